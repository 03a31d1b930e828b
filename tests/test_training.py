"""The step against a hand-written loop, the shards against the documented sum, the learning rate
against formulas.
"""

import copy
import math

import numpy as np
import pytest
import torch
from conftest import QUICK, draw_patches
from torch import nn
from torch.nn import functional

from lib import training
from lib.augment import draw_augmentation, model_input
from lib.batches import Batch
from lib.checkpoint import load_checkpoint, weights_sha256
from lib.config import load_config
from lib.seeding import position_seed, set_determinism

CPU = torch.device("cpu")


def make_cfg(**changes):
    """The quick configuration with changes."""
    keys = dict(pair.split("=") for pair in QUICK) | changes
    return load_config(overrides=[f"{key}={value}" for key, value in keys.items()])


def make_batches(num_batches, size=16):
    images, labels = draw_patches(num_batches * size, 0)
    images, labels = torch.from_numpy(images), torch.from_numpy(labels).float()
    parts = torch.arange(len(images)).split(size)
    return [Batch(images[keys], labels[keys], keys, len(images)) for keys in parts]


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    set_determinism(True, 1)


# ---- the step


def test_steps_equal_a_hand_written_loop():
    keys = {"lr": 0.05, "grad_clip": 0.05, "label_smoothing": 0.1}
    cfg = make_cfg(model="mlp", mlp_hidden="[6]", weight_decay=0, optimizer="sgd", **keys)
    weights = torch.tensor([0.6, 3.0])
    state = training.build_state(cfg, CPU)
    model = copy.deepcopy(state.model)
    by_hand = torch.optim.SGD(model.parameters(), cfg.lr, momentum=0.95, nesterov=True)
    for step, batch in enumerate(make_batches(4), 1):
        result = training.training_step(state, batch, cfg, cfg.lr / step, weights)

        logits = model(model_input(batch.images, draw_augmentation(batch.keys, 0, cfg))).flatten()
        target = batch.labels * 0.9 + 0.05
        class_weights = weights[batch.labels.long()]
        loss = functional.binary_cross_entropy_with_logits(logits, target, class_weights)
        by_hand.zero_grad()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), 0.05)
        by_hand.param_groups[0]["lr"] = cfg.lr / step
        by_hand.step()
        assert torch.allclose(result.loss, loss)
        assert float(result.grad_norm) == pytest.approx(float(norm), rel=1e-4) and norm > 0.05
    for one, other in zip(state.model.parameters(), model.parameters(), strict=True):
        assert torch.allclose(one, other, rtol=1e-3, atol=2e-6)


def test_averages_move_by_a_weight_on_the_host_and_on_the_device():
    for weight in (0.3, torch.tensor(0.3)):
        state = training.build_state(make_cfg(), CPU)
        for value in state.model.buffers():
            value.fill_(2.0)
        expected = [torch.lerp(mean, torch.tensor(2.0), 0.3) for mean in state.averaged.buffers()]
        training.average_weights(state, weight)
        assert all(map(torch.allclose, state.averaged.buffers(), expected))


def test_balanced_loss_gives_both_classes_the_same_weight_and_the_mean_weight_one():
    labels = np.array([0] * 50 + [1] * 10, np.uint8)
    weights = training.class_weights(labels, make_cfg(balance="loss"), CPU)
    assert weights.tolist() == pytest.approx([0.6, 3.0])
    assert training.class_weights(labels, make_cfg(balance="sampler"), CPU) is None


def results_of(model, loss) -> dict:
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    return {"loss": loss.detach(), **gradients, **dict(model.named_buffers())}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_four_shards_equal_four_models_summed_in_the_documented_tree_bit_for_bit(precision):
    cfg = make_cfg(shards=4, dropout=0.4, precision=precision)
    model = training.build_state(cfg, CPU).model.train()
    (batch,) = make_batches(1, size=32)
    inputs = model_input(batch.images, draw_augmentation(batch.keys, 0, cfg))
    parts = []
    for shard in range(4):
        alone, own = copy.deepcopy(model), slice(8 * shard, 8 * shard + 8)
        torch.manual_seed(position_seed(1, 2, 3, shard))
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            logits = alone(inputs[own]).float().flatten()
        loss = functional.binary_cross_entropy_with_logits(logits, batch.labels[own])
        loss.backward()
        parts.append(results_of(alone, loss))
    loss = training.compute_gradients(model, inputs, batch.labels, cfg, None, (1, 2, 3))
    for name, value in results_of(model, loss).items():
        a, b, c, d = (part[name] for part in parts)
        assert torch.equal(value, ((a + b) + (c + d)) / 4), name


def test_dropout_and_initial_weights_depend_on_the_position_not_on_what_was_drawn_before():
    (batch,) = make_batches(1)

    def weights_after(noise, seed=1, step=0):
        torch.manual_seed(noise)
        cfg = make_cfg(dropout=0.5, seed=seed)
        state = training.build_state(cfg, CPU)
        state.progress["step"] = step
        torch.manual_seed(noise)
        training.training_step(state, batch, cfg, 0.1)
        return weights_sha256(state.model.state_dict())

    assert weights_after(1) == weights_after(2)
    assert len({weights_after(1), weights_after(1, step=1), weights_after(1, seed=2)}) == 3


# ---- going on


def test_training_starts_from_the_evaluated_weights_of_a_checkpoint(quick_run):
    state = training.build_state(make_cfg(weights=quick_run / "best.pt"), CPU)
    expected = weights_sha256(load_checkpoint(quick_run / "best.pt")["averaged"])
    assert expected == weights_sha256(state.averaged.state_dict())
    assert expected == weights_sha256(state.model.state_dict())


# ---- the learning rate, and what validation decides

STEPS = 10  # an epoch


@pytest.mark.parametrize("num_warm", [0, 15])
def test_each_schedule_follows_its_formula_after_a_linear_warm_up(num_warm):
    formulas = {
        "cosine": lambda step: 0.25 * (1 + math.cos(math.pi * (step - num_warm) / (60 - num_warm))),
        "step": lambda step: 0.5 * 0.3 ** (step // 20),
        "constant": lambda _: 0.5,
    }
    for schedule, formula in formulas.items():
        decay = {"decay_epochs": 2, "decay_factor": 0.3, "epochs": 6, "lr": 0.5}
        cfg = make_cfg(schedule=schedule, warmup_epochs=num_warm / STEPS, **decay)
        for step in range(60):
            expected = 0.5 * (step + 1) / num_warm if step < num_warm else formula(step)
            assert training.learning_rate(cfg, step, STEPS) == pytest.approx(expected)


@pytest.mark.parametrize("metric, sign", [("auc", 1), ("loss", -1)])
def test_best_is_the_first_epoch_with_the_best_value(metric, sign):
    """tests/test_train.py has plateaus and early stops."""
    cfg = make_cfg(select_metric=metric)
    progress = {"best": None, "stale_epochs": 0}
    values = [sign * value for value in (0.5, 0.7, 0.7, 0.6)]
    for epoch, value in enumerate(values):
        progress["epoch"] = epoch
        assert training.note_epoch(progress, {metric: value}, cfg) == (epoch < 2)
    assert progress["best_epoch"] == 2 and progress["best_scores"] == {metric: values[1]}
