"""PatchCamelyon as it is published: one HDF5 pair and one meta CSV per split, in one folder, under the official names.

Source: Veeling et al. 2018, https://zenodo.org/records/2546921. `x` is uint8 (N, 96, 96, 3), `y` is uint8 (N, 1, 1, 1).
"""

import contextlib
import fcntl
import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np

from lib.command import BadInput, nearest, one_line
from lib.logger import file_digest, read_edited_csv, read_json, sync_folder, write_csv, write_json

SPLITS = ("train", "valid", "test")
PATCH_SHAPE = (96, 96, 3)
PATCH_BYTES = 96 * 96 * 3
META_COLUMNS = ("", "coord_y", "coord_x", "tumor_patch", "center_tumor_patch", "wsi")
FINGERPRINT_FILE = ".pcam-sha256.json"


def split_path(directory, split: str, part: str) -> Path:
    """The official path of a split's `x`, `y`, `mask` (HDF5) or `meta` (CSV)."""
    name = f"camelyonpatch_level_2_split_{split}_{part}"
    return Path(directory) / f"{name}{'.csv' if part == 'meta' else '.h5'}"


def require_file(path: Path) -> Path:
    """`path` if it is a file. Raises BadInput that names the closest thing that is there: a misspelt name is not skipped."""
    if path.is_file():
        return path
    if not path.parent.is_dir():
        raise BadInput(f"no folder {path.parent} (prepare.py puts the data there; data_dir= names another folder)")
    if path.with_name(path.name + ".gz").is_file():
        raise BadInput(f"{path.name}.gz in {path.parent} is still packed: gunzip it, or use prepare.py download")
    there = [entry.name for entry in path.parent.iterdir()]
    raise BadInput(f"no file {path.name} in {path.parent}{nearest(path.name, there)}")


def require_splits(directory) -> list[str]:
    """The splits of a PCam folder. Raises BadInput when train or valid lacks a file; the test split may be missing whole."""
    for split in ("train", "valid"):
        for part in ("x", "y"):
            require_file(split_path(directory, split, part))
    has_test = [split_path(directory, "test", part).exists() for part in ("x", "y")]
    if any(has_test) and not all(has_test):
        require_file(split_path(directory, "test", "y" if has_test[0] else "x"))
    return [split for split in SPLITS if split != "test" or all(has_test)]


@contextlib.contextmanager
def open_dataset(path, key: str):
    """Yield the h5py dataset `key` of a file. Raises BadInput for a file that is not HDF5, is cut off, or lacks the key."""
    path = require_file(Path(path))
    try:
        file = h5py.File(path, "r", locking=False)
    except OSError as error:
        text = str(error)
        what = "is cut off: it is shorter than its own header says" if "truncated" in text else "is not a readable HDF5 file"
        raise BadInput(f"{path} {what} ({path.stat().st_size:,} bytes)") from None
    with file:
        try:
            item = file.get(key)
        except (KeyError, OSError, RuntimeError) as error:
            raise BadInput(f"{path}: '{key}' cannot be read ({one_line(error)})") from None
        if not isinstance(item, h5py.Dataset):
            raise BadInput(f"{path} has no dataset '{key}'; it has: {', '.join(file) or 'nothing'}")
        yield item


