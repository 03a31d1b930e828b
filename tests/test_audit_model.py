"""The audit of a model: what is planted is found, what is not is not, and each figure is what
another way of counting gives.
"""

import base64
import contextlib
import functools
import io
import json
import math
import re
import shutil

import numpy as np
import pytest
import torch
from conftest import draw_patches
from PIL import Image

import audit
import inference
from lib.audit import model as model_audit
from lib.audit import shortcut, slices
from lib.audit.resampling import draw_weights, resampled_curves
from lib.audit.slices import conclude, measure_slices, split_answers
from lib.audit.tissue import compute_tissue
from lib.augment import PREPROCESSING
from lib.batches import fold_of_rows
from lib.calibration import choose_threshold
from lib.checkpoint import load_checkpoint, save_checkpoint
from lib.files import read_csv, read_json
from lib.groups import groups_for_halves, write_groups
from lib.metrics import compute_auc, sigmoid
from lib.pcam import open_split
from lib.predict import predict_batch
from lib.splitwriter import SplitWriter

CENTRE = shortcut.centre_mask()[..., 0]
LABELS = np.arange(120) % 2
COVERS = ("in the data's mean colour", "blurred", "of another patch")


def test_a_resampled_curve_begins_at_the_origin_and_a_constant_answer_is_the_diagonal():
    grid = np.linspace(0, 1, 101)
    curves = resampled_curves(np.arange(100) % 2, np.full(100, 0.5), np.ones((1, 100)), grid)
    np.testing.assert_allclose(curves["recall"][0], grid)


def test_nuclei_are_counted_and_tissue_is_told_from_glass():
    patches = np.full((2, 96, 96, 3), (240, 238, 240), np.uint8)
    patches[1, :48] = (220, 150, 200)  # cytoplasm
    y, x = np.indices((96, 96))
    for centre in (20, 40, 60):
        patches[1, (y - 22) ** 2 + (x - centre) ** 2 <= 12] = (90, 60, 140)
    features = compute_tissue(patches)
    np.testing.assert_array_equal(features["nuclear_density"], [0, 3])
    np.testing.assert_allclose(features["tissue_share"], [0, 0.5], atol=0.001)


@functools.cache
def judge_world(weakness=0.0):
    """Slices of a model that is weaker on the fifth of 1,500 patches with the lowest sharpness:
    (rows, worst, answers, mask of that fifth).
    """
    rng = np.random.default_rng(0)
    labels = rng.random(1500) < 0.5
    features = {name: rng.normal(size=1500) for name in slices.SLICED}
    signal = np.where(labels, 1.6, -1.6) * np.where(features["sharpness"] < -0.84, 1 - weakness, 1)
    groups = np.arange(1500) // 3
    answers = split_answers(labels, sigmoid(rng.normal(signal, 1.2)), 0.5, groups)
    rows = measure_slices(slices.build_slices(features, groups, answers.rows[0]), answers)
    edge = np.quantile(features["sharpness"][answers.rows[0]], 0.2)
    return rows, conclude(rows), answers, features["sharpness"] < edge


def test_a_weak_slice_is_found_on_one_half_and_confirmed_on_the_other():
    rows, worst, answers, is_weak = judge_world(weakness=0.8)
    assert worst["feature"] == "sharpness" and worst["slice"].startswith("below")
    assert worst["error_ratio"] > 1.5
    assert {row["feature"] for row in rows if row["confirmed"]} == {"sharpness"}
    # its scores are those of the patches of the second half below the edge of the first
    inside = answers.rows[1][is_weak[answers.rows[1]]]
    assert worst["num"] == len(inside)
    assert worst["auc"] == pytest.approx(compute_auc(answers.labels[inside], answers.probs[inside]))
    assert worst["auc_low"] < worst["auc"] < worst["auc_high"] < worst["rest_auc"]
    assert worst["gap_auc_low"] < worst["rest_auc"] - worst["auc"] < worst["gap_auc_high"]
    assert judge_world()[1] is None, "nothing is planted"


