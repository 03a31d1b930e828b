"""The rungs of a search, and what the run folders of its trials say.

Successive halving (Jamieson and Talwalkar 2016). Every trial's config has the full number of epochs
from the start, and a rung is how far its run has come: `train.py --until-epoch` pauses it there. So
no schedule knows of rungs, and a trial that is promoted ends with the weights, to the bit, of a run
that never paused.
"""

import math
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

from lib.command import BadInput
from lib.files import read_cache, read_csv, read_json, write_json
from lib.sweep.design import load_plan

# one in three trials goes on; `base` is the config with nothing varied
KEPT_SHARE, NUM_FINALISTS, BASE = 3, 3, "base"


@dataclass(frozen=True)
class Row:
    """A trial with one seed, trained so far. Those of the last rung are new runs with fresh seeds,
    scored over all views.
    """

    trial: str
    seed: int
    epochs: int
    is_final: bool

    def __str__(self):
        return f"{self.trial}-s{self.seed}"


@dataclass(frozen=True)
class Sweep:
    """A planned search: its folder, where its runs are, and the plan."""

    folder: Path
    runs_dir: Path
    plan: dict

    @property
    def num_rungs(self) -> int:
        """Without the last one, the champion's."""
        return len(self.plan["rungs"])

    def num_trials(self, rung: int) -> int:
        """The trials of a rung when none fails; of the last rung the finalists, BASE aside."""
        num = len(self.plan["trials"])
        if rung == self.num_rungs:
            return min(num, self.plan.get("finalists", NUM_FINALISTS))
        return max(1, num // KEPT_SHARE**rung)

    def run_name(self, trial: str) -> str:
        return f"{self.folder.name}-{self.plan['sha256'][:6]}-{trial}"

    def run_of(self, row: Row) -> Path | None:
        """The run folder of a row, known by its name; one without a config is none."""
        pattern = f"*Z-{self.run_name(row.trial)}-s{row.seed}-*/config.yaml"
        configs = sorted(self.runs_dir.glob(pattern))
        return configs[0].parent if configs else None

    def rung_file(self, rung: int) -> Path:
        return self.folder / f"rung-{rung}.json"

    def num_rows(self, rung: int) -> int:
        """How many rows a rung has when no trial fails: known before anything ran, so that arrays
        can be submitted.
        """
        if rung == self.num_rungs:
            return (self.num_trials(rung) + 1) * self.plan["champion_seeds"]
        return self.num_trials(rung) * len(self.plan["seeds"])

    def rows(self, rung: int) -> list[Row]:
        """The rows of a rung. Raises BadInput where it was not written yet."""
        if rung and not self.rung_file(rung).is_file():
            remedy = f"sweep.py promote {self.folder.name} writes the next one"
            raise BadInput(f"{self.folder} has no rung {rung} yet: {remedy}")
        trials = self.promoted(rung - 1) if rung else self.plan["trials"]
        seeds, epochs = self.plan["seeds"], self.plan["rungs"]
        is_final = rung == self.num_rungs
        if is_final:
            first = max(seeds) + 1
            seeds = range(first, first + self.plan["champion_seeds"])
        num_epochs = epochs[-1] if is_final else epochs[rung]
        return [Row(trial, seed, num_epochs, is_final) for trial in trials for seed in seeds]

    def promoted(self, rung: int) -> list[str]:
        """The trials that went on from a rung; none before it was promoted."""
        path = self.rung_file(rung + 1)
        return read_json(path)["trials"] if path.is_file() else []

    def newest_rung(self) -> int:
        rung = self.num_rungs
        while rung and not self.rung_file(rung).is_file():
            rung -= 1
        return rung


def load_sweep(folder, runs_dir) -> Sweep:
    """A planned search. Raises BadInput as load_plan does."""
    return Sweep(Path(folder), Path(runs_dir), load_plan(Path(folder)))


def outcome(sweep: Sweep, row: Row) -> dict:
    """How a row fares: `state` todo, done or failed, with the trial, the run, the AUC on validation
    as `score`, or the `reason`.

    The AUC is that of the last epoch of the row, over one view; of a final row that of best.pt over
    all views. What a run did beyond the row's epochs does not count, so that the answer never
    changes once there is one.
    """
    run, summary, epochs = sweep.run_of(row), {}, []
    if run and (run / "epochs.csv").is_file():
        epochs = read_csv(run / "epochs.csv")[: row.epochs]
        summary = read_cache(run / "summary.json")
    failure = read_cache(sweep.folder / "failed" / f"{row}.json")
    result = {"trial": row.trial, "run": run and str(run), "num_epochs": len(epochs)}
    # of the last rung a summary is needed: the last checkpoint might not be written yet
    is_paused = len(epochs) == row.epochs < sweep.plan["rungs"][-1]
    if summary.get("status") == "finished" or is_paused:
        scored = summary if row.is_final else epochs[-1]
        text = str(scored["val_auc"])  # without a score: nan, or null in JSON
        score = float(text.replace("None", "nan"))
        if math.isfinite(score):
            return result | {"state": "done", "score": score}
        reason = "no AUC: validation lacks a class, or no logit was finite"
    elif summary:
        reason = f"diverged after step {summary['diverged_step']}"
    elif failure:
        reason = failure["reason"]
    else:
        return result | {"state": "todo"}
    return result | {"state": "failed", "reason": reason}


def mean_scores(sweep: Sweep, rung: int) -> dict[str, float]:
    """Mean AUC over the seeds of each trial of a rung, the best first; a trial that failed with any
    seed has none.

    Raises BadInput while a row has no result, or where no trial has a score.
    """
    outcomes = [outcome(sweep, row) for row in sweep.rows(rung)]
    states = [result["state"] for result in outcomes]
    where = f"rung {rung} of {sweep.folder}"
    if "todo" in states:
        num, first = states.count("todo"), states.index("todo")
        reason = f"{num} of {len(states)} rows have no result, the first is row {first}"
        remedy = f"sweep.py run {sweep.folder.name} --all"
        raise BadInput(f"{where} is not over: {reason} ({remedy})")
    scores = defaultdict(list)
    for result in outcomes:
        scores[result["trial"]].append(result.get("score", math.nan))
    means = {}
    for trial, values in sorted(scores.items()):
        mean = sum(values) / len(values)
        if math.isfinite(mean):
            means[trial] = mean
    if not means:
        reason = outcomes[states.index("failed")]["reason"]
        raise BadInput(f"no trial of {where} has a score; the first failed so: {reason}")
    ranked = sorted(means, key=means.get, reverse=True)
    return {trial: means[trial] for trial in ranked}


def promote(sweep: Sweep, rung: int) -> Path:
    """Write the rung after `rung`: its best third, or for the champion the best of all with the
    base config.

    Nothing but the plan and the run folders decides, so that whoever writes it again writes the
    same bytes.
    """
    if rung >= sweep.num_rungs:
        raise BadInput(f"rung {rung} is the last one: sweep.py champion {sweep.folder.name}")
    scores = mean_scores(sweep, rung)
    promoted, is_last = list(scores), rung + 1 == sweep.num_rungs
    for earlier in range(rung)[::-1] if is_last else ():
        # what went on from there is in the list, or failed later
        went_on = sweep.promoted(earlier)
        promoted += [trial for trial in mean_scores(sweep, earlier) if trial not in went_on]
    promoted = promoted[: sweep.num_trials(rung + 1)]
    if is_last:
        promoted.append(BASE)
    path = sweep.rung_file(rung + 1)
    value = {"plan": sweep.plan["sha256"], "trials": promoted, "scores_before": scores}
    if path.is_file() and read_json(path) != value:
        reason = f"is not what the runs of rung {rung} give now: were runs removed or changed?"
        raise BadInput(f"{path} {reason}")
    write_json(path, value)
    return path
