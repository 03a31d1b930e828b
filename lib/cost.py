"""The memory and time that a training needs, estimated beforehand from a few steps."""

import dataclasses
import resource
import time

import torch

from lib.batches import (
    PatchSource,
    choose_residence,
    fit_batch_size,
    load_batches,
    open_train_valid,
)
from lib.config import Config
from lib.device import resolve_precision
from lib.machine import keep_freed_memory, memory_limit_bytes, resolve_threads
from lib.seeding import set_determinism
from lib.training import build_state, training_step

CPU = torch.device("cpu")
NUM_MEASURED = 16  # patches: so few take seconds on a busy machine
PREDICTION_SHARE = 1 / 3  # of the time of a training step: a forward pass without the backward pass


def measure_training(cfg: Config) -> dict:
    """The memory and seconds that a training needs on this machine's CPU, the number of its threads
    and the available memory: {memory_bytes, seconds, num_threads, available_bytes}.

    Two steps with a few whole patches are measured, and scaled to a batch. Memory includes the
    splits that the training keeps there. The pace of one thread, times the number of
    threads, gives the seconds at best. Raises BadInput where the data cannot be used.
    """
    cfg = resolve_threads(dataclasses.replace(cfg, crop_epochs=0))
    cfg = resolve_precision(cfg, CPU)
    # one thread: on a busy machine several wait for each other, and a login node is busy
    set_determinism(cfg.deterministic, 1)
    keep_freed_memory()
    (split, rows), (valid_split, valid_rows) = open_train_valid(cfg)
    state = build_state(cfg, CPU)
    batch_size = fit_batch_size(cfg, len(rows))
    num = min(batch_size, max(NUM_MEASURED, 2 * cfg.shards))
    keys = torch.from_numpy(rows.index[:num])
    before_bytes = peak_bytes()
    source = PatchSource(split.images, "disk", CPU)
    for batch in load_batches(source, split.labels, [keys, keys]):
        started_at = time.perf_counter()
        training_step(state, batch, cfg, 0.0)
        train_s = (time.perf_counter() - started_at) / num
    batch_bytes = (peak_bytes() - before_bytes) * max(batch_size, cfg.eval_batch_size) // num
    resident_bytes = 0
    for part in [split] if cfg.num_folds else [split, valid_split]:
        if choose_residence(part.images, cfg.data_residence, CPU) != "disk":
            resident_bytes += part.images.num_bytes
    num_trained = cfg.epochs * (len(rows) // batch_size * batch_size)
    num_predicted = (cfg.epochs + cfg.views) * len(valid_rows)
    return {
        "memory_bytes": before_bytes + batch_bytes + resident_bytes,
        "seconds": (num_trained + num_predicted * PREDICTION_SHARE) * train_s / cfg.threads,
        "num_threads": cfg.threads,
        "available_bytes": memory_limit_bytes(),
    }


def peak_bytes() -> int:
    """The most memory that this process has held."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
