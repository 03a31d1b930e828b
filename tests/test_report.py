"""The run page: everything in one file, and nothing drawn from what is not there."""

import re
import shutil

import pytest
from conftest import run_script

import inference
import report


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
    assert "always" not in page and "constant answer" in page and page.count("<figure") > 12
    assert re.search(r"64 patches", page) and (quick_run / "report.html").exists() is False


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
