"""Run folders as rows: listed while they are written, selected, compared, averaged over seeds or
folds, drawn together.
"""

import contextlib
import csv
import functools
import hashlib
import json
import operator
import os
import platform
import re
import time
from pathlib import Path

import yaml

from lib.blocks import Figure, Heading, Table, Words, table_of, write_page
from lib.command import BadInput, nearest, one_line, say
from lib.config import ADDED_KEYS, HINTS, plain, read_yaml
from lib.files import read_csv, read_json
from lib.rundir import SCORES, process_start

# a run on another machine that has not written for so long is dead: staging or an evaluation takes
# less
SILENT_S = 900.0
UNREADABLE = (
    OSError,
    BadInput,
    AttributeError,
    KeyError,
    TypeError,
    ValueError,
    RecursionError,
    csv.Error,
)
MOST_DRAWN = 32  # lines that eight colours in four styles tell apart
SHOWN = ("num_epochs", "val_auc", "val_f2", "val_loss", "wall_s")
# nothing that is compared depends on them
UNCOMPARED_KEYS = {"name", "data_dir", "data_residence", "checkpoint_every_steps"}
TRIAL = re.compile(r"-[0-9a-f]{6}-(t\d+|base)$")  # ends the name of a search's run
COUNTS = {"tp", "fp", "fn", "tn"}
CONDITION = re.compile(r"\s*(\w+)\s*(<=|>=|!=|==?|<|>)\s*((?![<>=!]).*?)\s*")
# YAML means by it what Python does
NUMBER_LINE = re.compile(r"(\w+): (-?(?:0|[1-9]\d*)(?:\.\d+(?:e[-+]\d+)?)?)", re.ASCII)
OPERATORS = {
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
    "!=": operator.ne,
}
OPERATORS |= {"=": operator.eq, "==": operator.eq}
# file, column, title, scale
CURVES = (
    ("steps.csv", "loss", "training loss (nats)", "linear"),
    ("epochs.csv", "val_loss", "log loss on validation (nats)", "linear"),
    ("epochs.csv", "val_auc", "ROC-AUC on validation", "linear"),
)
GRADIENTS = (
    ("steps.csv", "loss", "training loss (nats)", "linear"),
    ("steps.csv", "grad_norm", "global gradient norm, before clipping", "log"),
    ("steps.csv", "lr", "learning rate", "linear"),
)


def list_runs(runs_dir) -> list[dict]:
    """A row for each run folder in `runs_dir`, in the order of their names, which is that of their
    starts.
    """
    try:
        names = sorted(entry.name for entry in os.scandir(runs_dir) if entry.is_dir())
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
        try:
            config = ADDED_KEYS | read_flat_yaml(f"{run}/config.yaml")
        except FileNotFoundError:
            return {}
        meta, summary = read_if_there(f"{run}/meta.json"), read_if_there(f"{run}/summary.json")
        scores = summary or scores_so_far(run) | {"status": run_status(run, meta)}
        scores = {name: value for name, value in scores.items() if not isinstance(value, list)}
        filled = row | facts_of_meta(meta) | config | scores
        json.dumps(filled)  # what YAML takes for a date goes into no table
        return filled | {"status": str(filled["status"])}
    except UNREADABLE as error:  # edited by hand, or of another program
        say(f"{run} cannot be read: {error}")
        return row


