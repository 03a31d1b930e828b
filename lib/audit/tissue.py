"""How much of a patch is tissue, and how many nuclei it shows."""

import numpy as np

from lib.features import DENSITY, UNMIX

MIN_TISSUE_DENSITY = 0.15  # optical density of a pixel with tissue (Macenko et al. 2009)
# pixels between the middles of two nuclei; how much denser than around, in haematoxylin
NUCLEUS_PX, MIN_NUCLEUS_DENSITY = 7, 0.06


def mean_around(values: np.ndarray, step: int) -> np.ndarray:
    """(H, W, B) averaged over 3x3 pixels that lie `step` apart; the result is 2 `step` smaller."""
    rows = values[: -2 * step] + values[step:-step] + values[2 * step :]
    rows = rows[:, : -2 * step] + rows[:, step:-step] + rows[:, 2 * step :]
    return np.multiply(rows, np.float32(1 / 9), out=rows)


def smooth(planes: np.ndarray) -> np.ndarray:
    """Planes (96, 96, B) averaged over 3x3 pixels three times, (90, 90, B); pixel (3, 3) is the
    first.
    """
    for _ in range(3):
        planes = mean_around(planes, 1)
    return planes


def find_blobs(fine: np.ndarray) -> np.ndarray:
    """Smooth planes (90, 90, B) less what is smoothed wider, (74, 74, B); pixel (11, 11) of the
    patch is the first.
    """
    return fine[8:-8, 8:-8] - mean_around(mean_around(fine, 4), 4)


def extreme_around(values: np.ndarray, extreme, window: int) -> np.ndarray:
    """The extreme of `window` x `window` pixels (an odd number) around each of (H, W, B); outside
    there is nothing.
    """
    margin = window // 2
    values = np.pad(values, ((margin, margin), (margin, margin), (0, 0)), "edge")
    reach = 1
    while reach < window:  # doubled each time
        step = min(reach, window - reach)
        values = extreme(values[:-step], values[step:])
        values = extreme(values[:, :-step], values[:, step:])
        reach += step
    return values


def compute_tissue(patches: np.ndarray) -> dict[str, np.ndarray]:
    """float32 (B,) by name, of patches uint8 (B, 96, 96, 3).

    `tissue_share` is the share of pixels that are denser than glass in some channel.
    `nuclear_density` counts blobs of haematoxylin that stand out from what lies around them, in the
    manner of Al-Kofahi et al. 2010: unmix the stains, then take the maxima of a Laplacian of a
    Gaussian, here a difference of boxes.
    """
    tissue = (DENSITY[patches.min(3)] > MIN_TISSUE_DENSITY).mean((1, 2))
    density, weights = DENSITY.astype(np.float32), UNMIX[:, 0].astype(np.float32)
    stain = sum(density[patches[..., channel]] * weights[channel] for channel in range(3))
    blob = find_blobs(smooth(stain.transpose(1, 2, 0)))
    is_highest = blob == extreme_around(blob, np.maximum, NUCLEUS_PX)
    peaks = is_highest & (blob > MIN_NUCLEUS_DENSITY)
    return {
        "tissue_share": tissue.astype(np.float32),
        "nuclear_density": peaks.sum((0, 1), dtype=np.float32),
    }
