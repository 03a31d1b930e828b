"""What the long proofs share: when and of which commit a figure is, scripts as processes, and a
table of figures.
"""

import datetime
import json
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from conftest import REPOSITORY

from lib.command import EXIT_DONE, EXIT_FINDING, BadInput, print_result, say
from lib.files import atomic_write, read_json, write_json
from lib.rundir import git_state


def made_now() -> dict[str, str]:
    """Date and commit of a figure measured now."""
    code = git_state()
    commit = (code["commit"] or "none")[:10] + (
        " with changes" if code["uncommitted_patch"] else ""
    )
    return {"date": str(datetime.date.today()), "commit": commit}


def write_markdown(path, header, rows) -> None:
    """Write a table."""
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    lines += ["| " + " | ".join(row) + " |" for row in rows]
    with atomic_write(path, "w") as file:
        file.write("\n".join(lines) + "\n")


def run(*command) -> dict:
    """A script of the repository as a user runs it: its result, with peak memory and time of all
    children so far.
    """
    say("$ python " + " ".join(map(str, command)))
    started = time.monotonic()
    result = subprocess.run(
        [sys.executable, *map(str, command)], cwd=REPOSITORY, stdout=subprocess.PIPE, text=True
    )
    told = (
        json.loads(result.stdout.splitlines()[-1])
        if result.stdout
        else {"error": "it says nothing"}
    )
    # torchrun's code is 1 whatever a rank ends with
    if result.returncode not in (0, 1) or "error" in told:
        raise BadInput(
            f"{' '.join(map(str, command[:2]))} failed with exit code {result.returncode}:"
            f" {told.get('error')}"
        )
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1e6
    return told | {"wall_s": time.monotonic() - started, "peak_gb": peak}


def row(asked: str, measured: str, held: bool, limit: str = "") -> dict:
    """A row of a proof; `limit` is the bound that `measured` was compared with."""
    return {"asked": asked, "measured": measured, "limit": limit, "held": bool(held)}


def run_parts(parts: dict, args) -> int:
    """Run those of `parts` (functions of the arguments and a folder, to rows) that `args.parts`
    names, or all, into the files `args.out`.json and .md, where those of other parts stay; gives
    the exit code."""
    if unknown := set(args.parts) - set(parts):
        raise BadInput(f"no part {unknown.pop()!r}; allowed: {', '.join(parts)}")
    path, table = args.out.with_suffix(".json"), args.out.with_suffix(".md")
    results = read_json(path) if path.exists() else {}
    for name in args.parts or parts:
        made = made_now()
        with tempfile.TemporaryDirectory(prefix="proof-", dir=REPOSITORY / "data") as scratch:
            rows = parts[name](args, Path(scratch))
            shutil.rmtree(scratch, ignore_errors=True)
            Path(scratch).mkdir()
        results[name] = made | {"rows": rows}
        write_json(path, results)
        for found in rows:
            say(f"{'held' if found['held'] else 'MISSED'}: {found['asked']}: {found['measured']}")
    lines = []
    for name in (name for name in parts if name in results):
        made = f"{name}, {results[name]['date']}, {results[name]['commit']}"
        lines += [
            (r["asked"], r["measured"], r.get("limit", ""), "yes" if r["held"] else "NO", made)
            for r in results[name]["rows"]
        ]
    write_markdown(table, ("asked", "measured", "limit", "held", "part, date, commit"), lines)
    missed = [
        found["asked"]
        for result in results.values()
        for found in result["rows"]
        if not found["held"]
    ]
    print_result({"missed": missed, "table": str(table)})
    return EXIT_FINDING if missed else EXIT_DONE
