"""What patches look like in a few numbers, and whether other patches look like the training data.

Brightness, contrast, saturation, stain and sharpness; tissue and nuclei.
"""

import numpy as np

from lib.pcam import PATCH_SHAPE

# optical densities in R, G, B of haematoxylin, eosin and what is left (Ruifrok and Johnston 2001);
# rows of unit length
STAINS = np.array([[0.650, 0.704, 0.286], [0.072, 0.990, 0.105], [0.268, 0.570, 0.776]])
UNMIX = np.linalg.inv(STAINS / np.linalg.norm(STAINS, axis=1, keepdims=True))
DENSITY = -np.log10((np.arange(256) + 1) / 256)
NAMES = ("brightness", "contrast", "saturation", "haematoxylin", "eosin", "sharpness")
MIN_TISSUE_DENSITY = 0.15  # optical density of a pixel with tissue (Macenko et al. 2009)
# pixels between the middles of two nuclei; how much denser than around, in haematoxylin
NUCLEUS_PX, MIN_NUCLEUS_DENSITY = 7, 0.06
BLOCK = 64  # patches measured at a time

MAX_REFERENCE_ROWS = 4_000  # of a split, drawn evenly: enough for means and quantiles
CERTAINTY = 0.999  # share of the validation patches that lie within the limit of a single patch
# training deviations by which the mean of a batch may lie beside that of any part of validation
MAX_SHIFT = 0.35
CHANCE = 3.0  # standard errors that are granted to the mean of a small batch


def count_values(patches: np.ndarray) -> np.ndarray:
    """How often each value occurs in each channel of patches uint8 (B, 96, 96, 3): int64 (B, 3,
    256).
    """
    planes = patches.transpose(0, 3, 1, 2).reshape(-1, PATCH_SHAPE[0] * PATCH_SHAPE[1])
    counts = np.array([np.bincount(plane, minlength=256) for plane in planes], np.int64)
    return counts.reshape(-1, 3, 256)


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
    margin = window // 2
    values = np.pad(values, ((margin, margin), (margin, margin), (0, 0)), "edge")
    reach = 1
    while reach < window:  # doubled each time
        step = min(reach, window - reach)
        values = extreme(values[:-step], values[step:])
        values = extreme(values[:, :-step], values[:, step:])
        reach += step
    return values


def colour_statistics(counts: np.ndarray) -> np.ndarray:
    """float64 (B, 9): mean and deviation of each channel, and mean concentration of each stain and
    of what is left, from the value counts (B, 3, 256) of patches: all that they say of colour
    without saying where.
    """
    values, num = np.arange(256.0), PATCH_SHAPE[0] * PATCH_SHAPE[1]
    mean = counts @ values / num
    variance = counts @ values**2 / num - mean**2
    deviation = np.sqrt(np.maximum(variance, 0))
    stains = counts @ DENSITY / num @ UNMIX
    return np.concatenate([mean, deviation, stains], 1)


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
    fine = mean_around(mean_around(mean_around(stain.transpose(1, 2, 0), 1), 1), 1)  # (90, 90, B)
    blob = fine[8:-8, 8:-8] - mean_around(mean_around(fine, 4), 4)
    is_highest = blob == extreme_around(blob, np.maximum, NUCLEUS_PX)
    peaks = is_highest & (blob > MIN_NUCLEUS_DENSITY)
    return {
        "tissue_share": tissue.astype(np.float32),
        "nuclear_density": peaks.sum((0, 1), dtype=np.float32),
    }


def mean_difference(grey: np.ndarray, step: int) -> np.ndarray:
    """The mean difference of pixels `step` apart, down plus right, (B,), of grey planes (96, 96,
    B).
    """
    total = 0
    for part in (grey[step:] - grey[:-step], grey[:, step:] - grey[:, :-step]):
        np.abs(part, out=part)  # in place: new memory would cost more than the arithmetic
        total = total + part.mean((0, 1))
    return total