@dataclass(frozen=True)
class Images:
    """The `x` of a split. `mapped` is a uint8 (N, 96, 96, 3) array over the file itself, or None when it has to be decoded."""

    path: Path
    num: int
    mapped: np.ndarray | None
    layout: str
    offset: int = 0  # of the mapped array in the file

    @property
    def num_bytes(self) -> int:
        return self.num * PATCH_BYTES

    def read(self, rows) -> np.ndarray:
        """The patches at `rows`, any integers in any order, as uint8 (B, 96, 96, 3)."""
        rows = np.asarray(rows, dtype=np.int64)
        if self.mapped is not None:
            return self.mapped[rows]
        with open_dataset(self.path, "x") as dataset:
            patches = np.empty((len(rows), *PATCH_SHAPE), np.uint8)
            for position in np.argsort(rows, kind="stable"):  # in file order, so that a chunk is decoded once
                patches[position] = to_uint8(read_dataset(self.path, dataset, rows[position]))
            return patches

    def will_need(self, rows: np.ndarray) -> None:
        """Tell the system which mapped rows come next, so that a cold disk reads them side by side, not page by page.

        Cold random patches of a 4.35 GB file came at 220-300 a second without it and at 20,000 with it.
        """
        with open(self.path, "rb") as file:
            for row in rows.tolist():
                os.posix_fadvise(file.fileno(), self.offset + row * PATCH_BYTES, PATCH_BYTES, os.POSIX_FADV_WILLNEED)

    def blocks(self, num_rows: int = 1024):
        """Yield (first row, uint8 (B, 96, 96, 3)) over the whole split in order."""
        if self.mapped is not None:
            for start in range(0, self.num, num_rows):
                yield start, self.mapped[start : start + num_rows]
            return
        with open_dataset(self.path, "x") as dataset:
            for start in range(0, self.num, num_rows):
                yield start, to_uint8(read_dataset(self.path, dataset, slice(start, start + num_rows)))


def read_dataset(path, dataset, where) -> np.ndarray:
    """`dataset[where]`. Raises BadInput for data that cannot be decoded."""
    try:
        return dataset[where]
    except OSError as error:
        raise BadInput(f"{path}: patch data at {where} cannot be decoded ({one_line(error)})") from None


def to_uint8(values: np.ndarray) -> np.ndarray:
    """Intensities of any type as uint8: rounded, clipped to 0..255, NaN as 0. `prepare.py repack` counts what that loses."""
    if values.dtype == np.uint8:
        return values
    return np.clip(np.nan_to_num(np.rint(values), nan=0.0, posinf=255, neginf=0), 0, 255).astype(np.uint8)


def map_dataset(dataset) -> np.ndarray | None:
    """A contiguous uint8 dataset as an array over the file's own pages; None for any other layout.

    The map is private copy-on-write: nothing can change the file, and torch takes it without a warning. It holds no
    anonymous memory and survives the closing of the HDF5 file.
    """
    offset = dataset.id.get_offset()
    if offset is None or dataset.dtype != np.uint8 or dataset.chunks is not None or dataset.external:
        return None
    path = dataset.file.filename
    if offset + dataset.size > os.path.getsize(path):
        raise BadInput(f"{path} is cut off: its patches end at byte {offset + dataset.size:,}, the file before that")
    mapped = np.memmap(path, np.uint8, mode="c", offset=offset, shape=dataset.shape)
    for row in (0, len(mapped) - 1):  # a wrong offset would give plausible noise: compare with what HDF5 itself reads
        if not np.array_equal(mapped[row], dataset[row]):
            return None
    return mapped.view(np.ndarray)


