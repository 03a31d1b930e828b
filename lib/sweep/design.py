"""The design of a search: the trials of a space, frozen in plan.json before anything runs."""

import dataclasses
import hashlib
import itertools
import json
import re
from pathlib import Path
from typing import Annotated, Literal

from torch.quasirandom import SobolEngine

from lib import config
from lib.command import BadInput, nearest
from lib.files import atomic_write, file_digest, read_json, write_json

# below the largest by more than the champion's fresh seeds
Seed = Annotated[int, 0, 2**31 - 101]
SPACE = {
    "design": Literal["sobol", "grid"],
    "trials": config.Positive,
    "seed": Seed,  # of the design
    "seeds": tuple[Seed, ...],  # of training; a trial's score is the mean over them
    "rungs": tuple[config.Positive, ...],  # epochs
    "champion_seeds": Annotated[int, 1, 100],
    "finalists": config.Positive,  # may be left out
}
# the search sets them, or scores could not be compared across them
FIXED_KEYS = ("name", "seed", "epochs", "data_dir", "limit_valid", "num_folds", "fold", "views")
KINDS = {
    "sobol": "log: [low, high], range: [low, high] or choice: [...]",
    "grid": "choice: [...]",
}


def freeze(folder: Path, space_path, config_path, overrides: list[str]) -> dict:
    """Write config.yaml and plan.json of a search, once. Raises BadInput where another plan stands
    there.
    """
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]{0,39}", folder.name):
        allowed = "1 to 40 letters, digits, - and _ (runs are named after it)"
        raise BadInput(f"{folder.name!r} is no name of a search: {allowed}")
    for key in config.parse_overrides(overrides):
        if key in ("name", "seed", "epochs"):
            raise BadInput(f"{key}: the search sets names, seeds (by seeds) and epochs (by rungs)")
    plan = read_space(config.read_yaml(space_path), space_path)
    base = config.load_config(config_path, overrides)
    base = dataclasses.replace(base, epochs=plan["rungs"][-1])
    plan = build_plan(folder.name, plan, base, space_path)
    path = folder / "plan.json"
    if path.is_file():
        if read_json(path) != plan:
            raise BadInput(f"{folder} holds another plan: a plan is frozen, take another --name")
        return plan
    folder.mkdir(parents=True, exist_ok=True)
    with atomic_write(folder / "config.yaml", "w") as file:
        file.write(config.dump_config(base))
    write_json(path, plan)
    return plan


def read_space(space: dict, source) -> dict:
    """The keys of a space with typed values, `ranges` as they stand there. Raises BadInput for keys
    that are unknown or missing, and for values that are not allowed.
    """
    required = {*SPACE, "ranges", "finalists"}
    for key in sorted(required ^ {*space, "finalists"}):
        problem = "unknown" if key in space else "missing"
        raise BadInput(f"{source}: {problem} key {key!r}{nearest(key, required)}")
    typed = {}
    for key, kind in SPACE.items():
        if key in space:
            typed[key] = config.coerce(f"{source}: {key}", space[key], kind)
    rungs, seeds = typed["rungs"], typed["seeds"]
    if not rungs or not seeds or sorted(set(rungs)) != list(rungs) or len(set(seeds)) < len(seeds):
        raise BadInput(f"{source}: rungs must rise, seeds must differ, and each needs one or more")
    return typed | {"ranges": space["ranges"]}


def build_plan(name: str, plan: dict, base: config.Config, source) -> dict:
    """The trials of a space as plain values, each checked against the config, with a SHA-256 over
    the whole.
    """
    points = draw_points(plan, base, source)
    if len(points) != plan["trials"]:
        sentence = f"trials is {plan['trials']}, but the grid has {len(points)} points"
        raise BadInput(f"{source}: {sentence}")
    trials = {}
    for number, point in enumerate(points):
        values = dict(zip(plan["ranges"], point, strict=True))
        typed = {key: config.plain(value) for key, value in values.items()}  # as train.py gets them
        config.config_from_dict(base.as_dict() | typed, source=f"{source}: trial {number}")
        trials[f"t{number:03}"] = values
    config_sha256 = hashlib.sha256(config.dump_config(base).encode()).hexdigest()
    plan = plan | {"config_sha256": config_sha256, "trials": trials, "name": name}
    plan = json.loads(json.dumps(plan))
    return plan | {"sha256": plan_digest(plan)}


def draw_points(plan: dict, base: config.Config, source) -> list[tuple]:
    """The values of each trial, in the order of the ranges. Raises BadInput for a range that is not
    of KINDS.
    """
    ranges, design = plan["ranges"], plan["design"]
    if not isinstance(ranges, dict) or not ranges:
        raise BadInput(f"{source}: ranges must hold config keys, each with a range")
    config.refuse_unknown(ranges, f"{source}: ranges")
    engine = SobolEngine(len(ranges), scramble=True, seed=plan["seed"])
    draws = engine.draw(plan["trials"]).T.tolist()
    columns = []
    for (key, spec), xs in zip(ranges.items(), draws, strict=True):
        if key in FIXED_KEYS:
            reason = "the search sets it, or scores could not be compared"
            raise BadInput(f"{source}: {key} cannot be searched over: {reason}")
        try:
            values = [value_at(spec, x, getattr(base, key)) for x in xs]
            columns.append(values if design == "sobol" else spec["choice"])
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError):
            allowed = f"on a {design} design it must be {KINDS[design]}"
            raise BadInput(f"{source}: {key} is {spec!r}, {allowed}") from None
    combine = zip if design == "sobol" else itertools.product
    return list(combine(*columns))


def value_at(spec: dict, x: float, like):
    """The value at `x` from 0 to 1 of a range: whole where the config wants it whole, else in four
    digits for people.
    """
    ((kind, bounds),) = spec.items()
    if kind == "choice":
        return bounds[min(int(x * len(bounds)), len(bounds) - 1)]
    low, high = sorted(map(float, bounds))
    if kind == "log":
        value = low * (high / low) ** x
    elif kind == "range":
        value = low + (high - low) * x
    else:
        raise LookupError(kind)
    return round(value) if isinstance(like, int) else float(f"{value:.4g}")


def plan_digest(plan: dict) -> str:
    hashed = {key: value for key, value in plan.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(hashed, sort_keys=True).encode()).hexdigest()


def load_plan(folder: Path) -> dict:
    """The plan of a search. Raises BadInput where there is none, or the plan or its config was
    changed afterwards.
    """
    if not (folder / "plan.json").is_file():
        raise BadInput(f"{folder} is no planned search: it has no plan.json (sweep.py plan SPACE)")
    plan = read_json(folder / "plan.json")
    digests = [plan.get("sha256"), plan.get("config_sha256")]
    if digests != [plan_digest(plan), file_digest(folder / "config.yaml")]:
        raise BadInput(f"{folder}: plan.json or config.yaml was changed after the plan was frozen")
    name = plan.get("name", folder.name)
    if name != folder.name:  # two folders of one plan would train the same runs
        reason = f"was planned as {name}, after which its runs are called: give it that name again"
        raise BadInput(f"{folder} {reason}")
    return plan
