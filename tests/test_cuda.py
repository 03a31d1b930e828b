"""What only a GPU can show: it computes what the CPU does, draws the same bits, and never waits for
the host.
"""

import pytest
import torch
from proofs.trainer import Trainer, different_draws, first_wait, logit_difference

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


def test_a_wait_is_found(trainer, tmp_path, monkeypatch):
    step = trainer.step
    monkeypatch.setattr(
        trainer, "step", lambda batch: (step(batch), torch.ones(1, device="cuda").item())[0]
    )
    assert "synchroniz" in first_wait(trainer, tmp_path)


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
