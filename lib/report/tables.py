"""Tables and numbers of a journal, from the files that its directives name."""

import contextlib

from lib.blocks import Table, Words, show, table_of
from lib.command import BadInput, nearest
from lib.config import plain
from lib.files import file_digest
from lib.metrics import mean_interval
from lib.report.drawings import SPIKE, WINDOW, find_spikes
from lib.report.evidence import NUM_DIGITS, Evidence, Missing
from lib.report.quotes import read_code
from lib.report.runs import build_condition, differing, read_run, require_alike
from lib.rundir import read_run_config
from lib.runpage import CONSTANTS, constant_of, fact_table, mark_score, score_table
from lib.sources import locate_sources

MOST_ROWS, MOST_COLUMNS = 8, 7  # of a table, unless its directive asks for more
WORDS = {  # for the head of a table
    "name": "",
    "num": "patches",
    "num_positive": "positive",
    "num_negative": "negative",
    "num_finding": "patches of the other half",
    "images_per_s": "images/s",
    "memory_bytes": "memory (bytes)",
    "auc": "AUC",
    "f2": "F2",
}
RUN_COLUMNS = ("run", "code", "environment", "job", "config (SHA-256)", "weights (SHA-256)", "AUC")
SPREAD_SCORES = {
    "ROC-AUC": "val_auc",
    "PR-AUC": "val_pr_auc",
    "log loss (nats)": "val_loss",
    "F2 at 0.5": "val_f2",
    "recall at 0.5": "val_recall",
    "precision at 0.5": "val_precision",
    "F2 at the stored threshold": "half_f2",
    "recall at the stored threshold": "half_recall",
    "precision at the stored threshold": "half_precision",
}
F2_SENTENCE = (
    "F2 = 5 TP / (5 TP + 4 FN + FP): a missed tumour costs as much as four false alarms, so a"
    " threshold that is chosen for F2 calls many patches tumour"
)


def build_table(e: Evidence, source: str, options: dict) -> list:
    """The blocks of `<!-- table NAME|FILE[:key] ... -->`."""
    num_shown = read_number(options.get("rows", MOST_ROWS), "rows")
    if source in NAMED_TABLES:
        blocks = NAMED_TABLES[source](e, options.get("at", ""))
        return [cut_rows(block, num_shown) for block in blocks]
    file, _, key = e.resolve(source).partition(":")
    rows, constants = read_rows(e, file, key)
    rows = choose_rows(rows, options)
    if not rows:
        return [Words("None.")]
    columns = choose_columns(rows, options, file)
    cells = []
    for row in rows[:num_shown]:
        known = {"constant_auc": 0.5} | constants | row
        cells.append([mark_score(name, row.get(name), known) for name in columns])
    head = [WORDS.get(name, name.replace("_", " ")) for name in columns]
    num_more = len(rows) - len(cells)
    more = [Words(f"And {num_more:,} more, in {file}.")] if num_more else []
    return [Table(head, cells), *more]


def choose_rows(rows: list[dict], options: dict) -> list[dict]:
    """The rows that meet every `where`, of those the ones that begin with a name of `only`, in the
    order of `sort`: the largest first where `-` precedes the column, those that lack it last.
    """
    for condition in options.get("where", []):
        holds = build_condition(condition, rows)
        rows = [row for row in rows if holds(row)]
    if rows and "only" in options:
        by_name = {str(next(iter(row.values()))): row for row in rows}
        rows = [by_name[name] for name in options["only"].split(",") if name in by_name]
    if "sort" in options:
        name = options["sort"].removeprefix("-")
        present = [row for row in rows if row.get(name) not in (None, "")]
        lacking = [row for row in rows if row.get(name) in (None, "")]
        present.sort(key=lambda row: row[name], reverse=options["sort"].startswith("-"))
        rows = present + lacking
    return rows


def choose_columns(rows: list[dict], options: dict, file: str) -> list[str]:
    """The columns that the options name, else the first ones of the rows."""
    if "columns" not in options:
        return list(rows[0])[:MOST_COLUMNS]
    columns = options["columns"].split(",")
    for name in columns:
        if not any(name in row for row in rows):
            hint = nearest(name, rows[0]) or f" (allowed: {', '.join(rows[0])})"
            raise BadInput(f"{file} has no column {name}{hint}")
    return columns


