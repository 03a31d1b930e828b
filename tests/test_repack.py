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

IMAGES, LABELS = draw_patches(40, 3)
CHUNKS = {"chunks": (8, 96, 96, 3), "compression": "gzip", "compression_opts": 1}
UNIT = IMAGES.astype(np.float64) / 255


def write_source(directory, images=IMAGES, labels=LABELS, **options):
    """A PCam-like folder: `images`, in whatever type, shape and layout, as train, the first 16 as
    valid.
    """
    directory.mkdir()
    for split, x, y in (("train", images, labels), ("valid", images[:16], LABELS[:16])):
        with h5py.File(split_path(directory, split, "x"), "w") as file:
            file.create_dataset("x", data=x, **options)
        write_labels(split_path(directory, split, "y"), y)
    return directory


SOURCES = {
    "float32 odd chunks": (IMAGES.astype(np.float32), {"chunks": (16, 12, 12, 1)}, 1),
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
    folder, target = write_source(tmp_path / "in", images, **options), tmp_path / "out"
    meta = [(row, 2, "True", "False", "camelyon16_train_normal_001") for row in range(40)]
    write_meta(split_path(folder, "train", "meta"), meta)
    split_path(folder, "train", "mask").write_bytes(b"mask")
    result = repack(folder, target)
    assert result["written"] and read_csv(target / LOSSES_FILE) == []
    for name, expected in (("train", IMAGES), ("valid", IMAGES[:16])):
        facts = result["splits"][name]
        assert facts["losses"] == {} and facts["scaled_by"] == factor
        np.testing.assert_array_equal(open_split(target, name).images.mapped, expected)
    assert split_path(target, "train", "mask").read_bytes() == b"mask"
    assert read_meta(split_path(target, "train", "meta"))[3]["coord_y"] == "3"


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
        np.testing.assert_array_equal(open_split(tmp_path / "out", "train").images.mapped, IMAGES)
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
    images[6] += np.float32(0.25 * factor)
    return images


def test_each_loss_is_counted_to_the_value_and_its_rows_are_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(lib.prepare.repack, "BLOCK_ROWS", 3)  # rows are those of the split
    images = damaged()
    folder, target = write_source(tmp_path / "in", images), tmp_path / "out"
    num_white = int((IMAGES[6] == 255).sum())
    expected = {
        "not_finite": {"values": 4 * 4 * 3 + 2, "patches": 2},
        "below_0": {"values": 2, "patches": 1},
        "above_255": {"values": 12 + num_white, "patches": 1 + (num_white > 0)},
        "rounded": {"values": 1 + IMAGES[6].size - num_white, "patches": 2},
    }
    refused = repack(folder, target)
    assert not refused["written"] and not target.exists()
    written = repack(folder, target, allow_loss=True)
    for result in (refused, written):
        assert result["splits"]["train"]["losses"] == expected
    np.testing.assert_array_equal(open_split(target, "train").images.mapped, to_uint8(images))
    lines = (target / LOSSES_FILE).read_text().splitlines()
    for line in (
        "train,2,not_finite,48,nan,nan",
        "train,19,above_255,12,100000,100000",
        "train,5,below_0,2,-3,-0.25",
        "train,5,rounded,1,0.5,0.5",
    ):
        assert line in lines


@pytest.mark.parametrize("factor", [1, 255, 1 / 257])
def test_damage_does_not_move_the_scale(tmp_path, factor):
    images = damaged(1 / factor)
    images[20:25], images[25:30, 0, 0] = 0, 1e5  # an eighth black, an eighth far too bright
    result = repack(write_source(tmp_path / "in", images), tmp_path / "out", allow_loss=True)
    assert [split["scaled_by"] for split in result["splits"].values()] == [factor, factor]
    mapped = open_split(tmp_path / "out", "train").images.mapped
    np.testing.assert_array_equal(mapped[30:], IMAGES[30:])


BAD_SOURCES = {
    r"\(40, 3, 96, 96\), it must be": {"images": IMAGES.transpose(0, 3, 1, 2)},
    "39 rows for 40 patches": {"labels": LABELS[:39]},
    "label 2, it must be 0 or 1": {"labels": LABELS * 2},
    "train_x.h5: x from row .* cannot be decoded": {"images": IMAGES.astype("f4"), **CHUNKS},
}


@pytest.mark.parametrize("text", BAD_SOURCES)
def test_bad_input_is_refused_and_nothing_is_written(tmp_path, text):
    folder = write_source(tmp_path / "in", **BAD_SOURCES[text])
    if "decoded" in text:
        path = split_path(folder, "train", "x")
        with h5py.File(path) as file:
            chunk = file["x"].id.get_chunk_info(4)
        with open(path, "rb+") as file:
            file.seek(chunk.byte_offset)
            file.write(bytes(chunk.size))
    with pytest.raises(BadInput, match=text):
        repack(folder, tmp_path / "out", allow_loss=True)
    assert not (tmp_path / "out").exists()
