"""What the program does on one GPU, in minutes: sections of figures, in DIR/gpu.json and as one
table in DIR/gpu.md.

python tests/proofs/gpu.py --out DIR [--data DIR|TAR] [--sections a,b,...] [--budget SECONDS]
                           [--before FILE]
python tests/proofs/gpu.py --pack TAR     the real patches that travel to a machine with a GPU

Each row is written as soon as it is measured. Sections that FILE, or DIR/gpu.json of the same
commit, holds whole are kept. Without a GPU the same runs in small, and what needs CUDA is skipped
by name.
"""

import contextlib
import dataclasses
import itertools
import json
import multiprocessing
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
import traceback
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from conftest import REAL_SAMPLE, REPOSITORY

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
from lib.config import load_config
from lib.device import choose_device
from lib.files import atomic_write, read_json, write_json
from lib.machine import describe_machine
from lib.splitwriter import SplitWriter
from proofs import made_now, run, write_markdown
from proofs.plain_loop import plain_images_per_s
from proofs.trainer import (
    WARM_STEPS,
    Trainer,
    computed_bytes,
    different_draws,
    first_wait,
    launches_of_a_step,
    logit_difference,
    wait_for,
)

PACKED = REPOSITORY / "data" / "gpu" / "gpu-data.tar"
# patches of each class
PACKED_PATCHES, MOST_PACKED_BYTES = {"train": 4000, "valid": 1000}, 54_000_000
MODELS = ("p4m", "resnet18")
# by default the first epochs see the centre alone, which is faster
WHOLE_PATCHES = {"crop_epochs": 0}
SLICE_BYTES = 4864 << 20  # what a 1g.5gb slice of an A100 holds
FULL_TRAIN = 262_144  # patches of PCam's training split
GOAL_IMAGES_PER_S, GOAL_EPOCH_S, GOAL_IDLE = 40_000, 7.0, 0.05  # of an H100
RECIPES = (
    (64, ""),
    (256, "sqrt"),
    (1024, "sqrt"),
    (128, "sqrt"),
    (512, "sqrt"),
    (256, "linear"),
    (1024, "linear"),
)
# a section starts with everything imported; this process never starts CUDA
FORK = multiprocessing.get_context("fork")
COLUMNS = ("asked", "measured", "limit", "held", "card", "torch", "seconds")
SECTIONS = {}


@dataclasses.dataclass
class Context:
    """What a section is given; `ends_at`, on the monotonic clock, is when it is stopped."""

    device: torch.device
    small: bool
    data: Path
    scratch: Path
    ends_at: float = 0.0

    def patches(self) -> Path:
        """The PCam folder to measure with: the one that was given, or, made once, one of the tar,
        or a synthetic one.
        """
        if not self.data.is_file() and self.data != PACKED:
            return self.data
        made = self.scratch / "data"
        if all(
            pcam.split_path(made, split, part).is_file()
            for split in PACKED_PATCHES
            for part in "xy"
        ):
            return made
        if self.data.is_file():
            run("prepare.py", "import", self.data, "--to", made)
        else:
            num = self.size(8000, 512)
            run(
                "prepare.py",
                "synthetic",
                "--to",
                made,
                "--train",
                num,
                "--valid",
                num // 4,
                "--test",
                0,
            )
        return made

    def size(self, full, small):
        return small if self.small else full

    def goal(self, is_reached: bool) -> bool | None:
        """A goal of speed, which nothing is asked of in small."""
        return self.size(bool(is_reached), None)

    def left(self) -> float:
        return self.ends_at - time.monotonic()


def section(seconds: float, cuda_only: bool = False):
    """Register a section: a generator of rows, stopped after so many seconds; its docstring is what
    it asks.
    """

    def register(function):
        SECTIONS[function.__name__] = (function, seconds, cuda_only)
        return function

    return register


def figure(asked: str, measured: str, limit: str = "", held: bool | None = None) -> dict:
    """A row; `held` is None where nothing was asked."""
    return {
        "asked": asked,
        "measured": measured,
        "limit": limit,
        "held": held if held is None else bool(held),
    }


