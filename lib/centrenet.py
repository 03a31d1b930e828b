"""CentreNet, and the layers that make its answer the same for all eight symmetries of a patch.

The channels of a tensor are (R, num): R = 8 orientations of each feature (Cohen and Welling 2016;
Veeling et al. 2018, for PCam), or R = 1, which makes a plain network of the same shape. H is the
number of orientations of a layer's input: R, or 1 for the colours of a patch.
"""

import contextlib
import copy
import functools
import itertools
import math

import torch
from torch import nn
from torch.nn import functional
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_conv_bn_weights

from lib.augment import turned_views


def symmetry_reads(size: int) -> torch.Tensor:
    """For each symmetry of the square, the cell of a grid of size x size that each cell of the
    result is read from: int64 (8, size^2). The symmetries are numbered as in lib/augment.py.
    """
    grid = torch.arange(size * size).view(1, size, size, 1)
    return torch.stack([view.flatten() for view in turned_views(grid, shift=(0, 0))])


def orientation_reads() -> torch.Tensor:
    """Which orientation of a filter each orientation of its copies is read from: int64 (8, 8). At
    (g, h) stands g^-1 h, which becomes orientation h of copy g.
    """
    reads = symmetry_reads(3)  # enough cells to tell the symmetries apart
    composed = reads[:, reads]  # (8, 8, 9): h after g, at (h, g)
    is_equal = (composed[:, :, None] == reads).all(-1)
    product = is_equal.int().argmax(-1).T  # (8, 8): the number of the symmetry g h, at (g, h)
    return product.argsort(1)  # g h at h is inverted by g^-1 h at h


@functools.cache
@torch.inference_mode(False)  # a constant of inference mode could not be trained with afterwards
def filter_copies(size: int, num_read: int, device: torch.device) -> torch.Tensor:
    """A matrix of zeros and ones float32 (H * size^2, 8 * H * size^2). Multiplied by it, a filter
    of H = `num_read` orientations becomes its eight copies.

    The product only moves values, so it is exact on any device, and so is its gradient. H is 1 for
    a lifting filter, which reads plain channels, else 8.
    """
    reads = symmetry_reads(size)[:, None]  # (8, 1, size^2)
    if num_read > 1:
        reads = orientation_reads()[:, :, None] * size * size + reads  # (8, 8, size^2)
    copies = functional.one_hot(reads.flatten(), reads[0].numel()).float()
    return copies.T.contiguous().to(device)


class GroupConv(nn.Module):
    """A convolution whose filters are applied in R orientations. Its weight is a matrix (num_out,
    num_in * H * size^2).

    The first one of a network is lifting: it reads plain channels (H = `num_read` = 1). With a
    stride, on a grid of even sides, `size` must be even: otherwise a turned grid is sampled at
    other places.
    """

    def __init__(self, num_in, num_out, size, orientations, num_read=None, **geometry):
        super().__init__()
        self.size, self.orientations = size, orientations
        self.num_read = num_read or orientations  # H
        self.geometry = geometry  # stride and padding
        self.weight = nn.Parameter(torch.empty(num_out, num_in * self.num_read * size * size))
        nn.init.kaiming_normal_(self.weight)

    def make_filters(self):
        """The weight as filters (R * num_out, H * num_in, size, size): R turned copies of each."""
        filters, size, num_out = self.weight, self.size, len(self.weight)
        if self.orientations > 1:
            copies = filter_copies(size, self.num_read, filters.device)
            with torch.autocast(filters.device.type, enabled=False):
                filters = filters.view(-1, len(copies)) @ copies
        filters = filters.view(num_out, -1, self.orientations, self.num_read, size, size)
        filters = filters.permute(2, 0, 3, 1, 4, 5)  # (R, num_out, H, num_in, size, size)
        return filters.reshape(self.orientations * num_out, -1, size, size)

    def forward(self, x):
        # the result has the memory format of x
        return functional.conv2d(x, self.make_filters().to(x.dtype), **self.geometry)


class GroupBatchNorm(nn.BatchNorm2d):
    """Batch norm whose factors and running statistics are shared by the orientations of a feature.

    In training each orientation is normalised by its own statistics of the batch. These differ
    little from common ones, and save a third of the time.
    """

    def __init__(self, num: int, orientations: int):
        super().__init__(num)
        self.track_running_stats = False  # else torch counts batches, which checkpoints do not hold
        del self.num_batches_tracked
        self.orientations = orientations
        self.repeated = None  # set within `norms_repeated`, in training

    def repeated_tensors(self):
        """Mean, variance, weight and bias, repeated for each orientation: (R * num,) each."""
        tensors = (self.running_mean, self.running_var, self.weight, self.bias)
        return [tensor.repeat(self.orientations) for tensor in tensors]

    def forward(self, x):
        tensors = self.repeated or self.repeated_tensors()
        return functional.batch_norm(x, *tensors, self.training, eps=self.eps)


@functools.cache
@torch.inference_mode(False)
def repetition(sizes: tuple[int, ...], orientations: int, device: torch.device) -> torch.Tensor:
    """A matrix of zeros and ones float32 (T, R * T), T the sum of `sizes`. Vectors of these sizes,
    laid end to end and multiplied by it, are each repeated R times.
    """
    blocks = [torch.eye(size).repeat(1, orientations) for size in sizes]
    return torch.block_diag(*blocks).to(device)


