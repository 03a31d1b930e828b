"""Run folders as rows: listed while they are written, selected, compared, averaged over seeds or
folds, drawn together.
"""

import contextlib
import functools
import hashlib
import itertools
import operator
import os
import platform
import re
import time
from collections import Counter
from pathlib import Path

import yaml

from lib.blocks import Table, table_of
from lib.command import BadInput, nearest, say
from lib.config import ADDED_KEYS, HINTS, plain, read_yaml
from lib.files import read_csv, read_json
from lib.metrics import mean_interval
from lib.rundir import SCORES, process_start

# a run on another machine that has not written for so long is dead: staging or an evaluation takes
# less
SILENT_S = 900.0
# what a file that was edited by hand, or is of another program, provokes
UNREADABLE = (OSError, BadInput, AttributeError, LookupError, TypeError, ValueError)
SHOWN = ("num_epochs", "val_auc", "val_f2", "val_loss", "wall_s")
# nothing that is compared depends on them
UNCOMPARED_KEYS = {"name", "data_dir", "data_residence", "checkpoint_every_steps"}
TRIAL = re.compile(r"-[0-9a-f]{6}-(t\d+|base)$")  # ends the name of a search's run
COUNTS = {"tp", "fp", "fn", "tn"}
CONDITION = re.compile(r"\s*(\w+)\s*(<=|>=|!=|==?|<|>)\s*((?![<>=!]).*?)\s*")
# YAML means by it what Python does
NUMBER = re.compile(r"-?(?:0|[1-9]\d*)(?:\.\d+(?:e[-+]\d+)?)?", re.ASCII)
OPERATORS = {
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
    "!=": operator.ne,
    "=": operator.eq,
    "==": operator.eq,
}
LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # both are safe, one is written in C


def list_runs(runs_dir) -> list[dict]:
    """A row for each run folder in `runs_dir`, in the order of their names, which is that of their
    starts.
    """
    try:
        names = sorted(os.listdir(runs_dir))
    except (FileNotFoundError, NotADirectoryError):
        raise BadInput(f"no folder {runs_dir} (--runs names the one that holds the runs)") from None
    rows = [read_run(Path(runs_dir, name)) for name in names]
    return [row for row in rows if row]


def read_run(run: Path) -> dict:
    """A run as a flat row: its status, facts of meta.json, config, scores. Empty where there is no
    config.yaml, so no run.
    """
    row = {"run": run.name, "status": "unreadable"}
    try:
        config = ADDED_KEYS | read_flat_yaml(f"{run}/config.yaml")
        meta = read_if_there(f"{run}/meta.json")
        summary = read_if_there(f"{run}/summary.json")
        scores = summary or scores_so_far(run) | {"status": run_status(run, meta)}
        return row | facts_of_meta(meta) | config | scores
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except UNREADABLE as error:
        say(f"{run} cannot be read: {error}")
        return row


def facts_of_meta(meta: dict) -> dict:
    """What a row says of a run's meta.json. `code` is its commit and, of a run with uncommitted
    changes, a digest of the patch.
    """
    job = meta.get("job", {})
    data = meta.get("data")
    commit = (meta.get("commit") or "")[:10]
    patch = meta.get("uncommitted_patch") or ""
    machine = meta.get("machine", {})
    torch = meta.get("versions", {}).get("torch")
    starts = [*meta.get("earlier_starts", []), meta]
    return {
        "started_utc": starts[0].get("started_utc"),
        "commit": commit,
        "patched": bool(patch),
        "code": f"{commit} with patch {digest_of(patch)}" if patch else commit,
        "host": machine.get("host"),
        "environment": f"torch {torch}, {machine.get('gpu') or machine.get('cpu')}",
        "submission": (meta.get("submitted") or {}).get("id"),
        "job": job.get("SLURM_JOB_ID"),
        "array_index": job.get("SLURM_ARRAY_TASK_ID"),
        "data": data and digest_of(repr(sorted(data.items()))),
        "num_train": meta.get("rows", {}).get("train", {}).get("num"),
        "num_starts": len(starts),
    }


def digest_of(text: str) -> str:
    """The first digits of the SHA-256 of a text."""
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def read_if_there(path: str) -> dict:
    """The object in a JSON file that need not be there yet; asking first would cost as much as
    reading.
    """
    try:
        return read_json(path)
    except FileNotFoundError:
        return {}


@functools.cache
def _parse_line(line: str):
    # of which there are too many to remember, and YAML is slow
    key, _, value = line.partition(": ")
    if NUMBER.fullmatch(value):
        return key, float(value) if "." in value else int(value)
    ((key, value),) = yaml.load(line, LOADER).items()  # noqa: S506 (safe)
    return key, value


def read_flat_yaml(path: str) -> dict:
    """The values of a config.yaml: most of its lines stand in many runs, and each is parsed
    once.
    """
    with open(path, encoding="utf-8") as file:
        lines = file.read().splitlines()
    try:
        return dict(map(_parse_line, lines))
    except (yaml.YAMLError, AttributeError, ValueError):  # a value over several lines, a comment
        return read_yaml(path)


def scores_so_far(run: Path) -> dict:
    """What summary.json would say of the epochs that are done: the scores of the best one, over one
    view.
    """
    path = run / "epochs.csv"
    epochs = read_csv(path) if path.is_file() else []
    scores = {"num_epochs": len(epochs), "num_steps": 0}
    for row in epochs:
        scores["num_steps"] = int(row["step"])
        if row["is_best"] == "1":
            best = {name: value for name, value in row.items() if name.startswith("val_")}
            scores |= {name: float(value) for name, value in best.items() if value}
    return scores


