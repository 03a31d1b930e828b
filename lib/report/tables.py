"""Tables and numbers of a journal, from the files that its directives name."""

import contextlib

from lib.blocks import Table, Words, show, table_of
from lib.command import BadInput
from lib.config import plain
from lib.report.evidence import NUM_DIGITS, Evidence, Missing
from lib.report.quotes import read_code
from lib.report.runs import SPREAD_SCORES, average_scores, differing, require_column, select_runs
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
    "images_per_s": "images/s",
    "auc": "AUC",
    "f2": "F2",
}
RUN_COLUMNS = ("run", "code", "environment", "job", "config (SHA-256)", "weights (SHA-256)", "AUC")
F2_SENTENCE = (
    "The stored thresholds are judged on the half of validation that did not choose them."
    " F2 = 5 TP / (5 TP + 4 FN + FP): a missed tumour costs as much as four false alarms, so"
    " a threshold that is chosen for F2 calls many patches tumour."
)


def build_table(
    e: Evidence, source: str, _champion="", *, columns="", rows=MOST_ROWS, where=(), sort=""
) -> list:
    """The blocks of `<!-- table NAME|FILE[:key] ... -->`: the rows that meet every `where`, in the
    order of `sort`, the largest first where `-` precedes the column.
    """
    if source in NAMED_TABLES:
        return NAMED_TABLES[source](e)
    file, _, key = source.partition(":")
    document = e.document(file)
    chosen = select_runs(list_rows(look_up(document, key, file), file), where, sort)
    if not chosen:
        return [Words("None.")]
    names = columns.split(",") if columns else list(chosen[0])[:MOST_COLUMNS]
    for name in names:
        require_column(name, chosen, file)
    constants = {"constant_auc": 0.5} | constants_of(document)
    shown = chosen[: int(rows)]
    cells = []
    for row in shown:
        # the `value` of a row with a `name` is a score of that name
        scores = {"value": row.get("name")}
        answers = constants | row
        cells.append([mark_score(scores.get(name, name), row.get(name), answers) for name in names])
    head = [WORDS.get(name, name.replace("_", " ")) for name in names]
    num_more = len(chosen) - len(shown)
    more = [Words(f"And {num_more:,} more, in {file}.")] if num_more else []
    return [Table(head, cells), *more]


def list_rows(value, source: str) -> list[dict]:
    """The rows of a list of objects; of an object of objects, each with its `name`; an object of
    other values is one row.
    """
    if isinstance(value, list):
        return [{name: to_number(row[name]) for name in row} for row in value]
    if not isinstance(value, dict):
        raise BadInput(f"{source}: {plain(value)!r} is no table: `value` shows it")
    if not all(isinstance(item, dict) for item in value.values()):
        return [value]
    return [{"name": name} | item for name, item in value.items()]


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
            raise BadInput(f"{file} has no {key}")
        value = names[part]
    return value


def to_number(value):
    """A cell of a CSV as an int or a float where it is one; other values as they are."""
    for kind in (int, float) if isinstance(value, str) else ():
        with contextlib.suppress(ValueError):
            return kind(value)
    return value


def build_value(e: Evidence, file: str, key: str, *, digits="") -> list:
    """The text of `<!-- value FILE key -->`."""
    document = e.document(file)
    value = look_up(document, key, file)
    text = f"{value:.{digits}f}" if digits and isinstance(value, float) else show(value)
    return [Words(mark_score(key.rpartition(".")[2], value, constants_of(document), text))]


def read_seeds(e: Evidence, runs: list[str]) -> list[dict]:
    """The runs of several seeds as rows. Raises BadInput for runs of different code."""
    rows = [e.run(run) for run in runs]
    for sentence in differing(rows, "code"):
        raise BadInput(f"{sentence}: seeds of different code are not averaged")
    return rows


def build_seeds(e: Evidence, *runs: str) -> list:
    """The blocks of `<!-- seeds RUN... -->`: mean, deviation and interval of each score."""
    rows = read_seeds(e, runs)
    blocks = [spread_table(average_scores(rows, "seed"), rows[0], "seeds")]
    if "threshold" in rows[0]:
        blocks.append(Words(F2_SENTENCE))
    return blocks


def spread_table(spreads: dict[str, dict], constants: dict, varied: str) -> Table:
    """The spreads of `average_scores` as `mean ± deviation (95% interval a to b, n = 3)`."""
    text = "{mean:.3f} ± {deviation:.3f} (95% interval {low:.3f} to {high:.3f}, n = {num})"
    cells = []
    for name, spread in spreads.items():
        shown = mark_score(name, spread["mean"], constants, text.format(**spread))
        cells.append([SPREAD_SCORES[name], shown, constant_of(name, constants)])
    return Table(["score on validation", f"over the {varied}", "constant answer"], cells)


# tables by name


def tabulate_champion(e: Evidence) -> list:
    """The champion: what it is, and its scores beside those of constant answers."""
    (folder,) = e.find("champion")
    summary = e.document(f"{folder}/summary.json")
    meta = e.document(f"{folder}/meta.json")
    e.path(f"{folder}/best.pt")
    epochs = e.document(f"{folder}/epochs.csv")
    cfg = read_run_config(e.root / folder)
    facts = fact_table(e.root / folder, cfg, meta, summary, epochs)
    return [facts, score_table(summary, summary, "val_")]


def tabulate_runs(e: Evidence) -> list:
    """Config, code, environment and scores of the runs that the journal shows."""
    folders = list(e.find("seeds"))
    with contextlib.suppress(Missing):
        folders += e.find("champion")
    rows = []
    for folder in folders:
        row = e.run(folder)
        row["config (SHA-256)"] = e.sources[f"{folder}/config.yaml"][:NUM_DIGITS]
        row["weights (SHA-256)"] = row.get("weights_sha256", "")[:NUM_DIGITS]
        row["AUC"] = mark_score("auc", row.get("val_auc"), row)
        rows.append(row)
    return [table_of(rows, RUN_COLUMNS)]


def tabulate_sources(e: Evidence) -> list:
    """The sources of non-determinism, and where the code of the runs controls each."""
    commit = e.commit()
    cells = []
    for row in locate_sources(lambda name: read_code(commit, name)):
        if row["where"]:
            cells.append([row["source"], row["control"], ", ".join(row["where"])])
    return [Table(["source", "control", f"where, at {commit[:10]}"], cells)]


NAMED_TABLES = {
    "champion": tabulate_champion,
    "runs": tabulate_runs,
    "non-determinism": tabulate_sources,
}
