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
from lib.blocks import Figure, Gallery, Heading, Table, Words, table_of, write_page
from lib.figures import (
    COLOURS,
    MARKS,
    column,
    draw_constants,
    draw_threshold,
    figure_png,
    new_figure,
    plot_reliability,
)

NAMES = {
    "auc": "AUC",
    "f2": "F2",
    "recall": "recall",
    "specificity": "specificity",
    "precision": "precision",
}
JUDGED = ("auc", "recall", "specificity")  # as lib/audit/slices.py
MARKED = (
    "F2-optimal",
    "recall at least 0.95",
    "a miss costs 10 false alarms",
    "stored in the checkpoint",
    "one half",
)
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
        Heading("The price of a threshold"),
        *threshold_blocks(scores, tables),
        Heading("What a probability is worth"),
        *calibration_blocks(scores, tables["reliability"]),
        Heading("Slices"),
        *slice_blocks(scores, tables["slices"]),
        Heading("Where the model looks"),
        *shortcut_blocks(tables["shortcut"]),
        Heading("The most confident errors"),
        *error_blocks(tables["errors"], shown, patches, maps),
        Heading("What was audited"),
        Table(("what", "value"), list_facts(scores)),
    ]
    data = scores["data"]
    title = f"{scores['checkpoint']['path']} on {data['split']} of {data['directory']}"
    return write_page(path, f"Model audit: {title}", blocks)


def number(value, form: str = ".3f") -> str:
    """A number in this form; a score without a value is undefined."""
    if value is None or math.isnan(value):
        return "undefined"
    return f"{value:{form}}".replace("inf", "\N{INFINITY}")


def span(row: dict, name: str = "value", form: str = ".3f") -> str:
    """A figure of a row with its interval, where it has one, in one piece."""
    prefix = "" if name == "value" else f"{name}_"
    low, high = row[f"{prefix}low"], row[f"{prefix}high"]
    text = number(row[name], form)
    if math.isnan(low):
        return text
    return f"{text}\N{NO-BREAK SPACE}({low:.2f}\N{EN DASH}{high:.2f})"


def headline_blocks(scores: dict) -> list:
    """The table that a reader takes away."""
    worst, base = scores["worst_confirmed_slice"], scores["constant_baselines"]
    constants = (0.5, base["always_positive_f2"], 1.0, 0.0, base["prevalence"])
    header, rows = ["score", "all patches", "always positive"], []
    for (name, text), constant in zip(NAMES.items(), constants, strict=True):
        row = [text, span(scores["global"][name]), number(constant)]
        if worst:
            both = [span(worst, name), number(worst[f"rest_{name}"])] if name in worst else ["", ""]
            row += both
        rows.append(row)
    if not worst:
        note = f"Of {scores['num_slices']} slices none is confirmed to be worse than the rest."
        return [Table(header, rows), Words(note, "note")]
    name = slice_name(worst)
    note = (
        f"{name}: {worst['num']:,} patches, {worst['num_positive']:,} of them positive; F2 is"
        f" {number(worst['always_positive_f2'])} if all are called so. It fell furthest behind the"
        f" rest on the half that finds; here it has {worst['error_ratio']:.1f} times as many"
        f" errors, by {NAMES[worst['measure']]}."
    )
    return [Table([*header, f"worst slice: {name}", "the rest"], rows), Words(note, "note")]


