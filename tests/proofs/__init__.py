"""What the long proofs share: one command line, scripts run as a user runs them, the date and commit
of a figure, and one table of rows {asked, measured, limit, held}.
"""

import argparse
import datetime
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from conftest import REPOSITORY
from fill_docs import build_proof_table

from lib.command import (
    EXIT_DONE,
    EXIT_FINDING,
    BadInput,
    Parser,
    positive,
    print_result,
    say,
    script,
)
from lib.files import atomic_write, read_json, write_json
from lib.machine import describe_machine
from lib.rundir import git_state

OPTIONS = {
    "data": {
        "metavar": "DIR",
        "type": os.path.abspath,
        "help": "PCam folder (default: %(default)s)",
    },
    "full": {
        "metavar": "DIR",
        "type": os.path.abspath,
        "help": "files of full size (default: %(default)s)",
    },
    "count": {"metavar": "N", "type": positive, "help": "how often to repeat"},
    "run": {
        "metavar": "RUN",
        "type": os.path.abspath,
        "help": "whose best.pt predicts (default: %(default)s)",
    },
    "device": {"metavar": "D", "help": "cpu or cuda (default: %(default)s)"},
    "seconds": {"metavar": "S", "type": float, "help": "of a measurement (default: %(default)s)"},
}


def made_now() -> dict[str, str]:
    """Date, commit and machine of a figure measured now."""
    machine = describe_machine(torch.device("cpu"))
    code = git_state()
    commit = (code["commit"] or "none")[:10]
    if code["uncommitted_patch"]:
        commit += " with changes"
    return {
        "date": str(datetime.date.today()),
        "commit": commit,
        "machine": f"{machine['num_cores']} cores, {machine['cpu']}",
    }


def run(*command) -> dict:
    """The result of a script of the repository, run as a user runs it, with its time and the peak
    memory of all children so far. Raises BadInput where it fails.
    """
    say("$ python " + " ".join(map(str, command)))
    started_at = time.monotonic()
    command = [sys.executable, *map(str, command)]
    ended = subprocess.run(command, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True)
    result = {"error": "no output"}
    if ended.stdout:
        result = json.loads(ended.stdout.splitlines()[-1])
    # torchrun's code is 1 whatever a rank ends with
    if ended.returncode not in (EXIT_DONE, EXIT_FINDING) or "error" in result:
        name = " ".join(command[1:3])
        raise BadInput(f"{name} failed with exit code {ended.returncode}: {result.get('error')}")
    peak_gb = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1e6
    return result | {"wall_s": time.monotonic() - started_at, "peak_gb": peak_gb}


def is_writing(runs: Path) -> bool:
    """Whether a half-written checkpoint lies in a run."""
    return any(runs.glob("*/.*.pt.*.tmp"))


def kill_midway(command, runs: Path, delay_s=0.0, in_checkpoint=False) -> Path | None:
    """Kill a training into `runs` some time after its first checkpoint, or in the next one after
    that. Returns the run's folder, or None where it had ended before, or wrote no checkpoint then.
    """
    command = [sys.executable, *map(str, command), "--runs", runs]
    silent = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen(command, cwd=REPOSITORY, **silent)
    while process.poll() is None and not any(runs.glob("*/last.pt")):
        time.sleep(0.002)
    time.sleep(delay_s)
    while in_checkpoint and process.poll() is None and not is_writing(runs):
        time.sleep(0.0005)
    process.kill()
    was_killed = process.wait() < 0 and (is_writing(runs) or not in_checkpoint)
    return next(runs.iterdir()) if was_killed else None


def row(asked: str, measured: str, held: bool | None = None, limit="") -> dict:
    """A row of a proof's table. `held` is None where no figure was asked for."""
    is_held = None if held is None else bool(held)
    return {"asked": asked, "measured": measured, "limit": limit, "held": is_held}


def write_results(out: Path, results: dict) -> list[str]:
    """Write the rows of all parts as JSON and as a table, `out`.json and .md; gives what was asked
    and missed.
    """
    write_json(out.with_suffix(".json"), results)
    with atomic_write(out.with_suffix(".md"), "w") as file:
        file.write(build_proof_table(results).to_markdown() + "\n")
    rows = [line for result in results.values() for line in result["rows"]]
    return [line["asked"] for line in rows if line["held"] is False]


def run_parts(parts: dict, args) -> int:
    """Run the parts that `args.parts` names, or all; those of earlier calls stay."""
    unknown = set(args.parts) - set(parts)
    if unknown:
        raise BadInput(f"no part {unknown.pop()!r}; allowed: {', '.join(parts)}")
    path = args.out.with_suffix(".json")
    results = read_json(path) if path.exists() else {}
    (REPOSITORY / "data").mkdir(exist_ok=True)
    for name in args.parts or parts:
        made = made_now()
        with tempfile.TemporaryDirectory(prefix="proof-", dir=REPOSITORY / "data") as scratch:
            rows = parts[name](args, Path(scratch))
        results[name] = made | {"rows": rows}
        missed = write_results(args.out, results)
        for line in rows:
            say(f"{line['held']}: {line['asked']}: {line['measured']}")
    print_result({"missed": missed, "table": str(args.out.with_suffix(".md"))})
    return EXIT_FINDING if missed else EXIT_DONE


def prove(description: str, parts: dict, out: str, **defaults) -> int:
    """The main function of a proof: run those of its `parts` that the command line names, functions
    of the arguments and a folder that give rows. Gives the exit code.

    The rows go into `out`.json and .md below assets/. `defaults` are the proof's own OPTIONS.
    """
    parser = Parser(description=description, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("parts", nargs="*", help=f"some of {', '.join(parts)} (default: all)")
    path = REPOSITORY / "assets" / out
    parser.add_argument("--out", default=path, type=Path, help="OUT.json and OUT.md")
    for name, default in defaults.items():
        parser.add_argument(f"--{name}", default=default, **OPTIONS[name])
    return script(lambda argv=None: run_parts(parts, parser.parse_args(argv)))()
