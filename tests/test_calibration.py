"""lib/calibration.py: what is fitted is what was planted, a threshold does what its rule says,
intervals cover.
"""

import numpy as np
import pytest

from lib.audit.resampling import (
    at_prevalence,
    draw_weights,
    interval,
    resampled_curves,
    resampled_scores,
)
from lib.calibration import (
    calibration_scores,
    choose_threshold,
    decision_scores,
    fit_scaling,
    fit_temperature,
    reliability,
)
from lib.metrics import compute_auc, compute_metrics, curve_points, sigmoid

RNG = np.random.default_rng(5)
LOGITS = RNG.normal(0, 2, 40_000)  # true log odds
LABELS = RNG.random(40_000) < sigmoid(LOGITS)
SMALL = slice(0, 400)


def test_temperature_and_offset_are_recovered_and_mend_what_was_bent():
    assert fit_temperature(LABELS, 3 * LOGITS) == pytest.approx(3, rel=0.03)
    temperature, offset = fit_scaling(LABELS, 3 * LOGITS - 1.5)
    assert (temperature, offset) == pytest.approx((3, 0.5), rel=0.05)
    bent, mended = (
        calibration_scores(LABELS, z)
        for z in (3 * LOGITS - 1.5, (3 * LOGITS - 1.5) / temperature + offset)
    )
    assert (
        bent["ece"] > 0.1
        and mended["ece"] < 0.01
        and all(mended[name] < bent[name] for name in bent)
    )


@pytest.mark.parametrize(
    "logits", [[-30, -2, -1, 1, 2, 30], [30, 2, 1, -1, -2, -30], [0, 0, 0, 0, 0, 0]]
)
def test_scaling_stays_finite_where_classes_do_not_overlap(logits):
    temperature, offset = fit_scaling([0, 0, 0, 1, 1, 1], logits)
    assert 0 < temperature <= 100 and np.isfinite(offset)


def test_reliability_counts_every_patch_once_and_ece_is_its_weighted_gap():
    probs = sigmoid(LOGITS)
    rows = reliability(LABELS, probs)
    assert sum(row["num"] for row in rows) == len(LABELS)
    assert all(row["low"] <= row["mean_probability"] <= row["high"] for row in rows)
    assert calibration_scores([1, 1, 0, 0], [0.0, 0.0, 0.0, 0.0])["ece"] == 0
    assert calibration_scores([1, 1, 1, 1], [0.0, 0.0, 0.0, 0.0]) == pytest.approx(
        {"ece": 0.5, "brier": 0.25, "nll": np.log(2)}
    )


def best_by_hand(labels, probs, value):
    """The decision of highest value among those of every threshold."""
    return max(
        value(decision_scores(labels, probs, threshold)) for threshold in (*np.unique(probs), 1.1)
    )


def test_each_rule_chooses_the_best_of_all_thresholds():
    labels, probs = LABELS[SMALL], np.round(sigmoid(LOGITS[SMALL]), 2)
    chosen = {
        rule: decision_scores(labels, probs, choose_threshold(labels, probs, rule, 0.9, 7.0))
        for rule in ("f2", "cost")
    }
    assert chosen["f2"]["f2"] == best_by_hand(labels, probs, lambda d: d["f2"])
    assert -7 * chosen["cost"]["fn"] - chosen["cost"]["fp"] == best_by_hand(
        labels, probs, lambda d: -7 * d["fn"] - d["fp"]
    )
    threshold = choose_threshold(labels, probs, "recall", 0.9, 7.0)
    stricter = probs[probs > threshold].min() + 1e-9
    assert (
        decision_scores(labels, probs, threshold)["recall"]
        >= 0.9
        > decision_scores(labels, probs, stricter)["recall"]
    )
    assert np.isnan(choose_threshold(np.ones(4), np.arange(4) / 4, "f2", 0.9, 1.0))


def test_what_a_decision_means_follows_the_prevalence():
    rare, even = at_prevalence(0.9, 0.9, 0.01), at_prevalence(0.9, 0.9, 0.5)
    assert rare["precision"] == pytest.approx(0.009 / (0.009 + 0.099)) and even[
        "precision"
    ] == pytest.approx(0.9)
    assert even["always_positive_f2"] == pytest.approx(0.8333, abs=1e-4) and even[
        "f2"
    ] == pytest.approx(0.9)
    assert rare["negative_predictive_value"] > 0.998 and rare["flagged_share"] == pytest.approx(
        0.108
    )
    always = at_prevalence(1.0, 0.0, 0.3)
    assert always["f2"] == pytest.approx(always["always_positive_f2"]) and np.isnan(
        always["negative_predictive_value"]
    )


def test_scores_of_equal_weights_are_the_scores_and_those_of_copies_their_weights():
    labels, probs = LABELS[SMALL], np.round(sigmoid(LOGITS[SMALL]), 1)  # many ties
    once = resampled_scores(labels, probs, 0.4, np.ones((1, 400), np.uint8))
    logits = np.log(np.clip(probs, 1e-9, None) / np.clip(1 - probs, 1e-9, None))
    expected = compute_metrics(labels, logits, 0.4)
    assert once["auc"][0] == pytest.approx(compute_auc(labels, probs)) and once["f2"][
        0
    ] == pytest.approx(expected["f2"])
    weights = RNG.integers(0, 4, 400)
    found = resampled_scores(labels, probs, 0.4, weights[None])
    copies = np.repeat(np.arange(400), weights)
    assert found["auc"][0] == pytest.approx(compute_auc(labels[copies], probs[copies]))
    assert found["brier"][0] == pytest.approx(((probs - labels)[copies] ** 2).mean())
    one_class = resampled_scores(labels, probs, 0.4, np.where(labels, 1, 0)[None])
    assert np.isnan(one_class["auc"][0]) and np.isnan(interval(np.full(10, np.nan))[0])


def test_intervals_cover_the_truth_about_as_often_as_they_say_and_groups_widen_them():
    truth, inside = compute_auc(LABELS, LOGITS), 0
    for start in range(0, 20_000, 200):
        part = slice(start, start + 200)
        values = resampled_scores(
            LABELS[part], sigmoid(LOGITS[part]), 0.5, draw_weights(np.arange(200), 200, seed=start)
        )
        low, high = interval(values["auc"])
        inside += low <= truth <= high
    assert 88 <= inside <= 99, "of 100"
    copies, groups = np.repeat(np.arange(100), 4), np.repeat(np.arange(100), 4)
    widths = []
    for names in (groups, np.arange(400)):
        low, high = interval(
            resampled_scores(LABELS[copies], sigmoid(LOGITS[copies]), 0.5, draw_weights(names))[
                "auc"
            ]
        )
        widths.append(high - low)
    assert widths[0] > 1.5 * widths[1], "four copies of a patch are one patch"


def test_resampled_curves_of_equal_weights_are_the_curves():
    labels, probs = LABELS[SMALL], sigmoid(LOGITS[SMALL])
    grid, points = np.linspace(0, 1, 51), curve_points(labels, probs)
    curves = resampled_curves(labels, probs, np.ones((1, 400), np.uint8), grid)
    assert np.trapezoid(curves["recall"][0], grid) == pytest.approx(
        compute_auc(labels, probs), abs=0.01
    )
    for recall, precision in zip(grid[1:], curves["precision"][0][1:], strict=True):
        at = int(np.argmax(points["recall"] >= recall - 1e-9))
        assert precision == pytest.approx(points["precision"][at])
