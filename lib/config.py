"""The configuration: a flat YAML file read into a typed, frozen dataclass. Values stand in
config.yaml, types stand here.
"""

import contextlib
import dataclasses
import hashlib
import json
import math
import os
import re
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import yaml

from lib.command import REPOSITORY, BadInput, expand_home, nearest
from lib.files import file_digest

DEFAULT_PATH = REPOSITORY / "config.yaml"
# Annotated[type, lowest, highest]: both bounds are allowed values, and the highest may be missing
Natural = Annotated[int, 0]
Positive = Annotated[int, 1]
NonNegative = Annotated[float, 0]
AboveZero = Annotated[float, 1e-12]
Share = Annotated[float, 0, 1]
Switch = Literal[True, False]
Place = typing.NewType("Place", str)  # a file or folder
# the reasons for which quarantine.csv may list a row
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
    "colour",
    "detail",
    "partial",
    "blank",
    "outlier",
    "misaligned",
]


@dataclass(frozen=True)
class Config:
    """Every parameter of a run; config.yaml says what each one means."""

    name: str
    seed: Annotated[int, 0, 2**31 - 1]

    data_dir: Place
    data_residence: Literal["auto", "disk", "host", "device"]
    limit_train: Natural
    limit_valid: Natural
    num_folds: Natural
    fold: Natural
    quarantine: Place
    quarantine_reasons: tuple[Reason, ...]
    balance: Literal["none", "loss", "sampler"]

    model: Literal["cnn", "p4m", "mlp", "resnet18", "densenet121"]
    cnn_width: Positive
    p4m_width: Positive
    mlp_hidden: tuple[Positive, ...]
    dropout: Annotated[float, 0, 0.95]
    weights: Place

    symmetries: Switch
    # with each of these the 32 pixels in the centre are 2 x 2 whole cells of the model's last grid
    crop: Literal[32, 64, 96]
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
    decay_factor: Share
    grad_clip: NonNegative
    label_smoothing: Annotated[float, 0, 0.5]
    ema_decay: Annotated[float, 0, 0.99999]
    precision: Literal["auto", "fp32", "bf16"]
    threads: Natural
    deterministic: Switch

    select_metric: Literal["auc", "pr_auc", "f2", "f1", "accuracy", "loss"]
    early_stop_epochs: Natural
    eval_batch_size: Positive
    views: Literal[1, 4, 8]
    threshold_rule: Literal["f2", "recall", "cost"]
    least_recall: Share
    false_negative_cost: NonNegative
    checkpoint_every_steps: Natural

    def as_dict(self) -> dict:
        """Plain values (tuples as lists), in the order of the declaration."""
        return json.loads(json.dumps(dataclasses.asdict(self)))

    def free_keys(self) -> list[str]:
        """The keys that do not change the weights of this run."""
        if self.schedule == "plateau" or self.early_stop_epochs:
            # training follows the last digits of a score, which depend on eval_batch_size
            return [key for key in FREE_KEYS if key != "eval_batch_size"]
        return list(FREE_KEYS)

    def identity(self) -> dict:
        """The keys that change the weights, with their values."""
        free = self.free_keys()
        return {key: value for key, value in self.as_dict().items() if key not in free}

    def identity_digest(self, data: dict[str, str], groups: str | None = None) -> str:
        """SHA-256 of the identity keys, the data's fingerprint and, with folds, `groups`, which is
        the SHA-256 of groups.csv. Equal digests promise equal weights.
        """
        values = self.identity()
        if self.num_folds and groups:
            values["groups"] = groups
        for key in ("quarantine", "weights"):  # the file's content counts, not its path
            if values[key]:
                values[key] = file_digest(values[key])
        text = json.dumps([values, data], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()


HINTS = typing.get_type_hints(Config, include_extras=True)
# keys that do not change the weights; the identity has the data's fingerprint in place of data_dir
FREE_KEYS = (
    "name",
    "data_dir",
    "data_residence",
    "eval_batch_size",
    "views",
    "threshold_rule",
    "least_recall",
    "false_negative_cost",
    "checkpoint_every_steps",
)
# keys that came later, each with the value that stands for it in runs and checkpoints made before
ADDED_KEYS = {"threshold_rule": "f2", "least_recall": 0.95, "false_negative_cost": 10.0}


def coerce(key: str, value, hint):
    """`value` as the type `hint`. Raises BadInput that names `key` where it cannot be one.

    Every value is parsed from its text: YAML reads `1e-3` as text, and a shell passes only text.
    """
    text = "" if value is None else str(value)
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is str:
        return text
    if hint is Place:
        return expand_home(os.path.expandvars(text))
    if origin is tuple:  # `256,128`, `[256, 128]` or a list from YAML
        words = re.findall(r"[^][,'\s]+", text)
        return tuple(coerce(key, word, arguments[0]) for word in words)
    if origin is Annotated:
        kind, low, high = (*arguments, math.inf)[:3]
        with contextlib.suppress(ValueError, OverflowError):
            number = float(text)
            if low <= number <= high and number == kind(number) < math.inf:
                return kind(number)
        allowed = f"{kind.__name__} from {low} to {high}"
    else:
        choices = {str(choice).lower(): choice for choice in arguments}
        if text.lower() in choices:
            return choices[text.lower()]
        allowed = f"one of {', '.join(choices)}{nearest(text, choices)}"
    raise BadInput(f"config key {key}: {text!r} is not allowed, it must be {allowed}")


def config_from_dict(values: dict, source="config") -> Config:
    """Build a Config from plain values. Raises BadInput for a key that is unknown, missing, or of
    the wrong type or value.
    """
    refuse_unknown(values, source)
    values = ADDED_KEYS | values
    missing = [key for key in HINTS if key not in values]
    if missing:
        raise BadInput(
            f"{source}: missing {', '.join(missing)} (config.yaml has every key with its meaning)"
        )
    cfg = Config(**{key: coerce(key, values[key], hint) for key, hint in HINTS.items()})
    _check_together(cfg)
    return cfg


def refuse_unknown(keys, source) -> None:
    """Raise BadInput for the first key that Config does not have, with the nearest that it has."""
    for key in keys:
        if key not in HINTS:
            suggestion = nearest(key, HINTS) or f" (allowed: {', '.join(HINTS)})"
            raise BadInput(f"{source}: unknown key {key!r}{suggestion}")


def _check_together(cfg: Config) -> None:
    """Raise BadInput for values that each type allows but that do not fit together, and for a name
    that no folder can have.
    """
    if cfg.shards.bit_count() != 1 or cfg.batch_size % cfg.shards:
        raise BadInput(
            f"batch_size {cfg.batch_size} must be a multiple of shards {cfg.shards}, a power of two"
        )
    if cfg.num_folds == 1 or cfg.fold >= max(cfg.num_folds, 1):
        raise BadInput(f"num_folds must be 0 or at least 2, and above fold, which is {cfg.fold}")
    if not re.fullmatch(r"[^/\\\0\n]{1,60}", cfg.name):
        raise BadInput(f"name {cfg.name!r} must be 1 to 60 characters without slashes")


def read_yaml(path) -> dict:
    """The mapping in a YAML file. Raises BadInput for a file that holds none."""
    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (yaml.YAMLError, ValueError) as error:  # bytes that are no text, or an impossible date
        raise BadInput(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise BadInput(f"{path} must hold `key: value` lines")
    return values


def plain(value) -> str:
    """A value as text, as it would be typed on the command line."""
    if isinstance(value, (list, tuple)):
        return ",".join(map(plain, value))
    if isinstance(value, bool):
        return str(value).lower()
    return "" if value is None else str(value)


def parse_overrides(pairs) -> dict[str, str]:
    """`["lr=1e-3", ...]` as a dict of text."""
    return dict(pair.split("=", 1) for pair in pairs)


def load_config(path=DEFAULT_PATH, overrides=()) -> Config:
    """The configuration of config.yaml. The YAML file at `path` replaces some of its values, and
    the `key=value` overrides replace values of both.
    """
    changes = parse_overrides(overrides)
    refuse_unknown(changes, "command line")
    return config_from_dict(read_yaml(DEFAULT_PATH) | read_yaml(path) | changes, source=str(path))


def dump_config(cfg: Config) -> str:
    """The configuration as YAML, from which `load_config` builds an equal one."""
    return yaml.safe_dump(
        cfg.as_dict(), sort_keys=False, default_flow_style=None, allow_unicode=True
    )


def change_free_keys(cfg: Config, overrides: list[str]) -> Config:
    """`cfg` with changes of its free keys. Raises BadInput for a key that changes the weights: that
    would be another run.
    """
    changed = config_from_dict(cfg.as_dict() | parse_overrides(overrides), "command line")
    for key in cfg.identity():
        if getattr(changed, key) != getattr(cfg, key):
            raise BadInput(
                f"{key} changes the weights and cannot be changed in a resumed run; these can:"
                f" {', '.join(cfg.free_keys())}"
            )
    return changed
