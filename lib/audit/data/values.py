"""Values that cannot be pixels: not a number, out of range, scaled, or one colour all over; how
many, in which class, where.
"""

import numpy as np

from lib.audit.survey import FLAT_STD, Survey
from lib.metrics import share_interval
from lib.pcam import PATCH_BYTES

WORDS = {
    "nan": "hold NaN or infinite values",
    "range": "hold values below 0 or above 255",
    "scaled": "hold values scaled to [0, 1] or [-1, 1]",
    "black": "are black all over",
    "white": "are white all over",
    "constant": "have one colour all over",
    "flat": f"are nearly flat (no channel's deviation reaches {FLAT_STD:g})",
}
LEAST_BLACK = 0.1  # of a patch that is black in part
SIDES = ("top", "bottom", "left", "right")


def check_values(survey: Survey) -> list[dict]:
    """A finding for each kind of damage that occurs in a split, and one for values that are not
    integers.
    """
    findings, table = [], survey.table
    for kind, words in WORDS.items():
        index = np.flatnonzero(table["damage"] == kind)
        if not len(index):
            continue
        share = len(index) / len(survey)
        measured = (
            f"{len(index):,} patches ({share:.1%}) {words}; {describe_classes(survey, index)}"
        )
        columns = {name: table[name][index] for name in ("low", "high")}
        columns |= {"reason": kind, "score": 1.0}
        severity, advice = "error", "training leaves them out with quarantine="
        if kind in ("nan", "range"):
            measured += f"; {describe_places(survey, index)}"
            columns |= dict(zip(SIDES, table["box"][index].T, strict=True))
            columns["score"] = np.maximum(table["num_bad"][index] / PATCH_BYTES, 0.5).round(6)
        if share > 0.5:
            advice = (
                "so many are another scale, not damage: prepare.py repack undoes or explains it"
            )
        if kind == "flat":
            severity, advice = "warning", "may be empty glass: look at the gallery"
            columns["score"] = 0.3
        rows = survey.rows(index, **columns)
        findings.append(survey.finding(f"values: {kind}", severity, measured, "", advice, rows))

    intact = survey.intact
    index = intact[table["black_share"][intact] >= LEAST_BLACK]
    if len(index):
        measured = f"{len(index):,} patches are black in part,"
        measured += f" {LEAST_BLACK:.0%} of their pixels or more"
        score = table["black_share"][index].round(4)
        rows = survey.rows(index, black_share=score, reason="partial", score=score)
        advice = "lost tiles: look at the gallery; quarantine_reasons takes `partial`"
        check = "values: partly black"
        findings.append(survey.finding(check, "warning", measured, "", advice, rows))
    num_fractional = (~table["is_integer"][intact]).sum()
    if num_fractional:
        measured = f"{num_fractional:,} patches have values that are no integers: intensities were"
        measured += " changed before they were stored"
        check = "values: not integer"
        findings.append(
            survey.finding(check, "warning", measured, advice="ask where they come from")
        )
    return findings


def describe_classes(survey: Survey, index: np.ndarray) -> str:
    """How rows are spread over the classes, against how the split is, in words."""
    labels = survey.labels[survey.labels >= 0]
    mine = survey.labels[index]
    mine = mine[mine >= 0]
    if not len(mine):
        return "no labels"
    low, high = share_interval(mine.sum(), len(mine))
    interval = f"95% interval {low:.0%} to {high:.0%}"
    return f"{mine.mean():.0%} of them positive ({interval}), {labels.mean():.0%} of the split"


def describe_places(survey: Survey, index: np.ndarray) -> str:
    """Where in the patches of `index` bad values lie, how large a block they are, and the lowest
    and highest value, in words.
    """
    low, high, num_bad, box = (
        survey.table[name][index] for name in ("low", "high", "num_bad", "box")
    )
    top, bottom, left, right = box.T.astype(np.int64)
    height, width = bottom - top + 1, right - left + 1
    is_block = num_bad >= 0.6 * 3 * height * width
    form = "in one block" if is_block.mean() > 0.5 else "scattered"
    num_places = len(np.unique(96 * top + left))
    whole = (num_bad == PATCH_BYTES).sum()
    return (
        f"{form} of {height.min()}x{width.min()} to {height.max()}x{width.max()} pixels at"
        f" {num_places:,} places, {whole:,} of them whole patches; values from"
        f" {np.fmin.reduce(low):,.6g} to {np.fmax.reduce(high):,.6g}"
    )
