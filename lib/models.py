"""The classifiers: each takes normalised patches (B, 3, 96, 96) and gives one logit a patch, (B, 1)."""

import pickle
import warnings
import zipfile
from pathlib import Path

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from lib.centrenet import CentreNet, LogitLayer
from lib.command import BadInput, one_line
from lib.config import Config


def build_mlp(cfg: Config) -> nn.Module:
    """Flattened pixels through hidden layers: the baseline that a convolution has to beat."""
    sizes = [96 * 96 * 3, *cfg.mlp_hidden]
    layers = [nn.Flatten()]
    for num_in, num_out in zip(sizes, sizes[1:], strict=False):
        layers += [nn.Linear(num_in, num_out), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers, nn.Dropout(cfg.dropout), LogitLayer(sizes[-1], 1))


def build_resnet18(cfg: Config) -> nn.Module:
    """torchvision's ResNet-18 with one output, from random weights."""
    from torchvision.models import resnet18

    model = resnet18(weights=None)
    model.fc = nn.Sequential(nn.Dropout(cfg.dropout), LogitLayer(model.fc.in_features, 1))
    return model


BUILDERS = {
    "cnn": lambda cfg: CentreNet(cfg.cnn_width, 1, cfg.dropout),
    "p4m": lambda cfg: CentreNet(cfg.p4m_width, 8, cfg.dropout),  # the default: it gives at once what eight views give cnn
    "mlp": build_mlp,
    "resnet18": build_resnet18,
}


def build_model(cfg: Config) -> nn.Module:
    """The model that the config names, in float32 and channels last, its weights drawn from torch's generator."""
    try:
        return BUILDERS[cfg.model](cfg).to(memory_format=torch.channels_last)
    except RuntimeError as error:  # sizes beyond what memory, or a 64-bit count, can hold
        raise BadInput(f"model {cfg.model} cannot be built at this size ({one_line(error)})") from None


def num_parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def logit_layer(model: nn.Module) -> LogitLayer:
    """The last layer of a model."""
    return next(layer for layer in model.modules() if isinstance(layer, LogitLayer))


def fit_state(model: nn.Module, state: dict, source) -> nn.Module:
    """Put a state dict into a model. Raises BadInput that names the first tensor that does not fit."""
    own = model.state_dict()
    if not isinstance(state, dict) or not all(map(is_plain_tensor, state.values())):
        raise BadInput(f"{source} does not hold the weights of a model")
    for name in sorted(own.keys() | state.keys(), key=str):
        if name not in state or name not in own:
            raise BadInput(f"{source} is of another model: the tensor {name} is {'missing' if name in own else 'unknown'}")
        if own[name].shape != state[name].shape:
            shapes = f"{tuple(state[name].shape)} instead of {tuple(own[name].shape)}"
            raise BadInput(f"{source} is of another model: the tensor {name} has shape {shapes}")
    state = {name: state[name].to(value.dtype) for name, value in own.items()}
    model.load_state_dict(state, assign=next(iter(own.values())).is_meta)
    return model


class Undrawn(TorchFunctionMode):
    """While a model is built to be filled: no weights are drawn. Without a place for them, that would load torch's compiler."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function.__name__ in ("normal_", "uniform_"):
            return kwargs["tensor"] if "tensor" in kwargs else args[0]
        return function(*args, **kwargs)


def is_plain_tensor(value) -> bool:
    """Whether a value is a tensor whose real numbers all lie in memory: not sparse, quantized, complex or without content."""
    if not isinstance(value, torch.Tensor) or value.layout != torch.strided or value.device.type != "cpu":
        return False
    return not (value.is_quantized or value.is_complex() or value.is_nested)


def load_pickle_free(path) -> object:
    """What torch.save wrote to `path`, as tensors and plain values on the CPU; code in it is refused, never run."""
    path = Path(path)
    if not path.is_file():
        raise BadInput(f"no file {path}")
    if not path.stat().st_size:
        raise BadInput(f"{path} is an empty file, not a checkpoint")
    try:
        with open(path, "rb") as file:
            start = file.read(4)
        if start != b"PK\3\4" and start[:1] != b"\x80":  # torch would go on with a tar
            raise pickle.UnpicklingError
        if start == b"PK\3\4" and sum(part.file_size for part in zipfile.ZipFile(path).infolist()) > path.stat().st_size:
            raise ValueError("its parts are packed, torch.save leaves them as they are")  # up to a thousandfold
        with warnings.catch_warnings(action="ignore"):  # what torch has to remark about foreign files
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise BadInput(f"{path} is refused: it is no checkpoint, or it holds code besides tensors and numbers") from None
    except Exception as error:  # whatever a damaged archive provokes in torch's reader
        raise BadInput(f"{path} is not a readable checkpoint, it may be cut off ({one_line(error)})") from None
