"""The trace of a run: SHA-256 digests of what each step computed. Two runs are compared by them to
the bit, without keeping their tensors.
"""

import contextlib
import os
from pathlib import Path

import torch

from lib.checkpoint import weights_sha256
from lib.files import CsvLog

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


def step_values(state, batch, result) -> dict[str, dict[str, torch.Tensor]]:
    """What a step used and changed, {quantity: {name: tensor}}."""
    generators = {"cpu": torch.get_rng_state()}
    if batch.images.is_cuda:
        generators["cuda"] = torch.cuda.get_rng_state(batch.images.device)
    parameters = dict(state.model.named_parameters())
    return {
        "rows": {"keys": batch.keys, "labels": batch.labels},
        "images": {"uint8": batch.images},
        "draws": vars(result.draws),
        "rng": generators,
        "buffers": dict(state.model.named_buffers()),
        "loss": {"loss": result.loss},
        # as the optimizer saw them
        "gradients": {name: parameter.grad for name, parameter in parameters.items()},
        "parameters": parameters,
    }


class Trace:
    """Writes trace.csv of a run, a row for every `every`th step, and keeps the run's checkpoints. 0
    turns it off.

    Of several ranks the first one traces its own part of each batch.
    """

    def __init__(self, run: Path | None, state, every: int, ranks):
        self.run, self.state = run, state
        self.every = every if ranks.is_first else 0
        self.start_step = state.progress["num_steps"]
        self.log = None

    def add(self, batch, result) -> None:
        """Add a row for the step that was just made from `batch`."""
        step = self.state.progress["num_steps"]
        if not self.every or step % self.every:
            return
        row = {"step": step}
        for quantity, tensors in step_values(self.state, batch, result).items():
            row[quantity] = weights_sha256(tensors)
            for name, tensor in tensors.items():
                row[f"{quantity}.{name}"] = weights_sha256({name: tensor})
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
