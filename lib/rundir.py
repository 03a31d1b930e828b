"""The tracker: a run is a folder, made once, written by one process, read by anybody at any time."""

import contextlib
import dataclasses
import datetime
import importlib.metadata
import json
import math
import os
import platform
import secrets
import subprocess
import sys
import time
from pathlib import Path
from typing import BinaryIO

from lib.command import BadInput, nearest, one_line, print_result, say
from lib.config import ADDED_KEYS, Config, change_free_keys, config_from_dict, dump_config, parse_overrides, read_yaml
from lib.logger import CsvLog, atomic_write, read_csv, read_json, try_lock, utc_now, write_json

REPOSITORY = Path(__file__).resolve().parent.parent
PACKAGES = ("torch", "torchvision", "h5py", "numpy", "pyyaml", "matplotlib")
JOB_VARIABLES = ("SLURM_CLUSTER_NAME", "SLURM_JOB_ID", "SLURM_ARRAY_JOB_ID", "SLURM_ARRAY_TASK_ID", "SLURM_RESTART_COUNT")
SUBMITTED = "PCAM_SUBMITTED"  # what was submitted when, as JSON; the rest of meta.json says what ran
JOB_VARIABLES += ("SLURM_JOB_PARTITION", "SLURMD_NODENAME")
# environment variables that change what is computed
VARIABLES = ("OMP_", "KMP_", "MKL_", "OPENBLAS_", "DNNL_", "ONEDNN_", "ATEN_", "TORCH_", "CUDA_", "CUBLAS_", "CUDNN_", "NCCL_")
VARIABLES += ("NVIDIA_TF32_OVERRIDE",)
PATCH_BYTES_KEPT = 1 << 20

STEP_COLUMNS = ("step", "epoch", "loss", "lr", "grad_norm", "images_per_s", "wait_share")
SCORES = ("loss", "accuracy", "f1", "f2", "auc", "pr_auc", "positive_share", "tp", "fp", "fn", "tn")
BASELINES = ("always_positive_f2", "majority_accuracy", "constant_auc", "constant_pr_auc", "prior_loss")
EPOCH_COLUMNS = (
    *("epoch", "step", "train_loss", "is_best"),
    *(f"val_{name}" for name in SCORES),
    *BASELINES,
    *("train_s", "eval_s", "images_per_s"),
)


def create_run(runs_dir, cfg: Config) -> Path:
    """Make a new run folder `<utc>-<name>-s<seed>-<4 hex>` with config.yaml in it. mkdir decides who owns a name."""
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
    """Write every key that a run is trained with; a resumed run's keys that are free may be others than before."""
    with atomic_write(run / "config.yaml", "w") as file:
        file.write(dump_config(cfg))


def find_run(name, runs_dir="runs") -> Path:
    """A run folder by its path, or by its name under `runs_dir`. Raises BadInput with the nearest name."""
    for run in (Path(name), Path(runs_dir) / name):
        if run.is_dir():
            if (run / "config.yaml").is_file() and run.resolve() != REPOSITORY:
                return run
            raise BadInput(f"{run} is a folder, but no run: it has no config.yaml")
    there = [entry.name for entry in Path(runs_dir).iterdir()] if Path(runs_dir).is_dir() else []
    raise BadInput(f"no run {name}{nearest(Path(name).name, there)}")


def read_run_config(run: Path) -> Config:
    """The configuration that a run was started with."""
    return config_from_dict(ADDED_KEYS | read_yaml(run / "config.yaml"), source=str(run / "config.yaml"))


def resume_config(run: Path, overrides) -> Config:
    """The configuration to go on with: the run's own, with changes of keys that leave the weights alone.

    A relative path is looked for from here, then from where the run was started. A quarantine or weights file may be named
    elsewhere: `require_same_run` sees whether its content is the same.
    """
    cfg = read_run_config(run)
    started_in = Path(read_json(run / "meta.json").get("cwd", "") if (run / "meta.json").is_file() else "")
    changes = parse_overrides(overrides)
    moved = {key: changes.pop(key) for key in ("quarantine", "weights") if getattr(cfg, key) and changes.get(key)}
    for key in ("data_dir", "quarantine", "weights"):
        path = getattr(cfg, key)
        if path and not Path(path).exists() and (started_in / path).exists():
            moved = {key: str(started_in / path)} | moved
    return change_free_keys(dataclasses.replace(cfg, **moved), changes)


