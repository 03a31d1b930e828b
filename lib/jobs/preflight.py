"""What a job needs, found out before it is submitted: what its script would refuse at its start,
and the memory and time that a training takes.
"""

import dataclasses
import resource
import runpy
import time
from pathlib import Path

import numpy as np
import torch

from lib.augment import PREPROCESSING
from lib.batches import (
    PatchSource,
    choose_residence,
    epoch_order,
    fit_batch_size,
    load_batches,
    open_train_valid,
)
from lib.command import REPOSITORY
from lib.config import DEFAULT_PATH, Config, load_config
from lib.device import keep_freed_memory, memory_limit_bytes, resolve_threads
from lib.jobs.work import training_options
from lib.predict import predict_batch, ready_to_predict
from lib.ranks import require_equal_shares
from lib.rundir import find_run, resume_config
from lib.seeding import set_determinism
from lib.training import build_state, training_step

NUM_AUDIT_THREADS = 4
CPU = torch.device("cpu")
SPARE_SHARE = 0.1  # of the memory measured: allocators and the log of a long training take more


def examine(name: str, arguments: list[str], data: str, num_ranks: int, measures: bool) -> dict:
    """The threads of a script's work, where its data are and, with `measures`, what it needs.
    Raises BadInput for what the script would refuse at its start.
    """
    runpy.run_path(str(REPOSITORY / name))["parse"](arguments)  # unknown options
    if name == "audit.py":  # what is wrong with the data is for the audit to find out
        return {"threads": NUM_AUDIT_THREADS, "data_dir": data}
    cfg = read_config(name, arguments, data)
    require_equal_shares(cfg.shards, num_ranks)
    (split, rows), valid_part = open_train_valid(cfg)
    fit_batch_size(cfg, len(rows))
    needs = {"threads": 0 if name == "benchmark.py" else cfg.threads, "data_dir": cfg.data_dir}
    if measures:
        needs |= measure_training(cfg, (split, rows), valid_part)
    return needs


def read_config(name: str, arguments: list[str], data: str) -> Config:
    """The configuration that a script has with these arguments."""
    if name == "sweep.py":
        overrides = [word for word in arguments if "=" in word and not word.startswith("-")]
        return load_config(Path("sweeps") / arguments[1] / "config.yaml", overrides)
    if name == "benchmark.py":  # its first word is what to measure, and its data are --data
        return training_config([*arguments[1:], *([f"data_dir={data}"] if data else [])])
    return training_config(arguments)


def training_config(arguments: list[str]) -> Config:
    """The configuration that train.py has with these arguments."""
    options, rest = training_options(arguments)
    overrides = []
    for before, word in zip(["", *rest], rest, strict=False):
        # a word after an option may be its value
        is_pair = "=" in word or not before.startswith("--")
        if is_pair and not word.startswith("-"):
            overrides.append(word)
    if options.resume:
        return resume_config(find_run(options.resume, options.runs), overrides)
    return load_config(options.config or DEFAULT_PATH, overrides)


def measure_training(cfg: Config, train_part, valid_part) -> dict:
    """What a training takes on this machine's CPU: its memory and seconds, by the peak and the pace
    of two steps and a batch of evaluation, with the patches that it keeps in memory.

    The patches are whole, which no step has more of.
    """
    cfg = resolve_threads(dataclasses.replace(cfg, crop_epochs=0))
    set_determinism(cfg.deterministic, cfg.threads)
    keep_freed_memory()
    (split, rows), (valid_split, valid_rows) = train_part, valid_part
    state = build_state(cfg, CPU)
    batch_size = fit_batch_size(cfg, len(rows))
    keys = epoch_order(rows, len(split), 0, cfg, CPU)[:batch_size]
    source = PatchSource(split.images, "disk", CPU)
    for batch in load_batches(source, split.labels, [keys, keys]):
        started_at = time.perf_counter()
        training_step(state, batch, cfg, 0.0)
        step_s = time.perf_counter() - started_at
    model = ready_to_predict(state.model, cfg.precision)
    index = torch.from_numpy(valid_rows.index[: cfg.eval_batch_size])
    source = PatchSource(valid_split.images, "disk", CPU)
    for batch in load_batches(source, np.zeros(len(source), np.uint8), [index]):
        started_at = time.perf_counter()
        predict_batch(model, batch.images, cfg.precision, 1, PREPROCESSING)
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
