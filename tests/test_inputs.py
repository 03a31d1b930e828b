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
from conftest import REAL_SAMPLE, draw_patches, real_sample
from PIL import Image

from lib.command import BadInput
from lib.inputs import BLOCK, decode_patch, read_inputs
from lib.pcam import open_split, split_path

PATCHES, _ = draw_patches(8, 21)
# an address differs from run to run: predictions.csv would not repeat
NOT_READABLE = "not a readable image(?!.* at 0x)"


def encode(array, kind="PNG", mode=None) -> bytes:
    buffer = io.BytesIO()
    image = Image.fromarray(array)
    (image.convert(mode) if mode else image).save(buffer, kind)
    return buffer.getvalue()


def encode_png16(array) -> bytes:
    """RGB with 16 bits a channel, which Pillow reads but does not write."""

    def chunk(name, data):
        return (
            struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        )

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 96, 96, 16, 2, 0, 0, 0))
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in array)
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def read_all(*paths, split=""):
    """(sources, indices, images, labels, errors) over all blocks."""
    blocks = list(read_inputs(paths, split))
    names = ("sources", "indices", "images", "labels", "errors")
    assert all(
        len(getattr(block, name)) == len(block.images) <= BLOCK
        for block in blocks
        for name in names
    )
    columns = {name: [item for block in blocks for item in getattr(block, name)] for name in names}
    return (
        columns["sources"],
        columns["indices"],
        np.stack(columns["images"]),
        columns["labels"],
        columns["errors"],
    )


def write_tar(path, members, mode="w"):
    with tarfile.open(path, mode) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def test_a_folder_is_read_recursively_in_sorted_order(tmp_path):
    patches = {
        tmp_path / name: PATCHES[i]
        for i, name in enumerate(["b/2.png", "a.tif", "b/10.PNG", "c ü'/d/x.tiff", "b.png"])
    }
    for path, patch in patches.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encode(patch, "TIFF" if ".tif" in path.name else "PNG"))
    (tmp_path / "notes.txt").write_text("no image")
    sources, indices, images, labels, errors = read_all(tmp_path)
    assert (
        sources == [str(path) for path in sorted(patches)]
        and indices == [0] * 5
        and labels == errors == [None] * 5
    )
    assert np.array_equal(images, np.stack([patches[path] for path in sorted(patches)]))


@pytest.mark.parametrize("mode, suffix", [("w", ".tar"), ("w:gz", ".tar.gz"), ("w:gz", ".TGZ")])
def test_a_tar_is_read_in_its_own_order_whatever_its_packing_and_size(tmp_path, mode, suffix):
    names = [
        "z.png",
        "a/b.png",
        "readme.txt",
        "./m.png",
        *(f"{number}.png" for number in range(BLOCK)),
    ]
    data = [encode(patch) for patch in PATCHES]
    path = write_tar(
        tmp_path / f"t{suffix}", [(name, data[i % 8]) for i, name in enumerate(names)], mode
    )
    sources, _, images, _, errors = read_all(path)
    assert sources == [
        f"{path}/{name}" for name in ("z.png", "a/b.png", "m.png", *names[4:])
    ] and not any(errors)
    assert np.array_equal(images, PATCHES[[i % 8 for i in range(len(names)) if i != 2]])


@pytest.mark.parametrize("name", ["../evil.png", "a/../../evil.png", "/etc/evil.png"])
def test_a_tar_with_a_climbing_path_is_refused_whole(tmp_path, name):
    path = write_tar(
        tmp_path / "t.tar", [("fine.png", encode(PATCHES[0])), (name, encode(PATCHES[1]))]
    )
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
        (encode(PATCHES[0][:95]), "96x95 pixels.*do not scale"),
        (encode(np.zeros((224, 224, 3), np.uint8), "JPEG"), "224x224 pixels, it must be 96x96"),
        (encode(PATCHES[0])[:300], NOT_READABLE),
        (b"hello", NOT_READABLE),
    ],
    ids=["grey 16", "float", "cmyk", "rgb 16", "95 rows", "224", "cut", "text"],
)
def test_what_is_no_8_bit_patch_of_96_pixels_is_refused_by_name_and_reason(data, words):
    with pytest.raises(BadInput, match=f"^the name.png (is|has) .*{words}"):
        decode_patch(data, "the name.png")


