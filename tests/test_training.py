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
from lib.command import BadInput
from lib.config import change_free_keys, load_config
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


@pytest.mark.parametrize("optimizer, lr", [(torch.optim.AdamW, 1e-4), (torch.optim.SGD, 0.05)])
def test_steps_equal_a_hand_written_loop(optimizer, lr):
    keys = {"lr": lr, "grad_clip": 0.05, "label_smoothing": 0.1, "ema_decay": 0.9}
    name = optimizer.__name__.lower()
    cfg = make_cfg(model="mlp", mlp_hidden="[6]", weight_decay=0, optimizer=name, **keys)
    weights = torch.tensor([0.6, 3.0])
    state = training.build_state(cfg, CPU)
    model, averaged = copy.deepcopy(state.model), copy.deepcopy(state.averaged)
    options = (
        {"weight_decay": 0} if name == "adamw" else {"momentum": cfg.momentum, "nesterov": True}
    )
    by_hand = optimizer(model.parameters(), lr=cfg.lr, **options)
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
        decay = min(0.9, (1 + step) / (10 + step))
        with torch.no_grad():
            for mean, value in zip(averaged.parameters(), model.parameters(), strict=True):
                mean.lerp_(value, 1 - decay)
        assert torch.allclose(result.loss, loss)
        assert float(result.grad_norm) == pytest.approx(float(norm), rel=1e-4) and norm > 0.05
    for own, hand in ((state.model, model), (state.averaged, averaged)):
        for one, other in zip(own.parameters(), hand.parameters(), strict=True):
            assert torch.allclose(one, other, rtol=1e-3, atol=2e-6)


@pytest.mark.parametrize("as_on_gpu", [False, True])
def test_averaged_statistics_follow_and_counters_are_copied(as_on_gpu, monkeypatch):
    if as_on_gpu:  # where what changes from step to step is a tensor
        monkeypatch.setattr(training, "as_scalars", lambda numbers, _: map(torch.tensor, numbers))
    cfg = make_cfg(ema_decay=0.5, model="resnet18")
    state = training.build_state(cfg, CPU)
    mean = state.averaged.bn1.running_mean.clone()
    for step, batch in enumerate(make_batches(3), 1):
        training.training_step(state, batch, cfg, cfg.lr)
        mean.lerp_(state.model.bn1.running_mean, 1 - min(0.5, (1 + step) / (10 + step)))
    assert torch.allclose(state.averaged.bn1.running_mean, mean, rtol=1e-5)
    assert state.averaged.bn1.num_batches_tracked == 3


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
    statistics = next(name for name in parts[0] if name.endswith("running_mean"))
    assert not torch.equal(parts[0][statistics], parts[1][statistics])


def test_dropout_and_initial_weights_depend_on_the_position_not_on_what_was_drawn_before():
    (batch,) = make_batches(1)

    def weights_after(noise, lr=0.1, seed=1, **position):
        torch.rand(noise)
        cfg = make_cfg(dropout=0.5, seed=seed)
        state = training.build_state(cfg, CPU)
        state.progress |= position
        torch.manual_seed(noise)
        if lr:
            training.training_step(state, batch, cfg, lr)
        return weights_sha256(state.model.state_dict())

    assert weights_after(1) == weights_after(2)
    assert len({weights_after(1), weights_after(1, step=1), weights_after(1, epoch=1)}) == 3
    assert weights_after(1, 0) == weights_after(2, 0) != weights_after(1, 0, seed=2)


# ---- going on


def test_training_starts_from_the_weights_of_a_checkpoint_if_they_are_finite(quick_run, tmp_path):
    state = training.build_state(make_cfg(weights=quick_run / "best.pt"), CPU)
    expected = weights_sha256(load_checkpoint(quick_run / "best.pt")["averaged"])
    assert expected == weights_sha256(state.averaged.state_dict())
    weights = state.model.state_dict()
    assert expected == weights_sha256(weights)
    weights["head.1.bias"][0] = math.nan
    torch.save(weights, tmp_path / "a.pt")
    with pytest.raises(BadInput, match=r"a\.pt.*finite"):
        training.build_state(make_cfg(weights=tmp_path / "a.pt"), CPU)


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


def note_epochs(metric: str, values, **changes) -> tuple[dict, list]:
    """The progress after epochs with these values of a metric, and after each of them (is it the
    best, is training over, the rate).
    """
    cfg = make_cfg(select_metric=metric, warmup_epochs=0, epochs=99, lr=1, **changes)
    progress, notes = training.build_state(cfg, CPU).progress, []
    for epoch, value in enumerate(values):
        progress["epoch"] = epoch
        is_best = training.note_epoch(progress, {metric: value}, cfg)
        rate = training.learning_rate(cfg, 0, STEPS, progress["lr_scale"])
        notes.append((is_best, training.is_over(progress, cfg), rate))
    return progress, notes


@pytest.mark.parametrize("metric, sign", [("auc", 1), ("loss", -1)])
def test_best_is_the_first_epoch_with_the_best_value(metric, sign):
    values = [sign * value for value in (0.5, 0.7, 0.7, 0.6)]
    progress, notes = note_epochs(metric, values)
    assert progress["best_epoch"] == 2 and progress["best_scores"] == {metric: values[1]}
    assert [is_best for is_best, _, _ in notes] == [True, True, False, False]


def test_an_epoch_without_a_score_is_followed_by_a_better_one():
    progress, notes = note_epochs("auc", [math.nan, 0.6, 0.5])
    assert progress["best_epoch"] == 2 and [is_best for is_best, _, _ in notes] == [
        True,
        True,
        False,
    ]


def test_plateaus_decay_the_rate_and_early_stop_waits_as_long_as_asked():
    plateau = {"schedule": "plateau", "decay_epochs": 2, "decay_factor": 0.1}
    aucs = [0.6, 0.7, 0.7, 0.6, 0.8, 0.7, 0.7, 0.7, 0.7]
    _, notes = note_epochs("auc", aucs, early_stop_epochs=4, **plateau)
    rates = [1, 1, 1, 0.1, 0.1, 0.1, 0.01, 0.01, 0.001]
    assert [rate for _, _, rate in notes] == pytest.approx(rates)
    assert [is_over for _, is_over, _ in notes] == [False] * 8 + [True]


@pytest.mark.parametrize("changes", [{"schedule": "plateau"}, {"early_stop_epochs": 1}])
def test_where_training_follows_the_score_what_moves_it_is_part_of_the_identity(changes):
    one, other = make_cfg(eval_batch_size=8, **changes), make_cfg(eval_batch_size=9, **changes)
    assert one.identity_digest({}) != other.identity_digest({})
    with pytest.raises(BadInput):
        change_free_keys(one, {"eval_batch_size": "9"})
