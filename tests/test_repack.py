"""Repack: what uint8 can hold comes back to the bit from every type and layout; what it cannot is
counted to the value.
"""

import signal

import h5py
import numpy as np
import pytest
from conftest import draw_patches, run_script
from test_ingest import stop_in_mid_train

import lib.prepare.repack
from lib.command import BadInput
from lib.files import read_csv
from lib.pcam import (
    META_COLUMNS,
    open_split,
    split_path,
    to_uint8,
    write_labels,
    write_meta,
)
from lib.prepare.ingest import LOSSES_FILE
from lib.prepare.repack import repack
from lib.prepare.verify import require_splits

IMAGES, LABELS = draw_patches(40, 3)
CHUNKS = {"chunks": (8, 96, 96, 3), "compression": "gzip", "compression_opts": 1}


def write_source(directory, images=IMAGES, labels=LABELS, valid=IMAGES[:16], **options):
    """A PCam-like folder: `images` as train, `valid` as valid, in whatever type, shape and
    layout.
    """
    directory.mkdir()
    for split, x, y in (
        ("train", images, labels),
        ("valid", valid.astype(images.dtype), LABELS[:16]),
    ):
        with h5py.File(split_path(directory, split, "x"), "w") as file:
            file.create_dataset("x", data=x, **options)
        write_labels(split_path(directory, split, "y"), y)
    return directory


def scaled(dtype):
    return (IMAGES.astype(np.float64) / 255).astype(dtype)


SOURCES = {
    "float32": (IMAGES.astype(np.float32), {}),
    "float32 odd chunks": (IMAGES.astype(np.float32), {"chunks": (16, 12, 12, 1)}),
    "float64 gzip": (IMAGES.astype(np.float64), CHUNKS),
    "float16": (IMAGES.astype(np.float16), {}),
    "big-endian float32": (IMAGES.astype(">f4"), {}),
    "int16": (IMAGES.astype(np.int16), CHUNKS),
    "int64": (IMAGES.astype(np.int64), {}),
    "uint8 gzip": (IMAGES, CHUNKS),
    "float16 in 0..1": (scaled(np.float16), {}),
    "float32 in 0..1": (scaled(np.float32), CHUNKS),
    "float64 in 0..1": (scaled(np.float32).astype(np.float64), {}),
}


@pytest.mark.parametrize("source", SOURCES)
def test_what_uint8_can_hold_comes_back_to_the_bit(tmp_path, monkeypatch, source):
    monkeypatch.setattr(lib.prepare.repack, "BLOCK_ROWS", 7)  # several blocks
    images, options = SOURCES[source]
    factor = 255 if "0..1" in source else 1
    valid = scaled(images.dtype)[:16] if factor == 255 else IMAGES[:16]
    folder = write_source(tmp_path / "in", images, valid=valid, **options)
    write_meta(
        split_path(folder, "train", "meta"),
        [(row, 2, "True", "False", "camelyon16_train_normal_001") for row in range(40)],
    )
    split_path(folder, "train", "mask").write_bytes(b"mask")
    result = repack(folder, tmp_path / "out")
    assert (
        result["written"]
        and result["splits"]["train"]["losses"] == {}
        and read_csv(tmp_path / "out" / LOSSES_FILE) == []
    )
    assert result["splits"]["train"]["scaled_by"] == factor
    for name, expected in (("train", IMAGES), ("valid", IMAGES[:16])):
        split = open_split(tmp_path / "out", name)
        assert split.images.mapped is not None
        np.testing.assert_array_equal(split.images.mapped, expected)
    assert split_path(tmp_path / "out", "train", "mask").read_bytes() == b"mask"
    assert tuple(read_csv(split_path(tmp_path / "out", "train", "meta"))[3]) == META_COLUMNS


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
    images = damaged()
    folder = write_source(tmp_path / "in", images)
    expected = {
        "not_finite": {"values": 4 * 4 * 3 + 2, "patches": 2},
        "below_0": {"values": 2, "patches": 1},
        "above_255": {
            "values": 12 + int((IMAGES[6] == 255).sum()),
            "patches": 1 + bool((IMAGES[6] == 255).any()),
        },
        "rounded": {"values": 1 + int((IMAGES[6] < 255).sum()), "patches": 2},
    }
    refused = repack(folder, tmp_path / "out")
    assert not refused["written"] and not (tmp_path / "out").exists()
    assert (
        refused["splits"]["train"]["losses"] == expected
        and refused["splits"]["valid"]["losses"] == {}
    )
    written = repack(folder, tmp_path / "out", allow_loss=True)
    assert written["splits"]["train"]["losses"] == expected
    np.testing.assert_array_equal(
        open_split(tmp_path / "out", "train").images.mapped, to_uint8(images)
    )
    rows = [tuple(row.values()) for row in read_csv(tmp_path / "out" / LOSSES_FILE)]
    assert ("train", "2", "not_finite", "48", "nan", "nan") in rows
    assert ("train", "19", "above_255", "12", "100000", "100000") in rows
    assert ("train", "5", "below_0", "2", "-3", "-0.25") in rows and (
        "train",
        "5",
        "rounded",
        "1",
        "0.5",
        "0.5",
    ) in rows
    assert len(rows) == sum(count["patches"] for count in expected.values())
    # the rows are those of the split, not of a block
    monkeypatch.setattr(lib.prepare.repack, "BLOCK_ROWS", 3)
    repack(folder, tmp_path / "out2", allow_loss=True)
    assert (tmp_path / "out2" / LOSSES_FILE).read_bytes() == (
        tmp_path / "out" / LOSSES_FILE
    ).read_bytes()


