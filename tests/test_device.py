"""The device and the machine: chosen or refused by name, counted as the job was given them, and
described well enough to repeat a run.
"""

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
from lib.machine import memory_limit_bytes

HAS_GPU = torch.cuda.is_available()
CORES = sorted(os.sched_getaffinity(0))


@pytest.fixture(autouse=True)
def no_job(monkeypatch):
    """No variable of a job or of ranks, and twelve cores, counted without limits."""
    for name in [*os.environ]:
        if name.startswith(("SLURM_", "CUDA_VISIBLE", "LOCAL_")):
            monkeypatch.delenv(name)
    monkeypatch.setattr(machine, "control_groups", list)
    monkeypatch.setattr(machine, "affinity", lambda: set(range(12)))


def test_auto_takes_the_gpu_where_there_is_one_and_ranks_take_gpus_in_turn(monkeypatch):
    assert choose_device("auto") == torch.device("cuda:0" if HAS_GPU else "cpu")
    monkeypatch.setattr(device, "num_gpus", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda _: None)
    for rank, name in enumerate(("cuda:0", "cuda:1", "cuda:0")):
        monkeypatch.setenv("LOCAL_RANK", str(rank))
        assert choose_device("auto") == torch.device(name)


@pytest.mark.parametrize(
    "capability, fast", [("AVX512", "bf16"), ("AVX2", "fp32"), ("DEFAULT", "fp32")]
)
def test_auto_precision_is_bf16_where_the_processor_computes_it_fast(capability, fast, monkeypatch):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    cpu = torch.device("cpu")
    resolved = {}
    for given in ("auto", "bf16", "fp32"):
        cfg = load_config(overrides=[f"precision={given}"])
        resolved[given] = device.resolve_precision(cfg, cpu).precision
    assert resolved == {"auto": fast, "bf16": "bf16", "fp32": "fp32"}, "what is named is trained in"
    assert device.precision_to_predict("bf16", cpu) == fast
    assert device.precision_to_predict("fp32", cpu) == "fp32"


@pytest.mark.skipif(HAS_GPU, reason="needs a machine without a GPU that torch can use")
def test_a_gpu_that_was_given_but_cannot_be_used_is_said(monkeypatch, capsys):
    monkeypatch.setattr(device, "nvidia_smi", lambda _field: "unknown (no such program)")
    for variable, is_said in (("", False), ("SLURM_JOB_GPUS", True)):
        device.warn_of_unusable_gpu.cache_clear()
        if variable:
            monkeypatch.setenv(variable, "0")
        choose_device("auto")
        assert (f"({variable}=0)" in capsys.readouterr().err) == is_said
    with pytest.raises(BadInput, match=f"torch {torch.__version__}".replace("+", ".")):
        choose_device("cuda")


@pytest.mark.parametrize("name", ["", "gpu", "cuda:-1", "cuda:99"])
def test_a_device_that_is_not_there_is_refused_in_one_sentence(name):
    with pytest.raises(BadInput, match=f"^--device {name}: [^\n]*$"):
        choose_device(name)


@pytest.mark.parametrize("name", ["memory.max", "memory.limit_in_bytes"])
def test_the_least_memory_limit_of_the_control_groups_counts(name, monkeypatch, tmp_path):
    monkeypatch.setattr(machine, "control_groups", lambda: [tmp_path, tmp_path / "gone"])
    (tmp_path / name).write_text("70000000\n")
    assert memory_limit_bytes() == 70000000
    for text in ("max", str(2**63 - 4096)):  # no limit, in the words of both versions
        (tmp_path / name).write_text(text)
        assert memory_limit_bytes() > 70000000


@pytest.mark.parametrize(
    "quota, variables, num_processes, threads",
    [
        ("max", "SLURM_CPUS_PER_TASK=", 1, 12),
        ("750000 100000", "", 1, 7),
        ("50000 100000", "", 1, 1),
        ("max 100000", "SLURM_CPUS_PER_TASK=4", 1, 4),
        ("max", "SLURM_CPUS_PER_TASK=16", 1, 12),
        ("max", "LOCAL_WORLD_SIZE=2", 1, 6),
        # srun counts for each task
        ("max", "SLURM_CPUS_PER_TASK=4 SLURM_STEP_NUM_TASKS=2", 1, 4),
        ("max", "", 13, 1),
    ],
)
def test_threads_0_are_the_cores_that_the_job_was_given(
    quota, variables, num_processes, threads, monkeypatch, tmp_path
):
    (tmp_path / "cpu.max").write_text(quota)
    monkeypatch.setattr(machine, "control_groups", lambda: [tmp_path])
    for pair in variables.split():
        monkeypatch.setenv(*pair.split("="))
    for number, expected in ((0, threads), (3, 3)):
        cfg = load_config(overrides=[f"threads={number}"])
        assert machine.resolve_threads(cfg, num_processes).threads == expected


@pytest.mark.skipif(len(CORES) < 2, reason="one core is used by one thread at least")
def test_cores_that_others_use_are_noted_in_one_line_with_a_remedy(monkeypatch, capsys):
    monkeypatch.setattr(machine, "affinity", lambda: {*CORES[:2]})
    code = "import os\nos.sched_setaffinity(0, [{}])\nwhile True: pass"
    busy = [subprocess.Popen([sys.executable, "-c", code.format(core)]) for core in CORES[:2]]
    time.sleep(0.3)
    started_at, busy_s = time.monotonic(), machine.others_busy_s()
    time.sleep(0.3)
    machine.note_busy_cores(2, started_at, busy_s)
    assert machine.cores_used_by_others(busy_s, started_at) > 1.2
    for process in busy:
        process.kill()
        process.wait()
    note = capsys.readouterr().err
    assert note.count("\n") == 1 and "threads=1" in note
