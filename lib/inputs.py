"""Whatever a person points at, as patches in order: HDF5, images, folders and tars of images.
Nothing is unpacked to disk.
"""

import io
import itertools
import logging
import os
import tarfile
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np
from PIL import Image

from lib.command import BadInput, one_line
from lib.pcam import PATCH_SHAPE, SPLITS, open_images, open_split, split_path, to_uint8

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".tif", ".tiff")
TAR_SUFFIXES = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")
# of the many that Pillow knows; for some of those it starts another program
FORMATS = ("PNG", "JPEG", "TIFF")
# what Pillow turns into 8-bit RGB without a choice to make
EXACT_MODES = ("RGB", "RGBA", "L", "LA", "P", "1")
MAX_BYTES = 1 << 20  # of a file that is read: a patch has less, and a slide is refused unread
NUM_DECODERS = 2
BLOCK = 256

# what Pillow finds wrong with a file is the reason in its row, not a line on stderr
logging.getLogger("PIL").addHandler(logging.NullHandler())
warnings.filterwarnings("ignore", module="PIL")


@dataclass(frozen=True)
class Block:
    """Consecutive inputs: where each comes from, its patch uint8 (B, 96, 96, 3), label if known,
    reason if unreadable.
    """

    sources: list[str]
    indices: list[int]
    images: np.ndarray
    labels: list[int | None]
    errors: list[str | None]


def decode_patch(data: bytes | Path, name) -> np.ndarray:
    """An encoded image, or such a file, as uint8 (96, 96, 3). Raises BadInput if it is unreadable,
    no PNG, JPEG or TIFF, of another size, one of several pages, or not 8 bits a channel.
    """
    try:
        if isinstance(data, Path):
            with data.open("rb") as file:
                data = file.read(MAX_BYTES)
        if not data:
            raise BadInput(f"{name} is empty, or no plain file")
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            if image.size != PATCH_SHAPE[:2]:
                raise BadInput(
                    f"{name} is {image.width}x{image.height} pixels, it must be 96x96"
                    " (cut patches at 0.97 um a pixel, do not scale)"
                )
            # Pillow drops the lower bits of such RGB in silence
            if any(";16" in str(tile[3]) for tile in image.tile):
                raise BadInput(f"{name} has 16 bits a channel, it must be 8")
            if image.mode not in EXACT_MODES:
                allowed = ", ".join(EXACT_MODES)
                raise BadInput(f"{name} has the pixel type {image.mode}, allowed are {allowed}")
            if getattr(image, "n_frames", 1) > 1:
                raise BadInput(f"{name} holds several pages, it must be a single image")
            if image.format == "PNG":
                # its checksums, at which decoding does not look
                Image.open(io.BytesIO(data), formats=["PNG"]).verify()
            if image.has_transparency_data:  # beyond the scanned area there is glass
                white = Image.new("RGBA", image.size, "white")
                image = Image.alpha_composite(white, image.convert("RGBA"))
            return np.asarray(image.convert("RGB"))
    except BadInput:
        raise
    except Exception as error:  # whatever damage provokes in a decoder
        why = one_line(error).partition(" <")[0]  # a memory address follows
        raise BadInput(f"{name} is not a readable image (PNG, JPEG or TIFF): {why}") from None


def is_image(name: str) -> bool:
    return not name.startswith(".") and name.lower().endswith(IMAGE_SUFFIXES)


def is_tar(path: Path) -> bool:
    return path.name.lower().endswith(TAR_SUFFIXES) and path.is_file()


def refuse(error: OSError):
    """For os.walk, which would leave out a folder that cannot be entered."""
    raise error


def walk_tar(path: Path, archive=None, load=False):
    """Yield (name, member, bytes or None) of what is in a tar in its order; `load` reads the images
    among it.

    Raises BadInput for a tar that is damaged or cut off, and for a member that would climb out of
    the folder.
    """
    try:
        with tarfile.open(path, fileobj=archive) as tar:
            for member in iter(tar.next, None):
                tar.members.clear()  # tarfile would keep 1.5 KB of every member
                name, data = PurePosixPath(member.name), None
                if name.is_absolute() or ".." in name.parts:
                    raise BadInput(
                        f"{path} holds the path '{name}', which climbs out of its folder: the whole"
                        " tar is refused"
                    )
                if load and member.isfile() and is_image(name.name):
                    data = tar.extractfile(member).read(MAX_BYTES)
                yield str(name), member, data
            # tarfile takes a cut or damage between members for the end, which is a block of zeros
            tar.fileobj.seek(tar.offset)
            if tar.fileobj.read(512) != bytes(512):
                raise BadInput(f"{path} is cut off or damaged at byte {tar.offset:,}")
    except BadInput:
        raise
    except Exception as error:  # whatever damage provokes in tarfile
        raise BadInput(f"{path} is not a whole tar archive ({one_line(error)})") from None


