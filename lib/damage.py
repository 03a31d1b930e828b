"""Alterations of a patch, with which synthetic data and planted copies give an audit something to
find.
"""

import io

import numpy as np
from PIL import Image


def alter_patch(
    kind: str, image: np.ndarray, rng, least_quality: int = 70
) -> tuple[np.ndarray, str]:
    """(altered copy, words for it) of a patch uint8 (96, 96, 3). The kinds are symmetric,
    brightened and recompressed; any other kind leaves the patch as it is.
    """
    if kind == "symmetric":
        turns, is_mirrored = divmod(int(rng.integers(1, 8)), 2)
        turned = np.rot90(image, turns)
        if is_mirrored:
            return turned[:, ::-1], f"turned {90 * turns} mirrored"
        return turned, f"turned {90 * turns}"
    if kind == "brightened":
        factor = rng.uniform(1.02, 1.1)
        brighter = np.minimum(image * factor + 0.5, 255)
        return brighter.astype(np.uint8), f"times {factor:.3f}"
    if kind == "recompressed":
        buffer = io.BytesIO()
        quality = int(rng.integers(least_quality, 96))
        Image.fromarray(image).save(buffer, "JPEG", quality=quality)
        return np.asarray(Image.open(buffer)), f"quality {quality}"
    return image, "same bytes"
