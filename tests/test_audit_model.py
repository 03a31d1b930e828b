"""The audit of a model: what is planted is found, what is not is not, and each figure is what
another way of counting gives.
"""

import base64
import io
import json
import math
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import draw_patches, run_script
from PIL import Image

import audit
from lib.audit import model as model_audit
from lib.audit import shortcut, slices
from lib.audit.resampling import draw_weights, resampled_curves
from lib.audit.shortcut import (
    judge_shortcuts,
    map_evidence,
    probe_colours,
    probe_regions,
    probe_views,
)
from lib.audit.slices import conclude, measure_slices, split_answers
from lib.audit.tissue import compute_tissue
from lib.augment import PREPROCESSING
from lib.batches import fold_of_rows
from lib.calibration import calibration_scores, choose_threshold
from lib.checkpoint import load_checkpoint, load_model, save_checkpoint
from lib.features import DENSITY, UNMIX, colour_statistics, count_values
from lib.files import read_csv
from lib.groups import groups_for_halves, write_groups
from lib.metrics import compute_auc, compute_confusion, compute_fbeta, curve_points, sigmoid
from lib.pcam import open_split, split_path
from lib.predict import predict_batch
from lib.splitwriter import SplitWriter

GRID = np.linspace(0, 1, 101)


def test_a_resampled_curve_begins_at_the_origin_and_a_constant_answer_is_the_diagonal():
    labels = np.arange(100) % 2
    curves = resampled_curves(labels, np.full(100, 0.5), np.ones((1, 100)), GRID)
    np.testing.assert_allclose(curves["recall"][0], GRID)
    np.testing.assert_allclose(curves["precision"][0], 0.5)


def test_precision_on_a_resampled_curve_is_that_of_the_strictest_threshold_with_the_recall():
    labels = np.random.default_rng(0).permutation(np.arange(200) % 2)
    probs = np.linspace(1, 0, 200)
    points = curve_points(labels.astype(bool), probs)
    expected = points["precision"][np.argmax(points["recall"] >= GRID[:, None] - 1e-9, axis=1)]
    np.testing.assert_allclose(
        resampled_curves(labels, probs, np.ones((1, 200)), GRID)["precision"][0], expected
    )


def test_nuclei_are_counted_and_tissue_is_told_from_glass():
    patches = np.full((3, 96, 96, 3), (240, 238, 240), np.uint8)
    y, x = np.indices((96, 96))
    patches[1:, :48] = (220, 150, 200)  # cytoplasm
    for at_y, at_x in ((20, 20), (20, 40), (40, 60), (34, 76)):
        patches[2, (y - at_y) ** 2 + (x - at_x) ** 2 <= 12] = (90, 60, 140)
    found = compute_tissue(patches)
    np.testing.assert_array_equal(found["nuclear_density"], [0, 0, 4])
    np.testing.assert_allclose(found["tissue_share"], [0, 0.5, 0.5], atol=0.001)


def test_colour_statistics_are_those_of_the_pixels():
    patches, _ = draw_patches(5, 0)
    found, pixels = (
        colour_statistics(count_values(patches)),
        patches.reshape(5, -1, 3).astype(np.float64),
    )
    np.testing.assert_allclose(found[:, :6], np.concatenate([pixels.mean(1), pixels.std(1)], 1))
    np.testing.assert_allclose(found[:, 6:], DENSITY[patches].mean((1, 2)) @ UNMIX)


def draw_world(num=1500, weakness=0.0, seed=0):
    """Labels, features and probabilities of a model that is weaker on the fifth of the patches with
    the lowest sharpness.
    """
    rng = np.random.default_rng(seed)
    labels, features = rng.random(num) < 0.5, {name: rng.normal(size=num) for name in slices.SLICED}
    signal = np.where(labels, 1.6, -1.6) * np.where(features["sharpness"] < -0.84, 1 - weakness, 1)
    return labels, features, sigmoid(rng.normal(signal, 1.2))


