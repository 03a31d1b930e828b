"""inference.py: the same patch gets the same probability however it is handed over; a failed run
harms nothing.
"""

import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import call_script
from PIL import Image
from test_pcam import write_h5
from test_predict import by_hand

import inference
from lib.checkpoint import load_checkpoint, load_model, save_checkpoint
from lib.files import read_csv, read_json
from lib.metrics import sigmoid
from lib.pcam import open_images, open_split
from lib.splitwriter import SplitWriter

NUM = 12


def infer(ckpt, *arguments, out=None, expect=0):
    """(rows, JSON, stderr) of a call in this process; rows is None where it is refused."""
    if out:
        arguments = [*arguments, "--out", out]
    code, result, err = call_script(inference.main, "--ckpt", ckpt, *arguments)
    assert expect in (code, None), err
    return None if code == 2 else read_csv(out), result, err


def column(rows, name, kind=float):
    return [kind(row[name]) for row in rows]


@pytest.fixture(scope="module")
def sources(pcam_dir, tmp_path_factory) -> dict:
    """The same patches as folder of images, tar, HDF5 file and PCam folder with a test split."""
    root = tmp_path_factory.mktemp("sources")
    split = open_split(pcam_dir, "valid")
    patches, labels = split.images.read(range(NUM)), split.labels[:NUM]
    pcam, folder = root / "pcam", root / "pictures"
    pcam.mkdir()
    with SplitWriter(pcam, "test", NUM) as writer:
        writer.add(patches, labels)
    (folder / "deep er").mkdir(parents=True)
    for row, patch in enumerate(patches):
        name = f"deep er/{row:02}.png" if row < NUM // 2 else f"z{row:02}.tif"
        Image.fromarray(patch).save(folder / name)
    with tarfile.open(root / "packed.tar.gz", "w:gz") as tar:
        tar.add(folder, "x")
    h5 = write_h5(root / "patches.h5", patches)
    return {"folder": folder, "tar": tar.name, "h5": h5, "pcam": pcam}


@pytest.fixture(scope="module")
def logits(quick_run, sources):
    """Of the patches, from the definition."""
    patches = open_images(sources["h5"]).read(range(NUM))
    return by_hand(load_model(quick_run)[0], torch.from_numpy(patches)).numpy()


@pytest.fixture(scope="module")
def expected(quick_run, logits):
    """Probabilities of the patches, from the definition of the run's calibration."""
    calibration = load_checkpoint(quick_run / "best.pt")["calibration"]
    return sigmoid(logits / calibration["temperature"] + calibration["offset"])


def test_a_patch_has_one_probability_however_it_comes(quick_run, sources, expected, tmp_path):
    rows, result, _ = infer(quick_run, *sources.values(), "--split", "test", out=tmp_path / "p.csv")
    header = ["source", "index", "probability", "prediction", "label", "drift", "unlike"]
    assert list(rows[0]) == header and result["num"] == len(rows) == 4 * NUM
    probs = np.tile(expected, 4)
    assert column(rows, "probability") == pytest.approx(probs.tolist(), abs=1e-6)
    is_positive = probs >= result["threshold"]
    assert column(rows, "prediction", int) == is_positive.astype(int).tolist()
    assert result["num_positive"] == is_positive.sum()
    labels = open_split(sources["pcam"], "test").labels.tolist()
    assert [row["label"] for row in rows] == [""] * 3 * NUM + [*map(str, labels)]
    assert result["scores"]["tp"] + result["scores"]["fn"] == sum(labels)


