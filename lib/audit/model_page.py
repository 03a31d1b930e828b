"""The page of a model audit: the global figure beside the worst slice, what a threshold costs,
calibration, slices, shortcuts, and the worst errors in their own colours, with what the model saw
in them.
"""

import math
from pathlib import Path

import numpy as np
from matplotlib import colormaps

from lib.audit import rank_findings
from lib.audit.data_page import outline, plot_gallery
from lib.audit.model_plots import (
    TITLES,
    plot_curves,
    plot_prices,
    plot_reliability,
    plot_slices,
    slice_name,
)
from lib.audit.resampling import PREVALENCES
from lib.blocks import Figure, Gallery, Heading, Table, Words, table_of, write_page
from lib.figures import figure_png

PRICED = {"recall": "recall", "specificity": "specificity", "precision": "precision", "f2": "F2"}
NAMES = TITLES | {"f2": "F2", "precision": "precision"}
MEANINGS = {"rule": "rule"}
for share in PREVALENCES:
    for name, title in {"flagged_share": "flagged", "precision": "precision", "f2": "F2"}.items():
        MEANINGS[f"{name}_at_{share:g}"] = f"{title}, {share:.0%} positive"
# of a table of the audit: its name, a title, a note, columns as {name: title}, and what is drawn of
# it, as {file: (title, function of tables and scores)}
CHAPTERS = (
    (
        "thresholds",
        "The price of a threshold",
        "Always positive and always negative need no model: a threshold is worth what it has above"
        " them.",
        {"rule": "rule", "threshold": "threshold"} | PRICED,
        {
            "prices.png": ("Scores at each threshold; dotted: at the stored one", plot_prices),
            "curves.png": ("ROC and precision over recall", plot_curves),
        },
    ),
    (
        "thresholds",
        "Where tumour is rarer",
        "By Bayes' rule from recall and specificity above.",
        MEANINGS,
        {},
    ),
    (
        "calibration",
        "What a probability is worth",
        "ECE of 15 bins of equal width; by chance: what 95 of 100 samples this large show if every"
        " probability is right. NLL in nats.",
        {
            "probabilities": "probabilities",
            "temperature": "temperature",
            "offset": "offset",
            "ece": "ECE",
            "ece_by_chance": "ECE by chance",
            "brier": "Brier score",
            "nll": "NLL",
        },
        {"reliability.png": ("Reliability; area: patches in a bin", plot_reliability)},
    ),
    (
        "slices",
        "Slices",
        "No slice is defined by a label or by what the model says; of a feature they are fifths of"
        " the half that finds, and two together at either end. Found: AUC, recall or specificity"
        " falls behind the rest of that half, corrected for the number of comparisons"
        " (Benjamini-Hochberg, 5% of false discoveries). Confirmed (orange; found alone: yellow):"
        " the interval of its gap to the rest on the other half lies above 0. F2 follows how many"
        " of a slice's patches are positive and is not compared. Undefined: a class is missing; no"
        " interval: too few groups to resample. A slide lies in one half: its own patches are"
        " halved, and of slides the 20 are shown that are lowest on the half that finds.",
        {
            "feature": "feature",
            "slice": "slice",
            "found": "found",
            "confirmed": "confirmed",
            "num": "patches",
            "num_positive": "positive",
            "f2": "F2",
            "always_positive_f2": "always positive",
        }
        | TITLES,
        {"slices.png": ("Scores by slice; dotted: of all patches", plot_slices)},
    ),
    (
        "shortcut",
        "Where the model looks",
        "The label depends on the centre 32x32 alone. One view each. Tissue beside tumour is mostly"
        " tumour, so the ring tells something without being a cheat.",
        {"probe": "probe", "measure": "measure", "value": "value", "constant": "constant model"},
        {},
    ),
)
MOST_SLIDES = 20  # slides that are shown, those with the lowest scores
CENTRE = {"top": 32, "left": 32, "height": 32, "width": 32}
PAIRS_A_ROW = 4  # of pictures of errors
GAP_PX = 8
ZOOM = 2


def write_model_page(path, scores: dict, findings: list[dict], tables: dict, gallery) -> Path:
    """Write the page. `gallery`: rows of errors, patches uint8 (B, 96, 96, 3) or None, and maps (B,
    96, 96) of evidence.
    """
    half = scores["halves"][1]
    note = (
        f"Scores are those of {half['num']:,} patches, one half; thresholds, temperatures and"
        " slices were chosen on the other; errors are those of all. In brackets: 95% intervals,"
        f" {half['num_groups']:,} {half['groups']} resampled."
    )
    columns = ("severity", "check", "measured", "limit", "advice")
    blocks = [
        Words(note, "note"),
        Heading("The global figure and the worst slice"),
        *headline_blocks(scores),
        Heading("What was found"),
        table_of(rank_findings(findings), columns),
    ]
    shown = tables | {"calibration": scores["calibration"]}
    shown["slices"] = choose_slices(tables.get("slices", []))
    for table, title, note, columns, figures in CHAPTERS:
        if shown.get(table):
            blocks += [Heading(title), Words(note, "note"), score_table(shown[table], columns)]
            for file, (caption, plot) in figures.items():
                blocks.append(Figure(caption, figure_png(plot(shown, scores)), file))
    if "errors" in tables:
        blocks += [Heading("The most confident errors"), *error_blocks(tables["errors"], *gallery)]
    blocks += [Heading("What was audited"), *fact_blocks(scores)]
    data = scores["data"]
    title = f"{scores['checkpoint']['path']} on {data['split']} of {data['directory']}"
    return write_page(path, f"Model audit: {title}", blocks)


