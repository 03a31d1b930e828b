"""Hundreds of damaged files under one seed: inference.py never falls over, mixes up rows, or runs what is in a file."""

import io
import os
import random
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import draw_patches, write_pcam
from PIL import Image
from test_train import call_script

import inference
import report
from lib.checkpoint import KIND, SCHEMA, load_checkpoint, state_sha256, weights_sha256
from lib.logger import read_csv

SEED = 20_26
NUM_IMAGES, NUM_TARS, NUM_HDF5, NUM_CHECKPOINTS, NUM_CSV = 300, 60, 80, 80, 12


def mutate(data: bytes, rng: random.Random) -> bytes:
    """One way in which files are damaged: cut, flipped, overwritten, zeroed, doubled, spliced, its sizes blown up."""
    data, start = bytearray(data), rng.randrange(len(data))
    kind = rng.randrange(8)
    if kind == 0:
        return bytes(data[:start])
    if kind == 1:
        for _ in range(rng.randint(1, 20)):
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    elif kind == 2:
        data[start : start + 64] = rng.randbytes(64)
    elif kind == 3:
        data[start : start + 256] = bytes(256)
    elif kind == 4:
        data += data[start:]
    elif kind == 5:
        data[start:start] = rng.randbytes(rng.randint(1, 100))
    elif kind == 6:  # in the header, where sizes stand
        place = rng.randrange(min(len(data), 120))
        data[place : place + 4] = b"\xff\xff\xff\x7f"
    else:
        data[: min(16, start)] = b""
    return bytes(data)


def encode(patch: np.ndarray, suffix: str) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(patch).save(buffer, format={"jpg": "JPEG", "png": "PNG", "tif": "TIFF"}[suffix])
    return buffer.getvalue()


@pytest.fixture(scope="module")
def good(quick_run, tmp_path_factory):
    """An intact image and the probability that it has alone."""
    folder = tmp_path_factory.mktemp("good")
    (folder / "good.png").write_bytes(encode(draw_patches(1, 3)[0][0], "png"))
    row = predict(quick_run, folder / "good.png", out=folder / "p.csv")[1][0]
    return folder / "good.png", float(row["probability"])


def predict(ckpt, *inputs, out, split=()):
    """(exit code, rows or None) of a call; whatever else the contract asks of any call is asserted here."""
    out.unlink(missing_ok=True)
    code, result, err = call_script(inference.main, "--ckpt", ckpt, *inputs, *split, "--out", out)
    assert code in (0, 1, 2) and "Traceback" not in err
    if code == 2:
        assert not out.exists() and result["exit"] == 2 and "error: " in err
        return code, None
    rows = read_csv(out)
    failed = [row for row in rows if row.get("error")]
    assert result["num"] == len(rows) and result["num_failed"] == len(failed) and code == bool(failed)
    for row in rows:
        cells = [row[name] for name in ("probability", "prediction", "drift")]
        assert all(cell == "" for cell in cells) if row.get("error") else 0 <= float(row["probability"]) <= 1
    return code, rows


def test_damaged_images_are_rows_with_a_reason_and_harm_no_other(quick_run, good, tmp_path):
    rng, (path, prob) = random.Random(SEED), good
    patches = draw_patches(6, 4)[0]
    for start in range(0, NUM_IMAGES, 50):
        given = []
        for number in range(start, start + 50):
            suffix = rng.choice(("png", "jpg", "tif"))
            given.append(tmp_path / f"{number:03} a,'b'.{suffix}")
            given[-1].write_bytes(mutate(encode(patches[number % 6], suffix), rng))
            if number % 10 == 0:
                given.append(path)
        code, rows = predict(quick_run, *given, out=tmp_path / "p.csv")
        assert code == 1 and [row["source"] for row in rows] == [str(each) for each in given], "rows in the order of inputs"
        assert [float(row["probability"]) for row in rows if row["source"] == str(path)] == pytest.approx([prob] * 5, abs=1e-6)