def judge_world(groups=None, **world):
    labels, features, probs = draw_world(**world)
    groups = np.repeat(np.arange(len(labels) // 3), 3) if groups is None else groups
    answers = split_answers(labels, probs, 0.5, groups)
    rows = measure_slices(slices.build_slices(features, groups, answers.rows[0]), answers)
    return rows, conclude(rows), answers, features


def test_a_weak_slice_is_found_on_one_half_and_confirmed_on_the_other():
    rows, worst, answers, features = judge_world(weakness=0.8)
    assert (
        worst["feature"] == "sharpness"
        and worst["slice"].startswith("below")
        and worst["error_ratio"] > 1.5
    )
    assert {row["feature"] for row in rows if row["confirmed"]} == {"sharpness"}
    # its scores are those of the patches of the second half below the edge, which the first half
    # has set
    edge = np.quantile(features["sharpness"][answers.rows[0]], 0.2)
    inside = answers.rows[1][features["sharpness"][answers.rows[1]] < edge]
    labels, probs = answers.labels[inside], answers.probs[inside]
    confusion = compute_confusion(labels, probs >= 0.5)
    assert worst["num"] == len(inside) and worst["num_positive"] == labels.sum()
    assert worst["auc"] == pytest.approx(compute_auc(labels, probs)) and worst[
        "f2"
    ] == pytest.approx(compute_fbeta(confusion, 2))
    assert worst["recall"] == pytest.approx(confusion["tp"] / labels.sum())
    assert worst["auc_low"] < worst["auc"] < worst["auc_high"] < worst["rest_auc"]
    assert worst["gap_auc_low"] < worst["rest_auc"] - worst["auc"] < worst["gap_auc_high"]


def test_a_slice_is_not_confirmed_where_the_rest_is_as_uncertain():
    """The patches of the rest are of few groups, that differ: its value says little."""
    rng = np.random.default_rng(0)
    num_confirmed = 0
    for _ in range(40):
        inside = np.arange(1200) < 600
        labels = np.ones(1200, bool)
        groups = np.where(inside, np.arange(1200), 10_000 + np.arange(1200) // 20)
        chances = np.where(inside, 0.75, rng.choice([0.5, 1.0], 12_000)[groups % 997])
        answers = split_answers(labels, rng.random(1200) < chances, 0.5, groups)
        part = {"feature": "f", "slice": "a", "mask": inside}
        (row,) = measure_slices([part], answers)
        num_confirmed += row["gap_recall_low"] > 0
    assert num_confirmed <= 4, "of 40, where 2.5% are allowed"


def test_nothing_is_confirmed_where_nothing_is_planted():
    assert [judge_world(seed=seed)[1] for seed in range(4)] == [None] * 4


def test_a_slice_of_one_half_alone_and_one_without_a_class_are_undefined():
    labels, _, probs = draw_world(300)
    answers = split_answers(labels, probs, 0.5, np.arange(300))
    one_half = np.isin(np.arange(300), answers.rows[0])
    rows = measure_slices(
        [
            {"feature": "f", "slice": "a", "mask": one_half},
            {"feature": "f", "slice": "b", "mask": ~labels},
        ],
        answers,
    )
    assert conclude(rows) is None and rows[0]["num"] == 0
    assert all(math.isnan(rows[0][name]) for name in (*slices.SHOWN, "always_positive_f2"))
    assert (
        math.isnan(rows[1]["recall"])
        and math.isnan(rows[1]["auc"])
        and rows[1]["specificity"] > 0.5
    )
    assert rows[0]["found"] == rows[1]["found"] == ""


def test_corrected_chances_are_those_of_benjamini_and_hochberg():
    stats = pytest.importorskip("scipy.stats")
    chances = np.random.default_rng(0).random(30) ** 3
    rows = [
        {"p_auc": p, "p_recall": q, "p_specificity": math.nan} for p, q in chances.reshape(-1, 2)
    ]
    for row in rows:
        row |= {f"gap_{name}_low": -1 for name in slices.JUDGED}
    conclude(rows)
    found = [row[name] for row in rows for name in ("p_auc", "p_recall")]
    np.testing.assert_allclose(found, stats.false_discovery_control(chances))
    assert rows[0]["num_tried"] == 30


def test_the_worst_slice_is_ranked_on_the_half_that_finds():
    """On the half that judges luck would rank it; where the rest has no error, one in n counts."""
    common = {
        "p_auc": math.nan,
        "p_specificity": math.nan,
        "p_recall": 1e-6,
        "rest_recall": 1.0,
        "num": 20,
    }
    rows = [
        common | {"slice": name, "recall": recall, "gap_recall_low": 0.1, "finding_gap_recall": gap}
        for name, recall, gap in (("lucky", 0.5, 0.1), ("worst", 0.8, 0.3))
    ]
    worst = conclude(rows)
    assert worst["slice"] == "worst" and worst["error_ratio"] == pytest.approx(0.2 / (1 / 20))


def test_a_slice_of_few_groups_is_not_judged():
    labels, _, probs = draw_world(600)
    inside = np.arange(600) < 200
    for size, is_judged in ((50, False), (5, True)):
        answers = split_answers(
            labels, np.where(inside, 1 - probs, probs), 0.5, np.arange(600) // size
        )
        (row,) = measure_slices([{"feature": "f", "slice": "a", "mask": inside}], answers)
        assert math.isnan(row["p_auc"]) != is_judged


class Sees(torch.nn.Module):
    """A model whose logit is how dark the pixels of a region are."""

    def __init__(self, region):
        super().__init__()
        self.region = region  # bool (96, 96)

    def forward(self, images):
        return -8 * (images[:, :, self.region].mean((1, 2))[:, None] + 0.1)


def predictor(model):
    return lambda patches: predict_batch(model, patches, "fp32", 1, PREPROCESSING).double().numpy()


CENTRE = shortcut.centre_mask()[..., 0]


@pytest.fixture(scope="module")
def planted():
    """Patches whose ring and whose centre both tell the label, and resampling weights."""
    labels = np.arange(120) % 2
    values = (
        np.random.default_rng(1).normal(190, 12, (120, 1, 1, 3)) - 60 * labels[:, None, None, None]
    )
    patches = torch.from_numpy(
        np.clip(values + np.zeros((120, 96, 96, 3)), 0, 255).astype(np.uint8)
    )
    return patches, labels, draw_weights(np.arange(120), 200)


def probes(region, planted) -> dict:
    patches, labels, weights = planted
    rows = probe_regions(predictor(Sees(region)), patches, labels, 0.5, weights)
    return {(row["probe"], row["measure"]): row for row in rows}


@pytest.mark.parametrize(("seen", "hidden"), [("centre", "ring"), ("ring", "centre")])
def test_probes_tell_a_model_that_sees_the_centre_from_one_that_sees_the_ring(
    planted, seen, hidden
):
    found = probes(CENTRE if seen == "centre" else ~CENTRE, planted)
    assert found["as it is", "AUC"]["value"] == 1.0
    for how in ("in the data's mean colour", "blurred", "of another patch"):
        assert found[f"{hidden} {how}", "AUC"]["value"] == 1.0
        assert found[f"{hidden} {how}", "mean move of the probability"]["value"] == 0.0
        assert found[f"{hidden} {how}", "share of decisions changed"]["value"] == 0.0
    other = found[f"{seen} of another patch", "AUC"]
    assert (
        other["low"] < 0.5 < other["high"]
        and found[f"{seen} of another patch", shortcut.DONORS]["value"] == 1.0
    )
    assert found[f"{seen} of another patch", "share of decisions changed"]["value"] > 0.3
    assert found[f"{seen} in the data's mean colour", "AUC"]["value"] == 0.5


@pytest.mark.parametrize(("region", "share"), [(CENTRE, 1.0), (~CENTRE, 0.0)])
def test_evidence_lies_where_the_model_looks(planted, region, share):
    patches, _, weights = planted
    patches = patches[:6].clone()
    patches[:, ::3] //= 2  # a block of one colour in a patch of that colour would hide nothing
    found = shortcut.probe_evidence(predictor(Sees(region)), patches, weights[:, :6])
    assert found["value"] == pytest.approx(share, abs=1e-6) and found["constant"] == pytest.approx(
        1 / 9
    )


def test_a_map_is_positive_where_a_block_speaks_for_tumour():
    patch = np.full((1, 96, 96, 3), 230, np.uint8)
    patch[:, 40:56, 40:56] = 60
    (evidence,) = map_evidence(predictor(Sees(CENTRE)), torch.from_numpy(patch), 8)
    assert (
        np.unravel_index(evidence.argmax(), (96, 96)) == (40, 40)
        and evidence[40:56, 40:56].min() > 0
    )
    assert np.abs(evidence[:16]).max() < 1e-6


def test_views_disagree_where_a_model_sees_one_corner_and_agree_where_it_sees_all():
    patches = torch.full((24, 96, 96, 3), 230, dtype=torch.uint8)
    patches[:, :48, :48] = 60
    weights, corner = (
        draw_weights(np.arange(24), 50),
        torch.zeros(96, 96, dtype=torch.bool),
    )
    corner[:48, :48] = True
    for region, expected in ((corner, 1.0), (torch.ones(96, 96, dtype=torch.bool), 0.0)):
        rows = probe_views(predictor(Sees(region)), patches, 0.5, weights)
        shares = [row["value"] for row in rows if row["measure"] == shortcut.UNDECIDED]
        assert shares == [expected] * 2


def test_colours_explain_a_model_of_colours_and_no_other():
    rng, num = np.random.default_rng(0), 600
    colours = rng.normal(size=(num, 9))
    labels = rng.random(num) < sigmoid(2 * colours[:, 0])
    for logits, low, high in (
        (2 * colours[:, 0] + 1, 0.99, 1.0),
        (rng.normal(size=num), -0.2, 0.1),
    ):
        answers = split_answers(labels, sigmoid(logits), 0.5, np.arange(num))
        auc, explained = probe_colours(colours, answers, logits)
        assert (
            low <= explained["value"] <= high
            and 0.8 < auc["value"] < 0.95
            and auc["low"] < auc["value"] < auc["high"]
        )


def test_shortcuts_are_judged():
    def rows(**changed):
        auc = {
            "as it is": 0.9,
            "centre of another patch": 0.7,
            "ring of another patch": 0.88,
            "colours alone": 0.7,
        }
        measured = {
            (probe, "AUC"): value for probe, value in (auc | changed.get("auc", {})).items()
        }
        measured |= {
            ("ring of another patch", shortcut.DONORS): 0.5,
            ("colours alone", shortcut.EXPLAINED): 0.3,
        }
        measured |= {
            ("eight views, turned and shifted", shortcut.UNDECIDED): changed.get("undecided", 0.05)
        }
        return [
            {"probe": probe, "measure": measure, "value": value}
            for (probe, measure), value in measured.items()
        ]

    def warned(**changed):
        return [
            found["check"]
            for found in judge_shortcuts(rows(**changed))
            if found["severity"] == "warning"
        ]

    assert warned() == []
    assert warned(auc={"centre of another patch": 0.89}) == ["shortcut: ring"]
    assert warned(auc={"ring of another patch": 0.7}) == ["shortcut: other ring"]
    assert warned(auc={"colours alone": 0.88}) == ["shortcut: colours"]
    assert warned(undecided=0.3) == ["shortcut: views"]


@pytest.fixture(scope="module")
def audited(quick_run, pcam_dir, tmp_path_factory):
    """OUT of an audit as a user runs it, and its result."""
    out = tmp_path_factory.mktemp("audited") / "out"
    result = run_script("audit.py", "model", "--ckpt", quick_run, pcam_dir, "--out", out)
    assert result.returncode == (
        1 if result.json["num_errors"] + result.json["num_warnings"] else 0
    )
    return out, result.json


@pytest.mark.slow
def test_predictions_are_those_of_inference(audited, quick_run, pcam_dir, tmp_path):
    out, _ = audited
    run_script(
        "inference.py",
        "--ckpt",
        quick_run,
        pcam_dir,
        "--split",
        "valid",
        "--out",
        tmp_path / "p.csv",
        check=0,
    )
    ours, theirs = read_csv(out / "predictions.csv"), read_csv(tmp_path / "p.csv")
    assert len(ours) == len(theirs) == 64
    for row, expected in zip(ours, theirs, strict=True):
        assert all(
            row[name] == expected[name] for name in ("source", "index", "prediction", "label")
        )
        assert float(row["probability"]) == pytest.approx(float(expected["probability"]), abs=1e-5)


def test_errors_are_all_errors_the_most_confident_first(audited):
    out, _ = audited
    predictions = [
        row for row in read_csv(out / "predictions.csv") if row["prediction"] != row["label"]
    ]
    errors = read_csv(out / "errors.csv")
    assert (
        sorted(row["index"] for row in errors) == sorted(row["index"] for row in predictions)
        and errors
    )
    for kind, label, sign in (("false positive", "0", 1), ("false negative", "1", -1)):
        probs = [sign * float(row["probability"]) for row in errors if row["kind"] == kind]
        assert probs == sorted(probs, reverse=True)
        assert {row["label"] for row in errors if row["kind"] == kind} <= {label}
    assert (out / "errors.png").stat().st_size > 1000


def test_the_figures_of_the_page_are_files_too(audited):
    out, _ = audited
    drawn = {path.stem for path in out.glob("*.png")}
    assert drawn == {"prices", "curves", "reliability", "slices", "errors"}


def test_a_few_patches_and_parts_are_audited(quick_run, pcam_dir, tmp_path, capsys):
    """Of the parts that are left out nothing is written, and rows keep their numbers."""
    options = ["--limit", "40", "--parts", "thresholds", "--out", str(tmp_path / "out")]
    assert audit.main(["model", "--ckpt", str(quick_run), str(pcam_dir), *options]) in (0, 1)
    assert "40 patches, " in capsys.readouterr().err, "how much there is to do, beforehand"
    out = tmp_path / "out"
    rows = read_csv(out / "predictions.csv")
    labels = open_split(pcam_dir, "valid").labels
    assert len(rows) == 40 and int(rows[-1]["index"]) == 63
    assert all(int(row["label"]) == labels[int(row["index"])] for row in rows)
    names = {path.name for path in out.iterdir()}
    assert {"thresholds.csv", "curves.csv", "findings.json", "model.html"} <= names
    assert not names & {"slices.csv", "shortcut.csv", "errors.csv", "reliability.csv"}
    options[3] = "slides"
    assert audit.main(["model", "--ckpt", str(quick_run), str(pcam_dir), *options]) == 2


def test_few_groups_get_no_verdict(quick_run, tmp_path):
    """Four slides in each half: no interval, and no warning but that."""
    patches, labels = draw_patches(64, 0)
    with SplitWriter(tmp_path, "valid", 64) as writer:
        writer.add(patches, labels)
    write_groups(tmp_path, {"valid": np.arange(64) // 8})
    out = tmp_path / "out"
    options = ["--out", str(out), "--parts", "thresholds,calibration,slices,shortcut"]
    audit.main(["model", "--ckpt", str(quick_run), str(tmp_path), *options])
    findings = json.loads((out / "findings.json").read_text())
    assert [row["check"] for row in findings if row["severity"] == "warning"] == ["groups"]
    for name in ("thresholds", "slices", "shortcut"):
        for row in read_csv(out / f"{name}.csv"):
            assert not any(value for key, value in row.items() if key.endswith("low"))


def halves(split, folder) -> np.ndarray:
    return fold_of_rows(groups_for_halves(split, folder), 2)


def test_thresholds_are_chosen_on_one_half_and_judged_on_the_other(audited, pcam_dir):
    out, _ = audited
    rows = {row["rule"]: row for row in read_csv(out / "thresholds.csv")}
    probs = np.array([float(row["probability"]) for row in read_csv(out / "predictions.csv")])
    split = open_split(pcam_dir, "valid")
    half = halves(split, pcam_dir)
    chosen = choose_threshold(split.labels[half == 0], probs[half == 0], "f2", 0, 0)
    assert float(rows["F2-optimal"]["threshold"]) == pytest.approx(chosen, abs=1e-6)
    labels, probs = split.labels[half == 1], probs[half == 1]
    assert len(rows) == 12 and all(int(row["num"]) == len(labels) for row in rows.values())
    for rule, row in rows.items():
        called = probs >= (math.inf if rule == "always negative" else float(row["threshold"]))
        confusion = compute_confusion(labels, called)
        assert float(row["recall"]) == pytest.approx(confusion["tp"] / labels.sum())
        assert float(row["specificity"]) == pytest.approx(confusion["tn"] / (labels == 0).sum())
        assert float(row["f2"]) == pytest.approx(compute_fbeta(confusion, 2))
        assert float(row["f2_low"]) <= float(row["f2"]) <= float(row["f2_high"])
        # among a thousand patches of which a hundred are positive
        found, false_alarms = 100 * float(row["recall"]), 900 * (1 - float(row["specificity"]))
        assert float(row["flagged_share_at_0.1"]) == pytest.approx((found + false_alarms) / 1000)
    assert (
        rows["always negative"]["precision"] == "" and float(rows["always positive"]["recall"]) == 1
    )
    assert float(rows["always positive"]["f2_at_0.5"]) == pytest.approx(5 / 6)


def test_files_say_what_was_audited_and_the_page_shows_it(audited, quick_run, pcam_dir):
    out, result = audited
    scores, findings = (
        json.loads((out / name).read_text()) for name in ("scores.json", "findings.json")
    )
    assert {found["check"] for found in findings} >= {
        "rows",
        "threshold",
        "calibration",
        "shortcut: ring",
        "shortcut: views",
    }
    assert (
        scores["global"]["auc"]["value"] == result["auc"]
        and scores["halves"][0]["num"] + scores["halves"][1]["num"] == 64
    )
    assert scores["all_rows"]["auc"] == pytest.approx(
        json.loads((quick_run / "summary.json").read_text())["val_auc"], abs=1e-4
    )
    assert scores["data"]["sha256"].keys() == {
        split_path(pcam_dir, "valid", part).name for part in "xy"
    }
    assert (
        len(read_csv(out / "curves.csv")) == 201
        and len(read_csv(out / "slices.csv")) == scores["num_slices"] >= 35
    )
    bins = [
        row
        for row in read_csv(out / "reliability.csv")
        if row["probabilities"] == "as the model says"
    ]
    assert sum(int(row["num"]) for row in bins) == scores["halves"][1]["num"]
    page = (out / "model.html").read_text()
    index = int(read_csv(out / "errors.csv")[0]["index"])
    assert f"row {index}, p = " in page and scores["checkpoint"]["sha256"] in page


def test_a_page_without_patches_has_maps_and_captions_and_calibration_is_applied(
    quick_run, pcam_dir, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(model_audit, "NUM_PICTURES", 2)  # and few of all else, for speed
    monkeypatch.setattr(shortcut, "MOST_PROBED", 8)
    ckpt, calibration = tmp_path / "scaled.pt", {"temperature": 0.5, "offset": -0.4, "views": 1}
    save_checkpoint(ckpt, {**load_checkpoint(quick_run / "best.pt"), "calibration": calibration})
    options = ["--out", str(tmp_path), "--without-patches"]
    assert audit.main(["model", "--ckpt", str(ckpt), str(pcam_dir), *options]) in (0, 1)
    page = (tmp_path / "model.html").read_text()
    assert (
        not (tmp_path / "errors.png").exists()
        and "Pictures of patches are left out" in page
        and "row " in page
    )
    tiles = re.findall(r'<figure[^>]*><img src="data:image/png;base64,([^"]*)"', page)
    sizes = {Image.open(io.BytesIO(base64.b64decode(tile))).size for tile in tiles}
    assert sizes == {(192, 192)}, "a map alone, no patch beside it"
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["page"] == str(
        tmp_path / "model.html"
    )
    split, (network, cfg, _) = open_split(pcam_dir, "valid"), load_model(quick_run)
    patches = torch.from_numpy(split.images.read(np.arange(64)))
    raw = predict_batch(network, patches, cfg.precision, cfg.views, PREPROCESSING).double().numpy()
    probs = [float(row["probability"]) for row in read_csv(tmp_path / "predictions.csv")]
    assert probs == pytest.approx(sigmoid(2 * raw - 0.4).tolist(), abs=1e-5)
    scores = json.loads((tmp_path / "scores.json").read_text())
    rows, judged = (
        {row["probabilities"]: row for row in scores["calibration"]},
        np.flatnonzero(halves(split, pcam_dir) == 1),
    )
    expected = calibration_scores(split.labels[judged], raw[judged])
    assert rows["as the model says"]["brier"] == pytest.approx(expected["brier"], abs=1e-5)
    assert rows["as the checkpoint scales them"]["brier"] == pytest.approx(
        scores["global"]["brier"]["value"], abs=1e-6
    )


def test_an_audit_that_ends_early_leaves_the_last_one_and_never_touches_what_others_wrote(
    audited, quick_run, pcam_dir, tmp_path, monkeypatch
):
    def interrupt(*_):
        raise KeyboardInterrupt

    out = Path(shutil.copytree(audited[0], tmp_path / "out"))
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    monkeypatch.setattr(model_audit, "map_evidence", interrupt)
    assert audit.main(["model", "--ckpt", str(quick_run), str(pcam_dir), "--out", str(out)]) == 130
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "predictions.csv").write_text("mine")
    assert (
        audit.main(
            ["model", "--ckpt", str(quick_run), str(pcam_dir), "--out", str(tmp_path / "theirs")]
        )
        == 2
    )
    assert (tmp_path / "theirs" / "predictions.csv").read_text() == "mine"


@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        ("no labels", "no file camelyonpatch_level_2_split_valid_y.h5"),
        ("empty", "N > 0"),
        ("one class", "have the label 1, both are needed"),
        ("one group", "do not make two halves"),
        ("no checkpoint", "is not a checkpoint of this program"),
        ("unknown split", "did you mean 'valid'"),
        ("weights", "lr changes the weights"),
        ("into the data", "OUT may not be the data"),
    ],
)
def test_what_cannot_be_audited_is_refused_in_a_sentence(
    spoil, sentence, quick_run, tmp_path, capsys
):
    patches, labels = draw_patches(24, 0)
    ckpt, out, more = quick_run, tmp_path / "out", []
    if spoil == "empty":
        patches, labels = patches[:0], labels[:0]
    elif spoil == "one class":
        labels[:] = 1
    elif spoil == "one group":
        write_groups(tmp_path, {"valid": np.zeros(24, np.int64)})
    elif spoil == "no checkpoint":
        ckpt = tmp_path / "x.pt"
        torch.save({"kind": "another"}, ckpt)
    elif spoil == "into the data":
        out = tmp_path
    more = {"unknown split": ["--split", "vaild"], "weights": ["lr=1"]}.get(spoil, [])
    with SplitWriter(tmp_path, "valid", len(patches)) as writer:
        writer.add(patches, labels)
    if spoil == "no labels":
        split_path(tmp_path, "valid", "y").unlink()
    assert audit.main(["model", "--ckpt", str(ckpt), str(tmp_path), "--out", str(out), *more]) == 2
    told = capsys.readouterr()
    assert (
        sentence in told.err
        and told.err.strip().count("\n") == 0
        and not (tmp_path / "out").exists()
    )
