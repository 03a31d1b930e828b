"""What reports draw of several runs, of slices and of a repository's history."""

import math

import numpy as np
from matplotlib.ticker import MaxNLocator

from lib.figures import COLOURS, MARKS, add_legend, column, line_style, new_figure

MOST_POINTS = 150  # of a line, where several are drawn together
MOST_LETTERS = 90  # of a commit's subject


def block_means(values: np.ndarray) -> np.ndarray:
    """The means of at most MOST_POINTS blocks of values (N,)."""
    num_blocks = min(len(values), MOST_POINTS)
    blocks = np.array_split(values, num_blocks) if num_blocks else []
    return np.array([block.mean() for block in blocks])


def plot_runs(tables: dict[tuple[str, str], list[dict]], curves, with_mean: bool = False):
    """An axes for each curve (file, column, title, scale) with a line for each run; `tables` are
    {(run, file): CSV rows}.

    Of a long run the means of blocks of rows are drawn: the noise of single steps would hide every
    line but the last. With their mean over the runs, that is drawn so, and each run as it is.
    """
    figure, panels = new_figure(len(curves), max(4.2, 9 / len(curves)), 4.0)
    runs = list(dict.fromkeys(run for run, _ in tables))
    for axes, (file, name, title, scale) in zip(panels, curves, strict=True):
        x = "epoch" if file == "epochs.csv" else "step"
        lines = []
        for number, run in enumerate(runs):
            rows = tables.get((run, file), [])
            line = column(rows, x), column(rows, name)
            lines.append(line)
            drawn = line if with_mean else map(block_means, line)
            axes.plot(*drawn, linewidth=0.8, label=run, **line_style(number))
        if with_mean:
            length = min(len(values) for _, values in lines)
            mean = np.mean([values[:length] for _, values in lines], 0)
            positions = block_means(lines[0][0][:length])
            axes.plot(positions, block_means(mean), color="black", linewidth=2, label="mean")
        axes.set(title=title, xlabel=x, yscale=scale)
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    add_legend(figure, panels[0], num_columns=4)
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
    add_legend(figure, axes)
    return figure


def assign_lanes(commits: list[tuple[str, list[str], str]]) -> dict[str, int]:
    """A lane for each commit, the newest first: its first parent goes on in it, further ones take
    the next free.
    """
    waiting = []  # of each lane, the commit that comes next in it
    lane_of = {}
    for name, parents, _ in commits:
        lane = waiting.index(name) if name in waiting else len(waiting)
        lane_of[name] = lane
        waiting = [None if other == name else other for other in waiting]
        if lane == len(waiting):
            waiting.append(None)
        for number, parent in enumerate(parents):
            if parent in waiting:
                continue
            free = lane
            if number:
                free = waiting.index(None) if None in waiting else len(waiting)
            waiting[free : free + 1] = [parent]
    return lane_of


def plot_commits(commits: list[tuple[str, list[str], str]]):
    """Commits (name, names of parents, subject), the newest first, as a graph: a lane for each line
    of development.
    """
    figure, (axes,) = new_figure(1, 10, 0.5 + 0.3 * len(commits))
    lane_of = assign_lanes(commits)
    row_of = {name: row for row, (name, _, _) in enumerate(commits)}
    last_lane = max(lane_of.values())
    for row, (name, parents, subject) in enumerate(commits):
        lane = lane_of[name]
        for number, parent in enumerate(parents):
            parent_row, parent_lane = row_of.get(parent, len(commits)), lane_of.get(parent, lane)
            between = parent_lane if number else lane
            lanes = [lane, between, between, parent_lane]
            rows = [row, row + 0.5, max(parent_row - 0.5, row + 0.5), parent_row]
            axes.plot(lanes, rows, color="grey", zorder=1)
        kind = 1 if len(parents) > 1 else 0
        axes.plot(lane, row, MARKS[kind], color=COLOURS[kind], zorder=2)
        text = f"{name}  {subject[:MOST_LETTERS]}"
        axes.text(last_lane + 0.6, row, text, va="center", fontsize=8, family="monospace")
    axes.set(ylim=(len(commits) - 0.4, -0.6), xlim=(-0.5, last_lane + 12))
    axes.axis("off")
    return figure
