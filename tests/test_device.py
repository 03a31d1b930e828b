"""The device: chosen or refused by name, and described well enough to repeat a run."""

import json
import os

import pytest
import torch

from lib import device
from lib.command import BadInput
from lib.config import load_config
from lib.device import (
    choose_device,
    describe_machine,
    free_device_bytes,
    layer_precision,
    memory_limit_bytes,
)

HAS_GPU = torch.cuda.is_available()


@pytest.fixture(autouse=True)
def no_job(monkeypatch):
    """No variable of a job or of ranks, and all cores of this machine, counted without limits."""
    for name in [*os.environ]:
        if name.startswith(("SLURM_", "CUDA_VISIBLE", "LOCAL_")):
            monkeypatch.delenv(name)
    monkeypatch.setattr(device, "control_groups", list)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _pid: set(range(12)))


def test_auto_takes_the_gpu_where_there_is_one():
    assert choose_device("auto") == torch.device("cuda:0" if HAS_GPU else "cpu")
    assert choose_device("cpu").type == "cpu"


@pytest.mark.parametrize(
    "name", ["", "gpu", "meta", "mps", "cuda:-1", "cuda:99", "CPU", *([] if HAS_GPU else ["cuda"])]
)
def test_a_device_that_is_not_there_is_refused_in_one_sentence(name):
    with pytest.raises(BadInput, match=f"^--device {name}: [^\n]*$"):
        choose_device(name)


@pytest.mark.parametrize("name", ["SLURM_CPUS_PER_TASK", "LOCAL_WORLD_SIZE", "LOCAL_RANK"])
def test_a_variable_of_a_job_that_is_no_number_is_named_and_an_empty_one_ignored(name, monkeypatch):
    def use() -> int:
        choose_device("auto")
        return device.resolve_threads(load_config()).threads

    monkeypatch.setenv(name, "")
    assert use() == 12
    monkeypatch.setenv(name, "4(x2)")
    with pytest.raises(BadInput, match=name):
        use()


def test_bf16_computes_layers_in_bf16_and_fp32_leaves_them():
    layer = torch.nn.Linear(4, 4)
    for precision, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
        with layer_precision(torch.device("cpu"), precision):
            assert layer(torch.ones(1, 4)).dtype == dtype


def test_the_machine_is_described_in_plain_json_and_has_memory():
    machine = describe_machine(choose_device("auto"))
    assert json.loads(json.dumps(machine)) == machine and ("gpu" in machine) == HAS_GPU
    assert None not in machine.values() and "" not in machine.values()
    assert 0 < memory_limit_bytes() <= machine["memory_bytes"]
    assert free_device_bytes(torch.device("cpu")) == 0


@pytest.mark.parametrize("name", ["memory.max", "memory.limit_in_bytes"])
def test_the_least_memory_limit_of_the_control_groups_counts(name, monkeypatch, tmp_path):
    groups = [tmp_path / "step", tmp_path / "job", tmp_path / "gone"]
    monkeypatch.setattr(device, "control_groups", lambda: groups)
    for folder, limit in zip(groups, ["max", "70000000"], strict=False):
        folder.mkdir()
        (folder / name).write_text(f"{limit}\n")
    assert device.control_group_limits()["cgroup_memory_bytes"] == memory_limit_bytes() == 70000000
    (groups[1] / name).write_text(str(2**63 - 4096))  # no limit, in the words of version 1
    assert device.control_group_limits()["cgroup_memory_bytes"] is None


def test_a_system_without_proc_has_memory_and_a_processor(monkeypatch):
    monkeypatch.setattr(device, "_proc_field", lambda *_: "")
    assert memory_limit_bytes() > 0 and describe_machine(torch.device("cpu"))["cpu"]


@pytest.mark.parametrize(
    "quota, variables, num_processes, threads",
    [
        (None, {}, 1, 12),
        ("750000 100000", {}, 1, 7),
        ("50000 100000", {}, 1, 1),
        ("max 100000", {"SLURM_CPUS_PER_TASK": "4"}, 1, 4),
        (None, {"SLURM_CPUS_PER_TASK": "16"}, 1, 12),
        (None, {"LOCAL_WORLD_SIZE": "2"}, 1, 6),
        # srun counts for each task
        (None, {"SLURM_CPUS_PER_TASK": "4", "SLURM_STEP_NUM_TASKS": "2"}, 1, 4),
        (None, {}, 5, 2),
        (None, {}, 13, 1),
    ],
)
def test_threads_0_are_the_cores_that_the_job_was_given(
    quota, variables, num_processes, threads, monkeypatch, tmp_path
):
    if quota:
        (tmp_path / "cpu.max").write_text(quota)
        monkeypatch.setattr(device, "control_groups", lambda: [tmp_path])
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    of_job, fixed = (load_config(overrides=[f"threads={number}"]) for number in (0, 3))
    assert device.resolve_threads(of_job, num_processes).threads == threads
    assert device.resolve_threads(fixed, num_processes).threads == 3


def test_processes_of_a_machine_take_its_gpus_in_turn():
    devices = [device.device_of_rank(rank, 2) for rank in range(4)]
    assert devices == ["cuda:0", "cuda:1"] * 2
    assert device.device_of_rank(1, 0) == "cpu"


@pytest.mark.skipif(HAS_GPU, reason="torch can use the GPU of this machine")
@pytest.mark.parametrize(
    "variables, evidence, reason",
    [
        ({"SLURM_JOB_GPUS": "0"}, "SLURM_JOB_GPUS=0", ""),
        ({"SLURM_GPUS_ON_NODE": "2"}, "SLURM_GPUS_ON_NODE=2", ""),
        ({"CUDA_VISIBLE_DEVICES": "0"}, "CUDA_VISIBLE_DEVICES=0", ""),
        (
            {"SLURM_JOB_GPUS": "3", "CUDA_VISIBLE_DEVICES": ""},
            "SLURM_JOB_GPUS=3",
            "CUDA_VISIBLE_DEVICES= hides",
        ),
        ({}, "NVIDIA A100", ""),
        (None, "", ""),
    ],
)
def test_a_gpu_that_torch_cannot_use_is_told_of_once_with_the_reason(
    variables, evidence, reason, monkeypatch, tmp_path, capsys
):
    smi = tmp_path / "nvidia-smi"
    smi.write_text(
        f"#!/bin/sh\necho {'No devices were found' if variables is None else 'NVIDIA A100'}\n"
    )
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    for name, value in (variables or {}).items():
        monkeypatch.setenv(name, value)
    device.warn_of_unusable_gpu.cache_clear()
    assert [choose_device("auto").type for _ in range(2)] == ["cpu", "cpu"]
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == bool(evidence)
    for line in lines:
        assert evidence in line and (reason or device.why_no_gpu()) in line
    with pytest.raises(BadInput) as refused:
        choose_device("cuda")
    assert device.why_no_gpu() in str(refused.value)


@pytest.mark.skipif(HAS_GPU, reason="torch can use the GPU of this machine")
def test_a_build_without_cuda_is_the_reason(monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", None)
    with pytest.raises(BadInput, match="without CUDA"):
        choose_device("cuda")
