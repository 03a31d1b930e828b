"""The configuration: a flat YAML file read into a typed, frozen dataclass. Values stand in
config.yaml, types stand here.
"""

import contextlib
import dataclasses
import hashlib
import json
import math
import typing
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Annotated, Literal

import yaml

from lib.command import BadInput, nearest, one_line
from lib.files import file_digest

DEFAULT_PATH = Path(__file__).resolve().parent.parent / "config.yaml"
TINY = math.ulp(0.0)
MOST_ITEMS = 100  # of a key that takes several values
NOT_IDENTITY = "does not change the weights"
BOOLEANS = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}

Share = Annotated[float, 0, 1]  # a type and its bounds, both allowed
Natural = Annotated[int, 0]
Positive = Annotated[int, 1]
NonNegative = Annotated[float, 0]
AboveZero = Annotated[float, TINY]
Reason = Literal[
    "nan",
    "range",
    "black",
    "white",
    "constant",
    "flat",
    "scaled",
    "duplicate",
    "near_duplicate",
    "leak",
    "trigger",
    "label",
]


@dataclass(frozen=True)
class Config:
    """Every parameter of a run; config.yaml says what each one means."""

    name: Annotated[str, NOT_IDENTITY]
    seed: Annotated[int, 0, 2**31 - 1]

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
    dropout: Annotated[float, 0, 0.95]
    weights: str

    symmetries: bool
    crop: Annotated[int, 32, 96]
    crop_epochs: Natural
    shift: Annotated[int, 0, 48]
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
    decay_factor: Annotated[float, TINY, 1]
    grad_clip: NonNegative
    label_smoothing: Annotated[float, 0, 0.5]
    ema_decay: Annotated[float, 0, 0.99999]
    precision: Literal["fp32", "bf16"]
    threads: Annotated[int, 0, 1024]
    deterministic: bool

    select_metric: Literal["auc", "pr_auc", "f2", "f1", "accuracy", "loss"]
    early_stop_epochs: Natural
    eval_batch_size: Annotated[int, 1, NOT_IDENTITY]
    views: Annotated[Literal[1, 8], NOT_IDENTITY]
    threshold_rule: Annotated[Literal["f2", "recall", "cost"], NOT_IDENTITY]
    least_recall: Annotated[float, 0, 1, NOT_IDENTITY]
    false_negative_cost: Annotated[float, 0, NOT_IDENTITY]
    checkpoint_every_steps: Annotated[int, 0, NOT_IDENTITY]

    def identity(self) -> dict:
        """The keys that change the weights."""
        # then the score, and what moves it, reaches the weights
        listens = self.schedule == "plateau" or self.early_stop_epochs
        counted = ("eval_batch_size",) if listens else ()
        free = {
            key
            for key, hint in HINTS.items()
            if NOT_IDENTITY in typing.get_args(hint) and key not in counted
        }
        return {key: value for key, value in self.as_dict().items() if key not in free}

    def identity_digest(self, data: dict[str, str], groups: str | None = None) -> str:
        """Hex digest of the identity keys, the data's fingerprint and, with folds, the SHA-256 of
        groups.csv: equal digests promise equal weights.
        """
        values = self.identity()
        if self.num_folds and groups:
            values["groups"] = groups
        for key in ("quarantine", "weights"):  # what is in the file counts, not where it lies
            if values[key]:
                values[key] = file_digest(values[key])
        return hashlib.sha256(json.dumps([values, data], sort_keys=True).encode()).hexdigest()

    def as_dict(self) -> dict:
        """Plain values (tuples as lists), in the order of the declaration."""
        return {
            k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(self).items()
        }


# keys that came later, each with the value that stands for it in runs and checkpoints made before
ADDED_KEYS = {"threshold_rule": "f2", "least_recall": 0.95, "false_negative_cost": 10.0}
HINTS = typing.get_type_hints(Config, include_extras=True)


def coerce(key, value, hint):
    """`value` as the declared type. YAML reads `1e-3` as text, and the shell hands over nothing but
    text: both are parsed.
    """
    kind, *extras = typing.get_args(hint) if typing.get_origin(hint) is Annotated else (hint,)
    if typing.get_origin(kind) is tuple:
        items = value.strip(" []").replace(",", " ").split() if isinstance(value, str) else value
        items = items if isinstance(items, (list, tuple)) else [items]
        if len(items) > MOST_ITEMS:
            raise BadInput(
                f"config key {key}: {len(items):,} values are too many, at most {MOST_ITEMS} are"
                " allowed"
            )
        return tuple(coerce(key, item, typing.get_args(kind)[0]) for item in items)
    if typing.get_origin(kind) is Literal:
        choices = {str(choice): choice for choice in typing.get_args(kind)}
        if str(value) in choices:  # a nan that is a number to YAML too
            return choices[str(value)]
        allowed = f"one of {', '.join(choices)}{nearest(value, choices)}"
    elif kind is bool:
        if str(value).lower() in BOOLEANS:
            return BOOLEANS[str(value).lower()]
        allowed = "true or false"
    elif kind is str:
        if value is None or (isinstance(value, (str, int, float)) and not isinstance(value, bool)):
            return "" if value is None else str(value)
        allowed = "text"
    else:
        least, most = ([extra for extra in extras if extra != NOT_IDENTITY] + [math.inf])[:2]
        low = "above 0" if least == TINY else f"at least {least}"
        allowed = (
            f"{'an integer' if kind is int else 'a number'}"
            f" {low}{f' and at most {most}' if most < math.inf else ''}"
        )
        with contextlib.suppress(ArithmeticError, ValueError):  # of what is no number
            number = Decimal(str(value))  # which keeps the last digits of a large integer
            if (
                math.isfinite(number)
                and not (kind is int and number % 1)
                and least <= kind(number) <= most
            ):
                return kind(number)
    raise BadInput(f"config key {key}: {value!r} is not allowed, it must be {allowed}")