def choose_slices(rows: list[dict]) -> list[dict]:
    """The slices that are shown: all but slides, and the slides with the lowest scores on the half
    that finds. The other half judges: a slide chosen there would look worse than it is.
    """

    def lowest_score(row: dict) -> float:
        scores = [row[f"finding_{name}"] for name in TITLES]
        return min(np.nan_to_num(scores, nan=1.0))

    slides = [row for row in rows if row["feature"] == "slide"]
    others = [row for row in rows if row["feature"] != "slide"]
    return others + sorted(slides, key=lowest_score)[:MOST_SLIDES]


def interval_text(value: float, low: float, high: float) -> str:
    """A score with its interval, where it has one, in one piece; one without a value is
    undefined.
    """
    text = "undefined" if math.isnan(value) else f"{value:.3f}"
    if math.isnan(low):
        return text
    return f"{text}\N{NO-BREAK SPACE}({low:.2f}\N{EN DASH}{high:.2f})"


def score_table(rows: list[dict], columns: dict[str, str]) -> Table:
    """A table of rows, with `columns` as {name: title}; of scores with their intervals."""
    lines = []
    for row in rows:
        line = []
        for name in columns:
            # the interval of `value` is low and high
            prefix = "" if name == "value" else f"{name}_"
            cell = row.get(name)
            if f"{prefix}low" in row:
                cell = interval_text(cell, row[f"{prefix}low"], row[f"{prefix}high"])
            elif cell != cell:
                cell = "undefined"
            line.append(cell)
        lines.append(line)
    return Table(list(columns.values()), lines)


def headline_blocks(scores: dict) -> list:
    """The table that a reader takes away."""
    worst = scores["worst_confirmed_slice"]
    base = scores["constant_baselines"]
    overall = {name: interval_text(*scores["global"][name].values()) for name in NAMES}
    constants = (0.5, 1.0, 0.0, base["always_positive_f2"], base["prevalence"])
    rows = [
        overall | {"of": "all patches"},
        dict(zip((*NAMES, "of"), (*constants, "always positive"), strict=True)),
    ]
    note = "Slices were not judged."
    if scores["num_slices"]:
        note = f"Of {scores['num_slices']} slices none is confirmed to be worse than the rest."
    if worst:
        rest = {name: worst.get(f"rest_{name}") for name in NAMES}
        rows += [worst | {"of": f"worst slice: {slice_name(worst)}"}, rest | {"of": "the rest"}]
        note = (
            f"{slice_name(worst)}: {worst['num']:,} patches, {worst['num_positive']:,} of them"
            f" positive; F2 is {worst['always_positive_f2']:.3f} if all are called so. It fell"
            " furthest behind the rest on the half that finds; here it has"
            f" {worst['error_ratio']:.1f} times as many errors, by {NAMES[worst['measure']]}."
        )
    return [score_table(rows, {"of": "patches"} | NAMES), Words(note, "note")]


def error_blocks(errors: list[dict], shown: list[dict], patches, maps) -> list:
    """A gallery of false positives and negatives."""
    note = (
        "The most confident come first. Beside each: where hiding a block of 16x16 pixels takes"
        " evidence for tumour away (red) or adds to it (blue), each map in its own scale. The frame"
        " is the centre 32x32. errors.csv has all errors."
    )
    if patches is None:
        note = f"Pictures of patches are left out. {note}"
    kinds = [row["kind"] for row in errors]
    counts = [f"{kinds.count(kind):,} {kind}s" for kind in ("false positive", "false negative")]
    tiles = [tile.repeat(ZOOM, 0).repeat(ZOOM, 1) for tile in draw_pairs(patches, maps)]
    gallery = Gallery(tiles, list_captions(shown, maps))
    return [Words(", ".join(counts)), Words(note, "note"), gallery]


def list_captions(shown: list[dict], maps: np.ndarray) -> list[str]:
    """The kind, the row, the probability and, where it is known, the slide of errors."""
    captions = []
    for row, evidence in zip(shown, maps, strict=True):
        slide = f", {row['slide']}" if row["slide"] else ""
        place = f"{row['kind']}, row {row['index']}, p = {row['probability']:.3f}{slide}"
        captions.append(f"{place}; moves the logit by up to {np.abs(evidence).max():.2g}")
    return captions


def draw_pairs(patches, maps: np.ndarray) -> list[np.ndarray]:
    """Patches and their maps side by side, uint8 (96, 200, 3) each, or the maps alone where patches
    are None; the centre in a frame.
    """
    tiles = []
    for place, evidence in enumerate(maps):
        reach = np.abs(evidence).max() or 1.0
        heat = colormaps["RdBu_r"](0.5 + 0.5 * evidence / reach, bytes=True)[..., :3]
        tile = outline(heat, CENTRE)
        if patches is not None:
            gap = np.full((len(heat), GAP_PX, 3), 255, np.uint8)
            tile = np.concatenate([outline(patches[place], CENTRE), gap, tile], 1)
        tiles.append(tile)
    return tiles


def plot_errors(shown: list[dict], patches: np.ndarray, maps: np.ndarray):
    """The gallery as one picture, false positives before false negatives."""
    return plot_gallery(draw_pairs(patches, maps), list_captions(shown, maps), PAIRS_A_ROW)


def fact_blocks(scores: dict) -> list:
    """What was audited, to be found again."""
    data = scores["data"]
    checkpoint = scores["checkpoint"]
    facts = data | data["sha256"] | (checkpoint["calibration"] or {}) | checkpoint
    facts["commit"] = scores["commit"] or "not in a git repository"
    rows = [fact for fact in facts.items() if not isinstance(fact[1], dict)]
    return [Table(("what", "value"), rows), table_of(scores["halves"])]
