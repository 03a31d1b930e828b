"""Scores of a binary classifier, and 95% intervals, in float64 numpy. A score that is not defined
is NaN, never a made-up number.
"""

import functools

import numpy as np

Z_95 = 1.959964  # standard deviations within which 95% of a normal distribution lie


def sigmoid(logits: np.ndarray) -> np.ndarray:
    """Probabilities float64 of logits, without overflow."""
    logits = np.asarray(logits, np.float64)
    return np.exp(-np.logaddexp(0.0, -logits))


def as_arrays(labels, scores) -> tuple[np.ndarray, np.ndarray]:
    """Labels as bool (N,) and scores as float64 (N,)."""
    return np.asarray(labels, bool), np.asarray(scores, np.float64)


def compute_auc(labels, scores) -> float:
    """Area under the ROC curve of scores (N,) against labels (N,): the share of pairs of a positive
    and a negative that are in the right order. A tie counts half (Mann-Whitney). NaN where a class
    is missing.
    """
    labels, scores = as_arrays(labels, scores)
    if labels.all() or not labels.any():
        return float("nan")
    positives = scores[labels]
    negatives = np.sort(scores[~labels])
    num_below = np.searchsorted(negatives, positives, "left").sum()
    num_not_above = np.searchsorted(negatives, positives, "right").sum()
    return float((num_below + num_not_above) / (2 * len(positives) * len(negatives)))


def compute_pr_auc(labels, scores) -> float:
    """Average precision of scores (N,) against labels (N,): precision summed over the steps of
    recall, without interpolation. NaN without positives.
    """
    labels, scores = as_arrays(labels, scores)
    if not labels.any():
        return float("nan")
    points = curve_points(labels, scores)
    steps = np.diff(points["recall"], prepend=0)
    return float((steps * points["precision"]).sum())


def curve_points(labels, scores, weights=1) -> dict[str, np.ndarray]:
    """threshold, recall, precision and false_positive_rate, float64 (T,) each: a point for each
    distinct score of scores (N,), the strictest threshold first.

    Labels are bool, or 0 and 1, (N,). A row counts `weights` (N,) times.
    """
    labels, scores = as_arrays(labels, scores)
    order = np.argsort(-scores, kind="stable")
    labels, scores = labels[order], scores[order]
    weights = np.broadcast_to(weights, len(order))[order]
    last_of_tie = np.append(np.diff(scores) != 0, True)
    true_positives = np.cumsum(weights * labels)[last_of_tie]
    false_positives = np.cumsum(weights * ~labels)[last_of_tie]
    num_called = true_positives + false_positives
    return {
        "threshold": scores[last_of_tie],
        "recall": true_positives / max(1, true_positives[-1]),
        "precision": true_positives / np.maximum(1, num_called),
        "false_positive_rate": false_positives / max(1, false_positives[-1]),
    }


def compute_confusion(labels, predictions) -> dict[str, int]:
    """Counts tp, fp, fn, tn of predictions (N,) against labels (N,); they add up to N."""
    labels, predictions = np.asarray(labels, bool), np.asarray(predictions, bool)
    tn, fp, fn, tp = np.bincount(2 * labels + predictions, minlength=4).tolist()
    return {"tp": tp, "fp": fp, "fn": fn, "tn": tn}


def compute_fbeta(confusion: dict[str, int], beta: float) -> float:
    """F-beta (van Rijsbergen 1979): recall weighs beta times as much as precision. NaN where there
    is nothing to find.
    """
    weighted_hits = (1 + beta**2) * confusion["tp"]
    total = weighted_hits + beta**2 * confusion["fn"] + confusion["fp"]
    return weighted_hits / total if total else float("nan")


