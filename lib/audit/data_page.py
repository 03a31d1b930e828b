"""The page of a data audit: how many patches of what there are, what was found, with pictures, and
the power of each check.
"""

import textwrap
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

from lib.audit import rank_findings
from lib.audit.survey import Survey
from lib.blocks import Figure, Gallery, Heading, Words, show, table_of, write_page
from lib.figures import column, figure_png, line_style, new_figure

MOST_PICTURES, MOST_ROWS, NUM_BINS = 16, 12, 50
NUM_SUSPECTS = 4  # pictures of a reason in the gallery of all reasons
PIXELS_AN_INCH, CAPTION_PX, LETTER_PX = 71, 28, 5  # in that gallery
COLUMNS = ("severity", "check", "split", "count", "measured", "advice")
POWER = ("planted", "num", "found", "recall", "false_alarms", "on_clean")
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


def write_data_page(
    path,
    title: str,
    verdict: list[str],
    surveys: list[Survey],
    findings: list[dict],
    power: list[dict],
) -> Path:
    """Write the page of an audit of these splits, which begins with the verdict's sentences."""
    counts = []
    for survey in surveys:
        for label in (0, 1, -1):
            count = int((survey.labels == label).sum())
            counts.append({"split": survey.name, "label": label, "count": count})
    ranked = rank_findings(findings)
    blocks = [
        *(Words(sentence) for sentence in verdict),
        Heading("What there is"),
        Figure("Patches per split and class", figure_png(plot_counts(counts)), "counts.png"),
        Heading("What was found"),
        table_of(ranked, COLUMNS),
    ]
    if power:
        blocks.append(Heading("How much of planted damage is found, on a copy of these data"))
        blocks.append(table_of(power, POWER))
    else:
        blocks.append(Words(UNKNOWN_POWER, "note"))
    for finding in ranked:
        blocks += finding_blocks(finding, surveys)
    histograms = figure_png(plot_histograms(feature_histograms(surveys)))
    blocks += [
        Heading("How the splits look"),
        Figure("Features by split", histograms, "histograms.png"),
    ]
    return write_page(path, title, blocks)


def finding_blocks(finding: dict, surveys: list[Survey]) -> list:
    """One finding: its sentence, pictures or rows, and where in the patch."""
    split, rows = finding["split"], finding["rows"]
    blocks = [
        Heading(f"{finding['check']} in {split}" if split else finding["check"]),
        Words(finding["measured"], "alarm" if finding["severity"] == "error" else "note"),
        Words(finding["advice"], "note"),
    ]
    by_name = {survey.name: survey for survey in surveys}
    kind = finding["check"].removeprefix("values: ")
    if kind in ("nan", "range"):
        heat = figure_png(plot_heat(by_name[split].heat[kind], kind))
        blocks.append(Figure("Where in the patch", heat))
    pictured = [row for row in rows if row.get("split") in by_name and "index" in row]
    if pictured:
        patches, captions = [], []
        for row in thin_out(pictured, MOST_PICTURES):
            patches.append(read_patch(by_name, row))
            captions.append(describe_row(row))
            if "of" in row:  # the patch that it is a copy of
                split_of, _, index = str(row["of"]).rpartition(" ")
                place = {"split": split_of or row["split"], "index": int(index)}
                patches.append(read_patch(by_name, row | place))
                captions.append(f"of {place['split']} {index}")
        blocks.append(Gallery(patches, captions))
    elif rows:
        blocks.append(table_of(rows[:MOST_ROWS]))
    return blocks


def thin_out(rows: list, most: int) -> list:
    """At most so many of the rows, evenly spaced."""
    step = -(-len(rows) // most)
    return rows[::step]


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
    last = len(patch) - 1
    top, bottom = np.clip((top - FRAME_PX, bottom + FRAME_PX), 0, last)
    left, right = np.clip((left - FRAME_PX, right + FRAME_PX), 0, last)
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
        ends = edges.round(5).tolist()
        for split, of_split in values.items():
            counts, _ = np.histogram(of_split, edges)
            for place, num in enumerate(counts.tolist()):
                row = {"split": split, "feature": name, "unit": unit}
                rows.append(row | {"low": ends[place], "high": ends[place + 1], "num": num})
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
            patches.append(read_patch(by_name, row))
            captions.append(f"{reason} {row['split']} {row['index']}")
    return plot_gallery(patches, captions) if patches else None


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


def plot_heat(heat: np.ndarray, kind: str):
    """How many patches have damage at each pixel."""
    figure, (axes,) = new_figure(1, width=4.6, height=3.8)
    image = axes.imshow(heat, cmap="magma", vmin=0)
    axes.set(title=f"patches with {kind} at a pixel", xlabel="column", ylabel="row")
    axes.grid(False)
    figure.colorbar(image)
    return figure


def plot_counts(rows: list[dict]):
    """Bars of the patches per split and class: rows of split, label (-1: without one) and count."""
    figure, (axes,) = new_figure(1, width=7)
    splits = list(dict.fromkeys(row["split"] for row in rows))
    count_of = {(row["split"], int(row["label"])): int(row["count"]) for row in rows}
    names = {0: "negative", 1: "positive", -1: "without label"}
    for number, (label, name) in enumerate(names.items()):
        counts = [count_of.get((split, label), 0) for split in splits]
        if label == -1 and not any(counts):
            continue
        places = np.arange(len(splits)) + 0.28 * (number - 0.5)
        bars = axes.bar(places, counts, 0.26, label=name)
        axes.bar_label(bars, fmt="{:,.0f}", fontsize=8)
    axes.set(xticks=range(len(splits)), xticklabels=splits, ylabel="patches")
    axes.legend()
    return figure


def plot_histograms(rows: list[dict]):
    """An axes for each feature, a line for each split: rows of split, feature, unit, low, high and
    num.
    """
    units = {row["feature"]: row["unit"] for row in rows}
    splits = dict.fromkeys(row["split"] for row in rows)
    figure, panels = new_figure(max(1, len(units)), width=3.4)
    for axes, (feature, unit) in zip(panels, units.items(), strict=False):
        for number, split in enumerate(splits):
            bins = [row for row in rows if (row["split"], row["feature"]) == (split, feature)]
            num = column(bins, "num")
            edges = [float(bins[0]["low"]), *column(bins, "high")]
            axes.stairs(num / max(num.sum(), 1), edges, label=split, **line_style(number))
        axes.set(title=feature, xlabel=unit)
        axes.legend()
    panels[0].set_ylabel("share of the intact patches")
    return figure
