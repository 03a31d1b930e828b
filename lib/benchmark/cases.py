"""What a benchmark times: ways to a batch, inference, the step of training and its stages, and what
the machine does at most.

Each is a generator of (case, device, about): it yields after each batch how many images that held,
or FLOPs of a product. What it learns of itself goes into `about`.
"""

import contextlib
import ctypes
import functools
import gc
import itertools
import mmap
import os
import tempfile
import time
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode
from torchvision import transforms
from torchvision.datasets import PCAM

from lib import training
from lib.augment import (
    PCAM_MEAN,
    PCAM_STD,
    draw_augmentation,
    model_input,
    turns_patches,
)
from lib.batches import PatchSource, epoch_order, load_batches, open_train_valid
from lib.benchmark.plan import Case
from lib.benchmark.timing import finish, gpu_power_w, measure, take
from lib.command import BadInput, is_out_of_memory, one_line
from lib.config import Config
from lib.device import choose_device
from lib.inputs import list_blocks
from lib.machine import keep_freed_memory
from lib.models import build_model
from lib.pcam import PATCH_SHAPE, open_split, split_path
from lib.predict import predict_batch, predict_blocks, ready_to_predict
from lib.runlog import RunLog
from lib.seeding import position_permutation, seed_everything, set_determinism

OUT_OF_MEMORY = "out of memory"
MIN_BATCHES = 1000  # of an epoch that is gone through again and again
WARM_SHARE, COLD_SHARE = 0.95, 0.1  # of a file's pages in memory: at least, and at most
NUM_COPIED = 8192  # patches at a time, more than any cache holds
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
MATRIX_SIDES = {"cpu": (512, 1024, 2048), "cuda": (2048, 4096, 8192)}
PROBE_S = 0.05  # of each side


def time_case(case: Case, seconds: float) -> dict:
    """Time a case in this process: what was measured, or a status that says why nothing was."""
    try:
        return time_built(case, seconds)
    except Exception as error:
        status = OUT_OF_MEMORY if is_out_of_memory(error) else "error"
        return {"status": status, "note": f"{type(error).__name__}: {one_line(error)[:200]}"}


def time_built(case: Case, seconds: float) -> dict:
    """Bring the file's pages into the state that a case asks for, build it, and measure."""
    device = choose_device(case.device)
    set_determinism(case.cfg.deterministic, case.cfg.threads)
    keep_freed_memory()
    forget_memory(device)
    about = {"note": "", "cache": case.cache, "parts": {}}
    prepare_pages(split_path(case.cfg.data_dir, "train", "x"), about)
    with contextlib.closing(TIMED[case.kind](case, device, about)) as batches:
        take(batches, 0, 1)  # which builds all that it needs
        about |= measure(batches, seconds, is_endless=case.cache == "warm")
        about["memory_bytes"] = peak_memory_bytes(device)
        if device.type == "cuda":
            about["power_w"] = gpu_power_w()
    for stage_s in about["parts"].values():
        del stage_s[: -len(about["samples"])]  # of the warm-up
    if case.kind in ("infer", "train"):
        about["flops_per_image"] = count_flops(case.cfg, case.kind == "train")
    return about


def forget_memory(device: torch.device) -> None:
    """Give back what earlier cases took, and let the peak of memory begin here."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    with contextlib.suppress(AttributeError, OSError):  # another C library, or no such right
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory_bytes(device: torch.device) -> int:
    """The most memory that this process has held since: on the GPU, if the case uses one."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    _, _, peak = Path("/proc/self/status").read_text().partition("VmHWM:")
    return int(peak.split()[0]) * 1024


@functools.cache
def count_flops(cfg: Config, is_training: bool) -> float:
    """FLOPs an image, a product and a sum being two, of the forward pass and, in training, the
    backward pass.
    """
    model = build_model(cfg)
    images = torch.zeros(2, 3, 96, 96)
    with FlopCounterMode(display=False) as counter:
        logits = model(images)
        if is_training:
            logits.sum().backward()
    return counter.get_total_flops() / len(images)