def run_status(run: Path, meta: dict) -> str:
    """Of a run that is not over: running; interrupted or paused, when it was told to stop and has
    saved; or dead.

    On its own machine the process tells; from another one the last sign of life counts.
    """
    if "stopped" in meta:
        return meta["stopped"]["status"]
    if meta.get("process_start") and meta["machine"]["host"] == platform.node():
        is_alive = process_start(meta["pid"]) == meta["process_start"]
    else:
        paths = [run / name for name in ("steps.csv", "meta.json", "config.yaml")]
        written_at = max(path.stat().st_mtime for path in paths if path.exists())
        is_alive = time.time() - written_at < SILENT_S
    return "running" if is_alive else "dead"


def require_column(name: str, rows: list[dict], source: str) -> None:
    """Raise BadInput where there are rows, but none has the column, with the nearest that there
    is.
    """
    names = dict.fromkeys(column for row in rows for column in row)
    if rows and name not in names:
        hint = nearest(name, names) or f" (allowed: {', '.join(names)})"
        raise BadInput(f"{source}: there is no column {name}{hint}")


def build_condition(text: str, rows: list[dict]):
    """`val_auc>0.9` as a function of a row: numbers are compared as numbers, else text; what a row
    lacks meets only `!=`.
    """
    match = CONDITION.fullmatch(text)
    if not match:
        raise BadInput(
            f"--where {text!r}: it must be a name, one of {' '.join(OPERATORS)}, and a value, such"
            " as 'val_auc>0.9'"
        )
    name, sign, wanted = match.groups()
    require_column(name, rows, f"--where {text!r}")
    compare = OPERATORS[sign]

    def holds(row) -> bool:
        value = row.get(name)
        if value is None:
            return sign == "!="
        with contextlib.suppress(TypeError, ValueError):
            if not isinstance(value, (str, bool)):
                return compare(float(value), float(wanted))
        return compare(plain(value), wanted)

    return holds


def select_runs(rows: list[dict], conditions=(), sort="", descending=False) -> list[dict]:
    """The rows that meet every condition, in the order of a column, numbers before texts; those
    that lack it come last.
    """
    if sort:
        require_column(sort, rows, f"--sort {sort}")
    for holds in [build_condition(text, rows) for text in conditions]:
        rows = list(filter(holds, rows))
    present = [row for row in rows if row.get(sort) not in (None, "")]
    lacking = [row for row in rows if row.get(sort) in (None, "")]
    present.sort(key=lambda row: (isinstance(row[sort], str), row[sort]), reverse=descending)
    return present + lacking


def table_of_runs(rows: list[dict]) -> Table:
    """Status, the config keys in which the rows are not all equal, and scores of each run."""
    keys = [key for key in HINTS if any(row.get(key) != rows[0].get(key) for row in rows)]
    return table_of(rows, ["run", "status", *(key for key in keys if key != "name"), *SHOWN])


def require_alike(rows: list[dict], varied: str) -> None:
    """Raise BadInput unless these are two or more finished runs, all of which differ in `varied`,
    and in nothing else.
    """
    first = rows[0]
    if len(rows) < 2:
        raise BadInput(f"{first['run']} is one run: a spread over {varied}s needs at least two")
    same = {*HINTS, "data"} - UNCOMPARED_KEYS - {varied}
    if varied == "seed":
        same.add("num_train")
    for row in rows:
        if row["status"] != "finished":
            raise BadInput(f"{row['run']} is {row['status']}: only finished runs are averaged")
    value, num = Counter(row[varied] for row in rows).most_common(1)[0]
    if num > 1:
        raise BadInput(f"{num} of the runs share {varied} {value}: that is one result, not {num}")
    for row, key in itertools.product(rows, sorted(same)):
        ours = plain(first.get(key))
        theirs = plain(row.get(key))
        if ours != theirs:
            raise BadInput(
                f"{key} is {ours!r} in {first['run']}, {theirs!r} in {row['run']}: runs that are"
                f" averaged may differ in {varied} alone"
            )


def group_seeds(rows: list[dict]) -> list[list[dict]]:
    """The finished runs in sets that differ in the seed alone, of each seed the newest. Trials of a
    search belong to none.
    """
    groups = {}
    keys = sorted({*HINTS, "data", "code"} - UNCOMPARED_KEYS - {"seed"})
    for row in rows:  # in the order of their starts
        if row["status"] == "finished" and not TRIAL.search(str(row.get("name"))):
            same = repr([row.get(key) for key in keys])
            groups.setdefault(same, {})[row["seed"]] = row
    return [list(group.values()) for group in groups.values()]


def differing(rows: list[dict], key: str, what: str) -> list[str]:
    """A sentence for each run that differs from the first one in `key`."""
    sentences = []
    for row in rows[1:]:
        ours = row.get(key) or "none"
        theirs = rows[0].get(key) or "none"
        if ours != theirs:
            sentences.append(
                f"{row['run']} has another {what} than {rows[0]['run']}: {ours}, not {theirs}"
            )
    return sentences


def average_scores(rows: list[dict], varied: str) -> dict[str, dict]:
    """{score: {mean, deviation, low, high, num}} over runs that differ in `varied` alone. Raises
    BadInput for others.
    """
    require_alike(rows, varied)
    spreads = {}
    for name in [f"val_{score}" for score in SCORES if score not in COUNTS]:
        values = [row.get(name) for row in rows]
        if None not in values:
            spreads[name] = score_interval(values, name)
    return spreads


def score_interval(values: list[float], name: str) -> dict[str, float]:
    """The `mean_interval` of a score, within what is possible: no share is above 1."""
    spread = mean_interval(values)
    spread["low"] = max(0.0, spread["low"])
    if "loss" not in name:
        spread["high"] = min(1.0, spread["high"])
    return spread
