"""What a patch looks like in a few numbers: brightness, contrast, saturation, stain and sharpness."""

import numpy as np

from lib.pcam import PATCH_SHAPE

# optical densities in R, G, B of haematoxylin, eosin and what is left (Ruifrok and Johnston 2001); rows of unit length
STAINS = np.array([[0.650, 0.704, 0.286], [0.072, 0.990, 0.105], [0.268, 0.570, 0.776]])
UNMIX = np.linalg.inv(STAINS / np.linalg.norm(STAINS, axis=1, keepdims=True))
DENSITY = -np.log10((np.arange(256) + 1) / 256)
NAMES = ("brightness", "contrast", "saturation", "haematoxylin", "eosin", "sharpness")


def count_values(patches: np.ndarray) -> np.ndarray:
    """How often each value occurs in each channel of patches uint8 (B, 96, 96, 3): int64 (B, 3, 256)."""
    first = np.arange(3) * 256 + np.arange(len(patches))[:, None, None, None] * 768
    return np.bincount((patches + first).ravel(), minlength=768 * len(patches)).reshape(-1, 3, 256)


def grey_planes(patches: np.ndarray) -> np.ndarray:
    """The mean of the channels of patches uint8 (B, 96, 96, 3), float32 (96, 96, B): loops over pixels run along B."""
    grey = np.add(patches[..., 0], patches[..., 1], dtype=np.float32)  # no matrix product: BLAS would start threads of its own
    grey += patches[..., 2]
    return np.ascontiguousarray(grey.transpose(1, 2, 0)) / np.float32(3)


def compute_features(patches: np.ndarray, counts: np.ndarray, grey: np.ndarray) -> dict[str, np.ndarray]:
    """float32 (B,) by NAMES, of patches with their value counts and grey planes: brightness and contrast (the mean of the
    channels' deviations) in 0..255, saturation (Smith 1978) in 0..1, mean concentration of each stain in optical density,
    sharpness as the mean difference of neighbours over that of pixels two apart, which blurring brings down to a half. And
    `deviation`, the largest of a channel, by which a patch is flat."""
    values, num = np.arange(256.0), PATCH_SHAPE[0] * PATCH_SHAPE[1]
    mean = counts @ values / num  # (B, 3)
    deviation = np.sqrt(np.maximum(counts @ values**2 / num - mean**2, 0))
    red, green, blue = (patches[..., channel] for channel in range(3))
    widest = np.maximum(np.maximum(red, green), blue)
    spread = widest - np.minimum(np.minimum(red, green), blue)
    stains = counts @ DENSITY / num @ UNMIX
    near, far = (
        sum(np.abs(a - b).mean((0, 1)) for a, b in ((grey[step:], grey[:-step]), (grey[:, step:], grey[:, :-step])))
        for step in (1, 2)
    )
    columns = (
        mean.mean(1),
        deviation.mean(1),
        (spread / np.maximum(widest, 1).astype(np.float32)).mean((1, 2)),
        stains[:, 0],
        stains[:, 1],
        near / np.maximum(far, 1e-3),
    )
    named = zip((*NAMES, "deviation"), (*columns, deviation.max(1)), strict=True)
    return {name: np.asarray(column, np.float32) for name, column in named}
