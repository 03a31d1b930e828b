"""The page of a search: the champion, plots, and every trial with its scores or the reason it
failed.
"""

from pathlib import Path

import numpy as np
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize

from lib.blocks import Figure, Heading, Table, Words, table_of, write_page
from lib.figures import column, figure_png, new_figure
from lib.sweep.rungs import Sweep, outcome


def write_sweep_page(sweep: Sweep, champion: dict | None = None) -> Path:
    """Write SWEEP/sweep.html and its figures; gives its path."""
    plan, outcomes = sweep.plan, read_outcomes(sweep)
    num_trials = len(plan["trials"])
    # a later rung counts all epochs of a run, so it takes the place of an earlier one
    num_epochs = sum({row["run"]: row["num_epochs"] for row in outcomes}.values())
    full = plan["rungs"][-1] * num_trials * len(plan["seeds"])
    facts = (
        f"{num_trials} trials, {plan['design']}, rungs of {plan['rungs']} epochs; plan"
        f" SHA-256 {plan['sha256']}. {num_epochs} epochs were trained, {num_epochs / full:.0%} of"
        f" what every trial to its end would take ({full})."
    )
    first = []
    for row in outcomes:
        if row["rung"] == 0 and "score" in row:
            first.append(row | {"AUC": row["score"]})
    figures = {
        "trials": ("Every trial", plot_parallel(plan["ranges"], first, sweep.promoted(0))),
        "parameters": ("Each parameter alone", plot_marginals(plan["ranges"], first)),
    }
    blocks = [Words(facts, "note")]
    if champion:
        blocks += champion_blocks(champion, plan["champion_seeds"])
    for name, (title, figure) in figures.items():
        blocks += [Heading(title), Figure(title, figure_png(figure), f"{name}.png")]
    blocks += [Heading("Trials"), trial_table(plan, outcomes)]
    return write_page(sweep.folder / "sweep.html", f"Search {sweep.folder.name}", blocks)


def read_outcomes(sweep: Sweep) -> list[dict]:
    """The outcome of every row of every rung that has begun, with the trial's parameters; the
    champion's seeds aside.
    """
    outcomes = []
    last_rung = min(sweep.newest_rung(), sweep.num_rungs - 1)
    for rung in range(last_rung + 1):
        for row in sweep.rows(rung):
            result = outcome(sweep, row) | {"rung": rung}
            outcomes.append(result | sweep.plan["trials"][row.trial])
    return outcomes


def trial_table(plan: dict, outcomes: list[dict]) -> Table:
    """Every trial with its parameters and, after each rung, a score or a reason for each seed."""
    rows = {trial: {"trial": trial, **values} for trial, values in plan["trials"].items()}
    for result in outcomes:
        name = f"AUC at epoch {plan['rungs'][result['rung']]}"
        text = f"{result['score']:.4f}" if "score" in result else result.get("reason", "-")
        row = rows[result["trial"]]
        row[name] = f"{row[name]}; {text}" if name in row else text
    return table_of(list(rows.values()))


def champion_blocks(champion: dict, num_seeds: int) -> list:
    """The finalists, best first, over fresh seeds."""
    note = (
        f"AUC on validation over {num_seeds} fresh seeds, its 95% interval by t over seeds, and"
        " the best run. These are the scores of each run's best epoch, which was chosen on the same"
        " patches. Those of the rungs are of the last epoch."
    )
    return [
        Heading("Champion"),
        Words(champion["note"], "alarm"),
        table_of(champion["finalists"], ("trial", "mean", "low", "high", "run")),
        Words(note, "note"),
    ]


def parameter_axis(spec: dict, values: np.ndarray) -> tuple[np.ndarray, list[str]]:
    """Values of a parameter on an axis from 0 to 1, and labels that stand evenly on it.

    `spec` is the parameter's range in the space of a search, {kind: bounds}.
    """
    ((kind, bounds),) = spec.items()
    if kind == "choice":
        places = [bounds.index(value) for value in values]
        return np.array(places) / max(len(bounds) - 1, 1), list(map(str, bounds))
    ends = np.sort(np.array(bounds, float))
    labels = [f"{end:.4g}" for end in ends]
    if kind == "log":
        ends, values = np.log(ends), np.log(values)
    return np.interp(values, ends, (0, 1)), labels


def plot_parallel(ranges: dict, rows: list[dict], promoted: list[str]):
    """Trials as lines over axes: one for each parameter of `ranges`, the last for the AUC."""
    figure, (axes,) = new_figure(1, 1.6 * (len(ranges) + 2), 3.6)
    scores = column(rows, "AUC")
    bar = ScalarMappable(Normalize(scores.min(), scores.max()), "cividis_r")
    ranges = ranges | {"AUC": {"range": bar.get_clim()}}
    columns = []
    for number, (name, spec) in enumerate(ranges.items()):
        places, labels = parameter_axis(spec, [row[name] for row in rows])
        columns.append(places)
        axes.axvline(number, color="black", linewidth=0.8)
        for text, y in zip(labels, np.linspace(0, 1, len(labels)), strict=True):
            axes.text(number + 0.03, y, text, fontsize=8, va="center", backgroundcolor="#fffc")
    is_promoted = np.isin([row["trial"] for row in rows], promoted)
    order = np.lexsort([scores, is_promoted])  # the best ones on top
    widths = np.where(is_promoted, 2.4, 0.9)
    axes.set_prop_cycle(color=bar.to_rgba(scores[order]), linewidth=widths[order])
    axes.plot(np.stack(columns)[:, order])
    figure.colorbar(bar, ax=axes, label="AUC after the first rung")
    axes.set(xticks=range(len(ranges)), xticklabels=ranges, yticks=())
    axes.set_title("every trial after its first rung; thick: promoted")
    axes.grid(False)
    return figure


def plot_marginals(ranges: dict, rows: list[dict]):
    """AUC against each parameter alone."""
    figure, panels = new_figure(len(ranges), 3.0)
    for axes, (name, spec) in zip(panels, ranges.items(), strict=True):
        places, labels = parameter_axis(spec, [row[name] for row in rows])
        axes.plot(places, column(rows, "AUC"), "o", alpha=0.5)
        axes.set_xticks(np.linspace(0, 1, len(labels)), labels)
        axes.set(xlabel=name, ylabel="AUC after the first rung")
        low, high = axes.get_ylim()
        axes.set_ylim(max(low, 0.0), min(high, 1.0))  # the margin may reach beyond
    return figure
