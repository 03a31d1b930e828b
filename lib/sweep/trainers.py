"""Rows carried out: a claim on each, a trainer for it, and the reason where one fails."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import BinaryIO

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
POLL_S = 0.1  # between looks at the trainers


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


def file_of(sweep: Sweep, row: Row, kind: str, suffix: str) -> Path:
    """A file of a row in the folder of its kind, which is made."""
    folder = sweep.folder / kind
    folder.mkdir(exist_ok=True)
    return folder / f"{row}.{suffix}"


def claim(sweep: Sweep, row: Row) -> BinaryIO | None:
    """The claim on a row: the log of its trainer, open and locked; None where another process has
    it.

    The kernel lets go of it once every process that has it open is gone, however they ended. The
    trainer inherits it, so that one that outlives its parent keeps its row, and one that is dead
    blocks nobody.
    """
    path = file_of(sweep, row, "logs", "err")
    log = open(path, "ab")  # noqa: SIM115 (open as long as the claim is)
    try:
        if try_lock(log):
            return log
    except OSError as error:
        reason = f"this file system has no locks ({one_line(error)}); --sweeps takes another"
        raise BadInput(f"{path}: {reason}") from None
    log.close()
    return None


def start_trainer(
    sweep: Sweep, row: Row, log: BinaryIO, arguments: list[str], threads: int, slot: int
) -> subprocess.Popen:
    """train.py for a row, resumed if it has a run; what it says goes to its log. `slot` is its
    number among those beside it.
    """
    command = [sys.executable, str(REPOSITORY / "train.py"), "--runs", str(sweep.runs_dir)]
    command += ["--until-epoch", str(row.epochs)]
    run = sweep.run_of(row)
    if run:
        command += ["--resume", str(run)]
    else:
        values = {"name": sweep.run_name(row.trial), "seed": row.seed, "threads": threads}
        values |= sweep.plan["trials"].get(row.trial, {})
        command += ["--config", str(sweep.folder / "config.yaml")]
        command += [f"{key}={config.plain(value)}" for key, value in values.items()]
    # a process's number on its machine is what `--device auto` takes a GPU by
    environment = os.environ | {"LOCAL_RANK": str(slot)}
    streams = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": log}
    return subprocess.Popen([*command, *arguments], env=environment, **streams)


def note_end(sweep: Sweep, row: Row, code: int) -> None:
    """Record a trainer that ended without a result: a failure that quotes its last error, not a
    gap. What could not even start is to be mended, and is no failure of the trial.
    """
    log = file_of(sweep, row, "logs", "err")
    pattern = r"(?m)^(?:error|[\w.]*(?:Error|Exception)): .*"
    errors = re.findall(pattern, log.read_text(errors="replace"))
    reason = errors[-1] if errors else f"no error in {log}"
    if code == EXIT_USAGE and not sweep.run_of(row):
        say(f"{row} could not start: {reason}")
    elif outcome(sweep, row)["state"] == "todo":
        ending = f"exit {code}: {reason}"
        if code < 0:
            ending = f"killed by {signal.Signals(-code).name}; SIGKILL comes where memory runs out"
        write_json(file_of(sweep, row, "failed", "json"), {"exit": code, "reason": ending})


def run_rows(sweep: Sweep, rows: list[Row], num_processes: int, arguments: list[str]) -> dict:
    """Carry out rows, so many at a time; what has a result or is under way elsewhere is left alone.
    Returns counts of states.

    Each trainer has an equal share of the cores and, with `--device auto`, the next GPU in turn.
    Told to stop, the trainers save and leave, and nothing more is started: `interrupted` is then
    true.
    """
    base = config.load_config(sweep.folder / "config.yaml")
    threads = resolve_threads(base, num_processes).threads
    running, num_elsewhere = {}, 0
    stop, bar = StopFlag(), Progress(len(rows), sweep.folder.name, "rows")

    def wait() -> None:
        time.sleep(POLL_S)
        for slot, (row, log, trainer) in list(running.items()):
            code = trainer.poll()
            if code is not None:
                if not stop and code not in STOPPED:
                    note_end(sweep, row, code)
                log.close()
                del running[slot]
                bar.add()

    with stop, bar:
        for row in rows:
            while len(running) == num_processes and not stop:
                wait()
            if stop:
                break
            log = claim(sweep, row)
            if not log:
                num_elsewhere += 1
                bar.add()
            elif outcome(sweep, row)["state"] == "todo":
                slot = next(slot for slot in range(num_processes) if slot not in running)
                trainer = start_trainer(sweep, row, log, arguments, threads, slot)
                running[slot] = (row, log, trainer)
            else:
                log.close()
                bar.add()
        while running and not stop:
            wait()
        for _, _, trainer in running.values():
            trainer.terminate()  # once: it saves, and a second signal may cut that short
        while running:
            wait()
    states = [outcome(sweep, row)["state"] for row in rows]
    counts = {f"num_{state}": states.count(state) for state in ("done", "failed", "todo")}
    return {**counts, "num_elsewhere": num_elsewhere, "interrupted": bool(stop)}
