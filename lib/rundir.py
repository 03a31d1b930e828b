"""The folder of a run: made once, written by one process at a time, and readable by anybody at any
time.
"""

import contextlib
import datetime
import importlib.metadata
import json
import os
import platform
import secrets
import shlex
import subprocess
import sys
from pathlib import Path
from typing import BinaryIO

from lib.command import REPOSITORY, BadInput, nearest, one_line, print_result, say
from lib.config import (
    Config,
    change_free_keys,
    config_from_dict,
    dump_config,
    read_yaml,
)
from lib.files import atomic_write, lock_if_possible, read_json, utc_now, write_json

PACKAGES = ("torch", "torchvision", "h5py", "numpy", "pyyaml", "matplotlib")
JOB_VARIABLES = (
    "SLURM_CLUSTER_NAME",
    "SLURM_JOB_ID",
    "SLURM_ARRAY_JOB_ID",
    "SLURM_ARRAY_TASK_ID",
    "SLURM_RESTART_COUNT",
    "SLURM_JOB_PARTITION",
    "SLURMD_NODENAME",
)
# environment variable: JSON of what was submitted and when; the rest of meta.json says what ran
GIT_S = 30  # a network folder may hang
SUBMITTED = "PCAM_SUBMITTED"
# prefixes of environment variables that may change what is computed
VARIABLES = (
    "OMP_",
    "KMP_",
    "MKL_",
    "OPENBLAS_",
    "DNNL_",
    "ONEDNN_",
    "ATEN_",
    "TORCH_",
    "CUDA_",
    "CUBLAS_",
    "CUDNN_",
    "NCCL_",
    "NVIDIA_TF32_OVERRIDE",
)
# what may change the bits of a computation, of `machine` and `versions` in meta.json
BIT_SOURCES = ("device", "gpu", "cpu_capability", "torch", "schema")

# the scores of an evaluation that stand in epochs.csv, with val_ before their names
SCORES = ("loss", "accuracy", "f1", "f2", "auc", "pr_auc", "positive_share", "tp", "fp", "fn", "tn")


def create_run(runs_dir, cfg: Config) -> Path:
    """Make a new run folder `<utc>-<name>-s<seed>-<4 hex>` with config.yaml in it. Of processes
    that try the same name, mkdir lets one have it.
    """
    runs_dir = Path(runs_dir)
    runs_dir.mkdir(parents=True, exist_ok=True)
    stamp = datetime.datetime.now(datetime.UTC).strftime("%Y%m%dT%H%M%SZ")
    while True:
        run = runs_dir / f"{stamp}-{cfg.name}-s{cfg.seed}-{secrets.token_hex(2)}"
        with contextlib.suppress(FileExistsError):
            run.mkdir()
            break
    try:
        write_config(run, cfg)
    except BaseException:
        run.rmdir()  # an empty folder would be no run
        raise
    return run


def write_config(run: Path, cfg: Config) -> None:
    """Write config.yaml of a run, with every key. In a resumed run the keys that do not change the
    weights may have other values than before.
    """
    with atomic_write(run / "config.yaml", "w") as file:
        file.write(dump_config(cfg))


def find_run(name, runs_dir="runs") -> Path:
    """A run folder by its path, or by its name under `runs_dir`. Raises BadInput with the nearest
    name.
    """
    for run in (Path(name), Path(runs_dir, name)):
        # the repository has a config.yaml, too, and `--resume .` must not write into it
        if (run / "config.yaml").is_file() and run.resolve() != REPOSITORY:
            return run
    names = [entry.name for entry in Path(runs_dir).glob("*")]
    hint = nearest(Path(name).name, names) or ": no config.yaml of a run is there"
    raise BadInput(f"no run {name}{hint}")


def read_run_config(run: Path) -> Config:
    """The configuration in a run's config.yaml, as of its last start."""
    path = run / "config.yaml"
    return config_from_dict(read_yaml(path), source=str(path))


def read_meta(run: Path) -> dict:
    """The run's meta.json; empty before its first start."""
    path = run / "meta.json"
    return read_json(path) if path.is_file() else {}


def resume_config(run: Path, overrides) -> Config:
    """The configuration to resume a run with: its own, with changes of keys that do not change the
    weights.
    """
    return change_free_keys(read_run_config(run), overrides)


def require_same_run(run: Path, cfg: Config, data: dict[str, str], groups: str | None) -> None:
    """Raise BadInput unless a run is resumed with what it was started with: `data` and `groups`
    (SHA-256), its config, and the files that the config names.
    """
    before = read_meta(run)
    if not before:
        return
    if before.get("data") != data:
        raise BadInput(
            f"{cfg.data_dir} is not the data that {run} was trained on: its SHA-256 differs"
        )
    if before.get("identity") != cfg.identity_digest(data, groups):
        raise BadInput(
            f"{run} cannot go on: its config.yaml, the quarantine or weights file named there, or"
            " the groups.csv of its folds was changed"
        )


