"""The folder that import, repack and synthetic write: split by split, so that a killed run goes on
at the split where it was.
"""

import contextlib
import time
from pathlib import Path

from lib.command import BadInput
from lib.files import read_csv, read_json, require_space, write_csv, write_json
from lib.pcam import PATCH_BYTES, SPLITS, split_path
from lib.progress import Progress
from lib.splitwriter import SplitWriter, sole_writer

JOURNAL_FILE = ".import.json"
WRITE_ORDER = ("test", "valid", "train")  # a folder without train is never taken for a whole one


def read_journal(directory) -> dict:
    """The note of an unfinished run in a folder, {} for none. Raises BadInput for a folder that
    holds anything else.
    """
    path = Path(directory, JOURNAL_FILE)
    journal = read_json(path) if path.exists() else {}
    is_used = not journal and path.parent.is_dir() and any(path.parent.iterdir())
    if journal.get("finished", is_used):
        raise BadInput(f"{directory} already holds files: give a new or an empty folder")
    return journal


@contextlib.contextmanager
def begun_folder(directory: Path):
    """Hold a folder for this process, without what a killed run left half-written in it."""
    with sole_writer(directory):
        for leftover in directory.glob(".*.tmp"):
            leftover.unlink()
        yield


def fill_folder(
    directory: Path, source: str, sizes, read_blocks, table=(), patch_bytes=PATCH_BYTES, **storage
) -> dict[str, dict]:
    """Write each split of `sizes` (patches) that a killed run from the same `source` left undone;
    gives {split: {patches, seconds}}.

    `read_blocks(split)` yields (images, labels, meta rows, table rows). A `table` (name, *columns)
    collects the last of them; the first column is the split. `storage` is as SplitWriter takes it.
    """
    with begun_folder(directory):
        begun_from = read_journal(directory).get("source")
        done = [split for split in SPLITS if split_path(directory, split, "x").exists()]
        if done and begun_from != source:
            raise BadInput(
                f"{directory} was begun from {begun_from} as it was then: delete the folder first"
            )
        splits = {split: {"patches": sizes[split]} for split in SPLITS if split in sizes}
        todo = [split for split in WRITE_ORDER if split in sizes and split not in done]
        require_space(directory, sum(sizes[split] for split in todo) * patch_bytes)
        journal = directory / JOURNAL_FILE
        try:
            write_json(journal, {"source": source, "finished": False})
            for split in todo:
                began = time.monotonic()
                progress = Progress(sizes[split], f"write {split}")
                writer = SplitWriter(directory, split, sizes[split], **storage)
                rows = []
                with writer, progress:
                    for images, labels, meta, block_rows in read_blocks(split):
                        writer.add(images, labels, meta)
                        rows += block_rows
                        progress.add(len(labels))
                    if table:
                        replace_rows(directory / table[0], table[1:], split, rows)
                splits[split]["seconds"] = round(time.monotonic() - began, 2)
            write_json(journal, {"source": source, "finished": True})
        except BadInput:  # the source has to change, and is another one then
            tables = [directory / name for name in table[:1]]
            for path in [*directory.glob("camelyonpatch_*"), journal, *tables]:
                path.unlink(missing_ok=True)
            raise
    return splits


def replace_rows(path: Path, columns, split: str, rows) -> None:
    """Put the rows of a split into a table, in place of those that a killed run wrote."""
    earlier = [tuple(row.values()) for row in read_csv(path)] if path.exists() else []
    others = [row for row in earlier if row[0] != split]
    write_csv(path, columns, sorted([*others, *rows], key=lambda row: SPLITS.index(row[0])))
