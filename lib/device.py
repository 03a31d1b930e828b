"""Where the computing happens: the device and its number type."""

import contextlib
import functools
import os
import re
import warnings

import torch

from lib.command import BadInput, one_line, say
from lib.machine import nvidia_smi, read_count

NO_GPU = ("", "-1", "NoDevFiles")  # in CUDA_VISIBLE_DEVICES; Slurm sets the last one


def choose_device(name: str = "auto") -> torch.device:
    """The device `cpu`, `cuda` or `cuda:N`. `auto` is a GPU if there is one, another for each rank
    of a machine. Raises BadInput for a device that is not there.
    """
    if name == "auto":
        local_rank = read_count("LOCAL_RANK", read_count("SLURM_LOCALID", 0))
        name = device_of_rank(local_rank, num_gpus())
        if local_rank == 0:
            warn_of_unusable_gpu()
    if name == "cpu":
        return torch.device("cpu")
    if not re.fullmatch(r"cuda(:\d+)?", name):
        raise BadInput(f"--device {name}: allowed are auto, cpu, cuda and cuda:N")
    index = int(name.partition(":")[2] or 0)
    if index >= num_gpus():
        reason = f"there are only {num_gpus()} CUDA devices"
        if not num_gpus():
            reason = f"this machine offers no CUDA device to {why_no_gpu()} (use --device cpu)"
        raise BadInput(f"--device {name}: {reason}")
    torch.cuda.set_device(index)
    return torch.device("cuda", index)


def device_of_rank(local_rank: int, num_gpus: int) -> str:
    """The name of the device for process number `local_rank` of its machine. Processes take the
    GPUs in turn, and share them if there are fewer GPUs.
    """
    return f"cuda:{local_rank % num_gpus}" if num_gpus else "cpu"


def num_gpus() -> int:
    """The GPUs that torch can use."""
    # an old driver warns at length; why_no_gpu gives the reason in one line
    with warnings.catch_warnings(action="ignore"):
        return torch.cuda.device_count() if torch.cuda.is_available() else 0


def why_no_gpu() -> str:
    """torch's version, and why torch can use no GPU: `torch VERSION: REASON`."""
    reason = "it finds none"
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        reason = one_line(error).partition(". ")[0]
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible in NO_GPU:
        reason = f"CUDA_VISIBLE_DEVICES={visible} hides every GPU"
    return f"torch {torch.__version__}: {reason}"


@functools.cache
def warn_of_unusable_gpu() -> None:
    """Warn, once, that torch cannot use the GPU that this process has, and why: a CPU takes hours
    for what a GPU does in minutes. The job's variables or nvidia-smi tell that there is a GPU.
    """
    if num_gpus():
        return
    evidence = ""
    for name in ("CUDA_VISIBLE_DEVICES", "SLURM_JOB_GPUS"):
        value = os.environ.get(name, "")
        if value not in NO_GPU:
            evidence = f"{name}={value}"
    if not evidence:
        gpu = nvidia_smi("name")
        if not gpu or gpu.startswith(("unknown", "No devices")):
            return
        evidence = f"nvidia-smi lists {gpu}"
    say(f"warning: there is a GPU ({evidence}), but none for {why_no_gpu()}; this uses the CPU")


def input_dtype(precision: str) -> torch.dtype:
    """The type in which patches enter a model."""
    return torch.bfloat16 if precision == "bf16" else torch.float32


def note_slow_precision(precision: str, device: torch.device) -> None:
    """Print a note where a CPU computes bf16 more slowly than float32: an x86 without AVX-512."""
    capability = torch.backends.cpu.get_cpu_capability()
    if device.type == "cpu" and precision == "bf16" and capability == "AVX2":
        say("note: this CPU has no AVX-512 and computes bf16 slowly; precision=fp32 is faster here")


def layer_precision(device: torch.device, precision: str):
    """The context in which layers compute: autocast for `bf16` and for `fp16`, which only
    benchmark.py uses, or none for `fp32`.
    """
    if precision == "fp32":
        return contextlib.nullcontext()
    return torch.autocast(device.type, {"bf16": torch.bfloat16, "fp16": torch.float16}[precision])


def free_device_bytes(device: torch.device) -> int:
    """The bytes of free memory of a CUDA device; 0 for the CPU."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else 0
