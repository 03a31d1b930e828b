"""Whatever a person points at, as patches in order: HDF5, images, folders and tars of images. Nothing is unpacked to disk."""

import io
import itertools
import lzma
import tarfile
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np
from PIL import Image, UnidentifiedImageError

from lib.command import BadInput, one_line
from lib.pcam import PATCH_SHAPE, SPLITS, open_images, open_split, split_path

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".tif", ".tiff")
TAR_SUFFIXES = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")
EXACT_MODES = ("RGB", "RGBA", "L", "LA", "P", "1")  # what Pillow turns into 8-bit RGB without a choice to make
NUM_DECODERS = 2
BLOCK = 256


@dataclass(frozen=True)
class Block:
    """Consecutive inputs: where each comes from, its patch uint8 (B, 96, 96, 3), label if known, reason if unreadable."""

    sources: list[str]
    indices: list[int]
    images: np.ndarray
    labels: list[int | None]
    errors: list[str | None]


def decode_patch(data: bytes, name) -> np.ndarray:
    """An encoded image as uint8 (96, 96, 3). Raises BadInput if it is unreadable, of another size, or not 8 bits a channel."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            if (image.height, image.width) != PATCH_SHAPE[:2]:
                size = f"{image.width}x{image.height}"
                raise BadInput(f"{name} is {size} pixels, it must be 96x96 (cut patches at 0.97 um a pixel, do not scale)")
            if any(";16" in str(tile[3]) for tile in image.tile):  # Pillow drops the lower bits of such RGB in silence
                raise BadInput(f"{name} has 16 bits a channel, it must be 8")
            if image.mode not in EXACT_MODES:
                raise BadInput(f"{name} has the pixel type {image.mode}, allowed are {', '.join(EXACT_MODES)}")
            return np.asarray(image.convert("RGB"))
    except BadInput:
        raise
    except UnidentifiedImageError:  # its text names a memory address
        raise BadInput(f"{name} is not a readable image (of no kind that is known)") from None
    except Exception as error:  # whatever damage provokes in a decoder
        raise BadInput(f"{name} is not a readable image ({one_line(error)})") from None


def safe_member_name(name: str, tar_path) -> str:
    """A tar member's name. Raises BadInput if it would climb out of the folder it is unpacked in."""
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts:
        raise BadInput(f"{tar_path} holds the path {name!r}, which climbs out of its folder: the whole tar is refused")
    return str(path)


def is_tar(path: Path) -> bool:
    return path.name.lower().endswith(TAR_SUFFIXES)


def read_inputs(paths, split: str = "") -> Iterator[Block]:
    """Yield blocks over the inputs in the order given, folders in sorted order. Raises BadInput for what is not there."""
    for path in map(Path, paths):
        if not path.exists():
            raise BadInput(f"no such input: {path}")
    for path in map(Path, paths):
        if path.is_dir() and any(path.glob("camelyonpatch_level_2_split_*")):
            yield from _pcam_blocks(path, split)
        elif path.is_dir():
            found = sorted(entry for entry in path.rglob("*") if entry.suffix.lower() in IMAGE_SUFFIXES and entry.is_file())
            if not found:
                raise BadInput(f"{path} holds no image ({', '.join(IMAGE_SUFFIXES)})")
            yield from _image_blocks((str(entry), entry.read_bytes) for entry in found)
        elif path.suffix.lower() in (".h5", ".hdf5"):
            yield from _array_blocks(open_images(path), str(path), None)
        elif is_tar(path):
            num = 0
            for block in _image_blocks(_tar_members(path)):
                num += len(block.sources)
                yield block
            if not num:
                raise BadInput(f"{path} holds no image ({', '.join(IMAGE_SUFFIXES)})")
        elif path.suffix.lower() in IMAGE_SUFFIXES:
            yield from _image_blocks([(str(path), path.read_bytes)])
        else:
            raise BadInput(f"{path}: unknown kind of input; allowed are PCam folders, .h5, images, folders and tars of images")


def _pcam_blocks(folder: Path, split: str) -> Iterator[Block]:
    there = [name for name in SPLITS if split_path(folder, name, "x").exists()]
    if split not in there:
        raise BadInput(f"{folder} is a PCam folder: choose --split from {', '.join(there) or 'none, it has no x file'}")
    path = split_path(folder, split, "x")
    if split_path(folder, split, "y").exists():
        opened = open_split(folder, split)
        yield from _array_blocks(opened.images, str(path), opened.labels)
    else:
        yield from _array_blocks(open_images(path), str(path), None)


def _array_blocks(images, source: str, labels) -> Iterator[Block]:
    for start, block in images.blocks(BLOCK):
        num = len(block)
        known = [None] * num if labels is None else labels[start : start + num].tolist()
        yield Block([source] * num, list(range(start, start + num)), block, known, [None] * num)


def _image_blocks(named: Iterator[tuple[str, Callable[[], bytes]]]) -> Iterator[Block]:
    """Blocks of encoded images, decoded by a few threads: Pillow lets go of the interpreter while it decodes."""

    def decode(item):
        name, data, refusal = item
        try:
            if refusal:
                raise BadInput(refusal)
            return decode_patch(data, name), None
        except BadInput as error:
            return np.zeros(PATCH_SHAPE, np.uint8), str(error)

    def read(item):
        name, read_bytes = item
        try:
            return name, read_bytes(), None
        except OSError as error:
            return name, b"", f"{name}: {one_line(error)}"

    named = iter(named)
    with ThreadPoolExecutor(NUM_DECODERS) as pool:
        while chunk := [read(item) for item in itertools.islice(named, BLOCK)]:
            patches, errors = zip(*pool.map(decode, chunk), strict=True)
            names = [name for name, _, _ in chunk]
            yield Block(names, [0] * len(chunk), np.stack(patches), [None] * len(chunk), list(errors))


def _tar_members(path: Path) -> Iterator[tuple[str, Callable[[], bytes]]]:
    """(name, reader) of each image in a tar, in its order."""
    try:
        with tarfile.open(path) as tar:
            for member in tar:
                name = safe_member_name(member.name, path)
                if member.isfile() and PurePosixPath(name).suffix.lower() in IMAGE_SUFFIXES:
                    data = tar.extractfile(member).read()  # here, where a tar that is cut off is refused
                    yield f"{path}/{name}", lambda data=data: data
    except (tarfile.TarError, EOFError, OSError, zlib.error, lzma.LZMAError) as error:
        raise BadInput(f"{path} is not a readable tar ({one_line(error)})") from None
