"""Scores with intervals: whole groups of patches are drawn again and again (cluster bootstrap)."""

import math

import numpy as np

from lib.metrics import as_arrays, curve_points

NUM_RESAMPLES = 1_000
CHUNK = 64  # resamples that are computed at once
LEAST_GROUPS = 8  # fewer of them vary too little: no interval
PREVALENCES = (0.01, 0.05, 0.1, 0.5)


def at_prevalence(recall: float, specificity: float, prevalence: float) -> dict[str, float]:
    """What a decision with this recall and specificity means where `prevalence` of the patches are
    positive (Bayes): share flagged, precision, negative predictive value, F2, and the F2 of calling
    every patch positive.
    """
    hits = recall * prevalence
    flagged = hits + (1 - specificity) * (1 - prevalence)
    rejected = specificity * (1 - prevalence)
    return {
        "flagged_share": flagged,
        "precision": hits / flagged if flagged else math.nan,
        "negative_predictive_value": rejected / (1 - flagged) if flagged < 1 else math.nan,
        "f2": 5 * hits / (4 * prevalence + flagged),
        "always_positive_f2": 5 * prevalence / (4 * prevalence + 1),
    }


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


def score_cells(values: np.ndarray, names=("value", "low", "high")) -> dict[str, float]:
    """A resampled score as cells of a row: its value and its interval."""
    return dict(zip(names, estimate(values), strict=True))


def spread(name: str, values: np.ndarray) -> dict[str, float]:
    """Cells of a score that a row has among others."""
    return score_cells(values, (name, f"{name}_low", f"{name}_high"))


def resampled_scores(labels, probs, threshold: float, weights: np.ndarray) -> dict[str, np.ndarray]:
    """auc, f2, recall, specificity, precision and brier, float64 (R,) each, of rows (N,) weighted
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
    errors = (probs - labels) ** 2
    hits = labels & called
    false_alarms = ~labels & called
    columns = np.stack([labels, ~labels, hits, false_alarms, errors], 1)
    sums = []
    num_won = []
    for chunk in np.array_split(weights, len(weights) // CHUNK + 1):
        weight = chunk.astype(np.float64)
        sums.append(weight @ columns)
        negatives = np.add.reduceat(weight * ~labels, starts, 1)
        positives = np.add.reduceat(weight * labels, starts, 1)
        below = np.cumsum(negatives, 1) - negatives / 2  # a tie counts half
        num_won.append((positives * below).sum(1))

    positive, negative, tp, fp, squares = np.concatenate(sums).T
    with np.errstate(invalid="ignore", divide="ignore"):
        scores = {
            "auc": np.concatenate(num_won) / (positive * negative),
            "f2": 5 * tp / (tp + 4 * positive + fp),
            "recall": tp / positive,
            "specificity": 1 - fp / negative,
            "precision": tp / (tp + fp),
            "brier": squares / (positive + negative),
        }
    for names, rows in (
        (("auc", "f2", "recall"), labels),
        (("auc", "specificity"), ~labels),
        (("precision",), called),
        (("brier",), slice(None)),
    ):
        if has_few_groups(weights[:, rows]):
            for name in names:
                scores[name][1:] = np.nan
    return scores


def resampled_curves(labels, probs, weights: np.ndarray, grid: np.ndarray) -> dict[str, np.ndarray]:
    """`recall` at the false positive rates of the grid (G,), and `precision` at its recalls,
    float64 (R, G) each, of rows (N,) weighted by (R, N).
    """
    recalls = []
    precisions = []
    for weight in weights:
        points = curve_points(labels, probs, weight)
        # a threshold above all: without it the curve of one tie would be perfect
        rates = np.append(0.0, points["false_positive_rate"])
        heights = np.append(0.0, points["recall"])
        recalls.append(np.interp(grid, rates, heights))
        # a quotient is not quite that of the grid; the last recall is 1, or 0 without positives
        place = np.searchsorted(points["recall"], grid - 1e-9)
        last = len(points["recall"]) - 1
        precisions.append(points["precision"][place.clip(max=last)])
    return {"recall": np.stack(recalls), "precision": np.stack(precisions)}
