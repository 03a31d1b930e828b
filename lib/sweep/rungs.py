"""The rungs of a search, and what the run folders of its trials say.

Successive halving (Jamieson and Talwalkar 2016). Every trial's config has the full number of epochs
from the start, and a rung is how far its run has come: `train.py --until-epoch` pauses it there. So
no schedule knows of rungs, and a trial that is promoted ends with the weights, to the bit, of a run
that never paused.
"""

import glob
import math
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from lib.command import BadInput
from lib.files import read_cache, read_csv, read_json, write_json
from lib.sweep.design import plan_digest

# one in three trials goes on; `base` is the config with nothing varied
KEPT_SHARE, BASE = 3, "base"


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
        is_final = rung == self.num_rungs
        num = max(1, len(self.plan["trials"]) // KEPT_SHARE ** (rung - is_final))
        return min(num, self.plan["finalists"]) if is_final else num

    def run_name(self, trial: str) -> str:
        return f"{self.folder.name}-{self.plan['sha256'][:6]}-{trial}"

    def run_of(self, row: Row) -> Path | None:
        """The run folder of a row, known by its name; one without a config is none."""
        name = glob.escape(f"{self.run_name(row.trial)}-s{row.seed}")
        configs = sorted(self.runs_dir.glob(f"*Z-{name}-*/config.yaml"))
        return configs[0].parent if configs else None

    def rung_file(self, rung: int) -> Path:
        return self.folder / f"rung-{rung}.json"

    def log_of(self, row: Row) -> Path:
        return self.folder / "logs" / f"{row}.err"

    def failure_of(self, row: Row) -> Path:
        return self.folder / "failed" / f"{row}.json"

    def seeds(self, rung: int) -> list[int]:
        """Those of the plan; of the last rung fresh ones."""
        seeds = self.plan["seeds"]
        if rung < self.num_rungs:
            return seeds
        return [max(seeds) + number for number in range(1, self.plan["champion_seeds"] + 1)]

    def num_rows(self, rung: int) -> int:
        """How many rows a rung has when no trial fails: known before anything ran, so that arrays
        can be submitted.
        """
        num_base = int(rung == self.num_rungs)
        return (self.num_trials(rung) + num_base) * len(self.seeds(rung))

    def rows(self, rung: int) -> list[Row]:
        """The rows of a rung. Raises BadInput where `promote` has not written its file yet."""
        if rung and not self.rung_file(rung).is_file():
            raise BadInput(f"{self.folder} has no {self.rung_file(rung).name} yet: promote first")
        trials = self.promoted(rung - 1) if rung else self.plan["trials"]
        is_final = rung == self.num_rungs
        epochs = self.plan["rungs"][rung - is_final]
        seeds = self.seeds(rung)
        return [Row(trial, seed, epochs, is_final) for trial in trials for seed in seeds]

    def promoted(self, rung: int) -> list[str]:
        """The trials that went on from a rung. Raises OSError as `rows` does."""
        return read_json(self.rung_file(rung + 1))["trials"]

    def newest_rung(self) -> int:
        return len(list(self.folder.glob("rung-*.json")))


def load_sweep(folder, runs_dir) -> Sweep:
    """A planned search. Raises BadInput where the plan or its config was changed afterwards."""
    folder = Path(folder)
    plan = read_json(folder / "plan.json")
    if plan["sha256"] != plan_digest(plan, (folder / "config.yaml").read_text()):
        raise BadInput(f"{folder}: plan.json or config.yaml was changed after the plan was frozen")
    return Sweep(folder, Path(runs_dir), plan)


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
    failure = read_cache(sweep.failure_of(row))
    result = {"trial": row.trial, "run": run and str(run), "state": "failed"}
    # of the last rung a summary is needed: the last checkpoint might not be written yet
    is_paused = len(epochs) == row.epochs < sweep.plan["rungs"][-1]
    if summary.get("status") == "finished" or is_paused:
        scored = summary if row.is_final else epochs[-1]
        score = scored["val_auc"]  # without one: nan, or null in JSON
        if score not in (None, "nan"):
            return result | {"state": "done", "score": float(score)}
        reason = "no AUC: validation lacks a class, or no logit was finite"
        return result | {"reason": reason}
    if summary:
        return result | {"reason": f"diverged after step {summary['diverged_step']}"}
    return result | (failure or {"state": "todo"})


def trial_scores(sweep: Sweep, rung: int) -> dict[str, dict[str, float]]:
    """{trial: {run: AUC}} of a rung, a run for each seed, the trial with the best mean first; a
    trial that failed with any seed is left out.

    Raises BadInput while a row has no result, or where no trial has a score.
    """
    outcomes = [outcome(sweep, row) for row in sweep.rows(rung)]
    states = [result["state"] for result in outcomes]
    where = f"rung {rung} of {sweep.folder}"
    if "todo" in states:
        reason = f"row {states.index('todo')} has no result"
        raise BadInput(f"{where} is not over: {reason} (sweep.py run {sweep.folder.name} --all)")
    scores = defaultdict(dict)
    for result in outcomes:
        scores[result["trial"]][result["run"]] = result.get("score", math.nan)
    means = {trial: fmean(by_run.values()) for trial, by_run in sorted(scores.items())}
    ranked = [trial for trial in means if math.isfinite(means[trial])]
    if not ranked:
        reason = outcomes[states.index("failed")]["reason"]
        raise BadInput(f"no trial of {where} has a score; the first failed so: {reason}")
    ranked.sort(key=means.get, reverse=True)  # of equal ones the first
    return {trial: scores[trial] for trial in ranked}


def promote(sweep: Sweep, rung: int) -> Path:
    """Write the rung after `rung`, once: its best third, or for the champion its best finalists
    with the base config.

    Nothing but the plan and the run folders decides, so that whoever writes it writes the same
    bytes.
    """
    if rung >= sweep.num_rungs:
        raise BadInput(f"rung {rung} is the last one: sweep.py champion {sweep.folder.name}")
    path = sweep.rung_file(rung + 1)
    if not path.is_file():
        promoted = list(trial_scores(sweep, rung))[: sweep.num_trials(rung + 1)]
        if rung + 1 == sweep.num_rungs:
            promoted.append(BASE)
        write_json(path, {"trials": promoted})
    return path
