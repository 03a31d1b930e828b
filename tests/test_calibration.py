"""lib/calibration.py and lib/features.py: what is fitted is what was planted, a threshold does what
its rule says, and a finished checkpoint carries both. lib/audit/resampling.py: intervals cover.
"""

import dataclasses
import shutil

import numpy as np
import pytest
import torch
from conftest import draw_patches, make_old, write_pcam

from lib.audit.model import recalibrate
from lib.audit.resampling import draw_weights, estimate, resampled_scores
from lib.batches import PatchSource, Rows, fold_of_rows, open_train_valid
from lib.calibration import (
    calibrate,
    calibration_scores,
    choose_threshold,
    complete_checkpoint,
    fit_calibration,
    fit_scaling,
)
from lib.checkpoint import load_checkpoint, load_model
from lib.features import NAMES, build_reference, judge_batch, measure_features, patch_scores
from lib.files import read_json
from lib.groups import groups_for_halves, write_groups
from lib.metrics import compute_auc, compute_metrics, sigmoid
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
    after = calibration_scores(LABELS, bent / temperature + offset)
    assert before["ece"] > 0.1 and after["ece"] < 0.01
    assert all(after[name] < before[name] for name in before)
    # it stays finite where classes do not overlap
    for sign in (1, -1, 0):
        temperature, offset = fit_scaling(LABELS, sign * np.where(LABELS, 30, -30))
        assert 0 < temperature <= 100 and np.isfinite(offset)


def test_each_rule_chooses_the_best_of_all_thresholds():
    logits = np.round(LOGITS[:400], 1)
    probs = sigmoid(logits)
    decisions = [compute_metrics(FEW_LABELS, logits, at) for at in (*np.unique(probs), 1.1)]

    def choose(rule):
        threshold = choose_threshold(FEW_LABELS, probs, rule, 0.9, 7.0)
        return compute_metrics(FEW_LABELS, logits, threshold)

    def cost(decision):
        return 7 * decision["fn"] + decision["fp"]

    assert choose("f2")["f2"] == max(decision["f2"] for decision in decisions)
    assert cost(choose("cost")) == min(map(cost, decisions))
    recalls = [decision["recall"] for decision in decisions]
    assert choose("recall")["recall"] == min(recall for recall in recalls if recall >= 0.9)
    # of the most probable patches most are negative: each call costs more than it saves
    threshold = choose_threshold([0, 0, 1], [1.0, 0.9, 0.9], "cost", 0.0, 0.5)
    assert threshold > 1, "nothing is called positive"


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
    decision = compute_metrics(labels, scaled, checkpoint["threshold"])
    assert calibration["decision"] == {"threshold": checkpoint["threshold"], **decision}
    assert read_json(quick_run / "summary.json")["half_f2"] == decision["f2"]


@pytest.fixture
def ckpt(quick_run, tmp_path):
    """A copy of a finished checkpoint."""
    return shutil.copy(quick_run / "best.pt", tmp_path)


def test_without_both_classes_in_both_halves_nothing_is_made_up_and_a_fold_is_calibrated(
    ckpt, tmp_path
):
    """A fold is a stretch of the order that halves are cut from: the last lies in one half."""
    folder = write_pcam(tmp_path / "data")
    write_groups(folder, {"train": np.arange(160)})
    keys = {"data_dir": str(folder), "num_folds": 4, "fold": 3}
    cfg = dataclasses.replace(load_model(ckpt)[1], **keys)
    train, (split, rows) = open_train_valid(cfg)
    _, summary = complete_checkpoint(ckpt, train, (split, rows), patch_source(split), cfg)
    assert 0 <= summary["half_ece"] <= 1 and load_checkpoint(ckpt)["calibration"]
    few = Rows(rows.index[:1], rows.labels[:1], {})
    complete_checkpoint(ckpt, train, (split, few), patch_source(split), cfg)
    checkpoint = load_checkpoint(ckpt)
    assert checkpoint["threshold"] == 0.5 and checkpoint["calibration"] is None
    assert checkpoint["reference"]


def test_what_is_calibrated_anew_keeps_its_last_layer(ckpt, pcam_dir):
    make_old(ckpt)
    recalibrate(ckpt, pcam_dir, ["threshold_rule=recall", "least_recall=1.0"], "cpu")
    assert not load_checkpoint(ckpt)["float32_logits"]


def test_the_reference_is_the_training_data_and_its_limits_are_those_of_validation():
    train, valid = FEATURES[:400], FEATURES[400:]
    reference = build_reference(train, valid, np.arange(200))
    assert np.allclose(reference["mean"], train.mean(0))
    assert (patch_scores(valid, reference) > reference["limit"]).mean() <= 0.005
    moved = valid.copy()
    moved[:20] += 3 * np.array(reference["deviation"])
    by_slide = build_reference(train, moved, np.arange(200) // 20)
    assert by_slide["shift_limit"] > reference["shift_limit"] + 1, "a slide may look so, too"
    for place, name in enumerate(NAMES):
        moved = valid.copy()
        moved[:, place] += 2 * reference["deviation"][place]
        verdict = judge_batch(moved, reference)
        assert verdict["drifted"] and verdict["feature"] == name
    assert not judge_batch(valid, reference)["drifted"]
    assert sum(judge_batch(row[None], reference)["drifted"] for row in valid) <= 2


def test_an_interval_holds_its_value_and_groups_widen_it():
    def auc_interval(groups):
        copies = np.repeat(np.arange(100), 4)
        weights = draw_weights(groups, 400)
        scores = resampled_scores(LABELS[copies], sigmoid(LOGITS[copies]), 0.5, weights)
        return estimate(scores["auc"])

    value, low, high = auc_interval(np.repeat(np.arange(100), 4))
    _, naive_low, naive_high = auc_interval(np.arange(400))
    assert value == pytest.approx(compute_auc(LABELS[:100], LOGITS[:100]))
    assert low < naive_low < value < naive_high < high
    assert high - low > 1.5 * (naive_high - naive_low), "four copies of a patch are one patch"
