"""The progress of long work: a live bar on a terminal, a plain line now and then in a job log."""

import datetime
import sys
import time

from lib.command import NEW_LINE

LINE_EVERY_S = 30.0
BAR_EVERY_S = 0.1


def format_duration(seconds: float) -> str:
    """`75` as `01:15`, `3700` as `1:01:40`."""
    duration = datetime.timedelta(seconds=max(0, round(seconds)))
    return str(duration).removeprefix("0:")


class Progress:
    """Counts `unit`s of work towards `total` and shows rate and time left; use as a context
    manager.

    A total of 0 means unknown. `note` is a short text shown at the end of the line.
    """

    def __init__(self, total: int, label: str, unit: str = "patches"):
        self.total, self.label, self.unit = total, label, unit
        self.live = sys.stderr.isatty()
        self.num_done, self.note = 0, ""
        self.started_at = self.shown_at = time.monotonic()

    def add(self, count: int = 1, note: str = "") -> None:
        self.num_done += count
        self.note = note or self.note
        now = time.monotonic()
        if now - self.shown_at >= (BAR_EVERY_S if self.live else LINE_EVERY_S):
            self.shown_at = now
            self.show()

    def line(self) -> str:
        rate = self.num_done / max(time.monotonic() - self.started_at, 1e-9)
        text = f"{self.label}: {self.num_done:,}"
        if self.total:
            text += f"/{self.total:,}"
        text += f" {self.unit}, {rate:,.0f}/s"
        if self.total and rate:
            left_s = (self.total - self.num_done) / rate
            share = self.num_done / self.total
            text += f" ({share:.0%}), {format_duration(left_s)} left"
        return f"{text}, {self.note}" if self.note else text

    def show(self, end: str = "") -> None:
        text = f"{NEW_LINE}{self.line()}{end}" if self.live else f"{self.line()}\n"
        print(text, end="", file=sys.stderr, flush=True)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        # short work in a job log needs no line of its own
        if self.live or time.monotonic() - self.started_at >= LINE_EVERY_S:
            self.show(end="\n")
