"""Ranks share out the shards of a batch and nothing else: the weights have the same bits, however
many ranks there are.
"""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import QUICK, REPOSITORY, run_script

from lib.checkpoint import load_checkpoint
from lib.files import read_csv, read_json
from lib.ranks import ASK_EVERY

pytestmark = pytest.mark.slow

SHARDED = ["--trace", *QUICK, "shards=4", "dropout=0.3", "crop_epochs=1", "eval_batch_size=16"]


def under_torchrun(num_ranks: int, *arguments):
    """train.py as `num_ranks` ranks, started in a session of its own."""
    launcher = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        str(num_ranks),
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [*launcher, str(REPOSITORY / "train.py"), *map(str, arguments)]
    return subprocess.Popen(
        command,
        cwd=REPOSITORY,
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


@pytest.fixture(scope="module")
def alone(pcam_dir, tmp_path_factory):
    """The summary of a run that one process made undisturbed, and the trace of its every step."""
    runs = tmp_path_factory.mktemp("runs")
    run = Path(
        run_script("train.py", "--runs", runs, f"data_dir={pcam_dir}", *SHARDED, check=0).json[
            "run"
        ]
    )
    return read_json(run / "summary.json") | {"trace": (run / "trace.csv").read_text()}


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_ranks_end_with_the_weights_of_one_process(num_ranks, alone, pcam_dir, tmp_path):
    process = under_torchrun(num_ranks, "--runs", tmp_path, f"data_dir={pcam_dir}", *SHARDED)
    out = process.communicate(timeout=240)[0]
    assert process.returncode == 0
    result = json.loads(out.strip().splitlines()[-1])
    assert result["weights_sha256"] == alone["weights_sha256"]
    row = read_csv(Path(result["run"]) / "epochs.csv")[0]
    assert float(row["images_per_s"]) * float(row["train_s"]) == pytest.approx(160, rel=0.05), (
        "of all ranks together"
    )
    same = ("val_loss", "val_auc", "val_f2", "num_steps")
    assert {name: result[name] for name in same} == {name: alone[name] for name in same}
    assert (Path(result["run"]) / "trace.csv").read_text() == alone["trace"]
    assert (
        len(list(tmp_path.iterdir())) == 1
        and read_json(Path(result["run"]) / "meta.json")["num_ranks"] == num_ranks
    )


def test_a_run_of_two_ranks_goes_on_as_one_with_the_same_bits(alone, pcam_dir, tmp_path):
    process = under_torchrun(
        2, "--runs", tmp_path, f"data_dir={pcam_dir}", *SHARDED, "checkpoint_every_steps=1"
    )
    deadline = time.monotonic() + 200
    while not list(tmp_path.glob("*/last.pt")) and time.monotonic() < deadline:
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    (run,) = tmp_path.iterdir()
    # where it was already done: its last step then comes from the checkpoint
    (run / "summary.json").unlink(missing_ok=True)
    result = run_script("train.py", "--resume", run, "--trace", check=0).json
    assert result["weights_sha256"] == alone["weights_sha256"]
    assert (run / "trace.csv").read_text() == alone["trace"]
    assert [row["step"] for row in read_csv(run / "steps.csv")] == [
        str(step) for step in range(1, 11)
    ]


def test_a_run_that_is_killed_while_it_writes_a_checkpoint_goes_on_with_the_same_bits(
    alone, pcam_dir, tmp_path
):
    command = [
        sys.executable,
        str(REPOSITORY / "train.py"),
        "--runs",
        str(tmp_path),
        f"data_dir={pcam_dir}",
        *SHARDED,
    ]
    for _ in range(20):  # a kill may come too late
        process = subprocess.Popen(
            [*command, "checkpoint_every_steps=1"], stderr=subprocess.DEVNULL
        )
        while process.poll() is None and not list(tmp_path.glob("*/.last.pt.*.tmp")):
            time.sleep(0.0005)
        process.kill()
        process.wait()
        (run,) = tmp_path.iterdir()
        if list(run.glob(".last.pt.*.tmp")):
            break
        shutil.rmtree(run)
    result = run_script("train.py", "--resume", run, "--trace", check=0).json
    assert result["weights_sha256"] == alone["weights_sha256"]
    assert (run / "trace.csv").read_text() == alone["trace"] and not list(run.glob(".*.tmp"))


def test_ranks_leave_at_the_same_step_when_one_of_them_is_told_to_stop(pcam_dir, tmp_path):
    many = [option for option in SHARDED if option != "epochs=2"]
    process = under_torchrun(
        2,
        "--runs",
        tmp_path,
        f"data_dir={pcam_dir}",
        *many,
        "epochs=200",
        "checkpoint_every_steps=1",
    )
    deadline = time.monotonic() + 200
    while not list(tmp_path.glob("*/last.pt")) and time.monotonic() < deadline:
        time.sleep(0.02)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    second = [
        pid
        for pid in children
        if b"RANK=1" in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    ]
    os.kill(int(second[0]), signal.SIGUSR1)
    process.wait(timeout=200)
    (run,) = tmp_path.iterdir()
    stopped = read_json(run / "meta.json")["stopped"]
    assert stopped["status"] == "interrupted" and stopped["step"] % ASK_EVERY == 0
    assert load_checkpoint(run / "last.pt")["progress"]["num_steps"] == stopped["step"]


def test_ranks_that_were_given_unlike_numbers_of_cores_compute_with_the_least(pcam_dir, tmp_path):
    overrides = [
        f"data_dir={pcam_dir}",
        *(pair for pair in SHARDED if not pair.startswith("threads=")),
    ]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        common = {
            "WORLD_SIZE": "2",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(free.getsockname()[1]),
        }
    processes = []
    for rank, cores in enumerate("21"):
        environment = os.environ | common | {"RANK": str(rank), "SLURM_CPUS_PER_TASK": cores}
        command = [
            sys.executable,
            str(REPOSITORY / "train.py"),
            "--runs",
            str(tmp_path),
            *overrides,
        ]
        processes.append(subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL))
    assert [process.wait(240) for process in processes] == [0, 0]
    assert "\nthreads: 1\n" in next(tmp_path.glob("*/config.yaml")).read_text()


def test_ranks_that_diverge_name_the_rows_of_the_whole_batch(pcam_dir, tmp_path):
    options = [option for option in SHARDED if not option.startswith("batch_size")]
    diverging = [*options, "batch_size=32", "optimizer=sgd", "lr=1e30"]
    process = under_torchrun(2, "--runs", tmp_path, f"data_dir={pcam_dir}", *diverging)
    process.communicate(timeout=240)
    (run,) = tmp_path.iterdir()
    summary = read_json(run / "summary.json")
    assert summary["status"] == "diverged"
    assert len(set(summary["diverged_rows"])) == 32


def test_ranks_that_cannot_share_the_shards_equally_are_refused(pcam_dir, tmp_path):
    environment = {"RANK": "0", "WORLD_SIZE": "8", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}
    command = [
        sys.executable,
        "train.py",
        "--runs",
        str(tmp_path),
        f"data_dir={pcam_dir}",
        *SHARDED,
    ]
    result = subprocess.run(
        command,
        cwd=REPOSITORY,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (
        result.returncode == 2
        and "8 ranks cannot share out 4 shards" in result.stderr
        and not list(tmp_path.iterdir())
    )
