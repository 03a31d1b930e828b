"""Files that are damaged at random, and files made to harm: images, tars, HDF5, CSV and
checkpoints, for test_fuzz.py.

Of a file made to harm, the exit code stands beside it that inference.py owes it.
"""

import contextlib
import gzip
import io
import itertools
import os
import pickle
import random
import struct
import subprocess
import tarfile
import zipfile
import zlib
from pathlib import Path

import h5py
import numpy as np
import torch
from conftest import draw_patches
from PIL import Image
from test_inputs import encode, encode_png16

from lib.checkpoint import KIND, SCHEMA, evaluated, state_sha256, weights_sha256
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


def forged(fields: dict, has_sums: bool = True, **changes) -> bytes:
    """A checkpoint with other fields and the checksums that belong to them, so far as there can be
    any.
    """
    fields = {name: value for name, value in (fields | changes).items() if name != "weights_sha256"}
    header = {"kind": KIND, "schema": SCHEMA, "sha256": "0", "weights_sha256": "0"}
    with contextlib.suppress(Exception):
        if has_sums:
            header |= {
                "sha256": state_sha256(fields),
                "weights_sha256": weights_sha256(evaluated(fields)),
            }
    return archived(header | fields)


def rezipped(
    data: bytes, part: str = "", content: bytes = b"", packing=zipfile.ZIP_STORED
) -> bytes:
    """An archive of torch written anew, one of its parts exchanged."""
    buffer, archive = io.BytesIO(), zipfile.ZipFile(io.BytesIO(data))
    with zipfile.ZipFile(buffer, "w", packing, compresslevel=1) as copy:
        for name in archive.namelist():
            copy.writestr(name, content if part and name.endswith(part) else archive.read(name))
    return buffer.getvalue()


def in_itself() -> list:
    value = []
    value.append(value)
    return value


def doubled(times: int) -> list:
    value = []
    for _ in range(times):
        value = [value, value]
    return value


def hostile_fields(fields: dict):
    """Yield (field, value), each of which makes a checkpoint useless although its checksums
    hold.
    """
    config, weights, calibration, reference = (
        fields[name] for name in ("config", "averaged", "calibration", "reference")
    )
    largest = max(weights, key=lambda name: weights[name].numel())
    plain, square, itself = weights[largest], [[NAN] * 6] * 6, in_itself()

    def each(field, changes, of=None):
        yield from ((field, (fields[field] if of is None else of) | change) for change in changes)

    yield from itertools.product(["threshold"], [NAN, HUGE, -0.1, 1.5, 1, True, "0.5", None, [0.5]])
    yield from itertools.product(
        fields.keys() - {"threshold", "weights_sha256"}, ["x", itself, plain]
    )
    yield from itertools.product(
        ["calibration", "reference", "preprocessing", "config", "metrics"], [{"a": itself}]
    )
    yield from itertools.product(["calibration", "reference", "preprocessing", "config"], [{}])
    for value in (NAN, HUGE, -HUGE, "1", plain):
        yield from each("calibration", [{"temperature": value}, {"offset": value}])
        yield from each(
            "preprocessing",
            [{"mean": [0.5, 0.5, value]}, {"std": [0.5, 0.5, value]}, {"std": value}],
        )
        yield from each(
            "reference",
            [{name: value} for name in ("mean", "deviation", "inverse_correlation", "limit")],
        )
        yield from each(
            "reference",
            [
                {"mean": [value] * 6},
                {"deviation": [value] * 6},
                {"inverse_correlation": [[value] * 6] * 6},
            ],
        )
    for value in (NAN, None, [1.0], plain):
        yield from each(
            "config",
            [
                {name: value}
                for name in ("p4m_width", "model", "views", "precision", "threads", "lr")
            ],
        )
    for value in (0.0, -1.0, 1e-300, 1e-40):
        yield from each("calibration", [{"temperature": value}])
        yield from each("preprocessing", [{"std": [0.5, 0.5, value]}, {"mean": [0.5] * 4}])
        yield from each(
            "reference", [{"deviation": [value] * 6}, {"inverse_correlation": [[value] * 6] * 6}]
        )
        yield from each("reference", [{"limit": value}, {"shift_limit": value}, {"mean": square}])
    yield from each(
        "calibration",
        [{"views": value} for value in (3, 8.0, "1\n\x1b[2J", [1] * 500, "temperature", plain)],
    )
    yield "averaged", {1: plain, "a": plain}
    yield from each("config", [{"p4m_width": value} for value in (10**12, 10**7, 16, -1, 2.5)])
    yield from each("config", [{name: 1} for name in ("colour", 5, ("a",), None)])
    yield from each(
        "config",
        [
            {"model": "mlp"},
            {"model": "cnn"},
            {"name": "a/b\n"},
        ],
    )
    for sizes in ([10**6] * 3, [10**9] * 3, [1] * 5000, [10**30]):
        yield from each("config", [{"model": "mlp", "mlp_hidden": sizes}])
    for value in (NAN, float("inf"), 3e38):
        yield from each("averaged", [{largest: torch.full_like(plain, value)}])
    for tensor in (
        plain.to(torch.complex64),
        plain.to_sparse(),
        plain.to("meta"),
        torch.zeros(1).expand(10**7, 10**7),
        plain.T,
    ):
        yield from each("averaged", [{largest: tensor}])
    yield from each(
        "averaged", [{"more": plain}, {5: plain}, {largest: None}, {largest: "x"}, {largest: 1.0}]
    )
    yield "averaged", {largest: plain}


