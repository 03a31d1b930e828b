"""Import: any source of labelled images gives the same rows; what cannot be used is refused by
name; a killed run starts again.
"""

import os
import random
import subprocess
import sys
import tarfile
import time

import numpy as np
import pytest
from conftest import REPOSITORY, draw_patches
from test_inputs import encode, write_tar

import lib.prepare.ingest
from lib.command import BadInput
from lib.pcam import open_split, read_meta, split_path
from lib.prepare.ingest import import_images
from lib.prepare.verify import require_splits

NUM = {"train": 14, "valid": 6}
PATCHES = {split: draw_patches(num, seed) for seed, (split, num) in enumerate(NUM.items())}
PATCH = PATCHES["train"][0][0]


def members(prefix="", splits=tuple(NUM), ending="png", kind="PNG") -> dict[str, bytes]:
    """{name: data} in random order; sorted by name, patch10 would come before patch2, and 0 before
    1.
    """
    files = []
    for split in splits:
        for row, (patch, label) in enumerate(zip(*PATCHES[split], strict=True)):
            files.append((f"{prefix}{split}/{label}/patch{row}.{ending}", encode(patch, kind)))
    random.Random(1).shuffle(files)
    return dict(files)


def write_tree(root, files):
    for name, data in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return root


def folder_of_tars(root):
    root.mkdir()
    for split in NUM:
        write_tar(root / f"{split}.tar", members(splits=[split]))
    return root


def imported(directory, split):
    return open_split(directory, split).images.mapped


SOURCES = {
    "folder": lambda tmp: write_tree(tmp / "in", members("data/set/", ending="tif", kind="TIFF")),
    "packed tar": lambda tmp: write_tar(tmp / "in.tar.xz", members("./pcam/"), "w:xz"),
    "folder of tars": lambda tmp: folder_of_tars(tmp / "in"),
}


@pytest.mark.parametrize("source", SOURCES)
def test_every_source_gives_the_same_rows_in_the_order_of_the_numbers(
    tmp_path, monkeypatch, source
):
    monkeypatch.setattr(lib.prepare.ingest, "BLOCK_ROWS", 4)  # several blocks
    out = tmp_path / "out"
    assert import_images(SOURCES[source](tmp_path), out) == (["train", "valid"], {})
    for split, (patches, labels) in PATCHES.items():
        np.testing.assert_array_equal(imported(out, split), patches)
        np.testing.assert_array_equal(open_split(out, split).labels, labels)
    assert len(list(out.iterdir())) == 4
    with pytest.raises(BadInput, match="already holds files"):
        import_images(tmp_path, out)


def test_what_is_left_out_is_counted_and_two_hospitals_may_have_equal_names(tmp_path):
    files = {"a/train/0/1.png": encode(PATCH), "b/train/0/1.png": encode(255 - PATCH)}
    files |= {"README.md": b"text", "unlabelled/5a.png": encode(PATCH), "more.zip": b"PK"}
    files["._valid.tar"] = b""  # macOS puts one beside each file
    source = write_tree(tmp_path / "in", files)
    (source / "again").symlink_to(source)  # a folder above is not entered once more
    _, skipped = import_images(source, tmp_path / "out")
    reasons = ["no label", *(f"not an image: .{ending}" for ending in ("md", "zip", "tar"))]
    assert skipped == dict.fromkeys(reasons, 1)
    assert len(imported(tmp_path / "out", "train")) == 2


# tables: Kaggle's histopathologic-cancer-detection and Camelyon17-WILDS


def write_kaggle(root, table="id,label\n{rows}", row="{id},{label}\n", num=40):
    patches, labels = draw_patches(num, 5)
    files = {"test/00ff.tif": encode(patches[0], "TIFF")}
    lines = []
    for number in range(num):
        name = f"{number * 7919 % 997:040x}"
        files[f"train/{name}.tif"] = encode(patches[number], "TIFF")
        lines.append(row.format(id=name, label=labels[number]))
    files["train_labels.csv"] = table.format(rows="".join(lines)).encode()
    return write_tree(root, files), patches, labels


