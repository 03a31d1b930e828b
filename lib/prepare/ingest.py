"""Labelled images as PCam HDF5: folders, tars, the Kaggle edition. A killed run goes on at the
split where it was.
"""

import contextlib
import hashlib
import io
import itertools
import os
import re
import shutil
import stat
import tarfile
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath

import numpy as np
from PIL import Image

from lib.command import BadInput, nearest, one_line
from lib.files import nearest_folder, read_edited_csv, read_json, require_space, write_json
from lib.inputs import decode_patch, is_image, is_tar, refuse, walk_tar
from lib.pcam import PATCH_BYTES, SPLITS, SplitWriter, sole_writer, split_path
from lib.progress import Progress

JOURNAL_FILE, LOSSES_FILE = ".import.json", "repack_losses.csv"
WRITE_ORDER = ("test", "valid", "train")  # a folder without train is never taken for a whole one
BLOCK_ROWS = 1024
NUM_THREADS = min(4, os.cpu_count() or 1)


def read_journal(directory) -> dict:
    """What an unfinished run noted in a folder, {} for none. Raises BadInput for a folder that
    holds anything else.
    """
    path = Path(directory, JOURNAL_FILE)
    journal = read_json(path) if path.exists() else {}
    if journal.get("finished", not journal and path.parent.is_dir() and any(path.parent.iterdir())):
        raise BadInput(f"{directory} already holds files: give a new or an empty folder")
    return journal


def fill_folder(
    directory: Path, source: str, sizes: dict[str, int], write_split
) -> dict[str, dict]:
    """Have `write_split` write each split of `sizes` (patches) that a killed run left undone; gives
    {split: {patches, ...}}.
    """
    with sole_writer(directory):
        begun_from = read_journal(directory).get("source")
        splits = {split: {"patches": sizes[split]} for split in SPLITS if split in sizes}
        done = [split for split in SPLITS if split_path(directory, split, "x").exists()]
        if done and begun_from != source:
            raise BadInput(
                f"{directory} was begun from {begun_from} as it was then: delete the folder first"
            )
        for stale in directory.glob(".*.tmp"):  # of a killed run
            shutil.rmtree(stale) if stale.is_dir() else stale.unlink()
        todo = [split for split in WRITE_ORDER if split in sizes and split not in done]
        require_space(directory, sum(sizes[split] for split in todo) * PATCH_BYTES)
        try:
            write_json(directory / JOURNAL_FILE, {"source": source, "finished": False})
            for split in todo:
                began = time.monotonic()
                splits[split] |= write_split(split) | {
                    "seconds": round(time.monotonic() - began, 2)
                }
            write_json(directory / JOURNAL_FILE, {"source": source, "finished": True})
        except BadInput:  # the source has to change, and is another one then
            for path in (
                *directory.glob("camelyonpatch_*"),
                directory / JOURNAL_FILE,
                directory / LOSSES_FILE,
            ):
                path.unlink(missing_ok=True)
            raise
    return splits


def index_source(path: Path, scratch: Path, stack: contextlib.ExitStack, valid_share: float):
    """Look through a tar, a folder of images and tars at SPLIT/LABEL/NAME, or the Kaggle edition,
    which has no valid split.

    Gives {split: [(number in the name or row of the CSV, label, name, file, archive, offset,
    bytes)]} sorted, {reason: files left out} and a digest of it all; `stack` closes the archives.
    Raises BadInput for what cannot be read or has no labels.
    """
    if not path.is_dir() and not path.is_file():
        raise BadInput(f"no file or folder {path}")
    labels_path = path / "train_labels.csv"
    kaggle = read_kaggle_labels(labels_path, valid_share) if labels_path.is_file() else {}
    splits, skipped, seen, digest = {}, Counter(), set(), hashlib.sha256()
    with Progress(0, f"look through {path.name}", "files") as progress:
        for name, file, archive, offset, size, changed_ns in list_files(path, scratch, stack):
            progress.add()
            if size is None or not is_image(PurePosixPath(name).name):
                skipped["not an image"] += 1
                continue
            key = name.rpartition(".")[0] if kaggle else name
            place = kaggle.get(key) if kaggle else place_by_folder(name, file)
            if place is None:
                skipped["no label"] += 1
                continue
            if key in seen:
                raise BadInput(f"{file}: {name} is there twice")
            seen.add(key)
            split, label, number = place
            splits.setdefault(split, []).append((number, label, name, file, archive, offset, size))
            digest.update(repr((place, name, offset, size, changed_ns)).encode())
    if not splits:
        reasons = (
            ", ".join(f"{count:,} files skipped ({reason})" for reason, count in skipped.items())
            or "it is empty"
        )
        raise BadInput(
            f"{path} has no images as SPLIT/LABEL/NAME.jpg (train, valid, test; 0, 1): {reasons}"
        )
    if absent := [key for key in kaggle if key not in seen]:
        raise BadInput(
            f"{labels_path} lists {absent[0]}, which is not there ({len(absent):,} such)"
        )
    return (
        {split: sorted(images, key=lambda image: image[:3]) for split, images in splits.items()},
        skipped,
        digest.hexdigest(),
    )


