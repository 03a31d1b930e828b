"""The PCam files: mapped where they can be, read equal where they cannot, refused by name where
they are damaged.
"""

import errno
import hashlib
import json
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest
from conftest import draw_patches, write_pcam

from lib.command import BadInput
from lib.fingerprint import FINGERPRINT_FILE, fingerprint
from lib.pcam import open_images, open_split, read_labels, split_path
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


def test_damage_in_floats_reads_as_documented(tmp_path):
    values = IMAGES[:4].astype(np.float32)
    # halves go to the even neighbour, as numpy rounds
    values[0, 0, :3] = [[np.nan, np.inf, -np.inf], [-5, 255.4, 1e5], [0.5, 1.5, 254.6]]
    (patch,) = open_images(write_h5(tmp_path / "x.h5", values)).read([0])
    assert patch[0, :3].tolist() == [[0, 255, 0], [0, 255, 255], [0, 2, 255]]
    assert np.array_equal(patch[1:], IMAGES[0, 1:])


def write(part, values, **options):
    """Replace a file of the train split by such a dataset."""
    return lambda path: write_h5(path(part), values, part, **options)


def cut(part, share):
    return lambda path: os.truncate(path(part), int(path(part).stat().st_size * share))


def rename_x(name):
    return lambda path: path("x").rename(path("x").with_name(name))


def corrupt_chunk(path):
    write_h5(path("x"), IMAGES[:8], chunks=(1, 96, 96, 3), compression="gzip")
    with h5py.File(path("x")) as file:
        offset = file["x"].id.get_chunk_info(0).byte_offset
    with open(path("x"), "r+b") as file:
        file.seek(offset + 10)
        file.write(b"\xff" * 64)


def move_below(*folders):
    """Move the files of the folder into one below it, as other downloads have them."""

    def move(path):
        target = path("x").parent.joinpath(*folders)
        target.mkdir(parents=True)
        for file in [*path("x").parent.glob("*.h5")]:
            file.rename(target / file.name)

    return move


def link_to_nothing(path):
    path("x").unlink()
    path("x").symlink_to(".git/annex/objects/MD5E-s4")


def write_bytes(data):
    return lambda path: path("x").write_bytes(data)


LEAVE_OPEN = """
import h5py, os, sys
file = h5py.File(sys.argv[1], "w", libver="latest")
file["x"] = [0]
file.flush()
os._exit(0)
"""


def kill_writer(path):
    """All data are on the disk, and the mark of an open file too."""
    subprocess.run([sys.executable, "-c", LEAVE_OPEN, path("x")], check=True)


def compress_by_plugin(path):
    with h5py.File(path("x"), "w") as file:
        plist = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        plist.set_chunk((8, 96, 96, 3))
        plist.set_filter(32001, h5py.h5z.FLAG_OPTIONAL, (2, 2, 1, 8 * 27648, 5, 1, 0))
        space = h5py.h5s.create_simple((8, 96, 96, 3))
        h5py.h5d.create(file.id, b"x", h5py.h5t.STD_U8LE, space, plist)


def link_parts(path):
    """x is put together from another file, which is left behind."""
    layout = h5py.VirtualLayout((8, 96, 96, 3), np.uint8)
    layout[:] = h5py.VirtualSource("part.h5", "x", (8, 96, 96, 3))
    with h5py.File(path("x"), "w") as file:
        file.create_virtual_dataset("x", layout)


