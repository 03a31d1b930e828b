"""Rows carried out: a claim on each, a trainer for it, and the reason where one fails."""

import os
import queue
import re
import signal
import subprocess
import sys
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from pathlib import Path
from typing import TextIO

from lib import config
from lib.command import (
    EXIT_INTERRUPTED,
    EXIT_USAGE,
    REPOSITORY,
    STOP_SIGNALS,
    BadInput,
    one_line,
    say,
)
from lib.files import read_json, try_lock, write_json
from lib.fingerprint import fingerprint
from lib.machine import resolve_threads
from lib.progress import Progress
from lib.ranks import StopFlag
from lib.sweep.rungs import Row, Sweep, outcome

STOPPED = (EXIT_INTERRUPTED, *(-number for number in STOP_SIGNALS))


def require_comparable(sweep: Sweep, overrides: list[str]) -> None:
    """Raise BadInput for overrides, or data, with which rows would not be the plan's, or not
    comparable to those so far.
    """
    changes = config.parse_overrides(overrides)
    for key in ("name", "views"):
        if key in changes:
            raise BadInput(f"{key} cannot be changed after the plan")
    cfg = config.change_free_keys(config.load_config(sweep.folder / "config.yaml"), changes)
    splits = ["train"] if cfg.num_folds else ["train", "valid"]
    digests, path = fingerprint(cfg.data_dir, splits), sweep.folder / "data.json"
    if path.is_file() and read_json(path) != digests:
        reason = f"the data that {sweep.folder} was begun with: its SHA-256 differs"
        raise BadInput(f"{cfg.data_dir} is not {reason}")
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
        reason = f"this file system has no locks ({one_line(error)}); --sweeps takes another"
        raise BadInput(f"{path}: {reason}") from None
    file.close()
    return None


def start_trainer(
    sweep: Sweep, row: Row, lock: TextIO, arguments: list[str], threads: int, slot: int
) -> subprocess.Popen:
    """train.py for a row, resumed if it has a run; what it says goes to logs/. `slot` is its number
    among those beside it.
    """
    run = sweep.run_of(row)
    command = [sys.executable, str(REPOSITORY / "train.py"), "--runs", str(sweep.runs_dir)]
    command += ["--until-epoch", str(row.epochs)]
    if run:
        command += ["--resume", str(run)]
    else:
        values = {"name": sweep.run_name(row.trial), "seed": row.seed, "threads": threads}
        values |= sweep.plan["trials"].get(row.trial, {})
        command += ["--config", str(sweep.folder / "config.yaml")]
        command += [f"{key}={config.plain(value)}" for key, value in values.items()]
    # a process's number on its machine is what `--device auto` takes a GPU by
    options = {"env": os.environ | {"LOCAL_RANK": str(slot)}, "pass_fds": [lock.fileno()]}
    log = log_of(sweep, row)
    log.parent.mkdir(exist_ok=True)
    with open(log, "ab") as stderr:
        quiet = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": stderr}
        return subprocess.Popen([*command, *arguments], **quiet, **options)


def log_of(sweep: Sweep, row: Row) -> Path:
    return sweep.folder / "logs" / f"{row}.err"


def read_reason(sweep: Sweep, row: Row) -> str:
    """Why a trainer ended: its last error. A line of progress is no reason."""
    log = log_of(sweep, row)
    pattern = r"(?m)^(?:error|[\w.]*(?:Error|Exception)): .*"
    errors = re.findall(pattern, log.read_text(errors="replace"))
    return errors[-1] if errors else f"no error in {log}"


def note_end(sweep: Sweep, row: Row, code: int) -> None:
    """Record a trainer that ended without a result: a failure with a reason, not a gap; remove the
    file to try again. What could not even start is to be mended, and is no failure of the trial.
    """
    if code == EXIT_USAGE and not sweep.run_of(row):
        say(f"{row} could not start: {read_reason(sweep, row)}")
    elif outcome(sweep, row)["state"] == "todo":
        reason = f"exit {code}: {read_reason(sweep, row)}" if code >= 0 else ""
        if code < 0:
            reason = f"killed by {signal.Signals(-code).name}"
        if code == -signal.SIGKILL:
            reason += ", as the kernel and Slurm do where memory runs out"
        path = sweep.folder / "failed" / f"{row}.json"
        path.parent.mkdir(exist_ok=True)
        write_json(path, {"exit": code, "reason": reason})


def run_rows(sweep: Sweep, rows: list[Row], num_processes: int, arguments: list[str]) -> dict:
    """Carry out rows, so many at a time; what has a result or is under way elsewhere is left alone.
    Returns counts of states.

    Each trainer has an equal share of the cores and, with `--device auto`, the next GPU in turn.
    Told to stop, the trainers save and leave, and nothing more is started: `interrupted` is then
    true.
    """
    base = config.load_config(sweep.folder / "config.yaml")
    threads = resolve_threads(base, num_processes).threads
    slots, trainers, told, elsewhere = queue.SimpleQueue(), set(), set(), []
    for slot in range(num_processes):
        slots.put(slot)
    stop = StopFlag()

    def carry_out(row: Row) -> None:
        if stop:
            return
        lock = claim(sweep, row)
        if not lock:
            elsewhere.append(row)
            return
        with lock:
            if outcome(sweep, row)["state"] != "todo":
                return
            slot = slots.get()
            trainer = start_trainer(sweep, row, lock, arguments, threads, slot)
            trainers.add(trainer)
            code = trainer.wait()
            trainers.discard(trainer)
            slots.put(slot)
            if not stop and code not in STOPPED:
                note_end(sweep, row, code)

    bar = Progress(len(rows), sweep.folder.name, "rows")
    with stop, bar, ThreadPoolExecutor(num_processes) as pool:
        futures = [pool.submit(carry_out, row) for row in rows]
        pending = set(futures)
        while pending:
            ended, pending = wait(pending, timeout=0.1, return_when=FIRST_COMPLETED)
            bar.add(len(ended))
            for trainer in set(trainers) - told if stop else ():
                trainer.terminate()  # once: it saves, and a second signal may cut that short
                told.add(trainer)
    for future in futures:
        future.result()  # its error, if it had one
    states = [outcome(sweep, row)["state"] for row in rows]
    counts = {f"num_{state}": states.count(state) for state in ("done", "failed", "todo")}
    return {**counts, "num_elsewhere": len(elsewhere), "interrupted": bool(stop)}
