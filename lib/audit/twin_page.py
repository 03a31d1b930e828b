"""The page of a comparison of two runs: the verdict, every finding, and what was equal to the bit
at which step.
"""

from pathlib import Path

import numpy as np
from matplotlib.colors import ListedColormap

from lib.blocks import Figure, Heading, Words, table_of, write_page
from lib.figures import COLOURS, figure_png, new_figure
from lib.trace import QUANTITIES


def write_twin_page(path, findings: list[dict], a, b) -> Path:
    """Write the page of two sides of lib/audit/twin.py, from the findings on them."""
    by_check = {finding["check"]: finding for finding in findings}
    title = "Twin runs"
    if "self-test" in by_check:
        title = "Twin runs, self-test: B has a planted fault"
    verdict = f"A and B: {by_check['time line']['measured']}; {by_check['scores']['measured']}"
    time_line = figure_png(plot_time_line(a.trace, b.trace))
    blocks = [
        Words(f"**{verdict}**"),
        Figure("What was equal to the bit, by step", time_line, "timeline.png"),
    ]
    for finding in findings:
        kind = "alarm" if finding["severity"] == "error" else "note"
        blocks.append(Heading(finding["check"]))
        blocks.append(Words(f"{finding['measured']} {finding['advice']}", kind))
        if finding["rows"]:
            blocks.append(table_of(finding["rows"]))
    return write_page(path, title, blocks)


def plot_time_line(ours: dict[int, dict], theirs: dict[int, dict]):
    """The grid quantities x steps of two traces: equal to the bit, or not."""
    num = len(QUANTITIES)
    figure, (axes,) = new_figure(1, width=11, height=0.9 + 0.28 * num)
    equal = []
    for name in QUANTITIES:
        equal.append([row[name] == theirs[step][name] for step, row in ours.items()])
    cmap = ListedColormap([COLOURS[1], COLOURS[5]])
    extent = (0, max(ours), num, 0)
    axes.imshow(equal, cmap, vmin=0, vmax=1, aspect="auto", extent=extent)
    axes.set_yticks(np.arange(num) + 0.5, QUANTITIES)
    axes.set(title="blue: equal to the bit, orange: not", xlabel="step")
    return figure
