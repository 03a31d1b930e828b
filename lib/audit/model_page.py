"""The page of a model audit: the global figure beside the worst slice, what a threshold costs,
calibration, slices, shortcuts, and the worst errors, with what the model saw in them.
"""

import math
from pathlib import Path

import numpy as np
from matplotlib import colormaps

from lib.audit import rank_findings
from lib.audit.data_page import outline, plot_gallery
from lib.audit.evaluation import PUBLISHED
from lib.audit.slices import JUDGED
from lib.blocks import Figure, Heading, Table, Words, table_of, write_page
from lib.figures import COLOURS, column, figure_png, new_figure, plot_decisions

PRICED = ("recall", "specificity", "precision", "f2")
SHOWN = ("auc", *PRICED)
TITLES = {
    "auc": "AUC",
    "f2": "F2",
    "ece": "ECE",
    "nll": "NLL",
    "num": "patches",
    "num_positive": "positive",
    "always_positive_f2": "F2, always positive",
}
CENTRE = {"top": 32, "left": 32, "height": 32, "width": 32}
PAIRS_A_ROW = 3  # of pictures of errors
NUM_PICTURES = 12  # of false positives, and of false negatives


def write_model_page(path, audit, with_patches: bool) -> Path:
    """Write the page of an Audit of lib/audit/model.py, and its pictures beside it. Without patches
    it shows maps alone of the errors.
    """
    scores = audit.scores
    data = scores["data"]
    columns = ("severity", "check", "measured", "limit", "advice")
    blocks = evaluation_blocks(audit) if "evaluation" in audit.tables else []
    blocks += headline_blocks(audit)
    blocks += [Heading("What was found"), table_of(rank_findings(audit.findings), columns)]
    chapters = {
        "thresholds": threshold_blocks,
        "reliability": calibration_blocks,
        "slices": slice_blocks,
        "shortcut": shortcut_blocks,
    }
    for table, build_chapter in chapters.items():
        if table in audit.tables:
            blocks += build_chapter(audit)
    if audit.tables.get("errors"):
        blocks += error_blocks(audit, with_patches)
    checkpoint = scores["checkpoint"]
    facts = f"Checkpoint SHA-256 {checkpoint['sha256']}, commit {scores['commit']}."
    blocks.append(Words(facts, "note"))
    title = f"{checkpoint['path']} on {data['split']} of {data['directory']}"
    return write_page(path, f"Model audit: {title}", blocks)


def interval_text(value: float, low: float, high: float) -> str:
    """A score with its interval, where it has one, in one piece; one without a value is
    undefined.
    """
    text = "undefined" if math.isnan(value) else f"{value:.3f}"
    if math.isnan(low):
        return text
    return f"{text}\N{NO-BREAK SPACE}({low:.2f}\N{EN DASH}{high:.2f})"


def score_table(rows: list[dict], *columns: str) -> Table:
    """A table of some columns of rows, of scores with their intervals."""
    lines = []
    for row in rows:
        line = []
        for name in columns:
            cell = row.get(name)
            if f"{name}_low" in row:
                cell = interval_text(cell, row[f"{name}_low"], row[f"{name}_high"])
            line.append(cell)
        lines.append(line)
    return Table([title_of(name) for name in columns], lines)


def title_of(name: str) -> str:
    """The name of a column in words."""
    return TITLES.get(name, name.replace("_", " "))


def evaluation_blocks(audit) -> list:
    """Scores of all patches, and of one of each group of equal ones, beside published ones."""
    split = audit.split.name
    columns = ("rows", "num", "auc", "f2", "sensitivity", "specificity", "always_positive_f2")
    table = score_table(audit.tables["evaluation"], *columns)
    blocks = [Heading(f"Scores on all of {split}"), table]
    if split == "test":
        blocks.append(Words("Published, on the official test split:"))
        blocks.append(Table(["who", "accuracy", "AUC"], PUBLISHED))
    return blocks


def headline_blocks(audit) -> list:
    """The table that a reader takes away, and the curves."""
    scores = audit.scores
    overall = {name: interval_text(*scores["global"][name].values()) for name in SHOWN}
    rows = [{"patches": "all"} | overall]
    worst = scores["worst_confirmed_slice"]
    if worst:
        rest = {name: worst[f"rest_{name}"] for name in JUDGED}
        rows.append({"patches": f"worst slice: {slice_name(worst)}"} | worst)
        rows.append({"patches": "the rest"} | rest)
    always = scores["constant_baselines"]["always_positive_f2"]
    note = (
        f"Scores are those of {scores['num_judged']:,} patches, one half; thresholds and slices"
        " were chosen on the other; errors are those of all. In brackets: 95% intervals,"
        f" {scores['num_groups']:,} slides or groups resampled. Always positive has F2"
        f" {always:.3f}."
    )
    curves = figure_png(plot_decisions(*audit.answers.half(1), audit.answers.threshold))
    return [
        Heading("The global figure and the worst slice"),
        Words(note, "note"),
        score_table(rows, "patches", *SHOWN),
        Figure("ROC, precision over recall, and the decisions", curves, "curves.png"),
    ]


