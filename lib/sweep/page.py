"""The page of a search: the champion, plots, and every trial with its scores or the reason it
failed.
"""

from collections import defaultdict
from pathlib import Path

import numpy as np
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize

from lib.blocks import Figure, Heading, Table, Words, table_of, write_page
from lib.figures import COLOURS, column, figure_png, new_figure
from lib.metrics import mean_interval
from lib.sweep.rungs import outcome

NUM_GROUPS = 3  # of trials by the value of a parameter, unless it is a choice


def write_sweep_page(sweep, champion: dict | None = None) -> Path:
    """Write SWEEP/sweep.html and its figures; gives its path."""
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
            result = outcome(sweep, row)
            spent += max(0, result["num_epochs"] - epochs_before)
            outcomes.append(result | {"trial": row.trial, "rung": rung, "spent": spent})
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
        " the best run. These are the scores of each run's best epoch, which was chosen on the same"
        " patches. Those of the rungs are of the last epoch."
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
        "trials": ("Every trial", plot_parallel(ranges, trials, is_promoted)),
        "parameters": ("Each parameter alone", plot_marginals(ranges, trials)),
        "budget": ("Best against budget", plot_budget(scored, rung_ends, full)),
    }
    blocks = []
    for name, (title, figure) in figures.items():
        blocks += [Heading(title), Figure(title, figure_png(figure), f"{name}.png")]
    return blocks


def label_positions(labels: list) -> np.ndarray:
    """Where the labels of a parameter's axis stand, from 0 to 1; one alone in the middle."""
    return np.linspace(0, 1, len(labels)) if len(labels) > 1 else np.array([0.5])


def parameter_axis(spec: dict, values: list) -> tuple[np.ndarray, list[str]]:
    """Values of a parameter on an axis: positions from 0 to 1, and labels from low to high.

    `spec` is the parameter's range in the space of a search, {kind: bounds}.
    """
    ((kind, bounds),) = spec.items()
    if kind == "choice":
        choices = [bounds.index(value) for value in values]
        return label_positions(bounds)[choices], [str(bound) for bound in bounds]
    ends, points = np.array(bounds, float), np.array(values, float)
    labels = [f"{end:.4g}" for end in ends]
    if kind == "log":
        ends, points = np.log(ends), np.log(points)
    width = max(ends[1] - ends[0], 1e-9)
    return (points - ends[0]) / width, labels


def plot_parallel(ranges: dict, trials: list[dict], is_promoted: np.ndarray):
    """Trials, each with its `AUC`, as lines over axes: one for each parameter of `ranges`, the last
    for the AUC. `is_promoted` is bool (N,).
    """
    figure, (axes,) = new_figure(1, 1.6 * (len(ranges) + 2), 3.6)
    scores = column(trials, "AUC")
    ranges = ranges | {"AUC": {"range": (scores.min(), scores.max())}}
    box = {"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 1}
    columns = []
    for number, (name, spec) in enumerate(ranges.items()):
        points, labels = parameter_axis(spec, [trial[name] for trial in trials])
        columns.append(points)
        axes.axvline(number, color="black", linewidth=0.8)
        for text, y in zip(labels, label_positions(labels), strict=True):
            axes.text(number + 0.03, y, text, fontsize=8, va="center", bbox=box)
    lines = np.column_stack(columns)
    bar = ScalarMappable(Normalize(scores.min(), scores.max()), "cividis_r")
    for trial in np.lexsort([scores, is_promoted]):  # the best ones on top
        width, alpha = (2.4, 1.0) if is_promoted[trial] else (0.9, 0.6)
        colour = bar.to_rgba(scores[trial])
        axes.plot(lines[trial], color=colour, linewidth=width, alpha=alpha)
    figure.colorbar(bar, ax=axes, label="AUC after the first rung")
    axes.set(xticks=range(len(ranges)), xticklabels=ranges, yticks=())
    axes.set_xlim(-0.1, len(ranges) - 0.5)
    axes.set_title("every trial after its first rung; thick: promoted")
    axes.grid(False)
    return figure


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
        limit_to_possible(axes)
    panels[0].set_ylabel("AUC after the first rung")
    return figure


def limit_to_possible(axes) -> None:
    """Keep an axis of AUCs between 0 and 1: an interval may reach beyond."""
    low, high = axes.get_ylim()
    axes.set_ylim(max(low, 0.0), min(high, 1.0))


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
    limit_to_possible(axes)
    return figure
