"""The rungs of a search, and what the run folders of its trials say.

Successive halving (Jamieson and Talwalkar 2016). Every trial's config has the full number of epochs
from the start, and a rung is how far its run has come: `train.py --until-epoch` pauses it there. So
no schedule knows of rungs, and a trial that is promoted ends with the weights, to the bit, of a run
that never paused.
"""

import math
from dataclasses import dataclass
from pathlib import Path

from lib.command import BadInput
from lib.files import read_csv, read_json, write_json
from lib.rundir import is_finished
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

    @property
    def num_finalists(self) -> int:
        """The most trials that are trained on fresh seeds, `base` aside."""
        return min(self.plan.get("finalists", NUM_FINALISTS), len(self.plan["trials"]))

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
            return (self.num_finalists + 1) * self.plan["champion_seeds"]
        return max(1, len(self.plan["trials"]) // KEPT_SHARE**rung) * len(self.plan["seeds"])

    def num_epochs(self) -> int:
        """The epochs of all trainings, when no trial fails."""
        num, before = 0, 0
        for rung, epochs in enumerate(self.plan["rungs"]):
            num += self.num_rows(rung) * (epochs - before)
            before = epochs
        return num + self.num_rows(self.num_rungs) * before

    def rows(self, rung: int) -> list[Row]:
        """The rows of a rung. Raises BadInput where it was not written yet."""
        if not 0 <= rung <= self.num_rungs:
            raise BadInput(f"{self.folder} has no rung {rung}: they are 0 to {self.num_rungs}")
        if rung and not self.rung_file(rung).is_file():
            remedy = f"sweep.py promote {self.folder.name}"
            raise BadInput(f"{self.folder} has no rung {rung} yet: {remedy}")
        is_final, seeds = rung == self.num_rungs, self.plan["seeds"]
        trials = self.promoted(rung - 1) if rung else self.plan["trials"]
        if is_final:
            first = max(seeds) + 1
            seeds = range(first, first + self.plan["champion_seeds"])
        epochs = self.plan["rungs"][min(rung, self.num_rungs - 1)]
        return [Row(trial, seed, epochs, is_final) for trial in trials for seed in seeds]

    def promoted(self, rung: int) -> list[str]:
        """The trials that went on from a rung; none before it was promoted."""
        path = self.rung_file(rung + 1)
        trials = read_json(path).get("trials") if path.is_file() else []
        if not isinstance(trials, list) or not {*self.plan["trials"], BASE}.issuperset(trials):
            remedy = f"remove it, and promote rung {rung} again"
            raise BadInput(f"{path} does not hold trials of the plan: {remedy}")
        return trials

    def newest_rung(self) -> int:
        rungs = range(1, self.num_rungs + 1)
        return max([0, *(rung for rung in rungs if self.rung_file(rung).is_file())])

    def started_rung(self) -> int:
        """The newest rung of which a row has a result."""
        for rung in range(self.newest_rung(), 0, -1):
            if any(outcome(self, row)["state"] != "todo" for row in self.rows(rung)):
                return rung
        return 0


def load_sweep(folder, runs_dir) -> Sweep:
    """A planned search. Raises BadInput as load_plan does."""
    return Sweep(Path(folder), Path(runs_dir), load_plan(Path(folder)))


def outcome(sweep: Sweep, row: Row) -> dict:
    """How a row fares: `state` todo, done or failed, with the run, the AUC on validation, or the
    reason.

    The AUC is that of the last epoch of the row, over one view; of a final row that of best.pt over
    all views. What a run did beyond the row's epochs does not count, so that the answer never
    changes once there is one.
    """
    run, failure = sweep.run_of(row), sweep.folder / "failed" / f"{row}.json"
    summary = read_json(run / "summary.json") if run and is_finished(run) else {}
    epochs = []
    if run and (run / "epochs.csv").is_file():
        epochs = read_csv(run / "epochs.csv")[: row.epochs]
    result = {"run": str(run) if run else None, "num_epochs": len(epochs)}
    # of the last rung a summary is needed: the last checkpoint might not be written yet
    is_paused = len(epochs) == row.epochs < sweep.plan["rungs"][-1]
    if summary.get("status") == "finished" or is_paused:
        scored = summary if row.is_final or not epochs else epochs[-1]
        try:
            score = float(scored.get("val_auc"))
        except (TypeError, ValueError):
            score = math.nan
        if math.isfinite(score):
            return result | {"state": "done", "score": score}
        reason = "no AUC: validation lacks a class, or no logit was finite"
    elif summary:
        reason = f"diverged after step {summary.get('diverged_step')}"
    elif failure.is_file():
        reason = read_json(failure).get("reason", "for no reason that was kept")
    else:
        return result | {"state": "todo"}
    return result | {"state": "failed", "reason": reason}


def mean_scores(sweep: Sweep, rung: int) -> dict[str, float]:
    """Mean AUC over the seeds of each trial of a rung, the best first; a trial that failed with any
    seed has none.

    Raises BadInput while a row has no result, or where no trial has a score.
    """
    rows = sweep.rows(rung)
    outcomes = [outcome(sweep, row) for row in rows]
    todo = [number for number, result in enumerate(outcomes) if result["state"] == "todo"]
    if todo:
        where = f"{len(todo)} of {len(rows)} rows have no result, the first is row {todo[0]}"
        remedy = f"sweep.py run {sweep.folder.name} --all"
        raise BadInput(f"rung {rung} of {sweep.folder} is not over: {where} ({remedy})")
    scores = {}
    for row, result in zip(rows, outcomes, strict=True):
        scores.setdefault(row.trial, []).append(result.get("score", math.nan))
    means = {trial: sum(values) / len(values) for trial, values in scores.items()}
    ranked = [trial for trial in means if math.isfinite(means[trial])]
    ranked.sort(key=lambda trial: (-means[trial], trial))
    if not ranked:
        reasons = [result["reason"] for result in outcomes if "reason" in result]
        which = f"no trial of rung {rung} of {sweep.folder} has a score"
        raise BadInput(f"{which}; the first failed so: {reasons[0]}")
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
    if rung + 1 == sweep.num_rungs:
        ranked = list(scores)
        # those of earlier rungs come after those of later ones; what was promoted is in there, or
        # failed later
        for earlier in range(rung)[::-1]:
            promoted = sweep.promoted(earlier)
            ranked += [trial for trial in mean_scores(sweep, earlier) if trial not in promoted]
        promoted = [*ranked[: sweep.num_finalists], BASE]
    else:
        promoted = list(scores)[: sweep.num_rows(rung + 1) // len(sweep.plan["seeds"])]
    path = sweep.rung_file(rung + 1)
    value = {"plan": sweep.plan["sha256"], "trials": promoted, "scores_before": scores}
    if path.is_file() and read_json(path) != value:
        reason = f"is not what the runs of rung {rung} give now: were runs removed or changed?"
        raise BadInput(f"{path} {reason}")
    write_json(path, value)
    return path
