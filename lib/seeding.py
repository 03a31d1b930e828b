"""Randomness as a function of position: a draw depends on the seed and on where it is used, never
on what came before.
"""

import os
import random

# cuBLAS reads this when CUDA starts, so it is set when this module is imported
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import numpy as np
import torch

_SIGNED = 1 << 63


def _signed(value: int) -> int:
    """A 64-bit pattern as the signed integer that torch's int64 holds."""
    return (value + _SIGNED) % (1 << 64) - _SIGNED


# constants of splitmix64, and one for a second round of it
_ADD = _signed(0x9E3779B97F4A7C15)
_MULTIPLY_1 = _signed(0xBF58476D1CE4E5B9)
_MULTIPLY_2 = _signed(0x94D049BB133111EB)
_SECOND_ROUND = _signed(0xD1B54A32D192ED03)


def _shift_right(values, num_bits: int):
    """`values >> num_bits`, filled up with zeros; `>>` repeats the sign of a signed integer."""
    return (values >> num_bits) & ((1 << (64 - num_bits)) - 1)


def _mix(values, wrap=lambda value: value):
    """The finaliser of splitmix64 (Steele et al., OOPSLA 2014) of each int64. Integer arithmetic
    gives the same on every device. A tensor wraps around by itself; a Python int needs `wrap`.
    """
    values = wrap(values + _ADD)
    values = wrap((values ^ _shift_right(values, 30)) * _MULTIPLY_1)
    values = wrap((values ^ _shift_right(values, 27)) * _MULTIPLY_2)
    return values ^ _shift_right(values, 31)


def mix_position(*position: int) -> int:
    """A position such as (seed, epoch, purpose) hashed to one signed number of 64 bits.

    It is a Python int, which a GPU gets as an argument of a kernel. A tensor would have to be
    copied to the GPU, which waits for its steps.
    """
    mixed = 0
    for part in position:
        mixed = _mix(mixed ^ part, _signed)
    return mixed


def mixed_bits(keys: torch.Tensor, mixed_position: int | torch.Tensor) -> torch.Tensor:
    """64 random bits, as int64, for each of `keys` int64, of any shape and device.

    `mixed_position` comes from `mix_position`, as an int or an int64 tensor () on the keys' device.
    """
    return _mix(_mix(keys ^ mixed_position) ^ _SECOND_ROUND)


def position_bits(keys: torch.Tensor, *position: int) -> torch.Tensor:
    """64 random bits, as int64, for each of `keys` int64 at a position such as (seed, epoch,
    purpose).
    """
    return mixed_bits(keys, mix_position(*position))


def bits_to_uniform(bits: torch.Tensor) -> torch.Tensor:
    """Uniform numbers in [0, 1) made of random `bits` int64: float32 of the same shape, multiples
    of 2^-24.
    """
    return _shift_right(bits, 40).to(torch.float32) * 2.0**-24


def position_permutation(num: int, *position: int, device="cpu") -> torch.Tensor:
    """A permutation of range(num) that is a function of the position alone: int64 (num,) on
    `device`.
    """
    return torch.argsort(position_bits(torch.arange(num, device=device), *position), stable=True)


def position_seed(*position: int) -> int:
    """A non-negative seed for a generator, as a function of the position."""
    return int(_shift_right(position_bits(torch.zeros(1, dtype=torch.int64), *position), 1))


def seed_everything(seed: int) -> None:
    """Seed the generators of python, numpy and, on every device, torch, which draws the initial
    weights.
    """
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def set_determinism(deterministic: bool, threads: int | None = None) -> None:
    """Set the number of threads, if it is given, and whether torch may use only algorithms that
    repeat to the bit on the same machine.
    """
    if threads is not None:
        torch.set_num_threads(threads)
    # as torch.use_deterministic_algorithms, which also loads torch's compiler for some seconds
    torch.set_deterministic_debug_mode("error" if deterministic else "default")
    torch.backends.cudnn.deterministic = deterministic
    torch.backends.cudnn.benchmark = not deterministic
    # no TensorFloat-32: fp32 computes in float32
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    # to fill new tensors costs time and matters only to code that reads them before it writes
    torch.utils.deterministic.fill_uninitialized_memory = False
