"""Whether a folder is the PCam it says it is: whole, consistent, readable, and not with valid and
test exchanged.
"""

import numpy as np

from lib.pcam import SPLITS, open_split, require_file, split_path
from lib.progress import Progress
from lib.published import OFFICIAL, SLIDE_PREFIX, compare_md5, compare_slide_names


def require_splits(directory) -> list[str]:
    """The splits of a PCam folder. Raises BadInput when one lacks a file; the test split may be
    missing whole.
    """
    has_test = any(split_path(directory, "test", part).exists() for part in "xy")
    splits = list(SPLITS if has_test else SPLITS[:2])
    for split in splits:
        require_file(split_path(directory, split, "x"))
        require_file(split_path(directory, split, "y"))
    return splits


def verify_folder(
    directory, splits=None, md5=False, read=True, official=OFFICIAL
) -> tuple[list[dict], list[str]]:
    """The facts of a PCam folder, a row a split, and findings as sentences; `read` goes through all
    patches, end to end.
    """
    rows, findings = [], []
    for name in splits or require_splits(directory):
        split, values = open_split(directory, name), set()
        with Progress(0, f"read {name}") as progress:
            for _, patches in split.images.blocks() if read else ():
                values |= {int(patches.min()), int(patches.max())}
                progress.add(len(patches))
        slide_names, positive = compare_slide_names(split), int(split.labels.sum())
        if slide_names == "swapped":
            findings.append(
                f"{name}: its slides are not {SLIDE_PREFIX[name]}*, valid and test are exchanged"
            )
        if len(values) == 1:
            also = "(0 is also what NaN and unwritten rows read as)"
            findings.append(f"{name}: all patches have the one value {values.pop()} {also}")
        if md5:
            findings += compare_md5(directory, name, official)
        row = {
            "split": name,
            "patches": len(split),
            "negative": len(split) - positive,
            "positive": positive,
        }
        row |= {
            "bytes": split.images.path.stat().st_size,
            "official_rows": len(split) == official[name]["rows"],
        }
        row |= {
            "layout": split.images.layout,
            "slides": None if split.slides is None else len(np.unique(split.slides)),
            "slide_names": slide_names,
        }
        rows.append(row)
    return rows, findings
