"""The handover proven at full size: the real wheels, no network, an empty cache, a medium that
cannot be written.

python tests/proofs/handover.py [--run RUN] [--out assets/handover]     needs Linux, root or user
namespaces, 3 GB of disk
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from conftest import REPOSITORY, run_script
from test_handover import MOUNT, flip, start_run, verify

from proofs import prove, row


def run_stick(stick: Path, scratch: Path):
    """run.sh of a stick, mounted read-only and without a network, on its own sample patches: its
    exit code, and what it says.
    """
    mounted = scratch / "mounted medium"
    prefix = ["unshare", "-mn", "sh", "-c", MOUNT, stick, mounted]
    process = start_run(mounted, stick / "patches", cwd=scratch, prefix=prefix, HOME=str(scratch))
    return process.wait(), process.communicate()[1]


def prove_stick(args, scratch: Path) -> list[dict]:
    """A row for each thing that must hold of a stick with the run `args.run`."""
    stick = scratch / 'our "stick"'
    result = run_script("report.py", "handover", args.run, "--to", stick, check=0).json
    size = f"{result['num_bytes']:,} bytes in {result['num_files']} files, torch {result['torch']}"
    rows = [row("a handover is written", size, True)]
    code, words = run_stick(stick, scratch)
    asked = "predicts offline, read-only, from an empty cache"
    rows.append(row(asked, words[-80:], code == 0))
    if code == 0:
        compared = verify(stick, "--predictions", scratch / "predictions.csv")
        alike = f"{compared.json['num_alike']} of {compared.json['num_patches']}"
        limit = f"{compared.json['tolerance']:.2g}"
        asked = "probabilities are those of the writer"
        rows.append(row(asked, alike, compared.returncode == 0, limit))
        wheel = next(stick.glob("wheels/torch-*"))
        flip(wheel)
        code, words = run_stick(stick, scratch)
        is_named = code == 1 and f"changed: wheels/{wheel.name}" in words
        rows.append(row("a flipped bit is refused by name", wheel.name, is_named))
    return rows


if __name__ == "__main__":
    champion = REPOSITORY / "assets" / "champion"
    sys.exit(prove(__doc__, {"stick": prove_stick}, "handover", run=champion))
