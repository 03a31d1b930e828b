"""The audit of a PCam folder: one survey, the checks on it, and the files that they leave."""

import json
import shutil
import tempfile
from pathlib import Path

from lib.audit import finding
from lib.audit.data.balance import check_balance
from lib.audit.data.drift import check_drift
from lib.audit.data.duplicates import Copies, check_duplicates, find_copies
from lib.audit.data.files import check_files
from lib.audit.data.groups import check_groups
from lib.audit.data.leakage import check_leakage
from lib.audit.data.triggers import check_triggers, unique_rows
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
QUARANTINE = ("split", "index", "reason", "score")


def audit_data(
    directory, out: Path, checks, overrides: list[str], device="auto", plant=False
) -> dict:
    """Audit a folder into OUT; gives counts for the terminal. Raises BadInput where there is
    nothing to audit.
    """
    directory = Path(directory)
    if not directory.is_dir() or directory.resolve() == out.resolve():
        raise BadInput(
            f"{directory}:"
            f" {'OUT may not be the data themselves' if directory.is_dir() else 'no such folder'}"
        )
    load_config(overrides=overrides)  # whatever is wrong with it is said before an hour's work
    with sole_writer(out):
        clear(out)
        with tempfile.TemporaryDirectory(dir=out, prefix=WORK, ignore_cleanup_errors=True) as work:
            surveys, copies, findings, failed = run_checks(
                directory, out, checks, overrides, device, work
            )
            power = (
                plant_and_find(surveys, copies, checks, overrides, device, work)
                if plant and surveys
                else []
            )
            if power:
                write_csv(out / "power.csv", power[0], [row.values() for row in power])
                findings += judge_power(power)
            write_findings(out, findings)
            if bins := feature_histograms(surveys):
                write_csv(out / "histograms.csv", bins[0], [row.values() for row in bins])
            if gallery := plot_suspects(surveys, findings):
                (out / "suspects.png").write_bytes(figure_png(gallery))
            page = write_data_page(
                out / "audit.html", f"Data audit of {directory}", surveys, findings, power
            )
    num = {
        f"num_{severity}s": sum(f["severity"] == severity for f in findings)
        for severity in ("error", "warning")
    }
    return num | {
        "not_run": failed,
        "num_suspects": len(quarantine_rows(findings)),
        "page": str(page),
    }


def run_checks(directory, out: Path, checks, overrides, device, work):
    """Survey a folder and run checks on it: (surveys, copies or None, findings, names of the checks
    that could not run).
    """
    surveys, findings = [], []
    if set(checks) - {"groups"}:  # which reads patches its own way
        surveys, findings = survey_folder(directory, work)
    failed = sorted({found["split"] for found in findings if found["check"] == "unreadable split"})
    copies = (
        find_copies(surveys)
        if surveys and {"duplicates", "leakage", "triggers"} & set(checks)
        else None
    )
    train = next((survey for survey in surveys if survey.name == "train"), None)

    def labels():
        from lib.audit.data.labels import check_labels  # which brings all that training needs

        # what is found so far: folds leave damage out, and this may take an hour
        write_findings(out, findings)
        is_grouped = group_of_rows(open_split(directory, "train"), directory) is not None
        grouping = [] if is_grouped else check_groups(directory)
        return grouping + check_labels(directory, train, out, overrides, device)

    run = {
        "groups": lambda: check_groups(directory),
        "files": lambda: check_files(directory, surveys, work),
        "values": lambda: [found for survey in surveys for found in check_values(survey)],
        "balance": lambda: check_balance(surveys, load_config(overrides=overrides)),
        "duplicates": lambda: check_duplicates(surveys, copies),
        "leakage": lambda: check_leakage(surveys, copies),
        "drift": lambda: check_drift(surveys),
        "triggers": lambda: [
            found
            for at, survey in enumerate(surveys)
            for found in check_triggers(survey, unique_rows(survey, at, copies))
        ],
        "labels": labels,
    }
    for name in checks:
        if (not surveys and name != "groups") or (name == "labels" and train is None):
            failed.append(name)
            continue
        try:
            findings += run[name]() or [finding(name, "note", "nothing found")]
        except BadInput as error:
            failed.append(name)
            findings.append(
                finding(
                    name,
                    "error",
                    f"this check could not run: {error}",
                    advice="mend that and audit again",
                )
            )
    return surveys, copies, findings, failed


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


def plant_and_find(
    surveys: list[Survey], copies: Copies | None, checks, overrides, device, work
) -> list[dict]:
    """The power of the checks on a copy of part of the data with damage planted, against the same
    part as it is.
    """
    say("planting damage into a copy of these data, to see what is found of it")
    copies, found = copies or find_copies(surveys), {}
    rows_of = {
        survey.name: unique_rows(survey, number, copies) for number, survey in enumerate(surveys)
    }
    clean, planted = Path(work, "clean"), Path(work, "planted")
    truth = write_copies(surveys, rows_of, clean, planted)
    wanted = [name for name in checks if name not in ("files", "balance", "drift", "groups")]
    for folder in (clean, planted):
        say(f"auditing the {folder.name} copy")
        (folder / "out").mkdir()
        *_, findings, _ = run_checks(folder, folder / "out", wanted, overrides, device, work)
        found[folder] = quarantine_rows(findings)
    power = measure_power(truth, found[planted], found[clean])
    return [row for row in power if any(row["reason"] in REASONS_OF[name] for name in wanted)]
