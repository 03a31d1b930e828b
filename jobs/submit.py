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
    from lib.blocks import table_of
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
    from lib.files import read_json, require_space
    from lib.jobs import slurm, snapshot
    from lib.jobs.work import (
        Work,
        build_chain,
        parse_arguments,
        read_variables,
        resumed_arguments,
        split_arguments,
        sweep_chain,
    )
    from lib.progress import format_duration
    from lib.rundir import SUBMITTED
except ModuleNotFoundError as error:
    remedy = "make setup, or name another PYTHON"
    print(f"error: {sys.executable} lacks the package {error.name}: {remedy}", file=sys.stderr)
    sys.exit(2)

TRAININGS = ("train", "seeds", "folds")
MIN_FREE_BYTES = 1 << 30  # for the checkpoints and logs of a run


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
    ignored = ", ".join(os.environ.get("IGNORED", "").split())
    if ignored:
        say(
            f"note: only make's command line sets its variables: {ignored} of the shell are ignored"
        )
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
        chain = plan_sweep(variables)
    else:
        chain = build_chain(args.verb, variables, submission)
    if args.verb == "folds":
        write_missing_groups(chain[0])
    if slurm.has_slurm():
        return submit(args.verb, chain, variables, submission)
    return run_without_slurm(chain, variables)


def plan_sweep(variables: dict[str, str]) -> list[Work]:
    """Plan a search: the works that carry it out."""
    name = variables["SEARCH"] or Path(variables["SPACE"]).stem
    arguments = [variables["SPACE"], "--name", name, *split_arguments(variables["ARGS"])]
    if variables["DATA"]:
        arguments.append(f"data_dir={variables['DATA']}")
    planned = run_script("sweep.py", "plan", *arguments, shows_progress=True)
    return sweep_chain(name, planned["num_rows"], variables["PROCESSES"])


def run_without_slurm(chain: list[Work], variables: dict[str, str]) -> int:
    """Run what is no array, one command after the other: it carries out all that an array would."""
    say("no Slurm cluster here: this runs on this machine")
    ranks = []
    if variables["NUM_RANKS"] != "1":
        # torchrun would, with a warning; `threads` counts
        os.environ.setdefault("OMP_NUM_THREADS", "1")
        ranks = ["-m", "torch.distributed.run", "--nproc-per-node", variables["NUM_RANKS"]]
    if ranks or chain[0].is_array:
        examine(chain[0], variables)  # or each task would say what is wrong
    commands = []
    for work in chain:
        if not work.is_array:
            launcher = [] if work.only_reads else ranks
            commands += [[*launcher, *command] for command in work.commands()]
    return run_here(commands)


def write_missing_groups(work: Work) -> None:
    """Have audit.py find out here which patches share tissue, where nothing tells it yet: folds
    need that.
    """
    from lib.groups import group_of_rows
    from lib.jobs.preflight import read_config
    from lib.pcam import open_split

    data_dir = read_config(work.script, parse_arguments(work.script, work.arguments)).data_dir
    if group_of_rows(open_split(data_dir, "train"), data_dir) is None:
        say(f"{data_dir} has neither slide names nor groups.csv: looking for shared tissue first")
        with tempfile.TemporaryDirectory() as out:
            audit = ("data", data_dir, "--checks", "groups", "--out", out)
            run_script("audit.py", *audit, codes=(EXIT_DONE, EXIT_FINDING), shows_progress=True)


def submit(target: str, chain: list[Work], variables: dict[str, str], submission: dict) -> int:
    """Check all that can be checked now, in the environment that jobs will have, and submit; each
    waits for the one before. A chain is submitted as a whole, or not at all.
    """
    require_space(REPOSITORY, MIN_FREE_BYTES)
    say("checking environment, config and data")
    needs = examine(chain[0], variables)
    saves = chain[0].script in ("train.py", "sweep.py")
    request = slurm.fit_request(variables, needs["threads"], saves)
    # of two options sbatch takes the last
    light = [option for option in request if not option.startswith(("--gpus", "--signal"))]
    light += ["--ntasks=1", "--cpus-per-task=1"]
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
            # the next job waits for one that may not be needed, too
            after = f"{after},{jobs[-1]}" if work.mends else jobs[-1]
    except BadInput as error:
        shutil.rmtree(folder)
        if jobs:
            cancelling = ["scancel", *jobs]
            subprocess.run(cancelling)  # which says itself where it cannot
            error = f"{error}; what was submitted before it is cancelled: {' '.join(cancelling)}"
        raise BadInput(str(error)) from None
    say(f"job {', '.join(jobs)} submitted: {' '.join(request)}; `make status` shows how it fares")
    if chain[-1].only_reads:
        say(f"mean and spread will be in {slurm.LOGS.relative_to(REPOSITORY)}/{jobs[-1]}.err")
    print_result({"job": jobs[0], "jobs": jobs, "tasks": chain[0].tasks, "request": request})
    return EXIT_DONE


