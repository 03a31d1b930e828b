"""The device: chosen or refused by name, and described well enough to repeat a run."""

import contextlib
import json
import os
import subprocess
import sys
import time

import pytest
import torch

from lib import device, machine
from lib.command import BadInput
from lib.config import load_config
from lib.device import choose_device
from lib.machine import control_group_limits, describe_machine, memory_limit_bytes

HAS_GPU = torch.cuda.is_available()
CORES = sorted(os.sched_getaffinity(0))
needs_no_gpu = pytest.mark.skipif(HAS_GPU, reason="torch can use the GPU of this machine")


@pytest.fixture(autouse=True)
def no_job(monkeypatch):
    """No variable of a job or of ranks, and twelve cores, counted without limits."""
    for name in [*os.environ]:
        if name.startswith(("SLURM_", "CUDA_VISIBLE", "LOCAL_")):
            monkeypatch.delenv(name)
    monkeypatch.setattr(machine, "control_groups", list)
    monkeypatch.setattr(machine, "affinity", lambda: set(range(12)))


def test_auto_takes_the_gpu_where_there_is_one():
    assert choose_device("auto") == torch.device("cuda:0" if HAS_GPU else "cpu")
    assert choose_device("cpu").type == "cpu"


@pytest.mark.parametrize("name", ["", "gpu", "mps", "cuda:-1", "cuda:99", "CPU"])
def test_a_device_that_is_not_there_is_refused_in_one_sentence(name):
    with pytest.raises(BadInput, match=f"^--device {name}: [^\n]*$"):
        choose_device(name)


@pytest.mark.parametrize("name", ["SLURM_CPUS_PER_TASK", "LOCAL_WORLD_SIZE", "LOCAL_RANK"])
def test_a_variable_of_a_job_that_is_no_number_is_named_and_an_empty_one_ignored(name, monkeypatch):
    def use() -> int:
        choose_device("auto")
        return machine.resolve_threads(load_config()).threads

    monkeypatch.setenv(name, "")
    assert use() == 12
    monkeypatch.setenv(name, "4(x2)")
    with pytest.raises(BadInput, match=name):
        use()


@pytest.mark.parametrize("precision, dtype", [("bf16", torch.bfloat16), ("fp32", torch.float32)])
def test_bf16_computes_layers_in_bf16_and_fp32_leaves_them(precision, dtype):
    with device.layer_precision(torch.device("cpu"), precision):
        assert torch.nn.Linear(4, 4)(torch.ones(1, 4)).dtype == dtype


@pytest.mark.parametrize("has_proc", [True, False])
def test_the_machine_is_described_in_plain_json_and_has_memory(has_proc, monkeypatch):
    if not has_proc:
        monkeypatch.setattr(machine, "_proc_field", lambda *_: "")
    description = describe_machine(choose_device("auto"))
    assert json.loads(json.dumps(description)) == description and ("gpu" in description) == HAS_GPU
    assert None not in description.values() and "" not in description.values()
    assert 0 < memory_limit_bytes() <= description["memory_bytes"]


@pytest.mark.parametrize("name", ["memory.max", "memory.limit_in_bytes"])
def test_the_least_memory_limit_of_the_control_groups_counts(name, monkeypatch, tmp_path):
    groups = [tmp_path / "step", tmp_path / "job", tmp_path / "gone"]
    monkeypatch.setattr(machine, "control_groups", lambda: groups)
    for folder, limit in zip(groups, ["max", "70000000"], strict=False):
        folder.mkdir()
        (folder / name).write_text(f"{limit}\n")
    assert control_group_limits()["cgroup_memory_bytes"] == memory_limit_bytes() == 70000000
    (groups[1] / name).write_text(str(2**63 - 4096))  # no limit, in the words of version 1
    assert control_group_limits()["cgroup_memory_bytes"] is None


@pytest.mark.parametrize(
    "quota, variables, num_processes, threads",
    [
        ("max", {}, 1, 12),
        ("750000 100000", {}, 1, 7),
        ("50000 100000", {}, 1, 1),
        ("max 100000", {"SLURM_CPUS_PER_TASK": "4"}, 1, 4),
        ("max", {"SLURM_CPUS_PER_TASK": "16"}, 1, 12),
        ("max", {"LOCAL_WORLD_SIZE": "2"}, 1, 6),
        # srun counts for each task
        ("max", {"SLURM_CPUS_PER_TASK": "4", "SLURM_STEP_NUM_TASKS": "2"}, 1, 4),
        ("max", {}, 5, 2),
        ("max", {}, 13, 1),
    ],
)
def test_threads_0_are_the_cores_that_the_job_was_given(
    quota, variables, num_processes, threads, monkeypatch, tmp_path
):
    (tmp_path / "cpu.max").write_text(quota)
    monkeypatch.setattr(machine, "control_groups", lambda: [tmp_path])
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    for number, expected in ((0, threads), (3, 3)):
        cfg = load_config(overrides=[f"threads={number}"])
        assert machine.resolve_threads(cfg, num_processes).threads == expected


