"""The PCam files: mapped where they can be, read equal where they cannot, refused by name where
they are damaged.
"""

import hashlib
import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest
from conftest import draw_patches, write_pcam

from lib.command import BadInput
from lib.fingerprint import fingerprint
from lib.pcam import open_images, open_split, split_path
from lib.splitwriter import SplitWriter, sole_writer, write_labels

IMAGES, LABELS = draw_patches(40, 3)
LAYOUTS = [
    {},
    {"userblock": 4096},
    {"chunks": (16, 12, 12, 1)},
    {"chunks": (8, 96, 96, 3), "compression": "gzip"},
    {"dtype": np.float32},
]


def write_h5(path, values, key="x", userblock=0, **options):
    with h5py.File(path, "w", userblock_size=userblock) as file:
        file.create_dataset(key, data=values, **options)
    return path


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_every_layout_reads_in_any_order_and_in_blocks(tmp_path, layout):
    path = write_h5(tmp_path / "x.h5", IMAGES, **layout)
    stored = path.read_bytes()
    images = open_images(path)
    assert (images.mapped is not None) == (layout in LAYOUTS[:2])
    rows = [39, 0, 7, 7, 12, 39, 1]
    patches = images.read(rows)
    assert patches.dtype == np.uint8 and np.array_equal(patches, IMAGES[rows])
    starts, blocks = zip(*images.blocks(16), strict=True)
    assert starts == (0, 16, 32) and np.array_equal(np.concatenate(blocks), IMAGES)
    if images.mapped is not None:
        images.mapped[:] = 7
    assert path.read_bytes() == stored, "nothing done to the patches reaches the file"


def corrupt_chunk(x):
    write_h5(x, IMAGES[:8], chunks=(1, 96, 96, 3), compression="gzip")
    with h5py.File(x) as file:
        offset = file["x"].id.get_chunk_info(0).byte_offset
    with open(x, "r+b") as file:
        file.seek(offset + 10)
        file.write(b"\xff" * 64)


def move_below(x):
    below = x.parent / "pcam"
    below.mkdir()
    for file in x.parent.glob("*.h5"):
        file.rename(below / file.name)


def link_to_nothing(x):
    x.unlink()
    x.symlink_to(".git/annex/objects/MD5E-s4")


def kill_writer(x):
    """All data are on the disk, and the mark of an open file too."""
    code = "import h5py, os, sys; file = h5py.File(sys.argv[1], 'w', libver='latest')"
    code += "; file['x'] = [0]; file.flush(); os._exit(0)"
    subprocess.run([sys.executable, "-c", code, x], check=True)


def compress_by_plugin(x):
    options = {"compression": 32001, "allow_unknown_filter": True}  # blosc
    with h5py.File(x, "w") as file:
        file.create_dataset("x", (8, 96, 96, 3), np.uint8, **options)


def link_parts(x):
    """x is put together from another file, which is left behind."""
    layout = h5py.VirtualLayout((8, 96, 96, 3), np.uint8)
    layout[:] = h5py.VirtualSource("part.h5", "x", (8, 96, 96, 3))
    with h5py.File(x, "w") as file:
        file.create_virtual_dataset("x", layout)


