"""Labelled images as PCam HDF5: folders, tars, the Kaggle edition, Camelyon17-WILDS."""

import hashlib
import itertools
import os
import re
import tempfile
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path, PurePosixPath
from typing import BinaryIO, NamedTuple

import numpy as np

from lib.command import BadInput, nearest
from lib.files import read_edited_csv
from lib.inputs import (
    decode_patch,
    describe_other,
    is_image,
    is_tar,
    walk_folder,
    walk_tar,
)
from lib.pcam import SPLITS
from lib.prepare.target import new_folder, write_splits
from lib.progress import Progress

BLOCK_ROWS = 1024
NUM_THREADS = min(4, os.cpu_count() or 1)
WILDS_SPLITS = {"1": "valid", "2": "test"}  # by centre


class File(NamedTuple):
    """A file of a source: its path inside the source, its path in words, what reads its bytes."""

    name: str
    words: str
    read: Callable[[], bytes]


class Place(NamedTuple):
    """Where an image belongs: its rows are sorted by `order`. Copies of an image have one `key`."""

    split: str
    label: int
    order: float
    key: tuple | str
    meta: tuple = ()


def import_images(path, directory, valid_share: float = 0.1) -> tuple[list[str], dict[str, int]]:
    """Write the labelled images of a source as PCam files; gives the splits, and {reason: files
    left out}.
    """
    path = Path(path)
    directory = Path(directory)

    def read_blocks(split):
        rows = images[split]
        for start in range(0, len(rows), BLOCK_ROWS):
            places, files = zip(*rows[start : start + BLOCK_ROWS], strict=True)
            patches = list(pool.map(decode_file, files))
            labels = [place.label for place in places]
            meta = [place.meta for place in places if place.meta]
            yield np.stack(patches), labels, meta, ()

    with (
        new_folder(directory),
        ThreadPoolExecutor(NUM_THREADS) as pool,
        tempfile.TemporaryFile(dir=directory, buffering=0) as scratch,
    ):
        images, skipped = index_source(path, list_files(path, scratch), valid_share)
        sizes = {split: len(rows) for split, rows in images.items()}
        write_splits(directory, sizes, read_blocks)
    return [split for split in SPLITS if split in images], dict(skipped)


def decode_file(file: File) -> np.ndarray:
    return decode_patch(file.read(), file.words)


def index_source(path: Path, files, valid_share: float):
    """Look through `files` for images that a table, or else SPLIT/LABEL/NAME, gives a place.

    Gives {split: [(Place, File)]} in the order of rows, and {reason: files left out}. Raises
    BadInput for an image without its file, one that is there twice, and no images.
    """
    table = read_table(path, valid_share)
    images, skipped, first_files = {}, Counter(), {}
    with Progress(0, f"look through {path.name}", "files") as progress:
        for file in files:
            progress.add()
            base = PurePosixPath(file.name).name
            if not is_image(base):
                skipped[describe_other(base)] += 1
                continue
            place = table.get(file.name.rpartition(".")[0]) if table else place_by_folder(file)
            if place is None:
                skipped["no label"] += 1
                continue
            first = first_files.setdefault(place.key, file)
            # an archive beside its own content; other content may be of another hospital
            if first is not file and (table or first.read() == file.read()):
                words = f"{first.words} and {file.words} are one image"
                raise BadInput(f"{words}: leave one of the two out")
            if place.split in SPLITS:
                images.setdefault(place.split, []).append((place, file))
            else:
                skipped[place.split] += 1
    absent = [key for key in table if key not in first_files]
    if absent:
        raise BadInput(
            f"the table in {path} lists {len(absent):,} images that are not there"
            f" ({', '.join(absent[:2])}): take them out of it"
        )
    if not images:
        reasons = [f"{count:,} files skipped ({reason})" for reason, count in skipped.items()]
        raise BadInput(
            f"{path} has no images as SPLIT/LABEL/NAME.jpg (train, valid, test; 0, 1), and no"
            f" {' or '.join(TABLES)}: {', '.join(reasons) or 'it is empty'};"
            f" {explain_no_images(path)}"
        )
    for rows in images.values():
        rows.sort(key=lambda image: (image[0].order, image[0].label, image[1].name))
    return images, skipped


