"""The inputs of a prediction or an import, as patches in order: HDF5, images, folders and tars of
images. Nothing is unpacked to disk.
"""

import io
import itertools
import os
import tarfile
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np
from PIL import Image

from lib.command import BadInput, explain, one_line, printable, say
from lib.files import GZIP, explain_foreign
from lib.pcam import (
    PATCH_SHAPE,
    SPLITS,
    Images,
    explain_missing,
    open_images,
    open_split,
    split_path,
    to_uint8,
)

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".tif", ".tiff", ".bmp", ".webp")
TAR_SUFFIXES = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")
# the only ones that Pillow may open; for some others it starts another program
FORMATS = ("PNG", "JPEG", "TIFF", "BMP", "WEBP")
# pixel types that become 8-bit RGB in one way only
EXACT_MODES = ("RGB", "RGBA", "L", "LA", "P", "1")
# an image is read up to this many bytes: a patch has fewer, and a slide is not read whole
MAX_BYTES = 1 << 20
READ_ROWS = 256  # rows that are read from HDF5 at a time

# the header of a whole slide is read, for its size in the error; its pixels are not
Image.MAX_IMAGE_PIXELS = None
# Pillow's remarks on a file become the error in its row; they are not printed as well
warnings.filterwarnings("ignore", module="PIL")


class Row(NamedTuple):
    """Where a patch comes from, its label where known, and its error where it cannot be read."""

    source: str
    index: int = 0
    label: int | None = None
    error: str | None = None


class Block(NamedTuple):
    """Consecutive inputs: a Row for each, and their patches uint8 (B, 96, 96, 3). A patch that
    cannot be read is black.
    """

    rows: list[Row]
    images: np.ndarray


def decode_patch(data: bytes, name) -> np.ndarray:
    """The bytes of an image as uint8 (96, 96, 3); errors call it `name`.

    Raises BadInput unless it is a readable image of one of FORMATS, of 96 x 96 pixels, with 8 bits
    a channel.
    """
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            if image.size != PATCH_SHAPE[:2]:
                raise BadInput(
                    f"{name} is {image.width}x{image.height} pixels, it must be 96x96"
                    " (cut patches at 0.97 um a pixel, do not scale)"
                )
            # Pillow drops the lower bits of RGB;16B in silence
            raw_mode = str(image.tile[0][3]) if image.tile else image.mode  # WebP has no tiles
            if ";16" in raw_mode or image.mode not in EXACT_MODES:
                allowed = ", ".join(EXACT_MODES)
                raise BadInput(
                    f"{name} has the pixel type {image.mode} ({raw_mode}), allowed are {allowed}"
                    " with 8 bits a channel"
                )
            if image.has_transparency_data:  # beyond the scanned area there is glass
                white = Image.new("RGBA", image.size, "white")
                image = Image.alpha_composite(white, image.convert("RGBA"))
            return np.asarray(image.convert("RGB"))
    except BadInput:
        raise
    except Exception as error:  # whatever damage provokes in a decoder
        why = one_line(error).partition(" <")[0]  # without the memory address that follows
        if len(data) > MAX_BYTES:
            why = "it is too large for a patch, cut patches of 96x96 at 0.97 um a pixel"
        raise BadInput(f"{name} is not a readable image ({', '.join(FORMATS)}): {why}") from None


def is_image(name: str) -> bool:
    return has_suffix(name, IMAGE_SUFFIXES)


def is_tar(path: Path) -> bool:
    return has_suffix(path.name, TAR_SUFFIXES) and path.is_file()


def has_suffix(name: str, suffixes) -> bool:
    """Whether a file's name ends so, and is not hidden: macOS puts `._NAME` beside each file."""
    return not name.startswith(".") and name.lower().endswith(suffixes)


def describe_other(name: str) -> str:
    """Why a file that is no image is left out: by its ending."""
    return f"not an image: {PurePosixPath(name).suffix or name}"


def say_left_out(place, reasons: dict[str, int]) -> None:
    """Print how many files of `place` are left out, by reason."""
    for reason, count in reasons.items():
        say(printable(f"{place}: left out {count:,} file(s), {reason}"))


def walk_folder(path: Path):
    """Yield the files below a folder in sorted order; a folder that a link leads to is entered
    once. Raises OSError for a folder that cannot be entered.
    """
    entered = set()
    for folder, folders, names in os.walk(path, followlinks=True, onerror=refuse):
        real = os.path.realpath(folder)
        if real in entered:
            folders.clear()
            continue
        entered.add(real)
        folders.sort()
        for name in sorted(names):
            yield Path(folder, name)


def refuse(error: OSError):
    """Raise an error of os.walk, which would else leave out a folder that it cannot enter."""
    raise error