def facts_of_meta(meta: dict) -> dict:
    """What a row says of a run's meta.json. `code` is its commit and, of a run with uncommitted
    changes, a digest of the patch.
    """
    job, data = meta.get("job", {}), meta.get("data")
    commit, patch = (meta.get("commit") or "")[:10], meta.get("uncommitted_patch") or ""
    machine, torch = meta.get("machine", {}), meta.get("versions", {}).get("torch")
    return {
        "started_utc": [*meta.get("earlier_starts", []), meta][0].get("started_utc"),
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
        "num_starts": len(meta.get("earlier_starts", [])) + 1,
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
    match = NUMBER_LINE.fullmatch(line)
    if match:
        return match[1], float(match[2]) if "." in match[2] else int(match[2])
    ((key, value),) = yaml.load(line, getattr(yaml, "CSafeLoader", yaml.SafeLoader)).items()  # noqa: S506 (safe, written in C)
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
    epochs = read_csv(run / "epochs.csv") if (run / "epochs.csv").is_file() else []
    best = ([row for row in epochs if row["is_best"] == "1"] or [{}])[-1]
    scores = {
        name: float(value) for name, value in best.items() if name.startswith("val_") and value
    }
    return {
        "num_epochs": len(epochs),
        "num_steps": int(epochs[-1]["step"]) if epochs else 0,
    } | scores


def run_status(run: Path, meta: dict) -> str:
    """Of a run that is not over: running; interrupted or paused, when it was told to stop and has
    saved; or dead.

    On its own machine the process tells; from another one the last sign of life counts.
    """
    if "stopped" in meta:
        return meta["stopped"].get("status", "interrupted")
    if meta.get("process_start") and meta.get("machine", {}).get("host") == platform.node():
        return "running" if process_start(meta["pid"]) == meta["process_start"] else "dead"
    signs = [
        run / name for name in ("steps.csv", "meta.json", "config.yaml") if (run / name).exists()
    ]
    return (
        "running"
        if time.time() - max(path.stat().st_mtime for path in signs) < SILENT_S
        else "dead"
    )


def require_column(name: str, rows: list[dict], source: str) -> None:
    """Raise BadInput where no row has the column, with the nearest that there is."""
    if name not in HINTS and not any(name in row for row in rows):
        raise BadInput(f"{source}: no run has {name}{nearest(name, set().union(HINTS, *rows))}")


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

    def holds(row) -> bool:
        value = row.get(name)
        if value is None:
            return sign == "!="
        with contextlib.suppress(TypeError, ValueError, OverflowError):
            if not isinstance(value, (str, bool)):
                return OPERATORS[sign](float(value), float(wanted))
        return OPERATORS[sign](plain(value), wanted)

    return holds


def select_runs(rows: list[dict], conditions=(), sort="run", descending=False) -> list[dict]:
    """The rows that meet every condition, ordered by a column; those that lack it come last."""
    if not rows:
        return []
    conditions = [build_condition(text, rows) for text in conditions]
    require_column(sort, rows, f"--sort {sort}")
    rows = [row for row in rows if all(holds(row) for holds in conditions)]
    numbers = all(isinstance(row.get(sort), (int, float, type(None))) for row in rows)
    there = [row for row in rows if row.get(sort) is not None]
    there.sort(key=lambda row: row[sort] if numbers else plain(row[sort]), reverse=descending)
    return there + [row for row in rows if row.get(sort) is None]


def differing_keys(rows: list[dict], but=frozenset()) -> list[str]:
    """The config keys in which the rows are not all equal."""
    return [
        key
        for key in HINTS
        if key not in but and any(row.get(key) != rows[0].get(key) for row in rows)
    ]


def table_of_runs(rows: list[dict]) -> Table:
    """Status, the config keys that differ, and scores of each run."""
    return table_of(rows, ["run", "status", *differing_keys(rows, {"name"}), *SHOWN])


def require_alike(rows: list[dict], varied: str) -> None:
    """Raise BadInput unless these are two or more finished runs, all of which differ in `varied`,
    and in nothing else.
    """
    first, by_value = rows[0], {}
    if len(rows) < 2:
        raise BadInput(f"{first['run']} is one run: a spread over {varied}s needs at least two")
    same = {*HINTS, "data"} - UNCOMPARED_KEYS - {varied} | (
        {"num_train"} if varied == "seed" else set()
    )
    for row in rows:
        if row["status"] != "finished":
            raise BadInput(f"{row['run']} is {row['status']}: only finished runs are averaged")
        if row.get(varied) is None:
            raise BadInput(f"{row['run']} says nothing of its {varied}")
        other = by_value.setdefault(row[varied], row)
        if other is not row:
            raise BadInput(
                f"{other['run']} and {row['run']} share {varied} {row[varied]}: that is one result,"
                " not two"
            )
        for key in sorted(same):
            ours, theirs = first.get(key), row.get(key)
            if ours != theirs:
                values = f"{key} is {plain(ours)!r} in {first['run']}, {plain(theirs)!r} in"
                sentence = f"{values} {row['run']}: runs that are averaged may differ in"
                raise BadInput(f"{sentence} {varied} alone")


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
        if row.get(key) != rows[0].get(key):
            sentences.append(
                f"{row['run']} has another {what} than {rows[0]['run']}:"
                f" {row.get(key) or 'none'}, not {rows[0].get(key) or 'none'}"
            )
    return sentences


def average_scores(rows: list[dict], varied: str) -> dict[str, dict]:
    """{score: {mean, deviation, low, high, num}} over runs that differ in `varied` alone. Raises
    BadInput for others.
    """
    from lib.metrics import mean_interval

    require_alike(rows, varied)
    names = [
        f"val_{name}"
        for name in SCORES
        if name not in COUNTS and rows[0].get(f"val_{name}") is not None
    ]
    for row, name in ((row, name) for row in rows for name in names):
        if type(row.get(name)) not in (int, float):
            raise BadInput(f"{row['run']}: {name} is {row.get(name)!r}, which is no score")
    return {name: mean_interval([row[name] for row in rows]) for name in names}


def read_curves(path: Path, names: list[str]) -> list[dict]:
    """The rows of a CSV file that curves of these columns are drawn of; none, with a sentence,
    where it holds anything else.
    """
    try:
        rows = read_csv(path)
        for row in rows:
            for name in ("step", *names):
                float(row[name] or 0)
        return rows
    except UNREADABLE as error:
        say(f"{path} cannot be drawn: {one_line(error)}")
        return []


def write_together(path, title: str, table: Table, runs: list[Path], curves, remark="") -> Path:
    """A page with a table and the runs' curves drawn together. Raises BadInput for too many to tell
    apart.
    """
    from lib.figures import figure_png
    from lib.report.drawings import plot_runs

    if not 0 < len(runs) <= MOST_DRAWN:
        raise BadInput(
            f"{path}: {len(runs)} runs cannot be drawn together, 1 to {MOST_DRAWN} can (--where"
            " chooses)"
        )
    columns = {}  # of each file
    for file, name, *_ in curves:
        columns.setdefault(file, []).append(name)
    tables = {}
    for run in runs:
        for file, names in columns.items():
            rows = read_curves(run / file, names) if (run / file).is_file() else []
            if rows:
                tables[run.name, file] = rows
    drawn = figure_png(plot_runs(tables, curves))
    titles = ", ".join(title for _, _, title, _ in curves)
    blocks = [Heading("Runs"), table]
    if remark:
        blocks.append(Words(remark, "note"))
    return write_page(path, title, [*blocks, Heading("Curves"), Figure(titles, drawn)])
