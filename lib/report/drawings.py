"""What reports draw of several runs, of slices and of a repository's history."""

import math

import numpy as np
from matplotlib.ticker import MaxNLocator

from lib.figures import COLOURS, LINES, MARKS, add_legend, column, new_figure

MOST_POINTS = 150  # of a line, where several are drawn together
MOST_LETTERS = 90  # of a commit's subject


def block_means(values: np.ndarray) -> np.ndarray:
    """The means of at most MOST_POINTS blocks of values (N,)."""
    num_blocks = min(len(values), MOST_POINTS)
    blocks = np.array_split(values, num_blocks) if num_blocks else []
    return np.array([block.mean() for block in blocks])


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
            rows = tables.get((run, file), [])
            steps, values = block_means(column(rows, "step")), block_means(column(rows, name))
            line = LINES[number // len(COLOURS) % len(LINES)]
            axes.plot(steps, values, line, color=COLOURS[number % len(COLOURS)], linewidth=1)
        axes.set(title=title, xlabel="step", yscale=scale)
        axes.xaxis.set_major_locator(MaxNLocator(5))
    add_legend(figure, panels[0].lines, names, num_columns=max(1, min(3, len(names))))
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
    positions = column(next(iter(tables.values()))[:length], x)
    for axes, (name, title, scale) in zip(panels, curves, strict=True):
        values = np.array([column(rows[:length], name) for rows in tables.values()])
        for number, (run, line) in enumerate(zip(tables, values, strict=True)):
            style = {"color": COLOURS[number % 7], "linestyle": LINES[number % len(LINES)]}
            axes.plot(positions, line, linewidth=0.7, alpha=0.8, label=run, **style)
        means = block_means(values.mean(0))
        axes.plot(block_means(positions), means, color="black", linewidth=2, label="mean")
        axes.set(title=title, xlabel=x, yscale=scale)
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    panels[0].legend(fontsize=8)
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
    add_legend(figure, *axes.get_legend_handles_labels())
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
