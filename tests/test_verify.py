"""Verify: the facts of a folder, and what is wrong with it."""

import h5py
import numpy as np
import pytest
from conftest import draw_patches, write_pcam

from lib.command import BadInput
from lib.files import file_digest
from lib.pcam import open_split, split_path
from lib.prepare.verify import require_splits, verify_folder
from lib.splitwriter import SplitWriter, write_labels, write_meta

SLIDES = {
    "train": "camelyon16_train_normal_001",
    "valid": "camelyon16_train_tumor_002",
    "test": "camelyon16_test_001",
}


@pytest.fixture
def folder(tmp_path):
    return write_pcam(tmp_path / "a", 20, 10)


def name_slides(folder, slides):
    for split, slide in slides.items():
        num = len(open_split(folder, split))
        write_meta(split_path(folder, split, "meta"), [(0, 0, "True", "True", slide)] * num)


def test_the_test_split_may_be_missing_whole_but_not_in_half(folder):
    assert require_splits(folder) == ["train", "valid"]
    write_labels(split_path(folder, "test", "y"), [0, 1] * 5)
    with pytest.raises(BadInput, match="split_test_x"):
        require_splits(folder)
    split_path(folder, "test", "x").symlink_to(split_path(folder, "valid", "x"))
    assert require_splits(folder) == ["train", "valid", "test"]


def test_exchanged_splits_are_found_by_their_slides(folder):
    rows, _ = verify_folder(folder)
    assert [(row["slides"], row["slide_names"]) for row in rows] == [(None, "unknown")] * 2
    with SplitWriter(folder, "test", 10) as writer:
        writer.add(*draw_patches(10, 9))
    name_slides(folder, SLIDES)
    assert verify_folder(folder)[1] == []
    name_slides(folder, {"valid": SLIDES["test"], "test": SLIDES["valid"]})
    rows, findings = verify_folder(folder)
    assert [row["slide_names"] for row in rows] == ["match", "swapped", "swapped"]
    assert [finding.split(":")[0] for finding in findings] == ["valid", "test"]


def test_md5_names_the_split_whose_file_it_is(folder):
    official = {}
    for split in ("train", "valid"):
        official[split] = {"rows": 20, "meta": ""}
        for part in "xy":
            official[split][part] = ("", file_digest(split_path(folder, split, part), "md5"))
    assert verify_folder(folder, md5=True, official=official)[1] == []
    exchanged = {"train": official["valid"], "valid": official["train"]}
    findings = verify_folder(folder, md5=True, official=exchanged)[1]
    assert any("it is that of valid" in finding for finding in findings)


@pytest.mark.parametrize("value", [np.float32("nan"), np.uint8(0)])
def test_patches_that_show_nothing_are_a_finding(folder, value):
    with h5py.File(split_path(folder, "valid", "x"), "w") as file:
        file["x"] = np.full((10, 96, 96, 3), value)
    (finding,) = verify_folder(folder)[1]
    assert finding.startswith("valid: all patches have the one value 0")


def test_what_is_not_whole_is_refused_though_its_header_is_right(folder):
    path = split_path(folder, "train", "x")
    images = open_split(folder, "train").images.mapped.copy()
    with h5py.File(path, "w") as file:
        file.create_dataset("x", data=images, chunks=(5, 96, 96, 3), compression="gzip")
        offset = file["x"].id.get_chunk_info(2).byte_offset
    with open(path, "rb+") as file:
        file.seek(offset)
        file.write(bytes(500))
    with pytest.raises(BadInput, match="train_x.h5.*cannot be decoded"):
        verify_folder(folder)
