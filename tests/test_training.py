"""The step against hand-written loops, the shards against the documented sum, the learning rate
against formulas.
"""

import copy
import math

import numpy as np
import pytest
import torch
from conftest import QUICK, draw_patches
from torch.nn import functional

from lib import training
from lib.augment import draw_augmentation, model_input
from lib.batches import Batch, PatchSource, load_batches
from lib.checkpoint import load_checkpoint, state_sha256, weights_sha256
from lib.command import BadInput
from lib.config import DEFAULT_PATH, change_free_keys, load_config
from lib.pcam import open_split
from lib.seeding import position_seed, set_determinism

CPU = torch.device("cpu")


def make_cfg(**changes):
    """The quick configuration with changes."""
    keys = dict(pair.split("=") for pair in QUICK) | {
        key: str(value) for key, value in changes.items()
    }
    return load_config(DEFAULT_PATH, [f"{key}={value}" for key, value in keys.items()])


def make_batches(num_batches, size=16, seed=0):
    images, labels = draw_patches(num_batches * size, seed)
    images, labels = torch.from_numpy(images), torch.from_numpy(labels).float()
    parts = torch.arange(len(images)).split(size)
    return [Batch(images[keys], labels[keys], keys, len(images)) for keys in parts]


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    set_determinism(True, 1)


# ---- the step


@pytest.mark.parametrize(
    "changes",
    [
        {"optimizer": "adamw", "lr": 1e-4, "grad_clip": 0, "ema_decay": 0.9},
        {"optimizer": "sgd", "lr": 0.05, "grad_clip": 0.05, "ema_decay": 0.6},
        {"optimizer": "sgd", "lr": 0.05, "momentum": 0, "label_smoothing": 0.1, "balance": "loss"},
    ],
    ids=lambda changes: changes["optimizer"] + str(len(changes)),
)
def test_steps_equal_a_hand_written_loop(changes):
    cfg = make_cfg(model="mlp", mlp_hidden="[6]", weight_decay=0.1, **changes)
    weights = torch.tensor([0.6, 3.0]) if cfg.balance == "loss" else torch.ones(2)
    state = training.build_state(cfg, CPU)
    model = copy.deepcopy(state.model)
    averaged = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    first, second = (
        {name: torch.zeros_like(p) for name, p in model.named_parameters()} for _ in range(2)
    )
    for step, batch in enumerate(make_batches(6), 1):
        result = training.training_step(
            state, batch, cfg, cfg.lr / step, weights if cfg.balance == "loss" else None
        )

        logits = model(model_input(batch.images, draw_augmentation(batch.keys, 0, cfg))).flatten()
        target = batch.labels * (1 - cfg.label_smoothing) + cfg.label_smoothing / 2
        losses = -(
            target * functional.logsigmoid(logits) + (1 - target) * functional.logsigmoid(-logits)
        )
        losses = losses * weights[batch.labels.long()]
        model.zero_grad()
        losses.mean().backward()
        norm = math.sqrt(sum(float((p.grad.double() ** 2).sum()) for p in model.parameters()))
        factor = min(1.0, cfg.grad_clip / norm) if cfg.grad_clip else 1.0
        with torch.no_grad():
            for name, p in model.named_parameters():
                grad, lr, decay = p.grad * factor, cfg.lr / step, cfg.weight_decay * (p.ndim > 1)
                if cfg.optimizer == "sgd":  # Nesterov, decay added to the gradient
                    grad = grad + decay * p
                    first[name] = cfg.momentum * first[name] + grad
                    p -= lr * (grad + cfg.momentum * first[name] if cfg.momentum else grad)
                else:  # Loshchilov and Hutter 2019
                    p *= 1 - lr * decay
                    first[name] = 0.9 * first[name] + 0.1 * grad
                    second[name] = 0.999 * second[name] + 0.001 * grad**2
                    p -= (
                        lr
                        * first[name]
                        / (1 - 0.9**step)
                        / ((second[name] / (1 - 0.999**step)).sqrt() + 1e-8)
                    )
                decay = min(cfg.ema_decay, (1 + step) / (10 + step))
                averaged[name] = decay * averaged[name] + (1 - decay) * p

        assert float(result.loss) == pytest.approx(losses.mean().item(), rel=1e-5)
        assert float(result.grad_norm) == pytest.approx(norm, rel=1e-4), (
            "the norm is the one before clipping"
        )
        if "grad_clip" in changes and cfg.grad_clip:
            assert norm > cfg.grad_clip, "clipping has to happen for this to say something"
    for own, hand in (
        (state.model.state_dict(), model.state_dict()),
        (state.averaged.state_dict(), averaged),
    ):
        assert all(torch.allclose(own[name], hand[name], rtol=1e-3, atol=2e-6) for name in hand)


