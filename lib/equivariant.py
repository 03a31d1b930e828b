"""Layers that turn with their input, so that a model gives the eight symmetries of a patch one logit (Cohen and Welling 2016).

Channels are (8, num): eight orientations of each feature. Veeling et al. 2018 showed on PCam itself what that is worth.
"""

import functools

import numpy as np
import torch
from torch import nn
from torch.nn import functional


def symmetry_reads(size: int) -> np.ndarray:
    """Where each symmetry of the square reads a grid of size x size, int64 (8, size * size).

    Symmetry g flips x if bit 0 is set, y if bit 1 is, and transposes afterwards if bit 2 is, as in lib/augment.py.
    """
    grid = np.arange(size * size).reshape(size, size)
    flipped = [grid[:: -1 if g & 2 else 1, :: -1 if g & 1 else 1] for g in range(8)]
    return np.stack([(seen.T if g & 4 else seen).ravel() for g, seen in enumerate(flipped)])


@functools.cache
def filter_copies(size: int, lifting: bool, device: torch.device) -> torch.Tensor:
    """A matrix of zeros and ones float32 (R * size^2, 8 * R * size^2): from a filter of R orientations to its eight copies.

    As a product it is exact, and so is its gradient, on any device. R is 8, or 1 for a filter that reads plain channels.
    """
    reads = symmetry_reads(size)  # (8, size^2)
    if lifting:
        reads = reads[:, None]
    else:  # copy g holds for orientation h what the filter itself holds for g^-1 h
        seen = symmetry_reads(3)
        number = {row.tobytes(): g for g, row in enumerate(seen)}
        product = np.array([[number[seen[h][seen[g]].tobytes()] for h in range(8)] for g in range(8)])
        inverse = product.argmin(1)  # 0 is the identity
        reads = product[inverse][:, :, None] * size * size + reads[:, None]  # (8, R, size^2)
    copies = torch.zeros(reads[0].size, reads.size)
    copies[reads.ravel(), torch.arange(reads.size)] = 1
    return copies.to(device)


class GroupConv(nn.Module):
    """A convolution of the group p4m; a `lifting` one reads plain channels. Its weight is (num_out, num_in * R * size^2).

    Strided on grids of even sides it needs an even `size`, or the samples are not those of the turned grid.
    """

    def __init__(self, num_in: int, num_out: int, size: int, stride: int = 1, padding: int = 0, lifting: bool = False):
        super().__init__()
        self.num_in, self.num_out, self.size, self.stride, self.padding, self.lifting = (
            num_in, num_out, size, stride, padding, lifting
        )  # fmt: skip
        self.weight = nn.Parameter(torch.empty(num_out, num_in * (1 if lifting else 8) * size * size))
        nn.init.kaiming_normal_(self.weight)

    def forward(self, x):
        with torch.autocast(x.device.type, enabled=False):
            filters = self.weight.view(self.num_out * self.num_in, -1) @ filter_copies(self.size, self.lifting, x.device)
        filters = filters.view(self.num_out, self.num_in, 8, -1, self.size, self.size).permute(2, 0, 3, 1, 4, 5)
        filters = filters.reshape(8 * self.num_out, -1, self.size, self.size)
        filters = filters.to(x.dtype, memory_format=torch.channels_last)
        return functional.conv2d(x, filters, None, self.stride, self.padding)


class GroupBatchNorm(nn.Module):
    """Batch norm whose factors and running statistics the eight orientations of a feature share.

    In training each orientation is normalised by its own batch, which differs little and saves a third of the time.
    """

    def __init__(self, num: int):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(num)), nn.Parameter(torch.zeros(num))
        self.register_buffer("running_mean", torch.zeros(num))
        self.register_buffer("running_var", torch.ones(num))

    def forward(self, x):
        mean, var, weight, bias = (t.repeat(8) for t in (self.running_mean, self.running_var, self.weight, self.bias))
        x = functional.batch_norm(x, mean, var, weight, bias, self.training)
        if self.training:
            self.running_mean.copy_(mean.view(8, -1).mean(0))
            self.running_var.copy_(var.view(8, -1).mean(0))
        return x


def group_conv_norm(num_in: int, num_out: int, size: int = 3, **geometry) -> nn.Sequential:
    """A group convolution, its batch norm, and ReLU."""
    return nn.Sequential(GroupConv(num_in, num_out, size, **geometry), GroupBatchNorm(num_out), nn.ReLU(inplace=True))


class GroupResidual(nn.Module):
    """Two 3x3 group convolutions beside a shortcut; the last scale starts at zero, so that it starts as identity."""

    def __init__(self, num: int):
        super().__init__()
        self.first = group_conv_norm(num, num, padding=1)
        self.second, self.norm = GroupConv(num, num, 3, padding=1), GroupBatchNorm(num)
        nn.init.zeros_(self.norm.weight)

    def forward(self, x):
        return torch.relu(x + self.norm(self.second(self.first(x))))


class GroupCentreNet(nn.Module):
    """CentreNet with layers that turn with their input, `width` features of eight orientations in the first stage.

    The head reads features averaged over the orientations, over the patch and over the centre that decides the label.
    """

    def __init__(self, width: int, dropout: float):
        super().__init__()
        self.features = nn.Sequential(
            group_conv_norm(3, (width + 1) // 2, 4, stride=2, padding=1, lifting=True),
            group_conv_norm((width + 1) // 2, width, 2, stride=2),
            GroupResidual(width),
            group_conv_norm(width, 2 * width, 2, stride=2),
            GroupResidual(2 * width),
            group_conv_norm(2 * width, 4 * width, 2, stride=2),
            GroupResidual(4 * width),
        )
        self.head = nn.Sequential(nn.Dropout(dropout), nn.Linear(8 * width, 1))

    def forward(self, x):
        x = self.features(x)  # (B, 8 * 4 * width, 6, 6), less of a smaller crop
        first = x.shape[-1] // 2 - 1
        centre = x[:, :, first : first + 2, first : first + 2]
        means = [part.mean((2, 3)).view(len(x), 8, -1).mean(1) for part in (x, centre)]
        return self.head(torch.cat(means, 1))
