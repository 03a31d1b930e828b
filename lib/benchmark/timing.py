"""The harness of benchmarks: every repeat in a process of its own, warmed up until steady, all
cases in turn; what is quoted has an interval over repeats, and a mark where others used the machine
meanwhile."""

import contextlib
import dataclasses
import json
import math
import os
import platform
import resource
import signal
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lib.command import BadInput
from lib.config import Config
from lib.device import control_groups
from lib.progress import Progress
from lib.rundir import REPOSITORY, environment

# takes a task as JSON, and answers with one
CHILD = [sys.executable, str(REPOSITORY / "benchmark.py"), "case"]
REPEATS = 6  # the least whose range holds the median with 95%: 1 - 2 * 0.5**6
# windows of warm-up agree to this share; batches measured
STEADY, MOST_WINDOWS, LEAST_BATCHES = 0.05, 25, 3
WINDOW_SHARE = 0.2  # how long a window is, as a share of the time measured; one batch at least
# of this process's cores: used by others in a repeat; and before anything is begun
NOISE_SHARE, BUSY_SHARE = 0.05, 0.25
OVERHEAD = 0.02  # of a batch's time, for the harness itself
MOST_S = 1800.0  # a repeat that takes longer has failed
OUT_OF_MEMORY = "out of memory"

COLUMNS = (
    *(
        "what",
        "case",
        "model",
        "batch_size",
        "precision",
        "channels_last",
        "compile",
        "deterministic",
        "threads",
        "cache",
    ),
    *(
        "images_per_s",
        "low",
        "high",
        "factor",
        "p50_s",
        "p90_s",
        "p99_s",
        "num_repeats",
        "num_batches",
        "warmup_batches",
    ),
    *(
        "startup_s",
        "first_batch_s",
        "flops_per_image",
        "flops_per_s",
        "share_of_peak",
        "memory_bytes",
        "residence",
    ),
    *(
        "partition",
        "node_type",
        "job_id",
        "gpu",
        "host_load",
        "others_share",
        "stolen_share",
        "throttled_share",
    ),
    *("overhead_share", "status", "note", "date", "commit", "versions"),
)
KEY = COLUMNS[:10]


@dataclass(frozen=True)
class Case:
    """One way to be timed: `kind` is its function in cases.py, the config says with what, the flags
    in which variant.
    """

    what: str  # loader | infer | train | stage | limit
    name: str
    kind: str
    cfg: Config
    channels_last: bool = True
    compile: bool = False
    cache: str = "warm"  # the file's pages beforehand: warm | cold
    order: str = "random"  # random | sequential
    num_workers: int = 0
    resident: bool = False  # one batch over and over
    keep_memory: bool = True
    device: str = "auto"


def take(batches, seconds: float, num_least: int, wait) -> tuple[float, list[float]]:
    """What the batches held in all, and the seconds of each, for at least so long and so many;
    fewer where they end.

    `wait` returns when the device has done what it was given.
    """
    wait()
    amount, stamps = 0.0, [time.perf_counter()]
    ends_at = stamps[0] + seconds
    for held in batches:
        amount += held
        stamps.append(time.perf_counter())
        if stamps[-1] >= ends_at and len(stamps) > num_least:
            break
    wait()
    stamps[-1:] = [time.perf_counter()] if len(stamps) > 1 else stamps
    return amount, [later - earlier for earlier, later in zip(stamps, stamps[1:], strict=False)]


def is_steady(window_s: list[float]) -> bool:
    """Whether the mean batch of the last window of warm-up took as long as in the one before, to
    5%.
    """
    return len(window_s) > 1 and abs(window_s[-1] - window_s[-2]) <= STEADY * window_s[-2]