def cut_rows(block, num: int):
    """A block, of a table the first rows."""
    return Table(block.header, block.rows[:num]) if isinstance(block, Table) else block


def read_number(text, name: str) -> int:
    """The whole number of an option."""
    if not str(text).isdigit():
        raise BadInput(f"{name}={text} must be a whole number")
    return int(text)


def read_rows(e: Evidence, file: str, key: str = "") -> tuple[list[dict], dict]:
    """The rows of a CSV, JSON or YAML file, and the scores of constant answers that it holds.

    `key` leads into a JSON object, as in `a.b`. An object of objects has a row for each of them,
    with its `name`; of other values a row has `name` and `value`.
    """
    if file.endswith(".csv"):
        rows = []
        for row in e.csv(file):
            rows.append({name: to_number(text) for name, text in row.items()})
        return rows, {}
    document = e.document(file)
    constants = constants_of(document)
    value = look_up(document, key, file) if key else document
    if isinstance(value, list):
        return [dict(row) for row in value], constants
    if not isinstance(value, dict):
        raise BadInput(f"{file}: {key} is no table, but {plain(value)!r}: `value` shows it")
    if all(isinstance(item, dict) for item in value.values()):
        rows = [{"name": name} | item for name, item in value.items()]
        return rows, constants
    rows = []
    for name, item in value.items():
        if not isinstance(item, dict):
            rows.append({"name": name, "value": mark_score(name, plain_value(item), constants)})
    return rows, constants


def constants_of(document) -> dict:
    """The scores of constant answers in a JSON document; empty where it has none."""
    if not isinstance(document, dict):
        return {}
    constants = document.get("constant_baselines", document)
    return {name: value for name, value in constants.items() if name in CONSTANTS.values()}


def plain_value(item):
    """A value of a JSON or YAML file as a cell."""
    return item if isinstance(item, (int, float, str)) else plain(item)


def look_up(document, key: str, file: str):
    """The value at a path such as `a.b` in nested objects."""
    value = document
    for part in key.split("."):
        if not isinstance(value, dict) or part not in value:
            there = list(value) if isinstance(value, dict) else []
            raise BadInput(f"{file} has no {key}{nearest(part, there)}")
        value = value[part]
    return value


def to_number(text: str):
    """A cell of a CSV as an int or a float where it is one."""
    for kind in (int, float):
        try:
            return kind(text)
        except (TypeError, ValueError):
            pass
    return text


def build_value(e: Evidence, source: str, key: str, options: dict) -> str:
    """The text of `<!-- value FILE key -->`."""
    file = e.resolve(source)
    document = e.document(file)
    value = mark_score(key.rpartition(".")[2], look_up(document, key, file), constants_of(document))
    if isinstance(value, float) and "digits" in options:
        return f"{value:.{read_number(options['digits'], 'digits')}f}"
    return show(plain_value(value))


# several seeds


def build_seeds(e: Evidence, runs: list[str]) -> list:
    """The blocks of `<!-- seeds RUN... -->`: mean, deviation and interval of each score."""
    rows = [row | rates_of(row) for row in read_seeds(e, runs)]
    cells = []
    for title, name in SPREAD_SCORES.items():
        values = [row.get(name) for row in rows]
        if None not in values:
            text = spread_text(values, name, rows[0])
            cells.append([title, text, constant_of(name, rows[0])])
    blocks = [Table(["score on validation", "over the seeds", "constant answer"], cells)]
    thresholds = [row.get("threshold") for row in rows]
    if None not in thresholds:
        called = sum(row["called"] for row in rows) / len(rows)
        stored = f"The stored thresholds, {show(min(thresholds))} to {show(max(thresholds))},"
        words = f"{stored} are judged on the half of validation that did not choose them."
        share = f"{called:.0%} here, where {rows[0]['prevalence']:.0%} are tumour"
        blocks.append(Words(f"{words} {F2_SENTENCE}: {share}."))
    return blocks


def rates_of(row: dict) -> dict:
    """Recall and precision of a run at 0.5 and, where it has a threshold, the share of patches that
    it calls tumour at that.
    """
    hits, misses, false_alarms = (row.get(f"val_{name}") for name in ("tp", "fn", "fp"))
    rates = {}
    if hits is not None:
        rates["val_recall"] = hits / max(1, hits + misses)
        rates["val_precision"] = hits / max(1, hits + false_alarms)
    if "half_recall" in row:
        positive = row["prevalence"] * row["half_recall"]
        rates["called"] = positive + (1 - row["prevalence"]) * (1 - row["half_specificity"])
    return rates