def forget_memory(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def peak_memory(device: torch.device) -> str:
    return (
        f"{torch.cuda.max_memory_allocated(device) / 1e9:.2f} GB"
        if device.type == "cuda"
        else "not measured"
    )


# The sections, in the order in which they run


@section(60)
def environment(ctx):
    """The machine, the tests that need CUDA, and the patches"""
    machine = describe_machine(ctx.device)
    about = ", ".join(
        f"{key} {machine[key]}"
        for key in ("gpu", "driver", "cuda", "cudnn", "cpu", "num_cores")
        if key in machine
    )
    yield figure(
        "the machine", f"{about}, torch {torch.__version__}, python {sys.version.split()[0]}"
    )
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-p",
        "no:cacheprovider",
        "-m",
        "cuda",
        "tests/test_cuda.py",
    ]
    tested = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    counts = one_line((tested.stdout + tested.stderr).strip().rpartition("\n")[2])
    say(tested.stdout[-4000:])
    yield figure(
        "the tests that need CUDA pass",
        counts,
        "all",
        tested.returncode == 0 if ctx.device.type == "cuda" else None,
    )
    started = time.monotonic()
    data = ctx.patches()
    numbers = " + ".join(f"{len(pcam.open_split(data, split)):,}" for split in PACKED_PATCHES)
    kind = "given" if data == ctx.data else "real" if ctx.data.is_file() else "synthetic"
    yield figure(
        "the patches", f"{numbers}, {kind}, there after {time.monotonic() - started:.1f} s"
    )


@section(40, cuda_only=True)
def agreement(ctx):
    """The GPU says what the CPU says"""
    for model in MODELS:
        trainer = Trainer(ctx.device, ctx.patches(), model=model)
        # weights and batch-norm statistics that mean something
        list(trainer.logged_steps(None, 20, 64))
        for precision, most in (("fp32", 1e-3), ("bf16", 0.1)):
            share = logit_difference(trainer, precision)
            asked = (
                f"{model}, {precision}: greatest difference between the logits of 256 patches on"
                " GPU and CPU, over their range"
            )
            yield figure(asked, f"{share:.2g}", f"{most:g}", share <= most)
    different = ", ".join(different_draws(trainer))
    asked = "order and draws of an epoch are equal to the bit on GPU and CPU"
    yield figure(asked, different or "equal", "equal", not different)


@section(30, cuda_only=True)
def waits(ctx):
    """The host waits for the GPU nowhere"""
    for model in MODELS:
        trainer = Trainer(ctx.device, ctx.patches(), model=model)
        folder = Path(tempfile.mkdtemp(dir=ctx.scratch))
        waited = first_wait(trainer, folder)
        yield figure(
            f"{model}: waits of ten steps of training, loading and logging",
            waited or "none",
            "none",
            not waited,
        )


@section(60, cuda_only=True)
def graph(ctx):
    """A step is one CUDA graph"""
    for model in MODELS:
        changes = {"model": model, **WHOLE_PATCHES}
        first, plain, again = (
            computed_bytes(ctx.device, ctx.patches(), captured, **changes)
            for captured in (True, False, True)
        )
        same = all(map(torch.equal, first, plain)) and all(map(torch.equal, first, again))
        asked = f"{model}: weights, moments and losses of captured, plain and repeated steps"
        yield figure(asked, "equal" if same else "different", "equal", same)
        for size in (64, 256):
            trainers = {
                captured: Trainer(
                    ctx.device, ctx.patches(), captured=captured, batch_size=size, **changes
                )
                for captured in (True, False)
            }
            captured, plain = (trainer.images_per_s(1.0) for trainer in trainers.values())
            told = f"{captured / plain:.2f}x ({captured:,.0f} and {plain:,.0f} images/s)"
            yield figure(f"{model}, batch {size}: captured steps against plain ones", told)
        captured, plain = map(launches_of_a_step, trainers.values())
        asked = f"{model}: calls that put work on the GPU, of a captured step and of a plain one"
        yield figure(asked, f"{captured:.0f} and {plain:.0f}", "30", captured <= 30)