def measure(batches, seconds: float, wait, is_endless: bool = True) -> dict:
    """Time a generator that yields what each batch held: the first batch apart, warm-up until
    steady, then samples.

    What ends, as a cold file does, has no warm-up: whether it was steady is seen by the halves of
    its samples.
    """
    _, first = take(batches, 0, 1, wait)
    windows, num_warm = [], len(first)
    while is_endless and not is_steady(windows) and len(windows) < MOST_WINDOWS:
        times = take(batches, WINDOW_SHARE * seconds, 1, wait)[1]
        num_warm += len(times)
        windows.append(statistics.fmean(times))
    amount, samples = take(batches, seconds, LEAST_BATCHES, wait)
    if len(samples) < LEAST_BATCHES:
        raise BadInput(
            f"the data ended after {num_warm + len(samples)} batches, which are too few to measure"
        )
    half = len(samples) // 2
    steady = is_steady(
        windows or [statistics.fmean(samples[:half]), statistics.fmean(samples[half:])]
    )
    found = {
        "amount": amount,
        "samples": [round(sample, 9) for sample in samples],
        "first_batch_s": sum(first),
    }
    found |= {"warmup_batches": num_warm, "steady": steady}
    return found | {
        "overhead_s": statistics.median(take(iter(range(2000)), 0, 2000, lambda: None)[1])
    }


def read_load() -> dict[str, float]:
    """Seconds so far, summed over the cores of this process: all, busy, stolen by other machines,
    throttled by control groups, and our own, with children that have ended. Without /proc only the
    first and the last."""
    cores = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count())
    own = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    load = {
        "all": time.monotonic() * len(cores),
        "own": sum(usage.ru_utime + usage.ru_stime for usage in own),
    }
    load |= {"busy": 0.0, "stolen": 0.0, "throttled": 0.0}
    with contextlib.suppress(OSError):
        for name, *ticks in map(str.split, Path("/proc/stat").read_text().splitlines()):
            if name[:3] == "cpu" and name[3:].isdigit() and int(name[3:]) in cores:
                user, nice, system, _idle, _iowait, irq, softirq, stolen = (
                    int(tick) / os.sysconf("SC_CLK_TCK") for tick in ticks[:8]
                )
                load["busy"] += user + nice + system + irq + softirq
                load["stolen"] += stolen
    for folder in control_groups():
        with contextlib.suppress(OSError):
            counts = dict(line.split() for line in (folder / "cpu.stat").read_text().splitlines())
            ns = int(counts.get("throttled_time", 0)) or 1000 * int(counts.get("throttled_usec", 0))
            load["throttled"] = max(load["throttled"], ns / 1e9)
    return load


def load_between(before: dict, after: dict) -> dict[str, float]:
    """Shares of this process's cores that others used, that other machines stole, and that control
    groups withheld.
    """
    spent = {name: after[name] - before[name] for name in before}
    spent["others"] = max(0.0, spent["busy"] - spent["own"])
    return {
        f"{name}_share": spent[name] / max(spent["all"], 1e-9)
        for name in ("others", "stolen", "throttled")
    }


def require_quiet(seconds: float = 1.0) -> None:
    """Raise BadInput where others already use more of this machine than a measurement can bear."""
    before = read_load()
    time.sleep(seconds)
    share = load_between(before, read_load())["others_share"]
    if share > BUSY_SHARE:
        where = (
            f"others use {share:.0%} of the cores that this process may use, at most"
            f" {BUSY_SHARE:.0%} can be borne"
        )
        raise BadInput(
            f"{platform.node()} is too busy to measure: {where} (--allow-noise measures, and marks"
            " the rows)"
        )


def num_oom_kills() -> int | None:
    """How often the kernel has ended a process for want of memory; None where it does not say."""
    with contextlib.suppress(OSError):
        counts = dict(line.split() for line in Path("/proc/vmstat").read_text().splitlines())
        return int(counts["oom_kill"]) if "oom_kill" in counts else None
    return None


def run_case(case: Case, seconds: float, repeat: int, cache_dir) -> dict:
    """A repeat of a case in a fresh process: what it measured and who else used the machine, or a
    status that says why not.
    """
    task = {
        "case": dataclasses.asdict(case),
        "seconds": seconds,
        "repeat": repeat,
        "started_at": time.time(),
    }
    options = {"capture_output": True, "text": True, "errors": "replace", "timeout": MOST_S}
    # of this benchmark alone, so that the first repeat compiles and later ones find what it has
    # compiled
    options["env"] = os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(cache_dir)}
    before, kills = read_load(), num_oom_kills()
    try:
        child = subprocess.run(CHILD, input=json.dumps(task), **options)
    except subprocess.TimeoutExpired:
        return {"status": "error", "note": f"no result within {MOST_S:.0f} s"}
    told, last = (([""] + text.strip().splitlines())[-1] for text in (child.stdout, child.stderr))
    found = json.loads(told) if told.startswith("{") else {}
    if child.returncode:
        ended = (
            f"exit {child.returncode}"
            if child.returncode > 0
            else f"killed by {signal.Signals(-child.returncode).name}"
        )
        found = {"status": "error", "note": found.get("error", f"{ended}: {last}")}
        # else the kernel says what it did
        silent = kills is None and child.returncode == -signal.SIGKILL
        if silent or num_oom_kills() != kills:
            found = {"status": OUT_OF_MEMORY, "note": f"{ended}, for want of memory"}
    return found | load_between(before, read_load()) | {"host_load": os.getloadavg()[0]}


