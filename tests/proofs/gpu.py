"""What the program does on one GPU, in minutes: sections of figures, in DIR/gpu.json and as one
table in DIR/gpu.md.

python tests/proofs/gpu.py --out DIR [--data DIR|TAR] [--sections a,b,...] [--budget SECONDS]

Each row is written as soon as it is measured. Sections that DIR/gpu.json of the same commit holds
whole are kept. Without a GPU the same runs in small, and what needs CUDA is skipped by name.
"""

import contextlib
import dataclasses
import functools
import itertools
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from conftest import REPOSITORY

from lib import pcam, seeding
from lib.command import (
    EXIT_DONE,
    EXIT_FINDING,
    BadInput,
    Parser,
    is_out_of_memory,
    one_line,
    print_result,
    say,
    script,
)
from lib.device import choose_device
from lib.files import read_cache, read_json
from lib.machine import describe_machine
from lib.splitwriter import SplitWriter
from proofs import kill_midway, made_now, row, run, write_results
from proofs.rates import plain_images_per_s
from proofs.trainer import (
    WARM_STEPS,
    Trainer,
    median_rates,
    profile_steps,
    wait_for,
)

MODELS = ("p4m", "resnet18")
# by default the first epochs see the centre alone, which is faster
WHOLE_PATCHES = {"crop_epochs": 0}
SLICE_BYTES = 4864 << 20  # what a 1g.5gb slice of an A100 holds
FULL_TRAIN = 262_144  # patches of PCam's training split
GOAL_IMAGES_PER_S, GOAL_EPOCH_S, GOAL_IDLE = 40_000, 7.0, 0.05  # of an H100
# a section starts with everything imported; this process never starts CUDA
FORK = multiprocessing.get_context("fork")
SECTIONS = {}


@dataclasses.dataclass
class Context:
    """What a section is given."""

    device: torch.device
    small: bool
    data: Path | None
    scratch: Path

    def patches(self) -> Path:
        """The PCam folder to measure with: the one that was given, or, made once, one of the tar,
        or a synthetic one.
        """
        if self.data and not self.data.is_file():
            return self.data
        folder, is_made = self.scratch / "data", self.scratch / "data-is-made"
        if not is_made.exists():
            num = self.size(8000, 512)
            sizes = ("--train", num, "--valid", num // 4, "--test", 0)
            how = ("import", self.data) if self.data else ("synthetic", *sizes)
            run("prepare.py", *how, "--to", folder)
            is_made.touch()
        return folder

    def size(self, full, small):
        return small if self.small else full

    def goal(self, is_reached: bool) -> bool | None:
        """A goal of speed, which nothing is asked of in small."""
        return self.size(is_reached, None)

    def trainer(self, **changes) -> Trainer:
        return Trainer(self.device, self.patches(), **changes)

    def rates(self, num_rounds: int, *sides: dict) -> list[float]:
        """Images a second of trainers with these changes, medians of rounds in turn."""
        seconds = self.size(1.0, 0.1)
        trainers = [self.trainer(**changes) for changes in sides]
        measures = [functools.partial(trainer.images_per_s, seconds) for trainer in trainers]
        return median_rates(measures, num_rounds)


def section(seconds: float, cuda_only: bool = False):
    """Register a section: a generator of rows, stopped after so many seconds; its docstring is what
    it asks.
    """

    def register(function):
        SECTIONS[function.__name__] = (function, seconds, cuda_only)
        return function

    return register


def peak_memory(device: torch.device) -> str:
    if device.type == "cuda":
        return f"{torch.cuda.max_memory_allocated(device) / 1e9:.2f} GB"
    return "not measured"


# The sections, in the order in which they run


@section(80)
def environment(ctx):
    """The machine, the tests that need CUDA, and the patches"""
    machine = describe_machine(ctx.device)
    keys = ("gpu", "driver", "cuda", "cudnn", "cpu", "num_cores")
    about = "".join(f"{key} {machine[key]}, " for key in keys if key in machine)
    python = sys.version.split()[0]
    yield row("the machine", f"{about}torch {torch.__version__}, python {python}")
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "tests/test_cuda.py"]
    tested = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    say(tested.stdout[-4000:])
    counts = one_line((tested.stdout + tested.stderr).strip().rpartition("\n")[2])
    is_held = tested.returncode == 0 if ctx.device.type == "cuda" else None
    yield row("the tests that need CUDA pass", counts, is_held, "all")
    started = time.monotonic()
    data = ctx.patches()
    numbers = " + ".join(f"{len(pcam.open_split(data, split)):,}" for split in ("train", "valid"))
    took_s = time.monotonic() - started
    yield row("the patches", f"{numbers} in {data}, there after {took_s:.1f} s")


