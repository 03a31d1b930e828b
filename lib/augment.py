"""From uint8 patches to the input of the model: augmented by (seed, epoch, sample), normalised,
channels last.
"""

import functools
from dataclasses import dataclass

import numpy as np
import torch

from lib.config import Config
from lib.seeding import bits_to_uniform, mix_position, mixed_bits

# channel statistics of PCam's training split in [0, 1] (262,144 patches, summed in 64 bits)
PCAM_MEAN = (0.7008, 0.5384, 0.6916)
PCAM_STD = (0.2350, 0.2774, 0.2129)
PREPROCESSING = {"mean": list(PCAM_MEAN), "std": list(PCAM_STD)}  # as a checkpoint carries it

CHUNK = 16  # patches converted at a time: their float32 copy, 1.8 MB, stays in a core's cache
# the symmetries that are the views of a patch, by their number: the four turns, or all eight
VIEWS = {1: (0,), 4: (0, 3, 5, 6), 8: tuple(range(8))}
# pixels in y and x by which each of several views is shifted after it is turned. The answer of a
# strided network depends on where its grid lies, most of all for patches that were JPEG before
VIEW_SHIFT = (1, 3)
# the bits of a symmetry's number, 0 to 7; it transposes after it flips
FLIP_X = 1
FLIP_Y = 2
TRANSPOSE = 4
AUGMENTATION = 1  # purpose of a draw, as part of its position
# numbers drawn for a sample: 1 for the symmetry, 2 for the shift in y and x, 3 for brightness and 3
# for the gain of each channel
NUM_DRAWS = 15


@dataclass(frozen=True)
class Draws:
    """The augmentation drawn for a batch: geometry as integers, colour as a gain and an offset for
    each sample and channel.
    """

    symmetry: torch.Tensor  # (B,) int64 in 0..7, bits FLIP_X, FLIP_Y and TRANSPOSE
    shift: torch.Tensor  # (B, 2) int64, pixels in y and x
    gain: torch.Tensor  # (B, 3) float32, of intensities in [0, 1]
    offset: torch.Tensor  # (B, 3) float32


def draw_position(cfg: Config, epoch: int) -> int:
    """The position of an epoch's draws as one number, for `draw_at`."""
    return mix_position(cfg.seed, epoch, AUGMENTATION)


def draw_augmentation(keys: torch.Tensor, epoch: int, cfg: Config) -> Draws:
    """The draws for samples `keys` int64 (B,), on the keys' device: a function of (seed, epoch,
    sample) alone.
    """
    return draw_at(draw_position(cfg, epoch), keys, cfg)


def draw_at(position: int | torch.Tensor, keys: torch.Tensor, cfg: Config) -> Draws:
    """`draw_augmentation` at a position of `draw_position`: an int, or a tensor () that is an input
    of a CUDA graph.
    """
    places = keys[:, None] * NUM_DRAWS + torch.arange(NUM_DRAWS, device=keys.device)
    bits = mixed_bits(places, position)  # (B, 15)
    # mean 0, deviation 1: the sum of 3 uniform numbers is close to normal, but has bounds
    first, second, third = bits_to_uniform(bits[:, 3:]).view(-1, 4, 3).unbind(2)
    spread = (first + second + third - 1.5) * 2.0  # (B, 4), added in this order on every device
    gain = 1 + cfg.stain_jitter * spread[:, 1:]
    # a gain leaves white (1.0) as it is: stains get stronger or weaker, the background stays
    offset = (1 - gain) + cfg.brightness_jitter * spread[:, :1]
    symmetry = bits[:, 0] & (7 if turns_patches(cfg) else 0)
    # 31 bits with their sign, of which `%` leaves 0 to 2 * shift
    shift = (bits[:, 1:3] >> 33) % (2 * cfg.shift + 1) - cfg.shift
    return Draws(symmetry, shift, gain, offset)


def turns_patches(cfg: Config) -> bool:
    """Whether training draws symmetries. p4m answers all eight alike, so it would learn the same:
    its patches are not turned, which is faster.
    """
    return cfg.symmetries and cfg.model != "p4m"


def turned_views(images: torch.Tensor, shift=VIEW_SHIFT, num: int = 8):
    """Yield patches (B, S, S, C) of any type in `num` symmetries (4 or 8), each then moved by
    `shift` pixels (y, x). Where a shift leaves the patch the edge is repeated.
    """
    y, x = shift
    size = images.shape[1]
    margin = max(shift)
    reads = torch.arange(-margin, size + margin, device=images.device).clamp(0, size - 1)
    wide = images.index_select(1, reads).index_select(2, reads)
    for symmetry in VIEWS[num]:
        view = wide.flip([axis for axis, bit in ((2, FLIP_X), (1, FLIP_Y)) if symmetry & bit])
        if symmetry & TRANSPOSE:
            view = view.transpose(1, 2)
        view = view[:, margin - y : margin - y + size, margin - x : margin - x + size]
        yield view.contiguous()


