"""What a training takes of a machine: its memory and time, measured on a few steps beforehand."""

import dataclasses
import resource
import time

import torch

from lib.batches import (
    PatchSource,
    choose_residence,
    epoch_order,
    fit_batch_size,
    load_batches,
    open_train_valid,
)
from lib.config import Config
from lib.machine import keep_freed_memory, memory_limit_bytes, resolve_threads
from lib.predict import predict_rows
from lib.seeding import set_determinism
from lib.training import build_state, training_step

CPU = torch.device("cpu")
SPARE_SHARE = 0.1  # of the memory measured: a long training takes more than its first steps


def measure_training(cfg: Config) -> dict:
    """What a training takes on this machine's CPU: its memory and seconds, by the peak and the pace
    of two steps and a batch of evaluation, with the patches that it keeps in memory.

    The patches are whole, which no step has more of. Raises BadInput where the data cannot be used.
    """
    cfg = resolve_threads(dataclasses.replace(cfg, crop_epochs=0))
    set_determinism(cfg.deterministic, cfg.threads)
    keep_freed_memory()
    (split, rows), (valid_split, valid_rows) = open_train_valid(cfg)
    state = build_state(cfg, CPU)
    batch_size = fit_batch_size(cfg, len(rows))
    keys = epoch_order(rows, len(split), 0, cfg, CPU)[:batch_size]
    source = PatchSource(split.images, "disk", CPU)
    for batch in load_batches(source, split.labels, [keys, keys]):
        started_at = time.perf_counter()
        training_step(state, batch, cfg, 0.0)
        step_s = time.perf_counter() - started_at
    index = valid_rows.index[: cfg.eval_batch_size]
    started_at = time.perf_counter()
    predict_rows(state.model, PatchSource(valid_split.images, "disk", CPU), index, cfg, 1)
    patch_s = (time.perf_counter() - started_at) / len(index)
    peak_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    resident_bytes = 0
    parts = {part.path: part for part in (split.images, valid_split.images)}  # folds share one
    for images in parts.values():
        if choose_residence(images, cfg.data_residence, CPU) != "disk":
            resident_bytes += images.num_bytes
    num_predicted = (cfg.epochs + cfg.views) * len(valid_rows)
    num_steps = cfg.epochs * (len(rows) // batch_size)
    return {
        "memory_bytes": int(peak_bytes * (1 + SPARE_SHARE)) + resident_bytes,
        "seconds": num_steps * step_s + num_predicted * patch_s,
        "num_threads": cfg.threads,
        "available_bytes": memory_limit_bytes(),
    }