def require_same_run(run: Path, cfg: Config, data: dict[str, str]) -> None:
    """Raise BadInput if what a run is to go on with is not what it was begun with: its data, its config, a file named there."""
    if not (run / "meta.json").is_file():
        return
    before = read_json(run / "meta.json")
    if before.get("data") != data:
        raise BadInput(f"{cfg.data_dir} is not the data that {run} was trained on: its SHA-256 differs")
    if before.get("identity") != cfg.identity_digest(data):
        raise BadInput(f"{run} cannot go on: its config.yaml, or the quarantine or weights file named there, was changed")


def hold_run(run: Path, cfg: Config) -> BinaryIO:
    """Hold a run for this process, until it ends or the file that this gives is closed, and note what it goes on with.

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
        say(f"{run} cannot be locked ({one_line(error)}): see to it that no other process resumes it")
    return file


def is_finished(run: Path) -> bool:
    """summary.json is written last: without one the run did not finish."""
    return (run / "summary.json").is_file()


def git_state() -> dict:
    """Commit, uncommitted changes as a patch, and untracked files of this repository; None and empty outside of one."""

    def git(*arguments):
        command = ["git", "-C", str(REPOSITORY), *arguments]
        try:
            return subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=30, check=True).stdout
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
    """When a live process of this machine began, in ticks since the boot, which tells it from a later one of its number.

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
        "variables": {name: value for name, value in sorted(os.environ.items()) if name.startswith(VARIABLES)},
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
    """Note in meta.json that the run was interrupted, or paused as it was asked to, and say so: one that was killed cannot."""
    stopped = {"status": status, "step": step, "utc": utc_now()}
    write_json(run / "meta.json", read_json(run / "meta.json") | {"stopped": stopped})
    say(f"{status} after step {step}; go on with: python train.py --resume {run}")
    print_result({"run": str(run), "status": status, "step": step})


class Diverged(Exception):
    """A loss, score or weight that is not a finite number: after which step, over which rows of the training split."""

    def __init__(self, step: int, what: str, rows: list[int]):
        super().__init__(f"{what}; the batch of step {step} holds the training rows {rows}")
        self.step, self.rows = step, rows


