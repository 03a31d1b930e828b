"""Hyper-parameter search with files alone: a frozen design, rungs of trials, and what their run
folders say.

Successive halving (Jamieson and Talwalkar 2016). Every trial's config has the full number of epochs
from the start, and a rung is how far its run has come: `train.py --until-epoch` pauses it there. So
no schedule knows of rungs, and a trial that is promoted ends with the weights, to the bit, of a run
that never paused.
"""

import dataclasses
import hashlib
import itertools
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, TextIO

from lib import config
from lib.command import (
    EXIT_INTERRUPTED,
    EXIT_USAGE,
    STOP_SIGNALS,
    BadInput,
    last_line,
    nearest,
    one_line,
    say,
)
from lib.files import atomic_write, file_digest, read_csv, read_json, try_lock, write_json
from lib.progress import Progress
from lib.rundir import REPOSITORY, is_finished

MOST_SEED = 2**31 - 101  # with room for the champion's fresh ones
# one in three trials goes on; `base` is the config with nothing varied
KEPT_SHARE, NUM_FINALISTS, BASE = 3, 3, "base"
SPACE = {
    "design": Literal["sobol", "grid"],
    "trials": config.Positive,
    "seed": config.Natural,  # of the design
    "seeds": tuple[config.Natural, ...],  # of training; a trial's score is the mean over them
    "rungs": tuple[config.Positive, ...],  # epochs
    "champion_seeds": Annotated[int, 3],
}
# the search sets them, or scores could not be compared across them
FIXED_KEYS = ("name", "seed", "epochs", "data_dir", "limit_valid", "num_folds", "fold", "views")


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

    def run_name(self, trial: str) -> str:
        return f"{self.folder.name}-{self.plan['sha256'][:6]}-{trial}"

    def run_of(self, row: Row) -> Path | None:
        """The run folder of a row, known by its name; one without a config is none."""
        found = sorted(
            self.runs_dir.glob(f"*Z-{self.run_name(row.trial)}-s{row.seed}-*/config.yaml")
        )
        return found[0].parent if found else None

    def rung_file(self, rung: int) -> Path:
        return self.folder / f"rung-{rung}.json"

    def num_rows(self, rung: int) -> int:
        """How many rows a rung has when no trial fails: known before anything ran, so that arrays
        can be submitted.
        """
        if rung == self.num_rungs:
            return (min(NUM_FINALISTS, len(self.plan["trials"])) + 1) * self.plan["champion_seeds"]
        return max(1, len(self.plan["trials"]) // KEPT_SHARE**rung) * len(self.plan["seeds"])

    def rows(self, rung: int) -> list[Row]:
        """The rows of a rung. Raises BadInput where it was not written yet."""
        if not 0 <= rung <= self.num_rungs:
            raise BadInput(f"{self.folder} has no rung {rung}: they are 0 to {self.num_rungs}")
        if rung and not self.rung_file(rung).is_file():
            raise BadInput(
                f"{self.folder} has no rung {rung} yet: sweep.py promote {self.folder.name}"
            )
        is_final, seeds = rung == self.num_rungs, self.plan["seeds"]
        trials = self.promoted(rung - 1) if rung else self.plan["trials"]
        if is_final:
            seeds = range(max(seeds) + 1, max(seeds) + 1 + self.plan["champion_seeds"])
        epochs = self.plan["rungs"][min(rung, self.num_rungs - 1)]
        return [Row(trial, seed, epochs, is_final) for trial in trials for seed in seeds]

    def promoted(self, rung: int) -> list[str]:
        """The trials that went on from a rung; none before it was promoted."""
        path = self.rung_file(rung + 1)
        trials = read_json(path).get("trials") if path.is_file() else []
        if not isinstance(trials, list) or not {*self.plan["trials"], BASE}.issuperset(trials):
            raise BadInput(
                f"{path} does not hold trials of the plan: remove it, and promote rung {rung} again"
            )
        return trials

    def newest_rung(self) -> int:
        return max(
            rung for rung in range(self.num_rungs + 1) if not rung or self.rung_file(rung).is_file()
        )


# the design, frozen before anything runs


def build_plan(name: str, space: dict, base: config.Config, source) -> dict:
    """The trials of a space as plain values, each checked against the config, with a SHA-256 over
    the whole.
    """
    for key in space.keys() ^ {*SPACE, "ranges"}:
        raise BadInput(
            f"{source}: {'unknown' if key in space else 'missing'} key {key!r}{nearest(key, SPACE)}"
        )
    plan, ranges = (
        {key: config.coerce(f"{source}: {key}", space[key], hint) for key, hint in SPACE.items()},
        space["ranges"],
    )
    if not plan["rungs"] or list(plan["rungs"]) != sorted(set(plan["rungs"])) or not plan["seeds"]:
        raise BadInput(f"{source}: rungs must be rising numbers of epochs, and seeds at least one")
    if (
        len(set(plan["seeds"])) < len(plan["seeds"])
        or max(*plan["seeds"], plan["seed"]) > MOST_SEED
    ):
        raise BadInput(f"{source}: seeds must differ, and be at most {MOST_SEED:,}")
    if not isinstance(ranges, dict) or not ranges:
        raise BadInput(f"{source}: ranges must hold config keys, each with a range")
    config.refuse_unknown(ranges, f"{source}: ranges")
    if fixed := [key for key in ranges if key in FIXED_KEYS]:
        raise BadInput(
            f"{source}: {fixed[0]} cannot be searched over: the search sets it, or scores could not"
            " be compared"
        )
    kinds = {
        key: _check_range(f"{source}: {key}", spec, plan["design"]) for key, spec in ranges.items()
    }
    if plan["design"] == "sobol":
        from torch.quasirandom import SobolEngine

        points = (
            SobolEngine(len(kinds), scramble=True, seed=plan["seed"]).draw(plan["trials"]).tolist()
        )
    else:
        steps = (
            [(i + 0.5) / len(values) for i in range(len(values))] for _, values in kinds.values()
        )
        points = list(itertools.product(*steps))
    if len(points) != plan["trials"]:
        raise BadInput(
            f"{source}: trials is {plan['trials']}, but the grid has {len(points)} points"
        )
    plan |= {
        "ranges": ranges,
        "trials": {},
        "config_sha256": hashlib.sha256(config.dump_config(base).encode()).hexdigest(),
    }
    for number, point in enumerate(points):
        items = zip(kinds.items(), point, strict=True)
        values = {key: _value_at(*kind, x, getattr(base, key)) for (key, kind), x in items}
        typed = {key: config.plain(value) for key, value in values.items()}  # as train.py gets them
        config.config_from_dict(base.as_dict() | typed, source=f"{source}: trial {number}")
        plan["trials"][f"t{number:03}"] = values
    plan = json.loads(json.dumps(plan | {"name": name}))
    return plan | {"sha256": plan_digest(plan)}


def _check_range(where: str, spec, design: str) -> tuple[str, list]:
    """`{log: [low, high]}`, `{range: [low, high]}` or `{choice: [...]}`, a grid's only kind, as
    (kind, values).
    """
    kind, values = (
        next(iter(spec.items())) if isinstance(spec, dict) and len(spec) == 1 else ("", [])
    )
    if kind == "choice" and isinstance(values, list) and values:
        return kind, values
    if (
        kind in ("log", "range")
        and isinstance(values, list)
        and len(values) == 2
        and design == "sobol"
    ):
        low, high = (config.coerce(where, value, Annotated[float, -math.inf]) for value in values)
        if low < high and (low > 0 or kind == "range"):
            return kind, [low, high]
    allowed = (
        "choice: [...]"
        if design == "grid"
        else "log: [low, high], range: [low, high] or choice: [...]"
    )
    raise BadInput(f"{where} is {spec!r}, on a {design} design it must be {allowed}")


def _value_at(kind: str, values: list, x: float, like):
    """The value at `x` from 0 to 1 of a range: whole where the config wants it whole, else in four
    digits for people.
    """
    if kind == "choice":
        return values[min(int(x * len(values)), len(values) - 1)]
    low, high = values
    value = low * (high / low) ** x if kind == "log" else low + (high - low) * x
    return round(value) if isinstance(like, int) else float(f"{value:.4g}")


def plan_digest(plan: dict) -> str:
    return hashlib.sha256(
        json.dumps({k: v for k, v in plan.items() if k != "sha256"}, sort_keys=True).encode()
    ).hexdigest()


def freeze(folder: Path, space_path, config_path, overrides: list[str]) -> dict:
    """Write config.yaml and plan.json of a search, once. Raises BadInput where another plan stands
    there.
    """
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]{0,39}", folder.name):
        raise BadInput(
            f"{folder.name!r} is no name of a search: 1 to 40 letters, digits, - and _ (runs are"
            " named after it)"
        )
    space = config.read_yaml(space_path)
    if owned := [
        pair for pair in overrides if pair.partition("=")[0] in ("name", "seed", "epochs")
    ]:
        raise BadInput(f"{owned[0]}: the search sets names, seeds (by seeds) and epochs (by rungs)")
    base = config.load_config(config_path, overrides)
    base = dataclasses.replace(
        base, epochs=max(config.coerce("rungs", space.get("rungs", []), SPACE["rungs"]), default=1)
    )
    plan = build_plan(folder.name, space, base, space_path)
    if (folder / "plan.json").is_file():
        if read_json(folder / "plan.json") != plan:
            raise BadInput(f"{folder} holds another plan: a plan is frozen, take another --name")
        return plan
    folder.mkdir(parents=True, exist_ok=True)
    with atomic_write(folder / "config.yaml", "w") as file:
        file.write(config.dump_config(base))
    write_json(folder / "plan.json", plan)
    return plan


