import copy

import pytest
import torch
from torch import nn

from lib.config import load_config
from lib.optimizers import MuonAdamW, build_optimizer


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