@pytest.mark.parametrize("as_on_gpu", [False, True])
def test_averaged_statistics_follow_and_counters_are_copied(as_on_gpu, monkeypatch):
    if as_on_gpu:  # where what changes from step to step is a tensor
        as_tensors = lambda numbers, _device: tuple(torch.tensor(number) for number in numbers)  # noqa: E731
        monkeypatch.setattr(training, "as_scalars", as_tensors)
    cfg = make_cfg(ema_decay=0.5, model="resnet18")
    state = training.build_state(cfg, CPU)
    mean, counter = (
        next(n for n in state.averaged.state_dict() if n.endswith(end))
        for end in ("_mean", "_tracked")
    )
    hand = state.averaged.state_dict()[mean].clone()
    for step, batch in enumerate(make_batches(3), 1):
        training.training_step(state, batch, cfg, cfg.lr)
        decay = min(0.5, (1 + step) / (10 + step))
        hand = decay * hand + (1 - decay) * state.model.state_dict()[mean]
    assert torch.allclose(state.averaged.state_dict()[mean], hand, rtol=1e-5)
    assert state.averaged.state_dict()[counter] == 3


def test_balanced_loss_is_a_weighted_cross_entropy_with_mean_weight_one():
    labels = np.array([0] * 50 + [1] * 10, np.uint8)
    weights, index = (
        training.class_weights(labels, make_cfg(balance="loss"), CPU),
        torch.from_numpy(labels).long(),
    )
    assert weights.tolist() == pytest.approx([0.6, 3.0]) and weights[index].mean() == pytest.approx(
        1.0
    )
    assert weights[0] * 50 == pytest.approx(float(weights[1] * 10)), (
        "both classes have the same say"
    )
    logits, targets = torch.linspace(-3, 3, 60), torch.from_numpy(labels).float()
    loss = training.compute_loss(logits, targets, make_cfg(balance="loss"), weights)
    assert loss == pytest.approx(
        float(functional.binary_cross_entropy_with_logits(logits, targets, weight=weights[index]))
    )
    assert all(
        training.class_weights(labels, make_cfg(balance=other), CPU) is None
        for other in ("none", "sampler")
    )


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_loss_and_weights_are_float32(precision):
    cfg, batch, logits = make_cfg(precision=precision), make_batches(1)[0], []
    state = training.build_state(cfg, CPU)
    state.model.register_forward_hook(
        lambda _, __, output: logits.append(output.detach().flatten())
    )
    before = weights_sha256(state.model.state_dict())
    result = training.training_step(state, batch, cfg, cfg.lr)
    assert torch.equal(
        result.loss, functional.binary_cross_entropy_with_logits(logits[0], batch.labels)
    )
    assert logits[0].dtype == torch.float32 and not torch.equal(
        logits[0], logits[0].bfloat16().float()
    )
    assert result.loss.dtype == torch.float32 and 0.2 < float(result.loss) < 2
    assert {p.dtype for p in state.model.parameters()} == {torch.float32} and weights_sha256(
        state.model.state_dict()
    ) != before


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_four_shards_equal_four_models_summed_in_the_documented_tree_bit_for_bit(precision):
    cfg = make_cfg(shards=4, dropout=0.4, precision=precision)
    model = training.build_state(cfg, CPU).model.train()
    batch = make_batches(1, size=32)[0]
    inputs = model_input(batch.images, draw_augmentation(batch.keys, 0, cfg))
    parts = []
    for shard in range(4):
        alone = copy.deepcopy(model)
        mine = slice(8 * shard, 8 * shard + 8)
        torch.manual_seed(position_seed(1, 2, 3, shard))
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            logits = alone(inputs[mine])
        loss = functional.binary_cross_entropy_with_logits(
            logits.float().flatten(), batch.labels[mine]
        )
        loss.backward()
        parts.append(
            {
                "loss": loss.detach(),
                **{name: p.grad for name, p in alone.named_parameters()},
                **dict(alone.named_buffers()),
            }
        )
    loss = training.compute_gradients(model, inputs, batch.labels, cfg, None, (1, 2, 3))
    results = {
        "loss": loss,
        **{name: p.grad for name, p in model.named_parameters()},
        **dict(model.named_buffers()),
    }
    for name, value in results.items():
        a, b, c, d = (part[name] for part in parts)
        if value.is_floating_point():
            assert torch.equal(value, ((a + b) + (c + d)) / 4), name
        else:
            assert value == 1, f"{name} counts steps, not shards"
    statistics = next(name for name in results if name.endswith("running_mean"))
    assert not torch.equal(parts[0][statistics], parts[1][statistics])


