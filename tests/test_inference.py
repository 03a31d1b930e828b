"""inference.py: the same patch gets the same probability however it is handed over; a failed run
harms nothing.
"""

import shutil
import tarfile

import h5py
import numpy as np
import pytest
import torch
from conftest import run_script, write_pcam
from PIL import Image
from test_predict import DIHEDRAL, by_hand, shift
from test_train import call_script

import inference
from lib.audit.model import audit_model, recalibrate
from lib.checkpoint import load_checkpoint, load_model, save_checkpoint
from lib.files import read_csv, read_json
from lib.metrics import sigmoid
from lib.pcam import open_split, split_path
from lib.splitwriter import SplitWriter

NUM = 12


def infer(ckpt, *arguments, out, expect=0):
    code, result, err = call_script(inference.main, "--ckpt", ckpt, *arguments, "--out", out)
    assert code == expect, err
    return (read_csv(out), result, err) if expect != 2 else (None, result, err)


def column(rows, name, kind=float):
    return [kind(row[name]) for row in rows]


@pytest.fixture(scope="module")
def sources(pcam_dir, tmp_path_factory) -> dict:
    """The same patches as images, folder, tars, HDF5 and PCam folder, named so that sorted order is
    row order.
    """
    root = tmp_path_factory.mktemp("sources")
    split = open_split(pcam_dir, "valid")
    patches, labels = split.images.read(range(NUM)), split.labels[:NUM]
    pcam, folder = root / "pcam", root / "pictures"
    pcam.mkdir()
    with SplitWriter(pcam, "test", NUM) as writer:
        writer.add(patches, labels)
    shutil.copy(split_path(pcam, "test", "x"), root / "patches.h5")
    (folder / "deep er").mkdir(parents=True)
    (folder / "notes.txt").write_text("not an image")
    files = [folder / "deep er" / f"{row:02}.png" for row in range(NUM // 2)]
    files += [folder / f"z{row}.tif" for row in range(NUM // 2)]
    for patch, path in zip(patches, files, strict=True):
        Image.fromarray(patch).save(path)
    for name, mode in (("plain.tar", "w"), ("packed.tar.gz", "w:gz")):
        with tarfile.open(root / name, mode) as tar:
            for path in files:
                tar.add(path, path.relative_to(folder))
    return {
        "images": patches,
        "labels": labels.tolist(),
        "files": files,
        "folder": folder,
        "h5": root / "patches.h5",
        "pcam": pcam,
        "tar": root / "plain.tar",
        "packed": root / "packed.tar.gz",
    }


@pytest.fixture(scope="module")
def logits(quick_run, sources):
    """Of the patches, from the definition."""
    return by_hand(load_model(quick_run)[0], torch.from_numpy(sources["images"])).numpy()


def calibrated(logits, run):
    """Probabilities of logits, from the definition of a run's calibration."""
    calibration = load_checkpoint(run / "best.pt")["calibration"]
    return sigmoid(logits / calibration["temperature"] + calibration["offset"])


@pytest.fixture(scope="module")
def expected(quick_run, logits):
    return calibrated(logits, quick_run)


def expected_sources(kind, sources) -> list[str]:
    """Each patch by the path at which it is reached."""
    if kind in ("tar", "packed"):
        names = [path.relative_to(sources["folder"]) for path in sources["files"]]
        return [f"{sources[kind]}/{name}" for name in names]
    if kind in ("h5", "pcam"):
        path = sources["h5"] if kind == "h5" else split_path(sources["pcam"], "test", "x")
        return [str(path)] * NUM
    return [str(path) for path in sources["files"]]


@pytest.mark.parametrize("kind", ["files", "folder", "tar", "packed", "h5", "pcam"])
def test_a_patch_has_one_probability_however_it_comes(kind, quick_run, sources, expected, tmp_path):
    inputs = {"files": sources["files"], "pcam": [sources["pcam"], "--split", "test"]}
    arguments = inputs.get(kind, [sources[kind]])
    rows, result, _ = infer(quick_run, *arguments, out=tmp_path / "p.csv")
    label = ["label"] if kind == "pcam" else []
    header = ["source", "index", "probability", "prediction", *label, "drift", "unlike"]
    assert list(rows[0]) == header and result["num"] == NUM
    assert column(rows, "source", str) == expected_sources(kind, sources)
    assert column(rows, "probability") == pytest.approx(expected.tolist(), abs=1e-6)
    is_positive = [int(prob >= result["threshold"]) for prob in expected]
    assert column(rows, "prediction", int) == is_positive
    if kind in ("h5", "pcam"):
        assert column(rows, "index", int) == list(range(NUM))
    if kind == "pcam":
        assert column(rows, "label", int) == sources["labels"]
        assert result["scores"]["tp"] + result["scores"]["fn"] == sum(sources["labels"])


def test_inputs_keep_the_order_in_which_they_are_given(quick_run, sources, expected, tmp_path):
    picked = [7, 2, 2, 9, 0]
    files = [sources["files"][row] for row in picked]
    rows, _, _ = infer(quick_run, *files, sources["h5"], out=tmp_path / "p.csv")
    assert column(rows, "probability") == pytest.approx([*expected[picked], *expected], abs=1e-6)


def test_eight_views_are_the_mean_logit_of_eight_patches_and_are_remembered(
    quick_run, sources, tmp_path
):
    model, images = load_model(quick_run)[0], torch.from_numpy(sources["images"])
    logits = torch.stack([by_hand(model, shift(turn(images))) for turn in DIHEDRAL])
    probs = calibrated(logits.mean(0).numpy(), quick_run)
    rows, result, err = infer(quick_run, sources["h5"], "--views", 8, out=tmp_path / "p.csv")
    assert column(rows, "probability") == pytest.approx(probs.tolist(), abs=1e-6)
    assert result["views"] == 8 and "warning" in err, "the calibration is of one view"
    fields = load_checkpoint(quick_run / "best.pt")
    save_checkpoint(tmp_path / "eight.pt", {**fields, "config": fields["config"] | {"views": 8}})
    assert infer(tmp_path / "eight.pt", sources["h5"], out=tmp_path / "q.csv")[0] == rows


def test_the_threshold_decides_and_comes_from_the_checkpoint_unless_given(
    quick_run, sources, expected, tmp_path
):
    middle = float(np.median(expected))
    fields = load_checkpoint(quick_run / "best.pt")
    stored = tmp_path / "t.pt"
    save_checkpoint(stored, {**fields, "threshold": middle})
    for ckpt, arguments, threshold, num_positive in (
        (stored, [], middle, NUM // 2),
        (quick_run, ["--threshold", middle], middle, NUM // 2),
        (quick_run, ["--threshold", 0], 0, NUM),
        (stored, ["--threshold", 1], 1, 0),
    ):
        rows, result, _ = infer(ckpt, sources["h5"], *arguments, out=tmp_path / "p.csv")
        assert result["threshold"] == threshold
        assert sum(column(rows, "prediction", int)) == result["num_positive"] == num_positive


def test_calibration_in_a_checkpoint_is_applied_and_told(quick_run, sources, logits, tmp_path):
    fields = load_checkpoint(quick_run / "best.pt")
    for calibration, probs in (
        ({"temperature": 2.0, "offset": -1.0}, sigmoid(logits / 2 - 1)),
        (None, sigmoid(logits)),
    ):
        save_checkpoint(tmp_path / "t.pt", {**fields, "calibration": calibration})
        rows, result, _ = infer(tmp_path / "t.pt", sources["h5"], out=tmp_path / "p.csv")
        assert column(rows, "probability") == pytest.approx(probs.tolist(), abs=1e-6)
        assert result["calibrated"] == (calibration is not None)


@pytest.mark.parametrize(
    "kind, unlike", [("as they are", []), ("dark", [*range(40)]), ("one is grey", [39])]
)
def test_patches_unlike_the_training_data_are_named_one_by_one_and_as_a_batch(
    kind, unlike, quick_run, pcam_dir, tmp_path
):
    patches = open_split(pcam_dir, "valid").images.read(range(40))
    if kind == "dark":
        patches = (patches * 0.6).astype(np.uint8)
    if kind == "one is grey":
        patches[39] = patches[39].mean(2, keepdims=True)
    path = tmp_path / "x.h5"
    with h5py.File(path, "w") as file:
        file["x"] = patches
    rows, result, err = infer(quick_run, path, out=tmp_path / "p.csv")
    assert [row for row, cells in enumerate(rows) if cells["unlike"]] == unlike
    assert result["drift"]["drifted"] == ("WARNING" in err) == (kind == "dark")


def test_what_cannot_be_read_is_a_row_with_its_reason_and_a_finding(
    quick_run, sources, expected, tmp_path
):
    bad, small, floats = (tmp_path / name for name in ("bad.png", "small.png", "float.h5"))
    bad.write_bytes(b"\x89PNG" + bytes(50))
    Image.new("RGB", (95, 96)).save(small)
    patches = sources["images"].astype(np.float32)
    patches[1, 5, 5, 0], patches[2, 0, 0, 1], patches[3] = np.nan, np.inf, 1e5
    with h5py.File(floats, "w") as file:
        file["x"] = patches[:5]
    inputs = [sources["files"][0], bad, small, sources["files"][1], floats]
    rows, result, err = infer(quick_run, *inputs, out=tmp_path / "p.csv", expect=1)
    failed = [row for row, cells in enumerate(rows) if cells["error"]]
    assert failed == [1, 2, 5, 6, 7] and result["num"] == 9 and result["num_failed"] == 5
    for cells in (rows[row] for row in failed):
        assert cells["probability"] == cells["prediction"] == cells["drift"] == ""
    assert str(bad) in rows[1]["error"] and "95x96" in rows[2]["error"] and str(bad) in err
    read = [float(cells["probability"]) for cells in rows if not cells["error"]]
    assert read == pytest.approx(expected[[0, 1, 0, 4]].tolist(), abs=1e-6)
    infer(quick_run, bad, small, out=tmp_path / "q.csv", expect=2)  # nothing at all can be read


@pytest.mark.parametrize("kind", ["cut", "climbs", "no image", "empty folder"])
def test_a_damaged_or_empty_source_gets_one_sentence_and_an_earlier_result_stays(
    kind, quick_run, sources, tmp_path
):
    bad, out = tmp_path / "bad.tar", tmp_path / "p.csv"
    if kind == "cut":
        bad.write_bytes(sources["tar"].read_bytes()[:150_000])
    elif kind == "empty folder":
        bad.mkdir()
    else:
        with tarfile.open(bad, "w") as tar:
            name = "../../out.png" if kind == "climbs" else "notes.txt"
            tar.addfile(tarfile.TarInfo(name))
    out.write_text("from before\n")
    _, result, err = infer(quick_run, sources["files"][0], bad, out=out, expect=2)
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    assert str(bad) in errors[0] and len(errors) == 1 and result["exit"] == 2
    assert out.read_text() == "from before\n" and not list(tmp_path.glob(".p.csv*"))


BAD = [
    (["nowhere.png"], "nowhere.png"),
    (["{pcam}"], "--split"),
    (["{pcam}", "--split", "valid"], "test"),
    (["{h5}", "--threshold", "1.5"], "1.5"),
    (["{h5}", "--threshold", "nan"], "nan"),
    (["{h5}", "--views", "4"], "1, 8"),
    (["{h5}", "--device", "tpu"], "auto, cpu, cuda"),
    (["{folder}/notes.txt"], "notes.txt"),
    ([], "INPUT"),
    ([""], "empty"),
]


@pytest.mark.parametrize("arguments, names", BAD, ids=[" ".join(bad[0]) for bad in BAD])
def test_bad_arguments_get_one_sentence(arguments, names, quick_run, sources, tmp_path):
    arguments = [argument.format(**sources) for argument in arguments]
    _, _, err = infer(quick_run, *arguments, out=tmp_path / "p.csv", expect=2)
    assert names in err and len(err.strip().splitlines()) == 1
    assert not (tmp_path / "p.csv").exists()


@pytest.mark.parametrize("kind", ["empty", "other model", "no run", "no numbers"])
def test_a_bad_checkpoint_is_refused(kind, quick_run, sources, tmp_path):
    path, fields = tmp_path / "c.pt", load_checkpoint(quick_run / "best.pt")
    path.touch()
    if kind == "other model":
        save_checkpoint(path, {**fields, "config": fields["config"] | {"p4m_width": 4}})
    elif kind == "no numbers":
        weights = {name: torch.full_like(value, 1e38) for name, value in fields["model"].items()}
        save_checkpoint(path, {**fields, "model": weights, "averaged": None})
    ckpt = tmp_path if kind == "no run" else path
    _, _, err = infer(ckpt, sources["h5"], out=tmp_path / "p.csv", expect=2)
    assert str(tmp_path) in err and len(err.strip().splitlines()) == 1


@pytest.mark.parametrize("out", ["no/p.csv", ".", "input.h5"])
def test_a_place_that_cannot_or_should_not_be_written_is_named_as_the_person_wrote_it(
    out, quick_run, sources, tmp_path
):
    (tmp_path / "input.h5").write_text("an input")
    _, _, err = infer(quick_run, sources["h5"], out=tmp_path / out, expect=2)
    assert str(tmp_path / out) in err and ".tmp" not in err
    assert (tmp_path / "input.h5").read_text() == "an input"


def test_inference_repeats_the_validation_scores_of_training(quick_run, pcam_dir, tmp_path):
    def scores(*arguments):
        arguments = [pcam_dir, "--split", "valid", *arguments]
        return infer(quick_run, *arguments, out=tmp_path / "p.csv")[1]["scores"]

    summary = read_json(quick_run / "summary.json")
    assert summary["threshold"] == load_checkpoint(quick_run / "best.pt")["threshold"]
    half = sigmoid(summary["offset"])  # what a logit of 0 is called once it is calibrated
    of_half = scores("--threshold", half)
    del of_half["loss"]  # which calibration changes
    expected = {name: summary[f"val_{name}"] for name in of_half}
    assert of_half == pytest.approx(expected, abs=1e-6)
    assert scores()["auc"] == of_half["auc"], "no threshold moves it"


def test_a_real_process_writes_to_the_working_folder_by_default(quick_run, tmp_path):
    write_pcam(tmp_path / "d", 16, 16)
    arguments = ["--ckpt", quick_run, "d", "--split", "train"]
    result = run_script("inference.py", *arguments, cwd=tmp_path, check=0)
    rows = read_csv(tmp_path / "predictions.csv")
    assert len(rows) == result.json["num"] == 16 and "label" in rows[0]
    assert rows[0]["source"].startswith("d/")


@pytest.mark.slow
def test_what_predicts_computes_as_training_does(quick_run, sources, pcam_dir, tmp_path):
    ckpt = shutil.copytree(quick_run, tmp_path / "run")
    out = tmp_path / "audit"
    predicting = {
        "inference": lambda: infer(ckpt, sources["h5"], out=tmp_path / "p.csv"),
        "audit": lambda: audit_model(ckpt, pcam_dir, "valid", out, [], "cpu", with_patches=False),
        "calibration": lambda: recalibrate(ckpt, pcam_dir, [], "cpu"),
    }
    cudnn, products = torch.backends.cudnn, torch.backends.cuda.matmul
    for name, predict in predicting.items():
        # which, on a GPU, would round what float32 layers read
        cudnn.allow_tf32 = products.allow_tf32 = True
        cudnn.deterministic = False
        predict()
        assert not cudnn.allow_tf32 and not products.allow_tf32 and cudnn.deterministic, name
