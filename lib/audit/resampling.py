"""Scores with intervals: whole groups of patches are drawn again and again."""

import numpy as np

NUM_RESAMPLES = 1_000
PREVALENCES = (0.01, 0.05, 0.1, 0.5)


def at_prevalence(recall: float, specificity: float, prevalence: float) -> dict[str, float]:
    """What a decision with this recall and specificity means where `prevalence` of the patches are
    positive (Bayes): share flagged, precision, negative predictive value, F2, and the F2 of calling
    every patch positive."""
    found, false_alarms = recall * prevalence, (1 - specificity) * (1 - prevalence)
    flagged = found + false_alarms
    return {
        "prevalence": prevalence,
        "flagged_share": flagged,
        "precision": found / flagged if flagged else float("nan"),
        "negative_predictive_value": specificity * (1 - prevalence) / (1 - flagged)
        if flagged < 1
        else float("nan"),
        "f2": 5 * found / (4 * prevalence + flagged) if prevalence else float("nan"),
        "always_positive_f2": 5 * prevalence / (4 * prevalence + 1),
    }


def draw_weights(groups, num: int = NUM_RESAMPLES, seed: int = 0) -> np.ndarray:
    """How often each row is drawn, uint8 (num, N), when whole groups (N,) are drawn with
    replacement (cluster bootstrap).
    """
    _, group = np.unique(np.asarray(groups), return_inverse=True)
    num_groups, rng = int(group.max()) + 1, np.random.default_rng(seed)
    equal = np.full(num_groups, 1 / num_groups)
    return np.stack(
        [rng.multinomial(num_groups, equal).astype(np.uint8)[group] for _ in range(num)]
    )


def resampled_scores(labels, probs, threshold: float, weights: np.ndarray) -> dict[str, np.ndarray]:
    """auc, f2, recall, specificity, precision and brier, float64 (R,) each, of rows (N,) weighted
    by (R, N); NaN where not defined. A row of ones gives the score itself; weights times a mask
    that of a part."""
    labels, probs = np.asarray(labels, bool), np.asarray(probs, np.float64)
    order = np.argsort(probs, kind="stable")
    labels, probs = labels[order], probs[order]
    first = np.searchsorted(probs, probs[labels], "left")
    last = np.searchsorted(probs, probs[labels], "right")
    called = probs >= threshold
    parts = []
    for block in np.array_split(weights, -(-len(weights) // 64)):
        weight = block[:, order].astype(np.float64)
        below = np.concatenate([np.zeros((len(weight), 1)), np.cumsum(weight * ~labels, 1)], 1)
        hits = (weight[:, labels] * (below[:, first] + below[:, last]) / 2).sum(1)
        squares = weight @ (probs - labels) ** 2
        counts = [
            weight @ mask.astype(np.float64)
            for mask in (labels & called, ~labels & called, labels & ~called)
        ]
        parts.append((hits, squares, weight @ labels.astype(np.float64), weight.sum(1), *counts))
    hits, squares, positive, total, tp, fp, fn = (
        np.concatenate(part) for part in zip(*parts, strict=True)
    )
    with np.errstate(invalid="ignore", divide="ignore"):
        return {
            "auc": hits / (positive * (total - positive)),
            "f2": 5 * tp / (5 * tp + 4 * fn + fp),
            "recall": tp / positive,
            "specificity": 1 - fp / (total - positive),
            "precision": tp / (tp + fp),
            "brier": squares / total,
        }


def resampled_curves(labels, probs, weights: np.ndarray, grid: np.ndarray) -> dict[str, np.ndarray]:
    """float64 (R, G): `recall` at the false positive rates of the grid (G,), and `precision` at its
    recalls.
    """
    labels, probs = np.asarray(labels, bool), np.asarray(probs, np.float64)
    order = np.argsort(-probs, kind="stable")
    labels, ends = labels[order], np.append(np.flatnonzero(np.diff(-probs[order])), len(probs) - 1)
    recalls, precisions = [], []
    for weight in weights:
        weight = weight[order].astype(np.float64)
        tp, fp = np.cumsum(weight * labels)[ends], np.cumsum(weight * ~labels)[ends]
        # a threshold above all: without it the curve of one tie would be perfect
        origin = np.zeros(1)
        recalls.append(
            np.interp(
                grid, np.append(origin, fp) / max(fp[-1], 1), np.append(origin, tp) / max(tp[-1], 1)
            )
        )
        # counts are whole, their products not quite
        at = np.minimum(np.searchsorted(tp, grid * tp[-1] - 1e-6), len(tp) - 1)
        precisions.append(tp[at] / np.maximum(tp[at] + fp[at], 1))
    return {"recall": np.stack(recalls), "precision": np.stack(precisions)}


def interval(values: np.ndarray, level: float = 0.95) -> tuple[float, float]:
    """Percentile interval of resampled values (R,); NaN where more than one in twenty is not
    defined.
    """
    values = np.asarray(values, np.float64)
    if np.isnan(values).mean() > 0.05:
        return float("nan"), float("nan")
    low, high = np.nanquantile(values, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def with_itself(weights: np.ndarray) -> np.ndarray:
    """Weights (R, N) below a row of ones: what is computed of them has the figure itself in front
    (see `estimate`).
    """
    return np.concatenate([np.ones_like(weights[:1]), weights])


def estimate(values: np.ndarray) -> tuple[float, float, float]:
    """A figure and its interval, (value, low, high), from values (1 + R,) of which the first is the
    figure itself.
    """
    return float(values[0]), *interval(values[1:])
