"""Tables and numbers of a journal, from the files that its directives name."""

import contextlib
import dataclasses

from lib.blocks import Table, Words, show, table_of
from lib.command import BadInput, nearest
from lib.config import plain
from lib.files import file_digest
from lib.report.drawings import SPIKE, WINDOW, find_spikes
from lib.report.evidence import NUM_DIGITS, Evidence, Missing
from lib.report.quotes import read_code
from lib.report.runs import (
    differing,
    read_run,
    require_alike,
    require_column,
    score_interval,
    select_runs,
)
from lib.rundir import read_run_config
from lib.runpage import CONSTANTS, constant_of, fact_table, mark_score, score_table
from lib.sources import locate_sources

# of a table, unless its directive asks for more
MOST_ROWS = 8
MOST_COLUMNS = 7
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


def build_table(
    e: Evidence,
    source: str,
    _champion: str = "",
    columns: str = "",
    rows: int = MOST_ROWS,
    where=(),
    only: str = "",
    sort: str = "",
    at: str = "",
) -> list:
    """The blocks of `<!-- table NAME|FILE[:key] ... -->`: the rows that meet every `where`, of
    those the ones that begin with a name of `only`, in the order of `sort`, the largest first
    where `-` precedes the column.
    """
    if source in NAMED_TABLES:
        return [cut_rows(block, rows) for block in NAMED_TABLES[source](e, at)]
    file, _, key = source.partition(":")
    chosen, constants = read_rows(e, file, key)
    column = sort.removeprefix("-")
    chosen = select_runs(chosen, where)
    if only:
        by_name = {str(next(iter(row.values()))): row for row in chosen}
        chosen = [by_name[name] for name in only.split(",") if name in by_name]
    chosen = select_runs(chosen, (), column, descending=sort != column)
    if not chosen:
        return [Words("None.")]
    names = columns.split(",") if columns else list(chosen[0])[:MOST_COLUMNS]
    for name in names:
        require_column(name, chosen, file)
    cells = []
    for row in chosen[:rows]:
        constants_of_row = {"constant_auc": 0.5} | constants | row
        # the `value` of a row with a `name` is a score of that name
        scores = {name: name for name in names} | {"value": str(row.get("name"))}
        cells.append([mark_score(scores[name], row.get(name), constants_of_row) for name in names])
    head = [WORDS.get(name, name.replace("_", " ")) for name in names]
    num_more = len(chosen) - len(cells)
    more = [Words(f"And {num_more:,} more, in {file}.")] if num_more else []
    return [Table(head, cells), *more]


def cut_rows(block, num: int):
    """A block, of a table the first rows."""
    return dataclasses.replace(block, rows=block.rows[:num]) if isinstance(block, Table) else block


def read_rows(e: Evidence, file: str, key: str = "") -> tuple[list[dict], dict]:
    """The rows of a CSV, JSON or YAML file, and the scores of constant answers that it holds.

    `key` leads into a JSON object, as in `a.b`. An object of objects has a row for each of them,
    with its `name`; of other values a row has `name` and `value`.
    """
    if file.endswith(".csv"):
        rows = e.csv(file)
        return [dict(zip(row, map(to_number, row.values()), strict=True)) for row in rows], {}
    document = e.document(file)
    value = look_up(document, key, file)
    if isinstance(value, list):
        return value, constants_of(document)
    if not isinstance(value, dict):
        raise BadInput(f"{file}: {key} is no table, but {plain(value)!r}: `value` shows it")
    rows = []
    values = []
    for name, item in value.items():
        if isinstance(item, dict):
            rows.append({"name": name} | item)
        else:
            values.append({"name": name, "value": item})
    return values or rows, constants_of(document)


def constants_of(document) -> dict:
    """The scores of constant answers in a JSON document; empty where it has none."""
    if not isinstance(document, dict):
        return {}
    constants = document.get("constant_baselines", document)
    return {name: constants[name] for name in CONSTANTS.values() if name in constants}


