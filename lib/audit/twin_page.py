"""The page of a comparison of two runs: every finding, and what was equal to the bit at which
step.
"""

from pathlib import Path

import numpy as np
from matplotlib.colors import ListedColormap

from lib.blocks import Figure, Heading, Table, Words, table_of, write_page
from lib.figures import COLOURS, column, figure_png, new_figure
from lib.files import read_csv


def write_twin_page(
    path, findings: list[dict], equal: dict[str, list[bool]], steps: list[int], a: Path, b: Path
) -> Path:
    """Write the page of the run folders A and B; `equal` says which quantity was equal at which
    step.
    """
    blocks = [Table(("run", "folder"), [("A", a), ("B", b)])]
    for finding in findings:
        is_error = finding["severity"] == "error"
        sentence = f"{finding['measured']} {finding['advice']}"
        blocks.append(Heading(finding["check"]))
        blocks.append(Words(sentence, "alarm" if is_error else "note"))
        if finding["rows"]:
            blocks.append(table_of(finding["rows"]))
        if finding["check"] == "time line" and steps:
            drawn = figure_png(plot_time_line(equal, steps))
            blocks.append(Figure("What was equal to the bit, by step", drawn, "timeline.png"))
        if finding["check"] == "time line" and is_error:
            growth = plot_growth(read_csv(a / "steps.csv"), read_csv(b / "steps.csv"))
            blocks.append(Figure("Differences by step", figure_png(growth)))
    is_injected = any(finding["check"] == "self-test" for finding in findings)
    title = "Twin runs, self-test: B has a planted fault" if is_injected else "Twin runs"
    return write_page(path, title, blocks)


def plot_growth(ours: list[dict], theirs: list[dict]):
    """Relative difference of losses and gradient norms per step; zeros have no place on the
    logarithmic axis.
    """
    figure, (axes,) = new_figure(1, width=11)
    for name in ("loss", "grad_norm"):
        left, right = column(ours, name), column(theirs, name)
        difference = np.abs(left - right) / np.maximum(left, right)
        axes.plot(column(ours, "step"), difference, ".-", label=name)
        if difference.any():
            axes.set_yscale("log", nonpositive="mask")
    axes.set(title="relative difference, where there is one", xlabel="step")
    axes.legend()
    return figure


def plot_time_line(equal: dict[str, list[bool]], steps: list[int]):
    """The grid quantities x steps of two runs: equal to the bit, or not."""
    figure, (axes,) = new_figure(1, width=11, height=0.9 + 0.28 * len(equal))
    edges = np.append(0, steps) + steps[0] / 2  # a cell reaches half a step to either side
    colours = ListedColormap([COLOURS[1], COLOURS[5]])
    rows = range(len(equal) + 1)
    axes.pcolormesh(edges, rows, list(equal.values()), cmap=colours, vmin=0, vmax=1)
    axes.hlines(range(len(equal)), edges[0], edges[-1], color="white", linewidth=2)
    axes.set(xlabel="step", yticks=np.arange(len(equal)) + 0.5, yticklabels=equal)
    axes.set_title("blue: equal to the bit, orange: not")
    axes.invert_yaxis()
    axes.grid(False)
    return figure
