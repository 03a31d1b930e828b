"""The audit of a model: what is planted is found, what is not is not, and each figure is what
another way of counting gives.
"""

import contextlib
import functools
import io
import json
import math

import numpy as np
import pytest
import torch
from conftest import draw_patches

import audit
import inference
from lib.audit import shortcut, slices
from lib.audit.resampling import draw_weights
from lib.audit.slices import conclude, measure_slice, measure_slices, split_answers
from lib.batches import fold_of_rows
from lib.calibration import choose_threshold
from lib.checkpoint import load_checkpoint, save_checkpoint
from lib.files import read_csv, read_json
from lib.groups import groups_for_halves, write_groups
from lib.metrics import compute_auc, compute_metrics, sigmoid
from lib.pcam import open_split
from lib.predict import predict_batch
from lib.splitwriter import SplitWriter

CENTRE = shortcut.centre_mask()[..., 0]
LABELS = np.arange(120) % 2


@functools.cache
def judge_world(weakness=0.0):
    """Slices of a model that is weaker on the fifth of 1,500 patches with the lowest sharpness:
    (rows, worst, answers, mask of that fifth).
    """
    rng = np.random.default_rng(0)
    labels = rng.random(1500) < 0.5
    features = {name: rng.normal(size=1500) for name in ("sharpness", "a", "b")}
    signal = np.where(labels, 1.6, -1.6) * np.where(features["sharpness"] < -0.84, 1 - weakness, 1)
    answers = split_answers(labels, sigmoid(rng.normal(signal, 1.2)), 0.5, np.arange(1500) // 3)
    rows = measure_slices(slices.build_slices(features, answers.rows[0]), answers)
    edge = np.quantile(features["sharpness"][answers.rows[0]], 0.2)
    return rows, conclude(rows), answers, features["sharpness"] < edge


def test_a_weak_slice_is_found_on_one_half_and_confirmed_on_the_other():
    rows, worst, answers, is_weak = judge_world(weakness=0.8)
    assert worst["feature"] == "sharpness" and worst["slice"].startswith("below")
    assert {row["feature"] for row in rows if row["confirmed"]} == {"sharpness"}
    # its scores are those of the patches of the second half below the edge of the first
    inside = answers.rows[1][is_weak[answers.rows[1]]]
    assert worst["num"] == len(inside)
    assert worst["auc"] == pytest.approx(compute_auc(answers.labels[inside], answers.probs[inside]))
    assert worst["auc_low"] < worst["auc"] < worst["auc_high"] < worst["rest_auc"]
    assert judge_world()[1] is None, "nothing is planted"


def test_a_slice_is_not_confirmed_where_the_rest_is_as_uncertain():
    """The patches of the rest are of few groups, that differ: its value says little."""
    rng = np.random.default_rng(0)
    num_confirmed = 0
    inside = np.arange(1200) < 600
    groups = np.where(inside, np.arange(1200), 10_000 + np.arange(1200) // 20)
    for _ in range(10):
        chances = np.where(inside, 0.75, rng.choice([0.5, 1.0], 12_000)[groups % 997])
        probs = rng.random(1200) < chances
        row = measure_slice(inside, split_answers(np.ones(1200), probs, 0.5, groups))
        num_confirmed += row["gap_recall_low"] > 0
    assert num_confirmed <= 1, "of 10, where 2.5% are allowed"


def test_a_slice_without_a_class_or_groups_enough_is_not_judged():
    answers = judge_world()[2]
    row = measure_slice(~answers.labels, answers)
    assert math.isnan(row["recall"]) and math.isnan(row["auc"]) and row["specificity"] > 0.5
    patch = np.arange(1500)
    probs = np.where(patch < 200, 1 - answers.probs, answers.probs)  # wrong there
    for size, is_judged in ((50, False), (5, True)):
        others = split_answers(answers.labels, probs, 0.5, patch // size)
        assert (conclude([measure_slice(patch < 200, others)]) is not None) == is_judged


class Sees(torch.nn.Module):
    """A model whose logit is how dark the pixels of a region bool (96, 96) are."""

    def __init__(self, region):
        super().__init__()
        self.region = region

    def forward(self, images):
        return -8 * (images[:, :, self.region].mean((1, 2))[:, None] + 0.1)


def predictor(region):
    """Patches to the logits of a model that sees a region."""
    model = Sees(region)
    return lambda patches: predict_batch(model, patches, "fp32", 1).double().numpy()


@pytest.mark.parametrize("seen", ["centre", "ring"])
def test_probes_tell_a_model_that_sees_the_centre_from_one_that_sees_the_ring(seen):
    """Of patches whose ring and whose centre both tell the label."""
    values = np.random.default_rng(1).normal(190, 12, (120, 1, 1, 3))
    values = values - 60 * LABELS[:, None, None, None] + np.zeros((120, 96, 96, 3))
    patches = torch.from_numpy(np.clip(values, 0, 255).astype(np.uint8))
    predict = predictor(CENTRE if seen == "centre" else ~CENTRE)
    rows = shortcut.probe_regions(predict, patches, LABELS, draw_weights(np.arange(120), 200))
    values = {row["probe"]: row["auc"] for row in rows}
    other = {"centre": "ring", "ring": "centre"}[seen]
    assert values["as it is"] == values[f"{other} of another patch"] == 1.0
    assert 0.3 < values[f"{seen} of another patch"] < 0.7


def audit_here(ckpt, data, out, *options) -> tuple[int, dict]:
    """Run the audit in this process: its exit code and result."""
    arguments = ["model", "--ckpt", ckpt, data, "--out", out, *options]
    with contextlib.redirect_stdout(io.StringIO()) as stdout:
        code = audit.main([str(argument) for argument in arguments])
    return code, json.loads(stdout.getvalue().splitlines()[-1])


def findings_of(out) -> dict[str, dict]:
    return {row["check"]: row for row in json.loads((out / "findings.json").read_text())}


@pytest.fixture(scope="module")
def scaled(quick_run, tmp_path_factory):
    """A checkpoint whose answers are scaled."""
    ckpt = tmp_path_factory.mktemp("scaled") / "best.pt"
    calibration = {"temperature": 0.5, "offset": -0.4, "views": 1}
    changes = {"calibration": calibration, "threshold": 0.51}
    save_checkpoint(ckpt, load_checkpoint(quick_run / "best.pt") | changes)
    return ckpt


@pytest.fixture(scope="module")
def audited(scaled, pcam_dir, tmp_path_factory):
    """OUT of an audit, and its result."""
    out = tmp_path_factory.mktemp("audited") / "out"
    code, result = audit_here(scaled, pcam_dir, out)
    assert code == (1 if result["num_errors"] + result["num_warnings"] else 0)
    return out, result


def test_predictions_are_those_of_inference_and_errors_are_all_errors(
    audited, scaled, pcam_dir, tmp_path
):
    out, _ = audited
    path = tmp_path / "p.csv"
    options = ["--ckpt", str(scaled), str(pcam_dir), "--split", "valid", "--out", str(path)]
    assert inference.main(options) == 0
    ours = read_csv(out / "predictions.csv")
    theirs = read_csv(path)
    for name in ("source", "index", "prediction", "label"):
        assert [row[name] for row in ours] == [row[name] for row in theirs]
    probs = [[float(row["probability"]) for row in rows] for rows in (ours, theirs)]
    np.testing.assert_allclose(*probs, atol=1e-5)
    errors = read_csv(out / "errors.csv")
    wrong = [row["index"] for row in ours if row["prediction"] != row["label"]]
    assert wrong and sorted(row["index"] for row in errors) == sorted(wrong)
    for label in "01":  # the most confident first
        gaps = [
            abs(float(row["probability"]) - int(label)) for row in errors if row["label"] == label
        ]
        assert gaps == sorted(gaps, reverse=True)


def test_thresholds_are_chosen_on_one_half_and_judged_on_the_other(audited, pcam_dir):
    out, _ = audited
    rows = {row["rule"]: row for row in read_csv(out / "thresholds.csv")}
    best = rows["F2-optimal"]
    probs = np.array([float(row["probability"]) for row in read_csv(out / "predictions.csv")])
    split = open_split(pcam_dir, "valid")
    half = fold_of_rows(groups_for_halves(split, pcam_dir), 2)
    chosen = choose_threshold(split.labels[half == 0], probs[half == 0], "f2", 0, 0)
    assert float(best["threshold"]) == pytest.approx(chosen, abs=1e-6)
    logits = np.log(probs / (1 - probs))[half == 1]
    judged = compute_metrics(split.labels[half == 1], logits, float(best["threshold"]))
    for name in ("recall", "specificity", "precision", "f2"):
        assert float(best[name]) == pytest.approx(judged[name])
    assert float(best["f2_low"]) <= float(best["f2"]) <= float(best["f2_high"])
    assert float(rows["always positive"]["recall"]) == 1


def test_files_say_what_was_audited_and_the_page_shows_it(audited):
    out, result = audited
    scores = read_json(out / "scores.json")
    parts = {"thresholds", "reliability", "slices", "shortcut", "errors", "evaluation"}
    assert {path.stem for path in out.glob("*.csv")} == parts | {"predictions"}
    drawn = {"prices", "curves", "reliability", "slices", "errors"}
    assert {path.stem for path in out.glob("*.png")} == drawn
    assert findings_of(out).keys() >= {"rows", "threshold", "calibration", "slices", "shortcut"}
    assert scores["global"]["auc"]["value"] == result["auc"]
    page = (out / "model.html").read_text()
    assert scores["checkpoint"]["sha256"] in page and page.count("<img") == len(drawn)


def test_a_few_patches_and_parts_are_audited(quick_run, pcam_dir, tmp_path, capsys):
    """Of the parts that are left out nothing is written, and rows keep their numbers."""
    options = ["--limit", 40, "--parts", "thresholds,errors", "--without-patches"]
    (tmp_path / "slices.csv").touch()  # of an audit before
    assert audit_here(quick_run, pcam_dir, tmp_path, *options)[0] in (0, 1)
    assert "40 patches, " in capsys.readouterr().err, "how much there is to do, beforehand"
    rows = read_csv(tmp_path / "predictions.csv")
    assert len(rows) == 40 and int(rows[-1]["index"]) == 63
    assert int(rows[-1]["label"]) == open_split(pcam_dir, "valid").labels[63]
    names = {path.stem for path in tmp_path.glob("*.csv")}
    assert names == {"thresholds", "errors", "predictions"}


def write_split(folder, patches, labels, name="valid") -> None:
    folder.mkdir(exist_ok=True)
    with SplitWriter(folder, name, len(patches)) as writer:
        writer.add(patches, labels)


def test_few_groups_get_no_verdict(quick_run, tmp_path):
    """Four slides in each half: no interval, and no warning but that, not even for a threshold that
    calls every patch positive.
    """
    write_split(tmp_path, *draw_patches(64, 0))
    write_groups(tmp_path, {"valid": np.arange(64) // 8})
    ckpt = tmp_path / "best.pt"
    save_checkpoint(ckpt, load_checkpoint(quick_run / "best.pt") | {"threshold": 0.0})
    out = tmp_path / "out"
    audit_here(ckpt, tmp_path, out, "--parts", "thresholds,slices,shortcut")
    rows = findings_of(out).values()
    assert [row["check"] for row in rows if row["severity"] == "warning"] == ["groups"]
    for name in ("thresholds", "slices", "shortcut"):
        for row in read_csv(out / f"{name}.csv"):
            assert not any(value for key, value in row.items() if key.endswith("low"))


def test_the_test_split_is_evaluated_with_and_without_copies_and_a_second_opening_is_said(
    scaled, tmp_path
):
    """Half of the patches stand there twice, turned: one of each is scored."""
    patches, labels = draw_patches(60, 3)
    patches = np.concatenate([patches, np.rot90(patches[:30], axes=(1, 2))])
    write_split(tmp_path, patches, np.concatenate([labels, labels[:30]]), "test")
    out = tmp_path / "out"
    arguments = (scaled, tmp_path, out, "--split", "test", "--parts", "scores")
    assert audit_here(*arguments)[0] == 0
    raw, unique = read_csv(out / "evaluation.csv")
    assert (raw["num"], unique["num"]) == ("90", "60")
    probs = [float(row["probability"]) for row in read_csv(out / "predictions.csv")[:60]]
    assert float(unique["auc"]) == pytest.approx(compute_auc(labels, probs), abs=1e-6)
    assert float(unique["auc_low"]) < float(unique["auc"]) < float(unique["auc_high"])
    assert "Veeling" in (out / "model.html").read_text()
    assert "no official test" in findings_of(out)["official"]["measured"]
    assert "opened" not in findings_of(out)
    assert audit_here(*arguments)[0] == 0
    (opened_at,) = read_json(scaled.with_name("openings.json")).values()
    assert opened_at in findings_of(out)["opened"]["measured"]


def test_what_cannot_be_audited_is_refused_in_a_sentence(quick_run, tmp_path):
    patches, labels = draw_patches(24, 0)
    fine = tmp_path / "fine"
    alike = tmp_path / "alike"
    write_split(fine, patches, labels)
    write_split(alike, patches, np.ones_like(labels))
    out = tmp_path / "out"
    for sentence, *arguments in (
        ("no file camelyonpatch_level_2_split_test_x.h5", quick_run, fine, out, "--split", "test"),
        ("halves with both labels", quick_run, alike, out),
        ("'slides' is unknown", quick_run, fine, out, "--parts", "slides"),
        ("lr changes the weights", quick_run, fine, out, "lr=1"),
    ):
        code, result = audit_here(*arguments)
        assert code == 2 and sentence in result["error"] and not out.exists()
