"""Work as Slurm jobs: what they ask a partition for, how they are submitted, and how they fare.

Options and formats are those of the manual pages of sbatch, sinfo, scontrol and squeue 22.05.
"""

import os
import re
import shutil
import subprocess
from pathlib import Path

from lib.command import REPOSITORY, BadInput, nearest, one_line
from lib.files import read_csv, read_json
from lib.jobs.work import Work, job_of
from lib.progress import format_duration
from lib.rundir import read_run_config

LOGS = REPOSITORY / "jobs/logs"
MIN_FREE_BYTES = 1 << 30  # for the checkpoints and logs of a run
# asked for, where the partition has as much
MEMORY_MB, LIMIT_MINUTES, NUM_CPUS, NUM_GPU_CPUS = 16_000, 60, 16, 4
NUM_QUOTED_LINES, NUM_ENDED = 3, 20  # of a failed job's stderr; jobs that are over
SINFO_COLUMNS = ("name", "state", "limit", "cpus", "memory_mb", "gres")
SQUEUE_COLUMNS = ("id", "shown", "name", "state", "limit_left", "reason", "folder")
# sbatch's own variables: where one is set, it decides instead of what is asked for here
MEMORY_VARIABLES = {"SBATCH_MEM_PER_NODE", "SBATCH_MEM_PER_CPU", "SBATCH_MEM_PER_GPU"}
GPU_VARIABLES = {"SBATCH_GPUS", "SBATCH_GPUS_PER_NODE", "SBATCH_GPUS_PER_TASK", "SBATCH_GRES"}
STATES = {"0": "done", "": "killed", "130": "stopped", "138": "stopped", "143": "stopped"}


def run_command(*command: str, **options) -> str:
    """The stdout of a Slurm or git command. Raises BadInput with the first line of its stderr."""
    options |= {"capture_output": True, "text": True, "errors": "surrogateescape"}
    result = subprocess.run(command, **options)
    if result.returncode:
        raise BadInput(f"{command[0]}: {one_line(result.stderr.removeprefix(f'{command[0]}: '))}")
    return result.stdout


def has_slurm() -> bool:
    """Whether this machine belongs to a cluster: the programs are there, and know where their
    controller is.
    """
    if not shutil.which("sbatch"):
        return False
    answer = subprocess.run(["sinfo", "-h"], capture_output=True, text=True)
    return "configuration source" not in answer.stderr


def minutes_of(text: str) -> float:
    """Slurm's `days-hours:minutes:seconds`, `hours:minutes:seconds`, `minutes:seconds` or
    `minutes`; infinity for no limit.
    """
    if not text[0].isdigit():
        return float("inf")
    days, dash, clock = text.rpartition("-")
    parts = [int(part) for part in clock.split(":")]
    if not dash and len(parts) < 3:
        parts.insert(0, 0)  # no hours
    hours, minutes, seconds = [*parts, 0, 0][:3]
    return int(days or 0) * 1440 + hours * 60 + minutes + seconds / 60


def bytes_of(memory: str | None) -> float:
    """sbatch's `16000M` or `8G`; infinity where sbatch's own variables say how much."""
    if not memory:
        return float("inf")
    return int(memory[:-1]) * {"M": 1 << 20, "G": 1 << 30}[memory[-1]]


def find_partition(name: str) -> dict[str, str]:
    """What sinfo says of the partition of that name, of the first of several, or of the default
    one: of its largest nodes. Raises BadInput where there is none, or it starts no jobs.
    """
    name = name.partition(",")[0]
    partitions = {}
    for line in run_command("sinfo", "-h", "-e", "-o", "%P|%a|%l|%c|%m|%G").splitlines():
        row = dict(zip(SINFO_COLUMNS, line.split("|"), strict=True))
        is_default = row["name"].endswith("*")
        row["name"] = row["name"].removesuffix("*")
        if is_default and not name:
            name = row["name"]
        largest = partitions.setdefault(row["name"], row)
        if int(row["cpus"]) > int(largest["cpus"]):
            partitions[row["name"]] = row
    if name not in partitions:
        sentence = f"no partition {name or 'is the default'}{nearest(name, partitions)}"
        raise BadInput(f"{sentence} (there are: {', '.join(sorted(partitions))})")
    state = partitions[name]["state"]
    if state != "up":
        raise BadInput(f"partition {name} is {state}: it starts no jobs")
    return partitions[name]


