"""Scores of a binary classifier, in float64 numpy. A score that is not defined is NaN, never a
made-up number.
"""

import numpy as np

Z_95 = 1.959964  # of a normal distribution, 95% lie within as many deviations
# a log loss clipped here stays finite: 16.1 for a certain and wrong answer
PROBABILITY_FLOOR = 1e-7


def sigmoid(logits: np.ndarray) -> np.ndarray:
    """Probabilities of logits, without overflow."""
    logits = np.asarray(logits, np.float64)
    return np.exp(-np.logaddexp(0.0, -logits))


def compute_auc(labels, scores) -> float:
    """Area under the ROC curve by ranks, ties counted half (Mann-Whitney); NaN when a class is
    missing.
    """
    labels, scores = np.asarray(labels, bool), np.asarray(scores, np.float64)
    num_positive, num_negative = int(labels.sum()), int((~labels).sum())
    if not num_positive or not num_negative or np.isnan(scores).any():
        return float("nan")
    _, inverse, counts = np.unique(scores, return_inverse=True, return_counts=True)
    ranks = np.cumsum(counts) - (counts - 1) / 2  # mean rank of each distinct score, from 1
    rank_sum = ranks[inverse][labels].sum()
    return float((rank_sum - num_positive * (num_positive + 1) / 2) / (num_positive * num_negative))


def compute_pr_auc(labels, scores) -> float:
    """Average precision: precision summed over the steps of recall, without interpolation; NaN
    without positives.
    """
    labels, scores = np.asarray(labels, bool), np.asarray(scores, np.float64)
    if not labels.any() or np.isnan(scores).any():
        return float("nan")
    points = curve_points(labels, scores)
    return float((np.diff(points["recall"], prepend=0) * points["precision"]).sum())


def curve_points(labels: np.ndarray, scores: np.ndarray) -> dict[str, np.ndarray]:
    """Recall, precision and false positive rate of labels (N,) at every distinct threshold on
    scores (N,), strictest first.
    """
    order = np.argsort(-scores, kind="stable")
    last_of_tie = np.append(np.diff(scores[order]) != 0, True)
    true_positives = np.cumsum(labels[order])[last_of_tie]
    num_called = np.flatnonzero(last_of_tie) + 1
    num_negative = max(1, len(labels) - labels.sum())
    return {
        "threshold": scores[order][last_of_tie],
        "recall": true_positives / max(1, labels.sum()),
        "precision": true_positives / num_called,
        "false_positive_rate": (num_called - true_positives) / num_negative,
    }


def compute_confusion(labels, predictions) -> dict[str, int]:
    """Counts tp, fp, fn, tn; they add up to the number of labels."""
    labels, predictions = np.asarray(labels, bool), np.asarray(predictions, bool)
    tn, fp, fn, tp = np.bincount(2 * labels + predictions, minlength=4).tolist()
    return {"tp": tp, "fp": fp, "fn": fn, "tn": tn}


def compute_fbeta(confusion: dict[str, int], beta: float) -> float:
    """F-beta (van Rijsbergen 1979): recall weighs beta times as much as precision; NaN when there
    is nothing to find.
    """
    weighted_hits = (1 + beta**2) * confusion["tp"]
    total = weighted_hits + beta**2 * confusion["fn"] + confusion["fp"]
    return weighted_hits / total if total else float("nan")


def compute_metrics(labels, logits, threshold: float = 0.5) -> dict[str, float]:
    """Every score of logits (N,) against labels (N,): loss (mean log loss), accuracy, f1, f2, auc,
    pr_auc, and counts.

    A logit that is not a number makes every score NaN.
    """
    labels, logits = np.asarray(labels, bool), np.asarray(logits, np.float64)
    predictions = sigmoid(logits) >= threshold
    confusion = compute_confusion(labels, predictions)
    scores = {
        "loss": float(np.mean(np.logaddexp(0.0, np.where(labels, -logits, logits)))),
        "accuracy": float(np.mean(labels == predictions)),
        "f1": compute_fbeta(confusion, 1.0),
        "f2": compute_fbeta(confusion, 2.0),
        "auc": compute_auc(labels, logits),
        "pr_auc": compute_pr_auc(labels, logits),
        "positive_share": float(np.mean(predictions)),
    }
    if np.isnan(logits).any():
        scores = dict.fromkeys(scores, float("nan"))
    return scores | confusion


