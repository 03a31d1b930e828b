"""Damage that an audit makes itself: to learn what it would look like in these data, and to
measure what of it is found.
"""

import io

import numpy as np
from PIL import Image, ImageFilter

from lib.pcam import PATCH_SHAPE

SIZE = PATCH_SHAPE[0]
PATCH_KINDS = {}  # kind: (reason, function)


def damages(kind: str, reason: str):
    """Register a function of (patch uint8 (96, 96, 3), another patch, rng) to a damaged patch."""

    def register(function):
        PATCH_KINDS[kind] = reason, function
        return function

    return register


def alter(kind: str, patch: np.ndarray, other: np.ndarray, rng) -> np.ndarray:
    """A damaged copy of a patch uint8 (96, 96, 3); `other` is another patch."""
    _, function = PATCH_KINDS[kind]
    return np.clip(function(patch.copy(), other, rng), 0, 255).astype(np.uint8)


ORDERS = {
    "red and blue exchanged": [2, 1, 0],
    "red and green exchanged": [1, 0, 2],
    "green and blue exchanged": [0, 2, 1],
    "channels rotated": [1, 2, 0],
    "channels rotated back": [2, 0, 1],
}
for name, order in ORDERS.items():
    damages(name, "colour")(lambda patch, _, _rng, order=order: patch[..., order])


@damages("channel lost", "colour")
def lose_channel(patch, _, rng):
    patch[..., rng.integers(3)] = rng.choice((0, 255))
    return patch


@damages("grey", "colour")
def lose_colour(patch, _, _rng):
    return np.repeat(patch @ np.array([[0.299], [0.587], [0.114]]), 3, 2)


@damages("inverted", "colour")
def invert(patch, _, _rng):
    return 255 - patch


@damages("blurred", "detail")
def blur(patch, _, rng):
    return np.asarray(
        Image.fromarray(patch).filter(ImageFilter.GaussianBlur(rng.uniform(1.5, 3.5)))
    )


@damages("noisy", "detail")
def add_noise(patch, _, rng):
    return patch + rng.normal(0, rng.uniform(8, 40), patch.shape)


@damages("compressed", "detail")
def compress(patch, _, rng):
    buffer = io.BytesIO()
    Image.fromarray(patch).save(buffer, "JPEG", quality=int(rng.integers(3, 18)))
    return np.asarray(Image.open(buffer))


@damages("pixelated", "detail")
def pixelate(patch, _, rng):
    step = int(rng.choice((2, 3, 4)))
    return patch[::step, ::step].repeat(step, 0).repeat(step, 1)


@damages("half missing", "partial")
def lose_half(patch, _, rng):
    turned = np.rot90(patch, rng.integers(4)).copy()
    turned[: rng.integers(SIZE // 3, 2 * SIZE // 3)] = rng.choice((0, 255))
    return turned


@damages("framed", "partial")
def add_frame(patch, _, rng):
    width = rng.integers(3, 16)
    framed = np.full_like(patch, rng.choice((0, 255)))
    framed[width:-width, width:-width] = patch[width:-width, width:-width]
    return framed


@damages("strip missing", "partial")
def lose_strip(patch, _, rng):
    turned = np.rot90(patch, rng.integers(4)).copy()
    width = rng.integers(3, 16)
    start = rng.integers(0, SIZE - width)
    turned[start : start + width] = rng.choice((0, 255))
    return turned


@damages("block missing", "partial")
def lose_block(patch, _, rng):
    height, width = rng.integers(14, 56, 2)
    y, x = rng.integers(0, SIZE - height), rng.integers(0, SIZE - width)
    patch[y : y + height, x : x + width] = rng.choice((0, 255, rng.integers(1, 255)))
    return patch


@damages("blank", "blank")
def empty(patch, _, rng):
    glass = rng.uniform(205, 250) + rng.normal(0, 4, 3)
    return glass + rng.normal(0, rng.uniform(1, 5), patch.shape) + (patch - patch.mean()) * 0.06


@damages("centre of another", "outlier")
def replace_centre(patch, other, _rng):
    patch[32:64, 32:64] = other[32:64, 32:64]
    return patch
