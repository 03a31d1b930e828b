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
from lib.command import BadInput
from lib.pcam import open_split, split_path
from lib.prepare.ingest import JOURNAL_FILE, import_images
from lib.prepare.verify import require_splits

NUM = {"train": 14, "valid": 6}
PATCHES = {split: draw_patches(num, seed) for seed, (split, num) in enumerate(NUM.items())}


def encode(patch, kind="png", **options) -> bytes:
    data = io.BytesIO()
    Image.fromarray(patch).save(data, {"jpg": "jpeg", "tif": "tiff"}.get(kind, kind), **options)
    return data.getvalue()


def members(kind="png", prefix="") -> dict[str, bytes]:
    """{name: data}; sorted by name, patch10 would come before patch2, and 0 before 1."""
    return {
        f"{prefix}{split}/{label}/patch{row}.{kind}": encode(patch, kind)
        for split, (patches, labels) in PATCHES.items()
        for row, (patch, label) in enumerate(zip(patches, labels, strict=True))
    }


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
            if name == names[-1]:
                for field, value in fields.items():
                    setattr(info, field, value)
            tar.addfile(info, io.BytesIO(files[name]))
    return path


def folder_of_tars(root):
    for split in NUM:
        write_tar(
            root / f"{split}.tar",
            {name: data for name, data in members().items() if name.startswith(split)},
        )
    return write_tree(
        root,
        {"README.md": b"text", "unlabelled-tif/5a00d9.tif": encode(PATCHES["train"][0][0], "tif")},
    )


SOURCES = {
    "folder": lambda tmp: write_tree(tmp / "in", members()),
    "tif and a folder above": lambda tmp: write_tree(tmp / "in", members("tif", "data/set/")),
    "tar": lambda tmp: write_tar(tmp / "in.tar", members()),
    "tar.gz": lambda tmp: write_tar(tmp / "in.tar.gz", members(), "w:gz"),
    "tar.xz, ./ and a folder above": lambda tmp: write_tar(
        tmp / "in.tar.xz", members(prefix="./pcam/"), "w:xz"
    ),
    "folder of tars": lambda tmp: folder_of_tars(tmp / "in"),
}


@pytest.mark.parametrize("source", SOURCES)
def test_every_source_gives_the_same_rows_in_the_order_of_the_numbers(tmp_path, source):
    result = import_images(SOURCES[source](tmp_path), tmp_path / "out")
    assert require_splits(tmp_path / "out") == ["train", "valid"]
    for name, (patches, labels) in PATCHES.items():
        split = open_split(tmp_path / "out", name)
        assert split.images.mapped is not None
        np.testing.assert_array_equal(split.images.mapped, patches)
        np.testing.assert_array_equal(split.labels, labels)
        assert result["splits"][name]["patches"] == NUM[name]
    assert result["skipped"] == (
        {"not an image": 1, "no label": 1} if source == "folder of tars" else {}
    )
    assert sorted(path.name for path in (tmp_path / "out").iterdir() if ".tmp" in path.name) == []


def test_jpeg_pixels_are_pillows_and_equal_numbers_go_by_label_then_name(tmp_path, monkeypatch):
    monkeypatch.setattr(lib.prepare.ingest, "BLOCK_ROWS", 4)  # several blocks
    order = ["0/a7.jpg", "1/a7.jpg", "1/b07.jpg", "1/a8.jpg", "0/x9_10.jpg", "0/none.jpg"]
    files = {
        f"train/{name}": encode(patch, "jpg", quality=75)
        for name, patch in zip(order, PATCHES["train"][0], strict=False)
    }
    import_images(write_tar(tmp_path / "in.tar", files), tmp_path / "out")
    split = open_split(tmp_path / "out", "train")
    expected = [np.asarray(Image.open(io.BytesIO(files[f"train/{name}"]))) for name in order]
    np.testing.assert_array_equal(split.images.mapped, expected)
    assert split.labels.tolist() == [int(name[0]) for name in order]


def test_grey_and_transparent_images_are_converted_and_counted(tmp_path):
    grey, clear = (
        PATCHES["train"][0][0][..., 0],
        np.dstack([PATCHES["train"][0][1], np.full((96, 96), 9, np.uint8)]),
    )
    source = write_tree(
        tmp_path / "in", {"train/0/1.png": encode(grey), "train/1/2.png": encode(clear)}
    )
    result = import_images(source, tmp_path / "out")
    assert result["splits"]["train"]["converted"] == {"L": 1, "RGBA": 1}
    images = open_split(tmp_path / "out", "train").images.mapped
    np.testing.assert_array_equal(images[0], np.dstack([grey] * 3))
    np.testing.assert_array_equal(images[1], clear[..., :3])


