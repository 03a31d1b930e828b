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

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

try:
    from lib.command import (
        EXIT_DONE,
        EXIT_FINDING,
        EXIT_INTERRUPTED,
        REPOSITORY,
        BadInput,
        Parser,
        last_line,
        print_result,
        run_script,
        say,
        script,
    )
    from lib.files import read_json
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

TRAININGS = ("train", "seeds", "folds")
# what says nothing where there is no cluster
CLUSTER_VARIABLES = ("PARTITION", "TIME", "CPUS", "MEM", "AFTER", "STAGE_DATA")


@script
def main(argv=None) -> int:
    parser = Parser(
        prog="submit.py",
        description="Submit the work of a Make target, or run it here where there is no Slurm.",
    )
    verbs = (*TRAININGS, "bench", "audit", "sweep", *ACTIONS, "here", *JOB_STEPS)
    parser.add_argument("verb", choices=verbs)
    parser.add_argument(
        "rest", nargs=argparse.REMAINDER, help="here: a script and arguments before ARGS"
    )
    args = parser.parse_args(argv)
    if args.verb in JOB_STEPS:
        return JOB_STEPS[args.verb](*args.rest)
    ignored = os.environ.get("IGNORED", "").split()
    if ignored:
        names = ", ".join(ignored)
        say(f"note: only make's command line sets its variables: {names} of the shell are ignored")
    variables = read_variables(os.environ)
    if args.verb == "here":
        return run_here([[*args.rest, *split_arguments(variables["ARGS"])]])
    if args.verb in ACTIONS:
        return ACTIONS[args.verb](variables)
    if variables["NUM_RANKS"] != "1" and args.verb not in TRAININGS:
        raise BadInput(f"NUM_RANKS: what make {args.verb} runs has one rank")
    submission = snapshot.describe_submission()
    os.environ[SUBMITTED] = json.dumps(submission)  # which children inherit
    if args.verb == "sweep":
        return sweep(variables, submission)
    work = build_work(args.verb, variables)
    if args.verb == "folds":
        write_missing_groups(work)
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
        # torchrun would, with a warning; `threads` counts
        os.environ.setdefault("OMP_NUM_THREADS", "1")
        ranks = ["-m", "torch.distributed.run", "--nproc-per-node", variables["NUM_RANKS"]]
    if ranks or work.tasks:
        examine(work, variables)  # or each of them would say what is wrong
    commands = [[*ranks, path_of(work), *arguments] for arguments in work.arguments_of_tasks()]
    return run_here(commands, [[path_of(work), *work.arguments] for work in last])


def path_of(work: Work) -> str:
    return str(REPOSITORY / work.script)


def write_missing_groups(work: Work) -> None:
    """Have audit.py find out here which patches share tissue, where nothing tells it yet: folds
    need that.
    """
    from lib.groups import group_of_rows
    from lib.jobs.preflight import read_config
    from lib.pcam import open_split

    data_dir = read_config(work.script, work.arguments).data_dir
    if group_of_rows(open_split(data_dir, "train"), data_dir) is not None:
        return
    say(f"{data_dir} has neither slide names nor groups.csv: looking for shared tissue first")
    with tempfile.TemporaryDirectory() as out:
        audit = ("data", data_dir, "--checks", "groups", "--out", out)
        run_script("audit.py", *audit, codes=(EXIT_DONE, EXIT_FINDING), shows_progress=True)


def say_no_slurm(variables: dict[str, str]) -> None:
    """Say that there is no cluster, and which variables say nothing without one."""
    idle = [name for name in CLUSTER_VARIABLES if variables[name] not in ("", "0")]
    note = f", and {', '.join(idle)} say nothing" if idle else ""
    say(f"no Slurm cluster here: this runs on this machine{note}")


def sweep(variables: dict[str, str], submission: dict) -> int:
    """Plan a search and carry it out: as jobs, each after the one before, or rung by rung here."""
    name = variables["SEARCH"] or Path(variables["SPACE"]).stem
    arguments = [variables["SPACE"], "--name", name, *split_arguments(variables["ARGS"])]
    if variables["DATA"]:
        arguments.append(f"data_dir={variables['DATA']}")
    command = [sys.executable, str(REPOSITORY / "sweep.py"), "plan", *arguments]
    planned = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if planned.returncode:
        return planned.returncode
    num_rows = json.loads(planned.stdout.splitlines()[-1])["num_rows"]
    if slurm.has_slurm():
        return submit("sweep", sweep_stages(name, num_rows, []), variables, submission)
    say_no_slurm(variables)
    stages = sweep_stages(name, num_rows, ["--processes", variables["PROCESSES"]])
    return run_here([[path_of(work), *work.arguments] for work in stages if not work.tasks])


