"""A run is a folder: made once, readable at any time, its rows cut back to the checkpoint that a
resumed run starts from.
"""

import re
import subprocess
import time

import pytest
import torch

from lib import rundir, runlog
from lib.batches import Batch
from lib.command import BadInput
from lib.config import load_config
from lib.files import read_csv
from lib.training import StepResult


def note_steps(log, losses):
    """Let a log see steps with these losses; each batch holds the rows 2k and 2k + 1, k the step,
    in its second repeat.
    """
    for loss in losses:
        number = log.progress["num_steps"]
        keys = torch.tensor([2 * number + 101, 2 * number + 100])
        log.progress["num_steps"] += 1
        result = StepResult(torch.tensor(loss), torch.tensor(2.0))
        log.add_step(result, Batch(None, None, keys, 100, 0.0), 0.1)


def open_log(folder, num_steps=0) -> runlog.RunLog:
    progress = {"epoch": 0, "num_steps": num_steps, "loss_sum": 0.0, "wall_s": 30.0}
    log = runlog.RunLog(folder, progress, time.monotonic(), 2)
    log.start_epoch()
    return log


def test_a_run_has_a_name_of_its_own_by_which_it_is_found(tmp_path, monkeypatch):
    tokens = iter(["aaaa", "aaaa", "bbbb"])
    monkeypatch.setattr(rundir.secrets, "token_hex", lambda _: next(tokens))
    cfg = load_config(overrides=["name=a b'c", "seed=7"])
    rundir.create_run(tmp_path, cfg)
    run = rundir.create_run(tmp_path, cfg)
    assert re.fullmatch(r"\d{8}T\d{6}Z-a b'c-s7-bbbb", run.name)
    assert rundir.read_run_config(run) == cfg
    assert rundir.find_run(run) == rundir.find_run(run.name, tmp_path) == run
    for name, words in (
        (run.name[:-1], f"did you mean '{run.name}'"),
        (tmp_path, "no config.yaml"),
        (rundir.REPOSITORY, "no run"),  # its config.yaml is not a run's
    ):
        with pytest.raises(BadInput, match=words):
            rundir.find_run(name, tmp_path)


def test_only_a_repository_whose_top_is_the_programs_folder_tells_a_commit_and_a_patch(
    tmp_path, monkeypatch, capsys
):
    nothing = {"commit": None, "uncommitted_patch": "", "untracked_files": []}
    program, notes = tmp_path / "program", tmp_path / "private.txt"
    program.mkdir()
    notes.write_text("one\n")
    identity = ["-c", "user.name=n", "-c", "user.email=e", "-c", "core.hooksPath=none"]
    for command in (["init", "-q"], ["add", "."], ["commit", "-qm", "one"]):
        subprocess.run(["git", *identity, *command], cwd=tmp_path, check=True)
    notes.write_text("two\n")
    monkeypatch.setattr(rundir, "REPOSITORY", program)
    assert rundir.git_state() == nothing
    assert "another repository" in capsys.readouterr().err
    monkeypatch.setattr(rundir, "REPOSITORY", tmp_path)
    (tmp_path / "b.py").write_text("new\n")
    state = rundir.git_state()
    assert re.fullmatch("[0-9a-f]{40}", state["commit"]) and state["untracked_files"] == ["b.py"]
    assert "-one\n+two" in state["uncommitted_patch"]
    monkeypatch.setenv("GIT_TEST_ASSUME_DIFFERENT_OWNER", "1")
    assert rundir.git_state() == nothing
    assert "git config --global --add safe.directory" in capsys.readouterr().err


def test_a_log_has_one_row_a_step_and_a_resumed_one_drops_what_came_after_the_checkpoint(tmp_path):
    losses = [0.1, 1 / 3, 2e-9, 1.0, 1.0, 1.0]
    with open_log(tmp_path) as log:
        note_steps(log, losses)
        log.flush()
    stored = [float(torch.tensor(loss)) for loss in losses]
    assert log.progress["loss_sum"] == sum(stored)
    path = tmp_path / "steps.csv"
    path.write_text(path.read_text() + "7,1,0.5")  # the last row is torn
    with open_log(tmp_path, num_steps=4) as log:
        time.sleep(0.1)
        note_steps(log, [2.0] * 2)
        log.flush()
    rows = read_csv(path)
    assert tuple(rows[0]) == runlog.STEP_COLUMNS
    assert [int(row["step"]) for row in rows] == [1, 2, 3, 4, 5, 6]
    assert [float(row["loss"]) for row in rows] == [*stored[:4], 2.0, 2.0]
    assert 30.1 < log.progress["wall_s"] < 60, "the time before counts"
    assert float(rows[4]["images_per_s"]) < 2 / 0.1, "the images of a batch count"


class Event:
    """A GPU's event, as the log of steps knows it: of step `number`, passed once the GPU has come
    so far.
    """

    made = done = 0

    def __init__(self):
        Event.made += 1
        self.number = Event.made

    def query(self):
        return Event.done >= self.number

    def synchronize(self):
        Event.done = max(Event.done, self.number)

    def elapsed_time(self, later):
        return 500.0 * (later.number - self.number)  # ms


def test_of_a_gpu_only_steps_that_it_has_made_are_read_and_the_log_waits_for_none(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(runlog.RunLog, "_to_host", lambda _, values: (values, Event()))
    with open_log(tmp_path) as log:
        note_steps(log, [1.0] * 5)
        assert len(log.pending) == 5 and Event.done == 0
        Event.done = 3
        note_steps(log, [1.0])
        assert len(log.pending) == 3 and Event.done == 3
        note_steps(log, [1.0] * runlog.MAX_PENDING)
        assert len(log.pending) == runlog.MAX_PENDING, "so far and no further may a GPU be behind"
        log.flush()
    rows = read_csv(tmp_path / "steps.csv")
    assert len(rows) == 5 + 1 + runlog.MAX_PENDING
    assert {float(row["images_per_s"]) for row in rows[1:]} == {4.0}, "by the GPU's clock"


def test_a_run_is_held_by_one_process_and_says_what_it_goes_on_with(tmp_path):
    run = rundir.create_run(tmp_path, load_config())
    lock = rundir.hold_run(run, load_config(overrides=["views=1"]))
    assert rundir.read_run_config(run).views == 1
    with pytest.raises(BadInput, match="being trained by another process"):
        rundir.hold_run(run, load_config())
    lock.close()
    rundir.hold_run(run, load_config()).close()
    assert rundir.read_run_config(run) == load_config()