def threshold_blocks(scores: dict, tables: dict) -> list:
    """Tables and figures of thresholds."""
    rows, measures = tables["thresholds"], ("recall", "specificity", "precision", "f2")
    prefix = "flagged_share_at_"
    shares = [name.removeprefix(prefix) for name in rows[0] if name.startswith(prefix)]
    decisions, meanings = [], []
    for row in rows:
        spans = [span(row, name) for name in measures]
        decisions.append((row["rule"], number(row["threshold"], ".4f"), *spans))
        meanings.append((row["rule"], *(meaning(row, share) for share in shares)))
    always = [f"{rows[0][f'always_positive_f2_at_{at}']:.2f} at {float(at):.0%}" for at in shares]
    prices = figure_png(plot_prices(rows))
    prevalence = scores["constant_baselines"]["prevalence"]
    curves = figure_png(plot_curves(tables["curves"], rows, prevalence))
    return [
        Words(
            "Always positive and always negative need no model: a threshold is worth what it has"
            " above them.",
            "note",
        ),
        Table(("rule", "threshold", *(NAMES[name] for name in measures)), decisions),
        Figure("Tumours missed, and normal patches called tumour, at each threshold", prices),
        Figure("ROC and precision over recall", curves),
        Heading("Where tumour is rarer: share flagged, precision, F2", 3),
        Table(("rule", *(f"{float(at):.0%} positive" for at in shares)), meanings),
        Words(
            "By Bayes' rule from recall and specificity above. F2 of calling every patch positive:"
            f" {', '.join(always)}.",
            "note",
        ),
    ]


def meaning(row: dict, share: str) -> str:
    """What a threshold means where so many patches are positive: share flagged, precision, F2."""
    flagged, precision = row[f"flagged_share_at_{share}"], row[f"precision_at_{share}"]
    f2 = number(row[f"f2_at_{share}"], ".2f")
    return f"{number(flagged, '.1%')}, {number(precision, '.1%')}, {f2}"


def calibration_blocks(scores: dict, bins: list[dict]) -> list:
    """The scores of calibration and the reliability diagram."""
    header = (
        "probabilities",
        "temperature",
        "offset",
        "ECE",
        "ECE by chance, at most",
        "Brier",
        "NLL (nats)",
    )
    rows = []
    for row in scores["calibration"]:
        scaling = [number(row[name]) for name in ("temperature", "offset")]
        errors = [number(row[name], ".4f") for name in ("ece", "ece_by_chance", "brier", "nll")]
        rows.append((row["probabilities"], *scaling, *errors))
    note = (
        "ECE of 15 bins of equal width; by chance: what 95 of 100 samples this large show if every"
        " probability is right."
    )
    drawn = figure_png(plot_reliability(bins))
    return [Table(header, rows), Words(note, "note"), Figure("Reliability", drawn)]


def slice_blocks(scores: dict, slices: list[dict]) -> list:
    """The dot plot and the table of slices, of slides those with the lowest scores."""
    slides = [row for row in slices if row["feature"] == "slide"]
    slides.sort(key=lowest_score)
    shown = [row for row in slices if row["feature"] != "slide"] + slides[:MOST_SLIDES]
    header = (
        "slice",
        "worse by",
        "patches",
        "positive",
        "F2",
        "always positive",
        "recall",
        "AUC",
        "specificity",
    )
    rows = []
    for row in shown:
        confirmed = row["confirmed"].split()
        marks = [NAMES[name] + ("*" if name in confirmed else "") for name in row["found"].split()]
        constant = number(row["always_positive_f2"], ".2f")
        spans = [span(row, name, ".2f") for name in ("recall", "auc", "specificity")]
        scored = (span(row, "f2", ".2f"), constant, *spans)
        rows.append((slice_name(row), ", ".join(marks), row["num"], row["num_positive"], *scored))
    note = (
        "No slice is defined by a label or by what the model says; of a feature they are fifths of"
        " the half that finds, and two together at either end. Worse: AUC, recall or specificity"
        f" falls behind the rest of that half, {slices[0]['num_tried']} comparisons corrected for"
        " (Benjamini-Hochberg, 5% of false discoveries). Confirmed (*, orange; else yellow): its"
        " interval on the other half lies below the rest there. F2 follows how many of a slice's"
        " patches are positive and is not compared. Undefined: a class is missing; no interval:"
        " too few groups to resample."
    )
    if slides:
        note += (
            f" A slide lies in one half: its own patches are halved. The {MOST_SLIDES} lowest of"
            f" {len(slides)} are shown."
        )
    dots = figure_png(plot_slices(shown, scores["global"]))
    table = Table(header, rows, dense=True)
    return [Words(note, "note"), Figure("Scores by slice", dots), table]


