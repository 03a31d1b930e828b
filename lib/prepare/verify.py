"""Whether a folder is the PCam it says it is: whole, consistent, readable, and not with valid and
test exchanged.
"""

import numpy as np

from lib.pcam import SPLITS, Split, open_split, require_file, split_path
from lib.progress import Progress
from lib.published import compare_md5

# how the slides of another published split are named
OTHER_SLIDES = {
    "train": "camelyon16_test_",
    "valid": "camelyon16_test_",
    "test": "camelyon16_train_",
}


def require_splits(directory) -> list[str]:
    """The splits of a PCam folder. Raises BadInput when one lacks a file; the test split may be
    missing whole.
    """
    has_test = any(split_path(directory, "test", part).exists() for part in "xy")
    splits = list(SPLITS if has_test else SPLITS[:2])
    for split in splits:
        for part in "xy":
            require_file(split_path(directory, split, part))
    return splits


def verify_folder(directory, splits=None, md5=False) -> tuple[list[dict], list[str]]:
    """The facts of a PCam folder, a row a split, and findings as sentences, after all patches were
    read.
    """
    rows, findings = [], []
    for name in splits or require_splits(directory):
        split = open_split(directory, name)
        rows.append(list_facts(split))
        values = read_extremes(split)
        if len(values) == 1:
            findings.append(
                f"{name}: all patches have the one value {values.pop()} (0 is also what NaN and"
                " unwritten rows read as)"
            )
        slides = () if split.slides is None else split.slides
        other = OTHER_SLIDES[name]
        if any(slide.startswith(other) for slide in slides):
            findings.append(f"{name}: it has slides {other}*, valid and test are exchanged")
        if md5:
            findings += compare_md5(directory, name)
    return rows, findings


def list_facts(split: Split) -> dict:
    num_positive = int(split.labels.sum())
    return {
        "split": split.name,
        "patches": len(split),
        "negative": len(split) - num_positive,
        "positive": num_positive,
        "bytes": split.images.path.stat().st_size,
        "layout": split.images.layout,
        "slides": None if split.slides is None else len(np.unique(split.slides)),
    }


def read_extremes(split: Split) -> set[int]:
    """The lowest and highest values of blocks of patches, read by HDF5, which reports a bad
    disk.
    """
    values = set()
    with Progress(len(split), f"read {split.name}") as progress:
        for _, patches in split.images.blocks():
            values.update((int(patches.min()), int(patches.max())))
            progress.add(len(patches))
    return values
