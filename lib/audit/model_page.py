"""The page of a model audit: the global figure beside the worst slice, what a threshold costs,
calibration, slices, shortcuts, and the worst errors in their own colours, with what the model saw
in them."""

import math
from pathlib import Path

import matplotlib
import numpy as np

from lib.audit.data_page import outline
from lib.blocks import gallery, note, picture, section, table, write_page
from lib.figures import COLOURS, MARKS, figure_png, new_figure, patch_png, plot_reliability

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
PAIRS_A_ROW, GAP_PX, CAPTION_PX, ZOOM = 4, 8, 26, 2  # of pictures of errors


def write_model_page(
    path, scores: dict, findings: list[dict], tables: dict, shown: list[dict], patches, maps
) -> Path:
    """Write the page. `shown`: rows of errors, with maps (B, 96, 96) of evidence and patches uint8
    (B, 96, 96, 3), or None.
    """
    ranked = sorted(
        findings, key=lambda found: ("error", "warning", "note").index(found["severity"])
    )
    columns, half = ("severity", "check", "measured", "limit", "advice"), scores["halves"][1]
    words = (
        f"Scores are those of {half['num']:,} patches, one half; thresholds, temperatures and"
        " slices were chosen on the "
    )
    words += (
        f"other; errors are those of all. In brackets: 95% intervals, {half['num_groups']:,}"
        f" {half['groups']} resampled."
    )
    sections = [
        note(words),
        section("The global figure and the worst slice", *headline(scores)),
        section(
            "What was found",
            table(columns, [[found[name] for name in columns] for found in ranked]),
        ),
        section("The price of a threshold", *threshold_parts(scores, tables)),
        section("What a probability is worth", *calibration_parts(scores, tables["reliability"])),
        section("Slices", *slice_parts(scores, tables["slices"])),
        section("Where the model looks", *shortcut_parts(tables["shortcut"])),
        section("The most confident errors", *error_parts(tables["errors"], shown, patches, maps)),
        section("What was audited", table(("what", "value"), list_facts(scores))),
    ]
    data = scores["data"]
    return write_page(
        path,
        f"Model audit: {scores['checkpoint']['path']} on {data['split']} of {data['directory']}",
        sections,
    )


def number(value, form: str = ".3f") -> str:
    return (
        "undefined"
        if value is None or math.isnan(value)
        else f"{value:{form}}".replace("inf", "\N{INFINITY}")
    )


def span(row: dict, name: str = "", form: str = ".3f") -> str:
    """A figure of a row with its interval, where it has one, in one piece."""
    value, low, high = (
        row[key]
        for key in ((name, f"{name}_low", f"{name}_high") if name else ("value", "low", "high"))
    )
    return number(value, form) + (
        "" if math.isnan(low) else f"\N{NO-BREAK SPACE}({low:.2f}\N{EN DASH}{high:.2f})"
    )


def headline(scores: dict) -> list[str]:
    """The table that a reader takes away."""
    worst, base = scores["worst_confirmed_slice"], scores["constant_baselines"]
    constants = (0.5, base["always_positive_f2"], 1.0, 0.0, base["prevalence"])
    rows = [
        [text, span(scores["global"][name]), number(constant)]
        + (
            [span(worst, name), number(worst[f"rest_{name}"])]
            if worst and name in worst
            else ["", ""]
            if worst
            else []
        )
        for (name, text), constant in zip(NAMES.items(), constants, strict=True)
    ]
    header = ["score", "all patches", "always positive"]
    if not worst:
        return [
            table(header, rows),
            note(f"Of {scores['num_slices']} slices none is confirmed to be worse than the rest."),
        ]
    name = slice_name(worst)
    words = f"{name}: {worst['num']:,} patches, {worst['num_positive']:,} of them positive; F2 is "
    words += (
        f"{number(worst['always_positive_f2'])} if all are called so. It fell furthest behind the"
        " rest on the half that "
    )
    words += (
        f"finds; here it has {worst['error_ratio']:.1f} times as many errors, by"
        f" {NAMES[worst['measure']]}."
    )
    return [table([*header, f"worst slice: {name}", "the rest"], rows), note(words)]