def submit(target: str, chain: list[Work], variables: dict[str, str], submission: dict) -> int:
    """Check all that can be checked now, in the environment that jobs will have, and submit; each
    waits for the one before. A chain is submitted as a whole, or not at all.
    """
    slurm.require_disk()
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
    needed_bytes, allowed_bytes = needs["memory_bytes"], needs["available_bytes"]
    if slurm.has_slurm():
        slurm.require_disk()
        request = slurm.fit_request(variables, needs["threads"])
        options = dict(option.split("=", 1) for option in request)
        limit = options["--time"]
        allowed_bytes = slurm.bytes_of(options.get("--mem"))
    else:
        say_no_slurm(variables)
    fits = needed_bytes <= allowed_bytes
    remedy = "" if fits else ": ask for more (MEM=), or take less (batch_size, data_residence=disk)"
    allowed = f"{allowed_bytes / 1e9:.1f} GB allowed{remedy}"
    say(f"memory: {needed_bytes / 1e9:.1f} GB needed, {allowed}")
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
    options = {"num_ranks": int(variables["NUM_RANKS"]), "measures": measures}
    command = [sys.executable, __file__, "examine", json.dumps(options), work.script]
    command += work.arguments_of_tasks()[0]
    shell = ["bash", "-c", 'set -e; . jobs/env.sh; set +eu; exec "$@"', "bash", *command]
    pipes = {"capture_output": True, "text": True, "stdin": subprocess.DEVNULL}
    result = subprocess.run(shell, cwd=REPOSITORY, **pipes)
    last = last_line(result.stdout)
    needs = json.loads(last) if last.startswith("{") else {}
    if result.returncode or not needs:
        reason = f"the environment of jobs does not: {last_line(result.stderr)}"
        raise BadInput(f"this cannot work: {needs.get('error', reason)}")
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
    # beside the code that the job runs
    os.environ[SUBMITTED] = json.dumps(read_json(REPOSITORY.parent / "submission.json"))
    arguments = list(arguments)
    if varied:
        key, _, values = varied.partition("=")
        value = values.split(",")[int(os.environ["SLURM_ARRAY_TASK_ID"])]
        arguments.append(f"{key}={value}")
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
    for command in commands:
        child = subprocess.Popen([sys.executable, *command])
        signal.signal(signal.SIGTERM, lambda number, _, child=child: child.send_signal(number))
        codes.append(child.wait())
        if codes[-1] == EXIT_INTERRUPTED:
            break
    if last and not any(codes):
        return run_here(last)
    num_done = codes.count(EXIT_DONE)
    print_result({"num_done": num_done, "num_planned": len(commands), "exit_codes": codes})
    return max(map(abs, codes))


def show_status(_variables) -> int:
    """A line a job of this project, and the last words of those that failed."""
    queued = []
    if slurm.has_slurm():
        queued = slurm.queued_jobs()
    else:
        say("no Slurm cluster here: `make runs` lists what is trained on this machine")
    rows = slurm.describe_jobs(queued)
    for row in rows:
        is_task = row["shown"] != row["id"]
        parts = [f"{row['id']} ({row['shown']})" if is_task else row["id"]]
        for name in ("name", "state", "reason", "run", "progress"):
            if row.get(name, "None") not in ("", "None"):
                parts.append(row[name])
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
        array = job["shown"].partition("_")[0]
        if wanted in ("", job["id"], job["shown"], array):
            jobs.append(job["shown"])
    if wanted and not jobs:
        raise BadInput(f"no job {wanted} of this project waits or runs")
    if jobs:
        slurm.run_command("scancel", *jobs)
    print_result({"num_cancelled": len(jobs)})
    return EXIT_DONE


# what reads or ends jobs; what jobs call, in their environment
ACTIONS = {"check": check, "status": show_status, "cancel": cancel}
JOB_STEPS = {"examine": examine_here, "go": go}

if __name__ == "__main__":
    sys.exit(main())
