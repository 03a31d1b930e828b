"""Damaged files and hostile checkpoints, under one seed, and what inference.py promises for every one
of them.

An exit code of the contract, one sentence and no traceback, a row an input in input order, good
patches judged as if they were alone, nothing carried out, and nothing written but the file that was
asked for.
"""

import contextlib
import csv
import faulthandler
import gc
import gzip
import io
import json
import os
import random
import re
import shutil
import sys
import tempfile
import time
import warnings
from pathlib import Path

import hostile
import numpy as np
import pytest
from conftest import run_script
from hostile import LABELS, NUM_PATCHES, PATCHES, damage, mangle_csv, write_h5
from PIL import Image
from test_inputs import encode, write_tar

import inference
import report
from lib.batches import select_rows
from lib.command import BadInput
from lib.config import load_config
from lib.device import choose_device
from lib.pcam import open_split, split_path
from lib.splitwriter import SplitWriter

pytestmark = pytest.mark.slow

SEED = 9
MOST_S, HANG_S = 5, 120  # processor time of a call; when all is given up
TOLD = re.compile(
    r"error: |not read: |warning: probabilities|WARNING: these patches|AUC |page |\S.*: [\d,]+"
    r" patches, "
)
STARTS = {
    "os.system",
    "os.exec",
    "os.fork",
    "os.forkpty",
    "os.posix_spawn",
    "os.spawn",
    "subprocess.Popen",
    "socket.connect",
}
CHANGES = {
    "os.rename",
    "os.remove",
    "os.mkdir",
    "os.rmdir",
    "os.link",
    "os.symlink",
    "os.truncate",
    "os.chmod",
    "os.chown",
}
ODD_NAMES = (
    "new\nline",
    "re\rturn",
    'quo"te, comma',
    "=cmd()",
    "tab\t",
    " ",
    "\x1b[2J",
    "-o",
    "ü 病",
    "\udcff\udcfe",
    "a" * 200,
)


class Watch:
    """What Python does in a call, in any thread: programs that it starts, and changes outside of a
    folder.
    """

    def __init__(self):
        self.folder, self.seen = None, []
        sys.addaudithook(self.hear)  # there is no way to take one back

    def hear(self, event, arguments):
        if self.folder is None:
            return
        writes = (
            event == "open"
            and isinstance(arguments[2], int)
            and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        )
        if event in STARTS or (
            (writes or event in CHANGES) and Path(os.fsdecode(arguments[0])).parent != self.folder
        ):
            self.seen.append((event, arguments[0]))


watch = Watch()


