"""Run folders are listed whatever state they are in, selected, compared and averaged, and never
mixed up.
"""

import json
import os
import re
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import report
from lib import rundir
from lib.command import BadInput
from lib.config import dump_config, load_config, read_yaml
from lib.files import write_csv, write_json
from lib.report.runs import (
    SILENT_S,
    average_scores,
    group_seeds,
    list_runs,
    read_flat_yaml,
    read_run,
    select_runs,
)


def write_run(runs, *overrides, status="finished", num_steps=3, auc=0.9, data="ab", **meta) -> Path:
    """A run folder as training leaves it, without the training that takes the time; status '' is
    one that is not over.
    """
    run = rundir.create_run(runs, load_config(overrides=overrides))
    about = {"data": {"x": data}, "rows": {"train": {"num": 100}}, "argv": ["train.py"]}
    about |= {"started_utc": "2026-01-01T00:00:00+00:00", "commit": "c0ffee"}
    rundir.write_meta(run, about | meta)
    steps = [(step, 1, 0.5, 1 / step, 0.1) for step in range(1, num_steps + 1)]
    write_csv(run / "steps.csv", ("step", "epoch", "loss", "grad_norm", "lr"), steps)
    scores = dict.fromkeys([f"val_{name}" for name in rundir.SCORES], 0.5) | {"val_auc": auc}
    epoch = {"epoch": 1, "step": num_steps, "is_best": 1, "train_loss": 0.5} | scores
    write_csv(run / "epochs.csv", epoch, [epoch.values()])
    if status:
        summary = {"status": status, "num_epochs": 1, "wall_s": 1.5, "always_positive_f2": 5 / 6}
        write_json(run / "summary.json", summary | scores)
    return run


def call(capsys, *arguments, code=0) -> tuple[dict, str]:
    """Call report.py in this process: its JSON, and what it says on stderr."""
    assert report.main([*map(str, arguments)]) == code
    out, err = capsys.readouterr()
    return json.loads(out.splitlines()[-1]), err


# ---- listing


def test_the_state_of_a_run_is_told_from_its_folder(tmp_path):
    runs = {
        "finished": write_run(tmp_path),
        "running": write_run(tmp_path, status="", auc=0.75),
        "dead": write_run(tmp_path, status=""),
        "interrupted": write_run(tmp_path, status=""),
        "running, so young": rundir.create_run(tmp_path, load_config()),
        "unreadable": write_run(tmp_path),
    }
    for path in runs["dead"].iterdir():
        os.utime(path, (time.time() - SILENT_S - 60,) * 2)
    rundir.write_stop(runs["interrupted"], "interrupted", 3)
    (runs["unreadable"] / "summary.json").write_text("{")
    (tmp_path / "no run").mkdir()
    (tmp_path / "a file").touch()
    statuses = {row["run"]: row["status"] for row in list_runs(tmp_path)}
    assert statuses == {run.name: re.split("[ ,]", status)[0] for status, run in runs.items()}
    row = read_run(runs["running"])
    assert (row["val_auc"], row["num_epochs"]) == (0.75, 1), "of the best epoch so far"


def test_a_run_of_an_older_or_another_program_is_a_row_with_blanks(tmp_path, capsys):
    for seed in (1, 2):
        run = tmp_path / f"old-s{seed}"
        run.mkdir()
        (run / "config.yaml").write_text(f"seed: {seed}\n")
        write_json(run / "summary.json", {"status": "finished", "val_auc": 0.9})
    assert call(capsys, "runs", "--runs", tmp_path)[0]["num_runs"] == 2
    result, _ = call(capsys, "seeds", "--runs", tmp_path, "--where", "seed>0")
    assert list(result["seeds"]) == ["val_auc"]


