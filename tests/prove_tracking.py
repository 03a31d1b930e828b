"""The figures of tracking, at length: starts at once, kills while writing, full disks, ten thousand
folders.

python tests/prove_tracking.py [PART] [--count N] [--out assets/tracking]     needs Linux; `disk`
root, for a small tmpfs
"""

import json
import os
import random
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from conftest import QUICK, REPOSITORY, run_script, write_pcam
from proofs import made_now, write_markdown
from test_runs import kill_while_writing, start_at_once, write_run

from lib import rundir
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
from lib.config import load_config
from lib.files import read_csv, read_json, write_json
from lib.progress import Progress

NUM_PROCESSES, NUM_RUNS, DISK_KB = 50, 10_000, 1000
COLD_S, KEPT_S = 5.0, 1.0
VARIED = ("seed", "lr", "weight_decay", "dropout")


def prove_starts(scratch: Path, count: int) -> tuple[int, str]:
    """50 processes start runs at once in one folder, in names so short that they collide."""
    held = 0
    with Progress(count, "starts", "times") as bar:
        for number in range(count):
            start_at_once(scratch / str(number), NUM_PROCESSES)
            held += 1
            bar.add()
    return (
        held,
        (
            f"{NUM_PROCESSES} folders each time, each with its own config, process, rows and"
            " scores; names of two hex digits"
        ),
    )


def prove_kills(scratch: Path, count: int) -> tuple[int, str]:
    """SIGKILL at random while a run is written and read; each start goes on with the rows that the
    last one left.
    """
    run, draw, held, num_torn = rundir.create_run(scratch, load_config()), random.Random(1), 0, 0
    with Progress(count, "kills", "times") as bar:
        for _ in range(count):
            num_lost, num_left = kill_while_writing(run, draw.uniform(0, 0.03))
            held, num_torn = held + (num_lost == 0), num_torn + (num_left > 0)
            bar.add()
    num_rows = len(read_csv(run / "steps.csv"))
    return (
        held,
        (
            f"no reader failed, no flushed row of {num_rows:,} was lost; {num_torn} kills hit a"
            " file that was being replaced"
        ),
    )


def prove_disk(scratch: Path, count: int) -> tuple[int, str]:
    """Training into a full disk, at sizes from nothing to nearly enough; then, with room again,
    resumed to the same weights.
    """
    data, disk, held, num_resumed = write_pcam(scratch / "data"), scratch / "disk", 0, 0
    keys = [f"data_dir={data}", *QUICK, "epochs=1", "p4m_width=4"]
    keys = list({key.partition("=")[0]: key for key in keys}.values())
    whole = run_script("train.py", "--runs", scratch / "runs", *keys, check=0).json
    for number in range(count):
        disk.mkdir(exist_ok=True)
        subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={DISK_KB}k", "tmpfs", str(disk)], check=True
        )
        try:
            free_kb = 4 + 600 * number // count
            (disk / "full").write_bytes(bytes((DISK_KB - free_kb) * 1024))
            stopped = run_script("train.py", "--runs", disk / "runs", *keys)
            refused = (
                stopped.returncode == 2
                and stopped.stderr.count("error: ") == 1
                and "no space left" in stopped.stderr
            )
            listed = (
                run_script("report.py", "runs", "--runs", disk / "runs")
                if (disk / "runs").is_dir()
                else None
            )
            (disk / "full").unlink()
            runs = list((disk / "runs").glob("*/config.yaml"))
            subprocess.run(["mount", "-o", "remount,size=20m", str(disk)], check=True)
            same = True
            for config in runs:
                again = run_script("train.py", "--resume", config.parent, check=0).json
                same, num_resumed = (
                    same and again["weights_sha256"] == whole["weights_sha256"],
                    num_resumed + 1,
                )
            held += refused and same and (listed is None or listed.json["num_runs"] == len(runs))
            say(f"{free_kb} KB free: {stopped.stderr.splitlines()[-1]}; {len(runs)} runs resumed")
        finally:
            subprocess.run(["umount", str(disk)], check=True)
    return (
        held,
        (
            f"one sentence, exit 2, the folder listed; with room again {num_resumed} runs resumed"
            " to the same weights"
        ),
    )


