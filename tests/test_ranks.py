"""Signals set a flag and nothing else; whoever listened before listens again afterwards."""

import os
import signal

import pytest
import torch
from slurm_cluster import free_ports

from lib import ranks
from lib.command import BadInput
from lib.ranks import STOP_SIGNALS, StopFlag


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_a_signal_sets_the_flag_and_interrupts_nothing(number):
    with StopFlag() as stop:
        assert not stop
        os.kill(os.getpid(), number)
        assert stop and stop.signal == number


def test_the_handlers_from_before_are_back_afterwards_even_after_an_error():
    before = [signal.getsignal(number) for number in STOP_SIGNALS]
    with pytest.raises(RuntimeError), StopFlag():
        assert [signal.getsignal(number) for number in STOP_SIGNALS] != before
        raise RuntimeError
    assert [signal.getsignal(number) for number in STOP_SIGNALS] == before


def test_a_second_ctrl_c_does_not_wait_but_a_second_sigterm_does():
    with StopFlag() as stop:
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)  # the first Ctrl-C, whatever came before
        assert stop
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


TORCHRUN = {"RANK": "0", "WORLD_SIZE": "2"}
SRUN = {"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "2", "SLURM_JOB_ID": "4711"}


@pytest.mark.parametrize(
    "variables, num_shards",
    [
        (TORCHRUN, 1),
        (TORCHRUN, 2),
        (TORCHRUN | {"RANK": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}, 2),
        (TORCHRUN | {"MASTER_ADDR": "127.0.0.1"}, 2),
        (SRUN, 1),
        (SRUN, 2),
    ],
)
def test_a_rank_that_stands_alone_says_which_variables_make_it_one_and_how_to_train_alone(
    variables, num_shards, monkeypatch, capsys
):
    for name in ("MASTER_ADDR", "MASTER_PORT", *TORCHRUN, *SRUN):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    if variables == SRUN:
        monkeypatch.setenv("MASTER_PORT", str(free_ports(1)[0]))
    monkeypatch.setattr(ranks, "NOTE_S", 0.1)
    monkeypatch.setattr(ranks, "PATIENCE", ranks.datetime.timedelta(seconds=2))
    names = [name for name in variables if name not in ("SLURM_JOB_ID",)][:2]
    with (
        pytest.raises(BadInput) as refused,
        ranks.join_ranks(torch.device("cpu"), num_shards),
    ):
        pass
    remedy = f"env -u {names[0]} -u {names[1]} "
    assert remedy in str(refused.value)
    if variables == SRUN and num_shards == 2:
        assert remedy in capsys.readouterr().err, "and says so while it waits"