class Out:
    """A folder for predictions.csv, and calls of a script's main that are held to what all of them
    promise.
    """

    def __init__(self, folder: Path):
        self.folder, self.path = folder, folder / "predictions.csv"
        folder.mkdir()
        gc.collect()  # what earlier tests left open warns here, and not in a call

    def call(self, main, *arguments) -> tuple[int, dict, str]:
        """(exit code, JSON, stderr) of a call in this process."""
        out, err, began_s = io.StringIO(), io.StringIO(), time.process_time()
        with (
            tempfile.TemporaryFile() as spilt,
            warnings.catch_warnings(record=True) as remarks,
            contextlib.ExitStack() as stack,
        ):
            warnings.simplefilter("always")
            stderr = os.dup(2)
            stack.callback(os.close, stderr)
            stack.callback(os.dup2, stderr, 2)
            os.dup2(spilt.fileno(), 2)  # here goes what a library in C prints
            faulthandler.dump_traceback_later(HANG_S, exit=True, file=stderr)
            stack.callback(faulthandler.cancel_dump_traceback_later)
            stack.callback(setattr, watch, "folder", None)
            watch.folder, watch.seen = self.folder, []
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
                code = main([str(argument) for argument in arguments])
            # lib.inputs has those of Pillow ignored, which `always` overrides
            assert all("PIL" in remark.filename for remark in remarks), [str(r) for r in remarks][
                :3
            ]
        assert not watch.seen
        assert time.process_time() - began_s < MOST_S
        result, err = json.loads(out.getvalue().splitlines()[-1]), err.getvalue()
        assert code in (0, 1, 2) and all(map(TOLD.match, err.splitlines())), err
        if code == 2:
            assert (
                result == {"error": err[len("error: ") : -1], "exit": 2}
                and err.count("\n") == 1 < len(err) < 5000
            ), err
        return code, result, err

    def infer(self, ckpt, *inputs, expect=None) -> tuple[int, list[dict], str]:
        """(exit code, rows, stderr) of inference.py; what was there before stays when it ends with
        2.
        """
        self.path.write_text("from before")
        code, result, err = self.call(inference.main, "--ckpt", ckpt, *inputs, "--out", self.path)
        assert expect in (None, code), err
        assert os.listdir(self.folder) == [self.path.name]
        if code == 2:
            assert self.path.read_text() == "from before"
            return code, [], err
        with open(self.path, newline="", encoding="utf-8", errors="surrogateescape") as file:
            rows = list(csv.DictReader(file, strict=True))
        failed = [row for row in rows if row.get("error")]
        assert result["num"] == len(rows) > len(failed) == result["num_failed"] and code == bool(
            failed
        )
        for row in rows:
            told = {name for name, cell in row.items() if cell} - {"label", "unlike"}
            if row.get("error"):
                assert told == {"source", "index", "error"} and not row["unlike"], (
                    "nothing is said of what was not read"
                )
            else:
                assert (
                    told == {"source", "index", "probability", "prediction", "drift"}
                    and float(row["drift"]) >= 0
                )
                assert 0 <= float(row["probability"]) <= 1
                assert row["prediction"] == str(
                    int(float(row["probability"]) >= result["threshold"])
                )
        return code, rows, err


@pytest.fixture
def out(tmp_path) -> Out:
    choose_device()  # asks nvidia-smi, once a process
    return Out(tmp_path / "out")


def draws(kind: str, num: int):
    """(number, source of randomness) for so many files of a kind."""
    return ((number, random.Random(f"{SEED} {kind} {number}")) for number in range(num))


@pytest.fixture(scope="module")
def good(quick_run, tmp_path_factory) -> dict[str, tuple[bytes, float]]:
    """{name: (encoded patch, the probability that it has alone)} of every kind of image that is
    read.
    """
    kinds = {
        "rgb.png": ("PNG", "RGB"),
        "grey.png": ("PNG", "L"),
        "alpha.png": ("PNG", "RGBA"),
        "palette.png": ("PNG", "P"),
    }
    kinds |= {"a.jpg": ("JPEG", "RGB"), "grey.jpeg": ("JPEG", "L"), "raw.tif": ("TIFF", "RGB")}
    made = {
        name: encode(PATCHES[number], *kind) for number, (name, kind) in enumerate(kinds.items())
    }
    made["packed.tiff"] = hostile.save_image("TIFF", compression="tiff_lzw")
    folder = tmp_path_factory.mktemp("good")
    out, probs = Out(folder / "out"), []
    inference.main(["--ckpt", str(quick_run), "nothing"])  # loads what is loaded late
    for name, data in made.items():
        (folder / name).write_bytes(data)
        probs.append(float(out.infer(quick_run, folder / name, expect=0)[1][0]["probability"]))
    assert len(set(probs)) == len(made), "or a wrong order would go unnoticed"
    return {name: (data, prob) for (name, data), prob in zip(made.items(), probs, strict=True)}


