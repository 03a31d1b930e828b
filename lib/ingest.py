"""Labelled images as PCam HDF5: folders, tars, the Kaggle edition. A killed run goes on at the split where it was."""

import bz2
import contextlib
import csv
import gzip
import hashlib
import io
import itertools
import lzma
import os
import re
import shutil
import tarfile
import tempfile
import time
import zlib
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath

import numpy as np
from PIL import Image

from lib import pcam
from lib.command import BadInput, nearest, one_line
from lib.inputs import IMAGE_SUFFIXES, decode_patch, is_tar, safe_member_name
from lib.logger import read_json, write_json
from lib.pcam import PATCH_BYTES, PATCH_SHAPE, SPLITS, SplitWriter, split_path
from lib.progress import Progress

JOURNAL_FILE, LOSSES_FILE = ".import.json", "repack_losses.csv"
WRITE_ORDER = ("test", "valid", "train")  # a folder without train is never taken for a whole one
UNPACKERS = {b"\x1f\x8b": gzip, b"BZ": bz2, b"\xfd7": lzma}  # by the first two bytes of a file
BLOCK_ROWS, DECODE_ROWS = 1024, 64
NUM_THREADS = min(4, os.cpu_count() or 1)


def read_journal(directory) -> dict:
    """What an unfinished run noted in a folder, {} for none. Raises BadInput for a folder that holds anything else."""
    directory = Path(directory)
    journal = read_json(directory / JOURNAL_FILE) if (directory / JOURNAL_FILE).exists() else {}
    if journal.get("finished", not journal and directory.is_dir() and any(directory.iterdir())):
        raise BadInput(f"{directory} already holds files: give a new or an empty folder")
    return journal


def nearest_folder(path) -> Path:
    """`path` or the closest folder above it that is there already."""
    return next(folder for folder in (Path(path), *Path(path).absolute().parents) if folder.is_dir())


def require_space(directory, num_bytes: int) -> None:
    """Raises BadInput where fewer than `num_bytes` are free."""
    free = shutil.disk_usage(nearest_folder(directory)).free
    if num_bytes > free:
        raise BadInput(f"{directory}: {num_bytes / 1e6:,.1f} MB are needed and {free / 1e6:,.1f} MB are free there")


def fill_folder(directory: Path, source: dict, sizes: dict[str, int], write_split) -> dict[str, dict]:
    """Call `write_split(split)`, which gives what to say about it, for each split of `sizes` (patches) not written yet.

    Gives {split: {patches, negative, positive, bytes, seconds, ...}}. A journal says from what `source` the folder was begun,
    so that a killed run goes on: finished splits stay, what else it left is removed. Raises BadInput for a folder begun from
    another source and for a disk too small, without a change. An error leaves no unfinished split, bad input nothing at all.
    """
    created = not directory.exists()
    try:
        with pcam.sole_writer(directory):
            return _fill_folder(directory, source, sizes, write_split)
    except BaseException:
        if created:
            with contextlib.suppress(OSError):  # a finished split stays
                directory.rmdir()
        raise


def _fill_folder(directory: Path, source: dict, sizes: dict[str, int], write_split) -> dict[str, dict]:
    journal = read_journal(directory) or {"source": source, "splits": {}, "finished": False}
    done = journal["splits"]
    if journal["source"] != source:
        raise BadInput(f"{directory} was begun from {journal['source'].get('path')} as it was then: delete the folder first")

    def clear():
        unfinished = [split_path(directory, split, part) for split in SPLITS if split not in done for part in pcam_parts]
        for stale in (*directory.glob(".*.tmp"), *unfinished, *(() if done else own_files)):
            stale.unlink(missing_ok=True)

    pcam_parts, own_files = ("x", "y", "mask", "meta"), (directory / JOURNAL_FILE, directory / LOSSES_FILE)
    clear()
    todo = [split for split in WRITE_ORDER if split in sizes and split not in done]
    require_space(directory, sum(sizes[split] for split in todo) * PATCH_BYTES)
    try:
        write_json(directory / JOURNAL_FILE, journal)
        for split in todo:
            began, more = time.monotonic(), write_split(split)
            labels = pcam.read_labels(split_path(directory, split, "y"))
            counts = {"patches": len(labels), "negative": int((labels == 0).sum()), "positive": int(labels.sum())}
            num_bytes = sum(split_path(directory, split, part).stat().st_size for part in ("x", "y"))
            done[split] = counts | more | {"bytes": num_bytes, "seconds": round(time.monotonic() - began, 2)}
            write_json(directory / JOURNAL_FILE, journal)
    except BaseException as error:
        if isinstance(error, BadInput):  # the source has to change, and is another one then
            done.clear()
        clear()
        raise
    write_json(directory / JOURNAL_FILE, journal | {"finished": True})
    return {split: done[split] for split in SPLITS if split in done}


