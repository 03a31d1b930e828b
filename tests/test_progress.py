"""Progress: a live bar for a person, few plain lines for a log, nothing for short work in a log."""

import pytest

from lib import progress
from lib.progress import Progress, format_duration


@pytest.fixture
def work(monkeypatch, capsys):
    """What Progress prints while 1,000 patches take so many seconds each, by a clock that moves
    only here.
    """
    now = [1000.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])

    def report(seconds: float) -> str:
        with Progress(1000, "epoch 1/2") as bar:
            for _ in range(1000):
                now[0] += seconds
                bar.add(note="loss 0.5")
        return capsys.readouterr().err

    return report


def test_a_log_gets_a_line_every_so_often_and_a_terminal_one_line_overwritten(work, monkeypatch):
    assert work(0.02) == "", "short work needs no line in a log"
    log = work(0.3)
    lines = log.splitlines()
    assert 9 <= len(lines) <= 11 and "1,000/1,000" in lines[-1] and "\033" not in log
    for text in ("epoch 1/2", "(10%)", "3/s", "04:30 left", "loss 0.5"):
        assert text in lines[0]
    monkeypatch.setattr(progress.sys.stderr, "isatty", lambda: True)
    text = work(0.001)
    assert text.count("\n") == 1 and "1,000/1,000" in text.rpartition("\r")[2]
    assert 9 <= text.count("\r") <= 12, "no more often than the eye follows"


def test_of_an_unknown_total_nothing_is_said_to_be_left():
    line = Progress(0, "reading", "files").line()
    assert "left" not in line and "%" not in line
    assert [format_duration(seconds) for seconds in (59.6, 3700)] == ["01:00", "1:01:40"]