def test_damaged_images_among_good_ones_keep_their_rows(quick_run, good, out, tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    probs, whole = {}, [data for data, _ in good.values()]
    for number, rng in draws("image", 100):
        name, (data, prob) = list(good.items())[number % len(good)]
        path = folder / f"{number:03}{ODD_NAMES[number % len(ODD_NAMES)]}{Path(name).suffix}"
        is_whole = number % 3 == 0
        path.write_bytes(data if is_whole else damage(data, rng, rng.choice(whole), head=300))
        probs[str(path)] = prob if is_whole else None
    rows = out.infer(quick_run, folder, expect=1)[1]
    assert [row["source"] for row in rows] == sorted(probs)
    for row in rows:
        prob = probs[row["source"]]
        assert prob is None or float(row["probability"]) == pytest.approx(prob, abs=1e-6)
    assert sum(bool(row["error"]) for row in rows) > 20


def test_damaged_tars(quick_run, good, out, tmp_path):
    data = [good[name][0] for name in ("rgb.png", "palette.png")]
    members = [(f"{number}.png", data[number % 2]) for number in range(6)]
    tar = write_tar(tmp_path / "whole.tar", members).read_bytes()
    codes = set()
    for number, rng in draws("tar", 40):
        whole, suffix = rng.choice([(tar, ".tar"), (gzip.compress(tar, mtime=0), ".tgz")])
        path = tmp_path / f"{number}{suffix}"
        path.write_bytes(damage(whole, rng, data[0], head=rng.choice((0, 520))))
        code, rows, err = out.infer(quick_run, path)
        assert code != 2 or str(path) in err
        assert all(row["source"].startswith(f"{path}/") for row in rows)
        codes.add(code)
    assert {0, 2} <= codes


def test_damaged_hdf5(quick_run, out, tmp_path):
    packed = {"chunks": (4, 96, 96, 3), "compression": "gzip", "shuffle": True}
    layouts = [{}, packed | {"libver": "latest"}, {"data": PATCHES.astype(np.float32)}]
    kinds = [write_h5(tmp_path / "k.h5", **layout) for layout in layouts]
    codes = []
    for number, rng in draws("HDF5", 60):
        path = tmp_path / f"{number}.h5"
        path.write_bytes(damage(kinds[number % 3], rng, kinds[0], head=rng.choice((0, 3000))))
        code, rows, err = out.infer(quick_run, path)
        assert code != 2 or str(path) in err
        assert [int(row["index"]) for row in rows] == list(range(len(rows)))
        codes.append(code)
    assert 5 < codes.count(2) < 55


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_what_may_not_be_read(quick_run, good, out, tmp_path):
    (tmp_path / "in" / "sub").mkdir(parents=True)
    for name in ("a.png", "b.png", "sub/c.png"):
        (tmp_path / "in" / name).write_bytes(good["rgb.png"][0])
    (tmp_path / "in" / "b.png").chmod(0)
    assert [bool(row["error"]) for row in out.infer(quick_run, tmp_path / "in", expect=1)[1]] == [
        False,
        True,
        False,
    ]
    (tmp_path / "in" / "sub").chmod(0)
    assert "sub" in out.infer(quick_run, tmp_path / "in", expect=2)[2], "not left out in silence"


@pytest.fixture(scope="module")
def small_pcam(tmp_path_factory) -> Path:
    """A test split with labels and slides."""
    folder = tmp_path_factory.mktemp("small pcam")
    with SplitWriter(folder, "test", NUM_PATCHES) as writer:
        writer.add(
            PATCHES,
            LABELS,
            [(row, row, label, label, f"slide {row % 3}") for row, label in enumerate(LABELS)],
        )
    return folder


@pytest.mark.parametrize("part", ["y", "meta"])
def test_damaged_labels_and_slides(quick_run, small_pcam, out, tmp_path, part):
    whole = out.infer(quick_run, small_pcam, "--split", "test", expect=0)[1]
    folder, codes = shutil.copytree(small_pcam, tmp_path / "data"), []
    path = split_path(folder, "test", part)
    data = path.read_bytes()
    for _, rng in draws(part, 40):
        path.write_bytes(
            damage(data, rng, b"\x89HDF" * 20) if part == "y" else mangle_csv(data.decode(), rng)
        )
        code, rows, err = out.infer(quick_run, folder, "--split", "test")
        codes.append(code)
        for row, intact in zip(rows, whole, strict=code != 2):
            assert row["label"] in ("0", "1") and row["probability"] == intact["probability"]
    assert {0, 2} <= set(codes)


def test_damaged_quarantines(small_pcam, tmp_path):
    reasons = ["black" if row % 2 else "label" for row in range(NUM_PATCHES)]
    text = "split,index,reason,score\n" + "".join(
        f"test,{row},{reason},0.5\n" for row, reason in enumerate(reasons)
    )
    split, path, found = open_split(small_pcam, "test"), tmp_path / "quarantine.csv", []
    for _, rng in draws("quarantine", 60):
        path.write_bytes(mangle_csv(text, rng))
        try:
            rows = select_rows(split, load_config(overrides=[f"quarantine={path}"]))
        except BadInput as refusal:
            assert "\n" not in str(refusal) and len(str(refusal)) < 500
            found.append(0)
        else:
            assert (
                set(rows.left_out) <= {"black"}
                and len(rows) + rows.left_out.get("black", 0) == NUM_PATCHES
            )
            found.append(len(rows))
    assert 0 in found and NUM_PATCHES // 2 in found


def test_damaged_predictions_for_a_page(quick_run, small_pcam, out, tmp_path):
    source = out.infer(quick_run, small_pcam, "--split", "test", expect=0)[1][0]["source"]
    text = out.path.read_text()
    tables = [text.encode(), *(mangle_csv(text, rng) for _, rng in draws("predictions", 5))]
    (tmp_path / "black.png").write_bytes(b"no image")
    others = (
        "",
        ".",
        "/",
        small_pcam,
        tmp_path / "black.png",
        "/dev/zero",
        "nothing.h5",
    )
    tables += [text.replace(source, str(other)).encode() for other in others]
    given, codes = ["--predictions", tmp_path / "p.csv", "--out", out.folder / "p.html"], []
    # matplotlib makes folders at its first import
    report.main(["run", str(quick_run), "--out", str(tmp_path / "first.html")])
    for data in tables:
        (tmp_path / "p.csv").write_bytes(data)
        codes.append(out.call(report.main, "run", quick_run, *given)[0])
    assert set(codes[6:]) == {2} and set(codes) == {0, 2}


def test_damaged_checkpoints(quick_run, good, out, tmp_path):
    image, path = tmp_path / "a.png", tmp_path / "c.pt"
    image.write_bytes(good["rgb.png"][0])
    whole = out.infer(quick_run, image, expect=0)[1]
    data, codes = (quick_run / "best.pt").read_bytes(), []
    for _, rng in draws("checkpoint", 60):
        path.write_bytes(damage(data, rng, b"PK\3\4" * 999, head=rng.choice((0, 2000))))
        code, rows, _ = out.infer(path, image)
        codes.append(code)
        assert code == 2 or rows == whole, "a change that passes the checksum changes nothing"
    assert {0, 2} == set(codes)


def test_a_process_says_what_is_wrong_in_its_own_words(quick_run, good, tmp_path):
    transparent = io.BytesIO()
    Image.fromarray(PATCHES[4]).convert("P").save(
        transparent, "PNG", transparency=bytes(range(256))
    )
    files = {f"{kind}.png": hostile.save_image(kind) for kind in ("BMP", "GIF", "EPS", "WEBP")}
    files |= {"good.png": good["rgb.png"][0], "transparent.png": transparent.getvalue()}
    (tmp_path / "in").mkdir()
    for name, data in files.items():
        (tmp_path / "in" / name).write_bytes(data)
    result = run_script("inference.py", "--ckpt", quick_run, "in", cwd=tmp_path, check=1)
    with open(tmp_path / "predictions.csv", newline="") as file:
        rows = {row["source"]: row for row in csv.DictReader(file)}
    assert list(rows) == sorted(f"in/{name}" for name in files)
    read = [name for name, row in rows.items() if not row["error"]]
    assert read == ["in/BMP.png", "in/WEBP.png", "in/good.png", "in/transparent.png"]
    assert float(rows["in/good.png"]["probability"]) == pytest.approx(good["rgb.png"][1], abs=1e-6)
    assert all(map(TOLD.match, result.stderr.splitlines())), result.stderr
    (tmp_path / "evil.pt").write_bytes(
        hostile.archived({"a": hostile.Code(os.system, f"touch {tmp_path}/canary")})
    )
    result = run_script(
        "inference.py", "--ckpt", "evil.pt", "in", "--out", "other.csv", cwd=tmp_path, check=2
    )
    assert result.stderr.count("\n") == 1 and "holds code" in result.stderr
    assert sorted(os.listdir(tmp_path)) == ["evil.pt", "in", "predictions.csv"]
