"""Run folders are listed whatever state they are in, selected, compared and averaged, and never
mixed up or lost.
"""

import itertools
import json
import multiprocessing
import os
import platform
import re
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import report
from lib import rundir, runlog
from lib.command import BadInput
from lib.config import dump_config, load_config, read_yaml
from lib.files import read_csv, read_json, write_csv, write_json
from lib.report.runs import (
    SILENT_S,
    average_scores,
    group_seeds,
    list_runs,
    read_flat_yaml,
    read_run,
    select_runs,
    table_of_runs,
)

forked = multiprocessing.get_context("fork")
BASELINES = {"constant_auc": 0.5, "always_positive_f2": 5 / 6}


def note_steps(log, progress, num: int) -> None:
    log.start_epoch()
    for _ in range(num):
        progress["num_steps"] += 1
        batch = SimpleNamespace(keys=np.arange(2), num_rows=2, wait_s=0.0)
        loss, grad_norm = torch.tensor([0.5, 1.0 / progress["num_steps"]], dtype=torch.float64)
        log.add_step(SimpleNamespace(loss=loss, grad_norm=grad_norm), batch, 0.1)


def describe_process() -> dict:
    """What meta.json says of this process."""
    pid = os.getpid()
    start = rundir.process_start(pid)
    return {"pid": pid, "process_start": start, "machine": {"host": platform.node()}}


def write_run(runs, *overrides, status="finished", num_steps=3, auc=0.9, data="ab", **meta) -> Path:
    """A run folder as training leaves it, without the training that takes the time; status '' is
    one that is not over.
    """
    run = rundir.create_run(runs, load_config(overrides=overrides))
    about = {"data": {"x": data}, "rows": {"train": {"num": 100}}, "argv": ["train.py"]}
    about |= {"started_utc": "2026-01-01T00:00:00+00:00", "commit": "c0ffee"}
    rundir.write_meta(run, describe_process() | about | meta)
    progress = {"epoch": 0, "num_steps": 0, "loss_sum": 0.0, "best_epoch": 1}
    scores = dict.fromkeys(rundir.SCORES, 0.5) | {"auc": auc}
    with runlog.RunLog(run, progress, time.monotonic(), 2) as log:
        note_steps(log, progress, num_steps)
        log.flush()
        log.add_epoch(scores, dict.fromkeys(runlog.BASELINES, 0.5), True, num_steps, 0.0)
    progress |= {"epoch": 1, "best_scores": scores}
    if status:
        summary = rundir.build_summary(status, "00", progress, BASELINES, wall_s=1.5)
        rundir.write_summary(run, summary)
    return run


def call(capsys, *arguments, code=0) -> tuple[dict, str]:
    """Call report.py in this process: its JSON, and what it says on stderr."""
    assert report.main([*map(str, arguments)]) == code
    out, err = capsys.readouterr()
    return json.loads(out.splitlines()[-1]), err


# ---- listing


def test_the_state_of_a_run_is_told_from_its_folder_and_its_process(tmp_path):
    elsewhere = {"machine": {"host": "another"}}
    ended = subprocess.Popen(["sleep", "9"])
    gone = {"pid": ended.pid, "process_start": rundir.process_start(ended.pid)}
    ended.kill()
    ended.wait()
    made = {
        "finished": write_run(tmp_path),
        "diverged": write_run(tmp_path, status="diverged"),
        "running": write_run(tmp_path, status="", auc=0.75),
        "dead": write_run(tmp_path, status="", **gone),
        "running elsewhere": write_run(tmp_path, status="", **elsewhere),
        "dead elsewhere": write_run(tmp_path, status="", **elsewhere),
        "dead, its number taken": write_run(tmp_path, status="", process_start="1"),
        "interrupted": write_run(tmp_path, status="", **gone),
        "running, so young": rundir.create_run(tmp_path, load_config()),
        "unreadable": write_run(tmp_path),
    }
    for name in ("dead elsewhere", "running"):  # the latter lives, so it may take its time
        for path in made[name].iterdir():
            os.utime(path, (time.time() - SILENT_S - 60,) * 2)
    rundir.write_stop(made["interrupted"], "interrupted", 3)
    (made["unreadable"] / "summary.json").write_text("{")
    (tmp_path / "no run").mkdir()
    (tmp_path / "a file").write_text("")
    statuses = {row["run"]: row["status"] for row in list_runs(tmp_path)}
    assert statuses == {run.name: re.split("[ ,]", status)[0] for status, run in made.items()}
    row = read_run(made["running"])
    best = (row["val_auc"], row["num_epochs"], row["num_steps"])
    assert best == (0.75, 1, 3), "of the best epoch so far"
    rundir.write_meta(made["interrupted"], read_json(made["running"] / "meta.json"))  # resumed
    row = read_run(made["interrupted"])
    assert row["status"] == "running" and row["num_starts"] == 2