def walk_tar(path: Path):
    """Yield (name, data) of each file in a tar, in its order; `data` is empty for a link, a device
    and a file that is no image.

    Raises BadInput for a tar that is damaged or cut off, and for a member whose path climbs out of
    the folder.
    """
    try:
        with tarfile.open(path) as tar:
            for member in iter(tar.next, None):
                tar.members.clear()  # or tarfile keeps 1.5 KB for every member
                name = PurePosixPath(member.name)
                if name.is_absolute() or ".." in name.parts:
                    raise BadInput(
                        f"{path} holds the path '{name}', which climbs out of its folder: the whole"
                        " tar is refused"
                    )
                data = b""
                if member.isfile() and is_image(name.name):
                    data = tar.extractfile(member).read(MAX_BYTES + 1)
                if not member.isdir():
                    yield str(name), data
            # tarfile takes a cut or damage between members for the end; the true end is a block of
            # zeros
            tar.fileobj.seek(tar.offset)
            if tar.fileobj.read(512) != bytes(512):
                raise BadInput(f"{path} is cut off or damaged at byte {tar.offset:,}")
    except BadInput:
        raise
    except Exception as error:  # whatever damage provokes in tarfile
        words = explain_foreign(path, one_line(error), allowed=GZIP)
        raise BadInput(f"{path} is not a whole tar archive{words}") from None


def list_blocks(paths, split: str = "", size: int = 1) -> Iterator[Callable[[], Block]]:
    """Yield a function for each `size` consecutive inputs, which decodes them and returns their
    Block. Any thread may call it.

    Inputs come in the order of `paths`, the files of a folder in sorted order. Raises BadInput for
    a path that does not exist or holds no patches.
    """
    for path in paths:
        if not Path(path).exists():
            raise BadInput(f"no such input: {path}")
    inputs = (list_input(Path(path), split) for path in paths)
    items = itertools.chain.from_iterable(inputs)
    for block in iter(lambda: list(itertools.islice(items, size)), []):
        yield partial(decode_block, block)


def list_input(path: Path, split: str):
    """(Row, stored patch) of every input at one path. A stored patch is an array, the bytes of an
    image, or the path of an image.
    """
    if path.is_dir():
        if any(path.glob("camelyonpatch_level_2_split_*")):
            return list_split(path, split)
        return list_images(path, ((str(file), file) for file in sorted(walk_folder(path))))
    if path.suffix.lower() in (".h5", ".hdf5"):
        return list_array(open_images(path))
    if is_tar(path):
        return list_images(path, ((f"{path}/{name}", data) for name, data in walk_tar(path)))
    if is_image(path.name):
        return [(Row(str(path)), path)]
    raise BadInput(
        f"{path}: unknown kind of input; allowed are PCam folders, .h5, images, folders and tars of"
        " images"
    )


def list_split(folder: Path, split: str):
    splits = [name for name in SPLITS if split_path(folder, name, "x").exists()]
    if split not in splits:
        raise BadInput(f"{folder} is a PCam folder: choose --split from {', '.join(splits)}")
    if not split_path(folder, split, "y").exists():
        return list_array(open_images(split_path(folder, split, "x")))
    data = open_split(folder, split)
    return list_array(data.images, data.labels)


def list_array(images: Images, labels=None):
    for start, stored in images.stored_blocks(READ_ROWS):
        for index, patch in enumerate(stored, start):
            label = None if labels is None else labels[index]
            yield Row(str(images.path), index, label), patch


def list_images(place: Path, files):
    """Yield (Row, stored patch) of the images among `files`, which are (source, stored patch); say
    how many others there are. Raises BadInput where there is no image.
    """
    has_images = False
    left_out = Counter()
    for source, stored in files:
        name = PurePosixPath(source).name
        if is_image(name):
            has_images = True
            yield Row(source), stored
        else:
            left_out[describe_other(name)] += 1
    say_left_out(place, left_out)
    if not has_images:
        hint = explain_missing(split_path(place, "train", "x"))
        raise BadInput(f"{place} holds no image ({', '.join(IMAGE_SUFFIXES)}){hint}")


def decode_block(items: list[tuple]) -> Block:
    rows = []
    images = np.zeros((len(items), *PATCH_SHAPE), np.uint8)
    for position, (row, stored) in enumerate(items):
        try:
            images[position] = decode(stored, row)
        except (BadInput, OSError) as error:
            row = row._replace(error=explain(error))
        rows.append(row)
    return Block(rows, images)


def decode(stored, row: Row) -> np.ndarray:
    if isinstance(stored, Path):
        with stored.open("rb") as file:
            stored = file.read(MAX_BYTES + 1)
    if isinstance(stored, bytes):
        return decode_patch(stored, row.source)
    if stored.dtype != np.uint8 and not ((stored > -1) & (stored < 256)).all():  # NaN is neither
        raise BadInput(
            f"{row.source} holds NaN, or values below 0 or above 255, in row {row.index:,}"
        )
    return to_uint8(stored)
