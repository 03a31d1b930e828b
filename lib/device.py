"""Where the computing happens: the device, its number type, and what the machine is."""

import contextlib
import ctypes
import dataclasses
import functools
import os
import platform
import subprocess
import warnings
from pathlib import Path

import torch

from lib.command import BadInput, one_line, say
from lib.config import Config

NO_GPU = ("", "-1", "NoDevFiles")  # in CUDA_VISIBLE_DEVICES; Slurm sets the last one


def choose_device(name: str = "auto") -> torch.device:
    """`auto` takes a GPU if there is one, each rank of a machine its own. Raises BadInput for a
    device that is not there.
    """
    if name == "auto":
        local_rank = int(os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", 0)))
        name = device_of_rank(local_rank, num_gpus())
        if local_rank == 0:
            warn_of_unusable_gpu()
    try:
        device = torch.device(name)
    except RuntimeError:
        raise BadInput(
            f"--device {name}: unknown, allowed are auto, cpu, cuda and cuda:N"
        ) from None
    if device.type == "cuda":
        if not num_gpus():
            raise BadInput(
                f"--device {name}: this machine offers no CUDA device to {why_no_gpu()} (use"
                " --device cpu)"
            )
        device = torch.device("cuda", device.index or 0)
        if device.index >= num_gpus():
            raise BadInput(f"--device {name}: there are only {num_gpus()} CUDA devices")
        torch.cuda.set_device(device)
    elif device.type != "cpu":
        raise BadInput(f"--device {name}: allowed are auto, cpu, cuda and cuda:N")
    return device


def device_of_rank(local_rank: int, num_gpus: int) -> str:
    """The name of the device of a process that is number 0, 1, ... on its machine: GPUs in turn,
    shared if they are fewer.
    """
    return f"cuda:{local_rank % num_gpus}" if num_gpus else "cpu"


def num_gpus() -> int:
    """The GPUs that torch can use."""
    # of an old driver, which why_no_gpu tells in one line
    with warnings.catch_warnings(action="ignore"):
        return torch.cuda.device_count() if torch.cuda.is_available() else 0


def why_no_gpu() -> str:
    """torch's version and build, and the reason why it can use no GPU."""
    build = f"torch {torch.__version__}"
    if torch.version.cuda is None:
        return f"{build}: it is built without CUDA"
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible in NO_GPU:
        return f"{build}: CUDA_VISIBLE_DEVICES={visible} hides every GPU"
    reason = "it finds none"
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        reason = one_line(error).partition(". ")[0]
    return f"{build}, built for CUDA {torch.version.cuda}: {reason}"


def given_gpu() -> str:
    """What says that this process has a GPU: a variable of its job, or nvidia-smi; empty if nothing
    does.
    """
    for name in ("SLURM_JOB_GPUS", "SLURM_GPUS_ON_NODE", "CUDA_VISIBLE_DEVICES"):
        value = os.environ.get(name, "")
        if value not in NO_GPU:
            return f"{name}={value}"
    gpu = _nvidia_smi("name")
    return "" if not gpu or gpu.startswith(("unknown", "No devices")) else f"nvidia-smi lists {gpu}"


@functools.cache
def warn_of_unusable_gpu() -> None:
    """Say, once, that torch cannot use the GPU that this process has, and why: the CPU takes hours
    for what a GPU does.
    """
    if num_gpus():
        return
    evidence = given_gpu()
    if evidence:
        say(
            f"warning: there is a GPU ({evidence}), but none for {why_no_gpu()}; this computes on"
            " the CPU"
        )


def keep_freed_memory(keep: bool = True) -> None:
    """Whether the C library keeps what a step frees for the next one (glibc's mallopt).

    By default it hands large blocks back, so that the kernel has to clear the pages of every
    activation anew; what that costs on a machine, `memory_returned` of benchmark.py train tells. A
    platform with another C library is left as it is.
    """
    m_trim_threshold, m_mmap_max = -1, -4
    with contextlib.suppress(AttributeError, OSError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(m_mmap_max, 0 if keep else 65536)
        mallopt(m_trim_threshold, 2**31 - 1 if keep else 128 * 1024)


def layer_precision(device: torch.device, precision: str):
    """The context in which layers compute: autocast to bfloat16 or, which no config offers,
    float16; or plain float32.
    """
    if precision == "fp32":
        return contextlib.nullcontext()
    return torch.autocast(device.type, {"bf16": torch.bfloat16, "fp16": torch.float16}[precision])


def control_groups() -> list[Path]:
    """Folders of this process's control groups and of all above them: a job's limit may stand above
    the group of its step.
    """
    folders = []
    with contextlib.suppress(OSError):
        # number:controllers:path; version 2 names none
        for line in Path("/proc/self/cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            top = Path("/sys/fs/cgroup", controllers)
            group = top / path.lstrip("/")
            folders += [folder for folder in (group, *group.parents) if folder.is_relative_to(top)]
    return folders


def control_group_limits() -> dict:
    """The processors and the memory that the control groups, of version 2 or 1, leave to this
    process; None: no limit.
    """
    cpus, memory = [], []
    for folder in control_groups():
        with contextlib.suppress(OSError, ValueError):  # `max` and -1 are no limit
            quota, period = (folder / "cpu.max").read_text().split()
            cpus.append(int(quota) / int(period))
        with contextlib.suppress(OSError, ValueError):
            quota, period = (
                int((folder / f"cpu.cfs_{name}_us").read_text()) for name in ("quota", "period")
            )
            cpus += [quota / period] if quota > 0 else []
        for name in ("memory.max", "memory.limit_in_bytes"):
            with contextlib.suppress(OSError, ValueError):
                memory.append(int((folder / name).read_text()))
    physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    least = min(memory, default=physical)
    return {
        "cgroup_cpus": min(cpus, default=None),
        "cgroup_memory_bytes": least if least < physical else None,
    }


def memory_limit_bytes() -> int:
    """Memory that this process may still take: what the machine has free, or what its control group
    leaves.
    """
    free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
    with contextlib.suppress(OSError, StopIteration, ValueError):
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = (
            int(next(line for line in lines if line.startswith("MemAvailable")).split()[1]) * 1024
        )
    for folder in control_groups():
        for used, most, cached in (
            ("memory.current", "memory.max", "inactive_file"),
            ("memory.usage_in_bytes", "memory.limit_in_bytes", "total_inactive_file"),
        ):
            # what files have left in memory goes when it is needed
            with contextlib.suppress(OSError, ValueError):
                cache = dict(
                    line.split() for line in (folder / "memory.stat").read_text().splitlines()
                ).get(cached, 0)
                free = min(
                    free,
                    int((folder / most).read_text())
                    - int((folder / used).read_text())
                    + int(cache),
                )
    return max(free, 0)


def free_device_bytes(device: torch.device) -> int:
    """Free memory of a CUDA device, 0 for the CPU."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else 0


def num_cores() -> int:
    """The processor cores that this process was given: by its affinity mask, its control groups and
    its Slurm task.
    """
    limits = [len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()]
    quota = control_group_limits()["cgroup_cpus"]
    if quota is not None:
        limits.append(int(quota))
    if "SLURM_CPUS_PER_TASK" in os.environ:
        limits.append(int(os.environ["SLURM_CPUS_PER_TASK"]))
    return max(min(limits), 1)


def resolve_threads(cfg: Config, num_processes: int = 1) -> Config:
    """`cfg` with `threads: 0` replaced by the cores for each of so many processes, and of
    torchrun's ranks on this machine.

    A rank that srun starts has cores of its own.
    """
    if cfg.threads:
        return cfg
    num_processes *= int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return dataclasses.replace(cfg, threads=max(num_cores() // num_processes, 1))


def describe_machine(device: torch.device) -> dict:
    """What a reader needs in order to repeat a run elsewhere: processor, memory, accelerator,
    driver, system.
    """
    cpu = platform.processor() or platform.machine()
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next(line for line in lines if line.startswith("model name")).split(":", 1)[1].strip()
    machine = {
        "host": platform.node(),
        "system": platform.platform(),
        "cpu": cpu,
        "num_cores": num_cores(),
    }
    machine |= {"cpu_capability": torch.backends.cpu.get_cpu_capability()}
    machine |= {
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "device": str(device),
    }
    if device.type == "cuda":
        gpu = torch.cuda.get_device_properties(device)
        machine |= {
            "gpu": gpu.name,
            "gpu_memory_bytes": gpu.total_memory,
            "num_multiprocessors": gpu.multi_processor_count,
        }
        machine |= {"cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()}
        machine |= {"driver": _nvidia_smi("driver_version"), "mig": "MIG" in gpu.name}
    return machine


def _nvidia_smi(field: str) -> str:
    try:
        command = ["nvidia-smi", f"--query-gpu={field}", "--format=csv,noheader"]
        return (
            subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
            .stdout.split("\n")[0]
            .strip()
        )
    except (OSError, subprocess.SubprocessError) as error:
        return f"unknown ({one_line(error)})"
