"""Scores of a binary classifier, and 95% intervals, in float64 numpy. A score that is not defined
is NaN, never a made-up number.
"""

import numpy as np

Z_95 = 1.959964  # standard deviations within which 95% of a normal distribution lie
# the same of Student's distribution, from 1 degree of freedom on
T_95 = (
    *(12.7062047, 4.3026527, 3.1824463, 2.7764451, 2.5705818),
    *(2.4469119, 2.3646243, 2.3060041, 2.2621572, 2.2281389),
)


def sigmoid(logits: np.ndarray) -> np.ndarray:
    """Probabilities float64 of logits, without overflow."""
    return np.exp(-np.logaddexp(0.0, -np.asarray(logits, np.float64)))


def as_arrays(labels, scores) -> tuple[np.ndarray, np.ndarray]:
    """Labels as bool (N,) and scores as float64 (N,)."""
    return np.asarray(labels, bool), np.asarray(scores, np.float64)


def share(part: float, total: float) -> float:
    """part / total; NaN where there is nothing."""
    return float(part / total) if total else float("nan")


def compute_auc(labels, scores) -> float:
    """Area under the ROC curve of scores (N,) against labels (N,): the share of pairs of a positive
    and a negative that are in the right order. A tie counts half (Mann-Whitney). NaN where a class
    is missing.
    """
    labels, scores = as_arrays(labels, scores)
    positives, negatives = scores[labels], np.sort(scores[~labels])
    num_below = np.searchsorted(negatives, positives, "left").sum()
    num_not_above = np.searchsorted(negatives, positives, "right").sum()
    return share(num_below + num_not_above, 2 * len(positives) * len(negatives))


def compute_pr_auc(labels, scores) -> float:
    """Average precision of scores (N,) against labels (N,): precision summed over the steps of
    recall, without interpolation. NaN without positives.
    """
    points = curve_points(labels, scores)
    steps = np.diff(points["recall"], prepend=0)
    return float((steps * points["precision"]).sum()) if np.any(labels) else float("nan")


def curve_points(labels, scores) -> dict[str, np.ndarray]:
    """threshold, recall, precision and false_positive_rate, float64 (T,) each: a point for each
    distinct score of scores (N,), the strictest threshold first.

    Labels are bool, or 0 and 1, (N,).
    """
    labels, scores = as_arrays(labels, scores)
    # unique scores, and the number of each row's score among them, the highest first
    negated, tie = np.unique(-scores, return_inverse=True)
    true_positives = np.cumsum(np.bincount(tie, labels))
    false_positives = np.cumsum(np.bincount(tie, ~labels))
    num_called = true_positives + false_positives
    return {
        "threshold": -negated,
        "recall": true_positives / max(1, true_positives[-1]),
        "precision": true_positives / np.maximum(1, num_called),
        "false_positive_rate": false_positives / max(1, false_positives[-1]),
    }


def compute_metrics(labels, logits, threshold: float = 0.5) -> dict[str, float]:
    """Every score of logits (N,) against labels (N,): loss (mean log loss, nats), accuracy, f1, f2,
    auc, pr_auc, positive_share (of the predictions), recall, specificity, precision, and the counts
    tp, fp, fn, tn.

    `threshold` is on the probability. A logit that is not a number makes the loss NaN.
    """
    labels, logits = as_arrays(labels, logits)
    predictions = sigmoid(logits) >= threshold
    tn, fp, fn, tp = np.bincount(2 * labels + predictions, minlength=4).tolist()
    return {
        "loss": compute_log_loss(labels, logits),
        "accuracy": share(tp + tn, len(labels)),
        "f1": share(2 * tp, 2 * tp + fn + fp),
        "f2": share(5 * tp, 5 * tp + 4 * fn + fp),
        "auc": compute_auc(labels, logits),
        "pr_auc": compute_pr_auc(labels, logits),
        "positive_share": share(tp + fp, len(labels)),
        "recall": share(tp, tp + fn),
        "specificity": share(tn, tn + fp),
        "precision": share(tp, tp + fp),
        "tp": tp,
        "fp": fp,
        "fn": fn,
        "tn": tn,
    }


def compute_log_loss(labels: np.ndarray, logits: np.ndarray) -> float:
    """Mean log loss in nats of logits float64 (N,) against labels bool (N,)."""
    return float(np.mean(np.logaddexp(0.0, np.where(labels, -logits, logits))))


def constant_baselines(labels) -> dict[str, float]:
    """The scores, against labels (N,), of models that answer every patch alike: always positive,
    the majority, or the prevalence as probability. A model below these is worse than none.
    """
    prevalence = float(np.mean(labels))
    prior_probs = np.clip([prevalence, 1 - prevalence], 1e-7, 1)  # its logarithm stays finite
    return {
        "prevalence": prevalence,
        "majority_accuracy": max(prevalence, 1 - prevalence),
        "always_positive_f1": 2 * prevalence / (1 + prevalence),
        "always_positive_f2": 5 * prevalence / (1 + 4 * prevalence),
        "constant_auc": 0.5,
        "constant_pr_auc": prevalence,
        "prior_loss": float(-np.sum(prior_probs * np.log(prior_probs))),
    }


def constant_alarm(metrics: dict[str, float]) -> str:
    """A warning for a model that gives every patch the same answer, or an empty string."""
    if metrics["positive_share"] not in (0.0, 1.0):
        return ""
    answer = "positive" if metrics["positive_share"] else "negative"
    return f"ALARM: every validation patch is called {answer}, as a constant would answer"


def share_interval(num: float, num_total: float) -> tuple[float, float]:
    """95% interval of the share num / num_total (Wilson 1927)."""
    rate, weight = num / num_total, Z_95**2 / num_total
    middle = rate + weight / 2
    margin = Z_95 * np.sqrt((rate * (1 - rate) + weight / 4) / num_total)
    return float((middle - margin) / (1 + weight)), float((middle + margin) / (1 + weight))


def mean_interval(values) -> dict[str, float]:
    """mean, sample deviation, num, and low and high of values (N,), N at least 2: low to high is
    the 95% interval of the mean (Student 1908).
    """
    num = len(values)
    mean, deviation = float(np.mean(values)), float(np.std(values, ddof=1))
    margin = student_t(num - 1) * deviation / num**0.5
    low, high = mean - margin, mean + margin
    return {"mean": mean, "deviation": deviation, "low": low, "high": high, "num": num}


def student_t(num_free: int) -> float:
    """The t for which -t..t holds 95% of Student's distribution; `num_free` degrees of freedom."""
    if num_free <= len(T_95):
        return T_95[num_free - 1]
    # in powers of 1 / num_free (Abramowitz and Stegun 26.7.5)
    return float(np.polyval((1.5895, 2.5558, 2.8225, 2.37227, Z_95), 1 / num_free))
