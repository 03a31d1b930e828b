"""What the Make targets call: their work as Slurm jobs, or on this machine where there is no
cluster.

Make variables come in by the environment, so that no shell ever reads them. Jobs themselves call
`examine` and `go`.
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))

try:
    from lib.command import (
        EXIT_DONE,
        EXIT_FINDING,
        EXIT_INTERRUPTED,
        BadInput,
        Parser,
        last_line,
        print_result,
        say,
        script,
    )
    from lib.jobs import slurm, snapshot
    from lib.jobs.work import (
        Work,
        build_work,
        read_variables,
        requeued_arguments,
        split_arguments,
        sweep_stages,
    )
    from lib.progress import format_duration
    from lib.rundir import SUBMITTED
except ModuleNotFoundError as error:
    remedy = "make setup, or name another PYTHON"
    print(f"error: {sys.executable} lacks the package {error.name}: {remedy}", file=sys.stderr)
    sys.exit(2)

TARGETS = ("train", "seeds", "folds", "bench", "audit")
# what says nothing where there is no cluster
CLUSTER_VARIABLES = ("PARTITION", "TIME", "CPUS", "MEM", "AFTER")


@script
def main(argv=None) -> int:
    parser = Parser(
        prog="submit.py",
        description="Submit the work of a Make target, or run it here where there is no Slurm.",
    )
    verbs = (*TARGETS, "sweep", "check", "status", "cancel", "here", "examine", "go")
    parser.add_argument("verb", choices=verbs)
    parser.add_argument(
        "rest", nargs=argparse.REMAINDER, help="here: a script and arguments before ARGS"
    )
    args = parser.parse_args(argv)
    if args.verb == "examine":
        return examine_here(*args.rest)
    if args.verb == "go":
        return go(*args.rest)
    if os.environ.get("IGNORED"):
        names = ", ".join(os.environ["IGNORED"].split())
        say(f"note: only make's command line sets its variables: {names} of the shell are ignored")
    variables = read_variables(os.environ)
    if args.verb == "here":
        return run_here([[*args.rest, *split_arguments(variables["ARGS"])]])
    if args.verb == "status":
        return show_status()
    if args.verb == "cancel":
        return cancel(variables)
    if args.verb == "check":
        return check(variables)
    submission = snapshot.describe_submission()
    os.environ[SUBMITTED] = json.dumps(submission)  # which children inherit
    if args.verb == "sweep":
        return sweep(variables, submission)
    work = build_work(args.verb, variables)
    if args.verb == "folds":
        write_missing_groups(work)
    if variables["NUM_RANKS"] != "1" and work.script != "train.py":
        raise BadInput(f"NUM_RANKS: {work.script} has one rank")
    chain = [work]
    if len(work.tasks) > 1:
        which = ["--where", f"submission={submission['id']}"]
        chain.append(Work("report.py", [args.verb, *which], only_reads=True))
    if slurm.has_slurm():
        return submit(args.verb, chain, variables, submission)
    return run_without_slurm(chain, variables)


def run_without_slurm(chain: list[Work], variables: dict[str, str]) -> int:
    """Run the tasks of the first work one after the other, and then the work that reads them."""
    work, *last = chain
    say_no_slurm(variables)
    ranks = []
    if variables["NUM_RANKS"] != "1":
        examine(work, variables)  # or each rank would say what is wrong, and torchrun much more
        # torchrun would, with a warning; `threads` counts
        os.environ.setdefault("OMP_NUM_THREADS", "1")
        ranks = ["-m", "torch.distributed.run", "--nproc-per-node", variables["NUM_RANKS"]]
    path = str(REPOSITORY / work.script)
    commands = [[*ranks, path, *arguments] for arguments in work.arguments_of_tasks()]
    return run_here(commands, [[str(REPOSITORY / work.script), *work.arguments] for work in last])


def write_missing_groups(work: Work) -> None:
    """Have audit.py find out here which patches share tissue, where nothing tells it yet: folds
    need that.
    """
    from lib.groups import group_of_rows
    from lib.jobs.preflight import training_config
    from lib.pcam import open_split

    data_dir = training_config(work.arguments).data_dir
    if group_of_rows(open_split(data_dir, "train"), data_dir) is not None:
        return
    say(f"{data_dir} has neither slide names nor groups.csv: looking for shared tissue first")
    audit = [str(REPOSITORY / "audit.py"), "data", data_dir, "--checks", "groups"]
    with tempfile.TemporaryDirectory() as out:
        subprocess.run([sys.executable, *audit, "--out", out], stdout=subprocess.DEVNULL)


def say_no_slurm(variables: dict[str, str]) -> None:
    """Say that there is no cluster, and which variables say nothing without one."""
    idle = [name for name in CLUSTER_VARIABLES if variables[name]]
    if variables["STAGE_DATA"] == "1":
        idle.append("STAGE_DATA")
    note = f", and {', '.join(idle)} say nothing" if idle else ""
    say(f"no Slurm cluster here: this runs on this machine{note}")


def sweep(variables: dict[str, str], submission: dict) -> int:
    """Plan a search and carry it out: as jobs, each after the one before, or rung by rung here."""
    if variables["NUM_RANKS"] != "1":
        raise BadInput("NUM_RANKS: the trials of a search have one rank each")
    name = variables["SEARCH"] or Path(variables["SPACE"]).stem
    command = [sys.executable, str(REPOSITORY / "sweep.py"), "plan", variables["SPACE"]]
    command += ["--name", name, *split_arguments(variables["ARGS"])]
    if variables["DATA"]:
        command.append(f"data_dir={variables['DATA']}")
    planned = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if planned.returncode:
        return planned.returncode
    num_rows = json.loads(planned.stdout.splitlines()[-1])["num_rows"]
    if slurm.has_slurm():
        return submit("sweep", sweep_stages(name, num_rows, []), variables, submission)
    say_no_slurm(variables)
    stages = sweep_stages(name, num_rows, ["--processes", variables["PROCESSES"]])
    stages = [work for work in stages if not work.tasks]
    return run_here([[str(REPOSITORY / work.script), *work.arguments] for work in stages])


def submit(target: str, chain: list[Work], variables: dict[str, str], submission: dict) -> int:
    """Check all that can be checked now, in the environment that jobs will have, and submit; each
    waits for the one before. A chain is submitted as a whole, or not at all.
    """
    slurm.require_disk(REPOSITORY)
    slurm.require_jobs(variables["AFTER"])
    say("checking environment, config and data")
    needs = examine(chain[0], variables)
    saves = chain[0].script in ("train.py", "sweep.py")
    request = slurm.fit_request(variables, needs["threads"], saves)
    alone = variables | {"NUM_RANKS": "1", "CPUS": "1"}
    light = slurm.fit_request(alone, 1, saves=False, needs_gpu=False)
    staged = os.path.abspath(needs["data_dir"]) if variables["STAGE_DATA"] == "1" else ""
    folder = snapshot.take_snapshot(submission)
    jobs, after = [], variables["AFTER"]
    try:
        for work in chain:
            options, data = (light, "") if work.only_reads else (request, staged)
            varied = f"{work.varied}={','.join(work.tasks)}" if work.tasks else ""
            arguments = snapshot.freeze_config(work, folder)
            job = [str(folder / "code"), sys.executable, data, varied, work.script, *arguments]
            jobs.append(slurm.submit(target, work, options, job, after))
            # the next job waits for what may not be needed, too
            after = f"{after},{jobs[-1]}" if work.mends else jobs[-1]
    except BadInput as error:
        raise BadInput(f"{error}{take_back(jobs, folder)}") from None
    say(f"job {', '.join(jobs)} submitted: {' '.join(request)}; `make status` shows how it fares")
    if chain[-1].script == "report.py":
        say(f"mean and spread will be in {slurm.LOGS.relative_to(REPOSITORY)}/{jobs[-1]}.err")
    print_result({"job": jobs[0], "jobs": jobs, "tasks": chain[0].tasks, "request": request})
    return EXIT_DONE


def take_back(jobs: list[str], folder: Path) -> str:
    """End the jobs of a chain that could not be submitted whole; says what has become of them."""
    numbers = " ".join(jobs)
    try:
        if jobs:
            slurm.run_command("scancel", *jobs)
    except BadInput:
        return f"; what was submitted before it stays in the queue: scancel {numbers} ends it"
    shutil.rmtree(folder)
    return f"; what was submitted before it is cancelled: {numbers}" if jobs else ""


def check(variables: dict[str, str]) -> int:
    """Say whether `make train` with the same variables can work: environment, keys, data, and the
    memory and time that it needs beside what it would get.
    """
    needs = examine(build_work("train", variables), variables, measures=True)
    say("environment, keys and data: as a training needs them")
    request, limit = [], "none"
    allowed_bytes = needs["available_bytes"]
    if slurm.has_slurm():
        slurm.require_disk(REPOSITORY)
        request = slurm.fit_request(variables, needs["threads"])
        options = dict(option.split("=", 1) for option in request)
        limit = options["--time"]
        allowed_bytes = slurm.bytes_of(options.get("--mem"))
    else:
        say_no_slurm(variables)
    fits = needs["memory_bytes"] <= allowed_bytes
    remedy = "" if fits else ": ask for more (MEM=), or take less (batch_size, data_residence=disk)"
    allowed = f"{allowed_bytes / 1e9:.1f} GB allowed{remedy}"
    say(f"memory: {needs['memory_bytes'] / 1e9:.1f} GB needed, {allowed}")
    is_longer = limit != "none" and needs["seconds"] > 60 * slurm.minutes_of(limit)
    note = "; at its limit the job goes on by itself" if is_longer else ""
    pace = f"{needs['num_threads']} threads of this machine's CPU"
    duration = f"{format_duration(needs['seconds'])} at best with {pace}"
    say(f"time: {duration}, limit {limit}{note}")
    print_result({"fits": fits, "request": request, **needs})
    return EXIT_DONE if fits else EXIT_FINDING


def examine(work: Work, variables: dict[str, str], measures: bool = False) -> dict:
    """What lib.jobs.preflight finds of the first task, in the environment that jobs will have.
    Raises BadInput for what cannot work.
    """
    options = {
        "data": variables["DATA"],
        "num_ranks": int(variables["NUM_RANKS"]),
        "measures": measures,
    }
    command = [sys.executable, __file__, "examine", json.dumps(options), work.script]
    command += work.arguments_of_tasks()[0]
    shell = ["bash", "-c", 'set -e; . jobs/env.sh; set +eu; exec "$@"', "bash", *command]
    pipes = {"capture_output": True, "text": True, "stdin": subprocess.DEVNULL}
    result = subprocess.run(shell, cwd=REPOSITORY, **pipes)
    last = (result.stdout.splitlines() or [""])[-1]
    needs = json.loads(last) if last.startswith("{") else {}
    if result.returncode or not needs:
        reason = needs.get("error")
        reason = reason or f"the environment of jobs does not: {last_line(result.stderr)}"
        raise BadInput(f"this cannot work: {reason}")
    return needs


def examine_here(options: str, name: str, *arguments) -> int:
    """In the environment of jobs: print what a script's work needs, as a JSON object."""
    from lib.jobs import preflight

    print_result(preflight.examine(name, list(arguments), **json.loads(options)))
    return EXIT_DONE


