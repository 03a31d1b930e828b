"""Import: any source of labelled images gives the same rows; what cannot be used is refused by
name; a killed run goes on.
"""

import io
import json
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
from lib.prepare.target import JOURNAL_FILE
from lib.prepare.verify import require_splits

NUM = {"train": 14, "valid": 6}
PATCHES = {split: draw_patches(num, seed) for seed, (split, num) in enumerate(NUM.items())}
PATCH = PATCHES["train"][0][0]


def encode(patch, kind="png", **options) -> bytes:
    data = io.BytesIO()
    Image.fromarray(patch).save(data, {"jpg": "jpeg", "tif": "tiff"}.get(kind, kind), **options)
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
    """A tar whose members come in random order; `fields` overwrite those of the last one."""
    names = sorted(files)
    random.Random(1).shuffle(names)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode) as tar:
        for name in names:
            info = tarfile.TarInfo(name)
            info.size = len(files[name])
            for field, value in fields.items() if name == names[-1] else ():
                setattr(info, field, value)
            tar.addfile(info, io.BytesIO(files[name]))
    return path


def folder_of_tars(root):
    for split in NUM:
        write_tar(root / f"{split}.tar", members(splits=[split]))
    return root


SOURCES = {
    "folder": lambda tmp: write_tree(tmp / "in", members()),
    "tif and a folder above": lambda tmp: write_tree(tmp / "in", members("tif", "data/set/")),
    "tar": lambda tmp: write_tar(tmp / "in.tar", members()),
    "tar.gz": lambda tmp: write_tar(tmp / "in.tar.gz", members(), "w:gz"),
    "tar.xz below ./pcam": lambda tmp: write_tar(tmp / "in.tar.xz", members("png", "./pcam/"), "w:xz"),
    "folder of tars": lambda tmp: folder_of_tars(tmp / "in"),
}  # fmt: skip


@pytest.mark.parametrize("source", SOURCES)
def test_every_source_gives_the_same_rows_in_the_order_of_the_numbers(tmp_path, source):
    result = import_images(SOURCES[source](tmp_path), tmp_path / "out")
    assert require_splits(tmp_path / "out") == ["train", "valid"] and result["skipped"] == {}
    for name, (patches, labels) in PATCHES.items():
        split = open_split(tmp_path / "out", name)
        np.testing.assert_array_equal(split.images.mapped, patches)
        np.testing.assert_array_equal(split.labels, labels)
        assert result["splits"][name]["patches"] == NUM[name]
    assert not any(tmp_path.glob("out/.*.tmp"))


def test_jpeg_pixels_are_pillows_and_equal_numbers_go_by_label_then_name(tmp_path, monkeypatch):
    monkeypatch.setattr(lib.prepare.ingest, "BLOCK_ROWS", 4)  # several blocks
    order = ["0/a7.jpg", "1/a7.jpg", "1/b07.jpg", "1/a8.jpg", "0/x9_10.jpg", "0/none.jpg"]
    files = {}
    for name, patch in zip(order, PATCHES["train"][0], strict=False):
        files[f"train/{name}"] = encode(patch, "jpg", quality=75)
    import_images(write_tar(tmp_path / "in.tar", files), tmp_path / "out")
    images = open_split(tmp_path / "out", "train").images.mapped
    for image, name in zip(images, order, strict=True):
        np.testing.assert_array_equal(image, Image.open(io.BytesIO(files[f"train/{name}"])))


def test_grey_and_transparent_images_are_converted_and_counted(tmp_path):
    grey, patch = PATCHES["train"][0][0][..., 0], PATCHES["train"][0][1]
    alpha = np.full((96, 96, 1), 255, np.uint8)
    alpha[60:] = 0  # beyond the scanned area
    clear = np.dstack([patch * (alpha > 0), alpha])
    files = {"train/0/1.png": encode(grey), "train/1/2.png": encode(clear)}
    result = import_images(write_tree(tmp_path / "in", files), tmp_path / "out")
    assert result["splits"]["train"]["converted"] == {"L": 1, "RGBA": 1}
    images = open_split(tmp_path / "out", "train").images.mapped
    np.testing.assert_array_equal(images[0], np.dstack([grey] * 3))
    np.testing.assert_array_equal(images[1], np.where(alpha, patch, 255))


