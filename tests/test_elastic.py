"""Ranks share out the shards of a batch and nothing else: the weights have the same bits, however
many ranks there are.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import QUICK, REPOSITORY, run_script

from lib.checkpoint import load_checkpoint
from lib.files import read_csv, read_json

pytestmark = pytest.mark.slow

TRAIN = str(REPOSITORY / "train.py")
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node")
KEYS = [*QUICK, "shards=4", "dropout=0.3", "crop_epochs=1", "eval_batch_size=16"]


def start(*arguments, **variables):
    """Python with these arguments, in a session of its own."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | variables
    command = [sys.executable, *map(str, arguments)]
    pipes = {"stdout": subprocess.PIPE, "text": True, "start_new_session": True}
    return subprocess.Popen(command, cwd=REPOSITORY, env=environment, **pipes)


def wait_for(process, folder, pattern: str) -> None:
    """Wait until a file of a run appears in `folder`, or the process ends."""
    while process.poll() is None and not list(folder.glob(pattern)):
        time.sleep(0.0005)


@pytest.fixture(scope="module")
def data(pcam_dir):
    return f"data_dir={pcam_dir}"


@pytest.fixture(scope="module")
def alone(data, tmp_path_factory):
    """The summary of a run that one process made undisturbed."""
    runs = tmp_path_factory.mktemp("runs")
    return run_script("train.py", "--runs", runs, data, "--trace", *KEYS, check=0).json


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_ranks_end_with_the_weights_of_one_process(num_ranks, alone, data, tmp_path):
    process = start(*TORCHRUN, num_ranks, TRAIN, "--runs", tmp_path, data, *KEYS)
    out = process.communicate(timeout=240)[0]
    assert process.returncode == 0
    result = json.loads(out.strip().splitlines()[-1])
    for name in ("weights_sha256", "val_loss", "val_auc", "val_f2", "num_steps"):
        assert result[name] == alone[name]
    (run,) = tmp_path.iterdir()
    assert read_json(run / "meta.json")["num_ranks"] == num_ranks


def test_a_run_that_is_killed_while_it_writes_a_checkpoint_goes_on_with_the_same_bits(
    alone, data, tmp_path
):
    keys = (data, "--trace", *KEYS, "checkpoint_every_steps=1")
    for _ in range(20):  # a kill may come too late
        process = start(TRAIN, "--runs", tmp_path, *keys)
        wait_for(process, tmp_path, "*/.last.pt.*.tmp")
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        (run,) = tmp_path.iterdir()
        if list(run.glob(".last.pt.*.tmp")):
            break
        shutil.rmtree(run)
    result = run_script("train.py", "--resume", run, "--trace", check=0).json
    assert result["weights_sha256"] == alone["weights_sha256"]
    assert (run / "trace.csv").read_text() == Path(alone["run"], "trace.csv").read_text()
    assert len(read_csv(run / "steps.csv")) == 10 and not list(run.glob(".*.tmp"))


def test_ranks_leave_at_the_same_step_when_one_of_them_is_told_to_stop(data, tmp_path):
    keys = (*KEYS[1:], "epochs=200", "checkpoint_every_steps=1")
    process = start(*TORCHRUN, 2, TRAIN, "--runs", tmp_path, data, *keys)
    wait_for(process, tmp_path, "*/last.pt")
    for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split():
        if b"RANK=1" in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
            os.kill(int(pid), signal.SIGUSR1)
    process.wait(timeout=200)
    (run,) = tmp_path.iterdir()
    stopped = read_json(run / "meta.json")["stopped"]
    assert stopped["status"] == "interrupted"
    assert load_checkpoint(run / "last.pt")["progress"]["num_steps"] == stopped["step"]
