"""The handover proven at full size: the real wheels, no network, an empty cache, a medium that
cannot be written.

python tests/proofs/handover.py [--run RUN] [--out assets/handover]     needs Linux, root or user
namespaces, 3 GB of disk
"""

import json
import os
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from conftest import run_script
from test_handover import MOUNT, flip

from lib.command import REPOSITORY, script
from lib.files import read_csv
from proofs import proof_parser, row, run_parts

PARTS_OF_STICK = 5  # the first findings are on the stick, the others on the checklist


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
    stick, here, home = (scratch / name for name in ('our "stick"', "some folder", "a home"))
    for folder in (here, home):
        folder.mkdir()
    result = run_script("report.py", "handover", args.run, "--to", stick, check=0).json
    size = f"{result['num_bytes']:,} bytes in {result['num_files']} files, torch {result['torch']}"
    rows = [row("a handover is written", size, True)]

    first = run_stick(stick, scratch)
    rows.append(
        row(
            "predicts offline, read-only, from an empty cache",
            first.stderr[-80:],
            not first.returncode,
        )
    )
    if first.returncode:
        return rows
    pairs = zip(read_csv(here / "predictions.csv"), read_csv(stick / "expected.csv"), strict=True)
    offsets = [
        abs(float(ours["probability"]) - float(theirs["probability"])) for ours, theirs in pairs
    ]
    is_close = max(offsets) <= result["tolerance"]
    limit = f"{result['tolerance']:.2g}"
    rows.append(
        row("probabilities are those of the writer", f"off by {max(offsets):.2g}", is_close, limit)
    )
    packages = {path.name for path in home.glob(".cache/pcam-*/venv/lib/*/site-packages/*")}
    needless = sorted(packages & {"torchvision", "matplotlib"})
    is_lean = "torch" in packages and not needless
    rows.append(row("only what predicts is installed", f"needless: {needless}", is_lean, "none"))

    second = run_stick(stick, scratch, "--out", "again.csv")
    same = (here / "again.csv").read_bytes() == (here / "predictions.csv").read_bytes()
    is_new = "installing" in second.stderr
    rows.append(
        row("predicts again, equal to the byte", f"installed again: {is_new}", same and not is_new)
    )
    missing = run_script("audit.py", "handover", stick, "--out", scratch / "audit").json["missing"]
    findings = json.loads((scratch / "audit" / "findings.json").read_text())
    parts = {finding["check"] for finding in findings[:PARTS_OF_STICK]}
    wrong = sorted(parts & set(missing))
    rows.append(
        row("audit.py handover finds the stick whole", f"missing: {wrong}", not wrong, "none")
    )

    torch = next((stick / "wheels").glob("torch-*")).relative_to(stick)
    for name in ("model/best.pt", str(torch), "code/lib/predict.py"):
        flip(stick / name)
        refused = run_stick(stick, scratch)
        is_named = refused.returncode == 1 and f"changed: {name}" in refused.stderr
        rows.append(row("a flipped bit is refused by name", name, is_named))
        flip(stick / name)
    return rows


PARTS = {"stick": prove_stick}


@script
def main(argv=None) -> int:
    parser = proof_parser("handover.py", __doc__, PARTS, "handover")
    parser.add_argument("--run", default=REPOSITORY / "assets" / "champion", metavar="RUN")
    return run_parts(PARTS, parser.parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
