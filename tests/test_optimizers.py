"""Muon against the paper's iteration, and which parameters each optimizer moves and decays."""

import copy
import math

import pytest
import torch
from torch import nn

from lib.config import load_config
from lib.optimizers import MAX_ROWS, NEWTON_SCHULZ, NUM_ITERATIONS, build_optimizer, orthogonalise


def build(model, *overrides):
    return build_optimizer(model, load_config(overrides=["lr=0.1", *overrides]))


def make_model():
    torch.manual_seed(0)
    conv = nn.Conv2d(8, 16, 3, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(16), nn.Flatten(), nn.Linear(256, 1))


def step(model, optimizer):
    torch.manual_seed(1)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape)
    optimizer.step()


def iterate_plainly(matrix: torch.Tensor) -> torch.Tensor:
    """Newton-Schulz as in the paper, one matrix at a time, in float64."""
    a, b, c = NEWTON_SCHULZ
    x = matrix.double() / matrix.double().norm()
    for _ in range(NUM_ITERATIONS):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x * max(1, matrix.shape[0] / matrix.shape[1]) ** 0.5


def test_matrices_of_unlike_shapes_are_made_orthogonal_together_as_each_would_be_alone():
    torch.manual_seed(0)
    shapes = [(4, 48), (MAX_ROWS, 70), (40, 16), (2, 300), (2 * MAX_ROWS + 3, 5 * MAX_ROWS)]
    # singular values from 1 to 1e-4, as gradients have
    matrices = [torch.randn(shape) * torch.logspace(0, -4, shape[1]) for shape in shapes]
    for matrix, moved in zip(matrices, orthogonalise(matrices, -0.5), strict=True):
        num_blocks = math.ceil(len(matrix) / MAX_ROWS)
        blocks = matrix.split(math.ceil(len(matrix) / num_blocks))
        expected = torch.cat([iterate_plainly(block) for block in blocks])
        assert torch.allclose(moved.double(), -0.5 * expected, atol=1e-3)
    assert not orthogonalise([torch.zeros(8, 20)], 1.0)[0].any()


def test_filters_move_alike_in_either_memory_format_and_by_a_rate_on_the_device():
    start = make_model()[0].weight.detach()
    models = [make_model(), make_model().to(memory_format=torch.channels_last), make_model()]
    assert not models[1][0].weight.is_contiguous()
    for model, lr in zip(models, (0.1, 0.1, torch.tensor(0.1)), strict=True):
        optimizer = build(model, "weight_decay=0")
        for group in optimizer.param_groups:
            group["lr"] = lr
        step(model, optimizer)
    one, other, by_tensor = (model[0].weight.detach() for model in models)
    assert torch.allclose(one, other, atol=2e-3) and torch.allclose(one, by_tensor, atol=1e-6)
    singular = torch.linalg.svdvals((start - one).flatten(1) / 0.1)
    assert float(singular.min()) > 0.5 and float(singular.max()) < 1.5, "nearly orthogonal"


def test_what_is_no_matrix_and_the_one_logit_are_left_to_adamw():
    model = make_model()
    twin = copy.deepcopy(model)
    others = [*twin[1].parameters(), twin[3].bias]
    groups = [{"params": [twin[3].weight]}, {"params": others, "weight_decay": 0}]
    reference = torch.optim.AdamW(groups, lr=0.1, weight_decay=load_config().weight_decay)
    step(model, build(model))
    step(twin, reference)
    assert not torch.equal(model[0].weight, twin[0].weight)
    for name in ("1.weight", "1.bias", "3.weight", "3.bias"):
        assert torch.allclose(model.get_parameter(name), twin.get_parameter(name), atol=1e-6), name


@pytest.mark.parametrize("name", ["muon", "adamw", "sgd"])
def test_biases_and_norms_are_not_decayed(name):
    for group in build(make_model(), f"optimizer={name}", "weight_decay=0.5").param_groups:
        assert all((group["weight_decay"] > 0) == (item.ndim > 1) for item in group["params"])
