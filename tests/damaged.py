"""Editions of real or synthetic patches with known damage, for tests and proofs of the data
audit.
"""

import io
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from lib.pcam import open_split, split_path
from lib.splitwriter import SplitWriter


def write_damaged_edition(source, to, num_train: int, seed: int = 0) -> list[dict]:
    """A damaged edition as a course distributes one: 32-bit floats, five negatives for each
    positive, in train 14% of patches black or white, 3% with NaN in a part, 3% with values up to
    100,000 in a small block. Gives rows of truth."""
    rng, truth = np.random.default_rng(seed), []
    Path(to).mkdir(parents=True)
    train, valid = open_split(source, "train"), open_split(source, "valid")
    negative, positive = (
        rng.permutation(np.flatnonzero(train.labels == label)) for label in (0, 1)
    )
    num_positive = min(num_train // 6, len(positive))
    rows = np.sort(np.concatenate([negative[: num_train - num_positive], positive[:num_positive]]))
    kinds = rng.choice(
        ["", "black", "white", "nan", "range"], len(rows), p=[0.80, 0.07, 0.07, 0.03, 0.03]
    )
    with SplitWriter(to, "train", len(rows), np.float32) as writer:
        for place, (row, kind) in enumerate(zip(rows.tolist(), kinds.tolist(), strict=True)):
            patch = train.images.read([row]).astype(np.float32)
            side = int(rng.integers(8, 65) if kind == "nan" else rng.integers(2, 9))
            y, x = rng.integers(0, 97 - side, 2)
            if kind in ("black", "white"):
                patch[:] = 255 * (kind == "white")
            elif kind == "nan":
                patch[0, y : y + side, x : x + side] = np.nan
            elif kind == "range":
                patch[0, y : y + side, x : x + side] = rng.uniform(1_000, 100_000, (side, side, 3))
            if kind:
                truth.append({"split": "train", "index": place, "reason": kind})
            writer.add(patch, train.labels[[row]])
    with SplitWriter(to, "valid", len(valid), np.float32) as writer:
        for start, block in valid.images.blocks(256):
            writer.add(block.astype(np.float32), valid.labels[start : start + len(block)])
    return truth


def write_flipped_edition(source, to, share: float, seed: int = 0) -> list[dict]:
    """The same files with a share of the labels of train exchanged; gives rows of truth."""
    from lib.splitwriter import write_labels

    Path(to).mkdir(parents=True)
    for name in ("train", "valid"):
        for part in ("x", "y", "meta"):
            if (path := split_path(source, name, part)).exists() and (name, part) != ("train", "y"):
                split_path(to, name, part).symlink_to(path.resolve())
    labels = open_split(source, "train").labels.copy()
    rows = np.sort(
        np.random.default_rng(seed).choice(len(labels), round(share * len(labels)), replace=False)
    )
    labels[rows] ^= 1
    write_labels(split_path(to, "train", "y"), labels)
    return [{"split": "train", "index": int(row), "reason": "label"} for row in rows]


def score_quarantine(truth: list[dict], quarantine: list[dict], reason: str) -> dict:
    """Recall and precision of the rows that quarantine.csv lists for a reason."""
    wanted = {(row["split"], int(row["index"])) for row in truth if row["reason"] == reason}
    listed = {(row["split"], int(row["index"])) for row in quarantine if row["reason"] == reason}
    hits = len(wanted & listed)
    recall, precision = (hits / len(part) if part else float("nan") for part in (wanted, listed))
    return {
        "reason": reason,
        "planted": len(wanted),
        "listed": len(listed),
        "recall": recall,
        "precision": precision,
    }


def with_picture(change):
    """A kind of damage from a function of (picture, rng) to a picture or None, for in place."""

    def damage(patch, _, rng):
        picture = Image.fromarray(patch)
        return np.asarray(change(picture, rng) or picture)

    return damage


def compress(picture, rng):
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=int(rng.integers(5, 16)))
    return Image.open(buffer).convert("RGB")


def draw_pen(picture, rng):
    line = [tuple(point) for point in rng.integers(0, 96, (2, 2)).tolist()]
    ImageDraw.Draw(picture).line(line, fill=(20, 60, 160), width=8)


def turn_hue(patch, _, rng):
    hue = np.array(Image.fromarray(patch).convert("HSV"))
    hue[..., 0] += np.uint8(rng.choice((40, 64, 96, 128)))
    return np.asarray(Image.fromarray(hue, "HSV").convert("RGB"))


def black_half(patch, _, rng):
    turned = np.rot90(patch, rng.integers(4)).copy()
    turned[:48] = 0
    return turned


def white_half(patch, _, rng):
    turned = np.rot90(patch, rng.integers(4)).copy()
    turned[:48] = 255
    return turned


def frame(patch, _, rng):
    width = rng.integers(4, 12)
    inner = patch[width:-width, width:-width]
    margin = ((width, width), (width, width), (0, 0))
    return np.pad(inner, margin, constant_values=int(rng.choice((0, 255))))


def strip(patch, _, rng):
    turned = np.rot90(patch, rng.integers(4)).copy()
    start = rng.integers(0, 84)
    turned[start : start + rng.integers(4, 12)] = rng.choice((0, 255))
    return turned


def centre_of_another(patch, other, _rng):
    patch = patch.copy()
    patch[32:64, 32:64] = other[32:64, 32:64]
    return patch


def salt(patch, _, rng):
    patch = patch.copy()
    patch[rng.random((96, 96)) < 0.03] = rng.choice((0, 255))
    return patch


def shuffle_tiles(patch, _, rng):
    tiles = patch.reshape(3, 32, 3, 32, 3).swapaxes(1, 2).reshape(9, 32, 32, 3)
    tiles = tiles[rng.permutation(9)].reshape(3, 3, 32, 32, 3)
    return tiles.swapaxes(1, 2).reshape(96, 96, 3)


def wave(patch, _, _rng):
    y, x = np.indices((96, 96))
    return patch + 12 * np.sin((y + x) * np.pi / 3)[..., None]


def comb(patch, _, _rng):
    patch = patch.copy()
    patch[::2] = np.roll(patch[::2], 5, 1)
    return patch


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
    "black half": (True, black_half),
    "white half": (True, white_half),
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
