"""PCam-like HDF5 of any number type, layout and compression as contiguous uint8, with every loss
counted.
"""

import shutil
from pathlib import Path

import numpy as np

from lib.files import write_csv
from lib.pcam import (
    find_scale,
    open_patches,
    read_labels,
    read_meta,
    read_rows,
    require_rows,
    split_path,
    to_uint8,
)
from lib.prepare.target import new_folder, remove_files, write_splits
from lib.prepare.verify import require_splits

LOSSES_FILE = "repack_losses.csv"
LOSSES_HEADER = ("split", "row", "kind", "num_values")
# a block that a cache can hold; the longest chunk that memory may have to
BLOCK_ROWS, MOST_ROWS = 64, 1024


def repack(path, directory, allow_loss: bool = False) -> tuple[bool, dict, list]:
    """Write a folder of PCam-like HDF5 files of any number type, layout and compression in the
    official form.

    Gives whether it is written, {split: factor to 0..255}, and the losses: rows as LOSSES_HEADER,
    one for each patch and kind of value that uint8 cannot hold, which repack_losses.csv keeps.
    Unless `allow_loss`, nothing stays written if there are any.
    """
    path = Path(path)
    directory = Path(directory)
    sizes, factors = {}, {}
    for split in require_splits(path):
        sizes[split], factors[split] = plan_repack(path, split)

    def read_blocks(split):
        for part in ("meta", "mask"):
            source = split_path(path, split, part)
            if source.exists():
                shutil.copyfile(source, split_path(directory, split, part))
        return convert_split(path, split, factors[split])

    with new_folder(directory):
        losses = write_splits(directory, sizes, read_blocks)
        is_written = allow_loss or not losses
        if is_written:
            write_csv(directory / LOSSES_FILE, LOSSES_HEADER, losses)
        else:
            remove_files(directory)
    return is_written, factors, losses


def plan_repack(path: Path, split: str) -> tuple[int, float]:
    """(number of patches, factor to 0..255) of a split."""
    y_path = split_path(path, split, "y")
    meta_path = split_path(path, split, "meta")
    with open_patches(split_path(path, split, "x")) as dataset:
        num = len(dataset)
        require_rows(y_path, read_labels(y_path), num)
        if meta_path.exists():
            require_rows(meta_path, read_meta(meta_path), num)
        return num, find_scale(dataset)


def convert_split(path: Path, split: str, factor: float):
    """Yield a split by blocks: patches uint8 (B, 96, 96, 3), labels, no meta rows, rows of
    losses.
    """
    labels = read_labels(split_path(path, split, "y"))
    with open_patches(split_path(path, split, "x")) as dataset:
        chunk = dataset.chunks[0] if dataset.chunks and dataset.chunks[0] <= MOST_ROWS else 1
        num_rows = -(-BLOCK_ROWS // chunk) * chunk  # whole chunks, so that each is decoded once
        for start in range(0, len(labels), num_rows):
            block = slice(start, start + num_rows)
            patches, losses = convert_patches(read_rows(dataset, block), factor)
            rows = [(split, start + row, kind, num) for row, kind, num in losses]
            yield patches, labels[block], (), rows


def convert_patches(values: np.ndarray, factor: float) -> tuple[np.ndarray, list[tuple]]:
    """Numbers (B, 96, 96, 3) times `factor` as uint8, and the losses: (row, kind, values)."""
    if factor != 1:
        dtype = values.dtype
        with np.errstate(invalid="ignore"):  # infinity minus infinity
            values = values * np.float32(factor)  # in 32 bits at least
            whole = np.rint(values)
            # k/255 comes back as k: storage, not loss
            precision = np.finfo(dtype if dtype.kind == "f" else values.dtype).eps
            is_whole = np.abs(values - whole) <= max(1e-3, 255 * precision)
            values = np.where(is_whole, whole, values)
    patches = to_uint8(values)
    is_lost = patches != values
    losses = []
    if is_lost.any():
        kinds = {
            "not_finite": ~np.isfinite(values),
            "below_0": values < 0,
            "above_255": values > 255,
        }
        for kind, is_kind in kinds.items():
            losses += count_losses(kind, is_lost & is_kind)
            is_lost = is_lost & ~is_kind
        losses += count_losses("rounded", is_lost)
    return patches, sorted(losses)


def count_losses(kind: str, is_lost: np.ndarray) -> list[tuple]:
    """(row, kind, values) of each of the patches (B, 96, 96, 3) that lost some."""
    counts = is_lost.sum((1, 2, 3)).tolist()
    return [(row, kind, count) for row, count in enumerate(counts) if count]
