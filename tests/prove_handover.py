"""The handover proven at full size: the real wheels, no network, an empty cache, a medium that
cannot be written.

python tests/prove_handover.py [--run RUN] [--out assets/handover]     needs Linux, root or user
namespaces, 3 GB of disk
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from conftest import REPOSITORY, run_script
from proofs import made_now, write_markdown
from test_handover import MOUNT, flip

from lib.files import read_csv, write_json

NUM_PARTS = 5  # the first findings are on the stick, the others on the checklist


def prove(run_folder, scratch: Path) -> tuple[dict, list[dict]]:
    """What report.py handover printed, and a row for each thing that must hold."""
    rows, started_at = [], time.monotonic()

    def note(what, held, measured=""):
        nonlocal started_at
        wall_s, started_at = round(time.monotonic() - started_at, 1), time.monotonic()
        rows.append({"what": what, "held": bool(held), "measured": measured, "wall_s": wall_s})
        print(rows[-1], file=sys.stderr, flush=True)

    stick, here, home = (scratch / name for name in ('our "stick"', "some folder", "a home"))
    for folder in (here, home):
        folder.mkdir()
    told = run_script("report.py", "handover", run_folder, "--to", stick, check=0).json
    note(
        "written",
        True,
        f"{told['num_bytes']:,} bytes in {told['num_files']} files, torch {told['torch']}",
    )
    environment = {"HOME": str(home), "PATH": os.environ["PATH"], "PCAM_PYTHON": sys.executable}

    def run(*arguments):
        mounted = scratch / "mounted medium"
        command = [
            "unshare",
            "-mn",
            "sh",
            "-c",
            MOUNT,
            stick,
            mounted,
            mounted / "run.sh",
            stick / "patches",
            *arguments,
        ]
        return subprocess.run(command, capture_output=True, text=True, cwd=here, env=environment)

    first = run()
    assert first.returncode == 0, first.stderr
    pairs = zip(read_csv(here / "predictions.csv"), read_csv(stick / "expected.csv"), strict=True)
    off = max(
        abs(float(found["probability"]) - float(expected["probability"]))
        for found, expected in pairs
    )
    num_bytes = sum(path.lstat().st_size for path in home.rglob("*") if not path.is_dir())
    measured = (
        f"{num_bytes:,} bytes installed; probabilities off by at most {off:.2g}, allowed"
        f" {told['tolerance']:.2g}"
    )
    note(
        "installed, tested, predicted: no network, empty cache, read-only, spaces and quotes",
        True,
        measured,
    )
    packages = {path.name for path in home.glob(".cache/pcam-*/venv/lib/*/site-packages/*")}
    note(
        "neither torchvision nor matplotlib is installed",
        "torch" in packages and not packages & {"torchvision", "matplotlib"},
    )
    second = run("--out", "again.csv")
    same = (here / "again.csv").read_bytes() == (here / "predictions.csv").read_bytes()
    note(
        "predicted again: nothing is installed twice, equal to the byte",
        same and "installing" not in second.stderr,
    )
    missing = run_script("audit.py", "handover", stick, "--out", scratch / "audit").json["missing"]
    parts = [row["check"] for row in json.loads((scratch / "audit" / "findings.json").read_text())][
        :NUM_PARTS
    ]
    note(
        "audit.py handover: " + ", ".join(parts),
        not {*parts} & {*missing},
        f"of the checklist missing: {', '.join(missing)}",
    )
    torch = next((stick / "wheels").glob("torch-*")).relative_to(stick)
    for name in ("model/best.pt", torch, "code/lib/predict.py"):
        flip(stick / name)
        refused = run()
        held = (
            refused.returncode == 1
            and f"changed: {name}" in refused.stderr
            and "self-test" not in refused.stderr
        )
        note("one flipped bit is refused by name", held, str(name))
        flip(stick / name)
    return told | {"handover": "DIR"}, rows


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--run", default=REPOSITORY / "assets" / "champion")
    parser.add_argument("--out", default=REPOSITORY / "assets" / "handover")
    args = parser.parse_args()
    made = made_now()
    with tempfile.TemporaryDirectory(prefix="a stick's ") as scratch:
        told, rows = prove(args.run, Path(scratch))
    about = made | {"python": platform.python_version(), "num_cores": os.cpu_count()}
    write_json(f"{args.out}.json", about | told | {"rows": rows})
    header = ("what", "held", "measured", "wall seconds", "date, commit, machine")
    at = (
        f"{about['date']}, {about['commit']}, Python {about['python']} on {about['num_cores']}"
        " cores"
    )
    table = [
        (row["what"], "yes" if row["held"] else "NO", row["measured"], f"{row['wall_s']}", at)
        for row in rows
    ]
    write_markdown(f"{args.out}.md", header, table)
    return 0 if all(row["held"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