class RunLog:
    """steps.csv and epochs.csv of a run, and where its time went.

    A step's loss is read one step late, so that a GPU never waits for the logging. `progress` is the training state's: it
    says which rows a resumed run keeps, and carries the sum of the epoch's losses.
    `batch_size` patches make a step, over all ranks.
    """

    def __init__(self, run: Path | None, progress: dict, started_at: float, batch_size: int):
        self.progress, self.batch_size = progress, batch_size
        self.last_step, self.earlier_train_s, self.earlier_eval_s = (progress["num_steps"], []), 0.0, 0.0
        self.logs, kept_step, kept_epoch = (), progress["num_steps"], progress["epoch"]
        if run:  # ranks after the first note the same, and write nothing
            self.steps = CsvLog(run / "steps.csv", STEP_COLUMNS, keep=lambda row: int(row["step"]) <= kept_step)
            self.epochs = CsvLog(run / "epochs.csv", EPOCH_COLUMNS, keep=lambda row: int(row["epoch"]) <= kept_epoch)
            self.logs = (self.steps, self.epochs)
            rates = (float(row["images_per_s"] or 0) for row in read_csv(self.steps.path))
            self.earlier_train_s = sum(batch_size / (rate or math.inf) for rate in rates)
            self.earlier_eval_s = sum(float(row["eval_s"] or 0) for row in read_csv(self.epochs.path))
        self.pending, self.note = None, ""
        self.num_images = self.train_s = self.wait_s = self.log_s = self.eval_s = 0
        self.started_at, self.first_step_s = started_at, None  # on the monotonic clock

    def start_epoch(self) -> None:
        self.epoch_images, self.epoch_started_at = 0, time.perf_counter()
        self.step_started_at = self.epoch_started_at

    def add_step(self, result, batch, lr: float) -> None:
        """Note a step that was just made. Raises Diverged if the loss of the one before was not finite."""
        now = time.perf_counter()
        step_s, self.step_started_at = now - self.step_started_at, now
        self.train_s, self.wait_s = self.train_s + step_s, self.wait_s + batch.wait_s
        self.num_images, self.epoch_images = self.num_images + self.batch_size, self.epoch_images + self.batch_size
        if self.first_step_s is None:
            self.first_step_s = time.monotonic() - self.started_at
        before, self.pending = self.pending, (self.progress["num_steps"], self.progress["epoch"], result, batch, lr, step_s)
        if before:
            self._write(*before)
        self.log_s += time.perf_counter() - now

    def _write(self, step, epoch, result, batch, lr, step_s) -> None:
        loss = float(result.loss)
        self.last_step = step, sorted((batch.keys % batch.num_rows).tolist())
        if not math.isfinite(loss):
            self.pending = None
            self.diverged(f"the loss of step {step} is {loss}")
        self.progress["loss_sum"] += loss
        self.note = f"loss {loss:.4f}"
        if not self.logs:
            return
        self.steps.add(
            step=step,
            epoch=epoch + 1,
            loss=loss,
            lr=lr,
            grad_norm=float(result.grad_norm),
            images_per_s=round(self.batch_size / step_s, 1),
            wait_share=round(batch.wait_s / step_s, 5),
        )

    def diverged(self, what: str):
        """Raise Diverged, with the last step that was written."""
        step, rows = self.last_step
        raise Diverged(step, what, rows)

    def flush(self) -> None:
        """Put every row on disk. Raises Diverged as add_step does."""
        started_at = time.perf_counter()
        before, self.pending = self.pending, None
        if before:
            self._write(*before)
        for log in self.logs:
            log.flush(sync=True)  # as a checkpoint is, which is not to be ahead of its rows
        self.log_s += time.perf_counter() - started_at

    def add_epoch(self, scores: dict, baselines: dict, is_best: bool, steps_per_epoch: int, eval_s: float) -> None:
        """Note an epoch's evaluation, beside what constants score, and tell the person who waits."""
        train_s = time.perf_counter() - self.epoch_started_at - eval_s
        self.eval_s += eval_s
        train_loss, self.progress["loss_sum"] = self.progress["loss_sum"] / steps_per_epoch, 0.0
        if not self.logs:
            return
        self.epochs.add(
            epoch=self.progress["epoch"] + 1,
            step=self.progress["num_steps"],
            train_loss=train_loss,
            is_best=int(is_best),
            **{f"val_{name}": scores[name] for name in SCORES},
            **{name: baselines[name] for name in BASELINES},
            train_s=round(train_s, 3),
            eval_s=round(eval_s, 3),
            images_per_s=round(self.epoch_images / train_s, 1),
        )
        say(
            f"epoch {self.progress['epoch'] + 1}: train loss {train_loss:.4f}, valid loss {scores['loss']:.4f}, "
            f"AUC {scores['auc']:.4f} (constant 0.5), F2 {scores['f2']:.4f} (constant {baselines['always_positive_f2']:.4f}), "
            f"accuracy {scores['accuracy']:.4f} (constant {baselines['majority_accuracy']:.4f}), "
            f"{self.epoch_images / train_s:,.0f} images/s{', best' if is_best else ''}"
        )

    def times(self) -> dict[str, float]:
        """Where the time went: of a resumed run with that of earlier processes, for the steps that count. Rates and shares,
        these of the training time, are the last process's."""
        earlier_s = self.earlier_train_s + self.earlier_eval_s
        return {
            "wall_s": round(earlier_s + time.monotonic() - self.started_at, 3),
            "first_step_s": self.first_step_s and round(self.first_step_s, 3),
            "train_s": round(self.earlier_train_s + self.train_s, 3),
            "eval_s": round(self.earlier_eval_s + self.eval_s, 3),
            "images_per_s": round(self.num_images / self.train_s, 1) if self.train_s else None,
            "wait_share": round(self.wait_s / self.train_s, 5) if self.train_s else None,
            "log_share": round(self.log_s / self.train_s, 5) if self.train_s else None,
        }

    def __enter__(self):
        return self

    def __exit__(self, kind, *_):
        for log in self.logs:
            if kind is None:
                log.close()
            else:
                with contextlib.suppress(OSError):  # the first error is the one to report
                    log.close()


def write_summary(run: Path, status: str, weights_digest: str, progress: dict, baselines: dict, **details) -> dict:
    """Write summary.json, the last file of a run, and return what it holds. val_* are the scores of best.pt over `views`."""
    summary = {
        "status": status,
        "weights_sha256": weights_digest,
        "num_steps": progress["num_steps"],
        "num_epochs": progress["epoch"],
        "best_epoch": progress["best_epoch"],
        **{f"val_{name}": value for name, value in progress["best_scores"].items()},
        **baselines,
        **details,
    }
    write_json(run / "summary.json", summary)
    return summary