def test_what_is_left_out_is_counted_by_its_reason(tmp_path):
    source = write_tree(tmp_path / "in", members())
    more = {"README.md": b"text", "unlabelled/5a.png": encode(PATCH), "more.zip": b"PK"}
    write_tree(source, more)
    (source / "._valid.tar").write_bytes(b"")  # macOS puts one beside each file
    os.mkfifo(source / "train" / "0" / "f.png")
    (source / "again").symlink_to(source)  # a folder above is not entered once more
    result = import_images(source, tmp_path / "out")
    reasons = ["no label", *(f"not an image: .{ending}" for ending in ("md", "png", "zip", "tar"))]
    assert result["skipped"] == dict.fromkeys(reasons, 1)
    assert result["splits"]["train"]["patches"] == NUM["train"]


# tables: Kaggle's histopathologic-cancer-detection and Camelyon17-WILDS


def write_kaggle(root, table="id,label\n{rows}", row="{id},{label}\n", num=60, step=1):
    patches, labels = draw_patches(num, 5)
    names = [f"{row * 7919 % 997:040x}" for row in range(num)]
    files = {f"train/{name}.tif": encode(patch, "tif") for name, patch in zip(names, patches)}  # noqa: B905
    lines = [row.format(id=name, label=label) for name, label in zip(names, labels, strict=True)]
    files["train_labels.csv"] = table.format(rows="".join(lines[::step])).encode()
    files["test/00ff.tif"] = encode(patches[0], "tif")
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
    backwards, *_ = write_kaggle(tmp_path / "in2", step=-1)
    import_images(backwards, tmp_path / "out2", valid_share=0.3)
    held_out = open_split(tmp_path / "out2", "valid").images.mapped
    np.testing.assert_array_equal(held_out, valid.images.mapped[::-1])


@pytest.mark.parametrize(
    ("table", "row"),
    [
        ("id,label\n{rows}", "{id}.tif,{label}\n"),  # for flow_from_dataframe
        (",id,label\n{rows}", "0,{id},{label}.0\n"),  # DataFrame.to_csv, after a gap
        ("\ufeffid;label\r\n{rows}", "{id};{label}\r\n"),  # Excel
    ],
)
def test_kaggles_table_is_read_as_people_have_edited_it(tmp_path, table, row):
    source, _, labels = write_kaggle(tmp_path / "in", table, row)
    result = import_images(source, tmp_path / "out")["splits"]
    assert sum(split["patches"] for split in result.values()) == 60
    imported = [open_split(tmp_path / "out", name).labels for name in result]
    assert np.concatenate(imported).sum() == labels.sum()


def test_wilds_gets_the_splits_of_its_benchmark_and_its_slides(tmp_path):
    lines, files = [",patient,node,x_coord,y_coord,tumor,slide,center,split"], {}
    rows = [("004", 0, 0, 0), ("004", 0, 1, 1), ("017", 1, 1, 0), ("020", 2, 0, 1)]
    for row, (patient, center, tumor, split) in enumerate(rows):
        slide = f"patient_{patient}_node_4"
        lines.append(f"{row},{patient},4,{96 * row},3328,{tumor},{row},{center},{split}")
        opaque = np.dstack([PATCHES["train"][0][row], np.full((96, 96), 255, np.uint8)])
        files[f"patches/{slide}/patch_{slide}_x_{96 * row}_y_3328.png"] = encode(opaque)
    files["metadata.csv"] = "\n".join([*lines, ""]).encode()
    result = import_images(write_tree(tmp_path / "in", files), tmp_path / "out")
    for name, row, label in (("train", 0, 0), ("valid", 2, 1), ("test", 3, 0)):
        split = open_split(tmp_path / "out", name)
        assert split.labels.tolist() == [label]
        assert split.slides.tolist() == [f"patient_{rows[row][0]}_node_4"]
        np.testing.assert_array_equal(split.images.mapped[0], PATCHES["train"][0][row])
    meta = read_meta(split_path(tmp_path / "out", "test", "meta"))
    assert (meta[0]["coord_y"], meta[0]["coord_x"]) == ("3328", "288")
    (reason,) = set(result["skipped"]) - {"not an image: .csv"}
    assert "id_val" in reason and result["skipped"][reason] == 1


def tree_with(name, data):
    return lambda tmp: write_tree(tmp / "in", members() | {name: data})


def tar_with(name, **fields):
    return lambda tmp: write_tar(tmp / "in.tar", members() | {name: b""}, **fields)