@section(110)
def twins(ctx):
    """A run's weights are a function of its config alone"""
    data = ctx.patches()
    recipe = [
        f"data_dir={data}",
        "batch_size=64",
        "epochs=2",
        "crop_epochs=1",
        "warmup_epochs=0.5",
        "views=1",
        "threads=1",
    ]
    recipe += ctx.size(
        ["limit_train=4096", "limit_valid=512"],
        ["limit_train=256", "limit_valid=64", "p4m_width=2"],
    )
    where = ("--device", "cuda:0" if ctx.device.type == "cuda" else "cpu")
    train = ("train.py", *where, "--runs", ctx.scratch / "twins", *recipe)
    # the processes are mostly start-up, so three run at a time
    with ThreadPoolExecutor() as pool:
        killing = pool.submit(kill_midway, ctx.scratch / "killed", [*where, *recipe])
        first, second = pool.map(lambda command: run(*command), (train, train))
        killed = killing.result()
    yield equal_weights("two runs with one seed", first, second)
    with ThreadPoolExecutor() as pool:
        two_ranks = ("-m", "torch.distributed.run", "--nproc-per-node", "2", *train, "shards=2")
        commands = (("train.py", "--resume", killed, *where), (*train, "shards=2"), two_ranks)
        resuming, alone, sharing = [pool.submit(run, *command) for command in commands]
        resumed = resuming.result()
        step = read_json(killed / "meta.json")["start_step"]
        yield equal_weights(
            f"killed by SIGKILL, resumed at step {step} of {resumed['num_steps']}", first, resumed
        )
        yield equal_weights(
            "shards=2 on one device: one rank and two ranks", alone.result(), sharing.result()
        )


def equal_weights(asked: str, one: dict, other: dict) -> dict:
    same = one["weights_sha256"] == other["weights_sha256"]
    return figure(f"{asked}: equal weights", "equal" if same else "different", "equal", same)


def kill_midway(runs: Path, arguments) -> Path:
    """The folder of a run that was killed when its first checkpoint was there. Raises BadInput
    where it was faster.
    """
    command = [sys.executable, "train.py", "--runs", runs, "checkpoint_every_steps=3", *arguments]
    process = subprocess.Popen(list(map(str, command)), cwd=REPOSITORY, stdout=subprocess.DEVNULL)
    while process.poll() is None and not list(runs.glob("*/last.pt")):
        time.sleep(0.002)
    process.kill()
    process.wait()
    folders = list(runs.glob("*"))
    if not folders or (folders[0] / "summary.json").exists():
        raise BadInput("the run that was to be killed has failed, or had ended before")
    return folders[0]


@section(45)
def determinism_price(ctx):
    """What `deterministic` costs"""
    for model in MODELS:
        changes = {"model": model, "batch_size": ctx.size(256, 4), **WHOLE_PATCHES}
        trainers = {
            flag: Trainer(ctx.device, ctx.patches(), deterministic=flag, **changes)
            for flag in (True, False)
        }
        rates = {True: [], False: []}
        for flag in (True, False) * ctx.size(4, 1):  # in turn, so that what drifts hits both
            rates[flag].append(trainers[flag].images_per_s(ctx.size(0.8, 0.1)))
        strict, free = statistics.median(rates[True]), statistics.median(rates[False])
        asked = (
            f"{model}, batch {changes['batch_size']}: share of the steps a second that"
            " deterministic=true costs"
        )
        told = f"{1 - strict / free:.1%} ({strict:,.0f} and {free:,.0f} images/s)"
        yield figure(asked, told, "15%", ctx.goal(strict >= 0.85 * free))


@section(90)
def throughput(ctx):
    """Images a second and peak memory, by batch size and precision"""
    sizes, seconds = ctx.size((64, 256, 1024, 1), (4,)), ctx.size(0.8, 0.1)
    for precision, model in itertools.product(("bf16", "fp32"), MODELS):
        rates = []
        for size in sizes:
            changes = {"model": model, "precision": precision, "batch_size": size, **WHOLE_PATCHES}
            trainer = Trainer(ctx.device, ctx.patches(), **changes)
            for what, measure in (
                ("train", trainer.images_per_s),
                ("predict", trainer.predicting_images_per_s),
            ):
                forget_memory(ctx.device)
                try:
                    images_per_s = measure(seconds)
                    measured = f"{images_per_s:,.0f} images/s, peak {peak_memory(ctx.device)}"
                    rates += [images_per_s] if what == "train" else []
                except RuntimeError as error:
                    if not is_out_of_memory(error):
                        raise
                    measured = "out of memory"
                yield figure(f"{what} {model} {precision} batch {size}", measured)
        if precision == "bf16":
            asked = f"train {model} bf16: images/s at the best of these batch sizes"
            is_reached = ctx.goal(max(rates) >= GOAL_IMAGES_PER_S)
            yield figure(asked, f"{max(rates):,.0f}", f"{GOAL_IMAGES_PER_S:,}", is_reached)