def run_together(*commands) -> list[dict]:
    """Results of scripts that run at the same time: they are mostly start-up."""
    with ThreadPoolExecutor(3) as pool:
        return list(pool.map(lambda command: run(*command), commands))


@section(110)
def twins(ctx):
    """A run's weights are a function of its config alone"""
    recipe = "batch_size=64 epochs=2 crop_epochs=1 warmup_epochs=0.5 views=1 threads=1"
    limits = "limit_train=4096 limit_valid=512"
    if ctx.small:
        limits = "limit_train=256 limit_valid=64 p4m_width=2"
    where = ("--device", "cuda:0" if ctx.device.type == "cuda" else "cpu")
    keys = (f"data_dir={ctx.patches()}", *recipe.split(), *limits.split())
    train = ("train.py", *where, "--runs", ctx.scratch / "twins", *keys)
    interrupted = ("train.py", *where, *keys, "checkpoint_every_steps=3")
    killed = kill_midway(interrupted, ctx.scratch / "killed")
    if killed is None:
        raise BadInput("the run that was to be killed has failed, or had ended before")
    resume = ("train.py", "--resume", killed, *where)
    first, second, resumed = run_together(train, train, resume)
    yield equal_weights("two runs with one seed", first, second)
    step = read_json(killed / "meta.json")["start_step"]
    asked = f"killed by SIGKILL, resumed at step {step} of {resumed['num_steps']}"
    yield equal_weights(asked, first, resumed)
    two_ranks = ("-m", "torch.distributed.run", "--nproc-per-node", "2", *train, "shards=2")
    alone, sharing = run_together((*train, "shards=2"), two_ranks)
    yield equal_weights("shards=2 on one device: one rank and two ranks", alone, sharing)


def equal_weights(asked: str, one: dict, other: dict) -> dict:
    is_equal = one["weights_sha256"] == other["weights_sha256"]
    measured = "equal" if is_equal else "different"
    return row(f"{asked}: equal weights", measured, is_equal, "equal")


@section(45)
def determinism_price(ctx):
    """What `deterministic` costs"""
    for model in MODELS:
        changes = {"model": model, "batch_size": ctx.size(256, 4), **WHOLE_PATCHES}
        strict, free = ctx.rates(ctx.size(4, 1), changes, changes | {"deterministic": False})
        asked = (
            f"{model}, batch {changes['batch_size']}: share of the steps a second that"
            " deterministic=true costs"
        )
        share = f"{1 - strict / free:.1%} ({strict:,.0f} and {free:,.0f} images/s)"
        yield row(asked, share, ctx.goal(strict >= 0.85 * free), "15%")


