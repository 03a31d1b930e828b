"""The tracker: a run is a folder, made once, written by one process, read by anybody at any
time.
"""

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
)
# what was submitted when, as JSON; the rest of meta.json says what ran
SUBMITTED = "PCAM_SUBMITTED"
JOB_VARIABLES += ("SLURM_JOB_PARTITION", "SLURMD_NODENAME")
# environment variables that change what is computed
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
)
VARIABLES += ("NVIDIA_TF32_OVERRIDE",)
PATCH_BYTES_KEPT = 1 << 20

SCORES = ("loss", "accuracy", "f1", "f2", "auc", "pr_auc", "positive_share", "tp", "fp", "fn", "tn")


def create_run(runs_dir, cfg: Config) -> Path:
    """Make a new run folder `<utc>-<name>-s<seed>-<4 hex>` with config.yaml in it. mkdir decides
    who owns a name.
    """
    runs_dir = Path(runs_dir)
    runs_dir.mkdir(parents=True, exist_ok=True)
    while True:
        stamp = datetime.datetime.now(datetime.UTC).strftime("%Y%m%dT%H%M%SZ")
        run = runs_dir / f"{stamp}-{cfg.name}-s{cfg.seed}-{secrets.token_hex(2)}"
        try:
            run.mkdir()
        except FileExistsError:
            continue
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
            if (run / "config.yaml").is_file() and run.resolve() != REPOSITORY:
                return run
            raise BadInput(f"{run} is a folder, but no run: it has no config.yaml")
    there = [entry.name for entry in Path(runs_dir).iterdir()] if Path(runs_dir).is_dir() else []
    raise BadInput(f"no run {name}{nearest(Path(name).name, there)}")


def read_run_config(run: Path) -> Config:
    """The configuration that a run was started with."""
    return config_from_dict(
        ADDED_KEYS | read_yaml(run / "config.yaml"), source=str(run / "config.yaml")
    )


def resume_config(run: Path, overrides) -> Config:
    """The configuration to go on with: the run's own, with changes of keys that leave the weights
    alone.

    A relative path is looked for from here, then from where the run was started. A quarantine or
    weights file may be named elsewhere: `require_same_run` sees whether its content is the same.
    """
    cfg = read_run_config(run)
    started_in = Path(
        read_json(run / "meta.json").get("cwd", "") if (run / "meta.json").is_file() else ""
    )
    changes = parse_overrides(overrides)
    moved = {
        key: changes.pop(key)
        for key in ("quarantine", "weights")
        if getattr(cfg, key) and changes.get(key)
    }
    for key in ("data_dir", "quarantine", "weights"):
        path = getattr(cfg, key)
        if path and not Path(path).exists() and (started_in / path).exists():
            moved = {key: str(started_in / path)} | moved
    return change_free_keys(dataclasses.replace(cfg, **moved), changes)


def require_same_run(run: Path, cfg: Config, data: dict[str, str], groups: str | None) -> None:
    """Raise BadInput if what a run is to go on with is not what it was begun with: its data and
    their groups (SHA-256), its config, a file named there.
    """
    if not (run / "meta.json").is_file():
        return
    before = read_json(run / "meta.json")
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
    if not (run / "meta.json").is_file():
        return
    before = read_json(run / "meta.json")
    for name, place, key in (
        ("device", "machine", "device"),
        ("GPU", "machine", "gpu"),
        ("processor's instruction set", "machine", "cpu_capability"),
        ("torch", "versions", "torch"),
    ):
        old, new = (facts.get(place, {}).get(key) for facts in (before, meta))
        if old != new:
            say(
                f"warning: {run} goes on with another {name}, {new or 'none'} instead of"
                f" {old or 'none'}: other bits may follow"
            )


def hold_run(run: Path, cfg: Config) -> BinaryIO:
    """Hold a run for this process, until it ends or the file that this gives is closed, and note
    what it goes on with.

    Raises BadInput where another process holds it; a file system without locks holds nothing.
    """
    held = _lock(run)
    if read_run_config(run) != cfg:
        write_config(run, cfg)  # another file, to be locked anew
        held = _lock(run)
    return held


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


def git_state() -> dict:
    """Commit, uncommitted changes as a patch, and untracked files of this repository; None and
    empty outside of one.
    """

    def git(*arguments):
        command = ["git", "-C", str(REPOSITORY), *arguments]
        try:
            return subprocess.run(
                command, capture_output=True, text=True, errors="replace", timeout=30, check=True
            ).stdout
        except (OSError, subprocess.SubprocessError):
            return ""

    patch = git("diff", "HEAD")
    return {
        "commit": git("rev-parse", "HEAD").strip() or None,
        "uncommitted_patch": patch[:PATCH_BYTES_KEPT],
        "uncommitted_patch_cut": len(patch) > PATCH_BYTES_KEPT,
        "untracked_files": git("ls-files", "--others", "--exclude-standard").splitlines()[:1000],
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
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "not installed"
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
    path = run / "meta.json"
    for leftover in run.glob(".*.tmp"):
        leftover.unlink(missing_ok=True)
    if path.exists():
        before = read_json(path)
        meta = meta | {"earlier_starts": [*before.pop("earlier_starts", []), before]}
    write_json(path, meta)


def write_stop(run: Path, status: str, step: int) -> None:
    """Note in meta.json that the run was interrupted, or paused as it was asked to, and say so: one
    that was killed cannot.
    """
    stopped = {"status": status, "step": step, "utc": utc_now()}
    write_json(run / "meta.json", read_json(run / "meta.json") | {"stopped": stopped})
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