def test_one_shard_is_plain_training_and_two_are_another_computation():
    results = []
    for shards in (1, 2):
        cfg = make_cfg(shards=shards)
        state = training.build_state(cfg, CPU)
        training.training_step(state, make_batches(1, 32)[0], cfg, cfg.lr)
        results.append(weights_sha256(state.model.state_dict()))
    assert results[0] != results[1], "each shard has its own batch-norm statistics"


def test_dropout_depends_on_the_position_not_on_what_was_drawn_before():
    cfg, batch = make_cfg(dropout=0.5), make_batches(1)[0]

    def weights_after(noise, **position):
        state = training.build_state(cfg, CPU)
        state.progress |= position
        torch.manual_seed(noise)
        training.training_step(state, batch, cfg, 0.1)
        return weights_sha256(state.model.state_dict())

    assert weights_after(1) == weights_after(2)
    assert len({weights_after(1), weights_after(1, step=1), weights_after(1, epoch=1)}) == 3


def test_initial_weights_are_a_function_of_the_seed_alone():
    def initial(seed):
        torch.rand(seed + 3)  # whatever was drawn before
        return weights_sha256(training.build_state(make_cfg(seed=seed), CPU).model.state_dict())

    assert initial(1) == initial(1) != initial(2)


@pytest.mark.parametrize("prefetch_first", [True, False])
def test_prefetch_changes_no_bit(pcam_dir, prefetch_first):
    split, cfg = open_split(pcam_dir, "train"), make_cfg()
    order = torch.randperm(len(split), generator=torch.Generator().manual_seed(0))[:96].split(32)
    digests = []
    for prefetch, residence in ((prefetch_first, "disk"), (not prefetch_first, "host")):
        state = training.build_state(cfg, CPU)
        for batch in load_batches(
            PatchSource(split.images, residence, CPU), split.labels, list(order), prefetch
        ):
            training.training_step(state, batch, cfg, cfg.lr)
        digests.append(weights_sha256(state.model.state_dict()))
    assert digests[0] == digests[1]


# ---- going on


@pytest.mark.parametrize("optimizer", ["muon", "adamw", "sgd"])
def test_a_restored_state_goes_on_to_the_same_bits(optimizer, tmp_path):
    cfg, batches = make_cfg(optimizer=optimizer, dropout=0.2, shards=2), make_batches(6)
    whole = training.build_state(cfg, CPU)
    for batch in batches[:3]:
        training.training_step(whole, batch, cfg, cfg.lr)
    torch.save(whole.checkpoint(cfg, {}), tmp_path / "state.pt")
    resumed = training.build_state(
        make_cfg(optimizer=optimizer, dropout=0.2, shards=2, seed=99), CPU
    )
    training.restore_state(
        resumed, torch.load(tmp_path / "state.pt", weights_only=True), "state.pt"
    )
    for state in (whole, resumed):
        for batch in batches[3:]:
            training.training_step(state, batch, cfg, cfg.lr)
    fields = ("model", "averaged", "optimizer", "progress")
    one, other = (state.checkpoint(cfg, {}) for state in (whole, resumed))
    assert all(state_sha256(one[field]) == state_sha256(other[field]) for field in fields)


def test_a_checkpoint_that_cannot_be_resumed_is_refused(quick_run):
    last, best = (load_checkpoint(quick_run / name) for name in ("last.pt", "best.pt"))
    with pytest.raises(BadInput, match="another model"):
        training.restore_state(training.build_state(make_cfg(p4m_width=1), CPU), last, "last.pt")
    with pytest.raises(BadInput, match="optimizer"):  # best.pt holds none
        training.restore_state(training.build_state(make_cfg(), CPU), best, "best.pt")


def test_weights_that_are_no_finite_numbers_are_refused_by_the_tensor_that_has_them(tmp_path):
    cfg = load_config(overrides=["model=mlp", "mlp_hidden=4", f"weights={tmp_path / 'a.pt'}"])
    weights = training.build_model(cfg).state_dict()
    weights["1.bias"][2] = math.nan
    torch.save(weights, tmp_path / "a.pt")
    with pytest.raises(BadInput, match=r"a\.pt.*1\.bias"):
        training.build_state(cfg, CPU)


def test_training_can_start_from_the_weights_of_a_checkpoint(quick_run):
    state = training.build_state(make_cfg(weights=quick_run / "best.pt"), CPU)
    expected = load_checkpoint(quick_run / "best.pt")["averaged"]
    assert (
        weights_sha256(state.model.state_dict())
        == weights_sha256(expected)
        == weights_sha256(state.averaged.state_dict())
    )


