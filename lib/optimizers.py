"""The optimizers: SGD, AdamW, or Muon for matrices and filters with AdamW for the rest."""

import math

import torch
from torch import nn
from torch.nn.functional import pad

from lib.config import Config

# a, b, c of the polynomial a x + b x^3 + c x^5, which moves singular values x towards 1 (Jordan et
# al. 2024), and how often it is applied
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
NUM_ITERATIONS = 5
# the most filters that are made orthogonal to each other. A matrix of more rows is cut into blocks:
# otherwise the products of its rows would cost as much as the network
MAX_ROWS = 64


def build_optimizer(model: nn.Module, cfg: Config) -> "torch.optim.Optimizer | MuonAdamW":
    """The optimizer that the config names; biases and batch-norm factors are not decayed."""
    filters, weights, others = [], [], []
    for parameter in model.parameters():
        if parameter.ndim <= 1:
            others.append(parameter)
        # the weight of the one logit has a single row, with no other to be orthogonal to
        elif cfg.optimizer == "muon" and len(parameter) > 1:
            filters.append(parameter)
        else:
            weights.append(parameter)
    groups = [
        {"params": weights, "weight_decay": cfg.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    if cfg.optimizer == "sgd":
        return torch.optim.SGD(
            groups, lr=cfg.lr, momentum=cfg.momentum, nesterov=cfg.momentum > 0, fused=True
        )
    adamw = torch.optim.AdamW(groups, lr=cfg.lr, fused=True)
    return MuonAdamW(filters, adamw, cfg) if filters else adamw


class MuonAdamW:
    """Muon (Jordan et al. 2024) for `filters`, and an AdamW of the other parameters, behind the
    interface of one optimizer.

    Muon works on matrices. The filters of a convolution (out, in, k, k) are seen as a matrix (out,
    in * k * k) of the same memory, so the model must be on its device, and in its memory format,
    before this is built. torch's own Muon holds the state and the settings. The step is ours, since
    torch's reads the learning rate on the host and goes matrix by matrix.
    """

    def __init__(self, filters: list, adamw: torch.optim.AdamW, cfg: Config):
        self.filters, self.adamw = filters, adamw
        self.matrices = [nn.Parameter(as_matrix(weight.detach(), weight)) for weight in filters]
        self.muon = torch.optim.Muon(
            self.matrices, lr=cfg.lr, weight_decay=cfg.weight_decay, momentum=cfg.momentum
        )
        for matrix in self.matrices:
            self.muon.state[matrix]["momentum_buffer"] = torch.zeros_like(matrix)

    @property
    def param_groups(self) -> list[dict]:
        return self.muon.param_groups + self.adamw.param_groups

    @torch.no_grad()
    def step(self) -> None:
        settings = self.muon.param_groups[0]
        lr, momentum = settings["lr"], settings["momentum"]
        gradients = [as_matrix(weight.grad, weight) for weight in self.filters]
        momenta = [self.muon.state[matrix]["momentum_buffer"] for matrix in self.matrices]
        torch._foreach_lerp_(momenta, gradients, 1 - momentum)
        updates = torch._foreach_lerp(gradients, momenta, momentum)  # Nesterov's
        steps = orthogonalise(updates, -lr)
        torch._foreach_mul_(self.matrices, 1 - lr * settings["weight_decay"])
        torch._foreach_add_(self.matrices, steps)
        self.adamw.step()

    def state_dict(self) -> dict:
        return {"muon": self.muon.state_dict(), "adamw": self.adamw.state_dict()}

    def load_state_dict(self, state: dict) -> None:
        self.muon.load_state_dict(state["muon"])
        self.adamw.load_state_dict(state["adamw"])


def as_matrix(values: torch.Tensor, filters: torch.Tensor) -> torch.Tensor:
    """Filters (out, in, k, k), or their gradients, as a matrix (out, in * k * k). Its columns have
    the order of `filters` in memory.
    """
    if filters.ndim == 4 and not filters.is_contiguous():
        values = values.permute(0, 2, 3, 1)
    return values.flatten(1)


def orthogonalise(matrices: list[torch.Tensor], scale: float | torch.Tensor) -> list[torch.Tensor]:
    """For each matrix (rows, columns) the step of Muon: `scale` times a nearly orthogonal matrix of
    the same singular vectors, in equal blocks of at most MAX_ROWS rows. The last block is filled up
    with rows of zeros, which do not change the others.

    An iteration multiplies a block X from the left by a polynomial of its Gram matrix X X^T. So the
    Gram matrices of all blocks are iterated together, in float32, and X is needed only before and
    after. The step of a block with more rows than columns is sqrt(rows / columns) times as large,
    as in Jordan's Muon.
    """
    blocks = []  # (N, rows, columns) for each matrix
    for matrix in matrices:
        num_blocks = math.ceil(len(matrix) / MAX_ROWS)
        num_missing = -len(matrix) % num_blocks
        filled = pad(matrix, (0, 0, 0, num_missing)) if num_missing else matrix
        blocks.append(filled.unflatten(0, (num_blocks, -1)))
    size = max(block.shape[1] for block in blocks)
    grams = []
    for block in blocks:
        margin = size - block.shape[1]
        grams.append(pad(multiply(block, block.mT), (0, margin, 0, margin)))
    factors = scale * newton_schulz_factors(torch.cat(grams))
    parts = factors.split([len(block) for block in blocks])
    steps = []
    for matrix, block, factor in zip(matrices, blocks, parts, strict=True):
        _, num_rows, num_columns = block.shape
        factor = factor[:, :num_rows, :num_rows] * max(1.0, num_rows / num_columns) ** 0.5
        steps.append(multiply(factor, block).flatten(0, 1)[: len(matrix)])
    return steps


def multiply(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """The products, in float32, of float32 matrices (N, a, b) and (N, b, c). A GPU rounds the
    factors to bfloat16 first, which its tensor cores multiply.
    """
    if left.is_cuda:
        return torch.bmm(left.bfloat16(), right.bfloat16(), out_dtype=torch.float32)
    return left @ right


def newton_schulz_factors(grams: torch.Tensor) -> torch.Tensor:
    """For Gram matrices X X^T float32 (N, size, size) the factors Q of the same shape: Q X is the
    result of NUM_ITERATIONS of Newton-Schulz from X over its Frobenius norm.
    """
    a, b, c = NEWTON_SCHULZ
    squared_norms = grams.diagonal(dim1=1, dim2=2).sum(1).clamp(min=1e-14)[:, None, None]
    grams = grams / squared_norms
    identity = torch.eye(grams.shape[1], device=grams.device)
    factors = identity / squared_norms.sqrt()
    for _ in range(NUM_ITERATIONS):
        polynomials = torch.baddbmm(grams, grams, grams, beta=b, alpha=c) + a * identity
        factors = polynomials @ factors
        grams = polynomials @ grams @ polynomials
    return factors
