"""PatchCamelyon as it is published: one HDF5 pair and one meta CSV per split, in one folder, under
the official names.

Source: Veeling et al. 2018, https://zenodo.org/records/2546921. `x` is uint8 (N, 96, 96, 3), `y` is
uint8 (N, 1, 1, 1).
"""

import contextlib
import json
import math
import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np

from lib.command import BadInput, nearest, one_line
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
# bytes of patches, or labels, in a byte of the file: five times what gzip can do
MOST_PACKED = 5000
MOST_CHUNK_BYTES = 1 << 27  # which a row of it costs in memory: 1,024 patches of 32-bit floats


def split_path(directory, split: str, part: str) -> Path:
    """The official path of a split's `x`, `y`, `mask` (HDF5) or `meta` (CSV); in a job that has
    copied them, of the copy.
    """
    original, copy = json.loads(os.environ.get(DATA_COPY, "[null, null]"))
    if original and os.path.realpath(directory) == original:
        directory = copy
    return Path(
        directory, f"camelyonpatch_level_2_split_{split}_{part}.{'csv' if part == 'meta' else 'h5'}"
    )


def require_file(path: Path) -> Path:
    """`path` if it is a file. Raises BadInput that names the closest thing that is there: a
    misspelt name is not skipped.
    """
    if path.is_file():
        return path
    if not path.parent.is_dir():
        raise BadInput(
            f"no folder {path.parent} (prepare.py download, import or synthetic makes one;"
            " data_dir= names another)"
        )
    if path.with_name(path.name + ".gz").is_file():
        raise BadInput(
            f"{path.name}.gz in {path.parent} is still packed: gunzip it, or use prepare.py"
            " download"
        )
    if path.exists():
        raise BadInput(f"{path} is no file")
    raise BadInput(
        f"no file {path.name} in {path.parent}{nearest(path.name, os.listdir(path.parent))}"
    )


def require_splits(directory) -> list[str]:
    """The splits of a PCam folder. Raises BadInput when one lacks a file; the test split may be
    missing whole.
    """
    has_test = any(split_path(directory, "test", part).exists() for part in "xy")
    splits = [split for split in SPLITS if split != "test" or has_test]
    for path in (split_path(directory, split, part) for split in splits for part in "xy"):
        require_file(path)
    return splits


@contextlib.contextmanager
def open_dataset(path, key: str):
    """Yield the h5py dataset `key` of a file. Raises BadInput for a file that is not HDF5, is cut
    off, or lacks the key.
    """
    path = require_file(Path(path))
    try:
        file = h5py.File(path, "r", locking=False)
    except OSError as error:
        cut = "truncated" in str(error)
        what = (
            "is cut off: it is shorter than its own header says"
            if cut
            else "is not a readable HDF5 file"
        )
        raise BadInput(f"{path} {what} ({path.stat().st_size:,} bytes)") from None
    with file:
        try:
            names, link = list(file), file.get(key, getlink=True)
            item = file[key] if isinstance(link, h5py.HardLink) else None
            is_dataset = isinstance(item, h5py.Dataset) and item.dtype is not None
            is_link = isinstance(link, (h5py.SoftLink, h5py.ExternalLink))
            is_elsewhere = is_link or is_dataset and (item.external or item.is_virtual)
        except Exception as error:  # whatever damage provokes in HDF5
            raise BadInput(f"{path}: '{key}' cannot be read ({one_line(error)})") from None
        # it may be a device or a pipe, and the file's SHA-256 says nothing about it
        if is_elsewhere:
            raise BadInput(
                f"{path}: '{key}' is a link or lies in another file, it must be a dataset in"
                " this one"
            )
        if not is_dataset:
            raise BadInput(
                f"{path} has no dataset '{key}'; it has: {', '.join(names) or 'nothing'}"
            )
        yield item


def read_rows(dataset, rows) -> np.ndarray:
    """`dataset[rows]` as stored, for a row or a slice. Raises BadInput for data that cannot be
    decoded.
    """
    try:
        return dataset[rows]
    except (OSError, RuntimeError) as error:
        where = (
            f"{dataset.file.filename}: {dataset.name[1:]} from row"
            f" {getattr(rows, 'start', rows) or 0:,} on"
        )
        raise BadInput(f"{where} cannot be decoded ({one_line(error)})") from None


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
        with open_dataset(self.path, "x") as dataset:
            # in file order, so that a chunk is decoded once
            for position in np.argsort(rows, kind="stable"):
                patches[position] = to_uint8(read_rows(dataset, rows[position]))
        return patches

    def will_need(self, rows: np.ndarray) -> None:
        """Tell the system which mapped rows come next: cold, 20,000 patches a second came so,
        220-300 page by page.
        """
        with open(self.path, "rb") as file:
            for row in rows.tolist():
                os.posix_fadvise(
                    file.fileno(),
                    self.offset + row * PATCH_BYTES,
                    PATCH_BYTES,
                    os.POSIX_FADV_WILLNEED,
                )

    def stored_blocks(self, num_rows: int = 1024):
        """Yield (first row, (B, 96, 96, 3) of the type that is stored) over the whole split in
        order.
        """
        with (
            open_dataset(self.path, "x")
            if self.mapped is None
            else contextlib.nullcontext(self.mapped)
        ) as patches:
            for start in range(0, self.num, num_rows):
                yield start, read_rows(patches, slice(start, start + num_rows))

    def blocks(self, num_rows: int = 1024):
        """Yield (first row, uint8 (B, 96, 96, 3)) over the whole split in order."""
        return ((start, to_uint8(stored)) for start, stored in self.stored_blocks(num_rows))


