"""Run folders are listed whatever state they are in, selected, compared and averaged, and never
mixed up or lost.
"""

import functools
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
    differing_keys,
    group_seeds,
    list_runs,
    read_flat_yaml,
    read_run,
    select_runs,
    table_of_runs,
)

forked = multiprocessing.get_context("fork")
BASELINES = {"constant_auc": 0.5, "always_positive_f2": 5 / 6}


# ---- run folders, written by the tracker, without the training that takes the time


def note_steps(log, progress, num: int) -> None:
    log.start_epoch()
    for _ in range(num):
        progress["num_steps"] += 1
        batch = SimpleNamespace(keys=np.arange(2), num_rows=2, wait_s=0.0)
        loss, grad_norm = torch.tensor([0.5, 1.0 / progress["num_steps"]], dtype=torch.float64)
        log.add_step(SimpleNamespace(loss=loss, grad_norm=grad_norm), batch, 0.1)


def write_run(runs, *overrides, status="finished", num_steps=3, auc=0.9, data="ab", **meta) -> Path:
    """A run folder as training leaves it; status '' is one that is not over."""
    run = rundir.create_run(runs, load_config(overrides=overrides))
    about = {
        "pid": os.getpid(),
        "process_start": rundir.process_start(os.getpid()),
        "machine": {"host": platform.node()},
    }
    rundir.write_meta(run, about | {"data": {"x": data}, "rows": {"train": {"num": 100}}} | meta)
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


def ended_process() -> dict:
    """What meta.json says of a process that has ended."""
    code = (
        "import os; from lib.rundir import process_start as p; print(os.getpid(), p(os.getpid()))"
    )
    out = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=rundir.REPOSITORY,
        check=True,
    ).stdout
    return dict(zip(("pid", "process_start"), (int(out.split()[0]), out.split()[1]), strict=True))


def age(run: Path, seconds: float) -> None:
    for path in run.iterdir():
        os.utime(path, (time.time() - seconds,) * 2)


# ---- listing


def test_the_state_of_a_run_is_told_from_its_folder_and_its_process(tmp_path):
    elsewhere, ended = {"machine": {"host": "another"}}, ended_process()
    made = {
        "finished": write_run(tmp_path),
        "diverged": write_run(tmp_path, status="diverged"),
        "running": write_run(tmp_path, status=""),
        "dead": write_run(tmp_path, status="", **ended),
        "running elsewhere": write_run(tmp_path, status="", **elsewhere),
        "dead elsewhere": write_run(tmp_path, status="", **elsewhere),
        "dead, its number taken": write_run(tmp_path, status="", process_start="1"),
        "interrupted": write_run(tmp_path, status="", **ended),
        "running, so young": rundir.create_run(tmp_path, load_config()),
        "unreadable": write_run(tmp_path),
    }
    age(made["dead elsewhere"], SILENT_S + 60)
    age(made["running"], SILENT_S + 60)  # it lives, so it may take its time
    rundir.write_stop(made["interrupted"], "interrupted", 3)
    (made["unreadable"] / "summary.json").write_text("{")
    (tmp_path / "no run").mkdir()
    (tmp_path / "a file").write_text("")
    found = {row["run"]: row["status"] for row in list_runs(tmp_path)}
    assert found == {run.name: re.split("[ ,]", status)[0] for status, run in made.items()}
    rundir.write_meta(made["interrupted"], read_json(made["running"] / "meta.json"))  # resumed
    assert (
        read_run(made["interrupted"])["status"] == "running"
        and read_run(made["interrupted"])["num_starts"] == 2
    )


def test_a_run_that_is_not_over_shows_its_best_epoch_so_far(tmp_path):
    run = write_run(tmp_path, status="", auc=0.75)
    row = read_run(run)
    assert (row["val_auc"], row["num_epochs"], row["num_steps"]) == (0.75, 1, 3)


def test_seeds_of_different_code_are_averaged_with_a_note(tmp_path, capsys):
    runs = [
        write_run(tmp_path, "seed=1", commit="a" * 40),
        write_run(tmp_path, "seed=2", commit="a" * 40, uncommitted_patch="+x"),
    ]
    assert report.main(["seeds", *map(str, runs)]) == 0
    assert "another commit and patch" in capsys.readouterr().err
    sets = [[row["seed"] for row in group] for group in group_seeds(list_runs(tmp_path))]
    assert sets == [[1], [2]]


