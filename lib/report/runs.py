"""Run folders as rows: listed while they are written, selected, compared, and averaged over seeds
or folds.
"""

import functools
import hashlib
import math
import operator
import re
import time
from pathlib import Path

import yaml

from lib.blocks import Table, table_of
from lib.command import BadInput, nearest, say
from lib.config import ADDED_KEYS, HINTS, plain, read_yaml
from lib.files import read_csv, read_json
from lib.metrics import mean_interval
from lib.rundir import is_finished, read_meta

# a run that has not written for so long is dead: staging or an evaluation takes less
SILENT_S = 900.0
# what a file that was edited by hand, or is of another program, provokes
UNREADABLE = (OSError, BadInput, AttributeError, LookupError, TypeError, ValueError)
SHOWN = ("num_epochs", "val_auc", "val_f2", "val_loss", "wall_s")
# nothing that is compared depends on them
UNCOMPARED_KEYS = {"name", "data_dir", "data_residence", "checkpoint_every_steps"}
TRIAL = re.compile(r"-[0-9a-f]{6}-(t\d+|base)$")  # ends the name of a search's run
CONDITION = re.compile(r"(\w+)\s*(<=|>=|!=|=|<|>)\s*(?![<>=!])(.*)")
OPERATORS = {
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
    "!=": operator.ne,
    "=": operator.eq,
}
# the scores that are averaged, with their titles
SPREAD_SCORES = {
    "val_auc": "ROC-AUC",
    "val_pr_auc": "PR-AUC",
    "val_loss": "log loss (nats)",
    "val_f2": "F2 at 0.5",
    "val_recall": "recall at 0.5",
    "val_precision": "precision at 0.5",
    "half_f2": "F2 at the stored threshold",
    "half_recall": "recall at the stored threshold",
    "half_precision": "precision at the stored threshold",
}


def list_runs(runs_dir) -> list[dict]:
    """A row for each run folder in `runs_dir`, in the order of their names, which is that of their
    starts.
    """
    rows = [read_run(run) for run in sorted(Path(runs_dir).iterdir())]
    return [row for row in rows if row]


def read_run(run: Path) -> dict:
    """A run as a flat row: its status, facts of meta.json, config, scores. Empty where there is no
    config.yaml, so no run.
    """
    row = {"run": run.name, "status": "unreadable"}
    path = run / "config.yaml"
    if not path.is_file():
        return {}
    try:
        meta = read_meta(run)
        about = facts_of_meta(meta) | ADDED_KEYS | read_flat_yaml(path)
        if is_finished(run):
            scores = read_json(run / "summary.json")
        else:
            scores = scores_so_far(run) | {"status": run_status(run, meta)}
        return row | about | scores
    except UNREADABLE as error:
        say(f"{run} cannot be read: {error}")
        return row


def facts_of_meta(meta: dict) -> dict:
    """What a row says of a run's meta.json. `code` is its commit and, of a run with uncommitted
    changes, a digest of the patch.
    """
    machine = meta.get("machine", {})
    code = (meta.get("commit") or "")[:10]
    patch = meta.get("uncommitted_patch")
    if patch:
        code += f" with patch {digest_of(patch)}"
    torch = meta.get("versions", {}).get("torch")
    return {
        "code": code,
        "environment": f"torch {torch}, {machine.get('gpu') or machine.get('cpu')}",
        "submission": (meta.get("submitted") or {}).get("id"),
        "job": meta.get("job", {}).get("SLURM_JOB_ID"),
        "data": digest_of(str(sorted(meta.get("data", {}).items()))),
        "num_train": meta.get("rows", {}).get("train", {}).get("num"),
    }


def digest_of(text: str) -> str:
    """The first digits of the SHA-256 of a text."""
    return hashlib.sha256(text.encode()).hexdigest()[:12]


@functools.cache
def parse_line(line: str):
    """The key and the value of a line of YAML: the same lines stand in many runs."""
    ((key, value),) = yaml.load(line, yaml.CSafeLoader).items()  # noqa: S506 (safe)
    return key, value


def read_flat_yaml(path: Path) -> dict:
    """The values of a config.yaml, each different line of which is parsed once."""
    try:
        return dict(map(parse_line, path.read_text(encoding="utf-8").splitlines()))
    except (yaml.YAMLError, AttributeError, ValueError):  # a value over several lines, a comment
        return read_yaml(path)


def scores_so_far(run: Path) -> dict:
    """What summary.json would say of the epochs that are done: the scores of the best one, over one
    view.
    """
    path = run / "epochs.csv"
    epochs = read_csv(path) if path.is_file() else []
    scores = {"num_epochs": len(epochs)}
    best = [row for row in epochs if row["is_best"] == "1"]
    for name, text in best[-1].items() if best else ():
        if name.startswith("val_") and text:
            scores[name] = float(text)
    return scores


def run_status(run: Path, meta: dict) -> str:
    """Of a run that is not over: running; interrupted or paused, when it was told to stop and has
    saved; or dead.
    """
    if "stopped" in meta:
        return meta["stopped"]["status"]
    paths = [run / name for name in ("steps.csv", "meta.json", "config.yaml")]
    written_at = max(path.stat().st_mtime for path in paths if path.exists())
    return "running" if time.time() - written_at < SILENT_S else "dead"


