"""The page of a data audit: how many patches of what there are, what was found, with pictures, and
the power of each check.
"""

from pathlib import Path

import numpy as np

from lib.audit.plant import LEAST_POWER, REASONS_OF
from lib.audit.survey import Survey
from lib.blocks import gallery, note, picture, section, show, table, write_page
from lib.figures import (
    figure_png,
    new_figure,
    patch_png,
    plot_counts,
    plot_gallery,
    plot_histograms,
)

MOST_PICTURES, MOST_ROWS, NUM_BINS = 16, 12, 50
NUM_SUSPECTS = 4  # pictures of a reason in the gallery of all reasons
UNITS = {
    "brightness": "0 to 255",
    "saturation": "0 to 1",
    "haematoxylin": "optical density",
    "sharpness": "ratio",
}


def write_data_page(
    path, title: str, surveys: list[Survey], findings: list[dict], power: list[dict]
) -> Path:
    """Write the page of an audit of these splits."""
    power_of = {
        row["reason"]: [other for other in power if other["reason"] == row["reason"]]
        for row in power
    }
    ranked = sorted(
        findings, key=lambda found: ("error", "warning", "note").index(found["severity"])
    )
    summary = [
        (f["severity"], f["check"], f["split"], f["count"], f["measured"], f["advice"])
        for f in ranked
    ]
    pairs = [(survey, label) for survey in surveys for label in (0, 1, -1)]
    counts = [
        {"split": survey.name, "label": label, "count": int((survey.labels == label).sum())}
        for survey, label in pairs
    ]
    sections = [
        section(
            "What there is", picture(figure_png(plot_counts(counts)), "patches per split and class")
        ),
        section(
            "What was found",
            table(("severity", "check", "split", "rows", "measured", "advice"), summary),
        ),
    ]
    if power:
        header = ("planted", "in", "found", "recall", "false alarms", "found on the clean copy")
        rows = [
            (r["planted"], r["num"], r["found"], r["recall"], r["false_alarms"], r["on_clean"])
            for r in power
        ]
        sections.append(
            section(
                "How much of planted damage is found, on a copy of these data", table(header, rows)
            )
        )
    else:
        sections.append(
            note(
                "The power of these checks on these data is not measured: audit.py data ... --plant"
                " does."
            )
        )
    sections += [finding_section(found, surveys, power_of) for found in ranked]
    histograms = figure_png(plot_histograms(feature_histograms(surveys)))
    sections.append(section("How the splits look", picture(histograms, "features by split")))
    return write_page(path, title, sections)


def finding_section(found: dict, surveys: list[Survey], power_of: dict) -> str:
    """One finding: its sentence, the power of its check, pictures or rows, and where in the
    patch.
    """
    parts = [
        note(found["measured"], "alarm" if found["severity"] == "error" else "note"),
        note(found["advice"]),
    ]
    reasons = {row["reason"] for row in found["rows"] if row.get("reason")} or REASONS_OF.get(
        found["check"].split()[0], ()
    )
    for row in (row for reason in sorted(reasons) for row in power_of.get(reason, ())):
        words = (
            f"Planted on a copy of these data ({row['planted']}): {row['found']} of {row['num']}"
            " found, "
        )
        words += f"{row['false_alarms']} false alarms."
        if row["recall"] < LEAST_POWER:
            words += " No power on these data: that nothing is found says nothing."
        parts.append(note(words))
    by_name = {survey.name: survey for survey in surveys}
    kind = found["check"].removeprefix("values: ")
    if kind in ("nan", "range"):
        parts.append(
            picture(
                figure_png(plot_heat(by_name[found["split"]].heat[kind], kind)),
                "where in the patch",
            )
        )
    shown = [row for row in found["rows"] if row.get("split") in by_name and "index" in row]
    shown = shown[:: -(-len(shown) // MOST_PICTURES) or 1]
    if shown:
        seen = [(row, *side) for row in shown for side in sides(row)]
        pictures = [
            patch_png(outline(by_name[split].read([index])[0], row))
            for row, split, index, _ in seen
        ]
        parts.append(gallery(pictures, [caption for *_, caption in seen]))
    elif found["rows"]:
        parts.append(table(found["rows"][0], [row.values() for row in found["rows"][:MOST_ROWS]]))
    return section(
        f"{found['check']}{' in ' + found['split'] if found['split'] else ''}",
        *(part for part in parts if part),
    )


def sides(row: dict):
    """The patches that a row speaks of, (split, index, caption): its own, and the one that it is a
    copy of.
    """
    skipped = (
        "split",
        "index",
        "of",
        "reason",
        "top",
        "bottom",
        "left",
        "right",
        "height",
        "width",
    )
    facts = ", ".join(f"{name} {show(value)}" for name, value in row.items() if name not in skipped)
    yield row["split"], row["index"], f"{row['split']} {row['index']}: {facts}"
    if "of" in row:
        split, _, index = str(row["of"]).rpartition(" ")
        yield split or row["split"], int(index), f"of {split or row['split']} {index}"


def outline(patch: np.ndarray, row: dict) -> np.ndarray:
    """The patch with a frame around the block that a row names, just outside of it."""
    if "top" not in row:
        return patch
    patch = patch.copy()
    bottom = min(row.get("bottom", row["top"] + row.get("height", 1) - 1) + 2, 95)
    right = min(row.get("right", row["left"] + row.get("width", 1) - 1) + 2, 95)
    top, left = max(row["top"] - 2, 0), max(row["left"] - 2, 0)
    patch[[top, bottom], left : right + 1] = patch[top : bottom + 1, [left, right]] = 0, 158, 115
    return patch


def feature_histograms(surveys: list[Survey]) -> list[dict]:
    """Rows of split, feature, unit, low, high and num: intact patches in each bin, the same bins
    for all splits.
    """
    shown, rows = [survey for survey in surveys if len(survey.intact)], []
    for name, unit in UNITS.items() if shown else ():
        values = [survey.table[name][survey.intact] for survey in shown]
        edges = np.linspace(*np.quantile(np.concatenate(values), (0.002, 0.998)), NUM_BINS + 1)
        for survey, column in zip(shown, values, strict=True):
            for low, high, num in zip(
                edges, edges[1:], np.histogram(column, edges)[0], strict=False
            ):
                row = {
                    "split": survey.name,
                    "feature": name,
                    "unit": unit,
                    "low": round(float(low), 5),
                }
                rows.append(row | {"high": round(float(high), 5), "num": int(num)})
    return rows


def plot_suspects(surveys: list[Survey], findings: list[dict]):
    """Pictures of suspect patches, a few of each reason; None where there are none."""
    by_name, by_reason = {survey.name: survey for survey in surveys}, {}
    for row in (
        row
        for found in findings
        for row in found["rows"]
        if row.get("reason") and row["split"] in by_name
    ):
        by_reason.setdefault(row["reason"], []).append(row)
    chosen = [row for rows in by_reason.values() for row in rows[:: -(-len(rows) // NUM_SUSPECTS)]]
    patches = [outline(by_name[row["split"]].read([row["index"]])[0], row) for row in chosen]
    return (
        plot_gallery(patches, [f"{row['reason']} {row['split']} {row['index']}" for row in chosen])
        if patches
        else None
    )


def plot_heat(heat: np.ndarray, kind: str):
    """How many patches have damage at each pixel."""
    figure, (axes,) = new_figure(1, width=4.6, height=3.8)
    image = axes.imshow(heat, cmap="magma", vmin=0)
    axes.set(title=f"patches with {kind} at a pixel", xlabel="column", ylabel="row")
    axes.grid(False)
    figure.colorbar(image)
    return figure