def go(data: str, copy: str, varied: str, name: str, *arguments) -> int:
    """In a job: become the script, for its value of what varies. A training that starts again goes
    on with its run.
    """
    os.environ[SUBMITTED] = json.dumps(snapshot.read_submission(REPOSITORY))
    if varied:
        key, _, values = varied.partition("=")
        value = values.split(",")[int(os.environ["SLURM_ARRAY_TASK_ID"])]
        arguments = [*arguments, f"{key}={value}"]
    if name == "train.py" and int(os.environ.get("SLURM_RESTART_COUNT", 0)):
        arguments = requeued_arguments(arguments, os.environ)
    if copy:
        from lib.pcam import DATA_COPY

        os.environ[DATA_COPY] = json.dumps([os.path.realpath(data), copy])
    return run_here([[str(REPOSITORY / name), *arguments]])


def run_here(commands: list[list[str]], last=()) -> int:
    """Run Python with each of these arguments in turn, until one is interrupted, and with those of
    `last` if all succeed.

    The very last one takes this process's place.
    """
    if len(commands) == 1:
        os.execv(sys.executable, [sys.executable, *commands[0]])
    codes = []
    signal.signal(signal.SIGINT, lambda *_: None)  # Ctrl-C reaches the child by itself
    while len(codes) < len(commands) and EXIT_INTERRUPTED not in codes:
        child = subprocess.Popen([sys.executable, *commands[len(codes)]])
        signal.signal(signal.SIGTERM, lambda number, _, child=child: child.send_signal(number))
        codes.append(child.wait())
    if last and not any(codes):
        return run_here(last)
    print_result(
        {"num_done": codes.count(EXIT_DONE), "num_planned": len(commands), "exit_codes": codes}
    )
    return max(map(abs, codes))