def load_sweep(folder, runs_dir) -> Sweep:
    """A planned search. Raises BadInput where there is none, or the plan or its config was changed
    afterwards.
    """
    folder = Path(folder)
    if not (folder / "plan.json").is_file():
        raise BadInput(f"{folder} is no planned search: it has no plan.json (sweep.py plan SPACE)")
    plan = read_json(folder / "plan.json")
    if plan.get("sha256") != plan_digest(plan) or file_digest(folder / "config.yaml") != plan.get(
        "config_sha256"
    ):
        raise BadInput(f"{folder}: plan.json or config.yaml was changed after the plan was frozen")
    if (name := plan.get("name", folder.name)) != folder.name:
        raise BadInput(
            f"{folder} was planned as {name}, after which its runs are called: give it that name"
            " again"
        )
    return Sweep(folder, Path(runs_dir), plan)


# what the run folders say


def _number(value) -> float:
    """A score as a number; NaN for what is none."""
    try:
        return float(value)
    except (TypeError, ValueError):
        return math.nan


def outcome(sweep: Sweep, row: Row) -> dict:
    """How a row fares: `state` todo, done or failed, with the run, the AUC on validation, or the
    reason.

    What a run did beyond the row's epochs does not count, so that the answer never changes once
    there is one. The AUC is that of the best epoch so far, over one view; of a final row that of
    best.pt over all views.
    """
    run, failure = sweep.run_of(row), sweep.folder / "failed" / f"{row}.json"
    summary = read_json(run / "summary.json") if run and is_finished(run) else {}
    epochs = (
        read_csv(run / "epochs.csv")[: row.epochs] if run and (run / "epochs.csv").is_file() else []
    )
    found = {"run": str(run) if run else None, "num_epochs": len(epochs)}
    # or its last checkpoint might not be written yet
    needs_summary = row.epochs == sweep.plan["rungs"][-1]
    if summary.get("status") == "finished" or (len(epochs) == row.epochs and not needs_summary):
        scores = (
            [summary.get("val_auc")] if row.is_final else [epoch.get("val_auc") for epoch in epochs]
        )
        if scores := [score for score in map(_number, scores) if math.isfinite(score)]:
            return found | {"state": "done", "score": max(scores)}
        return found | {
            "state": "failed",
            "reason": "no AUC: validation lacks a class, or no logit was finite",
        }
    if summary:
        return found | {
            "state": "failed",
            "reason": f"diverged after step {summary.get('diverged_step')}",
        }
    if failure.is_file():
        return found | {
            "state": "failed",
            "reason": read_json(failure).get("reason", "for no reason that was kept"),
        }
    return found | {"state": "todo"}


