"""prepare.py as a user runs it: exit codes, one sentence for bad input, one JSON object last, and
the real sample.
"""

import io
import json
import os
import re
import subprocess
import sys
import tarfile

import h5py
import numpy as np
import pytest
from conftest import REAL_SAMPLE, REPOSITORY, draw_patches, real_sample, write_pcam
from PIL import Image

import prepare
from lib.fingerprint import FINGERPRINT_FILE, fingerprint
from lib.pcam import open_split, split_path
from lib.splitwriter import write_meta


@pytest.fixture
def run(capsys):
    """Run prepare.py in this process; gives the JSON object and stderr."""

    def run(*arguments, check):
        assert prepare.main([str(argument) for argument in arguments]) == check
        output = capsys.readouterr()
        return json.loads(output.out.splitlines()[-1]), output.err

    return run


def test_help_loads_no_array_library():
    command = [sys.executable, "-X", "importtime", REPOSITORY / "prepare.py", "import", "--help"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0 and "usage: prepare.py import" in result.stdout
    assert not re.search(r"\| +(numpy|h5py|torch|PIL)\b", result.stderr)


@real_sample
def test_the_real_sample_comes_in_official_order_with_pillows_pixels(tmp_path, run):
    """torchvision reads what was written, through a link."""
    from torchvision.datasets import PCAM

    (tmp_path / "in").mkdir()
    for name in ("valid.tar", "unlabelled-tif"):
        (tmp_path / "in" / name).symlink_to(REAL_SAMPLE / name)
    result, stderr = run("import", tmp_path / "in", "--to", tmp_path / "sample", check=0)
    (tmp_path / "pcam").symlink_to("sample")
    with tarfile.open(REAL_SAMPLE / "valid.tar") as tar:
        files = {member.name: tar.extractfile(member).read() for member in tar if member.isfile()}
    names = sorted(files, key=lambda name: int(re.search(r"patch(\d+)", name)[1]))
    split, dataset = open_split(tmp_path / "sample", "valid"), PCAM(tmp_path, split="val")
    assert result["splits"]["valid"]["patches"] == len(split) == len(dataset) == len(names)
    assert result["skipped"] == {"no label": 18} and "18 file(s), no label" in stderr
    assert split.labels.tolist() == [int(name.split("/")[1]) for name in names]
    for row in range(0, len(names), 13):
        patch = split.images.mapped[row]
        assert np.array_equal(patch, Image.open(io.BytesIO(files[names[row]]))), names[row]
        image, label = dataset[row]
        assert np.array_equal(image, patch) and label == split.labels[row]


def test_what_import_prints_is_what_it_wrote_and_the_fingerprint_is_there(tmp_path, run):
    source, target = tmp_path / "in", tmp_path / "deep" / "out"
    for number, patch in enumerate(draw_patches(4, 0)[0]):
        path = source / ("train" if number < 3 else "valid") / "1" / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(patch).save(path)
    result, stderr = run("import", source, "--to", target, check=0)
    assert result["splits"]["train"] | {"seconds": 0, "bytes": 0} == {
        "patches": 3, "negative": 0, "positive": 3, "converted": {}, "seconds": 0, "bytes": 0,
        "layout": "contiguous uint8", "official_rows": False, "slides": None, "slide_names": "unknown",
    }  # fmt: skip
    assert re.search(r"train +3 +0 +3 ", stderr) and (target / FINGERPRINT_FILE).exists()
    assert result["fingerprint"] == fingerprint(target)


def test_verify_exits_0_for_fine_1_for_a_finding_and_2_for_what_is_not_whole(tmp_path, run):
    folder = write_pcam(tmp_path, 20, 10)
    assert run("verify", folder, check=0)[0]["splits"]["valid"]["patches"] == 10
    assert len(run("verify", folder, "--md5", check=1)[0]["findings"]) == 4
    rows = [(0, 0, "True", "True", "camelyon16_test_001")] * 10
    write_meta(split_path(folder, "valid", "meta"), rows)
    assert "exchanged" in run("verify", folder, check=1)[1]
    os.truncate(split_path(folder, "train", "x"), 200_000)
    assert "train_x.h5" in run("verify", folder, check=2)[0]["error"]


def test_repack_exits_1_and_writes_nothing_until_the_loss_is_allowed(tmp_path, run):
    folder, target = write_pcam(tmp_path / "a", 20, 10), tmp_path / "b"
    images = open_split(folder, "train").images.mapped.astype(np.float32)
    images[3, 5, 5] = np.nan
    with h5py.File(split_path(folder, "train", "x"), "w") as file:
        file["x"] = images
    assert "repack makes it" in run("verify", folder, check=0)[1]
    result, stderr = run("repack", folder, "--to", target, check=1)
    assert re.search("train +not_finite +3 +1\n", stderr)
    assert not result["written"] and not target.exists()
    result, _ = run("repack", folder, "--to", target, "--allow-loss", check=0)
    assert result["splits"]["train"]["losses"] == {"not_finite": {"values": 3, "patches": 1}}


def test_synthetic_writes_a_folder_that_verifies(tmp_path, run):
    arguments = ["--train", 40, "--valid", 20, "--test", 0, "--plant", "nan=0.1", "--float32"]
    result, _ = run("synthetic", "--to", tmp_path / "a", *arguments, check=0)
    assert result["num_train"] == 40 and result["planted"]["nan"] > 0
    splits = run("verify", tmp_path / "a", check=0)[0]["splits"]
    assert splits["train"]["layout"].startswith("float32")


WRONG_USE = {
    "invalid choice: 'imprt'": ["imprt"],
    "required: --to": ["import", "x"],
    "SRC: an empty text names no": ["import", "", "--to", "out"],
    "no file or folder nowhere": ["import", "nowhere", "--to", "out"],
    "--valid-share": ["import", "x", "--to", "out", "--valid-share", "1.5"],
    "--splits names 'val'": ["download", "--to", "out", "--splits", "train,val"],
    "is not KIND=RATE": ["synthetic", "--to", "out", "--plant", "nan"],
    "plant 'fog' is unknown; allowed": ["synthetic", "--to", "out", "--plant", "fog=1"],
    "no folder nowhere": ["verify", "nowhere"],
}


def test_wrong_use_is_one_sentence_and_2(tmp_path, run, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for text, arguments in WRONG_USE.items():
        result, stderr = run(*arguments, check=2)
        assert text in result["error"] and stderr.count("\n") == 1
    assert not any(tmp_path.iterdir())
