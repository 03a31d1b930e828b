"""The audit of a PCam folder: one survey, the checks on it, and the files that they leave."""

import json
import shlex
import shutil
import tempfile
from pathlib import Path

import numpy as np

from lib.audit import build_finding, say_finding
from lib.audit.copies import link_groups
from lib.audit.data.balance import check_balance
from lib.audit.data.drift import check_drift
from lib.audit.data.duplicates import Copies, check_duplicates, find_copies
from lib.audit.data.files import check_files
from lib.audit.data.groups import check_groups
from lib.audit.data.labels import check_labels
from lib.audit.data.leakage import check_leakage
from lib.audit.data.triggers import check_triggers, unique_rows
from lib.audit.data.unusual import check_unusual
from lib.audit.data.values import check_values
from lib.audit.data_page import feature_histograms, plot_suspects, write_data_page
from lib.audit.plant import REASONS_OF, judge_power, measure_power, write_copies
from lib.audit.survey import Survey, survey_folder
from lib.command import BadInput, say
from lib.config import load_config
from lib.figures import figure_png
from lib.files import write_csv, write_json
from lib.groups import group_of_rows
from lib.pcam import open_split
from lib.splitwriter import sole_writer

WORK = ".work."  # begins the name of the folder of temporary files in OUT
# errors that no list of patches to leave out mends
BLOCKING = (
    *("unreadable split", "agreement of x and y", "exchanged splits", "labels", "one class"),
    *("labels: misaligned", "triggers", "meta"),
)
QUARANTINE = ("split", "index", "reason", "score")


class Audit:
    """An audit as it goes on: its findings are printed once each, and the files in `out` follow
    after each check. Without `out` nothing is printed or written.
    """

    def __init__(self, directory: Path, out: Path | None, work) -> None:
        self.directory, self.out, self.work = directory, out, work
        self.surveys, self.findings, self.failed, self.power = [], [], [], []
        self.copies = None
        self.skipped = []  # checks that were not asked for

    def add(self, findings: list[dict]) -> None:
        """Take findings that are not there yet, and write all."""
        known = {describe(row) for row in self.findings}
        new = {describe(row): row for row in findings if describe(row) not in known}
        self.findings += new.values()
        if self.out:
            for row in new.values():
                say_finding(row)
            self.write()

    def write(self) -> Path:
        """Write findings.json, the tables and the page; gives the page."""
        write_findings(self.out, self.findings)
        if self.power:
            write_csv(self.out / "power.csv", self.power[0], [row.values() for row in self.power])
        title = f"Data audit of {self.directory}"
        sentences = self.conclude()
        page = self.out / "audit.html"
        return write_data_page(page, title, sentences, self.surveys, self.findings, self.power)

    def conclude(self) -> list[str]:
        """The verdict in three sentences."""
        return conclude(self.directory, self.out, self.findings, self.failed, self.skipped)

    def find_copies(self) -> Copies:
        """Copies among all patches, found once."""
        self.copies = self.copies or find_copies(self.surveys)
        return self.copies

    def find_groups(self) -> dict[str, np.ndarray]:
        """The group of each row (N,) of each split: its slide, else what shares tissue with it."""
        groups = {}
        for number, survey in enumerate(self.surveys):
            groups[survey.name] = survey.slides
            if survey.slides is None:
                copies = self.find_copies()
                linked = link_groups(copies.first, copies.overlaps)
                groups[survey.name] = linked[copies.split == number]
        return groups


def describe(row: dict) -> tuple:
    return row["check"], row["split"], row["measured"]


