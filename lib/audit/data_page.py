"""The page of a data audit: how many patches of what there are, what was found, with pictures, and
the power of each check.
"""

import textwrap
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

from lib.audit import rank_findings
from lib.audit.plant import LEAST_POWER, REASONS_OF
from lib.audit.survey import Survey
from lib.blocks import Figure, Gallery, Heading, Table, Words, show, table_of, write_page
from lib.figures import figure_png, new_figure, plot_counts, plot_histograms

MOST_PICTURES, MOST_ROWS, NUM_BINS = 16, 12, 50
NUM_SUSPECTS = 4  # pictures of a reason in the gallery of all reasons
PIXELS_AN_INCH, CAPTION_PX, LETTER_PX = 71, 28, 5  # in that gallery
COLUMNS = ("severity", "check", "split", "count", "measured", "advice")
POWER = ("planted", "in", "found", "recall", "false alarms", "found on the clean copy")
PLACES = ("top", "bottom", "left", "right", "height", "width")  # of a block in a patch
FRAME = (0, 158, 115)  # of an outline, RGB
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
    counts = []
    for survey in surveys:
        for label in (0, 1, -1):
            num = int((survey.labels == label).sum())
            counts.append({"split": survey.name, "label": label, "count": num})
    ranked = rank_findings(findings)
    blocks = [
        Heading("What there is"),
        Figure("Patches per split and class", figure_png(plot_counts(counts))),
        Heading("What was found"),
        table_of(ranked, COLUMNS),
    ]
    if power:
        keys = ("planted", "num", "found", "recall", "false_alarms", "on_clean")
        rows = [[row[key] for key in keys] for row in power]
        blocks.append(Heading("How much of planted damage is found, on a copy of these data"))
        blocks.append(Table(POWER, rows))
    else:
        blocks.append(
            Words(
                "The power of these checks on these data is not measured: audit.py data ... --plant"
                " does.",
                "note",
            )
        )
    for finding in ranked:
        blocks += finding_blocks(finding, surveys, power)
    histograms = figure_png(plot_histograms(feature_histograms(surveys)))
    blocks += [Heading("How the splits look"), Figure("Features by split", histograms)]
    return write_page(path, title, blocks)


def finding_blocks(finding: dict, surveys: list[Survey], power: list[dict]) -> list:
    """One finding: its sentence, the power of its check, pictures or rows, and where in the
    patch.
    """
    split, rows = finding["split"], finding["rows"]
    blocks = [
        Heading(f"{finding['check']} in {split}" if split else finding["check"]),
        Words(finding["measured"], "alarm" if finding["severity"] == "error" else "note"),
    ]
    if finding["advice"]:
        blocks.append(Words(finding["advice"], "note"))
    blocks += power_blocks(finding, power)
    by_name = {survey.name: survey for survey in surveys}
    kind = finding["check"].removeprefix("values: ")
    if kind in ("nan", "range"):
        heat = figure_png(plot_heat(by_name[split].heat[kind], kind))
        blocks.append(Figure("Where in the patch", heat))
    pictured = [row for row in rows if row.get("split") in by_name and "index" in row]
    if pictured:
        patches, captions = [], []
        for row in thin_out(pictured, MOST_PICTURES):
            for side, index, caption in sides(row):
                patches.append(outline(by_name[side].read([index])[0], row))
                captions.append(caption)
        blocks.append(Gallery(patches, captions))
    elif rows:
        blocks.append(table_of(rows[:MOST_ROWS]))
    return blocks


def power_blocks(finding: dict, power: list[dict]) -> list[Words]:
    """How much the check behind a finding found of planted damage."""
    reasons = {row["reason"] for row in finding["rows"] if row.get("reason")}
    reasons = reasons or REASONS_OF.get(finding["check"].split()[0], ())
    blocks = []
    for row in sorted(power, key=lambda row: row["reason"]):
        if row["reason"] not in reasons:
            continue
        sentence = (
            f"Planted on a copy of these data ({row['planted']}): {row['found']} of {row['num']}"
            f" found, {row['false_alarms']} false alarms."
        )
        if row["recall"] < LEAST_POWER:
            sentence += " No power on these data: that nothing is found says nothing."
        blocks.append(Words(sentence, "note"))
    return blocks


