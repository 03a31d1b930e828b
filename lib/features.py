"""What a patch looks like in a few numbers: brightness, contrast, saturation, stain and sharpness,
tissue and nuclei.
"""

import numpy as np

from lib.pcam import PATCH_SHAPE

# optical densities in R, G, B of haematoxylin, eosin and what is left (Ruifrok and Johnston 2001);
# rows of unit length
STAINS = np.array([[0.650, 0.704, 0.286], [0.072, 0.990, 0.105], [0.268, 0.570, 0.776]])
UNMIX = np.linalg.inv(STAINS / np.linalg.norm(STAINS, axis=1, keepdims=True))
DENSITY = -np.log10((np.arange(256) + 1) / 256)
NAMES = ("brightness", "contrast", "saturation", "haematoxylin", "eosin", "sharpness")
LEAST_DENSITY = 0.15  # optical density of a pixel with tissue (Macenko et al. 2009)
# pixels between the middles of two nuclei; how much denser than around, in haematoxylin
NUCLEUS_PX, LEAST_NUCLEUS = 7, 0.06


def count_values(patches: np.ndarray) -> np.ndarray:
    """How often each value occurs in each channel of patches uint8 (B, 96, 96, 3): int64 (B, 3,
    256).
    """
    planes = np.ascontiguousarray(patches.transpose(0, 3, 1, 2)).reshape(
        -1, PATCH_SHAPE[0] * PATCH_SHAPE[1]
    )
    return np.array([np.bincount(plane, minlength=256) for plane in planes], np.int64).reshape(
        -1, 3, 256
    )


def grey_planes(patches: np.ndarray) -> np.ndarray:
    """The mean of the channels of patches uint8 (B, 96, 96, 3), float32 (96, 96, B): loops over
    pixels run along B.
    """
    # no matrix product: BLAS would start threads of its own
    grey = np.add(patches[..., 0], patches[..., 1], dtype=np.uint16)
    grey += patches[..., 2]
    return np.ascontiguousarray(grey.transpose(1, 2, 0)) / np.float32(3)


def mean_around(values: np.ndarray, step: int) -> np.ndarray:
    """(H, W, B) averaged over 3x3 pixels that lie `step` apart; the result is 2 `step` smaller."""
    rows = values[: -2 * step] + values[step:-step] + values[2 * step :]
    rows = rows[:, : -2 * step] + rows[:, step:-step] + rows[:, 2 * step :]
    return np.multiply(rows, np.float32(1 / 9), out=rows)


def extreme_around(values: np.ndarray, extreme, window: int) -> np.ndarray:
    """The extreme of `window` x `window` pixels (an odd number) around each of (H, W, B); outside
    there is nothing.
    """
    for axis in (0, 1):
        values = np.pad(
            values,
            [(window // 2, window // 2) if axis == side else (0, 0) for side in range(3)],
            "edge",
        )
        reach = 1
        while reach < window:  # doubled each time
            step = min(reach, window - reach)
            first, second = (
                (values[:-step], values[step:])
                if axis == 0
                else (values[:, :-step], values[:, step:])
            )
            values, reach = extreme(first, second), reach + step
    return values


def colour_statistics(counts: np.ndarray) -> np.ndarray:
    """float64 (B, 9): mean and deviation of each channel, and mean concentration of each stain and
    of what is left, from the value counts (B, 3, 256) of patches: all that they say of colour
    without saying where."""
    values, num = np.arange(256.0), PATCH_SHAPE[0] * PATCH_SHAPE[1]
    mean = counts @ values / num
    deviation = np.sqrt(np.maximum(counts @ values**2 / num - mean**2, 0))
    return np.concatenate([mean, deviation, counts @ DENSITY / num @ UNMIX], 1)


def compute_tissue(patches: np.ndarray) -> dict[str, np.ndarray]:
    """float32 (B,) of patches uint8 (B, 96, 96, 3): `tissue_share`, of the pixels that are denser
    than glass in some channel, and `nuclear_density`, blobs of haematoxylin that stand out from
    what lies around them, per patch (in the manner of Al-Kofahi et al. 2010: unmix the stains, then
    the maxima of a Laplacian of a Gaussian, here a difference of boxes)."""
    tissue = (DENSITY[patches.min(3)] > LEAST_DENSITY).mean((1, 2))
    density, weights = DENSITY.astype(np.float32), UNMIX[:, 0].astype(np.float32)
    stain = sum(density[patches[..., channel]] * weights[channel] for channel in range(3))
    fine = mean_around(mean_around(mean_around(stain.transpose(1, 2, 0), 1), 1), 1)  # (90, 90, B)
    blob = fine[8:-8, 8:-8] - mean_around(mean_around(fine, 4), 4)
    peaks = (blob == extreme_around(blob, np.maximum, NUCLEUS_PX)) & (blob > LEAST_NUCLEUS)
    return {
        "tissue_share": tissue.astype(np.float32),
        "nuclear_density": peaks.sum((0, 1), dtype=np.float32),
    }


def compute_features(
    patches: np.ndarray, counts: np.ndarray, grey: np.ndarray
) -> dict[str, np.ndarray]:
    """float32 (B,) by NAMES, of patches with their value counts and grey planes: brightness and
    contrast (the mean of the channels' deviations) in 0..255, saturation (Smith 1978) in 0..1, mean
    concentration of each stain in optical density, sharpness as the mean difference of neighbours
    over that of pixels two apart, which blurring brings down to a half. And `deviation`, the
    largest of a channel, by which a patch is flat."""
    mean, deviation, stains = np.split(colour_statistics(counts), 3, 1)  # (B, 3) each
    red, green, blue = (patches[..., channel] for channel in range(3))
    widest = np.maximum(np.maximum(red, green), blue)
    spread = widest - np.minimum(np.minimum(red, green), blue)

    saturation = (spread / np.maximum(widest, 1).astype(np.float32)).mean((1, 2))

    def difference(step):  # in place: new memory would cost more than the arithmetic
        parts = grey[step:] - grey[:-step], grey[:, step:] - grey[:, :-step]
        return sum(np.abs(part, out=part).mean((0, 1)) for part in parts)

    sharpness = difference(1) / np.maximum(difference(2), 1e-3)
    columns = (
        mean.mean(1),
        deviation.mean(1),
        saturation,
        stains[:, 0],
        stains[:, 1],
        sharpness,
        deviation.max(1),
    )
    return {
        name: np.asarray(column, np.float32)
        for name, column in zip((*NAMES, "deviation"), columns, strict=True)
    }
