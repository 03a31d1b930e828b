"""Editions of real or synthetic patches with known damage, for tests and proofs of the data
audit.
"""

from pathlib import Path

import numpy as np

from lib.pcam import open_split, split_path
from lib.splitwriter import SplitWriter


def write_damaged_edition(source, to, num_train: int, seed: int = 0) -> list[dict]:
    """A damaged edition as a course distributes one: 32-bit floats, five negatives for each
    positive, in train 14% of patches black or white, 3% with NaN in a part, 3% with values up to
    100,000 in a small block. Gives rows of truth."""
    rng, truth = np.random.default_rng(seed), []
    Path(to).mkdir(parents=True)
    train, valid = open_split(source, "train"), open_split(source, "valid")
    negative, positive = (
        rng.permutation(np.flatnonzero(train.labels == label)) for label in (0, 1)
    )
    num_positive = min(num_train // 6, len(positive))
    rows = np.sort(np.concatenate([negative[: num_train - num_positive], positive[:num_positive]]))
    kinds = rng.choice(
        ["", "black", "white", "nan", "range"], len(rows), p=[0.80, 0.07, 0.07, 0.03, 0.03]
    )
    with SplitWriter(to, "train", len(rows), np.float32) as writer:
        for place, (row, kind) in enumerate(zip(rows.tolist(), kinds.tolist(), strict=True)):
            patch = train.images.read([row]).astype(np.float32)
            side = int(rng.integers(8, 65) if kind == "nan" else rng.integers(2, 9))
            y, x = rng.integers(0, 97 - side, 2)
            if kind in ("black", "white"):
                patch[:] = 255 * (kind == "white")
            elif kind == "nan":
                patch[0, y : y + side, x : x + side] = np.nan
            elif kind == "range":
                patch[0, y : y + side, x : x + side] = rng.uniform(1_000, 100_000, (side, side, 3))
            if kind:
                truth.append({"split": "train", "index": place, "reason": kind})
            writer.add(patch, train.labels[[row]])
    with SplitWriter(to, "valid", len(valid), np.float32) as writer:
        for start, block in valid.images.blocks(256):
            writer.add(block.astype(np.float32), valid.labels[start : start + len(block)])
    return truth


def write_flipped_edition(source, to, share: float, seed: int = 0) -> list[dict]:
    """The same files with a share of the labels of train exchanged; gives rows of truth."""
    from lib.splitwriter import write_labels

    Path(to).mkdir(parents=True)
    for name in ("train", "valid"):
        for part in ("x", "y", "meta"):
            if (path := split_path(source, name, part)).exists() and (name, part) != ("train", "y"):
                split_path(to, name, part).symlink_to(path.resolve())
    labels = open_split(source, "train").labels.copy()
    rows = np.sort(
        np.random.default_rng(seed).choice(len(labels), round(share * len(labels)), replace=False)
    )
    labels[rows] ^= 1
    write_labels(split_path(to, "train", "y"), labels)
    return [{"split": "train", "index": int(row), "reason": "label"} for row in rows]


def score_quarantine(truth: list[dict], quarantine: list[dict], reason: str) -> dict:
    """Recall and precision of the rows that quarantine.csv lists for a reason."""
    wanted = {(row["split"], int(row["index"])) for row in truth if row["reason"] == reason}
    listed = {(row["split"], int(row["index"])) for row in quarantine if row["reason"] == reason}
    hits = len(wanted & listed)
    recall, precision = (hits / len(part) if part else float("nan") for part in (wanted, listed))
    return {
        "reason": reason,
        "planted": len(wanted),
        "listed": len(listed),
        "recall": recall,
        "precision": precision,
    }