def lowest_score(row: dict) -> float:
    """The lowest of a slice's scores that are compared; 1 where it has none."""
    return min((row[name] for name in JUDGED if not math.isnan(row[name])), default=1.0)


def slice_name(row: dict) -> str:
    return f"{row['feature'].replace('_', ' ')} {row['slice']}"


def shortcut_blocks(rows: list[dict]) -> list:
    """What covering and exchanging does, a line a probe, and the other measures."""
    by_probe, others = {}, []
    for row in rows:
        is_region = row["probe"].startswith(("as it is", "ring", "centre"))
        if is_region and row["measure"] in PROBED:
            by_probe.setdefault(row["probe"], {})[row["measure"]] = span(row)
        else:
            others.append((row["probe"], row["measure"], span(row), number(row["constant"])))
    lines = [
        (probe, *(spans.get(measure, "") for measure in PROBED))
        for probe, spans in by_probe.items()
    ]
    note = (
        "The label depends on the centre 32x32 alone. One view each. A constant model has AUC 0.5"
        " and moves by 0. Tissue beside tumour is mostly tumour, so the ring tells something"
        " without being a cheat."
    )
    return [
        Words(note, "note"),
        Table(("probe", *PROBED), lines),
        Table(("probe", "measure", "value", "constant model"), others),
    ]


def error_blocks(errors: list[dict], shown: list[dict], patches, maps) -> list:
    """Galleries of false positives and negatives."""
    note = (
        "Beside each: where hiding a block of 16x16 pixels takes evidence for tumour away (red) or"
        " adds to it (blue), each map in its own scale. The frame is the centre 32x32. errors.csv"
        " has all errors."
    )
    if patches is None:
        note = f"Pictures of patches are left out. {note}"
    blocks = [Words(note, "note")]
    for kind in ("false positive", "false negative"):
        tiles, captions = [], []
        for place, row in enumerate(shown):
            if row["kind"] == kind:
                tile = pair(None if patches is None else patches[place], maps[place])
                reach = np.abs(maps[place]).max()
                tiles.append(tile.repeat(ZOOM, 0).repeat(ZOOM, 1))
                captions.append(f"{caption(row)}; moves the logit by up to {reach:.2g}")
        num = sum(row["kind"] == kind for row in errors)
        blocks.append(Heading(f"{kind.capitalize()}s: {num:,}, the most confident first", 3))
        if tiles:
            blocks.append(Gallery(tiles, captions, tiles[0].shape[1]))
        else:
            blocks.append(Words("none", "note"))
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
    colours = colormaps["RdBu_r"](0.5 + 0.5 * evidence / reach)[..., :3]
    heat = outline((255 * colours).round().astype(np.uint8), CENTRE)
    if patch is None:
        return heat
    gap = np.full((len(heat), GAP_PX, 3), 255, np.uint8)
    return np.concatenate([outline(patch, CENTRE), gap, heat], 1)


def list_facts(scores: dict) -> list[tuple]:
    """What was audited, to be found again."""
    checkpoint, scaling = scores["checkpoint"], scores["checkpoint"]["calibration"]
    calibration = "not calibrated"
    if scaling:
        calibration = f"{scaling['temperature']:.4f}, {scaling['offset']:.4f}"
    facts = [
        ("checkpoint", checkpoint["path"]),
        ("its SHA-256", checkpoint["sha256"]),
        ("weights SHA-256", checkpoint["weights_sha256"]),
        ("threshold", number(checkpoint["threshold"], ".4f")),
        ("temperature, offset", calibration),
        ("views", str(checkpoint["views"])),
        *scores["data"]["sha256"].items(),
    ]
    for half in scores["halves"]:
        counts = f"{half['num']:,} patches, {half['num_positive']:,} positive"
        facts.append((half["use"], f"{counts}, {half['num_groups']:,} {half['groups']}"))
    return [*facts, ("commit", scores["commit"] or "not in a git repository")]


