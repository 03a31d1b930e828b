"""What the long proofs share: scripts run as a user runs them, the date and commit of a figure, and
one table of rows {asked, measured, limit, held}.
"""

import argparse
import datetime
import json
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from conftest import REPOSITORY

from lib.blocks import Table
from lib.command import EXIT_DONE, EXIT_FINDING, BadInput, Parser, print_result, say
from lib.files import atomic_write, read_json, write_json
from lib.machine import describe_machine
from lib.rundir import git_state

HELD = {True: "yes", False: "NO", None: "-"}


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


def write_markdown(path, header, rows) -> None:
    """Write a table."""
    with atomic_write(path, "w") as file:
        file.write(Table(header, list(rows)).to_markdown() + "\n")


def run(*command) -> dict:
    """The result of a script of the repository, run as a user runs it, with its time and the peak
    memory of all children so far. Raises BadInput where it fails.
    """
    say("$ python " + " ".join(map(str, command)))
    started_at = time.monotonic()
    ended = subprocess.run(
        [sys.executable, *map(str, command)], cwd=REPOSITORY, stdout=subprocess.PIPE, text=True
    )
    result = {"error": "no output"}
    if ended.stdout:
        result = json.loads(ended.stdout.splitlines()[-1])
    # torchrun's code is 1 whatever a rank ends with
    if ended.returncode not in (0, 1) or "error" in result:
        name = " ".join(map(str, command[:2]))
        raise BadInput(f"{name} failed with exit code {ended.returncode}: {result.get('error')}")
    peak_gb = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1e6
    return result | {"wall_s": time.monotonic() - started_at, "peak_gb": peak_gb}


def row(asked: str, measured: str, held: bool | None = None, limit="") -> dict:
    """A row of a proof's table. `held` is None where no figure was asked for."""
    is_held = None if held is None else bool(held)
    return {"asked": asked, "measured": measured, "limit": limit, "held": is_held}


def proof_parser(name: str, description: str, parts, out: str) -> Parser:
    """A proof's parser, for those of its `parts` that are run, and for `out`, the name below assets/
    of the files that run_parts writes.
    """
    parser = Parser(
        prog=name, description=description, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("parts", nargs="*", help=f"some of {', '.join(parts)} (default: all)")
    default = REPOSITORY / "assets" / out
    parser.add_argument(
        "--out", default=default, type=Path, metavar="OUT", help="OUT.json and OUT.md"
    )
    return parser


def run_parts(parts: dict, args) -> int:
    """Run the `parts`, functions of the arguments and a folder that give rows, that `args.parts`
    names, or all. Returns the exit code.

    The rows go into the files `args.out`.json and .md, where those of other parts stay.
    """
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
            shutil.rmtree(scratch, ignore_errors=True)
            Path(scratch).mkdir()
        results[name] = made | {"rows": rows}
        write_json(path, results)
        for line in rows:
            say(f"{HELD[line['held']]}: {line['asked']}: {line['measured']}")
    return write_results(args.out, {name: results[name] for name in parts if name in results})


def write_results(out: Path, results: dict) -> int:
    """Write the rows of all parts as a table, `out`.md; gives the exit code."""
    lines, missed = [], []
    for name, result in results.items():
        made = f"{name}, {result['date']}, {result['commit']}, {result.get('machine', '')}"
        for line in result["rows"]:
            figures = (line["asked"], line["measured"], line.get("limit", ""))
            lines.append((*figures, HELD[line["held"]], made))
            if line["held"] is False:
                missed.append(line["asked"])
    table = out.with_suffix(".md")
    write_markdown(
        table, ("asked", "measured", "limit", "held", "part, date, commit, machine"), lines
    )
    print_result({"missed": missed, "table": str(table)})
    return EXIT_FINDING if missed else EXIT_DONE
