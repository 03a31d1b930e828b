"""Scores with intervals: whole groups of patches are drawn again and again (cluster bootstrap)."""

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
    nan = float("nan")
    return {
        "prevalence": prevalence,
        "flagged_share": flagged,
        "precision": hits / flagged if flagged else nan,
        "negative_predictive_value": rejected / (1 - flagged) if flagged < 1 else nan,
        "f2": 5 * hits / (4 * prevalence + flagged) if prevalence else nan,
        "always_positive_f2": 5 * prevalence / (4 * prevalence + 1),
    }


def draw_weights(groups, num: int = NUM_RESAMPLES, seed: int = 0) -> np.ndarray:
    """How often each row counts, uint8 (1 + num, N): once in the first resample, which gives the
    score itself, and in the others as often as its group (N,) is drawn, with replacement.

    There are no others where there are fewer than LEAST_GROUPS groups.
    """
    names, group = np.unique(groups, return_inverse=True)
    num = num if len(names) >= LEAST_GROUPS else 0
    rng = np.random.default_rng(seed)
    equal = np.full(len(names), 1 / len(names))
    drawn = rng.multinomial(len(names), equal, num).astype(np.uint8)
    once = np.ones((1, len(group)), np.uint8)
    return np.concatenate([once, drawn[:, group]])


def count_groups(weights: np.ndarray) -> int:
    """How many groups the rows (N,) of weights (1 + R, N) are of. Those of one group are drawn
    equally often in each resample, by which they are known.
    """
    return np.unique(weights[1:33], axis=1).shape[1]


def estimate(values: np.ndarray) -> tuple[float, float, float]:
    """(value, low, high) of a score from its values float64 (1 + R,) over the resamples of
    `draw_weights`: the first, and the 95% percentile interval of the others (Efron 1979).

    The interval is NaN where there are no others, or more than one in twenty is not defined.
    """
    value, resampled = float(values[0]), values[1:]
    if np.isnan(resampled).sum() > 0.05 * len(resampled) or not len(resampled):
        return value, float("nan"), float("nan")
    low, high = np.nanquantile(resampled, [0.025, 0.975])
    return value, float(low), float(high)


def resampled_scores(labels, probs, threshold: float, weights: np.ndarray) -> dict[str, np.ndarray]:
    """auc, f2, recall, specificity, precision and brier, float64 (R,) each, of rows (N,) weighted
    by (R, N). NaN where not defined, and in all but the first where the score rests on fewer than
    LEAST_GROUPS groups.
    """
    labels, probs = as_arrays(labels, probs)
    order = np.argsort(probs, kind="stable")
    labels, probs = labels[order], probs[order]
    called = probs >= threshold
    tie_start = np.searchsorted(probs, probs[labels], "left")
    tie_end = np.searchsorted(probs, probs[labels], "right")

    # each sum over rows is a product of the weights with one column
    errors = (probs - labels) ** 2
    columns = np.stack([labels, ~labels, labels & called, ~labels & called, errors], 1)
    sums, num_won = [], []
    for chunk in np.array_split(weights, len(weights) // CHUNK + 1):
        weight = chunk[:, order].astype(np.float64)
        sums.append(weight @ columns)
        num_below = np.cumsum(weight * ~labels, 1)  # negatives up to each row
        num_below = np.pad(num_below, ((0, 0), (1, 0)))
        num_below = num_below[:, tie_start] + num_below[:, tie_end]
        num_won.append((weight[:, labels] * num_below).sum(1) / 2)

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
    if len(weights) > 1:
        weights = weights[:, order]
        few_positive, few_negative, few_called, few = (
            count_groups(weights[:, rows]) < LEAST_GROUPS
            for rows in (labels, ~labels, called, slice(None))
        )
        is_few = (few_positive or few_negative, few_positive, few_positive, few_negative)
        for name, is_unsure in zip(scores, (*is_few, few_called, few), strict=True):
            scores[name][1:][is_unsure] = np.nan
    return scores


def resampled_curves(labels, probs, weights: np.ndarray, grid: np.ndarray) -> dict[str, np.ndarray]:
    """`recall` at the false positive rates of the grid (G,), and `precision` at its recalls,
    float64 (R, G) each, of rows (N,) weighted by (R, N).
    """
    labels, probs = as_arrays(labels, probs)
    recalls, precisions = [], []
    for weight in weights:
        points = curve_points(labels, probs, weight)
        # a threshold above all: without it the curve of one tie would be perfect
        recall = np.append(0.0, points["recall"])
        false_positive_rate = np.append(0.0, points["false_positive_rate"])
        recalls.append(np.interp(grid, false_positive_rate, recall))
        place = np.searchsorted(recall[1:], grid - 1e-9)  # a quotient is not quite that of the grid
        precisions.append(points["precision"][place.clip(max=len(recall) - 2)])
    return {"recall": np.stack(recalls), "precision": np.stack(precisions)}
