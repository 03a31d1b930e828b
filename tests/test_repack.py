"""Repack: what uint8 can hold comes back to the bit from every type and layout; what it cannot is
counted to the value.
"""

import h5py
import numpy as np
import pytest
from conftest import draw_patches

import lib.prepare.repack
from lib.command import BadInput
from lib.files import read_csv
from lib.pcam import open_split, read_meta, split_path, to_uint8
from lib.prepare.repack import LOSSES_FILE, repack
from lib.prepare.verify import verify_folder
from lib.splitwriter import write_labels, write_meta

IMAGES, LABELS = draw_patches(20, 3)
CHUNKS = {"chunks": (8, 96, 96, 3), "compression": "gzip", "compression_opts": 1}
UNIT = IMAGES.astype(np.float64) / 255


def write_source(directory, images=IMAGES, **options):
    """A PCam-like folder: `images`, in whatever type, shape and layout, as train, the first 8 as
    valid.
    """
    directory.mkdir()
    for split, x, y in (("train", images, LABELS), ("valid", images[:8], LABELS[:8])):
        with h5py.File(split_path(directory, split, "x"), "w") as file:
            file.create_dataset("x", data=x, **options)
        write_labels(split_path(directory, split, "y"), y)
    return directory


def patches_of(directory, split="train"):
    return open_split(directory, split).images.mapped


SOURCES = {
    "float32 odd chunks": (IMAGES.astype(np.float32), {"chunks": (5, 12, 12, 1)}, 1),
    "float64 gzip": (IMAGES.astype(np.float64), CHUNKS, 1),
    "big-endian float16": (IMAGES.astype(">f2"), {}, 1),
    "int64": (IMAGES.astype(np.int64), {}, 1),
    "uint8 gzip": (IMAGES, CHUNKS, 1),
    "float16 of 0..1": (UNIT.astype(np.float16), {}, 255),
    "float64 of float32 of 0..1": (UNIT.astype(np.float32).astype(np.float64), CHUNKS, 255),
    "uint16 of 0..65535": (IMAGES.astype(np.uint16) * 257, {}, 1 / 257),
    "float32 of 0..65535": (IMAGES.astype(np.float32) * 257, {}, 1 / 257),
}


@pytest.mark.parametrize("source", SOURCES)
def test_what_uint8_can_hold_comes_back_to_the_bit(tmp_path, monkeypatch, source):
    monkeypatch.setattr(lib.prepare.repack, "BLOCK_ROWS", 7)  # several blocks
    images, options, factor = SOURCES[source]
    folder = write_source(tmp_path / "in", images, **options)
    meta = [(row, 2, "True", "False", "camelyon16_train_normal_001") for row in range(20)]
    write_meta(split_path(folder, "train", "meta"), meta)
    split_path(folder, "train", "mask").write_bytes(b"mask")
    out = tmp_path / "out"
    assert repack(folder, out) == (True, {"train": factor, "valid": factor}, [])
    assert read_csv(out / LOSSES_FILE) == []
    np.testing.assert_array_equal(patches_of(out), IMAGES)
    np.testing.assert_array_equal(patches_of(out, "valid"), IMAGES[:8])
    assert split_path(out, "train", "mask").read_bytes() == b"mask"
    assert read_meta(split_path(out, "train", "meta"))[3]["coord_y"] == "3"


NOT_READ_DIRECTLY = {
    "is int64 .*repack converts it": IMAGES.astype(np.int64),
    r"is float32 in \[0, 1\],.*repack converts it": UNIT.astype(np.float32),
    r"is uint16 in \[0, 65535\],.*repack converts it": IMAGES.astype(np.uint16) * 257,
    r"normalised; undo.*\* std \+ mean": ((UNIT - 0.5) / 0.225).astype(np.float32),
    "none of the scales": IMAGES.astype(np.uint16) * 16,
}


@pytest.mark.parametrize("text", NOT_READ_DIRECTLY)
def test_another_scale_is_refused_with_the_remedy_and_never_written_as_it_is(tmp_path, text):
    folder = write_source(tmp_path / "in", NOT_READ_DIRECTLY[text])
    with pytest.raises(BadInput, match=text):
        verify_folder(folder)
    if "repack" in text:
        repack(folder, tmp_path / "out")
        np.testing.assert_array_equal(patches_of(tmp_path / "out"), IMAGES)
    else:
        with pytest.raises(BadInput, match=text):
            repack(folder, tmp_path / "out", allow_loss=True)
        assert not (tmp_path / "out").exists()


def damaged(factor=1.0):
    images = (IMAGES * factor).astype(np.float32)
    images[1] = 0
    images[2, 5:9, 5:9] = np.nan
    images[3, 0, 0, :2] = [np.inf, -np.inf]
    images[19, 10:12, 10:12] = 1e5
    images[5, 7, 7] = [-3, -0.25, 0.5]
    images[6, 8] = np.float32(100.25 * factor)
    return images


def test_each_loss_is_counted_to_the_value_and_its_rows_are_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(lib.prepare.repack, "BLOCK_ROWS", 3)  # rows are those of the split
    images = damaged()
    folder = write_source(tmp_path / "in", images)
    out = tmp_path / "out"
    is_written, _, losses = repack(folder, out)
    assert not is_written and not out.exists()
    expected = [
        (2, "not_finite", 4 * 4 * 3),
        (3, "not_finite", 2),
        (5, "below_0", 2),
        (5, "rounded", 1),
        (6, "rounded", 96 * 3),
        (19, "above_255", 12),
    ]
    assert [row[1:] for row in losses if row[0] == "train"] == expected
    assert repack(folder, out, allow_loss=True)[2] == losses
    np.testing.assert_array_equal(patches_of(out), to_uint8(images))
    assert "train,19,above_255,12" in (out / LOSSES_FILE).read_text()


@pytest.mark.parametrize("factor", [1, 255, 1 / 257])
def test_damage_does_not_move_the_scale(tmp_path, factor):
    images = damaged(1 / factor)
    images[8:10] = 0
    images[10:13, 0, 0] = 1e5
    folder = write_source(tmp_path / "in", images)
    _, scales, _ = repack(folder, tmp_path / "out", allow_loss=True)
    assert scales == {"train": factor, "valid": factor}
    np.testing.assert_array_equal(patches_of(tmp_path / "out")[13:19], IMAGES[13:19])