@pytest.mark.parametrize(
    "overrides",
    [
        (),
        ("name=a: b # 'c'", 'data_dir=/x/"y" - {z}', "quarantine=yes"),
        ("name=1e3", "lr=1e-5", "data_dir=ü: \t"),
        ("data_dir=line: one\nline: two",),
    ],
)
def test_values_are_read_line_by_line_as_from_the_whole_file(overrides, tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(dump_config(load_config(overrides=overrides)), encoding="utf-8")
    assert read_flat_yaml(path) == read_yaml(path)


# ---- selecting and comparing

ROWS = [
    {"run": "a", "status": "finished", "seed": 1, "lr": 0.01, "symmetries": True, "val_auc": 0.91},
    {"run": "b", "status": "dead", "seed": 2, "lr": 0.001, "mlp_hidden": [2, 3]},
    {"run": "c", "status": "finished", "seed": 10, "lr": 0.01, "val_auc": 0.88, "job": "7"},
]


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
        "symmetries=true": "a",
        "mlp_hidden=2,3": "b",
        "job=7": "c",
        "run>a": "bc",
        "lr=0.01 or 1=1": "",
    }
    assert {condition: names_of([condition]) for condition in expected} == expected
    assert names_of(["val_auc>0", "seed>1"]) == "c"
    for wrong in ("", "val_auc", "val_auc>>1", "vall_auc>1", "__import__('os')=1", "=1"):
        with pytest.raises(BadInput, match="--where"):
            names_of([wrong])


def test_runs_are_ordered_by_numbers_as_numbers_and_what_is_missing_comes_last():
    assert names_of((), "seed") == "abc" and names_of((), "-seed") == "cba"
    assert names_of((), "val_auc") == "cab" and names_of((), "-val_auc") == "acb"
    with pytest.raises(BadInput, match="did you mean 'seed'"):
        names_of((), "sed")


# ---- seeds and folds


def test_the_interval_over_seeds_stays_within_what_is_possible():
    rows = []
    for seed, auc in enumerate((0.99, 1.0, 0.95)):
        rows.append({"run": seed, "status": "finished", "seed": seed, "val_auc": auc})
    assert average_scores(rows, "seed")["val_auc"]["high"] == 1.0


NO_REPETITIONS = (
    (["seed=1"], {}, "3 runs with 2 seed"),
    (["seed=2", "lr=1e-3"], {}, "another lr than .*: 0.001, not 0.02"),
    (["seed=2"], {"data": "cd"}, "another data"),
    (["seed=2"], {"rows": {"train": {"num": 99}}}, "another num_train"),
    (["seed=2"], {"status": ""}, "is running: only finished"),
    (["seed=2", "num_folds=3", "fold=1"], {}, "another fold"),
)


def test_runs_that_are_no_repetitions_are_not_averaged(tmp_path):
    rows = [read_run(write_run(tmp_path, "seed=1"))]
    with pytest.raises(BadInput, match="two or more"):
        average_scores(rows, "seed")
    free = ("name=x", "data_dir=/elsewhere", "data_residence=host", "checkpoint_every_steps=3")
    rows.append(read_run(write_run(tmp_path, "seed=5", *free)))
    assert average_scores(rows, "seed")["val_auc"]["num"] == 2
    for overrides, meta, sentence in NO_REPETITIONS:
        row = read_run(write_run(tmp_path, *overrides, **meta))
        with pytest.raises(BadInput, match=sentence):
            average_scores([*rows, row], "seed")


