"""Where the computing happens: the device and its number type."""

import dataclasses
import functools
import os
import re
import warnings

import torch

from lib.command import BadInput, one_line, say
from lib.config import Config
from lib.machine import nvidia_smi, read_count

NO_GPU = ("", "-1", "NoDevFiles")  # in CUDA_VISIBLE_DEVICES; Slurm sets the last one


def choose_device(name: str = "auto") -> torch.device:
    """The device `cpu`, `cuda` or `cuda:N`. `auto` is a GPU if there is one, another for each rank
    of a machine, in turn. Raises BadInput for a device that is not there.
    """
    num = num_gpus()
    if name == "auto":
        local_rank = read_count("LOCAL_RANK", read_count("SLURM_LOCALID", 0))
        name = f"cuda:{local_rank % num}" if num else "cpu"
        if not num and local_rank == 0:
            warn_of_unusable_gpu()
    if name == "cpu":
        return torch.device("cpu")
    if not re.fullmatch(r"cuda(:\d+)?", name):
        raise BadInput(f"--device {name}: allowed are auto, cpu, cuda and cuda:N")
    index = int(name.partition(":")[2] or 0)
    if index >= num:
        reason = "" if num else f" ({why_no_gpu()})"
        raise BadInput(f"--device {name}: there are {num} CUDA devices for torch here{reason}")
    torch.cuda.set_device(index)
    return torch.device("cuda", index)


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
    return f"torch {torch.__version__}: {reason}"


@functools.cache
def warn_of_unusable_gpu() -> None:
    """Warn, once, that torch cannot use the GPU that this job was given, or that nvidia-smi lists:
    a CPU takes hours for what a GPU does in minutes.
    """
    gpu = nvidia_smi("name")
    for name in ("SLURM_JOB_GPUS", "CUDA_VISIBLE_DEVICES"):
        value = os.environ.get(name, "")
        if value not in NO_GPU:
            gpu = f"{name}={value}"
    if gpu and not gpu.startswith(("unknown", "No devices")):
        say(f"warning: there is a GPU ({gpu}), but none for {why_no_gpu()}; this uses the CPU")


def fast_precision(device: torch.device) -> str:
    """`bf16` where a device computes it faster than float32: a GPU with bf16 units, or an x86
    processor with AVX-512. Elsewhere it is `fp32`: bf16 would be emulated, many times more slowly.
    """
    if device.type == "cuda":
        has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        has_bf16 = torch.backends.cpu.get_cpu_capability() == "AVX512"
    return "bf16" if has_bf16 else "fp32"


def resolve_precision(cfg: Config, device: torch.device) -> Config:
    """`cfg` with `precision: auto` replaced by what is fast on the device."""
    if cfg.precision != "auto":
        return cfg
    return dataclasses.replace(cfg, precision=fast_precision(device))


def precision_to_predict(precision: str, device: torch.device) -> str:
    """The precision in which a device predicts with a model that was trained in `precision`: equal
    up to rounding, and float32 where bf16 is slow.
    """
    return precision if fast_precision(device) == "bf16" else "fp32"


def input_dtype(precision: str) -> torch.dtype:
    """The type in which patches enter a model."""
    return torch.bfloat16 if precision == "bf16" else torch.float32


def layer_precision(device: torch.device, precision: str):
    """The context in which layers compute: autocast for `bf16` and for `fp16`, which only
    benchmark.py uses, or one without effect for `fp32`.
    """
    dtype = torch.float16 if precision == "fp16" else torch.bfloat16
    return torch.autocast(device.type, dtype, enabled=precision != "fp32")
