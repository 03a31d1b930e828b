"""All cases in turn, round after round, in a process per model; and a row of each case with its
interval over the rounds.
"""

import contextlib
import itertools
import math
import multiprocessing
import os
import re
import signal
import statistics
import subprocess
import tempfile
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool

import numpy as np

from lib.benchmark.cases import OUT_OF_MEMORY, time_case
from lib.benchmark.plan import Case
from lib.benchmark.timing import rate_of_repeat
from lib.metrics import mean_interval
from lib.progress import Progress

# roughly: a process and a case, before they measure; images/s of the large model on a core
START_S, CASE_S, CORE_RATES = 6.0, 0.5, {"infer": 300, "train": 75}
NOISE_SHARE = 0.05  # of the cores, used by others while a case is timed
# what a row is of, what was measured, where and when
KEY = [
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
]
MEASURED = [
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
    "first_batch_s",
    "flops_per_image",
    "flops_per_s",
    "share_of_peak",
    "memory_bytes",
    "energy_j_per_image",
    "residence",
    "others_share",
    "status",
    "note",
]
JOB = ["partition", "node_type", "job_id", "gpu", "date", "commit", "versions"]
COLUMNS = (*KEY, *MEASURED, *JOB)


def set_up(cache_dir: str) -> None:
    """Prepare a process of its own, before it times a case."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the benchmark to heed
    tempfile.tempdir = cache_dir  # so that nothing stays of a process that is killed
    # a DataLoader starts its workers as it would outside
    multiprocessing.set_start_method("fork", force=True)
    # the first round compiles, later ones find what it has compiled
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = cache_dir


def time_group(cases: list[Case], seconds: float, cache_dir: str):
    """Yield what each case measured, or a status and a note that say why nothing was. All are timed
    in one process, until it fails or dies: then a new one goes on.
    """
    context, pool = multiprocessing.get_context("spawn"), None
    options = {"mp_context": context, "initializer": set_up, "initargs": (cache_dir,)}
    workers = []  # the one process of the pool
    try:
        for case in cases:
            pool = pool or ProcessPoolExecutor(1, **options)
            try:
                future = pool.submit(time_case, case, seconds)
                workers = multiprocessing.active_children() or workers
                outcome = future.result()
            except BrokenProcessPool:
                pool = end(pool)
                outcome = describe_death(workers[0].exitcode)
            if "status" in outcome:
                pool = end(pool)
            yield outcome
    finally:
        end(pool)


def describe_death(exit_code: int) -> dict:
    """The outcome of a case whose process has died."""
    if exit_code == -signal.SIGKILL:
        note = "its process was killed, as the kernel and Slurm do where memory runs out"
        return {"status": OUT_OF_MEMORY, "note": note}
    return {"status": "error", "note": f"its process ended with exit code {exit_code}"}


def end(pool: ProcessPoolExecutor | None) -> None:
    """End a process at once, which may hold memory that the next one needs."""
    for process in multiprocessing.active_children():
        process.kill()
    if pool:
        pool.shutdown()


def run_cases(cases: list[Case], results: dict, seconds: float, repeats: int, cache_dir, keep):
    """Time all cases in turn, so that what drifts hits them alike; `keep()` is called after each
    round and when interrupted.

    `results` gets {case: [the outcome of each repeat]}. A case that failed is not tried again.
    """
    try:
        with Progress(repeats * len(cases), "benchmark", "measurements") as progress:
            for _ in range(repeats):
                todo = [case for case in cases if not find_failure(results.get(case, []))]
                progress.add(len(cases) - len(todo))
                for _, group in itertools.groupby(todo, lambda case: case.process):
                    group = list(group)
                    outcomes = time_group(group, seconds, cache_dir)
                    for case, outcome in zip(group, outcomes, strict=True):
                        add_outcome(results, case, outcome)
                        progress.add(note=f"{case.what} {case.name} {case.cfg.batch_size}")
                keep()
    except KeyboardInterrupt:
        if results:
            keep()
        raise


def add_outcome(results: dict, case: Case, outcome: dict) -> None:
    """Append the outcome of a repeat, and that of each stage, as if it were a case."""
    results.setdefault(case, []).append(outcome)
    for stage, samples in outcome.pop("parts", {}).items():
        add_outcome(results, case.vary(name=stage), outcome | {"samples": samples})


def find_failure(outcomes: list[dict]) -> dict | None:
    return next((outcome for outcome in outcomes if "status" in outcome), None)


def rate_interval(rates: list[float]) -> tuple[float, float | None, float | None]:
    """The geometric mean of rates and its 95% interval, Student's of the logarithms; one rate has
    none.
    """
    if len(rates) == 1:
        return rates[0], None, None
    spread = mean_interval(np.log(rates))
    return tuple(math.exp(spread[name]) for name in ("mean", "low", "high"))


def describe_job(machine: dict, about: dict) -> dict:
    """What every row carries of where and when it was measured."""
    job, node_type = about["job"], machine["cpu"]
    node = os.environ.get("SLURMD_NODENAME")  # a shell of salloc is on no node
    if node:
        command = ["scontrol", "-o", "show", "node", node]
        with contextlib.suppress(OSError):  # a container has no scontrol
            answer = subprocess.run(command, capture_output=True, text=True).stdout
            features = re.search(r"ActiveFeatures=([^ (]+)", answer)  # or (null)
            node_type = features[1] if features else node_type
    commit = (about["commit"] or "none")[:10]
    if about["uncommitted_patch"]:
        commit += " with changes"
    return {
        "partition": job.get("SLURM_JOB_PARTITION", "none"),
        "node_type": node_type,
        "job_id": job.get("SLURM_JOB_ID", "none"),
        "gpu": machine.get("gpu", "none"),
        "date": about["started_utc"][:10],
        "commit": commit,
        "versions": " ".join(itertools.chain(*about["versions"].items())),
    }


def build_rows(results: dict, job: dict) -> list[dict]:
    """A row for each case."""
    rows = [build_row(case, outcomes, job) for case, outcomes in results.items()]
    for row in rows:
        row["factor"] = share_of(row["images_per_s"], find_reference(row, rows))
        row["share_of_peak"] = share_of(row["images_per_s"], find_limit(row, rows))
    return rows


def share_of(rate: float | None, reference: float | None) -> float | None:
    return rate / reference if rate and reference else None


def build_row(case: Case, outcomes: list[dict], job: dict) -> dict:
    """A row of `COLUMNS`. A case that failed, in whichever repeat, has no number."""
    fields = vars(case.cfg) | vars(case) | {"case": case.name, "num_repeats": len(outcomes)} | job
    row = {column: fields.get(column) for column in COLUMNS}
    failure = find_failure(outcomes)
    if failure:
        return row | failure
    measured = {name: [outcome.get(name) for outcome in outcomes] for name in outcomes[0]}
    rate, row["low"], row["high"] = rate_interval(list(map(rate_of_repeat, outcomes)))
    row["flops_per_s" if case.kind == "matrix_product" else "images_per_s"] = rate
    samples = np.concatenate(measured["samples"])
    row["p50_s"], row["p90_s"], row["p99_s"] = np.quantile(samples, [0.5, 0.9, 0.99]).tolist()
    row["num_batches"] = len(samples)
    row["residence"] = measured["residence"][0]
    row["flops_per_image"] = outcomes[0].get("flops_per_image")
    # one `eviction requested` stands for all `cold`
    for column in ("others_share", "first_batch_s", "warmup_batches", "memory_bytes", "cache"):
        row[column] = max(measured[column])
    power_w = statistics.fmean(measured["power_w"])
    if power_w > 0 and row["images_per_s"]:
        row["energy_j_per_image"] = power_w / rate
    row["status"], notes = "ok", measured["note"]
    if row["others_share"] > NOISE_SHARE:
        row["status"] = "noisy"
        notes.append(f"others used up to {row['others_share']:.0%} of the cores")
    if not all(measured["steady"]):
        row["status"] = "unsteady"
        notes.append("not every repeat became steady")
    row["note"] = "; ".join(dict.fromkeys(filter(None, notes)))
    return row


def find_reference(row: dict, rows: list[dict]) -> float | None:
    """The rate that a row is a factor of: a model's smallest batch, the default of a variant, or
    torchvision's best, from a file as warm, of the loader.
    """
    rates = {}
    for other in rows:
        is_alike = all(other[name] == row[name] for name in ("what", "model", "cache"))
        is_reference = other["case"].startswith(("default", "torchvision"))
        if is_alike and is_reference and other["images_per_s"]:
            rates.setdefault(other["batch_size"], []).append(other["images_per_s"])
    size = min(rates, default=None) if row["case"] == "default" else row["batch_size"]
    return max(rates.get(size, []), default=None)


def find_limit(row: dict, rows: list[dict]) -> float | None:
    """The images/s that the machine does at most: of a matrix product where FLOPs were counted, of
    a copy of memory in the loader.
    """
    for other in rows:
        is_product = other["flops_per_s"] and other["precision"] == row["precision"]
        if row["flops_per_image"] and is_product:
            return other["flops_per_s"] / row["flops_per_image"]
        if row["what"] == "loader" and other["case"] == "memory_copy":
            return other["images_per_s"]
    return None


def estimate_s(cases: list[Case], seconds: float, repeats: int) -> float:
    """Roughly how long all of it takes. On a CPU large batches of the large model do."""
    round_s = START_S * len({case.process for case in cases})
    for case in cases:
        round_s += CASE_S + 2 * seconds
        if case.device == "cpu" and case.kind in CORE_RATES:
            round_s += 6 * case.cfg.batch_size / (CORE_RATES[case.kind] * case.cfg.threads)
    return repeats * round_s
