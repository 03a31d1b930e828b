"""What a benchmark times: ways to a batch, inference, the step of training and its stages, and what
the machine can do at most.

Each is a generator. It yields 0 when all is built, then after each batch how many images that held,
or FLOPs of a product.
"""

import contextlib
import ctypes
import dataclasses
import functools
import itertools
import os
import signal
import tempfile
import time
import traceback
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from torch.nn.functional import binary_cross_entropy_with_logits, pad

from lib import training
from lib.augment import PCAM_MEAN, PCAM_STD, PREPROCESSING, draw_augmentation, model_input
from lib.batches import (
    Batch,
    PatchSource,
    choose_residence,
    epoch_order,
    load_batches,
    open_train_valid,
)
from lib.benchmark.timing import OUT_OF_MEMORY, Case, measure
from lib.command import BadInput, is_out_of_memory, nearest, one_line
from lib.config import Config
from lib.device import choose_device, keep_freed_memory, num_cores
from lib.inputs import list_blocks
from lib.models import build_model
from lib.optimizers import build_optimizer
from lib.pcam import PATCH_BYTES, PATCH_SHAPE, open_split, split_path
from lib.predict import block_size, predict_batch, predict_blocks, ready_to_predict
from lib.runlog import RunLog
from lib.seeding import position_permutation, seed_everything, set_determinism

PARENT_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG of prctl(2)
SIZES = (1, 8, 16, 32, 64, 128, 256, 512)
LARGE = "resnet18"  # beside the config's model
LEAST_BATCHES = 1000  # of an epoch that is gone through again and again
WARM_SHARE, COLD_SHARE = 0.95, 0.1  # of a file's pages in memory: at least, and at most
NUM_COPIED = 8192  # patches, more than any cache holds
MATRIX_SIDE, GPU_MATRIX_SIDE = 1024, 8192
MOST_WORKERS = 16  # each number up to here is tried


def plan_cases(what: str, cfg: Config, sizes: list[int], device: torch.device, wanted: list[str]):
    """The cases of `loader`, `infer`, `train` or `all`, or those `wanted` by name: scaling over
    `sizes`, variants at one.

    And, for each batch size of the loader, torchvision's with each number of workers, of which the
    best is to be measured. Raises BadInput for a name that no case has.
    """
    whole = dataclasses.replace(cfg, crop_epochs=0)  # whole patches, unless a case says otherwise
    at = dataclasses.replace(whole, batch_size=size_of_variants(cfg, sizes))
    verbs = ("loader", "infer", "train") if what == "all" else (what,)
    cases, probed = [], []
    if "loader" in verbs:
        for size in sizes if what == "loader" else [at.batch_size]:
            each = dataclasses.replace(whole, batch_size=size, precision="fp32")
            cases += plan_loader(each, device)
            # every number of workers that may be the best
            numbers = sorted({*range(min(num_cores(), MOST_WORKERS) + 1), num_cores()})
            plain = Case("loader", "", "torchvision", each, channels_last=False, device="cpu")
            probed.append(
                [
                    dataclasses.replace(plain, name=f"torchvision_{n}_workers", num_workers=n)
                    for n in numbers
                ]
            )
    for verb in ("infer", "train"):
        cases += plan_model(verb, whole, at, sizes, device) if verb in verbs else []
    if "train" in verbs:
        cases += plan_training(cfg, at, device)
    kinds = dict.fromkeys(
        (case.cfg.precision, case.cfg.threads) for case in cases if case.kind in ("infer", "train")
    )
    alike = [
        dataclasses.replace(at, precision=precision, threads=threads)
        for precision, threads in kinds
    ]
    cases += [Case("limit", "matrix_product", "matrix_product", each) for each in alike]
    cases = [
        dataclasses.replace(case, device=str(device)) if case.device == "auto" else case
        for case in dict.fromkeys(cases)
    ]
    known = {case.name for case in cases} | ({"torchvision"} if probed else set())
    if unknown := [name for name in wanted if name not in known]:
        hint = f"{nearest(unknown[0], known)} ({', '.join(sorted(known))})"
        raise BadInput(f"--cases {unknown[0]}: {what} has no such case{hint}")
    if wanted:
        cases, probed = (
            [case for case in cases if case.name in wanted],
            probed if "torchvision" in wanted else [],
        )
    return cases, probed


