"""Groups: rows of a split that must stay in one fold. A group is a slide or, where a split has no
slide names, patches that are copies or overlap, from the groups.csv of `audit.py data DIR --checks
groups`.
"""

import shlex
from pathlib import Path

import numpy as np

from lib.command import BadInput, say
from lib.files import cache_folder, file_digest, read_edited_csv, row_number, write_csv
from lib.fingerprint import fingerprint
from lib.pcam import Split, split_path

FILE_NAME = "groups.csv"
COLUMNS = ("split", "index", "group")


def group_of_rows(split: Split, directory) -> np.ndarray | None:
    """The name of the group of each row, (N,): its slide, else its group in groups.csv. None where
    there are neither.

    Raises BadInput for a groups.csv that does not list each row once. It does not notice that
    patches were replaced by as many others; the name of a cached file, a digest, would.
    """
    path = find_groups(split, directory)
    if path is None:
        return split.slides
    num = len(split)
    rows = [row for row in read_edited_csv(path, COLUMNS) if row["split"] == split.name]
    group_of_row = {row_number(row["index"]): row["group"] for row in rows}
    if len(rows) != num or set(group_of_row) != set(range(num)):
        raise BadInput(
            f"{path} does not list each of the {num:,} rows of {split.name} once;"
            f" `{groups_command(directory)}` writes it anew"
        )
    return np.array([group_of_row[index] for index in range(num)])


def groups_for_folds(split: Split, directory) -> np.ndarray:
    """The group of each row, (N,). Raises BadInput where neither slides nor groups.csv exist."""
    groups = group_of_rows(split, directory)
    if groups is None:
        raise BadInput(
            f"{directory}: folds of {split.name} need slide names or {FILE_NAME}, which"
            f" `{groups_command(directory)}` writes"
        )
    return groups


def groups_for_halves(split: Split, directory) -> np.ndarray:
    """The group of each row, (N,). Where there are neither slides nor groups.csv, a note is printed
    and each row is a group of its own.
    """
    groups = group_of_rows(split, directory)
    if groups is None:
        say(
            f"note: halves of {split.name} may share tissue, {directory} has neither slide names"
            f" nor {FILE_NAME}; `{groups_command(directory)}` mends that"
        )
        return np.arange(len(split))
    return groups


def groups_command(directory) -> str:
    return f"python audit.py data {shlex.quote(str(directory))} --checks groups"


def find_groups(split: Split, directory) -> Path | None:
    """The groups.csv of a split, in the folder or else in the user's cache. None where there is no
    such file, and where the split has slide names.
    """
    if split.slides is not None:
        return None
    path = Path(directory, FILE_NAME)
    if not path.is_file():
        path = cached_path(directory, split.name)
    return path if path.is_file() else None


def groups_digest(split: Split, directory) -> str | None:
    """SHA-256 of the groups.csv of a split, None without one. Raises BadInput where it does not fit
    the split.
    """
    path = find_groups(split, directory)
    if path is None:
        return None
    group_of_rows(split, directory)
    return file_digest(path)


def write_groups(directory, groups: dict[str, np.ndarray]) -> None:
    """Write {split: group of each row (N,)} to DIR/groups.csv or, where that folder cannot be
    written, to the user's cache.

    Raises OSError where neither can be written, and where DIR has an old groups.csv, which readers
    would prefer to the cache.
    """
    path = Path(directory, FILE_NAME)
    rows = []
    for split, names in groups.items():
        rows += [(split, index, name) for index, name in enumerate(names.tolist())]
    try:
        write_csv(path, COLUMNS, rows)
    except OSError:
        if path.exists():
            raise
        for split in groups:
            cached = cached_path(directory, split)
            cached.parent.mkdir(parents=True, exist_ok=True)
            write_csv(cached, COLUMNS, rows)


def cached_path(directory, split: str) -> Path:
    """The file in the cache for a split, named by the SHA-256 of the split's patches."""
    digest = fingerprint(directory, [split])[split_path(directory, split, "x").name]
    return cache_folder() / f"groups-{digest}.csv"
