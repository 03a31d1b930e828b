"""Plots in one style: readable in print and by the colour-blind, axes with units, returned as
figures for a page or a file.
"""

import io
import math
import os

# a notebook's value names a backend that is not installed here; a cluster has no screen
os.environ["MPLBACKEND"] = "agg"

import matplotlib.pyplot as plt
import numpy as np
from matplotlib import colormaps, cycler
from matplotlib.colors import ListedColormap
from matplotlib.ticker import MaxNLocator

from lib.metrics import curve_points

# Okabe and Ito 2008: eight colours that the colour-blind tell apart; black last
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#F0E442", "#000000")
# what tells lines and points apart where colours do not
LINES, MARKS = ("-", "--", ":", "-."), "osD^vP*X"
plt.rcParams.update(
    {
        "axes.prop_cycle": cycler(color=COLOURS),
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "errorbar.capsize": 3,
        "figure.constrained_layout.use": True,
        "font.size": 10,
        "grid.alpha": 0.3,
        "image.interpolation": "nearest",
        "legend.fontsize": 8,
        "legend.frameon": False,
        "lines.linewidth": 1.2,
        "lines.markersize": 4,
    }
)
# columns of epochs.csv by title, with their line; the constant answer's is dotted
EPOCH_PANELS = {
    "log loss (nats)": {"train_loss": "o-", "val_loss": "o-", "prior_loss": "_:"},
    "ROC-AUC and PR-AUC on validation": {
        "val_auc": "o-",
        "val_pr_auc": "o-",
        "constant_auc": "_:",
        "constant_pr_auc": "_:",
    },
    "F2 and accuracy on validation": {
        "val_f2": "o-",
        "val_accuracy": "o-",
        "always_positive_f2": "_:",
        "majority_accuracy": "_:",
    },
}
STEP_PANELS = {
    "training loss (nats)": {"loss": "-"},
    "global gradient norm, before clipping": {"grad_norm": "-"},
    "learning rate": {"lr": "-"},
}
JUDGED = {"auc": "AUC", "recall": "recall", "specificity": "specificity"}  # of slices
MARKED = (  # of the rules for a threshold, on curves
    "F2-optimal",
    "recall at least 0.95",
    "a miss costs 10 false alarms",
    "stored in the checkpoint",
    "one half",
)


def new_figure(num_axes: int, width: float = 4.2, height: float = 3.2):
    """A row of axes, each `width` x `height` inches: (figure, array of axes)."""
    figure, axes = plt.subplots(1, num_axes, figsize=(width * num_axes, height), squeeze=False)
    return figure, axes[0]


def line_style(number: int) -> dict[str, str]:
    """The colour and the dashes of a line among others; 32 differ, 8 of them without colours."""
    dashes = number + number // len(COLOURS)
    return {"color": COLOURS[number % len(COLOURS)], "linestyle": LINES[dashes % len(LINES)]}


def add_legend(figure, axes, num_columns: int = 2) -> None:
    """One legend below all axes of a figure, of what one of them shows."""
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=num_columns)


def figure_png(figure, source: str = "") -> bytes:
    """A figure as PNG, with what it was drawn from as text in it; the figure is closed."""
    metadata = {"Software": None, "Source": source or None}
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110, metadata=metadata)
    plt.close(figure)
    return buffer.getvalue()


def column(rows: list[dict], name: str) -> np.ndarray:
    """A column of rows, of a CSV or not, as float64, empty cells as NaN."""
    return np.array([float("nan" if row[name] in ("", None) else row[name]) for row in rows])


def plot_columns(rows: list[dict], x: str, panels: dict[str, dict[str, str]]):
    """An axes for each panel, with a line for each of its columns, such as EPOCH_PANELS over
    `epoch`.
    """
    figure, all_axes = new_figure(len(panels))
    for axes, (title, lines) in zip(all_axes, panels.items(), strict=True):
        for name, style in lines.items():
            axes.plot(column(rows, x), column(rows, name), style, label=name)
        axes.set(title=title, xlabel=x, yscale="log" if "grad_norm" in lines else "linear")
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        axes.legend()
    return figure


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
    figure, panels = new_figure(len(JUDGED), 4.4, 1.2 + 0.2 * len(rows))
    places = range(len(rows))
    for axes, (name, title) in zip(panels, JUDGED.items(), strict=True):
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


def draw_constants(roc, pr, prevalence: float) -> None:
    """Set up the axes of ROC and precision-recall, each with what constant answers get."""
    style = {"color": "black", "linestyle": ":", "label": "constant answer"}
    roc.plot((0, 1), (0, 1), **style)
    roc.set(title="ROC", xlabel="false positive rate", ylabel="recall")
    pr.plot((0, 1), (prevalence, prevalence), **style)
    pr.set(title="precision and recall", xlabel="recall", ylabel="precision")


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