def test_kaggle_keeps_the_order_of_its_csv_and_the_hold_out_is_a_function_of_the_id(tmp_path):
    source, patches, labels = write_kaggle(tmp_path / "in")
    _, skipped = import_images(source, tmp_path / "out", valid_share=0.3)
    assert skipped == {"no label": 1, "not an image: .csv": 1}
    table = source / "train_labels.csv"
    header, *lines = table.read_text().splitlines()
    table.write_text("\n".join([header, *lines[::-1], ""]))
    import_images(source, tmp_path / "reversed", valid_share=0.3)
    num = 0
    for name in NUM:
        split = open_split(tmp_path / "out", name)
        rows = [int((patches == patch).all((1, 2, 3)).argmax()) for patch in split.images.mapped]
        assert rows == sorted(rows) and split.labels.tolist() == labels[rows].tolist()
        np.testing.assert_array_equal(imported(tmp_path / "reversed", name), patches[rows[::-1]])
        num += len(rows)
    assert num == 40 and 4 <= len(rows) <= 20


@pytest.mark.parametrize(
    ("table", "row"),
    [
        (",id,label\n{rows}", "0,{id}.tif,{label}.0\n"),  # DataFrame.to_csv, after a gap
        ("\ufeffid;label\r\n{rows}", "{id};{label}\r\n"),  # Excel
    ],
)
def test_kaggles_table_is_read_as_people_have_edited_it(tmp_path, table, row):
    source, _, labels = write_kaggle(tmp_path / "in", table, row)
    splits, _ = import_images(source, tmp_path / "out")
    imported = np.concatenate([open_split(tmp_path / "out", name).labels for name in splits])
    assert sorted(imported) == sorted(labels)


WILDS = """\
,patient,node,x_coord,y_coord,tumor,slide,center,split
0,004,4,96,3328,0,0,0,0
1,004,4,192,3328,1,0,0,1
2,017,4,288,3328,1,1,1,0
3,020,4,384,3328,0,2,2,1
"""


def test_wilds_gets_the_splits_of_its_benchmark_and_its_slides(tmp_path):
    files = {"metadata.csv": WILDS.encode()}
    for row, patient in enumerate(("004", "004", "017", "020")):
        slide = f"patient_{patient}_node_4"
        name = f"patches/{slide}/patch_{slide}_x_{96 * row + 96}_y_3328.png"
        files[name] = encode(PATCHES["train"][0][row])
    _, skipped = import_images(write_tree(tmp_path / "in", files), tmp_path / "out")
    assert sum(count for reason, count in skipped.items() if "id_val" in reason) == 1
    for name, row, label, slide in (
        ("train", 0, 0, "patient_004_node_4"),
        ("valid", 2, 1, "patient_017_node_4"),
        ("test", 3, 0, "patient_020_node_4"),
    ):
        split = open_split(tmp_path / "out", name)
        assert (split.labels.tolist(), split.slides.tolist()) == ([label], [slide])
        np.testing.assert_array_equal(split.images.mapped[0], PATCHES["train"][0][row])
        (place,) = read_meta(split_path(tmp_path / "out", name, "meta"))
        assert (place["coord_y"], place["coord_x"]) == ("3328", str(96 * row + 96))


def tree_with(name, data):
    return lambda tmp: write_tree(tmp / "in", members(splits=["valid"]) | {name: data})


def tar_with(name, kind=tarfile.REGTYPE):
    return lambda tmp: write_tar(tmp / "in.tar", {name: b""}, kind=kind)


def kaggle_with(line):
    return lambda tmp: write_kaggle(tmp / "in", "id,label\n{rows}" + line, num=4)[0]


