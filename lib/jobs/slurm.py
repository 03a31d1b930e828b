"""Work as Slurm jobs: what a Make target runs, what it asks a partition for, the code that was
submitted, and how jobs fare.

Options and formats are those of the manual pages of sbatch, sinfo, scontrol and squeue 22.05.
"""

import argparse
import datetime
import hashlib
import os
import platform
import re
import secrets
import shlex
import shutil
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

from lib.command import BadInput, nearest, one_line
from lib.files import read_cache, read_csv, read_json
from lib.progress import format_duration
from lib.rundir import REPOSITORY, git_state, read_run_config

LOGS, SNAPSHOTS = REPOSITORY / "jobs/logs", REPOSITORY / "jobs/snapshots"
LEAST_FREE_BYTES = 1 << 30  # checkpoints and logs of a run, with room to spare
# asked for, where the partition has as much
MEMORY_MB, LIMIT_MINUTES, NUM_CPUS, NUM_GPU_CPUS = 16_000, 60, 16, 4
NUM_QUOTED_LINES, NUM_ENDED = 3, 20  # of a failed job's stderr; jobs that are over
SNAPSHOT_S = 86_400  # a snapshot stays at least so long

# Make variables: what they may look like, and what they are when not given
VARIABLES = {
    "SEED": (r"\d+", "1"),
    "SEEDS": (r"\d+(,\d+)*", "1,2,3"),
    "K": (r"[2-9]|[1-9]\d+", "5"),
    "NUM_RANKS": (r"[1-9]\d*", "1"),
    "PARTITION": (r"\w[\w.-]*", ""),
    "TIME": (r"(\d+-)?\d+(:\d+){0,2}", ""),
    "CPUS": (r"[1-9]\d*", ""),
    "MEM": (r"[1-9]\d*[MG]", ""),
    "AFTER": (r"\d+(,\d+)*", ""),
    "JOB": (r"\d+(_\d+)?", ""),
    "STAGE_DATA": (r"[01]", "0"),
    "SEARCH": (r"[A-Za-z0-9][A-Za-z0-9_-]{0,39}", ""),
    "PROCESSES": (r"[1-9]\d*", "1"),
}
EXAMPLES = {
    "TIME": "30 (minutes), 0:30:00 or 1-12:00:00",
    "MEM": "8G",
    "SEEDS": "1,2,3",
    "AFTER": "123",
    "JOB": "123 or 123_4",
}
MOST_TASKS = 1000  # of an array: Slurm's MaxArraySize, unless a site has set another


def read_variables(environment) -> dict[str, str]:
    """The Make variables in an environment. Raises BadInput for one that could mean anything but
    what it is for.
    """
    values = {name: environment.get(name, "") for name in ("ARGS", "DATA", "OUT", "SPACE")}
    for name, (form, default) in VARIABLES.items():
        values[name] = environment.get(name) or default
        if values[name] and not re.fullmatch(form, values[name], re.ASCII):
            example = f", such as {EXAMPLES[name]}" if name in EXAMPLES else ""
            raise BadInput(f"{name} is {values[name]!r}, it must be of the form {form}{example}")
    return values


def split_arguments(text: str) -> list[str]:
    """ARGS as a list: quotes hold together what has spaces, and no shell sees any of it."""
    try:
        return shlex.split(text)
    except ValueError as error:
        raise BadInput(f"ARGS {text!r}: {one_line(error).lower()}") from None


@dataclass(frozen=True)
class Work:
    """What a Make target runs: a script with arguments, once, or once for each of `tasks` with a
    further key=value.
    """

    script: str
    arguments: list[str]
    varied: str = ""  # the key that differs between tasks
    tasks: tuple[str, ...] = ()
    only_reads: bool = False  # what other jobs have computed: it needs one core and no GPU
    mends: bool = False  # what tasks of the job before left undone: it starts only if one failed

    def of_task(self, task: str) -> list[str]:
        return [*self.arguments, *([f"{self.varied}={task}"] if task else [])]