def look_up(document, key: str, file: str):
    """The value at a path such as `a.b` in nested objects; the whole document without a path."""
    value = document
    for part in key.split(".") if key else []:
        names = value if isinstance(value, dict) else {}
        if part not in names:
            raise BadInput(f"{file} has no {key}{nearest(part, names)}")
        value = names[part]
    return value


def to_number(text: str):
    """A cell of a CSV as an int or a float where it is one."""
    for kind in (int, float):
        with contextlib.suppress(ValueError):
            return kind(text)
    return text


def build_value(e: Evidence, file: str, key: str, digits: int | None = None) -> list:
    """The text of `<!-- value FILE key -->`."""
    document = e.document(file)
    name = key.rpartition(".")[2]
    value = mark_score(name, look_up(document, key, file), constants_of(document))
    is_rounded = isinstance(value, float) and digits is not None
    return [Words(f"{value:.{digits}f}" if is_rounded else show(value))]


# several seeds


def build_seeds(e: Evidence, *runs: str) -> list:
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
        words = (
            f"The stored thresholds, {show(min(thresholds))} to {show(max(thresholds))}, are judged"
            f" on the half of validation that did not choose them. {F2_SENTENCE}: {called:.0%}"
            f" here, where {rows[0]['prevalence']:.0%} are tumour."
        )
        blocks.append(Words(words))
    return blocks


def rates_of(row: dict) -> dict:
    """Recall and precision of a run at 0.5 and, where it has a threshold, the share of patches that
    it calls tumour at that.
    """
    hits, misses, false_alarms = (row[f"val_{name}"] for name in ("tp", "fn", "fp"))
    rates = {
        "val_recall": hits / max(1, hits + misses),
        "val_precision": hits / max(1, hits + false_alarms),
    }
    if "half_recall" in row:
        positive = row["prevalence"] * row["half_recall"]
        rates["called"] = positive + (1 - row["prevalence"]) * (1 - row["half_specificity"])
    return rates


def read_seeds(e: Evidence, runs: list[str]) -> list[dict]:
    """The runs of several seeds as rows. Raises BadInput for runs that differ in anything else,
    code included.
    """
    rows = [e.run(run) for run in runs]
    require_alike(rows, "seed")
    for sentence in differing(rows, "code", "commit and patch"):
        raise BadInput(f"{sentence}: seeds of different code are not averaged")
    return rows


def spread_text(values: list[float], name: str, constants: dict) -> str:
    """`mean ± deviation (95% interval a to b, n = 3)`."""
    spread = score_interval(values, name)
    text = "{mean:.3f} ± {deviation:.3f} (95% interval {low:.3f} to {high:.3f}, n = {num})"
    return mark_score(name, spread["mean"], constants, text.format(**spread))


def tabulate_spreads(spreads: dict[str, dict], constants: dict) -> Table:
    """The spreads of `average_scores` over seeds, folds or both: a row a score."""
    columns = ("mean", "deviation", "low", "high", "num")
    header = ["score", "constant answer"]
    cells = {}
    for varied, scores in spreads.items():
        header += [f"{name} over {varied}" for name in columns]
        for score, spread in scores.items():
            row = cells.setdefault(score, [score, constant_of(score, constants)])
            shown = spread | {"mean": mark_score(score, spread["mean"], constants)}
            row += [shown[name] for name in columns]
    return Table(header, list(cells.values()))


# tables by name


def tabulate_champion(e: Evidence, _commit: str) -> list:
    """The champion: what it is, and its scores beside those of constant answers."""
    folder = e.find_champion()
    summary = e.document(f"{folder}/summary.json")
    meta = e.document(f"{folder}/meta.json")
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
        row = e.run(folder)
        row["config (SHA-256)"] = e.sources[f"{folder}/config.yaml"][:NUM_DIGITS]
        row["weights (SHA-256)"] = row["weights_sha256"][:NUM_DIGITS]
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
        row["loss above the median"] = sum(spike["has_high_loss"] for spike in spikes)
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
