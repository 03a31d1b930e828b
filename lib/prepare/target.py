"""The folder that import, repack and synthetic write: whole, or removed again."""

import contextlib
from pathlib import Path

import numpy as np

from lib.command import BadInput
from lib.files import require_space
from lib.pcam import PATCH_BYTES, SPLITS
from lib.progress import Progress
from lib.splitwriter import SplitWriter, sole_writer

UNFINISHED = ".unfinished"  # marks a folder whose writer is at work, or was killed
# what a writer may leave in such a folder
LEFTOVERS = (UNFINISHED, ".*.tmp", "camelyonpatch_*", "*.csv")


def remove_files(directory: Path) -> None:
    for pattern in LEFTOVERS:
        for path in directory.glob(pattern):
            path.unlink()


@contextlib.contextmanager
def new_folder(directory: Path):
    """Hold a folder for this process while a block fills it. What a killed run left there goes
    first, and if the block raises, so does all that it wrote.

    Raises BadInput for a folder that holds anything else.
    """
    marker = directory / UNFINISHED
    with sole_writer(directory):
        if any(directory.iterdir()) and not marker.exists():
            raise BadInput(f"{directory} already holds files: give a new or an empty folder")
        remove_files(directory)
        marker.touch()
        try:
            yield
        except BaseException:
            remove_files(directory)
            raise
        marker.unlink(missing_ok=True)


def write_splits(directory: Path, sizes: dict[str, int], read_blocks, dtype=np.uint8) -> list:
    """Write each split of `sizes` (patches) into a folder; gives all table rows.

    `read_blocks(split)` yields (images, labels, meta rows, table rows).
    """
    patch_bytes = PATCH_BYTES * np.dtype(dtype).itemsize
    require_space(directory, sum(sizes.values()) * patch_bytes)
    rows = []
    # train is the last: a folder without it is never taken for a whole one
    for split in reversed(SPLITS):
        num = sizes.get(split, 0)
        if not num:
            continue
        split_rows = []
        writer = SplitWriter(directory, split, num, dtype)
        with writer, Progress(num, f"write {split}") as progress:
            for images, labels, meta, block_rows in read_blocks(split):
                writer.add(images, labels, meta)
                split_rows += block_rows
                progress.add(len(labels))
        rows = split_rows + rows
    return rows
