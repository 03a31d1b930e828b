"""Scores with intervals: whole groups of patches are drawn again and again (cluster bootstrap)."""

import math

import numpy as np

from lib.metrics import as_arrays

NUM_RESAMPLES = 1_000
CHUNK = 64  # resamples that are computed at once
LEAST_GROUPS = 8  # fewer of them vary too little: no interval


def draw_weights(groups, num: int = NUM_RESAMPLES, seed: int = 0) -> np.ndarray:
    """How often each row counts, uint8 (1 + num, N): once in the first resample, which gives the
    score itself, and in the others as often as its group (N,) is drawn, with replacement.

    There are no others where there are fewer than LEAST_GROUPS groups.
    """
    names, group = np.unique(groups, return_inverse=True)
    num_groups = len(names)
    num = num if num_groups >= LEAST_GROUPS else 0
    equal = np.full(num_groups, 1 / num_groups)
    drawn = np.random.default_rng(seed).multinomial(num_groups, equal, num)
    drawn = np.insert(drawn, 0, 1, axis=0).astype(np.uint8)
    return drawn[:, group]


def has_few_groups(weights: np.ndarray) -> bool:
    """Whether rows (N,) of weights (1 + R, N) are of fewer than LEAST_GROUPS groups. Rows of one
    group are known by being drawn equally often in each resample.
    """
    return np.unique(weights[:33], axis=1).shape[1] < LEAST_GROUPS


def estimate(values: np.ndarray) -> tuple[float, float, float]:
    """(value, low, high) of a score from its values float64 (1 + R,) over the resamples of
    `draw_weights`: the first, and the 95% percentile interval of the others (Efron 1979).

    The interval is NaN where there are no others, or more than one in twenty is not defined.
    """
    value = float(values[0])
    resampled = values[1:]
    if not len(resampled) or np.isnan(resampled).mean() > 0.05:
        return value, math.nan, math.nan
    low, high = np.nanquantile(resampled, [0.025, 0.975]).tolist()
    return value, low, high


def spread(name: str, values: np.ndarray) -> dict[str, float]:
    """Cells of a resampled score in a row: NAME, NAME_low and NAME_high."""
    value, low, high = estimate(values)
    return {name: value, f"{name}_low": low, f"{name}_high": high}


def resampled_scores(labels, probs, threshold: float, weights: np.ndarray) -> dict[str, np.ndarray]:
    """auc, f2, recall, specificity and precision, float64 (R,) each, of rows (N,) weighted
    by (R, N). NaN where not defined, and in all but the first where the score rests on fewer than
    LEAST_GROUPS groups.
    """
    labels, probs = as_arrays(labels, probs)
    order = np.argsort(probs, kind="stable")
    labels = labels[order]
    probs = probs[order]
    weights = weights[:, order]
    called = probs >= threshold
    starts = np.flatnonzero(np.diff(probs, prepend=-np.inf))  # of rows of equal probability

    # each sum over rows is a product of the weights with one column
    columns = np.stack([labels, ~labels, labels & called, ~labels & called], 1)
    sums = []
    num_won = []
    for chunk in np.array_split(weights, len(weights) // CHUNK + 1):
        weight = chunk.astype(np.float64)
        sums.append(weight @ columns)
        negatives = np.add.reduceat(weight * ~labels, starts, 1)
        positives = np.add.reduceat(weight * labels, starts, 1)
        below = np.cumsum(negatives, 1) - negatives / 2  # a tie counts half
        num_won.append((positives * below).sum(1))

    positive, negative, tp, fp = np.concatenate(sums).T
    with np.errstate(invalid="ignore", divide="ignore"):
        scores = {
            "auc": np.concatenate(num_won) / (positive * negative),
            "f2": 5 * tp / (tp + 4 * positive + fp),
            "recall": tp / positive,
            "specificity": 1 - fp / negative,
            "precision": tp / (tp + fp),
        }
    for names, rows in (
        (("auc", "f2", "recall"), labels),
        (("auc", "specificity"), ~labels),
        (("precision",), called),
    ):
        if has_few_groups(weights[:, rows]):
            for name in names:
                scores[name][1:] = np.nan
    return scores