def write_copies(runs: Path, num: int) -> None:
    """`num` run folders that differ in seed, learning rate, weight decay, dropout and scores, as
    those of a search do.
    """
    run, draw = write_run(runs), random.Random(0)
    config = [
        line
        for line in (run / "config.yaml").read_text().splitlines()
        if line.split(":")[0] not in VARIED
    ]
    summary, meta = (
        read_json(run / "summary.json"),
        read_json(run / "meta.json") | rundir.git_state(),
    )
    for number in range(1, num):
        copy = runs / f"{run.name[:-4]}{number:05}"
        copy.mkdir()
        values = (number, draw.uniform(1e-4, 1e-1), draw.uniform(0, 0.1), draw.uniform(0, 0.5))
        (copy / "config.yaml").write_text(
            "\n".join([*config, *map("{}: {}".format, VARIED, values)]) + "\n"
        )
        (copy / "summary.json").write_text(
            json.dumps(summary | {"val_auc": draw.uniform(0.5, 1)}, indent=1)
        )
        (copy / "meta.json").write_text(json.dumps(meta, indent=1))


def prove_listing(scratch: Path, count: int) -> tuple[int, str]:
    """10,000 run folders listed without and with what the user's cache keeps."""
    write_copies(scratch / "runs", NUM_RUNS)
    held, told = 0, []
    for _ in range(count):
        shutil.rmtree(scratch / "cache", ignore_errors=True)
        seconds = []
        for _ in range(2):
            wall, before = time.monotonic(), resource.getrusage(resource.RUSAGE_CHILDREN)
            command = [
                sys.executable,
                str(REPOSITORY / "report.py"),
                "runs",
                "--runs",
                str(scratch / "runs"),
            ]
            environment = os.environ | {"XDG_CACHE_HOME": str(scratch / "cache")}
            listed = subprocess.run(
                command, capture_output=True, text=True, env=environment, check=True
            )
            assert f'"num_runs": {NUM_RUNS}' in listed.stdout
            after = resource.getrusage(resource.RUSAGE_CHILDREN)
            cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
            seconds.append((time.monotonic() - wall, cpu))
        (cold, cold_cpu), (kept, kept_cpu) = seconds
        held += cold < COLD_S and kept < KEPT_S
        told.append(
            f"{cold:.2f} s ({cold_cpu:.1f} s of processor) and with the cache {kept:.2f} s"
            f" ({kept_cpu:.1f} s)"
        )
    return held, f"{NUM_RUNS:,} folders, seconds of the whole program: " + "; ".join(told)


PARTS = {
    "starts": (prove_starts, 20),
    "kills": (prove_kills, 200),
    "disk": (prove_disk, 6),
    "listing": (prove_listing, 1),
}


@script
def main(argv=None) -> int:
    parser = Parser(
        prog="prove_tracking.py",
        description="Prove, at length, that run folders are neither mixed up nor lost.",
    )
    parser.add_argument(
        "part", nargs="?", default="all", help=f"{', '.join(PARTS)}, or all (default)"
    )
    parser.add_argument("--count", type=positive, help="how often (default: as the issue asks)")
    parser.add_argument(
        "--out",
        default=REPOSITORY / "assets" / "tracking",
        type=Path,
        metavar="OUT",
        help="OUT.json and OUT.md",
    )
    args = parser.parse_args(argv)
    if args.part not in (*PARTS, "all"):
        raise BadInput(f"{args.part} is no part: {', '.join(PARTS)}, all")
    path = args.out.with_suffix(".json")
    table = read_json(path) if path.is_file() else {}
    for name in PARTS if args.part == "all" else [args.part]:
        prove, count = PARTS[name]
        made = made_now()
        with tempfile.TemporaryDirectory(prefix="proof-") as scratch:
            held, remark = prove(Path(scratch), args.count or count)
        command = " ".join(
            [
                "python tests/prove_tracking.py",
                name,
                *(["--count", str(args.count)] if args.count else []),
            ]
        )
        what = prove.__doc__.strip()
        table[name] = {
            "what": what,
            "held": held,
            "count": args.count or count,
            "remark": remark,
            "command": command,
        } | made
        write_json(path, table)
        say(f"{name}: {held} of {args.count or count} held; {remark}")
    rows = []
    for row in table.values():
        held, made = f"{row['held']} of {row['count']}", f"{row['date']}, {row['commit']}"
        rows.append((row["what"], held, row["remark"], f"`{row['command']}`", made))
    write_markdown(
        args.out.with_suffix(".md"), ("what", "held", "remark", "command", "date, commit"), rows
    )
    failed = [name for name, row in table.items() if row["held"] < row["count"]]
    print_result({"failed": failed, "table": str(args.out.with_suffix(".md"))})
    return EXIT_FINDING if failed else EXIT_DONE


if __name__ == "__main__":
    sys.exit(main())