@section(60)
def baseline(ctx):
    """Twice the rate of a fair plain training loop"""
    split, size = pcam.open_split(ctx.patches(), "train"), ctx.size(256, 4)
    seeding.set_determinism(False, ctx.size(8, 1))
    rates, failed = {}, {}
    for num_workers in ctx.size((8, 15, 4, 0), (0, 2)):
        try:
            rates[num_workers] = plain_images_per_s(
                split, ctx.device, num_workers, size, ctx.size(2.0, 0.3)
            )
        except RuntimeError as error:  # of a worker, for want of shared memory say
            failed[num_workers] = one_line(error)
    told = ", ".join(f"{num} workers {found:,.0f}" for num, found in rates.items())
    told += "".join(f"; {num} workers: {why}" for num, why in failed.items())
    name = f"resnet18, bf16, batch {size}, whole patches"
    yield figure(
        f"{name}: the plain loop (DataLoader over h5py; normalised and flipped on the device),"
        " images/s",
        told,
    )
    changes = {"model": "resnet18", "optimizer": "sgd", "batch_size": size, **WHOLE_PATCHES}
    ours = Trainer(ctx.device, ctx.patches(), **changes).images_per_s(ctx.size(2.0, 0.3))
    ratio = ours / max(rates.values())
    told = f"{ratio:.2f}x ({ours:,.0f} images/s)"
    yield figure(
        f"{name}, optimizer=sgd: this program against it", told, "2x", ctx.goal(ratio >= 2)
    )


def write_random_split(folder: Path, num: int) -> None:
    """A training split of `num` random patches, contiguous uint8: a random block over and over,
    which no step is faster for.
    """
    needed = num * pcam.PATCH_BYTES
    free = shutil.disk_usage(folder).free
    if free < 1.2 * needed:
        raise BadInput(
            f"{folder}: {needed / 1e9:.1f} GB are needed and {free / 1e9:.1f} GB are free there"
        )
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
    gigabytes = num * pcam.PATCH_BYTES / 1e9
    yield figure(
        f"a file of {num:,} random patches is written",
        f"{time.monotonic() - started:.1f} s, {gigabytes:.2f} GB",
    )
    trainer = Trainer(ctx.device, folder, batch_size=size, lr=1e-3, **WHOLE_PATCHES)
    told = (
        f"{trainer.read_s:.1f} s, {gigabytes / trainer.read_s:.2f} GB/s, to"
        f" {trainer.source.residence}"
    )
    yield figure("it is read from the page cache to where it resides", told)
    list(trainer.logged_steps(None, WARM_STEPS, size))
    wait_for(ctx.device)
    num_steps, started = num // size, time.monotonic()
    for done in trainer.logged_steps(None, num_steps, size):
        if done == num_steps // 10:
            wait_for(ctx.device)
            if 1.2 * 10 * (time.monotonic() - started) > ctx.left():
                break
    wait_for(ctx.device)
    epoch_s = (time.monotonic() - started) * num_steps / done
    how = "measured" if done == num_steps else f"extrapolated from {done} steps"
    told = f"{epoch_s:.1f} s ({how}), {num / epoch_s:,.0f} images/s, peak {peak_memory(ctx.device)}"
    asked = f"p4m, bf16, batch {size}: the epoch's {num_steps} steps with whole patches"
    yield figure(asked, told, f"{GOAL_EPOCH_S:g} s", ctx.goal(epoch_s < GOAL_EPOCH_S))


def busy_us(kernels: list[dict]) -> float:
    """Microseconds in which at least one of the kernels ran."""
    busy = ends_at = 0.0
    for kernel in sorted(kernels, key=lambda kernel: kernel["ts"]):
        end = kernel["ts"] + kernel["dur"]
        busy += max(0.0, end - max(kernel["ts"], ends_at))
        ends_at = max(ends_at, end)
    return busy