def build_work(target: str, variables: dict[str, str]) -> Work:
    """The work of `make TARGET`."""
    arguments, data, num_folds = (
        split_arguments(variables["ARGS"]),
        variables["DATA"],
        int(variables["K"]),
    )
    if target == "audit":
        if not Path(data).is_dir() or not data:
            raise BadInput(f"make audit needs DATA=DIR, the PCam folder to audit, {data!r} is none")
        out = variables["OUT"] or f"audit-{Path(data).resolve().name}"
        return Work("audit.py", ["data", data, "--out", out, *arguments])
    if target == "bench":
        out = ["--out", variables["OUT"]] if variables["OUT"] else []
        return Work("benchmark.py", ["all", *(["--data", data] if data else []), *out, *arguments])
    arguments += [f"data_dir={data}"] if data else []
    seed = [] if "--resume" in arguments else [f"seed={variables['SEED']}"]
    if target == "seeds":
        return Work(
            "train.py", arguments, "seed", tuple(dict.fromkeys(variables["SEEDS"].split(",")))
        )
    if target == "folds":
        return Work(
            "train.py",
            [*seed, f"num_folds={num_folds}", *arguments],
            "fold",
            tuple(map(str, range(num_folds))),
        )
    return Work("train.py", seed + arguments)


def sweep_stages(name: str, num_rows: list[int], arguments: list[str]) -> list[Work]:
    """A planned search as jobs, one after the other: three for each rung.

    An array carries out the rows, a job those that a killed task left, and a job promotes or, at
    last, names the champion.
    """
    stages = []
    for rung, num in enumerate(num_rows):
        run = ["run", name, "--rung", str(rung)]
        ending = (
            ["champion", name]
            if rung == len(num_rows) - 1
            else ["promote", name, "--rung", str(rung)]
        )
        stages.append(Work("sweep.py", [*run, *arguments], "--row", tuple(map(str, range(num)))))
        stages.append(Work("sweep.py", [*run, "--all", *arguments], mends=True))
        stages.append(Work("sweep.py", [*ending, *arguments], only_reads=True))
    return stages