# what becomes of train's x, and words that a refusal must hold besides the folder's name
DAMAGES = {
    "still packed": (lambda x: x.rename(f"{x}.gz"), ["gunzip"]),
    "a folder below": (move_below, ["pcam/camelyon", "name that folder"]),
    "Kaggle's name": (lambda x: x.rename(x.with_name("training_split.h5")), ["training_split.h5"]),
    "linked to nothing": (link_to_nothing, ["annex", "not there"]),
    "a web page": (lambda x: x.write_bytes(b"<!DOCTYPE html><title>Quota"), ["web page"]),
    "Git LFS": (lambda x: x.write_bytes(b"version https://git-lfs.github"), ["git lfs pull"]),
    "packed, misnamed": (lambda x: x.write_bytes(b"\x1f\x8b\x08"), ["gunzip"]),
    "killed writer": (kill_writer, ["h5clear -s"]),
    "a plugin's compression": (compress_by_plugin, ["32001", "hdf5plugin"]),
    "parts left behind": (link_parts, ["other files"]),
    "channels first": (lambda x: write_h5(x, IMAGES.transpose(0, 3, 1, 2)), ["(N, 96, 96, 3)"]),
    "int64": (lambda x: write_h5(x, IMAGES.astype(np.int64)), ["int64", "repack"]),
    "scaled": (lambda x: write_h5(x, IMAGES / np.float32(255)), ["[0, 1]", "repack"]),
    "no dataset": (lambda x: write_h5(x, 3, "images"), ["'x'", "images"]),
    "cut half": (lambda x: os.truncate(x, 100_000), ["truncated"]),
    "bad chunk": (corrupt_chunk, ["cannot be decoded"]),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_bad_input_is_refused_in_one_sentence_that_names_the_file(tmp_path, damage):
    folder = write_pcam(tmp_path / "a folder", 8, 4)
    apply, words = DAMAGES[damage]
    apply(split_path(folder, "train", "x"))
    with pytest.raises(BadInput) as refusal:
        open_split(folder, "train").images.read(np.arange(8))
    sentence = str(refusal.value)
    assert str(folder) in sentence and all(word in sentence for word in words), sentence
    assert "\n" not in sentence


def test_labels_and_slides_must_be_of_the_patches(tmp_path):
    folder = write_pcam(tmp_path, 8, 4)
    split_path(folder, "train", "meta").write_text(",coord_y,coord_x,wsi\n" + "0,1,2,s\n" * 7)
    with pytest.raises(BadInput, match="meta.csv has 7 rows for 8"):
        open_split(folder, "train")
    write_labels(split_path(folder, "train", "y"), [0, 1, 2, 0, 1, 1, 0, 3])
    with pytest.raises(BadInput, match="row 2 has the label 2"):
        open_split(folder, "train")


def test_a_file_is_no_folder_and_the_folder_below_is_not_the_one(tmp_path):
    folder = write_pcam(tmp_path, 8, 4)
    with pytest.raises(BadInput, match="is a file: name the folder"):
        open_split(split_path(folder, "train", "x"), "train")
    (folder / "inside").mkdir()
    with pytest.raises(BadInput, match=f"it is {folder}.*name that folder"):
        open_split(folder / "inside", "train")


def test_what_the_system_refuses_is_no_damage(tmp_path):
    path = split_path(tmp_path, "train", "x")
    path.symlink_to("/proc/self/mem")  # which nobody can read at its start
    with pytest.raises(OSError):
        open_images(path)


def test_what_is_written_is_official_and_comes_back_equal(tmp_path):
    meta = [(3, 4, 1, 0, "camelyon16_train_tumor_001"), (5, 6, 0, 0, "slide, with comma")] * 20
    with SplitWriter(tmp_path, "valid", 40) as writer:
        for rows in (slice(0, 15), slice(15, 40)):
            writer.add(IMAGES[rows], LABELS[rows], meta[rows])
        assert not list(tmp_path.glob("camelyon*")), "nothing official before the end"
    split = open_split(tmp_path, "valid")
    assert np.array_equal(split.images.mapped, IMAGES) and np.array_equal(split.labels, LABELS)
    assert split.slides.tolist() == [row[4] for row in meta]
    assert len(list(tmp_path.iterdir())) == 3, "nothing else is left"


def test_a_writer_that_fails_leaves_nothing_and_a_folder_has_one_at_a_time(tmp_path):
    folder = tmp_path / "new"
    with pytest.raises(KeyboardInterrupt), sole_writer(folder):
        with pytest.raises(BadInput, match="another process"), sole_writer(folder):
            raise AssertionError("two writers")
        with SplitWriter(folder, "train", 20) as writer:
            writer.add(IMAGES[:10], LABELS[:10])
            raise KeyboardInterrupt
    assert os.listdir(tmp_path) == []


def test_a_full_disk_is_refused_by_name_and_leaves_nothing(tmp_path):
    """A limit on the size of files fails as a full disk does, and needs no disk of its own."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, limits[1]))
    refusal = pytest.raises(OSError, match=f"{tmp_path}")
    try:
        with refusal, SplitWriter(tmp_path, "train", 40) as writer:
            writer.add(IMAGES, LABELS)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert os.listdir(tmp_path) == []


def test_the_fingerprint_is_the_files_sha256_and_is_kept(tmp_path, monkeypatch):
    folder = write_pcam(tmp_path / "data", 8, 4)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    fingerprint(folder)
    labels = open_split(folder, "valid").labels
    write_labels(split_path(folder, "valid", "y"), 1 - labels)  # the same size
    digests = fingerprint(folder)
    files = {path.name: path.read_bytes() for path in folder.glob("*.h5")}
    assert digests == {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}
    monkeypatch.setattr("lib.fingerprint.file_digest", lambda *_: pytest.fail("hashed again"))
    assert fingerprint(folder) == digests
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", "/dev/null")
    assert fingerprint(folder) == digests, "also where no cache can be written"


@pytest.mark.slow
def test_torchvision_opens_the_files_and_sees_the_same(pcam_dir, tmp_path):
    datasets = pytest.importorskip("torchvision.datasets")
    (tmp_path / "pcam").symlink_to(pcam_dir)
    dataset = datasets.PCAM(tmp_path, "val")
    split = open_split(pcam_dir, "valid")
    assert len(dataset) == len(split)
    image, label = dataset[7]
    assert np.array_equal(image, split.images.mapped[7]) and label == split.labels[7]


def test_a_copied_folder_is_read_where_the_copy_is(tmp_path, monkeypatch):
    link = tmp_path / "link"
    link.symlink_to(tmp_path)
    monkeypatch.setenv("PCAM_DATA_COPY", json.dumps([str(tmp_path), "/scratch/copy"]))
    assert split_path(link, "train", "x").parent == Path("/scratch/copy")
    assert split_path("/other", "train", "x").parent == Path("/other")
