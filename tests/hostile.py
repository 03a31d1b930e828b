"""Files that are damaged at random, and checkpoints made to harm, for test_fuzz.py.

Of a checkpoint made to harm, the exit code stands beside it that inference.py owes it.
"""

import io
import random
import struct
from pathlib import Path

import h5py
import torch
from conftest import draw_patches
from PIL import Image

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
