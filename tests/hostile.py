"""Files that are damaged at random, and checkpoints made to harm, for test_fuzz.py.

Of a checkpoint made to harm, the exit code stands beside it that inference.py owes it.
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
import zipfile
from pathlib import Path

import h5py
import torch
from conftest import draw_patches
from PIL import Image

from lib.checkpoint import KIND, SCHEMA, evaluated, state_sha256, weights_sha256

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


def save_image(kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(PATCHES[7]).save(buffer, kind, **options)
    return buffer.getvalue()


def write_h5(path: Path, name="x", data=PATCHES, libver=None, **storage) -> bytes:
    with h5py.File(path, "w", libver=libver) as file:
        file.create_dataset(name, data=data, **storage)
    return path.read_bytes()


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
            {"quarantine_reasons": ["nan"] * 5000},
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
