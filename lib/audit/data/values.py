"""Values that cannot be pixels: not a number, out of range, scaled, or one colour all over; how
many, in which class, where.
"""

import numpy as np

from lib.audit.survey import FLAT_STD, Survey
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
BOX = ("top", "left", "height", "width")


def check_values(survey: Survey) -> list[dict]:
    """A finding for each kind of damage that occurs in a split."""
    findings, table = [], survey.table
    for kind, words in WORDS.items():
        index = np.flatnonzero(table["damage"] == kind)
        if not len(index):
            continue
        share = len(index) / len(survey)
        measured = f"{len(index):,} patches ({share:.1%}) {words}"
        columns = {"low": table["low"][index], "high": table["high"][index]}
        columns |= {"reason": kind, "score": 1.0}
        severity, advice = "error", "training leaves them out with quarantine="
        if share > 0.5:
            advice = "so many are another scale, not damage: prepare.py repack explains it"
        if kind in ("nan", "range"):
            low, high = np.fmin.reduce(columns["low"]), np.fmax.reduce(columns["high"])
            measured += f", from {low:,.6g} to {high:,.6g}"
            columns |= dict(zip(BOX, table["box"][index].T, strict=True))
            columns["score"] = np.maximum(table["num_bad"][index] / PATCH_BYTES, 0.5).round(6)
        if kind == "flat":
            severity, advice = "warning", "may be empty glass: look at the gallery"
            columns["score"] = 0.3
        measured += describe_classes(survey, index)
        rows = survey.rows(index, **columns)
        findings.append(survey.finding(f"values: {kind}", severity, measured, "", advice, rows))

    intact = survey.intact
    index = intact[table["black_share"][intact] >= LEAST_BLACK]
    if len(index):
        measured = f"{len(index):,} patches are black in {LEAST_BLACK:.0%} of their pixels or more"
        score = table["black_share"][index].round(4)
        rows = survey.rows(index, reason="partial", score=score)
        advice = "lost tiles: look at the gallery; quarantine_reasons takes `partial`"
        check = "values: partly black"
        findings.append(survey.finding(check, "warning", measured, "", advice, rows))
    return findings


def describe_classes(survey: Survey, index: np.ndarray) -> str:
    """How rows are spread over the classes, against how the split is, in words."""
    labels, mine = survey.labels[survey.labels >= 0], survey.labels[index]
    mine = mine[mine >= 0]
    if not len(mine):
        return ""
    return f"; {mine.mean():.0%} of them positive, {labels.mean():.0%} of the split"
