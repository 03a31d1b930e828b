"""The program as it was submitted: jobs start later, when the working tree may have changed."""

import datetime
import hashlib
import os
import platform
import secrets
import shutil
import time
from pathlib import Path

from lib.command import REPOSITORY
from lib.files import write_json
from lib.jobs.slurm import run_command
from lib.jobs.work import Work, parse_arguments
from lib.rundir import git_state

SNAPSHOTS = REPOSITORY / "jobs/snapshots"
SNAPSHOT_S = 86_400  # a snapshot stays at least so long
KEPT_OUT = {REPOSITORY / name for name in ("data", "runs", "sweeps", "jobs/logs", "jobs/snapshots")}


def describe_submission() -> dict:
    """What a run's meta.json keeps of its submission: the code as it was then, and an id that all
    its tasks share.
    """
    now, state = datetime.datetime.now(datetime.UTC), git_state()
    patch = state.pop("uncommitted_patch").encode()
    return {
        "id": f"{now:%Y%m%dT%H%M%SZ}-{secrets.token_hex(2)}",
        "utc": now.isoformat(timespec="seconds"),
        "host": platform.node(),
        "folder": str(REPOSITORY),
        "uncommitted_patch_sha256": hashlib.sha256(patch).hexdigest(),
        **state,
    }


def take_snapshot(submission: dict) -> Path:
    """A folder with what a chain of jobs needs: `code`, the program as it is now with uncommitted
    changes and new files, and submission.json.

    Of a git repository the code is a clone on the same commit with the same changes, so that a
    run's meta.json tells the truth.
    """
    remove_snapshots()
    folder = SNAPSHOTS / submission["id"]
    code = folder / "code"
    folder.mkdir(parents=True)
    write_json(folder / "submission.json", submission)
    if not submission["commit"]:
        shutil.copytree(REPOSITORY, code, ignore=_unneeded)
        return folder
    here, there = ("git", "-C", str(REPOSITORY)), ("git", "-C", str(code))
    run_command("git", "clone", "-q", "--shared", "--no-checkout", str(REPOSITORY), str(code))
    run_command(*there, "reset", "-q", submission["commit"])
    names = run_command(*here, "ls-files", "-z", "--cached", "--others", "--exclude-standard")
    for name in filter(None, names.split("\0")):
        source, target = REPOSITORY / name, code / name
        if source.is_file():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, target)
    return folder


def _unneeded(folder: str, names: list[str]) -> list[str]:
    hidden = [name for name in names if name.startswith((".", "__pycache__"))]
    return hidden + [name for name in names if Path(folder, name) in KEPT_OUT]


def freeze_config(work: Work, folder: Path) -> list[str]:
    """The arguments of a work with a copy of its config in the snapshot: the file may be edited
    before the job starts.
    """
    config = work.script == "train.py" and parse_arguments("train.py", work.arguments).config
    if not config:
        return work.arguments
    # of two the last counts
    return [*work.arguments, "--config", str(shutil.copy(config, folder / "config.yaml"))]


def remove_snapshots() -> None:
    """Remove this user's old snapshots, but those of jobs that wait or run."""
    commands, now = run_command("squeue", "-h", "-o", "%o"), time.time()
    for folder in SNAPSHOTS.glob("*"):
        status = folder.stat()
        is_old = now - status.st_mtime > SNAPSHOT_S
        if is_old and status.st_uid == os.getuid() and folder.name not in commands:
            shutil.rmtree(folder, ignore_errors=True)
