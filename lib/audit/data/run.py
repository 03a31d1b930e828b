"""The audit of a PCam folder: one survey, the checks on it, and the files that they leave."""

import functools
import shlex
import shutil
import tempfile
from pathlib import Path

import numpy as np

from lib.audit import build_finding, require_apart, say_finding
from lib.audit.data import folds
from lib.audit.data.balance import check_balance
from lib.audit.data.drift import check_drift
from lib.audit.data.duplicates import Copies, check_duplicates, check_leakage
from lib.audit.data.files import check_files
from lib.audit.data.groups import check_groups
from lib.audit.data.labels import check_labels
from lib.audit.data.triggers import check_triggers
from lib.audit.data.unusual import check_unusual
from lib.audit.data.values import check_values
from lib.audit.data_page import plot_suspects, write_data_page
from lib.audit.plant import REASONS_OF, judge_power, measure_power, write_copy
from lib.audit.survey import survey_folder
from lib.command import BadInput, say
from lib.config import load_config
from lib.files import write_csv, write_json
from lib.splitwriter import sole_writer

WORK = ".work."  # begins the name of the folder of temporary files in OUT
# errors that no list of patches to leave out mends
BLOCKING = {
    *("unreadable split", "labels", "one class", "labels: misaligned"),
    *("triggers", "meta"),
}
QUARANTINE = ("split", "index", "reason", "score")
FILES = (
    *("audit.html", "findings.json", "quarantine.csv", "power.csv", "out_of_fold.csv"),
    *("counts.png", "suspects.png"),
)


class Audit:
    """An audit as it goes on. Its findings are printed once each, and the files in `out` follow
    after each check; without `out` nothing is printed or written. `work` takes temporary files.
    """

    def __init__(self, directory: Path, work: Path, out: Path | None = None) -> None:
        self.directory, self.work, self.out = directory, work, out
        self.surveys, self.findings, self.power = [], [], []
        self.unchecked = []  # checks that were not asked for
        self.failed = []  # checks that could not run, and splits that cannot be read

    def add(self, findings: list[dict]) -> None:
        """Take findings, print them and write all files anew."""
        self.findings += findings
        if self.out:
            for row in findings:
                say_finding(row)
            self.write()

    def write(self) -> Path:
        """Write the tables, the page and, last, findings.json; gives the page."""
        suspects = [row.values() for row in quarantine_rows(self.findings)]
        write_csv(self.out / "quarantine.csv", QUARANTINE, suspects)
        if self.power:
            write_csv(self.out / "power.csv", self.power[0], [row.values() for row in self.power])
        page = write_data_page(self)
        write_json(self.out / "findings.json", self.findings)
        return page

    @functools.cached_property
    def copies(self) -> Copies:
        """Copies among all patches."""
        return Copies(self.surveys)

    def find_groups(self) -> dict[str, np.ndarray]:
        """The group of each row (N,) of each split: its slide, else what shares tissue with it."""
        groups = {}
        for number, survey in enumerate(self.surveys):
            has_slides = survey.slides is not None
            groups[survey.name] = survey.slides if has_slides else self.copies.groups_of(number)
        return groups

    def unique_rows(self) -> dict[str, np.ndarray]:
        """The intact rows of each split, of those that share tissue one."""
        rows_of = {}
        for number, survey in enumerate(self.surveys):
            _, first = np.unique(self.copies.groups_of(number), return_index=True)
            rows_of[survey.name] = np.intersect1d(first, survey.intact)
        return rows_of

    def run_checks(self, checks, predict=lambda: None) -> None:
        """Survey the folder and run checks on it. `predict` gives logits of train by the runs of
        its folds, or None.
        """
        if set(checks) != {"groups"}:  # which reads patches its own way
            self.surveys, findings = survey_folder(self.directory, self.work)
            present = [survey.name for survey in self.surveys]
            self.failed += [row["split"] for row in findings if row["split"] not in present]
            self.add(findings)
        surveys = self.surveys
        run = {
            "groups": lambda: check_groups(self.directory),
            "files": lambda: sum(map(check_files, surveys), []),
            "values": lambda: sum(map(check_values, surveys), []),
            "unusual": lambda: check_unusual(surveys),
            "balance": lambda: check_balance(surveys),
            "duplicates": lambda: check_duplicates(surveys, self.copies),
            "leakage": lambda: check_leakage(surveys, self.copies),
            "drift": lambda: check_drift(surveys),
            "triggers": lambda: check_triggers(surveys, self.unique_rows()),
            "labels": lambda: check_labels(
                surveys, self.find_groups(), self.out or self.work, predict()
            ),
        }
        self.unchecked = [name for name in run if name not in checks and name != "groups"]
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
        """Measure the power of the checks on a copy of part of the data with damage planted."""
        say("planting damage into a copy of these data, to see what is found of it")
        planted = Path(self.work, "planted")
        truth = write_copy(self.surveys, self.unique_rows(), planted)
        checks = [name for name in checks if name in REASONS_OF]
        audit = Audit(planted, planted)
        audit.run_checks(checks)
        reasons = {reason for name in checks for reason in REASONS_OF[name]}
        self.power = measure_power(truth, quarantine_rows(audit.findings), reasons)
        self.add(judge_power(self.power))

    def conclude(self) -> list[str]:
        """Three sentences: whether the data can be trained on, what to leave out, what to run
        next.
        """
        errors = {row["check"] for row in self.findings if row["severity"] == "error"}
        blocking = sorted(errors & BLOCKING | {*self.failed})
        unchecked = self.unchecked + [
            row["check"] for row in self.findings if row["advice"] == "not checked"
        ]
        certain = load_config().quarantine_reasons
        suspects = quarantine_rows(self.findings)
        left_out = {(row["split"], row["index"]) for row in suspects if row["reason"] in certain}
        others = sorted({row["reason"] for row in suspects}.difference(certain))
        train = f"python train.py data_dir={shlex.quote(str(self.directory))}"
        leave = "Nothing has to be left out"
        if left_out:
            quarantine = f"quarantine={shlex.quote(str(self.out / 'quarantine.csv'))}"
            train += f" {quarantine}"
            leave = f"{len(left_out):,} damaged patches are left out by `{quarantine}`"
        if others:
            leave += f"; look at those listed as {', '.join(others)}"
        verdict, following = "These data can be trained on", f"Next, run `{train}`"
        if unchecked:
            verdict += (
                f", as far as was checked; not checked: {', '.join(dict.fromkeys(unchecked))}"
            )
        if blocking:
            verdict = f"Do not train on these data yet: {', '.join(blocking)}"
            following = "Mend that, then run this audit again"
        return [f"{verdict}.", f"{leave}.", f"{following}."]


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
    require_apart(directory, out)
    load_config(overrides=overrides)  # what is wrong there is said before an hour's work

    def predict() -> np.ndarray | None:
        trained = folds.train_folds(audit, overrides, device) if train_folds else runs
        return folds.predict_folds(directory, trained, device) if trained else None

    with sole_writer(out):
        for leftover in out.glob(f"{WORK}*"):  # of an audit that was killed
            # NFS keeps what was still open under another name
            shutil.rmtree(leftover, ignore_errors=True)
        for name in FILES:
            (out / name).unlink(missing_ok=True)
        with tempfile.TemporaryDirectory(dir=out, prefix=WORK, ignore_cleanup_errors=True) as work:
            audit = Audit(directory, Path(work), out)
            audit.run_checks(checks, predict)
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
