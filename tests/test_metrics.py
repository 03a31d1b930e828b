"""Scores against scikit-learn's, ties included, and NaN where nothing is defined."""

import numpy as np
import pytest

from lib.metrics import (
    auc_interval,
    compute_auc,
    compute_confusion,
    compute_fbeta,
    compute_metrics,
    compute_pr_auc,
    constant_alarm,
    constant_baselines,
    share_interval,
    sigmoid,
)


def draw(num, seed, levels=0):
    """Labels and informative logits; `levels` > 0 makes ties."""
    rng = np.random.default_rng(seed)
    labels = rng.random(num) < 0.1 + 0.2 * (seed % 5)
    labels[:2] = True, False
    logits = rng.normal(labels * 1.2, 1)
    return labels, np.round(logits * levels) / levels if levels else logits


@pytest.mark.parametrize("levels", [0, 1, 4], ids=["no ties", "mostly ties", "some ties"])
@pytest.mark.parametrize("num", [2, 3, 50, 5000])
def test_every_score_is_scikit_learn_s(num, levels):
    reference = pytest.importorskip("sklearn.metrics")
    for seed in range(5):
        labels, logits = draw(num, seed, levels)
        probs = 1 / (1 + np.exp(-logits))
        called = probs >= 0.5
        ((tn, fp), (fn, tp)) = reference.confusion_matrix(labels, called)
        expected = {
            "auc": reference.roc_auc_score(labels, logits),
            "pr_auc": reference.average_precision_score(labels, logits),
            "f1": reference.fbeta_score(labels, called, beta=1, zero_division=0),
            "f2": reference.fbeta_score(labels, called, beta=2, zero_division=0),
            "accuracy": reference.accuracy_score(labels, called),
            "loss": reference.log_loss(labels, probs),
            "positive_share": called.mean(),
        }
        assert compute_metrics(labels, logits) == pytest.approx(
            expected | {"tp": tp, "fp": fp, "fn": fn, "tn": tn}, abs=1e-12
        )


def test_auc_counts_pairs_with_ties_half_and_reads_nothing_but_the_order():
    labels, scores = draw(300, 1, levels=2)
    pairs = scores[labels][:, None] - scores[~labels][None, :]
    assert compute_auc(labels, scores) == pytest.approx(
        ((pairs > 0) + 0.5 * (pairs == 0)).mean(), abs=1e-12
    )
    assert (
        compute_auc(labels, scores)
        == compute_auc(labels, np.exp(3 * scores))
        == 1 - compute_auc(labels, -scores)
    )
    order = np.random.default_rng(0).permutation(300)
    assert compute_pr_auc(labels, scores) == pytest.approx(
        compute_pr_auc(labels[order], scores[order]), abs=1e-12
    )


def test_f2_weighs_recall_twice_and_forgives_a_false_alarm_sooner_than_a_miss():
    precision, recall = 30 / 50, 30 / 40
    for beta in (0.5, 1, 2, 3):
        expected = (1 + beta**2) * precision * recall / (beta**2 * precision + recall)
        assert compute_fbeta({"tp": 30, "fp": 20, "fn": 10, "tn": 40}, beta) == pytest.approx(
            expected
        )
    missed, alarmed = {"tp": 8, "fp": 0, "fn": 2, "tn": 9}, {"tp": 8, "fp": 2, "fn": 0, "tn": 9}
    assert compute_fbeta(missed, 2) < compute_fbeta(alarmed, 2) and compute_fbeta(
        missed, 1
    ) == compute_fbeta(alarmed, 1)


@pytest.mark.parametrize("num", [1, 7, 32768])
def test_a_confusion_adds_up_to_the_split(num):
    labels, called = np.random.default_rng(num).integers(0, 2, (2, num), np.uint8)
    confusion = compute_confusion(labels, called)
    assert sum(confusion.values()) == num
    assert (
        confusion["tp"] + confusion["fn"] == labels.sum()
        and confusion["tp"] + confusion["fp"] == called.sum()
    )


