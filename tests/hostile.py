"""Files that are damaged at random, and files made to harm: images, tars, HDF5 and CSV, for
test_fuzz.py.

Of a file made to harm, the exit code stands beside it that inference.py owes it.
"""

import gzip
import io
import itertools
import os
import random
import struct
import tarfile
import zlib
from pathlib import Path

import h5py
import numpy as np
import torch
from conftest import draw_patches
from PIL import Image
from test_inputs import encode, encode_png16

from lib.pcam import write_labels

NUM_PATCHES = 8
PATCHES, LABELS = draw_patches(NUM_PATCHES, 9)
NAN, HUGE = float("nan"), 1e308


def damage(data: bytes, rng: random.Random, other: bytes, head: int = 0) -> bytes:
    """Bytes as they come from a bad disk, a cut transfer or a confused tool, hit within the first
    `head` bytes if given.
    """
    at = rng.randrange(min(len(data), head or len(data)))
    end = min(len(data), at + rng.randrange(1, 2 + len(data) // 4))
    flipped = bytearray(data)
    for place in rng.choices(range(min(len(data), head or len(data))), k=rng.choice((1, 3, 20))):
        flipped[place] ^= 1 << rng.randrange(8)
    number = struct.pack(
        rng.choice("<>") + rng.choice("IQ"), rng.choice((0, 1, 2**16, 2**31, 2**32 - 1))
    )
    ways = {
        "cut": data[:at],
        "bits": bytes(flipped),
        "noise": data[:at] + rng.randbytes(end - at) + data[end:],
        "zeros": data[:at] + bytes(end - at) + data[end:],
        "lost": data[:at] + data[end:],
        "twice": data[:at] + data[at:end] * 2 + data[end:],
        "spliced": data[:at] + other[at:],
        "another head": other[:64] + data[64:],
        "tail": data + rng.randbytes(end - at),
        "number": data[:at] + number + data[at + len(number) :],
    }
    return rng.choice(list(ways.values()))


def zeros_packed(num_mb: int) -> bytes:
    """A raw deflate stream of so many MB of zeros, a thousandth as long, without its end."""
    packer = zlib.compressobj(9, wbits=-15)
    return (packer.compress(bytes(1 << 20)) + packer.flush(zlib.Z_FULL_FLUSH)) * num_mb


# images


def png_chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png_of_size(width: int, height: int) -> bytes:
    data = encode(PATCHES[0])
    return (
        data[:8]
        + png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
        + data[33:]
    )


def tiff(changes: dict) -> bytes:
    """A grey TIFF of 96x96 pixels in one strip; tags, by number, are changed to (type, count,
    value), or left out for None.
    """
    tags = {
        256: (4, 1, 96),
        257: (4, 1, 96),
        258: (3, 1, 8),
        259: (3, 1, 1),
        262: (3, 1, 1),
        273: (4, 1, 200),
        277: (3, 1, 1),
    }
    tags = {
        number: value
        for number, value in (tags | {278: (4, 1, 96), 279: (4, 1, 9216)} | changes).items()
        if value
    }
    entries = b"".join(struct.pack("<HHII", number, *tags[number]) for number in sorted(tags))
    return (b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries).ljust(200, b"\0") + PATCHES[
        0, ..., 0
    ].tobytes() * 2


def save_image(kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(PATCHES[7]).save(buffer, kind, **options)
    return buffer.getvalue()


def hostile_images() -> dict[str, bytes]:
    """Files named as images that ask for much, or are something else: none of them is to be
    read.
    """
    data, jpeg = encode(PATCHES[0]), encode(PATCHES[0], "JPEG")
    frame = jpeg.index(b"\xff\xc0") + 5
    tiles = {273: None, 279: None, 259: (3, 1, 5), 324: (4, 1, 200), 325: (4, 1, 9000)}
    pages = {"save_all": True, "append_images": [Image.fromarray(PATCHES[1])]}
    cases = {
        f"{kind}.png": save_image(kind)
        for kind in ("BMP", "GIF", "PPM", "TGA", "PCX", "ICO", "SGI", "EPS", "WEBP")
    }
    cases |= {
        f"pages of a {kind}.tif": save_image(kind, **pages) for kind in ("TIFF", "PNG", "MPO")
    }
    cases |= {
        "postscript.png": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 96 96\n%%EndComments\n(canary) (w) file closefile\n",
        "giga.png": png_of_size(2**31 - 1, 2**31 - 1), "large.png": png_of_size(10_000, 10_000), "none.png": png_of_size(0, 0),
        "95.png": png_of_size(95, 96), "huge.jpg": jpeg[:frame] + struct.pack(">HH", 65500, 65500) + jpeg[frame + 4 :],
        "text.png": data[:33] + png_chunk(b"zTXt", b"a\0\0x\x9c" + zeros_packed(600)) + data[33:],
        "profile.png": data[:33] + png_chunk(b"iCCP", b"a\0\0x\x9c" + zeros_packed(600)) + data[33:],
        "chunk.png": data[:33] + struct.pack(">I", 2**31 - 1) + b"zTXt" + data[33:],
        "empty.png": b"", "one byte.jpg": b"\xff", "long.png": data + bytes(2 << 20), "grey.h5.png": b"\x89HDF\r\n\x1a\n" * 99,
        "16.png": encode_png16(PATCHES[0].astype(np.uint16) * 257), "cmyk.jpg": encode(PATCHES[0], "JPEG", "CMYK"),
        "grey 16.tif": encode(PATCHES[0, ..., 0].astype(np.uint16) * 257, "TIFF"),
        "float.tif": encode(PATCHES[0, ..., 0].astype(np.float32), "TIFF"),
        "slide.tif": tiff({256: (4, 1, 100_000), 257: (4, 1, 200_000)}), "bands.tif": tiff({277: (3, 1, 60_000)}),
        "tags.tif": tiff({273: (4, 2**31, 200)}), "rows.tif": tiff({278: (4, 1, 0)}), "fax.tif": tiff({259: (3, 1, 4)}),
        "strip.tif": tiff({259: (3, 1, 5), 279: (4, 1, 2**32 - 1)}), "far.tif": tiff({259: (3, 1, 5), 273: (4, 1, 2**32 - 1)}),
        "jpeg.tif": tiff({259: (3, 1, 7)}), "tile.tif": tiff(tiles | {322: (4, 1, 2**16), 323: (4, 1, 2**14)}),
        "tiles.tif": tiff(tiles | {322: (4, 1, 2**30), 323: (4, 1, 2**30)}),
    }  # fmt: skip
    return cases


# tars


def tar_header(name: str, size: int, kind: bytes = b"0") -> bytes:
    """A header that may declare any size, with the right checksum."""
    head = bytearray(tarfile.TarInfo(name).tobuf(tarfile.USTAR_FORMAT))
    head[124:136] = (
        b"%011o\0" % size
        if 0 <= size < 8**11
        else (size % 2**95 | (size < 0) * 255 << 88 | 1 << 95).to_bytes(12, "big")
    )
    head[156:157], head[148:156] = kind, b" " * 8
    head[148:156] = b"%06o\0 " % sum(head)
    return bytes(head)


def tar_member(name: str, data: bytes, kind: bytes = b"0") -> bytes:
    return tar_header(name, len(data), kind) + data + bytes(-len(data) % 512)


def tar_record(name: str, value: bytes) -> bytes:
    """An extended header, which describes the next member."""
    body = b" %b=%b\n" % (name.encode(), value)
    length = next(
        length for length in itertools.count(len(body)) if len(str(length)) + len(body) == length
    )
    return tar_member("record", str(length).encode() + body, b"x")


def hostile_tars(png: bytes) -> dict[str, tuple[bytes, int]]:
    """{name: (tar, exit code)}; in each, good images stand before or behind what is wrong."""
    first, last, end = tar_member("a.png", png), tar_member("z.png", png), bytes(1024)
    data, cases = png + bytes(-len(png) % 512), {}
    for size in (-1, -512, -(2**70), 8**11 - 1, 2**62, 10**20, 2**87):
        cases[f"size {size}"] = first + tar_header("b.png", size) + data + last + end, 2
        for kind in b"LKxgX":
            cases[f"{chr(kind)} {size}"] = (
                first + tar_header("b", size, bytes([kind])) + data + last + end,
                2,
            )
    records = [
        ("size", b"-512", 2), ("size", b"-99999999999", 2), ("size", b"99999999999999", 2), ("size", b"none", 2),
        ("path", b"../up.png", 2), ("path", b"/etc/root.png", 2), ("path", b"a/../../b.png", 2),
        ("path", b'line\n"quote", .png', 0), ("path", b"\xff\xfe.png", 0), ("path", b"nul\0\r.png", 0),
        ("path", b"deep/" * 2000 + b"a.png", 0), ("mtime", b"9" * 5000, 0), ("mtime", b"nan", 0),
        ("GNU.sparse.map", b"0,512,x,5", 2),
    ]  # fmt: skip
    for name, value, code in records:
        cases[f"{name}={value[:20]}"] = tar_record(name, value) + first + last + end, code
    cases["sparse"] = (
        tar_member("r", b"31 GNU.sparse.size=88888888888\n24 GNU.sparse.map=0,512\n", b"x")
        + first
        + last
        + end,
        1,
    )
    packed = gzip.compress(first + last + end, mtime=0)
    cases |= {
        "whole": (first + last + end, 0), "a text": (first + tar_member("b.txt", data) + last + end, 0),
        "a folder": (first + tar_header("b.png", 0, tarfile.DIRTYPE) + last + end, 0),
        "old sparse": (first + tar_header("b.png", 8**10, b"S") + data + last + end, 2),
        "records": (tar_record("comment", b"a") * 3000 + last + end, 2),
        "names": (tar_member("n", b"long name", b"L") * 3000 + last + end, 2),
        "cut": (first + last[:-600], 2), "no end": (first + last, 2), "no header": (data + last + end, 2),
        "zeros for a header": (first + bytes(512) + last[512:] + last + end, 2), "two": ((first + end) * 2, 2),
        "packed.gz": (packed, 0), "packed and cut.gz": (packed[:-9], 2), "wrong sum.gz": (packed[:-8] + bytes(8), 2),
        "packed twice.gz": (gzip.compress(packed, mtime=0), 2), "an image": (png, 2), "empty": (b"", 2), "zeros": (end * 9, 2),
    }  # fmt: skip
    for kind in (
        tarfile.LNKTYPE,
        tarfile.SYMTYPE,
        tarfile.CHRTYPE,
        tarfile.BLKTYPE,
        tarfile.FIFOTYPE,
    ):
        cases[f"type {kind}"] = first + tar_header("b.png", 0, kind) + last + end, 1
    return cases


# HDF5


def write_h5(path: Path, name="x", data=PATCHES, libver=None, **storage) -> bytes:
    with h5py.File(path, "w", libver=libver) as file:
        file.create_dataset(name, data=data, **storage)
    return path.read_bytes()


def hostile_h5(folder: Path) -> dict:
    """{name: (what makes it in an open file, exit code)}; `folder` gets what some of them refer
    to.
    """
    pipe, other, patches = str(folder / "pipe"), str(folder / "other.h5"), (3, 96, 96, 3)
    os.mkfifo(pipe)
    write_h5(Path(other))

    def dataset(**given):
        return lambda file: file.create_dataset("x", **given)

    def raw(kind):
        return lambda file: h5py.h5d.create(file.id, b"x", kind, h5py.h5s.create_simple(patches))

    def joined(path):
        layout = h5py.VirtualLayout(patches, np.uint8)
        layout[:] = h5py.VirtualSource(path, "x", patches)
        return lambda file: file.create_virtual_dataset("x", layout)

    def linked(target):
        return lambda file: file.__setitem__("x", target)

    def outside(path):
        return dataset(shape=patches, dtype=np.uint8, external=[(path, 0, 3 * 27648)])

    wide = h5py.h5t.IEEE_F32LE.copy()
    wide.set_fields(31, 20, 11, 0, 20)
    chunk = {"maxshape": (None, 96, 96, 3), "chunks": (30_000, 96, 96, 3)}
    return {
        "whole": (dataset(data=PATCHES), 0), "float16": (dataset(data=PATCHES.astype(np.float16)), 0),
        "big end": (dataset(data=PATCHES.astype(">f8")), 0), "odd float": (raw(wide), 0), "time": (raw(h5py.h5t.UNIX_D32LE), 2),
        "channels first": (dataset(data=PATCHES.transpose(0, 3, 1, 2)), 2), "one patch": (dataset(data=PATCHES[0]), 2),
        "four channels": (dataset(shape=(3, 96, 96, 4), dtype=np.uint8), 2), "64 wide": (dataset(data=PATCHES[:, :64, :64]), 2),
        "flat": (dataset(data=PATCHES.reshape(NUM_PATCHES, -1)), 2), "scalar": (dataset(data=3), 2),
        "null": (dataset(data=h5py.Empty(np.uint8)), 2), "no patch": (dataset(shape=(0, 96, 96, 3), dtype=np.uint8), 2),
        "str": (dataset(shape=patches, dtype=h5py.string_dtype()), 2), "ref": (dataset(shape=patches, dtype=h5py.ref_dtype), 2),
        "compound": (dataset(shape=patches, dtype=[("a", "u1"), ("b", "f4")]), 2),
        "complex": (dataset(data=PATCHES.astype(np.complex64)), 2), "signed": (dataset(data=PATCHES.astype(np.int16)), 2),
        "trillion": (dataset(shape=(10**12, 96, 96, 3), dtype=np.uint8, chunks=(1, 96, 96, 3)), 2),
        "trillion in one": (dataset(shape=(10**12, 96, 96, 3), dtype=np.uint8), 2),
        "giant chunk": (dataset(shape=patches, dtype=np.float32, **chunk), 2),
        "group": (lambda file: file.create_group("x"), 2), "nothing": (lambda file: file.attrs.create("x", 1), 2),
        "other name": (lambda file: file.create_dataset("images", data=PATCHES), 2),
        "many names": (lambda file: [file.create_group(f"g{number}") for number in range(300)], 2),
        "dangling": (linked(h5py.SoftLink("/nothing")), 2), "in a circle": (linked(h5py.SoftLink("/x")), 2),
        "another file": (linked(h5py.ExternalLink(other, "x")), 2), "a pipe": (linked(h5py.ExternalLink(pipe, "x")), 2),
        "a file's bytes": (outside(other), 2), "a device's": (outside("/dev/zero"), 2), "a pipe's": (outside(pipe), 2),
        "joined": (joined(other), 2), "joined with a pipe": (joined(pipe), 2),
    }  # fmt: skip


def hostile_labels() -> dict:
    """{name: what writes such a y file}, none of which can be used."""
    return {
        "two": lambda path: write_labels(path, LABELS + 1), "few": lambda path: write_labels(path, LABELS[:-1]),
        "nan": lambda path: write_h5(path, "y", np.full((NUM_PATCHES, 1, 1, 1), np.nan)),
        "text": lambda path: write_h5(path, "y", np.array([b"a"] * NUM_PATCHES)),
        "wide": lambda path: write_h5(path, "y", np.zeros((NUM_PATCHES, 2, 1, 1))),
        "trillion": lambda path: write_h5(path, "y", None, shape=(10**12, 1, 1, 1), dtype=np.uint8),
        "billions": lambda path: write_h5(path, "y", None, shape=(10**10, 1, 1, 1), dtype=np.uint8, chunks=(10**9, 1, 1, 1)),
        "pipe": os.mkfifo, "folder": Path.mkdir, "empty": Path.touch,
    }  # fmt: skip


# CSV

ODD_CELLS = ("²", "-1", "9" * 5000, "1e3", "nan", "", " ", "٣", "0x1", "1.0", "\0", "'", "=1", "\r")


def mangle_csv(text: str, rng: random.Random) -> bytes:
    """A CSV as people and programs spoil it."""
    lines = text.splitlines()
    row, cells = rng.randrange(len(lines)), []
    cells = lines[row].split(",")
    cells[rng.randrange(len(cells))] = rng.choice(ODD_CELLS)
    before, after = lines[:row], lines[row + 1 :]
    changed = [
        [",".join(cells)],
        [",".join(cells)],
        [",".join(cells)],
        ['"' + lines[row]],
        [lines[row] + ",1"],
        [],
        [lines[row]] * 2,
    ]
    ways = ["\n".join([*before, *change, *after, ""]).encode() for change in changed]
    ways += [
        text.replace(",", ";").encode(),
        text.replace("\n", "\r").encode(),
        text.encode("utf-16"),
        text.encode("utf-8-sig"),
    ]
    ways += [
        text.encode() + b"x" * 200_000 + b"\n",
        damage(text.encode(), rng, b"\x89PNG\r\n\x1a\n" * 99),
        b"",
    ]
    return rng.choice(ways)


# checkpoints


class Code:
    """What a pickle may ask for while it is read."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def archived(value, **options) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer, **options)
    return buffer.getvalue()
