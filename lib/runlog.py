"""What a run writes down while it trains: a row a step, a row an epoch, and where the time went."""

import collections
import contextlib
import math
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from lib.command import say
from lib.files import CsvLog, read_csv
from lib.ranks import ALONE, Ranks
from lib.rundir import SCORES

MAX_PENDING = 64  # steps that a GPU may be behind the log of them
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
    """A loss, score or weight that is not a finite number: after which step, over which rows of the
    training split.
    """

    def __init__(self, step: int, what: str, rows: list[int]):
        super().__init__(f"{what}; the batch of step {step} holds the training rows {rows}")
        self.step, self.rows = step, rows


@dataclass(frozen=True)
class LoggedStep:
    """A step that was made, and what will be known of it when the device has come that far.

    `values` (2,) on the host become its loss and gradient norm when `done`, an event of a GPU, has
    passed.
    """

    step: int
    epoch: int
    lr: float
    keys: torch.Tensor  # (B,) of its batch
    num_rows: int  # of the split: a key modulo this is a row
    wait_s: float
    host_s: float  # since the step before, on the host's clock
    values: torch.Tensor
    done: torch.cuda.Event | None = None
    before: torch.cuda.Event | None = None  # `done` of the step before, in this epoch

    @property
    def is_done(self) -> bool:
        return self.done is None or self.done.query()

    @property
    def seconds(self) -> float:
        """Since the step before, on the clock of the device that made it."""
        return self.before.elapsed_time(self.done) / 1000 if self.before else self.host_s


class RunLog:
    """steps.csv and epochs.csv of a run, and where its time went.

    A step's loss is read after the next step was begun: from a GPU when an event says that it is
    there, so that the GPU never waits for the logging. `progress` is the training state's: it says
    which rows a resumed run keeps, and carries the sum of the epoch's losses. `batch_size` patches
    make a step, over all ranks.
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
        self.earlier_train_s, self.earlier_eval_s = 0.0, 0.0
        self.logs, kept_step, kept_epoch = (), progress["num_steps"], progress["epoch"]
        if run:  # ranks after the first note the same, and write nothing
            self.steps = CsvLog(
                run / "steps.csv", STEP_COLUMNS, keep=lambda row: int(row["step"]) <= kept_step
            )
            self.epochs = CsvLog(
                run / "epochs.csv", EPOCH_COLUMNS, keep=lambda row: int(row["epoch"]) <= kept_epoch
            )
            self.logs = (self.steps, self.epochs)
            rates = (float(row["images_per_s"] or 0) for row in read_csv(self.steps.path))
            self.earlier_train_s = sum(batch_size / (rate or math.inf) for rate in rates)
            self.earlier_eval_s = sum(
                float(row["eval_s"] or 0) for row in read_csv(self.epochs.path)
            )
        self.pending = collections.deque()  # LoggedSteps that are not read yet
        self.last_step, self.host_values, self.last_done, self.note = None, None, None, ""
        self.num_images = self.train_s = self.wait_s = self.log_s = self.eval_s = 0
        self.started_at, self.first_step_s = started_at, None  # on the monotonic clock

    def start_epoch(self) -> None:
        self.epoch_images, self.epoch_started_at, self.last_done = 0, time.perf_counter(), None
        self.step_started_at = self.epoch_started_at

    def add_step(self, result, batch, lr: float) -> None:
        """Note a step that was just made. Raises Diverged if the loss of an earlier one was not
        finite.
        """
        now = time.perf_counter()
        host_s, self.step_started_at = now - self.step_started_at, now
        self.epoch_images += self.batch_size
        if self.first_step_s is None:
            self.first_step_s = time.monotonic() - self.started_at
        while self.pending and (self.pending[0].is_done or len(self.pending) == MAX_PENDING):
            self._write(self.pending.popleft())
        number, before = self.progress["num_steps"], self.last_done
        values, self.last_done = self._to_host(
            torch.stack([result.loss, result.grad_norm]).detach(), number
        )
        position = (number, self.progress["epoch"], lr, batch.keys, batch.num_rows, batch.wait_s)
        self.pending.append(LoggedStep(*position, host_s, values, self.last_done, before))
        self.log_s += time.perf_counter() - now

    def _to_host(
        self, values: torch.Tensor, number: int
    ) -> tuple[torch.Tensor, torch.cuda.Event | None]:
        """Values (2,) as they will be on the host, and the event after which they are."""
        if values.device.type != "cuda":
            return values, None
        if self.host_values is None:
            self.host_values = torch.empty(MAX_PENDING + 1, 2, pin_memory=True)
        host = self.host_values[number % len(self.host_values)]
        host.copy_(values, non_blocking=True)
        done = torch.cuda.Event(enable_timing=True)
        done.record()
        return host, done

    def _write(self, logged: LoggedStep) -> None:
        if logged.done:
            logged.done.synchronize()
        loss, grad_norm = logged.values.tolist()
        self.last_step = logged
        if not math.isfinite(loss):
            self.pending.clear()
            self.diverged(f"the loss of step {logged.step} is {loss}")
        seconds = logged.seconds
        self.train_s, self.wait_s = self.train_s + seconds, self.wait_s + logged.wait_s
        self.num_images += self.batch_size
        self.progress["loss_sum"] += loss
        self.note = f"loss {loss:.4f}"
        if not self.logs:
            return
        self.steps.add(
            step=logged.step,
            epoch=logged.epoch + 1,
            loss=loss,
            lr=logged.lr,
            grad_norm=grad_norm,
            images_per_s=round(self.batch_size / seconds, 1),
            wait_share=round(logged.wait_s / seconds, 5),
        )

    def diverged(self, what: str):
        """Raise Diverged, with the last step that was read; all ranks do at the same step."""
        step, rows = self.progress["num_steps"], []
        if self.last_step:
            step = self.last_step.step
            keys = torch.cat(self.ranks.gather(self.last_step.keys))  # each rank has its part
            rows = sorted((keys % self.last_step.num_rows).tolist())
        raise Diverged(step, what, rows)

    def flush(self) -> None:
        """Wait for the device, and put every row on disk. Raises Diverged as add_step does."""
        started_at = time.perf_counter()
        while self.pending:
            self._write(self.pending.popleft())
        for log in self.logs:
            log.flush(sync=True)  # as a checkpoint is, which is not to be ahead of its rows
        self.log_s += time.perf_counter() - started_at

    def add_epoch(
        self, scores: dict, baselines: dict, is_best: bool, steps_per_epoch: int, eval_s: float
    ) -> None:
        """Note an epoch's evaluation, beside what constants score, and tell the person who
        waits.
        """
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
            f"epoch {self.progress['epoch'] + 1}: train loss {train_loss:.4f}, valid loss"
            f" {scores['loss']:.4f}, AUC {scores['auc']:.4f} (constant 0.5), F2 {scores['f2']:.4f}"
            f" (constant {baselines['always_positive_f2']:.4f}), accuracy {scores['accuracy']:.4f}"
            f" (constant {baselines['majority_accuracy']:.4f}), {self.epoch_images / train_s:,.0f}"
            f" images/s{', best' if is_best else ''}"
        )

    def times(self) -> dict[str, float]:
        """Where the time went: of a resumed run with that of earlier processes, for the steps that
        count. Rates and shares, these of the training time, are the last process's."""
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
