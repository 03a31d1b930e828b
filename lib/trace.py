"""What a run computed, step by step, as SHA-256: two runs are compared to the bit without keeping
their tensors.
"""

import contextlib
import os
import random
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch

from lib.checkpoint import state_sha256
from lib.files import CsvLog
from lib.ranks import Ranks

# what a step is known by, in the order of cause and effect, and the likely cause where it is the
# first that differs
QUANTITIES = {
    "rows": (
        "the order of the samples or their labels: sampler, quarantine, or the code that draws the"
        " order"
    ),
    "images": (
        "the same rows gave other patches: the data files, where they reside, or the buffers of the"
        " prefetch"
    ),
    "draws": (
        "the augmentation drew otherwise for the same samples: a draw that is no function of (seed,"
        " epoch, sample)"
    ),
    "rng": (
        "a draw from a global generator in this step: dropout or noise that no position seeds, or"
        " another seed"
    ),
    "buffers": (
        "the forward pass: a batch norm's statistics came out otherwise from equal weights and an"
        " equal batch"
    ),
    "loss": "the forward pass after the last batch norm, or the loss itself",
    "gradients": "the backward pass: a sum in no fixed order, or another kernel",
    "parameters": "the optimizer, or something that changes weights outside of it",
}
KEPT = "trace"  # folder of the checkpoints that a traced run keeps, for a replay to start from


def step_values(state, batch, result, ranks: Ranks) -> dict[str, dict]:
    """Copies of what a step took and left, {quantity: {name: tensor or plain value}}, equal on any
    number of ranks.
    """
    device, parameters = batch.images.device, dict(state.model.named_parameters())
    draws = {name: value for name, value in vars(result.draws).items() if torch.is_tensor(value)}
    values = {
        "rows": {"keys": batch.keys, "labels": batch.labels},
        "images": {"uint8": batch.images},
        "draws": draws,
    }
    for part in values.values() if ranks.num > 1 else ():
        part |= {name: torch.cat(ranks.gather(value.to(device))) for name, value in part.items()}
    words, *position = np.random.get_state()[1:]
    rng = {"torch": torch.get_rng_state()} | (
        {"cuda": torch.cuda.get_rng_state(device)} if device.type == "cuda" else {}
    )
    # who computed the last shard
    rng = {name: ranks.gather(value.to(device))[-1] for name, value in rng.items()}
    values["rng"] = rng | {
        "python": repr(random.getstate()),
        "numpy": repr((words.tobytes(), *position)),
    }
    values |= {"buffers": dict(state.model.named_buffers()), "loss": {"loss": result.loss}}
    # as the optimizer saw them
    values["gradients"] = {name: parameter.grad for name, parameter in parameters.items()}
    values["parameters"] = parameters
    for part in values.values():
        part |= {
            name: value.detach().clone() for name, value in part.items() if torch.is_tensor(value)
        }
    return values


class Trace:
    """trace.csv of a run: a row for every `every`th step, 0 for none; its checkpoints are kept.

    A step costs the training loop a copy of its tensors (the next step overwrites them); they are
    hashed by a background thread, whose error is raised at a later call. Ranks give their parts of
    the batch to the first, which writes.
    """

    def __init__(self, run: Path | None, state, every: int, ranks: Ranks):
        self.run, self.state, self.every, self.ranks, self.start_step = (
            run,
            state,
            every,
            ranks,
            state.progress["num_steps"],
        )
        self.hasher, self.job, self.log = ThreadPoolExecutor(1), None, None

    def add(self, batch, result) -> None:
        """Take down the step that was just made from `batch`, this rank's part."""
        step, device = self.state.progress["num_steps"], batch.images.device
        if not self.every or step % self.every:
            return
        values = step_values(self.state, batch, result, self.ranks)
        if self.ranks.is_first:
            self.flush(to_disk=False)
            copied = (
                torch.cuda.current_stream(device).record_event() if device.type == "cuda" else None
            )
            self.job = self.hasher.submit(self._write, step, values, copied, device)

    def _write(self, step: int, values: dict[str, dict], copied, device) -> None:
        row = {"step": step}
        # a stream of its own: otherwise the copies to the host would queue behind the model's next
        # steps
        with torch.cuda.stream(torch.cuda.Stream(device) if copied else None):
            if copied:
                copied.synchronize()
            # a digest of the digests of its tensors (bytes, shape, dtype), then these
            for quantity, part in values.items():
                digests = {
                    f"{quantity}.{name}": state_sha256(value) for name, value in part.items()
                }
                row |= {quantity: state_sha256(digests), **digests}
        if not self.log:
            self.log = CsvLog(
                self.run / "trace.csv", row, keep=lambda row: int(row["step"]) <= self.start_step
            )
        self.log.add(**row)

    def flush(self, to_disk: bool = True) -> None:
        """Wait until every row is made and, with `to_disk`, on disk. Raises what hashing raised."""
        if self.job:
            self.job.result()
        if self.log and to_disk:
            self.log.flush()

    def keep(self, checkpoint: Path) -> None:
        """Keep a checkpoint when the next one replaces it, under the number of its step: a second
        name, no second copy.
        """
        if self.every:
            (self.run / KEPT).mkdir(exist_ok=True)
            # kept before, or a file system without links: a replay starts earlier
            with contextlib.suppress(OSError):
                os.link(checkpoint, self.run / KEPT / f"{self.state.progress['num_steps']:08}.pt")

    def __enter__(self):
        return self

    def __exit__(self, kind, *_):
        # report the first error
        with self.hasher, contextlib.suppress(Exception) if kind else contextlib.nullcontext():
            self.flush()
