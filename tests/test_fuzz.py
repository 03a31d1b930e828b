"""Hundreds of damaged and hostile files, under one seed, and what inference.py promises for every
one of them.

An exit code of the contract, one sentence and no traceback, a row an input in input order, good
patches judged as if they were alone, nothing carried out, and nothing written but the file that was
asked for.
"""

import contextlib
import csv
import faulthandler
import gzip
import io
import itertools
import json
import os
import random
import re
import socket
import struct
import subprocess
import sys
import tempfile
import time
import warnings
import zlib
from pathlib import Path

import h5py
import hostile
import numpy as np
import pytest
from conftest import REPOSITORY, run_script
from hostile import LABELS, NUM_PATCHES, PATCHES, damage, mangle_csv, write_h5, zeros_packed
from PIL import Image
from test_inputs import encode, write_tar

import inference
import report
from lib.batches import select_rows
from lib.command import BadInput
from lib.config import load_config
from lib.pcam import SplitWriter, open_split, split_path

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
            spilt.seek(0)
            assert not spilt.read() and not remarks, [str(remark.message) for remark in remarks]
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
    return Out(tmp_path / "out")


@pytest.fixture(scope="module")
def counted() -> dict[str, int]:
    """How many files of each kind were handed over so far."""
    return {"image": 0, "tar": 0, "HDF5": 0, "CSV": 0, "checkpoint": 0}


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


@pytest.fixture(scope="module")
def pictures(good, counted) -> dict[str, bytes]:
    """{name: bytes} of good, damaged and hostile images in a random order, which is that of their
    names.
    """
    made = [(Path(name).suffix, data) for name, (data, _) in good.items() for _ in range(6)]
    whole = [data for data, _ in good.values()]
    for number, rng in draws("image", 200):
        suffix = (
            Path(list(good)[number % len(good)]).suffix
            if rng.random() < 0.9
            else rng.choice((".PNG", ".jpeg", ".tif"))
        )
        made.append(
            (
                suffix,
                damage(
                    whole[number % len(good)], rng, rng.choice(whole), head=rng.choice((0, 0, 300))
                ),
            )
        )
    made += hostile.hostile_images().items()
    counted["image"] += len(made) - 6 * len(good)
    random.Random(SEED).shuffle(made)
    odd = itertools.cycle([*ODD_NAMES, *[""] * 30])
    return {f"{number:03}{next(odd)}{end}": data for number, (end, data) in enumerate(made)}


def verdict(row: dict, name) -> tuple:
    """What a row says of an image, wherever that lies: the probability, and the reason without the
    name.
    """
    return row["probability"] and round(float(row["probability"]), 5), (
        row.get("error") or ""
    ).replace(str(name), "")


