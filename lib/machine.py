"""What this process was given of the machine, what others use of it, and what the machine is."""

import contextlib
import ctypes
import dataclasses
import os
import platform
import subprocess
import time
from pathlib import Path

import torch

from lib.command import BadInput, one_line, say
from lib.config import Config


def read_count(name: str, default: int) -> int:
    """The number in an environment variable, which Slurm or torchrun sets; `default` where it is
    missing or empty.
    """
    value = os.environ.get(name) or str(default)
    if not value.isdecimal():
        raise BadInput(f"{name}={value} is no number: `env -u {name} ...` goes on without it")
    return int(value)


def keep_freed_memory() -> None:
    """Let the C library keep memory that a step frees for the next step (glibc's mallopt).

    By default glibc returns large blocks to the kernel, which then clears the pages of every
    activation anew. Another C library is left as it is.
    """
    m_trim_threshold, m_mmap_max = -1, -4  # numbers in malloc.h
    with contextlib.suppress(AttributeError, OSError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(m_mmap_max, 0)
        mallopt(m_trim_threshold, 2**31 - 1)


def _read_lines(path) -> list[str]:
    """The lines of a file that the kernel writes; none where it does not."""
    try:
        return Path(path).read_text().splitlines()
    except OSError:
        return []


def control_groups() -> list[Path]:
    """The folders of this process's control groups and all folders above them: a job's limit may
    be set above the group of its step.
    """
    folders = []
    for line in _read_lines("/proc/self/cgroup"):
        _, controllers, group = line.split(":", 2)  # version 2 names no controllers
        folder = Path(f"/sys/fs/cgroup/{controllers}/{group}")
        folders += [folder, *folder.parents]
    return folders


def _read_limits(name: str) -> list[list[str]]:
    """The words of the file `name` of each control group that sets a limit in it."""
    limits = []
    for folder in control_groups():
        limits += [line.split() for line in _read_lines(folder / name)]
    return [words for words in limits if words[0] != "max"]


def physical_bytes() -> int:
    """The memory of this machine in bytes."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def memory_limit_bytes() -> int:
    """The bytes that this process may take at most: what the machine has available, or less where
    its control groups allow less. Slurm sets a limit in version 1 of them, or in version 2.
    """
    available = _proc_field("meminfo", "MemAvailable")  # such as `16315340 kB`
    num_bytes = int(available.split()[0]) * 1024 if available else physical_bytes()
    limits = _read_limits("memory.max") + _read_limits("memory.limit_in_bytes")
    return min([num_bytes, *(int(words[0]) for words in limits)])


def _proc_field(file: str, name: str) -> str:
    """The text behind `name:` in a file of /proc; empty on a system without it."""
    for line in _read_lines(Path("/proc", file)):
        field, _, value = line.partition(":")
        if field.strip() == name:
            return value.strip()
    return ""


def affinity() -> set[int]:
    """The numbers of the processor cores on which this process may run."""
    if hasattr(os, "sched_getaffinity"):
        return os.sched_getaffinity(0)
    return set(range(os.cpu_count()))


def num_cores() -> int:
    """The processor cores that this process was given: by its affinity mask, its control groups and
    its Slurm task.
    """
    cores = len(affinity())
    quotas = [int(quota) / int(period) for quota, period in _read_limits("cpu.max")]
    return max(int(min(cores, read_count("SLURM_CPUS_PER_TASK", cores), *quotas)), 1)


def resolve_threads(cfg: Config, num_processes: int = 1) -> Config:
    """`cfg` with `threads: 0` replaced by the number of cores for each process.

    The cores are shared by `num_processes`, times the ranks that torchrun started on this machine.
    A rank that srun started has cores of its own.
    """
    if cfg.threads:
        return cfg
    num_processes *= max(read_count("LOCAL_WORLD_SIZE", 1), 1)
    return dataclasses.replace(cfg, threads=max(num_cores() // num_processes, 1))


def others_busy_s() -> float:
    """The seconds of computing by other processes on this process's cores since the machine
    started. The time of this process, and of its children that have ended, is subtracted. A system
    without /proc/stat counts none.
    """
    names = {f"cpu{core}" for core in affinity()}
    num_ticks = 0
    for line in _read_lines("/proc/stat"):
        name, *ticks = line.split()
        if name in names:
            num_ticks += sum(map(int, ticks[:3]))  # user, nice, system
    return num_ticks / os.sysconf("SC_CLK_TCK") - sum(os.times()[:4])


def cores_used_by_others(busy_s: float, started_at: float) -> float:
    """The mean number of this process's cores that others have used since `started_at`, a time of
    time.monotonic(). `busy_s` is what others_busy_s() gave at that time.
    """
    return max(0.0, others_busy_s() - busy_s) / (time.monotonic() - started_at)


def note_busy_cores(threads: int, started_at: float, busy_s: float) -> None:
    """Print a note where other processes use some of the cores that `threads` threads need, and
    name a number of threads that is faster. `started_at` and `busy_s` are those of
    `cores_used_by_others`.
    """
    num_busy = cores_used_by_others(busy_s, started_at)
    num_all = len(affinity())
    num_free = max(round(num_all - num_busy), 1)
    if num_free < min(threads, num_all):
        say(
            f"note: others use about {num_busy:.1f} of the {num_all} cores of this run;"
            f" threads={num_free} is faster then"
        )


def describe_machine(device: torch.device) -> dict:
    """What a reader needs in order to repeat a run elsewhere: processor, memory, accelerator,
    driver, system.
    """
    machine = {
        "host": platform.node(),
        "system": platform.platform(),
        "cpu": _proc_field("cpuinfo", "model name") or platform.machine(),
        "num_cores": num_cores(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "memory_bytes": physical_bytes(),
        "device": str(device),
    }
    if device.type != "cuda":
        return machine
    gpu = torch.cuda.get_device_properties(device)
    return machine | {
        "gpu": gpu.name,
        "gpu_memory_bytes": gpu.total_memory,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "driver": nvidia_smi("driver_version"),
    }


def nvidia_smi(field: str) -> str:
    """A field of the first GPU that nvidia-smi lists, or `unknown` with the reason."""
    command = ["nvidia-smi", f"--query-gpu={field}", "--format=csv,noheader"]
    try:
        output = subprocess.check_output(command, stderr=subprocess.DEVNULL, text=True, timeout=10)
    except (OSError, subprocess.SubprocessError) as error:
        return f"unknown ({one_line(error)})"
    return output.partition("\n")[0]