# ---- the learning rate, and what validation decides

STEPS = 10  # an epoch


@pytest.mark.parametrize("warmup", [0, 0.25, 1.5])
@pytest.mark.parametrize("schedule", ["cosine", "step", "constant"])
def test_each_schedule_follows_its_formula_after_a_linear_warm_up(schedule, warmup):
    cfg = make_cfg(
        schedule=schedule, warmup_epochs=warmup, epochs=6, decay_epochs=2, decay_factor=0.3, lr=0.5
    )
    num_warm, total = warmup * STEPS, 6 * STEPS
    after = {
        "cosine": lambda step: (
            0.25 * (1 + math.cos(math.pi * (step - num_warm) / (total - num_warm)))
        ),
        "step": lambda step: 0.5 * 0.3 ** (step // 20),
        "constant": lambda _: 0.5,
    }[schedule]
    for step in range(total):
        expected = 0.5 * (step + 1) / math.ceil(num_warm) if step < num_warm else after(step)
        assert training.learning_rate(cfg, step, STEPS) == pytest.approx(expected), step
    rates = [training.learning_rate(cfg, step, STEPS) for step in range(total)]
    assert max(rates) == 0.5 and min(rates) > 0
    assert schedule != "cosine" or rates[-1] < 0.002


def test_a_warm_up_longer_than_the_run_never_passes_the_highest_rate():
    for schedule in ("cosine", "step", "plateau", "constant"):
        cfg = make_cfg(schedule=schedule, warmup_epochs=9, epochs=2, lr=0.5)
        assert all(0 < training.learning_rate(cfg, step, STEPS) <= 0.5 for step in range(2 * STEPS))


def test_a_plateau_decays_after_so_many_epochs_without_a_better_score_and_again():
    cfg = make_cfg(schedule="plateau", warmup_epochs=0, decay_epochs=2, decay_factor=0.1, lr=1.0)
    progress = training.build_state(cfg, CPU).progress
    rates = []
    for epoch, auc in enumerate([0.6, 0.7, 0.7, 0.6, 0.6, 0.65, 0.8, 0.1, 0.1]):
        progress["epoch"] = epoch
        training.note_epoch(progress, {"auc": auc}, cfg)
        rates.append(training.learning_rate(cfg, 0, STEPS, progress["lr_scale"]))
    assert rates == pytest.approx([1, 1, 1, 0.1, 0.1, 0.01, 0.01, 0.01, 0.001])


@pytest.mark.parametrize(
    "metric, values, best", [("auc", [0.5, 0.7, 0.7, 0.6], 2), ("loss", [0.9, 0.4, 0.5, 0.4], 2)]
)
def test_best_is_the_first_epoch_with_the_best_value(metric, values, best):
    cfg = make_cfg(select_metric=metric)
    progress = training.build_state(cfg, CPU).progress
    is_best = []
    for epoch, value in enumerate(values):
        progress["epoch"] = epoch
        is_best.append(training.note_epoch(progress, {metric: value}, cfg))
    assert (
        progress["best_epoch"] == best
        and progress["best"] == progress["best_scores"][metric] == values[best - 1]
    )
    assert is_best[best - 1] and not any(is_best[best:])


def test_early_stop_waits_as_long_as_asked():
    cfg, never = make_cfg(early_stop_epochs=2), make_cfg()
    progress = training.build_state(cfg, CPU).progress
    stale = []
    for auc in (0.6, 0.5, 0.7, 0.7, 0.6):
        training.note_epoch(progress, {"auc": auc}, cfg)
        stale.append(training.is_over(progress, cfg))
        assert not training.is_over(progress, never)
    assert stale == [False, False, False, False, True]


def test_an_undefined_score_is_never_the_best():
    cfg = make_cfg()
    progress = training.build_state(cfg, CPU).progress
    training.note_epoch(progress, {"auc": float("nan")}, cfg)
    assert training.note_epoch(progress, {"auc": 0.6}, cfg) and progress["best"] == 0.6


@pytest.mark.parametrize("changes", [{"schedule": "plateau"}, {"early_stop_epochs": 1}])
def test_what_moves_the_validation_score_is_part_of_the_identity_where_training_listens_to_it(
    changes,
):
    one, other = make_cfg(eval_batch_size=8, **changes), make_cfg(eval_batch_size=9, **changes)
    assert one.identity_digest({}) != other.identity_digest({}), (
        "rounding reaches the weights through the schedule"
    )
    with pytest.raises(BadInput):
        change_free_keys(one, {"eval_batch_size": "9"})
