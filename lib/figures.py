"""Plots in one style: readable in print and by the colour-blind, axes with units, returned as
figures for a page or a file.
"""

import io

import matplotlib.pyplot as plt
import numpy as np
from matplotlib import cycler
from matplotlib.ticker import MaxNLocator

from lib.metrics import curve_points

# Okabe and Ito 2008: eight colours that the colour-blind tell apart; black last
CLASSES = ("normal", "tumour")
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#F0E442", "#000000")
# what tells lines and points apart where colours do not
LINES, MARKS = ("-", "--", ":", "-."), "osD^vP*X"
# of 32 lines that differ, 4 of them without colours
DASHES = [LINES[(number + number // 8) % 4] for number in range(32)]
plt.rcParams.update(
    {
        "axes.prop_cycle": cycler(color=COLOURS * 4, linestyle=DASHES),
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


def new_figure(num_axes: int, width: float = 4.2, height: float = 3.2):
    """A row of axes, each `width` x `height` inches: (figure, array of axes)."""
    figure, axes = plt.subplots(1, num_axes, figsize=(width * num_axes, height), squeeze=False)
    return figure, axes[0]


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
    """A column of rows, of a CSV or not, as float64; what is empty, or not there, is NaN."""
    values = [row.get(name) for row in rows]
    return np.array([float("nan" if value in ("", None) else value) for value in values])


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


def plot_decisions(labels: np.ndarray, probs: np.ndarray, threshold: float):
    """ROC, precision-recall and the confusion matrix at a threshold, of labels int (N,)."""
    figure, (roc, pr, matrix) = new_figure(3, height=3.6)
    points = curve_points(labels, probs)
    roc.plot(points["false_positive_rate"], points["recall"])
    roc.axline((0, 0), slope=1, color="black", linestyle=":", label="constant answer")
    roc.set(title="ROC", xlabel="false positive rate", ylabel="recall")
    roc.legend()
    pr.plot(points["recall"], points["precision"])
    pr.axhline(labels.mean(), color="black", linestyle=":")
    pr.set(title="precision and recall", xlabel="recall", ylabel="precision")
    counts = np.bincount(2 * labels + (probs >= threshold), minlength=4)
    draw_confusion(matrix, counts, f"decided at probability {threshold:.3g}")
    return figure


def draw_confusion(axes, counts, title: str) -> None:
    """A confusion matrix, label by prediction, with shares of each label; counts (4,) are tn, fp,
    fn, tp.
    """
    counts = np.reshape(counts, (2, 2))
    shares = counts / np.maximum(1, counts.sum(1, keepdims=True))
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1.4)
    for (label, call), count in np.ndenumerate(counts):
        text = f"{count:,.0f}\n{shares[label, call]:.1%}"
        axes.text(call, label, text, ha="center", va="center", fontsize=12)
    axes.set(title=title, xlabel="prediction", ylabel="label")
    axes.set_xticks((0, 1), CLASSES)
    axes.set_yticks((0, 1), CLASSES, rotation=90, va="center")
    axes.grid(False)