def explain_no_images(path: Path) -> str:
    """Words for what to do where a source holds no images with labels."""
    for name in TABLES:
        for table in (path.parent / name, *path.glob(f"*/{name}")):
            if table.is_file():
                return f"{table.parent} holds {name}: import that folder"
    return "unpack zips first, HDF5 is read by repack"


def place_by_folder(file: File) -> Place | None:
    """The place of SPLIT/LABEL/NAME, None without a label. Raises BadInput for misnamed folders."""
    *folders, base = PurePosixPath(file.name).parts
    misnamed = None
    for depth, (split, label) in enumerate(itertools.pairwise(folders), 2):
        if split in SPLITS and label in ("0", "1"):
            numbers = re.findall("[0-9]+", base.rpartition(".")[0])
            order = int(numbers[-1]) if numbers else float("inf")
            return Place(split, int(label), order, (split, label, *folders[depth:], base))
        if split in SPLITS or label in ("0", "1"):
            misnamed = (split, label)
    if misnamed:
        split, label = misnamed
        raise BadInput(
            f"{file.words}: {split}/{label} must be SPLIT/LABEL, with train, valid or test and 0 or"
            f" 1{nearest(split, SPLITS)}"
        )
    return None


def read_table(path: Path, valid_share: float) -> dict[str, Place]:
    """{path of an image without its ending: place} of a source's table, {} where it has none."""
    table = {}
    for name, (columns, find_place) in TABLES.items():
        rows = read_edited_csv(path / name, columns) if (path / name).is_file() else []
        for number, row in enumerate(rows):
            place = find_place(row, number, valid_share)
            if place.key in table:
                raise BadInput(f"{path / name} lists {place.key} twice")
            table[place.key] = place
    return table


def place_kaggle(row: dict, number: int, valid_share: float) -> Place:
    """The place of an image of Kaggle's table; whether it is held out is a function of its id."""
    name = row["id"]
    if is_image(name):
        name = name.rpartition(".")[0]
    drawn = int(hashlib.sha256(name.encode()).hexdigest(), 16)
    split = "valid" if drawn < valid_share * 2**256 else "train"
    return Place(split, parse_label(row["label"], name), number, f"train/{name}")


def place_wilds(row: dict, number: int, _valid_share: float) -> Place:
    """The place of an image of Camelyon17-WILDS, in the splits of the benchmark (Koh et al. 2021):
    one hospital validates, another one tests; `split` 1 shares the slides of train.
    """
    slide = f"patient_{row['patient']}_node_{row['node']}"
    x, y = row["x_coord"], row["y_coord"]
    name = f"patches/{slide}/patch_{slide}_x_{x}_y_{y}"
    label = parse_label(row["tumor"], name)
    split = WILDS_SPLITS.get(row["center"])
    if not split:
        split = "train" if row["split"] == "0" else "of slides that train too: WILDS's id_val"
    return Place(split, label, number, name, (y, x, bool(label), bool(label), slide))


# by the name of a table: its columns, and the function of one of its rows
WILDS_COLUMNS = ("patient", "node", "x_coord", "y_coord", "tumor", "center", "split")
TABLES = {
    "train_labels.csv": (("id", "label"), place_kaggle),
    "metadata.csv": (WILDS_COLUMNS, place_wilds),
}


def parse_label(text: str, name: str) -> int:
    label = text.strip().removesuffix(".0")  # pandas writes 1.0 where a column has gaps
    if label not in ("0", "1"):
        raise BadInput(f"{name} has the label '{text}', it must be 0 or 1")
    return int(label)


def list_files(path: Path, scratch: BinaryIO):
    """Yield every File of a tar, or of a folder and the tars in it. The images of tars are copied
    to the end of `scratch`, so that they can be read in any order.
    """
    if not path.exists():
        raise BadInput(f"no file or folder {path}")
    for full in walk_folder(path) if path.is_dir() else [path]:
        if full != path and not is_tar(full):
            yield File(full.relative_to(path).as_posix(), str(full), full.read_bytes)
            continue
        for name, data in walk_tar(full):
            read = partial(os.pread, scratch.fileno(), len(data), scratch.tell())
            scratch.write(data)
            yield File(name, f"{full}: {name}", read)
