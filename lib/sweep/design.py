"""The design of a search: the trials of a space, frozen in plan.json before anything runs."""

import dataclasses
import hashlib
import itertools
import json
from pathlib import Path
from typing import Annotated, Literal

from torch.quasirandom import SobolEngine

from lib import config
from lib.command import BadInput
from lib.files import atomic_write, read_json, write_json

# below the largest by more than the champion's fresh seeds
Seed = Annotated[int, 0, 2**31 - 101]
SPACE = {
    "design": Literal["sobol", "grid"],
    "trials": config.Positive,  # of a Sobol sequence; a grid has as many as its choices give
    "seed": Seed,  # of the design
    "seeds": tuple[Seed, ...],  # of training; a trial's score is the mean over them
    "rungs": tuple[config.Positive, ...],  # epochs
    "champion_seeds": Annotated[int, 1, 100],
    "finalists": config.Positive,  # NUM_FINALISTS where a space does not name it
}
NUM_FINALISTS = 3
# the search sets them, or scores could not be compared across them
FIXED_KEYS = ("name", "seed", "epochs", "data_dir", "limit_valid", "num_folds", "fold", "views")
KINDS = "log: [low, high], range: [low, high] or choice: [...], on a grid choice: [...]"


def freeze(folder: Path, space_path, config_path, overrides: list[str]) -> None:
    """Write config.yaml and plan.json of a search, once. Raises BadInput where another plan stands
    there.
    """
    for key in FIXED_KEYS[:3]:
        if key in config.parse_overrides(overrides):
            raise BadInput(f"{key}: the search sets names, seeds (by seeds) and epochs (by rungs)")
    space = read_space(space_path)
    base = config.load_config(config_path, overrides)
    base = dataclasses.replace(base, epochs=space["rungs"][-1])
    config_text = config.dump_config(base)
    plan = space | {"trials": name_trials(space, base, space_path)}
    plan["sha256"] = plan_digest(plan, config_text)
    path = folder / "plan.json"
    if path.is_file():
        if read_json(path)["sha256"] != plan["sha256"]:
            raise BadInput(f"{folder} holds another plan: a plan is frozen, take another --name")
        return
    for kind in ("logs", "failed"):
        (folder / kind).mkdir(parents=True, exist_ok=True)
    with atomic_write(folder / "config.yaml", "w") as file:
        file.write(config_text)
    write_json(path, plan)


def read_space(path) -> dict:
    """A space with typed values, `ranges` as they stand there. Raises BadInput for keys that are
    unknown or missing, and for values that are not allowed.
    """
    space = {"finalists": NUM_FINALISTS} | config.read_yaml(path)
    odd = sorted({*SPACE, "ranges"} ^ set(space))
    if odd:
        raise BadInput(f"{path}: unknown or missing: {', '.join(odd)} (assets/space.yaml has all)")
    for key, kind in SPACE.items():
        space[key] = config.coerce(f"{path}: {key}", space[key], kind)
    for key in ("rungs", "seeds"):
        if not space[key] or list(space[key]) != sorted(set(space[key])):
            raise BadInput(f"{path}: {key} must be one or more numbers that rise")
    return space


def name_trials(space: dict, base: config.Config, source) -> dict[str, dict]:
    """The trials of a space by name, as plain values, each checked against the config."""
    trials = {}
    for number, point in enumerate(draw_points(space, base, source)):
        values = dict(zip(space["ranges"], point, strict=True))
        typed = {key: config.plain(value) for key, value in values.items()}  # as train.py gets them
        config.config_from_dict(base.as_dict() | typed, source=f"{source}: trial {number}")
        trials[f"t{number:03}"] = values
    return trials


def draw_points(space: dict, base: config.Config, source) -> list[tuple]:
    """The values of each trial, in the order of the ranges: `trials` points of a Sobol sequence, or
    all of a grid. Raises BadInput for a range that is not of KINDS.
    """
    ranges, is_grid = space["ranges"], space["design"] == "grid"
    if not isinstance(ranges, dict) or not ranges:
        raise BadInput(f"{source}: ranges must hold config keys, each with a range")
    config.refuse_unknown(ranges, f"{source}: ranges")
    fixed = set(ranges).intersection(FIXED_KEYS)
    if fixed:
        reason = "the search sets it, or scores could not be compared"
        raise BadInput(f"{source}: {fixed.pop()} cannot be searched over: {reason}")
    engine = SobolEngine(len(ranges), scramble=True, seed=space["seed"])
    draws = engine.draw(space["trials"]).T.tolist()
    columns = []
    for (key, spec), xs in zip(ranges.items(), draws, strict=True):
        try:
            values = [value_at(spec, x, getattr(base, key)) for x in xs]
            columns.append(spec["choice"] if is_grid else values)
        except Exception:
            raise BadInput(f"{source}: {key} is {spec!r}, it must be {KINDS}") from None
    return list(itertools.product(*columns) if is_grid else zip(*columns, strict=True))


def value_at(spec: dict, x: float, like):
    """The value at `x` from 0 to 1 of a range: whole where the config wants it whole, else in four
    digits for people.
    """
    ((kind, bounds),) = spec.items()
    if kind == "choice":
        return bounds[int(x * len(bounds))]
    low, high = map(float, bounds)
    if kind == "log":
        value = low * (high / low) ** x
    elif kind == "range":
        value = low + (high - low) * x
    else:
        raise LookupError(kind)
    return round(value) if isinstance(like, int) else float(f"{value:.4g}")


def plan_digest(plan: dict, config_text: str) -> str:
    """SHA-256 over a plan and the config that its trials vary."""
    content = [plan | {"sha256": None}, config_text]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
