"""Checkpoints: all that the next step, or a prediction elsewhere, depends on. They hold tensors
and plain values alone.
"""

import hashlib
import io
import os
import pickle
import warnings
import zipfile
from pathlib import Path

import torch
from torch import nn

from lib.command import BadInput, one_line, say
from lib.config import ADDED_KEYS, Config, config_from_dict
from lib.files import atomic_write
from lib.models import build_model, find_state, fit_state, logit_layer

KIND = "pcam-checkpoint"
SCHEMA = 4  # from 4 on Muon works in blocks, and batch norms add in another order: other bits
PREVIOUS = "previous.pt"  # the last.pt before the newest one; removed when the run is over

HEADER = ("kind", "schema", "sha256", "weights_sha256")
FIELDS = (
    "config",
    "model",  # raw weights after the last step
    "averaged",  # their moving average, which is evaluated; None where there is none
    "optimizer",  # None in best.pt
    "float32_logits",  # whether the last layer computes in float32; False before schema 3
    "progress",  # epoch, step, and what the schedule and the choice of the best epoch remember
    "metrics",  # scores of the evaluated weights on validation
    "data",  # SHA-256 of the data files
    "preprocessing",  # mean and std of the channels
    "threshold",  # on the probability: from here on a patch is called positive
    "calibration",  # temperature, offset, number of views; or None
    "reference",  # feature statistics of the training data, by which drift is noticed; or None
)


def update_with_tensor(digest, heading: str, tensor: torch.Tensor, end: str = "") -> None:
    """Add a heading, and dtype, shape and bytes of a tensor, to a digest."""
    tensor = tensor.detach().cpu().contiguous()
    digest.update(f"{heading}{tensor.dtype} {tuple(tensor.shape)}{end}".encode())
    digest.update(tensor.reshape(-1).view(torch.uint8).numpy())


def weights_sha256(state: dict[str, torch.Tensor]) -> str:
    """SHA-256 over a model's state, names sorted: name, dtype, shape and bytes of each tensor."""
    digest = hashlib.sha256()
    for name in sorted(state):
        update_with_tensor(digest, f"{name} ", state[name], end="\n")
    return digest.hexdigest()


def state_sha256(value, digest=None) -> str:
    """SHA-256 over nested dicts and lists of tensors and plain values."""
    digest = digest or hashlib.sha256()
    if isinstance(value, torch.Tensor):
        update_with_tensor(digest, "", value)
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


def evaluated_weights(checkpoint: dict) -> dict:
    """The weights that are evaluated: the averaged ones where there are any, else the raw ones."""
    return checkpoint["averaged"] or checkpoint["model"]


def save_checkpoint(path, checkpoint: dict, keep_previous: bool = False) -> None:
    """Write the fields of a checkpoint atomically, with their schema and a checksum over them.

    With `keep_previous` an existing file becomes previous.pt, so that one of the two is whole at
    any time.
    """
    path = Path(path)
    fields = {name: checkpoint[name] for name in FIELDS if name in checkpoint}
    header = {
        "kind": KIND,
        "schema": SCHEMA,
        "sha256": state_sha256(fields),
        "weights_sha256": weights_sha256(evaluated_weights(checkpoint)),
    }
    buffer = io.BytesIO()  # torch's own writer reports a full disk as an internal error
    torch.save(header | fields, buffer)
    with atomic_write(path) as file:
        file.write(buffer.getbuffer())
        if keep_previous and path.exists():
            os.replace(path, path.with_name(PREVIOUS))


def load_pickle_free(path) -> object:
    """The object that torch.save wrote to `path`: tensors and plain values, on the CPU. Code in the
    file is never run.

    All weights are read here. Raises BadInput for any file that torch cannot read so.
    """
    path = Path(path)
    if not path.is_file():
        what = "is a folder: name a file in it" if path.is_dir() else "does not exist"
        raise BadInput(f"{path} {what}")
    if path.suffix == ".safetensors":
        raise BadInput(f"{path}: save its tensors with torch.save as a state dict, which is read")
    try:
        # torch does not compare the zip's checksums: with a flipped bit it loads another weight
        damaged = zipfile.ZipFile(path).testzip() if zipfile.is_zipfile(path) else None
        if damaged:
            raise ValueError(f"{damaged} does not match its checksum")
        with warnings.catch_warnings(action="ignore"):  # torch's remarks about old files
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:  # whose text advises to run the code
        raise BadInput(
            f"{path} is not a readable checkpoint: it holds code besides tensors and numbers, or is"
            " no file of torch.save"
        ) from None
    except Exception as error:  # torch does not document what it raises for a cut file
        raise BadInput(
            f"{path} is not a readable checkpoint, it may be cut off ({one_line(error)[:200]})"
        ) from None