def thin_out(rows: list, most: int) -> list:
    """At most so many of the rows, evenly spaced."""
    step = -(-len(rows) // most)
    return rows[::step]


def sides(row: dict):
    """The patches that a row speaks of, (split, index, caption): its own, and the one that it is a
    copy of.
    """
    skipped = ("split", "index", "of", "reason", *PLACES)
    facts = ", ".join(f"{name} {show(value)}" for name, value in row.items() if name not in skipped)
    yield row["split"], row["index"], f"{row['split']} {row['index']}: {facts}"
    if "of" in row:
        split, _, index = str(row["of"]).rpartition(" ")
        split = split or row["split"]
        yield split, int(index), f"of {split} {index}"


def outline(patch: np.ndarray, row: dict) -> np.ndarray:
    """The patch with a frame around the block that a row names, just outside of it."""
    if "top" not in row:
        return patch
    last = len(patch) - 1
    bottom = row.get("bottom", row["top"] + row.get("height", 1) - 1)
    right = row.get("right", row["left"] + row.get("width", 1) - 1)
    top, left = max(row["top"] - 2, 0), max(row["left"] - 2, 0)
    bottom, right = min(bottom + 2, last), min(right + 2, last)
    patch = patch.copy()
    patch[[top, bottom], left : right + 1] = FRAME
    patch[top : bottom + 1, [left, right]] = FRAME
    return patch


def feature_histograms(surveys: list[Survey]) -> list[dict]:
    """Rows of split, feature, unit, low, high and num: intact patches in each bin, the same bins
    for all splits.
    """
    surveys = [survey for survey in surveys if len(survey.intact)]
    if not surveys:
        return []
    rows = []
    for name, unit in UNITS.items():
        values = {survey.name: survey.table[name][survey.intact] for survey in surveys}
        low, high = np.quantile(np.concatenate(list(values.values())), (0.002, 0.998))
        edges = np.linspace(low, high, NUM_BINS + 1)
        for split, column in values.items():
            counts, _ = np.histogram(column, edges)
            for place, num in enumerate(counts.tolist()):
                start, end = edges[place : place + 2].tolist()
                row = {"split": split, "feature": name, "unit": unit}
                row |= {"low": round(start, 5), "high": round(end, 5), "num": num}
                rows.append(row)
    return rows


def plot_suspects(surveys: list[Survey], findings: list[dict]):
    """Pictures of suspect patches, a few of each reason; None where there are none."""
    by_name, by_reason = {survey.name: survey for survey in surveys}, {}
    for finding in findings:
        for row in finding["rows"]:
            if row.get("reason") and row["split"] in by_name:
                by_reason.setdefault(row["reason"], []).append(row)
    patches, captions = [], []
    for reason, rows in by_reason.items():
        for row in thin_out(rows, NUM_SUSPECTS):
            patches.append(outline(by_name[row["split"]].read([row["index"]])[0], row))
            captions.append(f"{reason} {row['split']} {row['index']}")
    return plot_gallery(patches, captions) if patches else None


def plot_gallery(patches: list[np.ndarray], captions: list[str], num_columns: int = 8):
    """Pictures uint8 (H, W, 3) of one size in rows, each with a caption below."""
    num_rows = -(-len(patches) // num_columns)
    height, width, _ = patches[0].shape
    size = (width * num_columns / PIXELS_AN_INCH, (height + CAPTION_PX) * num_rows / PIXELS_AN_INCH)
    figure, panels = plt.subplots(num_rows, num_columns, figsize=size, squeeze=False)
    for axes in panels.flat:
        axes.axis("off")
    for axes, patch, caption in zip(panels.flat, patches, captions, strict=False):
        # or nobody would see white ones
        framed = np.pad(patch, ((1, 1), (1, 1), (0, 0)), constant_values=190)
        axes.imshow(framed)
        text = "\n".join(textwrap.wrap(caption, width // LETTER_PX)[:3])
        axes.text(0.5, -0.04, text, fontsize=7, ha="center", va="top", transform=axes.transAxes)
    return figure


def plot_heat(heat: np.ndarray, kind: str):
    """How many patches have damage at each pixel."""
    figure, (axes,) = new_figure(1, width=4.6, height=3.8)
    image = axes.imshow(heat, cmap="magma", vmin=0)
    axes.set(title=f"patches with {kind} at a pixel", xlabel="column", ylabel="row")
    axes.grid(False)
    figure.colorbar(image)
    return figure
