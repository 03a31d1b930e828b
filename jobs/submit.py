"""What the Make targets call: their work as Slurm jobs, or on this machine where there is no
cluster.

Make variables come in by the environment, so that no shell ever reads them. Jobs themselves call
`check` and `go`.
"""

import argparse
import json
import os
import runpy
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
        EXIT_INTERRUPTED,
        BadInput,
        Parser,
        last_line,
        print_result,
        say,
        script,
    )
    from lib.jobs import slurm
    from lib.rundir import SUBMITTED
except ModuleNotFoundError as error:
    print(
        f"error: {sys.executable} lacks the package {error.name}: make setup, or name another"
        " PYTHON",
        file=sys.stderr,
    )
    sys.exit(2)

NUM_AUDIT_THREADS = 4
TARGETS = ("train", "seeds", "folds", "bench", "audit")


@script
def main(argv=None) -> int:
    parser = Parser(
        prog="submit.py",
        description="Submit the work of a Make target, or run it here where there is no Slurm.",
    )
    parser.add_argument(
        "verb", choices=(*TARGETS, "sweep", "status", "cancel", "here", "check", "go")
    )
    parser.add_argument(
        "rest", nargs=argparse.REMAINDER, help="here: a script and arguments before ARGS"
    )
    args = parser.parse_args(argv)
    if args.verb in ("check", "go"):
        return {"check": check, "go": go}[args.verb](*args.rest)
    variables = slurm.read_variables(os.environ)
    if args.verb == "here":
        return run_here([[*args.rest, *slurm.split_arguments(variables["ARGS"])]])
    if args.verb in ("status", "cancel"):
        return {"status": show_status, "cancel": cancel}[args.verb](variables)
    submission = slurm.describe_submission()
    os.environ[SUBMITTED] = json.dumps(submission)  # which jobs and children inherit
    if args.verb == "sweep":
        return sweep(variables)
    work = slurm.build_work(args.verb, variables)
    if args.verb == "folds":
        write_missing_groups(work)
    if variables["NUM_RANKS"] != "1" and work.script != "train.py":
        raise BadInput(f"NUM_RANKS: {work.script} has one rank")
    spread = []
    if len(work.tasks) > 1:
        spread.append(
            slurm.Work(
                "report.py",
                [args.verb, "--where", f"submission={submission['id']}"],
                only_reads=True,
            )
        )
    if slurm.has_slurm():
        return submit(args.verb, [work, *spread], variables)
    say_no_slurm(variables)
    ranks = []
    if variables["NUM_RANKS"] != "1":
        examine(work, variables)  # or each rank would say what is wrong, and torchrun much more
        # torchrun would, with a warning; `threads` counts
        os.environ.setdefault("OMP_NUM_THREADS", "1")
        ranks = ["-m", "torch.distributed.run", "--nproc-per-node", variables["NUM_RANKS"]]
    commands = [
        [*ranks, str(REPOSITORY / work.script), *work.of_task(task)] for task in work.tasks or [""]
    ]
    return run_here(commands, [[str(REPOSITORY / last.script), *last.arguments] for last in spread])


def write_missing_groups(work: slurm.Work) -> None:
    """Have audit.py find out here which patches share tissue, where nothing tells it yet: folds
    need that.
    """
    from lib.groups import group_of_rows
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
    idle = [name for name in ("PARTITION", "TIME", "CPUS", "MEM", "AFTER") if variables[name]]
    idle += ["STAGE_DATA"] if variables["STAGE_DATA"] == "1" else []
    say(
        "no Slurm cluster here: this runs on this machine"
        + f", and {', '.join(idle)} say nothing" * bool(idle)
    )


def sweep(variables: dict[str, str]) -> int:
    """Plan a search and carry it out: as jobs, each after the one before, or rung by rung here."""
    if variables["NUM_RANKS"] != "1":
        raise BadInput("NUM_RANKS: the trials of a search have one rank each")
    overrides = [
        *slurm.split_arguments(variables["ARGS"]),
        *([f"data_dir={variables['DATA']}"] if variables["DATA"] else []),
    ]
    name = variables["SEARCH"] or Path(variables["SPACE"]).stem
    planning = [
        sys.executable,
        str(REPOSITORY / "sweep.py"),
        "plan",
        variables["SPACE"],
        "--name",
        name,
        *overrides,
    ]
    planned = subprocess.run(planning, stdout=subprocess.PIPE, text=True)
    if planned.returncode:
        return planned.returncode
    num_rows = json.loads(planned.stdout.splitlines()[-1])["num_rows"]
    if not slurm.has_slurm():
        say_no_slurm(variables)
        stages = slurm.sweep_stages(name, num_rows, ["--processes", variables["PROCESSES"]])
        return run_here(
            [[str(REPOSITORY / work.script), *work.arguments] for work in stages if not work.tasks]
        )
    return submit("sweep", slurm.sweep_stages(name, num_rows, []), variables)


def submit(target: str, chain: list[slurm.Work], variables: dict[str, str]) -> int:
    """Check all that can be checked now, in the environment that jobs will have, and submit; each
    waits for the one before.
    """
    slurm.require_disk(REPOSITORY)
    slurm.require_jobs(variables["AFTER"])
    say("checking environment, config and data")
    found, jobs, after = examine(chain[0], variables), [], variables["AFTER"]
    request = slurm.fit_request(
        variables, found["threads"], chain[0].script in ("train.py", "sweep.py")
    )
    light = slurm.fit_request(
        variables | {"NUM_RANKS": "1", "CPUS": "1"}, 1, saves=False, needs_gpu=False
    )
    data = os.path.abspath(found["data_dir"]) if variables["STAGE_DATA"] == "1" else ""
    for work in chain:
        options, staged = (light, "") if work.only_reads else (request, data)
        jobs.append(slurm.submit(target, work, sys.executable, options, staged, after))
        # the next job waits for what may not be needed, too
        after = f"{after},{jobs[-1]}" if work.mends else jobs[-1]
    say(f"job {', '.join(jobs)} submitted: {' '.join(request)}; `make status` shows how it fares")
    if chain[-1].script == "report.py":
        say(f"mean and spread will be in {slurm.LOGS.relative_to(REPOSITORY)}/{jobs[-1]}.err")
    print_result({"job": jobs[0], "jobs": jobs, "tasks": chain[0].tasks, "request": request})
    return EXIT_DONE