def test_seeds_and_folds_are_averaged(tmp_path, capsys):
    runs = [write_run(tmp_path, "seed=1", auc=0.9), write_run(tmp_path, "seed=2", auc=0.92)]
    page = tmp_path / "p.html"
    result, err = call(capsys, "seeds", *runs, "--html", page)
    assert result["num_runs"] == 2 and result["seeds"]["val_auc"]["mean"] == pytest.approx(0.91)
    assert "0.910 ± 0.014" in err and "worse than the constant answer, 0.8333" in err
    assert "<img " in page.read_text()
    for fold in range(3):
        write_run(tmp_path, "num_folds=3", "seed=4", f"fold={fold}", auc=0.7 + fold / 10)
    result, _ = call(capsys, "folds", "--runs", tmp_path, "--where", "num_folds=3")
    assert result["folds"]["val_auc"]["deviation"] == pytest.approx(0.1)
    patched = write_run(tmp_path, "seed=3", uncommitted_patch="+x")
    _, err = call(capsys, "seeds", *runs, patched)
    assert "another code" in err
    sets = [[row["seed"] for row in group] for group in group_seeds(list_runs(tmp_path))]
    assert sets[0] == [1, 2] and [3] in sets


def test_report_lists_runs_and_draws_those_that_are_chosen(tmp_path, capsys):
    page = tmp_path / "runs.html"
    for seed in range(3):
        write_run(tmp_path / "runs", f"seed={seed}", "name=a & b", auc=0.8 + seed / 100)
    command = ["runs", "--runs", tmp_path / "runs", "--sort=-val_auc", "--html", page, "--where"]
    result, err = call(capsys, *command, "seed>0")
    assert result == {"num_runs": 2, "page": str(page)}
    assert re.findall(r"-s(\d)-", err) == ["2", "1"] and "a &amp; b-s2" in page.read_text()
    _, err = call(capsys, *command, "seed>9", code=2)
    assert "0 runs cannot be drawn" in err
    _, err = call(capsys, "runs", "--runs", tmp_path / "nowhere", code=2)
    assert "nowhere" in err


# ---- many at once


def test_runs_that_start_at_once_get_a_folder_each(tmp_path, monkeypatch):
    # so few names that each is wanted more than once
    monkeypatch.setattr(rundir.secrets, "token_hex", lambda _: os.urandom(1).hex())
    cfg = load_config()
    with ThreadPoolExecutor(8) as pool:
        runs = list(pool.map(lambda _: rundir.create_run(tmp_path, cfg), range(60)))
    assert len(set(runs)) == len(list_runs(tmp_path)) == 60


# ---- other programs


def export(program: str, tmp_path, capsys) -> Path:
    """The folder into which a finished run and a running one were exported."""
    runs = tmp_path / "my runs"
    out = tmp_path / "out"
    write_run(runs, "seed=1", auc=0.91)
    write_run(runs, "seed=2", status="", num_steps=2)
    command = ["export", "--to", program, "--runs", runs, "--out", out]
    assert call(capsys, *command)[0]["num_runs"] == 2
    return out


def test_tensorboard_reads_what_was_exported(tmp_path, capsys):
    name = "tensorboard.backend.event_processing.event_accumulator"
    library = pytest.importorskip(name)
    (run,) = export("tensorboard", tmp_path, capsys).glob("*-s1-*")
    events = library.EventAccumulator(str(run)).Reload()
    norms = [(event.step, event.value) for event in events.Scalars("train/grad_norm")]
    assert norms == [(1, 1.0), (2, 1 / 2), (3, pytest.approx(1 / 3))]


@pytest.mark.slow
def test_mlflow_reads_what_was_exported(tmp_path, capsys):
    mlflow = pytest.importorskip("mlflow")
    out = export("mlflow", tmp_path, capsys)
    client = mlflow.MlflowClient(tracking_uri=out.resolve().as_uri())
    experiment = client.get_experiment_by_name("my runs")
    runs = client.search_runs([experiment.experiment_id], order_by=["params.seed"])
    assert [run.info.status for run in runs] == ["FINISHED", "RUNNING"]
    assert runs[0].data.metrics["final/val_auc"] == 0.91
    assert runs[0].info.start_time == 1767225600000
    history = client.get_metric_history(runs[0].info.run_id, "train/grad_norm")
    assert [(point.step, point.value) for point in history] == [(1, 1.0), (2, 1 / 2), (3, 1 / 3)]
