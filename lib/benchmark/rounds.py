"""All cases in turn, round after round, in a process per model; and a row of each case with its
interval over the rounds.
"""

import contextlib
import itertools
import math
import multiprocessing
import os
import signal
import subprocess
import tempfile

import numpy as np

from lib.benchmark.cases import OUT_OF_MEMORY, time_case
from lib.benchmark.plan import Case
from lib.metrics import mean_interval
from lib.progress import Progress

NOISE_SHARE = 0.05  # of the cores, used by others while a case is timed
# what a row is of, what was measured, where and when
KEY = ("what", "case", "model", "batch_size", "precision", "threads", "cache")
PERCENTILES = ("p50_s", "p90_s", "p99_s")
JOB = ("partition", "node_type", "job_id", "gpu")
COLUMNS = (
    *KEY,
    "images_per_s",
    "low",
    "high",
    "factor",
    *PERCENTILES,
    "num_repeats",
    "flops_per_image",
    "flops_per_s",
    "share_of_peak",
    "memory_bytes",
    "energy_j_per_image",
    "residence",
    "others_share",
    "status",
    "note",
    *JOB,
)


def time_all(sender, cases: list[Case], seconds: float, cache_dir: str) -> None:
    """In a process of its own: send what each case measured, until one fails, whose memory goes
    with the process.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the benchmark to heed
    tempfile.tempdir = cache_dir  # so that nothing stays of a process that is killed
    # a DataLoader starts its workers as it would outside
    multiprocessing.set_start_method("fork", force=True)
    for case in cases:
        outcome = time_case(case, seconds)
        sender.send(outcome)
        if "status" in outcome:
            return


def time_group(cases: list[Case], seconds: float, cache_dir: str):
    """Yield what each case measured, or a status and a note that say why nothing was. All are timed
    in one process, until it fails or dies: then a new one goes on.
    """
    context = multiprocessing.get_context("spawn")
    process = None
    try:
        for number in range(len(cases)):
            if not process:
                receiver, sender = context.Pipe(duplex=False)
                arguments = (sender, cases[number:], seconds, cache_dir)
                process = context.Process(target=time_all, args=arguments)
                process.start()
                sender.close()  # so that the end of the process is the end of the pipe
            try:
                outcome = receiver.recv()
            except EOFError:
                process.join()
                # as the kernel and Slurm do where memory runs out
                is_killed = process.exitcode == -signal.SIGKILL
                note = f"its process ended with exit code {process.exitcode}"
                outcome = {"status": OUT_OF_MEMORY if is_killed else "error", "note": note}
            if "status" in outcome:
                process.join()
                process = None
            yield outcome
    finally:
        if process:
            process.kill()


def run_cases(cases: list[Case], results: dict, seconds: float, repeats: int, cache_dir, keep):
    """Time all cases in turn, so that what drifts hits them alike; `keep()` is called after each
    round and when interrupted.

    `results` gets {case: [the outcome of each repeat]}. A case that failed is not tried again.
    """
    with Progress(repeats * len(cases), "benchmark", "measurements") as progress:
        for _ in range(repeats):
            todo = [case for case in cases if not find_failure(results.get(case, []))]
            progress.add(len(cases) - len(todo))
            try:
                for _, group in itertools.groupby(todo, lambda case: case.process):
                    group = list(group)
                    outcomes = time_group(group, seconds, cache_dir)
                    for case, outcome in zip(group, outcomes, strict=True):
                        add_outcome(results, case, outcome)
                        progress.add(note=f"{case.what} {case.name} {case.cfg.batch_size}")
            finally:
                if results:
                    keep()


def add_outcome(results: dict, case: Case, outcome: dict) -> None:
    """Append the outcome of a repeat, and that of each stage, as if it were a case."""
    results.setdefault(case, []).append(outcome)
    for stage, samples in outcome.pop("parts", {}).items():
        add_outcome(results, case.vary(name=stage), outcome | {"samples": samples})


def find_failure(outcomes: list[dict]) -> dict | None:
    return next((outcome for outcome in outcomes if "status" in outcome), None)


def describe_job(machine: dict, about: dict) -> dict:
    """What every row carries of where and when it was measured."""
    job, features = about["job"], ""
    node = os.environ.get("SLURMD_NODENAME")  # a shell of salloc is on no node
    if node:
        command = ["sinfo", "-h", "-n", node, "-o", "%f"]
        with contextlib.suppress(OSError):  # a container has no sinfo
            answer = subprocess.run(command, capture_output=True, text=True).stdout
            features = answer.partition("\n")[0].replace("(null)", "")
    return {
        "partition": job.get("SLURM_JOB_PARTITION", "none"),
        "node_type": features or machine["cpu"],
        "job_id": job.get("SLURM_JOB_ID", "none"),
        "gpu": machine.get("gpu", "none"),
    }


def build_rows(results: dict, job: dict) -> list[dict]:
    """A row for each case."""
    rows = [build_row(case, outcomes, job) for case, outcomes in results.items()]
    for row in rows:
        references = {"factor": find_reference(row, rows), "share_of_peak": find_limit(row, rows)}
        for column, rate in references.items():
            if row["images_per_s"] and rate:
                row[column] = row["images_per_s"] / rate
    return rows


def build_row(case: Case, outcomes: list[dict], job: dict) -> dict:
    """A row of `COLUMNS`. A case that failed, in whichever repeat, has no number; one that was
    measured once has no interval.
    """
    fields = vars(case.cfg) | vars(case) | {"case": case.name, "num_repeats": len(outcomes)} | job
    row = {column: fields.get(column) for column in COLUMNS}
    failure = find_failure(outcomes)
    if failure:
        return row | failure
    logs = [math.log(outcome["amount"] / sum(outcome["samples"])) for outcome in outcomes]
    rate = math.exp(np.mean(logs))  # the geometric mean of the repeats
    if len(logs) > 1:
        spread = mean_interval(logs)
        row["low"], row["high"] = math.exp(spread["low"]), math.exp(spread["high"])
    row["flops_per_s" if case.kind == "matrix_product" else "images_per_s"] = rate
    samples = np.concatenate([outcome["samples"] for outcome in outcomes])
    quantiles = np.quantile(samples, [0.5, 0.9, 0.99]).tolist()
    row.update(zip(PERCENTILES, quantiles, strict=True))
    for column in ("residence", "flops_per_image"):
        row[column] = outcomes[0].get(column)
    # one `eviction requested` stands for all `cold`
    for column in ("others_share", "memory_bytes", "cache"):
        row[column] = max(outcome[column] for outcome in outcomes)
    power_w = np.mean([outcome["power_w"] for outcome in outcomes])
    if power_w > 0 and row["images_per_s"]:
        row["energy_j_per_image"] = power_w / rate
    row["status"] = "noisy" if row["others_share"] > NOISE_SHARE else "ok"
    row["note"] = "; ".join(dict.fromkeys(outcome["note"] for outcome in outcomes))
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
