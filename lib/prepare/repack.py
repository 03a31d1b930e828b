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
LOSSES_HEADER = ("split", "row", "kind", "num_values", "lowest", "highest")
# a block that a cache can hold; the longest chunk that memory may have to
BLOCK_ROWS, MOST_ROWS = 64, 1024


def repack(path, directory, allow_loss: bool = False) -> dict:
    """Write a folder of PCam-like HDF5 files of any number type, layout and compression in the
    official form.

    Gives {written, splits: {split: {scaled_by, losses: {kind: {values, patches}}, ...}}}. The rows
    that lose what uint8 cannot hold are kept in repack_losses.csv. Unless `allow_loss`, nothing
    stays written if there are any.
    """
    path, directory = Path(path), Path(directory)
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
        splits, losses = write_splits(directory, sizes, read_blocks)
        is_written = allow_loss or not losses
        if is_written:
            write_csv(directory / LOSSES_FILE, LOSSES_HEADER, losses)
        else:
            remove_files(directory)
    for split, facts in splits.items():
        facts["scaled_by"] = factors[split]
        facts["losses"] = summarise_losses(row for row in losses if row[0] == split)
    return {"written": is_written, "splits": splits}


def plan_repack(path: Path, split: str) -> tuple[int, float]:
    """(number of patches, factor to 0..255) of a split."""
    y_path, meta_path = split_path(path, split, "y"), split_path(path, split, "meta")
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
            rows = [(split, start + row, *loss) for row, *loss in losses]
            yield patches, labels[block], (), rows


def convert_patches(values: np.ndarray, factor: float) -> tuple[np.ndarray, list[tuple]]:
    """Numbers (B, 96, 96, 3) times `factor` as uint8, and the losses: (row, kind, values, lowest,
    highest), in 0..255.
    """
    flat = values.reshape(len(values), -1)
    if factor != 1:
        with np.errstate(invalid="ignore"):  # infinity minus infinity
            flat = flat * np.float32(factor)  # in 32 bits at least
            whole = np.rint(flat)
            stored = values if values.dtype.kind == "f" else flat
            # k/255 comes back as k: storage, not loss
            tolerance = max(1e-3, 255 * np.finfo(stored.dtype).eps)
            flat = np.where(np.abs(flat - whole) <= tolerance, whole, flat)
    patches = to_uint8(flat)
    losses = []
    for row in np.flatnonzero((patches != flat).any(axis=1)):
        losses += [(int(row), *loss) for loss in list_losses(flat[row])]
    return patches.reshape(values.shape), losses


def list_losses(values: np.ndarray):
    """Yield (kind, values, lowest, highest) of what uint8 cannot hold of a patch, (27648,)."""
    finite = np.isfinite(values)
    below, above = finite & (values < 0), finite & (values > 255)
    within = finite & ~below & ~above
    masks = {
        "not_finite": ~finite,
        "below_0": below,
        "above_255": above,
        "rounded": within & (values != np.rint(values)),
    }
    for kind, mask in masks.items():
        lost = values[mask]
        if len(lost):
            yield kind, len(lost), f"{lost.min():.9g}", f"{lost.max():.9g}"


def summarise_losses(rows) -> dict:
    """{kind: {values, patches}} of rows of losses."""
    losses = {}
    for _, _, kind, num, *_ in rows:
        loss = losses.setdefault(kind, {"values": 0, "patches": 0})
        loss["values"] += num
        loss["patches"] += 1
    return losses