def examine(work: slurm.Work, variables: dict[str, str]) -> dict:
    """What `check` finds of the first task, in the environment that jobs will have. Raises BadInput
    for what cannot work.
    """
    arguments = work.of_task(next(iter(work.tasks), ""))
    checking = [
        sys.executable,
        __file__,
        "check",
        variables["NUM_RANKS"],
        variables["DATA"],
        work.script,
        *arguments,
    ]
    shell = ["bash", "-c", 'set -e; . jobs/env.sh; set +eu; exec "$@"', "bash", *checking]
    result = subprocess.run(
        shell, capture_output=True, text=True, cwd=REPOSITORY, stdin=subprocess.DEVNULL
    )
    last = (result.stdout.splitlines() or [""])[-1]
    found = json.loads(last) if last.startswith("{") else {}
    if result.returncode or not found:
        why = found.get("error") or f"the environment of jobs does not: {last_line(result.stderr)}"
        raise BadInput(f"this cannot work: {why}")
    return found


def check(num_ranks: str, data: str, name: str, *arguments) -> int:
    """Refuse what the script would refuse at its start; print how many threads it computes with and
    where its data are.
    """
    from lib.batches import fit_batch_size, open_train_valid
    from lib.config import load_config
    from lib.ranks import require_equal_shares

    runpy.run_path(str(REPOSITORY / name))["parse"](list(arguments))  # unknown options
    found = {"threads": NUM_AUDIT_THREADS, "data_dir": data}
    if name != "audit.py":  # what is wrong with the data is for the audit to find out
        if name == "benchmark.py":  # its first word is what to measure, and its data are --data
            named = [f"data_dir={data}"] if data else []
            cfg = training_config([*arguments[1:], *named])
        elif name == "sweep.py":
            overrides = [word for word in arguments if "=" in word and not word.startswith("-")]
            cfg = load_config(Path("sweeps") / arguments[1] / "config.yaml", overrides)
        else:
            cfg = training_config(arguments)
        require_equal_shares(cfg.shards, int(num_ranks))
        (_, rows), _ = open_train_valid(cfg)
        fit_batch_size(cfg, len(rows))
        found = {"threads": 0 if name == "benchmark.py" else cfg.threads, "data_dir": cfg.data_dir}
    print_result(found)
    return EXIT_DONE


def training_config(arguments):
    """The configuration that train.py has with these arguments."""
    from lib.config import DEFAULT_PATH, load_config
    from lib.rundir import find_run, resume_config

    options, rest = slurm.training_options(arguments)
    # a word after an option may be its value
    words = [
        item
        for before, item in zip(["", *rest], rest, strict=False)
        if "=" in item or not before.startswith("--")
    ]
    overrides = [item for item in words if not item.startswith("-")]
    if options.resume:
        return resume_config(find_run(options.resume, options.runs), overrides)
    return load_config(options.config or DEFAULT_PATH, overrides)


def go(data: str, copy: str, varied: str, name: str, *arguments) -> int:
    """In a job: become the script, for its value of what varies. A training that starts again goes
    on with its run.
    """
    if varied:
        key, _, values = varied.partition("=")
        arguments = [
            *arguments,
            f"{key}={values.split(',')[int(os.environ['SLURM_ARRAY_TASK_ID'])]}",
        ]
    if name == "train.py" and int(os.environ.get("SLURM_RESTART_COUNT", 0)):
        arguments = slurm.going_on(arguments, os.environ)
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


def show_status(_variables) -> int:
    """A line a job of this project, and the last words of those that failed."""
    has_slurm = slurm.has_slurm()
    rows = slurm.describe_jobs(slurm.queued_jobs() if has_slurm else [])
    if not has_slurm:
        say("no Slurm cluster here: `make runs` lists what is trained on this machine")
    for row in rows:
        number = row["id"] if row["shown"] == row["id"] else f"{row['id']} ({row['shown']})"
        parts = [
            number,
            *(
                row.get(key)
                for key in ("name", "state", "reason", "run", "progress")
                if row.get(key) != "None"
            ),
        ]
        if "limit_left" in row:
            parts.append(f"{row.get('left') or '?'} left, {row['limit_left']} to the time limit")
        say("  ".join(filter(None, parts)))
        for line in row.get("stderr", []):
            say(f"    {line}")
    print_result({"num_jobs": len(rows), "jobs": rows})
    return EXIT_DONE


def cancel(variables) -> int:
    """End this project's jobs, or JOB alone."""
    if not slurm.has_slurm():
        raise BadInput("no Slurm cluster here: there are no jobs to cancel")
    jobs = [
        job
        for job in slurm.queued_jobs()
        if variables["JOB"] in ("", job["id"], job["shown"], job["shown"].split("_")[0])
    ]
    if jobs:
        slurm.run_command("scancel", *(job["shown"] for job in jobs))
    elif variables["JOB"]:
        raise BadInput(f"no job {variables['JOB']} of this project waits or runs")
    print_result({"num_cancelled": len(jobs)})
    return EXIT_DONE


if __name__ == "__main__":
    sys.exit(main())