def is_own(loaded) -> bool:
    """Whether a loaded object is a checkpoint of this program."""
    return isinstance(loaded, dict) and loaded.get("kind") == KIND


def load_checkpoint(path) -> dict:
    """The fields of a checkpoint and the `weights_sha256` of its evaluated weights. Fields and
    config keys that an older schema lacks are filled in.

    Raises BadInput for a file that is cut, altered, foreign, of a newer schema, or that holds code.
    """
    loaded = load_pickle_free(path)
    if not is_own(loaded):
        raise BadInput(
            f"{path} is not a checkpoint of this program, such as best.pt of a run; if it holds a"
            f" state dict, train.py weights={path} starts from it"
        )
    schema, checksum = loaded["schema"], loaded["sha256"]
    if schema not in range(1, SCHEMA + 1):
        raise BadInput(f"{path} has the schema {schema}, this program reads 1 to {SCHEMA}")
    checkpoint = {name: value for name, value in loaded.items() if name not in HEADER}
    if checksum != state_sha256(checkpoint):
        raise BadInput(f"{path} is damaged: its content does not match its checksum")
    checkpoint["float32_logits"] = bool(checkpoint.get("float32_logits"))
    checkpoint["config"] = ADDED_KEYS | checkpoint["config"]
    checkpoint["weights_sha256"] = weights_sha256(evaluated_weights(checkpoint))
    return checkpoint


def load_weights(path) -> object:
    """The state dict to start a training from: the evaluated weights of this program's checkpoint,
    or what another program saved, which is not checked here.
    """
    loaded = load_pickle_free(path)
    return evaluated_weights(load_checkpoint(path)) if is_own(loaded) else find_state(loaded)


def newest_checkpoint(run: Path | None) -> tuple[dict | None, Path | None]:
    """(checkpoint, path) to resume a run from: last.pt or, with a warning where that is damaged,
    previous.pt. (None, None) for a run that has neither, and for a new run.

    Raises BadInput where all of them are damaged.
    """
    names = ("last.pt", PREVIOUS) if run else ()
    paths = [run / name for name in names if (run / name).exists()]
    for path in paths:
        try:
            return load_checkpoint(path), path
        except BadInput as error:
            if path == paths[-1]:
                raise
            say(f"warning: {error}; going on from {paths[-1]}")
    return None, None


def checkpoint_path(ckpt) -> Path:
    """The file that `--ckpt` names: best.pt of a run folder, which may be given by its name under
    runs/, or the file itself. Raises BadInput for a folder without a best.pt.
    """
    path = Path(ckpt)
    if not path.exists() and Path("runs", ckpt).is_dir():
        path = Path("runs", ckpt)
    if not path.is_dir():
        return path
    best = path / "best.pt"
    if not best.is_file():
        raise BadInput(
            f"{path} has no best.pt: no epoch of that run was finished, or it is no run folder"
        )
    return best


def load_model(ckpt) -> tuple[nn.Module, Config, dict]:
    """(model, config, checkpoint) of a run or file. The model has the evaluated weights and is in
    evaluation mode.

    Raises BadInput as `checkpoint_path` and `load_checkpoint` do, and for a config that cannot be
    used.
    """
    path = checkpoint_path(ckpt)
    checkpoint = load_checkpoint(path)
    try:
        cfg = config_from_dict(checkpoint["config"], source="its config")
    except BadInput as error:
        raise BadInput(f"{path}: {error}") from None
    model = build_model(cfg)
    fit_state(model, evaluated_weights(checkpoint), path)
    logit_layer(model).is_float32 = checkpoint["float32_logits"]
    return model.eval().requires_grad_(False), cfg, checkpoint


def warn_of_views(calibration: dict | None, views: int) -> None:
    """Print a warning where a calibration was fitted to another number of views."""
    fitted_views = (calibration or {}).get("views", views)
    if fitted_views != views:
        say(
            f"warning: probabilities and threshold were set for {fitted_views} view(s),"
            f" not for {views}"
        )
