"""The optimisation step, the learning rate of a step, and the state that steps move forward."""

import copy
import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from lib.augment import PREPROCESSING, Draws, draw_at, draw_position, model_input, patch_size
from lib.batches import Batch
from lib.checkpoint import evaluated_weights, load_checkpoint, load_weights
from lib.command import BadInput
from lib.config import Config
from lib.device import input_dtype, layer_precision
from lib.graph import StepGraph
from lib.models import build_model, fit_state, fit_weights
from lib.optimizers import build_optimizer
from lib.ranks import ALONE, Ranks
from lib.seeding import position_seed, seed_everything

DROPOUT = 201  # purpose of a draw, as part of its position


@dataclass
class TrainState:
    """All that a step changes. `progress` holds the position in the run, and what the schedule and
    the choice of the best epoch remember.
    """

    model: nn.Module
    averaged: nn.Module
    optimizer: torch.optim.Optimizer
    progress: dict
    graph: StepGraph | None = None  # None on a CPU; without a graph a step gives the same, slower

    def checkpoint(self, cfg: Config, data: dict, with_optimizer: bool = True) -> dict:
        """The fields of an uncalibrated checkpoint of this state; the tensors are not copied."""
        return {
            "config": cfg.as_dict(),
            "model": dict(self.model.state_dict()),
            "averaged": dict(self.averaged.state_dict()),
            "float32_logits": True,
            "optimizer": self.optimizer.state_dict() if with_optimizer else None,
            "progress": dict(self.progress),
            "data": data,
            "preprocessing": PREPROCESSING,
            "threshold": 0.5,
        }


@dataclass(frozen=True)
class StepResult:
    """Loss and global gradient norm (before clipping) of a step, as tensors () on the device, and
    the augmentation drawn for this rank's part of the batch.

    Reading them waits for the step. On a GPU the next step overwrites them.
    """

    loss: torch.Tensor
    grad_norm: torch.Tensor
    draws: Draws | None = None


def build_state(cfg: Config, device: torch.device, ranks: Ranks = ALONE) -> TrainState:
    """The state before the first step. Initial weights are drawn on the CPU, so that they are the
    same on any device. Raises BadInput where the file `weights` of the config does not fit.
    """
    seed_everything(cfg.seed)
    model = build_model(cfg)
    if cfg.weights:
        fit_weights(model, cfg.model, load_weights(cfg.weights), cfg.weights)
    model.to(device)
    averaged = copy.deepcopy(model).eval().requires_grad_(False)
    progress = {
        "epoch": 0,
        "step": 0,  # of the epoch
        "num_steps": 0,
        "wall_s": 0.0,
        "loss_sum": 0.0,  # of the epoch
        "lr_scale": 1.0,
        "best": None,  # value of select_metric
        "best_epoch": 0,
        "best_scores": {},
        "stale_epochs": 0,  # since the best one
    }
    graph = StepGraph(why_not_captured(cfg, ranks)) if device.type == "cuda" else None
    return TrainState(model, averaged, build_optimizer(model, cfg), progress, graph)


def why_not_captured(cfg: Config, ranks: Ranks) -> str:
    """Why a step cannot be captured as a CUDA graph; empty if it can."""
    if cfg.dropout:
        return "dropout draws from a generator, which is seeded anew for each step"
    return "several ranks exchange their sums" if ranks.num > 1 else ""


def restore_state(state: TrainState, path) -> None:
    """Load the checkpoint at `path` into a state, in place. Raises BadInput if it cannot be read or
    is of another model. Where it is older than schema 3, its last layer computes in float32 from
    here on.
    """
    checkpoint = load_checkpoint(path)
    fit_state(state.model, checkpoint["model"], path)
    fit_state(state.averaged, evaluated_weights(checkpoint), path)
    if checkpoint["optimizer"] is None:
        raise BadInput(f"{path} has no optimizer's state: it is a best.pt, which cannot go on")
    state.optimizer.load_state_dict(checkpoint["optimizer"])
    state.progress.update(checkpoint["progress"])


