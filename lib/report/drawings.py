"""Figures of several runs, and of the champion."""

from pathlib import Path

import numpy as np
from matplotlib.ticker import MaxNLocator

from lib.blocks import Figure, Heading, Table, Words, write_page
from lib.command import BadInput
from lib.figures import (
    COLOURS,
    add_legend,
    column,
    draw_confusion,
    figure_png,
    line_style,
    new_figure,
)
from lib.files import read_csv

MOST_DRAWN = 32  # lines that eight colours in four styles tell apart
MOST_POINTS = 150  # of a line, where several are drawn together
# a spike: a norm of so many times the median of the steps around it
WINDOW = 101
SPIKE = 2.0
# curves: file, column, title, scale
LOSS = ("steps.csv", "loss", "training loss (nats)", "linear")
GRADIENT_NORM = ("steps.csv", "grad_norm", "global gradient norm, before clipping", "log")
LEARNING_RATE = ("steps.csv", "lr", "learning rate", "linear")
VAL_LOSS = ("epochs.csv", "val_loss", "log loss on validation (nats)", "linear")
VAL_AUC = ("epochs.csv", "val_auc", "ROC-AUC on validation", "linear")
VAL_F2 = ("epochs.csv", "val_f2", "F2 at 0.5 on validation", "linear")


def write_together(path, title: str, table: Table, runs: list[Path], curves, remark="") -> str:
    """Write a page with a table and the runs' curves drawn together, and give its path. Raises
    BadInput for too many to tell apart.
    """
    if not 0 < len(runs) <= MOST_DRAWN:
        raise BadInput(
            f"{path}: {len(runs)} runs cannot be drawn together, 1 to {MOST_DRAWN} can (--where"
            " chooses)"
        )
    tables = {}
    for run in runs:
        for file in {curve[0] for curve in curves}:
            if (run / file).is_file():
                tables[run.name, file] = read_csv(run / file)
    titles = ", ".join(title for _, _, title, _ in curves)
    drawn = Figure(titles, figure_png(plot_runs(tables, curves)))
    blocks = [Heading("Runs"), table, Words(remark, "note"), Heading("Curves"), drawn]
    return str(write_page(path, title, blocks))


def block_means(values: np.ndarray) -> np.ndarray:
    """The means of at most MOST_POINTS blocks of values (N,)."""
    num_blocks = max(1, min(len(values), MOST_POINTS))
    return np.array([block.mean() for block in np.array_split(values, num_blocks) if len(block)])


def plot_runs(tables: dict[tuple[str, str], list[dict]], curves, with_mean: bool = False):
    """An axes for each curve (file, column, title, scale[, constant]) with a line for each run;
    `tables` are {(run, file): CSV rows}. A constant answer is dotted.

    Of a long run the means of blocks of rows are drawn: the noise of single steps would hide every
    line but the last. With their mean over the runs, which is thick, each run is drawn as it is,
    and spikes of the gradient norm are marked.
    """
    figure, panels = new_figure(len(curves), max(4.2, 9 / len(curves)), 4.0)
    runs = list(dict.fromkeys(run for run, _ in tables))
    for axes, (file, name, title, scale, *constant) in zip(panels, curves, strict=True):
        x = "epoch" if file == "epochs.csv" else "step"
        lines = []
        for number, run in enumerate(runs):
            rows = tables.get((run, file), [])
            line = np.stack([column(rows, x), column(rows, name)])
            lines.append(line)
            shown = line if with_mean else map(block_means, line)
            axes.plot(*shown, linewidth=0.7, label=run, **line_style(number))
            if with_mean and name == "grad_norm":
                spikes = find_spikes(rows)
                places = column(spikes, "step")
                norms = column(spikes, "grad_norm")
                axes.plot(places, norms, "kv", label=None if number else "spike")
        if with_mean:
            shortest = min(line.shape[1] for line in lines)
            mean = np.mean([line[:, :shortest] for line in lines], 0)
            axes.plot(*map(block_means, mean), "k", linewidth=2.4, label="mean")
        for score in constant:
            answer = column(rows, score)[0]
            axes.axhline(answer, color="grey", linestyle=":", label="constant answer")
        axes.set(title=title, xlabel=x, yscale=scale)
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    add_legend(figure, panels[-1], num_columns=6 if with_mean else 4)
    return figure


