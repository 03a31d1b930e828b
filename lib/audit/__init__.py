"""Audits: a check is a function from data to findings; the terminal's lines, findings.json and
pages are views of them.
"""

from pathlib import Path

from lib.command import BadInput, say

MODEL_PARTS = ("scores", "thresholds", "calibration", "slices", "shortcut", "errors")


def require_apart(directory, out: Path) -> None:
    """Raise BadInput where OUT is the folder of the data."""
    if Path(directory).resolve() == out.resolve():
        raise BadInput(f"{directory}: OUT may not be the data themselves")


def build_finding(
    check: str,
    severity: str,
    measured: str,
    limit: str = "",
    advice: str = "",
    rows=(),
    split: str = "",
) -> dict:
    """A row of findings.json; `severity` is note, warning or error."""
    row = {"check": check, "split": split, "severity": severity, "measured": measured}
    return row | {"limit": limit, "advice": advice, "count": len(rows), "rows": list(rows)}


def say_finding(row: dict) -> None:
    """Print a finding as one line for the person at the terminal."""
    words = "; ".join(filter(None, (row["measured"], row["limit"], row["advice"])))
    check = f"{row['check']} in {row['split']}" if row["split"] else row["check"]
    say(f"{row['severity']:8}{check:28} {words}")


def finding(*args, **options) -> dict:
    """A row of findings.json as build_finding makes it, printed too."""
    row = build_finding(*args, **options)
    say_finding(row)
    return row


def rank_findings(findings: list[dict]) -> list[dict]:
    """Findings by their severity: errors, warnings, notes."""
    severities = ("error", "warning", "note")
    return sorted(findings, key=lambda row: severities.index(row["severity"]))
