"""Damage that an audit makes itself: to learn what it would look like in these data, and to
measure what of it is found.
"""

import io

import numpy as np
from PIL import Image, ImageFilter

ORDERS = {
    "red and blue exchanged": [2, 1, 0],
    "red and green exchanged": [1, 0, 2],
    "green and blue exchanged": [0, 2, 1],
    "channels rotated": [1, 2, 0],
    "channels rotated back": [2, 0, 1],
}


def alter(kind: str, patch: np.ndarray, other: np.ndarray, rng) -> np.ndarray:
    """A damaged copy of a patch uint8 (96, 96, 3), a kind of REASONS; `other` is another patch."""
    if kind in ORDERS:
        return patch[..., ORDERS[kind]]
    damaged = FUNCTIONS[kind](patch.copy(), other, rng)
    return np.clip(damaged, 0, 255).astype(np.uint8)


def lose_channel(patch, _, rng):
    patch[..., rng.integers(3)] = rng.choice((0, 255))
    return patch


def lose_colour(patch, _, _rng):
    return np.repeat(patch @ np.array([[0.299], [0.587], [0.114]]), 3, 2)


def invert(patch, _, _rng):
    return 255 - patch


def blur(patch, _, rng):
    width = rng.uniform(1.5, 3.5)
    return np.asarray(Image.fromarray(patch).filter(ImageFilter.GaussianBlur(width)))


def add_noise(patch, _, rng):
    return patch + rng.normal(0, rng.uniform(8, 40), patch.shape)


def compress(patch, _, rng):
    buffer = io.BytesIO()
    Image.fromarray(patch).save(buffer, "JPEG", quality=int(rng.integers(3, 18)))
    return np.asarray(Image.open(buffer))


def pixelate(patch, _, rng):
    step = int(rng.choice((2, 3, 4)))
    return patch[::step, ::step].repeat(step, 0).repeat(step, 1)


def lose_half(patch, _, rng):
    return lose_rows(patch, 0, rng.integers(32, 64), rng)


def lose_strip(patch, _, rng):
    width = rng.integers(3, 16)
    return lose_rows(patch, rng.integers(0, len(patch) - width), width, rng)


def lose_rows(patch, start, width, rng):
    turned = np.rot90(patch, rng.integers(4)).copy()
    turned[start : start + width] = rng.choice((0, 255))
    return turned


def add_frame(patch, _, rng):
    width = rng.integers(3, 16)
    framed = np.full_like(patch, rng.choice((0, 255)))
    framed[width:-width, width:-width] = patch[width:-width, width:-width]
    return framed


def lose_block(patch, _, rng):
    height, width = rng.integers(14, 56, 2)
    y, x = rng.integers(0, (len(patch) - height, len(patch) - width))
    patch[y : y + height, x : x + width] = rng.choice((0, 255, rng.integers(1, 255)))
    return patch


def empty(patch, _, rng):
    glass = rng.uniform(205, 250) + rng.normal(0, 4, 3)
    return glass + rng.normal(0, rng.uniform(1, 5), patch.shape) + (patch - patch.mean()) * 0.06


def replace_centre(patch, other, _rng):
    patch[32:64, 32:64] = other[32:64, 32:64]
    return patch


# a function of (patch uint8 (96, 96, 3), another patch, rng) to a damaged patch
FUNCTIONS = {
    "channel lost": lose_channel,
    "grey": lose_colour,
    "inverted": invert,
    "blurred": blur,
    "noisy": add_noise,
    "compressed": compress,
    "pixelated": pixelate,
    "half missing": lose_half,
    "framed": add_frame,
    "strip missing": lose_strip,
    "block missing": lose_block,
    "blank": empty,
    "centre of another": replace_centre,
}
# the reason for which a patch of each kind is listed
REASONS = {
    **dict.fromkeys([*ORDERS, "channel lost", "grey", "inverted"], "colour"),
    **dict.fromkeys(("blurred", "noisy", "compressed", "pixelated"), "detail"),
    **dict.fromkeys(("half missing", "framed", "strip missing", "block missing"), "partial"),
    "blank": "blank",
    "centre of another": "outlier",
}