def move_pixels(images: torch.Tensor, draws: Draws, crop: int = 96) -> torch.Tensor:
    """Flip, transpose, shift and crop patches uint8 (B, 96, 96, 3) to the centre (B, crop, crop,
    3). The draws are on the device of the patches.

    Where a shift leaves the patch the edge is repeated. All is one gather of whole pixels: output
    pixel (i, j) reads pixel along_rows[i] + along_columns[j] of the batch.
    """
    num = len(images)
    size = images.shape[1]
    device = images.device
    # not asked of a GPU, which would answer only after all steps that it has been given
    if device.type == "cpu" and not draws.symmetry.any():
        return cut_windows(images, draws.shift, crop)
    centre = torch.arange(crop, device=device) + (size - crop) // 2

    def source(axis, flip_bit):  # (B, crop): where each output position reads along an axis
        flips = (draws.symmetry & flip_bit).bool()[:, None]
        flipped = torch.where(flips, size - 1 - centre, centre)
        return (flipped - draws.shift[:, axis, None]).clamp(0, size - 1)

    y = source(0, FLIP_Y) * size
    x = source(1, FLIP_X)
    transposes = (draws.symmetry & TRANSPOSE).bool()[:, None]
    first_pixel = torch.arange(num, device=device)[:, None] * size * size  # of each patch
    along_rows = (torch.where(transposes, x, y) + first_pixel).int()
    along_columns = torch.where(transposes, y, x).int()
    index = (along_rows[:, :, None] + along_columns[:, None, :]).view(-1)  # (B * crop * crop,)
    return torch.index_select(images.reshape(-1, 3), 0, index).view(num, crop, crop, 3)


def cut_windows(images: torch.Tensor, shift: torch.Tensor, crop: int) -> torch.Tensor:
    """`move_pixels` on a CPU without a symmetry: rows of pixels are copied as they are."""
    border = (images.shape[1] - crop) // 2
    margin = max(0, int(shift.abs().max()) - border)
    pixels = images.numpy()
    if margin:
        pixels = np.pad(pixels, ((0, 0), (margin, margin), (margin, margin), (0, 0)), "edge")
    windows = np.lib.stride_tricks.sliding_window_view(pixels, (crop, crop, 3), (1, 2, 3))
    top, left = (border + margin - shift).T.numpy()
    return torch.from_numpy(windows[np.arange(len(images)), top, left, 0])


@functools.cache
def on_device(values: tuple, device: torch.device) -> torch.Tensor:
    """Constants as a tensor on a device, copied there once: each copy to a GPU waits for the steps
    that it was given.
    """
    return torch.tensor(values, device=device)


def normalise(
    images: torch.Tensor, gain, offset, mean=PCAM_MEAN, std=PCAM_STD, dtype=torch.float32
) -> torch.Tensor:
    """Patches uint8 (B, 96, 96, 3) with gain and offset (B, 3), minus `mean`, over `std`:
    (B, 3, 96, 96) `dtype`, channels last.
    """
    num, height, width, num_channels = images.shape
    mean, std = on_device((tuple(mean), tuple(std)), images.device)
    # a row of a patch is 288 numbers R G B R G B ...; with factors repeated in the same way one
    # long loop serves a row
    scale = (gain / (255.0 * std)).repeat(1, width)[:, None]  # (B, 1, 288)
    bias = ((offset - mean) / std).repeat(1, width)[:, None]
    rows = images.reshape(num, height, width * num_channels)
    out = torch.empty(rows.shape, dtype=dtype, device=images.device)
    chunk = CHUNK if images.device.type == "cpu" else num
    for start in range(0, num, chunk):
        part = slice(start, start + chunk)
        out[part] = torch.addcmul(bias[part], rows[part].float(), scale[part])
    return out.view(images.shape).permute(0, 3, 1, 2)


def model_input(
    images: torch.Tensor, draws: Draws, crop: int = 96, dtype=torch.float32
) -> torch.Tensor:
    """The input of a model in training, of patches uint8 (B, 96, 96, 3): (B, 3, crop, crop)
    `dtype`, channels last.
    """
    moved = move_pixels(images, draws, crop)
    return normalise(moved, draws.gain, draws.offset, dtype=dtype)


def patch_size(cfg: Config, epoch: int) -> int:
    """The side, in pixels, of the centre that an epoch (from 0) learns from: at first a crop, which
    is fast, then the whole patch.
    """
    return cfg.crop if epoch < cfg.crop_epochs and cfg.model != "mlp" else 96