def kaggle_with(line):
    return lambda tmp: write_kaggle(tmp / "in", "id,label\n{rows}" + line)[0]


def cut_tar(mode, kept):
    """A tar that ends after a share of its bytes or, for 0, at the head of a member."""

    def write(tmp):
        path = write_tar(tmp / f"in.tar{mode[1:].replace(':', '.')}", members(), mode)
        size = int(path.stat().st_size * kept)
        if not kept:
            with tarfile.open(path) as tar:
                size = tar.getmembers()[3].offset
        os.truncate(path, size)
        return path

    return write


def unpacked_beside(folder):
    """An archive and what a file manager unpacked of it into `folder`."""

    def write(tmp):
        source = folder_of_tars(tmp / "in")
        return write_tree(source, members("png", folder, ["train"]))

    return write


BAD_SOURCES = {
    "1234.png is 64x64": tree_with("train/0/1234.png", encode(PATCH[:64, :64])),
    "1234.jpg is not a readable image": tree_with("valid/1/1234.jpg", encode(PATCH, "jpg")[:900]),
    "did you mean 'valid'": tree_with("val/0/1.png", encode(PATCH)),
    "the folder 'tumour' must be a label": tree_with("train/tumour/1.png", encode(PATCH)),
    "has no images as SPLIT": lambda tmp: write_tree(tmp / "in", {"images/1.png": encode(PATCH)}),
    "not an image: .h5.*read by repack": lambda tmp: write_tree(tmp / "in", {"x.h5": b""}),
    "in/kaggle holds train_labels.csv: import that": lambda tmp: (
        write_kaggle(tmp / "in" / "kaggle")[0].parent
    ),
    "in holds train_labels.csv: import that": lambda tmp: write_kaggle(tmp / "in")[0] / "train",
    "in.tar is not a whole tar archive: it is a zip archive: unpack": lambda tmp: (
        write_tree(tmp, {"in.tar": b"PK\x03\x04"}) / "in.tar"
    ),
    "it is empty": lambda tmp: tmp,
    "no file or folder": lambda tmp: tmp / "nowhere",
    "climbs out": tar_with("train/0/../../../1.png"),
    "/1.png', which climbs out": tar_with("/train/0/1.png"),
    "is a link or a device": tar_with("x", type=tarfile.SYMTYPE, linkname="/etc/passwd"),
    "in.tar is not a whole tar": cut_tar("w", 0.5),
    "cut off or damaged at byte": cut_tar("w", 0),
    "in.tar.gz is not a whole tar": cut_tar("w:gz", 0.5),
    "train.tar: train/./patch.*/in/train/./patch.* are one image": unpacked_beside(""),
    "train.tar: train/./patch.*/in/train/train/./patch.* are one image": unpacked_beside("train/"),
    "ff has the label '2'": kaggle_with("ff,2\n"),
    "lists train/ff twice": kaggle_with("ff,1\nff,0\n"),
    "not a readable CSV": kaggle_with('abc,"1\n'),
    r"2 images that are not there \(train/ab, train/cd\): take": kaggle_with("ab,1\ncd,0\n"),
}  # fmt: skip


@pytest.mark.parametrize("text", BAD_SOURCES)
def test_bad_input_is_refused_by_name_and_leaves_nothing(tmp_path, text):
    source = BAD_SOURCES[text](tmp_path)
    with pytest.raises(BadInput, match=text) as refusal:
        import_images(source, tmp_path / "out")
    assert "\n" not in str(refusal.value) and not (tmp_path / "out").exists()


def test_images_of_two_hospitals_may_have_equal_names(tmp_path):
    files = {"a/train/0/1.png": encode(PATCH), "b/train/0/1.png": encode(255 - PATCH)}
    result = import_images(write_tree(tmp_path / "in", files), tmp_path / "out")
    assert result["splits"]["train"]["patches"] == 2


@pytest.mark.parametrize("filled_by", ["hand", "a finished import"])
def test_a_folder_that_holds_something_is_refused_and_stays_as_it_is(tmp_path, filled_by):
    source, target = SOURCES["tar"](tmp_path), tmp_path / "out"
    if filled_by == "hand":
        write_tree(target, {split_path("", "train", "x").name: b"mine"})
    else:
        import_images(source, target)
    before = {path.name: path.read_bytes() for path in target.iterdir()}
    with pytest.raises(BadInput, match="already holds files"):
        import_images(source, target)
    assert {path.name: path.read_bytes() for path in target.iterdir()} == before


