"""Plots in one style: readable in print and by the colour-blind, axes with units, returned as
images for a page or a file.
"""

import io
import math
import textwrap

import matplotlib

matplotlib.use("Agg")  # no screen on a cluster

import matplotlib.pyplot as plt
import numpy as np
from PIL import Image

from lib.metrics import curve_points, mean_interval

# Okabe and Ito 2008: eight colours that the colour-blind tell apart; black last
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#F0E442", "#000000")
# what tells lines and points apart where colours do not
LINES, MARKS = ("-", "--", ":", "-."), "osD^vP*X"
MOST_POINTS = 150  # of a line, where several are drawn together
NUM_GROUPS = 3  # of trials by the value of a parameter
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


def figure_png(figure, dpi: int = 110, source: str = "") -> bytes:
    """A figure as PNG, with what it was drawn from as text in it; the figure is closed."""
    buffer = io.BytesIO()
    with plt.rc_context(STYLE):
        figure.savefig(
            buffer,
            format="png",
            dpi=dpi,
            metadata={"Software": None} | ({"Source": source} if source else {}),
        )
    plt.close(figure)
    return buffer.getvalue()


def patch_png(patch: np.ndarray) -> bytes:
    """A patch uint8 (H, W, 3) as PNG, in its own colours."""
    buffer = io.BytesIO()
    Image.fromarray(patch).save(buffer, format="png")
    return buffer.getvalue()


def column(rows: list[dict], name: str) -> np.ndarray:
    """A column of rows, of a CSV or not, as float64, empty cells as NaN."""
    return np.array([float("nan" if row[name] in ("", None) else row[name]) for row in rows])


def plot_epochs(epochs: list[dict]):
    """Loss and scores per epoch, each beside what a constant answer gets."""
    figure, (left, middle, right) = new_figure(3)
    for axes, title, names, baselines in (
        (left, "log loss (nats)", ("train_loss", "val_loss"), ("prior_loss",)),
        (
            middle,
            "ROC-AUC and PR-AUC on validation",
            ("val_auc", "val_pr_auc"),
            ("constant_auc", "constant_pr_auc"),
        ),
        (
            right,
            "F2 and accuracy on validation",
            ("val_f2", "val_accuracy"),
            ("always_positive_f2", "majority_accuracy"),
        ),
    ):
        for name in names:
            axes.plot(
                column(epochs, "epoch"), column(epochs, name), marker="o", markersize=3, label=name
            )
        for name, colour in zip(
            baselines, COLOURS if len(baselines) > 1 else ["black"], strict=False
        ):
            axes.axhline(column(epochs, name)[0], color=colour, linestyle=":", label=name)
        axes.set(title=title, xlabel="epoch")
        axes.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(integer=True))
        axes.legend()
    return figure


def plot_steps(steps: list[dict]):
    """Training loss, global gradient norm and learning rate per step."""
    figure, panels = new_figure(3)
    titles = {
        "loss": "training loss (nats)",
        "grad_norm": "global gradient norm, before clipping",
        "lr": "learning rate",
    }
    for axes, (name, title) in zip(panels, titles.items(), strict=True):
        axes.plot(column(steps, "step"), column(steps, name), linewidth=0.8)
        axes.set(title=title, xlabel="step")
    panels[1].set_yscale("log")
    return figure