def show_status() -> int:
    """A line a job of this project, and the last words of those that failed."""
    has_slurm = slurm.has_slurm()
    rows = slurm.describe_jobs(slurm.queued_jobs() if has_slurm else [])
    if not has_slurm:
        say("no Slurm cluster here: `make runs` lists what is trained on this machine")
    for row in rows:
        number = row["id"] if row["shown"] == row["id"] else f"{row['id']} ({row['shown']})"
        columns = [row.get(name, "") for name in ("name", "state", "reason", "run", "progress")]
        parts = [number, *(text for text in columns if text not in ("", "None"))]
        if "limit_left" in row:
            parts.append(f"{row.get('left') or '?'} left, {row['limit_left']} to the time limit")
        say("  ".join(parts))
        for line in row.get("stderr", []):
            say(f"    {line}")
    print_result({"num_jobs": len(rows), "jobs": rows})
    return EXIT_DONE


def cancel(variables: dict[str, str]) -> int:
    """End this project's jobs, or JOB alone."""
    if not slurm.has_slurm():
        raise BadInput("no Slurm cluster here: there are no jobs to cancel")
    wanted, jobs = variables["JOB"], []
    for job in slurm.queued_jobs():
        array, _, _ = job["shown"].partition("_")
        if wanted in ("", job["id"], job["shown"], array):
            jobs.append(job["shown"])
    if wanted and not jobs:
        raise BadInput(f"no job {wanted} of this project waits or runs")
    if jobs:
        slurm.run_command("scancel", *jobs)
    print_result({"num_cancelled": len(jobs)})
    return EXIT_DONE


if __name__ == "__main__":
    sys.exit(main())