def threshold_parts(scores: dict, tables: dict) -> list[str]:
    """Tables and figures of thresholds."""
    rows, measures = tables["thresholds"], ("recall", "specificity", "precision", "f2")
    decisions = [
        (row["rule"], number(row["threshold"], ".4f"), *(span(row, name) for name in measures))
        for row in rows
    ]
    shares = [
        name.removeprefix("flagged_share_at_")
        for name in rows[0]
        if name.startswith("flagged_share_at_")
    ]
    forms = {"flagged_share": ".1%", "precision": ".1%", "f2": ".2f"}
    meanings = [
        (
            row["rule"],
            *(
                ", ".join(number(row[f"{name}_at_{at}"], form) for name, form in forms.items())
                for at in shares
            ),
        )
        for row in rows
    ]
    always = ", ".join(
        f"{rows[0][f'always_positive_f2_at_{at}']:.2f} at {float(at):.0%}" for at in shares
    )
    return [
        note(
            "Always positive and always negative need no model: a threshold is worth what it has"
            " above them."
        ),
        table(("rule", "threshold", *(NAMES[name] for name in measures)), decisions),
        picture(
            figure_png(plot_prices(rows)),
            "tumours missed, and normal patches called tumour, at each threshold",
        ),
        picture(
            figure_png(
                plot_curves(tables["curves"], rows, scores["constant_baselines"]["prevalence"])
            ),
            "ROC and PR",
        ),
        "<h3>Where tumour is rarer: share flagged, precision, F2</h3>",
        table(("rule", *(f"{float(at):.0%} positive" for at in shares)), meanings),
        note(
            "By Bayes' rule from recall and specificity above. F2 of calling every patch positive:"
            f" {always}."
        ),
    ]


def calibration_parts(scores: dict, bins: list[dict]) -> list[str]:
    """The scores of calibration and the reliability diagram."""
    forms = {"temperature": ".3f", "offset": ".3f"} | dict.fromkeys(
        ("ece", "ece_by_chance", "brier", "nll"), ".4f"
    )
    rows = [
        (row["probabilities"], *(number(row[name], form) for name, form in forms.items()))
        for row in scores["calibration"]
    ]
    header = (
        "probabilities",
        "temperature",
        "offset",
        "ECE",
        "ECE by chance, at most",
        "Brier",
        "NLL (nats)",
    )
    words = (
        "ECE of 15 bins of equal width; by chance: what 95 of 100 samples this large show if every"
        " probability is right."
    )
    return [
        table(header, rows),
        note(words),
        picture(figure_png(plot_reliability(bins)), "reliability"),
    ]


def slice_parts(scores: dict, slices: list[dict]) -> list[str]:
    """The dot plot and the table of slices, of slides those with the lowest scores."""
    slides = [row for row in slices if row["feature"] == "slide"]
    slides.sort(
        key=lambda row: min(
            (row[name] for name in JUDGED if not math.isnan(row[name])), default=1.0
        )
    )
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
        spans = {name: span(row, name, ".2f") for name in ("f2", *JUDGED)}
        marks = [
            NAMES[name] + "*" * (name in row["confirmed"].split()) for name in row["found"].split()
        ]
        cells = (
            spans["f2"],
            number(row["always_positive_f2"], ".2f"),
            spans["recall"],
            spans["auc"],
            spans["specificity"],
        )
        rows.append((slice_name(row), ", ".join(marks), row["num"], row["num_positive"], *cells))
    words = (
        "No slice is defined by a label or by what the model says; of a feature they are fifths of"
        " the half that finds, and two together at either end. Worse: AUC, recall or specificity"
        f" falls behind the rest of that half, {slices[0]['num_tried']} comparisons corrected for"
        " (Benjamini-Hochberg, 5% of false discoveries). Confirmed (*, orange; else yellow): its"
        " interval on the other half lies below the rest there. F2 follows how many of a slice's"
        " patches are positive and is not compared. Undefined: a class is missing; no interval:"
        " too few groups to resample."
    )
    dots = picture(figure_png(plot_slices(shown, scores["global"])), "scores by slice")
    if slides:
        words += (
            f" A slide lies in one half: its own patches are halved. The {MOST_SLIDES} lowest of"
            f" {len(slides)} are shown."
        )
    return [note(words), dots, table(header, rows, "dense")]


def slice_name(row: dict) -> str:
    return f"{row['feature'].replace('_', ' ')} {row['slice']}"