def started_rung(sweep: Sweep) -> int:
    """The newest rung of which a row has a result."""
    rungs = range(sweep.newest_rung(), 0, -1)
    return next(
        (r for r in rungs if any(outcome(sweep, row)["state"] != "todo" for row in sweep.rows(r))),
        0,
    )


def mean_scores(sweep: Sweep, rung: int) -> dict[str, float]:
    """Mean AUC over the seeds of each trial of a rung, the best first; a trial that failed with any
    seed has none.

    Raises BadInput while a row has no result, or where no trial has a score.
    """
    rows = sweep.rows(rung)
    outcomes = [outcome(sweep, row) for row in rows]
    if open_rows := [number for number, found in enumerate(outcomes) if found["state"] == "todo"]:
        where = (
            f"{len(open_rows)} of {len(rows)} rows have no result, the first is row {open_rows[0]}"
        )
        raise BadInput(
            f"rung {rung} of {sweep.folder} is not over: {where} (sweep.py run {sweep.folder.name}"
            " --all)"
        )
    scores = {}
    for row, found in zip(rows, outcomes, strict=True):
        scores.setdefault(row.trial, []).append(found.get("score", math.nan))
    means = {trial: sum(values) / len(values) for trial, values in scores.items()}
    ranked = sorted(
        (trial for trial in means if math.isfinite(means[trial])),
        key=lambda trial: (-means[trial], trial),
    )
    if not ranked:
        reasons = [found["reason"] for found in outcomes if "reason" in found]
        raise BadInput(
            f"no trial of rung {rung} of {sweep.folder} has a score; the first failed so:"
            f" {reasons[0]}"
        )
    return {trial: means[trial] for trial in ranked}


