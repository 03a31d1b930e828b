"""What only a GPU can show: it never waits for the host, and a captured step has the bits of a plain
one. `make prove-gpu` compares its logits and draws with the CPU's.
"""

import pytest
import torch
from proofs.trainer import (
    Trainer,
    computed_bytes,
    first_wait,
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