def fit_request(
    variables: dict[str, str], num_threads: int, saves: bool = True, needs_gpu: bool = True
) -> list[str]:
    """What sbatch asks for: what work with `num_threads` a rank (0: all that it can get) can use
    and the partition has.

    Work that `saves` is warned ahead of the time limit. Each rank of work that `needs_gpu` gets one
    where there are any. Raises BadInput where the partition has less than the variables name.
    """
    partition = find_partition(variables["PARTITION"])
    name, has_gpu = partition["name"], "gpu" in partition["gres"]
    time, memory = variables["TIME"], variables["MEM"]
    num_ranks, num_cpus = int(variables["NUM_RANKS"]), int(partition["cpus"])
    allowed = re.search(r"MaxCPUsPerNode=(\d+)", run_command("scontrol", "show", "partition", name))
    if allowed:
        num_cpus = min(num_cpus, int(allowed[1]))
    num_wanted = num_threads or (NUM_GPU_CPUS if has_gpu else NUM_CPUS)
    cpus = int(variables["CPUS"] or max(1, min(num_wanted, num_cpus // num_ranks)))
    if num_ranks * cpus > num_cpus:
        sentence = f"{num_ranks} x {cpus} cores do not fit"
        raise BadInput(f"{sentence}: a node of {name} has {num_cpus}")
    limit = minutes_of(partition["limit"])
    minutes = minutes_of(time) if time else min(LIMIT_MINUTES, limit)
    if not 0 < minutes <= limit:  # no minutes would be taken for no limit
        over = f"over the limit of partition {name}, {partition['limit']}"
        raise BadInput(f"TIME={time} is {over if minutes else 'no time at all'}")
    request = [f"--partition={variables['PARTITION'] or name}", "--nodes=1"]
    request += [f"--ntasks={num_ranks}", f"--cpus-per-task={cpus}"]
    request.append(f"--time={time or int(minutes)}")
    if memory or not needs_gpu or MEMORY_VARIABLES.isdisjoint(os.environ):
        default = min(MEMORY_MB, int(partition["memory_mb"].rstrip("+")))
        request.append(f"--mem={memory or f'{default}M'}")
    if saves:  # so many seconds ahead of the limit, and up to 30 more
        request.append(f"--signal=B:USR1@{int(min(120, minutes * 10))}")
    if needs_gpu and has_gpu and GPU_VARIABLES.isdisjoint(os.environ):
        request.append(f"--gpus={num_ranks}")
    return request


def require_disk(num_bytes: int = MIN_FREE_BYTES) -> None:
    """Raise BadInput where a run would fill the disk."""
    free = shutil.disk_usage(REPOSITORY).free
    if free < num_bytes:
        needed = f"a job needs {num_bytes / 1e9:.1f} GB for its run"
        raise BadInput(f"{REPOSITORY} has {free / 1e9:.1f} GB free, {needed}")


def require_jobs(numbers: str) -> None:
    """Raise BadInput for a job to wait for that Slurm has never heard of, nor this project: sbatch
    would not wait at all.
    """
    for number in filter(None, numbers.split(",")):
        if (LOGS / f"{number}.exit").exists():
            continue
        try:
            run_command("scontrol", "show", "job", number)
        except BadInput:
            sentence = f"there is no such job, and {LOGS.name}/ has no end of one"
            raise BadInput(f"AFTER={number}: {sentence}") from None


def submit(name: str, work: Work, request: list[str], job: list[str], after: str) -> str:
    """Submit a job, an array if there are several tasks, with the arguments `job` of job.sh,
    of which the first is the code to run; returns its number. Raises BadInput with sbatch's reason.
    """
    # sbatch makes no folder, and a job without its log ends without a word
    LOGS.mkdir(parents=True, exist_ok=True)
    logs = str(LOGS).replace("%", "%%")  # a % of the project's path is no pattern
    options = [f"--job-name=pcam-{name}", f"--chdir={REPOSITORY}", "--requeue"]
    options += ["--open-mode=append", f"--output={logs}/%j.out", f"--error={logs}/%j.err"]
    if work.tasks:
        options.append(f"--array=0-{len(work.tasks) - 1}")
    if after:
        kind = "afternotok" if work.mends else "afterany"
        options.append(f"--dependency={kind}:{after.replace(',', ':')}")
    if work.mends:
        options.append("--kill-on-invalid-dep=yes")  # it goes from the queue when no task failed
    # of a job that this is called from, nothing may reach the new one
    unwanted = MEMORY_VARIABLES | GPU_VARIABLES if work.only_reads else ()
    environment = {}
    for key, value in os.environ.items():
        if key == "SLURM_CONF" or not key.startswith("SLURM_") and key not in unwanted:
            environment[key] = value
    command = ["sbatch", "--parsable", *options, *request, f"{job[0]}/jobs/job.sh", *job]
    answer = run_command(*command, env=environment)
    # NUMBER or NUMBER;CLUSTER in the last line: a site's sbatch may print a banner above it
    number = answer.strip().rpartition("\n")[2].partition(";")[0]
    if not number.isdigit():
        raise BadInput(f"sbatch gives no job number, it says {one_line(answer)!r}")
    return number


def queued_jobs() -> list[dict[str, str]]:
    """This project's jobs that wait or run, each task of an array by itself; `id` is what its run
    and logs know it by.
    """
    jobs = []
    answer = run_command("squeue", "--me", "-h", "-r", "-o", "%A|%i|%j|%T|%L|%r|%Z")
    for line in answer.splitlines():
        values = line.split("|", len(SQUEUE_COLUMNS) - 1)
        if values[-1] == str(REPOSITORY):
            jobs.append(dict(zip(SQUEUE_COLUMNS, values, strict=True)))
    return jobs


def describe_jobs(queued: list[dict[str, str]]) -> list[dict]:
    """A row a job, those that are over last: state, run folder, progress, time left, and the last
    words of a failed one.
    """
    numbers = {job["id"] for job in queued}
    logs = [log for log in LOGS.glob("*.err") if log.stem not in numbers]
    logs.sort(key=lambda log: log.stat().st_mtime, reverse=True)
    rows = queued + [describe_ended(log) for log in logs[:NUM_ENDED]]
    runs = {}
    for meta in sorted((REPOSITORY / "runs").glob("*/meta.json")):
        runs[job_of(meta).get("SLURM_JOB_ID")] = meta.parent
    for row in rows:
        if row["id"] in runs:
            row |= run_progress(runs[row["id"]])
    return rows


def describe_ended(log: Path) -> dict:
    """A row of a job that is over, from what job.sh left beside its stderr."""
    name, shown, code = (read_end(log.with_suffix(end)) for end in (".name", ".shown", ".exit"))
    state = STATES.get(code, f"failed, exit {code}")
    row = {"id": log.stem, "shown": shown or log.stem, "name": name, "state": state}
    if code != "0":
        row["stderr"] = read_end(log).splitlines()[-NUM_QUOTED_LINES:]
    return row


def read_end(path: Path, num_bytes: int = 4096) -> str:
    """The last bytes of a text file, stripped; empty where there is none."""
    if not path.is_file():
        return ""
    with open(path, "rb") as file:
        file.seek(max(0, path.stat().st_size - num_bytes))
        return file.read().decode(errors="replace").strip()


def run_progress(run: Path) -> dict[str, str]:
    """How far a run has come, and how long it will take at the pace of its last steps."""
    row = {"run": str(run.relative_to(REPOSITORY)), "left": ""}
    steps = run / "steps.csv"
    try:
        meta = read_json(run / "meta.json")
        num_steps = meta["steps_per_epoch"] * read_run_config(run).epochs
        last_steps = read_csv(steps)[-50:] if steps.is_file() else []
        seconds = sum(meta["batch_size"] / float(step["images_per_s"]) for step in last_steps)
        num_done = int(last_steps[-1]["step"]) if last_steps else 0
    except Exception as error:  # edited, or of another version
        return row | {"progress": f"cannot be read: {one_line(error)}"}
    if last_steps:
        row["left"] = format_duration((num_steps - num_done) * seconds / len(last_steps))
    return row | {"progress": f"step {num_done}/{num_steps}"}
