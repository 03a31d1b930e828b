"""The classifiers: each takes normalised patches (B, 3, 96, 96) and gives one logit a patch, (B, 1)."""

import pickle
from pathlib import Path

import torch
from torch import nn

from lib.command import BadInput, one_line
from lib.config import Config
from lib.equivariant import GroupCentreNet


class Residual(nn.Module):
    """Two 3x3 convolutions beside a shortcut (He et al. 2016); the last scale starts at zero, so that it starts as identity."""

    def __init__(self, num_channels: int):
        super().__init__()
        self.first = ConvNorm(num_channels, num_channels)
        self.second = nn.Conv2d(num_channels, num_channels, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(num_channels)
        nn.init.zeros_(self.norm.weight)

    def forward(self, x):
        return torch.relu(x + self.norm(self.second(self.first(x))))


class ConvNorm(nn.Sequential):
    """A 3x3 convolution, its batch norm, and ReLU."""

    def __init__(self, num_in: int, num_out: int, stride: int = 1):
        norm = nn.BatchNorm2d(num_out)
        super().__init__(nn.Conv2d(num_in, num_out, 3, stride, padding=1, bias=False), norm, nn.ReLU(inplace=True))


class CentreNet(nn.Module):
    """A small residual network that looks at the whole patch and, apart from it, at the centre that decides the label.

    The features (B, C, 6, 6) are averaged over the patch and over the middle 2 x 2 cells, which are the centre 32 x 32 pixels.
    """

    def __init__(self, width: int, dropout: float):
        super().__init__()
        self.features = nn.Sequential(
            ConvNorm(3, width // 2, stride=2),
            ConvNorm(width // 2, width, stride=2),
            Residual(width),
            ConvNorm(width, 2 * width, stride=2),
            Residual(2 * width),
            ConvNorm(2 * width, 4 * width, stride=2),
            Residual(4 * width),
        )
        self.head = nn.Sequential(nn.Dropout(dropout), nn.Linear(8 * width, 1))

    def forward(self, x):
        x = self.features(x)  # (B, 4 * width, 6, 6), less of a smaller crop
        first = x.shape[-1] // 2 - 1
        centre = x[:, :, first : first + 2, first : first + 2]
        return self.head(torch.cat([x.mean((2, 3)), centre.mean((2, 3))], 1))


def build_cnn(cfg: Config) -> nn.Module:
    """The default: about half a million parameters, made for bfloat16 on a CPU."""
    return CentreNet(cfg.cnn_width, cfg.dropout)


def build_p4m(cfg: Config) -> nn.Module:
    """The same, invariant to the eight symmetries by its construction: one pass gives what eight views would."""
    return GroupCentreNet(cfg.p4m_width, cfg.dropout)


def build_mlp(cfg: Config) -> nn.Module:
    """Flattened pixels through hidden layers: the baseline that a convolution has to beat."""
    sizes = [96 * 96 * 3, *cfg.mlp_hidden]
    layers = [nn.Flatten()]
    for num_in, num_out in zip(sizes, sizes[1:], strict=False):
        layers += [nn.Linear(num_in, num_out), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers, nn.Dropout(cfg.dropout), nn.Linear(sizes[-1], 1))


def build_resnet18(cfg: Config) -> nn.Module:
    """torchvision's ResNet-18 with one output, from random weights."""
    from torchvision.models import resnet18

    model = resnet18(weights=None)
    model.fc = nn.Sequential(nn.Dropout(cfg.dropout), nn.Linear(model.fc.in_features, 1))
    return model


def build_densenet121(cfg: Config) -> nn.Module:
    """torchvision's DenseNet-121 with one output, from random weights."""
    from torchvision.models import densenet121

    model = densenet121(weights=None)
    model.classifier = nn.Sequential(nn.Dropout(cfg.dropout), nn.Linear(model.classifier.in_features, 1))
    return model


BUILDERS = {"cnn": build_cnn, "p4m": build_p4m, "mlp": build_mlp, "resnet18": build_resnet18, "densenet121": build_densenet121}


def build_model(cfg: Config) -> nn.Module:
    """The model that the config names, in float32 and channels last, its weights drawn from torch's generator."""
    try:
        return BUILDERS[cfg.model](cfg).to(memory_format=torch.channels_last)
    except RuntimeError as error:  # sizes beyond what memory, or a 64-bit count, can hold
        raise BadInput(f"model {cfg.model} cannot be built at this size ({one_line(error)})") from None


def num_parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def fit_state(model: nn.Module, state: dict, source) -> nn.Module:
    """Put a state dict into a model. Raises BadInput that names the first tensor that does not fit."""
    own = model.state_dict()
    if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
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


def load_pickle_free(path) -> object:
    """What torch.save wrote to `path`, as tensors and plain values on the CPU; code in it is refused, never run."""
    path = Path(path)
    if not path.is_file():
        raise BadInput(f"no file {path}")
    if not path.stat().st_size:
        raise BadInput(f"{path} is an empty file, not a checkpoint")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise BadInput(f"{path} is refused: it is no checkpoint, or it holds code besides tensors and numbers") from None
    except Exception as error:  # whatever a damaged archive provokes in torch's reader
        raise BadInput(f"{path} is not a readable checkpoint, it may be cut off ({one_line(error)})") from None
