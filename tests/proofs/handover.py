"""The handover proven at full size: the real wheels, no network, an empty cache, a medium that
cannot be written.

python tests/proofs/handover.py [--run RUN] [--out assets/handover]     needs Linux, root or user
namespaces, 3 GB of disk
"""

import os
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
from conftest import REPOSITORY, run_script
from test_handover import MOUNT, flip

from lib.figures import column
from lib.files import read_csv
from proofs import prove, row


def run_stick(stick: Path, scratch: Path, *arguments):
    """run.sh of a stick, mounted read-only and without a network, on its own sample patches."""
    home, mounted = scratch / "a home", scratch / "mounted medium"
    environment = {"HOME": str(home), "PATH": os.environ["PATH"], "PCAM_PYTHON": sys.executable}
    inside = ["sh", mounted / "run.sh", stick / "patches", *arguments]
    command = ["unshare", "-mn", "sh", "-c", MOUNT, stick, mounted, *inside]
    here = scratch / "some folder"
    return subprocess.run(command, capture_output=True, text=True, cwd=here, env=environment)


def prove_stick(args, scratch: Path) -> list[dict]:
    """A row for each thing that must hold of a stick with the run `args.run`."""
    stick, here = scratch / 'our "stick"', scratch / "some folder"
    for folder in (here, scratch / "a home"):
        folder.mkdir()
    result = run_script("report.py", "handover", args.run, "--to", stick, check=0).json
    size = f"{result['num_bytes']:,} bytes in {result['num_files']} files, torch {result['torch']}"
    rows = [row("a handover is written", size, True)]
    first = run_stick(stick, scratch)
    asked = "predicts offline, read-only, from an empty cache"
    rows.append(row(asked, first.stderr[-80:], not first.returncode))
    if first.returncode:
        return rows
    tables = (read_csv(here / "predictions.csv"), read_csv(stick / "expected.csv"))
    ours, theirs = (column(table, "probability") for table in tables)
    offset, tolerance = np.abs(ours - theirs).max(), result["tolerance"]
    asked = "probabilities are those of the writer"
    rows.append(row(asked, f"off by {offset:.2g}", offset <= tolerance, f"{tolerance:.2g}"))
    wheel = next(stick.glob("wheels/torch-*"))
    flip(wheel)
    refused = run_stick(stick, scratch)
    is_named = refused.returncode == 1 and f"changed: wheels/{wheel.name}" in refused.stderr
    rows.append(row("a flipped bit is refused by name", wheel.name, is_named))
    return rows


if __name__ == "__main__":
    champion = REPOSITORY / "assets" / "champion"
    sys.exit(prove(__doc__, {"stick": prove_stick}, "handover", run=champion))
