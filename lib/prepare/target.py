"""The folder that import, repack and synthetic write: whole, or removed again."""

import contextlib
import time
from pathlib import Path

from lib.command import BadInput
from lib.files import require_space
from lib.pcam import PATCH_BYTES, SPLITS
from lib.progress import Progress
from lib.splitwriter import SplitWriter, sole_writer

UNFINISHED = ".unfinished"  # marks a folder whose writer is at work, or was killed
# what a writer may leave in such a folder
LEFTOVERS = (UNFINISHED, ".*.tmp", "camelyonpatch_*", "*.csv")


def require_unused(directory) -> None:
    """Raise BadInput for a folder that holds anything but what a killed run left."""
    directory = Path(directory)
    is_used = directory.is_dir() and any(directory.iterdir())
    if is_used and not (directory / UNFINISHED).exists():
        raise BadInput(f"{directory} already holds files: give a new or an empty folder")


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
    with sole_writer(directory):
        require_unused(directory)
        remove_files(directory)
        marker = directory / UNFINISHED
        marker.touch()
        try:
            yield
        except BaseException:
            remove_files(directory)
            raise
        marker.unlink(missing_ok=True)


def write_splits(
    directory: Path, sizes, read_blocks, patch_bytes=PATCH_BYTES, **storage
) -> tuple[dict[str, dict], list[tuple]]:
    """Write each split of `sizes` (patches) into a folder. Gives {split: {patches, seconds}} and
    all table rows.

    `read_blocks(split)` yields (images, labels, meta rows, table rows). `storage` is as SplitWriter
    takes it.
    """
    require_space(directory, sum(sizes.values()) * patch_bytes)
    splits, rows = {}, []
    # train is the last: a folder without it is never taken for a whole one
    for split in reversed(SPLITS):
        if split not in sizes:
            continue
        began = time.monotonic()
        writer = SplitWriter(directory, split, sizes[split], **storage)
        split_rows = []
        with writer, Progress(sizes[split], f"write {split}") as progress:
            for images, labels, meta, block_rows in read_blocks(split):
                writer.add(images, labels, meta)
                split_rows += block_rows
                progress.add(len(labels))
        seconds = round(time.monotonic() - began, 2)
        splits[split] = {"patches": sizes[split], "seconds": seconds}
        rows = split_rows + rows
    return dict(reversed(splits.items())), rows