def hostile_checkpoints(fields: dict, canary: Path):
    """Yield (name, file, exit code): wrong numbers under right checksums, code that makes `canary`,
    what is no checkpoint.
    """
    whole, weights, shared = forged(fields), fields["averaged"], torch.zeros(100_000)
    for name, value in hostile_fields(fields):
        yield f"{name} {str(value)[:60]}", forged(fields, **{name: value}), 2
    # gone through in ages
    for value in (doubled(60), ["x" * 10**6] * 10**5, [shared] * 10**5, {1, 2}, b"bytes"):
        yield f"metrics of {type(value)}", forged(fields, has_sums=False, metrics={"a": value}), 2
    codes = [
        Code(os.system, f"touch {canary}"),
        Code(os.mkdir, str(canary)),
        Code(open, str(canary), "w"),
    ]
    codes += [
        Code(eval, f"open({str(canary)!r}, 'w')"),
        Code(subprocess.run, ["touch", str(canary)]),
        Code(torch.load, str(canary)),
    ]
    for code in codes:
        yield "pickle", pickle.dumps(code), 2
        yield "pickle of protocol 2", pickle.dumps({"kind": KIND, "config": code}, 2), 2
        yield "torch", archived({"a": code}), 2
        yield "torch before 1.6", archived({"a": code}, _use_new_zipfile_serialization=False), 2
        yield "code in a field", forged(fields, has_sums=False, metrics={"a": code}), 2
        yield "code in place of the pickle", rezipped(whole, "data.pkl", pickle.dumps(code)), 2
    storage = b"X\7\0\0\0storagectorch\nFloatStorage\nX\1\0\0\x000X\3\0\0\0cpu\x8a\x08\0\0\0\0\0\0\0\x10tQ."
    deep = b"]" * 10**5 + b"a" * (10**5 - 1) + b"."
    for code in (
        b"(" * 5,
        b"(" + storage,
        deep,
        b"X\xff\xff\xff\x7fabc.",
        b"\x8a\xffx.",
        b"N.",
        b"]q\0h\0a.",
        b"",
    ):
        yield f"opcodes {code[:9]}", b"\x80\x02" + code, 2
        yield (
            f"opcodes in an archive {code[:9]}",
            rezipped(whole, "data.pkl", b"\x80\x02" + code),
            2,
        )
    for part, content in (
        ("version", b"999999"),
        ("version", b"x"),
        ("byteorder", b"middle"),
        ("byteorder", b"big"),
    ):
        yield f"{part} {content}", rezipped(whole, part, content), 2
    yield "packed", rezipped(whole, packing=zipfile.ZIP_DEFLATED), 2
    yield "a module", archived(torch.nn.Linear(3, 3)), 2
    yield "foreign", archived({"state_dict": weights}), 2
    yield (
        "foreign, before 1.6",
        archived({"state_dict": weights}, _use_new_zipfile_serialization=False),
        2,
    )
    for header in (
        {"schema": 99},
        {"schema": [[]] * 5000},
        {"kind": shared},
        {"sha256": None},
    ):
        yield str(header)[:60], forged(fields, **header), 2
    for data in (
        b"hello\n" * 99,
        bytes(9999),
        save_image("PNG"),
        gzip.compress(whole),
        b"\x89HDF\r\n\x1a\n" * 99,
        b"PK\3\4" * 99,
    ):
        yield f"{data[:9]}", data, 2
    yield "written anew", rezipped(whole), 0
    yield (
        "doubles",
        forged(fields, averaged={name: tensor.double() for name, tensor in weights.items()}),
        0,
    )
    yield "no average", forged(fields, averaged=None, model=weights), 0
