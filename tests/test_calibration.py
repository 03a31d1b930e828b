"""lib/calibration.py and lib/features.py: what is fitted is what was planted, a threshold does what
its rule says, and a finished checkpoint carries both. lib/audit/resampling.py: intervals cover.
"""

import dataclasses
import shutil

import numpy as np
import pytest
import torch
from conftest import draw_patches, make_old, write_pcam

from lib.audit.model import recalibrate, reliability
from lib.audit.resampling import draw_weights, estimate, resampled_scores
from lib.batches import PatchSource, Rows, fold_of_rows, open_train_valid
from lib.calibration import (
    calibrate,
    calibration_scores,
    choose_threshold,
    complete_checkpoint,
    decision_scores,
    fit_calibration,
    fit_scaling,
)
from lib.checkpoint import load_checkpoint, load_model
from lib.features import NAMES, build_reference, judge_batch, measure_features, patch_scores
from lib.files import read_json
from lib.groups import groups_for_halves, write_groups
from lib.metrics import compute_auc, sigmoid
from lib.predict import predict_rows

CPU = torch.device("cpu")
RNG = np.random.default_rng(5)
LOGITS = RNG.normal(0, 2, 40_000)  # true log odds
LABELS = RNG.random(40_000) < sigmoid(LOGITS)
FEW_LABELS, FEW_PROBS = LABELS[:400], sigmoid(LOGITS[:400])
FEATURES = measure_features(draw_patches(600, 1)[0])


def test_temperature_and_offset_are_recovered_and_mend_what_was_bent():
    bent = 3 * LOGITS - 1.5
    temperature, offset = fit_scaling(LABELS, bent)
    assert (temperature, offset) == pytest.approx((3, 0.5), rel=0.05)
    before = calibration_scores(LABELS, bent)
    scaled = calibrate(bent, {"temperature": temperature, "offset": offset})
    after = calibration_scores(LABELS, scaled)
    assert before["ece"] > 0.1 and after["ece"] < 0.01
    assert all(after[name] < before[name] for name in before)


def test_scaling_stays_finite_where_classes_do_not_overlap():
    logits = np.linspace(-30, 30, 20)
    for sign in (1, -1, 0):
        temperature, offset = fit_scaling(logits > 0, sign * logits)
        assert 0 < temperature <= 100 and np.isfinite(offset)


def test_ece_is_the_weighted_gap_of_the_bins_that_reliability_lists():
    rows = reliability(LABELS, sigmoid(LOGITS))
    gaps = [row["num"] * abs(row["mean_probability"] - row["positive_share"]) for row in rows]
    assert calibration_scores(LABELS, LOGITS)["ece"] == pytest.approx(sum(gaps) / len(LABELS))
    expected = {"ece": 0.5, "brier": 0.25, "nll": np.log(2)}
    assert calibration_scores(np.ones(4), np.zeros(4)) == pytest.approx(expected)


def test_each_rule_chooses_the_best_of_all_thresholds():
    labels, probs = FEW_LABELS, np.round(FEW_PROBS, 2)
    decisions = [decision_scores(labels, probs, at) for at in (*np.unique(probs), 1.1)]

    def choose(rule):
        return decision_scores(labels, probs, choose_threshold(labels, probs, rule, 0.9, 7.0))

    def cost(decision):
        return 7 * decision["fn"] + decision["fp"]

    assert choose("f2")["f2"] == max(decision["f2"] for decision in decisions)
    assert cost(choose("cost")) == min(map(cost, decisions))
    threshold = choose("recall")["threshold"]
    stricter = decision_scores(labels, probs, probs[probs > threshold].min() + 1e-9)
    assert choose("recall")["recall"] >= 0.9 > stricter["recall"]
    # of the most probable patches most are negative: each call costs more than it saves
    threshold = choose_threshold([0, 0, 1], [1.0, 0.9, 0.9], "cost", 0.0, 0.5)
    assert 1 < threshold < 2, "nothing is called positive"


def patch_source(split) -> PatchSource:
    return PatchSource(split.images, "disk", CPU)


def test_threshold_and_calibration_are_judged_on_patches_that_did_not_choose_them(quick_run):
    model, cfg, checkpoint = load_model(quick_run)
    _, (split, rows) = open_train_valid(cfg)
    logits = predict_rows(model, patch_source(split), rows.index, cfg, cfg.views)
    is_judged = fold_of_rows(groups_for_halves(split, cfg.data_dir), 2)[rows.index] == 1
    calibration = checkpoint["calibration"]
    assert calibration == fit_calibration(rows.labels, logits, ~is_judged, cfg)
    labels, scaled = rows.labels[is_judged], calibrate(logits, calibration)[is_judged]
    assert calibration["after"] == pytest.approx(calibration_scores(labels, scaled))
    decision = decision_scores(labels, sigmoid(scaled), checkpoint["threshold"])
    assert calibration["decision"] == decision
    assert read_json(quick_run / "summary.json")["half_f2"] == decision["f2"]


@pytest.fixture
def ckpt(quick_run, tmp_path):
    """A copy of a finished checkpoint."""
    return shutil.copy(quick_run / "best.pt", tmp_path)