def find_spikes(rows: list[dict]) -> list[dict]:
    """The steps of a steps.csv whose gradient norm is a spike: step, epoch, grad_norm, its ratio to
    the running median, and whether the loss is above its own median.
    """
    norm = column(rows, "grad_norm")
    loss = column(rows, "loss")
    ratio = norm / running_median(norm)
    usual_loss = running_median(loss)
    spikes = []
    for place in np.flatnonzero(ratio > SPIKE):
        spike = {name: int(rows[place][name]) for name in ("step", "epoch")}
        spike |= {"grad_norm": norm[place], "ratio": ratio[place]}
        spikes.append(spike | {"has_high_loss": loss[place] > usual_loss[place]})
    return spikes


def running_median(values: np.ndarray) -> np.ndarray:
    """The median of the WINDOW values around each of values (N,), fewer at the ends: (N,)."""
    padded = np.pad(values, WINDOW // 2, constant_values=np.nan)
    return np.nanmedian(np.lib.stride_tricks.sliding_window_view(padded, WINDOW), 1)


def plot_front(seeds: list[dict], champion: dict, errors: list):
    """The front picture: a dot a seed and the champion beside constant answers, the champion's
    confusion matrix and, where there are any, errors (patch, caption).
    """
    figure, panels = new_figure(3 if errors else 2, height=3.6)
    draw_dots(panels[0], seeds, champion)
    counts = [champion[f"val_{name}"] for name in ("tn", "fp", "fn", "tp")]
    draw_confusion(panels[1], counts, "champion, decided at 0.5")
    if errors:
        panels[2].axis("off")
        panels[2].set_title("errors of the champion")
    for number, (patch, caption) in enumerate(errors):
        corner = (number % 2 * 0.5, 0.5 - number // 2 * 0.5)
        show_patch(panels[2].inset_axes([*corner, 0.46, 0.4]), patch, caption)
    add_legend(figure, panels[0], num_columns=3)
    return figure


def draw_dots(axes, seeds: list[dict], champion: dict) -> None:
    """AUC and F2 of each seed and of the champion, beside those of constant answers."""
    names = ("val_auc", "val_f2")
    constants = ("constant_auc", "always_positive_f2")
    places = np.arange(len(names))
    for number, row in enumerate(seeds):
        offset = 0.24 * number / max(1, len(seeds) - 1) - 0.12
        label = None if number else "a seed"
        scores = [row[name] for name in names]
        axes.plot(places + offset, scores, "o", color=COLOURS[0], label=label)
    scores = [champion[name] for name in names]
    axes.plot(places + 0.25, scores, "D", color=COLOURS[1], label="champion")
    answers = [champion[name] for name in constants]
    axes.hlines(answers, places - 0.3, places + 0.35, "k", ":", label="constant answer")
    axes.set(title="scores on validation", ylim=(None, 1), xlim=(-0.5, 1.6))
    axes.set_xticks(places, ("AUC", "F2 at 0.5"))


def plot_patches(groups: dict[str, list]):
    """A row of patches for each {title: [(patch, caption)]}."""
    most = max(map(len, groups.values()))
    figure, _ = new_figure(1, 1.5 * most, 1.9 * len(groups))
    figure.clear()
    panels = figure.subplots(len(groups), most, squeeze=False)
    for axes, (title, patches) in zip(panels, groups.items(), strict=True):
        for panel in axes:
            panel.axis("off")
        for panel, patch in zip(axes, patches, strict=False):
            show_patch(panel, *patch)
        axes[0].text(-0.15, 0.5, title, transform=axes[0].transAxes, rotation=90, va="center")
    return figure


def show_patch(axes, patch: np.ndarray, caption: str) -> None:
    axes.imshow(patch)
    axes.set_title(caption, fontsize=8)
    axes.axis("off")
