"""A split of PCam written under the official names: whole, or not at all."""

import contextlib
import os
from pathlib import Path

import h5py
import numpy as np

from lib.command import BadInput
from lib.files import atomic_path, lock_if_possible, write_csv
from lib.pcam import PATCH_SHAPE, split_path

META_COLUMNS = ("", "coord_y", "coord_x", "tumor_patch", "center_tumor_patch", "wsi")


@contextlib.contextmanager
def sole_writer(directory):
    """Lock a folder for this process, as a context manager. A missing folder is made, and removed
    again if nothing was written into it. Raises BadInput where another process is writing there.
    """
    directory = Path(directory)
    is_new = not directory.exists()
    directory.mkdir(parents=True, exist_ok=True)
    lock = os.open(directory, os.O_RDONLY)
    try:
        if not lock_if_possible(lock, directory):
            raise BadInput(f"{directory}: another process is writing there")
        yield
    finally:
        os.close(lock)
        if is_new:
            with contextlib.suppress(OSError):  # of a folder that is not empty
                directory.rmdir()


class SplitWriter:
    """Writes a split block by block, as a context manager. The files get their official names when
    all rows are there; an error leaves no file.

    x is contiguous uint8, which a reader can map. `dtype` and `storage`, the options of h5py's
    create_dataset, ask for something else.
    """

    def __init__(self, directory, split: str, num: int, dtype=np.uint8, **storage):
        self.directory = directory
        self.split = split
        self.labels = []
        self.meta = []
        self.stack = contextlib.ExitStack()
        temporary = self.stack.enter_context(atomic_path(split_path(directory, split, "x")))
        # nobody else has the temporary file, and some file systems have no locks
        self.file = h5py.File(temporary, "w", locking=False)
        self.x = self.file.create_dataset("x", (num, *PATCH_SHAPE), dtype, **storage)

    def add(self, images: np.ndarray, labels: np.ndarray, meta=()) -> None:
        """Append patches (B, 96, 96, 3), labels (B,) and, optionally, B meta rows (tuples as
        META_COLUMNS[1:]).
        """
        assert images.dtype == self.x.dtype, images.dtype
        start = len(self.labels)
        self.x[start : start + len(images)] = images
        self.labels.extend(labels)
        self.meta.extend(meta)

    def __enter__(self):
        return self

    def __exit__(self, _kind, error, _trace):
        with self.stack:  # x gets its name last: where it is, the others are
            if error:
                with contextlib.suppress(Exception):  # the first error is the one to report
                    self.file.close()
                raise error
            assert len(self.labels) == len(self.x), len(self.labels)
            self.file.close()
            if self.meta:
                write_meta(split_path(self.directory, self.split, "meta"), self.meta)
            with atomic_path(split_path(self.directory, self.split, "y")) as temporary:
                write_labels(temporary, self.labels)


def write_labels(path, labels: np.ndarray) -> None:
    """Write labels (N,) as the official y file: uint8 (N, 1, 1, 1)."""
    with h5py.File(path, "w", locking=False) as file:
        file["y"] = np.asarray(labels, np.uint8).reshape(-1, 1, 1, 1)


def write_meta(path, rows) -> None:
    """Write a meta CSV: rows are (coord_y, coord_x, tumor_patch, center_tumor_patch, wsi)."""
    write_csv(path, META_COLUMNS, [(index, *row) for index, row in enumerate(rows)])
