"""What a job needs, found out before it is submitted: what its script would refuse at its start,
and the memory and time that a training takes.
"""

import runpy
from pathlib import Path

from lib.batches import fit_batch_size, open_train_valid
from lib.command import REPOSITORY
from lib.config import DEFAULT_PATH, Config, load_config
from lib.cost import measure_training
from lib.jobs.work import training_options
from lib.ranks import require_equal_shares
from lib.rundir import find_run, resume_config

NUM_AUDIT_THREADS = 4


def examine(name: str, arguments: list[str], data: str, num_ranks: int, measures: bool) -> dict:
    """The threads of a script's work, where its data are and, with `measures`, what it needs.
    Raises BadInput for what the script would refuse at its start.
    """
    runpy.run_path(str(REPOSITORY / name))["parse"](arguments)  # unknown options
    if name == "audit.py":  # what is wrong with the data is for the audit to find out
        return {"threads": NUM_AUDIT_THREADS, "data_dir": data}
    cfg = read_config(name, arguments, data)
    require_equal_shares(cfg.shards, num_ranks)
    (_, rows), _ = open_train_valid(cfg)
    fit_batch_size(cfg, len(rows))
    needs = {"threads": 0 if name == "benchmark.py" else cfg.threads, "data_dir": cfg.data_dir}
    if measures:
        needs |= measure_training(cfg)
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