@section(30, cuda_only=True)
def profile(ctx):
    """Where a step's time goes"""
    num = 10
    for model, size in itertools.product(MODELS, (1024, 256)):
        trainer = Trainer(ctx.device, ctx.patches(), model=model, batch_size=size, **WHOLE_PATCHES)
        # without the profiler, which makes the host slower
        step_us = 1e6 * size / trainer.images_per_s(1.0)
        with contextlib.closing(trainer.batches(size)) as loader:
            for _ in range(WARM_STEPS):
                trainer.step(next(loader))
            wait_for(ctx.device)
            with torch.profiler.profile(
                activities=[torch.profiler.ProfilerActivity.CUDA]
            ) as profiled:
                for _ in range(num):
                    trainer.step(next(loader))
                wait_for(ctx.device)
        path = ctx.scratch / f"{model}.json"
        profiled.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
        kernels = [
            event for event in events if event.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")
        ]
        if not kernels:
            raise BadInput("the profiler saw no kernel: the driver does not let it")
        busy_step_us = busy_us(kernels) / num
        idle = 1 - busy_step_us / step_us
        told = (
            f"{len(kernels) / num:.0f} kernels, {step_us / 1000:.2f} ms, the GPU idle for"
            f" {idle:.1%}"
        )
        asked = (
            f"{model}, batch {size}: a step (idle: 1 - busy time, profiled, over its time, not"
            " profiled)"
        )
        if size == 1024:
            yield figure(asked, told, f"{GOAL_IDLE:.0%}", idle < GOAL_IDLE)
            continue
        yield figure(asked, told)
        spent = Counter()
        for kernel in kernels:
            spent[kernel["name"]] += kernel["dur"] / num
        for name, microseconds in spent.most_common(10):
            told = (
                f"{microseconds / 1000:.3f} ms, {microseconds / busy_step_us:.1%} of the busy time"
            )
            yield figure(f"{model}, a step's share of {name[:100]}", told)


@section(40, cuda_only=True)
def small_slice(ctx):
    """The default config in the memory of a 1g.5gb slice"""
    total = torch.cuda.get_device_properties(ctx.device).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, SLICE_BYTES / total), ctx.device)
    images_per_s = Trainer(ctx.device, ctx.patches(), **WHOLE_PATCHES).images_per_s(1.0)
    reserved = torch.cuda.max_memory_reserved(ctx.device)
    told = f"{reserved / 2**20:,.0f} MiB, {images_per_s:,.0f} images/s"
    asked = "p4m, batch 64, whole patches: memory with the sample resident, without CUDA's own"
    yield figure(asked, told, "4,864 MiB", reserved <= SLICE_BYTES)
    trainers = {where: Trainer(ctx.device, ctx.patches(), where) for where in ("device", "host")}
    rates = {where: [] for where in trainers}
    for where in [*trainers] * 3:
        rates[where].append(trainers[where].images_per_s(1.0))
    resident, streamed = (statistics.median(found) for found in rates.values())
    told = f"{streamed / resident:.1%} ({streamed:,.0f} and {resident:,.0f} images/s)"
    asked = "p4m, batch 64, the centre: the rate from host memory, of the resident one"
    yield figure(asked, told, "90%", streamed >= 0.9 * resident)


@section(150)
def batch_sizes(ctx):
    """Larger batches of the default recipe, each with a learning rate to match"""
    data, base, longest_s = ctx.patches(), load_config(), 0.0
    quick = (
        [
            "epochs=1",
            "warmup_epochs=0.5",
            "limit_train=64",
            "limit_valid=64",
            "views=1",
            "p4m_width=2",
        ]
        if ctx.small
        else []
    )
    for size, rule in ctx.size(RECIPES, RECIPES[:2]):
        if ctx.left() < 1.2 * longest_s:
            yield figure(f"train batch_size={size} {rule}", "not run: budget")
            continue
        factor = {
            "": 1.0,
            "sqrt": (size / base.batch_size) ** 0.5,
            "linear": size / base.batch_size,
        }[rule]
        changes = [f"batch_size={size}", f"lr={base.lr * factor:.4g}"]
        device = ["--device", ctx.device.type, "--runs", ctx.scratch / "runs"]
        result = run("train.py", *device, f"data_dir={data}", *changes, *quick)
        longest_s = max(longest_s, result["wall_s"])
        told = (
            f"{result['wall_s']:.1f} s, {result['status']}, val_auc"
            f" {result.get('val_auc') or 0:.4f}"
        )
        yield figure(f"train {' '.join(changes)}{f' ({rule})' if rule else ''}", told)


