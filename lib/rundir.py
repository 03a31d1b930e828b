"""The tracker: a run is a folder, made once, written by one process, read by anybody at any
time.
"""

import contextlib
import dataclasses
import datetime
import importlib.metadata
import json
import os
import platform
import secrets
import subprocess
import sys
from pathlib import Path
from typing import BinaryIO

from lib.command import REPOSITORY, BadInput, nearest, one_line, print_result, say
from lib.config import (
    ADDED_KEYS,
    Config,
    change_free_keys,
    config_from_dict,
    dump_config,
    parse_overrides,
    read_yaml,
)
from lib.files import atomic_write, read_json, try_lock, utc_now, write_json

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
# what was submitted when, as JSON; the rest of meta.json says what ran
SUBMITTED = "PCAM_SUBMITTED"
# environment variables that change what is computed begin so
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
# facts of meta.json; where one differs, the same computation may give other bits
HARDWARE = (
    ("machine", "device"),
    ("machine", "gpu"),
    ("machine", "cpu_capability"),
    ("versions", "torch"),
    ("versions", "schema"),
)
MOST_UNTRACKED = 1000

SCORES = ("loss", "accuracy", "f1", "f2", "auc", "pr_auc", "positive_share", "tp", "fp", "fn", "tn")


def create_run(runs_dir, cfg: Config) -> Path:
    """Make a new run folder `<utc>-<name>-s<seed>-<4 hex>` with config.yaml in it. mkdir decides
    who owns a name.
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
        run.rmdir()  # a run folder without a config is none
        raise
    return run


def write_config(run: Path, cfg: Config) -> None:
    """Write every key that a run is trained with; a resumed run's keys that are free may be others
    than before.
    """
    with atomic_write(run / "config.yaml", "w") as file:
        file.write(dump_config(cfg))


def find_run(name, runs_dir="runs") -> Path:
    """A run folder by its path, or by its name under `runs_dir`. Raises BadInput with the nearest
    name.
    """
    for run in (Path(name), Path(runs_dir) / name):
        if run.is_dir():
            # the repository has a config.yaml, too: `--resume .` must not write there
            if (run / "config.yaml").is_file() and run.resolve() != REPOSITORY:
                return run
            raise BadInput(f"{run} is a folder, but no run: it has no config.yaml")
    names = [entry.name for entry in Path(runs_dir).glob("*")]
    raise BadInput(f"no run {name}{nearest(Path(name).name, names)}")


def read_run_config(run: Path) -> Config:
    """The configuration that a run was started with."""
    path = run / "config.yaml"
    return config_from_dict(ADDED_KEYS | read_yaml(path), source=str(path))


def read_meta(run: Path) -> dict:
    """The run's meta.json; empty before its first start."""
    path = run / "meta.json"
    return read_json(path) if path.is_file() else {}


def resume_config(run: Path, overrides) -> Config:
    """The configuration to go on with: the run's own, with changes of keys that leave the weights
    alone.

    A relative path is looked for from here, then from where the run was started. A quarantine or
    weights file may be named elsewhere: `require_same_run` sees whether its content is the same.
    """
    cfg = read_run_config(run)
    changes = parse_overrides(overrides)
    started_in = Path(read_meta(run).get("cwd", ""))
    moved = {}
    for key in ("data_dir", "quarantine", "weights"):
        path = getattr(cfg, key)
        if not path:
            continue
        if key != "data_dir" and changes.get(key):
            moved[key] = changes.pop(key)
        elif not Path(path).exists() and (started_in / path).exists():
            moved[key] = str(started_in / path)
    return change_free_keys(dataclasses.replace(cfg, **moved), changes)


def require_same_run(run: Path, cfg: Config, data: dict[str, str], groups: str | None) -> None:
    """Raise BadInput if what a run is to go on with is not what it was begun with: its data and
    their groups (SHA-256), its config, a file named there.
    """
    before = read_meta(run)
    if not before:
        return
    if before.get("data") != data:
        raise BadInput(
            f"{cfg.data_dir} is not the data that {run} was trained on: its SHA-256 differs"
        )
    # a run that is older than groups.csv had the same groups, and no file of them
    groups = groups if "groups" in before else None
    if before.get("identity") != cfg.identity_digest(data, groups):
        raise BadInput(
            f"{run} cannot go on: its config.yaml, the quarantine or weights file named there, or"
            " the groups.csv of its folds was changed"
        )


