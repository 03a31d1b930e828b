"""How far long work has come: a live bar on a terminal, a plain line every so often in a job
log.
"""

import sys
import time

LINE_EVERY_S = 30.0
BAR_EVERY_S = 0.1


def format_duration(seconds: float) -> str:
    """`75` as `1:15`, `3700` as `1:01:40`."""
    minutes, seconds = divmod(max(0, round(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


class Progress:
    """Counts `unit`s of work towards `total` and shows rate and time left; use as a context
    manager.

    A total of 0 means unknown. `note` is a short text shown at the end of the line.
    """

    def __init__(self, total: int, label: str, unit: str = "patches", stream=None):
        self.total, self.label, self.unit = total, label, unit
        self.stream = stream or sys.stderr
        self.live = self.stream.isatty()
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
        text = (
            f"{self.label}: {self.num_done:,}{f'/{self.total:,}' if self.total else ''} {self.unit}"
        )
        share = f" ({self.num_done / self.total:.0%})" if self.total else ""
        left = (
            f", {format_duration((self.total - self.num_done) / rate if rate else 0.0)} left"
            if self.total
            else ""
        )
        return f"{text}{share}, {rate:,.0f}/s{left}" + (f", {self.note}" if self.note else "")

    def show(self, last: bool = False) -> None:
        self.stream.write(
            ("\r\033[K" if self.live else "")
            + self.line()
            + ("\n" if last or not self.live else "")
        )
        self.stream.flush()

    def __enter__(self):
        return self

    def __exit__(self, kind, *_):
        # short work in a job log needs no line of its own
        if self.live or time.monotonic() - self.started_at >= LINE_EVERY_S:
            self.show(last=True)
