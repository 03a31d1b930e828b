"""Inputs: whatever holds patches, in a known order, each row with its source, and damage named
instead of guessed away.
"""

import gzip
import io
import os
import struct
import tarfile
import zlib

import h5py
import numpy as np
import pytest
from conftest import REAL_SAMPLE, draw_patches, real_sample, write_pcam
from PIL import Image

from lib.command import BadInput
from lib.inputs import Row, decode_patch, list_blocks
from lib.pcam import open_split, split_path

PATCHES, _ = draw_patches(8, 21)
SIZE = 5  # of a block
# an address differs from run to run: predictions.csv would not repeat
NOT_READABLE = "not a readable image(?!.* at 0x)"


def encode(array, kind="PNG", mode=None) -> bytes:
    buffer = io.BytesIO()
    image = Image.fromarray(array)
    (image.convert(mode) if mode else image).save(buffer, kind, lossless=True)  # WebP's option
    return buffer.getvalue()


def png_chunk(name, data) -> bytes:
    checksum = struct.pack(">I", zlib.crc32(name + data))
    return struct.pack(">I", len(data)) + name + data + checksum


def encode_png16(array) -> bytes:
    """RGB with 16 bits a channel, which Pillow reads but does not write."""
    header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", 96, 96, 16, 2, 0, 0, 0))
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in array)
    pixels = png_chunk(b"IDAT", zlib.compress(rows))
    return b"\x89PNG\r\n\x1a\n" + header + pixels + png_chunk(b"IEND", b"")


# a whole slide: more pixels than Pillow decodes by default
SLIDE = encode(np.zeros((20_000, 20_000), np.uint8))


def read_all(*paths, split="") -> tuple[list[Row], np.ndarray]:
    """The rows and patches of all blocks."""
    blocks = [decode() for decode in list_blocks(paths, split, SIZE)]
    assert all(len(rows) == len(images) == SIZE for rows, images in blocks[:-1])
    rows = [row for block in blocks for row in block.rows]
    return rows, np.concatenate([block.images for block in blocks])


def write_tar(path, members, mode="w"):
    with tarfile.open(path, mode) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def test_a_folder_is_read_recursively_in_sorted_order(tmp_path):
    names = ["b/2.png", "a.tif", "b/10.PNG", "c ü'/d/x.tiff", "b.bmp", "b.webp", "b/3.jfif"]
    patches = {tmp_path / name: patch for name, patch in zip(names, PATCHES, strict=False)}
    patches[tmp_path / "b/3.jfif"] = np.full((96, 96, 3), 128, np.uint8)  # which JPEG keeps
    for path, patch in patches.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        kind = {".tif": "TIFF", ".tiff": "TIFF", ".jfif": "JPEG"}.get(path.suffix, path.suffix[1:])
        path.write_bytes(encode(patch, kind.upper()))
    rows, images = read_all(tmp_path)
    assert rows == [Row(str(path)) for path in sorted(patches)]
    assert np.array_equal(images, [patches[path] for path in sorted(patches)])


def test_a_linked_folder_is_entered_once_and_what_is_left_out_is_counted(tmp_path, capsys):
    folder, elsewhere = tmp_path / "in", tmp_path / "scratch"
    for place in (folder, elsewhere):
        place.mkdir()
        (place / "1.png").write_bytes(encode(PATCHES[0]))
    (folder / "slide").symlink_to(elsewhere)
    (folder / "slide" / "loop").symlink_to(folder)
    for name in ("a.txt", "b.txt", "no_ending", "._1.png"):
        (folder / name).write_bytes(b"")
    rows, _ = read_all(folder)
    assert rows == [Row(str(folder / "1.png")), Row(str(folder / "slide" / "1.png"))]
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 3 and all(str(folder) in line for line in lines)
    assert "2 file" in "".join(lines)


@pytest.mark.parametrize("mode, suffix", [("w", ".tar"), ("w:gz", ".tar.gz"), ("w:gz", ".TGZ")])
def test_a_tar_is_read_in_its_own_order_whatever_its_packing(tmp_path, mode, suffix):
    names = ["z.png", "a/b.png", "./m.png", *(f"{number}.png" for number in range(20))]
    order = np.arange(len(names)) % 8
    members = [(name, encode(PATCHES[i])) for name, i in zip(names, order, strict=True)]
    path = write_tar(tmp_path / f"t{suffix}", [("readme.txt", b"no image"), *members], mode)
    rows, images = read_all(path)
    assert rows == [Row(f"{path}/{name.removeprefix('./')}") for name in names]
    assert np.array_equal(images, PATCHES[order])


@pytest.mark.parametrize("name", ["../evil.png", "a/../../evil.png", "/etc/evil.png"])
def test_a_tar_with_a_climbing_path_is_refused_whole(tmp_path, name):
    members = [("fine.png", encode(PATCHES[0])), (name, encode(PATCHES[1]))]
    path = write_tar(tmp_path / "t.tar", members)
    with pytest.raises(BadInput, match="climbs out"):
        read_all(path)
    assert os.listdir(tmp_path) == ["t.tar"], "nothing is unpacked"


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "LA", "P", "1"])
def test_grey_transparent_and_palette_images_become_the_rgb_they_show(mode):
    image, buffer = Image.fromarray(PATCHES[0]).convert(mode), io.BytesIO()
    image.save(buffer, "PNG")
    decoded = decode_patch(buffer.getvalue(), "x.png")
    assert decoded.dtype == np.uint8 and np.array_equal(decoded, np.asarray(image.convert("RGB")))


