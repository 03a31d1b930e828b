"""The design of a search: the trials of a space, frozen in plan.json before anything runs."""

import dataclasses
import hashlib
import itertools
import json
import math
import re
from pathlib import Path
from typing import Annotated, Literal

from torch.quasirandom import SobolEngine

from lib import config
from lib.command import BadInput, nearest
from lib.files import atomic_write, file_digest, read_json, write_json

MAX_SEED = 2**31 - 101  # below the largest by more than the champion's fresh seeds
SPACE = {
    "design": Literal["sobol", "grid"],
    "trials": config.Positive,
    "seed": config.Natural,  # of the design
    "seeds": tuple[config.Natural, ...],  # of training; a trial's score is the mean over them
    "rungs": tuple[config.Positive, ...],  # epochs
    "champion_seeds": Annotated[int, 1, 100],
}
FINALISTS = {"finalists": config.Positive}  # may be left out
# the search sets them, or scores could not be compared across them
FIXED_KEYS = ("name", "seed", "epochs", "data_dir", "limit_valid", "num_folds", "fold", "views")
KINDS = {
    "sobol": "log: [low, high], range: [low, high] or choice: [...]",
    "grid": "choice: [...]",
}


def build_plan(name: str, space: dict, base: config.Config, source) -> dict:
    """The trials of a space as plain values, each checked against the config, with a SHA-256 over
    the whole.
    """
    keys = SPACE | (FINALISTS if "finalists" in space else {})
    for key in space.keys() ^ {*keys, "ranges"}:
        problem = "unknown" if key in space else "missing"
        raise BadInput(f"{source}: {problem} key {key!r}{nearest(key, [*SPACE, *FINALISTS])}")
    plan = {key: config.coerce(f"{source}: {key}", space[key], keys[key]) for key in keys}
    require_order(plan, source)
    plan["ranges"] = space["ranges"]
    ranges = read_ranges(plan["ranges"], plan["design"], source)
    points = draw_points(plan, list(ranges.values()))
    if len(points) != plan["trials"]:
        sentence = f"trials is {plan['trials']}, but the grid has {len(points)} points"
        raise BadInput(f"{source}: {sentence}")
    plan["config_sha256"] = hashlib.sha256(config.dump_config(base).encode()).hexdigest()
    plan |= {"trials": {}, "name": name}
    for number, point in enumerate(points):
        values = {}
        for (key, (kind, bounds)), x in zip(ranges.items(), point, strict=True):
            values[key] = value_at(kind, bounds, x, getattr(base, key))
        typed = {key: config.plain(value) for key, value in values.items()}  # as train.py gets them
        config.config_from_dict(base.as_dict() | typed, source=f"{source}: trial {number}")
        plan["trials"][f"t{number:03}"] = values
    plan = json.loads(json.dumps(plan))
    return plan | {"sha256": plan_digest(plan)}


def require_order(plan: dict, source) -> None:
    """Raise BadInput for rungs that do not rise, and for seeds that are none or not different."""
    rungs, seeds = plan["rungs"], plan["seeds"]
    if not rungs or list(rungs) != sorted(set(rungs)) or not seeds:
        raise BadInput(f"{source}: rungs must be rising numbers of epochs, and seeds at least one")
    if len(set(seeds)) < len(seeds) or max(*seeds, plan["seed"]) > MAX_SEED:
        raise BadInput(f"{source}: seeds must differ, and be at most {MAX_SEED:,}")