def measure_alone(measure, seconds: float, device: torch.device) -> tuple[float, str]:
    """Images a second, 0 where memory runs out, and the same with the peak memory in words."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    try:
        images_per_s = measure(seconds)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        return 0.0, "out of memory"
    return images_per_s, f"{images_per_s:,.0f} images/s, peak {peak_memory(device)}"


@section(90)
def throughput(ctx):
    """Images a second and peak memory, by batch size and precision"""
    sizes, seconds = ctx.size((64, 256, 1024, 1), (4,)), ctx.size(0.8, 0.1)
    for precision, model in itertools.product(("bf16", "fp32"), MODELS):
        best = 0.0
        for size in sizes:
            changes = {"model": model, "precision": precision, "batch_size": size}
            trainer = ctx.trainer(**changes, **WHOLE_PATCHES)
            name = f"{model} {precision} batch {size}"
            images_per_s, measured = measure_alone(trainer.images_per_s, seconds, ctx.device)
            best = max(best, images_per_s)
            yield row(f"train {name}", measured)
            _, measured = measure_alone(trainer.predicting_images_per_s, seconds, ctx.device)
            yield row(f"predict {name}", measured)
        if precision == "bf16":
            asked = f"train {model} bf16: images/s at the best of these batch sizes"
            is_reached = ctx.goal(best >= GOAL_IMAGES_PER_S)
            yield row(asked, f"{best:,.0f}", is_reached, f"{GOAL_IMAGES_PER_S:,}")


@section(60)
def baseline(ctx):
    """Twice the rate of a fair plain training loop"""
    split, size = pcam.open_split(ctx.patches(), "train"), ctx.size(256, 4)
    seconds = ctx.size(2.0, 0.3)
    seeding.set_determinism(False, ctx.size(8, 1))
    best, texts = 0.0, []
    for num_workers in ctx.size((8, 15, 4, 0), (0, 2)):
        try:
            rate = plain_images_per_s(split, ctx.device, num_workers, size, seconds)
            best = max(best, rate)
            texts.append(f"{num_workers} workers {rate:,.0f}")
        except RuntimeError as error:  # of a worker, for want of shared memory say
            texts.append(f"{num_workers} workers: {one_line(error)}")
    name = f"resnet18, bf16, batch {size}, whole patches"
    asked = (
        f"{name}: the plain loop (DataLoader over h5py; normalised and flipped on the device),"
        " images/s"
    )
    yield row(asked, ", ".join(texts))
    changes = {"model": "resnet18", "optimizer": "sgd", "batch_size": size, **WHOLE_PATCHES}
    ours = ctx.trainer(**changes).images_per_s(seconds)
    asked = f"{name}, optimizer=sgd: this program against it"
    measured = f"{ours / best:.2f}x ({ours:,.0f} images/s)"
    yield row(asked, measured, ctx.goal(ours >= 2 * best), "2x")


def write_random_split(folder: Path, num: int) -> None:
    """A training split of `num` random patches, contiguous uint8: a random block over and over,
    which no step is faster for.
    """
    rng = np.random.default_rng(0)
    block = rng.integers(0, 256, (min(num, 4096), *pcam.PATCH_SHAPE), dtype=np.uint8)
    with SplitWriter(folder, "train", num) as writer:
        for _ in range(num // len(block)):
            writer.add(block, rng.integers(0, 2, len(block), dtype=np.uint8))


@section(100)
def full_epoch(ctx):
    """An epoch over a training split of PCam's size"""
    num, size = ctx.size(FULL_TRAIN, 1024), ctx.size(1024, 16)
    folder = Path(tempfile.mkdtemp(dir=ctx.scratch))
    started = time.monotonic()
    write_random_split(folder, num)
    took_s, gigabytes = time.monotonic() - started, num * pcam.PATCH_BYTES / 1e9
    asked = f"a file of {num:,} random patches is written"
    yield row(asked, f"{took_s:.1f} s, {gigabytes:.2f} GB")
    trainer = Trainer(ctx.device, folder, batch_size=size, lr=1e-3, **WHOLE_PATCHES)
    speed = f"{trainer.read_s:.1f} s, {gigabytes / trainer.read_s:.2f} GB/s"
    asked = "it is read from the page cache to where it resides"
    yield row(asked, f"{speed}, to {trainer.source.residence}")
    list(trainer.logged_steps(None, WARM_STEPS, size))
    wait_for(ctx.device)
    num_steps, started = num // size, time.monotonic()
    list(trainer.logged_steps(None, num_steps, size))
    wait_for(ctx.device)
    epoch_s = time.monotonic() - started
    speed = f"{num / epoch_s:,.0f} images/s, peak {peak_memory(ctx.device)}"
    asked = f"p4m, bf16, batch {size}: the epoch's {num_steps} steps with whole patches"
    is_reached = ctx.goal(epoch_s < GOAL_EPOCH_S)
    yield row(asked, f"{epoch_s:.1f} s, {speed}", is_reached, f"{GOAL_EPOCH_S:g} s")


def busy_us(kernels: list[dict]) -> float:
    """Microseconds in which at least one of the kernels ran."""
    busy = ends_at = 0.0
    for kernel in sorted(kernels, key=lambda kernel: kernel["ts"]):
        end = kernel["ts"] + kernel["dur"]
        busy += max(0.0, end - max(kernel["ts"], ends_at))
        ends_at = max(ends_at, end)
    return busy


