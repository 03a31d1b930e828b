"""What a probability is worth: its temperature, its calibration, a threshold on it, and intervals
by resampling groups.
"""

import numpy as np

from lib.metrics import compute_confusion, compute_fbeta, curve_points, sigmoid

NUM_BINS = 15
NUM_RESAMPLES = 1_000
PREVALENCES = (0.01, 0.05, 0.1, 0.5)
STEEPEST = 100.0  # a temperature lies between this and its inverse


def fit_temperature(labels, logits) -> float:
    """The T for which sigmoid(logits / T) has the lowest log loss on labels (N,) (Guo et al.
    2017).
    """
    labels, logits = np.asarray(labels, np.float64), np.asarray(logits, np.float64)
    low, high = np.log([1 / STEEPEST, STEEPEST])
    # the log loss is convex in 1 / T: halve the interval in which its slope changes sign
    for _ in range(60):
        middle = (low + high) / 2
        slope = ((sigmoid(logits / np.exp(middle)) - labels) * logits).sum()
        low, high = (middle, high) if slope > 0 else (low, middle)
    return float(np.exp((low + high) / 2))


def fit_scaling(labels, logits) -> tuple[float, float]:
    """Temperature T and offset b for which sigmoid(logits / T + b) has the lowest log loss (Platt
    1999, with his targets, which keep it finite where the classes do not overlap). The offset mends
    a model that calls too few or too many positive. One that ranks them the wrong way round, or
    hardly at all, is left as it is."""
    labels, logits = np.asarray(labels, bool), np.asarray(logits, np.float64)
    targets = np.where(labels, (labels.sum() + 1) / (labels.sum() + 2), 1 / ((~labels).sum() + 2))
    inputs, factors = np.stack([logits, np.ones(len(logits))], 1), np.array([1.0, 0.0])

    def loss(factors) -> float:
        return float((np.logaddexp(0.0, inputs @ factors) - targets * (inputs @ factors)).mean())

    # Newton's method, with shorter steps where a whole one does not lower the loss
    for _ in range(100):
        probs = sigmoid(inputs @ factors)
        curvature = (inputs * (probs * (1 - probs))[:, None]).T @ inputs + 1e-9 * np.eye(2)
        step = np.linalg.solve(curvature, inputs.T @ (probs - targets))
        while loss(factors - step) > loss(factors) and np.abs(step).max() > 1e-9:
            step = step / 2
        factors = factors - step
        if np.abs(step).max() < 1e-9:
            break
    slope, offset = factors.tolist()
    return (1 / slope, offset) if 1 / STEEPEST <= slope <= STEEPEST else (1.0, 0.0)


def calibrate(logits: np.ndarray, calibration: dict | None) -> np.ndarray:
    """Logits float64 (N,) as a checkpoint's `calibration` scales them; as they are where it has
    none.
    """
    logits = np.asarray(logits, np.float64)
    return logits / calibration["temperature"] + calibration["offset"] if calibration else logits


def reliability(labels, probs) -> list[dict]:
    """Bins of equal width over probabilities (N,): low, high, num, mean probability, share of
    positives; no empty ones.
    """
    labels, probs = np.asarray(labels, bool), np.asarray(probs, np.float64)
    place = np.minimum((probs * NUM_BINS).astype(np.int64), NUM_BINS - 1)
    rows = []
    for number in np.unique(place):
        inside = place == number
        row = {"low": number / NUM_BINS, "high": (number + 1) / NUM_BINS, "num": int(inside.sum())}
        rows.append(
            row
            | {
                "mean_probability": float(probs[inside].mean()),
                "positive_share": float(labels[inside].mean()),
            }
        )
    return rows


def calibration_scores(labels, logits) -> dict[str, float]:
    """ece (of the positive class, NUM_BINS bins of equal width), brier (mean squared error) and nll
    (mean log loss, nats).
    """
    labels, logits = np.asarray(labels, bool), np.asarray(logits, np.float64)
    probs = sigmoid(logits)
    gaps = [
        row["num"] * abs(row["mean_probability"] - row["positive_share"])
        for row in reliability(labels, probs)
    ]
    nll = np.logaddexp(0.0, np.where(labels, -logits, logits)).mean()
    return {
        "ece": float(sum(gaps) / len(labels)),
        "brier": float(((probs - labels) ** 2).mean()),
        "nll": float(nll),
    }


def choose_threshold(
    labels, probs, rule: str, least_recall: float, false_negative_cost: float
) -> float:
    """The threshold on probabilities (N,) that a rule chooses; it lies half-way between two of
    them.

    f2: the highest F2 | recall: the strictest that still finds `least_recall` of the positives |
    cost: the lowest sum of false positives, and of false negatives that cost `false_negative_cost`
    each. NaN where a class is missing.
    """
    labels, probs = np.asarray(labels, bool), np.asarray(probs, np.float64)
    num_positive, num_negative = labels.sum(), (~labels).sum()
    if not num_positive or not num_negative:
        return float("nan")
    points = curve_points(labels, probs)
    found, false_alarms = (
        points["recall"] * num_positive,
        points["false_positive_rate"] * num_negative,
    )
    if rule == "recall":
        at = int(np.argmax(points["recall"] >= least_recall))
    elif rule == "cost":
        at = int(np.argmin(false_negative_cost * (num_positive - found) + false_alarms))
    else:
        at = int(np.argmax(5 * found / (5 * found + 4 * (num_positive - found) + false_alarms)))
    below = points["threshold"][at + 1] if at + 1 < len(points["threshold"]) else 0.0
    return float((points["threshold"][at] + below) / 2)


def decision_scores(labels, probs, threshold: float) -> dict[str, float]:
    """What a threshold means: counts tp fp fn tn, recall, specificity, precision, f2; NaN where not
    defined.
    """
    confusion = compute_confusion(labels, np.asarray(probs) >= threshold)
    tp, fp, fn, tn = (confusion[name] for name in ("tp", "fp", "fn", "tn"))

    def share(part, rest):
        return part / (part + rest) if part + rest else float("nan")

    rates = {"recall": share(tp, fn), "specificity": share(tn, fp), "precision": share(tp, fp)}
    return {"threshold": threshold, **confusion, **rates, "f2": compute_fbeta(confusion, 2.0)}


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
