"""Run folders are neither mixed up nor lost: starts at once, kills while writing, full disks, ten
thousand folders.

python tests/proofs/tracking.py [PART ...] [--count N] [--out assets/tracking]
Needs Linux; `disk` needs root, for a small tmpfs.
"""

import contextlib
import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from conftest import QUICK, run_script, write_pcam
from test_runs import kill_while_writing, start_at_once, write_run

from lib import rundir
from lib.command import positive, script
from lib.config import load_config
from lib.files import read_csv, read_json
from lib.progress import Progress
from proofs import proof_parser, row, run, run_parts

NUM_PROCESSES, NUM_RUNS, DISK_KB = 50, 10_000, 1000
MAX_LISTING_S = 3.0
VARIED = ("seed", "lr", "weight_decay", "dropout")


def prove_starts(args, scratch: Path) -> list[dict]:
    """Processes start runs at once, in names of two hex digits, which collide."""
    count = args.count or 20
    with Progress(count, "starts", "times") as bar:
        for number in range(count):
            start_at_once(scratch / str(number), NUM_PROCESSES)
            bar.add()
    text = f"{count} of {count}: each process has its own folder, config, rows and scores"
    return [row(f"{NUM_PROCESSES} processes start runs at once in one folder", text, True, count)]


def prove_kills(args, scratch: Path) -> list[dict]:
    """SIGKILL at random; each start goes on with the rows that the last one left."""
    count, draw = args.count or 200, random.Random(1)
    run_folder = rundir.create_run(scratch, load_config())
    num_held = num_torn = 0
    with Progress(count, "kills", "times") as bar:
        for _ in range(count):
            num_lost, num_left = kill_while_writing(run_folder, draw.uniform(0, 0.03))
            num_held += num_lost == 0
            num_torn += num_left > 0
            bar.add()
    num_rows = len(read_csv(run_folder / "steps.csv"))
    text = (
        f"{num_held} of {count}: no flushed row of {num_rows:,} lost; {num_torn} kills hit a file"
        " that was being replaced"
    )
    return [row("SIGKILL while a run is written and read", text, num_held == count, count)]


@contextlib.contextmanager
def small_disk(folder: Path):
    """A tmpfs of DISK_KB at `folder`, within the block."""
    folder.mkdir(exist_ok=True)
    options = ["-t", "tmpfs", "-o", f"size={DISK_KB}k", "tmpfs"]
    subprocess.run(["mount", *options, str(folder)], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def train_into_full_disk(disk: Path, free_kb: int, keys: list[str], weights: str) -> bool:
    """Whether a training on a disk with `free_kb` left says so in one sentence, and its run, with
    room again, is resumed to the same `weights`.
    """
    (disk / "full").write_bytes(bytes((DISK_KB - free_kb) * 1024))
    stopped = run_script("train.py", "--runs", disk / "runs", *keys)
    has_one_sentence = stopped.returncode == 2 and stopped.stderr.count("error: ") == 1
    is_held = has_one_sentence and "no space left" in stopped.stderr
    (disk / "full").unlink()
    subprocess.run(["mount", "-o", "remount,size=20m", str(disk)], check=True)
    for config in (disk / "runs").glob("*/config.yaml"):
        resumed = run_script("train.py", "--resume", config.parent, check=0).json
        is_held = is_held and resumed["weights_sha256"] == weights
    return is_held


def prove_disk(args, scratch: Path) -> list[dict]:
    """Disks with from nothing to nearly enough space."""
    count = args.count or 6
    data = write_pcam(scratch / "data")
    values = dict(key.split("=") for key in [*QUICK, "epochs=1", "p4m_width=4"])
    keys = [f"data_dir={data}", *(f"{key}={value}" for key, value in values.items())]
    whole = run_script("train.py", "--runs", scratch / "runs", *keys, check=0).json
    num_held = 0
    for number in range(count):
        with small_disk(scratch / "disk"):
            free_kb = 4 + 600 * number // count
            num_held += train_into_full_disk(
                scratch / "disk", free_kb, keys, whole["weights_sha256"]
            )
    text = f"{num_held} of {count}: one sentence, exit 2; resumed to the same weights"
    return [row("training into a full disk", text, num_held == count, count)]


def write_copies(runs: Path, num: int) -> None:
    """`num` run folders that differ in seed, learning rate, weight decay, dropout and scores, as
    those of a search do.
    """
    first, draw = write_run(runs), random.Random(0)
    lines = (first / "config.yaml").read_text().splitlines()
    config = [line for line in lines if line.split(":")[0] not in VARIED]
    summary = read_json(first / "summary.json")
    meta = read_json(first / "meta.json") | rundir.git_state()
    for number in range(1, num):
        copy = runs / f"{first.name[:-4]}{number:05}"
        copy.mkdir()
        values = (number, draw.uniform(1e-4, 1e-1), draw.uniform(0, 0.1), draw.uniform(0, 0.5))
        changed = [f"{key}: {value}" for key, value in zip(VARIED, values, strict=True)]
        (copy / "config.yaml").write_text("\n".join([*config, *changed]) + "\n")
        summary["val_auc"] = draw.uniform(0.5, 1)
        (copy / "summary.json").write_text(json.dumps(summary, indent=1))
        (copy / "meta.json").write_text(json.dumps(meta, indent=1))


def prove_listing(_args, scratch: Path) -> list[dict]:
    """The whole program, with a user's cache folder that is empty at first."""
    write_copies(scratch / "runs", NUM_RUNS)
    os.environ["XDG_CACHE_HOME"] = str(scratch / "cache")
    seconds = []
    for _ in range(2):
        started_at = time.monotonic()
        listed = run("report.py", "runs", "--runs", scratch / "runs")
        seconds.append(time.monotonic() - started_at)
        assert listed["num_runs"] == NUM_RUNS
    text = f"{seconds[0]:.1f} s, again {seconds[1]:.1f} s"
    is_held = max(seconds) < MAX_LISTING_S
    return [row(f"{NUM_RUNS:,} run folders listed", text, is_held, f"{MAX_LISTING_S:g} s")]


PARTS = {
    "starts": prove_starts,
    "kills": prove_kills,
    "disk": prove_disk,
    "listing": prove_listing,
}


@script
def main(argv=None) -> int:
    parser = proof_parser("tracking.py", __doc__, PARTS, "tracking")
    parser.add_argument("--count", type=positive, help="how often (default: 20, 200 and 6)")
    return run_parts(PARTS, parser.parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
