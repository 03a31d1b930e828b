"""PatchCamelyon as it is published: one HDF5 pair and one meta CSV per split, in one folder, under
the official names.

Source: Veeling et al. 2018, https://zenodo.org/records/2546921. `x` is uint8 (N, 96, 96, 3), `y` is
uint8 (N, 1, 1, 1).
"""

import contextlib
import json
import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np

from lib.command import BadInput, nearest, one_line, say
from lib.files import (
    cache_file,
    file_digest,
    read_cache,
    read_edited_csv,
    sync_folder,
    try_lock,
    write_cache,
    write_csv,
)

SPLITS = ("train", "valid", "test")
PATCH_SHAPE = (96, 96, 3)
PATCH_BYTES = 96 * 96 * 3
META_COLUMNS = ("", "coord_y", "coord_x", "tumor_patch", "center_tumor_patch", "wsi")
FINGERPRINT_FILE = ".pcam-sha256.json"
# a folder and its copy on the node, as JSON: so no run points at what a job removes
DATA_COPY = "PCAM_DATA_COPY"


def split_path(directory, split: str, part: str) -> Path:
    """The official path of a split's `x`, `y`, `mask` (HDF5) or `meta` (CSV), in the job's copy of
    the folder where there is one.
    """
    original, copy = json.loads(os.environ.get(DATA_COPY, "[null, null]"))
    if original and os.path.realpath(directory) == original:
        directory = copy
    suffix = "csv" if part == "meta" else "h5"
    return Path(directory, f"camelyonpatch_level_2_split_{split}_{part}.{suffix}")


def require_file(path: Path) -> Path:
    """`path` if it is a file. Raises BadInput that names the closest thing that is there."""
    if path.is_file():
        return path
    folder = path.parent
    if not folder.is_dir():
        raise BadInput(
            f"no folder {folder} (prepare.py download, import or synthetic makes one;"
            " data_dir= names another)"
        )
    names = os.listdir(folder)
    if f"{path.name}.gz" in names:
        raise BadInput(
            f"{path.name}.gz in {folder} is still packed: gunzip it, or use prepare.py download"
        )
    raise BadInput(f"no file {path.name} in {folder}{nearest(path.name, names)}")


def require_splits(directory) -> list[str]:
    """The splits of a PCam folder. Raises BadInput when one lacks a file; the test split may be
    missing whole.
    """
    has_test = any(split_path(directory, "test", part).exists() for part in "xy")
    splits = list(SPLITS if has_test else SPLITS[:2])
    for split in splits:
        require_file(split_path(directory, split, "x"))
        require_file(split_path(directory, split, "y"))
    return splits


@contextlib.contextmanager
def open_dataset(path, key: str):
    """Yield the h5py dataset `key` of a file. Raises BadInput for a file that is not HDF5, is cut
    off, or lacks the key.
    """
    path = require_file(Path(path))
    try:
        file = h5py.File(path, "r", locking=False)
        names, dataset = list(file), file.get(key)
        is_dataset = isinstance(dataset, h5py.Dataset) and dataset.dtype is not None
    except Exception as error:  # whatever damage provokes in HDF5
        what = "cut off" if "truncated" in str(error) else "not a readable HDF5 file"
        size = f"{path.stat().st_size:,} bytes"
        raise BadInput(f"{path} is {what} ({size}; {one_line(error)}): fetch it again") from None
    with file:
        if not is_dataset:
            content = ", ".join(names) or "nothing"
            raise BadInput(f"{path} has no dataset '{key}'; it has: {content}")
        yield dataset


@contextlib.contextmanager
def open_patches(path):
    """Yield the `x` of a file, an h5py dataset of numbers (N, 96, 96, 3). Raises BadInput for any
    other.
    """
    with open_dataset(path, "x") as dataset:
        shape = dataset.shape or (0,)  # an empty or scalar dataset has none
        if not shape[0] or shape[1:] != PATCH_SHAPE or dataset.dtype.kind not in "uif":
            raise BadInput(
                f"{path}: x is {dataset.dtype} {dataset.shape}, it must be numbers of shape"
                " (N, 96, 96, 3), N > 0"
            )
        yield dataset


