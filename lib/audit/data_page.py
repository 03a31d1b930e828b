"""The page of a data audit: its verdict, what there is, what was found, with pictures, and the
power of each check.
"""

import textwrap
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

from lib.audit import rank_findings
from lib.audit.survey import Survey
from lib.blocks import Figure, Gallery, Heading, Words, show, table_of, write_page
from lib.figures import figure_png, new_figure

MOST_PICTURES, MOST_ROWS = 16, 12
NUM_SUSPECTS = 4  # pictures of a finding in the gallery of all suspects
PIXELS_AN_INCH, CAPTION_PX, LETTER_PX = 71, 28, 5  # in that gallery
COLUMNS = ("severity", "check", "split", "count", "measured", "advice")
POWER = ("planted", "num", "found", "recall", "false_alarms")
FRAME, FRAME_PX = (0, 158, 115), 2  # of an outline: RGB, and how far outside of the block
# columns of a row that a caption does not repeat
UNSAID = ("split", "index", "of", "reason", "top", "left", "height", "width")


def write_data_page(audit) -> Path:
    """Write the page of an audit of lib/audit/data/run.py, which begins with its verdict."""
    ranked = rank_findings(audit.findings)
    blocks = [Words(sentence) for sentence in audit.conclude()]
    blocks += [Heading("What there is"), plot_counts(audit.surveys)]
    blocks += [Heading("What was found"), table_of(ranked, COLUMNS)]
    if audit.power:
        blocks.append(Heading("How much of planted damage is found, on a copy of these data"))
        blocks.append(table_of(audit.power, POWER))
    by_name = {survey.name: survey for survey in audit.surveys}
    for finding in ranked:
        check, split = finding["check"], finding["split"]
        blocks.append(Heading(f"{check} in {split}" if split else check))
        kind = "alarm" if finding["severity"] == "error" else "note"
        blocks.append(Words(f"{finding['measured']}. {finding['advice']}", kind))
        patches, captions = read_suspects(by_name, finding["rows"], MOST_PICTURES)
        if patches:
            blocks.append(Gallery(patches, captions))
        elif finding["rows"]:
            blocks.append(table_of(finding["rows"][:MOST_ROWS]))
    return write_page(audit.out / "audit.html", f"Data audit of {audit.directory}", blocks)


def read_suspects(surveys: dict[str, Survey], rows: list[dict], most: int) -> tuple[list, list]:
    """Patches uint8 (96, 96, 3) and captions of at most `most` rows that name a patch, evenly
    spaced, each followed by the patch that it is a copy of.
    """
    rows = [row for row in rows if row.get("split") in surveys and "index" in row]
    patches, captions = [], []
    for row in rows[:: -(-len(rows) // most) or 1]:
        (patch,) = surveys[row["split"]].read([row["index"]])
        patches.append(outline(patch, row) if "top" in row else patch)
        facts = [f"{name} {show(value)}" for name, value in row.items() if name not in UNSAID]
        captions.append(f"{row['split']} {row['index']}: {', '.join(facts)}")
        if "of" in row:  # a row of the same split, or a split and a row
            split, index = f"{row['split']} {row['of']}".split()[-2:]
            patches.extend(surveys[split].read([int(index)]))
            captions.append(f"of {split} {index}")
    return patches, captions


def outline(patch: np.ndarray, row: dict) -> np.ndarray:
    """The patch with a frame around the block that a row names, just outside of it."""
    top, left = row["top"], row["left"]
    bottom, right = top + row["height"] - 1, left + row["width"] - 1
    sides = np.array([top - FRAME_PX, bottom + FRAME_PX, left - FRAME_PX, right + FRAME_PX])
    top, bottom, left, right = sides.clip(0, len(patch) - 1)
    patch = patch.copy()
    patch[[top, bottom], left : right + 1] = FRAME
    patch[top : bottom + 1, [left, right]] = FRAME
    return patch


def plot_suspects(path: Path, surveys: list[Survey], findings: list[dict]) -> None:
    """Draw a file with pictures of suspect patches, a few of each finding; none where there are
    none.
    """
    by_name = {survey.name: survey for survey in surveys}
    patches, captions = [], []
    for finding in findings:
        suspects = [row for row in finding["rows"] if row.get("reason")]
        pictures, names = read_suspects(by_name, suspects, NUM_SUSPECTS)
        patches += pictures
        captions += [f"{finding['check']}, {name.partition(':')[0]}" for name in names]
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


def plot_counts(surveys: list[Survey]) -> Figure:
    """How many patches of each class the splits have."""
    figure, (axes,) = new_figure(1, width=7)
    places = np.arange(len(surveys))
    for label, title in enumerate(("negative", "positive")):
        counts = [(survey.labels == label).sum() for survey in surveys]
        bars = axes.bar(places + 0.28 * label, counts, 0.26, label=title)
        axes.bar_label(bars, fmt="{:,.0f}", fontsize=8)
    axes.set_xticks(places + 0.14, [survey.name for survey in surveys])
    axes.set_ylabel("patches")
    axes.legend()
    return Figure("Patches per split and class", figure_png(figure), "counts.png")
