"""What reports draw of several runs, and of a repository's history."""

import numpy as np
from matplotlib.ticker import MaxNLocator

from lib.figures import COLOURS, add_legend, column, line_style, new_figure

MOST_POINTS = 150  # of a line, where several are drawn together
MOST_LETTERS = 100  # of a commit
# of git's graph: columns that a stroke leads from and to, beside its own
STROKES = {"*": (0, 0), "|": (0, 0), "/": (1, -1), "\\": (-1, 1)}


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
            line = [column(rows, x), column(rows, name)]
            lines.append(line)
            if not with_mean:
                line = map(block_means, line)
            axes.plot(*line, linewidth=0.8, label=run, **line_style(number))
        if with_mean:
            length = min(len(values) for _, values in lines)
            mean = np.mean([values[:length] for _, values in lines], 0)
            line = map(block_means, (lines[0][0][:length], mean))
            axes.plot(*line, color="black", linewidth=2, label="mean")
        axes.set(title=title, xlabel=x, yscale=scale)
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    add_legend(figure, panels[0], num_columns=4)
    return figure


def plot_commits(lines: list[str]):
    """The lines of `git log --graph`: the strokes of its graph drawn and, behind a tab, the commit
    beside them.
    """
    figure, (axes,) = new_figure(1, 10, 0.5 + 0.28 * len(lines))
    width = max(len(line.partition("\t")[0]) for line in lines)
    for row, line in enumerate(lines):
        graph, _, commit = line.partition("\t")
        for place, mark in enumerate(graph):
            if mark in STROKES:
                slant = place % 2  # in a column of commits a stroke goes down
                ends = place + slant * np.array(STROKES[mark])
                axes.plot(ends, (row - 0.5, row + 0.5), color="grey", zorder=1)
            if mark == "*":
                axes.plot(place, row, "o", color=COLOURS[0])
        style = {"va": "center", "fontsize": 8, "family": "monospace", "parse_math": False}
        axes.text(width, row, commit[:MOST_LETTERS], **style)
    axes.set(ylim=(len(lines) - 0.4, -0.6), xlim=(-0.5, width + 36))
    axes.axis("off")
    return figure
