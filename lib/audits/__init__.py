"""Audits: a check is a function from data to findings; the terminal's lines, findings.json and pages are views of them."""

from dataclasses import dataclass, field

from lib.command import say


@dataclass(frozen=True)
class Finding:
    """What a check measured against its limit, what to do about it, and the rows that show it."""

    check: str
    severity: str  # note | warning | error
    count: int
    measured: object
    limit: object = None
    advice: str = ""
    split: str = ""
    rows: list[dict] = field(default_factory=list)

    def say(self) -> None:
        """A line for the person at the terminal."""
        rest = [str(text) for text in (self.measured, self.limit, self.advice) if text]
        say(f"{self.severity:8}{self.check:28}{'; '.join(rest)}")
