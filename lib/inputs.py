"""Whatever a person points at, as patches in order: HDF5, images, folders and tars of images.
Nothing is unpacked to disk.
"""

import contextlib
import ctypes
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
from PIL import Image, TiffImagePlugin, UnidentifiedImageError

from lib.command import BadInput, one_line
from lib.pcam import PATCH_SHAPE, SPLITS, open_images, open_split, split_path, to_uint8

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".tif", ".tiff")
TAR_SUFFIXES = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")
# of the many that Pillow knows; for some of those it starts another program
FORMATS = ("PNG", "JPEG", "TIFF")
# what Pillow turns into 8-bit RGB without a choice to make
EXACT_MODES = ("RGB", "RGBA", "L", "LA", "P", "1")
LONG_NAMES = b"LKxgX"  # types of members that describe the next one
MOST_BYTES = 1 << 20  # of an encoded patch, or of a name in a tar
MOST_TILE = 1 << 22  # pixels of a TIFF's tile, all of which are decoded, whatever the image's size
NUM_DECODERS = 2
BLOCK = 256

# what Pillow and libtiff find wrong with a file is told as the reason of its row, not on stderr
# beside
logging.getLogger("PIL").addHandler(logging.NullHandler())
with contextlib.suppress(AttributeError, OSError):  # of a Pillow whose libtiff cannot be reached
    ctypes.CDLL(Image.core.__file__).TIFFSetErrorHandler(None)


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


def decode_patch(data: bytes, name) -> np.ndarray:
    """An encoded image as uint8 (96, 96, 3). Raises BadInput if it is unreadable, no PNG, JPEG or
    TIFF, of another size, one of several pages, or not 8 bits a channel."""
    advice = "it must be 96x96 (cut patches at 0.97 um a pixel, do not scale)"
    try:
        if len(data) > MOST_BYTES:
            raise BadInput(
                f"{name} has more than {MOST_BYTES:,} bytes, too many for a patch: {advice}"
            )
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            if (image.height, image.width) != PATCH_SHAPE[:2]:
                raise BadInput(f"{name} is {image.width}x{image.height} pixels, {advice}")
            # Pillow drops the lower bits of such RGB in silence
            if any(";16" in str(tile[3]) for tile in image.tile):
                raise BadInput(f"{name} has 16 bits a channel, it must be 8")
            if image.mode not in EXACT_MODES:
                raise BadInput(
                    f"{name} has the pixel type {image.mode}, allowed are {', '.join(EXACT_MODES)}"
                )
            tags = getattr(image, "tag_v2", {})
            if (
                tags.get(TiffImagePlugin.TILEWIDTH, 1) * tags.get(TiffImagePlugin.TILELENGTH, 1)
                > MOST_TILE
            ):
                raise BadInput(f"{name} has tiles far larger than its 96x96 pixels")
            if image.format == "PNG":
                # its checksums, at which decoding does not look
                Image.open(io.BytesIO(data), formats=["PNG"]).verify()
            patch = np.asarray(image.convert("RGB"))
            with contextlib.suppress(EOFError):
                image.seek(1)
                raise BadInput(f"{name} holds several pages, it must be a single image")
            return patch
    except BadInput:
        raise
    except Exception as error:  # whatever damage provokes in a decoder
        unknown = isinstance(error, UnidentifiedImageError)  # its text names a memory address
        why = "neither PNG, JPEG nor TIFF, or its header is damaged" if unknown else one_line(error)
        raise BadInput(f"{name} is not a readable image ({why})") from None


def is_image(name: str) -> bool:
    return not name.startswith(".") and name.lower().endswith(IMAGE_SUFFIXES)


def is_tar(path: Path) -> bool:
    return path.name.lower().endswith(TAR_SUFFIXES) and path.is_file()


def refuse(error: OSError):
    """For os.walk, which would leave out a folder that cannot be entered."""
    raise error


class CheckedMember(tarfile.TarInfo):
    """A member of a tar whose header is not taken on trust: tarfile reads any size, and goes back
    where it is negative.
    """

    def _proc_member(self, tar):  # which tarfile calls for every header, and leaves to subclasses
        if self.size < 0 or (self.type in LONG_NAMES and self.size > MOST_BYTES):
            raise tarfile.ReadError(f"a header declares {self.size:,} bytes")
        return super()._proc_member(tar)


