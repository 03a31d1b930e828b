"""Tables and numbers of a journal, from the files that its directives name."""

from pathlib import Path

from lib.blocks import Table, Words, show, table_of
from lib.command import BadInput, nearest
from lib.config import plain
from lib.files import file_digest
from lib.metrics import mean_interval
from lib.report.drawings import SPIKE, WINDOW, find_spikes
from lib.report.evidence import NUM_DIGITS, Evidence, Missing
from lib.report.quotes import read_code
from lib.report.runs import build_condition, differing, read_run, require_alike
from lib.runpage import SHOWN_SCORES
from lib.sources import locate_sources

MOST_ROWS, MOST_COLUMNS = 8, 7  # of a table, unless its directive asks for more
CONSTANTS = dict(SHOWN_SCORES.values())  # a score and what a constant answer gets
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
F2_SENTENCE = (
    "F2 = 5 TP / (5 TP + 4 FN + FP): a missed tumour costs as much as four false alarms, so a"
    " threshold that is chosen for F2 calls many patches tumour"
)


def build_table(e: Evidence, source: str, options: dict) -> list:
    """The blocks of `<!-- table NAME|FILE[:key] ... -->`."""
    num_shown = read_number(options.get("rows", MOST_ROWS), "rows")
    if source in NAMED_TABLES:
        table, *words = NAMED_TABLES[source](e, options.get("at", ""))
        return [Table(table.header, table.rows[:num_shown]), *words]
    file, _, key = e.resolve(source).partition(":")
    rows, constants = read_rows(e, file, key)
    for condition in options.get("where", []):
        holds = build_condition(condition, rows)
        rows = [row for row in rows if holds(row)]
    if options.get("only"):
        names = options["only"].split(",")
        first = next(iter(rows[0]), "") if rows else ""
        rows = [row for name in names for row in rows if str(row[first]) == name]
    if options.get("sort"):
        rows = sort_rows(rows, options["sort"])
    if not rows:
        return [Words("None.")]
    columns = options.get("columns", "").split(",") if options.get("columns") else None
    for name in columns or []:
        if not any(name in row for row in rows):
            allowed = list(rows[0])
            hint = nearest(name, allowed) or f" (allowed: {', '.join(allowed)})"
            raise BadInput(f"{file} has no column {name}{hint}")
    columns = columns or list(rows[0])[:MOST_COLUMNS]
    cells = []
    for row in rows[:num_shown]:
        known = {"constant_auc": 0.5} | constants | row
        cells.append([mark_score(name, row.get(name), known) for name in columns])
    head = [WORDS.get(name, name.replace("_", " ")) for name in columns]
    num_more = len(rows) - len(cells)
    more = [Words(f"And {num_more:,} more, in {file}.")] if num_more else []
    return [Table(head, cells), *more]


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


def sort_rows(rows: list[dict], by: str) -> list[dict]:
    """The rows by a column, the largest first where `-` precedes its name; those that lack it
    last.
    """
    name = by.removeprefix("-")
    present = [row for row in rows if row.get(name) not in (None, "")]
    present.sort(key=lambda row: row[name], reverse=by.startswith("-"))
    return present + [row for row in rows if row.get(name) in (None, "")]


def mark_score(name: str, value, constants: dict):
    """A value; of a score that is worse than a constant answer a text that says so."""
    score = name.removeprefix("val_").removeprefix("half_")
    constant = constants.get(CONSTANTS.get(score))
    if not isinstance(value, (int, float)) or not isinstance(constant, (int, float)):
        return value
    is_worse = value > constant if score == "loss" else value < constant
    return f"{show(value)} {worse_than(constant)}" if is_worse else value


def worse_than(constant: float) -> str:
    return f"**(worse than the constant answer, {show(constant)})**"


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
    rows = read_seeds(e, runs)
    scores = {}
    for title, (score, constant) in SHOWN_SCORES.items():
        at = "" if "AUC" in title or "loss" in title else " at 0.5"
        values = [row.get(f"val_{score}") for row in rows]
        scores[title + at] = (values, score, rows[0].get(constant))
    scores["recall at 0.5"] = ([share(row, "val_fn") for row in rows], "recall", None)
    scores["precision at 0.5"] = ([share(row, "val_fp") for row in rows], "precision", None)
    for score in ("f2", "recall", "precision"):
        title = f"{WORDS.get(score, score)} at the stored threshold"
        constant = rows[0].get(CONSTANTS.get(score))
        scores[title] = ([row.get(f"half_{score}") for row in rows], score, constant)
    cells = []
    for title, (values, score, constant) in scores.items():
        if None not in values:
            text = spread_text(values, score, constant)
            cells.append([title, text, constant])
    table = Table(["score on validation", "mean ± standard deviation", "constant answer"], cells)
    note = "The runs differ in the seed alone"
    thresholds = [row.get("threshold") for row in rows]
    if None not in thresholds:
        low, high = min(thresholds), max(thresholds)
        chosen = f"the stored thresholds, {show(low)} to {show(high)}, are judged on the half"
        note += f"; {chosen} of validation that did not choose them. {F2_SENTENCE}"
        note += f": {called_share(rows):.0%} here, where {rows[0]['prevalence']:.0%} are tumour"
    return [table, Words(f"{note}.")]


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


