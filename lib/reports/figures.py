"""Plots in one style: readable in print and by the colour-blind, axes with units, returned as images for a page or a file."""

import base64
import io

import matplotlib

matplotlib.use("Agg")  # no screen on a cluster

import matplotlib.pyplot as plt
import numpy as np
from PIL import Image

from lib.metrics import curve_points, mean_interval

# Okabe and Ito 2008: eight colours that the colour-blind tell apart; black last
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#F0E442", "#000000")
MOST_POINTS = 150  # of a line, where several are drawn together
STYLE = {
    "axes.prop_cycle": matplotlib.cycler(color=COLOURS),
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "font.size": 10,
    "lines.linewidth": 1.6,
    "legend.frameon": False,
    "figure.constrained_layout.use": True,
}


def new_figure(num_axes: int, width: float = 4.2, height: float = 3.2):
    """A row of axes in the common style: (figure, list of axes)."""
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(1, num_axes, figsize=(width * num_axes, height), squeeze=False)
    return figure, list(axes[0])


def figure_png(figure, dpi: int = 110) -> bytes:
    """A figure as PNG; the figure is closed."""
    buffer = io.BytesIO()
    with plt.rc_context(STYLE):
        figure.savefig(buffer, format="png", dpi=dpi, metadata={"Software": None})
    plt.close(figure)
    return buffer.getvalue()


def patch_png(patch: np.ndarray) -> bytes:
    """A patch uint8 (H, W, 3) as PNG, in its own colours."""
    buffer = io.BytesIO()
    Image.fromarray(patch).save(buffer, format="png")
    return buffer.getvalue()


def data_uri(png: bytes) -> str:
    """A PNG as the text that an <img> takes in place of a file."""
    return "data:image/png;base64," + base64.b64encode(png).decode()


def column(rows: list[dict], name: str) -> np.ndarray:
    """A column of CSV rows as float64, empty cells as NaN."""
    return np.array([float(row[name] or "nan") for row in rows])


def plot_epochs(epochs: list[dict]):
    """Loss and scores per epoch, each beside what a constant answer gets."""
    figure, (left, middle, right) = new_figure(3)
    epoch = column(epochs, "epoch")
    for axes, title, names, baseline in (
        (left, "log loss (nats)", ("train_loss", "val_loss"), "prior_loss"),
        (middle, "ROC-AUC and PR-AUC on validation", ("val_auc", "val_pr_auc"), "constant_auc"),
        (right, "F2 and accuracy on validation", ("val_f2", "val_accuracy"), "always_positive_f2"),
    ):
        for name in names:
            axes.plot(epoch, column(epochs, name), marker="o", markersize=3, label=name)
        axes.axhline(column(epochs, baseline)[0], color="black", linestyle=":", label=baseline)
        axes.set(title=title, xlabel="epoch")
        axes.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(integer=True))
        axes.legend()
    return figure


def plot_steps(steps: list[dict]):
    """Training loss, global gradient norm and learning rate per step."""
    figure, (left, middle, right) = new_figure(3)
    step = column(steps, "step")
    for axes, name, title in (
        (left, "loss", "training loss (nats)"),
        (middle, "grad_norm", "global gradient norm, before clipping"),
        (right, "lr", "learning rate"),
    ):
        axes.plot(step, column(steps, name), linewidth=0.8)
        axes.set(title=title, xlabel="step")
    middle.set_yscale("log")
    return figure


def plot_decisions(labels: np.ndarray, probs: np.ndarray, threshold: float, confusion: dict[str, int]):
    """ROC, precision-recall and the confusion matrix at a threshold."""
    figure, (roc, pr, matrix) = new_figure(3)
    points = curve_points(labels, probs)
    at = np.searchsorted(-points["threshold"], -threshold, side="right") - 1
    for axes, x, y, chance in (
        (roc, "false_positive_rate", "recall", ([0, 1], [0, 1])),
        (pr, "recall", "precision", ([0, 1], [labels.mean()] * 2)),
    ):
        axes.plot(points[x], points[y])
        axes.plot(*chance, color="black", linestyle=":", label="constant answer")
        if at >= 0:
            axes.plot(points[x][at], points[y][at], "o", color=COLOURS[1], label=f"threshold {threshold:g}")
        axes.set(xlabel=x.replace("_", " "), ylabel=y, xlim=(0, 1), ylim=(0, 1.02))
        axes.legend(loc="lower right" if axes is roc else "lower left")
    roc.set_title("ROC")
    pr.set_title("precision and recall")
    counts = np.array([[confusion["tn"], confusion["fp"]], [confusion["fn"], confusion["tp"]]])
    matrix.imshow(counts, cmap="Blues", vmin=0, vmax=counts.sum())
    for (row, col), count in np.ndenumerate(counts):
        matrix.text(col, row, f"{count:,}", ha="center", va="center", fontsize=12)
    matrix.set(title="confusion matrix", xlabel="prediction", ylabel="label", xticks=(0, 1), yticks=(0, 1))
    matrix.grid(False)
    return figure


