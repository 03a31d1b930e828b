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
from slurm_cluster import free_ports

from lib.checkpoint import load_checkpoint
from lib.files import read_csv, read_json
from lib.ranks import ASK_EVERY

pytestmark = pytest.mark.slow

TRAIN = str(REPOSITORY / "train.py")
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node")
KEYS = ["shards=4", "dropout=0.3", "crop_epochs=1", "eval_batch_size=16"]
TRACED = ["--trace", *QUICK, *KEYS]


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
    """The summary of a run that one process made undisturbed, and the trace of its every step."""
    runs = tmp_path_factory.mktemp("runs")
    summary = run_script("train.py", "--runs", runs, data, *TRACED, check=0).json
    return summary | {"trace": (Path(summary["run"]) / "trace.csv").read_text()}


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_ranks_end_with_the_weights_of_one_process(num_ranks, alone, data, tmp_path):
    process = start(*TORCHRUN, num_ranks, TRAIN, "--runs", tmp_path, data, *TRACED)
    out = process.communicate(timeout=240)[0]
    assert process.returncode == 0
    result = json.loads(out.strip().splitlines()[-1])
    (run,) = tmp_path.iterdir()
    same = ("weights_sha256", "val_loss", "val_auc", "val_f2", "num_steps")
    assert {name: result[name] for name in same} == {name: alone[name] for name in same}
    assert (run / "trace.csv").read_text() == alone["trace"]
    assert read_json(run / "meta.json")["num_ranks"] == num_ranks
    row = read_csv(run / "epochs.csv")[0]
    num_images = float(row["images_per_s"]) * float(row["train_s"])
    assert num_images == pytest.approx(160, rel=0.05), "of all ranks together"


def test_a_run_that_is_killed_while_it_writes_a_checkpoint_goes_on_with_the_same_bits(
    alone, data, tmp_path
):
    """Once two ranks, after a checkpoint; once one process, in the midst of it."""
    for launcher, pattern in ((TORCHRUN + (2,), "*/last.pt"), ((), "*/.last.pt.*.tmp")):
        runs = tmp_path / str(len(launcher))
        for _ in range(20):  # a kill may come too late
            keys = (*TRACED, "checkpoint_every_steps=1")
            process = start(*launcher, TRAIN, "--runs", runs, data, *keys)
            wait_for(process, runs, pattern)
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            (run,) = runs.iterdir()
            if list(runs.glob(pattern)) and not (run / "summary.json").exists():
                break
            shutil.rmtree(run)
        result = run_script("train.py", "--resume", run, "--trace", check=0).json
        assert result["weights_sha256"] == alone["weights_sha256"]
        assert (run / "trace.csv").read_text() == alone["trace"]
        assert len(read_csv(run / "steps.csv")) == 10 and not list(run.glob(".*.tmp"))


def test_ranks_leave_at_the_same_step_when_one_of_them_is_told_to_stop(data, tmp_path):
    keys = (*QUICK, *KEYS, "checkpoint_every_steps=1")
    keys = ("epochs=200" if key.startswith("epochs=") else key for key in keys)
    process = start(*TORCHRUN, 2, TRAIN, "--runs", tmp_path, data, *keys)
    wait_for(process, tmp_path, "*/last.pt")
    for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split():
        if b"RANK=1" in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
            os.kill(int(pid), signal.SIGUSR1)
    process.wait(timeout=200)
    (run,) = tmp_path.iterdir()
    stopped = read_json(run / "meta.json")["stopped"]
    assert stopped["status"] == "interrupted" and stopped["step"] % ASK_EVERY == 0
    assert load_checkpoint(run / "last.pt")["progress"]["num_steps"] == stopped["step"]


def test_ranks_take_the_least_number_of_cores_and_diverge_together(data, tmp_path):
    """They name the rows of the whole batch."""
    port = str(free_ports(1)[0])
    keys = [key for key in QUICK if not key.startswith("threads=")]
    keys += [*KEYS, "optimizer=sgd", "lr=1e30"]
    variables = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    processes = []
    for rank, cores in enumerate("21"):
        own = variables | {"RANK": str(rank), "SLURM_CPUS_PER_TASK": cores}
        processes.append(start(TRAIN, "--runs", tmp_path, data, *keys, **own))
    assert [process.wait(240) for process in processes] == [1, 1]
    (run,) = tmp_path.iterdir()
    assert "\nthreads: 1\n" in (run / "config.yaml").read_text()
    summary = read_json(run / "summary.json")
    assert summary["status"] == "diverged" and len(set(summary["diverged_rows"])) == 32
