"""Checkpoints: all that the next step, or an inference elsewhere, depends on, as tensors and plain
values alone.
"""

import hashlib
import io
import itertools
import math
import os
from pathlib import Path

import torch
from torch import nn

from lib.augment import PREPROCESSING
from lib.command import BadInput, say
from lib.config import ADDED_KEYS, Config, config_from_dict
from lib.features import NAMES
from lib.files import atomic_write
from lib.models import (
    Undrawn,
    build_model,
    find_state,
    fit_state,
    is_plain_tensor,
    is_state,
    load_pickle_free,
    logit_layer,
)

SCHEMA = 3
PREVIOUS = "previous.pt"  # what last.pt was before, while a run goes on
KIND = "pcam-checkpoint"
# of plain values: a stranger's checkpoint must be gone through in time
ITEM_BYTES, SPARE_BYTES, DEEPEST = 100, 1 << 20, 20
# of numbers that are divided by and reckoned with: beyond, float32 is left
SMALLEST, LARGEST = 1e-9, 1e9
# keys of a checkpoint and their types; what is None belongs to later work or does not apply
FIELDS = {
    "config": dict,
    "model": dict,  # raw weights after the last step
    "averaged": (dict, type(None)),  # their moving average: what is evaluated, where there is one
    "optimizer": (dict, type(None)),  # absent in best.pt
    # whether the last layer computes in float32; None, before schema 3: it does not
    "float32_logits": (bool, type(None)),
    # epoch, step, and what the schedule and the choice of the best have to remember
    "progress": dict,
    "metrics": dict,  # on validation, of the evaluated weights
    "data": dict,  # SHA-256 of the data files
    "preprocessing": dict,  # mean and std of the channels
    "threshold": float,  # of the decision, on probabilities
    # temperature and offset, for how many views, and what it is worth
    "calibration": (dict, type(None)),
    "reference": (dict, type(None)),  # statistics of the training data, to notice other data by
}