def profile_kernels(trainer: Trainer, num: int, path: Path) -> list[dict]:
    """What the GPU did in `num` steps, as a trace in `path` says. Raises BadInput for nothing."""
    profiled = profile_steps(trainer, num, [torch.profiler.ProfilerActivity.CUDA])
    profiled.export_chrome_trace(str(path))
    events = json.loads(path.read_text())["traceEvents"]
    kinds = ("kernel", "gpu_memcpy", "gpu_memset")
    kernels = [event for event in events if event.get("cat") in kinds]
    if not kernels:
        raise BadInput("the profiler saw no kernel: the driver does not let it")
    return kernels


@section(30, cuda_only=True)
def profile(ctx):
    """For how much of a step the GPU is idle"""
    num, size = 10, 1024
    for model in MODELS:
        trainer = ctx.trainer(model=model, batch_size=size, **WHOLE_PATCHES)
        # without the profiler, which makes the host slower
        step_us = 1e6 * size / trainer.images_per_s(1.0)
        kernels = profile_kernels(trainer, num, ctx.scratch / f"{model}.json")
        idle = 1 - busy_us(kernels) / num / step_us
        step = f"{len(kernels) / num:.0f} kernels, {step_us / 1000:.2f} ms"
        asked = (
            f"{model}, batch {size}: a step (idle: 1 - busy time, profiled, over its time, not"
            " profiled)"
        )
        measured = f"{step}, the GPU idle for {idle:.1%}"
        yield row(asked, measured, idle < GOAL_IDLE, f"{GOAL_IDLE:.0%}")


@section(40, cuda_only=True)
def small_slice(ctx):
    """The default config in the memory of a 1g.5gb slice"""
    total = torch.cuda.get_device_properties(ctx.device).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, SLICE_BYTES / total), ctx.device)
    images_per_s = ctx.trainer(**WHOLE_PATCHES).images_per_s(1.0)
    reserved = torch.cuda.max_memory_reserved(ctx.device)
    asked = "p4m, batch 64, whole patches: memory with the sample resident, without CUDA's own"
    measured = f"{reserved / 2**20:,.0f} MiB, {images_per_s:,.0f} images/s"
    yield row(asked, measured, reserved <= SLICE_BYTES, "4,864 MiB")


@section(100, cuda_only=True)
def recipes(ctx):
    """config.yaml and config-gpu.yaml, three seeds each, three trainings at a time"""
    where = ("--device", "cuda", "--runs", ctx.scratch / "recipes", f"data_dir={ctx.patches()}")
    jobs = list(itertools.product(("config-gpu.yaml", "config.yaml"), (1, 2, 3)))
    commands = []
    for config, seed in jobs:
        commands.append(("train.py", *where, "--config", config, f"seed={seed}", "threads=4"))
    for (config, seed), result in zip(jobs, run_together(*commands), strict=True):
        outcome = f"{result['status']}, val_auc {result.get('val_auc') or 0:.4f}"
        yield row(f"train --config {config} seed={seed}", outcome)


# Carrying them out


def carry_out(function, ctx: Context, seconds: float, keep) -> str:
    """Run a section in a process of its own and give each row to `keep` as it comes: done, failed
    or unfinished.

    What it did to its process, a broken CUDA context say, ends with it; at the deadline all that it
    started ends too.
    """
    ends_at = time.monotonic() + seconds
    receiver, sender = FORK.Pipe(duplex=False)
    process = FORK.Process(target=work, args=(function, ctx, sender))
    process.start()
    sender.close()
    state = ""
    try:
        while not state:
            state, line = "unfinished", f"stopped after {seconds:.0f} s"
            if receiver.poll(max(0.0, ends_at - time.monotonic())):
                state, line = receiver.recv()
            if isinstance(line, str):  # why it ended
                line = row(function.__doc__, line, False)
            if line:
                keep(line)
    except EOFError:
        process.join()
        state = "failed"
        reason = f"its process ended with exit code {process.exitcode}"
        keep(row(function.__doc__, reason, False))
    finally:
        # torchrun ends its ranks, which are in no group of ours, at the first
        for number in (signal.SIGTERM, signal.SIGKILL):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, number)
            process.join(3)
    return state


