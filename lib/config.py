"""The configuration: a flat YAML file read into a typed, frozen dataclass. Values stand in config.yaml, types stand here."""

import dataclasses
import hashlib
import json
import math
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import yaml

from lib.command import BadInput, nearest, one_line
from lib.logger import file_digest

DEFAULT_PATH = Path(__file__).resolve().parent.parent / "config.yaml"
NOT_IDENTITY = "does not change the weights"


@dataclass(frozen=True)
class Range:
    """Closed bounds of a number; `above` excludes its own value."""

    least: float = -math.inf
    most: float = math.inf
    above: float = -math.inf

    def __contains__(self, value):
        return self.least <= value <= self.most and value > self.above

    def __str__(self):
        low = f"above {self.above:.10g}" if self.above > -math.inf else f"at least {self.least:.10g}"
        return low if self.most == math.inf else f"{low} and at most {self.most:.10g}"


Share = Annotated[float, Range(0, 1)]
Natural = Annotated[int, Range(0)]
Positive = Annotated[int, Range(1)]
NonNegative = Annotated[float, Range(0)]
AboveZero = Annotated[float, Range(above=0)]
Reason = Literal[
    "nan", "range", "black", "white", "constant", "flat", "scaled", "duplicate", "near_duplicate", "leak", "trigger", "label"
]


