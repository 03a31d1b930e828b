"""Figures of several runs, of the champion, and of the repository's history."""

import numpy as np
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator

from lib.figures import COLOURS, add_legend, column, line_style, new_figure

MOST_POINTS = 150  # of a line, where several are drawn together
WINDOW, SPIKE = 101, 2.0  # a spike: a norm of so many times the median of the steps around it
CLASSES = ("normal", "tumour")


def block_means(values: np.ndarray) -> np.ndarray:
    """The means of at most MOST_POINTS blocks of values (N,)."""
    num_blocks = min(len(values), MOST_POINTS)
    blocks = np.array_split(values, num_blocks) if num_blocks else []
    return np.array([block.mean() for block in blocks])


def set_up_axes(axes, title: str, x: str, scale: str) -> None:
    """Title, scale and plain ticks of the axes of a curve."""
    axes.set(title=title, xlabel=x, yscale=scale)
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    if scale == "log":
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.minorticks_off()


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
            line = [column(rows, x), column(rows, name)]
            lines.append(line)
            shown = line if with_mean else map(block_means, line)
            width = 0.6 if with_mean else 0.8
            axes.plot(*shown, linewidth=width, label=run, **line_style(number))
            if with_mean and name == "grad_norm":
                mark_spikes(axes, rows, "spike" if number == 0 else None)
        if with_mean:
            length = min(len(values) for _, values in lines)
            mean = np.mean([values[:length] for _, values in lines], 0)
            shown = map(block_means, (lines[0][0][:length], mean))
            axes.plot(*shown, "k", linewidth=2.4, label="mean")
        for score in constant:
            answer = column(rows, score)[0]
            axes.axhline(answer, color="grey", linestyle=":", label="constant answer")
        set_up_axes(axes, title, x, scale)
    add_legend(figure, panels[-1], num_columns=6 if with_mean else 4)
    return figure


def mark_spikes(axes, rows: list[dict], label: str | None) -> None:
    spikes = find_spikes(rows)
    places = [spike["step"] for spike in spikes]
    norms = [spike["grad_norm"] for spike in spikes]
    axes.plot(places, norms, "kv", label=label)


def find_spikes(rows: list[dict]) -> list[dict]:
    """The steps of a steps.csv whose gradient norm is a spike: step, epoch, grad_norm, its ratio to
    the running median, loss, and the median loss around it.
    """
    norm, loss = column(rows, "grad_norm"), column(rows, "loss")
    ratio, usual_loss = norm / running_median(norm), running_median(loss)
    spikes = []
    for place in np.flatnonzero(ratio > SPIKE).tolist():
        spike = {"step": int(rows[place]["step"]), "epoch": int(rows[place]["epoch"])}
        spike |= {"grad_norm": norm[place], "ratio": ratio[place]}
        spikes.append(spike | {"loss": loss[place], "usual_loss": usual_loss[place]})
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
    names = ("val_tn", "val_fp", "val_fn", "val_tp")
    draw_confusion(panels[1], np.reshape([champion[name] for name in names], (2, 2)))
    if errors:
        panels[2].axis("off")
        panels[2].set_title("errors of the champion")
        for number, (patch, caption) in enumerate(errors):
            corner = (number % 2 * 0.5, 0.5 - number // 2 * 0.5)
            inset = panels[2].inset_axes([*corner, 0.46, 0.4])
            show_patch(inset, patch, caption)
    add_legend(figure, panels[0], num_columns=3)
    return figure


def draw_dots(axes, seeds: list[dict], champion: dict) -> None:
    """AUC and F2 of each seed and of the champion, beside those of constant answers."""
    scores = (("AUC", "val_auc", "constant_auc"), ("F2 at 0.5", "val_f2", "always_positive_f2"))
    for place, (_, score, constant) in enumerate(scores):
        values = [row[score] for row in seeds]
        spread = np.linspace(-0.12, 0.12, len(values)) + place
        named = place == 0
        axes.plot(spread, values, "o", color=COLOURS[0], label="a seed" if named else None)
        axes.plot(
            place + 0.25,
            champion[score],
            "D",
            color=COLOURS[1],
            label="champion" if named else None,
        )
        reach = (place - 0.3, place + 0.35)
        label = "constant answer" if named else None
        axes.plot(reach, [champion[constant]] * 2, "k:", label=label)
    axes.set(title="scores on validation", xticks=range(len(scores)), ylim=(None, 1))
    axes.set_xticklabels([title for title, *_ in scores])
    axes.set_xlim(-0.5, len(scores) - 0.4)


def draw_confusion(axes, counts: np.ndarray) -> None:
    """A confusion matrix (2, 2), label by prediction, with shares of each label."""
    shares = counts / np.maximum(1, counts.sum(1, keepdims=True))
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1.4)
    for (label, call), count in np.ndenumerate(counts):
        text = f"{count:,.0f}\n{shares[label, call]:.1%}"
        axes.text(call, label, text, ha="center", va="center", fontsize=12)
    axes.set(title="champion, decided at 0.5", xlabel="prediction", ylabel="label")
    axes.set(xticks=(0, 1), yticks=(0, 1))
    axes.set_xticklabels(CLASSES)
    axes.set_yticklabels(CLASSES, rotation=90, va="center")
    axes.grid(False)


def plot_patches(rows: list[tuple[str, list]]):
    """A row of patches for each (title, [(patch, caption)])."""
    most = max(len(patches) for _, patches in rows)
    figure, _ = new_figure(1, 1.5 * most, 1.9 * len(rows))
    figure.clear()
    panels = figure.subplots(len(rows), most, squeeze=False)
    for axes, (title, patches) in zip(panels, rows, strict=True):
        for place, panel in enumerate(axes):
            panel.axis("off")
            if place < len(patches):
                show_patch(panel, *patches[place])
        axes[0].text(-0.15, 0.5, title, transform=axes[0].transAxes, rotation=90, va="center")
    return figure


def show_patch(axes, patch: np.ndarray, caption: str) -> None:
    axes.imshow(patch)
    axes.set_title(caption, fontsize=8)
    axes.axis("off")
