"""What a job needs, found out before it is submitted: what its script would refuse at its start,
and the memory and time that a training takes.
"""

from pathlib import Path

from lib.batches import fit_batch_size, open_train_valid
from lib.config import DEFAULT_PATH, Config, load_config
from lib.cost import measure_training
from lib.jobs.work import parse_arguments
from lib.ranks import require_equal_shares
from lib.rundir import find_run, resume_config

NUM_AUDIT_THREADS = 4


def examine(name: str, arguments: list[str], num_ranks: int, measures: bool) -> dict:
    """The threads of a script's work, where its data are and, with `measures`, what it needs.
    Raises BadInput for what the script would refuse at its start.
    """
    args = parse_arguments(name, arguments)
    if name == "audit.py":  # what is wrong with the data is for the audit to find out
        return {"threads": NUM_AUDIT_THREADS, "data_dir": args.dir}
    cfg = read_config(name, args)
    require_equal_shares(cfg.shards, num_ranks)
    (_, rows), _ = open_train_valid(cfg)
    fit_batch_size(cfg, len(rows))
    needs = {"threads": 0 if name == "benchmark.py" else cfg.threads, "data_dir": cfg.data_dir}
    return needs | (measure_training(cfg) if measures else {})


def read_config(name: str, args) -> Config:
    """The configuration that a script has with its parsed arguments."""
    if name == "sweep.py":
        return load_config(Path(args.sweeps, args.name, "config.yaml"))
    if name == "benchmark.py":
        data = [f"data_dir={args.data}"] if args.data else []
        return load_config(overrides=[*args.overrides, *data])
    if args.resume:
        return resume_config(find_run(args.resume, args.runs), args.overrides)
    return load_config(args.config or DEFAULT_PATH, args.overrides)