def to_uint8(values: np.ndarray) -> np.ndarray:
    """Intensities of any type as uint8: rounded, clipped to 0..255, NaN as 0. `prepare.py repack`
    counts what that loses.
    """
    if values.dtype == np.uint8:
        return values
    with np.errstate(invalid="ignore"):  # some NaN are remarked upon when they are rounded
        return np.nan_to_num(np.clip(np.rint(values), 0, 255)).astype(np.uint8)


def map_dataset(dataset) -> np.ndarray | None:
    """A contiguous uint8 dataset as a private copy-on-write array over the file's own pages; None
    for any other layout.
    """
    offset = dataset.id.get_offset()
    if (
        offset is None
        or dataset.dtype != np.uint8
        or dataset.chunks is not None
        or dataset.external
    ):
        return None
    path = dataset.file.filename
    if offset + dataset.size > os.path.getsize(path):
        raise BadInput(
            f"{path} is cut off: its patches end at byte {offset + dataset.size:,}, the file before"
            " that"
        )
    mapped = np.memmap(path, np.uint8, mode="c", offset=offset, shape=dataset.shape)
    # a wrong offset would give plausible noise: compare with what HDF5 itself reads
    return (
        mapped.view(np.ndarray)
        if all(np.array_equal(mapped[row], dataset[row]) for row in (0, -1))
        else None
    )


