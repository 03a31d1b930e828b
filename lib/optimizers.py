"""The optimizers: SGD, AdamW, or Muon for matrices beside AdamW for the rest."""

import torch
from torch import nn

from lib.config import Config


def build_optimizer(model: nn.Module, cfg: Config) -> "torch.optim.Optimizer | MuonAdamW":
    """The optimizer that the config names; biases and batch-norm factors are not decayed."""
    weights = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    others = [parameter for parameter in model.parameters() if parameter.ndim <= 1]
    filters = []
    if cfg.optimizer == "muon":
        filters = [weight for weight in weights if len(weight) > 1]
        # the weight of the one logit is a vector, nothing to make orthogonal
        weights = [weight for weight in weights if len(weight) == 1]
    groups = [
        {"params": weights, "weight_decay": cfg.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    if cfg.optimizer == "sgd":
        has_momentum = cfg.momentum > 0
        return torch.optim.SGD(
            groups, lr=cfg.lr, momentum=cfg.momentum, nesterov=has_momentum, fused=True
        )
    adamw = torch.optim.AdamW(groups, lr=cfg.lr, fused=True)
    return MuonAdamW(filters, adamw, cfg) if cfg.optimizer == "muon" else adamw


class MuonAdamW:
    """Muon (Jordan et al. 2024) for matrices and filters, and an AdamW of other parameters, behind
    the interface of one optimizer.

    torch's Muon takes matrices alone, so it is given each filter bank (out, in, k, k) as a view
    (out, in * k * k) on the same memory: a model must be where it is to be trained, in its memory
    format, before this is built.
    """

    def __init__(self, filters: list, adamw: torch.optim.AdamW, cfg: Config):
        self.filters, self.adamw = filters, adamw
        self.matrices = [nn.Parameter(as_matrix(weight.detach(), weight)) for weight in filters]
        self.muon = torch.optim.Muon(
            self.matrices, lr=cfg.lr, weight_decay=cfg.weight_decay, momentum=cfg.momentum
        )

    @property
    def param_groups(self) -> list[dict]:
        return self.muon.param_groups + self.adamw.param_groups

    def step(self) -> None:
        for matrix, weight in zip(self.matrices, self.filters, strict=True):
            matrix.grad = as_matrix(weight.grad, weight)
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
