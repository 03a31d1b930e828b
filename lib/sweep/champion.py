"""The champion of a search: the finalist with the highest mean AUC over fresh seeds, if it beats
the base config and the constant answers.
"""

from lib.metrics import mean_interval
from lib.sweep.rungs import BASE, Sweep, mean_scores, outcome

CONSTANT_AUC = 0.5
MIN_SEEDS = 3  # fewer leave an interval too wide, or none, to tell finalists apart


def choose_champion(sweep: Sweep) -> dict:
    """The champion, the `note` that says how it compares, and the finalists, the best first.

    `champion` and `run` are None where no trial beats the base config and the constant answers.
    `run`, of the champion's runs the one with the highest AUC, is what is handed over. Raises
    BadInput as mean_scores does.
    """
    rung = sweep.num_rungs
    trials = mean_scores(sweep, rung)
    finalists = [describe_finalist(sweep, trial) for trial in trials]
    best = finalists[0]
    note = compare(best, finalists[1:])
    failed = [trial for trial in sweep.promoted(rung - 1) if trial not in trials]
    if failed:
        note += f"; {', '.join(failed)} failed"
    reason = ""
    if best["mean"] <= CONSTANT_AUC:
        reason = f"no champion: a constant answer has an AUC of {CONSTANT_AUC}, none has more"
    elif best["trial"] == BASE:
        reason = "no champion: no trial has a higher mean AUC than the config as it is"
    if reason:
        return {"champion": None, "run": None, "note": f"{reason}; {note}", "finalists": finalists}
    name = best["trial"]
    chosen = {"champion": name, "values": sweep.plan["trials"][name], "note": note}
    return {**chosen, **best, "finalists": finalists}


def describe_finalist(sweep: Sweep, trial: str) -> dict:
    """A finalist's best run, and its mean AUC with the 95% interval over its seeds."""
    rows = [row for row in sweep.rows(sweep.num_rungs) if row.trial == trial]
    scores = {}
    for row in rows:
        result = outcome(sweep, row)
        scores[result["run"]] = result["score"]
    spread = {"mean": scores[result["run"]], "deviation": None, "low": None, "high": None, "num": 1}
    if len(scores) > 1:
        spread = mean_interval(list(scores.values()))
    return {"trial": trial, "run": max(scores, key=scores.get), **spread}


def compare(best: dict, others: list[dict]) -> str:
    """Whether the best finalist's interval lies apart from those of the others, in words."""
    name = best["trial"]
    if not others:
        return f"{name} is the only finalist with a score"
    note = f"{name} has the highest mean AUC"
    if best["num"] < MIN_SEEDS:
        return f"{note}, but nothing is separable over {best['num']} fresh seeds"
    close = [other["trial"] for other in others if other["high"] >= best["low"]]
    if close:
        return f"{note}, but is not separable from {', '.join(close)}: their intervals overlap"
    return f"{note}, apart from all others"