@pytest.mark.parametrize(
    "data, words",
    [
        (encode(PATCHES[0][..., 0].astype(np.uint16) * 257), "16"),
        (encode(PATCHES[0][..., 0].astype(np.float32), "TIFF"), "pixel type F"),
        (encode(PATCHES[0], "TIFF", "CMYK"), "pixel type CMYK"),
        (encode_png16(PATCHES[0].astype(np.uint16) * 257), "16"),
        (encode(np.zeros((224, 224, 3), np.uint8), "JPEG"), "224x224.*96x96.*do not scale"),
        (SLIDE, "20000x20000.*96x96.*cut patches"),
        (SLIDE[:8] + bytes(1 << 21), "too large for a patch"),
        (encode(PATCHES[0])[:300], NOT_READABLE),
        (b"hello", NOT_READABLE),
        (b"", "empty"),
    ],
    ids=[
        "grey 16",
        "float",
        "cmyk",
        "rgb 16",
        "224",
        "slide",
        "slide with its head at the end",
        "cut",
        "text",
        "nothing",
    ],
)
def test_what_is_no_8_bit_patch_of_96_pixels_is_refused_by_name_and_reason(data, words):
    with pytest.raises(BadInput, match=f"^the name.png (is|has) .*{words}"):
        decode_patch(data, "the name.png")


def test_an_unreadable_image_keeps_its_row_and_says_why(tmp_path, monkeypatch):
    for name, data in {"a": encode(PATCHES[0]), "b": b"junk", "d": encode(PATCHES[2])}.items():
        (tmp_path / f"{name}.png").write_bytes(data)
    (tmp_path / "e.png").symlink_to("nothing.png")
    os.mkfifo(tmp_path / "f.png")
    with tarfile.open(tmp_path / "t.tar", "w") as tar:
        link = tarfile.TarInfo("link.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/hosts"
        tar.addfile(link)
    rows, images = read_all(tmp_path, tmp_path / "t.tar")
    assert [row.source[-5:] for row in rows] == [
        "a.png",
        "b.png",
        "d.png",
        "e.png",
        "f.png",
        "k.png",
    ]
    assert [bool(row.error) for row in rows] == [False, True, False, True, True, True]
    assert all(row.source in row.error for row in rows if row.error)
    assert np.array_equal(images[[0, 2]], PATCHES[[0, 2]]) and not images[[1, 3, 4, 5]].any()

    def deny(path, *_):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(type(tmp_path), "open", deny)
    assert "Permission denied" in read_all(tmp_path)[0][2].error


@pytest.mark.parametrize("kind", ["in a member", "between members", "gzip", "no tar", "empty"])
def test_a_tar_that_is_cut_or_none_is_refused_by_name(tmp_path, kind):
    members = [(f"{i}.png", encode(patch)) for i, patch in enumerate(PATCHES)]
    path = write_tar(tmp_path / "bad.tar", members)
    whole = path.read_bytes()
    with tarfile.open(path) as tar:
        boundary = tar.getmembers()[3].offset
    damaged = {
        "in a member": whole[:30_000],
        "between members": whole[:boundary],
        "gzip": gzip.compress(whole)[:90_000],
        "no tar": b"hello",
        "empty": b"",
    }
    path.write_bytes(damaged[kind])
    with pytest.raises(BadInput, match=r"bad\.tar"):
        read_all(path)


def test_a_pcam_folder_gives_rows_and_labels_of_the_split_that_was_chosen(pcam_dir, tmp_path):
    split, path = open_split(pcam_dir, "valid"), split_path(pcam_dir, "valid", "x")
    rows, images = read_all(pcam_dir, split="valid")
    labels = split.labels.tolist()
    assert rows == [Row(str(path), index, label) for index, label in enumerate(labels)]
    assert np.array_equal(images, split.images.mapped)
    for wrong in ("", "test", "val"):
        with pytest.raises(BadInput, match="choose --split from train, valid"):
            read_all(pcam_dir, split=wrong)
    (tmp_path / split_path(".", "test", "x").name).symlink_to(path)
    rows, _ = read_all(tmp_path, split="test")
    assert {row.label for row in rows} == {None}, "a test split need not have labels"


def test_an_hdf5_file_of_patches_needs_no_labels_and_no_official_name(tmp_path):
    path = tmp_path / "mine.hdf5"
    with h5py.File(path, "w") as file:
        file["x"] = PATCHES.astype(np.float32)
    rows, images = read_all(path)
    assert rows == [Row(str(path), index) for index in range(8)]
    assert np.array_equal(images, PATCHES)


@pytest.mark.parametrize(
    "name, words",
    [
        ("none.png", "no such input"),
        ("a.gif", "unknown kind"),
        ("empty", "no image"),
        ("above", "no image.*above/pcam.*name that folder"),
    ],
)
def test_what_is_not_there_or_unknown_is_refused_by_name(tmp_path, name, words):
    (tmp_path / "a.gif").write_bytes(b"")
    write_pcam(tmp_path / "above" / "pcam", 2, 2)
    (tmp_path / "a.png").write_bytes(encode(PATCHES[0]))
    (tmp_path / "empty").mkdir()
    with pytest.raises(BadInput, match=words) as refusal:
        read_all(tmp_path / "a.png", tmp_path / name)
    assert str(tmp_path / name) in str(refusal.value)


@real_sample
def test_the_real_patches_read_as_pillow_reads_them():
    folder = REAL_SAMPLE / "unlabelled-tif"
    rows, images = read_all(folder)
    assert len(rows) == len(list(folder.glob("*.tif"))) and not any(row.error for row in rows)
    for row, image in list(zip(rows, images, strict=True))[::10]:
        assert np.array_equal(image, np.asarray(Image.open(row.source)))
