"""Verify: the facts of a folder, and what is wrong with it."""

import h5py
import numpy as np
import pytest
from conftest import draw_patches, write_pcam

from lib.command import BadInput
from lib.files import file_digest
from lib.pcam import SplitWriter, open_images, split_path, write_labels, write_meta
from lib.prepare.verify import require_splits, verify_folder
from lib.published import OFFICIAL

CAMELYON = {
    "train": "camelyon16_train_normal_001",
    "valid": "camelyon16_train_tumor_002",
    "test": "camelyon16_test_001",
}


def with_slides(directory, **slides):
    for split, slide in slides.items():
        num = open_images(split_path(directory, split, "x")).num
        write_meta(split_path(directory, split, "meta"), [(0, 0, "True", "True", slide)] * num)
    return directory


def test_the_facts_of_a_folder(tmp_path):
    folder = with_slides(write_pcam(tmp_path / "a", 20, 10), train=CAMELYON["train"])
    rows, findings = verify_folder(folder)
    assert findings == [] and [row["split"] for row in rows] == ["train", "valid"]
    assert rows[0] | {"bytes": 0} == {
        "split": "train", "patches": 20, "negative": 10, "positive": 10, "bytes": 0, "official_rows": False,
        "layout": "contiguous uint8", "slides": 1, "slide_names": "match",
    }  # fmt: skip
    assert rows[1]["slide_names"] == "unknown" and rows[1]["slides"] is None


def test_the_test_split_may_be_missing_whole_but_not_in_half(tmp_path):
    folder = write_pcam(tmp_path, 8, 4)
    assert require_splits(folder) == ["train", "valid"]
    write_labels(split_path(folder, "test", "y"), [0, 1, 0, 1])
    with pytest.raises(BadInput, match="split_test_x"):
        require_splits(folder)
    split_path(folder, "test", "x").symlink_to(split_path(folder, "valid", "x"))
    assert require_splits(folder) == ["train", "valid", "test"]


def test_exchanged_splits_are_found_by_their_slides(tmp_path):
    folder = write_pcam(tmp_path / "a", 20, 10)
    with SplitWriter(folder, "test", 10) as writer:
        writer.add(*draw_patches(10, 9))
    assert verify_folder(with_slides(folder, **CAMELYON))[1] == []
    exchanged = CAMELYON | {"valid": CAMELYON["test"], "test": CAMELYON["valid"]}
    rows, findings = verify_folder(with_slides(folder, **exchanged))
    assert [row["slide_names"] for row in rows] == ["match", "swapped", "swapped"]
    assert [finding.split(":")[0] for finding in findings] == ["valid", "test"]


def test_md5_names_the_split_whose_file_it_is(tmp_path):
    folder = write_pcam(tmp_path / "a", 20, 10)
    sums = {
        split: {part: ("", file_digest(split_path(folder, split, part), "md5")) for part in "xy"}
        for split in ("train", "valid")
    }
    own = {split: sums[split] | {"rows": len(split), "meta": ""} for split in sums}
    assert verify_folder(folder, md5=True, official=own)[1] == []
    exchanged = {"train": own["valid"], "valid": own["train"]}
    assert any(
        "it is that of valid" in finding
        for finding in verify_folder(folder, md5=True, official=exchanged)[1]
    )
    assert len(verify_folder(folder, md5=True, official=OFFICIAL)[1]) == 4


@pytest.mark.parametrize(
    "value, said",
    [(np.float32("nan"), "NaN"), (np.float32(200), "one value 200"), (np.uint8(0), "value 0")],
)
def test_patches_that_show_nothing_are_a_finding(tmp_path, value, said):
    folder = write_pcam(tmp_path / "a", 20, 10)
    with h5py.File(split_path(folder, "valid", "x"), "w") as file:
        file.create_dataset("x", data=np.full((10, 96, 96, 3), value))
    findings = verify_folder(folder)[1]
    assert (
        len(findings) == 1 and findings[0].startswith("valid: all patches") and said in findings[0]
    )


def test_what_is_not_whole_is_refused_though_its_header_is_right(tmp_path):
    folder = write_pcam(tmp_path / "a", 20, 10)
    path = split_path(folder, "train", "x")
    images = open_images(path).mapped.copy()
    with h5py.File(path, "w") as file:
        file.create_dataset("x", data=images, chunks=(5, 96, 96, 3), compression="gzip")
        offset = file["x"].id.get_chunk_info(2).byte_offset
    assert verify_folder(folder)[0][0]["layout"].startswith("uint8, chunks")
    with open(path, "rb+") as file:
        file.seek(offset)
        file.write(bytes(500))
    with pytest.raises(BadInput, match="train_x.h5.*cannot be decoded"):
        verify_folder(folder)