def compute_metrics(labels, logits, threshold: float = 0.5) -> dict[str, float]:
    """Every score of logits (N,) against labels (N,): loss (mean log loss, nats), accuracy, f1, f2,
    auc, pr_auc, positive_share (of the predictions), and the counts tp, fp, fn, tn.

    `threshold` is on the probability. A logit that is not a number makes every score NaN.
    """
    labels, logits = as_arrays(labels, logits)
    predictions = sigmoid(logits) >= threshold
    confusion = compute_confusion(labels, predictions)
    scores = {
        "loss": compute_log_loss(labels, logits),
        "accuracy": float(np.mean(labels == predictions)),
        "f1": compute_fbeta(confusion, 1.0),
        "f2": compute_fbeta(confusion, 2.0),
        "auc": compute_auc(labels, logits),
        "pr_auc": compute_pr_auc(labels, logits),
        "positive_share": float(np.mean(predictions)),
    }
    if np.isnan(logits).any():
        scores = dict.fromkeys(scores, float("nan"))
    return {**scores, **confusion}


def compute_log_loss(labels: np.ndarray, logits: np.ndarray) -> float:
    """Mean log loss in nats of logits float64 (N,) against labels bool (N,)."""
    return float(np.mean(np.logaddexp(0.0, np.where(labels, -logits, logits))))


def constant_baselines(labels) -> dict[str, float]:
    """The scores, against labels (N,), of models that answer every patch alike: always positive,
    always negative, or the prevalence as probability. A model below these is worse than none.
    """
    labels = np.asarray(labels, bool)
    prevalence = float(labels.mean())
    always = compute_confusion(labels, np.ones_like(labels))
    never = compute_confusion(labels, np.zeros_like(labels))
    prior_probs = np.clip([prevalence, 1 - prevalence], 1e-7, 1)  # its logarithm stays finite
    return {
        "prevalence": prevalence,
        "majority_accuracy": max(prevalence, 1 - prevalence),
        "always_positive_f1": compute_fbeta(always, 1.0),
        "always_positive_f2": compute_fbeta(always, 2.0),
        "always_negative_f2": compute_fbeta(never, 2.0),
        "constant_auc": 0.5,
        "constant_pr_auc": prevalence,
        "prior_loss": float(-np.sum(prior_probs * np.log(prior_probs))),
    }


def constant_alarm(metrics: dict[str, float], labels) -> str:
    """A warning for a model that gives every patch the same answer, or an empty string."""
    answers = {0.0: "negative", 1.0: "positive"}
    if metrics["positive_share"] not in answers:
        return ""
    baseline = constant_baselines(labels)["always_positive_f2"]
    return (
        f"ALARM: every validation patch is called {answers[metrics['positive_share']]};"
        f" F2 {metrics['f2']:.3f} is what a constant gives (always positive: {baseline:.3f})"
    )


def share_interval(num: float, num_total: float) -> tuple[float, float]:
    """95% interval of the share num / num_total (Wilson 1927)."""
    share, weight = num / num_total, Z_95**2 / num_total
    middle = share + weight / 2
    margin = Z_95 * np.sqrt((share * (1 - share) + weight / 4) / num_total)
    return float((middle - margin) / (1 + weight)), float((middle + margin) / (1 + weight))


def mean_interval(values) -> dict[str, float]:
    """mean, sample deviation, num, and low and high of values (N,), N at least 2: low to high is
    the 95% interval of the mean (Student 1908).
    """
    num = len(values)
    mean = float(np.mean(values))
    deviation = float(np.std(values, ddof=1))
    margin = student_t(num - 1) * deviation / num**0.5
    low, high = mean - margin, mean + margin
    return {"mean": mean, "deviation": deviation, "low": low, "high": high, "num": num}


@functools.cache
def student_t(num_free: int) -> float:
    """The t for which -t..t holds 95% of Student's distribution; `num_free` degrees of freedom."""
    # t = sqrt(num_free) tan(angle) turns the density into cos(angle) ** (num_free - 1)
    step = np.pi / 200_000
    angles = np.arange(step / 2, np.pi / 2, step)
    mass = np.cumsum(np.cos(angles) ** (num_free - 1))
    angle = np.interp(0.95 * mass[-1], mass, angles + step / 2)
    return float(num_free**0.5 * np.tan(angle))