@pytest.mark.parametrize(
    "overrides",
    [
        (),
        ("name=a: b # 'c'", 'data_dir=/x/"y" - {z}'),
        (f"data_dir={'long words ' * 30}", "quarantine=yes"),
        (
            "mlp_hidden=" + ",".join(map(str, range(100, 160))),
            "name=1e3",
            "lr=1e-5",
            "data_dir=ü: \t",
        ),
        ("data_dir=line: one\nline: two",),
    ],
)
def test_values_are_read_line_by_line_as_from_the_whole_file(overrides, tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(dump_config(load_config(overrides=overrides)), encoding="utf-8")
    assert read_flat_yaml(path) == read_yaml(path)


# ---- selecting and comparing

ROWS = [
    {
        "run": "a",
        "status": "finished",
        "seed": 1,
        "lr": 0.01,
        "symmetries": True,
        "mlp_hidden": [2, 3],
        "val_auc": 0.91,
    },
    {
        "run": "b",
        "status": "dead",
        "seed": 2,
        "lr": 0.001,
        "symmetries": False,
        "mlp_hidden": [2, 3],
        "val_auc": None,
    },
    {
        "run": "c",
        "status": "finished",
        "seed": 10,
        "lr": 0.01,
        "symmetries": True,
        "mlp_hidden": [4],
        "val_auc": 0.88,
        "job": "7",
    },
]


@pytest.mark.parametrize(
    "condition, expected",
    [
        ("val_auc>0.9", "a"),
        ("val_auc <= 0.91", "ac"),
        ("val_auc!=0.91", "bc"),
        ("lr=1e-2", "ac"),
        ("seed>=2", "bc"),
        ("status!=dead", "ac"),
        ("symmetries=true", "ac"),
        ("mlp_hidden=2,3", "ab"),
        ("job=7", "c"),
        ("run>a", "bc"),
        ("val_auc>high", ""),
        ("lr==0.01 or 1=1", ""),
        ("lr==0.001", "b"),
    ],
)
def test_a_condition_chooses_runs(condition, expected):
    assert "".join(row["run"] for row in select_runs(ROWS, [condition])) == expected


@pytest.mark.parametrize(
    "wrong", ["", "val_auc", "val_auc>>1", "vall_auc>1", "__import__('os')=1", "=1"]
)
def test_a_condition_is_never_code_and_a_wrong_one_is_refused(wrong):
    with pytest.raises(BadInput, match="--where"):
        select_runs(ROWS, [wrong])


def test_runs_are_ordered_by_numbers_as_numbers_and_what_is_missing_comes_last():
    order = [
        select_runs(ROWS, (), *by)
        for by in (("seed",), ("seed", True), ("val_auc",), ("val_auc", True))
    ]
    assert ["".join(row["run"] for row in rows) for rows in order] == ["abc", "cba", "cab", "acb"]
    assert "".join(row["run"] for row in select_runs(ROWS, ["val_auc>0", "seed>1"])) == "c"
    with pytest.raises(BadInput, match="did you mean 'seed'"):
        select_runs(ROWS, (), "sed")


def test_only_keys_that_differ_are_compared():
    assert differing_keys(ROWS) == ["seed", "mlp_hidden", "symmetries", "lr"]
    table = table_of_runs([ROWS[0], ROWS[2]])
    assert table.header[:4] == ["run", "status", "seed", "mlp_hidden"]
    assert table.rows[1][:4] == ["c", "finished", 10, [4]]
    assert differing_keys([]) == differing_keys(ROWS[:1]) == []


# ---- seeds and folds


def test_the_mean_over_seeds_has_students_interval(tmp_path):
    stats = pytest.importorskip("scipy.stats")
    rows = [
        read_run(write_run(tmp_path, f"seed={seed}", auc=auc))
        for seed, auc in ((1, 0.90), (2, 0.93), (3, 0.96))
    ]
    spread = average_scores(rows, "seed")["val_auc"]
    low, high = stats.t.interval(0.95, 2, 0.93, 0.03 / 3**0.5)
    assert spread == pytest.approx(
        {"mean": 0.93, "deviation": 0.03, "low": low, "high": high, "num": 3}, abs=1e-8
    )


@pytest.mark.parametrize(
    "changes, told",
    [
        ({}, "at least two"),
        ({"overrides": ["seed=1"]}, "share seed 1"),
        ({"overrides": ["seed=2", "lr=1e-3"]}, "lr is '0.02' in"),
        ({"overrides": ["seed=2", "views=1"]}, "views is '8' in"),
        ({"overrides": ["seed=2"], "data": "cd"}, "data is "),
        ({"overrides": ["seed=2"], "rows": {"train": {"num": 99}}}, "num_train is '100' in"),
        ({"overrides": ["seed=2"], "status": ""}, "is running: only finished"),
        ({"overrides": ["seed=2"], "status": "diverged"}, "is diverged: only finished"),
        ({"overrides": ["seed=2", "num_folds=3", "fold=1"]}, "fold is '0' in"),
    ],
)
def test_runs_that_are_no_repetitions_are_not_averaged(changes, told, tmp_path):
    rows = [read_run(write_run(tmp_path, "seed=1"))]
    if changes:
        rows.append(read_run(write_run(tmp_path, *changes.pop("overrides"), **changes)))
    with pytest.raises(BadInput, match=told):
        average_scores(rows, "seed")
    if len(rows) > 1 and "seed=1" not in str(rows[1]):
        free = write_run(
            tmp_path,
            "seed=5",
            "name=x",
            "data_dir=/elsewhere",
            "data_residence=host",
            "checkpoint_every_steps=3",
        )
        assert average_scores([rows[0], read_run(free)], "seed")["val_auc"]["num"] == 2


def test_the_spread_over_folds_stands_beside_that_over_seeds(tmp_path, capsys):
    seeds = [
        str(write_run(tmp_path, f"seed={seed}", auc=auc)) for seed, auc in ((1, 0.90), (2, 0.92))
    ]
    keys = ("num_folds=3", "seed=4")
    folds = [
        str(write_run(tmp_path, *keys, f"fold={fold}", auc=0.7 + fold / 10)) for fold in range(3)
    ]
    page = tmp_path / "p.html"
    assert report.main(["seeds", *seeds, "--folds", *folds, "--html", str(page)]) == 0
    out, err = capsys.readouterr()
    result = json.loads(out.splitlines()[-1])
    assert result["num_runs"] == 5 and result["folds"]["val_auc"]["deviation"] == pytest.approx(0.1)
    assert (
        result["seeds"]["val_auc"]["mean"] == pytest.approx(0.91)
        and "0.833333" in err
        and "0.0141421" in err
    )
    text = page.read_text()
    assert all(
        source.startswith("data:") for source in re.findall(r'(?:src|href)="([^"]{0,30})', text)
    ), "self-contained"
    assert "gradient norm" in text and "learning rate" in text and "deviation over folds" in text
    assert (
        report.main(["folds", *folds[:2], "--seeds", *folds]) == 2
        and "share seed 4" in capsys.readouterr().err
    )
    assert report.main(["folds", *seeds]) == 2 and "share fold 0" in capsys.readouterr().err


def test_report_lists_runs_and_draws_those_that_are_chosen(tmp_path, capsys):
    runs = tmp_path / "runs"
    for seed in range(4):
        write_run(
            runs,
            f"seed={seed}",
            "name=a & b",
            auc=0.8 + seed / 100,
            status="finished" if seed else "",
        )
    capsys.readouterr()
    command = ["runs", "--runs", str(runs), "--sort", "val_auc", "--descending"]
    page = tmp_path / "runs.html"
    assert (
        report.main(
            [*command, "--where", "status=finished", "--where", "seed>1", "--html", str(page)]
        )
        == 0
    )
    out, err = capsys.readouterr()
    assert json.loads(out.splitlines()[-1]) == {"num_runs": 2, "finished": 2, "page": str(page)}
    assert [re.search(r"-s(\d)-", line)[1] for line in err.splitlines()[1:]] == [
        "3",
        "2",
    ] and "a &amp; b-s3" in page.read_text()
    assert (
        report.main([*command[:3], "--where", "seed>9"]) == 0
        and '"num_runs": 0' in capsys.readouterr().out
    )
    assert report.main([*command[:3], "--where", "seed>9", "--html", str(page)]) == 2
    assert "0 runs cannot be drawn" in capsys.readouterr().err
    assert (
        report.main(["runs", "--runs", str(tmp_path / "nowhere")]) == 2
        and "no folder" in capsys.readouterr().err
    )


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
    processes = [
        forked.Process(target=_start_run, args=(runs, seed, barrier)) for seed in range(num)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert not any(process.exitcode for process in processes)
    rows = {row["seed"]: row for row in list_runs(runs)}
    assert len(os.listdir(runs)) == len(rows) == num and {
        row["status"] for row in rows.values()
    } == {"finished"}
    for process, (seed, row) in zip(processes, sorted(rows.items()), strict=True):
        meta = read_json(Path(runs, row["run"], "meta.json"))
        assert meta["pid"] == process.pid and meta["number"] == seed == round(row["val_auc"] * 1000)
        assert [point["step"] for point in read_csv(Path(runs, row["run"], "steps.csv"))] == [
            "1",
            "2",
            "3",
        ]


def _write_for_ever(run, num_steps: int, pipe) -> None:
    about = {
        "pid": os.getpid(),
        "process_start": rundir.process_start(os.getpid()),
        "machine": {"host": platform.node()},
    }
    progress = {"epoch": 0, "num_steps": num_steps, "loss_sum": 0.0}
    rundir.write_meta(run, about)
    with runlog.RunLog(run, progress, time.monotonic(), 2) as log:
        for number in itertools.count():
            note_steps(log, progress, 1 + number % 7)
            log.flush()
            os.write(pipe, b"%d\n" % progress["num_steps"])
            note_steps(log, progress, number % 3)  # rows that are not on disk yet
            write_json(run / "extra.json", {"number": number, "filler": "x" * (number % 5000)})
            write_csv(
                run / "extra.csv", ["a", "b"], [[number, step] for step in range(number % 50)]
            )


def kill_while_writing(run: Path, delay_s: float) -> tuple[int, int]:
    """SIGKILL a process that writes into `run`, reading all the while: (rows lost that were
    flushed, temporary files left).
    """
    before = len(read_csv(run / "steps.csv")) if (run / "steps.csv").is_file() else 0
    told, pipe = os.pipe()
    process = forked.Process(target=_write_for_ever, args=(run, before, pipe))
    process.start()
    os.close(pipe)
    written = os.read(told, 8)  # the writing has begun
    ends_at = time.monotonic() + delay_s
    while True:
        over = time.monotonic() > ends_at
        if over:
            process.kill()
            process.join()
        row = read_run(run)
        assert row["status"] == ("dead" if over else "running")
        for name in ("steps.csv", "extra.csv"):
            rows = read_csv(run / name) if (run / name).is_file() else []
            assert [int(row["step"]) for row in rows if "step" in row] == list(
                range(1, len(rows) + 1)
            )[: len(rows) * (name[0] == "s")]
        assert (
            not (run / "extra.json").is_file()
            or read_json(run / "extra.json")["filler"].strip("x") == ""
        )
        if over:
            break
    with os.fdopen(told, "rb") as pipe_end:
        flushed = int((written + pipe_end.read()).split(b"\n")[-2])
    return max(0, flushed - len(read_csv(run / "steps.csv"))), len(list(run.glob(".*.tmp")))


def test_processes_that_start_at_once_get_a_folder_each(tmp_path):
    start_at_once(tmp_path / "runs", 20)


def test_a_killed_process_leaves_a_folder_that_reads_and_loses_no_row_that_was_flushed(tmp_path):
    run = rundir.create_run(tmp_path, load_config())
    lost = [kill_while_writing(run, delay_s)[0] for delay_s in (0.0, 0.003, 0.02, 0.05, 0.011)]
    assert lost == [0] * 5 and len(read_csv(run / "steps.csv")) > 5


# ---- other programs


@functools.cache
def is_installed(module: str) -> bool:
    return not subprocess.run(
        [sys.executable, "-c", f"import {module}"], capture_output=True
    ).returncode


def export(program: str, tmp_path, capsys) -> Path:
    runs = tmp_path / "my runs"
    write_run(runs, "seed=1", auc=0.91)
    write_run(
        runs,
        "seed=2",
        status="",
        num_steps=2,
        started_utc="2026-01-01T00:00:00+00:00",
        commit="c0ffee",
    )
    command = ["export", "--to", program, "--runs", str(runs), "--out", str(tmp_path / "out")]
    code, (out, err) = report.main(command), capsys.readouterr()
    assert code == 0 and json.loads(out.splitlines()[-1])["num_runs"] == 2, err
    assert report.main(command) == 2 and "new or an empty folder" in capsys.readouterr().err
    return tmp_path / "out"


def test_a_program_that_is_not_installed_is_named(tmp_path, capsys, monkeypatch):
    # as Python notes a module that cannot be imported
    monkeypatch.setitem(sys.modules, "mlflow", None)
    (tmp_path / "runs").mkdir()
    assert (
        report.main(
            [
                "export",
                "--to",
                "mlflow",
                "--runs",
                str(tmp_path / "runs"),
                "--out",
                str(tmp_path / "out"),
            ]
        )
        == 2
    )
    assert (
        "needs the package mlflow-skinny" in capsys.readouterr().err
        and not (tmp_path / "out").exists()
    )


@pytest.mark.skipif(not is_installed("tensorboard"), reason="needs tensorboard")
def test_tensorboard_serves_what_was_exported(tmp_path, capsys):
    import urllib.error
    import urllib.request

    out = export("tensorboard", tmp_path, capsys)
    command = [
        sys.executable,
        "-m",
        "tensorboard.main",
        "--logdir",
        str(out),
        "--port",
        "0",
        "--load_fast",
        "false",
    ]
    server = subprocess.Popen([*command, "--host", "127.0.0.1"], stderr=subprocess.PIPE, text=True)
    try:
        url = next(
            found[1]
            for line in server.stderr
            if (found := re.search(r"(http://127\.0\.0\.1:\d+/)", line))
        )

        def get(path):
            with urllib.request.urlopen(f"{url}data/plugin/{path}", timeout=60) as answer:
                return json.load(answer)

        deadline = time.monotonic() + 120
        while len(tags := get("scalars/tags")) < 2 and time.monotonic() < deadline:
            time.sleep(0.2)
        first, second = sorted(tags, key=lambda name: "-s2-" in name)
        assert {"train/loss", "train/lr", "epoch/val_auc"} <= tags[first].keys()
        points = get(f"scalars/scalars?run={urllib.request.quote(first)}&tag=train%2Fgrad_norm")
        assert [point[1] for point in points] == [1, 2, 3] and [
            point[2] for point in points
        ] == pytest.approx([1, 1 / 2, 1 / 3])
        assert get(f"scalars/scalars?run={urllib.request.quote(first)}&tag=epoch%2Fval_auc")[0][
            2
        ] == pytest.approx(0.91)
        assert len(get(f"scalars/scalars?run={urllib.request.quote(second)}&tag=train%2Floss")) == 2
    finally:
        server.kill()
        server.communicate()


@pytest.mark.skipif(not is_installed("mlflow"), reason="needs mlflow-skinny")
def test_mlflow_reads_what_was_exported(tmp_path, capsys):
    import mlflow

    out = export("mlflow", tmp_path, capsys)
    client = mlflow.MlflowClient(tracking_uri=out.resolve().as_uri())
    experiment = client.get_experiment_by_name("my runs")
    first, second = sorted(
        client.search_runs([experiment.experiment_id]), key=lambda run: run.data.params["seed"]
    )
    assert (first.info.status, second.info.status) == (
        "FINISHED",
        "RUNNING",
    ) and "-s1-" in first.info.run_name
    assert first.data.metrics["final/val_auc"] == 0.91 and first.data.params[
        "quarantine_reasons"
    ].startswith("nan,range")
    history = client.get_metric_history(first.info.run_id, "train/grad_norm")
    assert [(point.step, point.value) for point in history] == [(1, 1.0), (2, 1 / 2), (3, 1 / 3)]
    assert (
        second.info.start_time == 1767225600000
        and second.data.tags["mlflow.source.git.commit"] == "c0ffee"
    )
    assert [
        run.info.run_id
        for run in client.search_runs([experiment.experiment_id], "metrics.`final/val_auc` > 0.9")
    ] == [first.info.run_id]
