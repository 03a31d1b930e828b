"""CentreNet, and the layers that let it turn with its input: the eight symmetries of a patch get
one logit.

Channels are (R, num): R = 8 orientations of each feature (Cohen and Welling 2016; Veeling et al.
2018 on PCam itself), or R = 1, which makes a plain network of the same shape.
"""

import contextlib
import copy
import functools
import itertools

import numpy as np
import torch
from torch import nn
from torch.nn import functional
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_conv_bn_weights

EPSILON = 1e-5  # of batch norm


def symmetry_reads(size: int) -> np.ndarray:
    """Where each symmetry of the square reads a grid of size x size, int64 (8, size * size).

    Symmetry g flips x if bit 0 is set, y if bit 1 is, and transposes afterwards if bit 2 is, as in
    lib/augment.py.
    """
    grid = np.arange(size * size).reshape(size, size)
    flipped = [grid[:: -1 if g & 2 else 1, :: -1 if g & 1 else 1] for g in range(8)]
    return np.stack([(seen.T if g & 4 else seen).ravel() for g, seen in enumerate(flipped)])


@functools.cache
def filter_copies(size: int, lifting: bool, device: torch.device) -> torch.Tensor:
    """A matrix of zeros and ones float32 (H * size^2, 8 * H * size^2): from a filter of H
    orientations to its eight copies.

    As a product it is exact, and so is its gradient, on any device. H is 8, or 1 for a filter that
    reads plain channels.
    """
    reads = symmetry_reads(size)  # (8, size^2)
    if lifting:
        reads = reads[:, None]
    else:  # copy g holds for orientation h what the filter itself holds for g^-1 h
        seen = symmetry_reads(3)
        number = {row.tobytes(): g for g, row in enumerate(seen)}
        product = np.array(
            [[number[seen[h][seen[g]].tobytes()] for h in range(8)] for g in range(8)]
        )
        inverse = product.argmin(1)  # 0 is the identity
        reads = product[inverse][:, :, None] * size * size + reads[:, None]  # (8, H, size^2)
    # or what a prediction keeps here could not be trained with afterwards
    with torch.inference_mode(False):
        copies = torch.zeros(reads[0].size, reads.size)
        copies[reads.ravel(), torch.arange(reads.size)] = 1
        return copies.to(device)


class GroupConv(nn.Module):
    """A convolution whose filters are applied in R orientations; its weight is a matrix (num_out,
    num_in * H * size^2).

    The first one is `lifting`: it reads plain channels (H = 1), the others R. Strided on grids of
    even sides it needs an even `size`, or the samples are not those of the turned grid.
    """

    def __init__(self, num_in, num_out, size, orientations, stride=1, padding=0, lifting=False):
        super().__init__()
        self.num_in, self.num_out, self.size, self.orientations = (
            num_in,
            num_out,
            size,
            orientations,
        )
        self.stride, self.padding, self.lifting = stride, padding, lifting
        self.weight = nn.Parameter(
            torch.empty(num_out, num_in * (1 if lifting else orientations) * size * size)
        )
        nn.init.kaiming_normal_(self.weight)
        self.filters = None  # what `filters_made_once` has made of the weight

    def make_filters(self):
        """The weight as filters (R * num_out, H * num_in, size, size), each in R orientations."""
        filters = self.weight
        if self.orientations > 1:
            with torch.autocast(filters.device.type, enabled=False):
                filters = filters.view(self.num_out * self.num_in, -1) @ filter_copies(
                    self.size, self.lifting, filters.device
                )
        filters = filters.view(
            self.num_out, self.num_in, self.orientations, -1, self.size, self.size
        ).permute(2, 0, 3, 1, 4, 5)
        return filters.reshape(self.orientations * self.num_out, -1, self.size, self.size)

    def forward(self, x):
        filters = self.make_filters() if self.filters is None else self.filters
        # in the memory format of x
        return functional.conv2d(x, filters.to(x.dtype), None, self.stride, self.padding)


@contextlib.contextmanager
def filters_made_once(model: nn.Module, dtype: torch.dtype):
    """Within it the weights of a model stay as they are: its filters, of `dtype`, are made once for
    many passes.
    """
    convs = [module for module in model.modules() if isinstance(module, GroupConv)]
    for conv in convs:
        conv.filters = conv.make_filters().to(dtype)
    try:
        yield
    finally:
        for conv in convs:
            conv.filters = None


