"""Where the computing happens: the device and its number type."""

import contextlib
import re
import warnings

import torch

from lib.command import BadInput, one_line
from lib.machine import read_count


def choose_device(name: str = "auto") -> torch.device:
    """The device `cpu`, `cuda` or `cuda:N`. `auto` is a GPU if there is one, another for each rank
    of a machine, in turn. Raises BadInput for a device that is not there.
    """
    num = num_gpus()
    if name == "auto":
        local_rank = read_count("LOCAL_RANK", read_count("SLURM_LOCALID", 0))
        name = f"cuda:{local_rank % num}" if num else "cpu"
    if name == "cpu":
        return torch.device("cpu")
    if not re.fullmatch(r"cuda(:\d+)?", name):
        raise BadInput(f"--device {name}: allowed are auto, cpu, cuda and cuda:N")
    index = int(name.partition(":")[2] or 0)
    if index >= num:
        reason = "" if num else f", to {why_no_gpu()} (use --device cpu)"
        raise BadInput(f"--device {name}: this machine offers {num} CUDA devices{reason}")
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


def input_dtype(precision: str) -> torch.dtype:
    """The type in which patches enter a model."""
    return torch.bfloat16 if precision == "bf16" else torch.float32


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
