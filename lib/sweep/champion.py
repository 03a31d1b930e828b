"""The champion of a search: the finalist with the highest mean AUC over fresh seeds, if it beats
the base config and the constant answers.
"""

from lib.metrics import mean_interval
from lib.sweep.rungs import BASE, Sweep, trial_scores

CONSTANT_AUC = 0.5
MIN_SEEDS = 3  # fewer leave an interval too wide, or none, to tell finalists apart


def choose_champion(sweep: Sweep) -> dict:
    """The champion, the `note` that says how it compares, and the finalists, the best first.

    `champion` and `run` are None where no trial beats the base config and the constant answers.
    `run`, of the champion's runs the one with the highest AUC, is what is handed over. Raises
    BadInput as trial_scores does.
    """
    scores = trial_scores(sweep, sweep.num_rungs)
    finalists = [describe_finalist(trial, by_run) for trial, by_run in scores.items()]
    best = finalists[0]
    note = compare(finalists)
    failed = set(sweep.promoted(sweep.num_rungs - 1)) - set(scores)
    if failed:
        note += f"; {', '.join(sorted(failed))} failed"
    champion, run = best["trial"], best["run"]
    if champion == BASE or best["mean"] <= CONSTANT_AUC:
        champion = run = None
        base = f"the config as it is and of a constant answer, {CONSTANT_AUC}"
        note = f"no champion: no trial has a mean AUC above that of {base}; {note}"
    return {"champion": champion, "run": run, "note": note, "finalists": finalists}


def describe_finalist(trial: str, scores: dict[str, float]) -> dict:
    """A finalist's best run, and its mean AUC with the 95% interval over its seeds."""
    run = max(scores, key=scores.get)
    spread = {"mean": scores[run], "low": None, "high": None, "num": 1}
    if len(scores) > 1:
        spread = mean_interval(list(scores.values()))
    return {"trial": trial, "run": run, **spread}


def compare(finalists: list[dict]) -> str:
    """Whether the best finalist's interval lies apart from those of the others, in words."""
    best, *others = finalists
    if not others:
        return f"{best['trial']} is the only finalist with a score"
    note = f"{best['trial']} has the highest mean AUC"
    if best["num"] < MIN_SEEDS:
        return f"{note}, but nothing is separable over {best['num']} fresh seeds"
    close = [other["trial"] for other in others if other["high"] >= best["low"]]
    if close:
        return f"{note}, but is not separable from {', '.join(close)}: their intervals overlap"
    return f"{note}, apart from all others"