def work(function, ctx: Context, sender) -> None:
    """In the process of a section: send its rows, each with a state that is empty, and a state at
    the end, with the reason where it failed.
    """
    os.setsid()
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        for line in function(ctx):
            sender.send(("", line))
    except Exception as error:
        traceback.print_exc()
        sender.send(("failed", one_line(error)))
    else:
        sender.send(("done", None))


def describe_device(_ctx):
    """The device"""
    device = choose_device()
    yield {"device": device, "card": describe_machine(device).get("gpu", "none")}


def measure(result: dict, name: str, ctx: Context, seconds: float, origin: dict, save) -> None:
    """Run a section into its `result`, each of whose rows is saved as soon as it is measured."""
    last_at = time.monotonic()

    def keep(line):
        nonlocal last_at
        now = time.monotonic()
        result["rows"].append(line | origin | {"seconds": round(now - last_at, 2)})
        last_at = now
        missed = " MISSED" if line["held"] is False else ""
        say(f"{name}: {line['asked']}: {line['measured']}{missed}")
        save()

    result["state"] = carry_out(SECTIONS[name][0], ctx, seconds, keep)


def parse(argv):
    parser = Parser(description="What the program does on one GPU, as a table of figures.")
    add = parser.add_argument
    out = Path("assets/gpu")
    add("--out", type=Path, default=out, metavar="DIR", help="for gpu.json and gpu.md")
    what = "a PCam folder, or a tar of images (default: synthetic patches)"
    add("--data", type=Path, metavar="DIR|TAR", help=what)
    what = f"some of {','.join(SECTIONS)} (default: those that are not done)"
    add("--sections", default="", help=what)
    what = "for all sections (default: 330)"
    add("--budget", type=float, default=330, metavar="SECONDS", help=what)
    add("--commit", help="of this code, where git is missing")
    args = parser.parse_args(argv)
    args.sections = args.sections.split(",") if args.sections else []
    unknown = set(args.sections) - set(SECTIONS)
    if unknown:
        raise BadInput(f"no section {unknown.pop()!r}; allowed: {', '.join(SECTIONS)}")
    return args


@script
def main(argv=None) -> int:
    started = time.monotonic()
    args = parse(argv)
    made = made_now()
    made["commit"] = args.commit or made["commit"]
    args.out.mkdir(parents=True, exist_ok=True)
    out = args.out / "gpu"
    sections = {}
    for name, result in read_cache(out.with_suffix(".json")).items():
        if result["commit"] == made["commit"]:
            sections[name] = result
    save = functools.partial(write_results, out, sections)
    done = [name for name, result in sections.items() if result["state"] == "done"]
    todo = args.sections or [name for name in SECTIONS if name not in done]
    with tempfile.TemporaryDirectory(prefix="proof-gpu-", ignore_cleanup_errors=True) as scratch:
        data = args.data and args.data.absolute()
        ctx = Context(torch.device("cpu"), True, data, Path(scratch))
        lines = []
        if carry_out(describe_device, ctx, 60, lines.append) != "done":
            raise BadInput(f"the device cannot be used: {lines[-1]['measured']}")
        ctx.device, card = lines[0]["device"], lines[0]["card"]
        ctx.small = ctx.device.type == "cpu"
        say(f"{ctx.device} ({card}), {', '.join(todo) or 'nothing is to do'}")
        for name in sorted(todo, key=done.count):
            function, seconds, cuda_only = SECTIONS[name]
            left = args.budget - (time.monotonic() - started)
            origin = {"section": name, "card": card, "torch": torch.__version__}
            reason = "not run: budget" if left < min(seconds / 2, 30) else ""
            if cuda_only and ctx.small:
                reason = "skipped: no CUDA device"
            if reason:
                # what was measured before is worth more
                line = row(function.__doc__, reason) | origin | {"seconds": 0.0}
                sections.setdefault(name, made | {"state": "skipped", "rows": [line]})
                say(f"{name}: {reason}")
            else:
                sections[name] = made | {"state": "unfinished", "rows": []}
                measure(sections[name], name, ctx, min(seconds, left), origin, save)
            save()
    missed = save()
    states = {name: result["state"] for name, result in sections.items()}
    table = str(out.with_suffix(".md"))
    print_result({"missed": missed, "sections": states, "table": table})
    return EXIT_FINDING if missed else EXIT_DONE


if __name__ == "__main__":
    sys.exit(main())
