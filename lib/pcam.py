"""The format of PatchCamelyon, and its readers: one HDF5 pair and one meta CSV per split, in one
folder, under the official names.

Source: Veeling et al. 2018, https://zenodo.org/records/2546921. `x` is uint8 (N, 96, 96, 3), `y` is
uint8 (N, 1, 1, 1).
"""

import contextlib
import json
import os
from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np

from lib.command import BadInput, one_line
from lib.files import explain_foreign, read_edited_csv

SPLITS = ("train", "valid", "test")
PATCH_SHAPE = (96, 96, 3)
PATCH_BYTES = 96 * 96 * 3
# the names that Kaggle's copies of PCam give the images
OTHER_NAMES = {
    "camelyonpatch_level_2_split_train_x.h5": "training_split.h5",
    "camelyonpatch_level_2_split_valid_x.h5": "validation_split.h5",
    "camelyonpatch_level_2_split_test_x.h5": "test_split.h5",
}
# environment variable: JSON of [data folder, its copy on the node]. A run names the folder, since
# its job removes the copy
DATA_COPY = "PCAM_DATA_COPY"


def split_path(directory, split: str, part: str) -> Path:
    """The official path of the `x`, `y`, `mask` (HDF5) or `meta` (CSV) of a split. It is in the
    job's copy of the folder where there is one.
    """
    original, copy = json.loads(os.environ.get(DATA_COPY, "[null, null]"))
    if os.path.realpath(directory) == original:
        directory = copy
    suffix = "csv" if part == "meta" else "h5"
    return Path(directory, f"camelyonpatch_level_2_split_{split}_{part}.{suffix}")


def require_file(path: Path) -> Path:
    """`path` if it is a file. Else raises BadInput, with a hint where the file may be instead."""
    if path.is_file():
        return path
    folder = path.parent
    if folder.is_file():
        raise BadInput(f"{folder} is a file: name the folder that holds it")
    if not folder.is_dir():
        raise BadInput(
            f"no folder {folder} (prepare.py download, import or synthetic makes one;"
            " data_dir= names another)"
        )
    raise BadInput(f"no file {path.name} in {folder}{explain_missing(path)}")


def explain_missing(path: Path) -> str:
    """Words for where the official file `path` is instead: packed, in a folder above or below, or
    under Kaggle's name. Empty where nothing like it is near.
    """
    folder = path.parent
    if path.is_symlink():
        return f", but a link to {os.readlink(path)}, which is not there"
    if path.with_name(f"{path.name}.gz").exists():
        return f", gunzip {path.name}.gz"
    names = (path.name, OTHER_NAMES.get(path.name, path.name))
    for other in (folder, folder.parent, *folder.glob("*/"), *folder.glob("*/*/")):
        for name in names:
            if (other / name).is_file():
                return f", it is {other / name}: name that folder, with files of official names"
    return ""


@contextlib.contextmanager
def open_dataset(path, key: str):
    """Yield the h5py dataset `key` of a file. Raises BadInput for a file that HDF5 cannot read or
    that lacks the key, OSError for what the system refuses.
    """
    path = require_file(Path(path))
    try:
        file = h5py.File(path, "r", locking=False)
        names = list(file)
        dataset = file.get(key)
    except Exception as error:  # whatever damage provokes in HDF5
        path.open().close()  # raises what the system refuses, such as a missing permission
        why = one_line(error)
        remedy = "fetch it again"
        if "h5clear" in why:
            why = "it is marked as open for writing, and its writer may have been killed"
            remedy = f"h5clear -s {path} takes the mark away"
        words = explain_foreign(path, why, remedy)
        raise BadInput(f"{path} cannot be read as HDF5{words}") from None
    with file:
        if not isinstance(dataset, h5py.Dataset):
            raise BadInput(f"{path} has no dataset '{key}'; it has: {', '.join(names)}")
        require_readable(dataset)
        yield dataset


def require_readable(dataset) -> None:
    """Raise BadInput for a compression that this HDF5 lacks, and for values that lie in other
    files: HDF5 reads 0 where such a file is not there.
    """
    path = dataset.file.filename
    plist = dataset.id.get_create_plist()
    if dataset.is_virtual:
        raise BadInput(f"{path} only points to values in other files: copy them into one file")
    for number in range(plist.get_nfilters()):
        code, _, _, name = plist.get_filter(number)
        if not h5py.h5z.filter_avail(code):
            raise BadInput(
                f"{path} is compressed by filter {code} {name.decode(errors='replace')}, which is"
                " not installed here; where it is, as with the package hdf5plugin, h5repack -f NONE"
                " writes the file anew"
            )


@contextlib.contextmanager
def open_patches(path):
    """Yield the dataset `x` of a file. Raises BadInput unless it has numbers (N, 96, 96, 3)."""
    with open_dataset(path, "x") as dataset:
        shape = dataset.shape
        dtype = dataset.dtype
        if not dataset.size or shape[1:] != PATCH_SHAPE or dtype.kind not in "uif":
            raise BadInput(
                f"{path}: x is {dtype} {shape}, it must be numbers of shape (N, 96, 96, 3), N > 0"
            )
        yield dataset


def read_rows(dataset, rows) -> np.ndarray:
    """`dataset[rows]` as stored, for a row or a slice. Raises BadInput for data that cannot be
    decoded.
    """
    try:
        return dataset[rows]
    except (OSError, RuntimeError) as error:
        path = dataset.file.filename
        raise BadInput(f"{path}: some values cannot be decoded ({one_line(error)})") from None


