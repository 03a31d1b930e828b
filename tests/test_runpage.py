"""The page of a run: written by train.py, whole by itself, and of nothing that is not there."""

import re
import shutil

import pytest
from conftest import QUICK, REPOSITORY, run_script

import report
import train
from lib.blocks import show
from lib.config import HINTS
from lib.files import read_json
from lib.rundir import read_run_config
from lib.runpage import write_run_page


@pytest.fixture(scope="module")
def predictions(quick_run, pcam_dir, tmp_path_factory):
    path = tmp_path_factory.mktemp("predictions") / "p.csv"
    inputs = ["--ckpt", quick_run, pcam_dir, "--split", "valid", "--out", path]
    run_script("inference.py", *inputs, check=0)
    return path


def call_report(*arguments) -> int:
    return report.main(["run", *map(str, arguments)])


def test_a_page_holds_all_that_it_shows(quick_run, predictions, tmp_path):
    out = tmp_path / "p.html"
    assert call_report(quick_run, "--predictions", predictions, "--out", out) == 0
    page = out.read_text()
    sources = re.findall(r'(?:src|href)="([^"]{0,30})', page)
    assert sources and all(source.startswith("data:") for source in sources)
    assert "constant answer" in page and "64 patches" in page and page.count("<figcaption") > 2


def test_train_writes_the_page_of_its_run_with_scores_and_config(quick_run):
    page, last = quick_run / "report.html", quick_run / "summary.json"
    summary = read_json(last)
    cells = set(re.findall(r"<td[^>]*>(.*?)</td>", page.read_text()))
    assert {show(summary["val_auc"]), show(summary["always_positive_f2"])} <= cells
    assert {*HINTS, summary["weights_sha256"]} <= cells
    assert page.stat().st_mtime_ns <= last.stat().st_mtime_ns


def test_a_page_that_cannot_be_drawn_fails_no_training(quick_run, tmp_path, monkeypatch, capsys):
    def refuse(*_):
        raise RuntimeError("no fonts\nat all")

    monkeypatch.setattr("lib.runpage.write_run_page", refuse)
    data = f"data_dir={read_run_config(quick_run).data_dir}"
    overrides = [*QUICK[1:], "epochs=1", "limit_train=32"]
    assert train.main(["--runs", str(tmp_path), data, *overrides]) == 0
    (run,) = tmp_path.iterdir()
    assert (run / "summary.json").is_file() and not (run / "report.html").exists()
    assert "no fonts" in capsys.readouterr().err


def test_what_cannot_be_shown_is_refused(quick_run, predictions, tmp_path, capsys):
    damaged = tmp_path / "p.csv"
    run = shutil.copytree(quick_run, tmp_path / "run")

    def refused(*arguments) -> str:
        assert call_report(run, "--out", tmp_path / "p.html", *arguments) == 2
        return capsys.readouterr().err

    text = predictions.read_text()
    damaged.write_text(text.replace("probability", "prob"))
    assert "lacks the column probability" in refused("--predictions", damaged)
    (run / "epochs.csv").write_text((run / "epochs.csv").read_text().splitlines()[0] + "\n")
    assert "no finished epoch" in refused() and not (tmp_path / "p.html").exists()


def test_a_champion_which_keeps_no_steps_has_a_page(tmp_path):
    champion = REPOSITORY / "assets" / "champion"
    page = write_run_page(champion, tmp_path / "p.html", read_json(champion / "summary.json"))
    text = page.read_text()
    assert "Epoch by epoch" in text and "Step by step" not in text