def test_without_both_classes_in_both_halves_nothing_is_made_up(ckpt):
    cfg = load_model(ckpt)[1]
    train, (split, rows) = open_train_valid(cfg)
    few = Rows(rows.index[:1], rows.labels[:1], {})
    complete_checkpoint(ckpt, train, (split, few), patch_source(split), cfg)
    checkpoint = load_checkpoint(ckpt)
    assert checkpoint["threshold"] == 0.5 and checkpoint["calibration"] is None
    assert checkpoint["reference"]


def test_a_fold_is_calibrated(ckpt, tmp_path):
    """A fold is a stretch of the order that halves are cut from: the last lies in one half."""
    folder = write_pcam(tmp_path / "data")
    write_groups(folder, {"train": np.arange(160)})
    keys = {"data_dir": str(folder), "num_folds": 4, "fold": 3}
    cfg = dataclasses.replace(load_model(ckpt)[1], **keys)
    train, valid = open_train_valid(cfg)
    _, summary = complete_checkpoint(ckpt, train, valid, patch_source(valid[0]), cfg)
    assert 0 <= summary["half_ece"] <= 1 and load_checkpoint(ckpt)["calibration"]


@pytest.mark.parametrize("is_old", [True, False])
def test_what_is_calibrated_anew_keeps_its_last_layer(ckpt, pcam_dir, is_old):
    if is_old:
        make_old(ckpt)
    recalibrate(ckpt, pcam_dir, ["threshold_rule=recall", "least_recall=1.0"], "cpu")
    checkpoint = load_checkpoint(ckpt)
    assert checkpoint["float32_logits"] == (not is_old)


def test_the_reference_is_the_training_data_and_its_limits_are_those_of_validation():
    train, valid = FEATURES[:400], FEATURES[400:]
    reference = build_reference(train, valid, np.arange(200))
    assert np.allclose(reference["mean"], train.mean(0))
    assert (patch_scores(valid, reference) > reference["limit"]).mean() <= 0.005
    moved = valid.copy()
    moved[:20] += 3 * np.array(reference["deviation"])
    by_slide = build_reference(train, moved, np.arange(200) // 20)
    assert by_slide["shift_limit"] > reference["shift_limit"] + 1, "a slide may look so, too"


def test_a_batch_that_differs_in_one_feature_is_named_by_it_and_a_small_one_is_granted_chance():
    valid = FEATURES[400:]
    reference = build_reference(FEATURES[:400], valid, np.arange(200))
    for place, name in enumerate(NAMES):
        moved = valid.copy()
        moved[:, place] += 2 * reference["deviation"][place]
        verdict = judge_batch(moved, reference)
        assert verdict["drifted"] and verdict["feature"] == name
    assert not judge_batch(valid, reference)["drifted"]
    assert sum(judge_batch(row[None], reference)["drifted"] for row in valid) <= 2


def test_scores_of_weights_are_those_of_copies_of_the_rows():
    labels, probs = FEW_LABELS, np.round(FEW_PROBS, 1)  # many ties
    weights = RNG.integers(0, 4, (11, 400))
    weights[0], weights[-1] = 1, labels
    scores = resampled_scores(labels, probs, 0.4, weights)
    for number in (0, 1):
        copies = np.repeat(np.arange(400), weights[number])
        expected = decision_scores(labels[copies], probs[copies], 0.4)
        expected["auc"] = compute_auc(labels[copies], probs[copies])
        for name in ("f2", "recall", "specificity", "precision", "auc"):
            assert scores[name][number] == pytest.approx(expected[name])
    assert np.isnan(scores["auc"][-1]), "one class alone"


def test_few_groups_have_no_interval():
    """Neither in all, nor for the class that a score rests on: one group drawn twice is itself."""
    few = np.arange(400) % 7
    groups = np.where(FEW_LABELS, few, np.arange(400))
    of_few, of_mixed = (
        resampled_scores(FEW_LABELS, FEW_PROBS, 0.4, draw_weights(names, 200))
        for names in (few, groups)
    )
    for values in (*of_few.values(), of_mixed["recall"]):
        assert values[0] > 0 and np.isnan(estimate(values)[1:]).all()
    _, low, high = estimate(of_mixed["specificity"])
    assert low < high


def auc_interval_of(part, groups, seed=0) -> tuple[float, float, float]:
    """The AUC of some rows with its interval, groups (N,) drawn together."""
    weights = draw_weights(groups, 400, seed)
    scores = resampled_scores(LABELS[part], sigmoid(LOGITS[part]), 0.5, weights)
    return estimate(scores["auc"])


def test_intervals_cover_the_truth_about_as_often_as_they_say_and_groups_widen_them():
    truth, num_inside = compute_auc(LABELS, LOGITS), 0
    for start in range(0, 20_000, 200):
        part = np.arange(start, start + 200)
        value, low, high = auc_interval_of(part, np.arange(200), start)
        assert value == pytest.approx(compute_auc(LABELS[part], LOGITS[part]))
        num_inside += low <= truth <= high
    assert 88 <= num_inside <= 99, "of 100"
    copies = np.repeat(np.arange(100), 4)
    _, low, high = auc_interval_of(copies, copies)
    _, naive_low, naive_high = auc_interval_of(copies, np.arange(400))
    assert high - low > 1.5 * (naive_high - naive_low), "four copies of a patch are one patch"
