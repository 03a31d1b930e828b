"""The page of a search: the champion, plots, and every trial with its scores or the reason it
failed.
"""

from collections import defaultdict
from pathlib import Path

import numpy as np

from lib.blocks import Figure, Heading, Table, Words, table_of, write_page
from lib.figures import (
    COLOURS,
    column,
    figure_png,
    label_positions,
    new_figure,
    parameter_axis,
    plot_parallel,
)
from lib.metrics import mean_interval
from lib.sweep import search

NUM_GROUPS = 3  # of trials by the value of a parameter, unless it is a choice


def write_sweep_page(sweep, champion: dict | None = None) -> Path:
    """Write SWEEP/sweep.html; gives its path."""
    plan, outcomes = sweep.plan, read_outcomes(sweep)
    full = plan["rungs"][-1] * len(plan["trials"]) * len(plan["seeds"])
    num_epochs = outcomes[-1]["spent"]
    facts = (
        f"{len(plan['trials'])} trials, {plan['design']}, rungs of {plan['rungs']} epochs; plan"
        f" SHA-256 {plan['sha256']}. {num_epochs} epochs were trained, {num_epochs / full:.0%} of"
        f" what every trial to its end would take ({full})."
    )
    blocks = [Words(facts, "note")]
    if champion:
        blocks += champion_blocks(champion, plan["champion_seeds"])
    blocks += figure_blocks(sweep, outcomes, full)
    blocks += [Heading("Trials"), trial_table(plan, outcomes)]
    return write_page(sweep.folder / "sweep.html", f"Search {sweep.folder.name}", blocks)


def read_outcomes(sweep) -> list[dict]:
    """The outcome of every row of every rung that has begun, the champion's seeds aside.

    `spent` counts the epochs of all rows so far; without a `score` there is the `reason`.
    """
    outcomes, spent, epochs_before = [], 0, 0
    last_rung = min(sweep.newest_rung(), sweep.num_rungs - 1)
    for rung in range(last_rung + 1):
        for row in sweep.rows(rung):
            outcome = search.outcome(sweep, row)
            spent += max(0, outcome["num_epochs"] - epochs_before)
            outcomes.append(outcome | {"trial": row.trial, "rung": rung, "spent": spent})
        epochs_before = sweep.plan["rungs"][rung]
    return outcomes


def trial_table(plan: dict, outcomes: list[dict]) -> Table:
    """Every trial with its parameters and, after each rung, a score or a reason for each seed."""
    texts = defaultdict(list)
    for row in outcomes:
        text = f"{row['score']:.4f}" if "score" in row else row.get("reason", "-")
        texts[row["trial"], row["rung"]].append(text)
    rows = []
    for trial, values in plan["trials"].items():
        scores = ["; ".join(texts[trial, rung]) for rung in range(len(plan["rungs"]))]
        rows.append([trial, *values.values(), *scores])
    names = [f"AUC after {num} epoch{'s' if num > 1 else ''}" for num in plan["rungs"]]
    return Table(["trial", *plan["ranges"], *names], rows)


def champion_blocks(champion: dict, num_seeds: int) -> list:
    """The finalists, best first, over fresh seeds."""
    note = (
        f"AUC on validation over {num_seeds} fresh seeds, its 95% interval by t over seeds, and"
        " the best run. Epochs were chosen on the same patches."
    )
    return [
        Heading("Champion"),
        Words(champion["note"], "alarm"),
        table_of(champion["finalists"], ("trial", "mean", "low", "high", "run")),
        Words(note, "note"),
    ]


def figure_blocks(sweep, outcomes: list[dict], full: int) -> list:
    """Plots of all trials after their first rung, and of what they have cost."""
    scored = [row for row in outcomes if "score" in row]
    first_scores = defaultdict(list)
    for row in scored:
        if row["rung"] == 0:
            first_scores[row["trial"]].append(row["score"])
    trials = []
    for trial, scores in first_scores.items():
        trials.append(sweep.plan["trials"][trial] | {"AUC": np.mean(scores)})
    is_promoted = np.isin(list(first_scores), sweep.promoted(0))
    ranges = sweep.plan["ranges"]
    rung_ends = {row["rung"]: row["spent"] for row in outcomes}.values()
    figures = {
        "Every trial": plot_parallel(ranges, trials, is_promoted),
        "Each parameter alone": plot_marginals(ranges, trials),
        "Best against budget": plot_budget(scored, rung_ends, full),
    }
    blocks = []
    for title, figure in figures.items():
        blocks += [Heading(title), Figure(title, figure_png(figure))]
    return blocks


def plot_marginals(ranges: dict, trials: list[dict]):
    """AUC against each parameter alone: trials as dots, and the mean with its interval in each
    group.
    """
    figure, panels = new_figure(len(ranges), 3.0)
    scores = column(trials, "AUC")
    for axes, (name, spec) in zip(panels, ranges.items(), strict=True):
        points, labels = parameter_axis(spec, [trial[name] for trial in trials])
        groups = points
        if "choice" not in spec:
            groups = np.minimum(np.floor(points * NUM_GROUPS), NUM_GROUPS - 1)
        axes.plot(points, scores, "o", alpha=0.5)
        for group in np.unique(groups):
            inside = groups == group
            if inside.sum() > 1:
                spread = mean_interval(scores[inside])
                reach = spread["high"] - spread["mean"]
                place = points[inside].mean()
                axes.errorbar(place, spread["mean"], reach, fmt="s", color=COLOURS[1])
        axes.set_xticks(label_positions(labels), labels)
        axes.set_xlabel(name)
    panels[0].set_ylabel("AUC after the first rung")
    return figure


def plot_budget(scored: list[dict], rung_ends, full: float):
    """The best score so far against the epochs spent so far, beside what all trials to the end
    would have cost.
    """
    figure, (axes,) = new_figure(1, 6.4)
    spent, scores = column(scored, "spent"), column(scored, "score")
    best = np.maximum.accumulate(scores)
    axes.plot(spent, scores, "o", alpha=0.5, label="a trial")
    axes.step(spent, best, where="post", color=COLOURS[1], label="best so far")
    for end in rung_ends:
        axes.axvline(end, color="black", linestyle=":", linewidth=0.8)
    axes.axvline(full, color=COLOURS[2], label="every trial to its end")
    axes.set_xlabel("epochs trained, all trials together (dotted: end of a rung)")
    axes.set_ylabel("AUC on validation")
    axes.legend(loc="lower right")
    return figure
