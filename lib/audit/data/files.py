"""What the files are: names, published checksums, exchanged splits, layout; why they are as large
as they are.
"""

import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from lib.audit import build_finding
from lib.audit.survey import DAMAGE, Survey
from lib.pcam import PATCH_BYTES, SPLITS, open_images, open_patches, read_rows, split_path
from lib.published import OFFICIAL, SLIDE_PREFIX, compare_md5, compare_slide_names
from lib.splitwriter import SplitWriter

# patches that are packed anew to measure what that would give, and read one by one
TRIED_ROWS, READ_AT_RANDOM = 2048, 256


def check_files(directory, surveys: list[Survey], work) -> list[dict]:
    """Names, layout, checksums, slide names, and the account of the size of each split's x file."""
    findings = []
    allowed = {
        split_path("", name, part).name for name in SPLITS for part in ("x", "y", "meta", "mask")
    }
    if others := sorted({path.name for path in Path(directory).glob("camelyonpatch*")} - allowed):
        measured = f"not among the official names: {', '.join(others[:4])}"
        findings.append(
            build_finding(
                "names", "warning", measured, "", "rename", [{"file": name} for name in others]
            )
        )
    for survey in surveys:
        layout, num_official = survey.layout, OFFICIAL[survey.name]["rows"]
        stored = (
            f"{layout['dtype']},"
            f" {'chunks of ' + str(layout['chunks']) if layout['chunks'] else 'contiguous'}"
        )
        stored += f", {layout['compression']}" if layout["compression"] else ""
        num = f"{len(survey):,} patches" + (
            "" if len(survey) == num_official else f" (published: {num_official:,})"
        )
        # hashing 7 GB for nothing takes a while
        may_be_official = any(
            layout_bytes(survey) == published["rows"] * PATCH_BYTES
            for published in OFFICIAL.values()
        )
        differing = (
            compare_md5(directory, survey.name)
            if may_be_official
            else ["of another size than as published"]
        )
        verdict = "; ".join(differing) or "MD5 as published"
        findings.append(
            build_finding(
                "files", "note", f"{num}, {stored}; {verdict}", split=survey.name, rows=[layout]
            )
        )
        if (named := compare_slide_names(survey)) == "swapped" or "it is that of" in verdict:
            proof = "its slides are named as another split's" if named == "swapped" else verdict
            limit, advice = f"{SLIDE_PREFIX[survey.name]}*", "give the files their names back"
            findings.append(
                build_finding("exchanged splits", "error", proof, limit, advice, split=survey.name)
            )
        findings.append(account_for_size(survey, work))
    return findings


def layout_bytes(survey: Survey) -> int:
    """The bytes of the values of a split, unpacked."""
    return len(survey) * PATCH_BYTES * survey.layout["itemsize"]


def account_for_size(survey: Survey, work) -> dict:
    """bytes = rows x 27,648 x bytes a value / compression + overhead, each beside the official
    file; what repacking gives.
    """
    layout, num = survey.layout, len(survey)
    ratio = layout_bytes(survey) / max(layout["stored_bytes"], 1)
    overhead = layout["file_bytes"] - layout["stored_bytes"]
    official = OFFICIAL[survey.name]["rows"]
    measured = (
        f"{layout['file_bytes']:,} bytes = {num:,} rows x 27,648 values x {layout['itemsize']}"
        f" bytes / {ratio:.2f} by compression + {overhead:,}; official:"
        f" {official * PATCH_BYTES:,} = {official:,} x 27,648 x 1"
    )
    factors = {
        "rows": (num, official),
        "values a patch": (PATCH_BYTES, PATCH_BYTES),
        "bytes a value": (layout["itemsize"], 1),
        "compression": (round(ratio, 3), 1.0),
        "overhead, bytes": (overhead, 2048),
    }
    rows = [
        {"factor": factor, "here": here, "official": published}
        for factor, (here, published) in factors.items()
    ]
    if layout["offset"] is not None and layout["dtype"] == "uint8":
        return build_finding("size", "note", measured, rows=rows, split=survey.name)
    is_readable = survey.damage != DAMAGE.index("unreadable")
    if is_readable.any():
        readable = np.flatnonzero(is_readable)[:TRIED_ROWS]
        before, after, packed_bytes = measure_repacking(survey, readable, work)
        saved = layout["file_bytes"] - packed_bytes
        measured += (
            f"; repacked as contiguous uint8: {packed_bytes:,} bytes"
            f" ({saved / layout['file_bytes']:+.0%} saved), single patches at random {after:,.0f}/s"
            f" instead of {before:,.0f}/s"
        )
        rate = {"here": round(before), "repacked": round(after)}
        rows.append({"factor": "random patches a second", **rate})
    advice = "prepare.py repack"
    return build_finding("size", "warning", measured, advice=advice, rows=rows, split=survey.name)


def measure_repacking(survey: Survey, rows, work) -> tuple[float, float, int]:
    """Patches a second read singly at random from the file as it is and from a repacked part, its
    `rows` int64 (N,), and bytes of all repacked.
    """
    wanted = np.random.default_rng(0).choice(rows, min(READ_AT_RANDOM, len(rows)), replace=False)
    with tempfile.TemporaryDirectory(dir=work, ignore_cleanup_errors=True) as folder:
        with SplitWriter(folder, survey.name, len(rows)) as writer:
            for part in np.array_split(rows, -(-len(rows) // 256)):
                writer.add(survey.read(part), np.maximum(survey.labels[part], 0).astype(np.uint8))
        path = split_path(folder, survey.name, "x")
        overhead = path.stat().st_size - len(rows) * PATCH_BYTES
        packed = open_images(path)
        with open_patches(survey.path) as dataset:
            rates = [
                rate_of(read, wanted)
                for read in (lambda row: read_rows(dataset, row), lambda row: packed.read([row]))
            ]
    return *rates, len(survey) * PATCH_BYTES + overhead


def rate_of(read: Callable, rows: np.ndarray) -> float:
    """Rows a second that `read` gives, one at a time."""
    started = time.perf_counter()
    for row in rows.tolist():
        read(row)
    return len(rows) / (time.perf_counter() - started)