def training_options(arguments) -> tuple[argparse.Namespace, list[str]]:
    """What says, among train.py's arguments, which run it is and where, and the other arguments."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for option, default in (("--config", ""), ("--runs", "runs"), ("--resume", None)):
        parser.add_argument(option, default=default)
    return parser.parse_known_args(arguments)


def job_of(meta: Path) -> dict:
    """The Slurm job that a run's meta.json names; empty for one that names none, or cannot be
    read.
    """
    return read_cache(meta).get("job") or {}


def going_on(arguments: list[str], environment) -> list[str]:
    """train.py's arguments when a job starts again: its run resumed, if it got as far as to make
    one.

    The run remembers its job, in meta.json, so that there is no second file that has to agree with
    it.
    """
    options, rest = training_options(arguments)
    for meta in sorted(Path(options.runs).glob("*/meta.json"), reverse=True):
        job = job_of(meta)
        if all(
            job.get(name) == environment.get(name)
            for name in ("SLURM_JOB_ID", "SLURM_CLUSTER_NAME")
        ):
            kept = [item for item in rest if item.startswith("-") or "=" not in item]
            return ["--runs", options.runs, "--resume", str(meta.parent), *kept]
    return arguments


def run_command(*command, **options) -> str:
    """The stdout of a Slurm or git command. Raises BadInput with the first line of its stderr."""
    result = subprocess.run(
        command, capture_output=True, text=True, errors="surrogateescape", **options
    )
    if result.returncode:
        raise BadInput(f"{command[0]}: {one_line(result.stderr.removeprefix(f'{command[0]}: '))}")
    return result.stdout


def has_slurm() -> bool:
    """Whether this machine belongs to a cluster: the programs are there, and know where their
    controller is.
    """
    if not shutil.which("sbatch"):
        return False
    return (
        "configuration source"
        not in subprocess.run(["sinfo", "-h"], capture_output=True, text=True).stderr
    )


def minutes_of(text: str) -> float:
    """Slurm's `days-hours:minutes:seconds`, `hours:minutes:seconds`, `minutes:seconds` or
    `minutes`; infinity for no limit.
    """
    if not text[0].isdigit():
        return float("inf")
    days, dash, clock = text.rpartition("-")
    parts = [int(part) for part in clock.split(":")]
    hours, minutes, seconds = [*([0] * (not dash and len(parts) < 3)), *parts, 0, 0][:3]
    return int(days or 0) * 1440 + hours * 60 + minutes + seconds / 60


def fit_request(
    variables: dict[str, str], num_threads: int, saves: bool = True, needs_gpu: bool = True
) -> list[str]:
    """What sbatch asks for: what work with `num_threads` a rank (0: all that it can get) can use
    and the partition has.

    Work that `saves` is warned ahead of the time limit. Each rank of work that `needs_gpu` gets one
    where there are any. Raises BadInput where there is no such partition, it starts no jobs, or has
    less than the variables name.
    """
    name, ranks, time = variables["PARTITION"], int(variables["NUM_RANKS"]), variables["TIME"]
    rows = [
        line.split("|")
        for line in run_command("sinfo", "-h", "-e", "-o", "%P|%a|%l|%c|%m|%G").splitlines()
    ]
    chosen = [row for row in rows if (row[0].rstrip("*") == name if name else row[0].endswith("*"))]
    if not chosen:
        names = sorted({row[0].rstrip("*") for row in rows})
        raise BadInput(
            f"no partition {name or 'is the default'}{nearest(name, names)} (there are:"
            f" {', '.join(names)})"
        )
    name, state, limit, num_cpus, memory_mb, gres = max(chosen, key=lambda row: int(row[3]))
    name, num_cpus, has_gpu = name.rstrip("*"), int(num_cpus), "gpu" in gres
    if state != "up":
        raise BadInput(f"partition {name} is {state}: it starts no jobs")
    if most := re.search(
        r"MaxCPUsPerNode=(\d+)", run_command("scontrol", "show", "partition", name)
    ):
        num_cpus = min(num_cpus, int(most[1]))
    usable = min(num_threads or (NUM_GPU_CPUS if has_gpu else NUM_CPUS), num_cpus // ranks)
    if usable < 1 or ranks * int(variables["CPUS"] or 1) > num_cpus:
        raise BadInput(
            f"{ranks} x {variables['CPUS'] or 1} cores do not fit: a node of {name} has {num_cpus}"
        )
    # no minutes would be taken for no limit
    if time and not 0 < minutes_of(time) <= minutes_of(limit):
        over = (
            f"over the limit of partition {name}, {limit}" if minutes_of(time) else "no time at all"
        )
        raise BadInput(f"TIME={time} is {over}")
    minutes = minutes_of(time) if time else min(LIMIT_MINUTES, minutes_of(limit))
    request = [
        f"--partition={name}",
        "--nodes=1",
        f"--ntasks={ranks}",
        f"--cpus-per-task={variables['CPUS'] or usable}",
    ]
    request += [
        f"--mem={variables['MEM'] or f'{min(MEMORY_MB, int(memory_mb))}M'}",
        f"--time={time or int(minutes)}",
    ]
    # so many seconds ahead of the limit, and up to 30 more
    request += [f"--signal=B:USR1@{int(min(120, minutes * 10))}"] if saves else []
    return request + ([f"--gpus={ranks}"] if has_gpu and needs_gpu else [])


def require_disk(folder: Path, least_bytes: int = LEAST_FREE_BYTES) -> None:
    """Raise BadInput where a run would fill the disk."""
    if (free := shutil.disk_usage(folder).free) < least_bytes:
        raise BadInput(
            f"{folder} has {free / 1e9:.1f} GB free, a job needs {least_bytes / 1e9:.1f} GB for"
            " its run"
        )


def require_jobs(numbers: str) -> None:
    """Raise BadInput for a job to wait for that Slurm has never heard of, nor this project: sbatch
    would not wait at all.
    """
    for number in filter(None, numbers.split(",")):
        if not (LOGS / f"{number}.exit").exists():
            try:
                run_command("scontrol", "show", "job", number)
            except BadInput:
                raise BadInput(
                    f"AFTER={number}: there is no such job, and {LOGS.name}/ has no end of one"
                ) from None


def take_snapshot() -> Path:
    """A copy of the program as it is now, uncommitted changes and new files included, for a job
    that starts later.

    Of a git repository it is a clone on the same commit with the same changes, so that a run's
    meta.json tells the truth.
    """
    snapshot = (
        SNAPSHOTS / f"{datetime.datetime.now(datetime.UTC):%Y%m%dT%H%M%SZ}-{secrets.token_hex(2)}"
    )
    snapshot.parent.mkdir(parents=True, exist_ok=True)
    here, there = ["git", "-C", str(REPOSITORY)], ["git", "-C", str(snapshot)]
    if not (REPOSITORY / ".git").exists():
        kept_out = {REPOSITORY / name for name in ("data", "runs", "jobs/logs", "jobs/snapshots")}

        def hidden(folder: str, names: list[str]) -> list[str]:
            return [
                name
                for name in names
                if name.startswith((".", "__pycache__")) or Path(folder, name) in kept_out
            ]

        return shutil.copytree(REPOSITORY, snapshot, ignore=hidden)
    run_command(
        "git", "clone", "--quiet", "--shared", "--no-checkout", str(REPOSITORY), str(snapshot)
    )
    run_command(
        *there, "checkout", "--quiet", "--detach", run_command(*here, "rev-parse", "HEAD").strip()
    )
    changed = run_command(*here, "diff", "--no-renames", "--name-only", "-z", "HEAD")
    changed += run_command(*here, "ls-files", "--others", "--exclude-standard", "-z")
    for path in filter(None, changed.split("\0")):
        if (snapshot / path).is_dir() and not (snapshot / path).is_symlink():
            shutil.rmtree(snapshot / path)
        (snapshot / path).unlink(missing_ok=True)
        if (REPOSITORY / path).is_file():
            (snapshot / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(REPOSITORY / path, snapshot / path)
    return snapshot


def remove_snapshots() -> None:
    """Remove this user's old snapshots, but those of jobs that wait or run."""
    commands, now = run_command("squeue", "-h", "-o", "%o"), time.time()
    for kept in SNAPSHOTS.glob("*"):
        status = kept.stat()
        if (
            status.st_uid == os.getuid()
            and now - status.st_mtime > SNAPSHOT_S
            and kept.name not in commands
        ):
            shutil.rmtree(kept, ignore_errors=True) if kept.is_dir() else kept.unlink()


