"""Plots in one style: readable in print and by the colour-blind, axes with units, returned as
figures for a page or a file.
"""

import collections
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
NUM_GROUPS = 3  # of trials by the value of a parameter
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
        "lines.linewidth": 1.4,
        "lines.markersize": 4,
    }
)
# (title, columns with the constant answer of each)
EPOCH_PANELS = (
    ("log loss (nats)", {"train_loss": "prior_loss", "val_loss": "prior_loss"}),
    (
        "ROC-AUC and PR-AUC on validation",
        {"val_auc": "constant_auc", "val_pr_auc": "constant_pr_auc"},
    ),
    (
        "F2 and accuracy on validation",
        {"val_f2": "always_positive_f2", "val_accuracy": "majority_accuracy"},
    ),
)
STEP_PANELS = {
    "loss": "training loss (nats)",
    "grad_norm": "global gradient norm, before clipping",
    "lr": "learning rate",
}


def new_figure(num_axes: int, width: float = 4.2, height: float = 3.2):
    """A row of axes, each `width` x `height` inches: (figure, list of axes)."""
    figure, axes = plt.subplots(1, num_axes, figsize=(width * num_axes, height), squeeze=False)
    return figure, list(axes[0])


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
    metadata = {"Software": None}
    if source:
        metadata["Source"] = source
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110, metadata=metadata)
    plt.close(figure)
    return buffer.getvalue()


def column(rows: list[dict], name: str) -> np.ndarray:
    """A column of rows, of a CSV or not, as float64, empty cells as NaN."""
    return np.array([float("nan" if row[name] in ("", None) else row[name]) for row in rows])


def plot_epochs(epochs: list[dict]):
    """Loss and scores per epoch, each beside what a constant answer gets (dotted)."""
    figure, panels = new_figure(3)
    for axes, (title, constants) in zip(panels, EPOCH_PANELS, strict=True):
        for name in constants:
            values = column(epochs, name)
            axes.plot(column(epochs, "epoch"), values, "o-", markersize=3, label=name)
        for number, name in enumerate(dict.fromkeys(constants.values())):
            level = column(epochs, name)[0]
            axes.axhline(level, color=COLOURS[number], linestyle=":", label=name)
        axes.set(title=title, xlabel="epoch")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.legend()
    return figure


def plot_steps(steps: list[dict]):
    """Training loss, global gradient norm and learning rate per step."""
    figure, panels = new_figure(3)
    for axes, (name, title) in zip(panels, STEP_PANELS.items(), strict=True):
        axes.plot(column(steps, "step"), column(steps, name), linewidth=0.8)
        axes.set(title=title, xlabel="step", yscale="log" if name == "grad_norm" else "linear")
    return figure


def draw_constants(roc, pr, prevalence: float) -> None:
    """Set up the axes of ROC and precision-recall, each with what constant answers get."""
    for axes, heights in ((roc, (0, 1)), (pr, (prevalence, prevalence))):
        axes.plot((0, 1), heights, color="black", linestyle=":", label="constant answer")
        axes.set(xlim=(0, 1), ylim=(0, 1.02))
    roc.set(title="ROC", xlabel="false positive rate", ylabel="recall")
    pr.set(title="precision and recall", xlabel="recall", ylabel="precision")


def draw_threshold(roc, pr, false_positive_rate, recall, precision, **style) -> None:
    """Mark a threshold on both curves."""
    roc.plot(false_positive_rate, recall, linestyle="", **style)
    pr.plot(recall, precision, linestyle="", **style)