def shortcut_parts(rows: list[dict]) -> list[str]:
    """What covering and exchanging does, a line a probe, and the other measures."""
    probes = {}
    for row in rows:
        probes.setdefault(row["probe"], {})[row["measure"]] = row
    regions = [probe for probe in probes if probe.startswith(("as it is", "ring", "centre"))]
    lines = [
        (probe, *(span(probes[probe][name]) if name in probes[probe] else "" for name in PROBED))
        for probe in regions
    ]
    rest = [row for row in rows if row["probe"] not in regions or row["measure"] not in PROBED]
    others = [(row["probe"], row["measure"], span(row), number(row["constant"])) for row in rest]
    words = (
        "The label depends on the centre 32x32 alone. One view each. A constant model has AUC 0.5"
        " and moves by 0. Tissue "
    )
    words += "beside tumour is mostly tumour, so the ring tells something without being a cheat."
    return [
        note(words),
        table(("probe", *PROBED), lines),
        table(("probe", "measure", "value", "constant model"), others),
    ]


def error_parts(errors: list[dict], shown: list[dict], patches, maps) -> list[str]:
    """Galleries of false positives and negatives."""
    words = (
        "Beside each: where hiding a block of 16x16 pixels takes evidence for tumour away (red) or"
        " adds to it (blue), "
    )
    words += "each map in its own scale. The frame is the centre 32x32. errors.csv has all errors."
    parts = [note(words if patches is not None else f"Pictures of patches are left out. {words}")]
    for kind in ("false positive", "false negative"):
        places = [place for place, row in enumerate(shown) if row["kind"] == kind]
        tiles = [pair(None if patches is None else patches[place], maps[place]) for place in places]
        pngs = [patch_png(tile.repeat(ZOOM, 0).repeat(ZOOM, 1)) for tile in tiles]
        captions = [
            f"{caption(shown[place])}; moves the logit by up to {np.abs(maps[place]).max():.2g}"
            for place in places
        ]
        parts.append(
            f"<h3>{kind.capitalize()}s: {sum(row['kind'] == kind for row in errors):,}, the most"
            " confident first</h3>"
        )
        parts.append(gallery(pngs, captions, ZOOM * tiles[0].shape[1]) if places else note("none"))
    return parts


def caption(row: dict) -> str:
    return (
        f"row {row['index']}, p ="
        f" {row['probability']:.3f}{', ' if row['slide'] else ''}{row['slide']}"
    )


def pair(patch, evidence: np.ndarray) -> np.ndarray:
    """A patch and its map side by side, uint8 (96, 200, 3), or the map alone; the centre in a
    frame.
    """
    colours = matplotlib.colormaps["RdBu_r"](
        0.5 + 0.5 * evidence / (np.abs(evidence).max() or 1.0)
    )[..., :3]
    heat = outline((255 * colours).round().astype(np.uint8), CENTRE)
    gap = np.full((len(heat), GAP_PX, 3), 255, np.uint8)
    return heat if patch is None else np.concatenate([outline(patch, CENTRE), gap, heat], 1)


def list_facts(scores: dict) -> list[tuple]:
    """What was audited, to be found again."""
    checkpoint, scaling = scores["checkpoint"], scores["checkpoint"]["calibration"]
    facts = [("checkpoint", checkpoint["path"]), ("its SHA-256", checkpoint["sha256"])]
    facts += [
        ("weights SHA-256", checkpoint["weights_sha256"]),
        ("threshold", number(checkpoint["threshold"], ".4f")),
    ]
    facts += [
        (
            "temperature, offset",
            "{temperature:.4f}, {offset:.4f}".format(**scaling) if scaling else "not calibrated",
        )
    ]
    facts += [("views", str(checkpoint["views"])), *scores["data"]["sha256"].items()]
    for half in scores["halves"]:
        counts = (
            f"{half['num']:,} patches, {half['num_positive']:,} positive, {half['num_groups']:,}"
            f" {half['groups']}"
        )
        facts.append((half["use"], counts))
    return [*facts, ("commit", scores["commit"] or "not in a git repository")]


