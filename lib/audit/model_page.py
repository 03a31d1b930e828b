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
from lib.blocks import Figure, Gallery, Heading, Table, Words, table_of, write_page
from lib.figures import figure_png

NAMES = TITLES | {"f2": "F2", "precision": "precision"}
PRICED = ("recall", "specificity", "precision", "f2")
CALIBRATION = ("probabilities", "temperature", "offset", "ece", "ece_by_chance", "brier", "nll")
REGIONS = ("as it is", "ring", "centre")  # begin the name of a probe
PROBED = ("AUC", "mean move of the probability", "share of decisions changed")
MOST_SLIDES = 20  # slides that are shown, those with the lowest scores
CENTRE = {"top": 32, "left": 32, "height": 32, "width": 32}
PAIRS_A_ROW, GAP_PX, ZOOM = 4, 8, 2  # of pictures of errors


def write_model_page(
    path, scores: dict, findings: list[dict], tables: dict, shown: list[dict], patches, maps
) -> Path:
    """Write the page. `shown`: rows of errors, with maps (B, 96, 96) of evidence and patches uint8
    (B, 96, 96, 3), or None.
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
    chapters = {  # by the table that a part of the audit makes
        "thresholds": ("The price of a threshold", threshold_blocks, scores, tables),
        "reliability": ("What a probability is worth", calibration_blocks, scores, tables),
        "slices": ("Slices", slice_blocks, scores, tables),
        "shortcut": ("Where the model looks", shortcut_blocks, tables),
        "errors": ("The most confident errors", error_blocks, tables, shown, patches, maps),
    }
    for table, (title, build_blocks, *arguments) in chapters.items():
        if table in tables:
            blocks += [Heading(title), *build_blocks(*arguments)]
    blocks += [Heading("What was audited"), Table(("what", "value"), list_facts(scores))]
    data = scores["data"]
    title = f"{scores['checkpoint']['path']} on {data['split']} of {data['directory']}"
    return write_page(path, f"Model audit: {title}", blocks)


def number(value, form: str = ".3f") -> str:
    """A number in this form; a score without a value is undefined."""
    return "undefined" if value is None or math.isnan(value) else f"{value:{form}}"


def span(row: dict, name: str = "", form: str = ".3f") -> str:
    """A figure of a row with its interval, where it has one, in one piece."""
    keys = (name, f"{name}_low", f"{name}_high") if name else ("value", "low", "high")
    value, low, high = (row[key] for key in keys)
    if math.isnan(low):
        return number(value, form)
    return f"{number(value, form)}\N{NO-BREAK SPACE}({low:.2f}\N{EN DASH}{high:.2f})"


def headline_blocks(scores: dict) -> list:
    """The table that a reader takes away."""
    worst, base = scores["worst_confirmed_slice"], scores["constant_baselines"]
    constants = (0.5, base["always_positive_f2"], 1.0, 0.0, base["prevalence"])
    note = f"Of {scores['num_slices']} slices none is confirmed to be worse than the rest."
    if not scores["num_slices"]:
        note = "Slices were not judged."
    if worst:
        slice_text = slice_name(worst)
        note = (
            f"{slice_text}: {worst['num']:,} patches, {worst['num_positive']:,} of them positive;"
            f" F2 is {number(worst['always_positive_f2'])} if all are called so. It fell furthest"
            " behind the rest on the half that finds; here it has"
            f" {worst['error_ratio']:.1f} times as many errors, by {NAMES[worst['measure']]}."
        )
    rows = []
    for (name, title), constant in zip(NAMES.items(), constants, strict=True):
        row = {
            "score": title,
            "all patches": span(scores["global"][name]),
            "always positive": number(constant),
        }
        if worst and name in worst:
            row[f"worst slice: {slice_text}"] = span(worst, name)
            row["the rest"] = number(worst[f"rest_{name}"])
        rows.append(row)
    return [table_of(rows), Words(note, "note")]


def threshold_blocks(scores: dict, tables: dict) -> list:
    """Tables and figures of thresholds."""
    rows = tables["thresholds"]
    prefix = "flagged_share_at_"
    shares = [name.removeprefix(prefix) for name in rows[0] if name.startswith(prefix)]
    decisions, meanings = [], []
    for row in rows:
        decision = {"rule": row["rule"], "threshold": number(row["threshold"], ".4f")}
        meaning = {"rule": row["rule"]}
        for name in PRICED:
            decision[NAMES[name]] = span(row, name)
        for share in shares:
            flagged = number(row[f"flagged_share_at_{share}"], ".1%")
            precision = number(row[f"precision_at_{share}"], ".1%")
            f2 = number(row[f"f2_at_{share}"], ".2f")
            meaning[f"{float(share):.0%} positive"] = f"{flagged}, {precision}, {f2}"
        decisions.append(decision)
        meanings.append(meaning)
    prices = figure_png(plot_prices(rows))
    missed = "Tumours missed, and normal patches called tumour, at each threshold"
    prevalence = scores["constant_baselines"]["prevalence"]
    curves = figure_png(plot_curves(tables["curves"], rows, prevalence))
    note = (
        "Always positive and always negative need no model: a threshold is worth what it has above"
        " them."
    )
    return [
        Words(note, "note"),
        table_of(decisions),
        Figure(missed, prices, "prices.png"),
        Figure("ROC and precision over recall", curves, "curves.png"),
        Heading("Where tumour is rarer: share flagged, precision, F2", 3),
        table_of(meanings),
        Words("By Bayes' rule from recall and specificity above.", "note"),
    ]


def calibration_blocks(scores: dict, tables: dict) -> list:
    """The scores of calibration and the reliability diagram."""
    note = (
        "ECE of 15 bins of equal width; by chance: what 95 of 100 samples this large show if every"
        " probability is right. NLL in nats."
    )
    drawn = figure_png(plot_reliability(tables["reliability"]))
    table = table_of(scores["calibration"], CALIBRATION)
    title = "Reliability; the area of a marker shows how many patches are in its bin"
    return [table, Words(note, "note"), Figure(title, drawn, "reliability.png")]


def slice_blocks(scores: dict, tables: dict) -> list:
    """The dot plot and the table of slices, of slides those lowest on the half that finds."""
    slices = tables["slices"]
    slides = [row for row in slices if row["feature"] == "slide"]
    slides.sort(key=lowest_score)
    shown = [row for row in slices if row["feature"] != "slide"] + slides[:MOST_SLIDES]
    rows = []
    for row in shown:
        confirmed = row["confirmed"].split()
        marks = [
            f"{NAMES[name]}*" if name in confirmed else NAMES[name] for name in row["found"].split()
        ]
        cells = {
            "slice": slice_name(row),
            "worse by": ", ".join(marks),
            "patches": row["num"],
            "positive": row["num_positive"],
            "F2": span(row, "f2", ".2f"),
            "always positive": number(row["always_positive_f2"], ".2f"),
        }
        for name in TITLES:
            cells[NAMES[name]] = span(row, name, ".2f")
        rows.append(cells)
    note = (
        "No slice is defined by a label or by what the model says; of a feature they are fifths of"
        " the half that finds, and two together at either end. Worse: AUC, recall or specificity"
        f" falls behind the rest of that half, {slices[0]['num_tried']} comparisons corrected for"
        " (Benjamini-Hochberg, 5% of false discoveries). Confirmed (*, orange; else yellow): the"
        " interval of its gap to the rest on the other half lies above 0. F2 follows how many of a"
        " slice's patches are positive and is not compared. Undefined: a class is missing; no"
        " interval: too few groups to resample."
    )
    if slides:
        note += (
            f" A slide lies in one half: its own patches are halved. Of {len(slides)} the"
            f" {MOST_SLIDES} are shown that are lowest on the half that finds."
        )
    dots = figure_png(plot_slices(shown, scores["global"]))
    drawn = Figure("Scores by slice", dots, "slices.png")
    return [Words(note, "note"), drawn, table_of(rows)]


def lowest_score(row: dict) -> float:
    """The lowest of a slice's scores on the half that finds; 1 where it has none.

    The other half judges. A slide chosen there would look worse than it is.
    """
    scores = [row[f"finding_{name}"] for name in TITLES]
    return min(np.nan_to_num(scores, nan=1.0))


def shortcut_blocks(tables: dict) -> list:
    """What covering and exchanging does, a line a probe, and the other measures."""
    by_probe, others = {}, []
    for row in tables["shortcut"]:
        probe, measure = row["probe"], row["measure"]
        if probe.startswith(REGIONS) and measure in PROBED:
            by_probe.setdefault(probe, {"probe": probe})[measure] = span(row)
        else:
            constant = number(row["constant"])
            cells = {"value": span(row), "constant model": constant}
            others.append({"probe": probe, "measure": measure, **cells})
    note = (
        "The label depends on the centre 32x32 alone. One view each. A constant model has AUC 0.5"
        " and moves by 0. Tissue beside tumour is mostly tumour, so the ring tells something"
        " without being a cheat."
    )
    return [Words(note, "note"), table_of(list(by_probe.values())), table_of(others)]


def error_blocks(tables: dict, shown: list[dict], patches, maps) -> list:
    """Galleries of false positives and negatives."""
    note = (
        "Beside each: where hiding a block of 16x16 pixels takes evidence for tumour away (red) or"
        " adds to it (blue), each map in its own scale. The frame is the centre 32x32. errors.csv"
        " has all errors."
    )
    if patches is None:
        note = f"Pictures of patches are left out. {note}"
        patches = [None] * len(shown)
    blocks = [Words(note, "note")]
    for kind in ("false positive", "false negative"):
        tiles, captions = [], []
        for row, patch, evidence in zip(shown, patches, maps, strict=True):
            if row["kind"] == kind:
                reach = np.abs(evidence).max()
                captions.append(f"{caption(row)}; moves the logit by up to {reach:.2g}")
                tiles.append(pair(patch, evidence).repeat(ZOOM, 0).repeat(ZOOM, 1))
        num = sum(row["kind"] == kind for row in tables["errors"])
        blocks.append(Heading(f"{kind.capitalize()}s: {num:,}, the most confident first", 3))
        blocks.append(Gallery(tiles, captions))
    return blocks


def caption(row: dict) -> str:
    """The row, the probability and, where it is known, the slide of an error."""
    slide = f", {row['slide']}" if row["slide"] else ""
    return f"row {row['index']}, p = {row['probability']:.3f}{slide}"


def pair(patch, evidence: np.ndarray) -> np.ndarray:
    """A patch and its map side by side, uint8 (96, 200, 3), or the map alone; the centre in a
    frame.
    """
    reach = np.abs(evidence).max() or 1.0
    heat = colormaps["RdBu_r"](0.5 + 0.5 * evidence / reach, bytes=True)[..., :3]
    heat = outline(heat, CENTRE)
    if patch is None:
        return heat
    gap = np.full((len(heat), GAP_PX, 3), 255, np.uint8)
    return np.concatenate([outline(patch, CENTRE), gap, heat], 1)


def list_facts(scores: dict) -> list[tuple]:
    """What was audited, to be found again."""
    checkpoint = scores["checkpoint"]
    scaling = checkpoint["calibration"] or {"temperature": None, "offset": None}
    facts = {
        "checkpoint": checkpoint["path"],
        "its SHA-256": checkpoint["sha256"],
        "weights SHA-256": checkpoint["weights_sha256"],
        "threshold": checkpoint["threshold"],
        "temperature": scaling["temperature"],
        "offset": scaling["offset"],
        "views": checkpoint["views"],
        **scores["data"]["sha256"],
        "commit": scores["commit"] or "not in a git repository",
    }
    for half in scores["halves"]:
        counts = f"{half['num']:,} patches, {half['num_positive']:,} positive"
        facts[half["use"]] = f"{counts}, {half['num_groups']:,} {half['groups']}"
    return list(facts.items())


def plot_errors(shown: list[dict], patches: np.ndarray, maps: np.ndarray):
    """The gallery as one picture, false positives before false negatives."""
    tiles = [pair(patch, evidence) for patch, evidence in zip(patches, maps, strict=True)]
    return plot_gallery(tiles, [f"{row['kind']}, {caption(row)}" for row in shown], PAIRS_A_ROW)