def write_kaggle(root, lines=(), step=1, num=60):
    patches, labels = draw_patches(num, 5)
    names = [f"{row * 7919 % 997:040x}" for row in range(num)]
    files = {
        f"train/{name}.tif": encode(patch, "tif")
        for name, patch in zip(names, patches, strict=True)
    }
    rows = [f"{name},{label}" for name, label in zip(names, labels, strict=True)]
    files["train_labels.csv"] = "\n".join(["id,label", *rows[::step], *lines, ""]).encode()
    return write_tree(root, files | {"test/00ff.tif": encode(patches[0], "tif")}), patches, labels


def test_kaggle_keeps_the_order_of_its_csv_and_the_hold_out_is_a_function_of_the_id(tmp_path):
    source, patches, labels = write_kaggle(tmp_path / "in")
    result = import_images(source, tmp_path / "out", valid_share=0.3)
    train, valid = (open_split(tmp_path / "out", name) for name in ("train", "valid"))
    assert (
        result["skipped"] == {"no label": 1, "not an image": 1}
        and len(train) + len(valid) == 60
        and 8 <= len(valid) <= 28
    )
    row_of = {patch.tobytes(): row for row, patch in enumerate(patches)}
    for split in (train, valid):
        rows = [row_of[patch.tobytes()] for patch in split.images.mapped]
        assert rows == sorted(rows) and split.labels.tolist() == labels[rows].tolist()
    # the same ids are held out, whatever their order
    backwards, *_ = write_kaggle(tmp_path / "in2", step=-1)
    import_images(backwards, tmp_path / "out2", valid_share=0.3)
    np.testing.assert_array_equal(
        open_split(tmp_path / "out2", "valid").images.mapped, valid.images.mapped[::-1]
    )


def tree_with(name, data):
    return lambda tmp: write_tree(tmp / "in", members() | {name: data})


def cut_file(make, num_bytes):
    def write(tmp):
        path = make(tmp)
        path.write_bytes(path.read_bytes()[:num_bytes])
        return path

    return write


PATCH = PATCHES["train"][0][0]
BAD_SOURCES = {
    "1234.png is 64x64": tree_with("train/0/1234.png", encode(PATCH[:64, :64])),
    "1234.jpg is not a readable image": tree_with("valid/1/1234.jpg", encode(PATCH, "jpg")[:900]),
    "1234.tif has 16 bits|1234.tif has the pixel type": tree_with(
        "train/0/1234.tif", encode(PATCH[..., 0].astype(np.uint16) * 200, "tif")
    ),
    "did you mean 'valid'": tree_with("val/0/1.png", encode(PATCH)),
    "the folder 'tumour' must be a label": tree_with("train/tumour/1.png", encode(PATCH)),
    "1 files skipped \\(no label\\)": lambda tmp: write_tree(
        tmp / "in", {"images/1.png": encode(PATCH)}
    ),
    "it is empty": lambda tmp: (
        write_tree(tmp / "in", {"a/b": b""}).joinpath("a", "c").mkdir() or tmp / "in" / "a" / "c"
    ),
    "no file or folder": lambda tmp: tmp / "nowhere",
    "climbs out": lambda tmp: write_tar(
        tmp / "in.tar", members() | {"train/0/../../../1.png": b""}
    ),
    "/1.png', which climbs out": lambda tmp: write_tar(
        tmp / "in.tar", members() | {"/train/0/1.png": b""}
    ),
    "is a link or a device": lambda tmp: write_tar(
        tmp / "in.tar", members(), type=tarfile.SYMTYPE, linkname="/etc/passwd"
    ),
    "link.* a device": lambda tmp: write_tar(tmp / "in.tar", members(), type=tarfile.CHRTYPE),
    "not a whole tar": cut_file(SOURCES["tar"], 150_000),
    "cut off or damaged at byte": lambda tmp: cut_file(
        SOURCES["tar"], member_end(SOURCES["tar"](tmp))
    )(tmp),
    "in.tar.gz is not a whole tar": cut_file(SOURCES["tar.gz"], 150_000),
    "is there twice": lambda tmp: write_tree(
        folder_of_tars(tmp / "in"), {"train/0/patch1.png": b"", "train/1/patch1.png": b""}
    ),
    "has the label '2'": lambda tmp: write_kaggle(tmp / "in", lines=["ff,2"])[0],
    "not a readable CSV \\(unexpected end": lambda tmp: write_kaggle(tmp / "in", lines=['abc,"1'])[
        0
    ],
    "lists train/abc, which is not there": lambda tmp: write_kaggle(tmp / "in", lines=["abc,1"])[0],
}


