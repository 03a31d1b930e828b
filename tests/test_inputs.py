"""Inputs: whatever holds patches, in a known order, each row with its source, and damage named
instead of guessed away.
"""

import gzip
import io
import os
import tarfile

import numpy as np
import pytest
from conftest import draw_patches, write_pcam
from PIL import Image

from lib.command import BadInput
from lib.inputs import Row, decode_patch, list_blocks
from lib.pcam import open_split, split_path

PATCHES, _ = draw_patches(8, 21)
SIZE = 5  # of a block


def encode(array, kind="PNG", mode="RGB") -> bytes:
    buffer = io.BytesIO()
    image = array if isinstance(array, Image.Image) else Image.fromarray(array).convert(mode)
    image.save(buffer, kind, lossless=True)  # WebP's option
    return buffer.getvalue()


def read_all(*paths, split="") -> tuple[list[Row], np.ndarray]:
    """The rows and patches of all blocks."""
    blocks = [decode() for decode in list_blocks(paths, split, SIZE)]
    assert all(len(rows) == len(images) == SIZE for rows, images in blocks[:-1])
    rows = [row for block in blocks for row in block.rows]
    return rows, np.concatenate([block.images for block in blocks])


def write_tar(path, members, mode="w", kind=tarfile.REGTYPE):
    with tarfile.open(path, mode) as tar:
        for name, data in dict(members).items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            info.type = kind
            tar.addfile(info, io.BytesIO(data))
    return path


def test_a_folder_is_read_recursively_in_sorted_order(tmp_path):
    kinds = {"a.tif": "TIFF", "b.bmp": "BMP", "b.webp": "WEBP", "b/10.PNG": "PNG"}
    kinds |= {"b/2.jfif": "JPEG", "c ü'/d/x.tiff": "TIFF"}
    grey = np.full((96, 96, 3), 128, np.uint8)  # which JPEG keeps
    for name, kind in kinds.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encode(grey, kind))
    rows, images = read_all(tmp_path)
    assert rows == [Row(str(path)) for path in sorted(map(tmp_path.joinpath, kinds))]
    assert (images == 128).all()


def test_a_linked_folder_is_entered_once_and_what_is_left_out_is_counted(tmp_path, capsys):
    folder = tmp_path / "in"
    elsewhere = tmp_path / "scratch"
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


def test_a_tar_is_read_in_its_own_order_whatever_its_packing(tmp_path):
    names = ["z.png", "a/b.png", "./m.png", *(f"{number}.png" for number in range(5))]
    members = {"readme.txt": b"no image"}
    members |= {name: encode(patch) for name, patch in zip(names, PATCHES, strict=True)}
    for mode, suffix in (("w", ".tar"), ("w:gz", ".TGZ")):
        path = write_tar(tmp_path / f"t{suffix}", members, mode)
        rows, images = read_all(path)
        assert rows == [Row(f"{path}/{name.removeprefix('./')}") for name in names]
        assert np.array_equal(images, PATCHES)


def test_a_tar_with_a_climbing_path_is_refused_whole(tmp_path):
    for name in ("../evil.png", "a/../../evil.png", "/etc/evil.png"):
        path = write_tar(tmp_path / "t.tar", {"fine.png": encode(PATCHES[0]), name: b""})
        with pytest.raises(BadInput, match="climbs out"):
            read_all(path)
        assert os.listdir(tmp_path) == ["t.tar"], "nothing is unpacked"


def test_a_tar_that_is_cut_or_none_is_refused_by_name(tmp_path):
    members = {f"{i}.png": encode(patch) for i, patch in enumerate(PATCHES)}
    path = write_tar(tmp_path / "bad.tar", members)
    whole = path.read_bytes()
    with tarfile.open(path) as tar:
        boundary = tar.getmembers()[3].offset
    for data in (whole[:30_000], whole[:boundary], gzip.compress(whole)[:90_000], b"hello", b""):
        path.write_bytes(data)
        with pytest.raises(BadInput, match=r"bad\.tar"):
            read_all(path)


