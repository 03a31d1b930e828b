"""The audit of a PCam folder: one survey, the checks on it, and the files that they leave."""

import json
import shlex
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np

from lib.audit import build_finding, say_finding
from lib.audit.data.balance import check_balance
from lib.audit.data.drift import check_drift
from lib.audit.data.duplicates import Copies, check_duplicates, find_copies
from lib.audit.data.files import check_files
from lib.audit.data.groups import check_groups
from lib.audit.data.labels import check_labels
from lib.audit.data.leakage import check_leakage
from lib.audit.data.triggers import check_triggers
from lib.audit.data.unusual import check_unusual
from lib.audit.data.values import check_values
from lib.audit.data_page import draw_splits, plot_suspects, write_data_page
from lib.audit.plant import REASONS_OF, judge_power, measure_power, write_copies
from lib.audit.survey import survey_folder
from lib.command import BadInput, say
from lib.config import load_config
from lib.files import write_csv, write_json
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

    `predict` gives the logits of train by folds, from the audit, or None.
    """

    def __init__(self, directory: Path, out: Path | None, work, cfg, predict: Callable) -> None:
        self.directory, self.out, self.work = directory, out, work
        self.cfg, self.predict = cfg, predict
        self.surveys, self.findings, self.failed, self.power = [], [], [], []
        self.copies, self.figures = None, []
        self.skipped = []  # checks that were not asked for

    def add(self, findings: list[dict]) -> None:
        """Take findings, and write all."""
        self.findings += findings
        if self.out:
            for row in findings:
                say_finding(row)
            self.write()

    def write(self) -> Path:
        """Write findings.json, the tables and the page; gives the page."""
        write_findings(self.out, self.findings)
        if self.power:
            write_csv(self.out / "power.csv", self.power[0], [row.values() for row in self.power])
        return write_data_page(self)

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
                groups[survey.name] = self.find_copies().of_split(number)
        return groups

    def unique_rows(self) -> dict[str, np.ndarray]:
        """The intact rows of each split, copies once."""
        rows_of = {}
        for number, survey in enumerate(self.surveys):
            linked = self.find_copies().of_split(number, has_overlaps=False)
            _, first = np.unique(linked, return_index=True)
            rows_of[survey.name] = np.intersect1d(first, survey.intact)
        return rows_of

    def run_checks(self, checks) -> None:
        """Survey the folder and run checks on it."""
        if set(checks) - {"groups"}:  # which reads patches its own way
            self.surveys, findings = survey_folder(self.directory, self.work)
            lost = {row["split"] for row in findings if row["check"] == "unreadable split"}
            self.failed += sorted(lost)
            if self.out and self.surveys:
                self.figures = draw_splits(self.out, self.surveys)
            self.add(findings)
        surveys = self.surveys
        run = {
            "groups": lambda: check_groups(self.directory),
            "files": lambda: check_files(self.directory, surveys),
            "values": lambda: sum(map(check_values, surveys), []),
            "unusual": lambda: check_unusual(surveys),
            "balance": lambda: check_balance(surveys, self.cfg),
            "duplicates": lambda: check_duplicates(surveys, self.find_copies()),
            "leakage": lambda: check_leakage(surveys, self.find_copies()),
            "drift": lambda: check_drift(surveys),
            "triggers": lambda: check_triggers(surveys, self.unique_rows()),
            "labels": lambda: check_labels(
                surveys, self.find_groups(), self.out or self.work, self.predict(self)
            ),
        }
        self.skipped = [name for name in run if name not in checks and name != "groups"]
        for name in checks:
            if not surveys and name != "groups":
                self.failed.append(name)
                continue
            try:
                self.add(run[name]() or [build_finding(name, "note", "nothing found")])
            except BadInput as error:
                self.failed.append(name)
                measured, advice = f"this check could not run: {error}", "mend that, audit again"
                self.add([build_finding(name, "error", measured, "", advice)])

    def plant(self, checks) -> None:
        """Measure the power of the checks on a copy of part of the data with damage planted,
        against the same part as it is.
        """
        say("planting damage into a copy of these data, to see what is found of it")
        clean, planted = Path(self.work, "clean"), Path(self.work, "planted")
        truth = write_copies(self.surveys, self.unique_rows(), clean, planted)
        checks = [name for name in checks if name in REASONS_OF]
        flagged = []
        for folder in (planted, clean):
            say(f"auditing the {folder.name} copy")
            copy = Audit(folder, None, folder, self.cfg, lambda _: None)
            copy.run_checks(checks)
            flagged.append(quarantine_rows(copy.findings))
        checked = " ".join(REASONS_OF[name] for name in checks)
        power = measure_power(truth, *flagged)
        self.power = [row for row in power if row["reason"] in checked]
        self.add(judge_power(self.power))

    def conclude(self) -> list[str]:
        """Three sentences: whether the data can be trained on, what to leave out, what to run
        next.
        """
        names = {row["check"] for row in self.findings if row["severity"] == "error"}
        blocking = sorted(names.intersection(BLOCKING))
        blocking += [f"{name} was not checked" for name in self.failed]
        unchecked = list(self.skipped)
        for row in self.findings:
            if (row["check"], row["advice"]) == ("unusual", "not checked"):
                unchecked.append("the looks of patches, too few to compare")
        certain = load_config().quarantine_reasons
        left_out, others = set(), set()
        for row in quarantine_rows(self.findings):
            if row["reason"] in certain:
                left_out.add((row["split"], row["index"]))
            else:
                others.add(row["reason"])
        train = f"python train.py data_dir={shlex.quote(str(self.directory))}"
        leave = "Nothing has to be left out"
        verdict = "These data can be trained on"
        if left_out:
            quarantine = f"quarantine={shlex.quote(str(self.out / 'quarantine.csv'))}"
            train += f" {quarantine}"
            leave = f"{len(left_out):,} damaged patches are left out by `{quarantine}`"
            verdict += " without their damaged patches"
        following = f"Next, run `{train}`."
        if unchecked:
            verdict += f", as far as was checked; not checked: {', '.join(unchecked)}"
        if blocking:
            verdict = f"Do not train on these data yet: {', '.join(blocking)}"
            following = "Mend that, then run this audit again."
        if others:
            leave += f"; look at those listed as {', '.join(sorted(others))}"
        return [f"{verdict}.", f"{leave}.", following]


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
    cfg = load_config(overrides=overrides)  # what is wrong there is said before an hour's work

    def predict(audit: Audit) -> np.ndarray | None:
        if not (runs or train_folds):
            return None
        from lib.audit.data import folds  # which brings all that training needs

        trained = folds.train_folds(audit, overrides, device) if train_folds else runs
        return folds.predict_folds(audit, trained, device)

    with sole_writer(out):
        clear(out)
        with tempfile.TemporaryDirectory(dir=out, prefix=WORK, ignore_cleanup_errors=True) as work:
            audit = Audit(directory, out, work, cfg, predict)
            audit.run_checks(checks)
            if plant and audit.surveys:
                audit.plant(checks)
            plot_suspects(out / "suspects.png", audit.surveys, audit.findings)
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
    suspects = [row.values() for row in quarantine_rows(findings)]
    write_csv(out / "quarantine.csv", QUARANTINE, suspects)
    by_check = {}
    for finding in findings:
        by_check.setdefault(csv_name(finding["check"]), []).extend(finding["rows"])
    for name, rows in by_check.items():
        if rows:
            header = list(dict.fromkeys(key for row in rows for key in row))
            write_csv(out / name, header, [[row.get(key, "") for key in header] for row in rows])
    write_json(out / "findings.json", findings)


def quarantine_rows(findings: list[dict]) -> list[dict]:
    """Suspect samples, one row for each sample and reason, with the highest of its scores."""
    suspects = {}
    for finding in findings:
        for row in finding["rows"]:
            if row.get("reason"):
                key = row["split"], int(row["index"]), row["reason"]
                suspects[key] = max(suspects.get(key, 0.0), float(row["score"]))
    rows = []
    for key, score in sorted(suspects.items()):
        rows.append(dict(zip(QUARANTINE, (*key, round(score, 4)), strict=True)))
    return rows