def test_damaged_images_among_good_ones(quick_run, good, pictures, out, tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    files = [folder / name for name in pictures]
    for path, data in zip(files, pictures.values(), strict=True):
        path.write_bytes(data)
    rows = out.infer(quick_run, folder, expect=1)[1]
    assert [row["source"] for row in rows] == [str(path) for path in files]
    whole, refused = dict(good.values()), set(hostile.hostile_images().values())
    for row, data in zip(rows, pictures.values(), strict=True):
        assert data not in whole or float(row["probability"]) == pytest.approx(
            whole[data], abs=1e-6
        ), row["source"]
        assert data not in refused or row["error"], (
            f"{row['source']} is none of the images that are read"
        )
    found = {path: verdict(row, path) for path, row in zip(files, rows, strict=True)}
    assert 0.3 < np.mean([bool(error) for _, error in found.values()]) < 0.8

    shuffled = random.Random(SEED).sample(files, len(files))
    rows = out.infer(quick_run, *shuffled, expect=1)[1]
    assert [row["source"] for row in rows] == [str(path) for path in shuffled]
    assert [verdict(row, row["source"]) for row in rows] == [found[path] for path in shuffled]

    tar = write_tar(
        tmp_path / "pictures.tar", [(path.name, path.read_bytes()) for path in shuffled]
    )
    rows = out.infer(quick_run, tar, expect=1)[1]
    assert [row["source"] for row in rows] == [f"{tar}/{path.name}" for path in shuffled]
    assert [verdict(row, row["source"]) for row in rows] == [found[path] for path in shuffled]

    for path in shuffled[:20]:
        rows = out.infer(quick_run, path, expect=2 if found[path][1] else 0)[1]
        assert [verdict(row, path) for row in rows] == ([] if found[path][1] else [found[path]])


def test_what_is_named_as_an_image_and_is_no_file(quick_run, good, out, counted, tmp_path):
    folder = tmp_path / "odd"
    (folder / "b.png" / "deep.png").mkdir(parents=True)
    (folder / "a.png").write_bytes(good["rgb.png"][0])
    (folder / "b.png" / "deep.png" / "c.tif").write_bytes(good["raw.tif"][0])
    os.mkfifo(folder / "d.png")
    (folder / "e.png").symlink_to(folder / "e.png")
    (folder / "f.png").symlink_to(tmp_path / "nothing.png")
    (folder / "g.png").symlink_to(folder, target_is_directory=True)
    (folder / "h.png").symlink_to(folder / "a.png")
    (folder / "j.png").symlink_to("/dev/zero")
    with contextlib.closing(socket.socket(socket.AF_UNIX)) as listener, contextlib.chdir(folder):
        listener.bind("i.png")
    names = ["a.png", "b.png/deep.png/c.tif", "d.png", "e.png", "f.png", "h.png", "i.png", "j.png"]
    rows = out.infer(quick_run, folder, expect=1)[1]
    assert [row["source"] for row in rows] == [str(folder / name) for name in names]
    assert [name for name, row in zip(names, rows, strict=True) if not row["error"]] == [
        *names[:2],
        "h.png",
    ]
    codes = {
        "d.png": 2,
        "e.png": 2,
        "f.png": 2,
        "i.png": 2,
        "j.png": 2,
        "h.png": 0,
        "b.png": 0,
        "n" * 300 + ".png": 2,
    }
    for name, code in codes.items():
        out.infer(quick_run, folder / name, expect=code)
    counted["image"] += len(codes)


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


def test_hostile_and_damaged_tars(quick_run, good, out, counted, tmp_path):
    (png, prob), (other, other_prob) = good["rgb.png"], good["palette.png"]
    for name, (data, code) in hostile.hostile_tars(png).items():
        path = tmp_path / f"{counted['tar']}{'.tar.gz' if name.endswith('.gz') else '.tar'}"
        path.write_bytes(data)
        found, rows, err = out.infer(quick_run, path)
        assert found == code, (name, err, rows)
        for row in rows:
            assert row["source"].startswith(f"{path}/")
            assert row.get("error") or float(row["probability"]) == pytest.approx(prob, abs=1e-6), (
                name
            )
        counted["tar"] += 1
    images = {
        f"{number}.png": (png, prob) if number % 2 else (other, other_prob) for number in range(6)
    }
    whole = write_tar(
        tmp_path / "whole.tar", [(name, data) for name, (data, _) in images.items()]
    ).read_bytes()
    codes = []
    for number, rng in draws("tar", 50):
        packed = rng.random() < 0.4
        path = (
            tmp_path
            / f"damaged {number}{'.tgz' if packed else rng.choice(('.tar', '.tar.gz', '.TAR.XZ'))}"
        )
        path.write_bytes(
            damage(
                gzip.compress(whole, mtime=0) if packed else whole,
                rng,
                png,
                head=rng.choice((0, 520)),
            )
        )
        code, rows, _ = out.infer(quick_run, path)
        codes.append(code)
        names = [row["source"][len(str(path)) + 1 :] for row in rows]
        assert names == sorted(names, key=list(images).index) and (code or names == list(images)), (
            "all, in the order of the tar"
        )
        # which both a header and a PNG have a checksum for
        for name, row in zip(names, rows, strict=True):
            assert row.get("error") or float(row["probability"]) == pytest.approx(
                images[name][1], abs=1e-6
            )
    counted["tar"] += len(codes)
    assert {0, 1, 2} == set(codes)


def test_hostile_and_damaged_hdf5(quick_run, out, counted, tmp_path):
    write_h5(tmp_path / "whole.h5")
    probs = [
        float(row["probability"])
        for row in out.infer(quick_run, tmp_path / "whole.h5", expect=0)[1]
    ]
    (tmp_path / "by hand").mkdir()
    for name, (make, code) in hostile.hostile_h5(tmp_path / "by hand").items():
        path = tmp_path / f"{name}.h5"
        with h5py.File(path, "w") as file:
            make(file)
        found, rows, err = out.infer(quick_run, path)
        assert found == code and (code == 0 or str(path) in err), (name, err)
        assert name == "odd float" or [float(row["probability"]) for row in rows] == pytest.approx(
            probs[: len(rows)], abs=1e-6
        )
        counted["HDF5"] += 1
    kinds = [
        write_h5(tmp_path / "k.h5"),
        write_h5(
            tmp_path / "k.h5",
            libver="latest",
            chunks=(1, 96, 96, 3),
            compression="lzf",
            fletcher32=True,
        ),
        write_h5(tmp_path / "k.h5", chunks=(4, 96, 96, 3), compression="gzip", shuffle=True),
        write_h5(tmp_path / "k.h5", data=PATCHES.astype(np.float32)),
    ]
    dims, codes = struct.pack("<QQQQ", NUM_PATCHES, 96, 96, 3), []
    for number, rng in draws("HDF5", 90):
        data = kinds[number % 4]
        if number < 12:
            sides = rng.choice([(96, 96, 3), (96, 96, 3), (2**40, 96, 3)])
            data = data.replace(
                dims,
                struct.pack("<QQQQ", rng.choice((0, 7, 9, 1000, 2**31, 2**62, 2**64 - 1)), *sides),
            )
        else:
            data = damage(data, rng, kinds[0], head=rng.choice((0, 3000, 3000)))
        path = tmp_path / f"{number}{rng.choice(('.h5', '.hdf5', '.H5'))}"
        path.write_bytes(data)
        code, rows, err = out.infer(quick_run, path)
        codes.append(code)
        assert code in (0, 1, 2) and (code == 0 or str(path) in err)
        assert (code == 1) == any(row.get("error") for row in rows), (
            "floats that are no intensities any more"
        )
        assert [(row["source"], int(row["index"])) for row in rows] == [
            (str(path), index) for index in range(len(rows))
        ]
        if number % 4 == 1:  # checksums find every change
            assert [float(row["probability"]) for row in rows] in (
                [],
                pytest.approx(probs, abs=1e-6),
            )
        path.unlink()
    counted["HDF5"] += len(codes)
    assert 10 < codes.count(0) < 60


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


def test_damaged_labels_and_slides(quick_run, small_pcam, out, counted, tmp_path):
    whole = out.infer(quick_run, small_pcam, "--split", "test", expect=0)[1]
    labels, slides = (split_path(small_pcam, "test", part) for part in ("y", "meta"))
    makers = hostile.hostile_labels()
    files = [("y", make) for make in makers.values()] + [
        ("meta", makers["pipe"]),
        ("meta", makers["folder"]),
    ]
    files += [("y", damage(labels.read_bytes(), rng, b"\x89HDF" * 20)) for _, rng in draws("y", 40)]
    files += [("meta", mangle_csv(slides.read_text(), rng)) for _, rng in draws("meta", 40)]
    codes = {"y": [], "meta": []}
    for number, (part, made) in enumerate(files):
        (tmp_path / f"{number}").mkdir()
        for other in {"x", "y", "meta"} - {part}:
            split_path(tmp_path / f"{number}", "test", other).symlink_to(
                split_path(small_pcam, "test", other)
            )
        path = split_path(tmp_path / f"{number}", "test", part)
        path.write_bytes(made) if isinstance(made, bytes) else made(path)
        code, rows, _ = out.infer(quick_run, path.parent, "--split", "test")
        codes[part].append(code)
        for row, known in zip(rows, whole, strict=code != 2):
            assert row["label"] in ("0", "1") and (part == "y" or row["label"] == known["label"])
            assert row | {"source": "", "label": ""} == known | {"source": "", "label": ""}
    assert (
        codes["y"][: len(makers)] == [2] * len(makers)
        and codes["meta"][:2] == [2, 2]
        and 0 in codes["meta"]
    )
    counted["HDF5"], counted["CSV"] = (
        counted["HDF5"] + len(codes["y"]),
        counted["CSV"] + len(codes["meta"]),
    )


def test_damaged_quarantines(small_pcam, counted, tmp_path):
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
    counted["CSV"] += len(found)


def test_damaged_predictions_for_a_page(quick_run, small_pcam, out, counted, tmp_path):
    source = out.infer(quick_run, small_pcam, "--split", "test", expect=0)[1][0]["source"]
    text = out.path.read_text()
    tables = [mangle_csv(text, rng) for _, rng in draws("predictions", 20)]
    (tmp_path / "black.png").write_bytes(b"no image")
    os.mkfifo(tmp_path / "pipe.png")
    others = (
        "",
        ".",
        "/",
        small_pcam,
        tmp_path / "black.png",
        tmp_path / "pipe.png",
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
    assert set(codes[20:]) == {2} and set(codes) == {0, 2}
    counted["CSV"] += len(codes)


def test_damaged_checkpoints(quick_run, good, out, counted, tmp_path):
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
    counted["checkpoint"] += len(codes)


def test_there_are_more_than_five_hundred(counted):
    if not all(counted.values()):
        pytest.skip("the tests above did not all run in this process")
    assert min(counted.values()) > 50 and sum(counted.values()) > 500, counted


BOUNDED = """if True:
    import json, resource, sys
    import inference, lib.inputs, lib.predict, lib.reference
    taken_bytes = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (taken_bytes + int(sys.argv[1]),) * 2)
    for line in sys.stdin:
        code = inference.main(json.loads(line))
        print(json.dumps([code, sum(resource.getrusage(resource.RUSAGE_SELF)[:2])]), flush=True)
"""


def test_what_asks_for_gigabytes_is_refused_within_a_bound(quick_run, good, tmp_path):
    headroom_bytes, png = 400 << 20, good["rgb.png"][0]
    start = hostile.tar_member("a.png", png)

    def packed_tar(header: bytes, num_mb: int) -> bytes:
        packer = zlib.compressobj(9, wbits=-15)
        return (
            b"\x1f\x8b\x08"
            + bytes(7)
            + packer.compress(start + header)
            + packer.flush(zlib.Z_FULL_FLUSH)
            + zeros_packed(num_mb)
        )

    with h5py.File(tmp_path / "chunk.h5", "w") as file:
        x = file.create_dataset(
            "x", (3, 96, 96, 3), np.uint8, chunks=(1, 96, 96, 3), compression="gzip"
        )
        x.id.write_direct_chunk((0, 0, 0, 0), b"x\x9c" + zeros_packed(900))
    files = {
        name: data
        for name, data in hostile.hostile_images().items()
        if name.startswith(("t", "p", "giga", "huge", "slide"))
    }
    codes = dict.fromkeys(files, 1) | {"chunk.h5": 2}
    files |= {
        "name.tar.gz": packed_tar(hostile.tar_header("b", 800 << 20, b"L"), 800),
        "member.tar.gz": packed_tar(hostile.tar_header("b.png", 600 << 20), 600),
        "size.tar": start + hostile.tar_header("b.png", 2**40) + png,
    }
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    (tmp_path / "good.png").write_bytes(png)
    codes = {name: codes.get(name, 2) for name in ["chunk.h5", *files]}
    calls = []
    for name in codes:
        calls.append(["--ckpt", str(quick_run), name, "good.png", "--out", "p.csv"])
    result = subprocess.run(
        [sys.executable, "-c", BOUNDED, str(headroom_bytes)],
        input="".join(json.dumps(call) + "\n" for call in calls),
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)},
        timeout=300,
    )
    assert result.returncode == 0 and all(map(TOLD.match, result.stderr.splitlines())), (
        result.stderr[-3000:]
    )
    found = [json.loads(line) for line in result.stdout.splitlines() if line.startswith("[")]
    assert dict(zip(codes, (code for code, _ in found), strict=True)) == codes
    spent_s = np.diff([seconds for _, seconds in found], prepend=found[0][1] - 1)
    assert spent_s.max() < MOST_S, dict(zip(codes, spent_s.tolist(), strict=True))


def test_a_process_says_what_is_wrong_in_its_own_words(quick_run, good, tmp_path):
    transparent = io.BytesIO()
    Image.fromarray(PATCHES[4]).convert("P").save(
        transparent, "PNG", transparency=bytes(range(256))
    )
    files = hostile.hostile_images() | {
        "good.png": good["rgb.png"][0],
        "transparent.png": transparent.getvalue(),
    }
    (tmp_path / "in").mkdir()
    for name, data in files.items():
        (tmp_path / "in" / name).write_bytes(data)
    result = run_script("inference.py", "--ckpt", quick_run, "in", cwd=tmp_path, check=1)
    with open(tmp_path / "predictions.csv", newline="") as file:
        rows = {row["source"]: row for row in csv.DictReader(file)}
    assert list(rows) == sorted(f"in/{name}" for name in files)
    assert [name for name, row in rows.items() if not row["error"]] == [
        "in/good.png",
        "in/transparent.png",
    ]
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
