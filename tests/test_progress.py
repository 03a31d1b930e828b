"""Progress: a live bar for a person, few plain lines for a log, nothing for short work in a log."""

import pytest

from lib import progress
from lib.progress import Progress, format_duration


@pytest.fixture
def wait(monkeypatch):
    """A clock that moves only when told: `wait(seconds)`."""
    now = [1000.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return lambda seconds: now.__setitem__(0, now[0] + seconds)


def test_rate_and_time_left_follow_from_what_is_done(wait):
    bar = Progress(1000, "epoch 1/2")
    wait(10)
    bar.add(250, "loss 0.5")
    bar.add(0)
    for text in ("epoch 1/2", "250/1,000 patches", "25%", "25/s", "00:30 left", "loss 0.5"):
        assert text in bar.line()
    unknown = Progress(0, "reading", "files").line()
    assert "left" not in unknown and "%" not in unknown
    assert [format_duration(seconds) for seconds in (59.6, 3700)] == ["01:00", "1:01:40"]


def work(wait, label: str, seconds: float) -> None:
    """Report on 1,000 patches that take so many seconds each."""
    with Progress(1000, label) as bar:
        for _ in range(1000):
            wait(seconds)
            bar.add()


def test_a_log_gets_a_line_every_so_often_and_a_terminal_one_line_overwritten(
    wait, capsys, monkeypatch
):
    work(wait, "short", 0.02)
    assert capsys.readouterr().err == "", "short work needs no line in a log"
    work(wait, "long", progress.LINE_EVERY_S / 100)
    log = capsys.readouterr().err
    lines = log.splitlines()
    assert 9 <= len(lines) <= 11 and all(line.startswith("long: ") for line in lines)
    assert "1,000/1,000" in lines[-1] and "\033" not in log
    monkeypatch.setattr(progress.sys.stderr, "isatty", lambda: True)
    work(wait, "live", progress.BAR_EVERY_S / 100)
    text = capsys.readouterr().err
    assert text.count("\n") == 1 and "1,000/1,000" in text.rpartition("\r")[2]
    assert 9 <= text.count("\r") <= 12, "no more often than the eye follows"