def test_processes_of_a_machine_take_its_gpus_in_turn():
    devices = [device.device_of_rank(rank, 2) for rank in range(4)]
    assert devices == ["cuda:0", "cuda:1"] * 2
    assert device.device_of_rank(1, 0) == "cpu"


@needs_no_gpu
@pytest.mark.parametrize(
    "variables, gpu, evidence",
    [
        ({"SLURM_JOB_GPUS": "0"}, "", "SLURM_JOB_GPUS=0"),
        ({"SLURM_JOB_GPUS": "3", "CUDA_VISIBLE_DEVICES": ""}, "", "SLURM_JOB_GPUS=3"),
        ({"CUDA_VISIBLE_DEVICES": "0"}, "", "CUDA_VISIBLE_DEVICES=0"),
        ({}, "NVIDIA A100", "NVIDIA A100"),
        ({}, "No devices were found", ""),
    ],
)
def test_a_gpu_that_torch_cannot_use_is_told_of_once_with_the_reason(
    variables, gpu, evidence, monkeypatch, tmp_path, capsys
):
    smi = tmp_path / "nvidia-smi"
    smi.write_text(f"#!/bin/sh\necho {gpu}\n")
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    device.warn_of_unusable_gpu.cache_clear()
    assert [choose_device("auto").type for _ in range(2)] == ["cpu", "cpu"]
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == bool(evidence)
    for line in lines:
        assert evidence in line and device.why_no_gpu() in line


@needs_no_gpu
def test_a_variable_that_hides_the_gpus_is_the_reason_why_there_is_none(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with pytest.raises(BadInput, match="CUDA_VISIBLE_DEVICES= hides"):
        choose_device("cuda")


@contextlib.contextmanager
def kept_busy(cores):
    """One process that computes on each of these cores."""
    code = "import os\nos.sched_setaffinity(0, [{}])\nwhile True: pass"
    processes = [subprocess.Popen([sys.executable, "-c", code.format(core)]) for core in cores]
    time.sleep(0.3)
    yield
    for process in processes:
        process.kill()
        process.wait()


def watch_cores(threads: int, spin_s: float) -> float:
    """Compute for a while, then note; the cores that others used meanwhile."""
    started_at, busy_s = time.monotonic(), machine.others_busy_s()
    while time.monotonic() < started_at + spin_s:
        pass
    machine.note_busy_cores(threads, started_at, busy_s)
    return (machine.others_busy_s() - busy_s) / (time.monotonic() - started_at)


@pytest.mark.skipif(len(CORES) < 2, reason="one core is used by one thread at least")
def test_cores_that_others_use_are_noted_in_one_line_with_a_remedy(monkeypatch, capsys):
    monkeypatch.setattr(machine, "affinity", lambda: set(CORES[:2]))
    with kept_busy(CORES[:2]):
        assert watch_cores(2, 0) > 1.5
    note = capsys.readouterr().err
    assert note.count("\n") == 1 and "threads=1" in note


def test_what_this_process_and_other_cores_do_is_not_noted(monkeypatch, capsys):
    """Own use and that of others fill the one core at most."""
    monkeypatch.setattr(machine, "affinity", lambda: {CORES[0]})
    os.sched_setaffinity(0, CORES[:1])
    own_s, started_at = time.process_time(), time.monotonic()
    try:
        with kept_busy(CORES[1:2]):
            num_others = watch_cores(2, 0.6)
            num_own = (time.process_time() - own_s) / (time.monotonic() - started_at)
    finally:
        os.sched_setaffinity(0, CORES)
    assert num_others + num_own < 1.2
    assert capsys.readouterr().err == ""


def test_nothing_is_noted_where_the_system_does_not_say(monkeypatch, capsys):
    monkeypatch.setattr(machine, "affinity", lambda: {10**6, 10**6 + 1})
    watch_cores(64, 0)
    assert capsys.readouterr().err == ""