def resident_share(path) -> float:
    """Share of a file's pages that the page cache holds, by mincore(2); all of a file that this
    user may not write, since the kernel then does not tell.
    """
    mapped = np.memmap(path, np.uint8, "r")
    pages = np.ones(-(-len(mapped) // mmap.PAGESIZE), np.uint8)
    ctypes.CDLL(None).mincore(mapped.ctypes, ctypes.c_size_t(len(mapped)), pages.ctypes)
    return float((pages & 1).mean())


def prepare_pages(path: Path, about: dict) -> None:
    """Drop a file from the page cache, or read it in, and note where the kernel still holds it."""
    is_cold = about["cache"] == "cold"
    with open(path, "rb", buffering=0) as file:
        if is_cold:
            open_source.cache_clear()  # a page that is mapped cannot be dropped
            gc.collect()
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        elif resident_share(path) < WARM_SHARE:
            while file.read(1 << 24):
                pass
    share = resident_share(path)
    if is_cold and share > COLD_SHARE:
        about["cache"] = "eviction requested"  # the page cache may still hold the file
        about["note"] = f"the page cache holds {share:.0%} of the file"


@functools.cache
def open_source(data_dir: str, residence: str, device: torch.device):
    """The train split, and its patches from where they reside, once for all cases of a process."""
    split = open_split(data_dir, "train")
    return split, PatchSource(split.images, residence, device)


def open_batches(case: Case, device: torch.device, about: dict, keys=None, prefetch=None):
    """The train split as `load_batches` gives it, in the case's order or that of `keys`: once of a
    cold file, else for ever.
    """
    split, source = open_source(case.cfg.data_dir, case.cfg.data_residence, device)
    about["residence"] = source.residence
    size = case.cfg.batch_size
    if keys is None:
        keys = torch.arange(len(split))
        if case.order == "random":
            keys = position_permutation(len(split), case.cfg.seed)
    if case.cache == "warm":  # a short split over and over, without a new start
        keys = keys.repeat(-(-MIN_BATCHES * size // len(keys)))
    batches = keys[: len(keys) // size * size].split(size)
    for _ in rounds_of(case):
        yield from load_batches(source, split.labels, batches, prefetch)


def rounds_of(case: Case):
    """Once for a cold file, else for ever."""
    return itertools.count() if case.cache == "warm" else range(1)


def raw(case, device, about):
    """uint8 batches in host memory."""
    for batch in open_batches(case, device, about):
        yield len(batch.keys)


def ready(case, device, about):
    """Batches as the model takes them: augmented, normalised, of the case's precision."""
    for batch in open_batches(case, device, about):
        make_input(case.cfg, batch)
        finish()
        yield len(batch.keys)


def make_input(cfg: Config, batch) -> torch.Tensor:
    """A batch as a training step makes it its model's input, of whole patches."""
    draws = draw_augmentation(batch.keys, 0, cfg)
    return model_input(batch.images, draws, dtype=DTYPES[cfg.precision])


def copy(*_):
    """The bytes of patches from one place in memory to another: what no loader can beat."""
    patches = torch.ones(NUM_COPIED, *PATCH_SHAPE, dtype=torch.uint8)
    target = torch.empty_like(patches)
    while True:
        target.copy_(patches)
        yield NUM_COPIED


def matrix_product(case, device, _about):
    """Products of square matrices in the case's precision, of the side that is the fastest here."""
    from torch.utils.benchmark import Timer  # looks for CUDA's compiler, and warns without a GPU

    def seconds_a_flop(matrix) -> float:
        threads = torch.get_num_threads()
        timer = Timer("matrix @ matrix", globals={"matrix": matrix}, num_threads=threads)
        return timer.blocked_autorange(min_run_time=PROBE_S).median / len(matrix) ** 3

    dtype = DTYPES[case.cfg.precision]
    sides = MATRIX_SIDES[device.type]
    matrices = [torch.randn(side, side, device=device).to(dtype) for side in sides]
    matrix = min(matrices, key=seconds_a_flop)
    while True:
        matrix @ matrix
        finish()
        yield 2 * len(matrix) ** 3


def build_predictor(case: Case, device: torch.device) -> torch.nn.Module:
    seed_everything(case.cfg.seed)
    return ready_to_predict(build_model(case.cfg).to(device), case.cfg.precision)


def infer(case, device, about):
    """Logits on the host: one view of patches in file order, the model alone."""
    model = build_predictor(case, device)
    for batch in open_batches(case, device, about):
        predict_batch(model, batch.images, case.cfg.precision, 1).cpu()
        yield len(batch.keys)


def end_to_end(case, device, _about):
    """What inference.py does to an HDF5 file: read, decode and measure patches, predict them."""
    model = build_predictor(case, device)
    path = split_path(case.cfg.data_dir, "train", "x")
    while True:
        blocks = list_blocks([path], size=case.cfg.batch_size)
        for block, _, _ in predict_blocks(model, blocks, case.cfg.precision, 1):
            yield len(block.rows)


def build_training(case: Case, device: torch.device) -> tuple:
    """What the loop of train.py works with: (state, the sample keys of its first epoch, its
    learning rate).
    """
    (split, rows), _ = open_train_valid(case.cfg)
    state = training.build_state(case.cfg, device)
    keys = epoch_order(rows, len(split), 0, case.cfg, device)
    # the first one: patches over and over must not diverge
    return state, keys, training.learning_rate(case.cfg, 0, MIN_BATCHES)


def train(case, device, about):
    """The loop of train.py: batches, the very step, its row of the log."""
    state, keys, lr = build_training(case, device)
    with tempfile.TemporaryDirectory() as folder:
        facts = (Path(folder), state.progress, time.monotonic(), case.cfg.batch_size)
        with RunLog(*facts) as log:
            log.start_epoch()
            for batch in open_batches(case, device, about, keys):
                log.add_step(training.training_step(state, batch, case.cfg, lr), batch, lr)
                yield len(batch.keys)


def apart(case, device, about):
    """The same steps with nothing overlapped, and in `about["parts"]` the seconds of each stage,
    which ends where the next begins.
    """
    state, keys, lr = build_training(case, device)
    state.graph = None  # whose stages the host does not see
    batches = open_batches(case, device, about, keys, prefetch=False)
    optimizer_step = state.optimizer.step
    ends = []  # (stage, when it ended)

    def end(stage: str) -> None:
        finish()
        ends.append((stage, time.perf_counter()))

    def optimise():
        end("backward")  # of the last shard, with the norm of the gradients
        optimizer_step()

    state.optimizer.step = optimise
    state.model.register_forward_hook(lambda *_: end("forward"))
    while True:
        ends.clear()
        end("begin")
        batch = next(batches)
        end("gather")
        make_input(case.cfg, batch)
        end("augment")
        training.training_step(state, batch, case.cfg, lr)
        end("optimiser")  # and the averaged weights
        stage_s = Counter()
        for (_, started_at), (stage, ended_at) in itertools.pairwise(ends):
            stage_s[stage] += ended_at - started_at
        stage_s["forward"] -= stage_s["augment"]  # the step makes its input itself, once more
        for stage, seconds in stage_s.items():
            about["parts"].setdefault(stage, []).append(seconds)
        yield len(batch.keys)


def torchvision(case, *_):
    """Batches ready for the model by torchvision's PCAM and a DataLoader."""
    for images, _ in torchvision_batches(case):
        yield len(images)


def torchvision_batches(case: Case):
    """The same product, the plain way: torchvision's PCAM, a transform per patch, a DataLoader; for
    ever, unless cold.
    """
    size = case.cfg.batch_size
    with tempfile.TemporaryDirectory() as root:
        folder = split_path(case.cfg.data_dir, "train", "x").parent
        Path(root, "pcam").symlink_to(folder.resolve())
        dataset = PCAM(root, split="train", transform=plain_transform(case.cfg))
        if len(dataset) < size:
            raise BadInput(f"a split of {len(dataset):,} patches is less than a batch of {size}")
        options = {"num_workers": case.num_workers, "shuffle": case.order == "random"}
        loader = DataLoader(dataset, size, drop_last=True, **options)
        for _ in rounds_of(case):
            yield from loader


def plain_transform(cfg: Config) -> transforms.Compose:
    """What makes an image the model's input, augmented like ours, patch by patch: float32
    (3, 96, 96).
    """

    def jitter_colours(patch: torch.Tensor) -> torch.Tensor:
        gain = 1 + cfg.stain_jitter * torch.randn(3, 1, 1)
        offset = 1 - gain + cfg.brightness_jitter * torch.randn(1)
        return patch * gain + offset

    steps = [transforms.ToTensor()]  # (3, 96, 96) in [0, 1]
    if turns_patches(cfg):
        transpose = transforms.RandomApply([lambda patch: patch.mT])
        steps += [transforms.RandomHorizontalFlip(), transforms.RandomVerticalFlip(), transpose]
    steps.append(transforms.RandomCrop(96, padding=cfg.shift, padding_mode="edge"))
    steps += [jitter_colours, transforms.Normalize(PCAM_MEAN, PCAM_STD)]
    return transforms.Compose(steps)


TIMED = {
    "raw": raw,
    "ready": ready,
    "copy": copy,
    "matrix_product": matrix_product,
    "infer": infer,
    "end_to_end": end_to_end,
    "train": train,
    "apart": apart,
    "torchvision": torchvision,
}