META = ",coord_y,coord_x,wsi\n" + "0,1,2,s\n" * 7
X_NAME = split_path("", "train", "x").name
# what is done to the files of train, and words that a refusal must hold besides the file's name
DAMAGES = {
    "no folder": (lambda path: shutil.rmtree(path("x").parent), []),
    "missing labels": (lambda path: path("y").unlink(), []),
    "misnamed": (rename_x(X_NAME.replace("train", "trian")), [X_NAME, "trian"]),
    "still packed": (rename_x(X_NAME + ".gz"), [X_NAME + ".gz", "gunzip"]),
    "a folder below": (move_below("pcam"), [X_NAME, "pcam/camelyon", "name that folder"]),
    "two folders below": (move_below("a", "b"), [X_NAME, "a/b/camelyon", "name that folder"]),
    "Kaggle's name": (rename_x("training_split.h5"), [X_NAME, "training_split.h5: give it this"]),
    "linked to nothing": (link_to_nothing, [X_NAME, "annex", "not there"]),
    "a web page": (write_bytes(b"<!DOCTYPE html><title>Quota"), [X_NAME, "web page"]),
    "Git LFS": (write_bytes(b"version https://git-lfs.github.com/spec/v1\n"), ["git lfs pull"]),
    "packed, misnamed": (write_bytes(b"\x1f\x8b\x08"), [X_NAME, "gunzip"]),
    "killed writer": (kill_writer, [X_NAME, "h5clear -s"]),
    "a plugin's compression": (compress_by_plugin, [X_NAME, "32001 (blosc)", "hdf5plugin"]),
    "parts left behind": (link_parts, [X_NAME, "part.h5", "not there"]),
    "shorter y": (write("y", np.zeros((7, 1, 1, 1))), ["train", "8", "7"]),
    "channels first": (write("x", IMAGES[:8].transpose(0, 3, 1, 2)), [X_NAME, "(N, 96, 96, 3)"]),
    "int64": (write("x", IMAGES[:8].astype(np.int64)), [X_NAME, "int64", "uint8"]),
    "scaled": (write("x", IMAGES[:8] / np.float32(255)), [X_NAME, "[0, 1]", "repack"]),
    "no dataset": (lambda path: write_h5(path("x"), 3, "images"), [X_NAME, "'x'", "images"]),
    "cut half": (cut("x", 0.5), [X_NAME, "truncated"]),
    "bad chunk": (corrupt_chunk, [X_NAME, "row 0"]),
    "label 2": (write("y", np.array([0, 1, 2, 0, 1, 1, 0, 3])), ["row 2", "label 2", "2 such"]),
    "short meta": (lambda path: path("meta").write_text(META), ["meta", "7", "8"]),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_bad_input_is_refused_in_one_sentence_that_names_the_file(tmp_path, damage):
    folder = write_pcam(tmp_path / "a folder", 8, 4)
    apply, words = DAMAGES[damage]
    apply(lambda part: split_path(folder, "train", part))
    with pytest.raises(BadInput) as refusal:
        open_split(folder, "train").images.read(np.arange(8))
    sentence = str(refusal.value)
    assert all(word in sentence for word in [str(folder), *words]), sentence
    assert "\n" not in sentence and "mean 'camelyonpatch_level_2_split_train_y" not in sentence


def test_a_file_is_no_folder_and_the_folder_below_is_not_the_one(tmp_path):
    folder = write_pcam(tmp_path / "data" / "pcam", 8, 4)
    with pytest.raises(BadInput, match="is a file: name the folder"):
        open_split(split_path(folder, "train", "x"), "train")
    (folder / "inside").mkdir()
    with pytest.raises(BadInput, match=f"it is {folder}.*name that folder"):
        open_split(folder / "inside", "train")


def test_what_the_system_refuses_is_no_damage(tmp_path):
    path = split_path(tmp_path, "train", "x")
    path.symlink_to("/proc/self/mem")  # which nobody can read at its start
    with pytest.raises(OSError) as refusal:
        open_images(path)
    assert refusal.value.errno == errno.EIO and refusal.value.filename == str(path)


def test_what_is_written_is_official_and_comes_back_equal(tmp_path):
    meta = [(3, 4, 1, 0, "camelyon16_train_tumor_001"), (5, 6, 0, 0, "slide, with comma")] * 20
    with SplitWriter(tmp_path, "valid", 40) as writer:
        for rows in (slice(0, 15), slice(15, 40)):
            writer.add(IMAGES[rows], LABELS[rows], meta[rows])
        assert not list(tmp_path.glob("camelyon*")), "nothing official before the end"
    split = open_split(tmp_path, "valid")
    assert np.array_equal(split.images.mapped, IMAGES) and np.array_equal(split.labels, LABELS)
    assert split.slides.tolist() == [row[4] for row in meta]
    paths = [split_path(tmp_path, "valid", part) for part in ("x", "y", "meta")]
    assert set(tmp_path.iterdir()) == set(paths), "nothing else is left"
    for values in (LABELS[:, None], LABELS.astype(np.float64), LABELS.astype(bool)):
        labels = read_labels(write_h5(paths[1], values, "y"))
        assert labels.dtype == np.uint8 and labels.tolist() == LABELS.tolist()


def test_a_writer_that_fails_leaves_nothing_and_a_folder_has_one_at_a_time(tmp_path):
    folder = tmp_path / "new"
    with pytest.raises(KeyboardInterrupt), sole_writer(folder):
        with pytest.raises(BadInput, match="another process"), sole_writer(folder):
            raise AssertionError("two writers")
        with SplitWriter(folder, "train", 20) as writer:
            writer.add(IMAGES[:10], LABELS[:10])
            raise KeyboardInterrupt
    assert os.listdir(tmp_path) == []
    with sole_writer(folder):
        pass


def test_a_full_disk_is_refused_by_name_and_leaves_nothing(tmp_path):
    """A limit on the size of files fails as a full disk does, and needs no disk of its own."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, limits[1]))
    refusal = pytest.raises(BadInput, match=f"{tmp_path}.*is the disk full")
    try:
        with refusal, SplitWriter(tmp_path, "train", 40) as writer:
            writer.add(IMAGES, LABELS)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("store", ["beside the data", "of the user", "nowhere"])
def test_the_fingerprint_is_the_files_sha256_kept_where_it_can_be(tmp_path, monkeypatch, store):
    folder = write_pcam(tmp_path / "data", 8, 4)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    if store != "beside the data":
        (folder / FINGERPRINT_FILE).mkdir()  # refused even to root
    if store == "nowhere":
        (tmp_path / "cache").write_text("")
    before = fingerprint(folder)
    labels = open_split(folder, "valid").labels
    write_labels(split_path(folder, "valid", "y"), 1 - labels)  # the same size
    digests = fingerprint(folder)
    files = {path.name: path.read_bytes() for path in folder.glob("*.h5")}
    assert digests == {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}
    assert len(before.items() - digests.items()) == 1
    if store != "nowhere":
        monkeypatch.setattr("lib.fingerprint.file_digest", lambda *_: pytest.fail("hashed again"))
    assert fingerprint(folder, ["valid"]).items() <= digests.items()


def test_torchvision_opens_the_files_and_sees_the_same(pcam_dir, tmp_path):
    datasets = pytest.importorskip("torchvision.datasets")
    (tmp_path / "pcam").symlink_to(pcam_dir)
    dataset, ours = datasets.PCAM(tmp_path, "val"), open_split(pcam_dir, "valid")
    assert len(dataset) == len(ours)
    for row in (0, 7, 63):
        image, label = dataset[row]
        assert np.array_equal(image, ours.images.mapped[row]) and label == ours.labels[row]


def test_a_copied_folder_is_read_where_the_copy_is(tmp_path, monkeypatch):
    there, link = tmp_path / "data", tmp_path / "link"
    there.mkdir()
    link.symlink_to(there)
    monkeypatch.setenv("PCAM_DATA_COPY", json.dumps([str(there), "/scratch/copy"]))
    assert split_path(link, "train", "x").parent == Path("/scratch/copy")
    assert split_path(tmp_path, "train", "x").parent == tmp_path
