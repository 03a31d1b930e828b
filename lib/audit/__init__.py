"""Audits: a check is a function from data to findings; the terminal's lines, findings.json and
pages are views of them.
"""

from lib.command import say

MODEL_PARTS = ("thresholds", "calibration", "slices", "shortcut", "errors")


def finding(
    check: str,
    severity: str,
    measured: str,
    limit: str = "",
    advice: str = "",
    rows=(),
    split: str = "",
) -> dict:
    """A row of findings.json, said to the person at the terminal too; `severity` is note, warning
    or error.
    """
    say(f"{severity:8}{check:28}{'; '.join(text for text in (measured, limit, advice) if text)}")
    texts = {
        "check": check,
        "split": split,
        "severity": severity,
        "measured": measured,
        "limit": limit,
        "advice": advice,
    }
    return texts | {"count": len(rows), "rows": list(rows)}


def rank_findings(findings: list[dict]) -> list[dict]:
    """Findings by their severity: errors, warnings, notes."""
    severities = ("error", "warning", "note")
    return sorted(findings, key=lambda row: severities.index(row["severity"]))