def read_inputs(paths, split: str = "") -> Iterator[Block]:
    """Yield blocks over the inputs in the order given, folders in sorted order. Raises BadInput for
    what is not there.
    """
    paths = [Path(path) for path in paths]
    for path in paths:
        if not path.exists():
            raise BadInput(f"no such input: {path}")
    for path in paths:
        if path.is_dir() and any(path.glob("camelyonpatch_level_2_split_*")):
            yield from _pcam_blocks(path, split)
        elif path.suffix.lower() in (".h5", ".hdf5") and not path.is_dir():
            yield from _array_blocks(open_images(path))
        else:
            yield from _image_blocks(path)


def _pcam_blocks(folder: Path, split: str) -> Iterator[Block]:
    splits = [name for name in SPLITS if split_path(folder, name, "x").exists()]
    if split not in splits:
        choices = ", ".join(splits) or "none, it has no x file"
        raise BadInput(f"{folder} is a PCam folder: choose --split from {choices}")
    if not split_path(folder, split, "y").exists():
        return _array_blocks(open_images(split_path(folder, split, "x")))
    opened = open_split(folder, split)
    return _array_blocks(opened.images, opened.labels.tolist())


def _array_blocks(images, labels=None) -> Iterator[Block]:
    labels = labels or [None] * images.num
    for start, stored in images.stored_blocks(BLOCK):
        rows = range(start, start + len(stored))
        errors = [None] * len(rows)
        if stored.dtype != np.uint8:
            is_sound = ((stored > -1) & (stored < 256)).all(axis=(1, 2, 3))  # NaN is neither
            for place in np.flatnonzero(~is_sound):
                errors[place] = (
                    f"{images.path} holds NaN, or values below 0 or above 255, in row"
                    f" {rows[place]:,}"
                )
        sources = [str(images.path)] * len(rows)
        yield Block(sources, list(rows), to_uint8(stored), labels[start : rows.stop], errors)


def _list_images(path: Path) -> Iterator[tuple[str, Path | bytes]]:
    """Yield (name, file or its bytes) of an image, or of the images in a folder or tar."""
    if path.is_dir():
        files = []
        for parent, _, names in os.walk(path, onerror=refuse):
            files += [Path(parent, name) for name in names if is_image(name)]
        yield from ((str(file), file) for file in sorted(files))
    elif is_tar(path):
        for name, member, data in walk_tar(path, load=True):
            if is_image(PurePosixPath(name).name) and not member.isdir():
                yield f"{path}/{name}", data or b""
    elif is_image(path.name):
        yield str(path), path
    else:
        raise BadInput(
            f"{path}: unknown kind of input; allowed are PCam folders, .h5, images, folders and"
            " tars of images"
        )


def _image_blocks(path: Path) -> Iterator[Block]:
    """Blocks of encoded images, decoded by a few threads: Pillow lets go of the interpreter while
    it decodes.
    """
    images = _list_images(path)
    with ThreadPoolExecutor(NUM_DECODERS) as pool:
        items = list(itertools.islice(images, BLOCK))
        if not items:
            raise BadInput(f"{path} holds no image ({', '.join(IMAGE_SUFFIXES)})")
        while items:
            patches, errors = zip(*pool.map(_decode, items), strict=True)
            num, sources = len(items), [name for name, _ in items]
            yield Block(sources, [0] * num, np.stack(patches), [None] * num, list(errors))
            items = list(itertools.islice(images, BLOCK))


def _decode(item: tuple[str, Path | bytes]) -> tuple[np.ndarray, str | None]:
    """The patch of (name, file or its bytes), or a black one and the reason."""
    name, data = item
    try:
        return decode_patch(data, name), None
    except BadInput as error:
        return np.zeros(PATCH_SHAPE, np.uint8), str(error)