def test_an_unreadable_image_keeps_its_row_and_says_why(tmp_path, monkeypatch):
    for name, data in {
        "a": encode(PATCHES[0]),
        "b": b"junk",
        "c": encode(PATCHES[1][:50]),
        "d": encode(PATCHES[2]),
    }.items():
        (tmp_path / f"{name}.png").write_bytes(data)
    (tmp_path / "e.png").symlink_to("nothing.png")
    (tmp_path / "f.png").write_bytes(b"")
    sources, _, images, _, errors = read_all(tmp_path)
    assert [source[-5:] for source in sources] == [f"{name}.png" for name in "abcdef"]
    assert [bool(error) for error in errors] == [False, True, True, False, True, True]
    assert "96x50" in errors[2]
    assert np.array_equal(images[[0, 3]], PATCHES[[0, 2]]) and not images[[1, 2]].any()

    def deny(path, *_):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(type(tmp_path), "open", deny)
    assert "Permission denied" in read_all(tmp_path)[4][3]


@pytest.mark.parametrize("kind", ["in a member", "between members", "gzip", "no tar", "empty"])
def test_a_tar_that_is_cut_or_none_is_refused_by_name(tmp_path, kind):
    members = [(f"{i}.png", encode(patch)) for i, patch in enumerate(PATCHES)]
    path = write_tar(tmp_path / "bad.tar", members)
    whole = path.read_bytes()
    with tarfile.open(path) as tar:
        boundary = tar.getmembers()[3].offset
    path.write_bytes(
        {
            "in a member": whole[:30_000],
            "between members": whole[:boundary],
            "gzip": gzip.compress(whole)[:90_000],
            "no tar": b"hello",
            "empty": b"",
        }[kind]
    )
    with pytest.raises(BadInput, match=r"bad\.tar"):
        read_all(path)


def test_what_is_no_file_in_a_tar_keeps_its_row_and_says_why(tmp_path):
    with tarfile.open(tmp_path / "t.tar", "w") as tar:
        link = tarfile.TarInfo("link.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/hosts"
        tar.addfile(link)
    sources, _, _, _, errors = read_all(tmp_path / "t.tar")
    assert sources == [f"{tmp_path}/t.tar/link.png"] and sources[0] in errors[0]


def test_a_pcam_folder_gives_rows_and_labels_of_the_split_that_was_chosen(pcam_dir, tmp_path):
    split, path = open_split(pcam_dir, "valid"), split_path(pcam_dir, "valid", "x")
    sources, indices, images, labels, errors = read_all(pcam_dir, split="valid")
    assert set(sources) == {str(path)} and indices == list(range(len(split))) and not any(errors)
    assert np.array_equal(images, split.images.mapped) and labels == split.labels.tolist()
    for wrong in ("", "test", "val"):
        with pytest.raises(BadInput, match="choose --split from train, valid"):
            read_all(pcam_dir, split=wrong)
    (tmp_path / split_path(".", "test", "x").name).symlink_to(path)
    assert read_all(tmp_path, split="test")[3] == [None] * len(split), (
        "a test split need not have labels"
    )


def test_an_hdf5_file_of_patches_needs_no_labels_and_no_official_name(tmp_path):
    with h5py.File(tmp_path / "mine.hdf5", "w") as file:
        file["x"] = PATCHES.astype(np.float32)
    sources, indices, images, labels, _ = read_all(tmp_path / "mine.hdf5")
    assert np.array_equal(images, PATCHES) and indices == list(range(8)) and labels == [None] * 8
    assert set(sources) == {str(tmp_path / "mine.hdf5")}


@pytest.mark.parametrize(
    "name, words", [("none.png", "no such input"), ("a.bmp", "unknown kind"), ("empty", "no image")]
)
def test_what_is_not_there_or_unknown_is_refused_by_name(tmp_path, name, words):
    (tmp_path / "a.bmp").write_bytes(b"")
    (tmp_path / "a.png").write_bytes(encode(PATCHES[0]))
    (tmp_path / "empty").mkdir()
    with pytest.raises(BadInput, match=words) as refusal:
        read_all(tmp_path / "a.png", tmp_path / name)
    assert str(tmp_path / name) in str(refusal.value)


@real_sample
def test_the_real_patches_read_as_pillow_reads_them():
    sources, _, images, _, errors = read_all(REAL_SAMPLE / "unlabelled-tif")
    assert len(sources) == len(list((REAL_SAMPLE / "unlabelled-tif").glob("*.tif"))) and not any(
        errors
    )
    for source, image in list(zip(sources, images, strict=True))[::10]:
        assert np.array_equal(image, np.asarray(Image.open(source)))