def member_end(path) -> int:
    with tarfile.open(path) as tar:
        return tar.getmembers()[3].offset


@pytest.mark.parametrize("text", BAD_SOURCES)
def test_bad_input_is_refused_by_name_and_leaves_nothing(tmp_path, text):
    source = BAD_SOURCES[text](tmp_path)
    with pytest.raises(BadInput, match=text) as refusal:
        import_images(source, tmp_path / "out")
    assert "\n" not in str(refusal.value) and not (tmp_path / "out").exists()


def test_a_folder_that_holds_something_is_refused_and_stays_as_it_is(tmp_path):
    source, target = (
        SOURCES["tar"](tmp_path),
        write_tree(tmp_path / "out", {split_path("", "train", "x").name: b"mine"}),
    )
    for _ in range(2):  # the second time it is a finished import
        before = {path.name: path.read_bytes() for path in target.iterdir()}
        with pytest.raises(BadInput, match="already holds files"):
            import_images(source, target)
        assert {path.name: path.read_bytes() for path in target.iterdir()} == before
        (target := tmp_path / "empty").mkdir(exist_ok=True)
        if not any(target.iterdir()):
            import_images(source, target)


def test_a_link_to_a_folder_above_does_not_double_the_images(tmp_path):
    source = SOURCES["folder"](tmp_path)
    (source / "again").symlink_to(source)
    assert import_images(source, tmp_path / "out")["splits"]["train"]["patches"] == NUM["train"]


def test_a_pipe_that_is_named_like_an_image_is_left_out(tmp_path):
    source = SOURCES["folder"](tmp_path)
    os.mkfifo(source / "train" / "0" / "f.png")
    assert import_images(source, tmp_path / "out")["skipped"] == {"not an image": 1}
    with pytest.raises(BadInput, match="no file or folder"):
        import_images(source / "train" / "0" / "f.png", tmp_path / "out2")


@pytest.mark.parametrize(
    "journal",
    ["{}", "[]", "{", '{"finished": false}', '{"finished": false, "splits": 3, "source": 3}'],
)
@pytest.mark.parametrize("done", [True, False])
def test_a_damaged_journal_is_refused_or_taken_for_no_progress(tmp_path, journal, done):
    source, target = SOURCES["tar"](tmp_path), tmp_path / "out"
    import_images(source, target)
    if not done:
        for path in target.glob("camelyon*_x.h5"):
            path.unlink()
    (target / JOURNAL_FILE).write_text(journal)
    if done or "finished" not in journal:
        with pytest.raises(BadInput, match="begun from|already holds|JSON"):
            import_images(source, target)
        assert len(open_split(target, "train")) if done else True
    else:
        assert (
            import_images(source, target)["splits"]["train"]["patches"]
            == NUM["train"]
            == len(open_split(target, "train"))
        )


@pytest.fixture(scope="module")
def large_tar(tmp_path_factory):
    """400 train and 3 valid images: more than a small disk holds."""
    data = encode(PATCH, "jpg")
    names = [f"train/{row % 2}/{row}.jpg" for row in range(400)] + [
        f"valid/1/{row}.jpg" for row in range(3)
    ]
    return write_tar(tmp_path_factory.mktemp("large") / "in.tar", dict.fromkeys(names, data))


HELD_UP = """
import sys, time
sys.path.insert(0, sys.argv[1])
import prepare
from lib.pcam import SplitWriter
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
    result = import_images(large_tar, target)
    assert result["splits"]["train"]["patches"] == 400 and len(open_split(target, "train")) == 400
    assert split_path(target, "valid", "x").stat().st_mtime_ns == valid_written_at and not any(
        target.glob(".*.tmp")
    )
    assert json.loads((target / JOURNAL_FILE).read_text())["finished"]


@pytest.mark.parametrize("noticed", ["before", "while writing"])
def test_a_full_disk_is_one_sentence_and_leaves_nothing(tmp_path, large_tar, monkeypatch, noticed):
    (disk := tmp_path / "disk").mkdir()
    if (
        os.geteuid()
        or subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=8m", "none", disk], capture_output=True
        ).returncode
    ):
        pytest.skip("needs the right to mount a small disk")
    try:
        if noticed == "while writing":
            monkeypatch.setattr(lib.prepare.ingest, "require_space", lambda *_: None)
        text = (
            "11.1 MB are needed and 8.4 MB are free"
            if noticed == "before"
            else "writing 400 patches of train failed"
        )
        with pytest.raises(BadInput, match=text):
            import_images(large_tar, disk / "out")
        assert not any(disk.iterdir())
    finally:
        subprocess.run(["umount", "-l", disk], check=True)