def weights_sha256(state: dict[str, torch.Tensor]) -> str:
    """SHA-256 over a model's state, names sorted: name, dtype, shape and bytes of each tensor."""
    digest = hashlib.sha256()
    for name in sorted(state, key=str):
        tensor = state[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def state_sha256(value, digest=None) -> str:
    """SHA-256 over nested dicts and lists of tensors and plain values."""
    digest = digest or hashlib.sha256()
    if isinstance(value, torch.Tensor):
        tensor = value.detach().cpu().contiguous()
        digest.update(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy())
    elif isinstance(value, dict):
        for key in sorted(value, key=str):
            digest.update(f"{key!r}:".encode())
            state_sha256(value[key], digest)
    elif isinstance(value, (list, tuple)):
        digest.update(f"[{len(value)}".encode())
        for item in value:
            state_sha256(item, digest)
    else:
        digest.update(repr(value).encode())
    return digest.hexdigest()


def evaluated(checkpoint: dict) -> dict:
    """The weights of a checkpoint that are evaluated: the averaged ones, where there are any."""
    return checkpoint["averaged"] or checkpoint["model"]


def build_checkpoint(cfg: Config, model: nn.Module, averaged: nn.Module | None, **fields) -> dict:
    """A checkpoint as a dict; `fields` give what FIELDS names besides config and weights."""
    return {
        "config": cfg.as_dict(),
        "model": dict(model.state_dict()),
        "averaged": averaged and dict(averaged.state_dict()),
        "float32_logits": logit_layer(model).is_float32,
        "optimizer": None,
        "preprocessing": PREPROCESSING,
        "threshold": 0.5,
        "calibration": None,
        "reference": None,
        **fields,
    }


def save_checkpoint(path, checkpoint: dict, keep_previous: bool = False) -> None:
    """Write a checkpoint atomically, with its schema and a checksum over all that it holds.

    With `keep_previous` the one that was there stays beside it as previous.pt, at every instant at
    least one is whole.
    """
    # torch's writer would turn a full disk into an error of its own
    path, buffer = Path(path), io.BytesIO()
    fields = {name: checkpoint[name] for name in FIELDS if name in checkpoint}
    header = {"kind": KIND, "schema": SCHEMA, "sha256": state_sha256(fields)}
    header["weights_sha256"] = weights_sha256(evaluated(checkpoint))  # since schema 2
    torch.save(header | fields, buffer)
    with atomic_write(path) as file:
        file.write(buffer.getbuffer())
        if keep_previous and path.exists():
            os.replace(path, path.with_name(PREVIOUS))


def newest_checkpoint(run: Path) -> tuple[dict, Path] | None:
    """The checkpoint to resume a run from: last.pt, or the one before it, with a warning, when
    last.pt is damaged.

    None where the run has none. Raises BadInput when those that it has are all damaged.
    """
    paths = [path for path in (run / "last.pt", run / PREVIOUS) if path.exists()]
    for path in paths:
        try:
            return load_checkpoint(path), path
        except BadInput as error:
            if path == paths[-1]:
                raise
            say(f"warning: {error}; going on from {paths[-1]}")
    return None


def load_checkpoint(path) -> dict:
    """Read a checkpoint. Raises BadInput for a file that is empty, cut, altered, foreign, newer, or
    that holds code.
    """
    checkpoint = load_pickle_free(path)
    if not isinstance(checkpoint, dict) or checkpoint.get("kind") != KIND:
        what = "train.py writes best.pt and last.pt"
        if is_state(find_state(checkpoint)):
            what = (
                f"it holds weights without the config of their model; train.py weights={path}"
                " starts from them"
            )
        raise BadInput(f"{path} is not a checkpoint of this program ({what})")
    del checkpoint["kind"]
    if _num_bytes(checkpoint, most := Path(path).stat().st_size + SPARE_BYTES) > most:
        raise BadInput(
            f"{path} is damaged: it holds what no checkpoint does, or more than fits into its file"
        )
    schema, checksum, digest = (
        checkpoint.pop(name, None) for name in ("schema", "sha256", "weights_sha256")
    )
    if not isinstance(schema, int) or not 1 <= schema <= SCHEMA:
        raise BadInput(f"{path} has the schema {str(schema):.40}, this program reads 1 to {SCHEMA}")
    for name, kind in FIELDS.items():
        if not isinstance(checkpoint.get(name), kind):
            raise BadInput(
                f"{path} is damaged: its {name} is"
                f" {'of a wrong type' if name in checkpoint else 'missing'}"
            )
    if not all(map(is_plain_tensor, evaluated(checkpoint).values())):
        raise BadInput(f"{path} is damaged: its weights are not all tensors")
    if checksum != state_sha256(checkpoint):
        raise BadInput(f"{path} is damaged: its content does not match its checksum")
    checkpoint["float32_logits"] = bool(checkpoint.get("float32_logits"))
    checkpoint["config"] = ADDED_KEYS | checkpoint["config"]
    checkpoint["weights_sha256"] = weights_sha256(evaluated(checkpoint))
    if schema > 1 and digest != checkpoint["weights_sha256"]:
        raise BadInput(f"{path} is damaged: its weights do not match their checksum")
    return checkpoint


def _num_bytes(value, most: float, depth: int = 0) -> float:
    """Roughly the bytes of nested dicts and lists of tensors and plain values, each counted as
    often as it is referred to. Counts no further than beyond `most`; infinite for anything else,
    and for what is nested deeply or in itself."""
    if isinstance(value, (dict, list, tuple)) and depth < DEEPEST:
        num_bytes = ITEM_BYTES
        for item in (
            itertools.chain(value.keys(), value.values()) if isinstance(value, dict) else value
        ):
            if num_bytes > most:
                break
            num_bytes += _num_bytes(item, most - num_bytes, depth + 1)
        return num_bytes
    if is_plain_tensor(value):
        return ITEM_BYTES + value.numel() * value.element_size()
    if isinstance(value, str):
        return ITEM_BYTES + len(value)
    return ITEM_BYTES if value is None or isinstance(value, (bool, int, float)) else math.inf


def _is_finite(value, *shape: int) -> bool:
    """Whether a value is a float that can be reckoned with or, of a shape, lists of such."""
    if not shape:
        return isinstance(value, float) and abs(value) < LARGEST
    return (
        isinstance(value, list)
        and len(value) == shape[0]
        and all(_is_finite(item, *shape[1:]) for item in value)
    )


def require_sound(checkpoint: dict, path) -> None:
    """Raise BadInput unless what prediction takes from a checkpoint, besides weights, is of the
    right kind.
    """
    preprocessing, calibration, reference = (
        checkpoint[name] for name in ("preprocessing", "calibration", "reference")
    )
    if (
        not all(_is_finite(preprocessing.get(name), 3) for name in ("mean", "std"))
        or min(preprocessing["std"]) < SMALLEST
    ):
        raise BadInput(
            f"{path} is damaged: its preprocessing must hold a mean and a std of three numbers"
        )
    if not 0 <= checkpoint["threshold"] <= 1:
        raise BadInput(
            f"{path} is damaged: its threshold {checkpoint['threshold']} is not between 0 and 1"
        )
    if calibration is not None and not all(
        _is_finite(calibration.get(name)) for name in ("temperature", "offset")
    ):
        raise BadInput(
            f"{path} is damaged: its calibration must hold a temperature and an offset, two numbers"
        )
    if calibration and calibration["temperature"] < SMALLEST:
        raise BadInput(
            f"{path} is damaged: the temperature {calibration['temperature']} is not above zero"
        )
    if calibration and (
        type(views := calibration.get("views", 1)) is not int or views not in (1, 8)
    ):
        raise BadInput(f"{path} is damaged: its calibration must be of 1 view or of 8")
    num, shapes = (
        len(NAMES),
        {"mean": 1, "deviation": 1, "inverse_correlation": 2, "limit": 0, "shift_limit": 0},
    )
    if reference is not None:
        if not all(
            _is_finite(reference.get(name), *[num] * depth) for name, depth in shapes.items()
        ):
            raise BadInput(
                f"{path} is damaged: its reference statistics must hold {', '.join(shapes)} of"
                f" {num} features"
            )
        inverse = torch.tensor(reference["inverse_correlation"], dtype=torch.float64)
        # below zero a distance would be no number
        variances = torch.linalg.eigvalsh(inverse + inverse.T).tolist()
        if (
            min(*reference["deviation"], *variances, reference["limit"], reference["shift_limit"])
            < SMALLEST
        ):
            raise BadInput(
                f"{path} is damaged: its reference statistics hold spreads or limits that are not"
                " above zero"
            )


def checkpoint_path(ckpt) -> Path:
    """The file that `--ckpt` means: a run folder's best.pt, or the file itself."""
    path = Path(ckpt)
    if not path.exists() and (Path("runs") / ckpt).is_dir():
        path = Path("runs") / ckpt
    if path.is_dir():
        if not (path / "best.pt").is_file():
            raise BadInput(
                f"{path} has no best.pt: no epoch of that run was finished, or it is no run folder"
            )
        path = path / "best.pt"
    return path


def warn_of_views(calibration: dict | None, views: int) -> None:
    """Say so where a calibration was fitted to another number of views."""
    if calibration and (fitted := calibration.get("views", views)) != views:
        say(f"warning: probabilities and threshold were set for {fitted} view(s), not for {views}")


def load_model(ckpt) -> tuple[nn.Module, Config, dict]:
    """The model of a checkpoint with the weights that were evaluated, ready to predict; its config;
    the checkpoint.
    """
    path = checkpoint_path(ckpt)
    checkpoint = load_checkpoint(path)
    require_sound(checkpoint, path)
    try:
        cfg = config_from_dict(checkpoint["config"], source="its config")
        # no memory is taken before every shape has been compared
        with torch.device("meta"), Undrawn():
            model = build_model(cfg)
    except BadInput as error:
        raise BadInput(f"{path}: {error}") from None
    fit_state(model, evaluated(checkpoint), path)
    logit_layer(model).is_float32 = checkpoint["float32_logits"]
    return model.to(memory_format=torch.channels_last).eval().requires_grad_(False), cfg, checkpoint