@contextlib.contextmanager
def open_source(path: Path, scratch, valid_share: float = 0.1):
    """Index a tar, a folder of images and tars, or the Kaggle edition (train/ID.tif, train_labels.csv).

    Yields the images by split, in row order, as (number, label, name, file they lie in, offset there, bytes); the number of
    files left out by reason; open tars by path; and a SHA-256 over all places, sizes and times, by which to know the source.
    Images lie at SPLIT/LABEL/NAME, below whatever other folders; the last number in NAME orders them. The Kaggle edition keeps
    the order of its CSV and has no valid split: the share `valid_share` of its train split, by a hash of the id, becomes one.
    A packed tar is unpacked into `scratch`, into a file without a name. Raises BadInput for what cannot be read, a tar that
    reaches outside itself, misnamed folders, and a source without labels.
    """
    splits, skipped, archives, seen, labels_path = {}, Counter(), {}, set(), path / "train_labels.csv"
    digest = hashlib.sha256()
    if not path.exists():
        raise BadInput(f"no file or folder {path}")
    kaggle = read_kaggle_labels(labels_path, valid_share) if labels_path.is_file() else None
    with contextlib.ExitStack() as stack:
        with Progress(0, f"look through {path.name}", "files") as progress:
            for name, file, offset, size, changed_ns in list_files(path, scratch, archives, stack):
                progress.add()
                folder, _, base = name.rpartition("/")
                if base.startswith(".") or not base.lower().endswith(IMAGE_SUFFIXES):
                    skipped["not an image"] += 1
                    continue
                if kaggle is None:
                    place, key = place_by_folder(name, file), name
                else:
                    place = key = kaggle.get(base.rpartition(".")[0]) if folder == "train" else None
                if place is None:
                    skipped["no label"] += 1
                    continue
                if key in seen:
                    raise BadInput(f"{file}: {name} is there twice")
                seen.add(key)
                split, label, number = place
                splits.setdefault(split, []).append((number, label, name, file, offset, size))
                digest.update(repr((place, name, offset, size, changed_ns)).encode())
        if not splits:
            reasons = ", ".join(f"{count:,} files skipped ({reason})" for reason, count in skipped.items()) or "it is empty"
            raise BadInput(f"{path} has no images as SPLIT/LABEL/NAME.jpg (train, valid, test; 0, 1): {reasons}")
        if absent := [name for name, place in (kaggle or {}).items() if place not in seen]:
            raise BadInput(f"{labels_path} lists {absent[0]}, which train/ does not have ({len(absent):,} such)")
        for images in splits.values():
            images.sort()
        yield splits, skipped, archives, digest.hexdigest()


def place_by_folder(name: str, file) -> tuple[str, int, float] | None:
    """(split, label, number) of an image by its path, None without a label. Raises BadInput for misnamed folders."""
    *folders, base = PurePosixPath(name).parts
    pairs = list(itertools.pairwise(folders))
    for split, label in pairs:
        if split in SPLITS and label in ("0", "1"):
            numbers = re.findall("[0-9]+", base.rpartition(".")[0])
            return split, int(label), int(numbers[-1]) if numbers else float("inf")
    for split, label in pairs:
        if split in SPLITS:
            raise BadInput(f"{file}: {name}: below {split}, the folder '{label}' must be a label, 0 or 1")
        if label in ("0", "1"):
            raise BadInput(f"{file}: {name}: the folder '{split}' must be train, valid or test{nearest(split, SPLITS)}")
    return None


def read_kaggle_labels(path: Path, valid_share: float) -> dict[str, tuple[str, int, int]]:
    """{id: (split, label, row)} of a train_labels.csv; which are held out is a function of the id alone."""
    places = {}
    with open(path, newline="", encoding="utf-8", errors="replace") as file:
        reader = csv.DictReader(file)
        if not {"id", "label"} <= set(reader.fieldnames or ()):
            raise BadInput(f"{path} has the columns {reader.fieldnames}, it must have id and label")
        for row, entry in enumerate(reader):
            name, label = entry["id"], entry["label"]
            if label not in ("0", "1") or name in places:
                raise BadInput(f"{path}: row {row + 1} ({name}) has the label {label!r}; a row an id, with 0 or 1, is allowed")
            held_out = int(hashlib.sha256(name.encode()).hexdigest(), 16) < valid_share * 2**256
            places[name] = ("valid" if held_out else "train", int(label), row)
    return places


