"""Which patches make up a batch, and how they get from the file to the device while the model is
busy with the batch before.
"""

import contextlib
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch

from lib.command import BadInput, say
from lib.config import Config
from lib.files import read_edited_csv, row_number
from lib.groups import groups_for_folds
from lib.machine import memory_limit_bytes
from lib.pcam import PATCH_SHAPE, Images, Split, open_split
from lib.progress import Progress
from lib.seeding import position_bits, position_permutation

# the most host memory that `auto` takes for a split: others may need the rest of the machine
HOST_BYTES = 1 << 30
NUM_BUFFERS = 3  # one that the model uses, one ready, one being filled
# part of a position in lib/seeding.py: the purpose of a draw, so that no two purposes share bits
ORDER = 101
CLASS_ORDER = 102
FOLD = 103
LIMIT = 104


@dataclass(frozen=True)
class Rows:
    """Part of a split: row numbers int64 (N,) in file order, their labels uint8 (N,), and how many
    suspect rows were left out, {reason: count}.
    """

    index: np.ndarray
    labels: np.ndarray
    left_out: dict[str, int]

    def __len__(self) -> int:
        return len(self.index)

    def describe(self) -> dict:
        """Counts for meta.json, of the data as they are: a sampler may repeat some rows."""
        num = len(self)
        num_positive = int(self.labels.sum())
        return {
            "num": num,
            "num_negative": num - num_positive,
            "num_positive": num_positive,
            "left_out": self.left_out,
        }


@dataclass(frozen=True)
class Batch:
    """Patches uint8 (B, 96, 96, 3), labels float32 (B,) and `keys` int64 (B,) on one device. The
    augmentation of a sample is drawn by its key, which `epoch_order` makes.
    """

    images: torch.Tensor
    labels: torch.Tensor
    keys: torch.Tensor
    num_rows: int  # of the split: a key modulo this is the number of a row
    wait_s: float = 0.0