@contextlib.contextmanager
def norms_repeated(model: nn.Module, orientations: int):
    """Repeat the tensors of all norms of a model for one batch of training within the block, and
    set their running statistics after it.

    That takes three products in all. Done norm by norm, a GPU would spend more time on launches.
    """
    norms = [layer for layer in model.modules() if isinstance(layer, GroupBatchNorm)]
    statistics, factors = [], []
    for norm in norms:
        statistics += [norm.running_mean, norm.running_var]
        factors += [norm.weight, norm.bias]
    sizes, device = tuple(map(len, factors)), factors[0].device
    repeat = repetition(sizes, orientations, device)
    # autocast would round them to bf16, in which a running mean stops moving near its goal
    with torch.autocast(device.type, enabled=False):
        repeated_statistics = torch.cat(statistics) @ repeat  # batch norm moves it in place
        repeated_factors = torch.cat(factors) @ repeat
    own_sizes = [2 * orientations * len(norm.weight) for norm in norms]
    parts = zip(
        repeated_statistics.split(own_sizes), repeated_factors.split(own_sizes), strict=True
    )
    for norm, (own_statistics, own_factors) in zip(norms, parts, strict=True):
        norm.repeated = (*own_statistics.chunk(2), *own_factors.chunk(2))
    yield
    for norm in norms:
        norm.repeated = None
    with torch.autocast(device.type, enabled=False):
        means = repeat @ repeated_statistics / orientations
    torch._foreach_copy_(statistics, list(means.split(sizes)))


@torch.no_grad()
def fold_norms(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A copy of a model for prediction alone: equal up to rounding, and faster. Each convolution
    and its batch norm become one plain convolution of `dtype`.
    """
    model = copy.deepcopy(model).eval()
    for parent in list(model.modules()):
        neighbours = itertools.pairwise(list(parent.named_children()))
        for (conv_name, conv), (norm_name, norm) in neighbours:
            if isinstance(norm, GroupBatchNorm):
                plain = fold_group_norm(conv, norm)
            elif isinstance(norm, nn.BatchNorm2d) and isinstance(conv, nn.Conv2d):
                plain = fuse_conv_bn_eval(conv, norm)
            else:  # no norm, or, in DenseNet, one after a pool or a block
                continue
            setattr(parent, conv_name, plain.to(dtype, memory_format=torch.channels_last))
            setattr(parent, norm_name, nn.Identity())
    return model.requires_grad_(False)


def fold_group_norm(conv: GroupConv, norm: GroupBatchNorm) -> nn.Conv2d:
    """A plain convolution that gives what a GroupConv and its batch norm give in evaluation."""
    mean, var, weight, bias = norm.repeated_tensors()
    filters = conv.make_filters()
    filters, bias = fuse_conv_bn_weights(filters, None, mean, var, norm.eps, weight, bias)
    num_out, num_in, size, _ = filters.shape
    # on the device meta, without memory: both tensors are replaced
    plain = nn.Conv2d(num_in, num_out, size, **conv.geometry, device="meta")
    plain.weight, plain.bias = filters, bias
    return plain


def conv_norm(num_in: int, num_out: int, size: int, orientations: int, **geometry) -> nn.Sequential:
    """A convolution, its batch norm, and ReLU."""
    conv = GroupConv(num_in, num_out, size, orientations, **geometry)
    return nn.Sequential(conv, GroupBatchNorm(num_out, orientations), nn.ReLU(inplace=True))


class Residual(nn.Module):
    """Two 3x3 convolutions beside a shortcut (He et al. 2016). The weight of the last norm starts
    at zero, so at first the layer only passes on its input.
    """

    def __init__(self, num: int, orientations: int):
        super().__init__()
        self.first = conv_norm(num, num, 3, orientations, padding=1)
        self.second = GroupConv(num, num, 3, orientations, padding=1)
        self.norm = GroupBatchNorm(num, orientations)
        nn.init.zeros_(self.norm.weight)

    def forward(self, x):
        return torch.relu(x + self.norm(self.second(self.first(x))))


class LogitLayer(nn.Linear):
    """The last layer of every model. It computes in float32 whatever the precision of the others:
    bfloat16 has steps of 0.03 at a logit of 4, which makes ties."""

    # False for the model of a checkpoint before schema 3, which was not trained so
    is_float32 = True

    def forward(self, x):
        if not self.is_float32:
            return super().forward(x)
        with torch.autocast(x.device.type, enabled=False):
            return super().forward(x.float())


class CentreNet(nn.Module):
    """A small residual network that averages its features twice: over the whole patch, and over the
    centre, which decides the label.

    The first stage has `width` features in each orientation. The last features (B, R * 4 * width,
    6, 6) are averaged over the orientations, and over all cells or the middle 2 x 2 cells, which
    are the 32 x 32 pixels in the centre.
    """

    def __init__(self, width: int, orientations: int, dropout: float):
        super().__init__()
        self.orientations = orientations
        half = math.ceil(width / 2)
        self.features = nn.Sequential(
            conv_norm(3, half, 4, orientations, num_read=1, stride=2, padding=1),
            conv_norm(half, width, 2, orientations, stride=2),
            Residual(width, orientations),
            conv_norm(width, 2 * width, 2, orientations, stride=2),
            Residual(2 * width, orientations),
            conv_norm(2 * width, 4 * width, 2, orientations, stride=2),
            Residual(4 * width, orientations),
        )
        self.head = nn.Sequential(nn.Dropout(dropout), LogitLayer(8 * width, 1))

    def forward(self, x):
        repeated = norms_repeated(self, self.orientations)
        with repeated if self.training else contextlib.nullcontext():
            x = self.features(x)
        # (B, R * 4 * width, 6, 6), or fewer cells for a smaller crop
        first = x.shape[-1] // 2 - 1
        centre = x[:, :, first : first + 2, first : first + 2]
        means = torch.cat([x.mean((2, 3)), centre.mean((2, 3))], 1)
        means = means.view(len(x), 2, self.orientations, -1).mean(2)  # (B, 2, 4 * width)
        return self.head(means.flatten(1))
