"""Verify: the facts of a folder, and what is wrong with it."""

import h5py
import numpy as np
import pytest
from conftest import draw_patches, write_pcam

from lib.command import BadInput
from lib.files import file_digest
from lib.pcam import open_split, split_path
from lib.prepare.verify import require_splits, verify_folder
from lib.published import compare_md5
from lib.splitwriter import SplitWriter, write_labels

SLIDES = {
    "train": "camelyon16_train_normal_001",
    "valid": "camelyon16_train_tumor_002",
    "test": "camelyon16_test_001",
}


@pytest.fixture
def folder(tmp_path):
    return write_pcam(tmp_path, 20, 10)


def test_the_test_split_may_be_missing_whole_but_not_in_half(folder):
    assert require_splits(folder) == ["train", "valid"]
    write_labels(split_path(folder, "test", "y"), [0, 1] * 5)
    with pytest.raises(BadInput, match="split_test_x"):
        require_splits(folder)
    split_path(folder, "test", "x").symlink_to(split_path(folder, "valid", "x"))
    assert require_splits(folder) == ["train", "valid", "test"]


def test_exchanged_splits_are_found_by_their_slides(tmp_path):
    for valid, test, expected in (("valid", "test", []), ("test", "valid", ["valid", "test"])):
        for split, named in (("train", "train"), ("valid", valid), ("test", test)):
            with SplitWriter(tmp_path, split, 4) as writer:
                writer.add(*draw_patches(4, 9), [(0, 0, "True", "True", SLIDES[named])] * 4)
        rows, findings = verify_folder(tmp_path)
        assert [row["slides"] for row in rows] == [1, 1, 1]
        assert [finding.split(":")[0] for finding in findings] == expected


def test_md5_names_the_split_whose_file_it_is(folder):
    official = {}
    for split in ("train", "valid"):
        official[split] = {"meta": ""}
        for part in "xy":
            official[split][part] = ("", file_digest(split_path(folder, split, part), "md5"))
    assert compare_md5(folder, "train", official) == []
    exchanged = {"train": official["valid"], "valid": official["train"]}
    assert "it is that of valid" in compare_md5(folder, "train", exchanged)[0]


def test_patches_that_show_nothing_are_a_finding_and_bad_chunks_are_refused(folder):
    path = split_path(folder, "valid", "x")
    with h5py.File(path, "w") as file:
        file["x"] = np.full((10, 96, 96, 3), np.float32("nan"))
    (finding,) = verify_folder(folder)[1]
    assert finding.startswith("valid: all patches have the one value 0")
    images = open_split(folder, "train").images.mapped[:10]
    with h5py.File(path, "w") as file:
        file.create_dataset("x", data=images, chunks=(5, 96, 96, 3), compression="gzip")
        offset = file["x"].id.get_chunk_info(1).byte_offset
    with open(path, "rb+") as file:
        file.seek(offset)
        file.write(bytes(500))
    with pytest.raises(BadInput, match="valid_x.h5.*cannot be decoded"):
        verify_folder(folder)