@dataclass(frozen=True)
class Config:
    """Every parameter of a run; config.yaml says what each one means."""

    name: Annotated[str, NOT_IDENTITY]
    seed: Annotated[int, Range(0, 2**31 - 1)]

    data_dir: Annotated[str, NOT_IDENTITY]  # the fingerprint of the data stands in for it
    data_residence: Annotated[Literal["auto", "disk", "host", "device"], NOT_IDENTITY]
    limit_train: Natural
    limit_valid: Natural
    num_folds: Natural
    fold: Natural
    quarantine: str
    quarantine_reasons: tuple[Reason, ...]
    balance: Literal["none", "loss", "sampler"]

    model: Literal["cnn", "p4m", "mlp", "resnet18", "densenet121"]
    cnn_width: Positive
    p4m_width: Positive
    mlp_hidden: tuple[Positive, ...]
    dropout: Annotated[float, Range(0, 0.95)]
    weights: str

    symmetries: bool
    crop: Annotated[int, Range(32, 96)]
    crop_epochs: Natural
    shift: Annotated[int, Range(0, 48)]
    stain_jitter: NonNegative
    brightness_jitter: NonNegative

    epochs: Positive
    batch_size: Positive
    shards: Positive
    optimizer: Literal["muon", "adamw", "sgd"]
    lr: AboveZero
    weight_decay: NonNegative
    momentum: Share
    schedule: Literal["cosine", "step", "plateau", "constant"]
    warmup_epochs: NonNegative
    decay_epochs: Positive
    decay_factor: Annotated[float, Range(above=0, most=1)]
    grad_clip: NonNegative
    label_smoothing: Annotated[float, Range(0, 0.5)]
    ema_decay: Annotated[float, Range(0, 0.99999)]
    precision: Literal["fp32", "bf16"]
    threads: Annotated[int, Range(1, 1024)]
    deterministic: bool

    select_metric: Literal["auc", "pr_auc", "f2", "f1", "accuracy", "loss"]
    early_stop_epochs: Natural
    eval_batch_size: Annotated[int, Range(1), NOT_IDENTITY]
    views: Annotated[Literal[1, 8], NOT_IDENTITY]
    checkpoint_every_steps: Annotated[int, Range(0), NOT_IDENTITY]

    def identity(self) -> dict:
        """The keys that change the weights."""
        hints = typing.get_type_hints(Config, include_extras=True)
        listens = self.schedule == "plateau" or self.early_stop_epochs  # then the score, and what moves it, reaches the weights
        counted = ("eval_batch_size",) if listens else ()
        free = {k for k in hints if NOT_IDENTITY in getattr(hints[k], "__metadata__", ()) and k not in counted}
        return {k: v for k, v in self.as_dict().items() if k not in free}

    def identity_digest(self, data: dict[str, str]) -> str:
        """Hex digest of the identity keys and the data's fingerprint: equal digests promise equal weights."""
        values = self.identity()
        for key in ("quarantine", "weights"):  # what is in the file counts, not where it lies
            if values[key]:
                values[key] = file_digest(values[key])
        text = json.dumps([values, data], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    def as_dict(self) -> dict:
        """Plain values (tuples as lists), in the order of the declaration."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(self).items()}


def _strip(hint):
    """`Annotated[T, ...]` as (T, its Range or None)."""
    if typing.get_origin(hint) is Annotated:
        inner, extras = hint.__origin__, hint.__metadata__
        return inner, next((extra for extra in extras if isinstance(extra, Range)), None)
    return hint, None


def _coerce(key, value, hint):
    """`value` as the declared type. YAML reads `1e-3` as text, and the shell hands over nothing but text: both are parsed."""
    kind, bounds = _strip(hint)

    def refuse(allowed):
        raise BadInput(f"config key {key}: {value!r} is not allowed, it must be {allowed}")

    origin = typing.get_origin(kind)
    if origin is Literal:
        choices = typing.get_args(kind)
        found = [choice for choice in choices if str(choice) == str(value)]
        return found[0] if found else refuse("one of " + ", ".join(map(str, choices)) + nearest(value, map(str, choices)))
    if origin is tuple:
        if isinstance(value, str):
            value = value.strip().strip("[]").replace(",", " ").split()
        items = value if isinstance(value, (list, tuple)) else [value]
        # an unquoted nan in a YAML list is text, but .nan is a number: take it for the word that was meant
        items = ["nan" if isinstance(item, float) and math.isnan(item) else item for item in items]
        return tuple(_coerce(key, item, typing.get_args(kind)[0]) for item in items)
    if kind is bool:
        words = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
        word = str(value).lower()
        return words[word] if word in words else refuse("true or false")
    if kind is str:
        if value is None:
            return ""
        return str(value) if isinstance(value, (str, int, float)) and not isinstance(value, bool) else refuse("text")
    what = "an integer" if kind is int else "a number"
    try:
        if isinstance(value, bool):
            raise ValueError
        number = float(value)
        if kind is int:
            # through int() where it can be, so that a large integer keeps its last digits
            number = int(value) if not isinstance(value, float) and str(value).strip().lstrip("+-").isdigit() else number
            if number != int(number):
                raise ValueError
            number = int(number)
    except (TypeError, ValueError, OverflowError):
        refuse(what + (f" {bounds}" if bounds else ""))
    if not math.isfinite(number) or (bounds and number not in bounds):
        refuse(f"{what} {bounds}" if bounds else f"a finite {what.split()[1]}")
    return number


def config_from_dict(values: dict, source="config") -> Config:
    """Build a Config from plain values. Raises BadInput for a key that is unknown, missing, or of the wrong type or value."""
    hints = typing.get_type_hints(Config, include_extras=True)
    refuse_unknown(values, source)
    if missing := [key for key in hints if key not in values]:
        raise BadInput(f"{source}: missing {', '.join(missing)} (config.yaml has every key with its meaning)")
    cfg = Config(**{key: _coerce(key, values[key], hint) for key, hint in hints.items()})
    _check_together(cfg)
    return cfg


def refuse_unknown(keys, source) -> None:
    """Raise BadInput for the first key that no configuration has, with the nearest that it has."""
    allowed = [field.name for field in dataclasses.fields(Config)]
    for key in keys:
        if key not in allowed:
            hint = nearest(key, allowed) or f" (allowed: {', '.join(allowed)})"
            raise BadInput(f"{source}: unknown key {key!r}{hint}")


def _check_together(cfg: Config) -> None:
    """What no key can tell alone."""
    if cfg.batch_size % cfg.shards:
        raise BadInput(f"batch_size {cfg.batch_size} must be a multiple of shards ({cfg.shards})")
    if cfg.shards & (cfg.shards - 1):
        raise BadInput(f"shards is {cfg.shards}, it must be a power of two, so that the sum is a full binary tree")
    if cfg.num_folds == 1 or (cfg.fold and cfg.fold >= cfg.num_folds):
        raise BadInput(f"num_folds {cfg.num_folds} and fold {cfg.fold}: num_folds is 0 or at least 2, fold is below it")
    if cfg.crop % 32:
        raise BadInput(f"crop {cfg.crop} must be 32, 64 or 96, so that the centre 32 pixels are whole cells of the model")
    if cfg.name != cfg.name.strip() or not cfg.name or any(c in cfg.name for c in "/\\\0\n") or len(cfg.name) > 60:
        raise BadInput(f"name {cfg.name!r} must be 1 to 60 characters without slashes: it becomes part of a folder's name")


class _UniqueKeyLoader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):
    """A safe loader that refuses a repeated key; plain YAML lets the last one win in silence."""


def _construct_mapping(loader, node):
    keys = [loader.construct_object(key) for key, _ in node.value]
    for key in keys:
        if keys.count(key) > 1:
            raise BadInput(f"the key {key!r} stands there twice")
    return {key: loader.construct_object(value, deep=True) for key, (_, value) in zip(keys, node.value, strict=True)}


_UniqueKeyLoader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _construct_mapping)


def read_yaml(path) -> dict:
    """The mapping in a YAML file. Raises BadInput where there is none."""
    try:
        text = Path(path).read_text(encoding="utf-8")
        values = yaml.load(text, _UniqueKeyLoader)  # noqa: S506 (derived from the safe loader)
    except FileNotFoundError:
        raise BadInput(f"no configuration at {path}") from None
    except (yaml.YAMLError, ValueError, TypeError) as error:
        where = getattr(error, "problem_mark", None)
        problem = getattr(error, "problem", None) or one_line(error)
        raise BadInput(f"{path} is not valid YAML{f', line {where.line + 1}' if where else ''}: {problem}") from None
    except BadInput as error:
        raise BadInput(f"{path}: {error}") from None
    if not isinstance(values, dict):
        raise BadInput(f"{path} must hold `key: value` lines")
    return values


def parse_overrides(pairs) -> dict[str, str]:
    """`["lr=1e-3", ...]` as a dict of text."""
    values = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        key = key.strip()
        if not equals:
            raise BadInput(f"{pair!r} is not of the form key=value")
        if key in values:
            raise BadInput(f"{key} is given twice")
        values[key] = value
    return values


def load_config(path=DEFAULT_PATH, overrides=()) -> Config:
    """The configuration in the YAML file at `path`, with `key=value` overrides put over it."""
    changes = parse_overrides(overrides)
    refuse_unknown(changes, "command line")
    return config_from_dict(read_yaml(path) | changes, source=str(path))


def dump_config(cfg: Config) -> str:
    """The configuration as YAML that `load_config` reads back to an equal one."""
    return yaml.safe_dump(cfg.as_dict(), sort_keys=False, default_flow_style=None, allow_unicode=True)


def change_free_keys(cfg: Config, changes: dict[str, str]) -> Config:
    """`cfg` with keys changed that do not change the weights. Raises BadInput for any other: that would be another run."""
    refuse_unknown(changes, "command line")
    changed = config_from_dict(cfg.as_dict() | changes, source="command line")
    before, after = cfg.identity(), changed.identity()
    for key in before:
        if before[key] != after[key]:
            free = ", ".join(key for key in cfg.as_dict() if key not in before)
            raise BadInput(f"{key} changes the weights and cannot be changed in a resumed run; these can: {free}")
    return changed
