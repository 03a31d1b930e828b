"""All cases in turn, round after round, in a process per model; and a row of each case with its
interval over the rounds.
"""

import contextlib
import itertools
import math
import multiprocessing
import os
import signal
import statistics
import subprocess
import tempfile

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


def work(pipe, cache_dir: str) -> None:
    """In a process of its own: answer each case that comes through `pipe`, until it is closed."""
    tempfile.tempdir = cache_dir  # so that nothing stays of a process that is killed
    # a DataLoader starts its workers as it would outside
    multiprocessing.set_start_method("fork", force=True)
    # the first round compiles, later ones find what it has compiled
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = cache_dir
    with contextlib.suppress(EOFError):
        while True:
            pipe.send(time_case(*pipe.recv()))


class Worker:
    """A process that times cases one after another. A new one goes on where it failed or died."""

    def __init__(self, cache_dir):
        self.cache_dir, self.process = str(cache_dir), None

    def time(self, case: Case, seconds: float) -> dict:
        """What a case measured, or a status and a note that say why nothing was."""
        if not self.process:
            context = multiprocessing.get_context("spawn")
            self.pipe, other_end = context.Pipe()
            self.process = context.Process(target=work, args=(other_end, self.cache_dir))
            # Ctrl-C is for the benchmark to heed: the new process inherits that it ignores it
            handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
            self.process.start()
            signal.signal(signal.SIGINT, handler)
            other_end.close()  # so that the end of the process is the end of the pipe
        try:
            self.pipe.send((case, seconds))
            outcome = self.pipe.recv()
        except (EOFError, OSError):
            self.process.join()
            exit_code = self.process.exitcode
            outcome = {"status": "error", "note": f"its process ended with exit code {exit_code}"}
            if exit_code == -signal.SIGKILL:
                note = "killed, as the kernel and Slurm do where memory runs out"
                outcome = {"status": OUT_OF_MEMORY, "note": note}
        if "status" in outcome:
            self.close()
        return outcome

    def close(self) -> None:
        if self.process:
            self.process.kill()
            self.process.join()
            self.process = None


def run_cases(cases: list[Case], results: dict, seconds: float, repeats: int, cache_dir, keep):
    """Time all cases in turn, so that what drifts hits them alike; `keep()` is called after each
    round and when interrupted.

    `results` gets {case: [the outcome of each repeat]}. A case that failed is not tried again.
    """
    try:
        with Progress(repeats * len(cases), "benchmark", "measurements") as progress:
            for _ in range(repeats):
                for _, group in itertools.groupby(cases, lambda case: case.process):
                    with contextlib.closing(Worker(cache_dir)) as worker:
                        for case in group:
                            if not find_failure(results.get(case, [])):
                                add_outcome(results, case, worker.time(case, seconds))
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
    of_logarithms = mean_interval(np.log(rates))
    mean, low, high = (math.exp(of_logarithms[name]) for name in ("mean", "low", "high"))
    return mean, low, high


def describe_job(machine: dict, about: dict) -> dict:
    """What every row carries of where and when it was measured."""
    job = about["job"]
    node_type = machine["cpu"]
    if "SLURMD_NODENAME" in os.environ:  # a shell of salloc is on no node
        command = ["scontrol", "-o", "show", "node", os.environ["SLURMD_NODENAME"]]
        with contextlib.suppress(OSError):
            answer = subprocess.run(command, capture_output=True, text=True).stdout
            features = answer.partition("ActiveFeatures=")[2].partition(" ")[0]
            node_type = features if features not in ("", "(null)") else node_type
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
        rate = row["images_per_s"]
        reference, limit = find_reference(row, rows), find_limit(row, rows)
        row["factor"] = rate / reference if rate and reference else None
        row["share_of_peak"] = rate / limit if rate and limit else None
    return rows


def build_row(case: Case, outcomes: list[dict], job: dict) -> dict:
    """A row of `COLUMNS`. A case that failed, in whichever repeat, has no number."""
    fields = vars(case.cfg) | vars(case) | {"case": case.name, "num_repeats": len(outcomes)} | job
    row = {column: fields.get(column) for column in COLUMNS}
    failure = find_failure(outcomes)
    if failure:
        return row | failure
    rate, row["low"], row["high"] = rate_interval([rate_of_repeat(outcome) for outcome in outcomes])
    row["flops_per_s" if case.kind == "matrix_product" else "images_per_s"] = rate
    samples = np.concatenate([outcome["samples"] for outcome in outcomes])
    row["p50_s"], row["p90_s"], row["p99_s"] = np.quantile(samples, [0.5, 0.9, 0.99]).tolist()
    row["num_batches"] = len(samples)
    row["residence"] = outcomes[0]["residence"]
    row["flops_per_image"] = outcomes[0].get("flops_per_image")
    columns = ["others_share", "first_batch_s", "warmup_batches", "memory_bytes"]
    columns.append("cache")  # one `eviction requested` stands for all `cold`
    for column in columns:
        row[column] = max(outcome[column] for outcome in outcomes)
    power_w = statistics.fmean(outcome["power_w"] for outcome in outcomes)
    if power_w > 0 and row["images_per_s"]:
        row["energy_j_per_image"] = power_w / rate
    row["status"], notes = "ok", [outcome["note"] for outcome in outcomes]
    if row["others_share"] > NOISE_SHARE:
        row["status"] = "noisy"
        notes.append(f"others used up to {row['others_share']:.0%} of the cores")
    if not all(outcome["steady"] for outcome in outcomes):
        row["status"] = "unsteady"
        notes.append("not every repeat became steady")
    row["note"] = "; ".join(dict.fromkeys(filter(None, notes)))
    return row


def find_reference(row: dict, rows: list[dict]) -> float | None:
    """The rate that a row is a factor of: a model's smallest batch, the default of a variant, or
    torchvision's best, from a file as warm, of the loader.
    """
    alike = {}
    for other in rows:
        is_reference = other["case"].startswith(("default", "torchvision"))
        is_alike = all(other[name] == row[name] for name in ("what", "model", "cache"))
        if is_reference and is_alike and other["images_per_s"]:
            size = other["batch_size"]
            alike[size] = max(other["images_per_s"], alike.get(size, 0.0))
    return alike.get(min(alike, default=None) if row["case"] == "default" else row["batch_size"])


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
