"""Values that cannot be pixels: not a number, out of range, scaled, or one colour all over; how many, in which class, where."""

import numpy as np

from lib.audits import finding
from lib.audits.survey import DAMAGE, FLAT_STD, Survey

WORDS = {
    "nan": "NaN or infinite values",
    "range": "values below 0 or above 255",
    "scaled": "values scaled to [0, 1] or [-1, 1]",
    "black": "black all over",
    "white": "white all over",
    "constant": "one colour all over",
    "flat": f"nearly flat (no channel's deviation reaches {FLAT_STD:g})",
}


def check_values(survey: Survey) -> list[dict]:
    """A finding for each kind of damage that occurs in a split, and one for a file of values that are not integers."""
    findings, table = [], survey.table
    for place, kind in enumerate(DAMAGE[:7]):
        index = np.flatnonzero(survey.damage == place)
        if not len(index):
            continue
        score = table["num_nan"] if kind == "nan" else table["num_below"] + table["num_above"] if kind == "range" else None
        columns = {"low": table["low"][index], "high": table["high"][index]}
        if score is not None:
            columns |= {name: survey.boxes[index, side] for side, name in enumerate(("top", "bottom", "left", "right"))}
        size = np.ones(len(index)) if score is None else (score[index] / 27_648).round(6)
        columns |= {"reason": kind, "score": np.maximum(size, 0.5) if kind != "flat" else 0.3}
        measured = f"{len(index):,} patches ({len(index) / len(survey):.1%}) with {WORDS[kind]}" if score is not None else ""
        measured = measured or f"{len(index):,} patches ({len(index) / len(survey):.1%}) are {WORDS[kind]}".replace(
            "are values", "have values"
        )
        measured += f"; {by_class(survey, index)}"
        measured += f"; {where(survey.boxes[index], table, index, kind)}" if score is not None else ""
        certain = kind != "flat"
        advice = "training leaves them out with quarantine=" if certain else "may be empty glass: look at the gallery"
        severity = "error" if certain else "warning"
        findings.append(
            finding(f"values: {kind}", severity, measured, "none", advice, survey.rows(index, **columns), survey.name)
        )
    fractional = int((table["num_fractional"][survey.intact] > 0).sum())
    if fractional:
        measured = f"{fractional:,} patches have values that are no integers: intensities were changed before they were stored"
        findings.append(
            finding("values: not integer", "warning", measured, "none", "ask where they come from", split=survey.name)
        )
    return findings


def by_class(survey: Survey, index) -> str:
    """How the rows are spread over the classes, against how the split is."""
    known = survey.labels[survey.labels >= 0]
    mine = survey.labels[index][survey.labels[index] >= 0]
    if not len(known) or not len(mine):
        return "no labels"
    share, base = mine.mean(), known.mean()
    sigma = np.sqrt(max(base * (1 - base) / len(mine), 1e-12))
    verdict = "as the split" if abs(share - base) <= 4 * sigma else f"not by chance: {abs(share - base) / sigma:.0f} sigma"
    return f"{share:.0%} of them positive, {base:.0%} of the split, {verdict}"


def where(boxes: np.ndarray, table: dict, index, kind: str) -> str:
    """Where in a patch the values lie, how large a block, and how far from 0..255, in words."""
    height, width = boxes[:, 1] - boxes[:, 0] + 1, boxes[:, 3] - boxes[:, 2] + 1
    count = table["num_nan"][index] if kind == "nan" else (table["num_below"] + table["num_above"])[index]
    solid = np.mean(count >= 0.6 * height * width * 3)
    places = len(np.unique(boxes[:, [0, 2]], axis=0))
    form = "in one block" if solid > 0.5 else "scattered"
    size = f"{height.min()}x{width.min()} to {height.max()}x{width.max()} pixels"
    place = f"always at row {boxes[0, 0]}, column {boxes[0, 2]}" if places == 1 and len(boxes) > 1 else f"at {places:,} places"
    reach = f", from {table['low'][index].min():,.6g} to {table['high'][index].max():,.6g}" if kind == "range" else ""
    whole = f", {int((count == 27_648).sum()):,} of them whole patches" if kind == "nan" else ""
    return f"{form} of {size} {place}{reach}{whole}"