def cut_tar(tmp):
    path = write_tar(tmp / "in.tar", members())
    os.truncate(path, path.stat().st_size // 2)
    return path


def unpacked_beside(tmp):
    """An archive and what a file manager unpacked of it."""
    return write_tree(folder_of_tars(tmp / "in"), members("train/", ["train"]))


BAD_SOURCES = {
    "1234.png is 64x64": tree_with("train/0/1234.png", encode(PATCH[:64, :64])),
    "1234.jpg is not a readable image": tree_with("valid/1/1234.jpg", encode(PATCH, "JPEG")[:900]),
    "did you mean 'valid'": tree_with("val/0/1.png", encode(PATCH)),
    "train/tumour must be SPLIT/LABEL": tree_with("train/tumour/1.png", encode(PATCH)),
    "has no images as SPLIT.*no label": lambda tmp: write_tree(tmp, {"images/1.png": b""}),
    "not an image: .h5.*read by repack": lambda tmp: write_tree(tmp / "in", {"x.h5": b""}),
    "in holds train_labels.csv: import that": lambda tmp: kaggle_with("")(tmp) / "train",
    "in.tar is not a whole tar archive: it is a zip archive: unpack": lambda tmp: (
        write_tree(tmp, {"in.tar": b"PK\x03\x04"}) / "in.tar"
    ),
    "no file or folder": lambda tmp: tmp / "nowhere",
    "climbs out": tar_with("train/0/../../../1.png"),
    "/1.png is not a readable image": tar_with("train/0/1.png", tarfile.SYMTYPE),
    "in.tar is not a whole tar": cut_tar,
    "train.tar: train/./patch.*/in/train/train/./patch.* are one image": unpacked_beside,
    "ff has the label '2'": kaggle_with("ff,2\n"),
    r"2 images that are not there \(train/ab, train/cd\): take": kaggle_with("ab,1\ncd,0\n"),
}


@pytest.mark.parametrize("text", BAD_SOURCES)
def test_bad_input_is_refused_by_name_and_leaves_nothing(tmp_path, text):
    source = BAD_SOURCES[text](tmp_path)
    with pytest.raises(BadInput, match=text) as refusal:
        import_images(source, tmp_path / "out")
    assert "\n" not in str(refusal.value) and not (tmp_path / "out").exists()


HELD_UP = """
import sys, time
sys.path.insert(0, sys.argv[1])
import prepare
from lib.splitwriter import SplitWriter
add = SplitWriter.add
def add_and_wait(writer, *rows):
    add(writer, *rows)
    if writer.split == "train":
        open(sys.argv[2], "w").close()
        time.sleep(600)
SplitWriter.add = add_and_wait
sys.exit(prepare.main(sys.argv[3:]))
"""


def test_a_killed_import_looks_incomplete_and_the_next_one_takes_its_place(tmp_path):
    out = tmp_path / "out"
    held = tmp_path / "held"
    arguments = [REPOSITORY, held, "import", SOURCES["folder of tars"](tmp_path), "--to", out]
    process = subprocess.Popen([sys.executable, "-c", HELD_UP, *arguments])
    while not held.exists() and process.poll() is None:
        time.sleep(0.01)
    process.kill()
    process.wait()
    assert split_path(out, "valid", "x").exists()
    with pytest.raises(BadInput, match="train"):
        require_splits(out)
    import_images(SOURCES["packed tar"](tmp_path), out)
    assert len(list(out.iterdir())) == 4 and len(imported(out, "train")) == 14


NO_LOCKS = """
#include <errno.h>
int flock(int descriptor, int operation) { errno = ENOLCK; return -1; }
"""


def test_a_file_system_without_locks_is_written_with_a_note(tmp_path):
    """All writers share SplitWriter."""
    (tmp_path / "nolock.c").write_text(NO_LOCKS)
    library = tmp_path / "nolock.so"
    try:
        subprocess.run(["cc", "-shared", "-fPIC", "-o", library, tmp_path / "nolock.c"], check=True)
    except FileNotFoundError:
        pytest.skip("needs a C compiler")
    out = tmp_path / "out"
    command = [sys.executable, REPOSITORY / "prepare.py", "import", SOURCES["folder"](tmp_path)]
    environment = os.environ | {"LD_PRELOAD": str(library)}
    options = {"env": environment, "capture_output": True, "text": True}
    result = subprocess.run([*command, "--to", out], **options)
    assert result.returncode == 0 and f"{out} cannot be locked" in result.stderr
    assert require_splits(out) == ["train", "valid"]