@section(100, cuda_only=True)
def recipes(ctx):
    """config.yaml and config-gpu.yaml, three seeds each, three trainings at a time"""
    data, runs = ctx.patches(), ctx.scratch / "recipes"
    jobs = list(itertools.product(("config-gpu.yaml", "config.yaml"), (1, 2, 3)))

    def train(config, seed) -> dict:
        where = ("--device", "cuda", "--runs", runs, "--config", config)
        return run("train.py", *where, f"data_dir={data}", f"seed={seed}", "threads=4")

    with ThreadPoolExecutor(3) as pool:
        results = list(pool.map(train, *zip(*jobs, strict=True)))
    for (config, seed), result in zip(jobs, results, strict=True):
        told = f"{result['status']}, val_auc {result.get('val_auc') or 0:.4f}"
        yield figure(f"train --config {config} seed={seed}", told)


# Carrying them out


def carry_out(function, ctx: Context, seconds: float, keep) -> str:
    """Run a section in a process of its own and give each row to `keep` as it comes: done, failed
    or unfinished.

    What it did to its process, a broken CUDA context say, ends with it; at the deadline all that it
    started ends too.
    """
    ctx.ends_at = time.monotonic() + seconds
    receiver, sender = FORK.Pipe(duplex=False)
    process = FORK.Process(target=work, args=(function, ctx, sender))
    process.start()
    sender.close()
    state, row = "", None
    try:
        while not state:
            if receiver.poll(max(0.0, ctx.left())):
                state, row = receiver.recv()
            else:
                state, row = (
                    "unfinished",
                    figure(function.__doc__, f"stopped after {seconds:.0f} s", held=False),
                )
            if row:
                keep(row)
    except EOFError:
        process.join()
        state = "failed"
        keep(
            figure(
                function.__doc__, f"its process ended with exit code {process.exitcode}", held=False
            )
        )
    finally:
        # torchrun ends its ranks, which are in no group of ours, at the first
        for number in (signal.SIGTERM, signal.SIGKILL):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, number)
            process.join(3)
    return state


def work(function, ctx: Context, sender) -> None:
    """In the process of a section: send its rows, each with a state that is empty, and a state at
    the end.
    """
    os.setsid()
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        for row in function(ctx):
            sender.send(("", row))
    except Exception as error:
        traceback.print_exc()
        sender.send(("failed", figure(function.__doc__, one_line(error), held=False)))
    else:
        sender.send(("done", None))


def describe_device(_ctx):
    """The device"""
    device = choose_device()
    yield {"device": device, "card": describe_machine(device).get("gpu", "none")}