def share(row: dict, errors: str):
    """True positives among themselves and the false answers `errors` of a run."""
    hits, misses = row.get("val_tp"), row.get(errors)
    if hits is None or misses is None:
        return None
    return hits / max(1, hits + misses)


def called_share(rows: list[dict]) -> float:
    """The share of patches that the runs call tumour at their stored thresholds, on average."""
    shares = []
    for row in rows:
        prevalence = row["prevalence"]
        false_alarms = (1 - prevalence) * (1 - row["half_specificity"])
        shares.append(prevalence * row["half_recall"] + false_alarms)
    return sum(shares) / len(shares)


def spread_text(values: list[float], score: str, constant) -> str:
    """`mean ± deviation (95% interval a to b, n = 3)`, the interval within what is possible."""
    spread = mean_interval(values)
    low = max(0.0, spread["low"])
    high = spread["high"] if score == "loss" else min(1.0, spread["high"])
    interval = f"95% interval {low:.3f} to {high:.3f}, n = {spread['num']}"
    text = f"{spread['mean']:.3f} ± {spread['deviation']:.3f} ({interval})"
    is_worse = isinstance(mark_score(score, spread["mean"], {CONSTANTS.get(score): constant}), str)
    return f"{text} {worse_than(constant)}" if is_worse else text


# tables by name


def tabulate_champion(e: Evidence, _commit: str) -> list:
    """The champion: what it is, and its scores beside those of constant answers."""
    folder = e.find_champion()
    summary = e.document(f"{folder}/summary.json")
    meta = e.document(f"{folder}/meta.json")
    checkpoint = e.path(f"{folder}/best.pt")
    num_train = meta.get("rows", {}).get("train", {}).get("num")
    facts = [
        ["model", meta.get("model", {}).get("name"), None],
        ["trained on", f"{show(num_train)} patches, {summary['num_epochs']} epochs", None],
        ["code", read_run(e.root / folder)["code"] or "no commit", None],
        ["best.pt, SHA-256", file_digest(checkpoint)[:NUM_DIGITS], None],
    ]
    for title, (score, constant) in SHOWN_SCORES.items():
        value = mark_score(score, summary.get(f"val_{score}"), summary)
        facts.append([f"{title} on validation", value, summary.get(constant)])
    if "half_f2" in summary:
        threshold = show(summary["threshold"])
        value = mark_score("f2", summary["half_f2"], summary)
        facts.append([f"F2 at the threshold {threshold}", value, summary["always_positive_f2"]])
    return [Table(["what", "champion", "constant answer"], facts)]


def tabulate_runs(e: Evidence, _commit: str) -> list:
    """Config, code, machine and scores of the runs that the journal shows."""
    folders = list(e.seeds)
    try:
        folders.append(e.find_champion())
    except Missing:
        folders = folders or e.find_seeds()
    rows = []
    for folder in folders:
        meta, summary = e.document(f"{folder}/meta.json"), e.document(f"{folder}/summary.json")
        config = e.path(f"{folder}/config.yaml")
        machine = f"{meta['machine'].get('gpu') or meta['machine'].get('cpu')}"
        row = {
            "run": Path(folder).name,
            "code": read_run(e.root / folder)["code"] or "no commit",
            "config, SHA-256": file_digest(config)[:NUM_DIGITS],
            "environment": f"torch {meta['versions']['torch']}, {machine}",
            "job": meta.get("job", {}).get("SLURM_JOB_ID", "none"),
            "AUC": mark_score("auc", summary["val_auc"], summary),
            "weights, SHA-256": summary["weights_sha256"][:NUM_DIGITS],
        }
        rows.append(row)
    return [table_of(rows)]


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