def require_column(name: str, rows: list[dict], source: str) -> None:
    """Raise BadInput where there are rows, but none has the column, with the nearest that there
    is.
    """
    if rows and not any(name in row for row in rows):
        hint = nearest(name, rows[0]) or f" (allowed: {', '.join(rows[0])})"
        raise BadInput(f"{source}: there is no column {name}{hint}")


def parse_condition(text: str, rows: list[dict]) -> tuple[str, str, str]:
    """`val_auc>0.9` as column, sign and value. Raises BadInput where it is none of these rows."""
    match = CONDITION.fullmatch(text.strip())
    if not match:
        raise BadInput(f"--where {text!r}: it must be like val_auc>0.9 ({' '.join(OPERATORS)})")
    require_column(match[1], rows, f"--where {text!r}")
    return match.groups()


def meets(row: dict, name: str, sign: str, wanted: str) -> bool:
    """Whether a condition holds: numbers are compared as numbers, else text; what a row lacks meets
    only `!=`.
    """
    value = row.get(name)
    if value is None:
        return sign == "!="
    try:
        return OPERATORS[sign](float(value), float(wanted))
    except (TypeError, ValueError):
        return OPERATORS[sign](plain(value), wanted)


def select_runs(rows: list[dict], conditions=(), sort="") -> list[dict]:
    """The rows that meet every condition, in the order of the column `sort`, numbers before texts,
    or with a `-` before its name in reverse; those that lack it come last.
    """
    name = sort.removeprefix("-")
    if sort:
        require_column(name, rows, f"--sort {sort}")
    for condition in [parse_condition(text, rows) for text in conditions]:
        rows = [row for row in rows if meets(row, *condition)]
    present = [row for row in rows if row.get(name) not in (None, "")]
    lacking = [row for row in rows if row.get(name) in (None, "")]
    present.sort(key=lambda row: (isinstance(row[name], str), row[name]), reverse=sort != name)
    return present + lacking


def table_of_runs(rows: list[dict]) -> Table:
    """Status, the config keys in which the rows are not all equal, and scores of each run."""
    keys = [key for key in HINTS if any(row.get(key) != rows[0].get(key) for row in rows)]
    return table_of(rows, ["run", "status", *(key for key in keys if key != "name"), *SHOWN])


def compared_keys(varied: str) -> list[str]:
    """What has to be equal in runs that are averaged: config and data, but for what `varied`
    changes.
    """
    keys = {*HINTS, "data"} - UNCOMPARED_KEYS - {varied}
    if varied == "seed":
        keys.add("num_train")
    return sorted(keys)


def require_alike(rows: list[dict], varied: str) -> None:
    """Raise BadInput unless these are two or more finished runs, all of which differ in `varied`,
    and in nothing else.
    """
    for row in rows:
        if row["status"] != "finished":
            raise BadInput(f"{row['run']} is {row['status']}: only finished runs are averaged")
    num = len({row.get(varied) for row in rows})
    if num < max(2, len(rows)):
        raise BadInput(f"{len(rows)} runs with {num} {varied}(s): a spread needs two or more")
    for key in compared_keys(varied):
        for sentence in differing(rows, key):
            raise BadInput(f"{sentence}: runs that are averaged may differ in {varied} alone")


def group_seeds(rows: list[dict]) -> list[list[dict]]:
    """The finished runs in sets that differ in the seed alone, of each seed the newest. Trials of a
    search belong to none.
    """
    groups = {}
    keys = ["code", *compared_keys("seed")]
    for row in rows:  # in the order of their starts
        if row["status"] == "finished" and not TRIAL.search(str(row.get("name"))):
            same = str([row.get(key) for key in keys])
            groups.setdefault(same, {})[row.get("seed")] = row
    return [list(group.values()) for group in groups.values()]


def differing(rows: list[dict], key: str) -> list[str]:
    """A sentence for each run that differs from the first one in `key`."""
    sentences = []
    first = plain(rows[0].get(key)) if rows else ""
    for row in rows[1:]:
        value = plain(row.get(key))
        if value != first:
            names = f"{row['run']} has another {key} than {rows[0]['run']}"
            sentences.append(f"{names}: {value or 'none'}, not {first or 'none'}")
    return sentences


def average_scores(rows: list[dict], varied: str) -> dict[str, dict]:
    """{score: {mean, deviation, low, high, num}} of SPREAD_SCORES, without those that a run lacks,
    over runs that differ in `varied` alone. Raises BadInput for other runs.

    The interval of the mean ends at what is possible: no share is above 1.
    """
    require_alike(rows, varied)
    rows = [row | rates_of(row) for row in rows]
    spreads = {}
    for name in SPREAD_SCORES:
        values = [row.get(name) for row in rows]
        if None not in values:
            spread = mean_interval(values)
            highest = math.inf if name == "val_loss" else 1.0
            spread.update(low=max(0.0, spread["low"]), high=min(highest, spread["high"]))
            spreads[name] = spread
    return spreads


def rates_of(row: dict) -> dict:
    """Recall and precision of a run at 0.5; empty where it lacks the counts."""
    counts = [row.get(f"val_{name}") for name in ("tp", "fn", "fp")]
    if None in counts:
        return {}
    hits, misses, false_alarms = counts
    recall = hits / max(1, hits + misses)
    return {"val_recall": recall, "val_precision": hits / max(1, hits + false_alarms)}
