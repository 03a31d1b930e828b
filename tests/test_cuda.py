"""What only a GPU can show: it never waits for the host, and a captured step has the bits of a plain
one.
"""

import contextlib
import traceback
from pathlib import Path

import pytest
import torch
from conftest import REPOSITORY
from proofs.trainer import LAUNCHES, WARM_STEPS, Trainer, profile_steps
from torch.utils._pytree import tree_leaves

from lib.augment import draw_augmentation
from lib.command import one_line
from lib.device import choose_device
from lib.files import read_csv

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def first_wait(trainer: Trainer, run_folder, num=10) -> str:
    """Where the host first waits for the GPU in `num` steps of training, loading and logging; empty
    for nowhere.
    """
    try:
        for done in trainer.logged_steps(run_folder, WARM_STEPS + num, trainer.cfg.batch_size):
            if done == WARM_STEPS:
                torch.cuda.set_sync_debug_mode("error")
            elif done == WARM_STEPS + num:
                torch.cuda.set_sync_debug_mode("default")
    except RuntimeError as error:
        where = "outside of lib"
        for frame in traceback.extract_tb(error.__traceback__):
            if str(REPOSITORY / "lib") in frame.filename:
                where = f"{Path(frame.filename).name}:{frame.lineno} ({frame.line})"
        return f"{one_line(error)}: {where}"
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return ""


def computed_bytes(device: torch.device, data, captured: bool, num=6, **changes) -> list:
    """All that `num` steps leave, as tensors on the CPU: weights, averages, momenta and each step's
    loss.
    """
    trainer = Trainer(device, data, captured=captured, batch_size=16, **changes)
    with contextlib.closing(trainer.batches(16)) as loader:
        losses = [trainer.step(next(loader)).loss.cpu() for _ in range(num)]
    state = trainer.state
    tensors = [*state.model.state_dict().values(), *state.averaged.state_dict().values()]
    moments = tree_leaves(state.optimizer.state_dict())
    moments = [value for value in moments if torch.is_tensor(value) and value.ndim > 0]
    return [tensor.cpu() for tensor in (*losses, *tensors, *moments)]


def launches_of_a_step(trainer: Trainer, num=4) -> float:
    """How often the host calls the GPU in a step of training, its batch included."""
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    profiled = profile_steps(trainer, num, activities)
    calls = [event for event in profiled.events() if event.name.startswith(LAUNCHES)]
    return len(calls) / num


@pytest.fixture(params=["p4m", "resnet18"])
def trainer(pcam_dir, request):
    return Trainer(choose_device("cuda"), pcam_dir, model=request.param, batch_size=16)


def test_order_and_draws_are_those_of_the_cpu_and_a_step_is_a_few_calls(trainer):
    keys = trainer.order(1)
    alike = trainer.order(1, torch.device("cpu"))
    assert torch.equal(keys.cpu(), alike)
    ours = vars(draw_augmentation(keys, 1, trainer.cfg))
    theirs = vars(draw_augmentation(alike, 1, trainer.cfg))
    assert all(torch.equal(ours[name].cpu(), theirs[name]) for name in ours)
    assert launches_of_a_step(trainer) < 30


def test_training_never_waits_for_the_gpu_and_logs_every_step(trainer, tmp_path):
    assert first_wait(trainer, tmp_path, num=10) == ""
    assert len(read_csv(tmp_path / "steps.csv")) == 13


@pytest.mark.parametrize(
    "changes",
    [
        {"balance": "loss", "label_smoothing": 0.1},
        {"model": "resnet18", "optimizer": "sgd", "precision": "fp32"},
        {"model": "cnn", "shards": 2, "grad_clip": 0.5, "optimizer": "adamw"},
    ],
)
def test_captured_plain_and_repeated_steps_are_equal_to_the_bit(pcam_dir, changes):
    device = choose_device("cuda")
    first, plain, again = (
        computed_bytes(device, pcam_dir, captured, **changes) for captured in (True, False, True)
    )
    assert all(map(torch.equal, first, plain)) and all(map(torch.equal, first, again))


def test_a_new_shape_is_captured_anew_and_dropout_is_not_captured(pcam_dir, capsys):
    trainer = Trainer(choose_device("cuda"), pcam_dir, batch_size=16, crop_epochs=1)
    for epoch in (0, 1):
        trainer.state.progress["epoch"] = epoch
        list(trainer.logged_steps(None, 3, 16))
        assert trainer.state.graph.graph is not None and not trainer.state.graph.reason
    trainer = Trainer(choose_device("cuda"), pcam_dir, batch_size=16, dropout=0.1)
    list(trainer.logged_steps(None, 3, 16))
    assert trainer.state.graph.graph is None and "dropout" in capsys.readouterr().err
