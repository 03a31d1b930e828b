"""PCam-like HDF5 of any number type, layout and compression as contiguous uint8, with every loss
counted.
"""

import shutil
from pathlib import Path

import numpy as np

from lib.files import atomic_write, read_csv
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
from lib.prepare.target import fill_folder, read_journal
from lib.prepare.verify import require_splits
from lib.progress import Progress

LOSSES_FILE = "repack_losses.csv"
LOSSES_HEADER = ("split", "row", "kind", "num_values", "lowest", "highest")
# a block that a cache can hold; the longest chunk that memory may have to
BLOCK_ROWS, MOST_ROWS = 64, 1024


def repack(path, directory, allow_loss: bool = False) -> dict:
    """Write a folder of PCam-like HDF5 files of any number type, layout and compression in the
    official form.

    Gives {written, splits: {split: {scaled_by, losses: {kind: {values, patches}}, ...}}}. Unless
    `allow_loss`, what uint8 cannot hold is counted first, and nothing is written if there is any;
    else its rows are kept in repack_losses.csv.
    """
    path, directory = Path(path), Path(directory)
    read_journal(directory)
    plans = {split: plan_repack(path, split) for split in require_splits(path)}
    sizes = {split: num for split, (num, _) in plans.items()}
    splits, losses = {split: {} for split in plans}, []

    def read_blocks(split):
        for part in ("meta", "mask"):
            copy_file(split_path(path, split, part), split_path(directory, split, part))
        return convert_split(path, split, plans[split][1])

    if not allow_loss:
        for split, (num, factor) in plans.items():
            with Progress(num, f"count the losses of {split}") as progress:
                for patches, _, _, rows in convert_split(path, split, factor):
                    losses += rows
                    progress.add(len(patches))
    is_written = not losses
    if is_written:
        states = []
        for file in sorted(path.glob("camelyonpatch_*")):
            status = file.stat()
            states.append((file.name, status.st_size, status.st_mtime_ns))
        source = f"{path.resolve()} ({'with losses' if allow_loss else 'without loss'}, {states})"
        splits = fill_folder(directory, source, sizes, read_blocks, (LOSSES_FILE, *LOSSES_HEADER))
        # which holds those that an earlier start wrote, too
        losses = [list(row.values()) for row in read_csv(directory / LOSSES_FILE)]
    for split, facts in splits.items():
        of_split = [row for row in losses if row[0] == split]
        facts |= {"scaled_by": plans[split][1], "losses": summarise_losses(of_split)}
    return {"written": is_written, "splits": splits}


def copy_file(source: Path, target: Path) -> None:
    if source.exists():
        with open(source, "rb") as original, atomic_write(target) as copy:
            shutil.copyfileobj(original, copy)


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
            values = read_rows(dataset, slice(start, start + num_rows))
            patches, losses = convert_patches(values, factor)
            rows = [(split, start + row, *loss) for row, *loss in losses]
            yield patches, labels[start : start + num_rows], (), rows


def convert_patches(values: np.ndarray, factor: float) -> tuple[np.ndarray, list[tuple]]:
    """Numbers (B, 96, 96, 3) times `factor` as uint8, and the losses: (row, kind, values, lowest,
    highest), in 0..255.
    """
    flat = values.reshape(len(values), -1)
    if factor != 1:
        with np.errstate(invalid="ignore"):  # infinity minus infinity
            flat = flat * np.float32(factor)  # in 32 bits at least
            whole = np.rint(flat)
            precision = np.finfo(flat.dtype if values.dtype.kind != "f" else values.dtype).eps
            # k/255 comes back as k: storage, not loss
            flat = np.where(np.abs(flat - whole) <= max(1e-3, 255 * precision), whole, flat)
    patches = to_uint8(flat)
    losses = []
    for row in np.flatnonzero((patches != flat).any(axis=1)):
        losses += [(int(row), *loss) for loss in list_losses(flat[row])]
    return patches.reshape(values.shape), losses


def list_losses(values: np.ndarray):
    """Yield (kind, values, lowest, highest) of what uint8 cannot hold of a patch, (27648,)."""
    finite = np.isfinite(values)
    below, above = finite & (values < 0), finite & (values > 255)
    is_rounded = finite & ~below & ~above & (values != np.rint(values))
    kinds = ("not_finite", "below_0", "above_255", "rounded")
    for kind, mask in zip(kinds, (~finite, below, above, is_rounded), strict=True):
        lost = values[mask]
        if len(lost):
            yield kind, len(lost), f"{lost.min():.9g}", f"{lost.max():.9g}"


def summarise_losses(rows) -> dict:
    """{kind: {values, patches}} of rows of losses."""
    losses = {}
    for _, _, kind, num, *_ in rows:
        loss = losses.setdefault(kind, {"values": 0, "patches": 0})
        loss["values"] += int(num)
        loss["patches"] += 1
    return losses
