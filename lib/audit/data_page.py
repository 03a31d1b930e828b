"""The page of a data audit: how many patches of what there are, what was found, with pictures, and
the power of each check.
"""

import textwrap
from collections import defaultdict
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

from lib.audit import rank_findings
from lib.audit.survey import Survey
from lib.blocks import Figure, Gallery, Heading, Words, show, table_of, write_page
from lib.figures import figure_png, line_style, new_figure
from lib.files import write_csv
from lib.pcam import PATCH_SHAPE

MOST_PICTURES, MOST_ROWS, NUM_BINS = 16, 12, 50
NUM_SUSPECTS = 4  # pictures of a reason in the gallery of all reasons
PIXELS_AN_INCH, CAPTION_PX, LETTER_PX = 71, 28, 5  # in that gallery
COLUMNS = ("severity", "check", "split", "count", "measured", "advice")
POWER = ("planted", "num", "found", "recall", "false_alarms", "on_clean")
BINS = ("split", "feature", "unit", "low", "high", "num")  # of histograms.csv
PLACES = ("top", "bottom", "left", "right", "height", "width")  # of a block in a patch
FRAME, FRAME_PX = (0, 158, 115), 2  # of an outline: RGB, and how far outside of the block
UNITS = {
    "brightness": "0 to 255",
    "saturation": "0 to 1",
    "haematoxylin": "optical density",
    "sharpness": "ratio",
}
UNKNOWN_POWER = (
    "The power of these checks on these data is not measured: audit.py data ... --plant does."
)


def write_data_page(audit) -> Path:
    """Write the page of an audit of lib/audit/data/run.py, which begins with its verdict."""
    ranked = rank_findings(audit.findings)
    blocks = [Words(sentence) for sentence in audit.conclude()]
    blocks += [Heading("What there is"), *audit.figures]
    blocks += [Heading("What was found"), table_of(ranked, COLUMNS)]
    if audit.power:
        blocks.append(Heading("How much of planted damage is found, on a copy of these data"))
        blocks.append(table_of(audit.power, POWER))
    else:
        blocks.append(Words(UNKNOWN_POWER, "note"))
    for finding in ranked:
        blocks += finding_blocks(finding, audit.surveys)
    return write_page(audit.out / "audit.html", f"Data audit of {audit.directory}", blocks)


def draw_splits(out: Path, surveys: list[Survey]) -> list[Figure]:
    """How many patches of each class the splits have, and how they look; writes
    OUT/histograms.csv.
    """
    histograms, rows = plot_histograms([survey for survey in surveys if len(survey.intact)])
    write_csv(out / "histograms.csv", BINS, rows)
    return [
        Figure("Patches per split and class", figure_png(plot_counts(surveys)), "counts.png"),
        Figure("Features by split", figure_png(histograms), "histograms.png"),
    ]


def finding_blocks(finding: dict, surveys: list[Survey]) -> list:
    """One finding: its sentence, pictures or rows, and where in the patch."""
    check, split, rows = finding["check"], finding["split"], finding["rows"]
    blocks = [
        Heading(f"{check} in {split}" if split else check),
        Words(finding["measured"], "alarm" if finding["severity"] == "error" else "note"),
        Words(finding["advice"], "note"),
    ]
    by_name = {survey.name: survey for survey in surveys}
    if check in ("values: nan", "values: range"):
        blocks.append(Figure("Where in the patch", figure_png(plot_heat(rows))))
    pictured = [row for row in rows if row.get("split") in by_name and "index" in row]
    patches, captions = [], []
    for row in thin_out(pictured, MOST_PICTURES):
        patches.append(read_patch(by_name, row))
        captions.append(describe_row(row))
        if "of" in row:  # the patch that it is a copy of
            split_of, _, index = f"{row['of']}".rpartition(" ")
            place = {"split": split_of or row["split"], "index": int(index)}
            patches.append(read_patch(by_name, place))
            captions.append(f"of {place['split']} {index}")
    if patches:
        blocks.append(Gallery(patches, captions))
    elif rows:
        blocks.append(table_of(rows[:MOST_ROWS]))
    return blocks


