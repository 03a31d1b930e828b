"""prepare.py as a user runs it: exit codes, one sentence for bad input, one JSON object last, and
the real sample.
"""

import io
import os
import re
import subprocess
import sys
import tarfile

import h5py
import numpy as np
import pytest
from conftest import REAL_SAMPLE, REPOSITORY, draw_patches, real_sample, run_script, write_pcam
from PIL import Image

from lib.fingerprint import FINGERPRINT_FILE, fingerprint
from lib.pcam import open_split, split_path
from lib.splitwriter import write_meta

VERBS = ("download", "import", "repack", "synthetic", "verify")


@pytest.mark.parametrize("verb", ["", *VERBS])
def test_help_is_there_at_once_and_loads_no_array_library(verb):
    command = [sys.executable, "-X", "importtime", REPOSITORY / "prepare.py", verb, "--help"]
    used_s = os.times().children_user
    result = subprocess.run(list(filter(None, command)), capture_output=True, text=True)
    assert result.returncode == 0 and "usage: prepare.py" in result.stdout
    assert not re.search(r"\| +(numpy|h5py|torch|PIL)\b", result.stderr)
    # of processor time: the clock also counts what others do
    assert os.times().children_user - used_s < 0.15


@pytest.fixture(scope="module")
def imported(tmp_path_factory):
    """The valid split of the real sample, imported from a folder that holds images without labels
    too.
    """
    folder = tmp_path_factory.mktemp("real")
    (folder / "in").mkdir()
    for name in ("valid.tar", "unlabelled-tif"):
        (folder / "in" / name).symlink_to(REAL_SAMPLE / name)
    result = run_script("prepare.py", "import", folder / "in", "--to", folder / "sample", check=0)
    (folder / "pcam").symlink_to("sample")
    return folder / "sample", result


@real_sample
def test_the_real_sample_comes_in_official_order_with_pillows_pixels(imported):
    directory, result = imported
    with tarfile.open(REAL_SAMPLE / "valid.tar") as tar:
        files = {member.name: tar.extractfile(member).read() for member in tar if member.isfile()}
    names = sorted(files, key=lambda name: int(re.search(r"patch(\d+)", name)[1]))
    split = open_split(directory, "valid")
    assert result.json["splits"]["valid"]["patches"] == len(split) == len(names) == 3000
    assert result.json["skipped"] == {"no label": 18} and "18 file(s), no label" in result.stderr
    assert split.labels.tolist() == [int(name.split("/")[1]) for name in names]
    for patch, name in zip(split.images.mapped, names, strict=True):
        assert np.array_equal(patch, Image.open(io.BytesIO(files[name]))), name


@real_sample
def test_torchvision_opens_the_import_through_a_link_and_sees_the_same(imported):
    from torchvision.datasets import PCAM

    directory, _ = imported
    split, dataset = open_split(directory, "valid"), PCAM(directory.parent, split="val")
    assert len(dataset) == len(split)
    for row in range(0, len(split), 101):
        image, label = dataset[row]
        assert np.array_equal(image, split.images.mapped[row]) and label == split.labels[row]


def test_what_import_prints_is_what_it_wrote_and_the_fingerprint_is_there(tmp_path):
    source, target = tmp_path / "in", tmp_path / "deep" / "out"
    for number, patch in enumerate(draw_patches(4, 0)[0]):
        path = source / ("train" if number < 3 else "valid") / "1" / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(patch).save(path)
    result = run_script("prepare.py", "import", source, "--to", target, check=0)
    assert result.json["splits"]["train"] | {"seconds": 0, "bytes": 0} == {
        "patches": 3, "negative": 0, "positive": 3, "converted": {}, "seconds": 0, "bytes": 0,
        "layout": "contiguous uint8", "official_rows": False, "slides": None, "slide_names": "unknown",
    }  # fmt: skip
    assert re.search(r"train +3 +0 +3 ", result.stderr) and (target / FINGERPRINT_FILE).exists()
    assert result.json["fingerprint"] == fingerprint(target)
    (source / "train" / "1" / "0.png").write_bytes(b"")
    result = run_script("prepare.py", "import", source, "--to", tmp_path / "out2", check=2)
    assert re.fullmatch(r"error: .*0\.png .+\n", result.stderr) and result.json["exit"] == 2


def test_verify_exits_0_for_fine_1_for_a_finding_and_2_for_what_is_not_whole(tmp_path):
    folder = write_pcam(tmp_path, 20, 10)
    splits = run_script("prepare.py", "verify", folder, check=0).json["splits"]
    assert splits["valid"]["patches"] == 10
    assert len(run_script("prepare.py", "verify", folder, "--md5", check=1).json["findings"]) == 4
    rows = [(0, 0, "True", "True", "camelyon16_test_001")] * 10
    write_meta(split_path(folder, "valid", "meta"), rows)
    assert "exchanged" in run_script("prepare.py", "verify", folder, check=1).stderr
    os.truncate(split_path(folder, "train", "x"), 200_000)
    assert "train_x.h5" in run_script("prepare.py", "verify", folder, check=2).json["error"]


def test_repack_exits_1_and_writes_nothing_until_the_loss_is_allowed(tmp_path):
    folder = write_pcam(tmp_path / "a", 20, 10)
    images = open_split(folder, "train").images.mapped.astype(np.float32)
    images[3, 5, 5] = np.nan
    with h5py.File(split_path(folder, "train", "x"), "w") as file:
        file["x"] = images
    assert "repack makes it" in run_script("prepare.py", "verify", folder, check=0).stderr
    command = ["prepare.py", "repack", folder, "--to", tmp_path / "b"]
    result = run_script(*command, check=1)
    assert re.search("train +not_finite +3 +1\n", result.stderr)
    assert not result.json["written"] and not (tmp_path / "b").exists()
    result = run_script(*command, "--allow-loss", check=0)
    assert result.json["splits"]["train"]["losses"] == {"not_finite": {"values": 3, "patches": 1}}
    assert "already holds files" in run_script(*command, check=2).stderr


def test_synthetic_writes_a_folder_that_verifies(tmp_path):
    arguments = ["--train", 40, "--valid", 20, "--test", 0, "--plant", "nan=0.1", "--float32"]
    result = run_script("prepare.py", "synthetic", "--to", tmp_path / "a", *arguments, check=0)
    assert result.json["num_train"] == 40 and result.json["planted"]["nan"] > 0
    splits = run_script("prepare.py", "verify", tmp_path / "a", check=0).json["splits"]
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


@pytest.mark.parametrize("text", WRONG_USE)
def test_wrong_use_is_one_sentence_and_2(tmp_path, text):
    result = run_script("prepare.py", *WRONG_USE[text], check=2, cwd=tmp_path)
    assert text in result.json["error"] and result.stderr.count("\n") == 1
    assert not any(tmp_path.iterdir())