def constant_baselines(labels) -> dict[str, float]:
    """What a model that never looks scores: always positive, always negative. A score below these
    is worse than none.
    """
    labels = np.asarray(labels, bool)
    always, never = (
        compute_confusion(labels, np.full(len(labels), answer)) for answer in (True, False)
    )
    prevalence = float(labels.mean())
    p = np.clip(prevalence, PROBABILITY_FLOOR, 1 - PROBABILITY_FLOOR)
    return {
        "prevalence": prevalence,
        "majority_accuracy": max(prevalence, 1 - prevalence),
        "always_positive_f1": compute_fbeta(always, 1.0),
        "always_positive_f2": compute_fbeta(always, 2.0),
        "always_negative_f2": compute_fbeta(never, 2.0),
        "constant_auc": 0.5,
        "constant_pr_auc": prevalence,
        # in nats, of always answering with the prevalence
        "prior_loss": float(-(p * np.log(p) + (1 - p) * np.log(1 - p))),
    }


def constant_alarm(metrics: dict[str, float], labels) -> str:
    """A warning for a model that answers always the same, or an empty string."""
    if metrics["positive_share"] not in (0.0, 1.0):
        return ""
    answer = "positive" if metrics["positive_share"] else "negative"
    always = f"(always positive: {constant_baselines(labels)['always_positive_f2']:.3f})"
    return (
        f"ALARM: every validation patch is called {answer}; F2 {metrics['f2']:.3f} is what a"
        f" constant gives {always}"
    )


def auc_interval(auc: float, num_positive: int, num_negative: int) -> tuple[float, float]:
    """95% interval of an AUC from the counts of the classes alone (Hanley and McNeil 1982)."""
    both_positive, both_negative = auc / (2 - auc), 2 * auc**2 / (1 + auc)
    variance = (
        auc * (1 - auc)
        + (num_positive - 1) * (both_positive - auc**2)
        + (num_negative - 1) * (both_negative - auc**2)
    )
    reach = Z_95 * np.sqrt(max(variance, 0) / (num_positive * num_negative))
    return float(max(0, auc - reach)), float(min(1, auc + reach))


def mean_interval(values) -> dict[str, float]:
    """Mean of values (N,), N at least 2, their sample deviation, and the 95% interval of the mean
    (Student 1908).
    """
    values = np.asarray(values, np.float64)
    num_free = len(values) - 1
    # t = sqrt(num_free) tan(angle) turns Student's density into cos(angle) ** (num_free - 1)
    angles = np.linspace(0, np.pi / 2, 100_001)
    mass = np.cumsum(np.cos((angles[1:] + angles[:-1]) / 2) ** (num_free - 1))
    reach = (
        np.sqrt(num_free)
        * np.tan(np.interp(0.95, mass / mass[-1], angles[1:]))
        * values.std(ddof=1)
        / np.sqrt(len(values))
    )
    mean = values.mean()
    spread = {
        "mean": mean,
        "deviation": values.std(ddof=1),
        "low": mean - reach,
        "high": mean + reach,
    }
    return {name: float(value) for name, value in spread.items()} | {"num": len(values)}


def share_interval(num: int, num_total: int) -> tuple[float, float]:
    """95% interval of the share num / num_total (Wilson 1927)."""
    share, weight = num / num_total, Z_95**2 / num_total
    reach = Z_95 * np.sqrt((share * (1 - share) + weight / 4) / num_total)
    return float((share + weight / 2 - reach) / (1 + weight)), float(
        (share + weight / 2 + reach) / (1 + weight)
    )