def size_of_variants(cfg: Config, sizes: list[int]) -> int:
    """The batch size at which variants and stages are measured: the config's, or the largest where
    that is not asked for.
    """
    return cfg.batch_size if cfg.batch_size in sizes else sizes[-1]


def plan_loader(cfg: Config, device: torch.device) -> list[Case]:
    """Ways to a batch: from where the patches reside by default; from the file, cold and warm,
    random and in order.
    """
    in_bf16 = dataclasses.replace(cfg, precision="bf16")
    on_disk = dataclasses.replace(cfg, data_residence="disk")
    cases = [Case("loader", "ready", "ready", each, device="cpu") for each in (cfg, in_bf16)]
    cases += [
        Case("loader", "raw", "raw", cfg, device="cpu"),
        Case("limit", "memory_copy", "memory_copy", cfg, device="cpu"),
    ]
    for kind, cache, order in itertools.product(
        ("raw", "ready"), ("warm", "cold"), ("random", "sequential")
    ):
        cases.append(
            Case(
                "loader",
                f"{kind}_file_{order}",
                kind,
                on_disk,
                cache=cache,
                order=order,
                device="cpu",
            )
        )
    return cases + (
        [Case("loader", "ready_on_gpu", "ready", in_bf16)] if device.type == "cuda" else []
    )


def plan_model(
    verb: str, whole: Config, at: Config, sizes: list[int], device: torch.device
) -> list[Case]:
    """A small and a large model over batch sizes, and the small one with one thing changed."""
    models, precisions = dict.fromkeys((at.model, LARGE)), ["fp32", "bf16"]
    # training has no scaled loss, without which fp16 does not learn
    if device.type == "cuda" and verb == "infer":
        precisions.append("fp16")
    changed = {
        precision: {"precision": precision} for precision in precisions if precision != at.precision
    }
    changed["not_deterministic" if at.deterministic else "deterministic"] = {
        "deterministic": not at.deterministic
    }
    changed |= {"all_cores": {"threads": num_cores()}} if num_cores() != at.threads else {}
    scaled = [
        dataclasses.replace(whole, model=model, batch_size=size)
        for model in models
        for size in sizes
    ]
    cases = [Case(verb, "default", verb, cfg) for cfg in scaled]
    cases += [
        Case(verb, name, verb, dataclasses.replace(at, **keys)) for name, keys in changed.items()
    ]
    if verb == "infer":
        whole_blocks = dataclasses.replace(at, batch_size=block_size(device))
        cases.append(Case(verb, "end_to_end", "end_to_end", whole_blocks))
    return [
        *cases,
        Case(verb, "nchw", verb, at, channels_last=False),
        Case(verb, "compile", verb, at, compile=True),
    ]


def plan_training(cfg: Config, at: Config, device: torch.device) -> list[Case]:
    """What `train` has besides: techniques, the plain way, stages apart and overlapped, and the
    limits of the machine.
    """
    plain = dataclasses.replace(at, precision="fp32")
    cases = [
        Case("train", f"plain_{n}_workers", "plain", plain, channels_last=False, num_workers=n)
        for n in (0, 2)
    ]
    if cfg.crop < 96 and cfg.crop_epochs:
        cases.append(
            Case(
                "train",
                f"centre_{cfg.crop}",
                "train",
                dataclasses.replace(at, crop_epochs=cfg.epochs),
            )
        )
    cases.append(Case("train", "resident_batch", "train", at, resident=True))
    cases.append(Case("train", "memory_returned", "train", at, keep_memory=False))
    cases += [Case("stage", "apart", "apart", at), Case("stage", "overlapped", "train", at)]
    residence = choose_residence(open_split(at.data_dir, "train").images, at.data_residence, device)
    # as training reads it: else once, before its first step
    order = "random" if residence == "disk" else "sequential"
    cases.append(Case("stage", "read", "read", at, cache="cold", order=order))
    cases += (
        [Case("stage", "overlapped_cold", "train", at, cache="cold")] if residence == "disk" else []
    )
    cases.append(Case("limit", "sequential_read", "read", at, cache="cold", order="sequential"))
    cases.append(Case("limit", "memory_copy", "memory_copy", plain, device="cpu"))
    return cases + (
        [Case("limit", "copy_to_device", "copy_to_device", at)] if device.type == "cuda" else []
    )


