"""The page of a run: written by train.py, whole by itself, and of nothing that is not there."""

import dataclasses
import re
import shutil

import numpy as np
import pytest
from conftest import QUICK, run_script

import inference
import report
import train
from lib.blocks import show
from lib.figures import plot_decisions
from lib.files import read_csv, read_json
from lib.pcam import open_images
from lib.rundir import read_run_config
from lib.runpage import read_patch


@pytest.fixture(scope="module")
def predictions(quick_run, pcam_dir, tmp_path_factory):
    path = tmp_path_factory.mktemp("predictions") / "p.csv"
    arguments = ["--ckpt", quick_run, pcam_dir, "--split", "valid", "--out", path]
    assert inference.main(list(map(str, arguments))) == 0
    return path


@pytest.fixture
def refusal(capsys):
    """Call report.py in this process with what it has to refuse: its sentence."""

    def refusal(*arguments) -> str:
        assert report.main(list(map(str, arguments))) == 2
        return capsys.readouterr().err

    return refusal


def test_a_page_holds_all_that_it_shows(quick_run, predictions, tmp_path):
    out = tmp_path / "p.html"
    arguments = ("run", quick_run, "--predictions", predictions, "--out", out)
    result = run_script("report.py", *arguments, check=0)
    page = out.read_text()
    assert result.json["page"] == str(out) and len(page) < 5_000_000
    sources = re.findall(r'(?:src|href)="([^"]{0,30})', page)
    assert sources and all(source.startswith("data:") for source in sources)
    assert "constant answer" in page and page.count("<figure") > 12 and "64 patches" in page


def test_train_writes_the_page_of_its_run_with_scores_and_config(quick_run):
    page, last = quick_run / "report.html", quick_run / "summary.json"
    summary, cfg = read_json(last), read_run_config(quick_run)
    cells = set(re.findall(r"<td[^>]*>(.*?)</td>", page.read_text()))
    assert {show(summary["val_auc"]), show(summary["always_positive_f2"])} <= cells
    assert set(dataclasses.asdict(cfg)) | {summary["weights_sha256"]} <= cells
    assert page.stat().st_mtime_ns <= last.stat().st_mtime_ns


def test_a_page_that_cannot_be_drawn_fails_no_training(quick_run, tmp_path, monkeypatch, capsys):
    def refuse(*_):
        raise RuntimeError("no fonts\nat all")

    monkeypatch.setattr("lib.runpage.write_run_page", refuse)
    overrides = [pair for pair in QUICK if pair != "epochs=2"]
    data = f"data_dir={read_run_config(quick_run).data_dir}"
    assert train.main(["--runs", str(tmp_path), data, *overrides, "epochs=1"]) == 0
    (run,) = tmp_path.iterdir()
    assert (run / "summary.json").is_file() and not (run / "report.html").exists()
    warnings = [line for line in capsys.readouterr().err.splitlines() if "no fonts" in line]
    assert len(warnings) == 1 and "at all" not in warnings[0]


def test_an_example_is_the_very_patch_of_its_row(predictions):
    row = read_csv(predictions)[17]
    assert np.array_equal(read_patch(row), open_images(row["source"]).read([17])[0])


@pytest.mark.parametrize(
    "pattern, replacement, words",
    [
        ("probability", "prob", "lacks the column probability"),
        (r"(?m)^((?:[^,]*,){4})[01],", r"\g<1>2,", "label"),
        (r"(?m)_x.h5,\d+,", "_x.h5,99999,", "no row 99999"),
        (r"(?s)(?<=\n).*", "", "no row"),
    ],
)
def test_predictions_that_cannot_be_shown_are_refused(
    pattern, replacement, words, quick_run, predictions, tmp_path, refusal
):
    damaged, out = tmp_path / "p.csv", tmp_path / "p.html"
    damaged.write_text(re.sub(pattern, replacement, predictions.read_text()))
    assert words in refusal("run", quick_run, "--predictions", damaged, "--out", out)
    assert not out.exists()


def test_a_run_without_a_finished_epoch_has_no_page(quick_run, tmp_path, refusal):
    run = shutil.copytree(quick_run, tmp_path / "run")
    header = (run / "epochs.csv").read_text().splitlines()[0]
    (run / "epochs.csv").write_text(header + "\n")
    assert "no finished epoch" in refusal("run", run)
    (run / "summary.json").unlink()
    assert "did not finish" in refusal("run", run)


def test_curves_of_decisions_run_from_corner_to_corner_and_hold_the_threshold():
    labels, probs = np.array([0, 0, 1, 0, 1, 1]), np.array([0.1, 0.2, 0.3, 0.6, 0.7, 0.9])
    roc, pr, _ = plot_decisions(labels, probs, 0.5).axes
    _, curve, threshold = (line.get_xydata() for line in roc.lines)
    assert curve[0].tolist() == [0, 0] and curve[-1].tolist() == [1, 1]
    np.testing.assert_allclose(threshold, [[1 / 3, 2 / 3]])
    np.testing.assert_allclose(pr.lines[2].get_xydata(), [[2 / 3, 2 / 3]])
    assert pr.lines[1].get_xydata()[-1].tolist() == [1, 0.5]
