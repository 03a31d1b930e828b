"""What the page of a model audit draws, and the names of its rows: curves, thresholds, calibration
and slices.
"""

import numpy as np

from lib.figures import COLOURS, MARKS, add_legend, column, draw_constants, new_figure

# of the scores that slices are judged by
TITLES = {"auc": "AUC", "recall": "recall", "specificity": "specificity"}
LARGEST_MARKER = 200  # its area, in square points
MARKED = (  # of the rules for a threshold, on curves
    "F2-optimal",
    "recall at least 0.95",
    "a miss costs 10 false alarms",
    "stored in the checkpoint",
    "one half",
)


def name_rows(axes, names: list[str]) -> None:
    """Write the names of the rows 0, 1, ... of a plot beside it, the first on top."""
    axes.set(yticks=range(len(names)), yticklabels=names, ylim=(len(names) - 0.4, -0.6))


def slice_name(row: dict) -> str:
    """A slice in words: its feature and which part of it."""
    return f"{row['feature'].replace('_', ' ')} {row['slice']}"


def slice_colour(row: dict, name: str) -> str:
    if name in row["confirmed"].split():
        return COLOURS[1]
    return COLOURS[4] if name in row["found"].split() else COLOURS[0]


def plot_slices(rows: list[dict], overall: dict[str, dict]):
    """AUC, recall and specificity of slices with intervals, beside the `value` of each over all
    patches (dotted). Orange: confirmed to be worse; yellow: found to be, on one half.
    """
    figure, panels = new_figure(len(TITLES), 4.4, 1.2 + 0.2 * len(rows))
    places = range(len(rows))
    for axes, (name, title) in zip(panels, TITLES.items(), strict=True):
        colours = [slice_colour(row, name) for row in rows]
        lows, highs = column(rows, f"{name}_low"), column(rows, f"{name}_high")
        axes.hlines(places, lows, highs, colors=colours)
        axes.scatter(column(rows, name), places, s=16, c=colours)
        value = overall[name]["value"]
        axes.axvline(value, color="black", linestyle=":")
        axes.set_title(f"{title} ({value:.3f})")
        name_rows(axes, [""] * len(rows))
    panels[0].set_yticklabels([slice_name(row) for row in rows], fontsize=8)
    return figure


def plot_curves(points: list[dict], thresholds: list[dict], prevalence: float):
    """ROC and precision-recall with their 95% bands, and where thresholds lie.

    `points`: rows of curve (roc or pr), x, y, low and high; `thresholds`: rows of rule, threshold
    and scores.
    """
    figure, panels = new_figure(2, 5.2, 4.2)
    for axes, curve in zip(panels, ("roc", "pr"), strict=True):
        rows = [row for row in points if row["curve"] == curve]
        x = column(rows, "x")
        axes.fill_between(x, column(rows, "low"), column(rows, "high"), alpha=0.25, linewidth=0)
        axes.plot(x, column(rows, "y"))
    draw_constants(*panels, prevalence)
    marked = [row for row in thresholds if row["rule"] in MARKED]
    rates = [1 - column(marked, "specificity"), column(marked, "recall")]
    rates.append(column(marked, "precision"))
    for number, row in enumerate(marked):
        style = {"color": COLOURS[number + 1], "markersize": 6, "label": threshold_name(row)}
        for place, axes in enumerate(panels):  # recall is the height of one, the width of the other
            axes.plot(rates[place][number], rates[place + 1][number], MARKS[number], **style)
    panels[1].legend(loc="lower left")
    return figure


def threshold_name(row: dict) -> str:
    return f"{row['rule']} ({float(row['threshold']):.3g})"


def plot_reliability(bins: list[dict]):
    """Share of positives, with its 95% interval, against the mean probability of each bin, for each
    of the series that `probabilities` names; the constant one is left out. The area of a marker is
    proportional to the number of patches in its bin.
    """
    figure, (axes,) = new_figure(1, 6, 4.5)
    axes.plot((0, 1), (0, 1), color="black", linestyle=":")
    rows_of = {}
    for row in bins:
        if not row["probabilities"].startswith("always"):
            rows_of.setdefault(row["probabilities"], []).append(row)
    for colour, mark, (name, rows) in zip(COLOURS, MARKS, rows_of.items(), strict=False):
        mean = column(rows, "mean_probability")
        lows, highs = column(rows, "positive_share_low"), column(rows, "positive_share_high")
        axes.vlines(mean, lows, highs, color=colour)
        share, num = column(rows, "positive_share"), column(rows, "num")
        axes.plot(mean, share, color=colour)
        area = LARGEST_MARKER * num / num.max()
        axes.scatter(mean, share, area, color=colour, marker=mark, alpha=0.7, label=name)
    axes.set(xlabel="mean probability of a bin", ylabel="share of positives")
    add_legend(figure, axes)
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
        values = 100 - 100 * column(rows, name)
        lows = 100 - 100 * column(rows, f"{name}_high")
        highs = 100 - 100 * column(rows, f"{name}_low")
        axes.hlines(places, lows, highs, color=colour)
        axes.plot(values, places, "o", color=colour, label=label)
    name_rows(axes, [threshold_name(row) for row in rows])
    axes.set_xlabel("% of them")
    axes.set_xlim(left=0)
    axes.legend()
    return figure
