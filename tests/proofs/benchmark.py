"""The benchmark's own figures: its verdict on what was slowed, what it costs itself, whether it
agrees with itself.

python tests/proofs/benchmark.py [PART ...] --data DIR [--count N]     needs a quiet machine; `disk`
root and control groups, `partitions` Slurm
"""

import contextlib
import functools
import itertools
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import slurm_cluster
import torch

import benchmark
from lib.batches import PatchSource
from lib.benchmark import cases, plan, rounds
from lib.benchmark.timing import take
from lib.centrenet import CentreNet
from lib.command import REPOSITORY, BadInput, positive, script
from lib.config import load_config
from lib.files import read_json
from lib.machine import num_cores, resolve_threads
from lib.pcam import open_split
from lib.seeding import set_determinism
from lib.splitwriter import SplitWriter
from proofs import proof_parser, row, run, run_parts

NUM_PATCHES, BATCH_SIZE = 256, 16  # few, so that a slow disk need not be waited for
SLOW_S, SLOW_BYTES_PER_S = 1.0, 250_000  # a batch more; a second at most: 1.8 s a batch
OVERHEAD, NUM_BATCHES = 0.02, 200  # asked for: at most; batches in a run of the loop
AGREE = 0.9  # asked for: of the intervals
MAX_JOB_S = 3600.0
STAGES = "apart,read"
# the bottleneck of the first epoch and of later ones, where a part is slowed
EXPECTED = {
    "loader": ("loader", "loader"),
    "model": ("model", "model"),
    "disk": ("disk", "model"),
    "nothing": ("model", "model"),
}
SLOWED = {"loader": (PatchSource, "gather"), "model": (CentreNet, "forward")}
# options of each partition: the node of the second has no GPU here, so that its tables are short
PARTITIONS = {
    "thin_course": "",
    "gpu_course": f"--device cpu --batch-sizes 1,64 --cases default,{STAGES},matrix_product",
}


def set_up_slowed(what: str, group: str, cache_dir: str) -> None:
    """In place of `rounds.set_up`: a process in which something is slow, the disk by a control
    group.
    """
    if group:
        Path(group, "cgroup.procs").write_text(str(os.getpid()))
    if what in SLOWED:
        owner, name = SLOWED[what]
        method = getattr(owner, name)

        def slowed(*arguments):
            time.sleep(SLOW_S)
            return method(*arguments)

        setattr(owner, name, slowed)
    SET_UP(cache_dir)


SET_UP = rounds.set_up


def write_part(data: str, folder: Path) -> Path:
    """A PCam folder with the first patches of another."""
    folder.mkdir()
    for name in ("train", "valid"):
        split = open_split(data, name)
        num = min(NUM_PATCHES, len(split))
        with SplitWriter(folder, name, num) as writer:
            writer.add(split.images.read(range(num)), split.labels[:num])
    return folder


@contextlib.contextmanager
def slow_disk(folder: Path):
    """A small file system on a device of its own, mounted at `folder`, and a control group (version
    1 or 2) whose processes read slowly from it.
    """
    image = folder.with_suffix(".img")
    folder.mkdir()
    with open(image, "wb") as file:
        file.truncate(64 << 20)
    subprocess.run(["mkfs.ext4", "-q", "-F", image], check=True)
    subprocess.run(["mount", "-o", "loop", image, folder], check=True)
    device = os.stat(folder).st_dev
    number = f"{os.major(device)}:{os.minor(device)}"
    root, limit = Path("/sys/fs/cgroup/blkio"), "blkio.throttle.read_bps_device"
    line = f"{number} {SLOW_BYTES_PER_S}"
    if not root.is_dir():
        root, limit, line = root.parent, "io.max", f"{number} rbps={SLOW_BYTES_PER_S}"
        (root / "cgroup.subtree_control").write_text("+io")
    group = root / f"slow-disk-{os.getpid()}"
    try:
        group.mkdir()
        (group / limit).write_text(line)
        yield group
    finally:
        group.rmdir()
        subprocess.run(["umount", folder], check=True)


def prove_slowed(what: str, args, scratch: Path) -> list[dict]:
    """The verdict of `benchmark.py train` on what was slowed, cold and warm."""
    with contextlib.ExitStack() as stack:
        place, group = scratch, ""
        if what == "disk":
            place = scratch / "disk"
            group = str(stack.enter_context(slow_disk(place)))
        part = write_part(args.data, place / "part")
        stack.callback(setattr, rounds, "set_up", SET_UP)
        rounds.set_up = functools.partial(set_up_slowed, what, group)
        options = ["--batch-sizes", str(BATCH_SIZE), "--cases", STAGES, "--allow-noise"]
        options += ["data_residence=disk", "threads=1", "--out", str(scratch / "out")]
        if benchmark.main(["train", "--data", str(part), *options]):
            raise BadInput(f"the benchmark with a slowed {what} failed")
    judged = read_json(scratch / "out" / "benchmark.json")["verdict"]
    named = tuple(judged[epoch]["bottleneck"] for epoch in ("first_epoch", "later_epochs"))
    asked = f"{what} slowed: cold and warm, the verdict names {' and '.join(EXPECTED[what])}"
    return [row(asked, judged["sentence"], named == EXPECTED[what])]


