"""lib/deploy.py and the reference of lib/features.py: what a finished checkpoint carries to be used elsewhere."""

import dataclasses
import shutil

import numpy as np
import pytest
import torch
from conftest import draw_patches, make_old

from lib import deploy
from lib.batches import PatchSource, fold_of_rows, group_of_rows, open_train_valid
from lib.calibration import calibration_scores, choose_threshold, decision_scores
from lib.checkpoint import load_checkpoint, load_model
from lib.features import NAMES, build_reference, judge_batch, measure_features, patch_scores
from lib.files import read_json
from lib.metrics import sigmoid
from lib.predict import predict_rows


def test_threshold_and_calibration_are_judged_on_patches_that_did_not_choose_them(quick_run):
    model, cfg, checkpoint = load_model(quick_run)
    _, (split, rows) = open_train_valid(cfg)
    logits = predict_rows(
        model, PatchSource(split.images, "disk", torch.device("cpu")), rows.index, cfg, cfg.views
    )
    judged = fold_of_rows(group_of_rows(split, cfg.data_dir), 2)[rows.index] == 1
    calibration = checkpoint["calibration"]
    scaled = logits / calibration["temperature"] + calibration["offset"]
    rule = cfg.threshold_rule, cfg.least_recall, cfg.false_negative_cost
    assert choose_threshold(rows.labels[~judged], sigmoid(scaled[~judged]), *rule) == pytest.approx(
        checkpoint["threshold"]
    )
    decision = decision_scores(
        rows.labels[judged], sigmoid(scaled[judged]), checkpoint["threshold"]
    )
    assert decision == pytest.approx(calibration["decision"])
    for name, values in (("before", logits), ("after", scaled)):
        assert calibration_scores(rows.labels[judged], values[judged]) == pytest.approx(
            calibration[name], abs=1e-6
        )
    summary = read_json(quick_run / "summary.json")
    assert (
        summary["half_f2"] == decision["f2"] and summary["half_ece"] == calibration["after"]["ece"]
    )


def test_without_both_classes_in_both_halves_nothing_is_made_up(quick_run, tmp_path, capsys):
    _, cfg, fields = load_model(quick_run)
    (train, train_rows), (split, rows) = open_train_valid(cfg)
    few = type(rows)(rows.index[:1], rows.labels[:1], {})
    target = tmp_path / "best.pt"
    target.write_bytes((quick_run / "best.pt").read_bytes())
    source = PatchSource(split.images, "disk", torch.device("cpu"))
    before = load_checkpoint(target)["weights_sha256"]
    _, told = deploy.complete_checkpoint(
        target, torch.device("cpu"), (train, train_rows), (split, few), source, cfg
    )
    left = load_checkpoint(target)
    assert (
        left["threshold"] == 0.5 and left["calibration"] is None and not told and left["reference"]
    )
    assert left["weights_sha256"] == before
    assert "probabilities are not calibrated" in capsys.readouterr().err


@pytest.mark.parametrize("fold", range(4))
def test_every_fold_is_calibrated(quick_run, tmp_path, fold):
    """A fold is a stretch of the order that halves are cut from: most of them lie in one half of
    it.
    """
    cfg = dataclasses.replace(load_model(quick_run)[1], num_folds=4, fold=fold)
    train, valid = open_train_valid(cfg)
    shutil.copy(quick_run / "best.pt", tmp_path)
    source = PatchSource(valid[0].images, "disk", torch.device("cpu"))
    _, told = deploy.complete_checkpoint(
        tmp_path / "best.pt", torch.device("cpu"), train, valid, source, cfg
    )
    assert 0 <= told["half_ece"] <= 1 and load_checkpoint(tmp_path / "best.pt")["calibration"]


def test_what_is_calibrated_anew_keeps_its_last_layer(quick_run, pcam_dir, tmp_path):
    for name in ("old.pt", "new.pt"):
        shutil.copy(quick_run / "best.pt", tmp_path / name)
    make_old(tmp_path / "old.pt")
    for name in ("old.pt", "new.pt"):
        deploy.recalibrate(tmp_path / name, pcam_dir, [], "cpu")
        assert load_checkpoint(tmp_path / name)["float32_logits"] == (name == "new.pt")


FEATURES = measure_features(draw_patches(600, 1)[0])


def test_the_reference_is_the_training_data_and_its_limits_are_those_of_validation():
    train, valid = FEATURES[:400], FEATURES[400:]
    reference = build_reference(train, valid, np.arange(200))
    assert np.allclose(reference["mean"], train.mean(0)) and reference["num"] == 400
    assert (patch_scores(valid, reference) > reference["limit"]).mean() <= 0.005
    assert np.sqrt((patch_scores(train, reference) ** 2).mean()) == pytest.approx(1, abs=0.05), (
        "a deviation over all features"
    )
    by_slide = build_reference(train, valid + np.where(np.arange(200) < 20, 3.0, 0)[:, None] * reference["deviation"],
                               np.arange(200) // 20)  # fmt: skip
    assert by_slide["shift_limit"] > reference["shift_limit"] + 1, (
        "a slide of validation may look so, too"
    )


@pytest.mark.parametrize("name", NAMES)
def test_a_batch_that_differs_in_one_feature_is_named_by_it_and_a_small_one_is_granted_chance(name):
    reference = build_reference(FEATURES[:400], FEATURES[400:], np.arange(200))
    place = NAMES.index(name)
    moved = FEATURES[400:].copy()
    moved[:, place] += 2 * reference["deviation"][place]
    found = judge_batch(moved, reference)
    assert (
        found["drifted"]
        and found["feature"] == name
        and found["shift"] == pytest.approx(2, abs=0.3)
    )
    assert not judge_batch(FEATURES[400:], reference)["drifted"]
    alone = [judge_batch(FEATURES[row : row + 1], reference)["drifted"] for row in range(400, 600)]
    assert sum(alone) <= 2