def threshold_blocks(audit) -> list:
    """What each threshold costs."""
    rows = audit.tables["thresholds"]
    note = "Always positive needs no model: a threshold is worth what it has above that."
    labels = [f"{row['rule']} ({row['threshold']:.3g})" for row in rows]
    figure = plot_scores(rows, labels, ("recall", "specificity"), audit.scores["global"])
    title = "Scores at each threshold; dotted: at the stored one"
    return [
        Heading("The price of a threshold"),
        Words(note, "note"),
        score_table(rows, "rule", "threshold", *PRICED),
        Figure(title, figure_png(figure), "prices.png"),
    ]


def calibration_blocks(audit) -> list:
    """What a probability is worth."""
    note = "ECE of 15 bins of equal width. NLL in nats."
    figure = figure_png(plot_reliability(audit.tables["reliability"]))
    return [
        Heading("What a probability is worth"),
        Words(note, "note"),
        score_table(audit.scores["calibration"], "probabilities", "ece", "brier", "nll"),
        Figure("Reliability", figure, "reliability.png"),
    ]


def slice_blocks(audit) -> list:
    """The scores of each slice."""
    rows = audit.tables["slices"]
    note = (
        "A slice is a fifth of the patches by a feature of the image, never by the label or by what"
        " the model says. Confirmed (orange): AUC, recall or specificity falls behind the rest on"
        " both halves, so that the 95% interval of the gap lies above 0. Chance alone does that in"
        " one of 1,600 comparisons."
    )
    columns = ("feature", "slice", "confirmed", "num", "num_positive", *JUDGED)
    labels = [slice_name(row) for row in rows]
    figure = plot_scores(rows, labels, JUDGED, audit.scores["global"])
    return [
        Heading("Slices"),
        Words(note, "note"),
        score_table(rows, *columns),
        Figure("Scores by slice; dotted: of all patches", figure_png(figure), "slices.png"),
    ]


def shortcut_blocks(audit) -> list:
    """What exchanged centres and rings do to the AUC."""
    note = (
        "The label depends on the centre 32x32 alone. One view each. Tissue beside tumour is mostly"
        " tumour, so the ring tells something without being a cheat."
    )
    table = score_table(audit.tables["shortcut"], "probe", "auc")
    return [Heading("Where the model looks"), Words(note, "note"), table]


def slice_name(row: dict) -> str:
    """A slice in words: its feature and which part of it."""
    return f"{row['feature'].replace('_', ' ')} {row['slice']}"


def plot_scores(rows: list[dict], labels: list[str], names, overall: dict):
    """A panel for each of some scores, with a line for each row: its value and interval, beside the
    `value` over all patches at the stored threshold (dotted). A slice that is confirmed to be worse
    is orange.
    """
    num = len(rows)
    places = range(num)
    colours = [COLOURS[1] if row.get("confirmed") else COLOURS[0] for row in rows]
    figure, panels = new_figure(len(names), width=4.4, height=1.2 + 0.2 * num)
    for axes, name in zip(panels, names, strict=True):
        lows = column(rows, f"{name}_low")
        highs = column(rows, f"{name}_high")
        axes.hlines(places, lows, highs, colors=colours)
        axes.scatter(column(rows, name), places, s=16, c=colours)
        axes.axvline(overall[name]["value"], color="black", linestyle=":")
        axes.set_title(title_of(name))
        axes.set_yticks(places, labels if axes is panels[0] else [""] * num, fontsize=8)
        axes.set_ylim(num - 0.4, -0.6)  # the first on top
    return figure


def plot_reliability(rows: list[dict]):
    """Share of positives, with its 95% interval, against the mean probability of each bin."""
    figure, (axes,) = new_figure(1, 6, 4.5)
    axes.plot((0, 1), (0, 1), color="black", linestyle=":")
    mean = column(rows, "mean_probability")
    lows = column(rows, "positive_share_low")
    highs = column(rows, "positive_share_high")
    axes.vlines(mean, lows, highs)
    axes.scatter(mean, column(rows, "positive_share"))
    axes.set(xlabel="mean probability of a bin", ylabel="share of positives")
    return figure


def error_blocks(audit, with_patches: bool) -> list:
    """A picture of false positives and negatives."""
    note = (
        "The most confident come first. Beside each: where hiding a block of 16x16 pixels takes"
        " evidence for tumour away (red) or adds to it (blue), each map in its own scale. The frame"
        " is the centre 32x32. errors.csv has all errors."
    )
    errors = audit.tables["errors"]
    shown = [row for row in errors if row["rank"] <= NUM_PICTURES]
    tiles = []
    captions = []
    for row, patch, evidence in zip(shown, audit.patches, audit.maps, strict=True):
        tiles.append(draw_error(patch, evidence, with_patches))
        captions.append(f"{row['kind']}, row {row['index']}, p = {row['probability']:.3f}")
    picture = figure_png(plot_gallery(tiles, captions, PAIRS_A_ROW))
    return [
        Heading("The most confident errors"),
        Words(note, "note"),
        Figure(f"The first of {len(errors):,} errors", picture, "errors.png"),
    ]


def draw_error(patch: np.ndarray, evidence: np.ndarray, with_patch: bool) -> np.ndarray:
    """A patch and its map side by side, uint8 (96, 192, 3), the centre in a frame; or the map
    alone.
    """
    reach = np.abs(evidence).max() or 1.0
    heat = colormaps["RdBu_r"](0.5 + 0.5 * evidence / reach, bytes=True)[..., :3]
    return np.concatenate([outline(patch, CENTRE), heat], 1) if with_patch else heat