def pack(path: Path) -> int:
    """Write the first patches of each class of the real sample as one tar; gives its bytes. Raises
    BadInput for too many.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as file:
        with tarfile.open(fileobj=file, mode="w") as packed:
            for split, num in PACKED_PATCHES.items():
                taken = Counter()
                with tarfile.open(REAL_SAMPLE / f"{split}.tar") as sample:
                    for member in sample:
                        folder = PurePosixPath(member.name).parent
                        if member.isreg() and taken[folder] < num:
                            taken[folder] += 1
                            packed.addfile(member, sample.extractfile(member))
        if file.tell() > MOST_PACKED_BYTES:
            raise BadInput(
                f"{path} would have {file.tell():,} bytes, at most {MOST_PACKED_BYTES:,} can travel"
            )
        return file.tell()


def save(out: Path, results: dict) -> None:
    """Write what there is so far as gpu.json and gpu.md."""
    write_json(out / "gpu.json", results)
    words, lines = {True: "yes", False: "NO", None: ""}, []
    for name in (name for name in SECTIONS if name in results):
        found = results[name]
        for row in found["rows"]:
            cells = [
                words[row[key]] if key == "held" else str(row[key]).replace("|", "\\|")
                for key in COLUMNS
            ]
            lines.append([*cells, f"{name}, {found['date']}, {found['commit']}"])
    write_markdown(out / "gpu.md", (*COLUMNS, "section, date, commit"), lines)


@script
def main(argv=None) -> int:
    started = time.monotonic()
    parser = Parser(
        prog="gpu.py", description="What the program does on one GPU, as a table of figures."
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("assets/gpu"),
        metavar="DIR",
        help="for gpu.json and gpu.md",
    )
    parser.add_argument(
        "--data",
        type=Path,
        default=PACKED,
        metavar="DIR|TAR",
        help="a PCam folder, or a tar of images",
    )
    parser.add_argument(
        "--sections",
        default="",
        help=f"some of {','.join(SECTIONS)} (default: those that are not done)",
    )
    parser.add_argument(
        "--budget",
        type=float,
        default=330,
        metavar="SECONDS",
        help="for all sections (default: 330)",
    )
    parser.add_argument(
        "--before", type=Path, metavar="FILE", help="an earlier gpu.json, whose sections are kept"
    )
    parser.add_argument("--commit", help="of this code, where git is missing")
    parser.add_argument("--small", action="store_true", help="tiny sizes, as without a GPU")
    parser.add_argument(
        "--pack", type=Path, metavar="TAR", help="write the real patches that travel, and end"
    )
    args = parser.parse_args(argv)
    if args.pack:
        print_result({"tar": str(args.pack), "bytes": pack(args.pack)})
        return EXIT_DONE
    named = args.sections.split(",") if args.sections else []
    if unknown := set(named) - set(SECTIONS):
        raise BadInput(f"no section {unknown.pop()!r}; allowed: {', '.join(SECTIONS)}")

    # what was measured before, and what is to do
    made = made_now() | ({"commit": args.commit} if args.commit else {})
    args.out.mkdir(parents=True, exist_ok=True)
    earlier = args.before or args.out / "gpu.json"
    results = read_json(earlier) if args.before or earlier.exists() else {}
    if not args.before:
        results = {
            name: found for name, found in results.items() if found["commit"] == made["commit"]
        }
    is_done = {name: results.get(name, {}).get("state") == "done" for name in SECTIONS}
    todo = sorted(named or [name for name in SECTIONS if not is_done[name]], key=is_done.get)

    with tempfile.TemporaryDirectory(prefix="proof-gpu-", ignore_cleanup_errors=True) as scratch:
        ctx = Context(torch.device("cpu"), True, args.data.absolute(), Path(scratch))
        found = []
        if carry_out(describe_device, ctx, 60, found.append) != "done":
            raise BadInput(f"the device cannot be used: {found[-1]['measured']}")
        ctx.device, card = found[0]["device"], found[0]["card"]
        ctx.small = args.small or ctx.device.type == "cpu"
        say(f"{ctx.device} ({card}), {', '.join(todo) or 'nothing is to do'}")
        for name in todo:
            function, seconds, cuda_only = SECTIONS[name]
            left = args.budget - (time.monotonic() - started)
            origin = {"section": name, "card": card, "torch": torch.__version__}
            skipped = "not run: budget" if left < min(seconds / 2, 30) else ""
            if cuda_only and ctx.device.type == "cpu":
                skipped = "skipped: no CUDA device"
            if skipped:  # what was measured before is worth more
                row = figure(function.__doc__, skipped) | origin | {"seconds": 0.0}
                results.setdefault(name, made | {"state": "skipped", "rows": [row]})
                say(f"{name}: {skipped}")
                save(args.out, results)
                continue
            results[name] = made | {"state": "unfinished", "rows": []}
            since = [time.monotonic()]

            def keep(row, name=name, origin=origin, since=since):
                row = row | origin | {"seconds": round(time.monotonic() - since[-1], 2)}
                since.append(time.monotonic())
                results[name]["rows"].append(row)
                say(
                    f"{name}: {row['asked']}:"
                    f" {row['measured']}{'' if row['held'] is not False else ' MISSED'}"
                )
                save(args.out, results)

            results[name]["state"] = carry_out(function, ctx, min(seconds, left), keep)
            save(args.out, results)
    missed = [
        row["asked"] for found in results.values() for row in found["rows"] if row["held"] is False
    ]
    states = {name: found["state"] for name, found in results.items()}
    print_result({"missed": missed, "sections": states, "table": str(args.out / "gpu.md")})
    return EXIT_FINDING if missed else EXIT_DONE


if __name__ == "__main__":
    sys.exit(main())