def run_cases(
    cases: list[Case], results: dict, seconds: float, repeats: int, cache_dir, keep
) -> None:
    """Repeat all cases in turn, so that what drifts hits them alike; `keep()` is called after each
    round and when interrupted.

    `results` gets {case: [what each repeat found]}. A case that failed is not tried again.
    """
    try:
        with Progress(repeats * len(cases), "benchmark", "repeats") as bar:
            for repeat in range(repeats):
                for case in cases:
                    found = results.get(case, [])
                    if not any("status" in each for each in found):
                        results[case] = [*found, run_case(case, seconds, repeat, cache_dir)]
                    bar.add(note=f"{case.what} {case.name} {case.cfg.batch_size}")
                keep()
    except KeyboardInterrupt:
        if results:
            keep()
        raise


def rate_of(found: list[dict]) -> float:
    """What a case did a second, the median over its repeats; 0 where one failed."""
    return (
        0.0
        if any("status" in each for each in found)
        else statistics.median(map(rate_of_repeat, found))
    )


def rate_of_repeat(found: dict) -> float:
    return found["amount"] / sum(found["samples"])


def median_interval(values) -> tuple[float, float]:
    """The narrowest range of order statistics that holds the median with 95% (David and Nagaraja
    2003, 7.1).

    Of fewer than six values it is their whole range, which holds it with less: 1 - 2 * 0.5**N.
    """
    values, num_left_out = sorted(values), 0
    while 2 * sum(math.comb(len(values), k) for k in range(num_left_out + 2)) <= 0.05 * 2 ** len(
        values
    ):
        num_left_out += 1  # on either side
    return values[num_left_out], values[-1 - num_left_out]


def describe_job(machine: dict) -> dict:
    """What every row carries of where and when it was measured: partition, node type, job, device,
    date, commit, versions.
    """
    about, node_type = environment(), machine["cpu"]
    # a shell of salloc is on no node
    with contextlib.suppress(subprocess.SubprocessError, OSError, KeyError):
        told = ""
        if about["job"]:
            command = ["scontrol", "-o", "show", "node", os.environ["SLURMD_NODENAME"]]
            told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        features = dict(item.split("=", 1) for item in told.split() if "=" in item).get(
            "ActiveFeatures", "(null)"
        )
        node_type = node_type if features == "(null)" else features
    commit = (about["commit"] or "none")[:10] + " with changes" * bool(about["uncommitted_patch"])
    versions = " ".join(f"{name} {version}" for name, version in about["versions"].items())
    partition, job_id = (
        about["job"].get(name, "none") for name in ("SLURM_JOB_PARTITION", "SLURM_JOB_ID")
    )
    job = {
        "partition": partition,
        "node_type": node_type,
        "job_id": job_id,
        "gpu": machine.get("gpu", "none"),
    }
    return job | {"date": about["started_utc"][:10], "commit": commit, "versions": versions}


def build_rows(results: dict, job: dict) -> list[dict]:
    """A row for each case, and for each stage of one that tells its stages apart."""
    rows = []
    for case, found in results.items():
        for part in [*found[0].get("parts", {}), None]:
            picked = [
                (
                    each | {"samples": each["parts"][part], "overhead_s": 0.0}
                    if part in each.get("parts", ())
                    else each
                )
                for each in found
            ]
            rows.append(build_row(case, part or case.name, picked, job))
    return add_shares(rows)


def samples_of(results: dict) -> list[dict]:
    """The raw samples: each case, and the seconds of every batch, and of its stages, of every
    repeat.
    """
    raw = {
        case: {name: [each.get(name) for each in found] for name in ("samples", "parts")}
        for case, found in results.items()
    }
    return [dataclasses.asdict(case) | told for case, told in raw.items()]


