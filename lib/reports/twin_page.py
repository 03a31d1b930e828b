"""The comparison of two runs on one page: the findings, the time line, and how the difference grows."""

from pathlib import Path

import numpy as np
from matplotlib.colors import ListedColormap

from lib.logger import read_csv
from lib.reports.figures import COLOURS, column, figure_png, new_figure
from lib.reports.pages import note, picture, section, table, write_page


def plot_time_line(equal: dict[str, list[bool]], steps: list[int]):
    """The grid quantities x steps: equal or not."""
    figure, (axes,) = new_figure(1, width=11, height=0.9 + 0.28 * len(equal))
    extent = (steps[0] / 2, steps[-1] + steps[0] / 2, len(equal) - 0.5, -0.5)
    colours = ListedColormap([COLOURS[1], COLOURS[5]])
    axes.imshow([*equal.values()], cmap=colours, vmin=0, vmax=1, aspect="auto", interpolation="nearest", extent=extent)
    axes.hlines(np.arange(len(equal)) + 0.5, *extent[:2], color="white", linewidth=2)
    axes.set(xlabel="step", yticks=range(len(equal)), yticklabels=equal, title="blue: equal to the bit, orange: not")
    axes.grid(False)
    return figure


def plot_growth(ours: list[dict], theirs: list[dict]):
    """Relative difference of losses and gradient norms per step; zeros have no place on the logarithmic axis."""
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


def write_twin_page(path, findings: list[dict], equal: dict[str, list[bool]], steps: list[int], a: Path, b: Path) -> Path:
    """Write the page of a comparison of the run folders A and B; `equal` says which quantity was equal at which step."""
    sections = [table(("run", "folder"), [("A", a), ("B", b)])]
    for found in findings:
        parts = [note(" ".join((found["measured"], found["advice"])), "alarm" if found["severity"] == "error" else "note")]
        parts += [table(found["rows"][0], [row.values() for row in found["rows"]])] if found["rows"] else []
        if found["check"] == "time line" and steps:
            parts.append(picture(figure_png(plot_time_line(equal, steps)), "equal or not, by step"))
        if found["check"] == "time line" and found["severity"] == "error":
            growth = plot_growth(read_csv(a / "steps.csv"), read_csv(b / "steps.csv"))
            parts.append(picture(figure_png(growth), "differences by step"))
        sections.append(section(found["check"], *parts))
    return write_page(path, "Twin runs", sections)