def time_case(task: dict) -> dict:
    """Carry out a task of `timing.py` in this process: what it measured, or a status that says why
    there is no number.
    """
    case = Case(**task["case"] | {"cfg": Config(**task["case"]["cfg"])})
    # where memory runs out, this process is to go, and not what started it
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("500")
        ctypes.CDLL(None).prctl(PARENT_DEATH_SIGNAL, signal.SIGTERM)  # nor is it to outlive it
    try:
        return time_built(case, task)
    except BadInput as error:
        return {"status": "error", "note": str(error)}
    except Exception as error:
        if is_out_of_memory(error):
            return {"status": OUT_OF_MEMORY, "note": one_line(error)[:200]}
        traceback.print_exc()
        return {"status": "error", "note": f"{type(error).__name__}: {one_line(error)[:200]}"}


def time_built(case: Case, task: dict) -> dict:
    """Build a case, bring the file's pages into the state that it asks for, measure, and count what
    a batch computes.
    """
    device = choose_device(case.device)
    set_determinism(case.cfg.deterministic, case.cfg.threads)
    keep_freed_memory(case.keep_memory)
    about, parts = {"residence": "disk"} if case.kind in ("torchvision", "plain") else {}, {}
    batches = TIMED[case.kind](case, device, about, parts)
    next(batches)
    about["startup_s"] = time.time() - task["started_at"]
    if about.get("residence") == "disk" or case.cache == "cold":
        about |= prepare_pages(split_path(case.cfg.data_dir, "train", "x"), case.cache)
    found = about | measure(
        batches, task["seconds"], functools.partial(finish, device), case.cache == "warm"
    )
    num = len(found["samples"])
    found["parts"] = {
        name: [round(second, 9) for second in seconds[-num:]] for name, seconds in parts.items()
    }
    found["memory_bytes"] = (
        torch.cuda.max_memory_allocated(device) if device.type == "cuda" else most_memory_bytes()
    )
    if (
        case.what in ("infer", "train", "stage")
        and case.kind in ("infer", "train")
        and task["repeat"] == 0
    ):
        found["flops_per_image"] = count_flops(batches, case.compile)
    batches.close()
    return found


def finish(device: torch.device) -> None:
    """Wait until a GPU has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def count_flops(batches, is_compiled: bool) -> float | None:
    """FLOPs an image of the next batch, a product and a sum being two; of a compiled model those
    that it has uncompiled.
    """
    from torch.utils.flop_counter import FlopCounterMode

    stance = torch.compiler.set_stance("force_eager") if is_compiled else contextlib.nullcontext()
    with stance, FlopCounterMode(display=False) as counter:
        num_images = next(batches, 0)
    return counter.get_total_flops() / num_images if num_images else None


def most_memory_bytes() -> int:
    """The most memory that this process has held; what getrusage tells would be its parent's, if
    that was larger.
    """
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) * 1024


def resident_share(path) -> float:
    """Share of a file's pages that the page cache holds, by mincore(2)."""
    mapped = np.memmap(path, np.uint8, "r")
    pages = np.zeros(-(-len(mapped) // os.sysconf("SC_PAGE_SIZE")), np.uint8)
    place, size = ctypes.c_void_p(mapped.ctypes.data), ctypes.c_size_t(len(mapped))
    if ctypes.CDLL(None, use_errno=True).mincore(
        place, size, pages.ctypes.data_as(ctypes.c_void_p)
    ):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), str(path))
    return float((pages & 1).mean())


def prepare_pages(path, cache: str) -> dict:
    """Drop a file from the page cache, or read it in, and see whether that had an effect: {note}
    where not quite.

    Raises BadInput for a file that is to be cold and is not: what would be measured is memory.
    """
    with open(path, "rb", buffering=0) as file:
        if cache == "cold":
            with contextlib.suppress(OSError):
                os.fsync(file.fileno())  # a page that waits to be written cannot be dropped
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        elif resident_share(path) < WARM_SHARE:
            while file.read(1 << 24):
                pass
    share = resident_share(path)
    if cache == "cold" and share > COLD_SHARE:
        raise BadInput(
            f"{Path(path).name} cannot be made cold: {share:.0%} of it stays in the page cache"
        )
    if cache == "warm" and share < WARM_SHARE:
        return {"note": f"the page cache holds {share:.0%} of the file"}
    return {}