@pytest.fixture(scope="module")
def large_tar(tmp_path_factory):
    """400 train and 3 valid images: more than a small disk holds."""
    files = {}
    for row in range(400):
        files[f"train/{row % 2}/{row}.jpg"] = encode(PATCH, "jpg")
    for row in range(3):
        files[f"valid/1/{row}.jpg"] = encode(PATCH, "jpg")
    return write_tar(tmp_path_factory.mktemp("large") / "in.tar", files)


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


def stop_in_mid_train(target, with_signal, *arguments):
    """Run prepare.py in a process of its own and stop it with part of the train split written;
    gives exit code, stderr.
    """
    held = target.with_name(f"{target.name} held")
    process = subprocess.Popen(
        [sys.executable, "-c", HELD_UP, str(REPOSITORY), str(held), *map(str, arguments)],
        stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True,
        # a job in the background ignores it
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    while not held.exists() and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(with_signal)
    return process.wait(), process.stderr.read()


@pytest.mark.parametrize("way", [signal.SIGKILL, signal.SIGINT])
def test_a_stopped_import_looks_incomplete_and_goes_on_where_it_was(tmp_path, large_tar, way):
    target = tmp_path / "out"
    code, stderr = stop_in_mid_train(target, way, "import", large_tar, "--to", target)
    assert code == (130 if way == signal.SIGINT else -9) and "Traceback" not in stderr
    assert any(target.glob(".*.tmp")) == (way == signal.SIGKILL)
    with pytest.raises(BadInput, match="train"):
        require_splits(target)
    valid_written_at = split_path(target, "valid", "x").stat().st_mtime_ns
    with pytest.raises(BadInput, match="was begun from .*in.tar"):
        import_images(SOURCES["folder"](tmp_path), target)
    assert import_images(large_tar, target)["splits"]["train"]["patches"] == 400
    assert len(open_split(target, "train")) == 400 and not any(target.glob(".*.tmp"))
    assert split_path(target, "valid", "x").stat().st_mtime_ns == valid_written_at
    assert json.loads((target / JOURNAL_FILE).read_text())["finished"]


@pytest.mark.parametrize("noticed", ["before", "while writing"])
def test_a_full_disk_is_one_sentence_and_leaves_nothing(tmp_path, large_tar, monkeypatch, noticed):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=8m", "none", disk]
    if os.geteuid() or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("needs the right to mount a small disk")
    text = "11.1 MB are needed"
    if noticed == "while writing":
        monkeypatch.setattr(lib.prepare.target, "require_space", lambda *_: None)
        text = "writing 400 patches of train failed"
    try:
        with pytest.raises(BadInput, match=text):
            import_images(large_tar, disk / "out")
        assert not any(disk.iterdir())
    finally:
        subprocess.run(["umount", "-l", disk], check=True)


NO_LOCKS = """
#include <errno.h>
int flock(int descriptor, int operation) { errno = ENOLCK; return -1; }
"""


@pytest.fixture(scope="session")
def no_locks(tmp_path_factory):
    """A library that takes away the locks of all file systems, for LD_PRELOAD."""
    folder = tmp_path_factory.mktemp("nolock")
    (folder / "nolock.c").write_text(NO_LOCKS)
    command = ["cc", "-shared", "-fPIC", "-o", folder / "nolock.so", folder / "nolock.c"]
    try:
        subprocess.run(command, check=True)
    except FileNotFoundError:
        pytest.skip("needs a C compiler")
    return folder / "nolock.so"


@pytest.mark.parametrize("verb", ["import", "repack", "synthetic"])
def test_a_file_system_without_locks_is_written_with_a_note(tmp_path, no_locks, verb):
    source = SOURCES["folder"](tmp_path)
    import_images(source, tmp_path / "pcam")
    options = {
        "import": [source],
        "repack": [tmp_path / "pcam"],
        "synthetic": ["--train", "8", "--valid", "8", "--test", "0"],
    }
    result = subprocess.run(
        [sys.executable, REPOSITORY / "prepare.py", verb, *options[verb], "--to", tmp_path / "out"],
        env=os.environ | {"LD_PRELOAD": str(no_locks)}, capture_output=True, text=True,
    )  # fmt: skip
    assert result.returncode == 0 and f"{tmp_path / 'out'} cannot be locked" in result.stderr
    assert require_splits(tmp_path / "out") == ["train", "valid"]
