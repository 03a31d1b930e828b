"""The classifiers: each takes normalised patches (B, 3, 96, 96) and gives one logit a patch, (B,
1).
"""

import pickle
import re
import warnings
import zipfile
from pathlib import Path

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from lib.centrenet import CentreNet, LogitLayer
from lib.command import BadInput, one_line, say
from lib.config import Config

# torchvision's models and their last layers, here behind a dropout
HEADS = {"resnet18": "fc", "densenet121": "classifier"}
# where others keep a state dict beside other things
WRAPPERS = ("state_dict", "model_state_dict", "model")
PREFIXES = r"^((module|_orig_mod)\.)+"  # of DistributedDataParallel and of torch.compile


def build_mlp(cfg: Config) -> nn.Module:
    """Flattened pixels through hidden layers: the baseline that a convolution has to beat."""
    sizes = [96 * 96 * 3, *cfg.mlp_hidden]
    layers = [nn.Flatten()]
    for num_in, num_out in zip(sizes, sizes[1:], strict=False):
        layers += [nn.Linear(num_in, num_out), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers, nn.Dropout(cfg.dropout), LogitLayer(sizes[-1], 1))


def build_torchvision(cfg: Config) -> nn.Module:
    """torchvision's model of that name with one output, from random weights."""
    from torchvision import models

    model, head = getattr(models, cfg.model)(weights=None), HEADS[cfg.model]
    num_in = getattr(model, head).in_features
    setattr(model, head, nn.Sequential(nn.Dropout(cfg.dropout), LogitLayer(num_in, 1)))
    return model


BUILDERS = {
    "cnn": lambda cfg: CentreNet(cfg.cnn_width, 1, cfg.dropout),
    # the default: it gives at once what eight views give cnn
    "p4m": lambda cfg: CentreNet(cfg.p4m_width, 8, cfg.dropout),
    "mlp": build_mlp,
    **dict.fromkeys(HEADS, build_torchvision),
}


def build_model(cfg: Config) -> nn.Module:
    """The model that the config names, in float32 and channels last, its weights drawn from torch's
    generator.
    """
    try:
        return BUILDERS[cfg.model](cfg).to(memory_format=torch.channels_last)
    except RuntimeError as error:  # sizes beyond what memory, or a 64-bit count, can hold
        raise BadInput(
            f"model {cfg.model} cannot be built at this size ({one_line(error)})"
        ) from None


def num_parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def logit_layer(model: nn.Module) -> LogitLayer:
    """The last layer of a model."""
    return next(layer for layer in model.modules() if isinstance(layer, LogitLayer))


def is_state(value) -> bool:
    """Whether a value is a state dict: tensors by name."""
    return isinstance(value, dict) and bool(value) and all(map(is_plain_tensor, value.values()))


def find_state(loaded) -> object:
    """The state dict in what others have saved: taken out of a dict of other things, without
    prefixes of wrappers.
    """
    if not isinstance(loaded, dict):
        return loaded
    state = next((loaded[key] for key in WRAPPERS if isinstance(loaded.get(key), dict)), loaded)
    return {re.sub(PREFIXES, "", str(name)): tensor for name, tensor in state.items()}


def fit_weights(model: nn.Module, name: str, loaded, source) -> None:
    """Let the model `name`, its weights drawn, start from what others have saved. Raises BadInput
    as `fit_state` does.

    Of one of torchvision's models the trunk is enough: a last layer that is missing or of other
    classes stays as drawn.
    """
    state = find_state(loaded)
    if name not in HEADS or not is_state(state):
        fit_state(model, state, source)
        return
    head, own = HEADS[name], model.state_dict()
    state = {our_name(key, head): tensor for key, tensor in state.items()}
    # files of 2017 have none
    counters = {key: tensor for key, tensor in own.items() if key.endswith("num_batches_tracked")}
    drawn = {key: tensor for key, tensor in own.items() if key.startswith(head)}
    shapes = {key: tensor.shape for key, tensor in state.items() if key.startswith(head)}
    if shapes == {key: tensor.shape for key, tensor in drawn.items()}:
        fit_state(model, counters | state, source)
        return
    trunk = {key: tensor for key, tensor in state.items() if key not in shapes}
    fit_state(model, counters | trunk | drawn, source)
    say(
        f"the run starts from {len(trunk)} tensors of {source}; its last layer, {head}, is drawn"
        " from the seed"
    )


