"""What the training data look like, in a few numbers, and whether other patches look like that."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np

from lib.device import num_cores
from lib.features import NAMES, compute_features, count_values, grey_planes

MOST_ROWS = 4_000  # of a split, drawn evenly: enough for means and quantiles
CERTAINTY = 0.999  # share of the validation patches that lie within the limit of a single patch
# training deviations by which the mean of a batch may lie beside that of any part of validation
MOST_SHIFT = 0.35
CHANCE = 3.0  # standard errors that are granted to the mean of a small batch
BLOCK = 64


def measure_features(patches: np.ndarray) -> np.ndarray:
    """Features float64 (B, 6), columns as lib.features.NAMES, of patches uint8 (B, 96, 96, 3)."""

    def measure(start: int) -> np.ndarray:
        part = patches[start : start + BLOCK]
        found = compute_features(part, count_values(part), grey_planes(part))
        return np.stack([found[name] for name in NAMES], 1).astype(np.float64)

    with ThreadPoolExecutor(num_cores()) as pool:
        return np.concatenate(
            [np.empty((0, len(NAMES))), *pool.map(measure, range(0, len(patches), BLOCK))]
        )


def build_reference(train: np.ndarray, valid: np.ndarray, groups: np.ndarray) -> dict:
    """Reference statistics as plain values: mean and covariance of the features (N, 6) of training
    patches, the limit of a single patch's score, and that of a batch's, both set on validation
    patches (M, 6), whose groups (M,), slides where they are known, say how much the mean of a batch
    from elsewhere may differ."""
    deviation = np.maximum(train.std(0), 1e-6)
    correlation = np.corrcoef(((train - train.mean(0)) / deviation).T) + 1e-3 * np.eye(len(NAMES))
    reference = {
        "mean": train.mean(0).tolist(),
        "deviation": deviation.tolist(),
        "inverse_correlation": np.linalg.inv(correlation).tolist(),
        "num": len(train),
    }
    names, sizes = np.unique(groups, return_counts=True)
    # slides, not groups of a few copies
    large = names[sizes >= 2 * len(NAMES)] if len(names) < len(valid) / 10 else []
    parts = [valid, *(valid[groups == name] for name in large)]
    shifts = [np.abs(feature_shifts(part, reference)).max() for part in parts]
    limit = float(np.quantile(patch_scores(valid, reference), CERTAINTY))
    return reference | {"limit": limit, "shift_limit": float(MOST_SHIFT + max(shifts))}


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
    return np.sqrt(
        np.einsum("bi,ij,bj->b", away, np.array(reference["inverse_correlation"]), away)
        / len(NAMES)
    )


def farthest_features(features: np.ndarray, reference: dict) -> np.ndarray:
    """The name of the feature by which each patch differs most, (B,)."""
    return np.array(NAMES)[
        (np.abs(features - reference["mean"]) / reference["deviation"]).argmax(1)
    ]


def judge_batch(features: np.ndarray, reference: dict) -> dict:
    """Whether a batch of patches looks like the training data: the largest shift of a feature's
    mean, in training deviations, against a limit that grants chance to few patches; and the share
    of patches beyond the limit of a single one."""
    shifts = feature_shifts(features, reference)
    worst = int(np.abs(shifts).argmax())
    limit = reference["shift_limit"] + CHANCE / np.sqrt(len(features))
    beyond = float((patch_scores(features, reference) > reference["limit"]).mean())
    return {
        "shift": float(shifts[worst]),
        "feature": NAMES[worst],
        "shift_limit": float(limit),
        "share_beyond": beyond,
        "drifted": bool(
            abs(shifts[worst]) > limit
            or beyond > 20 * (1 - CERTAINTY) + CHANCE * np.sqrt(0.02 / len(features))
        ),
    }
