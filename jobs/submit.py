"""What the Make targets call: their work as Slurm jobs, or on this machine where there is no cluster.

Make variables come in by the environment, so that no shell ever reads them. Jobs themselves call `check` and `go`.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))

try:
    from lib import slurm
    from lib.command import EXIT_DONE, EXIT_INTERRUPTED, BadInput, Parser, print_result, say, script
except ModuleNotFoundError as error:
    print(f"error: {sys.executable} lacks the package {error.name}: make setup, or name another PYTHON", file=sys.stderr)
    sys.exit(2)

TARGETS = ("train", "seeds", "folds", "bench", "audit")


@script
def main(argv=None) -> int:
    parser = Parser(prog="submit.py", description="Submit the work of a Make target, or run it here where there is no Slurm.")
    parser.add_argument("verb", choices=(*TARGETS, "status", "cancel", "here", "check", "go"))
    parser.add_argument("rest", nargs=argparse.REMAINDER, help="here: a script and arguments before ARGS")
    args = parser.parse_args(argv)
    if args.verb in ("check", "go"):
        return {"check": check, "go": go}[args.verb](*args.rest)
    variables = slurm.read_variables(os.environ)
    if args.verb == "here":
        return run_here([[*args.rest, *slurm.split_arguments(variables["ARGS"])]])
    if args.verb in ("status", "cancel"):
        return {"status": show_status, "cancel": cancel}[args.verb](variables)
    work = slurm.build_work(args.verb, variables)
    if slurm.has_slurm():
        return submit(args.verb, work, variables)
    say("no Slurm cluster here: this runs on this machine")
    ranks = ["-m", "torch.distributed.run", "--nproc-per-node", variables["NUM_RANKS"]] if variables["NUM_RANKS"] != "1" else []
    return run_here([[*ranks, work.script, *work.of_task(task)] for task in work.tasks or [""]])


def submit(target: str, work: slurm.Work, variables: dict[str, str]) -> int:
    """Check all that can be checked now, in the environment that the job will have, and submit."""
    slurm.require_disk(REPOSITORY)
    arguments = [*work.of_task(next(iter(work.tasks), "")), *([f"data_dir={variables['DATA']}"] if variables["DATA"] else [])]
    checking = [sys.executable, __file__, "check", variables["NUM_RANKS"], work.script, *arguments]
    shell = ["bash", "-c", '. jobs/env.sh && exec "$@"', "bash", *checking]
    result = subprocess.run(shell, capture_output=True, text=True, cwd=REPOSITORY, stdin=subprocess.DEVNULL)
    found = json.loads((result.stdout.splitlines() or ["{}"])[-1])
    if result.returncode:
        reason = found.get("error") or f"a job's environment does not work: {result.stderr.strip().splitlines()[-1:]}"
        raise BadInput(f"not submitted: {reason}")
    request = slurm.fit_request(variables, found["threads"])
    data = os.path.abspath(found["data_dir"]) if variables["STAGE_DATA"] == "1" else ""
    job = slurm.submit(target, work, sys.executable, request, data, variables["AFTER"])
    say(f"job {job} submitted: {' '.join(request)}; `make status` shows how it fares")
    print_result({"job": job, "tasks": work.tasks, "request": request})
    return EXIT_DONE


def check(num_ranks: str, name: str, *arguments) -> int:
    """Refuse what the script would refuse at its start; print how many threads it computes with and where its data are."""
    from lib.batches import fit_batch_size, open_train_valid
    from lib.config import DEFAULT_PATH, load_config
    from lib.launch import require_equal_shares
    from lib.rundir import find_run, resume_config

    if name == "audit.py":  # what is wrong with the data is what it is to find out
        print_result({"threads": 0, "data_dir": arguments[1]})
        return EXIT_DONE
    options, rest = slurm.training_options(arguments if name == "train.py" else arguments[1:])
    # a word after an option may be its value
    words = [item for before, item in zip(["", *rest], rest, strict=False) if "=" in item or not before.startswith("--")]
    overrides = [item for item in words if not item.startswith("-")]
    if options.resume:
        cfg = resume_config(find_run(options.resume, options.runs), overrides)
    else:
        cfg = load_config(options.config or DEFAULT_PATH, overrides)
    require_equal_shares(cfg.shards, int(num_ranks))
    (_, rows), _ = open_train_valid(cfg)
    fit_batch_size(cfg, len(rows))
    print_result({"threads": cfg.threads if name == "train.py" else 0, "data_dir": cfg.data_dir})
    return EXIT_DONE


def go(data: str, varied: str, name: str, *arguments) -> int:
    """In a job: become the script. A training that starts again goes on with its run."""
    arguments = [*arguments, *([f"{varied}={os.environ['SLURM_ARRAY_TASK_ID']}"] if varied else [])]
    if name == "train.py" and int(os.environ.get("SLURM_RESTART_COUNT", 0)):
        arguments = slurm.going_on(arguments, os.environ)
    if data:
        arguments = slurm.with_data(name, arguments, data)
    return run_here([[name, *arguments]])


def run_here(commands: list[list[str]]) -> int:
    """Run Python with each of these arguments in turn, until one is interrupted; one alone takes this process's place."""
    codes = []
    for command in commands:
        command = [
            sys.executable,
            *(str(REPOSITORY / item) if item.endswith(".py") and "/" not in item else item for item in command),
        ]
        if len(commands) == 1:
            os.execv(sys.executable, command)
        child = subprocess.Popen(command)
        signal.signal(signal.SIGINT, lambda *_: None)  # Ctrl-C reaches the child by itself
        signal.signal(signal.SIGTERM, lambda number, _, child=child: child.send_signal(number))
        codes.append(child.wait())
        if codes[-1] == EXIT_INTERRUPTED:
            break
    print_result({"num_done": codes.count(EXIT_DONE), "num_planned": len(commands), "exit_codes": codes})
    return max(map(abs, codes))


def show_status(_variables) -> int:
    """A line a job of this project, and the last words of those that failed."""
    rows = slurm.describe_jobs(slurm.queued_jobs() if slurm.has_slurm() else [])
    for row in rows:
        limit = f"{row['limit_left']} to the time limit" if row.get("limit_left") else ""
        left = f"{row['left']} left" if row.get("left") and limit else ""
        parts = [
            row["shown"],
            row.get("name", ""),
            row["state"].lower(),
            row.get("run", ""),
            row.get("progress", ""),
            left,
            limit,
        ]
        say("  ".join(filter(None, parts)))
        for line in row.get("stderr", []):
            say(f"    {line}")
    print_result({"num_jobs": len(rows), "jobs": rows})
    return EXIT_DONE


def cancel(variables) -> int:
    """End this project's jobs, or JOB alone."""
    jobs = [job for job in slurm.queued_jobs() if variables["JOB"] in ("", job["id"], job["shown"], job["shown"].split("_")[0])]
    if jobs:
        slurm.run_command("scancel", *(job["shown"] for job in jobs))
    elif variables["JOB"]:
        raise BadInput(f"no job {variables['JOB']} of this project waits or runs")
    print_result({"num_cancelled": len(jobs)})
    return EXIT_DONE


if __name__ == "__main__":
    sys.exit(main())