def read_ranges(ranges, design: str, source) -> dict[str, tuple[str, list]]:
    """(kind, bounds) of each key of a space: `{log: [low, high]}`, `{range: [low, high]}` or
    `{choice: [...]}`, a grid's only kind. Raises BadInput for what is none.
    """
    if not isinstance(ranges, dict) or not ranges:
        raise BadInput(f"{source}: ranges must hold config keys, each with a range")
    config.refuse_unknown(ranges, f"{source}: ranges")
    parsed = {}
    for key, spec in ranges.items():
        if key in FIXED_KEYS:
            reason = "the search sets it, or scores could not be compared"
            raise BadInput(f"{source}: {key} cannot be searched over: {reason}")
        is_pair = isinstance(spec, dict) and len(spec) == 1
        kind, bounds = next(iter(spec.items())) if is_pair else ("", None)
        fits = kind in KINDS[design] and isinstance(bounds, list) and len(bounds) > 0
        if fits and kind != "choice":
            number = Annotated[float, -math.inf]
            bounds = [config.coerce(f"{source}: {key}", bound, number) for bound in bounds]
            fits = len(bounds) == 2 and bounds[0] < bounds[1]
            fits = fits and (kind == "range" or bounds[0] > 0)
        if not kind or not fits:
            allowed = f"on a {design} design it must be {KINDS[design]}"
            raise BadInput(f"{source}: {key} is {spec!r}, {allowed}")
        parsed[key] = (kind, bounds)
    return parsed


def draw_points(plan: dict, ranges: list[tuple[str, list]]) -> list[list[float]]:
    """A point from 0 to 1 in each range for each trial."""
    if plan["design"] == "sobol":
        engine = SobolEngine(len(ranges), scramble=True, seed=plan["seed"])
        return engine.draw(plan["trials"]).tolist()
    axes = []
    for _, choices in ranges:
        axes.append([(place + 0.5) / len(choices) for place in range(len(choices))])
    return list(itertools.product(*axes))


def value_at(kind: str, bounds: list, x: float, like):
    """The value at `x` from 0 to 1 of a range: whole where the config wants it whole, else in four
    digits for people.
    """
    if kind == "choice":
        return bounds[min(int(x * len(bounds)), len(bounds) - 1)]
    low, high = bounds
    value = low * (high / low) ** x if kind == "log" else low + (high - low) * x
    return round(value) if isinstance(like, int) else float(f"{value:.4g}")


def plan_digest(plan: dict) -> str:
    hashed = {key: value for key, value in plan.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(hashed, sort_keys=True).encode()).hexdigest()


def freeze(folder: Path, space_path, config_path, overrides: list[str]) -> dict:
    """Write config.yaml and plan.json of a search, once. Raises BadInput where another plan stands
    there.
    """
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]{0,39}", folder.name):
        allowed = "1 to 40 letters, digits, - and _ (runs are named after it)"
        raise BadInput(f"{folder.name!r} is no name of a search: {allowed}")
    space = config.read_yaml(space_path)
    for pair in overrides:
        if pair.partition("=")[0] in ("name", "seed", "epochs"):
            raise BadInput(f"{pair}: the search sets names, seeds (by seeds) and epochs (by rungs)")
    rungs = config.coerce("rungs", space.get("rungs", []), SPACE["rungs"])
    base = config.load_config(config_path, overrides)
    base = dataclasses.replace(base, epochs=max(rungs, default=1))
    plan = build_plan(folder.name, space, base, space_path)
    if (folder / "plan.json").is_file():
        if read_json(folder / "plan.json") != plan:
            raise BadInput(f"{folder} holds another plan: a plan is frozen, take another --name")
        return plan
    folder.mkdir(parents=True, exist_ok=True)
    with atomic_write(folder / "config.yaml", "w") as file:
        file.write(config.dump_config(base))
    write_json(folder / "plan.json", plan)
    return plan


def load_plan(folder: Path) -> dict:
    """The plan of a search. Raises BadInput where there is none, or the plan or its config was
    changed afterwards.
    """
    if not (folder / "plan.json").is_file():
        raise BadInput(f"{folder} is no planned search: it has no plan.json (sweep.py plan SPACE)")
    plan = read_json(folder / "plan.json")
    config_sha256 = file_digest(folder / "config.yaml")
    if plan.get("sha256") != plan_digest(plan) or config_sha256 != plan.get("config_sha256"):
        raise BadInput(f"{folder}: plan.json or config.yaml was changed after the plan was frozen")
    name = plan.get("name", folder.name)
    if name != folder.name:
        reason = f"was planned as {name}, after which its runs are called: give it that name again"
        raise BadInput(f"{folder} {reason}")
    return plan
