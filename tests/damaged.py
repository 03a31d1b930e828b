"""Editions of real or synthetic patches with known damage, for tests and proofs of the data
audit.
"""

import io
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from lib.pcam import open_split, split_path
from lib.splitwriter import write_labels


def write_flipped_edition(source, to, share: float, seed: int = 0) -> list[dict]:
    """The same files with a share of the labels of train exchanged; gives rows of truth."""
    Path(to).mkdir(parents=True)
    train_y = split_path(to, "train", "y")
    for path in Path(source).resolve().glob("camelyonpatch*"):
        if path.name != train_y.name:
            Path(to, path.name).symlink_to(path)
    labels = open_split(source, "train").labels.copy()
    rng = np.random.default_rng(seed)
    rows = np.sort(rng.choice(len(labels), round(share * len(labels)), replace=False))
    labels[rows] ^= 1
    write_labels(train_y, labels)
    return [{"split": "train", "index": row, "reason": "label"} for row in rows.tolist()]


def with_picture(change):
    """A kind of damage from a function of (picture, rng) to a picture."""
    return lambda patch, _, rng: np.asarray(change(Image.fromarray(patch), rng))


def compress(picture, rng):
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=int(rng.integers(5, 16)))
    return Image.open(buffer)


def draw_pen(picture, rng):
    line = rng.integers(0, 96, 4).tolist()
    ImageDraw.Draw(picture).line(line, fill=(20, 60, 160), width=8)
    return picture


def turn_hue(patch, _, rng):
    hue = np.array(Image.fromarray(patch).convert("HSV"))
    hue[..., 0] += np.uint8(rng.choice((40, 64, 96, 128)))
    return np.asarray(Image.fromarray(hue, "HSV").convert("RGB"))


def fill_strip(patch, start: int, width: int, value: int, rng):
    """A patch with a strip of one value along one of its sides."""
    turned = np.rot90(patch, rng.integers(4)).copy()
    turned[start : start + width] = value
    return turned


def strip(patch, _, rng):
    return fill_strip(patch, rng.integers(84), rng.integers(4, 12), rng.choice((0, 255)), rng)


def frame(patch, _, rng):
    width = rng.integers(4, 12)
    inner = patch[width:-width, width:-width]
    margin = ((width, width), (width, width), (0, 0))
    return np.pad(inner, margin, constant_values=int(rng.choice((0, 255))))


def centre_of_another(patch, other, _rng):
    is_centre = np.zeros((96, 96, 1), bool)
    is_centre[32:64, 32:64] = True
    return np.where(is_centre, other, patch)


def salt(patch, _, rng):
    return np.where(rng.random((96, 96, 1)) < 0.03, rng.choice((0, 255)), patch)


def shuffle_tiles(patch, _, rng):
    tiles = patch.reshape(3, 32, 3, 32, 3).swapaxes(1, 2).reshape(9, 32, 32, 3)
    tiles = tiles[rng.permutation(9)].reshape(3, 3, 32, 32, 3)
    return tiles.swapaxes(1, 2).reshape(96, 96, 3)


def wave(patch, _, _rng):
    y, x = np.indices((96, 96))
    return patch + 12 * np.sin((y + x) * np.pi / 3)[..., None]


def comb(patch, _, _rng):
    is_even = np.arange(96)[:, None, None] % 2 == 0
    return np.where(is_even, np.roll(patch, 5, 1), patch)


# kind: (whether it is gross, function of (patch, another patch, rng)); made otherwise than those
# that the audit learns from, and the lower half is of kinds that it does not learn from
KINDS = {
    "red and blue exchanged": (True, lambda patch, *_: patch[..., ::-1]),
    "red and green exchanged": (True, lambda patch, *_: patch[..., [1, 0, 2]]),
    "green and blue exchanged": (True, lambda patch, *_: patch[..., [0, 2, 1]]),
    "channels rotated": (True, lambda patch, *_: patch[..., [1, 2, 0]]),
    "a channel lost": (True, lambda patch, _, rng: patch * (np.arange(3) != rng.integers(3))),
    "grey": (True, lambda patch, *_: patch.mean(2, keepdims=True).repeat(3, 2)),
    "inverted": (True, lambda patch, *_: 255 - patch),
    "black half": (True, lambda patch, _, rng: fill_strip(patch, 0, 48, 0, rng)),
    "white half": (True, lambda patch, _, rng: fill_strip(patch, 0, 48, 255, rng)),
    "frame": (True, frame),
    "strip": (True, strip),
    "blurred, sigma 2": (
        False,
        with_picture(lambda picture, _: picture.filter(ImageFilter.GaussianBlur(2))),
    ),
    "noise, deviation 15": (False, lambda patch, _, rng: patch + rng.normal(0, 15, patch.shape)),
    "JPEG, quality 5 to 15": (False, with_picture(compress)),
    "centre of another patch": (False, centre_of_another),
    "hue turned": (False, turn_hue),
    "gamma 2.2": (False, lambda patch, *_: 255 * (patch / 255) ** 2.2),
    "two bits a channel": (False, lambda patch, *_: patch & 192),
    "contrast of 0.4": (False, lambda patch, *_: patch * 0.4 + 100),
    "salt and pepper, 3%": (False, salt),
    "tiles shuffled": (False, shuffle_tiles),
    "every other row moved": (False, comb),
    "pen stroke": (False, with_picture(draw_pen)),
    "another patch blended in": (False, lambda patch, other, _: patch * 0.5 + other * 0.5),
    "faint wave": (False, wave),
}