def audit_data(
    directory,
    out: Path,
    checks,
    overrides: list[str],
    device="auto",
    plant=False,
    runs=(),
    train_folds=False,
) -> dict:
    """Audit a folder into OUT; gives counts for the terminal. Raises BadInput where there is
    nothing to audit.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise BadInput(f"{directory}: no such folder")
    if directory.resolve() == out.resolve():
        raise BadInput(f"{directory}: OUT may not be the data themselves")
    load_config(overrides=overrides)  # whatever is wrong with it is said before an hour's work

    def judge_labels(audit: Audit) -> list[dict]:
        train = next((survey for survey in audit.surveys if survey.name == "train"), None)
        logits = None
        if (runs or train_folds) and audit.out:
            from lib.audit.data import folds  # which brings all that training needs

            if train is None:
                raise BadInput("there is no train split for the folds")
            trained = runs
            if train_folds:
                is_grouped = group_of_rows(open_split(directory, "train"), directory) is not None
                if not is_grouped:
                    audit.add(check_groups(directory))
                trained = folds.train_folds(directory, train, out, overrides, device)
            logits = folds.predict_folds(directory, train, trained, device)
        return check_labels(audit.surveys, audit.find_groups(), audit.out or audit.work, logits)

    with sole_writer(out):
        clear(out)
        with tempfile.TemporaryDirectory(dir=out, prefix=WORK, ignore_cleanup_errors=True) as work:
            audit = Audit(directory, out, work)
            run_checks(audit, checks, overrides, judge_labels)
            if plant and audit.surveys:
                audit.power = plant_and_find(audit, checks, overrides, judge_labels)
                audit.add(judge_power(audit.power))
            if bins := feature_histograms(audit.surveys):
                write_csv(out / "histograms.csv", bins[0], [row.values() for row in bins])
            if gallery := plot_suspects(audit.surveys, audit.findings):
                (out / "suspects.png").write_bytes(figure_png(gallery))
            page = audit.write()
    for sentence in audit.conclude():
        say(sentence)
    severities = [row["severity"] for row in audit.findings]
    return {
        "num_errors": severities.count("error"),
        "num_warnings": severities.count("warning"),
        "not_run": audit.failed,
        "num_suspects": len(quarantine_rows(audit.findings)),
        "page": str(page),
    }


def run_checks(audit: Audit, checks, overrides, judge_labels) -> None:
    """Survey the folder of an audit and run checks on it."""
    if set(checks) - {"groups"}:  # which reads patches its own way
        audit.surveys, findings = survey_folder(audit.directory, audit.work)
        lost = {row["split"] for row in findings if row["check"] == "unreadable split"}
        audit.failed += sorted(lost)
        audit.add(findings)
    surveys = audit.surveys

    def over_splits(check) -> list[dict]:
        return [row for number, survey in enumerate(surveys) for row in check(number, survey)]

    def find_triggers(number: int, survey: Survey) -> list[dict]:
        return check_triggers(survey, unique_rows(survey, number, audit.find_copies()))

    run = {
        "groups": lambda: check_groups(audit.directory),
        "files": lambda: check_files(audit.directory, surveys, audit.work),
        "values": lambda: over_splits(lambda _, survey: check_values(survey)),
        "unusual": lambda: check_unusual(surveys),
        "balance": lambda: check_balance(surveys, load_config(overrides=overrides)),
        "duplicates": lambda: check_duplicates(surveys, audit.find_copies()),
        "leakage": lambda: check_leakage(surveys, audit.find_copies()),
        "drift": lambda: check_drift(surveys),
        "triggers": lambda: over_splits(find_triggers),
        "labels": lambda: judge_labels(audit),
    }
    audit.skipped = [name for name in run if name not in checks and name != "groups"]
    for name in checks:
        if not surveys and name != "groups":
            audit.failed.append(name)
            continue
        try:
            audit.add(run[name]() or [build_finding(name, "note", "nothing found")])
        except BadInput as error:
            audit.failed.append(name)
            measured = f"this check could not run: {error}"
            audit.add([build_finding(name, "error", measured, advice="mend that and audit again")])


def conclude(directory, out, findings: list[dict], failed: list, skipped: list) -> list[str]:
    """Three sentences: whether the data can be trained on, what to leave out, what to run next."""
    errors = [row for row in findings if row["severity"] == "error"]
    blocking = sorted({row["check"] for row in errors if row["check"] in BLOCKING})
    certain = load_config().quarantine_reasons
    rows = quarantine_rows(findings)
    left_out = {(row["split"], row["index"]) for row in rows if row["reason"] in certain}
    others = sorted({row["reason"] for row in rows} - set(certain))
    quarantine = f"quarantine={shlex.quote(str(out / 'quarantine.csv'))}"
    train = f"python train.py data_dir={shlex.quote(str(directory))}"
    if blocking or failed:
        reasons = ", ".join(blocking + [f"{name} was not checked" for name in failed])
        verdict = f"Do not train on these data yet: {reasons}."
        following = "Mend that, then run this audit again."
    elif left_out:
        verdict = "These data can be trained on without their damaged patches."
        following = f"Next, run `{train} {quarantine}`."
    else:
        verdict = "These data can be trained on."
        following = f"Next, run `{train}`."
    if skipped and not (blocking or failed):
        verdict = f"Nothing that was checked forbids training; not checked: {', '.join(skipped)}."
    leave = f"{len(left_out):,} damaged patches are left out by `{quarantine}`"
    if not left_out:
        leave = "Nothing has to be left out"
    if others:
        leave += f"; look at those listed as {', '.join(others)}"
    return [verdict, f"{leave}.", following]


def clear(out: Path) -> None:
    """Remove what an earlier audit has left in OUT, its temporary files if it was killed too; runs
    of folds stay.
    """
    for leftover in out.glob(f"{WORK}*"):
        # NFS keeps what was still open under another name
        shutil.rmtree(leftover, ignore_errors=True)
    if not (out / "findings.json").exists():
        return
    checks = {found["check"] for found in json.loads((out / "findings.json").read_text())}
    tables = ("quarantine.csv", "power.csv", "out_of_fold.csv", "histograms.csv")
    figures = ("counts.png", "histograms.png", "suspects.png")
    for name in (*map(csv_name, checks), *tables, *figures, "audit.html", "findings.json"):
        (out / name).unlink(missing_ok=True)


def csv_name(check: str) -> str:
    return f"{check.replace(': ', '_').replace(' ', '_')}.csv"


def write_findings(out: Path, findings: list[dict]) -> None:
    """Write the rows of each check as a CSV, quarantine.csv, and, last, findings.json."""
    write_csv(
        out / "quarantine.csv", QUARANTINE, [row.values() for row in quarantine_rows(findings)]
    )
    by_check = {}
    for found in findings:
        by_check.setdefault(csv_name(found["check"]), []).extend(found["rows"])
    for name, rows in by_check.items():
        if rows:
            header = list(dict.fromkeys(key for row in rows for key in row))
            write_csv(out / name, header, [[row.get(key, "") for key in header] for row in rows])
    write_json(out / "findings.json", findings)


def quarantine_rows(findings: list[dict]) -> list[dict]:
    """Suspect samples, one row for each sample and reason, with the highest of its scores."""
    suspects = {}
    for row in (row for found in findings for row in found["rows"] if row.get("reason")):
        key = row["split"], int(row["index"]), row["reason"]
        suspects[key] = max(suspects.get(key, 0.0), float(row["score"]))
    return [
        {**dict(zip(QUARANTINE, key, strict=False)), "score": round(score, 4)}
        for key, score in sorted(suspects.items())
    ]


def plant_and_find(audit: Audit, checks, overrides, judge_labels) -> list[dict]:
    """The power of the checks on a copy of part of the data with damage planted, against the same
    part as it is.
    """
    say("planting damage into a copy of these data, to see what is found of it")
    copies, found = audit.find_copies(), {}
    rows_of = {
        survey.name: unique_rows(survey, number, copies)
        for number, survey in enumerate(audit.surveys)
    }
    clean, planted = Path(audit.work, "clean"), Path(audit.work, "planted")
    truth = write_copies(audit.surveys, rows_of, clean, planted)
    wanted = [name for name in checks if name in REASONS_OF]
    for folder in (clean, planted):
        say(f"auditing the {folder.name} copy")
        copy = Audit(folder, None, folder)
        run_checks(copy, wanted, overrides, judge_labels)
        found[folder] = quarantine_rows(copy.findings)
    power = measure_power(truth, found[planted], found[clean])
    checked = {reason for name in wanted for reason in REASONS_OF[name]}
    return [row for row in power if checked & set(row["reason"].split())]
