"""Signals set a flag and nothing else; a rank that waits for others says why it does."""

import datetime
import os
import signal

import pytest
from slurm_cluster import free_ports

from lib import ranks
from lib.command import BadInput
from lib.ranks import STOP_SIGNALS, StopFlag


def test_a_signal_sets_the_flag_and_whoever_listened_before_listens_again_afterwards():
    before = [signal.getsignal(number) for number in STOP_SIGNALS]
    for number in STOP_SIGNALS:
        with StopFlag() as stop:
            assert not stop
            os.kill(os.getpid(), number)
            assert stop and stop.signal == number
    assert [signal.getsignal(number) for number in STOP_SIGNALS] == before


def test_a_second_ctrl_c_does_not_wait_but_a_second_sigterm_does():
    with StopFlag():
        for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGINT):
            os.kill(os.getpid(), number)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


TORCHRUN = {"RANK": "0", "WORLD_SIZE": "2"}
SRUN = {"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "2", "SLURM_JOB_ID": "4711"}


@pytest.mark.parametrize(
    "variables, num_shards, words",
    [
        (TORCHRUN, 2, "MASTER_ADDR"),
        (TORCHRUN | {"WORLD_SIZE": "8"}, 4, "8 ranks cannot share out 4 shards"),
        (SRUN, 1, "2 ranks cannot share out 1 shards"),
        (SRUN, 2, "do not reach each other"),
    ],
)
def test_a_rank_that_stands_alone_says_which_variables_make_it_one_and_how_to_train_alone(
    variables, num_shards, words, monkeypatch, capsys
):
    for name in ("MASTER_ADDR", "MASTER_PORT", *TORCHRUN, *SRUN):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    if variables == SRUN:
        monkeypatch.setenv("MASTER_PORT", str(free_ports(1)[0]))
    monkeypatch.setattr(ranks, "PATIENCE", datetime.timedelta(seconds=2))
    with (
        pytest.raises(BadInput, match=words) as refused,
        ranks.join_ranks(num_shards),
    ):
        pass
    first, second = [*variables][:2]
    remedy = f"env -u {first} -u {second} "
    assert remedy in str(refused.value)
    if "reach" in words:
        assert remedy in capsys.readouterr().err, "and says so while it waits"
