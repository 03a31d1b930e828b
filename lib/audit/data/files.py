"""What the files are: names, published checksums, exchanged splits, layout; why they are as large
as they are.
"""

import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from lib.audit import build_finding
from lib.audit.survey import Survey
from lib.pcam import PARTS, PATCH_BYTES, SPLITS, open_patches, read_rows, split_path
from lib.published import OFFICIAL, SLIDE_PREFIX, compare_md5, compare_slide_names

OVERHEAD_BYTES = 2048  # of a contiguous HDF5 file
READ_AT_RANDOM = 256  # patches, one by one


def check_files(directory, surveys: list[Survey]) -> list[dict]:
    """Names, layout, checksums, slide names, and the account of the size of each split's x file."""
    findings = []
    allowed = {split_path("", name, part).name for name in SPLITS for part in PARTS}
    others = {path.name for path in Path(directory).glob("camelyonpatch*")} - allowed
    if others:
        measured = f"not among the official names: {', '.join(sorted(others)[:4])}"
        rows = [{"file": name} for name in sorted(others)]
        findings.append(build_finding("names", "warning", measured, "", "rename", rows))
    for survey in surveys:
        findings += identify(directory, survey)
        findings.append(account_for_size(survey))
    return findings


def identify(directory, survey: Survey) -> list[dict]:
    """Findings for how a split is stored, and whether its files are the published ones."""
    layout = survey.layout
    num_bytes = len(survey) * PATCH_BYTES * layout["itemsize"]
    verdict = "of another size than as published"  # hashing 7 GB for nothing takes a while
    if num_bytes in [published["rows"] * PATCH_BYTES for published in OFFICIAL.values()]:
        verdict = "; ".join(compare_md5(directory, survey.name)) or "MD5 as published"
    chunks = f"chunks of {layout['chunks']}" if layout["chunks"] else "contiguous"
    stored = f"{layout['dtype']}, {chunks}, compression {layout['compression']}"
    official = OFFICIAL[survey.name]["rows"]
    measured = f"{len(survey):,} patches (published: {official:,}), {stored}; {verdict}"
    findings = [survey.finding("files", "note", measured, rows=[layout])]
    proof = verdict if "it is that of" in verdict else ""
    if compare_slide_names(survey) == "swapped":
        proof = "its slides are named as another split's"
    if proof:
        limit, advice = f"{SLIDE_PREFIX[survey.name]}*", "give the files their names back"
        findings.append(survey.finding("exchanged splits", "error", proof, limit, advice))
    return findings


def account_for_size(survey: Survey) -> dict:
    """bytes = rows x 27,648 x bytes a value / compression + overhead, each beside the official
    file; what repacking gives.
    """
    layout, num = survey.layout, len(survey)
    file_bytes, stored_bytes = layout["file_bytes"], layout["stored_bytes"]
    ratio = num * PATCH_BYTES * layout["itemsize"] / max(stored_bytes, 1)
    overhead = file_bytes - stored_bytes
    official = OFFICIAL[survey.name]["rows"]
    measured = (
        f"{file_bytes:,} bytes = {num:,} rows x 27,648 values x {layout['itemsize']} bytes /"
        f" {ratio:.2f} by compression + {overhead:,}; official: {official * PATCH_BYTES:,} ="
        f" {official:,} x 27,648 x 1"
    )
    factors = {
        "rows": (num, official),
        "values a patch": (PATCH_BYTES, PATCH_BYTES),
        "bytes a value": (layout["itemsize"], 1),
        "compression": (round(ratio, 3), 1.0),
        "overhead, bytes": (overhead, OVERHEAD_BYTES),
    }
    rows = []
    for factor, (here, published) in factors.items():
        rows.append({"factor": factor, "here": here, "official": published})
    if layout["offset"] is not None and layout["dtype"] == "uint8":
        return survey.finding("size", "note", measured, rows=rows)
    packed_bytes = num * PATCH_BYTES + OVERHEAD_BYTES
    saved = (file_bytes - packed_bytes) / file_bytes
    measured += f"; repacked as contiguous uint8: {packed_bytes:,} bytes ({saved:+.0%} saved)"
    readable = np.flatnonzero(survey.table["damage"] != "unreadable")
    if len(readable):
        # the survey reads from such a file already
        with open_patches(survey.path) as dataset:
            before = rate_of(lambda row: read_rows(dataset, row), readable)
        after = rate_of(lambda row: survey.read([row]), readable)
        measured += f", single patches at random {after:,.0f}/s instead of {before:,.0f}/s"
        rate = {"here": round(before), "repacked": round(after)}
        rows.append({"factor": "random patches a second", **rate})
    return survey.finding("size", "warning", measured, "", "prepare.py repack", rows)


def rate_of(read: Callable, rows: np.ndarray) -> float:
    """Rows a second that `read` gives, one at a time, of some at random."""
    rows = np.random.default_rng(0).permutation(rows)[:READ_AT_RANDOM]
    started = time.perf_counter()
    for row in rows.tolist():
        read(row)
    return len(rows) / (time.perf_counter() - started)