def test_the_constant_baselines_are_what_constants_score():
    assert constant_baselines(np.arange(1000) % 2)["always_positive_f2"] == pytest.approx(
        0.8333, abs=1e-4
    )
    labels = np.arange(600) % 6 == 0  # five negatives to one positive
    baselines = constant_baselines(labels)
    always, never = (
        compute_metrics(labels, np.full(600, 9.0)),
        compute_metrics(labels, np.full(600, -9.0)),
    )
    assert [baselines[f"always_positive_{name}"] for name in ("f1", "f2")] == [
        always["f1"],
        always["f2"],
    ]
    assert (
        baselines["always_negative_f2"] == never["f2"] == 0
        and baselines["majority_accuracy"] == never["accuracy"]
    )
    assert (
        baselines["constant_auc"] == always["auc"]
        and baselines["constant_pr_auc"] == always["pr_auc"]
    )
    assert baselines["prior_loss"] == pytest.approx(
        compute_metrics(labels, np.full(600, np.log(1 / 5)))["loss"]
    )


@pytest.mark.filterwarnings("ignore:invalid value")
def test_what_is_not_defined_is_nan_and_never_a_number():
    ones, zeros, scores = np.ones(4), np.zeros(4), np.arange(4.0)
    assert np.isnan(
        [compute_auc(ones, scores), compute_auc(zeros, scores), compute_pr_auc(zeros, scores)]
    ).all()
    assert np.isnan([compute_auc([0, 1], [0, np.nan]), compute_pr_auc([0, 1], [0, np.nan])]).all()
    assert np.isnan(compute_metrics([0, 1], [0.0, np.nan])["loss"])
    assert np.isnan(compute_fbeta({"tp": 0, "fp": 0, "fn": 0, "tn": 4}, 2))
    assert compute_fbeta({"tp": 0, "fp": 3, "fn": 0, "tn": 1}, 2) == 0


def test_extreme_logits_stay_finite_and_the_border_is_positive():
    with np.errstate(all="raise", under="ignore"):
        assert sigmoid([-1e4, -750, 0, 750, 1e4]).tolist() == pytest.approx([0, 0, 0.5, 1, 1])
        assert np.isfinite(compute_metrics([1, 0], [-1e4, 1e4])["loss"])
    assert compute_metrics([1, 0], [0.0, -1e-9])["tp"] == 1, (
        "a probability of 0.5 is called positive at 0.5"
    )
    labels, logits = draw(200_000, 4)
    assert compute_metrics(labels, logits, 0.9)["tp"] == int(
        (labels & (sigmoid(logits) >= 0.9)).sum()
    )
    drift = (
        compute_metrics(labels, logits.astype(np.float32))["loss"]
        / compute_metrics(labels, logits)["loss"]
        - 1
    )
    assert abs(drift) < 1e-7, "sums are in 64 bits"


@pytest.mark.parametrize("logit, word", [(3.0, "positive"), (-3.0, "negative")])
def test_a_constant_model_raises_the_alarm_and_another_does_not(logit, word):
    labels = np.arange(10) % 2
    alarm = constant_alarm(compute_metrics(labels, np.full(10, logit) + np.arange(10) / 10), labels)
    assert alarm.startswith("ALARM") and word in alarm and "0.833" in alarm
    assert constant_alarm(compute_metrics(labels, np.where(labels, 1, -1)), labels) == ""


def test_intervals_agree_with_published_and_drawn_ones():
    """Wilson's for 0 of 10 and 50 of 100 (Newcombe 1998); Hanley and McNeil's against redrawn
    patches.
    """
    assert share_interval(0, 10) == pytest.approx((0.0, 0.2775), abs=5e-5)
    assert share_interval(50, 100) == pytest.approx((0.4038, 0.5962), abs=5e-5)
    rng = np.random.default_rng(0)
    labels, scores = np.arange(600) % 2, rng.normal(np.arange(600) % 2 * 1.5)
    draws = rng.integers(0, 600, (400, 600))
    redrawn = np.percentile(
        [compute_auc(labels[draw], scores[draw]) for draw in draws], [2.5, 97.5]
    )
    assert auc_interval(compute_auc(labels, scores), 300, 300) == pytest.approx(
        tuple(redrawn), abs=0.008
    )
    assert auc_interval(1.0, 5, 5) == (1.0, 1.0)