def test_scaled_or_not_is_decided_past_damage(tmp_path):
    """Black patches, NaN and values of 100,000 in an eighth of the patches each move neither
    decision.
    """
    for factor in (1, 1 / 255):
        images = damaged(factor)
        images[7:12], images[12:17, 0, 0] = 0, 1e5
        result = repack(
            write_source(tmp_path / f"in{factor}", images, valid=IMAGES[:16] * factor),
            tmp_path / f"out{factor}",
            True,
        )
        assert (
            result["splits"]["train"]["scaled_by"]
            == result["splits"]["valid"]["scaled_by"]
            == round(1 / factor)
        )
        np.testing.assert_array_equal(
            open_split(tmp_path / f"out{factor}", "train").images.mapped[20:], IMAGES[20:]
        )


BAD_SOURCES = {
    r"\(40, 96, 96, 1\), it must be": {"images": IMAGES[..., :1]},
    r"\(40, 3, 96, 96\), it must be": {"images": IMAGES.transpose(0, 3, 1, 2)},
    "bool": {"images": IMAGES > 99},
    "seem normalised": {"images": (IMAGES / 127.5 - 1).astype(np.float32)},
    "40 patches, 39 labels": {"labels": LABELS[:39]},
    "label 2, it must be 0 or 1": {"labels": LABELS * 2},
}


@pytest.mark.parametrize("text", BAD_SOURCES)
def test_bad_input_is_refused_and_nothing_is_written(tmp_path, text):
    folder = write_source(tmp_path / "in", **BAD_SOURCES[text])
    with pytest.raises(BadInput, match=text):
        repack(folder, tmp_path / "out", allow_loss=True)
    assert not (tmp_path / "out").exists()


def test_a_damaged_chunk_in_mid_file_leaves_nothing(tmp_path):
    folder = write_source(tmp_path / "in", IMAGES.astype(np.float32), **CHUNKS)
    with h5py.File(split_path(folder, "train", "x")) as file:
        chunk = file["x"].id.get_chunk_info(4)
    with open(split_path(folder, "train", "x"), "rb+") as file:
        file.seek(chunk.byte_offset)
        file.write(bytes(chunk.size))
    with pytest.raises(BadInput, match="train_x.h5: x from row .* cannot be decoded"):
        repack(folder, tmp_path / "out", allow_loss=True)
    assert not (tmp_path / "out").exists()


def test_a_killed_repack_goes_on_and_keeps_the_losses_of_the_finished_split(tmp_path):
    images = np.repeat(damaged(), 3, axis=0)
    folder, target = (
        write_source(tmp_path / "in", images, np.repeat(LABELS, 3), damaged()[:16]),
        tmp_path / "out",
    )
    arguments = ["repack", folder, "--to", target, "--allow-loss"]
    assert stop_in_mid_train(target, signal.SIGKILL, *arguments)[0] == -9
    with pytest.raises(BadInput, match="train"):
        require_splits(target)
    finished = read_csv(target / LOSSES_FILE)
    assert {row["split"] for row in finished} == {"valid"}
    splits = run_script("prepare.py", *arguments, check=0).json["splits"]
    assert splits["train"]["patches"] == 120 and all(
        splits[split]["losses"]["rounded"]["patches"] for split in splits
    )
    rows = read_csv(target / LOSSES_FILE)
    assert rows[: len(finished)] == finished and len(rows) == 3 * 7 + len(finished)
    np.testing.assert_array_equal(open_split(target, "train").images.mapped, to_uint8(images))