def our_name(name: str, head: str) -> str:
    """The name here of a tensor of torchvision's model, whose own file of densenet121 has names of
    an older release.
    """
    name = re.sub(r"(denselayer\d+\.(?:norm|conv))\.([12]\.)", r"\1\2", name)
    return re.sub(rf"^{head}\.(weight|bias)$", rf"{head}.1.\1", name)


def fit_state(model: nn.Module, state: dict, source) -> nn.Module:
    """Put a state dict into a model. Raises BadInput that names the first tensor that does not
    fit.
    """
    own = model.state_dict()
    if not is_state(state):
        raise BadInput(f"{source} does not hold the weights of a model")
    for name in sorted(own.keys() | state.keys(), key=str):
        if name not in state or name not in own:
            raise BadInput(
                f"{source} is of another model: the tensor {name} is"
                f" {'missing' if name in own else 'unknown'}"
            )
        if own[name].shape != state[name].shape:
            shapes = f"{tuple(state[name].shape)} instead of {tuple(own[name].shape)}"
            raise BadInput(f"{source} is of another model: the tensor {name} has shape {shapes}")
    state = {name: state[name].to(value.dtype) for name, value in own.items()}
    model.load_state_dict(state, assign=next(iter(own.values())).is_meta)
    return model


class Undrawn(TorchFunctionMode):
    """While a model is built to be filled: no weights are drawn. Without a place for them, that
    would load torch's compiler.
    """

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function.__name__ in ("normal_", "uniform_"):
            return kwargs["tensor"] if "tensor" in kwargs else args[0]
        return function(*args, **kwargs)


def is_plain_tensor(value) -> bool:
    """Whether a value is a tensor whose real numbers all lie in memory: not sparse, quantized,
    complex or without content.
    """
    if (
        not isinstance(value, torch.Tensor)
        or value.layout != torch.strided
        or value.device.type != "cpu"
    ):
        return False
    return not (value.is_quantized or value.is_complex() or value.is_nested)


def load_pickle_free(path) -> object:
    """What torch.save wrote to `path`, as tensors and plain values on the CPU; code in it is
    refused, never run.
    """
    path = Path(path)
    if not path.is_file():
        raise BadInput(f"no file {path}")
    if not path.stat().st_size:
        raise BadInput(f"{path} is an empty file, not a checkpoint")
    try:
        with open(path, "rb") as file:
            start = file.read(9)
        if start[8:] == b"{" and int.from_bytes(start[:8], "little") < path.stat().st_size:
            raise BadInput(
                f"{path} is a safetensors file, which is not read: save its tensors with torch.save"
                " as a state dict"
            )
        if not start.startswith((b"PK\3\4", b"\x80")):  # torch would go on with a tar
            raise pickle.UnpicklingError
        if (
            start.startswith(b"PK")
            and sum(part.file_size for part in zipfile.ZipFile(path).infolist())
            > path.stat().st_size
        ):
            # up to a thousandfold
            raise ValueError("its parts are packed, torch.save leaves them as they are")
        # what torch has to remark about foreign files
        with warnings.catch_warnings(action="ignore"):
            return torch.load(path, map_location="cpu", weights_only=True)
    except BadInput:
        raise
    except pickle.UnpicklingError:
        raise BadInput(
            f"{path} is refused: it is no checkpoint, or it holds code besides tensors and numbers"
        ) from None
    except Exception as error:  # whatever a damaged archive provokes in torch's reader
        raise BadInput(
            f"{path} is not a readable checkpoint, it may be cut off ({one_line(error)})"
        ) from None
