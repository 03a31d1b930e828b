"""Values that cannot be pixels: not a number, out of range, scaled, or one colour all over; how
many, in which class, where.
"""

import math

import numpy as np

from lib.audit import build_finding
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
LEAST_CHANCE = 1e-3  # below it the classes of damaged patches are not the split's by chance
SIDES = ("top", "bottom", "left", "right")


def check_values(survey: Survey) -> list[dict]:
    """A finding for each kind of damage that occurs in a split, and one for values that are not
    integers.
    """
    findings, table = [], survey.table
    num_bad = {"nan": table["num_nan"], "range": table["num_below"] + table["num_above"]}
    for place, (kind, words) in enumerate(WORDS.items()):
        index = np.flatnonzero(survey.damage == place)
        if not len(index):
            continue
        measured = (
            f"{len(index):,} patches ({len(index) / len(survey):.1%}) {words};"
            f" {by_class(survey, index)}"
        )
        columns = {
            "low": table["low"][index],
            "high": table["high"][index],
            "reason": kind,
            "score": 1.0,
        }
        advice, severity = "training leaves them out with quarantine=", "error"
        if kind in num_bad:
            low, high = columns["low"], columns["high"]
            measured += f"; {where(survey.boxes[index], num_bad[kind][index], low, high, kind)}"
            columns |= {side: survey.boxes[index, number] for number, side in enumerate(SIDES)}
            columns["score"] = np.maximum(num_bad[kind][index] / PATCH_BYTES, 0.5).round(6)
        if len(index) > len(survey) / 2:
            advice = (
                "so many are another scale, not damage: prepare.py repack undoes or explains it"
            )
        if kind == "flat":
            columns["score"], advice, severity = (
                0.3,
                "may be empty glass: look at the gallery",
                "warning",
            )
        rows = survey.rows(index, **columns)
        findings.append(
            build_finding(f"values: {kind}", severity, measured, "none", advice, rows, survey.name)
        )
    partly = survey.intact[table["black_share"][survey.intact] >= LEAST_BLACK]
    if len(partly):
        measured = (
            f"{len(partly):,} patches are black in part, {LEAST_BLACK:.0%} of their pixels or more"
        )
        black_share = table["black_share"][partly].round(4)
        rows = survey.rows(partly, black_share=black_share, reason="partial", score=black_share)
        advice = "lost tiles: look at the gallery; quarantine_reasons takes `partial`"
        check = "values: partly black"
        findings.append(
            build_finding(check, "warning", measured, "none", advice, rows, survey.name)
        )
    if fractional := int((table["num_fractional"][survey.intact] > 0).sum()):
        measured = (
            f"{fractional:,} patches have values that are no integers: intensities were changed"
            " before they were stored"
        )
        advice = "ask where they come from"
        findings.append(
            build_finding(
                "values: not integer", "warning", measured, "none", advice, split=survey.name
            )
        )
    return findings


def by_class(survey: Survey, index) -> str:
    """How the rows are spread over the classes, against how the split is."""
    known = survey.labels[survey.labels >= 0]
    mine = survey.labels[index][survey.labels[index] >= 0]
    if not len(known) or not len(mine):
        return "no labels"
    base = known.mean()
    chance = binomial_chance(int(mine.sum()), len(mine), base)
    verdict = "as the split" if chance >= LEAST_CHANCE else f"not by chance (p = {chance:.1g})"
    return f"{mine.mean():.0%} of them positive, {base:.0%} of the split, {verdict}"


def binomial_chance(num: int, num_total: int, share: float) -> float:
    """Two-sided p of `num` positives or what is less likely among `num_total`, each positive with
    probability `share`.
    """
    if not 0 < share < 1:
        return float(num == share * num_total)
    logs = np.array([math.lgamma(k + 1) for k in range(num_total + 1)])
    counts = np.arange(num_total + 1)
    logs = (
        logs[-1] - logs - logs[::-1] + counts * math.log(share) + counts[::-1] * math.log1p(-share)
    )
    return float(np.exp(logs[logs <= logs[num] + 1e-7]).sum())


def where(
    boxes: np.ndarray, count: np.ndarray, low: np.ndarray, high: np.ndarray, kind: str
) -> str:
    """Where in a patch `count` bad values lie, how large a block they are, and how far from 0..255,
    in words.
    """
    height, width = boxes[:, 1] - boxes[:, 0] + 1, boxes[:, 3] - boxes[:, 2] + 1
    form = "in one block" if np.mean(count >= 0.6 * height * width * 3) > 0.5 else "scattered"
    size = f"{height.min()}x{width.min()} to {height.max()}x{width.max()} pixels"
    places = len(np.unique(boxes[:, [0, 2]], axis=0))
    place = (
        f"always at row {boxes[0, 0]}, column {boxes[0, 2]}"
        if places == 1 and len(boxes) > 1
        else f"at {places:,} places"
    )
    reach = f", from {low.min():,.6g} to {high.max():,.6g}" if kind == "range" else ""
    whole = (
        f", {int((count == PATCH_BYTES).sum()):,} of them whole patches" if kind == "nan" else ""
    )
    return f"{form} of {size} {place}{reach}{whole}"