def say_what_changed(run: Path, meta: dict) -> None:
    """Warn where a run is resumed on other hardware, or with another torch, than at its last start:
    its bits may then be others.
    """
    before = read_meta(run) or meta
    old = before["machine"] | before["versions"]
    new = meta["machine"] | meta["versions"]
    for key in BIT_SOURCES:
        if old.get(key) != new.get(key):
            say(f"warning: {run} had {key} {old.get(key)}, now {new[key]}: other bits may follow")


def hold_run(run: Path, cfg: Config) -> BinaryIO:
    """Lock a run for this process, and write the config that it is resumed with. The lock is held
    until the returned file is closed, or the process ends.

    Raises BadInput where another process holds the lock. On a file system without locks a note is
    printed instead.
    """
    lock = _lock(run)
    if read_run_config(run) != cfg:
        write_config(run, cfg)  # replaces the file, so the new one has to be locked
        lock = _lock(run)
    return lock


def _lock(run: Path) -> BinaryIO:
    file = open(run / "config.yaml", "rb+")  # noqa: SIM115 (open as long as the run is held)
    if not lock_if_possible(file, run):
        raise BadInput(f"{run} is being trained by another process")
    return file


def is_finished(run: Path) -> bool:
    """Whether a run is over, finished or diverged: summary.json is written last."""
    return (run / "summary.json").is_file()


def run_git(*arguments: str) -> tuple[str, str]:
    """(output, error) of a git command in this repository. One of them is empty."""
    command = ["git", "-C", str(REPOSITORY), *arguments]
    try:
        result = subprocess.run(
            command, capture_output=True, text=True, errors="replace", timeout=GIT_S
        )
    except (OSError, subprocess.TimeoutExpired) as error:  # no git, or a folder that hangs
        return "", one_line(error)
    if result.returncode:
        return "", " ".join(result.stderr.split())
    return result.stdout, ""


def git(*arguments: str) -> str:
    """The output of a git command in this repository; empty where it fails."""
    return run_git(*arguments)[0]


def why_no_commit() -> str:
    """Why git tells no commit of this program, with the remedy that git names; empty where it does.

    A repository around the folder of the program is not the program's, and may be private.
    """
    output, error = run_git("rev-parse", "HEAD", "--show-toplevel")
    if error:
        return f"git says: {error}"
    top = output.splitlines()[1]
    if not os.path.samefile(top, REPOSITORY):
        return f"{REPOSITORY} lies in another repository, {top}"
    return ""


def git_state() -> dict:
    """Commit, uncommitted changes as a patch, and untracked files of this repository. Where git
    tells no commit, all are empty, and a warning gives the reason.
    """
    reason = why_no_commit()
    if reason:
        say(f"warning: no commit is recorded, since {reason}")
        return {"commit": None, "uncommitted_patch": "", "untracked_files": []}
    return {
        "commit": git("rev-parse", "HEAD").strip(),
        "uncommitted_patch": git("diff", "HEAD"),
        "untracked_files": git("ls-files", "--others", "--exclude-standard").splitlines(),
    }


def environment() -> dict:
    """What runs, and where, for meta.json: argv, commit and patch, versions, environment variables,
    Slurm job.
    """
    versions = {package: importlib.metadata.version(package) for package in PACKAGES}
    versions["python"] = platform.python_version()
    return {
        "argv": sys.argv,
        "cwd": os.getcwd(),
        "started_utc": utc_now(),
        "pid": os.getpid(),
        **git_state(),
        "versions": versions,
        "variables": {
            name: text for name, text in os.environ.items() if name.startswith(VARIABLES)
        },
        "submitted": json.loads(os.environ.get(SUBMITTED, "null")),
        "job": {name: os.environ[name] for name in JOB_VARIABLES if name in os.environ},
    }


def write_meta(run: Path, meta: dict) -> None:
    """Write meta.json. For a resumed run `earlier_starts` holds what earlier starts wrote.

    Temporary files that a killed process left behind are removed.
    """
    for leftover in run.glob(".*.tmp"):
        leftover.unlink()
    before = read_meta(run)
    if before:
        earlier = before.pop("earlier_starts", [])
        meta = meta | {"earlier_starts": [*earlier, before]}
    write_json(run / "meta.json", meta)


def write_stop(run: Path, status: str, step: int) -> None:
    """Write into meta.json, and print, that a run was interrupted or paused, after which step, and
    how to resume it. A run that was killed has no such note.
    """
    stopped = {"status": status, "step": step, "utc": utc_now()}
    write_json(run / "meta.json", read_meta(run) | {"stopped": stopped})
    say(f"{status} after step {step}; go on with: python train.py --resume {shlex.quote(str(run))}")
    print_result({"run": str(run), "status": status, "step": step})


def describe_scores(scores: dict, baselines: dict) -> str:
    """The scores of an evaluation beside those of constant answers, as part of a sentence."""
    return (
        f"AUC {scores['auc']:.4f} (constant 0.5), F2 {scores['f2']:.4f} (constant"
        f" {baselines['always_positive_f2']:.4f}), accuracy {scores['accuracy']:.4f} (constant"
        f" {baselines['majority_accuracy']:.4f})"
    )
