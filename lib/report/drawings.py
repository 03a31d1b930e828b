"""Figures of several runs, and of the champion."""

from pathlib import Path

import numpy as np
from matplotlib.ticker import MaxNLocator

from lib.blocks import Figure, Table, Words, write_page
from lib.command import BadInput
from lib.figures import (
    add_legend,
    column,
    draw_confusion,
    figure_png,
    new_figure,
)
from lib.files import read_csv

MOST_DRAWN = 32  # lines that eight colours in four styles tell apart
MOST_POINTS = 150  # of a mean
# a spike: a norm of so many times the median of the steps around it
WINDOW = 101
SPIKE = 2.0
# curves: file, column, title
LOSS = ("steps.csv", "loss", "training loss (nats)")
GRADIENT_NORM = ("steps.csv", "grad_norm", "global gradient norm, before clipping")
LEARNING_RATE = ("steps.csv", "lr", "learning rate")
TRAIN_LOSS = ("epochs.csv", "train_loss", "training loss (nats)")
VAL_LOSS = ("epochs.csv", "val_loss", "log loss on validation (nats)")
VAL_AUC = ("epochs.csv", "val_auc", "ROC-AUC on validation")
VAL_F2 = ("epochs.csv", "val_f2", "F2 at 0.5 on validation")


def write_together(
    path, title: str, table: Table, runs: list[Path], curves, with_mean=False, remark=""
) -> str:
    """Write a page with a table and the runs' curves drawn together, and give its path. Raises
    BadInput for too many to tell apart.
    """
    if not 0 < len(runs) <= MOST_DRAWN:
        sentence = f"{len(runs)} runs cannot be drawn together, 1 to {MOST_DRAWN} can"
        raise BadInput(f"{path}: {sentence} (--where chooses)")
    png = figure_png(plot_runs({run.name: run for run in runs}, curves, with_mean))
    blocks = [table, Words(remark, "note"), Figure("Curves of these runs", png)]
    return str(write_page(path, title, blocks))


def plot_runs(runs: dict[str, Path], curves, with_mean=False):
    """An axes for each curve (file, column, title[, constant]) with a line for each {label: run
    folder}. A constant answer is dotted.

    With their mean over the runs, which is thick, spikes of the gradient norm are marked.
    """
    figure, panels = new_figure(len(curves), max(4.2, 9 / len(curves)), 4.0)
    for axes, (file, name, title, *constant) in zip(panels, curves, strict=True):
        x = "epoch" if file == "epochs.csv" else "step"
        lines = []
        for number, (label, run) in enumerate(runs.items()):
            rows = read_csv(run / file) if (run / file).is_file() else []
            line = np.stack([column(rows, x), column(rows, name)])
            lines.append(line)
            axes.plot(*line, linewidth=0.7, label=label)
            if with_mean and name == "grad_norm":
                spikes = line[:, norm_ratios(line[1]) > SPIKE]
                axes.plot(*spikes, "kv", label=None if number else "spike")
        if with_mean:
            shortest = min(line.shape[1] for line in lines)
            mean = np.mean([line[:, :shortest] for line in lines], 0)
            axes.plot(*block_means(mean), "k-", linewidth=2.4, label="mean")
        for score in constant:
            answer = column(rows, score)[0]
            axes.axhline(answer, color="grey", linestyle=":", label="constant answer")
        axes.set(title=title, xlabel=x, yscale="log" if name == "grad_norm" else "linear")
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    add_legend(figure, panels[-1], num_columns=6)
    return figure


def block_means(values: np.ndarray) -> np.ndarray:
    """The means of at most MOST_POINTS blocks of values (K, N): (K, blocks)."""
    num_blocks = max(1, min(values.shape[1], MOST_POINTS))
    return np.stack([block.mean(1) for block in np.array_split(values, num_blocks, 1)], 1)


def norm_ratios(norms: np.ndarray) -> np.ndarray:
    """Each of norms (N,) over the median of the WINDOW steps around it, fewer at the ends: (N,)."""
    padded = np.pad(norms, WINDOW // 2, constant_values=np.nan)
    windows = np.lib.stride_tricks.sliding_window_view(padded, WINDOW)
    return norms / np.nanmedian(windows, 1)


def plot_front(seeds: list[dict], champion: dict, errors: list):
    """The front picture: a dot a seed and the champion beside constant answers, the champion's
    confusion matrix and, where there are any, errors (patch, caption).
    """
    figure, panels = new_figure(3 if errors else 2, height=3.6)
    answer = {"val_auc": champion["constant_auc"], "val_f2": champion["always_positive_f2"]}
    series = {
        "a seed": (seeds, "o"),
        "champion": ([champion], "D"),
        "constant answer": ([answer], "_"),
    }
    for label, (rows, mark) in series.items():
        scores = np.concatenate([column(rows, "val_auc"), column(rows, "val_f2")])
        panels[0].plot(np.repeat((0, 1), len(rows)), scores, mark, label=label, markersize=8)
    panels[0].set(title="scores on validation", xlim=(-0.5, 1.5), ylim=(None, 1))
    panels[0].set_xticks((0, 1), ("AUC", "F2 at 0.5"))
    counts = [champion[f"val_{name}"] for name in ("tn", "fp", "fn", "tp")]
    draw_confusion(panels[1], counts, "champion, decided at 0.5")
    if errors:
        show_patches(panels[2], errors)
    add_legend(figure, panels[0], num_columns=3)
    return figure


def show_patches(axes, patches: list) -> None:
    """Errors (patch uint8 (H, W, 3), caption) side by side, each above its caption."""
    strip = np.concatenate([patch for patch, _ in patches], 1)
    centres = strip.shape[1] / len(patches) * (np.arange(len(patches)) + 0.5)
    axes.imshow(strip)
    axes.set(title="errors of the champion", yticks=[])
    axes.set_xticks(centres, [caption for _, caption in patches], fontsize=8)
    axes.grid(False)
