"""The optimisation step, the learning rate of a step, and the state that steps move forward."""

import copy
import math
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from lib.augment import PREPROCESSING, Draws, draw_at, draw_position, model_input, patch_size
from lib.batches import Batch
from lib.centrenet import filters_made_once
from lib.checkpoint import load_weights
from lib.command import BadInput
from lib.config import Config
from lib.device import input_dtype, layer_precision
from lib.graph import StepGraph
from lib.models import build_model, fit_state, fit_weights, logit_layer
from lib.optimizers import build_optimizer
from lib.ranks import ALONE, Ranks
from lib.seeding import position_seed, seed_everything

DROPOUT = 201  # purpose of a draw, as part of its position


@dataclass
class TrainState:
    """All that a step changes. `progress` holds the position in the run, and what the schedule and
    the choice of the best epoch remember. `averaged` is None without `ema_decay`.
    """

    model: nn.Module
    averaged: nn.Module | None
    optimizer: torch.optim.Optimizer
    progress: dict
    graph: StepGraph | None = None  # None on a CPU; without a graph a step gives the same, slower
    metrics: dict = field(default_factory=dict)  # scores of the last evaluation

    def checkpoint(self, cfg: Config, data: dict, with_optimizer: bool = True) -> dict:
        """The fields of an uncalibrated checkpoint of this state; the tensors are not copied."""
        return {
            "config": cfg.as_dict(),
            "model": dict(self.model.state_dict()),
            "averaged": self.averaged and dict(self.averaged.state_dict()),
            "float32_logits": logit_layer(self.model).is_float32,
            "optimizer": self.optimizer.state_dict() if with_optimizer else None,
            "progress": dict(self.progress),
            "metrics": self.metrics,
            "data": data,
            "preprocessing": PREPROCESSING,
            "threshold": 0.5,
            "calibration": None,
            "reference": None,
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
        if not is_finite(model):
            raise BadInput(f"{cfg.weights} holds values that are no finite numbers")
    model.to(device)
    averaged = copy.deepcopy(model).eval().requires_grad_(False) if cfg.ema_decay else None
    progress = {
        "epoch": 0,
        "step": 0,  # of the epoch
        "num_steps": 0,
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


def restore_state(state: TrainState, checkpoint: dict, source) -> None:
    """Load a checkpoint into a state, in place. Raises BadInput if it is of another model or
    optimizer.
    """
    for model, name in ((state.model, "model"), (state.averaged, "averaged")):
        if model is not None:
            fit_state(model, checkpoint[name], source)
            logit_layer(model).is_float32 = checkpoint["float32_logits"]
    try:
        state.optimizer.load_state_dict(checkpoint["optimizer"])
    except (ValueError, KeyError, TypeError, AttributeError):  # best.pt has no optimizer
        raise BadInput(f"{source}: the optimizer's state does not fit the config") from None
    state.progress.update(checkpoint["progress"])
    state.metrics = checkpoint["metrics"]


def learning_rate(cfg: Config, step: int, steps_per_epoch: int, lr_scale: float = 1.0) -> float:
    """The learning rate of a step, from 0: a linear warm-up, then the schedule. `lr_scale` is the
    product of the decays at plateaus so far.
    """
    warmup_steps = cfg.warmup_epochs * steps_per_epoch
    if step < warmup_steps:
        return cfg.lr * (step + 1) / math.ceil(warmup_steps)
    if cfg.schedule == "cosine":
        total = max(1.0, cfg.epochs * steps_per_epoch - warmup_steps)
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


def compute_loss(
    logits: torch.Tensor, labels: torch.Tensor, cfg: Config, loss_weights: torch.Tensor | None
) -> torch.Tensor:
    """Mean log loss () of float32 logits (B,) against labels (B,) in {0, 1}, by `loss_weights` (2,)
    of the classes.
    """
    smoothed = labels * (1 - cfg.label_smoothing) + 0.5 * cfg.label_smoothing
    losses = functional.binary_cross_entropy_with_logits(logits, smoothed, reduction="none")
    if loss_weights is not None:
        losses = losses * loss_weights[labels.long()]
    return losses.mean()


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
    crop = patch_size(cfg, progress["epoch"])
    dtype = input_dtype(cfg.precision)
    dropout_position = (cfg.seed, progress["epoch"], progress["step"], DROPOUT)

    # what changes from step to step is an argument: a CUDA graph replays all else as it was
    def step(images, labels, keys, position, lr, averaging) -> StepResult:
        draws = draw_at(position, keys, cfg)
        inputs = model_input(images, draws, crop, dtype)
        loss = compute_gradients(
            state.model, inputs, labels, cfg, loss_weights, dropout_position, ranks
        )
        grad_norm = update_weights(state, cfg, lr)
        if state.averaged is not None:
            average_weights(state, averaging)
        return StepResult(loss, grad_norm, draws)

    state.model.train()
    position = draw_position(cfg, progress["epoch"])
    # the share by which the averaged weights move
    averaging = 1 - average_decay(cfg, progress["num_steps"] + 1)
    numbers = as_scalars((position, lr, averaging), batch.images.device)
    inputs = (batch.images, batch.labels, batch.keys, *numbers)
    if state.graph:
        shape = (crop, len(batch.keys))
        result = state.graph.run(step, inputs, shape, state.optimizer)
    else:
        result = step(*inputs)
    progress["step"] += 1
    progress["num_steps"] += 1
    return result


def as_scalars(numbers: tuple, device: torch.device) -> tuple:
    """Numbers as tensors () on a GPU, where a captured step reads them; unchanged for a CPU."""
    if device.type == "cpu":
        return numbers
    return tuple(torch.full((), number, device=device) for number in numbers)


def update_weights(state: TrainState, cfg: Config, lr: float | torch.Tensor) -> torch.Tensor:
    """Clip the gradients, let the optimizer step, and return the norm () before clipping."""
    gradients = [parameter.grad for parameter in state.model.parameters()]
    grad_norm = nn.utils.get_total_norm(gradients)
    if cfg.grad_clip:
        nn.utils.clip_grads_with_norm_(state.model.parameters(), cfg.grad_clip, grad_norm)
    for group in state.optimizer.param_groups:
        group["lr"] = lr
    state.optimizer.step()
    return grad_norm


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
    buffers_before = []
    if cfg.shards > 1:
        buffers_before = [(buffer, buffer.clone()) for buffer in model.buffers()]
    shards = ranks.shard_range(cfg.shards)
    input_parts, label_parts = inputs.chunk(len(shards)), labels.chunk(len(shards))
    shard_vectors = []  # all results of a shard, laid end to end
    with filters_made_once(model, inputs.dtype):
        for shard, shard_inputs, shard_labels in zip(shards, input_parts, label_parts, strict=True):
            for buffer, value in buffers_before:
                buffer.copy_(value)
            if cfg.dropout:
                torch.manual_seed(position_seed(*position, shard))
            keep_filters = shard != shards[-1]
            loss = backpropagate(model, shard_inputs, shard_labels, cfg, loss_weights, keep_filters)
            if cfg.shards == 1:
                return loss
            results = shard_results(model, loss)
            shard_vectors.append(torch.cat([tensor.detach().reshape(-1) for tensor in results]))
    mean = ranks.tree_sum(shard_vectors) / cfg.shards
    # the mean goes where the last shard's results are: into the loss, gradients and statistics
    sizes = [tensor.numel() for tensor in results]
    for tensor, value in zip(results, mean.split(sizes), strict=True):
        tensor.detach().copy_(value.view(tensor.shape))
    return loss


def backpropagate(
    model, inputs, labels, cfg: Config, loss_weights, keep_filters: bool
) -> torch.Tensor:
    """Set the gradients of a shard and return its loss ().

    The backward pass frees what the forward pass stored, unless `keep_filters`: the next shard then
    goes back through the same filters.
    """
    with layer_precision(inputs.device, cfg.precision):
        logits = model(inputs)
    loss = compute_loss(logits.float().flatten(), labels, cfg, loss_weights)
    model.zero_grad(set_to_none=True)
    loss.backward(retain_graph=keep_filters)
    return loss.detach()


def shard_results(model: nn.Module, loss: torch.Tensor) -> list[torch.Tensor]:
    """The tensors of a shard that are averaged over the shards: loss, gradients and running
    statistics. Integer buffers, such as counters of batches, are not.
    """
    gradients = [parameter.grad for parameter in model.parameters()]
    statistics = [buffer for buffer in model.buffers() if buffer.is_floating_point()]
    return [loss, *gradients, *statistics]


def average_decay(cfg: Config, num_steps: int) -> float:
    """The decay of the averaged weights after `num_steps` steps. At first it is smaller, so that
    the initial weights are soon forgotten.
    """
    return min(cfg.ema_decay, (1 + num_steps) / (10 + num_steps))


@torch.no_grad()
def average_weights(state: TrainState, weight: float | torch.Tensor) -> None:
    """Move the averaged weights and statistics towards the current ones, by the share `weight`."""
    means, values = [], []
    averaged, current = state.averaged.state_dict(), state.model.state_dict()
    for name, value in current.items():
        if value.is_floating_point():
            means.append(averaged[name])
            values.append(value)
        else:
            averaged[name].copy_(value)
    if torch.is_tensor(weight):  # torch has no lerp of many tensors by a weight on the device
        differences = torch._foreach_sub(values, means)
        torch._foreach_mul_(differences, weight)
        torch._foreach_add_(means, differences)
    else:
        torch._foreach_lerp_(means, values, weight)


def note_epoch(progress: dict, scores: dict, cfg: Config) -> bool:
    """Update the best metric, and the decay at plateaus, after an epoch's evaluation. True if this
    epoch is the best so far.
    """
    sign = -1 if cfg.select_metric == "loss" else 1
    value, best = scores[cfg.select_metric], progress["best"]
    has_best = best is not None and math.isfinite(best)
    if not has_best or sign * value > sign * best:
        epoch = progress["epoch"] + 1
        progress.update(best=value, best_epoch=epoch, best_scores=scores, stale_epochs=0)
        return True
    progress["stale_epochs"] += 1
    if cfg.schedule == "plateau" and progress["stale_epochs"] % cfg.decay_epochs == 0:
        progress["lr_scale"] *= cfg.decay_factor
    return False


def is_finite(model: nn.Module) -> bool:
    """Whether every weight and statistic is a finite number."""
    are_finite = [tensor.isfinite().all() for tensor in model.state_dict().values()]
    return bool(torch.stack(are_finite).all())


def is_over(progress: dict, cfg: Config) -> bool:
    """Whether all epochs are done, or early stopping ends the run."""
    is_stale = cfg.early_stop_epochs and progress["stale_epochs"] >= cfg.early_stop_epochs
    return bool(is_stale) or progress["epoch"] >= cfg.epochs