def describe_submission() -> dict:
    """What a run's meta.json keeps of its submission: the code as it was then, and an id that all
    its tasks share.
    """
    state, now = git_state(), datetime.datetime.now(datetime.UTC)
    state["uncommitted_patch_sha256"] = hashlib.sha256(
        state.pop("uncommitted_patch").encode()
    ).hexdigest()
    number = f"{now:%Y%m%dT%H%M%SZ}-{secrets.token_hex(2)}"
    return {
        "id": number,
        "utc": now.isoformat(timespec="seconds"),
        "host": platform.node(),
        "folder": str(REPOSITORY),
    } | state


def submit(name: str, work: Work, python: str, request: list[str], data: str, after: str) -> str:
    """Submit a job, an array if there are several tasks; returns its id. Raises BadInput with
    sbatch's reason.
    """
    if len(work.tasks) > MOST_TASKS:
        raise BadInput(f"{len(work.tasks)} tasks are more than an array takes, {MOST_TASKS}")
    # sbatch makes no folder, and a job without its log ends without a word
    LOGS.mkdir(parents=True, exist_ok=True)
    remove_snapshots()
    code = take_snapshot()
    options = [
        f"--job-name=pcam-{name}",
        f"--chdir={REPOSITORY}",
        "--requeue",
        "--open-mode=append",
        *request,
    ]
    logs = str(LOGS).replace("%", "%%")  # a % of the project's path is no pattern
    options += [f"--output={logs}/%j.out", f"--error={logs}/%j.err"]
    options += [f"--array=0-{len(work.tasks) - 1}"] if work.tasks else []
    if after:
        options.append(
            f"--dependency={'afternotok' if work.mends else 'afterany'}:{after.replace(',', ':')}"
        )
    if work.mends:
        options.append("--kill-on-invalid-dep=yes")  # it goes from the queue when no task failed
    arguments, wanted = work.arguments, training_options(work.arguments)
    # a copy, for it may be edited before the job starts
    if work.script == "train.py" and wanted[0].config:
        frozen = shutil.copy(wanted[0].config, code.with_suffix(".yaml"))
        arguments = ["--config", frozen, "--runs", wanted[0].runs, *wanted[1]]
    varied = f"{work.varied}={','.join(work.tasks)}" if work.tasks else ""
    job = [code / "jobs/job.sh", code, python, data, varied, work.script, *arguments]
    # of a job that this is called from, nothing may reach the new one
    environment = {
        key: value
        for key, value in os.environ.items()
        if not key.startswith("SLURM_") or key == "SLURM_CONF"
    }
    try:
        return (
            run_command("sbatch", "--parsable", *options, *map(str, job), env=environment)
            .strip()
            .partition(";")[0]
        )
    except BadInput:
        shutil.rmtree(code)
        raise


