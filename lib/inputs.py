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

IMAGE_SUFFIXES = (
    ".png",
    ".jpg",
    ".jpeg",
    ".jpe",
    ".jfif",
    ".tif",
    ".tiff",
    ".bmp",
    ".webp",
)
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

    Raises BadInput unless it is a readable image of one of FORMATS, of 96 x 96 pixels, a single
    page, with 8 bits a channel.
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
            if getattr(image, "n_frames", 1) > 1:
                raise BadInput(f"{name} holds several pages, it must be a single image")
            if image.format == "PNG":
                # compares the checksums, which decoding does not
                Image.open(io.BytesIO(data), formats=["PNG"]).verify()
            if image.has_transparency_data:  # beyond the scanned area there is glass
                white = Image.new("RGBA", image.size, "white")
                image = Image.alpha_composite(white, image.convert("RGBA"))
            return np.asarray(image.convert("RGB"))
    except BadInput:
        raise
    except Exception as error:  # whatever damage provokes in a decoder
        # without the memory address that follows
        why = one_line(error).partition(" <")[0] if data else "it is empty"
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


def walk_tar(path: Path, archive=None):
    """Yield (name, member, data) of each member of a tar, in its order. `data` is the bytes of
    an image. It is None for other members, and always where an open file `archive` is given.

    Raises BadInput for a tar that is damaged or cut off, and for a member whose path climbs out of
    the folder.
    """
    try:
        with tarfile.open(path, fileobj=archive) as tar:
            for member in iter(tar.next, None):
                tar.members.clear()  # or tarfile keeps 1.5 KB for every member
                name, data = PurePosixPath(member.name), None
                if name.is_absolute() or ".." in name.parts:
                    raise BadInput(
                        f"{path} holds the path '{name}', which climbs out of its folder: the whole"
                        " tar is refused"
                    )
                if archive is None and member.isfile() and is_image(name.name):
                    data = tar.extractfile(member).read(MAX_BYTES + 1)
                yield str(name), member, data
            # tarfile takes a cut or damage between members for the end; the true end is a block of
            # zeros
            tar.fileobj.seek(tar.offset)
            if tar.fileobj.read(512) != bytes(512):
                raise BadInput(f"{path} is cut off or damaged at byte {tar.offset:,}")
    except BadInput:
        raise
    except Exception as error:  # whatever damage provokes in tarfile
        raise not_a_tar(path, error) from None


def not_a_tar(path: Path, error: Exception) -> BadInput:
    """The refusal of a file that is no tar, or a damaged one."""
    words = explain_foreign(path, one_line(error), allowed=GZIP)
    return BadInput(f"{path} is not a whole tar archive{words}")


def list_blocks(paths, split: str = "", size: int = 1) -> Iterator[Callable[[], Block]]:
    """Yield a function for each `size` consecutive inputs, which decodes them and returns their
    Block. Any thread may call it.

    Inputs come in the order of `paths`, the files of a folder in sorted order. Raises BadInput for
    a path that does not exist.
    """
    paths = [Path(path) for path in paths]
    for path in paths:
        if not path.exists():
            raise BadInput(f"no such input: {path}")
    items = _list_inputs(paths, split)
    for block in iter(lambda: list(itertools.islice(items, size)), []):
        yield partial(_decode_block, block)


def _list_inputs(paths: list[Path], split: str):
    """Yield (Row, stored patch) of every input. A stored patch is an array, the bytes of an image,
    or the path of an image.
    """
    for path in paths:
        items = iter(_list_input(path, split))
        first = list(itertools.islice(items, 1))
        yield from first
        yield from items
        if not first:
            hint = explain_missing(split_path(path, split or "train", "x")) if path.is_dir() else ""
            raise BadInput(f"{path} holds no image ({', '.join(IMAGE_SUFFIXES)}){hint}")


def _list_input(path: Path, split: str):
    """(Row, stored patch) of every input at one path: a folder, HDF5 file, tar or image."""
    if path.is_dir():
        if any(path.glob("camelyonpatch_level_2_split_*")):
            return _list_split(path, split)
        files = sorted(walk_folder(path))
        return _list_files(path, ((str(file), file.name, file) for file in files))
    if path.suffix.lower() in (".h5", ".hdf5"):
        return _list_array(open_images(path))
    if is_tar(path):
        return _list_files(path, _files_of_tar(path))
    if is_image(path.name):
        return [(Row(str(path)), path)]
    raise BadInput(
        f"{path}: unknown kind of input; allowed are PCam folders, .h5, images, folders and tars of"
        " images"
    )


def _list_split(folder: Path, split: str):
    splits = [name for name in SPLITS if split_path(folder, name, "x").exists()]
    if split not in splits:
        choices = ", ".join(splits) or "none, it has no x file"
        raise BadInput(f"{folder} is a PCam folder: choose --split from {choices}")
    if not split_path(folder, split, "y").exists():
        return _list_array(open_images(split_path(folder, split, "x")))
    data = open_split(folder, split)
    return _list_array(data.images, data.labels.tolist())


def _list_array(images: Images, labels: list[int] | None = None):
    for start, stored in images.stored_blocks(READ_ROWS):
        for index, patch in enumerate(stored, start):
            yield Row(str(images.path), index, labels[index] if labels else None), patch


def _list_files(place: Path, files):
    """Yield (Row, stored patch) of the images among `files`, which are (source, name, stored
    patch); say how many others there are.
    """
    left_out = Counter()
    for source, name, stored in files:
        if is_image(name):
            yield Row(source), stored
        else:
            left_out[describe_other(name)] += 1
    say_left_out(place, left_out)


def _files_of_tar(path: Path):
    for name, member, data in walk_tar(path):
        if not member.isdir():
            yield f"{path}/{name}", PurePosixPath(name).name, data or b""


def _decode_block(items: list[tuple]) -> Block:
    rows, patches = [], []
    for row, stored in items:
        try:
            patch = _decode(stored, row)
        except (BadInput, OSError) as error:
            patch = np.zeros(PATCH_SHAPE, np.uint8)
            row = row._replace(error=explain(error))
        rows.append(row)
        patches.append(patch)
    return Block(rows, np.stack(patches))


def _decode(stored, row: Row) -> np.ndarray:
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