def place_by_folder(name: str, file) -> tuple[str, int, float] | None:
    """(split, label, number) of an image by its path, None without a label. Raises BadInput for
    misnamed folders.
    """
    *folders, base = PurePosixPath(name).parts
    misnamed = []
    for split, label in itertools.pairwise(folders):
        if split in SPLITS and label in ("0", "1"):
            numbers = re.findall("[0-9]+", base.rpartition(".")[0])
            return split, int(label), int(numbers[-1]) if numbers else float("inf")
        if split in SPLITS:
            misnamed.append(f"below {split}, the folder '{label}' must be a label, 0 or 1")
        elif label in ("0", "1"):
            misnamed.append(
                f"the folder '{split}' must be train, valid or test{nearest(split, SPLITS)}"
            )
    if misnamed:
        raise BadInput(f"{file}: {name}: {misnamed[0]}")
    return None


def read_kaggle_labels(path: Path, valid_share: float) -> dict[str, tuple[str, int, int]]:
    """{train/id: (split, label, row)} of a train_labels.csv; which are held out is a function of
    the id alone.
    """
    places = {}
    for row, entry in enumerate(read_edited_csv(path, ("id", "label"))):
        name, label = f"train/{entry['id']}", entry["label"]
        if label not in ("0", "1") or name in places:
            raise BadInput(
                f"{path}: row {row + 1} ({name}) has the label {label!r}; a row an id, with 0 or 1,"
                " is allowed"
            )
        held_out = int(hashlib.sha256(entry["id"].encode()).hexdigest(), 16) < valid_share * 2**256
        places[name] = ("valid" if held_out else "train", int(label), row)
    return places


def list_files(path: Path, scratch: Path, stack: contextlib.ExitStack):
    """Yield (name below the source, file, its open archive or None, offset, bytes or None for no
    plain file, time changed).
    """
    entered = set()
    walk = (
        os.walk(path, followlinks=True, onerror=refuse)
        if path.is_dir()
        else [(path.parent, [], [path.name])]
    )
    for folder, folders, files in walk:
        if os.path.realpath(folder) in entered:  # by a link to a folder above
            folders.clear()
            continue
        entered.add(os.path.realpath(folder))
        folders.sort()
        for full in (Path(folder, file) for file in sorted(files)):
            status = full.stat()
            if full == path or is_tar(full):
                archive = stack.enter_context(open_archive(full, scratch))
                for name, member, _ in walk_tar(full, archive):
                    if member.isreg() and not member.issparse():
                        yield (
                            name,
                            str(full),
                            archive,
                            member.offset_data,
                            member.size,
                            status.st_mtime_ns,
                        )
                    elif not member.isdir():
                        raise BadInput(
                            f"{full}: the member '{name}' is a link or a device, only plain files"
                            " are taken"
                        )
            else:
                size = status.st_size if stat.S_ISREG(status.st_mode) else None
                yield (
                    full.relative_to(path).as_posix(),
                    str(full),
                    None,
                    0,
                    size,
                    status.st_mtime_ns,
                )


def open_archive(path: Path, scratch: Path):
    """A tar as a seekable file; a packed one is unpacked into a file without a name, which is gone
    with the process.
    """
    try:
        with tarfile.open(path) as tar:
            if isinstance(tar.fileobj, io.BufferedReader):
                return open(path, "rb")
            unpacked = tempfile.TemporaryFile(dir=scratch)  # noqa: SIM115 (the caller closes it)
            tar.fileobj.seek(0)
            shutil.copyfileobj(tar.fileobj, unpacked, 1 << 20)
            unpacked.seek(0)
            return unpacked
    except Exception as error:  # whatever damage provokes in tarfile
        # a full disk, not a damaged archive
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise BadInput(f"{path} is not a whole tar archive ({one_line(error)})") from None


def decode_image(image: tuple) -> tuple[np.ndarray, str]:
    """The patch uint8 (96, 96, 3) of an image of `index_source`, and the mode that it was in."""
    _, _, name, file, archive, offset, size = image
    data = os.pread(archive.fileno(), size, offset) if archive else Path(file).read_bytes()
    return (
        decode_patch(data, f"{file}: {name}" if archive else file),
        Image.open(io.BytesIO(data)).mode,
    )


def import_images(path, directory, valid_share: float = 0.1) -> dict:
    """Write the labelled images of a source as PCam files; gives {splits: {split: {...}}, skipped:
    {reason: files}}.
    """
    path, directory = Path(path), Path(directory)
    read_journal(directory)

    def write_split(split):
        images, modes = source[split], Counter()
        with (
            SplitWriter(directory, split, len(images)) as writer,
            Progress(len(images), f"import {split}") as progress,
        ):
            for start in range(0, len(images), BLOCK_ROWS):
                block = images[start : start + BLOCK_ROWS]
                patches, found = zip(*pool.map(decode_image, block), strict=True)
                writer.add(np.stack(patches), [label for _, label, *_ in block])
                modes.update(found)
                progress.add(len(block))
        return {"converted": {mode: count for mode, count in modes.items() if mode != "RGB"}}

    with ThreadPoolExecutor(NUM_THREADS) as pool, contextlib.ExitStack() as stack:
        source, skipped, digest = index_source(path, nearest_folder(directory), stack, valid_share)
        sizes = {split: len(images) for split, images in source.items()}
        splits = fill_folder(directory, f"{path.resolve()} (SHA-256 {digest})", sizes, write_split)
        return {"splits": splits, "skipped": dict(skipped)}
