"""Import: any source of labelled images gives the same rows; what cannot be used is refused by
name; a killed run starts again.
"""

import io
import os
import random
import signal
import subprocess
import sys
import tarfile
import time

import numpy as np
import pytest
from conftest import REPOSITORY, draw_patches
from PIL import Image

import lib.prepare.ingest
import lib.prepare.target
from lib.command import BadInput
from lib.pcam import open_split, read_meta, split_path
from lib.prepare.ingest import import_images
from lib.prepare.verify import require_splits

NUM = {"train": 14, "valid": 6}
PATCHES = {split: draw_patches(num, seed) for seed, (split, num) in enumerate(NUM.items())}
PATCH = PATCHES["train"][0][0]
KINDS = {"jpg": "jpeg", "tif": "tiff"}


def encode(patch, kind="png", **options) -> bytes:
    data = io.BytesIO()
    Image.fromarray(patch).save(data, KINDS.get(kind, kind), **options)
    return data.getvalue()


def members(kind="png", prefix="", splits=tuple(NUM)) -> dict[str, bytes]:
    """{name: data}; sorted by name, patch10 would come before patch2, and 0 before 1."""
    files = {}
    for split in splits:
        for row, (patch, label) in enumerate(zip(*PATCHES[split], strict=True)):
            files[f"{prefix}{split}/{label}/patch{row}.{kind}"] = encode(patch, kind)
    return files


def write_tree(root, files):
    for name, data in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return root


def write_tar(path, files, mode="w", **fields):
    """A tar whose members come in random order, with some `fields`."""
    names = sorted(files)
    random.Random(1).shuffle(names)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode) as tar:
        for name in names:
            info = tarfile.TarInfo(name)
            info.size = len(files[name])
            for field, value in fields.items():
                setattr(info, field, value)
            tar.addfile(info, io.BytesIO(files[name]))
    return path


def folder_of_tars(root):
    for split in NUM:
        write_tar(root / f"{split}.tar", members(splits=[split]))
    return root


SOURCES = {
    "folder": lambda tmp: write_tree(tmp / "in", members("tif", "data/set/")),
    "packed tar": lambda tmp: write_tar(tmp / "in.tar.xz", members("png", "./pcam/"), "w:xz"),
    "folder of tars": lambda tmp: folder_of_tars(tmp / "in"),
}


@pytest.mark.parametrize("source", SOURCES)
def test_every_source_gives_the_same_rows_in_the_order_of_the_numbers(
    tmp_path, monkeypatch, source
):
    monkeypatch.setattr(lib.prepare.ingest, "BLOCK_ROWS", 4)  # several blocks
    result = import_images(SOURCES[source](tmp_path), tmp_path / "out")
    assert require_splits(tmp_path / "out") == ["train", "valid"] and result["skipped"] == {}
    for name, (patches, labels) in PATCHES.items():
        split = open_split(tmp_path / "out", name)
        np.testing.assert_array_equal(split.images.mapped, patches)
        np.testing.assert_array_equal(split.labels, labels)
        assert result["splits"][name]["patches"] == NUM[name]
    assert len(list((tmp_path / "out").iterdir())) == 4
    with pytest.raises(BadInput, match="already holds files"):
        import_images(tmp_path, tmp_path / "out")


def test_equal_numbers_go_by_label_then_name(tmp_path):
    order = ["0/a7.png", "1/a7.png", "1/b07.png", "1/a8.png", "0/x9_10.png", "0/none.png"]
    patches = PATCHES["train"][0][: len(order)]
    files = {f"train/{name}": encode(patch) for name, patch in zip(order, patches, strict=True)}
    import_images(write_tar(tmp_path / "in.tar", files), tmp_path / "out")
    images = open_split(tmp_path / "out", "train").images.mapped
    np.testing.assert_array_equal(images, patches)


def test_grey_and_transparent_images_are_converted_and_counted(tmp_path):
    grey = PATCH[..., 0]
    clear = np.dstack([PATCH, np.full((96, 96), 255, np.uint8)])
    clear[60:] = 0  # beyond the scanned area
    files = {"train/0/1.png": encode(grey), "train/1/2.png": encode(clear)}
    result = import_images(write_tree(tmp_path / "in", files), tmp_path / "out")
    assert result["splits"]["train"]["converted"] == {"L": 1, "RGBA": 1}
    images = open_split(tmp_path / "out", "train").images.mapped
    np.testing.assert_array_equal(images[0], np.dstack([grey] * 3))
    np.testing.assert_array_equal(images[1, :60], PATCH[:60])
    assert (images[1, 60:] == 255).all()


