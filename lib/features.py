"""Six features of a patch (brightness, contrast, saturation, two stains, sharpness), and whether
patches look like the training data by them.
"""

import numpy as np

from lib.pcam import PATCH_SHAPE

# optical densities in R, G, B of haematoxylin, eosin and the rest (Ruifrok and Johnston 2001)
STAINS = np.array([[0.650, 0.704, 0.286], [0.072, 0.990, 0.105], [0.268, 0.570, 0.776]])
UNMIX = np.linalg.inv(STAINS / np.linalg.norm(STAINS, axis=1, keepdims=True))
DENSITY = -np.log10((np.arange(256) + 1) / 256)  # optical density of each value in 0..255
NAMES = ("brightness", "contrast", "saturation", "haematoxylin", "eosin", "sharpness")
NUM_PIXELS = PATCH_SHAPE[0] * PATCH_SHAPE[1]
BLOCK = 64  # patches measured at a time

MAX_REFERENCE_ROWS = 4_000  # of a split, drawn evenly: enough for means and quantiles
CERTAINTY = 0.999  # share of the validation patches that lie within the limit of a single patch
# training deviations by which a feature's mean may shift more than in any part of validation
MAX_SHIFT = 0.35
MAX_BEYOND = 0.02  # share of a batch that may lie beyond the limit of a single patch
CHANCE = 3.0  # standard errors by which the mean of a small batch may differ by chance


def count_values(patches: np.ndarray) -> np.ndarray:
    """How often each value occurs in each channel of patches uint8 (B, 96, 96, 3): int64 (B, 3,
    256).
    """
    planes = patches.transpose(0, 3, 1, 2).reshape(-1, NUM_PIXELS)
    counts = [np.bincount(plane, minlength=256) for plane in planes]
    return np.reshape(counts, (-1, 3, 256))


def grey_planes(patches: np.ndarray) -> np.ndarray:
    """The mean of the channels of patches uint8 (B, 96, 96, 3), float32 (96, 96, B). B comes last,
    so that numpy's inner loops are long.
    """
    # no matrix product: BLAS would start threads of its own
    total = np.add(patches[..., 0], patches[..., 1], dtype=np.uint16)
    total += patches[..., 2]
    return np.ascontiguousarray(total.transpose(1, 2, 0)) / np.float32(3)


def mean_difference(grey: np.ndarray, step: int) -> np.ndarray:
    """The mean absolute difference of pixels `step` apart, down plus right, (B,), of grey planes
    (96, 96, B).
    """
    down = grey[step:] - grey[:-step]
    right = grey[:, step:] - grey[:, :-step]
    # in place: new memory would cost more than the arithmetic
    return np.abs(down, down).mean((0, 1)) + np.abs(right, right).mean((0, 1))


def compute_features(
    patches: np.ndarray, counts: np.ndarray, grey: np.ndarray
) -> dict[str, np.ndarray]:
    """{feature: float32 (B,)} of patches, their value counts and their grey planes.

    - brightness: the mean of all values, in 0..255
    - contrast: the mean of the channels' deviations, in 0..255
    - saturation (Smith 1978), in 0..1
    - haematoxylin, eosin: mean concentrations, in optical density
    - sharpness: the mean difference of neighbours over that of pixels two apart; blurring brings it
      down to a half
    - deviation: the largest of the channels' deviations. It is none of NAMES; audits find flat
      patches by it.
    """
    values = np.arange(256.0)
    means = counts @ values / NUM_PIXELS  # (B, 3), as the next two
    variances = counts @ values**2 / NUM_PIXELS - means**2
    deviations = np.sqrt(np.maximum(variances, 0))
    stains = counts @ DENSITY / NUM_PIXELS @ UNMIX
    # patches.max(3) takes ten times as long
    red, green, blue = np.moveaxis(patches, 3, 0)
    highest = np.maximum(np.maximum(red, green), blue)
    lowest = np.minimum(np.minimum(red, green), blue)
    saturation = (highest - lowest) / np.maximum(highest, np.float32(1))
    coarse = np.maximum(mean_difference(grey, 2), 1e-3)
    features = {
        "brightness": means.mean(1),
        "contrast": deviations.mean(1),
        "saturation": saturation.mean((1, 2)),
        "haematoxylin": stains[:, 0],
        "eosin": stains[:, 1],
        "sharpness": mean_difference(grey, 1) / coarse,
        "deviation": deviations.max(1),
    }
    return {name: values.astype(np.float32) for name, values in features.items()}


