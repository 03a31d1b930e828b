"""Scores against scikit-learn's, ties included; NaN where nothing is defined; intervals that cover."""

import numpy as np
import pytest

from lib.metrics import (
    compute_metrics,
    constant_alarm,
    constant_baselines,
    share_interval,
    sigmoid,
    student_t,
)


def draw(num, seed, levels=0):
    """Labels and informative logits; `levels` > 0 makes ties."""
    rng = np.random.default_rng(seed)
    labels = rng.random(num) < 0.1 + 0.2 * (seed % 5)
    labels[:2] = True, False
    logits = rng.normal(labels * 1.2, 1)
    return labels, np.round(logits * levels) / levels if levels else logits


@pytest.mark.parametrize("levels", [0, 1, 4], ids=["no ties", "mostly ties", "some ties"])
def test_every_score_is_scikit_learn_s(levels):
    reference = pytest.importorskip("sklearn.metrics")
    for seed, num in enumerate((2, 3, 50, 5000)):
        labels, logits = draw(num, seed, levels)
        probs = 1 / (1 + np.exp(-logits))
        called = probs >= 0.5
        ((tn, fp), (fn, tp)) = reference.confusion_matrix(labels, called)
        expected = {
            "auc": reference.roc_auc_score(labels, logits),
            "pr_auc": reference.average_precision_score(labels, logits),
            "f1": reference.fbeta_score(labels, called, beta=1, zero_division=0),
            "f2": reference.fbeta_score(labels, called, beta=2, zero_division=0),
            "recall": reference.recall_score(labels, called),
            "specificity": reference.recall_score(~labels, ~called),
            "precision": reference.precision_score(labels, called, zero_division=np.nan),
            "accuracy": reference.accuracy_score(labels, called),
            "loss": reference.log_loss(labels, probs),
            "positive_share": called.mean(),
            "tp": tp,
            "fp": fp,
            "fn": fn,
            "tn": tn,
        }
        scores = compute_metrics(labels, logits)
        assert scores == pytest.approx(expected, abs=1e-12, nan_ok=True)


def test_the_constant_baselines_are_what_constants_score_and_raise_the_alarm():
    labels = np.arange(600) % 6 == 0  # five negatives to one positive
    always = compute_metrics(labels, np.full(600, 9.0))
    never = compute_metrics(labels, np.full(600, -9.0))
    prior = compute_metrics(labels, np.full(600, np.log(1 / 5)))
    expected = {
        "prevalence": 1 / 6,
        "majority_accuracy": never["accuracy"],
        "always_positive_f1": always["f1"],
        "always_positive_f2": always["f2"],
        "constant_auc": always["auc"],
        "constant_pr_auc": always["pr_auc"],
        "prior_loss": prior["loss"],
    }
    assert constant_baselines(labels) == pytest.approx(expected)
    assert "positive" in constant_alarm(always) and "negative" in constant_alarm(never)
    assert constant_alarm(compute_metrics(labels, np.where(labels, 1, -1))) == ""


def test_what_is_not_defined_is_nan_and_extreme_logits_stay_finite():
    no_positive = compute_metrics([0, 0], [-1.0, -2.0])
    names = ("auc", "pr_auc", "f1", "f2", "recall", "precision")
    undefined = [no_positive[name] for name in names]
    undefined.append(compute_metrics([1, 1], [0.0, 1.0])["auc"])
    undefined.append(compute_metrics([0, 1], [0.0, np.nan])["loss"])
    assert np.isnan(undefined).all()
    assert compute_metrics([0, 0], [1.0, -1.0])["f2"] == 0
    with np.errstate(all="raise", under="ignore"):
        assert sigmoid([-1e4, -750, 0, 750, 1e4]).tolist() == pytest.approx([0, 0, 0.5, 1, 1])
        assert np.isfinite(compute_metrics([1, 0], [-1e4, 1e4])["loss"])
        assert np.isfinite(constant_baselines([1, 1])["prior_loss"])
    assert compute_metrics([1, 0], [0.0, -1e-9])["tp"] == 1, "0.5 is positive at 0.5"


def test_intervals_agree_with_published_ones():
    """Wilson's for 0 of 10 and 50 of 100 (Newcombe 1998); Student's t of 1, 4 and 30."""
    assert share_interval(0, 10) == pytest.approx((0.0, 0.2775), abs=5e-5)
    assert share_interval(50, 100) == pytest.approx((0.4038, 0.5962), abs=5e-5)
    quantiles = [student_t(num_free) for num_free in (1, 4, 11, 30)]
    assert quantiles == pytest.approx([12.7062, 2.7764, 2.2010, 2.0423], abs=5e-5)
