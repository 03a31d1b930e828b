"""The page of a search: the champion, a plot, and every trial with its scores or the reason it
failed.
"""

from pathlib import Path

from matplotlib.cm import ScalarMappable
from matplotlib.colors import LogNorm, Normalize

from lib.blocks import Figure, Heading, Words, table_of, write_page
from lib.figures import figure_png, new_figure
from lib.sweep.rungs import Sweep, outcome

CHAMPION_NOTE = (
    "AUC on validation over fresh seeds, its 95% interval by t over seeds, and the best run. These"
    " are the scores of each run's best epoch, which was chosen on the same patches. Those of the"
    " rungs are of the last epoch."
)


def write_sweep_page(sweep: Sweep, champion: dict | None = None) -> Path:
    """Write SWEEP/sweep.html and its figure; gives its path."""
    plan = sweep.plan
    facts = "{design}, rungs of {rungs} epochs; plan SHA-256 {sha256}.".format(**plan)
    blocks = [Words(f"{len(plan['trials'])} trials, {facts}", "note")]
    if champion:
        columns = ("trial", "mean", "low", "high", "run")
        blocks += [Heading("Champion"), Words(champion["note"], "alarm")]
        blocks += [table_of(champion["finalists"], columns), Words(CHAMPION_NOTE, "note")]
    rows = trial_rows(sweep)
    first = [row for row in rows if row["epochs"] == plan["rungs"][0] and row["AUC"] is not None]
    png = figure_png(plot_parallel(plan["ranges"], first))
    blocks += [Heading("Every trial"), Figure("Every trial", png, "trials.png")]
    blocks += [Heading("Trials"), table_of(rows)]
    return write_page(sweep.folder / "sweep.html", f"Search {sweep.folder.name}", blocks)


def trial_rows(sweep: Sweep) -> list[dict]:
    """For each rung that has begun, the champion's aside, a row for each of its trials and seeds:
    the parameters and then the AUC, or the reason that there is none.
    """
    rows = []
    for rung in range(min(sweep.newest_rung(), sweep.num_rungs - 1) + 1):
        for row in sweep.rows(rung):
            result = outcome(sweep, row)
            cells = {"trial": row.trial, "seed": row.seed, "epochs": row.epochs}
            cells |= {"AUC": result.get("score"), "reason": result.get("reason")}
            rows.append(cells | sweep.plan["trials"][row.trial])
    return rows


def plot_parallel(ranges: dict, rows: list[dict]):
    """Trials as lines over axes: one for each parameter of `ranges`, the last for the AUC."""
    figure, (axes,) = new_figure(1, 1.6 * (len(ranges) + 2), 3.6)
    scores = [row["AUC"] for row in rows]
    colours = ScalarMappable(Normalize(min(scores), max(scores)), "cividis_r")
    ranges = ranges | {"AUC": {"range": [round(score, 4) for score in colours.get_clim()]}}
    for row in sorted(rows, key=lambda row: row["AUC"]):  # the best ones on top
        heights = [height_of(spec, row[name]) for name, spec in ranges.items()]
        axes.plot(heights, color=colours.to_rgba(row["AUC"]), linestyle="-")
    for number, spec in enumerate(ranges.values()):
        axes.axvline(number, color="black", linewidth=0.8)
        (bounds,) = spec.values()
        for bound in bounds:
            place = (number + 0.03, height_of(spec, bound))
            axes.text(*place, bound, fontsize=8, va="center", backgroundcolor="#fffc")
    figure.colorbar(colours, ax=axes, label="AUC after the first rung")
    axes.set(xticks=range(len(ranges)), xticklabels=ranges, yticks=())
    axes.set_title("every trial after its first rung")
    axes.grid(False)
    return figure


def height_of(spec: dict, value) -> float:
    """Where a value stands, from 0 to 1, on the axis of a range {kind: bounds}."""
    ((kind, bounds),) = spec.items()
    if kind == "choice":
        return bounds.index(value) / max(len(bounds) - 1, 1)
    scale = LogNorm if kind == "log" else Normalize
    return float(scale(*sorted(map(float, bounds)))(float(value)))
