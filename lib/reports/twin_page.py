"""The comparison of two runs on one page: verdict, time line, the module, how the difference grows and what it matters."""

from pathlib import Path

import numpy as np
from matplotlib.colors import ListedColormap

from lib.logger import read_csv
from lib.reports.figures import COLOURS, column, figure_png, new_figure
from lib.reports.pages import note, picture, section, table, write_page

MAX_COLUMNS = 400  # of the grid; longer runs are shown in blocks of steps


def plot_time_line(quantities: list[str], steps: list[int], equal: np.ndarray):
    """The grid quantities x steps: equal or not. A block of steps counts as unequal if one of them is."""
    block = -(-len(steps) // MAX_COLUMNS)
    blocks = np.stack([equal[:, first : first + block].all(axis=1) for first in range(0, len(steps), block)], axis=1)
    figure, (axes,) = new_figure(1, width=11, height=0.9 + 0.28 * len(quantities))
    extent = (steps[0] / 2, steps[-1] + steps[0] / 2, len(quantities) - 0.5, -0.5)
    colours = ListedColormap([COLOURS[1], COLOURS[5]])
    axes.imshow(blocks, cmap=colours, vmin=0, vmax=1, aspect="auto", interpolation="nearest", extent=extent)
    axes.hlines(np.arange(len(quantities)) + 0.5, *extent[:2], color="white", linewidth=2)
    axes.set(xlabel="step", yticks=range(len(quantities)), yticklabels=quantities)
    axes.set_title("blue: equal to the bit, orange: not", loc="left")
    axes.grid(False)
    return figure


def plot_growth(ours: list[dict], theirs: list[dict]):
    """Relative difference of losses and gradient norms per step; zeros have no place on the logarithmic axis."""
    figure, (axes,) = new_figure(1, width=11)
    for name in ("loss", "grad_norm"):
        left, right = column(ours, name), column(theirs, name)
        axes.plot(column(ours, "step"), np.abs(left - right) / np.maximum(left, right), ".-", label=name)
    axes.set(title="relative difference", xlabel="step")
    axes.set_yscale("log", nonpositive="mask")
    axes.legend()
    return figure


def write_twin_page(path, report: dict, a: Path, b: Path) -> Path:
    """Write the page of a comparison of the run folders A and B."""
    parted = report["verdict"] == "parted"
    verdict = f"Identical to the bit over {report['num_steps_compared']:,} traced steps."
    if parted:
        where = f"{report['quantity']} {report['layer']}".rstrip()
        verdict = f"The two part at step {report['step']}, in {where}. Likely cause: {report['cause']}."
    facts = [("A", a), ("B", b), ("final weights", "equal" if report["weights_equal"] else "not equal")]
    facts += [(f"planted {key}", value) for key, value in report.get("planted", {}).items() if value]
    inputs, scores = ([tuple(row.values()) for row in report[name]] for name in ("inputs", "metrics"))
    sections = [
        note(verdict, "alarm" if parted else "note"),
        table(("what", "value"), facts),
        section("What went in", table(("differs", "A", "B"), inputs) if inputs else note("No difference.")),
        section("Time line", picture(figure_png(plot_time_line(*report["time_line"])), "equal or not, by step")),
    ]
    if parted:
        growth = plot_growth(read_csv(a / "steps.csv"), read_csv(b / "steps.csv"))
        sections.append(section("How the difference grows", picture(figure_png(growth), "differences by step")))
        for title, name in (("Replay of the step", "replay"), ("Predictions on validation", "flips")):
            found = list(report[name].items()) or [
                ("nothing", "the step parts before the model, or data or best.pt are missing")
            ]
            sections.append(section(title, table(("what", "found"), found)))
    remark = note("nan: fewer than two runs of other seeds were named (--seeds RUN...)")
    sections.append(section("Scores", table(("score", "A", "B", "difference", "deviation over seeds"), scores), remark))
    return write_page(path, "Twin runs", sections)