def walk_tar(path: Path, archive=None, load=False):
    """Yield (name, member, bytes or None) of what is in a tar in its order; `load` reads the images
    among it.

    Raises BadInput for a tar that is damaged or cut off, and for a member that would climb out of
    the folder.
    """
    try:
        with tarfile.open(path, fileobj=archive, tarinfo=CheckedMember) as tar:
            while (member := tar.next()) is not None:
                tar.members.clear()  # tarfile would keep 1.5 KB of every member
                name = PurePosixPath(member.name)
                if name.is_absolute() or ".." in name.parts:
                    raise BadInput(
                        f"{path} holds the path '{name}', which climbs out of its folder: the whole"
                        " tar is refused"
                    )
                if member.size < 0:  # by an extended header
                    raise BadInput(
                        f"{path} is damaged: the member '{name}' has {member.size:,} bytes"
                    )
                wanted = load and member.isfile() and is_image(name.name)
                yield (
                    str(name),
                    member,
                    tar.extractfile(member).read(MOST_BYTES + 1) if wanted else None,
                )
            tar.fileobj.seek(tar.offset)
            # tarfile takes a cut or damage between members for the end
            if tar.fileobj.read(512) != bytes(512):
                raise BadInput(
                    f"{path} is cut off or damaged at byte {tar.offset:,}: a tar ends in blocks of"
                    " zeros"
                )
            while rest := tar.fileobj.read(1 << 20):  # behind which a packed one has its checksum
                # zeros in place of a header would end the tar before its time
                if rest.strip(b"\0"):
                    raise BadInput(
                        f"{path} is damaged: something stands behind its end at byte {tar.offset:,}"
                    )
    except BadInput:
        raise
    except Exception as error:  # whatever damage provokes in tarfile
        raise BadInput(f"{path} is not a whole tar archive ({one_line(error)})") from None


def read_inputs(paths, split: str = "") -> Iterator[Block]:
    """Yield blocks over the inputs in the order given, folders in sorted order. Raises BadInput for
    what is not there.
    """
    for path in map(Path, paths):
        if not path.exists():
            raise BadInput(f"no such input: {path}")
    for path in map(Path, paths):
        if path.is_dir() and any(path.glob("camelyonpatch_level_2_split_*")):
            yield from _pcam_blocks(path, split)
        elif path.suffix.lower() in (".h5", ".hdf5") and not path.is_dir():
            yield from _array_blocks(open_images(path))
        else:
            yield from _image_blocks(path)


def _pcam_blocks(folder: Path, split: str) -> Iterator[Block]:
    there = [name for name in SPLITS if split_path(folder, name, "x").exists()]
    if split not in there:
        raise BadInput(
            f"{folder} is a PCam folder: choose --split from"
            f" {', '.join(there) or 'none, it has no x file'}"
        )
    if split_path(folder, split, "y").exists():
        opened = open_split(folder, split)
        return _array_blocks(opened.images, opened.labels.tolist())
    return _array_blocks(open_images(split_path(folder, split, "x")))


def _array_blocks(images, labels=None) -> Iterator[Block]:
    for start, stored in images.stored_blocks(BLOCK):
        rows = range(start, start + len(stored))
        known = [labels[row] if labels else None for row in rows]
        # NaN is neither
        sound = stored.dtype == np.uint8 or ((stored > -1) & (stored < 256)).all(axis=(1, 2, 3))
        why = f"{images.path} holds NaN, or values below 0 or above 255, in row"
        errors = [
            None if is_sound else f"{why} {row:,}"
            for row, is_sound in zip(rows, np.broadcast_to(sound, len(rows)), strict=True)
        ]
        yield Block([str(images.path)] * len(rows), list(rows), to_uint8(stored), known, errors)


def _image_blocks(path: Path) -> Iterator[Block]:
    """Blocks of encoded images, decoded by a few threads: Pillow lets go of the interpreter while
    it decodes.
    """
    if path.is_dir():
        walk = os.walk(path, onerror=refuse)
        # no folders
        files = sorted(
            Path(parent, name) for parent, _, names in walk for name in names if is_image(name)
        )
        found = ((str(file), file) for file in files)
    elif is_tar(path):
        members = (
            (PurePosixPath(name), member, data) for name, member, data in walk_tar(path, load=True)
        )
        found = (
            (f"{path}/{name}", data)
            for name, member, data in members
            if is_image(name.name) and not member.isdir()
        )
    elif is_image(path.name) and path.is_file():
        found = iter([(str(path), path)])
    else:
        raise BadInput(
            f"{path}: unknown kind of input; allowed are PCam folders, .h5, images, folders and"
            " tars of images"
        )

    num = 0
    with ThreadPoolExecutor(NUM_DECODERS) as pool:
        while chunk := list(itertools.islice(found, BLOCK)):
            with warnings.catch_warnings(action="ignore"):  # of Pillow, in the threads too
                patches, errors = zip(*pool.map(_decode, chunk), strict=True)
            num += len(chunk)
            yield Block(
                [name for name, _ in chunk],
                [0] * len(chunk),
                np.stack(patches),
                [None] * len(chunk),
                list(errors),
            )
    if not num:
        raise BadInput(f"{path} holds no image ({', '.join(IMAGE_SUFFIXES)})")


def _decode(item: tuple[str, Path | bytes | None]) -> tuple[np.ndarray, str | None]:
    """The patch of (name, file or its bytes), or a black one and the reason."""
    name, data = item
    try:
        if data is None or (isinstance(data, Path) and not data.is_file()):
            raise BadInput(f"{name} is a link, a pipe or a device, not a file")
        if isinstance(data, Path):
            with data.open("rb") as file:
                data = file.read(MOST_BYTES + 1)
        return decode_patch(data, name), None
    except (BadInput, OSError) as error:
        return np.zeros(PATCH_SHAPE, np.uint8), (
            str(error) if isinstance(error, BadInput) else f"{name}: {one_line(error)}"
        )