def test_grey_transparent_and_palette_images_become_the_rgb_they_show():
    for mode in ("L", "LA", "P", "1"):
        image = Image.fromarray(PATCHES[0]).convert(mode)
        assert np.array_equal(decode_patch(encode(image), "x.png"), image.convert("RGB"))
    clear = np.zeros((96, 96, 4), np.uint8)
    clear[:60] = 255
    clear[:60, :, :3] = PATCHES[0, :60]
    decoded = decode_patch(encode(Image.fromarray(clear)), "x.png")
    assert np.array_equal(decoded[:60], PATCHES[0, :60])
    assert (decoded[60:] == 255).all(), "white, as glass is, beyond the scanned area"


SLIDE = encode(Image.new("1", (20_000, 20_000)))
REFUSED = {
    "16": encode(Image.fromarray(PATCHES[0, ..., 0].astype(np.uint16) * 257)),
    "pixel type F": encode(PATCHES[0], "TIFF", "F"),
    "pixel type CMYK": encode(PATCHES[0], "TIFF", "CMYK"),
    "224x224.*96x96.*do not scale": encode(np.zeros((224, 224, 3), np.uint8)),
    "20000x20000.*96x96.*cut patches": SLIDE,
    "too large for a patch": SLIDE[:8] + bytes(1 << 21),
    # an address would differ from run to run
    "not a readable image(?!.* at 0x)": b"hello",
    "not a readable image": encode(PATCHES[0])[:300],
}


@pytest.mark.parametrize("words", REFUSED)
def test_what_is_no_8_bit_patch_of_96_pixels_is_refused_by_name_and_reason(words):
    with pytest.raises(BadInput, match=f"^the name.png (is|has) .*{words}"):
        decode_patch(REFUSED[words], "the name.png")


def test_an_unreadable_image_keeps_its_row_and_says_why(tmp_path):
    (tmp_path / "a.png").write_bytes(encode(PATCHES[0]))
    (tmp_path / "b.png").write_bytes(b"junk")
    (tmp_path / "c.png").symlink_to("nothing.png")
    rows, images = read_all(tmp_path)
    assert [row.source[-5:] for row in rows] == ["a.png", "b.png", "c.png"]
    assert rows[0].error is None and all(row.source in row.error for row in rows[1:])
    assert np.array_equal(images[0], PATCHES[0]) and not images[1:].any()


def test_a_pcam_folder_gives_rows_and_labels_of_the_split_that_was_chosen(pcam_dir, tmp_path):
    split = open_split(pcam_dir, "valid")
    path = split_path(pcam_dir, "valid", "x")
    rows, images = read_all(pcam_dir, split="valid")
    assert rows == [Row(str(path), index, label) for index, label in enumerate(split.labels)]
    assert np.array_equal(images, split.images.mapped)
    with pytest.raises(BadInput, match="choose --split from train, valid"):
        read_all(pcam_dir, split="test")
    # a test split need not have labels, and other files need not have official names
    for name in (split_path("", "test", "x").name, "mine.hdf5"):
        (tmp_path / name).symlink_to(path)
    for rows, images in (read_all(tmp_path, split="test"), read_all(tmp_path / "mine.hdf5")):
        assert {row.label for row in rows} == {None}
        assert np.array_equal(images, split.images.mapped)


def test_what_is_not_there_or_unknown_is_refused_by_name(tmp_path):
    (tmp_path / "a.gif").write_bytes(b"")
    write_pcam(tmp_path / "above" / "pcam", 2, 2)
    (tmp_path / "empty").mkdir()
    for name, words in (
        ("none.png", "no such input"),
        ("a.gif", "unknown kind"),
        ("empty", "no image"),
        ("above", "no image.*above/pcam.*name that folder"),
    ):
        with pytest.raises(BadInput, match=words):
            read_all(tmp_path / name)
