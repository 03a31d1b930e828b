"""What turns gradients into a step: SGD, AdamW, or Muon with AdamW for what is no matrix."""

import torch
from torch import nn

from lib.config import Config


def build_optimizer(model: nn.Module, cfg: Config) -> torch.optim.Optimizer:
    """The optimiser that the config names; biases and batch-norm factors are not decayed."""
    decayed = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    others = [parameter for parameter in model.parameters() if parameter.ndim <= 1]
    if cfg.optimizer == "muon":
        # one logit: a vector, nothing to make orthogonal
        output = [parameter for parameter in decayed if len(parameter) == 1]
        return MuonAdamW(
            [parameter for parameter in decayed if len(parameter) > 1], output, others, cfg
        )
    groups = [
        {"params": decayed, "weight_decay": cfg.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    if cfg.optimizer == "sgd":
        return torch.optim.SGD(
            groups, lr=cfg.lr, momentum=cfg.momentum, nesterov=cfg.momentum > 0, fused=True
        )
    return torch.optim.AdamW(groups, lr=cfg.lr, fused=True)


class MuonAdamW:
    """Muon (Jordan et al. 2024) for matrices and filters, AdamW for the rest, behind the interface
    of one optimiser.

    torch's Muon takes matrices alone, so it is given each filter bank (out, in, k, k) as a view
    (out, in * k * k) on the same memory: a model must be where it is to be trained, in its memory
    format, before this is built.
    """

    def __init__(self, filters: list, output: list, others: list, cfg: Config):
        self.filters = filters
        self.matrices = [
            nn.Parameter(as_matrix(parameter.detach(), parameter)) for parameter in filters
        ]
        self.muon = torch.optim.Muon(
            self.matrices, lr=cfg.lr, weight_decay=cfg.weight_decay, momentum=cfg.momentum
        )
        groups = [
            {"params": output, "weight_decay": cfg.weight_decay},
            {"params": others, "weight_decay": 0.0},
        ]
        self.adamw = torch.optim.AdamW(groups, lr=cfg.lr, fused=True)

    @property
    def param_groups(self) -> list[dict]:
        return self.muon.param_groups + self.adamw.param_groups

    def step(self) -> None:
        for matrix, parameter in zip(self.matrices, self.filters, strict=True):
            matrix.grad = as_matrix(parameter.grad, parameter)
        self.muon.step()
        self.adamw.step()

    def state_dict(self) -> dict:
        return {"muon": self.muon.state_dict(), "adamw": self.adamw.state_dict()}

    def load_state_dict(self, state: dict) -> None:
        self.muon.load_state_dict(state["muon"])
        self.adamw.load_state_dict(state["adamw"])


def as_matrix(values: torch.Tensor, filters: torch.Tensor) -> torch.Tensor:
    """Values of filters (out, in, k, k), or gradients, as (out, in * k * k), columns in the order
    of `filters` in memory.
    """
    if filters.ndim == 4 and not filters.is_contiguous():
        values = values.permute(0, 2, 3, 1)
    return values.flatten(1)
