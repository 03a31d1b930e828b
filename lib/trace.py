"""The trace of a run: SHA-256 digests of what each step computed. Two runs are compared by them to
the bit, without keeping their tensors.
"""

import contextlib
import os
import random
from pathlib import Path

import numpy as np
import torch

from lib.checkpoint import state_sha256
from lib.files import CsvLog
from lib.ranks import Ranks

# the quantities of a step in the order in which they are computed, each with the likely cause where
# it is the first one that differs between two runs
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
    """What a step used and changed, {quantity: {name: tensor or text}}. It is the same for any
    number of ranks.
    """
    device = batch.images.device

    def of_all_ranks(tensors: dict) -> dict[str, torch.Tensor]:
        return {
            name: torch.cat(ranks.gather(tensor.to(device))) for name, tensor in tensors.items()
        }

    def of_last_rank(state_bytes: torch.Tensor) -> torch.Tensor:
        return ranks.gather(state_bytes.to(device))[-1]

    # the generators of the last rank, which computed the last shard
    _, numbers, *position = np.random.get_state()
    rng = {
        "torch": of_last_rank(torch.get_rng_state()),
        "numpy": repr((numbers.tobytes(), *position)),
        "python": repr(random.getstate()),
    }
    if device.type == "cuda":
        rng["cuda"] = of_last_rank(torch.cuda.get_rng_state(device))
    parameters = dict(state.model.named_parameters())
    return {
        "rows": of_all_ranks({"keys": batch.keys, "labels": batch.labels}),
        "images": of_all_ranks({"uint8": batch.images}),
        "draws": of_all_ranks(vars(result.draws)),
        "rng": rng,
        "buffers": dict(state.model.named_buffers()),
        "loss": {"loss": result.loss},
        # as the optimizer saw them
        "gradients": {name: parameter.grad for name, parameter in parameters.items()},
        "parameters": parameters,
    }


class Trace:
    """Writes trace.csv of a run, a row for every `every`th step, and keeps the run's checkpoints. 0
    turns it off.

    The ranks send their parts of a batch to the first rank, which hashes and writes.
    """

    def __init__(self, run: Path | None, state, every: int, ranks: Ranks):
        self.run, self.state, self.every, self.ranks = run, state, every, ranks
        self.start_step = state.progress["num_steps"]
        self.log = None

    def add(self, batch, result) -> None:
        """Add a row for the step that was just made from `batch`, this rank's part."""
        step = self.state.progress["num_steps"]
        if not self.every or step % self.every:
            return
        values = step_values(self.state, batch, result, self.ranks)
        if not self.ranks.is_first:
            return
        row = {"step": step}
        for quantity, parts in values.items():
            digests = {f"{quantity}.{name}": state_sha256(part) for name, part in parts.items()}
            row[quantity] = state_sha256(digests)  # of the digests of its tensors
            row.update(digests)
        if not self.log:
            self.log = CsvLog(self.run / "trace.csv", list(row), self.start_step)
        self.log.add(**row)

    def flush(self) -> None:
        """Write every row to the disk."""
        if self.log:
            self.log.flush()

    def keep(self, checkpoint: Path) -> None:
        """Keep a checkpoint, which the next one will replace, under the number of its step. A hard
        link needs no second copy.
        """
        if self.every:
            (self.run / KEPT).mkdir(exist_ok=True)
            # OSError: no links here, and a replay starts earlier; or the link is already there
            with contextlib.suppress(OSError):
                os.link(checkpoint, self.run / KEPT / f"{self.state.progress['num_steps']:08}.pt")
