"""Progress: a live bar for a person, few plain lines for a log, nothing for short work in a log."""

import io

import pytest

from lib import progress
from lib.progress import Progress, format_duration


def stream_to(terminal: bool) -> io.StringIO:
    stream = io.StringIO()
    stream.isatty = lambda: terminal
    return stream


@pytest.fixture
def wait(monkeypatch):
    """A clock that moves only when told: `wait(seconds)`."""
    now = [1000.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return lambda seconds: now.__setitem__(0, now[0] + seconds)


def test_a_duration_reads_like_a_clock():
    durations = {0: "00:00", -3: "00:00", 59.6: "01:00", 3599.4: "59:59", 3700: "1:01:40"}
    assert {seconds: format_duration(seconds) for seconds in durations} == durations


def test_rate_and_time_left_follow_from_what_is_done(wait):
    bar = Progress(1000, "epoch 1/2", stream=stream_to(False))
    assert " 0/1,000 patches" in bar.line()
    wait(10)
    bar.add(250, "loss 0.5")
    bar.add(0)
    for text in ("epoch 1/2", "250/1,000 patches", "25%", "25/s", "00:30 left", "loss 0.5"):
        assert text in bar.line()
    unknown = Progress(0, "reading", "files", stream_to(False)).line()
    assert "left" not in unknown and "%" not in unknown


def work(wait, stream, label: str, seconds: float) -> str:
    """What a stream gets of 1,000 patches that take so many seconds each."""
    with Progress(1000, label, stream=stream) as bar:
        for _ in range(1000):
            wait(seconds)
            bar.add()
    return stream.getvalue()


def test_a_log_gets_a_line_every_so_often_and_short_work_none(wait):
    stream = stream_to(False)
    assert work(wait, stream, "short", 0.02) == ""
    lines = work(wait, stream, "long", progress.LINE_EVERY_S / 100).splitlines()
    assert 9 <= len(lines) <= 11 and all(line.startswith("long: ") for line in lines)
    assert "1,000/1,000" in lines[-1] and "\033" not in stream.getvalue()


def test_a_terminal_gets_one_line_overwritten_in_place(wait):
    text = work(wait, stream_to(True), "live", progress.BAR_EVERY_S / 100)
    assert text.count("\n") == 1 and "1,000/1,000" in text.rpartition("\r")[2]
    assert 9 <= text.count("\r") <= 12, "no more often than the eye follows"
