"""What a probability is worth: its temperature, its calibration, a threshold on it."""

import numpy as np

from lib.metrics import compute_confusion, compute_fbeta, curve_points, sigmoid

NUM_BINS = 15
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