def test_what_is_left_out_is_counted_and_two_hospitals_may_have_equal_names(tmp_path):
    files = {"a/train/0/1.png": encode(PATCH), "b/train/0/1.png": encode(255 - PATCH)}
    files |= {"README.md": b"text", "unlabelled/5a.png": encode(PATCH), "more.zip": b"PK"}
    files["._valid.tar"] = b""  # macOS puts one beside each file
    source = write_tree(tmp_path / "in", files)
    (source / "again").symlink_to(source)  # a folder above is not entered once more
    result = import_images(source, tmp_path / "out")
    reasons = ["no label", *(f"not an image: .{ending}" for ending in ("md", "zip", "tar"))]
    assert result["skipped"] == dict.fromkeys(reasons, 1)
    assert result["splits"]["train"]["patches"] == 2


# tables: Kaggle's histopathologic-cancer-detection and Camelyon17-WILDS


def write_kaggle(root, table="id,label\n{rows}", row="{id},{label}\n", num=60):
    patches, labels = draw_patches(num, 5)
    files = {"test/00ff.tif": encode(patches[0], "tif")}
    lines = []
    for number in range(num):
        name = f"{number * 7919 % 997:040x}"
        files[f"train/{name}.tif"] = encode(patches[number], "tif")
        lines.append(row.format(id=name, label=labels[number]))
    files["train_labels.csv"] = table.format(rows="".join(lines)).encode()
    return write_tree(root, files), patches, labels


def test_kaggle_keeps_the_order_of_its_csv_and_the_hold_out_is_a_function_of_the_id(tmp_path):
    source, patches, labels = write_kaggle(tmp_path / "in")
    result = import_images(source, tmp_path / "out", valid_share=0.3)
    train, valid = (open_split(tmp_path / "out", name) for name in ("train", "valid"))
    assert result["skipped"] == {"no label": 1, "not an image: .csv": 1}
    assert len(train) + len(valid) == 60 and 8 <= len(valid) <= 28
    row_of = {patch.tobytes(): row for row, patch in enumerate(patches)}
    for split in (train, valid):
        rows = [row_of[patch.tobytes()] for patch in split.images.mapped]
        assert rows == sorted(rows) and split.labels.tolist() == labels[rows].tolist()
    # the same ids are held out, whatever their order
    table = source / "train_labels.csv"
    header, *lines = table.read_text().splitlines()
    table.write_text("\n".join([header, *reversed(lines), ""]))
    import_images(source, tmp_path / "out2", valid_share=0.3)
    held_out = open_split(tmp_path / "out2", "valid").images.mapped
    np.testing.assert_array_equal(held_out, valid.images.mapped[::-1])


@pytest.mark.parametrize(
    ("table", "row"),
    [
        (",id,label\n{rows}", "0,{id}.tif,{label}.0\n"),  # DataFrame.to_csv, after a gap
        ("\ufeffid;label\r\n{rows}", "{id};{label}\r\n"),  # Excel
    ],
)
def test_kaggles_table_is_read_as_people_have_edited_it(tmp_path, table, row):
    source, _, labels = write_kaggle(tmp_path / "in", table, row)
    splits = import_images(source, tmp_path / "out")["splits"]
    imported = np.concatenate([open_split(tmp_path / "out", name).labels for name in splits])
    assert len(imported) == 60 and imported.sum() == labels.sum()


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
    result = import_images(write_tree(tmp_path / "in", files), tmp_path / "out")
    for name, row, label, patient in (("train", 0, 0, "004"), ("valid", 2, 1, "017")):
        split = open_split(tmp_path / "out", name)
        assert split.labels.tolist() == [label]
        assert split.slides.tolist() == [f"patient_{patient}_node_4"]
        np.testing.assert_array_equal(split.images.mapped[0], PATCHES["train"][0][row])
    (row,) = read_meta(split_path(tmp_path / "out", "test", "meta"))
    assert (row["coord_y"], row["coord_x"]) == ("3328", "384")
    (reason,) = set(result["skipped"]) - {"not an image: .csv"}
    assert "id_val" in reason and result["skipped"][reason] == 1


def tree_with(name, data):
    return lambda tmp: write_tree(tmp / "in", members(splits=["valid"]) | {name: data})


