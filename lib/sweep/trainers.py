"""Rows carried out: a claim on each, a trainer for it, and the reason where one fails."""

import os
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from typing import BinaryIO

from lib import config
from lib.batches import open_train_valid
from lib.command import (
    EXIT_INTERRUPTED,
    EXIT_USAGE,
    REPOSITORY,
    STOP_SIGNALS,
    BadInput,
    say,
)
from lib.files import lock_if_possible, write_json
from lib.machine import resolve_threads
from lib.progress import Progress
from lib.ranks import StopFlag
from lib.sweep.rungs import Row, Sweep, outcome

STOPPED = (EXIT_INTERRUPTED, *(-number for number in STOP_SIGNALS))
POLL_S = 0.1  # between looks at a trainer
ERROR_LINE = r"(?m)^(?:error|[\w.]*(?:Error|Exception)): .*"


def require_comparable(sweep: Sweep, overrides: list[str]) -> None:
    """Raise BadInput for overrides with which rows would not be the plan's, and for data that
    cannot be read.
    """
    for key in config.parse_overrides(overrides):
        if key in ("name", "views"):
            raise BadInput(f"{key} cannot be changed after the plan")
    cfg = config.load_config(sweep.folder / "config.yaml")
    open_train_valid(config.change_free_keys(cfg, overrides))


def start_trainer(
    sweep: Sweep, row: Row, log: BinaryIO, arguments: list[str], threads: int, slot: int
) -> subprocess.Popen:
    """train.py for a row, resumed if it has a run; what it says goes to its log. `slot` is its
    number among those beside it.
    """
    command = [sys.executable, REPOSITORY / "train.py", "--runs", sweep.runs_dir]
    command += ["--until-epoch", str(row.epochs)]
    run = sweep.run_of(row)
    if run:
        command += ["--resume", run]
    else:
        values = {"name": sweep.run_name(row.trial), "seed": row.seed, "threads": threads}
        values |= sweep.plan["trials"].get(row.trial, {})
        command += ["--config", sweep.folder / "config.yaml"]
        command += [f"{key}={config.plain(value)}" for key, value in values.items()]
    # a process's number on its machine is what `--device auto` takes a GPU by
    environment = os.environ | {"LOCAL_RANK": str(slot)}
    command += arguments
    return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=log)


def note_end(sweep: Sweep, row: Row, code: int) -> None:
    """Record a trainer that ended without a result and was not stopped: a failure that quotes its
    last error, not a gap.
    """
    if code in STOPPED or outcome(sweep, row)["state"] != "todo":
        return
    errors = re.findall(ERROR_LINE, sweep.log_of(row).read_text(errors="replace"))
    reason = f"exit {code}: {errors[-1] if errors else 'it says no error'}"
    if code == EXIT_USAGE and not sweep.run_of(row):
        say(f"{row.trial}, seed {row.seed}, could not start and stays to be done: {reason}")
        return
    if code < 0:
        reason = f"killed by signal {-code}; 9 comes where memory runs out"
    write_json(sweep.failure_of(row), {"reason": reason})


def run_row(sweep: Sweep, row: Row, arguments: list[str], threads: int, slot: int, stop) -> bool:
    """Carry out a row that has no result yet. False if another process has it. Once `stop` is true
    the trainer is told to save and leave.

    Who has locked the log of a row has the row. The kernel lets go of the lock once every process
    that has the log open is gone, however they ended. The trainer inherits it, so that one that
    outlives its parent keeps its row, and one that is dead blocks nobody.
    """
    with open(sweep.log_of(row), "ab") as log:
        if not lock_if_possible(log, log.name):
            return False
        if not stop and outcome(sweep, row)["state"] == "todo":
            trainer = start_trainer(sweep, row, log, arguments, threads, slot)
            while trainer.poll() is None:
                time.sleep(POLL_S)
                if stop:
                    trainer.terminate()  # once: a second signal may cut the saving short
                    trainer.wait()
            note_end(sweep, row, trainer.returncode)
    return True


def run_rows(
    sweep: Sweep, rows: list[Row], num_processes: int, arguments: list[str]
) -> tuple[int, bool]:
    """Carry out rows, so many at a time; what has a result or is under way elsewhere is left alone.
    Returns how many are under way elsewhere, and whether this process was told to stop.

    Each trainer has an equal share of the cores and, with `--device auto`, the next GPU in turn.
    Told to stop, the trainers save and leave, and nothing more is started.
    """
    base = config.load_config(sweep.folder / "config.yaml")
    threads = resolve_threads(base, num_processes).threads
    todo = iter(rows)

    def carry_out(slot: int) -> int:
        """The next row again and again; how many of them another process has."""
        num_elsewhere = 0
        for row in todo:
            num_elsewhere += not run_row(sweep, row, arguments, threads, slot, stop)
            bar.add()
        return num_elsewhere

    bar, pool = Progress(len(rows), sweep.folder.name, "rows"), ThreadPoolExecutor(num_processes)
    with StopFlag() as stop, bar, pool:
        num_elsewhere = sum(pool.map(carry_out, range(num_processes)))
    return num_elsewhere, bool(stop)
