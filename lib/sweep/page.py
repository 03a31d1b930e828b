"""The page of a search: the champion, plots, and every trial with its scores or the reason it
failed.
"""

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from lib.blocks import Figure, Heading, Table, Words, write_page
from lib.figures import (
    COLOURS,
    figure_png,
    label_positions,
    new_figure,
    parameter_axis,
    plot_parallel,
)
from lib.metrics import mean_interval
from lib.sweep import search


@dataclass
class Trials:
    """What has become of the trials of a search."""

    texts: dict[str, list[list[str]]]  # of each trial, by rung: a score or a reason a seed
    first_scores: dict[str, list[float]] = field(default_factory=dict)  # after the first rung
    spent: list[tuple[int, float]] = field(default_factory=list)  # epochs of all so far, score
    rung_ends: list[int] = field(default_factory=list)  # epochs of all
    num_epochs: int = 0


def write_sweep_page(sweep, champion: dict | None = None) -> Path:
    """Write SWEEP/sweep.html; gives its path."""
    plan = sweep.plan
    trials = read_trials(sweep)
    full = plan["rungs"][-1] * len(plan["trials"]) * len(plan["seeds"])
    facts = (
        f"{len(plan['trials'])} trials, {plan['design']}, rungs of {plan['rungs']} epochs; plan"
        f" SHA-256 {plan['sha256']}. {trials.num_epochs} epochs were trained,"
        f" {trials.num_epochs / full:.0%} of what every trial to its end would take ({full})."
    )
    blocks = [Words(facts, "note")]
    if champion:
        blocks += champion_blocks(champion, plan["champion_seeds"])
    blocks += figure_blocks(sweep, trials, full)
    names = [f"AUC after {num} epoch{'s' if num > 1 else ''}" for num in plan["rungs"]]
    rows = []
    for trial, by_rung in trials.texts.items():
        scores = ["; ".join(texts) or "-" for texts in by_rung]
        rows.append([trial, *plan["trials"][trial].values(), *scores])
    blocks += [Heading("Trials"), Table(["trial", *plan["ranges"], *names], rows)]
    return write_page(sweep.folder / "sweep.html", f"Search {sweep.folder.name}", blocks)


def read_trials(sweep) -> Trials:
    """The outcome of every row of every rung that has begun, the champion's seeds aside."""
    plan = sweep.plan
    trials = Trials({trial: [[] for _ in plan["rungs"]] for trial in plan["trials"]})
    last_rung = min(sweep.newest_rung(), sweep.num_rungs - 1)
    for rung in range(last_rung + 1):
        epochs_before = plan["rungs"][rung - 1] if rung else 0
        for row in sweep.rows(rung):
            outcome = search.outcome(sweep, row)
            trials.num_epochs += max(0, outcome["num_epochs"] - epochs_before)
            score = outcome.get("score")
            text = outcome.get("reason", "-") if score is None else show_score(score)
            trials.texts[row.trial][rung].append(text)
            if score is not None:
                trials.spent.append((trials.num_epochs, score))
                if rung == 0:
                    trials.first_scores.setdefault(row.trial, []).append(score)
        trials.rung_ends.append(trials.num_epochs)
    return trials


def show_score(score: float) -> str:
    return f"{score:.4f}"


def champion_blocks(champion: dict, num_seeds: int) -> list:
    """The finalists, best first, over fresh seeds."""
    rows = []
    for finalist in champion["finalists"]:
        scores = [show_score(finalist[name]) for name in ("mean", "low", "high")]
        rows.append([finalist["trial"], *scores, Path(finalist["run"]).name])
    note = (
        f"Over {num_seeds} fresh seeds; intervals by t over seeds. Epochs were chosen on the same"
        " patches."
    )
    return [
        Heading("Champion"),
        Words(champion["note"], "alarm"),
        Table(("trial", "mean AUC on validation", "95% from", "to", "its best run"), rows),
        Words(note, "note"),
    ]


def figure_blocks(sweep, trials: Trials, full: int) -> list:
    """Three plots of all trials after their first rung, and of what they have cost."""
    plan, names, scored = sweep.plan, list(sweep.plan["ranges"]), trials.first_scores
    points, groups, labels = [], [], []
    for name in names:
        values = [plan["trials"][trial][name] for trial in scored]
        places, group, texts = parameter_axis(plan["ranges"][name], values)
        points.append(places)
        groups.append(group)
        labels.append(texts)
    points, groups = np.array(points).T, np.array(groups).T
    means = np.array([np.mean(scores) for scores in scored.values()])
    is_promoted = np.isin(list(scored), sweep.promoted(0))
    figures = {
        "Every trial": plot_parallel(points, labels, names, means, is_promoted),
        "Each parameter alone": plot_marginals(points, labels, names, means, groups),
        "Best against budget": plot_budget(*np.array(trials.spent).T, trials.rung_ends, full),
    }
    blocks = []
    for title, figure in figures.items():
        blocks += [Heading(title), Figure(title, figure_png(figure))]
    return blocks


def plot_marginals(points, labels: list[list[str]], names: list[str], scores, groups):
    """Score against each parameter alone: trials as dots, and the mean with its interval in each
    group.

    `points` (N, D) lie from 0 to 1, `groups` are int (N, D), `scores` float (N,).
    """
    figure, panels = new_figure(len(names), 3.0)
    for number, (axes, name, texts) in enumerate(zip(panels, names, labels, strict=True)):
        places, group = points[:, number], groups[:, number]
        axes.plot(places, scores, "o", alpha=0.5)
        for value in np.unique(group):
            inside = group == value
            if inside.sum() > 1:
                spread = mean_interval(scores[inside])
                reach = spread["high"] - spread["mean"]
                place = places[inside].mean()
                axes.errorbar(place, spread["mean"], reach, fmt="s", color=COLOURS[1])
        axes.set_xticks(label_positions(texts), texts)
        axes.set_xlabel(name)
    panels[0].set_ylabel("AUC after the first rung")
    return figure


def plot_budget(budgets: np.ndarray, scores: np.ndarray, rung_ends: list[float], full: float):
    """The best score so far against the epochs spent so far, beside what all trials to the end
    would have cost.
    """
    figure, (axes,) = new_figure(1, 6.4)
    best = np.maximum.accumulate(scores)
    axes.plot(budgets, scores, "o", alpha=0.5, label="a trial")
    axes.step(budgets, best, where="post", color=COLOURS[1], label="best so far")
    for end in rung_ends:
        axes.axvline(end, color="black", linestyle=":", linewidth=0.8)
    axes.axvline(full, color=COLOURS[2], label="every trial to its end")
    axes.set_xlabel("epochs trained, all trials together (dotted: end of a rung)")
    axes.set_ylabel("AUC on validation")
    axes.legend(loc="lower right")
    return figure
