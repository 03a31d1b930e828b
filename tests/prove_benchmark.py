"""The benchmark's own figures, at length: its verdict on what was slowed, what it costs itself,
whether it agrees with itself.

python tests/prove_benchmark.py [PART] --data DIR [--count N] [--out OUT]     needs a quiet machine;
`disk` root, cgroups
"""

import contextlib
import itertools
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import slurm_cluster
import torch
from conftest import REPOSITORY
from proofs import made_now, write_markdown

import benchmark
from lib.benchmark import cases
from lib.benchmark import timing as bench
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
from lib.device import num_cores, resolve_threads
from lib.files import read_json, write_json
from lib.pcam import SplitWriter, open_split
from lib.seeding import set_determinism

OF_MEMORY = "apart,overlapped,read,memory_copy,sequential_read,matrix_product"
STAGES = f"{OF_MEMORY},overlapped_cold"  # of patches that stay on the disk
NUM_PATCHES, BATCH_SIZE = 256, 16  # few, so that a slow disk need not be waited for
SLOW_S, SLOW_BYTES_PER_S = 1.0, 250_000  # a batch more; a second at most: 1.8 s a batch
OVERHEAD, NUM_BATCHES = 0.02, 200  # asked for: at most; batches in a run of the loop
AGREE = 0.9  # asked for: of the intervals
MOST_S = 3600.0  # of a job
# folder below assets/, options: the node of the second has no GPU here, so that its tables are
# short
PARTITIONS = {
    "thin_course": ("benchmark", ""),
    "gpu_course": (
        "benchmark-gpu_course",
        f"--device cpu --batch-sizes 1,64 --cases default,{OF_MEMORY}",
    ),
}
QUICK = ["--seconds", "1", "--repeats"]


def write_part(data: str, folder: Path) -> Path:
    """A PCam folder with the first patches of another, on the same disk."""
    for name in ("train", "valid"):
        split = open_split(data, name)
        num = min(NUM_PATCHES, len(split))
        folder.mkdir(exist_ok=True)
        with SplitWriter(folder, name, num) as writer:
            writer.add(split.images.read(range(num)), split.labels[:num])
    return folder


