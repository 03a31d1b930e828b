"""How the patches are stored, and why a file is as large as it is. `prepare.py verify --md5` says
whether files are the published ones.
"""

from lib.audit.survey import Survey
from lib.pcam import PATCH_BYTES
from lib.published import OFFICIAL


def check_files(survey: Survey) -> list[dict]:
    """The finding for bytes = rows x 27,648 x bytes a value / compression + overhead of a split's x
    file, beside the official file, and what repacking saves.
    """
    layout, num = survey.layout, len(survey)
    file_bytes, stored_bytes = layout["file_bytes"], layout["stored_bytes"]
    ratio = num * PATCH_BYTES * layout["itemsize"] / max(stored_bytes, 1)
    official = OFFICIAL[survey.name]["rows"]
    measured = (
        f"{file_bytes:,} bytes = {num:,} rows x 27,648 values x {layout['itemsize']} bytes /"
        f" {ratio:.3f} by compression + {file_bytes - stored_bytes:,}; official:"
        f" {official * PATCH_BYTES:,} = {official:,} x 27,648 x 1; stored as {layout['words']}"
    )
    if layout["is_plain"]:
        return [survey.finding("size", "note", measured)]
    saved = 1 - num * PATCH_BYTES / file_bytes
    measured += f"; repacked as contiguous uint8: {num * PATCH_BYTES:,} bytes ({saved:+.0%} saved)"
    return [survey.finding("size", "warning", measured, "", "prepare.py repack")]