def say_what_changed(run: Path, meta: dict) -> None:
    """Say where a run goes on with other hardware, or another torch, than at its last start: the
    bits may then be others.
    """
    before = read_meta(run)
    if not before:
        return
    for place, key in HARDWARE:
        old, new = before[place].get(key), meta[place].get(key)
        if old != new:
            change = f"another {key}, {new or 'none'} instead of {old or 'none'}"
            say(f"warning: {run} goes on with {change}: other bits may follow")


def hold_run(run: Path, cfg: Config) -> BinaryIO:
    """Hold a run for this process, until it ends or the file that this gives is closed, and note
    what it goes on with.

    Raises BadInput where another process holds it; a file system without locks holds nothing.
    """
    lock = _lock(run)
    if read_run_config(run) != cfg:
        write_config(run, cfg)  # another file, to be locked anew
        lock = _lock(run)
    return lock


def _lock(run: Path) -> BinaryIO:
    file = open(run / "config.yaml", "rb+")  # noqa: SIM115 (open as long as the run is held)
    try:
        if not try_lock(file):
            file.close()
            raise BadInput(f"{run} is being trained by another process")
    except OSError as error:
        say(
            f"{run} cannot be locked ({one_line(error)}): see to it that no other process"
            " resumes it"
        )
    return file


def is_finished(run: Path) -> bool:
    """summary.json is written last: without one the run did not finish."""
    return (run / "summary.json").is_file()


def git(*arguments: str) -> str:
    """What git says of this repository; empty where it has no answer."""
    command = ["git", "-C", str(REPOSITORY), *arguments]
    options = {"stderr": subprocess.DEVNULL, "text": True, "errors": "replace"}
    try:
        return subprocess.check_output(command, **options, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return ""


def git_state() -> dict:
    """Commit, uncommitted changes as a patch, and untracked files of this repository; None and
    empty outside of one.
    """
    patch = git("diff", "HEAD")
    untracked = git("ls-files", "--others", "--exclude-standard").splitlines()
    return {
        "commit": git("rev-parse", "HEAD").strip() or None,
        "uncommitted_patch": patch,
        "untracked_files": untracked[:MOST_UNTRACKED],
    }


def process_start(pid: int) -> str:
    """When a live process of this machine began, in ticks since the boot, which tells it from a
    later one of its number.

    Empty where there is none, or no /proc to ask.
    """
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if state in "ZX" else fields[18]


def package_versions() -> dict[str, str]:
    """Versions of Python and of the packages that a run uses."""
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        versions[package] = importlib.metadata.version(package)
    return versions


def environment() -> dict:
    """Who ran what where: argv, commit and patch, versions, environment variables, Slurm job."""
    return {
        "argv": sys.argv,
        "cwd": os.getcwd(),
        "started_utc": utc_now(),
        "pid": os.getpid(),
        "process_start": process_start(os.getpid()),
        **git_state(),
        "versions": package_versions(),
        "variables": {
            name: value for name, value in sorted(os.environ.items()) if name.startswith(VARIABLES)
        },
        "submitted": json.loads(os.environ.get(SUBMITTED, "null")),
        "job": {name: os.environ[name] for name in JOB_VARIABLES if name in os.environ},
    }


def write_meta(run: Path, meta: dict) -> None:
    """Write meta.json; a resumed run keeps what earlier starts wrote, under `earlier_starts`.

    What a killed process left half-written is removed.
    """
    for leftover in run.glob(".*.tmp"):
        leftover.unlink()
    before = read_meta(run)
    if before:
        earlier = before.pop("earlier_starts", [])
        meta = meta | {"earlier_starts": [*earlier, before]}
    write_json(run / "meta.json", meta)


def write_stop(run: Path, status: str, step: int) -> None:
    """Note in meta.json that the run was interrupted, or paused as it was asked to, and say so: one
    that was killed cannot.
    """
    stopped = {"status": status, "step": step, "utc": utc_now()}
    write_json(run / "meta.json", read_meta(run) | {"stopped": stopped})
    say(f"{status} after step {step}; go on with: python train.py --resume {run}")
    print_result({"run": str(run), "status": status, "step": step})


def build_summary(
    status: str, weights_digest: str, progress: dict, baselines: dict, **details
) -> dict:
    """What summary.json holds. val_* are the scores of best.pt over `views`."""
    return {
        "status": status,
        "weights_sha256": weights_digest,
        "num_steps": progress["num_steps"],
        "num_epochs": progress["epoch"],
        "best_epoch": progress["best_epoch"],
        **{f"val_{name}": value for name, value in progress["best_scores"].items()},
        **baselines,
        **details,
    }


def write_summary(run: Path, summary: dict) -> None:
    """Write summary.json, the last file of a run."""
    write_json(run / "summary.json", summary)