def open_batches(case: Case, device: torch.device, about: dict, keys: torch.Tensor | None = None):
    """The train split as `load_batches` gives it, in the case's order or that of `keys`: once of a
    cold file, else for ever.
    """
    split = open_split(case.cfg.data_dir, "train")
    source = PatchSource(split.images, case.cfg.data_residence, device)
    about["residence"] = source.residence
    batches = cut_batches(case, order_of(case, len(split)) if keys is None else keys)

    def stream():
        while True:
            for batch in load_batches(source, split.labels, batches):
                yield batch
                while case.resident:
                    yield batch
            if case.cache == "cold":
                return

    return stream()


def order_of(case: Case, num: int) -> torch.Tensor:
    return (
        torch.arange(num)
        if case.order == "sequential"
        else position_permutation(num, case.cfg.seed)
    )


def cut_batches(case: Case, keys: torch.Tensor) -> list[torch.Tensor]:
    """Whole batches of keys; of a split that is short, and need not be cold, over and over."""
    size = case.cfg.batch_size
    if case.cache != "cold":
        keys = keys.repeat(-(-LEAST_BATCHES * size // len(keys)))
    return list(keys[: len(keys) // size * size].split(size))


def raw(case, device, about, _parts):
    """uint8 batches in host memory."""
    batches = open_batches(case, device, about)
    yield 0
    for batch in batches:
        yield len(batch.keys)


def ready(case, device, about, _parts):
    """Batches as the model takes them: augmented, normalised, of the case's precision."""
    batches, dtype = (
        open_batches(case, device, about),
        torch.bfloat16 if case.cfg.precision == "bf16" else torch.float32,
    )
    yield 0
    for batch in batches:
        made = model_input(batch.images, draw_augmentation(batch.keys, 0, case.cfg), dtype=dtype)
        finish(device)
        yield len(made)


def memory_copy(case, *_):
    """The bytes of patches from one place to another, which no loader can beat."""
    patches = torch.zeros(NUM_COPIED, *PATCH_SHAPE, dtype=torch.uint8)
    target = torch.empty_like(patches[: case.cfg.batch_size])
    yield 0
    for part in itertools.cycle(patches.split(case.cfg.batch_size)):
        target[: len(part)].copy_(part)
        yield len(part)


def copy_to_device(case, device, *_):
    """The bytes of a batch from pinned memory to the GPU."""
    patches = torch.zeros(case.cfg.batch_size, *PATCH_SHAPE, dtype=torch.uint8).pin_memory()
    yield 0
    while True:
        patches.to(device, non_blocking=True)
        finish(device)
        yield len(patches)


def matrix_product(case, device, *_):
    """Products of square matrices in the case's precision."""
    side = GPU_MATRIX_SIDE if device.type == "cuda" else MATRIX_SIDE
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[
        case.cfg.precision
    ]
    left, right = torch.randn(2, side, side, device=device, dtype=dtype)
    product = torch.empty_like(left)
    yield 0
    while True:
        torch.mm(left, right, out=product)
        finish(device)
        yield 2 * side**3


def read(case, _device, about, _parts):
    """The bytes of patches from the file into memory, without the map: at random as training asks
    for them, or in order.
    """
    images = open_split(case.cfg.data_dir, "train").images
    batches, buffer = (
        cut_batches(case, order_of(case, images.num)),
        np.empty((case.cfg.batch_size, PATCH_BYTES), np.uint8),
    )
    about["residence"] = "disk"
    if images.mapped is None:
        about["note"] = f"decoding included: the file is {images.layout}"
    yield 0
    with open(images.path, "rb", buffering=0) as file:
        for keys in batches:
            rows = keys.numpy()
            if images.mapped is None:
                images.read(rows)
            elif case.order == "sequential":
                os.preadv(file.fileno(), [buffer], images.offset + int(rows[0]) * PATCH_BYTES)
            else:
                images.will_need(rows)
                for row, target in zip(rows.tolist(), buffer, strict=True):
                    os.preadv(file.fileno(), [target], images.offset + row * PATCH_BYTES)
            yield len(rows)


def alter(model: torch.nn.Module, case: Case) -> torch.nn.Module:
    """The model in the memory format of the case, compiled if it asks for that."""
    if not case.channels_last:
        model.to(memory_format=torch.contiguous_format)
        model.register_forward_pre_hook(lambda _, inputs: (inputs[0].contiguous(),))
    if case.compile:
        model.compile()
    return model


def infer(case, device, about, _parts):
    """Logits on the host: one view of patches in file order, the model alone."""
    seed_everything(case.cfg.seed)
    model = alter(ready_to_predict(build_model(case.cfg).to(device), case.cfg.precision), case)
    batches = open_batches(dataclasses.replace(case, order="sequential"), device, about)
    yield 0
    for batch in batches:
        yield len(predict_batch(model, batch.images, case.cfg.precision, 1, PREPROCESSING).cpu())


def end_to_end(case, device, about, _parts):
    """What inference.py does to an HDF5 file: read, decode and measure patches, predict them."""
    seed_everything(case.cfg.seed)
    model = alter(ready_to_predict(build_model(case.cfg).to(device), case.cfg.precision), case)
    path = split_path(case.cfg.data_dir, "train", "x")
    passes = (list_blocks([path], size=case.cfg.batch_size) for _ in itertools.count())
    blocks = itertools.chain.from_iterable(passes)
    about["residence"] = "disk"
    yield 0
    for block, _, _ in predict_blocks(model, blocks, case.cfg.precision, 1, PREPROCESSING):
        yield len(block.rows)


def build_training(case: Case, device: torch.device) -> tuple[training.TrainState, torch.Tensor]:
    """A state in the case's variant, and the sample keys of its first epoch."""
    (split, rows), _ = open_train_valid(case.cfg)
    state = training.build_state(case.cfg, device)
    alter(state.model, case)
    if not case.channels_last:
        # which looks at the filters as they lie in memory
        state.optimizer = build_optimizer(state.model, case.cfg)
    return state, epoch_order(rows, len(split), 0, case.cfg, device)


@contextlib.contextmanager
def logged(state, batch_size: int):
    """A run's log in a folder that goes with the block."""
    with (
        tempfile.TemporaryDirectory() as folder,
        RunLog(Path(folder), state.progress, time.monotonic(), batch_size) as log,
    ):
        log.start_epoch()
        yield log


def train(case, device, about, _parts):
    """The loop of train.py: batches, the very step, its row of the log."""
    state, keys = build_training(case, device)
    batches = open_batches(case, device, about, keys)
    # the first one: a batch over and over must not diverge
    lr = training.learning_rate(case.cfg, 0, LEAST_BATCHES)
    with logged(state, case.cfg.batch_size) as log:
        yield 0
        for batch in batches:
            log.add_step(training.training_step(state, batch, case.cfg, lr), batch, lr)
            yield len(batch.keys)


def apart(case, device, about, parts):
    """The same loop with nothing overlapped, and in `parts` the seconds of each stage, which ends
    where the next begins.
    """
    state, keys = build_training(case, device)
    state.graph = None  # whose stages the host does not see
    split, on_gpu = open_split(case.cfg.data_dir, "train"), device.type == "cuda"
    source = PatchSource(split.images, case.cfg.data_residence, device)
    about["residence"] = source.residence
    targets = torch.from_numpy(split.labels).float().to(device)
    buffer = torch.empty(case.cfg.batch_size, *PATCH_SHAPE, dtype=torch.uint8, pin_memory=on_gpu)
    lr, ended_at, in_batch = training.learning_rate(case.cfg, 0, LEAST_BATCHES), 0.0, {}

    def end(stage):
        nonlocal ended_at
        finish(device)
        started_at, ended_at = ended_at, time.perf_counter()
        in_batch[stage] = in_batch.get(stage, 0.0) + ended_at - started_at

    def optimise(step=state.optimizer.step):
        end("backward")  # with the norm of the gradients
        step()

    def compute_gradients(*given, inner=training.compute_gradients):
        end("augment" if on_gpu else "transfer")
        return inner(*given)

    state.optimizer.step = optimise
    # before the forward pass of the first shard filters are made; before that of another lies the
    # backward pass of the last
    state.model.register_forward_pre_hook(
        lambda *_: end("backward" if "forward" in in_batch else "forward")
    )
    state.model.register_forward_hook(lambda *_: end("forward"))
    with (
        logged(state, case.cfg.batch_size) as log,
        mock.patch.object(training, "compute_gradients", compute_gradients),
    ):
        yield 0
        for batch_keys in itertools.cycle(cut_batches(case, keys)):
            in_batch.clear()
            ended_at, rows = time.perf_counter(), batch_keys % len(split)
            images = source.gather(rows if source.residence == "device" else rows.cpu(), buffer)
            end("gather")
            if on_gpu:
                images = images.to(device, non_blocking=True)
                end("transfer")
            batch = Batch(images, targets[rows], batch_keys, len(split))
            result = training.training_step(state, batch, case.cfg, lr)
            end("optimiser")  # and the averaged weights
            log.add_step(result, batch, lr)
            end("logging")
            for stage, seconds in in_batch.items():
                parts.setdefault(stage, []).append(seconds)
            yield len(batch_keys)


def plain(case, device, _about, _parts):
    """Training the plain way: float32, NCHW, torchvision's PCAM in a DataLoader."""
    seed_everything(case.cfg.seed)
    model = build_model(case.cfg).to(device, memory_format=torch.contiguous_format).train()
    optimizer = build_optimizer(model, case.cfg)
    batches = torchvision_batches(case)
    yield 0
    for images, labels in batches:
        logits = model(images.to(device)).flatten()
        loss = binary_cross_entropy_with_logits(logits, labels.to(device).float().flatten())
        model.zero_grad()
        loss.backward()
        optimizer.step()
        finish(device)
        yield len(images)


def torchvision(case, *_):
    """Batches ready for the model by torchvision's PCAM and a DataLoader."""
    batches = torchvision_batches(case)
    yield 0
    for images, _ in batches:
        yield len(images)


def torchvision_batches(case: Case):
    """The same product, the plain way: torchvision's PCAM, a transform per patch, a DataLoader; for
    ever, unless cold.
    """
    from torchvision.datasets import PCAM
    from torchvision.transforms.functional import to_tensor

    cfg = case.cfg
    mean, std = torch.tensor(PCAM_MEAN).view(3, 1, 1), torch.tensor(PCAM_STD).view(3, 1, 1)

    def transform(image):
        patch = to_tensor(image)  # (3, 96, 96) in [0, 1]
        if cfg.symmetries:
            flip_x, flip_y, transpose = torch.rand(3) < 0.5
            patch = patch.flip(2) if flip_x else patch
            patch = patch.flip(1) if flip_y else patch
            patch = patch.transpose(1, 2) if transpose else patch
        if cfg.shift:
            y, x = torch.randint(2 * cfg.shift + 1, (2,)).tolist()
            patch = pad(patch[None], [cfg.shift] * 4, mode="replicate")[
                0, :, y : y + 96, x : x + 96
            ]
        gain = 1 + cfg.stain_jitter * torch.randn(3, 1, 1)
        offset = 1 - gain + cfg.brightness_jitter * torch.randn(1)
        return (patch * gain + offset - mean) / std

    with tempfile.TemporaryDirectory() as root:
        (Path(root) / "pcam").symlink_to(split_path(cfg.data_dir, "train", "x").parent.resolve())
        dataset = PCAM(root, split="train", transform=transform)
        if len(dataset) < cfg.batch_size:
            raise BadInput(
                f"a split of {len(dataset):,} patches is less than a batch of {cfg.batch_size}"
            )
        options = {
            "shuffle": case.order == "random",
            "drop_last": True,
            "num_workers": case.num_workers,
        }
        loader = torch.utils.data.DataLoader(dataset, cfg.batch_size, **options)
        while True:
            yield from loader
            if case.cache == "cold":
                return


KINDS = (
    raw,
    ready,
    memory_copy,
    copy_to_device,
    matrix_product,
    read,
    infer,
    end_to_end,
    train,
    apart,
    plain,
    torchvision,
)
TIMED = {kind.__name__: kind for kind in KINDS}