def prove_overhead(args, _scratch) -> list[dict]:
    """The loop with the harness's clock against the bare one, in turn, over the fastest case (uint8
    batches of 64, some 0.1 ms) and the step of training.
    """
    cfg = resolve_threads(load_config(overrides=[f"data_dir={args.data}"]))
    set_determinism(cfg.deterministic, cfg.threads)
    rows = []
    for kind, num in (("raw", NUM_BATCHES), ("train", 4)):
        case = plan.Case("train", kind, kind, cfg)
        stream = cases.TIMED[kind](case, torch.device("cpu"), {})
        list(itertools.islice(stream, 10))
        seconds = {"bare": [], "clocked": []}
        for turn in range(args.count or 50):
            # who goes first changes, or drift of the machine would count for one of them
            for name in sorted(seconds, reverse=bool(turn % 2)):
                started_at = time.perf_counter()
                if name == "bare":
                    list(itertools.islice(stream, num))
                else:
                    take(stream, 0, num)
                seconds[name].append(time.perf_counter() - started_at)
        bare_s, clocked_s = (statistics.median(values) for values in seconds.values())
        share = clocked_s / bare_s - 1
        asked = f"{kind}: the harness costs at most {OVERHEAD:.0%} of a batch"
        rows.append(row(asked, f"{share:+.2%} of {bare_s / num * 1e3:.3g} ms", share < OVERHEAD))
    return rows


def prove_agreement(args, scratch: Path) -> list[dict]:
    """Whole runs repeated: the interval of a row holds the mean over all runs nine times of ten."""
    runs = []
    for number in range(args.count or 10):
        options = ["--cases", "raw,ready,default,matrix_product", "--batch-sizes", 64]
        out = ["--out", scratch / str(number), "--allow-noise"]
        runs.append(run("benchmark.py", "all", "--data", args.data, *out, *options)["rows"])
    num_held, widths = 0, []
    for rows in zip(*runs, strict=True):
        mean = statistics.geometric_mean(row["images_per_s"] or row["flops_per_s"] for row in rows)
        num_held += sum(row["low"] <= mean <= row["high"] for row in rows)
        widths += [row["high"] / row["low"] - 1 for row in rows]
    measured = f"{num_held} of {len(widths)}, half of them narrower than"
    measured += f" {statistics.median(widths):.1%}"
    asked = f"{AGREE:.0%} of the intervals hold the mean over {len(runs)} runs"
    return [row(asked, measured, num_held >= AGREE * len(widths))]


def prove_partitions(args, scratch: Path) -> list[dict]:
    """`make bench` as a job of a real Slurm whose nodes are all this machine, in both partitions:
    data/benchmark-PARTITION, which is what assets/ has.
    """
    # what this machine is not
    slurm_cluster.CONFIG = slurm_cluster.CONFIG.replace(" Feature=rome,256g", "")
    rows = []
    with slurm_cluster.running_cluster(scratch) as environment:
        for partition, options in PARTITIONS.items():
            out, began = REPOSITORY / "data" / f"benchmark-{partition}", time.time()
            command = ["make", "-s", "bench", f"PARTITION={partition}", f"DATA={args.data}"]
            command += [f"OUT={out}", f"PYTHON={sys.executable}", f"CPUS={num_cores()}"]
            answer = subprocess.check_output(
                [*command, f"ARGS={options}"], env=environment, cwd=REPOSITORY, text=True
            )
            job = json.loads(answer.splitlines()[-1])["jobs"][-1]
            ended = REPOSITORY / "jobs" / "logs" / f"{job}.exit"

            # that of an older cluster's job of this number may lie there
            def is_over(ended=ended, began=began):
                return ended.is_file() and ended.stat().st_mtime > began

            slurm_cluster.wait_for(is_over, f"job {job}", MAX_JOB_S)
            measured, held = f"job {job} failed", ended.read_text().strip() == "0"
            if held:
                jobs = {
                    (r["partition"], r["job_id"]) for r in read_json(out / "benchmark.json")["rows"]
                }
                measured, held = f"{jobs}", jobs == {(partition, job)}
            rows.append(row(f"every row of {partition} names it and its job", measured, held))
    return rows


PARTS = {what: functools.partial(prove_slowed, what) for what in EXPECTED}
PARTS |= {
    "overhead": prove_overhead,
    "agreement": prove_agreement,
    "partitions": prove_partitions,
}


@script
def main(argv=None) -> int:
    parser = proof_parser("benchmark.py", __doc__, PARTS, "benchmark_proof")
    parser.add_argument("--data", required=True, metavar="DIR", help="the real patches, on a disk")
    parser.add_argument("--count", type=positive, help="how often (default: 50 or 10)")
    return run_parts(PARTS, parser.parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
