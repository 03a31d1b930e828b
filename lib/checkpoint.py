"""Checkpoints: all that the next step, or a prediction elsewhere, depends on. They hold tensors
and plain values alone.
"""

import hashlib
import io
import zipfile
from pathlib import Path

import torch
from torch import nn

from lib.command import BadInput, say
from lib.config import Config, config_from_dict
from lib.files import atomic_write
from lib.models import build_model, fit_state, logit_layer

KIND = "pcam-checkpoint"
# 4: Muon works in blocks, and batch norms add in another order; 5: bf16 leaves batch norms alone
SCHEMA = 5
FIELDS = (
    "config",
    "model",  # raw weights after the last step
    "averaged",  # their moving average, which is evaluated; None in older files without one
    "optimizer",  # None in best.pt
    "float32_logits",  # whether the last layer computes in float32; False before schema 3
    "progress",  # epoch, step, the best epoch with its scores, and what the schedule remembers
    "data",  # SHA-256 of the data files
    "preprocessing",  # mean and std of the channels
    "threshold",  # on the probability: from here on a patch is called positive
    "calibration",  # temperature, offset, number of views; or None
    "reference",  # feature statistics of the training data, by which drift is noticed; or None
)


def weights_sha256(state: dict[str, torch.Tensor]) -> str:
    """SHA-256 over a model's state, names sorted: name, dtype, shape and bytes of each tensor."""
    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def evaluated_weights(checkpoint: dict) -> dict:
    """The weights that are evaluated: the averaged ones where there are any, else the raw ones."""
    return checkpoint["averaged"] or checkpoint["model"]


def save_checkpoint(path, checkpoint: dict) -> None:
    """Write the fields of a checkpoint atomically, with their schema."""
    fields = {name: checkpoint.get(name) for name in FIELDS}
    buffer = io.BytesIO()  # torch's own writer reports a full disk as an internal error
    torch.save({"kind": KIND, "schema": SCHEMA, **fields}, buffer)
    with atomic_write(path) as file:
        file.write(buffer.getbuffer())


def load_pickle_free(path) -> dict:
    """The dict that torch.save wrote to `path`: tensors and plain values, on the CPU. Code in the
    file is never run.

    All weights are read here. Raises BadInput for any file that torch cannot read so.
    """
    path = Path(path)
    if not path.is_file():
        raise BadInput(f"there is no file {path}")
    if path.suffix == ".safetensors":
        raise BadInput(f"{path}: save its tensors with torch.save as a state dict, which is read")
    try:
        # torch does not compare the zip's checksums: with a flipped bit it loads another weight
        if zipfile.is_zipfile(path) and zipfile.ZipFile(path).testzip():
            raise ValueError
        return dict(torch.load(path, map_location="cpu", weights_only=True))
    # torch does not document what it raises for a cut file, and advises to run the code in one
    except Exception:
        raise BadInput(
            f"{path} is not a readable checkpoint: it is damaged, holds code besides tensors and"
            " numbers, or is no dict that torch.save wrote"
        ) from None


def load_checkpoint(path) -> dict:
    """The fields of a checkpoint and the `weights_sha256` of its evaluated weights. Fields
    that an older schema lacks are filled in.

    Raises BadInput for a file that is cut, altered, foreign, of a newer schema, or that holds code.
    """
    loaded = load_pickle_free(path)
    if loaded.get("kind") != KIND:
        raise BadInput(
            f"{path} is not a checkpoint of this program, such as best.pt of a run; if it holds a"
            f" state dict, train.py weights={path} starts from it"
        )
    if loaded["schema"] > SCHEMA:
        raise BadInput(
            f"{path} has the schema {loaded['schema']}, this program reads 1 to {SCHEMA}"
        )
    checkpoint = {name: loaded.get(name) for name in FIELDS}
    checkpoint["float32_logits"] = bool(checkpoint["float32_logits"])
    checkpoint["weights_sha256"] = weights_sha256(evaluated_weights(checkpoint))
    return checkpoint


def load_weights(path) -> dict:
    """The state dict to start a training from: the evaluated weights of this program's checkpoint,
    or what another program saved, which is not checked here.
    """
    loaded = load_pickle_free(path)
    if loaded.get("kind") == KIND:
        return evaluated_weights(loaded)
    for key in ("model", "state_dict"):  # other programs save more than the state
        if isinstance(loaded.get(key), dict):
            return loaded[key]
    return loaded


def checkpoint_path(ckpt) -> Path:
    """The file that `--ckpt` names: best.pt of a run folder, which may be given by its name under
    runs/, or the file itself.
    """
    for folder in (Path(ckpt), Path("runs", ckpt)):
        if folder.is_dir():
            return folder / "best.pt"
    return Path(ckpt)


def load_model(ckpt) -> tuple[nn.Module, Config, dict]:
    """(model, config, checkpoint) of a run or file. The model has the evaluated weights and is in
    evaluation mode.

    Raises BadInput as `load_checkpoint` does, and for a config that cannot be used.
    """
    path = checkpoint_path(ckpt)
    checkpoint = load_checkpoint(path)
    cfg = config_from_dict(checkpoint["config"], source=f"{path}: its config")
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
