"""Which rows must stay in one fold, where no slide names tell it: groups.csv is written."""

from pathlib import Path

import numpy as np

from lib.audit import build_finding
from lib.audit.copies import link_copies
from lib.command import BadInput
from lib.groups import find_groups, write_groups
from lib.pcam import SPLITS, open_split, split_path


def check_groups(directory) -> list[dict]:
    """Write the groups of all splits without slide names, and a finding for each split.

    A split that cannot be read becomes a finding, and the others are written.
    """
    findings, splits = [], []
    for name in SPLITS:
        if not split_path(directory, name, "x").exists():
            continue
        try:
            splits.append(open_split(directory, name))
        except BadInput as error:
            findings.append(build_finding("groups", "error", str(error), split=name))
    groups = {split.name: link_copies(split.images) for split in splits if split.slides is None}
    if groups:
        write_groups(directory, groups)
    for split in splits:
        measured = "folds keep its slides whole, no groups are needed"
        if split.name in groups:
            measured = describe_groups(groups[split.name], find_groups(split, directory))
        findings.append(build_finding("groups", "note", measured, split=split.name))
    return findings


def describe_groups(groups: np.ndarray, path: Path) -> str:
    """How many of the rows, whose groups are int64 (N,), share tissue, and where that is
    written.
    """
    _, sizes = np.unique(groups, return_counts=True)
    shared = sizes[sizes > 1]
    return (
        f"{shared.sum():,} of {len(groups):,} rows share tissue, in {len(shared):,} groups that"
        f" stay in one fold: {path}"
    )
