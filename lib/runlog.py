"""The log of a run while it trains: a row for each step and each epoch, and the time spent."""

import collections
import contextlib
import math
import time
from pathlib import Path

import torch

from lib.command import say
from lib.files import CsvLog
from lib.ranks import ALONE, Ranks
from lib.rundir import SCORES, describe_scores

MAX_PENDING = 64  # the most steps that wait in memory until a GPU has computed their loss
STEP_COLUMNS = ("step", "epoch", "loss", "lr", "grad_norm", "images_per_s", "wait_share")
BASELINES = (
    "always_positive_f2",
    "majority_accuracy",
    "constant_auc",
    "constant_pr_auc",
    "prior_loss",
)
EPOCH_COLUMNS = (
    *("epoch", "step", "train_loss", "is_best"),
    *(f"val_{name}" for name in SCORES),
    *BASELINES,
    *("train_s", "eval_s", "images_per_s"),
)


class Diverged(Exception):
    """A loss, score or weight is not a finite number. `step` is the last step that was read, and
    `rows` are its batch, by their numbers in the training split.
    """

    def __init__(self, step: int, what: str, rows: list[int]):
        super().__init__(f"{what}; the batch of step {step} holds the training rows {rows}")
        self.step, self.rows = step, rows


class RunLog:
    """Writes steps.csv and epochs.csv of a run, and measures the time spent.

    The loss of a step is read from a GPU when an event says that it is there, so that the GPU never
    waits for the log.

    `progress` is that of the training state. It says which rows a resumed run keeps, and holds the
    sum of the epoch's losses and the time spent. `batch_size` is the number of patches in a step,
    over all ranks. Only the first rank has a `run` to write to.
    """

    def __init__(
        self,
        run: Path | None,
        progress: dict,
        started_at: float,
        batch_size: int,
        ranks: Ranks = ALONE,
    ):
        self.progress, self.batch_size, self.ranks = progress, batch_size, ranks
        # by time.monotonic(), as if the processes before this one had only just ended
        self.started_at = started_at - progress["wall_s"]
        self.logs = ()
        if run:
            self.steps = CsvLog(run / "steps.csv", STEP_COLUMNS, progress["num_steps"])
            self.epochs = CsvLog(run / "epochs.csv", EPOCH_COLUMNS, progress["epoch"])
            self.logs = (self.steps, self.epochs)
        # steps whose loss was not read yet, each as the arguments of _write
        self.pending = collections.deque()
        self.last_rows = self.last_done = None
        self.note = ""  # for the progress bar

    def start_epoch(self) -> None:
        """Start the clocks of an epoch. All steps before it must be flushed."""
        self.epoch_images, self.last_done = 0, None
        self.epoch_started_at = self.step_started_at = time.perf_counter()

    def add_step(self, result, batch, lr: float) -> None:
        """Log a step that was just made. Raises Diverged if the loss of an earlier step is not
        finite.
        """
        now = time.perf_counter()
        host_s = now - self.step_started_at
        self.step_started_at = now
        self.epoch_images += self.batch_size
        row = {"step": self.progress["num_steps"], "epoch": self.progress["epoch"] + 1, "lr": lr}
        values, done = self._to_host(torch.stack([result.loss, result.grad_norm]).detach())
        rows = batch.keys, batch.num_rows
        self.pending.append((row, rows, host_s, batch.wait_s, values, done))
        while self.pending:
            done = self.pending[0][-1]
            if done and not done.query() and len(self.pending) <= MAX_PENDING:
                break  # the GPU has not computed this loss yet
            self._write(*self.pending.popleft())

    def _to_host(self, values: torch.Tensor) -> tuple[torch.Tensor, torch.cuda.Event | None]:
        """(values (2,) on the host, the event after which they are valid: None on a CPU)."""
        if not values.is_cuda:
            return values, None
        host = values.to("cpu", non_blocking=True)  # into pinned memory: nobody waits
        done = torch.cuda.Event(enable_timing=True)
        done.record()
        return host, done

    def _write(self, row: dict, rows: tuple, seconds: float, wait_s: float, values, done) -> None:
        if done:
            done.synchronize()
            if self.last_done:  # by the clock of the GPU: the host's is ahead of its steps
                seconds = self.last_done.elapsed_time(done) / 1000
            self.last_done = done
        loss, grad_norm = values.tolist()
        self.last_step, self.last_rows = row["step"], rows
        if not math.isfinite(loss):
            self.raise_diverged(f"the loss of step {row['step']} is {loss}")
        self.progress["loss_sum"] += loss
        self.note = f"loss {loss:.4f}"
        if self.logs:
            self.steps.add(
                **row,
                loss=loss,
                grad_norm=grad_norm,
                images_per_s=round(self.batch_size / seconds, 1),
                wait_share=round(wait_s / seconds, 5),
            )

    def raise_diverged(self, what: str):
        """Raise Diverged for the last step whose loss was read, which is the same on every rank."""
        if not self.last_rows:
            raise Diverged(self.progress["num_steps"], what, [])
        keys, num_rows = self.last_rows
        all_keys = torch.cat(self.ranks.gather(keys))  # each rank has its part
        raise Diverged(self.last_step, what, sorted((all_keys % num_rows).tolist()))

    def flush(self) -> None:
        """Wait for the device and write every row to the disk. Raises Diverged as add_step does."""
        while self.pending:
            self._write(*self.pending.popleft())
        self.progress["wall_s"] = self.wall_s()
        for log in self.logs:
            # a checkpoint is synced, too, and must not be ahead of its rows
            log.flush(sync=True)

    def add_epoch(
        self, scores: dict, baselines: dict, is_best: bool, steps_per_epoch: int, eval_s: float
    ) -> None:
        """Log the scores of an epoch beside those of constant answers, and print them."""
        epoch = self.progress["epoch"] + 1
        train_s = time.perf_counter() - self.epoch_started_at - eval_s
        images_per_s = self.epoch_images / train_s
        train_loss = self.progress["loss_sum"] / steps_per_epoch
        self.progress["loss_sum"] = 0.0
        if not self.logs:
            return
        self.epochs.add(
            epoch=epoch,
            step=self.progress["num_steps"],
            train_loss=train_loss,
            is_best=int(is_best),
            **{f"val_{name}": scores[name] for name in SCORES},
            **{name: baselines[name] for name in BASELINES},
            train_s=round(train_s, 3),
            eval_s=round(eval_s, 3),
            images_per_s=round(images_per_s, 1),
        )
        say(
            f"epoch {epoch}: train loss {train_loss:.4f}, valid loss {scores['loss']:.4f},"
            f" {describe_scores(scores, baselines)}, {images_per_s:,.0f} images/s"
            f"{', best' if is_best else ''}"
        )

    def wall_s(self) -> float:
        """The seconds that the run has taken, in earlier processes up to their last checkpoint."""
        return round(time.monotonic() - self.started_at, 3)

    def __enter__(self):
        return self

    def __exit__(self, kind, *_):
        errors = (OSError,) if kind else ()  # the first error is the one to report
        for log in self.logs:
            with contextlib.suppress(*errors):
                log.close()