class PatchSource:
    """The patches of a split, gathered by row number from where they reside: the mapped file, host
    memory or the device.
    """

    def __init__(self, images: Images, residence: str, device: torch.device):
        self.images = images
        self.device = device
        self.residence = choose_residence(images, residence, device)
        if self.residence != "disk":
            place = device if self.residence == "device" else "cpu"
            self.patches = read_whole(images, place)  # (N, 96, 96, 3) uint8
        elif images.mapped is None:
            say(
                f"note: {images.path.name} is {images.layout}: read slowly, patch by patch;"
                " prepare.py repack mends that"
            )

    def __len__(self) -> int:
        return self.images.num

    def gather(self, rows: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        """Copy the patches at `rows` int64 (B,) into `out` uint8 (B, 96, 96, 3), or, on the device,
        into a fresh tensor.
        """
        if self.residence == "device":
            return self.patches.index_select(0, rows)
        if self.residence == "host":
            return torch.index_select(self.patches, 0, rows, out=out)
        index = rows.numpy()
        if self.images.mapped is None:
            return out.copy_(torch.from_numpy(self.images.read(index)))
        # may wait for the disk, so it runs in the background; np.take keeps to that one thread
        self.images.will_need(index)
        np.take(self.images.mapped, index, axis=0, out=out.numpy(), mode="clip")
        return out


def choose_residence(images: Images, residence: str, device: torch.device) -> str:
    """`disk`, `host` or `device`. `auto` means the fastest of these that takes at most half of the
    free memory.
    """
    if residence == "auto":
        if device.type == "cuda" and images.num_bytes < torch.cuda.mem_get_info(device)[0] // 2:
            return "device"
        fits_host = images.num_bytes < min(HOST_BYTES, memory_limit_bytes() // 2)
        return "host" if fits_host else "disk"
    return residence


def read_whole(images: Images, device: torch.device | str) -> torch.Tensor:
    """All patches uint8 (N, 96, 96, 3) on the device, read in file order, at which a networked disk
    is fast.
    """
    patches = torch.empty((images.num, *PATCH_SHAPE), dtype=torch.uint8, device=device)
    with Progress(images.num, f"reading {images.path.name}") as bar:
        for start, block in images.blocks():
            patches[start : start + len(block)] = torch.from_numpy(block)
            bar.add(len(block))
    return patches


def select_rows(split: Split, cfg: Config, held_out: bool = False) -> Rows:
    """The rows of a split that a run uses: its folds, without quarantined rows, up to the limit.

    `held_out` asks for the rows to validate on: with folds those of the config's fold. Raises
    BadInput where less than two classes are left, and for folds of a split whose groups are not
    known.
    """
    index = np.arange(len(split))
    left_out = Counter()
    if cfg.num_folds:
        groups = groups_for_folds(split, cfg.data_dir)
        in_fold = fold_of_rows(groups, cfg.num_folds) == cfg.fold
        index = index[in_fold == held_out]
    # validation keeps quarantined rows, so that scores with and without a quarantine compare
    if cfg.quarantine and not held_out:
        suspects = read_quarantine(cfg.quarantine, split, cfg.quarantine_reasons)
        left_out.update(suspects[row] for row in index.tolist() if row in suspects)
        index = np.setdiff1d(index, list(suspects))
    limit = cfg.limit_valid if held_out else cfg.limit_train
    if limit:  # drawn at random, so that a file sorted by class or slide gives a fair part, too
        order = position_permutation(len(index), LIMIT).numpy()
        index = np.sort(index[order[:limit]])
    labels = split.labels[index]
    if len(np.unique(labels)) < 2:
        raise BadInput(
            f"split {split.name} leaves {len(index):,} patches of one class: both are needed"
        )
    return Rows(index, labels, dict(left_out))


def read_quarantine(path, split: Split, reasons) -> dict[int, str]:
    """Rows of a split that quarantine.csv lists for one of `reasons`, each with the first such
    reason. Raises BadInput for a file that cannot be read, and a row that the split does not have.
    """
    suspects = {}
    for number, row in enumerate(read_edited_csv(path, ("split", "index", "reason")), 2):
        if row["split"] != split.name or row["reason"] not in reasons:
            continue
        index = row_number(row["index"])
        if index is None or index >= len(split):
            raise BadInput(
                f"quarantine={path}: line {number}: no row {row['index'][:20]!r} of split"
                f" {split.name}, which has {len(split):,} patches"
            )
        suspects.setdefault(index, row["reason"])
    return suspects


def fold_of_rows(names: np.ndarray, num_folds: int) -> np.ndarray:
    """The fold of each row, (N,), from the name of its group (N,): groups stay whole."""
    _, first_row, group, sizes = np.unique(
        names, return_index=True, return_inverse=True, return_counts=True
    )
    # The groups get a random order, drawn by the number of each group's first row. The number of
    # rows in the groups before it decides the fold of a group: folds have nearly equal sizes.
    order = torch.argsort(position_bits(torch.from_numpy(first_row), FOLD), stable=True).numpy()
    rows_before = np.empty_like(sizes)
    rows_before[order] = np.cumsum(sizes[order]) - sizes[order]
    return rows_before[group] * num_folds // len(names)


def open_train_valid(cfg: Config) -> tuple[tuple[Split, Rows], tuple[Split, Rows]]:
    """(split, rows) to train on, and (split, rows) to validate on. Raises BadInput for data that
    cannot be used.
    """
    train = open_split(cfg.data_dir, "train")
    valid = train if cfg.num_folds else open_split(cfg.data_dir, "valid")
    return (train, select_rows(train, cfg)), (valid, select_rows(valid, cfg, held_out=True))


def fit_batch_size(cfg: Config, num_rows: int) -> int:
    """Patches per step: batch_size, or all there are when they are fewer, as a multiple of
    shards.
    """
    size = min(cfg.batch_size, num_rows // cfg.shards * cfg.shards)
    if not size:
        raise BadInput(f"{num_rows} training patches are too few for {cfg.shards} shards")
    return size


def epoch_order(rows: Rows, num_total: int, epoch: int, cfg: Config, device="cpu") -> torch.Tensor:
    """Sample keys of an epoch, int64 (N,) on `device`, a function of (seed, epoch).

    A key is row + repeat * num_total. With `balance: sampler` rows of the smaller class come up
    several times in an epoch; each repeat has its own key, and so its own augmentation.
    """
    keys = torch.from_numpy(rows.index).to(device)
    if cfg.balance == "sampler":
        num_per_class = len(keys) // 2
        parts = []
        for label in (0, 1):
            members = torch.from_numpy(rows.index[rows.labels == label]).to(device)
            num_missing = num_per_class
            repeat = 0
            while num_missing > 0:
                position = (cfg.seed, epoch, CLASS_ORDER, label, repeat)
                order = position_permutation(len(members), *position, device=device)
                parts.append(members[order[:num_missing]] + repeat * num_total)
                num_missing -= len(members)
                repeat += 1
        keys = torch.cat(parts)
    return keys[position_permutation(len(keys), cfg.seed, epoch, ORDER, device=device)]


def load_batches(
    source: PatchSource, labels: np.ndarray, batches: list[torch.Tensor], prefetch=None
) -> Iterator[Batch]:
    """Yield a Batch for each of `batches`, the sample keys int64 (B,) of a batch on any device.

    Patches that are not on the device are gathered into a few buffers, which are reused: a batch is
    valid until the next one is asked for. With `prefetch`, by default where that may wait for a
    disk or a transfer, a background thread does so; its errors are raised here. `wait_s` is the
    time that the caller waited for the batch. The host never waits for a GPU.
    """
    if not batches:
        return
    num = len(source)
    device = source.device
    sizes = [len(keys) for keys in batches]
    keys = torch.cat(batches)  # one copy to the device for all batches
    targets = torch.from_numpy(labels).float().to(device)
    device_keys = keys.to(device).split(sizes)
    if source.residence == "device":
        gathered = ((source.gather(batch_keys % num), 0.0) for batch_keys in device_keys)
    else:
        if prefetch is None:
            # From host memory to a CPU a gather is a short copy by all threads. In the background
            # these compete with the model's: a third of the throughput on two cores.
            prefetch = source.residence == "disk" or device.type == "cuda"
        gathered = gather_ahead(source, (keys % num).cpu().split(sizes), prefetch)
    with contextlib.closing(gathered):
        for batch_keys, (images, wait_s) in zip(device_keys, gathered, strict=True):
            yield Batch(images, targets[batch_keys % num], batch_keys, num, wait_s)


def gather_ahead(
    source: PatchSource, batches, prefetch: bool
) -> Iterator[tuple[torch.Tensor, float]]:
    """Yield (patches on the device, seconds that the caller waited for them) for each of `batches`,
    row numbers int64 (B,).
    """
    on_gpu = source.device.type == "cuda"
    shape = (NUM_BUFFERS, max(len(rows) for rows in batches), *PATCH_SHAPE)
    buffers = torch.empty(shape, dtype=torch.uint8, pin_memory=on_gpu)
    copied = [None] * NUM_BUFFERS  # for each buffer, the event after which the GPU has its patches
    # a stream of its own: otherwise copies would queue behind the model's steps
    stream = torch.cuda.Stream(source.device) if on_gpu else None

    def fill(number: int) -> torch.Tensor:
        rows = batches[number]
        buffer = number % NUM_BUFFERS
        if copied[buffer]:
            copied[buffer].synchronize()  # the patches that it held have to be on the GPU
        images = source.gather(rows, buffers[buffer, : len(rows)])
        if on_gpu:
            with torch.cuda.stream(stream):
                images = images.to(source.device, non_blocking=True)
                copied[buffer] = stream.record_event()
        return images

    numbers = range(len(batches))
    with ThreadPoolExecutor(1, "prefetch") as pool:
        filled = map_ahead(pool, fill, numbers, NUM_BUFFERS) if prefetch else map(fill, numbers)
        for number in numbers:
            started_at = time.perf_counter()
            images = next(filled)
            if on_gpu:
                current = torch.cuda.current_stream(source.device)
                current.wait_event(copied[number % NUM_BUFFERS])
                # torch keeps the memory of `images` until the model has used it
                images.record_stream(current)
            yield images, time.perf_counter() - started_at


def map_ahead(pool, function: Callable, items: Iterable, num_ahead: int) -> Iterator:
    """Yield the results of `function` for each item, in order, computed by the threads of a pool.

    At most `num_ahead` results are being computed, waiting, or in use by the caller.
    """
    pending = deque()
    for item in items:
        pending.append(pool.submit(function, item))
        if len(pending) == num_ahead:
            yield pending.popleft().result()
    for future in pending:
        yield future.result()