def compute_features(
    patches: np.ndarray, counts: np.ndarray, grey: np.ndarray
) -> dict[str, np.ndarray]:
    """float32 (B,) by NAMES, of patches with their value counts and grey planes.

    - brightness, and contrast (the mean of the channels' deviations), in 0..255
    - saturation (Smith 1978) in 0..1
    - haematoxylin, eosin: mean concentration in optical density
    - sharpness: the mean difference of neighbours over that of pixels two apart, which blurring
      brings down to a half

    And `deviation`, the largest of a channel, by which a patch is flat.
    """
    mean, deviation, stains = np.split(colour_statistics(counts), 3, 1)  # (B, 3) each
    red, green, blue = (patches[..., channel] for channel in range(3))
    highest = np.maximum(np.maximum(red, green), blue)
    spread = highest - np.minimum(np.minimum(red, green), blue)
    saturation = spread / np.maximum(highest, 1).astype(np.float32)
    features = {
        "brightness": mean.mean(1),
        "contrast": deviation.mean(1),
        "saturation": saturation.mean((1, 2)),
        "haematoxylin": stains[:, 0],
        "eosin": stains[:, 1],
        "sharpness": mean_difference(grey, 1) / np.maximum(mean_difference(grey, 2), 1e-3),
        "deviation": deviation.max(1),
    }
    return {name: values.astype(np.float32) for name, values in features.items()}


def measure_features(patches: np.ndarray) -> np.ndarray:
    """Features float64 (B, 6), columns as NAMES, of patches uint8 (B, 96, 96, 3)."""
    parts = []
    for start in range(0, len(patches), BLOCK):
        part = patches[start : start + BLOCK]
        features = compute_features(part, count_values(part), grey_planes(part))
        parts.append(np.stack([features[name] for name in NAMES], 1))
    return np.concatenate(parts).astype(np.float64)


def build_reference(train: np.ndarray, valid: np.ndarray, groups: np.ndarray) -> dict:
    """Reference statistics as plain values: mean and covariance of the features (N, 6) of training
    patches, and two limits set on validation patches (M, 6).

    One limit is that of a single patch's score, one that of a batch's shift. `groups` (M,), slides
    where they are known, say how much the mean of a batch from elsewhere may differ.
    """
    deviation = np.maximum(train.std(0), 1e-6)
    correlation = np.corrcoef(((train - train.mean(0)) / deviation).T) + 1e-3 * np.eye(len(NAMES))
    reference = {
        "mean": train.mean(0).tolist(),
        "deviation": deviation.tolist(),
        "inverse_correlation": np.linalg.inv(correlation).tolist(),
        "num": len(train),
    }
    reference["limit"] = float(np.quantile(patch_scores(valid, reference), CERTAINTY))
    parts = [valid]
    names, sizes = np.unique(groups, return_counts=True)
    if len(names) < len(valid) / 10:  # slides, not groups of a few copies
        parts += [valid[groups == name] for name in names[sizes >= 2 * len(NAMES)]]
    shift = max(np.abs(feature_shifts(part, reference)).max() for part in parts)
    reference["shift_limit"] = float(MAX_SHIFT + shift)
    return reference


def feature_shifts(features: np.ndarray, reference: dict) -> np.ndarray:
    """How far the means of features (B, 6) lie from the training data's, in training deviations,
    (6,).
    """
    return (features.mean(0) - reference["mean"]) / reference["deviation"]


def patch_scores(features: np.ndarray, reference: dict) -> np.ndarray:
    """Distance float64 (B,) of each patch from the training data's mean, in deviations over all
    features (Mahalanobis 1936).
    """
    away = (features - reference["mean"]) / reference["deviation"]
    inverse = np.array(reference["inverse_correlation"])
    return np.sqrt(np.einsum("bi,ij,bj->b", away, inverse, away) / len(NAMES))


def farthest_features(features: np.ndarray, reference: dict) -> np.ndarray:
    """The name of the feature by which each patch differs most, (B,)."""
    away = np.abs(features - reference["mean"]) / reference["deviation"]
    return np.array(NAMES)[away.argmax(1)]


def judge_batch(features: np.ndarray, reference: dict) -> dict:
    """Whether a batch of patches looks like the training data.

    Two things are held against a limit that grants chance to few patches: the largest shift of a
    feature's mean, in training deviations, and the share of patches beyond the limit of a single
    one.
    """
    num = len(features)
    shifts = feature_shifts(features, reference)
    worst = int(np.abs(shifts).argmax())
    shift_limit = reference["shift_limit"] + CHANCE / np.sqrt(num)
    share_beyond = float((patch_scores(features, reference) > reference["limit"]).mean())
    share_limit = 20 * (1 - CERTAINTY) + CHANCE * np.sqrt(0.02 / num)
    return {
        "shift": float(shifts[worst]),
        "feature": NAMES[worst],
        "shift_limit": float(shift_limit),
        "share_beyond": share_beyond,
        "drifted": bool(abs(shifts[worst]) > shift_limit or share_beyond > share_limit),
    }