def queued_jobs() -> list[dict[str, str]]:
    """This project's jobs that wait or run, each task of an array by itself; `id` is what its run
    and logs know it by.
    """
    columns = ("id", "shown", "name", "state", "limit_left", "reason", "folder")
    rows = run_command("squeue", "--me", "-h", "-r", "-o", "%A|%i|%j|%T|%L|%r|%Z").splitlines()
    # not of torn names
    jobs = [
        dict(zip(columns, row.split("|", 6), strict=True)) for row in rows if row.count("|") >= 6
    ]
    return [job for job in jobs if job["folder"] == str(REPOSITORY)]


def describe_jobs(queued: list[dict[str, str]]) -> list[dict]:
    """A row a job, those that are over last: state, run folder, progress, time left, and the last
    words of a failed one.
    """
    metas = sorted((REPOSITORY / "runs").glob("*/meta.json"))
    runs = {job_of(meta).get("SLURM_JOB_ID"): meta.parent for meta in metas}
    rows, known = [dict(job) for job in queued], {job["id"] for job in queued}
    logs = [log for log in LOGS.glob("*.err") if log.stem not in known and log.is_file()]
    for log in sorted(logs, key=lambda path: path.stat().st_mtime, reverse=True)[:NUM_ENDED]:
        # job.sh leaves them
        name, shown, code = (
            read_end(log.with_suffix(suffix)) for suffix in (".name", ".shown", ".exit")
        )
        stopped = dict.fromkeys(("130", "138", "143"), "stopped")
        state = ({"0": "done", "": "killed"} | stopped).get(code, f"failed, exit {code}")
        quoted = {} if code == "0" else {"stderr": read_end(log).splitlines()[-NUM_QUOTED_LINES:]}
        rows.append(
            {"id": log.stem, "shown": shown or log.stem, "name": name, "state": state} | quoted
        )
    return [row | (run_progress(runs[row["id"]]) if row["id"] in runs else {}) for row in rows]


def read_end(path: Path, num_bytes: int = 4096) -> str:
    """The last bytes of a text file, stripped; empty where there is none."""
    if not path.is_file():
        return ""
    with open(path, "rb") as file:
        file.seek(max(0, path.stat().st_size - num_bytes))
        return file.read().decode(errors="replace").strip()


def run_progress(run: Path) -> dict[str, str]:
    """How far a run has come, and how long it will take at the pace of its last steps."""
    found = {"run": str(run.relative_to(REPOSITORY))}
    try:
        meta, rows = (
            read_json(run / "meta.json"),
            read_csv(run / "steps.csv")[-50:] if (run / "steps.csv").is_file() else [],
        )
        total, num_done = (
            meta["steps_per_epoch"] * read_run_config(run).epochs,
            int(rows[-1]["step"]) if rows else 0,
        )
        step_s = sum(meta["batch_size"] / float(row["images_per_s"]) for row in rows) / max(
            len(rows), 1
        )
    except (OSError, BadInput, KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        # edited, or of another version
        return found | {"progress": f"cannot be read: {one_line(error)}"}
    left = format_duration((total - num_done) * step_s) if rows else ""
    return found | {"progress": f"step {num_done}/{total}", "left": left}