def measure_slice(mask, labels, probs, groups) -> dict:
    part = {"feature": "f", "slice": "a", "mask": mask}
    return measure_slices([part], split_answers(labels, probs, 0.5, groups))[0]


def test_a_slice_is_not_confirmed_where_the_rest_is_as_uncertain():
    """The patches of the rest are of few groups, that differ: its value says little."""
    rng = np.random.default_rng(0)
    num_confirmed = 0
    inside = np.arange(1200) < 600
    groups = np.where(inside, np.arange(1200), 10_000 + np.arange(1200) // 20)
    for _ in range(20):
        chances = np.where(inside, 0.75, rng.choice([0.5, 1.0], 12_000)[groups % 997])
        row = measure_slice(inside, np.ones(1200, bool), rng.random(1200) < chances, groups)
        num_confirmed += row["gap_recall_low"] > 0
    assert num_confirmed <= 2, "of 20, where 2.5% are allowed"


def test_a_slice_without_a_class_or_groups_enough_is_not_judged():
    _, _, answers, _ = judge_world()
    labels = answers.labels
    groups = np.arange(1500)
    row = measure_slice(~labels, labels, answers.probs, groups)
    assert conclude([row]) is None and not row["found"]
    assert math.isnan(row["recall"]) and math.isnan(row["auc"]) and row["specificity"] > 0.5
    inside = groups < 200
    probs = np.where(inside, 1 - answers.probs, answers.probs)
    for size, is_judged in ((50, False), (5, True)):
        row = measure_slice(inside, labels, probs, groups // size)
        assert math.isnan(row["p_auc"]) != is_judged


def test_chances_are_corrected_for_their_number_and_the_worst_is_ranked_where_it_is_found():
    """After Benjamini and Hochberg. On the half that judges luck would rank the worst slice; where
    the rest has no error, one in n counts.
    """
    unjudged = {"p_auc": math.nan, "p_specificity": math.nan, "rest_recall": 1.0, "num": 20}
    cells = ((1e-6, 0.5, 0.1), (0.02, 0.8, 0.3), (0.03, 0.9, 0.2), (0.9, 0.9, 0.0))
    rows = []
    for chance, recall, gap in cells:
        row = {"p_recall": chance, "recall": recall, "gap_recall_low": 0.1}
        rows.append(unjudged | row | {"finding_gap_recall": gap})
    worst = conclude(rows)
    assert [row["p_recall"] for row in rows] == pytest.approx([4e-6, 0.04, 0.04, 0.9])
    assert worst["recall"] == 0.8 and worst["error_ratio"] == pytest.approx(0.2 / (1 / 20))


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
    return lambda patches: predict_batch(model, patches, "fp32", 1, PREPROCESSING).double().numpy()


@pytest.fixture(scope="module")
def planted() -> torch.Tensor:
    """Patches whose ring and whose centre both tell the label."""
    values = np.random.default_rng(1).normal(190, 12, (120, 1, 1, 3))
    values = values - 60 * LABELS[:, None, None, None] + np.zeros((120, 96, 96, 3))
    return torch.from_numpy(np.clip(values, 0, 255).astype(np.uint8))


@pytest.mark.parametrize("seen", ["centre", "ring"])
def test_probes_tell_a_model_that_sees_the_centre_from_one_that_sees_the_ring(planted, seen):
    region, hidden = (CENTRE, "ring") if seen == "centre" else (~CENTRE, "centre")
    weights = draw_weights(np.arange(120), 200)
    rows = shortcut.probe_regions(predictor(region), planted, LABELS, 0.5, weights)
    measures = {(row["probe"], row["measure"]): row["value"] for row in rows}
    assert measures["as it is", "AUC"] == 1.0
    for how in COVERS:
        values = [measures[f"{hidden} {how}", name] for name in ("AUC", shortcut.CHANGED)]
        assert values == [1.0, 0.0]
    other = f"{seen} of another patch"
    assert 0.3 < measures[other, "AUC"] < 0.7 and measures[other, shortcut.DONORS] == 1.0
    assert measures[other, shortcut.CHANGED] > 0.3
    assert measures[f"{seen} in the data's mean colour", "AUC"] == 0.5
    # evidence lies where the model looks; a block of a patch's one colour would hide nothing
    patches = planted[:6].clone()
    patches[:, ::3] //= 2
    row = shortcut.probe_evidence(predictor(region), patches, weights[:, :6])
    assert row["value"] == pytest.approx(float(seen == "centre"), abs=1e-6)
    assert row["constant"] == pytest.approx(1 / 9)


def test_a_map_is_positive_where_a_block_speaks_for_tumour():
    patch = np.full((1, 96, 96, 3), 230, np.uint8)
    patch[:, 40:56, 40:56] = 60
    (evidence,) = shortcut.map_evidence(predictor(CENTRE), torch.from_numpy(patch), 8)
    assert np.unravel_index(evidence.argmax(), (96, 96)) == (40, 40)
    assert evidence[40:56, 40:56].min() > 0 and np.abs(evidence[:16]).max() < 1e-6


def test_views_disagree_where_a_model_sees_one_corner_and_agree_where_it_sees_all():
    patches = torch.full((24, 96, 96, 3), 230, dtype=torch.uint8)
    patches[:, :48, :48] = 60
    weights = draw_weights(np.arange(24), 50)
    for reach, expected in ((48, 1.0), (96, 0.0)):
        region = torch.zeros(96, 96, dtype=torch.bool)
        region[:reach, :reach] = True
        rows = shortcut.probe_views(predictor(region), patches, 0.5, weights)
        shares = [row["value"] for row in rows if row["measure"] == shortcut.UNDECIDED]
        assert shares == [expected] * 2


def test_colours_explain_a_model_of_colours_and_no_other():
    rng = np.random.default_rng(0)
    colours = rng.normal(size=(600, 9))
    labels = rng.random(600) < sigmoid(2 * colours[:, 0])
    for logits, low, high in (
        (2 * colours[:, 0] + 1, 0.99, 1.0),
        (rng.normal(size=600), -0.2, 0.1),
    ):
        answers = split_answers(labels, sigmoid(logits), 0.5, np.arange(600))
        auc, explained = shortcut.probe_colours(colours, answers, logits)
        assert low <= explained["value"] <= high
        assert 0.8 < auc["value"] < 0.95 and auc["low"] < auc["value"] < auc["high"]


def test_shortcuts_are_judged():
    measured = [
        ["as it is", "AUC", 0.9],
        ["centre of another patch", "AUC", 0.7],
        ["ring of another patch", "AUC", 0.88],
        [shortcut.COLOURS, "AUC", 0.7],
        [shortcut.SHIFTED, shortcut.UNDECIDED, 0.05],
        [shortcut.COLOURS, shortcut.EXPLAINED, 0.3],
        ["ring of another patch", shortcut.DONORS, 0.5],
    ]
    changes = {"ring": (1, 0.89), "other ring": (2, 0.7), "colours": (3, 0.88), "views": (4, 0.3)}
    for check, (place, value) in (changes | {"": (0, 0.9)}).items():
        rows = [dict(zip(("probe", "measure", "value"), cells, strict=True)) for cells in measured]
        rows[place]["value"] = value
        findings = shortcut.judge_shortcuts(rows)
        warned = [row["check"] for row in findings if row["severity"] == "warning"]
        assert warned == ([f"shortcut: {check}"] if check else [])


def audit_here(ckpt, data, out, *options) -> tuple[int, dict]:
    """Run the audit in this process: its exit code and result."""
    arguments = ["model", "--ckpt", ckpt, data, "--out", out, *options]
    with contextlib.redirect_stdout(io.StringIO()) as stdout:
        code = audit.main([str(argument) for argument in arguments])
    return code, json.loads(stdout.getvalue().splitlines()[-1])


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
    for row, expected in zip(ours, theirs, strict=True):
        assert float(row["probability"]) == pytest.approx(float(expected["probability"]), abs=1e-5)
        assert expected | row == expected | {"probability": row["probability"]}
    errors = read_csv(out / "errors.csv")
    wrong = [row["index"] for row in ours if row["prediction"] != row["label"]]
    assert wrong and sorted(row["index"] for row in errors) == sorted(wrong)
    for kind, sign in (("false positive", 1), ("false negative", -1)):
        probs = [sign * float(row["probability"]) for row in errors if row["kind"] == kind]
        assert probs == sorted(probs, reverse=True), "the most confident first"


def test_thresholds_are_chosen_on_one_half_and_judged_on_the_other(audited, pcam_dir):
    out, _ = audited
    rows = {row["rule"]: row for row in read_csv(out / "thresholds.csv")}
    probs = np.array([float(row["probability"]) for row in read_csv(out / "predictions.csv")])
    split = open_split(pcam_dir, "valid")
    half = fold_of_rows(groups_for_halves(split, pcam_dir), 2)
    chosen = choose_threshold(split.labels[half == 0], probs[half == 0], "f2", 0, 0)
    assert float(rows["F2-optimal"]["threshold"]) == pytest.approx(chosen, abs=1e-6)
    labels = split.labels[half == 1]
    probs = probs[half == 1]
    assert len(rows) == 12
    for rule, row in rows.items():
        called = probs >= (math.inf if rule == "always negative" else float(row["threshold"]))
        recall = called[labels == 1].mean()
        specificity = 1 - called[labels == 0].mean()
        f2 = 5 * called[labels == 1].sum() / (4 * labels.sum() + called.sum())
        # of patches of which a tenth is positive
        flagged = 0.1 * recall + 0.9 * (1 - specificity)
        measured = [float(row[name]) for name in ("recall", "f2", "flagged_share_at_0.1")]
        assert measured == pytest.approx([recall, f2, flagged])
        assert float(row["f2_low"]) <= float(row["f2"]) <= float(row["f2_high"])


def test_files_say_what_was_audited_and_the_page_shows_it(audited):
    out, result = audited
    scores = read_json(out / "scores.json")
    checks = {row["check"] for row in json.loads((out / "findings.json").read_text())}
    assert checks >= {"rows", "threshold", "calibration", "slices", "shortcut: ring"}
    assert scores["global"]["auc"]["value"] == result["auc"]
    num_judged = scores["halves"][1]["num"]
    assert scores["halves"][0]["num"] + num_judged == 64
    assert len(read_csv(out / "slices.csv")) == scores["num_slices"] >= 35
    name = "as the checkpoint scales them"
    (scaled,) = (row for row in scores["calibration"] if row["probabilities"] == name)
    assert scaled["brier"] == pytest.approx(scores["global"]["brier"]["value"], abs=1e-6)
    bins = [row for row in read_csv(out / "reliability.csv") if row["probabilities"] == name]
    assert sum(int(row["num"]) for row in bins) == num_judged
    drawn = {path.stem for path in out.glob("*.png")}
    assert drawn == {"prices", "curves", "reliability", "slices", "errors"}
    page = (out / "model.html").read_text()
    index = read_csv(out / "errors.csv")[0]["index"]
    assert f"row {index}, p = " in page and scores["checkpoint"]["sha256"] in page


def test_a_few_patches_and_parts_are_audited(quick_run, pcam_dir, tmp_path, capsys):
    """Of the parts that are left out nothing is written, and rows keep their numbers."""
    options = ["--limit", 40, "--parts", "thresholds"]
    assert audit_here(quick_run, pcam_dir, tmp_path, *options)[0] in (0, 1)
    assert "40 patches, " in capsys.readouterr().err, "how much there is to do, beforehand"
    rows = read_csv(tmp_path / "predictions.csv")
    labels = open_split(pcam_dir, "valid").labels
    assert len(rows) == 40 and int(rows[-1]["index"]) == 63
    assert all(int(row["label"]) == labels[int(row["index"])] for row in rows)
    names = {path.name for path in tmp_path.iterdir()}
    assert {"thresholds.csv", "curves.csv", "findings.json", "model.html"} <= names
    assert not names & {"slices.csv", "shortcut.csv", "errors.csv", "reliability.csv"}


def test_few_groups_get_no_verdict(quick_run, tmp_path):
    """Four slides in each half: no interval, and no warning but that."""
    write_split(tmp_path, *draw_patches(64, 0))
    write_groups(tmp_path, {"valid": np.arange(64) // 8})
    out = tmp_path / "out"
    audit_here(quick_run, tmp_path, out, "--parts", "thresholds,calibration,slices,shortcut")
    findings = json.loads((out / "findings.json").read_text())
    assert [row["check"] for row in findings if row["severity"] == "warning"] == ["groups"]
    for name in ("thresholds", "slices", "shortcut"):
        for row in read_csv(out / f"{name}.csv"):
            assert not any(value for key, value in row.items() if key.endswith("low"))


def test_a_page_without_patches_has_maps_and_captions(quick_run, pcam_dir, tmp_path, monkeypatch):
    monkeypatch.setattr(model_audit, "NUM_PICTURES", 2)
    options = ["--without-patches", "--parts", "errors"]
    assert audit_here(quick_run, pcam_dir, tmp_path, *options)[0] in (0, 1)
    assert not (tmp_path / "errors.png").exists()
    page = (tmp_path / "model.html").read_text()
    assert "Pictures of patches are left out" in page and "row " in page
    tiles = re.findall(r'<figure[^>]*><img src="data:image/png;base64,([^"]*)"', page)
    sizes = {Image.open(io.BytesIO(base64.b64decode(tile))).size for tile in tiles}
    assert sizes == {(192, 192)}, "a map alone, no patch beside it"


def test_an_audit_that_ends_early_leaves_the_last_one_and_never_touches_what_others_wrote(
    audited, quick_run, pcam_dir, tmp_path, monkeypatch
):
    def interrupt(*_):
        raise KeyboardInterrupt

    out = tmp_path / "out"
    theirs = tmp_path / "predictions.csv"
    shutil.copytree(audited[0], out)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    monkeypatch.setattr(model_audit, "map_evidence", interrupt)
    assert audit_here(quick_run, pcam_dir, out, "--parts", "errors")[0] == 130
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    theirs.write_text("mine")
    assert audit_here(quick_run, pcam_dir, tmp_path)[0] == 2
    assert theirs.read_text() == "mine"


def write_split(folder, patches, labels) -> None:
    folder.mkdir(exist_ok=True)
    with SplitWriter(folder, "valid", len(patches)) as writer:
        writer.add(patches, labels)


def test_what_cannot_be_audited_is_refused_in_a_sentence(quick_run, tmp_path):
    patches, labels = draw_patches(24, 0)
    fine = tmp_path / "fine"
    alike = tmp_path / "alike"
    write_split(fine, patches, labels)
    write_split(alike, patches, np.ones_like(labels))
    other = tmp_path / "x.pt"
    out = tmp_path / "out"
    torch.save({"kind": "another"}, other)
    for sentence, *arguments in (
        ("no file camelyonpatch_level_2_split_test_x.h5", quick_run, fine, out, "--split", "test"),
        ("have the label 1", quick_run, alike, out),
        ("is not a checkpoint of this program", other, fine, out),
        ("did you mean 'slices'", quick_run, fine, out, "--parts", "slides"),
        ("lr changes the weights", quick_run, fine, out, "lr=1"),
        ("OUT may not be the data", quick_run, fine, fine),
    ):
        code, result = audit_here(*arguments)
        assert code == 2 and sentence in result["error"] and not out.exists()
    write_split(tmp_path / "black", np.zeros_like(patches), labels)
    code, result = audit_here(quick_run, tmp_path / "black", out, "--parts", "slices")
    assert code == 2 and "leave out the part slices" in result["error"]