class GroupBatchNorm(nn.Module):
    """Batch norm whose factors and running statistics the orientations of a feature share.

    In training each orientation is normalised by its own batch, which differs little and saves a
    third of the time.
    """

    def __init__(self, num: int, orientations: int):
        super().__init__()
        self.orientations = orientations
        self.weight, self.bias = nn.Parameter(torch.ones(num)), nn.Parameter(torch.zeros(num))
        self.register_buffer("running_mean", torch.zeros(num))
        self.register_buffer("running_var", torch.ones(num))

    def tensors(self):
        return self.running_mean, self.running_var, self.weight, self.bias

    def forward(self, x):
        mean, var, weight, bias = (tensor.repeat(self.orientations) for tensor in self.tensors())
        x = functional.batch_norm(x, mean, var, weight, bias, self.training, eps=EPSILON)
        if self.training:
            self.running_mean.copy_(mean.view(self.orientations, -1).mean(0))
            self.running_var.copy_(var.view(self.orientations, -1).mean(0))
        return x


@torch.no_grad()
def fold_norms(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A copy of a model for prediction alone: its batch norms, whose statistics are fixed then, and
    the orientations of its filters become plain convolutions of `dtype`, which say the same up to
    rounding and cost less."""
    model = copy.deepcopy(model).eval()
    for parent in list(model.modules()):
        for (name, conv), (norm_name, norm) in itertools.pairwise(list(parent.named_children())):
            if isinstance(norm, GroupBatchNorm):
                filters, factors = (
                    conv.make_filters(),
                    [tensor.repeat(norm.orientations) for tensor in norm.tensors()],
                )
                weight, bias = fuse_conv_bn_weights(
                    filters, None, *factors[:2], EPSILON, *factors[2:]
                )
                plain = nn.Conv2d(
                    weight.shape[1],
                    len(weight),
                    conv.size,
                    conv.stride,
                    conv.padding,
                    device=weight.device,
                )
                plain.weight, plain.bias = weight, bias
            elif isinstance(norm, nn.BatchNorm2d) and isinstance(conv, nn.Conv2d):
                # DenseNet has norms after a pool or a block
                plain = fuse_conv_bn_eval(conv, norm)
            else:
                continue
            setattr(parent, name, plain.to(dtype, memory_format=torch.channels_last))
            setattr(parent, norm_name, nn.Identity())
    return model.requires_grad_(False)


def conv_norm(num_in: int, num_out: int, size: int, orientations: int, **geometry) -> nn.Sequential:
    """A convolution, its batch norm, and ReLU."""
    conv = GroupConv(num_in, num_out, size, orientations, **geometry)
    return nn.Sequential(conv, GroupBatchNorm(num_out, orientations), nn.ReLU(inplace=True))


class Residual(nn.Module):
    """Two 3x3 convolutions beside a shortcut (He et al. 2016); the last scale starts at zero, so
    that it starts as identity.
    """

    def __init__(self, num: int, orientations: int):
        super().__init__()
        self.first = conv_norm(num, num, 3, orientations, padding=1)
        self.second, self.norm = (
            GroupConv(num, num, 3, orientations, padding=1),
            GroupBatchNorm(num, orientations),
        )
        nn.init.zeros_(self.norm.weight)

    def forward(self, x):
        return torch.relu(x + self.norm(self.second(self.first(x))))


class LogitLayer(nn.Linear):
    """The last layer of every model. It computes in float32 whatever the precision of the others:
    bfloat16 has steps of 0.03 at a logit of 4, which makes ties."""

    # False for a model of a checkpoint before schema 3, which was trained without
    is_float32 = True

    def forward(self, x):
        if not self.is_float32:
            return super().forward(x)
        with torch.autocast(x.device.type, enabled=False):
            return super().forward(x.float())


class CentreNet(nn.Module):
    """A small residual network that looks at the whole patch and, apart from it, at the centre that
    decides the label.

    `width` features of each orientation in the first stage. The features (B, R * 4 * width, 6, 6)
    are averaged over the orientations, and over the patch and over the middle 2 x 2 cells, which
    are the centre 32 x 32 pixels.
    """

    def __init__(self, width: int, orientations: int, dropout: float):
        super().__init__()
        self.orientations = orientations
        layers = [
            conv_norm(3, -(-width // 2), 4, orientations, stride=2, padding=1, lifting=True),
            conv_norm(-(-width // 2), width, 2, orientations, stride=2),
            Residual(width, orientations),
        ]
        for num in (width, 2 * width):
            layers += [
                conv_norm(num, 2 * num, 2, orientations, stride=2),
                Residual(2 * num, orientations),
            ]
        self.features = nn.Sequential(*layers)
        self.head = nn.Sequential(nn.Dropout(dropout), LogitLayer(8 * width, 1))

    def forward(self, x):
        x = self.features(x)  # (B, R * 4 * width, 6, 6), less of a smaller crop
        first = x.shape[-1] // 2 - 1
        centre = x[:, :, first : first + 2, first : first + 2]
        means = [
            part.mean((2, 3)).view(len(x), self.orientations, -1).mean(1) for part in (x, centre)
        ]
        return self.head(torch.cat(means, 1))