@pytest.mark.parametrize(
    "overrides",
    [
        (),
        ("name=a: b # 'c'", 'data_dir=/x/"y" - {z}', "quarantine=yes"),
        (f"data_dir={'long words ' * 30}", f"mlp_hidden={','.join(map(str, range(100, 160)))}"),
        ("name=1e3", "lr=1e-5", "data_dir=ü: \t"),
        ("data_dir=line: one\nline: two",),
    ],
)
def test_values_are_read_line_by_line_as_from_the_whole_file(overrides, tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(dump_config(load_config(overrides=overrides)), encoding="utf-8")
    assert read_flat_yaml(path) == read_yaml(path)


# ---- selecting and comparing

COLUMNS = ("run", "status", "seed", "lr", "symmetries", "mlp_hidden", "val_auc", "job")
VALUES = (
    ("a", "finished", 1, 0.01, True, [2, 3], 0.91, None),
    ("b", "dead", 2, 0.001, False, [2, 3], None, None),
    ("c", "finished", 10, 0.01, True, [4], 0.88, "7"),
)
ROWS = [dict(zip(COLUMNS, values, strict=True)) for values in VALUES]


def names_of(*arguments) -> str:
    return "".join(row["run"] for row in select_runs(ROWS, *arguments))


def test_conditions_choose_runs_and_are_never_code():
    expected = {
        "val_auc>0.9": "a",
        "val_auc <= 0.91": "ac",
        "val_auc!=0.91": "bc",
        "lr=1e-2": "ac",
        "seed>=2": "bc",
        "status!=dead": "ac",
        "symmetries=true": "ac",
        "mlp_hidden=2,3": "ab",
        "job=7": "c",
        "run>a": "bc",
        "val_auc>high": "",
        "lr==0.01 or 1=1": "",
        "lr==0.001": "b",
    }
    assert {condition: names_of([condition]) for condition in expected} == expected
    assert names_of(["val_auc>0", "seed>1"]) == "c" and names_of(["seed>99", "lr=1"]) == ""
    for wrong in ("", "val_auc", "val_auc>>1", "vall_auc>1", "__import__('os')=1", "=1"):
        with pytest.raises(BadInput, match="--where"):
            names_of([wrong])


def test_runs_are_ordered_by_numbers_as_numbers_and_what_is_missing_comes_last():
    assert names_of((), "seed") == "abc" and names_of((), "seed", True) == "cba"
    assert names_of((), "val_auc") == "cab" and names_of((), "val_auc", True) == "acb"
    assert names_of((), "mlp_hidden") == "abc"
    with pytest.raises(BadInput, match="did you mean 'seed'"):
        names_of((), "sed")


def test_only_keys_that_differ_are_compared():
    table = table_of_runs([ROWS[0], ROWS[2]])
    assert table.header[:5] == ["run", "status", "seed", "mlp_hidden", "num_epochs"]
    assert table.rows[1][:4] == ["c", "finished", 10, [4]]
    assert table_of_runs([]).header == table_of_runs(ROWS[:1]).header


# ---- seeds and folds


def test_the_mean_over_seeds_has_students_interval_within_what_is_possible(tmp_path):
    stats = pytest.importorskip("scipy.stats")

    def spread(*scores) -> dict:
        runs = [write_run(tmp_path, f"seed={seed}", auc=auc) for seed, auc in enumerate(scores)]
        return average_scores([read_run(run) for run in runs], "seed")["val_auc"]

    low, high = stats.t.interval(0.95, 2, 0.73, 0.03 / 3**0.5)
    expected = {"mean": 0.73, "deviation": 0.03, "low": low, "high": high, "num": 3}
    assert spread(0.70, 0.73, 0.76) == pytest.approx(expected, abs=1e-8)
    assert spread(0.99, 1.0, 0.95)["high"] == 1.0


@pytest.mark.parametrize(
    "overrides, meta, sentence",
    [
        (["seed=1"], {}, "share seed 1"),
        (["seed=2", "lr=1e-3"], {}, "lr is '0.02' in"),
        (["seed=2", "views=1"], {}, "views is '4' in"),
        (["seed=2"], {"data": "cd"}, "data is "),
        (["seed=2"], {"rows": {"train": {"num": 99}}}, "num_train is '100' in"),
        (["seed=2"], {"status": ""}, "is running: only finished"),
        (["seed=2"], {"status": "diverged"}, "is diverged: only finished"),
        (["seed=2", "num_folds=3", "fold=1"], {}, "fold is '0' in"),
    ],
)
def test_runs_that_are_no_repetitions_are_not_averaged(overrides, meta, sentence, tmp_path):
    rows = [read_run(write_run(tmp_path, "seed=1"))]
    with pytest.raises(BadInput, match="at least two"):
        average_scores(rows, "seed")
    free = ("name=x", "data_dir=/elsewhere", "data_residence=host", "checkpoint_every_steps=3")
    rows.append(read_run(write_run(tmp_path, "seed=5", *free)))
    assert average_scores(rows, "seed")["val_auc"]["num"] == 2
    rows.append(read_run(write_run(tmp_path, *overrides, **meta)))
    with pytest.raises(BadInput, match=sentence):
        average_scores(rows, "seed")


def test_the_spread_over_folds_stands_beside_that_over_seeds(tmp_path, capsys):
    seeds = [write_run(tmp_path, "seed=1", auc=0.9), write_run(tmp_path, "seed=2", auc=0.92)]
    keys = ("num_folds=3", "seed=4")
    folds = []
    for fold in range(3):
        folds.append(write_run(tmp_path, *keys, f"fold={fold}", auc=0.7 + fold / 10))
    page = tmp_path / "p.html"
    result, err = call(capsys, "seeds", *seeds, "--folds", *folds, "--html", page)
    assert result["num_runs"] == 5 and result["seeds"]["val_auc"]["mean"] == pytest.approx(0.91)
    assert result["folds"]["val_auc"]["deviation"] == pytest.approx(0.1) and "0.0141421" in err
    assert "0.5 **(worse than the constant answer, 0.8333)**" in err
    text = page.read_text()
    for source in re.findall(r'(?:src|href)="([^"]{0,30})', text):
        assert source.startswith("data:"), "self-contained"
    assert "gradient norm" in text and "learning rate" in text and "deviation over folds" in text
    _, err = call(capsys, "folds", *folds[:2], "--seeds", *folds, code=2)
    assert "share seed 4" in err
    _, err = call(capsys, "folds", *seeds, code=2)
    assert "share fold 0" in err
    patched = write_run(tmp_path, "seed=3", uncommitted_patch="+x")
    _, err = call(capsys, "seeds", *seeds, patched)
    assert "another commit and patch" in err
    sets = [[row["seed"] for row in group] for group in group_seeds(list_runs(tmp_path))]
    assert sets[0] == [1, 2] and [3] in sets


def test_report_lists_runs_and_draws_those_that_are_chosen(tmp_path, capsys):
    runs = tmp_path / "runs"
    page = tmp_path / "runs.html"
    for seed in range(4):
        status = "finished" if seed else ""
        write_run(runs, f"seed={seed}", "name=a & b", auc=0.8 + seed / 100, status=status)
    capsys.readouterr()
    command = ["runs", "--runs", runs]
    options = ["--sort", "val_auc", "--descending", "--where", "status=finished", "--html", page]
    result, err = call(capsys, *command, *options, "--where", "seed>1")
    assert result == {"num_runs": 2, "finished": 2, "page": str(page)}
    order = [re.search(r"-s(\d)-", line)[1] for line in err.splitlines()[1:]]
    assert order == ["3", "2"] and "a &amp; b-s3" in page.read_text()
    assert call(capsys, *command, "--where", "seed>9")[0] == {"num_runs": 0}
    _, err = call(capsys, *command, "--where", "seed>9", "--html", page, code=2)
    assert "0 runs cannot be drawn" in err
    _, err = call(capsys, "runs", "--runs", tmp_path / "nowhere", code=2)
    assert "no folder" in err


# ---- many processes, and processes that are killed


def _start_run(runs, seed: int, barrier) -> None:
    # so few names that each is wanted more than once
    rundir.secrets.token_hex = lambda _: os.urandom(1).hex()
    barrier.wait()
    write_run(runs, f"seed={seed}", auc=seed / 1000, number=seed)


def start_at_once(runs, num: int) -> None:
    """`num` processes start a run each in one folder at the same moment; all must be there, and
    each its own.
    """
    barrier = forked.Barrier(num)
    starts = [(runs, seed, barrier) for seed in range(num)]
    processes = [forked.Process(target=_start_run, args=start) for start in starts]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    rows = sorted(list_runs(runs), key=lambda row: row["seed"])
    for (_, seed, _), process, row in zip(starts, processes, rows, strict=True):
        meta = read_json(Path(runs, row["run"], "meta.json"))
        assert meta["pid"] == process.pid and meta["number"] == seed == round(row["val_auc"] * 1000)
        assert row["status"] == "finished" and not process.exitcode
        assert len(read_csv(Path(runs, row["run"], "steps.csv"))) == 3


def _write_for_ever(run, num_steps: int, pipe) -> None:
    progress = {"epoch": 0, "num_steps": num_steps, "loss_sum": 0.0}
    rundir.write_meta(run, describe_process())
    with runlog.RunLog(run, progress, time.monotonic(), 2) as log:
        for number in itertools.count():
            note_steps(log, progress, 1 + number % 7)
            log.flush()
            os.write(pipe, b"%d\n" % progress["num_steps"])
            note_steps(log, progress, number % 3)  # rows that are not on disk yet
            write_json(run / "extra.json", {"number": number, "filler": "x" * (number % 5000)})
            rows = [[number, step] for step in range(number % 50)]
            write_csv(run / "extra.csv", ["a", "b"], rows)


def read_if_there(path: Path) -> list[dict]:
    return read_csv(path) if path.is_file() else []


def kill_while_writing(run: Path, delay_s: float) -> tuple[int, int]:
    """SIGKILL a process that writes into `run`, reading all the while: (rows lost that were
    flushed, temporary files left).
    """
    before = len(read_if_there(run / "steps.csv"))
    reading, writing = os.pipe()
    process = forked.Process(target=_write_for_ever, args=(run, before, writing))
    process.start()
    os.close(writing)
    written = os.read(reading, 8)  # the writing has begun
    ends_at = time.monotonic() + delay_s
    is_over = False
    while not is_over:
        is_over = time.monotonic() > ends_at
        if is_over:
            process.kill()
            process.join()
        assert read_run(run)["status"] == ("dead" if is_over else "running")
        steps = [int(row["step"]) for row in read_if_there(run / "steps.csv")]
        assert steps == list(range(1, len(steps) + 1))
        read_if_there(run / "extra.csv")
        if (run / "extra.json").is_file():
            assert not read_json(run / "extra.json")["filler"].strip("x")
    with os.fdopen(reading, "rb") as pipe:
        flushed = int((written + pipe.read()).split(b"\n")[-2])
    return max(0, flushed - len(steps)), len(list(run.glob(".*.tmp")))


def test_processes_that_start_at_once_get_a_folder_each(tmp_path):
    start_at_once(tmp_path / "runs", 12)


def test_a_killed_process_leaves_a_folder_that_reads_and_loses_no_row_that_was_flushed(tmp_path):
    run = rundir.create_run(tmp_path, load_config())
    lost = [kill_while_writing(run, delay_s)[0] for delay_s in (0.0, 0.003, 0.02, 0.05)]
    assert lost == [0] * 4 and len(read_csv(run / "steps.csv")) > 5


# ---- other programs


def export(program: str, tmp_path, capsys) -> Path:
    """The folder into which two runs were exported."""
    runs = tmp_path / "my runs"
    out = tmp_path / "out"
    write_run(runs, "seed=1", auc=0.91)
    write_run(runs, "seed=2", status="", num_steps=2)
    command = ["export", "--to", program, "--runs", runs, "--out", out]
    assert call(capsys, *command)[0]["num_runs"] == 2
    _, err = call(capsys, *command, code=2)
    assert "new or empty folder" in err
    return out


def test_a_program_that_is_not_installed_is_named(tmp_path, capsys, monkeypatch):
    # as Python notes a module that cannot be imported
    monkeypatch.setitem(sys.modules, "mlflow", None)
    out = tmp_path / "out"
    _, err = call(capsys, "export", "--to", "mlflow", "--runs", tmp_path, "--out", out, code=2)
    assert "needs the package mlflow-skinny" in err and not out.exists()


def test_tensorboard_reads_what_was_exported(tmp_path, capsys):
    name = "tensorboard.backend.event_processing.event_accumulator"
    library = pytest.importorskip(name)
    first, second = sorted(
        export("tensorboard", tmp_path, capsys).iterdir(), key=lambda run: "-s2-" in run.name
    )
    points = {}
    for run in (first, second):
        events = library.EventAccumulator(str(run)).Reload()
        for tag in events.Tags()["scalars"]:
            points[run, tag] = [(event.step, event.value) for event in events.Scalars(tag)]
    norms = [(1, 1.0), (2, 1 / 2), (3, pytest.approx(1 / 3))]
    assert points[first, "train/grad_norm"] == norms and (first, "train/lr") in points
    assert points[first, "epoch/val_auc"] == [(3, pytest.approx(0.91))]
    assert len(points[second, "train/loss"]) == 2


def test_mlflow_reads_what_was_exported(tmp_path, capsys):
    mlflow = pytest.importorskip("mlflow")
    out = export("mlflow", tmp_path, capsys)
    client = mlflow.MlflowClient(tracking_uri=out.resolve().as_uri())
    experiment = client.get_experiment_by_name("my runs")
    runs = client.search_runs([experiment.experiment_id])
    first, second = sorted(runs, key=lambda run: run.data.params["seed"])
    assert (first.info.status, second.info.status) == ("FINISHED", "RUNNING")
    assert "-s1-" in first.info.run_name and first.data.metrics["final/val_auc"] == 0.91
    assert first.data.params["quarantine_reasons"].startswith("nan,range")
    history = client.get_metric_history(first.info.run_id, "train/grad_norm")
    assert [(point.step, point.value) for point in history] == [(1, 1.0), (2, 1 / 2), (3, 1 / 3)]
    assert second.info.start_time == 1767225600000
    assert second.data.tags["mlflow.source.git.commit"] == "c0ffee"