def open_images(path, num_labels: int = 0) -> Images:
    """Open an `x` file. Raises BadInput for a wrong shape or type, damage, and many more rows than
    its bytes and labels say.
    """
    path = Path(path)
    with open_dataset(path, "x") as dataset:
        if dataset.shape is None or dataset.shape[1:] != PATCH_SHAPE:
            raise BadInput(f"{path}: x has shape {dataset.shape}, it must be (N, 96, 96, 3)")
        if len(dataset) == 0:
            raise BadInput(f"{path}: x is empty")
        if dataset.dtype != np.uint8 and dataset.dtype.kind != "f":
            raise BadInput(
                f"{path}: x is of type {dataset.dtype}, it must be uint8 (or float, which repack"
                " converts)"
            )
        size = path.stat().st_size
        if len(dataset) > max(num_labels, size * MOST_PACKED // PATCH_BYTES):
            raise BadInput(
                f"{path}: x declares {len(dataset):,} patches in a file of {size:,} bytes, most"
                " were never written"
            )
        if (chunks := dataset.chunks) and math.prod(
            chunks
        ) * dataset.dtype.itemsize > MOST_CHUNK_BYTES:
            raise BadInput(
                f"{path}: x is cut into chunks of {chunks}, too large for memory (prepare.py repack"
                " mends that)"
            )
        if dataset.dtype.kind == "f":
            sample = read_rows(dataset, slice(None, None, max(1, len(dataset) // 64)))
            if 0 < np.max(sample, where=np.isfinite(sample), initial=0) <= 1:
                raise BadInput(
                    f"{path}: x seems scaled to [0, 1]; prepare.py repack brings it back to 0..255"
                )
        if (mapped := map_dataset(dataset)) is not None:
            return Images(path, len(dataset), mapped, "mapped", dataset.id.get_offset())
        return Images(
            path,
            len(dataset),
            None,
            f"{dataset.dtype}, chunks {chunks}, compression {dataset.compression}",
        )


def read_label_values(path) -> np.ndarray:
    """The numbers in a `y` file as they are, (N,). Raises BadInput where there is not one for each
    row.
    """
    with open_dataset(path, "y") as dataset:
        if not dataset.shape or dataset.size != len(dataset) or dataset.dtype.kind not in "uifb":
            raise BadInput(
                f"{path}: y has shape {dataset.shape} and type {dataset.dtype}, it must be numbers"
                " (N, 1, 1, 1)"
            )
        if dataset.size > dataset.id.get_storage_size() * MOST_PACKED:
            raise BadInput(f"{path}: y declares {dataset.size:,} labels, most were never written")
        return read_rows(dataset, slice(None)).reshape(-1)


def read_labels(path) -> np.ndarray:
    """The labels of a `y` file as uint8 (N,). Raises BadInput for values other than 0 and 1."""
    values = read_label_values(path)
    if len(wrong := np.flatnonzero(~np.isin(values, (0, 1)))):
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
    labels, slides = read_labels(split_path(directory, split, "y")), None
    images = open_images(split_path(directory, split, "x"), len(labels))
    if len(labels) != images.num:
        raise BadInput(
            f"{directory}: split {split} has {images.num:,} patches in x but {len(labels):,} labels"
            " in y"
        )
    if (meta_path := split_path(directory, split, "meta")).exists():
        slides = np.array([row["wsi"] for row in read_meta(require_file(meta_path))], dtype=str)
        if len(slides) != images.num:
            raise BadInput(f"{meta_path} has {len(slides):,} rows for {images.num:,} patches")
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
    created = not directory.exists()
    directory.mkdir(parents=True, exist_ok=True)
    lock = os.open(directory, os.O_RDONLY)
    try:
        if not try_lock(lock):
            raise BadInput(f"{directory}: another process is writing there")
        yield
    finally:
        os.close(lock)
        if created:
            with contextlib.suppress(OSError):  # what holds something stays
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
        self.file = h5py.File(split_path(self.hidden, split, "x"), "w")
        self.x = self.file.create_dataset("x", (num, *PATCH_SHAPE), dtype, **storage)

    def add(self, images: np.ndarray, labels: np.ndarray, meta=()) -> None:
        """Append patches (B, 96, 96, 3), labels (B,) and, optionally, B meta rows (tuples as
        META_COLUMNS[1:]).
        """
        end = self.num_done + len(images)
        if (
            images.dtype != self.x.dtype
            or images.shape[1:] != PATCH_SHAPE
            or len(labels) != len(images)
            or end > self.num
        ):
            raise ValueError(
                f"{images.shape} {images.dtype}, {len(labels)} labels: no room from {self.num_done}"
                f" of {self.num}"
            )
        with self._full_disk_named():
            self.x[self.num_done : end] = images
        self.labels[self.num_done : end] = labels
        self.meta.extend(meta)
        self.num_done = end

    @contextlib.contextmanager
    def _full_disk_named(self):
        try:
            yield
        except (OSError, RuntimeError) as error:  # h5py has both for it
            free_mb = shutil.disk_usage(self.directory).free / 1e6
            what = (
                f"writing {self.num:,} patches of {self.split} failed, {free_mb:,.0f} MB are free"
                " there"
            )
            raise BadInput(f"{self.directory}: {what} ({one_line(error)})") from None

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
        if self.num_done != self.num or len(self.meta) not in (0, self.num):
            raise ValueError(
                f"{self.num_done} of {self.num} patches and {len(self.meta)} meta rows were written"
            )
        with self._full_disk_named():
            self.file.close()
            write_labels(split_path(self.hidden, self.split, "y"), self.labels)
            if self.meta:
                write_meta(split_path(self.hidden, self.split, "meta"), self.meta)
            for path in sorted(self.hidden.iterdir(), key=lambda path: path.name.endswith("_x.h5")):
                with open(path, "rb+") as file:
                    os.fsync(file.fileno())
                # x last: its presence says that all is there
                path.rename(self.directory / path.name)
            sync_folder(self.directory)


def write_labels(path, labels: np.ndarray) -> None:
    """Write labels (N,) as the official y file: uint8 (N, 1, 1, 1)."""
    with h5py.File(path, "w") as file:
        file.create_dataset("y", data=np.asarray(labels, np.uint8).reshape(-1, 1, 1, 1))


def write_meta(path, rows) -> None:
    """Write a meta CSV: rows are (coord_y, coord_x, tumor_patch, center_tumor_patch, wsi)."""
    write_csv(path, META_COLUMNS, [(index, *row) for index, row in enumerate(rows)])


def fingerprint(directory, splits=("train", "valid")) -> dict[str, str]:
    """SHA-256 {file name: hex} of each x and y file, so that 7 GB are hashed once; kept beside the
    data or by the user.
    """
    result, store = {}, Path(directory, FINGERPRINT_FILE)
    stores = (store, cache_file(store))
    known = read_cache(stores[1]) | read_cache(stores[0])
    before = dict(known)
    for path in (split_path(directory, split, part) for split in splits for part in "xy"):
        status = require_file(path).stat()
        key = f"{path.name} {status.st_size} {status.st_mtime_ns}"
        known[key] = result[path.name] = known.get(key) or file_digest(path)
    if known != before:
        # the first one that takes it: shared data are often read-only
        any(write_cache(store, known) for store in stores)
    return result