def plot_decisions(
    labels: np.ndarray, probs: np.ndarray, threshold: float, confusion: dict[str, int], others=()
):
    """ROC, precision-recall and the confusion matrix at a threshold; on the curves `others` too, as
    (name, threshold).
    """
    figure, (roc, pr, matrix) = new_figure(3, height=3.4 + 0.2 * (len(others) // 3))
    points = curve_points(labels, probs)
    styles = [
        {"marker": MARKS[n % len(MARKS)], "color": COLOURS[1 + n % 5]} for n in range(len(others))
    ]
    # around what lies there
    styles.append({"marker": "o", "markersize": 12, "fillstyle": "none", "color": "black"})
    for axes, title, x, y, chance in (
        (roc, "ROC", "false_positive_rate", "recall", ([0, 1], [0, 1])),
        (pr, "precision and recall", "recall", "precision", ([0, 1], [labels.mean()] * 2)),
    ):
        axes.plot(points[x], points[y])
        axes.plot(*chance, color="black", linestyle=":", label="constant answer")
        for (name, value), style in zip(
            [*others, (f"threshold {threshold:.3g}", threshold)], styles, strict=True
        ):
            at = np.searchsorted(-points["threshold"], -value, side="right") - 1
            if at >= 0:
                axes.plot(points[x][at], points[y][at], linestyle="", label=name, **style)
        axes.set(title=title, xlabel=x.replace("_", " "), ylabel=y, xlim=(0, 1), ylim=(0, 1.02))
    with plt.rc_context(STYLE):
        figure.legend(
            *roc.get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=8
        )
    counts = np.array([[confusion["tn"], confusion["fp"]], [confusion["fn"], confusion["tp"]]])
    matrix.imshow(counts, cmap="Blues", vmin=0, vmax=counts.sum())
    for (row, col), count in np.ndenumerate(counts):
        matrix.text(col, row, f"{count:,}", ha="center", va="center", fontsize=12)
    matrix.set(
        title="confusion matrix", xlabel="prediction", ylabel="label", xticks=(0, 1), yticks=(0, 1)
    )
    matrix.grid(False)
    return figure


def axis(spec: dict, values: list) -> tuple[list[float], list[int], list[str]]:
    """Values of a search's range as positions from 0 to 1 on an axis, the group of each, and labels
    from low to high.
    """
    ((kind, bounds),) = spec.items()
    if kind == "choice":
        groups = [bounds.index(value) for value in values]
        return (
            [group / max(1, len(bounds) - 1) for group in groups],
            groups,
            [str(bound) for bound in bounds],
        )
    scale = math.log if kind == "log" else float
    low, high = (scale(float(bound)) for bound in bounds)
    points = [(scale(value) - low) / (high - low) for value in values]
    return (
        points,
        [min(int(point * NUM_GROUPS), NUM_GROUPS - 1) for point in points],
        [f"{float(b):g}" for b in bounds],
    )


def plot_parallel(
    points: np.ndarray,
    labels: list[list[str]],
    names: list[str],
    scores: np.ndarray,
    kept: np.ndarray,
):
    """Trials as lines over axes, the last of them their score: `points` (N, D) from 0 to 1,
    `labels` of each axis from low to high, `kept` bool (N,) for those that were promoted."""
    figure, (axes,) = new_figure(1, 1.6 * (len(names) + 2), 3.6)
    low, high = scores.min(), max(scores.max(), scores.min() + 1e-9)
    height = np.column_stack([points, (scores - low) / (high - low)])
    for line, score, is_kept in sorted(
        zip(height, scores, kept, strict=True), key=lambda trial: (trial[2], trial[1])
    ):
        colour = matplotlib.colormaps["cividis_r"]((score - low) / (high - low))
        axes.plot(
            line, color=colour, linewidth=2.4 if is_kept else 0.9, alpha=1.0 if is_kept else 0.6
        )
    for number, texts in enumerate([*labels, [f"{low:.3f}", f"{high:.3f}"]]):
        axes.axvline(number, color="black", linewidth=0.8)
        for text, y in zip(
            texts, np.linspace(0, 1, len(texts)) if len(texts) > 1 else [0.5], strict=True
        ):
            box = {"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 1}
            axes.text(number + 0.03, y, text, fontsize=8, va="center", bbox=box)
    axes.set(
        xticks=range(len(names) + 1),
        xticklabels=[*names, "AUC"],
        yticks=(),
        xlim=(-0.1, len(names) + 0.5),
    )
    axes.set_title("every trial after its first rung; thick: promoted")
    axes.grid(False)
    return figure


def plot_marginals(
    points: np.ndarray, labels: list[list[str]], names: list[str], scores: np.ndarray, groups
):
    """Score against each parameter alone: trials as dots, and the mean with its interval in each of
    `groups` int (N, D).
    """
    figure, all_axes = new_figure(len(names), 3.0)
    for axes, at, texts, name, group in zip(
        all_axes, points.T, labels, names, groups.T, strict=True
    ):
        axes.plot(at, scores, "o", markersize=3, alpha=0.5)
        for number in np.unique(group):
            inside = group == number
            if inside.sum() > 1:
                spread = mean_interval(scores[inside])
                reach = spread["high"] - spread["mean"]
                axes.errorbar(
                    at[inside].mean(), spread["mean"], reach, fmt="s", color=COLOURS[1], capsize=4
                )
        axes.set(
            xticks=np.linspace(0, 1, len(texts)) if len(texts) > 1 else [0.5],
            xticklabels=texts,
            xlabel=name,
        )
    all_axes[0].set_ylabel("AUC after the first rung")
    return figure


def plot_budget(budgets: np.ndarray, scores: np.ndarray, rung_ends: list[float], full: float):
    """The best score so far against the epochs spent so far, beside what all trials to the end
    would have cost.
    """
    figure, (axes,) = new_figure(1, 6.4)
    axes.plot(budgets, scores, "o", markersize=3, alpha=0.5, label="a trial")
    axes.step(
        budgets, np.maximum.accumulate(scores), where="post", color=COLOURS[1], label="best so far"
    )
    for end in rung_ends:
        axes.axvline(end, color="black", linestyle=":", linewidth=0.8)
    axes.axvline(full, color=COLOURS[2], label="every trial to its end")
    axes.set(
        xlabel="epochs trained, all trials together (dotted: end of a rung)",
        ylabel="AUC on validation",
    )
    axes.legend(loc="lower right")
    return figure


def plot_together(tables: dict[tuple[str, str], list[dict]], curves):
    """An axes for each curve (file, column, title, scale) with a line for each run; `tables` are
    {(run, file): CSV rows}.

    Of a long run the means of blocks of rows are drawn: the noise of single steps would hide every
    line but the last.
    """
    figure, panels = new_figure(len(curves), height=4.2)
    names = list(dict.fromkeys(run for run, _ in tables))
    for axes, (file, name, title, scale) in zip(panels, curves, strict=True):
        for number, run in enumerate(names):
            rows, style = tables.get((run, file), []), LINES[number // len(COLOURS) % 4]
            blocks = [
                np.array_split(column(rows, key), min(len(rows), MOST_POINTS) or 1)
                for key in ("step", name)
            ]
            x, y = ([block.mean() for block in part if len(block)] for part in blocks)
            axes.plot(x, y, style, color=COLOURS[number % len(COLOURS)], linewidth=1)
        axes.set(title=title, xlabel="step", yscale=scale)
        axes.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(5))
    with plt.rc_context(STYLE):
        figure.legend(
            panels[0].lines,
            names,
            loc="outside lower center",
            ncols=max(1, min(3, len(names))),
            fontsize=8,
        )
    return figure


def plot_seeds(tables: dict[str, list[dict]], curves):
    """An axes for each curve (column, title, scale) over `step` or `epoch`: each run a thin line,
    their mean a thick one.

    Where there are many steps the mean is taken over blocks of them too, and the thin lines show
    what it hides.
    """
    figure, panels = new_figure(len(curves), 4.2 if len(curves) > 2 else 9 / len(curves), 3.6)
    x = "epoch" if all("val_loss" in rows[0] for rows in tables.values()) else "step"
    length = min(map(len, tables.values()))
    for axes, (name, title, scale) in zip(panels, curves, strict=True):
        values = np.array([column(rows[:length], name) for rows in tables.values()])
        at = column(next(iter(tables.values()))[:length], x)
        for number, (run, line) in enumerate(zip(tables, values, strict=True)):
            axes.plot(
                at,
                line,
                LINES[number % 4],
                color=COLOURS[number % 7],
                linewidth=0.7,
                alpha=0.8,
                label=run,
            )
        blocks = np.array_split(np.arange(length), min(length, MOST_POINTS))
        middle = [values[:, block].mean() for block in blocks]
        axes.plot(
            [at[block].mean() for block in blocks], middle, color="black", linewidth=2, label="mean"
        )
        axes.set(title=title, xlabel=x, yscale=scale)
        axes.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(5, integer=True))
    panels[0].legend(fontsize=8)
    return figure


def plot_reliability(bins: list[dict]):
    """Share of positives against the mean probability of each bin, and how many patches it holds,
    for each of the series that `probabilities` names; the constant one is left out."""
    figure, (axes, counts) = new_figure(2, 5.2, 4.0)
    axes.plot([0, 1], [0, 1], color="black", linestyle=":")
    names = [
        name
        for name in dict.fromkeys(row["probabilities"] for row in bins)
        if not name.startswith("always")
    ]
    for place, name in enumerate(names):
        keys = (
            "mean_probability",
            "positive_share",
            "positive_share_low",
            "positive_share_high",
            "num",
            "low",
            "high",
        )
        rows = [row for row in bins if row["probabilities"] == name]
        x, y, low, high, num, start, end = (column(rows, key) for key in keys)
        style = {"color": COLOURS[place], "label": name}
        axes.errorbar(
            x,
            y,
            np.maximum([y - low, high - y], 0),
            fmt=f"{MARKS[place]}-",
            markersize=4,
            capsize=2,
            **style,
        )
        counts.hlines(num, start, end, linewidth=2, **style)
    axes.set(
        xlabel="mean probability of a bin",
        ylabel="share of positives",
        xlim=(0, 1),
        ylim=(0, 1),
        title="reliability",
    )
    counts.set(
        xlabel="probability", ylabel="patches", yscale="log", xlim=(0, 1), title="patches in a bin"
    )
    with plt.rc_context(STYLE):
        figure.legend(
            *axes.get_legend_handles_labels(), loc="outside lower center", ncols=2, fontsize=8
        )
    return figure


def plot_counts(rows: list[dict]):
    """Bars of the patches per split and class: rows of split, label (-1: without one) and count."""
    figure, (axes,) = new_figure(1, width=7)
    splits = list(dict.fromkeys(row["split"] for row in rows))
    for number, (label, name) in enumerate(
        ((0, "negative"), (1, "positive"), (-1, "without label"))
    ):
        own = [row for row in rows if int(row["label"]) == label]
        counts = [
            sum(int(row["count"]) for row in own if row["split"] == split) for split in splits
        ]
        if label >= 0 or any(counts):
            places, hatch = np.arange(len(splits)) + 0.28 * (number - 0.5), ("", "//", "..")[number]
            bars = axes.bar(
                places,
                counts,
                0.26,
                label=name,
                color=COLOURS[number],
                hatch=hatch,
                edgecolor="white",
            )
            axes.bar_label(bars, [f"{count:,}" for count in counts], fontsize=8)
    axes.set(xticks=range(len(splits)), xticklabels=splits, ylabel="patches")
    axes.legend()
    return figure


def plot_histograms(rows: list[dict]):
    """An axes for each feature, a line for each split: rows of split, feature, unit, low, high and
    num.
    """
    units = {row["feature"]: row["unit"] for row in rows}
    figure, panels = new_figure(max(1, len(units)), width=3.4)
    for axes, (feature, unit) in zip(panels, units.items(), strict=False):
        for number, split in enumerate(dict.fromkeys(row["split"] for row in rows)):
            bins = [row for row in rows if (row["split"], row["feature"]) == (split, feature)]
            num, edges = column(bins, "num"), [float(bins[0]["low"]), *column(bins, "high")]
            style = {"color": COLOURS[number], "linestyle": LINES[number % 4], "linewidth": 1.4}
            axes.stairs(num / max(num.sum(), 1), edges, label=split, **style)
        axes.set(title=feature, xlabel=unit)
        axes.legend(fontsize=8)
    panels[0].set_ylabel("share of the intact patches")
    return figure


def plot_gallery(patches, captions: list[str], num_columns: int = 8):
    """Patches uint8 (H, W, 3) in rows, each with a caption below."""
    num_rows = -(-len(patches) // num_columns)
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(
            num_rows, num_columns, figsize=(1.35 * num_columns, 1.75 * num_rows), squeeze=False
        )
    for place in axes.flat:
        place.axis("off")
    for place, patch, caption in zip(axes.flat, patches, captions, strict=False):
        # or nobody would see white ones
        framed = np.pad(patch, ((1, 1), (1, 1), (0, 0)), constant_values=190)
        place.imshow(framed, interpolation="nearest")
        words = "\n".join(textwrap.wrap(caption, 20)[:3])
        place.text(0.5, -0.04, words, fontsize=7, ha="center", va="top", transform=place.transAxes)
    return figure


def plot_intervals(names: list[str], values, lows, highs, overall: float, title: str):
    """A score as a dot with its interval for each name, beside the overall one."""
    figure, (axes,) = new_figure(1, 7.5, 1.2 + 0.26 * len(names))
    places = np.arange(len(names))[::-1]
    axes.hlines(places, lows, highs, color=COLOURS[0])
    axes.plot(values, places, "o", color=COLOURS[0], label="slice, with its interval")
    if math.isfinite(overall):
        axes.axvline(overall, color="black", linestyle="--", label="all of them")
    axes.set(yticks=places, yticklabels=names, xlabel=title, ylim=(-0.7, len(names) - 0.3))
    with plt.rc_context(STYLE):
        figure.legend(loc="outside upper right", ncols=2, fontsize=8)
    return figure


def plot_scaling(series: dict[str, list[tuple[float, float, float, float]]]):
    """Throughput against batch size, a line for each series: (batch size, images per second, low,
    high).
    """
    figure, (axes,) = new_figure(1, 7.5, 4.2)
    for number, (name, points) in enumerate(series.items()):
        size, rate, low, high = np.array(sorted(points)).T
        colour, line, mark = COLOURS[number % 7], LINES[number // 7 % 4], MARKS[number % len(MARKS)]
        axes.errorbar(
            size,
            rate,
            [rate - low, high - rate],
            color=colour,
            linestyle=line,
            marker=mark,
            capsize=3,
            label=name,
        )
    sizes = sorted({point[0] for points in series.values() for point in points})
    axes.set(
        xscale="log", yscale="log", xlabel="batch size", ylabel="images per second", xticks=sizes
    )
    axes.set_xticklabels([f"{size:g}" for size in sizes])
    axes.minorticks_off()
    with plt.rc_context(STYLE):
        figure.legend(loc="outside lower center", ncols=2, fontsize=8)
    return figure


def plot_time_line(equal: dict[str, list[bool]], steps: list[int]):
    """The grid quantities x steps of two runs: equal to the bit, or not."""
    figure, (axes,) = new_figure(1, width=11, height=0.9 + 0.28 * len(equal))
    extent = (steps[0] / 2, steps[-1] + steps[0] / 2, len(equal) - 0.5, -0.5)
    colours = matplotlib.colors.ListedColormap([COLOURS[1], COLOURS[5]])
    axes.imshow(
        [*equal.values()],
        cmap=colours,
        vmin=0,
        vmax=1,
        aspect="auto",
        interpolation="nearest",
        extent=extent,
    )
    axes.hlines([row + 0.5 for row in range(len(equal))], *extent[:2], color="white", linewidth=2)
    axes.set(
        xlabel="step",
        yticks=range(len(equal)),
        yticklabels=equal,
        title="blue: equal to the bit, orange: not",
    )
    axes.grid(False)
    return figure


def plot_commits(commits: list[tuple[str, list[str], str]]):
    """Commits (name, names of parents, subject), the newest first, as a graph: a lane for each line
    of development.
    """
    figure, (axes,) = new_figure(1, 10, 0.5 + 0.3 * len(commits))
    lanes, row_of, lane_of = [], {name: row for row, (name, _, _) in enumerate(commits)}, {}
    for name, parents, _ in commits:
        lane = lane_of[name] = lanes.index(name) if name in lanes else len(lanes)
        lanes = [None if waiting == name else waiting for waiting in lanes] + [None] * (
            lane == len(lanes)
        )
        for number, parent in enumerate(parents):
            if parent not in lanes:
                free = (
                    lane
                    if not number
                    else next((at for at, waits in enumerate(lanes) if waits is None), len(lanes))
                )
                lanes[free : free + 1] = [parent]
    for row, (name, parents, subject) in enumerate(commits):
        for number, parent in enumerate(parents):
            to = row_of.get(parent, len(commits))
            bend = lane_of.get(parent, lane_of[name])
            via = bend if number else lane_of[name]
            axes.plot(
                [lane_of[name], via, via, bend],
                [row, row + 0.5, max(to - 0.5, row + 0.5), to],
                color="grey",
                zorder=1,
            )
        axes.plot(
            lane_of[name], row, MARKS[len(parents) > 1], color=COLOURS[len(parents) > 1], zorder=2
        )
        axes.text(
            max(lane_of.values()) + 0.6,
            row,
            f"{name}  {subject[:90]}",
            va="center",
            fontsize=8,
            family="monospace",
        )
    axes.set(ylim=(len(commits) - 0.4, -0.6), xlim=(-0.5, max(lane_of.values()) + 12))
    axes.axis("off")
    return figure
