"""The page of a run: written by train.py, whole by itself, and of nothing that is not there."""

import dataclasses
import re
import shutil

import pytest
from conftest import QUICK, run_script

import inference
import report
import train
from lib.blocks import show
from lib.files import read_json
from lib.rundir import read_run_config


@pytest.fixture(scope="module")
def predictions(quick_run, pcam_dir, tmp_path_factory):
    path = tmp_path_factory.mktemp("predictions") / "p.csv"
    assert (
        inference.main(
            ["--ckpt", str(quick_run), str(pcam_dir), "--split", "valid", "--out", str(path)]
        )
        == 0
    )
    return path


def test_a_page_holds_all_that_it_shows(quick_run, predictions, tmp_path):
    result = run_script(
        "report.py",
        "run",
        quick_run,
        "--predictions",
        predictions,
        "--out",
        tmp_path / "p.html",
        check=0,
    )
    page = (tmp_path / "p.html").read_text()
    assert result.json["page"] == str(tmp_path / "p.html") and len(page) < 5_000_000
    sources = re.findall(r'(?:src|href)="([^"]{0,30})', page)
    assert sources and all(source.startswith("data:") for source in sources), (
        "nothing is fetched from elsewhere"
    )
    assert "constant answer" in page and page.count("<figure") > 12 and "64 patches" in page


def test_train_writes_the_page_of_its_run_with_scores_and_config(quick_run):
    page = (quick_run / "report.html").read_text()
    summary = read_json(quick_run / "summary.json")
    cfg = read_run_config(quick_run)
    cells = re.findall(r"<td[^>]*>(.*?)</td>", page)
    assert {show(summary["val_auc"]), show(summary["always_positive_f2"])} <= set(cells)
    assert set(dataclasses.asdict(cfg)) | {summary["weights_sha256"]} <= set(cells)
    assert (quick_run / "report.html").stat().st_mtime_ns <= (
        quick_run / "summary.json"
    ).stat().st_mtime_ns


def test_a_page_that_cannot_be_drawn_fails_no_training(quick_run, tmp_path, monkeypatch, capsys):
    def refuse(*_):
        raise RuntimeError("no fonts\nat all")

    monkeypatch.setattr("lib.runpage.write_run_page", refuse)
    overrides = [f"data_dir={read_run_config(quick_run).data_dir}", *QUICK, "epochs=1"]
    overrides.remove("epochs=2")
    assert train.main(["--runs", str(tmp_path), *overrides]) == 0
    (run,) = tmp_path.iterdir()
    assert (run / "summary.json").is_file() and not (run / "report.html").exists()
    warnings = [line for line in capsys.readouterr().err.splitlines() if "no fonts" in line]
    assert len(warnings) == 1 and "at all" not in warnings[0]


def test_a_picture_shows_the_very_pixels_of_the_patch(predictions):
    import io

    import numpy as np
    from PIL import Image

    from lib.blocks import patch_png
    from lib.files import read_csv
    from lib.pcam import open_images
    from lib.runpage import read_patch

    row = read_csv(predictions)[17]
    drawn = np.asarray(Image.open(io.BytesIO(patch_png(read_patch(row)))))
    assert np.array_equal(drawn, open_images(row["source"]).read([17])[0])


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda text: text.replace("probability", "prob", 1), "lacks the column probability"),
        (lambda text: re.sub(r"(?m)^((?:[^,]*,){4})[01],", r"\g<1>2,", text), "label"),
        (lambda text: re.sub(r"(?m)_x.h5,\d+,", "_x.h5,99999,", text), "no row 99999"),
        (lambda text: text.splitlines()[0] + "\n", "no row"),
    ],
)
def test_predictions_that_cannot_be_shown_are_refused(
    change, words, quick_run, predictions, tmp_path, capsys
):
    (tmp_path / "p.csv").write_text(change(predictions.read_text()))
    code = report.main(
        [
            "run",
            str(quick_run),
            "--predictions",
            str(tmp_path / "p.csv"),
            "--out",
            str(tmp_path / "p.html"),
        ]
    )
    assert code == 2 and words in capsys.readouterr().err and not (tmp_path / "p.html").exists()


def test_a_run_without_a_finished_epoch_has_no_page(quick_run, tmp_path, capsys):
    run = shutil.copytree(quick_run, tmp_path / "run")
    header = (run / "epochs.csv").read_text().splitlines()[0]
    (run / "epochs.csv").write_text(header + "\n")
    assert report.main(["run", str(run)]) == 2 and "no finished epoch" in capsys.readouterr().err
    (run / "summary.json").unlink()
    assert report.main(["run", str(run)]) == 2 and "did not finish" in capsys.readouterr().err