def read_seeds(e: Evidence, runs: list[str]) -> list[dict]:
    """The runs of several seeds as rows. Raises BadInput for runs that differ in anything else,
    code included.
    """
    for run in runs:
        for name in ("config.yaml", "meta.json", "summary.json"):
            e.path(f"{run}/{name}")
    rows = [read_run(e.root / run) for run in runs]
    require_alike(rows, "seed")
    for sentence in differing(rows, "code", "commit and patch"):
        raise BadInput(f"{sentence}: seeds of different code are not averaged")
    return rows


def spread_text(values: list[float], name: str, constants: dict) -> str:
    """`mean ± deviation (95% interval a to b, n = 3)`, the interval within what is possible."""
    spread = mean_interval(values)
    high = spread["high"] if "loss" in name else min(1.0, spread["high"])
    interval = f"95% interval {max(0.0, spread['low']):.3f} to {high:.3f}, n = {spread['num']}"
    text = f"{spread['mean']:.3f} ± {spread['deviation']:.3f} ({interval})"
    return mark_score(name, spread["mean"], constants, text)


# tables by name


def tabulate_champion(e: Evidence, _commit: str) -> list:
    """The champion: what it is, and its scores beside those of constant answers."""
    folder = e.find_champion()
    summary, meta = e.document(f"{folder}/summary.json"), e.document(f"{folder}/meta.json")
    facts = fact_table(e.root / folder, read_run_config(e.root / folder), meta, summary)
    digest = file_digest(e.path(f"{folder}/best.pt"))
    facts.rows.append(("SHA-256 of best.pt", digest[:NUM_DIGITS]))
    return [facts, score_table(summary, summary, "val_")]


def tabulate_runs(e: Evidence, _commit: str) -> list:
    """Config, code, environment and scores of the runs that the journal shows."""
    folders = list(e.find_seeds())
    with contextlib.suppress(Missing):
        folders.append(e.find_champion())
    rows = []
    for folder in folders:
        row = read_run(e.root / folder)
        for name in ("config.yaml", "meta.json", "summary.json"):
            e.path(f"{folder}/{name}")
        config = file_digest(e.root / folder / "config.yaml")
        weights = row["weights_sha256"][:NUM_DIGITS]
        row |= {"config (SHA-256)": config[:NUM_DIGITS], "weights (SHA-256)": weights}
        row["AUC"] = mark_score("auc", row["val_auc"], row)
        rows.append(row)
    return [table_of(rows, RUN_COLUMNS)]


def tabulate_sources(_e: Evidence, commit: str) -> list:
    """The sources of non-determinism, and where the code of a commit controls each."""
    cells = []
    for row in locate_sources(lambda name: read_code(commit, name)):
        if row["where"]:
            cells.append([row["source"], row["control"], ", ".join(row["where"])])
    return [Table(["source", "control", f"where, at {commit[:10] or 'no commit'}"], cells)]


def tabulate_spikes(e: Evidence, _commit: str) -> list:
    """How many spikes the gradient norm of each seed has, when, and the largest."""
    rows = []
    for run in e.find_seeds():
        steps = e.csv(f"{run}/steps.csv")
        spikes = find_spikes(steps)
        row = {"seed": read_run(e.root / run)["seed"], "steps": len(steps), "spikes": len(spikes)}
        row["in the first epoch"] = sum(spike["epoch"] == 1 for spike in spikes)
        row["loss above the median"] = sum(spike["loss"] > spike["usual_loss"] for spike in spikes)
        if spikes:
            largest = max(spikes, key=lambda spike: spike["ratio"])
            row["largest"] = f"step {largest['step']}, {largest['ratio']:.1f} times the median"
        rows.append(row)
    words = f"A spike is a norm above {SPIKE:g} times the median of the {WINDOW} steps around it."
    return [table_of(rows), Words(words)]


NAMED_TABLES = {
    "champion": tabulate_champion,
    "runs": tabulate_runs,
    "non-determinism": tabulate_sources,
    "spikes": tabulate_spikes,
}