def promote(sweep: Sweep, rung: int) -> Path:
    """Write the rung after `rung`: its best third, or for the champion the best three of all with
    the base config.

    Nothing but the plan and the run folders decides, so that whoever writes it again writes the
    same bytes.
    """
    if rung >= sweep.num_rungs:
        raise BadInput(f"rung {rung} is the last one: sweep.py champion {sweep.folder.name}")
    scores = mean_scores(sweep, rung)
    if rung + 1 == sweep.num_rungs:
        # those of earlier rungs come after those of later ones, and what was promoted is in there,
        # or failed later
        earlier = [
            trial
            for r in range(rung)[::-1]
            for trial in mean_scores(sweep, r)
            if trial not in sweep.promoted(r)
        ]
        kept = [*[*scores, *earlier][:NUM_FINALISTS], BASE]
    else:
        kept = list(scores)[: sweep.num_rows(rung + 1) // len(sweep.plan["seeds"])]
    path, value = (
        sweep.rung_file(rung + 1),
        {"plan": sweep.plan["sha256"], "trials": kept, "scores_before": scores},
    )
    if path.is_file() and read_json(path) != value:
        raise BadInput(
            f"{path} is not what the runs of rung {rung} give now: were runs removed or changed?"
        )
    write_json(path, value)
    return path


def choose_champion(sweep: Sweep) -> dict:
    """The finalist with the highest mean AUC over fresh seeds, and whether its interval lies apart
    from those of the others.

    `run`, of the champion's runs the one with the highest AUC, is what is handed over. Raises
    BadInput as mean_scores does.
    """
    from lib.metrics import mean_interval

    finalists, rung = [], sweep.num_rungs
    for trial in mean_scores(sweep, rung):
        found = [outcome(sweep, row) for row in sweep.rows(rung) if row.trial == trial]
        best = max(found, key=lambda each: each["score"])
        finalists.append(
            {"trial": trial, "run": best["run"], **mean_interval([each["score"] for each in found])}
        )
    champion, *others = finalists
    close = [each["trial"] for each in others if each["high"] >= champion["low"]]
    lost = [
        trial
        for trial in sweep.promoted(rung - 1)
        if trial not in [each["trial"] for each in finalists]
    ]
    note = f"{champion['trial']} has the highest mean AUC"
    if not others:
        note = f"{champion['trial']} is the only finalist with a score"
    elif close:
        note += f", but is not separable from {', '.join(close)}: their intervals overlap"
    else:
        note += ", apart from all others"
    note += f"; {', '.join(lost)} failed" * bool(lost)
    values = sweep.plan["trials"].get(champion["trial"], {})
    return {
        "champion": champion["trial"],
        "values": values,
        "note": note,
        **champion,
        "finalists": finalists,
    }


# carrying rows out


def require_comparable(sweep: Sweep, overrides: list[str]) -> None:
    """Raise BadInput for overrides, or data, with which rows would not be the plan's, or not
    comparable to those so far.
    """
    from lib.fingerprint import fingerprint

    changes = config.parse_overrides(overrides)
    if fixed := [key for key in changes if key in ("name", "views")]:
        raise BadInput(f"{fixed[0]} cannot be changed after the plan")
    cfg = config.change_free_keys(config.load_config(sweep.folder / "config.yaml"), changes)
    digests, path = (
        fingerprint(cfg.data_dir, ["train"] if cfg.num_folds else ["train", "valid"]),
        sweep.folder / "data.json",
    )
    if path.is_file() and read_json(path) != digests:
        raise BadInput(
            f"{cfg.data_dir} is not the data that {sweep.folder} was begun with: its SHA-256"
            " differs"
        )
    write_json(path, digests)


def claim(sweep: Sweep, row: Row) -> TextIO | None:
    """The claim on a row, an open file; None where another process has it.

    The kernel lets go of it once every process that has it open is gone, however they ended. The
    trainer inherits it, so that one that outlives its parent keeps its row, and one that is dead
    blocks nobody.
    """
    path = sweep.folder / "claims" / f"{row}.lock"
    path.parent.mkdir(exist_ok=True)
    file = open(path, "a")  # noqa: SIM115 (open as long as the claim is)
    try:
        if try_lock(file):
            return file
    except OSError as error:
        raise BadInput(
            f"{path}: this file system has no locks ({one_line(error)}); --sweeps takes another"
        ) from None
    file.close()
    return None


def start_row(
    sweep: Sweep, row: Row, held: TextIO, arguments: list[str], threads: int, slot: int
) -> subprocess.Popen:
    """train.py for a row, resumed if it has a run; what it says goes to logs/. `slot` is its number
    among those beside it.
    """
    run, logs = sweep.run_of(row), sweep.folder / "logs"
    if run:
        which = ["--resume", str(run)]
    else:
        values = {"name": sweep.run_name(row.trial), "seed": row.seed, "threads": threads}
        values.update(sweep.plan["trials"].get(row.trial, {}))
        pairs = [f"{key}={config.plain(value)}" for key, value in values.items()]
        which = ["--config", str(sweep.folder / "config.yaml"), *pairs]
    command = [
        sys.executable,
        str(REPOSITORY / "train.py"),
        "--runs",
        str(sweep.runs_dir),
        "--until-epoch",
        str(row.epochs),
    ]
    logs.mkdir(exist_ok=True)
    with open(logs / f"{row}.err", "ab") as log:
        quiet = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": log}
        # a process's number on its machine is what `--device auto` takes a GPU by
        environment = os.environ | {"LOCAL_RANK": str(slot)}
        return subprocess.Popen(
            [*command, *which, *arguments], **quiet, env=environment, pass_fds=[held.fileno()]
        )


def last_words(sweep: Sweep, row: Row) -> str:
    """What the trainer of a row said last."""
    return last_line((sweep.folder / "logs" / f"{row}.err").read_text(errors="replace"))


def record_death(sweep: Sweep, row: Row, code: int) -> None:
    """A trial whose trainer ended without a result is a failure with a reason, not a gap; remove
    the file to try again.
    """
    reason = (
        f"{f'killed by {signal.Signals(-code).name}' if code < 0 else f'exit {code}'}:"
        f" {last_words(sweep, row)}"
    )
    (sweep.folder / "failed").mkdir(exist_ok=True)
    write_json(sweep.folder / "failed" / f"{row}.json", {"exit": code, "reason": reason})


def run_rows(sweep: Sweep, rows: list[Row], num_processes: int, arguments: list[str]) -> dict:
    """Carry out rows, so many at a time; what has a result or is under way elsewhere is left alone.
    Returns counts of states.

    Each trainer has an equal share of the cores and, with `--device auto`, the next GPU in turn.
    Told to stop, the trainers save and leave, and nothing more is started: `interrupted` is then
    true.
    """
    from lib.machine import resolve_threads

    threads = resolve_threads(
        config.load_config(sweep.folder / "config.yaml"), num_processes
    ).threads
    running, told, waiting, num_elsewhere = {}, [], rows[::-1], 0
    free_slots = list(range(num_processes))

    def stop(number, _frame):
        told.append(number)
        for process in list(running):
            process.send_signal(signal.SIGTERM)

    previous = {number: signal.signal(number, stop) for number in STOP_SIGNALS}
    with Progress(len(rows), sweep.folder.name, "rows") as bar:
        while running or (waiting and not told):
            for process in [process for process in running if process.poll() is not None]:
                row, held, slot = running.pop(process)
                free_slots.append(slot)
                stopped = told or process.returncode in (
                    EXIT_INTERRUPTED,
                    *(-number for number in STOP_SIGNALS),
                )
                # its surroundings, not the trial: to be mended
                if process.returncode == EXIT_USAGE and not sweep.run_of(row):
                    say(f"{row} could not start: {last_words(sweep, row)}")
                elif not stopped and outcome(sweep, row)["state"] == "todo":
                    record_death(sweep, row, process.returncode)
                held.close()
                bar.add(1)
            while waiting and not told and len(running) < num_processes:
                row = waiting.pop()
                if not (held := claim(sweep, row)):
                    num_elsewhere += 1
                elif outcome(sweep, row)["state"] != "todo":
                    held.close()
                else:
                    slot = min(free_slots)
                    free_slots.remove(slot)
                    process = start_row(sweep, row, held, arguments, threads, slot)
                    running[process] = row, held, slot
                    if told:  # while it was started
                        process.send_signal(signal.SIGTERM)
            time.sleep(0.05)
    for number, handler in previous.items():
        signal.signal(number, handler)
    states = [outcome(sweep, row)["state"] for row in rows]
    counts = {f"num_{state}": states.count(state) for state in ("done", "failed", "todo")}
    return {**counts, "num_elsewhere": num_elsewhere, "interrupted": bool(told)}