def plot_parallel(points: np.ndarray, labels: list[list[str]], names: list[str], scores: np.ndarray, kept: np.ndarray):
    """Trials as lines over axes, the last of them their score: `points` (N, D) from 0 to 1, `labels` of each axis from low to
    high, `kept` bool (N,) for those that were promoted."""
    figure, (axes,) = new_figure(1, 1.6 * (len(names) + 2), 3.6)
    low, high = scores.min(), max(scores.max(), scores.min() + 1e-9)
    height = np.column_stack([points, (scores - low) / (high - low)])
    for line, score, is_kept in sorted(zip(height, scores, kept, strict=True), key=lambda trial: (trial[2], trial[1])):
        colour = matplotlib.colormaps["cividis"]((score - low) / (high - low))
        axes.plot(line, color=colour, linewidth=2.4 if is_kept else 0.9, alpha=1.0 if is_kept else 0.6)
    for number, texts in enumerate([*labels, [f"{low:.3f}", f"{high:.3f}"]]):
        axes.axvline(number, color="black", linewidth=0.8)
        for text, y in zip(texts, np.linspace(0, 1, len(texts)) if len(texts) > 1 else [0.5], strict=True):
            box = {"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 1}
            axes.text(number + 0.03, y, text, fontsize=8, va="center", bbox=box)
    axes.set(xticks=range(len(names) + 1), xticklabels=[*names, "AUC"], yticks=(), xlim=(-0.1, len(names) + 0.5))
    axes.set_title("every trial after its first rung; thick: promoted")
    axes.grid(False)
    return figure


def plot_marginals(points: np.ndarray, labels: list[list[str]], names: list[str], scores: np.ndarray, groups):
    """Score against each parameter alone: trials as dots, and the mean with its interval in each of `groups` int (N, D)."""
    figure, all_axes = new_figure(len(names), 3.0)
    for axes, at, texts, name, group in zip(all_axes, points.T, labels, names, groups.T, strict=True):
        axes.plot(at, scores, "o", markersize=3, alpha=0.5)
        for number in np.unique(group):
            inside = group == number
            if inside.sum() > 1:
                spread = mean_interval(scores[inside])
                reach = spread["high"] - spread["mean"]
                axes.errorbar(at[inside].mean(), spread["mean"], reach, fmt="s", color=COLOURS[1], capsize=4)
        axes.set(xticks=np.linspace(0, 1, len(texts)) if len(texts) > 1 else [0.5], xticklabels=texts, xlabel=name)
    all_axes[0].set_ylabel("AUC after the first rung")
    return figure


def plot_budget(budgets: np.ndarray, scores: np.ndarray, rung_ends: list[float], full: float):
    """The best score so far against the epochs spent so far, beside what all trials to the end would have cost."""
    figure, (axes,) = new_figure(1, 6.4)
    axes.plot(budgets, scores, "o", markersize=3, alpha=0.5, label="a trial")
    axes.step(budgets, np.maximum.accumulate(scores), where="post", color=COLOURS[1], label="best so far")
    for end in rung_ends:
        axes.axvline(end, color="black", linestyle=":", linewidth=0.8)
    axes.axvline(full, color=COLOURS[2], label="every trial to its end")
    axes.set(xlabel="epochs trained, all trials together (dotted: end of a rung)", ylabel="AUC on validation")
    axes.legend(loc="lower right")
    return figure


def plot_together(tables: dict[tuple[str, str], list[dict]], curves):
    """An axes for each curve (file, column, title, scale) with a line for each run; `tables` are {(run, file): CSV rows}.

    Of a long run the means of blocks of rows are drawn: the noise of single steps would hide every line but the last.
    """
    figure, panels = new_figure(len(curves), height=4.2)
    names = list(dict.fromkeys(run for run, _ in tables))
    for axes, (file, name, title, scale) in zip(panels, curves, strict=True):
        for number, run in enumerate(names):
            rows, style = tables.get((run, file), []), ("-", "--", ":", "-.")[number // len(COLOURS) % 4]
            blocks = [np.array_split(column(rows, key), min(len(rows), MOST_POINTS) or 1) for key in ("step", name)]
            x, y = ([block.mean() for block in part if len(block)] for part in blocks)
            axes.plot(x, y, style, color=COLOURS[number % len(COLOURS)], linewidth=1)
        axes.set(title=title, xlabel="step", yscale=scale)
        axes.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(5))
    with plt.rc_context(STYLE):
        figure.legend(panels[0].lines, names, loc="outside lower center", ncols=max(1, min(3, len(names))), fontsize=8)
    return figure