@dataclass(frozen=True)
class Images:
    """The `x` of a split. A file of contiguous uint8 is mapped into memory: `mapped` is uint8
    (N, 96, 96, 3). Of any other file `mapped` is None, and each patch has to be decoded.
    """

    path: Path
    num: int
    mapped: np.ndarray | None
    layout: str  # how the file stores x, in words
    offset: int = 0  # bytes from the start of the file to the mapped array

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
            for position in np.argsort(rows):  # in file order, so that a chunk is decoded once
                patches[position] = to_uint8(read_rows(dataset, rows[position]))
        return patches

    def will_need(self, rows: np.ndarray) -> None:
        """Tell the system which mapped rows come next. A disk whose pages are not in memory then
        gives 20,000 patches a second, where single pages on demand give 220 to 300. macOS has no
        such call.
        """
        if hasattr(os, "posix_fadvise"):
            with open(self.path, "rb") as file:
                for start in (self.offset + rows * PATCH_BYTES).tolist():
                    advice = os.POSIX_FADV_WILLNEED
                    os.posix_fadvise(file.fileno(), start, PATCH_BYTES, advice)

    def stored_blocks(self, num_rows: int = 1024):
        """Yield (first row, patches (B, 96, 96, 3) of the stored type) over the whole split in
        order. HDF5 reads them: it reports a bad disk, at which a mapped page kills the process.
        """
        with open_patches(self.path) as dataset:
            for start in range(0, self.num, num_rows):
                yield start, read_rows(dataset, slice(start, start + num_rows))

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
    return np.nan_to_num(np.rint(values).clip(0, 255)).astype(np.uint8)


def find_scale(dataset) -> float:
    """The factor that brings the values of patches to 0..255, from the medians of their lowest and
    highest values: damage does not move these. Raises BadInput for scales that cannot be undone.
    """
    if dataset.dtype == np.uint8:
        return 1
    path = dataset.file.filename
    step = max(1, len(dataset) // 64)
    sample = read_rows(dataset, slice(None, None, step)).reshape(-1, PATCH_BYTES)
    sample = np.where(np.isfinite(sample), sample, 0)
    ranges = np.stack([sample.min(1), sample.max(1)], 1)
    informative = ranges[ranges.any(1)]  # black patches, and NaN all over, tell nothing
    low, high = np.median(informative, 0) if len(informative) else (0, 0)
    if low < 0:
        raise BadInput(
            f"{path}: most patches have values below 0 (to {low:.3g}), so they are normalised; undo"
            " it where they were written: (x * std + mean) * 255, or (x + 1) * 127.5 for -1..1"
        )
    if dataset.dtype.kind == "f" and 0 < high <= 1:
        return 255
    if high < 512:  # repack clips and counts what is a little above 255
        return 1
    if 32_768 <= high < 131_072:  # 16 bits
        return 1 / 257
    raise BadInput(f"{path}: most patches reach {high:,.0f}, none of the scales 1, 255 and 65535")


def open_images(path) -> Images:
    """Open an `x` file. Raises BadInput for a wrong shape, type or scale, and for damage."""
    path = Path(path)
    with open_patches(path) as dataset:
        num = len(dataset)
        dtype = dataset.dtype
        scale = find_scale(dataset)
        if scale != 1 or dtype.kind != "f" and dtype != np.uint8:
            raise BadInput(
                f"{path}: x is {dtype} in [0, {round(255 / scale)}], it must be uint8 or floats in"
                " [0, 255]; prepare.py repack converts it"
            )
        layout = f"{dtype}, chunks {dataset.chunks}, compression {dataset.compression}"
        mapped = None
        offset = dataset.id.get_offset()  # None where the values do not lie in one piece
        if dtype == np.uint8 and offset is not None:
            layout = "contiguous uint8"
            # private copy-on-write pages: what is written there does not reach the file
            mapped = np.memmap(path, np.uint8, "c", offset, dataset.shape).view(np.ndarray)
        return Images(path, num, mapped, layout, offset)


def read_label_values(path) -> np.ndarray:
    """The numbers of a `y` file as stored, (N,). Raises BadInput where it does not have one number
    for each row.
    """
    with open_dataset(path, "y") as dataset:
        shape = dataset.shape
        dtype = dataset.dtype
        if not shape or dataset.size != shape[0] or dtype.kind not in "uifb":
            raise BadInput(f"{path}: y is {dtype} {shape}, it must be numbers (N, 1, 1, 1)")
        return read_rows(dataset, slice(None)).reshape(-1)


def read_labels(path) -> np.ndarray:
    """The labels of a `y` file as uint8 (N,). Raises BadInput for values other than 0 and 1."""
    values = read_label_values(path)
    wrong = np.flatnonzero(~np.isin(values, (0, 1)))
    if len(wrong):
        row = wrong[0]
        raise BadInput(f"{path}: row {row} has the label {values[row]}, it must be 0 or 1")
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
    images = open_images(split_path(directory, split, "x"))
    y_path = split_path(directory, split, "y")
    labels = read_labels(y_path)
    require_rows(y_path, labels, images.num)
    meta_path = split_path(directory, split, "meta")
    slides = None
    if meta_path.exists():
        slides = np.array([row["wsi"] for row in read_meta(meta_path)])
        require_rows(meta_path, slides, images.num)
    return Split(split, images, labels, slides)


def require_rows(path, column, num: int) -> None:
    """Raise BadInput unless a file's column has a row for each of `num` patches."""
    if len(column) != num:
        raise BadInput(f"{path} has {len(column):,} rows for {num:,} patches")


def read_meta(path) -> list[dict[str, str]]:
    """The rows of a meta CSV, with at least `coord_y`, `coord_x` and `wsi`."""
    return read_edited_csv(path, ("coord_y", "coord_x", "wsi"))
