"""The program as it was submitted: jobs start later, when the working tree may have changed."""

import datetime
import secrets
import shutil
import time
from pathlib import Path

from lib.command import REPOSITORY
from lib.files import utc_now, write_json
from lib.jobs.slurm import run_command
from lib.jobs.work import Work, parse_arguments
from lib.rundir import git_state

SNAPSHOTS = REPOSITORY / "jobs/snapshots"
SNAPSHOT_S = 60 * 86_400  # a snapshot stays so long: its jobs may wait, and be requeued


def describe_submission() -> dict:
    """What a run's meta.json keeps of its submission: an id that all its tasks share, and the
    commit. A warning says why git tells none.
    """
    now = datetime.datetime.now(datetime.UTC)
    number = f"{now:%Y%m%dT%H%M%SZ}-{secrets.token_hex(2)}"
    return {"id": number, "utc": utc_now(), "commit": git_state()["commit"]}


def take_snapshot(submission: dict) -> Path:
    """A folder with what a chain of jobs needs: `code`, the program as it is now with uncommitted
    changes and new files, and submission.json.

    Of a git repository the code is a clone on the same commit, with the changes of what jobs run,
    so that a run's meta.json tells the truth.
    """
    remove_snapshots()
    folder = SNAPSHOTS / submission["id"]
    code = folder / "code"
    folder.mkdir(parents=True)
    write_json(folder / "submission.json", submission)
    if submission["commit"]:
        run_command("git", "clone", "-q", "--shared", str(REPOSITORY), str(code))
    unneeded = shutil.ignore_patterns("__pycache__", "logs", "snapshots")
    for name in ("lib", "jobs"):
        shutil.rmtree(code / name, ignore_errors=True)
        shutil.copytree(REPOSITORY / name, code / name, ignore=unneeded)
    for path in REPOSITORY.iterdir():
        if path.suffix in (".py", ".yaml"):
            shutil.copy2(path, code)
    return folder


def freeze_config(work: Work, folder: Path) -> list[str]:
    """The arguments of a work with a copy of its config in the snapshot: the file may be edited
    before the job starts.
    """
    config = work.script == "train.py" and parse_arguments("train.py", work.arguments).config
    if not config:
        return work.arguments
    copy = str(shutil.copy(config, folder / "config.yaml"))
    frozen = {config: copy, f"--config={config}": f"--config={copy}"}
    return [frozen.get(word, word) for word in work.arguments]


def remove_snapshots() -> None:
    """Remove snapshots that are older than any job waits."""
    for folder in SNAPSHOTS.glob("*"):
        if time.time() - folder.stat().st_mtime > SNAPSHOT_S:
            shutil.rmtree(folder, ignore_errors=True)
