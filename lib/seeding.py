"""Randomness as a function of position: a draw depends on the seed and on where it is used, never
on what came before.
"""

import os
import random

# cuBLAS reads this when CUDA starts; importing this module is early enough, setting it later is not
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import numpy as np
import torch

_ADD, _MULTIPLY_1, _MULTIPLY_2 = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
_SIGNED = 1 << 63


def _signed(value: int) -> int:
    """A 64-bit pattern as the signed integer that torch's int64 holds."""
    return (value + _SIGNED) % (1 << 64) - _SIGNED


def _shift_right(values, num_bits: int):
    """Logical shift; a signed integer's own keeps the sign."""
    return (values >> num_bits) & ((1 << (64 - num_bits)) - 1)


def _mix(values: torch.Tensor) -> torch.Tensor:
    """splitmix64's finaliser (Steele et al., OOPSLA 2014) over int64; integer, so equal on every
    device.
    """
    values = values + _signed(_ADD)
    values = (values ^ _shift_right(values, 30)) * _signed(_MULTIPLY_1)
    values = (values ^ _shift_right(values, 27)) * _signed(_MULTIPLY_2)
    return values ^ _shift_right(values, 31)


def _mix_int(value: int) -> int:
    """The same of one number, which then reaches a GPU as an argument: copying a tensor there would
    wait for its steps.
    """
    value = _signed(value + _ADD)
    value = _signed((value ^ _shift_right(value, 30)) * _MULTIPLY_1)
    value = _signed((value ^ _shift_right(value, 27)) * _MULTIPLY_2)
    return value ^ _shift_right(value, 31)


def mix_position(*position: int) -> int:
    """A position such as (seed, epoch, purpose) as one number of 64 bits, signed."""
    mixed = 0
    for part in position:
        mixed = _mix_int(mixed ^ part)
    return mixed


def mixed_bits(keys: torch.Tensor, mixed: int | torch.Tensor) -> torch.Tensor:
    """64 random bits for each of `keys` int64, of any shape and device, at a mixed position, which
    may be an int64 tensor () on their device: int64.
    """
    return _mix(_mix(keys ^ mixed) ^ _signed(0xD1B54A32D192ED03))


def position_bits(keys: torch.Tensor, *position: int) -> torch.Tensor:
    """64 random bits for each of `keys` int64, of any shape and device, at a position: int64."""
    return mixed_bits(keys, mix_position(*position))


def bits_to_uniform(bits: torch.Tensor) -> torch.Tensor:
    """64 random bits, as int64, as numbers in [0, 1): float32 of the same shape, multiples of
    2^-24.
    """
    return _shift_right(bits, 40).to(torch.float32) * 2.0**-24


def position_permutation(num: int, *position: int, device="cpu") -> torch.Tensor:
    """A permutation of range(num) that is a function of the position alone: int64 (num,) on
    `device`.
    """
    return torch.argsort(position_bits(torch.arange(num, device=device), *position), stable=True)


def position_seed(*position: int) -> int:
    """A non-negative seed for a generator, from a position."""
    return int(_shift_right(position_bits(torch.zeros(1, dtype=torch.int64), *position), 1))


def seed_everything(seed: int) -> None:
    """Seed python, numpy and torch on every device: the initial weights are drawn from these."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def set_determinism(deterministic: bool, threads: int | None = None) -> None:
    """Choose, or not, only algorithms that repeat to the bit on the same machine, with `threads`
    threads if they are given.
    """
    if threads is not None:
        torch.set_num_threads(threads)
    # what use_deterministic_algorithms does, but for loading torch's compiler, which takes seconds
    torch.set_deterministic_debug_mode("error" if deterministic else "default")
    torch.backends.cudnn.deterministic = deterministic
    torch.backends.cudnn.benchmark = not deterministic
    # fp32 is float32
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    # filling every fresh buffer costs time and can only hide reads of uninitialised memory, of
    # which there are none here
    torch.utils.deterministic.fill_uninitialized_memory = False