def tar_with(name, **fields):
    return lambda tmp: write_tar(tmp / "in.tar", {name: b""}, **fields)


def kaggle_with(line):
    return lambda tmp: write_kaggle(tmp / "in", "id,label\n{rows}" + line, num=4)[0]


def cut_tar(mode):
    def write(tmp):
        path = write_tar(tmp / f"in.tar{mode[1:].replace(':', '.')}", members(), mode)
        os.truncate(path, path.stat().st_size // 2)
        return path

    return write


def unpacked_beside(tmp):
    """An archive and what a file manager unpacked of it."""
    return write_tree(folder_of_tars(tmp / "in"), members("png", "train/", ["train"]))


BAD_SOURCES = {
    "1234.png is 64x64": tree_with("train/0/1234.png", encode(PATCH[:64, :64])),
    "1234.jpg is not a readable image": tree_with("valid/1/1234.jpg", encode(PATCH, "jpg")[:900]),
    "did you mean 'valid'": tree_with("val/0/1.png", encode(PATCH)),
    "the folder 'tumour' must be a label": tree_with("train/tumour/1.png", encode(PATCH)),
    "has no images as SPLIT.*no label": lambda tmp: write_tree(tmp, {"images/1.png": b""}),
    "not an image: .h5.*read by repack": lambda tmp: write_tree(tmp / "in", {"x.h5": b""}),
    "in/kaggle holds train_labels.csv: import that": lambda tmp: (
        write_kaggle(tmp / "in" / "kaggle", num=4)[0].parent
    ),
    "in holds train_labels.csv: import that": lambda tmp: kaggle_with("")(tmp) / "train",
    "in.tar is not a whole tar archive: it is a zip archive: unpack": lambda tmp: (
        write_tree(tmp, {"in.tar": b"PK\x03\x04"}) / "in.tar"
    ),
    "no file or folder": lambda tmp: tmp / "nowhere",
    "climbs out": tar_with("train/0/../../../1.png"),
    "/1.png', which climbs out": tar_with("/train/0/1.png"),
    "is a link or a device": tar_with("x", type=tarfile.SYMTYPE, linkname="/etc/passwd"),
    "in.tar is not a whole tar": cut_tar("w"),
    "in.tar.gz is not a whole tar": cut_tar("w:gz"),
    "train.tar: train/./patch.*/in/train/train/./patch.* are one image": unpacked_beside,
    "ff has the label '2'": kaggle_with("ff,2\n"),
    "lists train/ff twice": kaggle_with("ff,1\nff,0\n"),
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


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_stopped_import_looks_incomplete_and_the_next_one_takes_its_place(tmp_path, number):
    target, held = tmp_path / "out", tmp_path / "held"
    arguments = [REPOSITORY, held, "import", SOURCES["folder of tars"](tmp_path), "--to", target]
    process = subprocess.Popen([sys.executable, "-c", HELD_UP, *arguments])
    while not held.exists() and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(number)
    code = process.wait()
    if number == signal.SIGKILL:
        assert split_path(target, "valid", "x").exists()
        with pytest.raises(BadInput, match="train"):
            require_splits(target)
    else:
        assert code == 130 and not target.exists()
    import_images(SOURCES["packed tar"](tmp_path), target)
    assert len(open_split(target, "train")) == 14
    assert not [path.name for path in target.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize("noticed", ["before", "while writing"])
def test_a_full_disk_is_one_sentence_and_leaves_nothing(tmp_path, monkeypatch, noticed):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=400k", "none", disk]
    if os.geteuid() or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("needs the right to mount a small disk")
    text = "0.6 MB are needed"
    if noticed == "while writing":
        monkeypatch.setattr(lib.prepare.target, "require_space", lambda *_: None)
        text = "writing 14 patches of train failed"
    try:
        with pytest.raises(BadInput, match=text):
            import_images(SOURCES["folder"](tmp_path), disk / "out")
        assert not any(disk.iterdir())
    finally:
        subprocess.run(["umount", "-l", disk], check=True)


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
    target = tmp_path / "out"
    command = [sys.executable, REPOSITORY / "prepare.py", "import", SOURCES["folder"](tmp_path)]
    result = subprocess.run(
        [*command, "--to", target],
        env=os.environ | {"LD_PRELOAD": str(library)},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0 and f"{target} cannot be locked" in result.stderr
    assert require_splits(target) == ["train", "valid"]