def test_damaged_tars_give_whole_rows_or_one_sentence(quick_run, tmp_path):
    rng, patches = random.Random(SEED + 1), draw_patches(4, 5)[0]
    for number in range(NUM_TARS):
        packed, buffer = number % 3 == 0, io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w:gz" if packed else "w") as tar:
            for row, patch in enumerate(patches):
                data = encode(patch, "png")
                info = tarfile.TarInfo(f"{row}.png")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
        path = tmp_path / f"{number}.tar{'.gz' * packed}"
        path.write_bytes(mutate(buffer.getvalue(), rng))
        _, rows = predict(quick_run, path, out=tmp_path / "p.csv")
        names = [row["source"] for row in rows or ()]
        assert all(name.startswith(f"{path}/") for name in names)


def test_damaged_hdf5_is_refused_or_read_whole(quick_run, tmp_path):
    rng = random.Random(SEED + 2)
    whole = write_pcam(tmp_path / "whole", 16, 16)
    files = sorted(path.name for path in whole.glob("*valid*"))
    for number in range(NUM_HDF5):
        folder = shutil.copytree(whole, tmp_path / "pcam", dirs_exist_ok=True)
        name = files[number % len(files)]
        (folder / name).write_bytes(mutate((whole / name).read_bytes()[: 4096 if rng.random() < 0.5 else None], rng))
        for split in (("--split", "valid"), ()):
            given = folder if split else folder / "camelyonpatch_level_2_split_valid_x.h5"
            _, rows = predict(quick_run, given, out=tmp_path / "p.csv", split=split)
            assert rows is None or [int(row["index"]) for row in rows] == list(range(len(rows)))


class Code:
    def __init__(self, canary):
        self.canary = canary

    def __reduce__(self):
        return os.system, (f"touch {self.canary}",)


ODD = (
    None,
    "text",
    -1.0,
    float("nan"),
    float("inf"),
    1e300,
    [],
    {},
    [1.0],
    {"temperature": "1"},
    {"mean": [0.0] * 3},
    True,
    10**40,
)


def test_strange_checkpoints_are_refused_in_a_sentence_and_run_nothing(quick_run, good, tmp_path):
    rng, canary = random.Random(SEED + 3), tmp_path / "canary"
    data, fields = (quick_run / "best.pt").read_bytes(), load_checkpoint(quick_run / "best.pt")
    fields.pop("weights_sha256")
    for number in range(NUM_CHECKPOINTS):
        path = tmp_path / f"{number}.pt"
        if number % 2:
            path.write_bytes(mutate(data, rng))
        else:
            name, value = rng.choice(["threshold", "calibration", "reference", "preprocessing", "config"]), rng.choice(ODD)
            changed = dict(fields)
            if isinstance(fields[name], dict) and rng.random() < 0.8:
                changed[name] = fields[name] | {rng.choice(list(fields[name])): value}
            else:
                changed[name] = Code(canary) if rng.random() < 0.3 else value
            header = {"kind": KIND, "schema": SCHEMA, "weights_sha256": weights_sha256(fields["averaged"])}
            plain = {key: item for key, item in changed.items() if not isinstance(item, Code)}
            torch.save(header | changed | {"sha256": state_sha256(plain)}, path)
        code, rows = predict(path, good[0], out=tmp_path / "p.csv")
        assert code in (0, 2) and not canary.exists() and (rows is None or len(rows) == 1)


def test_damaged_tables_of_predictions_draw_no_page_or_a_whole_one(quick_run, pcam_dir, tmp_path, capsys):
    rng, table = random.Random(SEED + 4), tmp_path / "p.csv"
    assert predict(quick_run, pcam_dir, out=table, split=("--split", "valid"))[0] == 0
    data = table.read_bytes()
    for _ in range(NUM_CSV):
        (tmp_path / "q.csv").write_bytes(mutate(data, rng))
        page = Path(tmp_path / "page.html")
        page.unlink(missing_ok=True)
        code = report.main(["run", str(quick_run), "--predictions", str(tmp_path / "q.csv"), "--out", str(page)])
        told = capsys.readouterr()
        assert code in (0, 2) and page.exists() == (code == 0) and "Traceback" not in told.err
        assert code == 0 or "error: " in told.err
