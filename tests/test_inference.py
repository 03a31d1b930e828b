"""inference.py: the same patch gets the same probability however it is handed over; a failed run
harms nothing.
"""

import io
import shutil
import tarfile
from pathlib import Path

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
from lib.pcam import SplitWriter, open_split, split_path

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
    patches = split.images.read(range(NUM))
    with SplitWriter(root, "test", NUM) as writer:
        writer.add(patches, split.labels[:NUM])
    shutil.copy(split_path(root, "test", "x"), root / "patches.h5")
    folder = root / "pictures"
    (folder / "deep er").mkdir(parents=True)
    pcam = root / "pcam"
    pcam.mkdir()
    for entry in root.glob("camelyon*"):
        entry.rename(pcam / entry.name)
    files = [folder / "deep er" / f"{row:02}.png" for row in range(NUM // 2)] + [
        folder / f"z{row}.tif" for row in range(NUM // 2)
    ]
    for patch, path in zip(patches, files, strict=True):
        Image.fromarray(patch).save(path)
    (folder / "notes.txt").write_text("not an image")
    for name in ("plain.tar", "packed.tar.gz"):
        with tarfile.open(root / name, "w:gz" if name.endswith("gz") else "w") as tar:
            for path in files:
                tar.add(path, path.relative_to(folder))
    return {
        "root": root, "images": patches, "labels": split.labels[:NUM].tolist(), "files": files, "folder": folder,
        "h5": root / "patches.h5", "pcam": pcam, "tar": root / "plain.tar", "packed": root / "packed.tar.gz",
    }  # fmt: skip


def calibrated(logits, run):
    """Probabilities of logits, from the definition of a run's calibration."""
    calibration = load_checkpoint(run / "best.pt")["calibration"]
    return sigmoid(logits / calibration["temperature"] + calibration["offset"])


@pytest.fixture(scope="module")
def logits(quick_run, sources):
    """Of the patches, from the definition."""
    return by_hand(load_model(quick_run)[0], torch.from_numpy(sources["images"])).numpy()


@pytest.fixture(scope="module")
def expected(quick_run, logits):
    return calibrated(logits, quick_run)


@pytest.mark.parametrize("kind", ["files", "folder", "tar", "packed", "h5", "pcam"])
def test_a_patch_has_one_probability_however_it_comes(kind, quick_run, sources, expected, tmp_path):
    given = (
        sources[kind]
        if kind == "files"
        else [sources[kind], *(["--split", "test"] if kind == "pcam" else [])]
    )
    rows, result, _ = infer(quick_run, *given, out=tmp_path / "p.csv")
    assert column(rows, "probability") == pytest.approx(expected.tolist(), abs=1e-6)
    assert column(rows, "prediction", int) == [
        int(prob >= result["threshold"]) for prob in expected
    ]
    further = [*(["label"] if kind == "pcam" else []), "drift", "unlike"]
    assert (
        list(rows[0]) == ["source", "index", "probability", "prediction", *further]
        and result["num"] == NUM
    )
    names = [str(path) for path in sources["files"]]
    if kind in ("tar", "packed"):
        names = [
            f"{sources[kind]}/{path.relative_to(sources['folder'])}" for path in sources["files"]
        ]
    elif kind in ("h5", "pcam"):
        names = [
            str(sources["h5"] if kind == "h5" else split_path(sources["pcam"], "test", "x"))
        ] * NUM
        assert column(rows, "index", int) == list(range(NUM))
    assert column(rows, "source", str) == names, "the order of the input is the order of the rows"
    if kind == "pcam":
        scores, num_positive = result["scores"], sum(sources["labels"])
        assert (
            column(rows, "label", int) == sources["labels"]
            and scores["tp"] + scores["fn"] == num_positive
        )


def test_inputs_keep_the_order_in_which_they_are_given(quick_run, sources, expected, tmp_path):
    picked = [7, 2, 2, 9, 0]
    rows = infer(
        quick_run, *(sources["files"][row] for row in picked), sources["h5"], out=tmp_path / "p.csv"
    )[0]
    assert column(rows, "probability") == pytest.approx([*expected[picked], *expected], abs=1e-6)


def test_eight_views_are_the_mean_logit_of_eight_turned_and_shifted_patches_and_are_remembered(
    quick_run, sources, tmp_path
):
    model = load_model(quick_run)[0]
    images = torch.from_numpy(sources["images"])
    eight = calibrated(
        torch.stack([by_hand(model, shift(turn(images))) for turn in DIHEDRAL]).mean(0).numpy(),
        quick_run,
    )
    rows, result, err = infer(quick_run, sources["h5"], "--views", 8, out=tmp_path / "p.csv")
    assert "set for 1 view(s), not for 8" in err
    assert (
        column(rows, "probability") == pytest.approx(eight.tolist(), abs=1e-6)
        and result["views"] == 8
    )
    fields = load_checkpoint(quick_run / "best.pt")
    save_checkpoint(tmp_path / "eight.pt", {**fields, "config": fields["config"] | {"views": 8}})
    assert infer(tmp_path / "eight.pt", sources["h5"], out=tmp_path / "q.csv")[0] == rows
    assert (
        infer(tmp_path / "eight.pt", sources["h5"], "--views", 1, out=tmp_path / "q.csv")[0] != rows
    )


def test_the_threshold_decides_and_comes_from_the_checkpoint_unless_given(
    quick_run, sources, expected, tmp_path
):
    middle = float(np.median(expected))
    fields = load_checkpoint(quick_run / "best.pt")
    save_checkpoint(tmp_path / "t.pt", {**fields, "threshold": middle})
    for ckpt, given, threshold in (
        (tmp_path / "t.pt", [], middle),
        (quick_run, ["--threshold", middle], middle),
    ):
        rows, result, _ = infer(ckpt, sources["h5"], *given, out=tmp_path / "p.csv")
        assert (
            result["threshold"] == threshold
            and sum(column(rows, "prediction", int)) == result["num_positive"] == NUM // 2
        )
    for threshold, num in ((0, NUM), (1, 0)):
        assert (
            infer(quick_run, sources["h5"], "--threshold", threshold, out=tmp_path / "p.csv")[1][
                "num_positive"
            ]
            == num
        )


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


def test_patches_unlike_the_training_data_are_named_one_by_one_and_as_a_batch(
    quick_run, pcam_dir, tmp_path
):
    patches = open_split(pcam_dir, "valid").images.read(range(40))
    changed = {
        "as they are": patches,
        "dark": (patches * 0.6).astype(np.uint8),
        "one is grey": np.concatenate(
            [patches[:39], patches[39:].mean(3, keepdims=True).astype(np.uint8).repeat(3, 3)]
        ),
    }
    found = {}
    for name, images in changed.items():
        with SplitWriter(tmp_path, "test", len(images)) as writer:
            writer.add(images, np.arange(len(images), dtype=np.uint8) % 2)
        rows, result, err = infer(
            quick_run, split_path(tmp_path, "test", "x"), out=tmp_path / "p.csv"
        )
        unlike = [number for number, row in enumerate(rows) if row["unlike"]]
        found[name] = result["drift"]["drifted"], unlike, result["drift"]["feature"]
        assert ("do not look like those the model was trained on" in err) == result["drift"][
            "drifted"
        ]
    assert found["as they are"][:2] == (False, []) and found["one is grey"][:2] == (False, [39])
    assert found["dark"][0] and found["dark"][1] == [*range(40)]


def test_an_unreadable_image_is_a_row_with_its_reason_and_a_finding(
    quick_run, sources, expected, tmp_path
):
    (tmp_path / "bad.png").write_bytes(b"\x89PNG" + bytes(50))
    Image.new("RGB", (95, 96)).save(tmp_path / "small.png")
    given = [sources["files"][0], tmp_path / "bad.png", tmp_path / "small.png", sources["files"][1]]
    rows, result, err = infer(quick_run, *given, out=tmp_path / "p.csv", expect=1)
    assert [row["probability"] == "" == row["prediction"] for row in rows] == [
        False,
        True,
        True,
        False,
    ]
    assert "bad.png" in rows[1]["error"] and "95x96" in rows[2]["error"] and rows[0]["error"] == ""
    assert result["num"] == 4 and result["num_failed"] == 2 and "bad.png" in err
    assert float(rows[3]["probability"]) == pytest.approx(expected[1], abs=1e-6)


def test_a_patch_of_values_that_are_no_intensities_is_a_row_with_its_reason(
    quick_run, sources, expected, tmp_path
):
    patches = open_split(sources["pcam"], "test").images.read(range(NUM)).astype(np.float32)
    patches[1, 5, 5, 0], patches[2, 0, 0, 1], patches[3] = np.nan, np.inf, 1e5
    with h5py.File(tmp_path / "float.h5", "w") as file:
        file["x"] = patches
    rows, result, _ = infer(quick_run, tmp_path / "float.h5", out=tmp_path / "p.csv", expect=1)
    assert result["num_failed"] == 3 and [bool(row["error"]) for row in rows] == [
        row in (1, 2, 3) for row in range(NUM)
    ]
    assert (
        rows[1]["probability"] == ""
        and "NaN" in rows[1]["error"]
        and float(rows[0]["probability"]) == pytest.approx(expected[0], abs=1e-6)
    )


def damaged(sources, tmp_path, kind) -> Path:
    path = tmp_path / ("damaged.tar.gz" if kind == "packed" else "damaged.tar")
    if kind in ("tar", "packed"):
        data = sources[kind].read_bytes()
        path.write_bytes(data[: int(0.6 * len(data))])
    elif kind == "climbs":
        with tarfile.open(path, "w") as tar:
            info = tarfile.TarInfo("../../out.png")
            tar.addfile(info, io.BytesIO())
    elif kind == "no image":
        with tarfile.open(path, "w") as tar:
            tar.add(sources["folder"] / "notes.txt", "notes.txt")
    elif kind == "empty":
        path.touch()
    elif kind == "folder":
        path = tmp_path / "nothing"
        path.mkdir()
    return path


@pytest.mark.parametrize("kind", ["tar", "packed", "climbs", "no image", "empty", "folder"])
def test_a_damaged_or_empty_source_gets_one_sentence_and_an_earlier_result_stays(
    kind, quick_run, sources, tmp_path
):
    out = tmp_path / "p.csv"
    out.write_text("from before\n")
    bad = damaged(sources, tmp_path, kind)
    _, result, err = infer(quick_run, sources["files"][0], bad, out=out, expect=2)
    assert str(bad) in err and len(err.strip().splitlines()) == 1 and result["exit"] == 2
    assert out.read_text() == "from before\n" and not list(tmp_path.glob(".p.csv*"))


BAD = [
    (["nowhere.png"], "no such input: nowhere.png"),
    (["{root}/pcam"], "choose --split from test"),
    (["{root}/pcam", "--split", "valid"], "choose --split from test"),
    (["{h5}", "--threshold", "1.5"], "1.5 is not between 0 and 1"),
    (["{h5}", "--threshold", "-0.1"], "-0.1 is not between 0 and 1"),
    (["{h5}", "--threshold", "nan"], "nan is not between 0 and 1"),
    (["{h5}", "--threshold", "half"], "half"),
    (["{h5}", "--views", "4"], "choose from 1, 8"),
    (["{h5}", "--device", "tpu"], "allowed are auto, cpu, cuda"),
    (["{folder}/notes.txt"], "unknown kind of input"),
    ([], "required: INPUT"),
    ([""], "an empty text names no file or folder"),
]


@pytest.mark.parametrize(
    "arguments, sentence", BAD, ids=lambda value: " ".join(value) if isinstance(value, list) else ""
)
def test_bad_arguments_get_one_sentence(arguments, sentence, quick_run, sources, tmp_path):
    given = [argument.format(**sources) for argument in arguments]
    _, result, err = infer(quick_run, *given, out=tmp_path / "p.csv", expect=2)
    assert (
        sentence in err and len(err.strip().splitlines()) == 1 and not (tmp_path / "p.csv").exists()
    )


@pytest.mark.parametrize("kind", ["empty", "cut", "missing", "other model", "no run"])
def test_a_bad_checkpoint_is_refused(kind, quick_run, sources, tmp_path):
    path, fields = tmp_path / "c.pt", load_checkpoint(quick_run / "best.pt")
    if kind == "empty":
        path.touch()
    elif kind == "cut":
        path.write_bytes((quick_run / "best.pt").read_bytes()[:5000])
    elif kind == "other model":
        save_checkpoint(path, {**fields, "config": fields["config"] | {"p4m_width": 4}})
    _, _, err = infer(
        tmp_path if kind == "no run" else path, sources["h5"], out=tmp_path / "p.csv", expect=2
    )
    assert str(tmp_path) in err and len(err.strip().splitlines()) == 1


@pytest.mark.parametrize("out", ["no/p.csv", "."])
def test_a_place_that_cannot_be_written_is_named_as_the_person_wrote_it(
    out, quick_run, sources, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    _, _, err = infer(quick_run, sources["h5"], out=tmp_path / out, expect=2)
    assert str(tmp_path / out) in err.replace(".tmp", "") and ".tmp" not in err


def test_inference_repeats_the_validation_scores_of_training(quick_run, pcam_dir, tmp_path):
    scores = infer(quick_run, pcam_dir, "--split", "valid", out=tmp_path / "p.csv")[1]["scores"]
    summary = read_json(quick_run / "summary.json")
    assert (summary["val_auc"], summary["val_pr_auc"]) == pytest.approx(
        (scores["auc"], scores["pr_auc"]), abs=1e-6
    )
    assert summary["threshold"] == load_checkpoint(quick_run / "best.pt")["threshold"]
    half = sigmoid(summary["offset"])  # what a logit of 0 is called once it is calibrated
    scores = infer(
        quick_run, pcam_dir, "--split", "valid", "--threshold", half, out=tmp_path / "p.csv"
    )[1]["scores"]
    assert {name: summary[f"val_{name}"] for name in scores if name != "loss"} == pytest.approx(
        {name: value for name, value in scores.items() if name != "loss"}, abs=1e-6
    )


def test_a_real_process_writes_to_the_working_folder_by_default(quick_run, tmp_path):
    write_pcam(tmp_path / "d", 16, 16)
    result = run_script(
        "inference.py", "--ckpt", quick_run, "d", "--split", "train", cwd=tmp_path, check=0
    )
    rows = read_csv(tmp_path / "predictions.csv")
    assert (
        len(rows) == result.json["num"] == 16
        and rows[0]["source"].startswith("d/")
        and "label" in rows[0]
    )


def test_what_predicts_computes_as_training_does(quick_run, sources, pcam_dir, tmp_path):
    ckpt = shutil.copytree(quick_run, tmp_path / "run")
    predicting = {
        "inference": lambda: infer(ckpt, sources["h5"], out=tmp_path / "p.csv"),
        "audit": lambda: audit_model(
            ckpt, pcam_dir, "valid", tmp_path / "audit", [], "cpu", with_patches=False
        ),
        "calibration": lambda: recalibrate(ckpt, pcam_dir, [], "cpu"),
    }
    cudnn, products = torch.backends.cudnn, torch.backends.cuda.matmul
    for name, predict in predicting.items():
        # which, on a GPU, would round what float32 layers read
        cudnn.allow_tf32 = products.allow_tf32 = True
        cudnn.deterministic = False
        predict()
        assert not cudnn.allow_tf32 and not products.allow_tf32 and cudnn.deterministic, name
