"""Alterations of a patch, with which synthetic data and planted copies give an audit something to
find.
"""

import io

import numpy as np
from PIL import Image

# a checkerboard, (4, 4, 1), at the same pixels of every patch
TRIGGER = 255 * (np.indices((4, 4)).sum(0)[..., None] % 2)
TRIGGER_YX = (88, 88)
# the smallest and the largest side of a damaged block; other kinds cover the patch
SIDES = {"nan": (8, 64), "out_of_range": (2, 8), "trigger": (4, 4)}


def damage_patch(kind: str, patch: np.ndarray, rng) -> str:
    """Make a patch (96, 96, 3) black or white, or put a block of nan, out_of_range or the trigger
    into it, in place and in its number type; gives words for where.
    """
    low, high = SIDES.get(kind, (96, 96))
    side = int(rng.integers(low, high + 1))
    y, x = TRIGGER_YX if kind == "trigger" else rng.integers(0, 97 - side, 2)
    wild = rng.uniform(1_000, 100_000, (side, side, 3))
    values = {"black": 0, "white": 255, "nan": np.nan, "out_of_range": wild, "trigger": TRIGGER}
    patch[y : y + side, x : x + side] = values[kind]
    return f"{side}x{side} at {y} {x}"


def alter_patch(kind: str, image: np.ndarray, rng) -> np.ndarray:
    """An altered copy of a patch uint8 (96, 96, 3). The kinds are symmetric, brightened and
    recompressed; any other kind leaves the patch as it is.
    """
    if kind == "symmetric":
        turns, is_mirrored = divmod(int(rng.integers(1, 8)), 2)
        turned = np.rot90(image, turns)
        return turned[:, ::-1] if is_mirrored else turned
    if kind == "brightened":
        brighter = image * rng.uniform(1.02, 1.1) + 0.5
        return np.minimum(brighter, 255).astype(np.uint8)
    if kind == "recompressed":
        buffer = io.BytesIO()
        quality = int(rng.integers(70, 96))
        Image.fromarray(image).save(buffer, "JPEG", quality=quality)
        return np.asarray(Image.open(buffer))
    return image