def config_from_dict(values: dict, source="config") -> Config:
    """Build a Config from plain values. Raises BadInput for a key that is unknown, missing, or of
    the wrong type or value.
    """
    refuse_unknown(values, source)
    if missing := [key for key in HINTS if key not in values]:
        raise BadInput(
            f"{source}: missing {', '.join(missing)} (config.yaml has every key with its meaning)"
        )
    cfg = Config(**{key: coerce(key, values[key], hint) for key, hint in HINTS.items()})
    _check_together(cfg)
    return cfg


def refuse_unknown(keys, source) -> None:
    """Raise BadInput for the first key that no configuration has, with the nearest that it has."""
    if unknown := [key for key in keys if key not in HINTS]:
        hint = nearest(unknown[0], HINTS) or f" (allowed: {', '.join(HINTS)})"
        raise BadInput(f"{source}: unknown key {unknown[0]!r}{hint}")


def _check_together(cfg: Config) -> None:
    """What no key can tell alone."""
    if cfg.batch_size % cfg.shards:
        raise BadInput(f"batch_size {cfg.batch_size} must be a multiple of shards ({cfg.shards})")
    if cfg.shards & (cfg.shards - 1):
        raise BadInput(
            f"shards is {cfg.shards}, it must be a power of two, so that the sum is a full binary"
            " tree"
        )
    if cfg.num_folds == 1 or (cfg.fold and cfg.fold >= cfg.num_folds):
        raise BadInput(
            f"num_folds {cfg.num_folds} and fold {cfg.fold}: num_folds is 0 or at least 2, fold is"
            " below it"
        )
    if cfg.crop % 32:
        raise BadInput(
            f"crop {cfg.crop} must be 32, 64 or 96, so that the centre 32 pixels are whole cells of"
            " the model"
        )
    if (
        cfg.name != cfg.name.strip()
        or not cfg.name
        or any(c in cfg.name for c in "/\\\0\n")
        or len(cfg.name) > 60
    ):
        raise BadInput(
            f"name {cfg.name!r} must be 1 to 60 characters without slashes: it becomes part of a"
            " folder's name"
        )


def read_yaml(path) -> dict:
    """The mapping in a YAML file. Raises BadInput where there is none, or a key stands there
    twice.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
        values, root = yaml.safe_load(text), yaml.compose(text, yaml.SafeLoader)
    except FileNotFoundError:
        raise BadInput(f"no configuration at {path}") from None
    except (yaml.YAMLError, ValueError) as error:
        where = getattr(error, "problem_mark", None)
        problem = getattr(error, "problem", None) or one_line(error)
        raise BadInput(
            f"{path} is not valid YAML{f', line {where.line + 1}' if where else ''}: {problem}"
        ) from None
    if not isinstance(values, dict):
        raise BadInput(f"{path} must hold `key: value` lines")
    nodes = [root]
    for node in nodes:
        # of keys that stand twice safe_load keeps the last in silence
        if isinstance(node, yaml.MappingNode):
            keys = [key.value for key, _ in node.value]
            if twice := [key for key in keys if keys.count(key) > 1]:
                raise BadInput(f"{path}: the key {twice[0]!r} stands there twice")
            nodes += [value for _, value in node.value if value not in nodes]
    return values


def plain(value) -> str:
    """A value as it would be typed."""
    if isinstance(value, (list, tuple)):
        return ",".join(map(plain, value))
    return "" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def parse_overrides(pairs) -> dict[str, str]:
    """`["lr=1e-3", ...]` as a dict of text."""
    values = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals:
            raise BadInput(f"{pair!r} is not of the form key=value")
        if key.strip() in values:
            raise BadInput(f"{key.strip()} is given twice")
        values[key.strip()] = value
    return values


def load_config(path=DEFAULT_PATH, overrides=()) -> Config:
    """The configuration in the YAML file at `path`, with `key=value` overrides put over it."""
    changes = parse_overrides(overrides)
    refuse_unknown(changes, "command line")
    return config_from_dict(read_yaml(path) | changes, source=str(path))


def dump_config(cfg: Config) -> str:
    """The configuration as YAML that `load_config` reads back to an equal one."""
    return yaml.safe_dump(
        cfg.as_dict(), sort_keys=False, default_flow_style=None, allow_unicode=True
    )


def change_free_keys(cfg: Config, changes: dict[str, str]) -> Config:
    """`cfg` with keys changed that do not change the weights. Raises BadInput for any other: that
    would be another run.
    """
    changed = config_from_dict(cfg.as_dict() | changes, source="command line")
    before, after = cfg.identity(), changed.identity()
    for key in before:
        if before[key] != after[key]:
            free = ", ".join(key for key in cfg.as_dict() if key not in before)
            raise BadInput(
                f"{key} changes the weights and cannot be changed in a resumed run; these can:"
                f" {free}"
            )
    return changed
