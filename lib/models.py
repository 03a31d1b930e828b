"""The classifiers: each takes normalised patches (B, 3, 96, 96) and gives logits (B, 1)."""

import re

import torch
from torch import nn

from lib.centrenet import CentreNet, LogitLayer
from lib.command import BadInput, say
from lib.config import Config

# torchvision's models, each with the name of its last layer
HEADS = {"resnet18": "fc", "densenet121": "classifier"}
# keys under which other programs save a state dict
WRAPPERS = ("state_dict", "model_state_dict", "model")
# before a tensor's name, from DistributedDataParallel, torch.compile and Lightning
PREFIXES = r"^((module|_orig_mod|model)\.)+"


def build_cnn(cfg: Config) -> nn.Module:
    return CentreNet(cfg.cnn_width, 1, cfg.dropout)


def build_p4m(cfg: Config) -> nn.Module:
    """The default. Its eight orientations do in one pass what eight views do for cnn."""
    return CentreNet(cfg.p4m_width, 8, cfg.dropout)


def build_mlp(cfg: Config) -> nn.Module:
    """Hidden layers on the flattened pixels: the baseline that a convolution has to beat."""
    num_in = 96 * 96 * 3
    layers = [nn.Flatten()]
    for num_out in cfg.mlp_hidden:
        layers += [nn.Linear(num_in, num_out), nn.ReLU(inplace=True)]
        num_in = num_out
    return nn.Sequential(*layers, nn.Dropout(cfg.dropout), LogitLayer(num_in, 1))


def build_torchvision(cfg: Config) -> nn.Module:
    """torchvision's model of the config's name, with random weights and one output."""
    from torchvision import models

    model = getattr(models, cfg.model)(weights=None)
    head = HEADS[cfg.model]
    num_in = getattr(model, head).in_features
    setattr(model, head, nn.Sequential(nn.Dropout(cfg.dropout), LogitLayer(num_in, 1)))
    return model


BUILDERS = {
    "cnn": build_cnn,
    "p4m": build_p4m,
    "mlp": build_mlp,
    "resnet18": build_torchvision,
    "densenet121": build_torchvision,
}


def build_model(cfg: Config) -> nn.Module:
    """The model that the config names, in float32 and channels last. torch's global generator draws
    its weights.
    """
    return BUILDERS[cfg.model](cfg).to(memory_format=torch.channels_last)


def num_parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def logit_layer(model: nn.Module) -> LogitLayer:
    """The last layer of a model."""
    return next(layer for layer in model.modules() if isinstance(layer, LogitLayer))


def is_state(value) -> bool:
    """Whether a value is a state dict: tensors by name."""
    return isinstance(value, dict) and all(
        isinstance(item, torch.Tensor) for item in value.values()
    )


def find_state(loaded: object) -> object:
    """The state dict in what another program saved, without the prefixes of wrappers. An object
    that is no dict is returned as it is.
    """
    if not isinstance(loaded, dict):
        return loaded
    for key in WRAPPERS:
        if isinstance(loaded.get(key), dict):
            loaded = loaded[key]
    return {re.sub(PREFIXES, "", str(name)): tensor for name, tensor in loaded.items()}


def compute_shapes(state: dict) -> dict[str, tuple]:
    return {name: tuple(tensor.shape) for name, tensor in state.items()}


def fit_state(model: nn.Module, state: object, source) -> None:
    """Load a state dict into a model. Raises BadInput that names the first tensor that does not
    fit, and then leaves the model unchanged.
    """
    if not is_state(state):
        raise BadInput(f"{source} does not hold the weights of a model")
    expected, shapes = compute_shapes(model.state_dict()), compute_shapes(state)
    for name in sorted(expected.keys() | shapes.keys()):
        if shapes.get(name) != expected.get(name):
            raise BadInput(
                f"{source} is of another model: the tensor {name} is"
                f" {shapes.get(name, 'missing')} in the file and"
                f" {expected.get(name, 'unknown')} in the model"
            )
    model.load_state_dict(state)


def fit_weights(model: nn.Module, name: str, state: object, source) -> None:
    """Load a state dict of another program into the model `name`. Raises as `fit_state` does.

    For torchvision's models the layers before the last one are enough: where the last layer is
    missing, or has another number of classes, the model keeps its own, which was drawn at random.
    """
    if name not in HEADS or not is_state(state):
        fit_state(model, state, source)
        return
    head, drawn = HEADS[name], model.state_dict()
    state = {rename_torchvision(key, head): tensor for key, tensor in state.items()}
    shape = compute_shapes(state).get(f"{head}.1.weight")
    is_foreign = shape != compute_shapes(drawn)[f"{head}.1.weight"]
    if is_foreign:
        state = {key: tensor for key, tensor in state.items() if not key.startswith(head)}
    for key, tensor in drawn.items():
        # counters of batches are missing in files of 2017
        if key.endswith("num_batches_tracked") or (is_foreign and key.startswith(head)):
            state.setdefault(key, tensor)
    fit_state(model, state, source)
    if is_foreign:
        say(f"the run starts from {source}; its last layer, {head}, is drawn from the seed")


def rename_torchvision(name: str, head: str) -> str:
    """This program's name for a tensor of torchvision's model. The official file of densenet121 has
    the names of an older release.
    """
    name = re.sub(r"(denselayer\d+\.(?:norm|conv))\.([12]\.)", r"\1\2", name)
    return re.sub(rf"^{head}\.(weight|bias)$", rf"{head}.1.\1", name)