def read_rows(dataset, rows) -> np.ndarray:
    """`dataset[rows]` as stored, for a row or a slice. Raises BadInput for data that cannot be
    decoded.
    """
    try:
        return dataset[rows]
    except (OSError, RuntimeError) as error:
        start = getattr(rows, "start", rows) or 0
        raise BadInput(
            f"{dataset.file.filename}: {dataset.name[1:]} from row {start:,} on cannot be decoded"
            f" ({one_line(error)})"
        ) from None


@dataclass(frozen=True)
class Images:
    """The `x` of a split. `mapped` is a uint8 (N, 96, 96, 3) array over the file itself, or None
    when it has to be decoded.
    """

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
        patches = np.empty((len(rows), *PATCH_SHAPE), np.uint8)
        with open_patches(self.path) as dataset:
            # in file order, so that a chunk is decoded once
            for position in np.argsort(rows, kind="stable"):
                patches[position] = to_uint8(read_rows(dataset, rows[position]))
        return patches

    def will_need(self, rows: np.ndarray) -> None:
        """Tell the system which mapped rows come next. A cold disk then gives 20,000 patches a
        second, page by page 220 to 300.
        """
        with open(self.path, "rb") as file:
            for row in rows.tolist():
                start = self.offset + row * PATCH_BYTES
                os.posix_fadvise(file.fileno(), start, PATCH_BYTES, os.POSIX_FADV_WILLNEED)

    def stored_blocks(self, num_rows: int = 1024):
        """Yield (first row, (B, 96, 96, 3) of the type that is stored) over the whole split in
        order.
        """
        with contextlib.ExitStack() as stack:
            patches = self.mapped
            if patches is None:
                patches = stack.enter_context(open_patches(self.path))
            for start in range(0, self.num, num_rows):
                yield start, read_rows(patches, slice(start, start + num_rows))

    def blocks(self, num_rows: int = 1024):
        """Yield (first row, uint8 (B, 96, 96, 3)) over the whole split in order."""
        for start, stored in self.stored_blocks(num_rows):
            yield start, to_uint8(stored)


def to_uint8(values: np.ndarray) -> np.ndarray:
    """Intensities of any type as uint8: rounded, clipped to 0..255, NaN as 0. `prepare.py repack`
    counts what that loses.
    """
    if values.dtype == np.uint8:
        return values
    with np.errstate(invalid="ignore"):  # some NaN are remarked upon when they are rounded
        return np.nan_to_num(np.clip(np.rint(values), 0, 255)).astype(np.uint8)


