"""What only a GPU can show: it computes what the CPU does, draws the same bits, and never waits for
the host.
"""

import pytest
import torch
from proofs.trainer import (
    Trainer,
    computed_bytes,
    different_draws,
    first_wait,
    launches_of_a_step,
    logit_difference,
)

from lib.device import choose_device
from lib.files import read_csv

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.fixture(params=["p4m", "resnet18"])
def trainer(pcam_dir, request):
    return Trainer(choose_device("cuda"), pcam_dir, model=request.param, batch_size=16)


def test_logits_are_those_of_the_cpu_over_one_view_and_over_eight(trainer):
    list(trainer.logged_steps(None, 20, 16))  # batch-norm statistics that mean something
    assert logit_difference(trainer, "fp32") < 1e-3
    assert logit_difference(trainer, "fp32", views=8) < 1e-3
    assert logit_difference(trainer, "bf16") < 0.1


@pytest.mark.parametrize("balance", ["none", "sampler"])
def test_order_and_draws_are_those_of_the_cpu_to_the_bit(pcam_dir, balance):
    assert not different_draws(Trainer(choose_device("cuda"), pcam_dir, balance=balance))


def test_training_never_waits_for_the_gpu_and_logs_every_step(trainer, tmp_path):
    assert first_wait(trainer, tmp_path, num=10) == ""
    rows = read_csv(tmp_path / "steps.csv")
    assert [int(row["step"]) for row in rows] == list(range(1, 14))
    assert all(float(row["loss"]) > 0 and float(row["grad_norm"]) > 0 for row in rows)


def test_patches_streamed_from_host_memory_train_as_resident_ones_do(pcam_dir):
    weights = []
    for residence in ("device", "host"):
        trainer = Trainer(choose_device("cuda"), pcam_dir, residence, batch_size=16)
        list(trainer.logged_steps(None, 5, 16))
        weights.append(
            torch.cat(
                [parameter.detach().flatten() for parameter in trainer.state.model.parameters()]
            )
        )
    assert torch.equal(*weights)


CHANGES = [
    {},
    {"model": "resnet18", "optimizer": "sgd"},
    {"model": "cnn", "shards": 2, "grad_clip": 0.5, "optimizer": "adamw"},
    {"precision": "fp32", "balance": "loss", "label_smoothing": 0.1},
]


@pytest.mark.parametrize("changes", CHANGES)
def test_captured_plain_and_repeated_steps_are_equal_to_the_bit(pcam_dir, changes):
    device = choose_device("cuda")
    first, plain, again = (
        computed_bytes(device, pcam_dir, captured, **changes) for captured in (True, False, True)
    )
    assert all(map(torch.equal, first, plain)) and all(map(torch.equal, first, again))


def test_a_step_is_one_launch_and_the_few_that_fill_it(trainer):
    assert launches_of_a_step(trainer) < 30


def test_a_new_shape_is_captured_anew_and_dropout_is_not_captured(pcam_dir, capsys):
    trainer = Trainer(choose_device("cuda"), pcam_dir, batch_size=16, crop_epochs=1)
    for epoch in (0, 1):
        trainer.state.progress["epoch"] = epoch
        list(trainer.logged_steps(None, 3, 16))
        assert trainer.state.graph.graph is not None and not trainer.state.graph.reason
    trainer = Trainer(choose_device("cuda"), pcam_dir, batch_size=16, dropout=0.1)
    list(trainer.logged_steps(None, 3, 16))
    assert trainer.state.graph.graph is None and "dropout" in capsys.readouterr().err