def check(variables: dict[str, str]) -> int:
    """Say whether `make train` with the same variables can work: environment, keys, data, and the
    memory and time that it needs beside what it would get.
    """
    (work,) = build_chain("train", variables, {})
    needs = examine(work, variables, measures=True)
    say("environment, keys and data: as a training needs them")
    request, limit, allowed_bytes = [], "none", needs["available_bytes"]
    if slurm.has_slurm():
        require_space(REPOSITORY, MIN_FREE_BYTES)
        request = slurm.fit_request(variables, needs["threads"], saves=True)
        options = dict(option.split("=", 1) for option in request)
        limit, memory = options["--time"], options.get("--mem", "inf")
        allowed_bytes = float(memory.rstrip("MG")) * (1 << (30 if memory.endswith("G") else 20))
    fits = needs["memory_bytes"] <= allowed_bytes
    say(
        f"memory: {needs['memory_bytes'] / 1e9:.1f} GB needed, {allowed_bytes / 1e9:.1f} GB allowed"
    )
    if not fits:
        say("ask for more (MEM=), or take less (batch_size, data_residence=disk)")
    pace = f"at best with {needs['num_threads']} threads of this machine's CPU"
    say(f"time: {format_duration(needs['seconds'])} {pace}, limit {limit}")
    print_result({"fits": fits, "request": request, **needs})
    return EXIT_DONE if fits else EXIT_FINDING


def examine(work: Work, variables: dict[str, str], measures: bool = False) -> dict:
    """What lib.jobs.preflight finds of the first task, in the environment that jobs will have.
    Raises BadInput for what cannot work.
    """
    options = {"num_ranks": int(variables["NUM_RANKS"]), "measures": measures}
    _, *arguments = work.commands()[0]
    command = [sys.executable, __file__, "examine", json.dumps(options), work.script, *arguments]
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


def go(data: str, copy: str, varied: str, script: str, *arguments) -> int:
    """In a job: become the script, for its value of what varies; in a job that is no array for all
    values. A training that starts again goes on with its run.
    """
    submission = read_json(REPOSITORY.parent / "submission.json")  # beside the code that it runs
    os.environ[SUBMITTED] = json.dumps(submission)
    key, _, values = varied.partition("=")
    tasks, number = tuple(filter(None, values.split(","))), os.environ.get("SLURM_ARRAY_TASK_ID")
    if number:
        tasks = (tasks[int(number)],)
    commands = []
    for path, *words in Work(script, list(arguments), key, tasks).commands():
        if script == "train.py":
            words = resumed_arguments(words, submission["id"])
        commands.append([path, *words])
    if copy:
        from lib.pcam import DATA_COPY

        os.environ[DATA_COPY] = json.dumps([os.path.realpath(data), copy])
    return run_here(commands)


def run_here(commands: list[list[str]]) -> int:
    """Run Python with each of these arguments in turn, until one is interrupted; the exit code of
    the worst. One command alone takes this process's place.
    """
    if len(commands) == 1:
        os.execv(sys.executable, [sys.executable, *commands[0]])
    codes = []
    signal.signal(signal.SIGINT, lambda *_: None)  # Ctrl-C reaches the child by itself
    for command in commands:
        child = subprocess.Popen([sys.executable, *command])
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, lambda number, _, child=child: child.send_signal(number))
        codes.append(child.wait())
        if codes[-1] == EXIT_INTERRUPTED:
            break
    return max(map(abs, codes))


def show_status(_variables) -> int:
    """A row a job of this project, and the last lines of its log: the progress, or the error."""
    if not slurm.has_slurm():
        raise BadInput("no Slurm cluster here: `make runs` lists what is trained on this machine")
    rows = slurm.describe_jobs(slurm.queued_jobs())
    columns = ("id", "shown", "name", "state", "reason", "run", "limit_left")
    say(table_of(rows, columns).to_text())
    for row in rows:
        if row["state"] != "done" and row["log"]:
            lines = "\n    ".join(row["log"])
            say(f"{row['id']}, the last lines of its log:\n    {lines}")
    print_result({"num_jobs": len(rows), "jobs": rows})
    return EXIT_DONE


def cancel(variables: dict[str, str]) -> int:
    """End this project's jobs, or JOB alone."""
    jobs = [variables["JOB"]]
    if not variables["JOB"]:
        jobs = [job["shown"] for job in slurm.queued_jobs()]
    if jobs:
        slurm.run_command("scancel", *jobs)
    print_result({"num_cancelled": len(jobs)})
    return EXIT_DONE


# what reads or ends jobs; what jobs call, in their environment
ACTIONS = {"check": check, "status": show_status, "cancel": cancel}
JOB_STEPS = {"examine": examine_here, "go": go}

if __name__ == "__main__":
    sys.exit(main())
