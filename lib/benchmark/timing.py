"""How a case is timed: warmed up until steady, every batch a sample, with what others and the power
supply did meanwhile.
"""

import contextlib
import platform
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import fmean

import numpy as np
import torch

from lib.command import BadInput
from lib.machine import affinity, cores_used_by_others, others_busy_s

STEADY = 0.05  # two windows of warm-up agree to this share
WINDOW_SHARE = 0.2  # how long a window is, of the time measured; one batch at least
MAX_WINDOWS, MIN_BATCHES = 15, 3
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


def is_steady(window_s: list[float]) -> bool:
    """Whether the mean batch took as long in the last window as in the one before, to 5%."""
    return len(window_s) > 1 and abs(window_s[-1] - window_s[-2]) <= STEADY * window_s[-2]


def measure(batches: Iterator, seconds: float, is_endless: bool = True) -> dict:
    """Time an iterator that yields what each batch held: warm-up until steady, then samples.

    What ends, as a cold file does, has no warm-up: its samples are steady if their halves agree.
    Raises BadInput where fewer than three batches are left.
    """
    window_s, num_warmup = [], 0
    while is_endless and not is_steady(window_s) and len(window_s) < MAX_WINDOWS:
        _, samples = take(batches, WINDOW_SHARE * seconds, 1)
        window_s.append(fmean(samples))
        num_warmup += len(samples)
    amount, samples = take(batches, seconds, MIN_BATCHES)
    if len(samples) < MIN_BATCHES:
        raise BadInput(f"the data end {len(samples)} batches after the first: too few to measure")
    if not is_endless:
        half = len(samples) // 2
        window_s = [fmean(samples[:half]), fmean(samples[half:])]
    return {
        "amount": amount,
        "samples": [round(sample, 9) for sample in samples],
        "warmup_batches": num_warmup,
        "steady": is_steady(window_s),
    }


def rate_of_repeat(outcome: dict) -> float:
    """What a case did a second in one repeat: images, or FLOPs of a product."""
    return outcome["amount"] / sum(outcome["samples"])


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


def gpu_power_w(device: torch.device) -> float:
    """Watts of a GPU, as nvidia-smi tells them; 0 where it does not, or for a MIG slice, whose
    share of the GPU's power nobody knows.
    """
    gpu = torch.cuda.get_device_properties(device)
    query = ["--query-gpu=power.draw", "--format=csv,noheader,nounits"]
    with contextlib.suppress(OSError, subprocess.SubprocessError, ValueError):
        if "MIG" not in gpu.name:
            return float(subprocess.check_output(["nvidia-smi", f"--id=GPU-{gpu.uuid}", *query]))
    return 0.0
