"""Work as Slurm jobs: what they ask a partition for, how they are submitted, and how they fare.

Options and formats are those of the manual pages of sbatch, sinfo and squeue 22.05.
"""

import os
import shutil
import subprocess
from pathlib import Path

from lib.command import REPOSITORY, BadInput, one_line
from lib.files import read_cache
from lib.jobs.work import Work

LOGS = REPOSITORY / "jobs/logs"
# asked for, where the partition has as much
MEMORY_MB, LIMIT_MINUTES, NUM_CPUS, NUM_GPU_CPUS = 16_000, 60, 16, 4
NUM_QUOTED_LINES, NUM_ENDED = 3, 20  # of a job's stderr; jobs that are over
SINFO_COLUMNS = ("name", "state", "limit", "cpus", "memory_mb", "gres")
SQUEUE_COLUMNS = ("id", "shown", "name", "state", "limit_left", "reason", "folder")
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
    # of two parts the first are minutes, but hours behind days
    units = (60, 1, 1 / 60) if dash or len(parts) == 3 else (1, 1 / 60)
    minutes = sum(part * unit for part, unit in zip(parts, units, strict=False))
    return int(days or 0) * 1440 + minutes


def find_partition(names: str) -> dict[str, str]:
    """What sinfo says of the largest nodes of a partition: of that name, the first of several, or
    the default one. Raises BadInput where there is none.
    """
    name, rows = names.partition(",")[0], []
    for line in run_command("sinfo", "-h", "-e", "-o", "%P|%a|%l|%c|%m|%G").splitlines():
        row = dict(zip(SINFO_COLUMNS, line.split("|"), strict=True))
        is_default = row["name"].endswith("*")
        row["name"] = row["name"].removesuffix("*")
        if row["name"] == name or is_default and not name:
            rows.append(row)
    if not rows:
        raise BadInput(f"no partition {name or 'is the default'}: sinfo lists them")
    return max(rows, key=lambda row: int(row["cpus"]))


def fit_request(variables: dict[str, str], num_threads: int, saves: bool) -> list[str]:
    """What sbatch is asked for: what work with `num_threads` a rank (0: all that it can get) can
    use and the partition has. Work that `saves` is warned ahead of the time limit.

    Raises BadInput for a time over the partition's limit, with which a job would wait for ever.
    """
    partition = find_partition(variables["PARTITION"])
    has_gpu, num_ranks = "gpu" in partition["gres"], int(variables["NUM_RANKS"])
    num_wanted = num_threads or (NUM_GPU_CPUS if has_gpu else NUM_CPUS)
    num_cpus = max(1, min(num_wanted, int(partition["cpus"]) // num_ranks))
    limit = minutes_of(partition["limit"])
    time = variables["TIME"] or str(int(min(LIMIT_MINUTES, limit)))
    minutes = minutes_of(time)
    if not 0 < minutes <= limit:  # no minutes would be taken for no limit
        longest = f"{partition['limit']}, the limit of the partition"
        raise BadInput(f"TIME={time} is not between 0 and {longest}")
    memory = variables["MEM"]
    if not memory and not is_set("SBATCH_MEM_PER_"):
        memory = f"{min(MEMORY_MB, int(partition['memory_mb'].rstrip('+')))}M"
    request = [f"--partition={variables['PARTITION'] or partition['name']}", "--nodes=1"]
    request += [f"--ntasks={num_ranks}", f"--cpus-per-task={variables['CPUS'] or num_cpus}"]
    request.append(f"--time={time}")
    if memory:
        request.append(f"--mem={memory}")
    if saves:  # so many seconds ahead of the limit, and up to 30 more
        request.append(f"--signal=B:USR1@{int(min(120, minutes * 10))}")
    if has_gpu and not is_set("SBATCH_GPUS", "SBATCH_GRES"):
        request.append(f"--gpus={num_ranks}")
    return request


def is_set(*prefixes: str) -> bool:
    """Whether one of sbatch's own variables, such as those of GPUs, decides in place of this."""
    return any(name.startswith(prefixes) for name in os.environ if name != "SBATCH_GRES_FLAGS")


def submit(name: str, work: Work, request: list[str], job: list[str], after: str) -> str:
    """Submit a job, an array if there are several tasks, with the arguments `job` of job.sh,
    of which the first is the code to run; returns its number. Raises BadInput with sbatch's reason.
    """
    # sbatch makes no folder, and a job without its log ends without a word
    LOGS.mkdir(parents=True, exist_ok=True)
    logs = str(LOGS).replace("%", "%%")  # a % of the project's path is no pattern
    options = [f"--job-name=pcam-{name}", f"--chdir={REPOSITORY}", "--requeue"]
    options += ["--open-mode=append", f"--output={logs}/%j.out", f"--error={logs}/%j.err"]
    if work.is_array:
        options.append(f"--array=0-{len(work.tasks) - 1}")
    if after:
        kind = "afternotok" if work.mends else "afterany"
        options.append(f"--dependency={kind}:{after.replace(',', ':')}")
    if work.mends:
        options.append("--kill-on-invalid-dep=yes")  # it goes from the queue when no task failed
    # of a job that this is called from, nothing may reach the new one
    unwanted = ("SLURM_", "SBATCH_G") if work.only_reads else "SLURM_"
    environment = {}
    for key, value in os.environ.items():
        if key == "SLURM_CONF" or not key.startswith(unwanted):
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
    """A row a job, those that are over last: state, run folder, and the last lines of its log,
    which are its progress or its error.
    """
    numbers = {job["id"] for job in queued}
    logs = sorted(LOGS.glob("*.err"), key=lambda log: log.stat().st_mtime, reverse=True)
    logs = [log for log in logs if log.stem not in numbers]
    rows = list(queued)
    for log in logs[:NUM_ENDED]:
        code = read_end(log.with_suffix(".exit"))  # which job.sh left
        rows.append({"id": log.stem, "state": STATES.get(code, f"failed, exit {code}")})
    runs = {}
    for meta in sorted((REPOSITORY / "runs").glob("*/meta.json")):
        job = read_cache(meta).get("job") or {}
        runs[job.get("SLURM_JOB_ID")] = str(meta.parent.relative_to(REPOSITORY))
    for row in rows:
        row["run"] = runs.get(row["id"])
        row["log"] = read_end(LOGS / f"{row['id']}.err").splitlines()[-NUM_QUOTED_LINES:]
    return rows


def read_end(path: Path, num_bytes: int = 4096) -> str:
    """The last bytes of a text file, stripped; empty where there is none."""
    if not path.is_file():
        return ""
    return path.read_bytes()[-num_bytes:].decode(errors="replace").strip()
