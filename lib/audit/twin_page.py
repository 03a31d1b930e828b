"""The page of a comparison of two runs: the verdict, every finding, and what was equal to the bit
at which step.
"""

from pathlib import Path

import numpy as np
from matplotlib.colors import ListedColormap

from lib.blocks import Figure, Heading, Words, table_of, write_page
from lib.figures import COLOURS, column, figure_png, new_figure
from lib.files import read_csv
from lib.trace import QUANTITIES


def write_twin_page(path, findings: list[dict], a, b) -> Path:
    """Write the page of two sides of lib/audit/twin.py, from the findings on them."""
    by_check = {finding["check"]: finding for finding in findings}
    time_line = by_check["time line"]
    is_parted = time_line["severity"] == "error"
    title = "Twin runs"
    if "self-test" in by_check:
        title = "Twin runs, self-test: B has a planted fault"
    verdict = f"**A and B: {time_line['measured']}**; {by_check['scores']['measured']}"
    blocks = [Words(verdict, "alarm" if is_parted else "")]
    for finding in findings:
        kind = "alarm" if finding["severity"] == "error" else "note"
        blocks.append(Heading(finding["check"]))
        blocks.append(Words(f"{finding['measured']} {finding['advice']}", kind))
        if finding["rows"]:
            blocks.append(table_of(finding["rows"]))
        if finding is time_line:
            drawn = figure_png(plot_time_line(a.trace, b.trace))
            blocks.append(Figure("What was equal to the bit, by step", drawn, "timeline.png"))
            if is_parted:
                growth = figure_png(plot_growth(a.run, b.run))
                blocks.append(Figure("Differences by step", growth))
    return write_page(path, title, blocks)


def plot_growth(a: Path, b: Path):
    """Relative difference of losses and gradient norms per step of two runs; zeros have no place on
    the logarithmic axis.
    """
    ours = read_csv(a / "steps.csv")
    theirs = read_csv(b / "steps.csv")
    figure, (axes,) = new_figure(1, width=11)
    for name in ("loss", "grad_norm"):
        left = column(ours, name)
        right = column(theirs, name)
        difference = np.abs(left - right) / np.maximum(left, right)
        axes.plot(column(ours, "step"), difference, ".-", label=name)
        if difference.any():
            axes.set_yscale("log", nonpositive="mask")
    axes.set(title="relative difference, where there is one", xlabel="step")
    axes.legend()
    return figure


def plot_time_line(ours: dict[int, dict], theirs: dict[int, dict]):
    """The grid quantities x steps of two traces: equal to the bit, or not."""
    num = len(QUANTITIES)
    figure, (axes,) = new_figure(1, width=11, height=0.9 + 0.28 * num)
    equal = []
    for name in QUANTITIES:
        equal.append([row[name] == theirs[step][name] for step, row in ours.items()])
    steps = list(ours)
    edges = np.append(0, steps) + steps[0] / 2  # a cell reaches half a step to either side
    rows = np.arange(num)
    colours = ListedColormap([COLOURS[1], COLOURS[5]])
    axes.pcolormesh(edges, np.arange(num + 1), equal, cmap=colours, vmin=0, vmax=1)
    axes.hlines(rows, edges[0], edges[-1], color="white", linewidth=2)
    axes.set_xlabel("step")
    axes.set_yticks(rows + 0.5, QUANTITIES)
    axes.set_title("blue: equal to the bit, orange: not")
    axes.invert_yaxis()
    axes.grid(False)
    return figure