def find_scale(dataset) -> float:
    """The factor that brings the values of patches to 0..255, from the medians of their lowest and
    highest values: damage does not move these. Raises BadInput for scales that cannot be undone.
    """
    if dataset.dtype == np.uint8:
        return 1
    step = max(1, len(dataset) // 64)
    sample = read_rows(dataset, slice(None, None, step)).reshape(-1, PATCH_BYTES)
    sample = np.where(np.isfinite(sample), sample, np.nan)
    lowest, highest = np.fmin.reduce(sample, axis=1), np.fmax.reduce(sample, axis=1)
    is_shown = (lowest < 0) | (highest > 0)  # black patches, and NaN all over, tell nothing
    low = np.median(lowest[is_shown]) if is_shown.any() else 0
    high = np.median(highest[is_shown]) if is_shown.any() else 255
    path = dataset.file.filename
    if low < 0:
        raise BadInput(
            f"{path}: most patches have values below 0 (to {low:.3g}), so they are normalised; undo"
            " it where they were written: (x * std + mean) * 255, or (x + 1) * 127.5 for -1..1"
        )
    if high <= 1 and dataset.dtype.kind == "f":
        return 255
    if high < 512:  # repack clips and counts what is a little above 255
        return 1
    if 32_768 <= high < 131_072:  # 16 bits
        return 1 / 257
    raise BadInput(f"{path}: most patches reach {high:,.0f}, none of the scales 1, 255 and 65535")


def map_dataset(dataset) -> np.ndarray | None:
    """A contiguous uint8 dataset as a private copy-on-write array over the file's own pages; None
    for any other layout.
    """
    offset = dataset.id.get_offset()  # None where the values do not lie in one piece
    if offset is None or dataset.dtype != np.uint8:
        return None
    path = dataset.file.filename
    if offset + dataset.size > os.path.getsize(path):
        return None
    mapped = np.memmap(path, np.uint8, mode="c", offset=offset, shape=dataset.shape)
    # a wrong offset would give plausible noise: compare with what HDF5 itself reads
    is_same = all(np.array_equal(mapped[row], read_rows(dataset, row)) for row in (0, -1))
    return mapped.view(np.ndarray) if is_same else None


def open_images(path) -> Images:
    """Open an `x` file. Raises BadInput for a wrong shape or type, damage, and values in [0, 1]."""
    path = Path(path)
    with open_patches(path) as dataset:
        num, dtype = dataset.shape[0], dataset.dtype
        scale = find_scale(dataset)
        if scale != 1 or dtype.kind != "f" and dtype != np.uint8:
            raise BadInput(
                f"{path}: x is {dtype} in [0, {round(255 / scale)}], it must be uint8 or floats in"
                " [0, 255]; prepare.py repack converts it"
            )
        mapped = map_dataset(dataset)
        if mapped is not None:
            return Images(path, num, mapped, "mapped", dataset.id.get_offset())
        layout = f"{dtype}, chunks {dataset.chunks}, compression {dataset.compression}"
        return Images(path, num, None, layout)


def read_label_values(path) -> np.ndarray:
    """The numbers in a `y` file as they are, (N,). Raises BadInput where there is not one for each
    row.
    """
    with open_dataset(path, "y") as dataset:
        shape, dtype = dataset.shape, dataset.dtype
        if not shape or dataset.size != shape[0] or dtype.kind not in "uifb":
            raise BadInput(
                f"{path}: y has shape {shape} and type {dtype}, it must be numbers (N, 1, 1, 1)"
            )
        return read_rows(dataset, slice(None)).reshape(-1)


def read_labels(path) -> np.ndarray:
    """The labels of a `y` file as uint8 (N,). Raises BadInput for values other than 0 and 1."""
    values = read_label_values(path)
    wrong = np.flatnonzero(~np.isin(values, (0, 1)))
    if len(wrong):
        raise BadInput(
            f"{path}: row {wrong[0]} has the label {values[wrong[0]]}, it must be 0 or 1"
            f" ({len(wrong):,} such rows)"
        )
    return values.astype(np.uint8)


@dataclass(frozen=True)
class Split:
    """One split of a data set: patches, labels uint8 (N,) and the slide name of each row where a
    meta CSV gives it.
    """

    name: str
    images: Images
    labels: np.ndarray
    slides: np.ndarray | None

    def __len__(self) -> int:
        return self.images.num


def open_split(directory, split: str) -> Split:
    """Open a split of a PCam folder. Raises BadInput where its files are missing, malformed or do
    not belong together.
    """
    labels = read_labels(split_path(directory, split, "y"))
    images = open_images(split_path(directory, split, "x"))
    if len(labels) != images.num:
        raise BadInput(
            f"{directory}: split {split} has {images.num:,} patches in x but {len(labels):,} labels"
            " in y"
        )
    meta_path, slides = split_path(directory, split, "meta"), None
    if meta_path.exists():
        rows = read_meta(meta_path)
        if len(rows) != images.num:
            raise BadInput(f"{meta_path} has {len(rows):,} rows for {images.num:,} patches")
        slides = np.array([row["wsi"] for row in rows])
    return Split(split, images, labels, slides)


def read_meta(path) -> list[dict[str, str]]:
    """The rows of a meta CSV, with at least `coord_y`, `coord_x` and `wsi`."""
    return read_edited_csv(path, ("coord_y", "coord_x", "wsi"))


@contextlib.contextmanager
def sole_writer(directory):
    """Hold a folder for this process, made for it if missing. Raises BadInput where another process
    is writing there.
    """
    directory = Path(directory)
    is_new = not directory.exists()
    directory.mkdir(parents=True, exist_ok=True)
    lock = os.open(directory, os.O_RDONLY)
    try:
        try:
            is_sole = try_lock(lock)
        except OSError as error:  # such as NFS mounted without its lock service
            say(f"{directory} cannot be locked ({one_line(error)}): let nobody else write there")
            is_sole = True
        if not is_sole:
            raise BadInput(f"{directory}: another process is writing there")
        yield
    finally:
        os.close(lock)
        if is_new:
            with contextlib.suppress(OSError):  # a folder that holds something stays
                directory.rmdir()


class SplitWriter:
    """Writes a split block by block, as a context manager: it gets its official names when whole,
    an error leaves nothing.

    x is contiguous uint8, so that a reader can map it, unless `dtype` and `storage` (as h5py knows
    it) say otherwise.
    """

    def __init__(self, directory, split: str, num: int, dtype=np.uint8, **storage):
        self.directory, self.split, self.num, self.num_done = Path(directory), split, num, 0
        self.labels, self.meta = np.empty(num, np.uint8), []
        self.hidden = Path(tempfile.mkdtemp(dir=directory, prefix=f".{split}_x.", suffix=".tmp"))
        # nobody else has the hidden file, and some file systems have no locks
        self.file = h5py.File(split_path(self.hidden, split, "x"), "w", locking=False)
        self.x = self.file.create_dataset("x", (num, *PATCH_SHAPE), dtype, **storage)

    def add(self, images: np.ndarray, labels: np.ndarray, meta=()) -> None:
        """Append patches (B, 96, 96, 3), labels (B,) and, optionally, B meta rows (tuples as
        META_COLUMNS[1:]).
        """
        rows = slice(self.num_done, self.num_done + len(images))
        assert images.dtype == self.x.dtype and rows.stop <= self.num, (images.dtype, rows)
        with self._full_disk_named():
            self.x[rows] = images
        self.labels[rows] = labels
        self.meta.extend(meta)
        self.num_done = rows.stop

    @contextlib.contextmanager
    def _full_disk_named(self):
        try:
            yield
        except (OSError, RuntimeError) as error:  # h5py raises either for a full disk
            free_mb = shutil.disk_usage(self.directory).free / 1e6
            raise BadInput(
                f"{self.directory}: writing {self.num:,} patches of {self.split} failed,"
                f" {free_mb:,.0f} MB are free there ({one_line(error)})"
            ) from None

    def __enter__(self):
        return self

    def __exit__(self, kind, *_):
        try:
            if kind is None:
                self._finish()
        finally:
            with contextlib.suppress(Exception):  # the first error is the one to report
                self.file.close()
            shutil.rmtree(self.hidden, ignore_errors=True)

    def _finish(self) -> None:
        assert self.num_done == self.num and len(self.meta) in (0, self.num), self.num_done
        with self._full_disk_named():
            self.file.close()
            write_labels(split_path(self.hidden, self.split, "y"), self.labels)
            if self.meta:
                write_meta(split_path(self.hidden, self.split, "meta"), self.meta)
            # x last: its presence says that all is there
            for path in sorted(self.hidden.iterdir(), key=lambda path: path.name.endswith("_x.h5")):
                with open(path, "rb+") as file:
                    os.fsync(file.fileno())
                path.rename(self.directory / path.name)
            sync_folder(self.directory)


def write_labels(path, labels: np.ndarray) -> None:
    """Write labels (N,) as the official y file: uint8 (N, 1, 1, 1)."""
    with h5py.File(path, "w", locking=False) as file:
        file["y"] = np.asarray(labels, np.uint8).reshape(-1, 1, 1, 1)


def write_meta(path, rows) -> None:
    """Write a meta CSV: rows are (coord_y, coord_x, tumor_patch, center_tumor_patch, wsi)."""
    write_csv(path, META_COLUMNS, [(index, *row) for index, row in enumerate(rows)])


def fingerprint(directory, splits=("train", "valid")) -> dict[str, str]:
    """SHA-256 {file name: hex} of each x and y file. The digests are kept beside the data, or in
    the user's cache where that is read-only, so that 7 GB are hashed once.
    """
    store = Path(directory, FINGERPRINT_FILE)
    digests = read_cache(cache_file(store)) | read_cache(store)
    num_cached, fingerprints = len(digests), {}
    for split in splits:
        for path in (split_path(directory, split, "x"), split_path(directory, split, "y")):
            status = require_file(path).stat()
            key = f"{path.name} {status.st_size} {status.st_mtime_ns}"
            if key not in digests:
                digests[key] = file_digest(path)
            fingerprints[path.name] = digests[key]
    if len(digests) > num_cached:
        write_cache(store, digests) or write_cache(cache_file(store), digests)
    return fingerprints
