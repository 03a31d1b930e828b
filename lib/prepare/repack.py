"""PCam-like HDF5 of any number type, layout and compression as contiguous uint8, with every loss
counted.
"""

import shutil
from pathlib import Path

import numpy as np

from lib import pcam
from lib.command import BadInput
from lib.files import read_csv, write_csv
from lib.pcam import SplitWriter, open_patches, read_labels, read_rows, split_path
from lib.prepare.ingest import LOSSES_FILE, fill_folder, read_journal
from lib.prepare.verify import require_splits
from lib.progress import Progress

LOSSES_HEADER = ("split", "row", "kind", "num_values", "lowest", "highest")
LOSS_KINDS = ("not_finite", "below_0", "above_255", "rounded")
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
    if not allow_loss:
        counted = {
            split: summarise_losses(convert_split(path, split, factor), factor)
            for split, (_, factor) in plans.items()
        }
        if any(stats["losses"] for stats in counted.values()):
            return {"written": False, "splits": counted}

    def write_split(split):
        (num, factor), losses_path = plans[split], directory / LOSSES_FILE
        earlier = (
            [list(row.values()) for row in read_csv(losses_path) if row["split"] != split]
            if losses_path.exists()
            else []
        )
        with SplitWriter(directory, split, num) as writer:
            losses = convert_split(path, split, factor, writer)
            write_csv(losses_path, LOSSES_HEADER, earlier + [(split, *loss) for loss in losses])
            for file in (split_path(path, split, part) for part in ("meta", "mask")):
                if file.exists():
                    shutil.copyfile(file, writer.hidden / file.name)
        return {}

    files = sorted(
        (file.name, file.stat().st_size, file.stat().st_mtime_ns)
        for file in path.glob("camelyonpatch_*")
    )
    source = f"{path.resolve()} ({'with losses' if allow_loss else 'without loss'}, {files})"
    splits = fill_folder(
        directory, source, {split: num for split, (num, _) in plans.items()}, write_split
    )
    rows = read_csv(directory / LOSSES_FILE)  # which knows what an earlier start wrote, too
    for split, stats in splits.items():
        losses = [
            (row["row"], row["kind"], int(row["num_values"]))
            for row in rows
            if row["split"] == split
        ]
        stats |= summarise_losses(losses, plans[split][1])
    return {"written": True, "splits": splits}


def plan_repack(path: Path, split: str) -> tuple[int, int]:
    """(number of patches, factor to 0..255) of a split: 255 where the median of the patches' maxima
    is at most 1.
    """
    x_path, meta_path = split_path(path, split, "x"), split_path(path, split, "meta")
    num_labels = len(read_labels(split_path(path, split, "y")))
    num_meta = len(pcam.read_meta(meta_path)) if meta_path.exists() else num_labels
    with open_patches(x_path) as dataset:
        if not len(dataset) == num_labels == num_meta:
            counts = f"{len(dataset):,} patches, {num_labels:,} labels, {num_meta:,} rows of meta"
            raise BadInput(f"{path}: split {split} has {counts}")
        if dataset.dtype.kind != "f":
            return num_labels, 1
        rows = np.unique(np.linspace(0, num_labels - 1, 256).astype(int))
        sample = np.stack([read_rows(dataset, row) for row in rows]).reshape(len(rows), -1)
    sample[~np.isfinite(sample)] = np.nan
    highest, lowest = np.fmax.reduce(sample, axis=1), np.fmin.reduce(sample, axis=1)
    if np.median(lowest[~np.isnan(lowest)]) < 0:
        raise BadInput(
            f"{x_path}: most patches have values below 0, so they seem normalised; repack takes"
            " 0..255 or 0..1"
        )
    # black patches tell nothing
    return num_labels, 255 if np.median(highest[highest > 0]) <= 1 else 1


def convert_split(
    path: Path, split: str, factor: int, writer: SplitWriter | None = None
) -> list[tuple]:
    """Convert a split by blocks, into `writer` if there is one. Gives its losses: (row, kind,
    values, lowest, highest).
    """
    labels, losses = read_labels(split_path(path, split, "y")), []
    progress = Progress(len(labels), f"{'repack' if writer else 'count the losses of'} {split}")
    with open_patches(split_path(path, split, "x")) as dataset, progress:
        chunk = dataset.chunks[0] if dataset.chunks and dataset.chunks[0] <= MOST_ROWS else 1
        num_rows = -(-BLOCK_ROWS // chunk) * chunk  # whole chunks, so that each is decoded once
        for start in range(0, len(labels), num_rows):
            values = read_rows(dataset, slice(start, start + num_rows))
            patches, lost = convert_patches(values, factor, start)
            losses += lost
            if writer:
                writer.add(patches, labels[start : start + num_rows])
            progress.add(len(values))
    return sorted(losses)


def convert_patches(
    values: np.ndarray, factor: int, first_row: int = 0
) -> tuple[np.ndarray, list[tuple]]:
    """Numbers (B, 96, 96, 3) times `factor` as uint8, and the losses: (row, kind, values, lowest,
    highest), in 0..255.
    """
    flat = values.reshape(len(values), -1)
    with np.errstate(invalid="ignore"):  # NaN has no uint8; the comparison finds it
        if factor != 1:
            flat = flat * np.float32(factor)  # in 32 bits at least
            whole, tolerance = np.rint(flat), max(1e-3, 255 * np.finfo(values.dtype).eps)
            # k/255 comes back as k: storage, not loss
            flat = np.where(np.abs(flat - whole) <= tolerance, whole, flat)
        patches = flat.astype(np.uint8)
    inexact = np.flatnonzero((patches != flat).any(axis=1))
    lossy, losses = flat[inexact], []
    patches[inexact] = pcam.to_uint8(lossy)
    finite, below, above = np.isfinite(lossy), lossy < 0, lossy > 255
    rounded = finite & ~below & ~above & (lossy != np.rint(lossy))
    for kind, masks in zip(
        LOSS_KINDS, (~finite, finite & below, finite & above, rounded), strict=True
    ):
        for row in np.flatnonzero(masks.any(axis=1)):
            lost = lossy[row][masks[row]]
            losses.append(
                (
                    first_row + int(inexact[row]),
                    kind,
                    len(lost),
                    f"{lost.min():.9g}",
                    f"{lost.max():.9g}",
                )
            )
    return patches.reshape(values.shape), losses


def summarise_losses(losses: list[tuple], factor: int) -> dict:
    """{scaled_by, losses: {kind: {values, patches}}} of a split, kinds that occur only."""
    of_kind = {kind: [loss[2] for loss in losses if loss[1] == kind] for kind in LOSS_KINDS}
    counts = {
        kind: {"values": sum(values), "patches": len(values)}
        for kind, values in of_kind.items()
        if values
    }
    return {"scaled_by": factor, "losses": counts}