def build_row(case: Case, name: str, found: list[dict], job: dict) -> dict:
    """A row of `COLUMNS`. One that failed, in whichever repeat, has no number."""
    cfg = case.cfg
    row = (
        dict.fromkeys(COLUMNS)
        | job
        | {
            "what": case.what,
            "case": name,
            "model": cfg.model,
            "batch_size": cfg.batch_size,
        }
    )
    row |= {
        "precision": cfg.precision,
        "channels_last": case.channels_last,
        "compile": case.compile,
        "cache": case.cache,
    }
    row |= {"deterministic": cfg.deterministic, "threads": cfg.threads, "num_repeats": len(found)}
    failed = next((each for each in found if "status" in each), None)
    if failed:
        return row | {
            name: failed.get(name) for name in ("status", "note", "host_load", "others_share")
        }
    rates = list(map(rate_of_repeat, found))
    quantiles = np.quantile(np.concatenate([each["samples"] for each in found]), [0.5, 0.9, 0.99])
    row |= {f"p{name}_s": float(value) for name, value in zip((50, 90, 99), quantiles, strict=True)}
    row |= {
        "flops_per_s" if case.kind == "matrix_product" else "images_per_s": statistics.median(rates)
    }
    if len(rates) > 1:
        row |= dict(zip(("low", "high"), median_interval(rates), strict=True))
    largest = (
        "host_load",
        "others_share",
        "stolen_share",
        "throttled_share",
        "startup_s",
        "first_batch_s",
        "warmup_batches",
    )
    row |= {column: max(each[column] for each in found) for column in (*largest, "memory_bytes")}
    row |= {column: found[0].get(column) for column in ("residence", "flops_per_image")}
    row |= {"num_batches": sum(len(each["samples"]) for each in found)}
    row |= {"overhead_share": max(each["overhead_s"] for each in found) / row["p50_s"]}
    return row | judge_quality(row, found)


def judge_quality(row: dict, found: list[dict]) -> dict[str, str]:
    """Status and note of a row that has numbers: unsteady before noisy before ok."""
    notes = dict.fromkeys(each["note"] for each in found if each.get("note"))
    num_unsteady = sum(not each["steady"] for each in found)
    causes = {
        "others_share": "others used",
        "stolen_share": "other machines took",
        "throttled_share": "limits withheld",
    }
    noisy = [
        f"{words} up to {row[name]:.0%} of the cores"
        for name, words in causes.items()
        if row[name] > NOISE_SHARE
    ]
    if num_unsteady:
        notes[f"{num_unsteady} of {len(found)} repeats never became steady"] = None
    notes |= dict.fromkeys(noisy)
    if row["overhead_share"] > OVERHEAD:
        notes[f"the harness itself takes {row['overhead_share']:.1%} of a batch"] = None
    if 1 < len(found) < REPEATS:
        notes[
            f"the range of {len(found)} repeats holds the median with"
            f" {1 - 2 * 0.5 ** len(found):.1%} only"
        ] = None
    return {
        "status": "unsteady" if num_unsteady else "noisy" if noisy else "ok",
        "note": "; ".join(notes),
    }


def add_shares(rows: list[dict]) -> list[dict]:
    """Put the factor against the smallest batch of the same series into rows, and the share of what
    the machine can do at most: of its matrix product where FLOPs were counted, of its memory copy
    in the loader."""
    products = {
        (row["precision"], row["threads"]): row["flops_per_s"]
        for row in rows
        if row["case"] == "matrix_product"
    }
    copies = {
        row["batch_size"]: row["images_per_s"] for row in rows if row["case"] == "memory_copy"
    }
    for row in rows:
        series = [
            other
            for other in rows
            if all(other[name] == row[name] for name in KEY if name != "batch_size")
        ]
        first = min(series, key=lambda other: other["batch_size"])
        if (
            len(series) > 1
            and row["images_per_s"]
            and first["images_per_s"]
            and row["what"] in ("infer", "train")
        ):
            row["factor"] = row["images_per_s"] / first["images_per_s"]
        peak, used = (
            copies.get(row["batch_size"]),
            row["images_per_s"] if row["what"] == "loader" else None,
        )
        if row["flops_per_image"]:
            peak, used = (
                products.get((row["precision"], row["threads"])),
                row["images_per_s"] * row["flops_per_image"],
            )
        if peak and used:
            row["share_of_peak"] = used / peak
    return rows