def learning_rate(cfg: Config, step: int, steps_per_epoch: int, lr_scale: float = 1.0) -> float:
    """The learning rate of a step, from 0: a linear warm-up, then the schedule. `lr_scale` is the
    product of the decays at plateaus so far.
    """
    warmup_steps = cfg.warmup_epochs * steps_per_epoch
    if step < warmup_steps:
        return cfg.lr * (step + 1) / math.ceil(warmup_steps)
    if cfg.schedule == "cosine":
        total = cfg.epochs * steps_per_epoch - warmup_steps
        return cfg.lr * 0.5 * (1 + math.cos(math.pi * (step - warmup_steps) / total))
    if cfg.schedule == "step":
        return cfg.lr * cfg.decay_factor ** (step // steps_per_epoch // cfg.decay_epochs)
    return cfg.lr * lr_scale


def class_weights(labels: np.ndarray, cfg: Config, device: torch.device) -> torch.Tensor | None:
    """Weights (2,) in the loss that give both classes the same total weight, with mean 1 over the
    samples. None unless `balance: loss`.
    """
    if cfg.balance != "loss":
        return None
    counts = np.bincount(labels, minlength=2)
    return torch.tensor(len(labels) / (2 * counts), dtype=torch.float32, device=device)


def training_step(
    state: TrainState,
    batch: Batch,
    cfg: Config,
    lr: float,
    loss_weights: torch.Tensor | None = None,
    ranks: Ranks = ALONE,
) -> StepResult:
    """Make one optimisation step, in place; the same for training, benchmarks and audits. The host
    never waits for the device here.

    `batch` is this rank's part, and `loss_weights` are those of `class_weights`. Loss, norm and the
    new weights are those of the whole batch, equal on every rank.
    """
    progress = state.progress
    epoch = progress["epoch"]
    crop = patch_size(cfg, epoch)
    dropout_position = (cfg.seed, epoch, progress["step"], DROPOUT)

    # what changes from step to step is an argument: a CUDA graph replays all else as it was
    def step(images, labels, keys, position, lr, averaging) -> StepResult:
        draws = draw_at(position, keys, cfg)
        inputs = model_input(images, draws, crop, input_dtype(cfg.precision))
        loss = compute_gradients(
            state.model, inputs, labels, cfg, loss_weights, dropout_position, ranks
        )
        # the norm before clipping
        grad_norm = nn.utils.clip_grad_norm_(state.model.parameters(), cfg.grad_clip or math.inf)
        for group in state.optimizer.param_groups:
            group["lr"] = lr
        state.optimizer.step()
        average_weights(state, averaging)
        return StepResult(loss, grad_norm, draws)

    state.model.train()
    progress["step"] += 1
    progress["num_steps"] += 1
    num_steps = progress["num_steps"]
    # at first the average decays faster, so that the initial weights are soon forgotten
    decay = min(cfg.ema_decay, (1 + num_steps) / (10 + num_steps))
    numbers = [draw_position(cfg, epoch), lr, 1 - decay]
    if batch.images.is_cuda:  # a captured step reads them from the device
        numbers = [torch.full((), number, device=batch.images.device) for number in numbers]
    inputs = (batch.images, batch.labels, batch.keys, *numbers)
    if state.graph:
        return state.graph.run(step, inputs, (crop, len(batch.keys)), state.optimizer)
    return step(*inputs)


def compute_gradients(
    model, inputs, labels, cfg: Config, loss_weights, position, ranks: Ranks = ALONE
) -> torch.Tensor:
    """Set the gradients and batch-norm statistics of a batch and return its loss ().

    `inputs` (B, 3, S, S) and `labels` (B,) are this rank's part of the batch. `position` is that of
    dropout: a tuple, to which the number of the shard is added.

    The batch is cut into `shards` equal parts. Each shard starts from the same running statistics.
    Losses, gradients and statistics of the shards are added in one fixed binary tree, so their mean
    has the same bits whichever rank computes a shard.
    """

    def backpropagate(shard: int, inputs, labels) -> torch.Tensor:
        """Set the gradients of a shard and return its loss ()."""
        if cfg.dropout:
            torch.manual_seed(position_seed(*position, shard))
        with layer_precision(inputs.device, cfg.precision):
            logits = model(inputs).float().flatten()
        targets = labels * (1 - cfg.label_smoothing) + 0.5 * cfg.label_smoothing
        weights = None if loss_weights is None else loss_weights[labels.long()]
        loss = functional.binary_cross_entropy_with_logits(logits, targets, weights)
        model.zero_grad(set_to_none=True)
        loss.backward()
        return loss.detach()

    if cfg.shards == 1:
        return backpropagate(0, inputs, labels)
    buffers_before = [(buffer, buffer.clone()) for buffer in model.buffers()]
    shards = ranks.part(torch.arange(cfg.shards)).tolist()
    shard_vectors = []  # all results of a shard, laid end to end
    parts = zip(shards, inputs.chunk(len(shards)), labels.chunk(len(shards)), strict=True)
    for part in parts:
        for buffer, value in buffers_before:
            buffer.copy_(value)
        loss = backpropagate(*part)
        gradients = [parameter.grad for parameter in model.parameters()]
        statistics = [buffer for buffer in model.buffers() if buffer.is_floating_point()]
        results = [loss, *gradients, *statistics]
        shard_vectors.append(torch.cat([tensor.reshape(-1) for tensor in results]))
    mean = ranks.tree_sum(shard_vectors) / cfg.shards
    # the mean goes where the last shard's results are: into the loss, gradients and statistics
    for tensor, value in zip(
        results, mean.split([tensor.numel() for tensor in results]), strict=True
    ):
        tensor.copy_(value.view(tensor.shape))
    return loss


@torch.no_grad()
def average_weights(state: TrainState, weight: float | torch.Tensor) -> None:
    """Move the averaged weights and statistics towards the current ones, by the share `weight`."""
    means, values = float_tensors(state.averaged), float_tensors(state.model)
    if torch.is_tensor(weight):  # torch has no lerp of many tensors by a weight on the device
        differences = torch._foreach_sub(values, means)
        torch._foreach_mul_(differences, weight)
        torch._foreach_add_(means, differences)
    else:
        torch._foreach_lerp_(means, values, weight)


def float_tensors(model: nn.Module) -> list[torch.Tensor]:
    """The weights and statistics of a model, without its counters of batches."""
    return [tensor for tensor in model.state_dict().values() if tensor.is_floating_point()]


def note_epoch(progress: dict, scores: dict, cfg: Config) -> bool:
    """Update the best metric, and the decay at plateaus, after an epoch's evaluation. True if this
    epoch is the best so far.
    """
    value, best = scores[cfg.select_metric], progress["best"]
    sign = -1 if cfg.select_metric == "loss" else 1
    if best is None or sign * value > sign * best:
        epoch = progress["epoch"] + 1
        progress.update(best=value, best_epoch=epoch, best_scores=scores, stale_epochs=0)
        return True
    progress["stale_epochs"] += 1
    if cfg.schedule == "plateau" and progress["stale_epochs"] % cfg.decay_epochs == 0:
        progress["lr_scale"] *= cfg.decay_factor
    return False


def is_finite(model: nn.Module) -> bool:
    """Whether every weight and statistic is a finite number."""
    return bool(nn.utils.get_total_norm(float_tensors(model)).isfinite())


def is_over(progress: dict, cfg: Config) -> bool:
    """Whether all epochs are done, or early stopping ends the run."""
    is_stale = 0 < cfg.early_stop_epochs <= progress["stale_epochs"]
    return is_stale or progress["epoch"] >= cfg.epochs