def plot_decisions(labels: np.ndarray, probs: np.ndarray, threshold: float):
    """ROC, precision-recall and the confusion matrix at a threshold, of labels int (N,)."""
    figure, (roc, pr, matrix) = new_figure(3, height=3.6)
    draw_constants(roc, pr, labels.mean())
    points = curve_points(labels, probs)
    rates = [points[name] for name in ("false_positive_rate", "recall", "precision")]
    rates = np.insert(rates, 0, (0, 0, math.nan), axis=1)  # above the highest probability
    place = np.searchsorted(-points["threshold"], -threshold, side="right")
    for axes, x, y in ((roc, rates[0], rates[1]), (pr, rates[1], rates[2])):
        axes.plot(x, y)
        axes.plot(x[place], y[place], "o", color="black", label=f"threshold {threshold:.3g}")
        axes.legend()

    called = probs >= threshold
    counts = np.bincount(2 * labels + called, minlength=4).reshape(2, 2)
    matrix.imshow(counts, cmap="Blues", vmin=0, vmax=len(labels))
    for (label, call), count in np.ndenumerate(counts):
        matrix.text(call, label, f"{count:,}", ha="center", va="center", fontsize=12)
    matrix.set(title="confusion matrix", xlabel="prediction", ylabel="label")
    matrix.set(xticks=(0, 1), yticks=(0, 1))
    matrix.grid(False)
    return figure


def label_positions(labels: list) -> np.ndarray:
    """Where the labels of a parameter's axis stand, from 0 to 1; one alone in the middle."""
    return np.linspace(0, 1, len(labels)) if len(labels) > 1 else np.array([0.5])


def parameter_axis(spec: dict, values: list) -> tuple[np.ndarray, list[str]]:
    """Values of a parameter on an axis: positions from 0 to 1, and labels from low to high.

    `spec` is the parameter's range in the space of a search, {kind: bounds}.
    """
    ((kind, bounds),) = spec.items()
    if kind == "choice":
        choices = [bounds.index(value) for value in values]
        return label_positions(bounds)[choices], [str(bound) for bound in bounds]
    ends, points = np.array(bounds, float), np.array(values, float)
    labels = [f"{end:.4g}" for end in ends]
    if kind == "log":
        ends, points = np.log(ends), np.log(points)
    width = max(ends[1] - ends[0], 1e-9)
    return (points - ends[0]) / width, labels


def plot_parallel(ranges: dict, trials: list[dict], is_promoted: np.ndarray):
    """Trials, each with its `AUC`, as lines over axes: one for each parameter of `ranges`, the last
    for the AUC. `is_promoted` is bool (N,).
    """
    figure, (axes,) = new_figure(1, 1.6 * (len(ranges) + 2), 3.6)
    scores = column(trials, "AUC")
    ranges = ranges | {"AUC": {"range": (scores.min(), scores.max())}}
    box = {"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 1}
    columns = []
    for number, (name, spec) in enumerate(ranges.items()):
        points, labels = parameter_axis(spec, [trial[name] for trial in trials])
        columns.append(points)
        axes.axvline(number, color="black", linewidth=0.8)
        for text, y in zip(labels, label_positions(labels), strict=True):
            axes.text(number + 0.03, y, text, fontsize=8, va="center", bbox=box)
    lines = np.column_stack(columns)
    for trial in np.lexsort([scores, is_promoted]):  # the best ones on top
        width, alpha = (2.4, 1.0) if is_promoted[trial] else (0.9, 0.6)
        colour = colormaps["cividis_r"](lines[trial, -1])
        axes.plot(lines[trial], color=colour, linewidth=width, alpha=alpha)
    axes.set(xticks=range(len(ranges)), xticklabels=ranges, yticks=())
    axes.set_xlim(-0.1, len(ranges) - 0.5)
    axes.set_title("every trial after its first rung; thick: promoted")
    axes.grid(False)
    return figure


def plot_reliability(bins: list[dict]):
    """Share of positives, with its 95% interval, against the mean probability of each bin, for each
    of the series that `probabilities` names; the constant one is left out.
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
        axes.plot(mean, column(rows, "positive_share"), f"{mark}-", color=colour, label=name)
    axes.set(xlabel="mean probability of a bin", ylabel="share of positives")
    add_legend(figure, axes)
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


def plot_scaling(series: dict[str, list[tuple[float, float, float, float]]]):
    """Throughput against batch size, a line for each series: (batch size, images per second, low,
    high).
    """
    figure, (axes,) = new_figure(1, 7.5, 4.2)
    sizes = set()
    for number, (name, points) in enumerate(series.items()):
        size, rate, low, high = np.array(sorted(points)).T
        sizes.update(size)
        mark = MARKS[number % len(MARKS)]
        axes.errorbar(size, rate, [rate - low, high - rate], marker=mark, label=name)
    axes.set(xscale="log", yscale="log", xlabel="batch size", ylabel="images per second")
    axes.set_xticks(sorted(sizes), [f"{size:g}" for size in sorted(sizes)])
    axes.minorticks_off()
    add_legend(figure, axes)
    return figure


def plot_time_line(equal: dict[str, list[bool]], steps: list[int]):
    """The grid quantities x steps of two runs: equal to the bit, or not."""
    figure, (axes,) = new_figure(1, width=11, height=0.9 + 0.28 * len(equal))
    edges = np.append(0, steps) + steps[0] / 2  # a cell reaches half a step to either side
    colours = ListedColormap([COLOURS[1], COLOURS[5]])
    axes.pcolormesh(
        edges, range(len(equal) + 1), list(equal.values()), cmap=colours, vmin=0, vmax=1
    )
    axes.hlines(range(len(equal)), edges[0], edges[-1], color="white", linewidth=2)
    axes.set(xlabel="step", yticks=np.arange(len(equal)) + 0.5, yticklabels=equal)
    axes.set_title("blue: equal to the bit, orange: not")
    axes.invert_yaxis()
    axes.grid(False)
    return figure