def test_threshold_calibration_and_views_come_from_the_checkpoint_unless_given(
    quick_run, sources, logits, expected, tmp_path
):
    fields = load_checkpoint(quick_run / "best.pt")

    def infer_with(*given, **changes):
        save_checkpoint(tmp_path / "c.pt", {**fields, **changes})
        given = sources["h5"], *given
        rows, result, err = infer(tmp_path / "c.pt", *given, out=tmp_path / "p.csv")
        return pytest.approx(column(rows, "probability"), abs=1e-6), result, err

    middle = float(np.median(expected))
    assert infer_with(threshold=middle)[1]["num_positive"] == NUM // 2
    assert infer_with("--threshold", 0, threshold=middle)[1]["num_positive"] == NUM
    calibration = {"temperature": 2.0, "offset": -1.0}
    assert sigmoid(logits / 2 - 1).tolist() == infer_with(calibration=calibration)[0]
    probs, result, err = infer_with(calibration=None)
    assert sigmoid(logits).tolist() == probs
    assert not result["calibrated"] and "not calibrated" in err
    probs, result, err = infer_with("--views", 8)
    assert result["views"] == 8 and "warning" in err, "the calibration is of one view"
    assert expected.tolist() != probs


def test_patches_unlike_the_training_data_are_named_one_by_one_and_as_a_batch(
    quick_run, pcam_dir, tmp_path
):
    patches = open_split(pcam_dir, "valid").images.read(range(40))
    dark = (patches * 0.6).astype(np.uint8)
    one_grey = patches.copy()
    one_grey[39] = one_grey[39].mean(2, keepdims=True)
    for images, num_unlike in ((one_grey, 1), (dark, 40)):
        path = write_h5(tmp_path / "x.h5", images)
        rows, result, err = infer(quick_run, path, out=tmp_path / "p.csv")
        assert rows[39]["unlike"] and sum(bool(row["unlike"]) for row in rows) == num_unlike
        assert result["drift"]["drifted"] == ("WARNING" in err) == (images is dark)


def test_what_cannot_be_read_is_a_row_with_its_reason_and_a_finding(
    quick_run, sources, expected, tmp_path
):
    bad, out = tmp_path / "bad.png", tmp_path / "p.csv"
    bad.write_bytes(b"\x89PNG" + bytes(50))
    patches = open_images(sources["h5"]).read(range(3)).astype(np.float32)
    patches[1, 5, 5, 0] = np.nan
    inputs = bad, write_h5(tmp_path / "float.h5", patches)
    rows, result, err = infer(quick_run, *inputs, out=out, expect=1)
    assert result["num_failed"] == 2 and str(bad) in rows[0]["error"] and str(bad) in err
    assert rows[0]["probability"] == rows[0]["prediction"] == rows[0]["drift"] == ""
    read = [float(row["probability"]) for row in rows if not row["error"]]
    assert read == pytest.approx(expected[[0, 2]].tolist(), abs=1e-6)
    infer(quick_run, bad, out=out, expect=2)  # nothing at all can be read


def test_a_refusal_is_one_sentence_and_an_earlier_result_stays(quick_run, sources, tmp_path):
    out, cut = tmp_path / "p.csv", tmp_path / "cut.tgz"
    out.write_text("from before\n")
    cut.write_bytes(Path(sources["tar"]).read_bytes()[:150_000])
    for arguments, words in (
        ([sources["pcam"]], "--split"),
        ([cut], str(cut)),
        ([cut, "--threshold", "1.5"], "1.5"),
        ([cut, "--ckpt", tmp_path], str(tmp_path)),
        ([cut, "--out", cut], str(cut)),
    ):
        _, _, err = infer(quick_run, "--out", out, *arguments, expect=2)
        assert words in err and err.startswith("error: ") and err.count("\n") == 1
        assert out.read_text() == "from before\n"
    assert len(list(tmp_path.iterdir())) == 2 and cut.stat().st_size == 150_000


def test_inference_repeats_the_validation_scores_of_training(quick_run, pcam_dir, tmp_path):
    summary = read_json(quick_run / "summary.json")
    half = sigmoid(summary["offset"])  # what a logit of 0 is called once it is calibrated
    arguments = [pcam_dir, "--split", "valid", "--threshold", half]
    scores = infer(quick_run, *arguments, out=tmp_path / "p.csv")[1]["scores"]
    del scores["loss"]  # which calibration changes
    assert scores == pytest.approx({name: summary[f"val_{name}"] for name in scores}, abs=1e-6)