def open_images(path) -> Images:
    """Open an `x` file. Raises BadInput for a wrong shape or type and for an empty or damaged file."""
    path = Path(path)
    with open_dataset(path, "x") as dataset:
        if dataset.shape is None or dataset.shape[1:] != PATCH_SHAPE:
            raise BadInput(f"{path}: x has shape {dataset.shape}, it must be (N, 96, 96, 3)")
        if len(dataset) == 0:
            raise BadInput(f"{path}: x is empty")
        if dataset.dtype != np.uint8 and dataset.dtype.kind != "f":
            raise BadInput(f"{path}: x is of type {dataset.dtype}, it must be uint8 (or float, which repack converts)")
        mapped = map_dataset(dataset)
        layout = f"{dataset.dtype}, chunks {dataset.chunks}, compression {dataset.compression}"
        if dataset.dtype.kind == "f":
            sample = read_dataset(path, dataset, slice(None, None, max(1, len(dataset) // 64)))
            if 0 < np.max(sample, where=np.isfinite(sample), initial=0) <= 1:
                raise BadInput(f"{path}: x seems scaled to [0, 1]; prepare.py repack brings it back to 0..255")
        if mapped is None:
            return Images(path, len(dataset), None, layout)
        return Images(path, len(dataset), mapped, "mapped", dataset.id.get_offset())


def read_labels(path) -> np.ndarray:
    """The labels of a `y` file as uint8 (N,). Raises BadInput for values other than 0 and 1."""
    with open_dataset(path, "y") as dataset:
        if dataset.shape is None or dataset.size != (dataset.shape or (0,))[0] or dataset.dtype.kind not in "uifb":
            raise BadInput(f"{path}: y has shape {dataset.shape} and type {dataset.dtype}, it must be numbers (N, 1, 1, 1)")
        try:
            values = dataset[()].reshape(-1)
        except OSError as error:
            raise BadInput(f"{path}: the labels cannot be decoded ({one_line(error)})") from None
    wrong = np.flatnonzero(~np.isin(values, (0, 1)))
    if len(wrong):
        raise BadInput(f"{path}: row {wrong[0]} has the label {values[wrong[0]]}, it must be 0 or 1 ({len(wrong):,} such rows)")
    return values.astype(np.uint8)


@dataclass(frozen=True)
class Split:
    """One split of a data set: patches, labels uint8 (N,) and the slide name of each row where a meta CSV gives it."""

    name: str
    images: Images
    labels: np.ndarray
    slides: np.ndarray | None

    def __len__(self) -> int:
        return self.images.num


def open_split(directory, split: str) -> Split:
    """Open a split of a PCam folder. Raises BadInput where its files are missing, malformed or do not belong together."""
    images = open_images(split_path(directory, split, "x"))
    labels = read_labels(split_path(directory, split, "y"))
    if len(labels) != images.num:
        raise BadInput(f"{directory}: split {split} has {images.num:,} patches in x but {len(labels):,} labels in y")
    meta_path = split_path(directory, split, "meta")
    slides = None
    if meta_path.exists():
        slides = np.array([row["wsi"] for row in read_meta(meta_path)], dtype=str)
        if len(slides) != images.num:
            raise BadInput(f"{meta_path} has {len(slides):,} rows for {images.num:,} patches")
    return Split(split, images, labels, slides)


def read_meta(path) -> list[dict[str, str]]:
    """The rows of a meta CSV, with at least `coord_y`, `coord_x` and `wsi`."""
    return read_edited_csv(path, ("coord_y", "coord_x", "wsi"))


@contextlib.contextmanager
def sole_writer(directory):
    """Hold a folder for this process, made if missing; the kernel lets go of it when the process ends, however it ends.

    Raises BadInput where another process is writing there.
    """
    Path(directory).mkdir(parents=True, exist_ok=True)
    lock = os.open(directory, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError:
        raise BadInput(f"{directory}: another process is writing there") from None
    finally:
        os.close(lock)


class SplitWriter:
    """Writes a split in the official layout block by block; nothing shows under its official name before `finish`.

    x is contiguous uint8, so that a reader can map it. Use as a context manager: leaving it with an error removes what
    was written.
    """

    def __init__(self, directory, split: str, num: int):
        self.directory, self.split, self.num, self.num_done = Path(directory), split, num, 0
        self.labels, self.meta = np.empty(num, np.uint8), []
        fd, self.temporary = tempfile.mkstemp(dir=directory, prefix=f".{split}_x.", suffix=".tmp")
        os.close(fd)
        self.file = h5py.File(self.temporary, "w")
        self.x = self.file.create_dataset("x", (num, *PATCH_SHAPE), np.uint8)

    def add(self, images: np.ndarray, labels: np.ndarray, meta=()) -> None:
        """Append patches uint8 (B, 96, 96, 3), labels (B,) and, optionally, B meta rows (tuples as META_COLUMNS[1:])."""
        end = self.num_done + len(images)
        if images.dtype != np.uint8 or images.shape[1:] != PATCH_SHAPE or len(labels) != len(images) or end > self.num:
            raise ValueError(
                f"{images.shape} {images.dtype}, {len(labels)} labels: no room from row {self.num_done} of {self.num}"
            )
        try:
            self.x[self.num_done : end] = images
        except OSError as error:
            raise self._refused(error) from None
        self.labels[self.num_done : end] = labels
        self.meta.extend(meta)
        self.num_done = end

    def finish(self) -> None:
        """Give the files their official names. Raises ValueError if rows are missing."""
        if self.num_done != self.num or len(self.meta) not in (0, self.num):
            raise ValueError(f"{self.num_done} of {self.num} patches and {len(self.meta)} meta rows were written")
        paths = {part: split_path(self.directory, self.split, part) for part in ("meta", "y", "x")}
        ready = {part: path.with_name(f"{Path(self.temporary).name}.{part}") for part, path in paths.items() if part != "x"}
        try:
            self.file.close()
            with open(self.temporary, "rb+") as file:
                os.fsync(file.fileno())
            write_labels(ready["y"], self.labels)
            if self.meta:
                write_meta(ready["meta"], self.meta)
            os.chmod(self.temporary, 0o644)
            for part, path in ready.items():
                if part != "meta" or self.meta:
                    os.replace(path, paths[part])
            os.replace(self.temporary, paths["x"])  # x last: its presence says that all is there
        except (OSError, RuntimeError) as error:
            raise self._refused(error) from None
        finally:
            for path in ready.values():
                path.unlink(missing_ok=True)
        sync_folder(self.directory)

    def _refused(self, error) -> BadInput:
        free_mb = shutil.disk_usage(self.directory).free / 1e6
        return BadInput(
            f"{self.directory}: writing split {self.split} failed, {free_mb:,.0f} MB are free there and "
            f"{self.num * PATCH_BYTES / 1e6:,.0f} MB are needed ({one_line(error)})"
        )

    def __enter__(self):
        return self

    def __exit__(self, kind, *_):
        try:
            if kind is None:
                self.finish()
        finally:
            with contextlib.suppress(Exception):  # the first error is the one to report
                self.file.close()
            with contextlib.suppress(OSError):  # after a good end it is there no more
                os.unlink(self.temporary)


def write_labels(path, labels: np.ndarray) -> None:
    """Write labels (N,) as the official y file: uint8 (N, 1, 1, 1)."""
    temporary = Path(path).with_name(f".{Path(path).name}.tmp")
    try:
        with h5py.File(temporary, "w") as file:
            file.create_dataset("y", data=np.asarray(labels, np.uint8).reshape(-1, 1, 1, 1))
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_meta(path, rows) -> None:
    """Write a meta CSV: rows are (coord_y, coord_x, tumor_patch, center_tumor_patch, wsi)."""
    write_csv(path, META_COLUMNS, [(index, *row) for index, row in enumerate(rows)])


def fingerprint(directory, splits=("train", "valid"), on_block=None) -> dict[str, str]:
    """SHA-256 of each x and y file of the splits, {file name: hex}.

    Kept beside the data by name, size and modification time where the folder can be written, so that 7 GB are hashed once.
    """
    directory = Path(directory)
    store = directory / FINGERPRINT_FILE
    try:
        known = read_json(store)
    except (OSError, BadInput):
        known = {}
    result, fresh = {}, {}
    for path in (split_path(directory, split, part) for split in splits for part in ("x", "y")):
        status = require_file(path).stat()
        stamp = [status.st_size, status.st_mtime_ns]
        entry = known.get(path.name)
        if isinstance(entry, dict) and entry.get("stamp") == stamp and isinstance(entry.get("sha256"), str):
            result[path.name] = entry["sha256"]
        else:
            result[path.name] = file_digest(path, on_block=on_block)
            fresh[path.name] = {"stamp": stamp, "sha256": result[path.name]}
    if fresh:
        with contextlib.suppress(OSError):  # read-only data: hashed again next time
            write_json(store, known | fresh)
    return result
