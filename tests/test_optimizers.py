import copy

import pytest
import torch
from torch import nn

from lib.config import load_config
from lib.optimizers import (
    MAX_ROWS,
    NEWTON_SCHULZ,
    NUM_ITERATIONS,
    MuonAdamW,
    build_optimizer,
    orthogonalise,
)


def make_cfg(**changes):
    return load_config(
        overrides=[
            f"{key}={value}" for key, value in {"optimizer": "muon", "lr": 0.1, **changes}.items()
        ]
    )


def make_model():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(8, 16, 3, bias=False), nn.BatchNorm2d(16), nn.Flatten(), nn.Linear(256, 1)
    )


def step(model, optimizer, grad_seed=1):
    torch.manual_seed(grad_seed)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape)
    optimizer.step()


def test_a_muon_step_moves_filters_by_a_nearly_orthogonal_matrix():
    model = make_model()
    before = model[0].weight.detach().clone()
    step(model, build_optimizer(model, make_cfg(weight_decay=0)))
    moved = (before - model[0].weight.detach()).flatten(1) / 0.1
    singular = torch.linalg.svdvals(moved)
    assert len(singular) == 16 and float(singular.min()) > 0.5 and float(singular.max()) < 1.5


def iterate_plainly(matrix: torch.Tensor) -> torch.Tensor:
    """Newton-Schulz as in the paper, one matrix at a time, in float64."""
    a, b, c = NEWTON_SCHULZ
    x = matrix.double() if matrix.shape[0] <= matrix.shape[1] else matrix.double().T
    x = x / x.norm()
    for _ in range(NUM_ITERATIONS):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    scale = max(1.0, matrix.shape[0] / matrix.shape[1]) ** 0.5
    return (x if matrix.shape[0] <= matrix.shape[1] else x.T) * scale


def test_matrices_of_unlike_shapes_are_made_orthogonal_together_as_each_would_be_alone():
    torch.manual_seed(0)
    shapes = [(4, 48), (32, 200), (MAX_ROWS, 70), (40, 16), (2, 300)]
    # singular values from 1 to 1e-4, as gradients have
    matrices = [
        torch.randn(shape) @ torch.diag(torch.logspace(0, -4, shape[1])) for shape in shapes
    ]
    for matrix, moved in zip(matrices, orthogonalise(matrices, -0.5), strict=True):
        assert torch.allclose(moved.double(), -0.5 * iterate_plainly(matrix), atol=1e-3)


def test_a_matrix_of_low_rank_stays_so_and_zeros_do_not_move():
    torch.manual_seed(0)
    matrix = torch.randn(MAX_ROWS, 3) @ torch.randn(3, 500)
    moved, still = orthogonalise([matrix, torch.zeros(8, 20)], 1.0)
    assert torch.allclose(moved.double(), iterate_plainly(matrix), atol=1e-3)
    assert not still.any()


@pytest.mark.parametrize("num_rows", [2 * MAX_ROWS, 2 * MAX_ROWS + 3])
def test_a_large_bank_of_filters_is_made_orthogonal_in_blocks_of_rows(num_rows):
    torch.manual_seed(0)
    matrix = torch.randn(num_rows, 5 * MAX_ROWS)
    (moved,) = orthogonalise([matrix], 1.0)
    blocks = matrix.split(-(-num_rows // -(-num_rows // MAX_ROWS)))
    alone = torch.cat([iterate_plainly(block) for block in blocks])
    assert torch.allclose(moved.double(), alone, atol=1e-5)


def test_a_learning_rate_on_the_device_moves_filters_as_a_number_does():
    models = [make_model(), make_model()]
    for model, lr in zip(models, (0.1, torch.tensor(0.1)), strict=True):
        optimizer = build_optimizer(model, make_cfg())
        for group in optimizer.param_groups:
            group["lr"] = lr
        step(model, optimizer)
    assert torch.allclose(models[0][0].weight, models[1][0].weight, atol=1e-6)


def test_filters_move_alike_in_either_memory_format_whatever_that_of_their_gradients():
    models = [make_model(), make_model().to(memory_format=torch.channels_last)]
    assert not models[1][0].weight.is_contiguous(), "else this compares nothing"
    for model in models:
        optimizer = build_optimizer(model, make_cfg())
        for number in range(3):
            step(model, optimizer, number)  # gradients NCHW in both
    one, other = (model[0].weight for model in models)
    assert torch.allclose(one, other, atol=2e-3) and not torch.allclose(
        one, make_model()[0].weight, atol=2e-2
    )


def test_what_is_no_matrix_and_the_one_logit_are_left_to_adamw():
    model = make_model()
    twin = copy.deepcopy(model)
    optimizer = build_optimizer(model, make_cfg())
    assert (
        isinstance(optimizer, MuonAdamW)
        and [group["lr"] for group in optimizer.param_groups] == [0.1] * 3
    )
    reference = torch.optim.AdamW(
        [
            {"params": [twin[3].weight]},
            {"params": [twin[1].weight, twin[1].bias, twin[3].bias], "weight_decay": 0},
        ],
        lr=0.1,
        weight_decay=make_cfg().weight_decay,
    )
    for number in range(2):
        step(model, optimizer, number)
        step(twin, reference, number)
    assert torch.equal(model[0].weight == twin[0].weight, torch.zeros(16, 8, 3, 3).bool())
    for name in ("1.weight", "1.bias", "3.weight", "3.bias"):
        assert torch.allclose(model.get_parameter(name), twin.get_parameter(name), atol=1e-6), name


def test_the_learning_rate_reaches_both_parts():
    model = make_model()
    before = copy.deepcopy(model)
    optimizer = build_optimizer(model, make_cfg())
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    step(model, optimizer)
    assert all(
        torch.equal(one, other)
        for one, other in zip(model.parameters(), before.parameters(), strict=True)
    )


@pytest.mark.parametrize("name", ["muon", "adamw", "sgd"])
def test_biases_and_norms_are_not_decayed(name):
    model = make_model()
    optimizer = build_optimizer(model, make_cfg(optimizer=name, weight_decay=0.5))
    for group in optimizer.param_groups:
        assert all(
            (group["weight_decay"] > 0) == (parameter.ndim > 1) for parameter in group["params"]
        )