def plot_decisions(
    labels: np.ndarray, probs: np.ndarray, threshold: float, confusion: dict[str, int], others=()
):
    """ROC, precision-recall and the confusion matrix at a threshold.

    `others` are further thresholds on the curves, as (name, threshold).
    """
    figure, (roc, pr, matrix) = new_figure(3, height=3.4 + 0.2 * (len(others) // 3))
    points = curve_points(labels, probs)
    rates = [points[name] for name in ("false_positive_rate", "recall", "precision")]
    roc.plot(rates[0], rates[1])
    pr.plot(rates[1], rates[2])
    draw_constants(roc, pr, labels.mean())
    for number, (name, value) in enumerate([*others, (f"threshold {threshold:.3g}", threshold)]):
        style = {"marker": MARKS[number % len(MARKS)], "color": COLOURS[1 + number % 5]}
        if number == len(others):  # a ring, around what lies there
            style = {"marker": "o", "markersize": 12, "fillstyle": "none", "color": "black"}
        place = np.searchsorted(-points["threshold"], -value, side="right") - 1
        if place >= 0:
            draw_threshold(roc, pr, *(rate[place] for rate in rates), label=name, **style)
    add_legend(figure, roc, num_columns=4)
    counts = np.array([[confusion["tn"], confusion["fp"]], [confusion["fn"], confusion["tp"]]])
    matrix.imshow(counts, cmap="Blues", vmin=0, vmax=counts.sum())
    for (row, col), count in np.ndenumerate(counts):
        matrix.text(col, row, f"{count:,}", ha="center", va="center", fontsize=12)
    matrix.set(title="confusion matrix", xlabel="prediction", ylabel="label")
    matrix.set(xticks=(0, 1), yticks=(0, 1))
    matrix.grid(False)
    return figure


def parameter_axis(spec: dict, values: list) -> tuple[list[float], list[int], list[str]]:
    """Values of a parameter on an axis: positions from 0 to 1, the group of each, and labels from
    low to high.

    `spec` is the parameter's range in the space of a search, {kind: bounds}.
    """
    ((kind, bounds),) = spec.items()
    if kind == "choice":
        groups = [bounds.index(value) for value in values]
        last = max(1, len(bounds) - 1)
        return [group / last for group in groups], groups, [str(bound) for bound in bounds]
    scale = math.log if kind == "log" else float
    low, high = (scale(float(bound)) for bound in bounds)
    points = [(scale(value) - low) / (high - low) for value in values]
    groups = [min(int(point * NUM_GROUPS), NUM_GROUPS - 1) for point in points]
    return points, groups, [f"{float(bound):g}" for bound in bounds]


def label_positions(labels: list[str]) -> np.ndarray:
    """Where the labels of a parameter's axis stand, from 0 to 1; one alone in the middle."""
    return np.linspace(0, 1, len(labels)) if len(labels) > 1 else np.array([0.5])


def plot_parallel(
    points: np.ndarray,
    labels: list[list[str]],
    names: list[str],
    scores: np.ndarray,
    is_promoted: np.ndarray,
):
    """Trials as lines over axes, the last of them their score.

    `points` (N, D) lie from 0 to 1; `labels` of each axis run from low to high; `is_promoted` is
    bool (N,).
    """
    figure, (axes,) = new_figure(1, 1.6 * (len(names) + 2), 3.6)
    low, high = scores.min(), max(scores.max(), scores.min() + 1e-9)
    shares = (scores - low) / (high - low)
    lines = np.column_stack([points, shares])
    for trial in np.lexsort([scores, is_promoted]):  # the best ones on top
        width, alpha = (2.4, 1.0) if is_promoted[trial] else (0.9, 0.6)
        colour = colormaps["cividis_r"](shares[trial])
        axes.plot(lines[trial], color=colour, linewidth=width, alpha=alpha)
    box = {"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 1}
    for number, texts in enumerate([*labels, [f"{low:.3f}", f"{high:.3f}"]]):
        axes.axvline(number, color="black", linewidth=0.8)
        for text, y in zip(texts, label_positions(texts), strict=True):
            axes.text(number + 0.03, y, text, fontsize=8, va="center", bbox=box)
    axes.set(xticks=range(len(names) + 1), xticklabels=[*names, "AUC"], yticks=())
    axes.set(xlim=(-0.1, len(names) + 0.5))
    axes.set_title("every trial after its first rung; thick: promoted")
    axes.grid(False)
    return figure


def plot_reliability(bins: list[dict]):
    """Share of positives against the mean probability of each bin, and how many patches it holds,
    for each of the series that `probabilities` names; the constant one is left out.
    """
    figure, (axes, counts) = new_figure(2, 5.2, 4.0)
    axes.plot([0, 1], [0, 1], color="black", linestyle=":")
    names = dict.fromkeys(row["probabilities"] for row in bins)
    names = [name for name in names if not name.startswith("always")]
    for number, name in enumerate(names):
        rows = [row for row in bins if row["probabilities"] == name]
        mean, share = column(rows, "mean_probability"), column(rows, "positive_share")
        below = share - column(rows, "positive_share_low")
        above = column(rows, "positive_share_high") - share
        errors = np.maximum([below, above], 0)
        style = {"color": COLOURS[number], "label": name}
        axes.errorbar(mean, share, errors, fmt=f"{MARKS[number]}-", **style)
        low, high = column(rows, "low"), column(rows, "high")
        counts.hlines(column(rows, "num"), low, high, linewidth=2, **style)
    axes.set(title="reliability", xlabel="mean probability of a bin", ylabel="share of positives")
    axes.set(xlim=(0, 1), ylim=(0, 1))
    counts.set(title="patches in a bin", xlabel="probability", ylabel="patches")
    counts.set(xlim=(0, 1), yscale="log")
    add_legend(figure, axes)
    return figure


def plot_counts(rows: list[dict]):
    """Bars of the patches per split and class: rows of split, label (-1: without one) and count."""
    figure, (axes,) = new_figure(1, width=7)
    splits = list(dict.fromkeys(row["split"] for row in rows))
    totals = collections.Counter()
    for row in rows:
        totals[int(row["label"]), row["split"]] += int(row["count"])
    names = {0: "negative", 1: "positive", -1: "without label"}
    for number, (label, name) in enumerate(names.items()):
        counts = [totals[label, split] for split in splits]
        if label >= 0 or any(counts):
            places = np.arange(len(splits)) + 0.28 * (number - 0.5)
            style = {"color": COLOURS[number], "hatch": ("", "//", "..")[number]}
            bars = axes.bar(places, counts, 0.26, label=name, edgecolor="white", **style)
            axes.bar_label(bars, [f"{count:,}" for count in counts], fontsize=8)
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
            shares = num / max(num.sum(), 1)
            axes.stairs(shares, edges, label=split, linewidth=1.4, **line_style(number))
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
        errors = [rate - low, high - rate]
        axes.errorbar(size, rate, errors, marker=mark, label=name, **line_style(number))
    axes.set(xscale="log", yscale="log", xlabel="batch size", ylabel="images per second")
    axes.set_xticks(sorted(sizes), [f"{size:g}" for size in sorted(sizes)])
    axes.minorticks_off()
    add_legend(figure, axes)
    return figure


def plot_time_line(equal: dict[str, list[bool]], steps: list[int]):
    """The grid quantities x steps of two runs: equal to the bit, or not."""
    figure, (axes,) = new_figure(1, width=11, height=0.9 + 0.28 * len(equal))
    left, right = steps[0] / 2, steps[-1] + steps[0] / 2
    grid = {"extent": (left, right, len(equal) - 0.5, -0.5), "aspect": "auto"}
    colours = ListedColormap([COLOURS[1], COLOURS[5]])
    cells = list(equal.values())
    axes.imshow(cells, cmap=colours, vmin=0, vmax=1, **grid)
    borders = np.arange(len(equal)) + 0.5
    axes.hlines(borders, left, right, color="white", linewidth=2)
    axes.set(xlabel="step", yticks=range(len(equal)), yticklabels=equal)
    axes.set_title("blue: equal to the bit, orange: not")
    axes.grid(False)
    return figure