def plot_curves(points: list[dict], thresholds: list[dict], prevalence: float):
    """ROC and precision-recall with bands, and where the thresholds lie."""
    figure, panels = new_figure(2, 5.2, 4.2)
    for axes, curve, chance in zip(panels, ("roc", "pr"), ([0, 1], [prevalence] * 2), strict=True):
        x, y, low, high = (
            [row[name] for row in points if row["curve"] == curve]
            for name in ("x", "y", "low", "high")
        )
        axes.fill_between(x, low, high, alpha=0.25, linewidth=0)
        axes.plot(x, y)
        axes.plot([0, 1], chance, color="black", linestyle=":", label="constant answer")
        for place, row in enumerate(row for row in thresholds if row["rule"] in MARKED):
            at = (
                (1 - row["specificity"], row["recall"])
                if curve == "roc"
                else (row["recall"], row["precision"])
            )
            axes.plot(
                *at,
                MARKS[place],
                color=COLOURS[place + 1],
                label=f"{row['rule']} ({row['threshold']:.3g})",
            )
        axes.set(xlim=(0, 1), ylim=(0, 1.02))
    panels[0].set(title="ROC", xlabel="false positive rate", ylabel="recall")
    panels[1].set(title="precision and recall", xlabel="recall", ylabel="precision")
    panels[1].legend(loc="lower left", fontsize=8)
    return figure


def plot_prices(rows: list[dict]):
    """What each threshold misses, and what it calls in vain, in % and with intervals."""
    rows = [row for row in rows if not row["rule"].startswith("always")]
    figure, (axes,) = new_figure(1, 8.5, 0.9 + 0.3 * len(rows))
    for name, label, colour, beside in (
        ("recall", "tumours missed", COLOURS[1], -0.14),
        ("specificity", "normal patches called tumour", COLOURS[0], 0.14),
    ):
        places = np.arange(len(rows)) + beside
        value, low, high = (
            100 - 100 * np.array([row[name + end] for row in rows]) for end in ("", "_high", "_low")
        )
        axes.hlines(places, low, high, color=colour)
        axes.plot(value, places, "o", color=colour, markersize=4.5, label=label)
    labels = [f"{row['rule']} ({row['threshold']:.3g})" for row in rows]
    axes.set(
        yticks=range(len(rows)),
        yticklabels=labels,
        ylim=(len(rows) - 0.5, -0.5),
        xlabel="% of them",
        xlim=(0, None),
    )
    axes.legend(loc="best", fontsize=8)
    return figure


def plot_slices(rows: list[dict], overall: dict):
    """AUC, recall and specificity of slices with intervals, beside those of all patches
    (dotted).
    """
    figure, panels = new_figure(len(JUDGED), 4.4, 1.2 + 0.2 * len(rows))
    for axes, name in zip(panels, JUDGED, strict=True):
        for place, row in enumerate(rows):
            is_confirmed, is_found = (name in row[kind].split() for kind in ("confirmed", "found"))
            colour = COLOURS[1] if is_confirmed else COLOURS[4] if is_found else COLOURS[0]
            axes.hlines(place, row[f"{name}_low"], row[f"{name}_high"], color=colour)
            axes.plot(row[name], place, "o", color=colour, markersize=4.5)
        axes.axvline(overall[name]["value"], color="black", linestyle=":")
        axes.set(
            title=f"{NAMES[name]} ({overall[name]['value']:.3f})",
            yticks=range(len(rows)),
            yticklabels=[],
        )
        axes.set_ylim(len(rows) - 0.4, -0.6)
    panels[0].set_yticklabels([slice_name(row) for row in rows], fontsize=8)
    return figure


def plot_errors(shown: list[dict], patches: np.ndarray, maps: np.ndarray):
    """The gallery as one picture, false positives above false negatives."""
    places, below = [], 0  # of a tile, in tiles: the kinds begin on rows of their own
    for kind in ("false positive", "false negative"):
        num = sum(row["kind"] == kind for row in shown)
        places += [(below + place // PAIRS_A_ROW, place % PAIRS_A_ROW) for place in range(num)]
        below += -(-num // PAIRS_A_ROW)
    tile = np.array([96 + CAPTION_PX, 192 + 3 * GAP_PX])
    canvas = np.full((*(tile * (below, PAIRS_A_ROW)), 3), 255, np.uint8)
    figure, (axes,) = new_figure(1, canvas.shape[1] / 80, canvas.shape[0] / 80)
    for row, patch, evidence, place in zip(shown, patches, maps, places, strict=True):
        (y, x), both = tile * place + (CAPTION_PX, 0), pair(patch, evidence)
        canvas[y : y + both.shape[0], x : x + both.shape[1]] = both
        axes.text(x, y - 3, f"{row['kind']}\n{caption(row)}", fontsize=6, va="bottom")
    axes.imshow(canvas, interpolation="nearest")
    axes.set_axis_off()
    return figure