def thin_out(rows: list, most: int) -> list:
    """At most so many of the rows, evenly spaced."""
    return rows[:: -(-len(rows) // most) or 1]


def read_patch(surveys: dict[str, Survey], row: dict) -> np.ndarray:
    """The patch uint8 (96, 96, 3) that a row names, with a frame around the block that it names."""
    (patch,) = surveys[row["split"]].read([row["index"]])
    return outline(patch, row)


def describe_row(row: dict) -> str:
    """What a row says of a patch."""
    skipped = ("split", "index", "of", "reason", *PLACES)
    facts = [f"{name} {show(value)}" for name, value in row.items() if name not in skipped]
    return f"{row['split']} {row['index']}: {', '.join(facts)}"


def outline(patch: np.ndarray, row: dict) -> np.ndarray:
    """The patch with a frame around the block that a row names, just outside of it."""
    if "top" not in row:
        return patch
    top, left = row["top"], row["left"]
    bottom = row.get("bottom", top + row.get("height", 1) - 1)
    right = row.get("right", left + row.get("width", 1) - 1)
    sides = np.array([top - FRAME_PX, bottom + FRAME_PX, left - FRAME_PX, right + FRAME_PX])
    top, bottom, left, right = sides.clip(0, len(patch) - 1)
    patch = patch.copy()
    patch[[top, bottom], left : right + 1] = FRAME
    patch[top : bottom + 1, [left, right]] = FRAME
    return patch


def plot_suspects(path: Path, surveys: list[Survey], findings: list[dict]) -> None:
    """Draw a file with pictures of suspect patches, a few of each reason; none where there are
    none.
    """
    by_name, by_reason = {survey.name: survey for survey in surveys}, defaultdict(list)
    for finding in findings:
        for row in finding["rows"]:
            if row.get("reason"):
                by_reason[row["reason"]].append(row)
    shown = [row for rows in by_reason.values() for row in thin_out(rows, NUM_SUSPECTS)]
    patches = [read_patch(by_name, row) for row in shown]
    captions = [f"{row['reason']} {row['split']} {row['index']}" for row in shown]
    if patches:
        path.write_bytes(figure_png(plot_gallery(patches, captions)))


def plot_gallery(patches: list[np.ndarray], captions: list[str], num_columns: int = 8):
    """Pictures uint8 (H, W, 3) of one size in rows, each with a caption above."""
    num_rows = -(-len(patches) // num_columns)
    height, width, _ = patches[0].shape
    size_px = np.array([width * num_columns, (height + CAPTION_PX) * num_rows])
    figure = plt.figure(figsize=size_px / PIXELS_AN_INCH)
    for place, (patch, caption) in enumerate(zip(patches, captions, strict=True)):
        axes = figure.add_subplot(num_rows, num_columns, place + 1)
        # framed, or nobody would see white ones
        axes.imshow(np.pad(patch, ((1, 1), (1, 1), (0, 0)), constant_values=190))
        axes.set_title(textwrap.fill(caption, width // LETTER_PX), fontsize=7)
        axes.axis("off")
    return figure


def plot_heat(rows: list[dict]):
    """How many patches have damage at each pixel, from rows that name the block."""
    heat = np.zeros(PATCH_SHAPE[:2], np.int64)
    for row in rows:
        heat[row["top"] : row["bottom"] + 1, row["left"] : row["right"] + 1] += 1
    figure, (axes,) = new_figure(1, width=4.6, height=3.8)
    image = axes.imshow(heat, cmap="magma", vmin=0)
    axes.set(title="patches with such a block at a pixel", xlabel="column", ylabel="row")
    axes.grid(False)
    figure.colorbar(image)
    return figure


def plot_counts(surveys: list[Survey]):
    """Bars of the patches per split and class."""
    figure, (axes,) = new_figure(1, width=7)
    places = np.arange(len(surveys))
    for label, name in {0: "negative", 1: "positive", -1: "without label"}.items():
        counts = [(survey.labels == label).sum() for survey in surveys]
        if any(counts):
            offset = 0.28 * (label % 3 - 0.5)
            bars = axes.bar(places + offset, counts, 0.26, label=name)
            axes.bar_label(bars, fmt="{:,.0f}", fontsize=8)
    names = [survey.name for survey in surveys]
    axes.set(xticks=places, xticklabels=names, ylabel="patches")
    axes.legend()
    return figure


def plot_histograms(surveys: list[Survey]) -> tuple:
    """An axes for each feature of UNITS, with a line for each split's intact patches, and the rows
    of histograms.csv; the bins are the same for all splits.
    """
    figure, panels = new_figure(len(UNITS), width=3.4)
    rows = []
    for axes, (feature, unit) in zip(panels, UNITS.items(), strict=True):
        values = [survey.table[feature][survey.intact] for survey in surveys]
        if surveys:
            low, high = np.quantile(np.concatenate(values), (0.002, 0.998))
            edges = np.linspace(low, high, NUM_BINS + 1).round(5)
        for number, survey in enumerate(surveys):
            nums, _ = np.histogram(values[number], edges)
            shares = nums / max(nums.sum(), 1)
            axes.stairs(shares, edges, label=survey.name, **line_style(number))
            axes.legend()
            for low, high, num in zip(edges[:-1], edges[1:], nums, strict=True):
                rows.append((survey.name, feature, unit, low, high, num))
        axes.set(title=feature, xlabel=unit)
    panels[0].set_ylabel("share of the intact patches")
    return figure, rows
