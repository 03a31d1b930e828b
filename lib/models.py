"""The classifiers: each takes normalised patches (B, 3, 96, 96) and gives logits (B, 1)."""

import itertools
import re

import torch
from torch import nn

from lib.centrenet import CentreNet, LogitLayer
from lib.command import BadInput, say
from lib.config import Config

# torchvision's models, each with the name of its last layer
HEADS = {"resnet18": "fc", "densenet121": "classifier"}
# before a tensor's name, from DistributedDataParallel and torch.compile
PREFIXES = r"^((module|_orig_mod)\.)+"


def build_mlp(cfg: Config) -> nn.Module:
    """Hidden layers on the flattened pixels: the baseline that a convolution has to beat."""
    sizes = [96 * 96 * 3, *cfg.mlp_hidden]
    layers = [nn.Flatten()]
    for num_in, num_out in itertools.pairwise(sizes):
        layers += [nn.Linear(num_in, num_out), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers, nn.Dropout(cfg.dropout), LogitLayer(sizes[-1], 1))


def build_torchvision(cfg: Config) -> nn.Module:
    """torchvision's model of the config's name, with random weights and one output."""
    from torchvision import models

    model = models.get_model(cfg.model, weights=None)
    head = HEADS[cfg.model]
    num_in = model.get_submodule(head).in_features
    setattr(model, head, nn.Sequential(nn.Dropout(cfg.dropout), LogitLayer(num_in, 1)))
    return model


BUILDERS = {
    "cnn": lambda cfg: CentreNet(cfg.cnn_width, 1, cfg.dropout),
    # the default. Its eight orientations do in one pass what eight views do for cnn
    "p4m": lambda cfg: CentreNet(cfg.p4m_width, 8, cfg.dropout),
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


def fit_state(model: nn.Module, state: dict, source) -> None:
    """Load a state dict into a model. Raises BadInput that names the first tensors that do not
    fit.
    """
    try:
        model.load_state_dict(state)
    except RuntimeError as error:  # a heading, then a line for each kind of difference
        difference = str(error).splitlines()[1].strip()
        raise BadInput(f"{source} is of another model: {difference[:200]}") from None


def fit_weights(model: nn.Module, name: str, state: dict, source) -> None:
    """Load a state dict of another program into the model `name`, without the prefixes of wrappers.
    Raises as `fit_state` does.

    For torchvision's models the layers before the last one are enough: where the last layer is
    missing, or has another number of classes, the model keeps its own, which was drawn at random.
    """
    state = {re.sub(PREFIXES, "", str(key)): tensor for key, tensor in state.items()}
    if name in HEADS:
        head = HEADS[name]
        state = {rename_torchvision(key, head): tensor for key, tensor in state.items()}
        if len(state.get(f"{head}.1.weight", ())) != 1:
            own = model.state_dict()
            trunk = {key: tensor for key, tensor in state.items() if not key.startswith(head)}
            state = trunk | {key: tensor for key, tensor in own.items() if key.startswith(head)}
            say(f"the run starts from {source}; its last layer, {head}, is drawn from the seed")
    # torch itself fills in the counters of batches, which files of 2017 lack
    fit_state(model, state, source)


def rename_torchvision(name: str, head: str) -> str:
    """This program's name for a tensor of torchvision's model. The official file of densenet121 has
    the names of an older release.
    """
    name = re.sub(r"(denselayer\d+\.(?:norm|conv))\.([12]\.)", r"\1\2", name)
    return re.sub(rf"^{head}\.(weight|bias)$", rf"{head}.1.\1", name)