def plot_curves(points: list[dict], thresholds: list[dict], prevalence: float):
    """ROC and precision-recall with bands, and where the thresholds lie."""
    figure, panels = new_figure(2, 5.2, 4.2)
    for axes, curve in zip(panels, ("roc", "pr"), strict=True):
        rows = [row for row in points if row["curve"] == curve]
        x = column(rows, "x")
        axes.fill_between(x, column(rows, "low"), column(rows, "high"), alpha=0.25, linewidth=0)
        axes.plot(x, column(rows, "y"))
    draw_constants(*panels, prevalence)
    marked = [row for row in thresholds if row["rule"] in MARKED]
    for number, row in enumerate(marked):
        rates = 1 - row["specificity"], row["recall"], row["precision"]
        label = f"{row['rule']} ({row['threshold']:.3g})"
        style = {"marker": MARKS[number], "color": COLOURS[number + 1], "markersize": 6}
        draw_threshold(*panels, *rates, label=label, **style)
    panels[1].legend(loc="lower left")
    return figure


def plot_prices(rows: list[dict]):
    """What each threshold misses, and what it calls in vain, in % and with intervals."""
    rows = [row for row in rows if not row["rule"].startswith("always")]
    figure, (axes,) = new_figure(1, 8.5, 0.9 + 0.3 * len(rows))
    for name, label, colour, offset in (
        ("recall", "tumours missed", COLOURS[1], -0.14),
        ("specificity", "normal patches called tumour", COLOURS[0], 0.14),
    ):
        places = np.arange(len(rows)) + offset
        value, high, low = (
            100 - 100 * np.array([row[name + end] for row in rows]) for end in ("", "_low", "_high")
        )
        axes.hlines(places, low, high, color=colour)
        axes.plot(value, places, "o", color=colour, label=label)
    labels = [f"{row['rule']} ({row['threshold']:.3g})" for row in rows]
    axes.set(yticks=range(len(rows)), yticklabels=labels, ylim=(len(rows) - 0.5, -0.5))
    axes.set(xlabel="% of them", xlim=(0, None))
    axes.legend()
    return figure


def plot_slices(rows: list[dict], overall: dict):
    """AUC, recall and specificity of slices with intervals, beside those of all patches
    (dotted).
    """
    figure, panels = new_figure(len(JUDGED), 4.4, 1.2 + 0.2 * len(rows))
    for axes, name in zip(panels, JUDGED, strict=True):
        for place, row in enumerate(rows):
            colour = COLOURS[0]
            if name in row["confirmed"].split():
                colour = COLOURS[1]
            elif name in row["found"].split():
                colour = COLOURS[4]
            axes.hlines(place, row[f"{name}_low"], row[f"{name}_high"], color=colour)
            axes.plot(row[name], place, "o", color=colour)
        value = overall[name]["value"]
        axes.axvline(value, color="black", linestyle=":")
        axes.set(title=f"{NAMES[name]} ({value:.3f})", ylim=(len(rows) - 0.4, -0.6))
        axes.set(yticks=range(len(rows)), yticklabels=[])
    panels[0].set_yticklabels([slice_name(row) for row in rows], fontsize=8)
    return figure


def plot_errors(shown: list[dict], patches: np.ndarray, maps: np.ndarray):
    """The gallery as one picture, false positives before false negatives."""
    tiles = [pair(patch, evidence) for patch, evidence in zip(patches, maps, strict=True)]
    return plot_gallery(tiles, [f"{row['kind']}, {caption(row)}" for row in shown], PAIRS_A_ROW)