def measure_features(patches: np.ndarray) -> np.ndarray:
    """Features float64 (B, 6), columns as NAMES, of patches uint8 (B, 96, 96, 3)."""
    blocks = []
    for start in range(0, len(patches), BLOCK):
        part = patches[start : start + BLOCK]
        features = compute_features(part, count_values(part), grey_planes(part))
        blocks.append(np.stack([features[name] for name in NAMES], 1))
    return np.concatenate(blocks, dtype=np.float64)


def build_reference(train: np.ndarray, valid: np.ndarray, groups: np.ndarray) -> dict:
    """Reference statistics as plain values: mean, deviation and correlation of the features (N, 6)
    of training patches, and two limits set on validation patches (M, 6).

    `limit` is that of a single patch's score. `shift_limit` is that of the mean of a batch: it lies
    MAX_SHIFT beyond the farthest mean of the `groups` (M,), such as slides, or of all patches.
    """
    mean = train.mean(0)
    deviation = np.maximum(train.std(0), 1e-6)
    correlation = np.corrcoef((train - mean) / deviation, rowvar=False)
    correlation += 1e-3 * np.eye(len(NAMES))
    reference = {
        "mean": mean.tolist(),
        "deviation": deviation.tolist(),
        "inverse_correlation": np.linalg.inv(correlation).tolist(),
        "num": len(train),
    }
    scores = patch_scores(valid, reference)
    reference["limit"] = float(np.quantile(scores, CERTAINTY))
    shifts = [away_from(valid.mean(0), reference)]
    names, sizes = np.unique(groups, return_counts=True)
    if len(names) < len(valid) / 10:  # groups of many rows, such as slides, not of a few copies
        for name in names[sizes >= 2 * len(NAMES)]:
            shifts.append(away_from(valid[groups == name].mean(0), reference))
    reference["shift_limit"] = float(MAX_SHIFT + np.abs(shifts).max())
    return reference


def away_from(features: np.ndarray, reference: dict) -> np.ndarray:
    """Features (..., 6) minus the training data's mean, in training deviations."""
    return (features - reference["mean"]) / reference["deviation"]


def patch_scores(features: np.ndarray, reference: dict) -> np.ndarray:
    """The distance float64 (B,) of each patch from the training data's mean over all features, in
    deviations (Mahalanobis 1936).
    """
    away = away_from(features, reference)
    inverse = np.array(reference["inverse_correlation"])
    squares = np.einsum("bi,ij,bj->b", away, inverse, away)
    return np.sqrt(squares / len(NAMES))


def farthest_features(features: np.ndarray, reference: dict) -> np.ndarray:
    """The name of the feature by which each patch differs most, (B,)."""
    away = np.abs(away_from(features, reference))
    return np.array(NAMES)[away.argmax(1)]


def judge_batch(features: np.ndarray, reference: dict) -> dict:
    """Whether a batch of patches looks like the training data.

    `shift` is the largest shift of a feature's mean, in training deviations; `share_beyond` is the
    share of patches beyond the limit of a single patch. The batch has drifted if either is above
    its limit. The limits are wider for few patches, which differ by chance.
    """
    shifts = away_from(features.mean(0), reference)
    worst = np.abs(shifts).argmax()
    error = CHANCE / np.sqrt(len(features))
    shift_limit = reference["shift_limit"] + error
    is_beyond = patch_scores(features, reference) > reference["limit"]
    share_beyond = is_beyond.mean()
    # 20 times the share in validation, and CHANCE standard errors of that
    share_limit = MAX_BEYOND + error * np.sqrt(MAX_BEYOND)
    return {
        "shift": float(shifts[worst]),
        "feature": NAMES[worst],
        "shift_limit": float(shift_limit),
        "share_beyond": float(share_beyond),
        "drifted": bool(abs(shifts[worst]) > shift_limit or share_beyond > share_limit),
    }