@contextlib.contextmanager
def own_disk(folder: Path):
    """A small file system in a file, on a device of its own, mounted at `folder` for the block."""
    image = folder.with_suffix(".img")
    folder.mkdir()
    with open(image, "wb") as file:
        file.truncate(64 << 20)
    subprocess.run(["mkfs.ext4", "-q", "-F", str(image)], check=True)
    subprocess.run(["mount", "-o", "loop", str(image), str(folder)], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


@contextlib.contextmanager
def slow_reader(folder: Path):
    """A control group (version 1 or 2) whose processes read so much a second from the disk that
    holds `folder`.
    """
    device = os.stat(folder).st_dev
    number = f"{os.major(device)}:{os.minor(device)}"
    one, two = Path("/sys/fs/cgroup/blkio"), Path("/sys/fs/cgroup")
    group = (one if one.is_dir() else two) / f"slow-disk-{os.getpid()}"
    if not one.is_dir():
        (two / "cgroup.subtree_control").write_text("+io")
    group.mkdir()
    try:
        if one.is_dir():
            (group / "blkio.throttle.read_bps_device").write_text(f"{number} {SLOW_BYTES_PER_S}")
        else:
            (group / "io.max").write_text(f"{number} rbps={SLOW_BYTES_PER_S}")
        yield group
    finally:
        group.rmdir()


def judge_slowed(what: str, value, data: Path, scratch: Path, repeats: int) -> dict:
    """The verdict of `benchmark.py train` whose repeats are slowed."""
    before = bench.CHILD
    bench.CHILD = (
        [sys.executable, str(REPOSITORY / "tests/slowed_case.py"), what, str(value)]
        if what
        else before
    )
    try:
        arguments = [
            "--out",
            str(scratch),
            "--batch-sizes",
            str(BATCH_SIZE),
            "--cases",
            STAGES,
            "--allow-noise",
        ]
        told = [*QUICK, str(repeats), "data_residence=disk", "threads=1"]
        if benchmark.main(["train", "--data", str(data), *arguments, *told]):
            raise BadInput(f"the benchmark with a slowed {what} failed")
    finally:
        bench.CHILD = before
    return read_json(scratch / "benchmark.json")["verdict"]


def prove_slowed(what: str, data: str, scratch: Path, count: int) -> tuple[int, int, str]:
    """The verdict of one run with a slowed part, once for each count: in the first epoch, and for
    what is in memory later.
    """
    expected = {
        "loader": ("loader", "loader"),
        "model": ("model", "model"),
        "disk": ("disk", "model"),
        "": ("model", "model"),
    }
    held, verdict, is_disk = 0, {}, what == "disk"
    with own_disk(scratch / "disk") if is_disk else contextlib.nullcontext(scratch) as place:
        part = write_part(data, place / "part")
        for _ in range(count):
            with slow_reader(part) if is_disk else contextlib.nullcontext(SLOW_S) as value:
                verdict = judge_slowed(what, value, part, scratch / "out", 3)
            named = tuple(verdict[epoch]["bottleneck"] for epoch in ("first_epoch", "later_epochs"))
            held += named == expected[what]
            say(f"{what or 'nothing'} slowed: {named}")
    return held, count, verdict["sentence"]


def prove_loader(data: str, scratch: Path, count: int):
    """Slowed loader: 1 s more in each gather. The verdict names the loader, cold and warm."""
    return prove_slowed("loader", data, scratch, count)


def prove_model(data: str, scratch: Path, count: int):
    """Slowed model: 1 s more in each forward pass. The verdict names the model, cold and warm."""
    return prove_slowed("model", data, scratch, count)


def prove_disk(data: str, scratch: Path, count: int):
    """Slowed disk: the kernel lets the repeats read 0.25 MB/s (cgroup). Cold, the disk is named,
    warm, the model.
    """
    return prove_slowed("disk", data, scratch, count)


def prove_nothing(data: str, scratch: Path, count: int):
    """Nothing slowed, on this machine: the verdict names the model's computing, cold and warm."""
    return prove_slowed("", data, scratch, count)


def prove_overhead(data: str, _scratch: Path, count: int) -> tuple[int, int, str]:
    """The loop with the harness's clock against the bare one, in turn, over the fastest case (uint8
    batches of 64, some 0.1 ms) and the step of training: under 2% of a batch."""
    cfg, told, held = resolve_threads(load_config(overrides=[f"data_dir={data}"])), [], 0
    set_determinism(cfg.deterministic, cfg.threads)
    for kind, num in (("raw", NUM_BATCHES), ("train", 4)):
        stream = cases.TIMED[kind](
            bench.Case("train", kind, kind, cfg, device="cpu"), torch.device("cpu"), {}, {}
        )
        list(itertools.islice(stream, 10))
        shares = []

        def run_bare(stream=stream, num=num):
            for _ in itertools.islice(stream, num):
                pass

        def run_clocked(stream=stream, num=num):
            bench.take(stream, 0, num, lambda: None)

        # who goes first changes, or drift of the machine would count for one of them
        for turn in range(count):
            seconds = {}
            for run in (run_bare, run_clocked)[:: 1 if turn % 2 else -1]:
                started_at = time.perf_counter()
                run()
                seconds[run] = time.perf_counter() - started_at
            bare_s = seconds[run_bare]
            shares.append(seconds[run_clocked] / bare_s - 1)
        low, high = bench.median_interval(shares)
        median = statistics.median(shares)
        told.append(
            f"{kind}: {median:+.2%} of {bare_s / num * 1e3:.3g} ms a batch (95% {low:+.2%} to"
            f" {high:+.2%})"
        )
        held += median < OVERHEAD
    return held, 2, "; ".join(told)


def prove_agreement(data: str, scratch: Path, count: int) -> tuple[int, int, str]:
    """Whole runs repeated: the interval of a row holds the median over all runs nine times of
    ten.
    """
    runs = []
    for number in range(count):
        arguments = [
            "--cases",
            "raw,ready,default,matrix_product",
            "--batch-sizes",
            "64",
            *QUICK,
            str(bench.REPEATS),
        ]
        code = benchmark.main(
            [
                "all",
                "--data",
                data,
                "--out",
                str(scratch / str(number)),
                "--allow-noise",
                *arguments,
            ]
        )
        if code:
            raise BadInput(f"run {number} failed")
        runs.append(read_json(scratch / str(number) / "benchmark.json")["rows"])
    held, total, noisy, widths = 0, 0, 0, []
    for rows in zip(*runs, strict=True):
        rates = [row["images_per_s"] or row["flops_per_s"] for row in rows]
        median = statistics.median(rates)
        inside = [row["low"] <= median <= row["high"] for row in rows]
        widths += [row["high"] / row["low"] - 1 for row in rows]
        held, total, noisy = (
            held + sum(inside),
            total + len(inside),
            noisy + sum(row["status"] != "ok" for row in rows),
        )
        say(
            f"{rows[0]['what']} {rows[0]['case']} {rows[0]['model']}: {sum(inside)} of"
            f" {len(inside)}"
        )
    remark = (
        f"{total} intervals of {len(runs[0])} rows, half of them narrower than"
        f" {statistics.median(widths):.1%}"
    )
    return held, total, f"{remark}; {noisy} rows were marked noisy or unsteady"


def prove_partitions(data: str, scratch: Path, count: int) -> tuple[int, int, str]:
    """`make bench` as a job of a real Slurm whose nodes are all this machine, in both partitions:
    into assets/.
    """
    # what this machine is not
    slurm_cluster.CONFIG = slurm_cluster.CONFIG.replace(" Feature=rome,256g", "")
    held, told, kept = 0, [], REPOSITORY / "data"
    with slurm_cluster.running_cluster(scratch) as environment:
        for partition, (folder, options) in PARTITIONS.items():
            began, told_to = (
                time.time(),
                {"PARTITION": partition, "DATA": data, "OUT": str(kept / folder)},
            )
            told_to |= {
                "PYTHON": sys.executable,
                "ARGS": f"{options} --seconds 0.3 --repeats {count}",
                "CPUS": str(num_cores()),
            }
            command = [
                "make",
                "-s",
                "bench",
                *(f"{name}={value}" for name, value in told_to.items()),
            ]
            said = subprocess.run(
                command,
                env=environment,
                cwd=REPOSITORY,
                stdout=subprocess.PIPE,
                text=True,
                check=True,
            ).stdout
            job = json.loads(said.splitlines()[-1])["jobs"][-1]
            # that of an older cluster's job of this number may lie there
            ended = REPOSITORY / "jobs" / "logs" / f"{job}.exit"

            def is_over(ended=ended, began=began):
                return ended.is_file() and ended.stat().st_mtime > began

            slurm_cluster.wait_for(is_over, f"job {job}", MOST_S)
            if ended.read_text().strip() != "0":
                told.append(f"{partition}: job {job} failed, {ended.with_suffix('.err')} says why")
                continue
            rows = read_json(kept / folder / "benchmark.json")["rows"]
            held += all(row["partition"] == partition and row["job_id"] == job for row in rows)
            status = Counter(row["status"] for row in rows)
            told.append(
                f"{partition}: {', '.join(f'{num} rows {name}' for name, num in status.items())}"
            )
    for folder, _ in PARTITIONS.values():  # now, so that all of it was measured at a clean commit
        if (kept / folder).is_dir():
            shutil.copytree(kept / folder, REPOSITORY / "assets" / folder, dirs_exist_ok=True)
    return held, len(PARTITIONS), "; ".join(told)


PARTS = {  # what, how often, and the share that has to hold
    "loader": (prove_loader, 1, 1.0),
    "model": (prove_model, 1, 1.0),
    "disk": (prove_disk, 1, 1.0),
    "nothing": (prove_nothing, 1, 1.0),
    "overhead": (prove_overhead, 50, 1.0),
    "agreement": (prove_agreement, 10, AGREE),
    "partitions": (prove_partitions, 5, 1.0),
}


@script
def main(argv=None) -> int:
    parser = Parser(
        prog="prove_benchmark.py",
        description="Prove, at length, that the benchmark can be believed.",
    )
    parser.add_argument(
        "part", nargs="?", default="all", help=f"{', '.join(PARTS)}, or all (default)"
    )
    parser.add_argument("--data", required=True, metavar="DIR", help="the real patches, on a disk")
    parser.add_argument("--count", type=positive, help="how often (default: as the issue asks)")
    parser.add_argument(
        "--out", default=REPOSITORY / "assets" / "benchmark_proof", type=Path, metavar="OUT"
    )
    args = parser.parse_args(argv)
    if args.part not in (*PARTS, "all"):
        raise BadInput(f"{args.part} is no part: {', '.join(PARTS)}, all")
    path = args.out.with_suffix(".json")
    table = read_json(path) if path.is_file() else {}
    for name in PARTS if args.part == "all" else [args.part]:
        prove, count, asked = PARTS[name]
        made, count = made_now(), args.count or count
        (REPOSITORY / "data").mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="proof-", dir=REPOSITORY / "data") as scratch:
            held, total, remark = prove(args.data, Path(scratch), count)
        command = f"python tests/prove_benchmark.py {name} --data {args.data}" + (
            f" --count {count}" if args.count else ""
        )
        what = " ".join(prove.__doc__.split())
        table[name] = {
            "what": what,
            "held": held,
            "total": total,
            "asked": asked,
            "remark": remark,
            "command": command,
        } | made
        write_json(path, table)
        say(f"{name}: {held} of {total} held; {remark}")
    rows = []
    for row in table.values():
        held, made = f"{row['held']} of {row['total']}", f"{row['date']}, {row['commit']}"
        rows.append((row["what"], held, row["remark"], f"`{row['command']}`", made))
    write_markdown(
        args.out.with_suffix(".md"), ("what", "held", "remark", "command", "date, commit"), rows
    )
    failed = [name for name, row in table.items() if row["held"] < row["asked"] * row["total"]]
    print_result({"failed": failed, "table": str(args.out.with_suffix(".md"))})
    return EXIT_FINDING if failed else EXIT_DONE


if __name__ == "__main__":
    sys.exit(main())
