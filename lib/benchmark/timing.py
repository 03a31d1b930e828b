"""How a case is timed: warmed up, every batch a sample, with what others and the power
supply did meanwhile.
"""

import contextlib
import platform
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from lib.command import BadInput
from lib.machine import affinity, cores_used_by_others, nvidia_smi, others_busy_s

WARM_UP_SHARE = 0.5  # how long the warm-up is, of the time measured
MIN_BATCHES = 3  # of warm-up and samples
MAX_BUSY_SHARE = 0.25  # of the cores, used by others before anything is begun


def finish() -> None:
    """Wait until a GPU has done what it was given."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def take(batches: Iterator, seconds: float, num_least: int) -> tuple[float, list[float]]:
    """What the batches held in all, and the seconds of each, for at least so long and so many;
    fewer where they end.
    """
    finish()
    amount, stamps = 0.0, [time.perf_counter()]
    for num_images in batches:
        amount += num_images
        stamps.append(time.perf_counter())
        if stamps[-1] >= stamps[0] + seconds and len(stamps) > num_least:
            break
    finish()
    stamps[-1] = time.perf_counter()
    return amount, np.diff(stamps).tolist()


def measure(batches: Iterator, seconds: float, is_endless: bool = True) -> dict:
    """Time an iterator that yields what each batch held: first a warm-up, then samples, with the
    share of the cores that others used meanwhile and the power of the processor packages.

    What ends, as a cold file does, has no warm-up. Raises BadInput where fewer than three batches
    are left.
    """
    if is_endless:
        take(batches, WARM_UP_SHARE * seconds, MIN_BATCHES)
    busy_s, energy_j, started_at = others_busy_s(), read_energy_j(), time.monotonic()
    amount, samples = take(batches, seconds, MIN_BATCHES)
    if len(samples) < MIN_BATCHES:
        raise BadInput(f"the data end {len(samples)} batches after the first: too few to measure")
    return {
        "amount": amount,
        "samples": samples,
        "others_share": share_of_others(busy_s, started_at),
        "power_w": (read_energy_j() - energy_j) / (time.monotonic() - started_at),
    }


def share_of_others(busy_s: float, started_at: float) -> float:
    """The share of this process's cores that others used since `others_busy_s` was `busy_s`, at
    `started_at` by time.monotonic().
    """
    return cores_used_by_others(busy_s, started_at) / len(affinity())


def require_quiet() -> None:
    """Raise BadInput where others already use more of this machine than a measurement can bear."""
    busy_s, started_at = others_busy_s(), time.monotonic()
    time.sleep(1.0)
    share = share_of_others(busy_s, started_at)
    if share > MAX_BUSY_SHARE:
        raise BadInput(
            f"{platform.node()} is too busy to measure: others use {share:.0%} of the cores that"
            f" this process may use, at most {MAX_BUSY_SHARE:.0%} can be borne (--allow-noise"
            " measures, and marks the rows)"
        )


def read_energy_j() -> float:
    """Joules that the processor packages have taken so far (RAPL); 0 where this user may not read
    them.
    """
    with contextlib.suppress(OSError):
        counters = Path("/sys/class/powercap").glob("intel-rapl:?/energy_uj")
        return sum(int(counter.read_text()) for counter in counters) / 1e6
    return 0.0


def gpu_power_w() -> float:
    """Watts of the only GPU, as nvidia-smi tells them. 0 where it does not, where there are
    several, and for a MIG slice, whose share of the GPU's power nobody knows.
    """
    with contextlib.suppress(ValueError):
        if torch.cuda.device_count() == 1 and "MIG" not in torch.cuda.get_device_name():
            return float(nvidia_smi("power.draw").removesuffix(" W"))
    return 0.0