def list_files(path: Path, scratch, archives: dict, stack: contextlib.ExitStack):
    """Yield (name below the source, file, offset, bytes, time changed) of all files, those in tars too, in a fixed order."""

    def fail(error):
        raise error

    entered = set()
    for folder, folders, files in (
        os.walk(path, followlinks=True, onerror=fail) if path.is_dir() else [(path.parent, [], [path.name])]
    ):
        if os.path.realpath(folder) in entered:  # by a link to a folder above
            folders.clear()
            continue
        entered.add(os.path.realpath(folder))
        folders.sort()
        for full in (Path(folder, file) for file in sorted(files)):
            if full == path or is_tar(full):
                yield from list_tar(full, scratch, archives, stack)
            else:
                status = full.stat()
                yield full.relative_to(path).as_posix(), str(full), 0, status.st_size, status.st_mtime_ns


def list_tar(path: Path, scratch, archives: dict, stack: contextlib.ExitStack):
    """Yield what `list_files` does for the files in a tar, and leave it open in `archives`.

    Raises BadInput for a damaged or cut tar and for a member that would lie outside it or is no plain file.
    """
    archive = archives[str(path)] = stack.enter_context(open_archive(path, scratch))
    changed_ns = path.stat().st_mtime_ns
    try:
        with tarfile.open(fileobj=archive, mode="r:") as tar:
            while (member := tar.next()) is not None:
                tar.members.clear()  # tarfile would keep 1.5 KB of every member
                name = safe_member_name(member.name, path)
                if member.isreg() and not member.issparse():
                    yield name, str(path), member.offset_data, member.size, changed_ns
                elif not member.isdir():
                    raise BadInput(f"{path}: the member '{name}' is a link or a device, only plain files are taken")
            end = tar.offset
    except tarfile.TarError as error:
        raise BadInput(f"{path} is not a whole tar archive ({one_line(error)})") from None
    if os.pread(archive.fileno(), 512, end) != bytes(512):  # tarfile takes a cut or damage between members for the end
        raise BadInput(f"{path} is cut off or damaged at byte {end:,}: a tar ends in blocks of zeros")


def open_archive(path: Path, scratch):
    """A tar as a seekable file; a packed one is unpacked into a file without a name, which is gone with the process."""
    archive = open(path, "rb")  # noqa: SIM115 (the caller closes it)
    unpacker = UNPACKERS.get(archive.read(2))
    archive.seek(0)
    if unpacker is None:
        return archive
    unpacked = tempfile.TemporaryFile(dir=scratch)  # noqa: SIM115
    try:
        with archive, unpacker.open(archive) as stream:
            shutil.copyfileobj(stream, unpacked, 1 << 20)
        unpacked.seek(0)
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        unpacked.close()
        if isinstance(error, OSError) and error.errno is not None:  # a full disk, not a damaged archive
            raise
        raise BadInput(f"{path} is cut off or damaged ({one_line(error)})") from None
    return unpacked


def decode_images(images: list[tuple], archives: dict, patches: np.ndarray) -> Counter:
    """Decode images of `open_source` into `patches` uint8 (B, 96, 96, 3); gives {mode: images}. Safe in several threads."""
    modes = Counter()
    for patch, (_, _, name, file, offset, size) in zip(patches, images, strict=True):
        archive = archives.get(file)
        data = os.pread(archive.fileno(), size, offset) if archive else Path(file).read_bytes()
        patch[:] = decode_patch(data, f"{file}: {name}" if archive else file)
        modes[Image.open(io.BytesIO(data)).mode] += 1
    return modes


def import_images(path, directory, valid_share: float = 0.1) -> dict:
    """Write the labelled images of a source (see `open_source`) as PCam files into a new, empty or unfinished folder.

    Gives what `fill_folder` says as `splits`, with {mode: images} `converted` to RGB, and {reason: files} as `skipped`. Memory
    holds some 1,000 patches and the list of names. Raises BadInput for a source or a folder that cannot be used.
    """
    path, directory, pool = Path(path), Path(directory), ThreadPoolExecutor(NUM_THREADS)
    read_journal(directory)

    def write_split(split):
        images, modes = source[split], Counter()
        with SplitWriter(directory, split, len(images)) as writer, Progress(len(images), f"import {split}") as progress:
            for start in range(0, len(images), BLOCK_ROWS):
                block = images[start : start + BLOCK_ROWS]
                patches = np.empty((len(block), *PATCH_SHAPE), np.uint8)
                parts = [slice(first, first + DECODE_ROWS) for first in range(0, len(block), DECODE_ROWS)]
                for future in [pool.submit(decode_images, block[part], archives, patches[part]) for part in parts]:
                    modes.update(future.result())
                writer.add(patches, [label for _, label, *_ in block])
                progress.add(len(block))
        return {"converted": {mode: count for mode, count in modes.items() if mode != "RGB"}}

    with pool, open_source(path, nearest_folder(directory), valid_share) as (source, skipped, archives, digest):
        identity = {"path": str(path.resolve()), "digest": digest}
        sizes = {split: len(images) for split, images in source.items()}
        return {"splits": fill_folder(directory, identity, sizes, write_split), "skipped": dict(skipped)}
