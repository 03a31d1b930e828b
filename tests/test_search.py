"""The search: a plan is frozen, a row is carried out once whatever is killed, and what run folders
say decides.
"""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import yaml
from conftest import QUICK, REPOSITORY, run_script, write_pcam
from slurm_cluster import wait_for

from lib import rundir
from lib.command import BadInput
from lib.config import load_config
from lib.files import read_csv, read_json, write_csv, write_json
from lib.sweep import champion, design, page, rungs, trainers
from lib.sweep.page import write_sweep_page

SPACE = {
    "design": "sobol",
    "trials": 9,
    "seed": 1,
    "seeds": [1],
    "rungs": [1, 3],
    "champion_seeds": 3,
    "ranges": {
        "lr": {"log": ["1e-4", 0.1]},
        "weight_decay": {"range": [0, 0.1]},
        "batch_size": {"choice": [16, 32]},
    },
}
RATES = [0.001, 0.003, 0.01, 0.02, 0.05, 1e30]  # with the last one no network stays finite
TINY = [
    "model=mlp",
    "mlp_hidden=4",
    "optimizer=sgd",
    "limit_train=64",
    "limit_valid=32",
    *QUICK[1:4],
    "views=1",
]


def plan(tmp_path, name="s", overrides=(), **changes) -> rungs.Sweep:
    """A planned search in `tmp_path`, with its runs beside it."""
    path = tmp_path / f"{name}.yaml"
    path.write_text(yaml.safe_dump(SPACE | changes))
    design.freeze(tmp_path / name, path, REPOSITORY / "config.yaml", list(overrides))
    return rungs.load_sweep(tmp_path / name, tmp_path / "runs")


def leave_run(sweep, row, aucs, status="finished", **summary) -> Path:
    """The run folder that a trial leaves which scored so in its epochs; without a summary where it
    paused.
    """
    values = {"name": sweep.run_name(row.trial), "seed": row.seed}
    run = rundir.create_run(
        sweep.runs_dir,
        load_config(sweep.folder / "config.yaml", [f"{k}={v}" for k, v in values.items()]),
    )
    write_csv(run / "epochs.csv", ["epoch", "val_auc"], enumerate(aucs, 1))
    if status:
        write_json(
            run / "summary.json", {"status": status, "val_auc": max(aucs, default=None), **summary}
        )
    return run


def leave_rung(sweep, rung, scores):
    """Runs of a rung, each with one of the scores, in the order of the rows."""
    for row, score in zip(sweep.rows(rung), scores, strict=True):
        leave_run(
            sweep, row, [0.5, score] if row.epochs > 1 else [score], "finished" if rung else None
        )


# the plan


def test_a_plan_is_frozen_and_the_same_seed_makes_the_same_one(tmp_path):
    first, again = plan(tmp_path), plan(tmp_path)
    assert (
        first.plan == again.plan
        and len(first.plan["sha256"]) == 64
        and len(first.plan["trials"]) == 9
    )
    assert first.plan["trials"] != plan(tmp_path, "other", seed=2).plan["trials"]
    with pytest.raises(BadInput, match="holds another plan"):
        plan(tmp_path, seed=2)
    changed = read_json(first.folder / "plan.json")
    changed["trials"]["t000"]["lr"] = 0.5
    write_json(first.folder / "plan.json", changed)
    with pytest.raises(BadInput, match="was changed after the plan was frozen"):
        rungs.load_sweep(first.folder, tmp_path)


def test_a_sobol_design_fills_each_range_evenly_in_its_own_scale(tmp_path):
    trials = list(plan(tmp_path, trials=64).plan["trials"].values())
    for low, high in ((1e-4, 1e-3), (1e-3, 1e-2), (1e-2, 1e-1)):
        assert 20 <= sum(low <= trial["lr"] < high for trial in trials) <= 23
    assert (
        sum(trial["weight_decay"] < 0.05 for trial in trials)
        == sum(trial["batch_size"] == 16 for trial in trials)
        == 32
    )


def test_a_grid_has_every_combination_once(tmp_path):
    ranges = {
        "lr": {"choice": RATES},
        "model": {"choice": ["cnn", "mlp"]},
        "mlp_hidden": {"choice": [[8], [8, 4]]},
    }
    trials = plan(tmp_path, design="grid", trials=24, ranges=ranges).plan["trials"].values()
    assert len({json.dumps(trial) for trial in trials}) == 24 and {
        trial["lr"] for trial in trials
    } == set(RATES)


@pytest.mark.parametrize(
    "changes, sentence",
    [
        ({"ranges": {"lrr": {"choice": [1]}}}, "unknown key 'lrr', did you mean 'lr'?"),
        (
            {"ranges": {"lr": {"log": [0, 1]}}},
            "lr is {'log': \\[0, 1\\]}, on a sobol design it must be log",
        ),
        ({"ranges": {"lr": {"range": [2, 1]}}}, "it must be log"),
        ({"ranges": {"lr": {"choice": []}}}, "it must be log"),
        ({"ranges": {"lr": 0.1}}, "it must be log"),
        ({"ranges": {"lr": {"range": ["a", 1]}}}, "must be a number"),
        ({"ranges": {"batch_size": {"range": [-9, -1]}}}, "trial 0|batch_size"),
        ({"ranges": {"epochs": {"choice": [1, 2]}}}, "epochs cannot be searched over"),
        ({"ranges": {}}, "ranges must hold config keys"),
        ({"design": "grid"}, "on a grid design it must be choice"),
        (
            {"design": "grid", "ranges": {"lr": {"choice": [0.1, 0.2]}}},
            "trials is 9, but the grid has 2 points",
        ),
        ({"design": "random"}, "one of sobol, grid"),
        ({"rungs": [3, 1]}, "rising numbers of epochs"),
        ({"rungs": []}, "rising numbers of epochs"),
        ({"seeds": []}, "seeds at least one"),
        ({"seeds": [1, 1]}, "seeds must differ"),
        ({"seed": 10**20}, "seed"),
        ({"ranges": {"views": {"choice": [1, 8]}}}, "views cannot be searched over"),
        ({"trials": 0}, "of 1 or more"),
        ({"champion_seeds": 0}, "champion_seeds"),
        ({"finalists": 0}, "finalists"),
        ({"trails": 9}, "unknown key 'trails', did you mean 'trials'?"),
        ({"overrides": ["epochs=3"]}, "epochs=3: the search sets"),
        ({"overrides": ["modell=cnn"]}, "unknown key 'modell'"),
        ({"name": "a b"}, "'a b' is no name of a search"),
    ],
)
def test_a_space_that_cannot_be_meant_is_refused_and_nothing_is_written(
    changes, sentence, tmp_path
):
    with pytest.raises(BadInput, match=sentence):
        plan(tmp_path, **changes)
    assert [entry.suffix for entry in tmp_path.iterdir()] == [".yaml"]


# what run folders say


def test_the_best_third_goes_on_and_whoever_promotes_again_writes_the_same_bytes(tmp_path):
    sweep = plan(tmp_path)
    rows, scores = sweep.rows(0), [0.7, 0.9, 0.6, 0.8, 0.9, 0.5, 0.65, 0.95]
    leave_rung(sweep, 0, [*scores, 0.55])
    failed = sweep.run_of(rows[7])
    write_csv(failed / "epochs.csv", ["epoch", "val_auc"], [])
    write_json(failed / "summary.json", {"status": "diverged", "diverged_step": 4})
    path = rungs.promote(sweep, 0)
    before = path.read_bytes()
    assert read_json(path)["trials"] == ["t001", "t004", "t003"], (
        "of equal ones the first; a diverged one not"
    )
    assert rungs.outcome(sweep, rows[7])["reason"] == "diverged after step 4"
    # what a trial does later changes nothing of what it was promoted for
    epochs = sweep.run_of(rows[1]) / "epochs.csv"
    epochs.write_text(epochs.read_text() + "2,0.1\n3,0.99\n")
    assert rungs.promote(sweep, 0).read_bytes() == before
    shutil.rmtree(sweep.run_of(rows[8]))
    with pytest.raises(BadInput, match="1 of 9 rows have no result, the first is row 8"):
        rungs.promote(sweep, 0)
    leave_run(sweep, rows[8], [0.99], None)
    with pytest.raises(BadInput, match="were runs removed or changed"):
        rungs.promote(sweep, 0)


def test_with_several_seeds_the_mean_counts_and_a_trial_that_failed_with_one_is_out(tmp_path):
    sweep = plan(tmp_path, trials=3, seeds=[1, 2])
    leave_rung(sweep, 0, [0.9, 0.6, 0.8, 0.8, 0.99, 0.99])
    write_csv(sweep.run_of(sweep.rows(0)[5]) / "epochs.csv", ["epoch", "val_auc"], [(1, "nan")])
    assert rungs.mean_scores(sweep, 0) == {"t001": pytest.approx(0.8), "t000": pytest.approx(0.75)}


def finals(tmp_path, *scores) -> rungs.Sweep:
    """A search whose finalists, the base last, scored so over their seeds."""
    sweep = plan(tmp_path, trials=3, rungs=[1])
    leave_rung(sweep, 0, [0.6, 0.8, 0.7])
    # with one rung of one epoch its runs are over when they have a summary
    for row in sweep.rows(0):
        write_json(sweep.run_of(row) / "summary.json", {"status": "finished", "val_auc": 0.1})
    rungs.promote(sweep, 0)
    rows = sweep.rows(1)
    assert [row.trial for row in rows[::3]] == ["t001", "t002", "t000", "base"] and {
        row.seed for row in rows
    } == {2, 3, 4}
    for row, score in zip(rows, scores, strict=True):
        leave_run(sweep, row, [0.5], val_auc=score)
    return sweep


def test_the_champion_has_the_highest_mean_and_overlapping_intervals_are_not_separable(tmp_path):
    scores = [0.90, 0.91, 0.92, 0.94, 0.90, 0.95, 0.80, 0.81, 0.82, 0.70, 0.71, 0.72]
    sweep = finals(tmp_path, *scores)
    found = champion.choose_champion(sweep)
    assert found["champion"] == "t002" and found["mean"] == pytest.approx(0.93)
    assert "not separable from t001: " in found["note"] and found["run"] == str(
        sweep.run_of(sweep.rows(1)[5])
    )
    # mean of three +- 4.303 s / sqrt(3), from a table of Student's t
    low, high = (
        next(f for f in found["finalists"] if f["trial"] == "base")[side]
        for side in ("low", "high")
    )
    assert (low, high) == (
        pytest.approx(0.71 - 0.02484, abs=1e-5),
        pytest.approx(0.71 + 0.02484, abs=1e-5),
    )


def test_a_champion_apart_from_all_others_is_said_to_be(tmp_path):
    found = champion.choose_champion(
        finals(
            tmp_path, 0.90, 0.901, 0.902, 0.6, 0.601, 0.602, 0.7, 0.701, 0.702, 0.5, 0.501, 0.502
        )
    )
    assert found["note"] == "t001 has the highest mean AUC, apart from all others"


@pytest.mark.slow
def test_the_test_split_is_opened_once_and_on_record(tmp_path, quick_run, pcam_dir):
    data = shutil.copytree(pcam_dir, tmp_path / "data")
    for part in "xy":
        shutil.copy(
            *(
                data / f"camelyonpatch_level_2_split_{split}_{part}.h5"
                for split in ("valid", "test")
            )
        )
    sweep = finals(tmp_path, *[0.9, 0.901, 0.902] * 3, 0.8, 0.801, 0.802)
    for row in sweep.rows(1):
        shutil.copy(quick_run / "best.pt", sweep.run_of(row))
    command = [
        "champion",
        "s",
        "--sweeps",
        tmp_path,
        "--runs",
        tmp_path / "runs",
        "--open-test",
        f"data_dir={data}",
    ]
    result = run_script("sweep.py", *command, check=0).json
    record = next(tmp_path.glob("test-opened-*.json"))
    before = read_json(record)
    assert (
        before["who"]
        and before["when_utc"]
        and before["run"] == result["run"]
        and before["auc"] == result["test"]["auc"]
    )
    assert (
        0 < before["auc"] <= 1
        and "not separable" in result["note"]
        and Path(result["page"]).is_file()
    )
    refused = run_script("sweep.py", *command, check=2)
    assert (
        "is opened once" in refused.stderr
        and before["when_utc"] in refused.stderr
        and f"{before['auc']}" in refused.stderr
    )
    assert read_json(record) == before


# rows as real processes


def sweep_script(folder, *arguments, **options):
    return run_script(
        "sweep.py", *arguments, "--sweeps", folder, "--runs", folder / "runs", **options
    )


@pytest.fixture(scope="module")
def killed(tmp_path_factory, pcam_dir) -> rungs.Sweep:
    """A search of which every process was killed half-way, then carried on by two at once, and
    promoted to its end.
    """
    tmp_path = tmp_path_factory.mktemp("sweep")
    num = int(os.environ.get("NUM_TRIALS", len(RATES)))  # a longer one: NUM_TRIALS=54
    rates = [*RATES[:-1], *(0.05 + 0.001 * n for n in range(num - len(RATES))), RATES[-1]]
    space = {"design": "grid", "trials": num, "rungs": [1, 2], "ranges": {"lr": {"choice": rates}}}
    sweep = plan(tmp_path, overrides=[f"data_dir={pcam_dir}", *TINY], **space)
    command = [
        sys.executable,
        REPOSITORY / "sweep.py",
        "run",
        "s",
        "--all",
        "--processes",
        "2",
        "--sweeps",
        tmp_path,
    ]
    command += ["--runs", tmp_path / "runs"]
    start = {
        "env": os.environ | {"OMP_NUM_THREADS": "1"},
        "stdout": subprocess.PIPE,
        "text": True,
        "start_new_session": True,
    }
    process = subprocess.Popen(command, **start)
    wait_for(
        lambda: len(list((tmp_path / "runs").glob("*/last.pt"))) >= num // 2 - 1,
        "half of the trials",
        600,
    )
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    done = {row.trial: rungs.outcome(sweep, row)["state"] for row in sweep.rows(0)}
    write_json(tmp_path / "before.json", done)
    both = [subprocess.Popen(command, **start) for _ in range(2)]
    results = [json.loads(each.communicate(timeout=600)[0].splitlines()[-1]) for each in both]
    write_json(tmp_path / "results.json", {"results": results})
    assert max(each.returncode for each in both) == 1, "a failed trial is a finding"
    return sweep


def test_a_killed_search_goes_on_where_it_was_and_two_that_go_on_do_each_row_once(killed):
    states = set(read_json(killed.folder.parent / "before.json").values())
    assert "todo" in states and "done" in states
    assert len(list(killed.runs_dir.iterdir())) == len(killed.rows(0)), "one run a row"
    outcomes = {row.trial: rungs.outcome(killed, row) for row in killed.rows(0)}
    *others, last = outcomes.values()
    assert {each["state"] for each in others} == {"done"} and last["reason"].startswith(
        "diverged after step"
    )


def test_a_second_run_of_a_row_does_nothing(killed):
    row = killed.rows(0)[0]
    before = {path: path.stat().st_mtime_ns for path in killed.run_of(row).iterdir()}
    result = sweep_script(killed.folder.parent, "run", "s", "--rung", 0, "--row", 0, check=0)
    assert result.json["num_done"] == 1 and before == {
        path: path.stat().st_mtime_ns for path in killed.run_of(row).iterdir()
    }
    assert (
        "has the rows 0 to"
        in sweep_script(killed.folder.parent, "run", "s", "--rung", 0, "--row", 99, check=2).stderr
    )


def test_a_promoted_trial_ends_with_the_weights_of_a_run_that_never_paused(
    killed, pcam_dir, tmp_path
):
    folder = killed.folder.parent
    path = Path(sweep_script(folder, "promote", "s", "--rung", 0, check=0).json["next"])
    before = path.read_bytes()
    assert (
        sweep_script(folder, "promote", "s", check=0).json["next"] == str(path)
        and path.read_bytes() == before
    )
    trial = killed.rows(1)[0].trial
    sweep_script(folder, "run", "s", "--row", 0, check=0)
    rate, data = f"lr={killed.plan['trials'][trial]['lr']}", f"data_dir={pcam_dir}"
    alone = run_script(
        "train.py", "--runs", tmp_path, data, *TINY, rate, "seed=1", "epochs=2", check=0
    )
    run = killed.run_of(killed.rows(1)[0])
    assert read_json(run / "summary.json")["weights_sha256"] == alone.json["weights_sha256"]
    assert (
        read_json(run / "meta.json")["start_step"] == 2 and len(read_csv(run / "epochs.csv")) == 2
    )


def test_a_claimed_row_is_left_alone_until_its_last_process_is_gone(tmp_path, pcam_dir):
    sweep = plan(tmp_path, overrides=[f"data_dir={pcam_dir}", *TINY])
    row, free = sweep.rows(0)[0], lambda: trainers.claim(sweep, sweep.rows(0)[0])
    held = free()
    assert held and free() is None
    assert sweep_script(tmp_path, "run", "s", "--row", 0, check=0).json[
        "num_elsewhere"
    ] == 1 and not sweep.run_of(row)
    # a trainer that outlives the search keeps the row
    orphan = subprocess.Popen(["sleep", "60"], pass_fds=[held.fileno()])
    held.close()
    assert free() is None
    orphan.kill()
    orphan.wait()
    free().close()


@pytest.mark.slow
def test_rows_are_the_plans_and_comparable_or_refused_and_nothing_is_recorded(tmp_path, pcam_dir):
    data = shutil.copytree(pcam_dir, tmp_path / "data")
    sweep = plan(
        tmp_path,
        overrides=[f"data_dir={data}", *TINY],
        ranges={"mlp_hidden": {"choice": [[4], [4, 4]]}},
    )
    for override, sentence in (
        ("weight_decay=0.7", "weight_decay changes the weights"),
        ("views=8", "views cannot be changed after the plan"),
        ("data_dir=nowhere", "no folder nowhere"),
    ):
        assert sentence in sweep_script(tmp_path, "run", "s", "--row", 0, override, check=2).stderr
    assert not sweep.runs_dir.exists() and not (sweep.folder / "failed").exists()
    sweep_script(tmp_path, "run", "s", "--row", 0, check=0)
    write_pcam(data, seed=9)
    assert "is not the data that" in sweep_script(tmp_path, "run", "s", "--row", 1, check=2).stderr
    renamed = sweep.folder.rename(tmp_path / "t")
    assert "was planned as s" in sweep_script(tmp_path, "run", "t", "--row", 1, check=2).stderr
    renamed.rename(sweep.folder)
    (sweep.folder / "rung-1.json").write_text("{}")
    assert "does not hold trials" in sweep_script(tmp_path, "run", "s", "--all", check=2).stderr


def test_a_finalist_that_failed_is_named_and_one_alone_is_not_apart_from_others(tmp_path):
    sweep = finals(tmp_path, *[0.9, 0.91, 0.92] * 4)
    for row in sweep.rows(1):
        if row.trial != "base":
            write_json(
                sweep.run_of(row) / "summary.json", {"status": "diverged", "diverged_step": 2}
            )
    result = champion.choose_champion(sweep)
    assert result["champion"] is None
    assert result["note"].endswith(
        "base is the only finalist with a score; t001, t002, t000 failed"
    )


def test_a_trials_score_is_that_of_its_last_epoch_in_the_rung(tmp_path):
    sweep = plan(tmp_path, rungs=[3, 5])
    row = sweep.rows(0)[0]
    leave_run(sweep, row, [0.9, 0.95, 0.8, 0.99], None)
    assert rungs.outcome(sweep, row)["score"] == 0.8


@pytest.mark.parametrize(
    "scores, has_champion",
    [
        ([0.80, 0.81, 0.82] * 3 + [0.70, 0.71, 0.72], True),
        ([0.80, 0.81, 0.82] * 3 + [0.81, 0.82, 0.83], False),  # the base is better
        ([0.40, 0.45, 0.50] * 3 + [0.30, 0.35, 0.40], False),  # a constant answer is
    ],
)
def test_what_beats_neither_the_base_nor_constant_answers_is_no_champion(
    scores, has_champion, tmp_path
):
    sweep = finals(tmp_path, *scores)
    path = ("champion", "s", "--sweeps", tmp_path, "--runs", sweep.runs_dir)
    result = run_script("sweep.py", *path, check=0 if has_champion else 1).json
    assert bool(result["champion"]) == bool(result["run"]) == has_champion
    assert len(result["finalists"]) == 4 and Path(result["page"]).is_file()


@pytest.mark.parametrize("num_seeds", [1, 2])
def test_one_or_two_fresh_seeds_and_one_finalist_are_allowed_and_separate_nothing(
    num_seeds, tmp_path
):
    sweep = plan(tmp_path, trials=3, rungs=[1], champion_seeds=num_seeds, finalists=1)
    leave_rung(sweep, 0, [0.6, 0.8, 0.7])
    for row in sweep.rows(0):
        write_json(sweep.run_of(row) / "summary.json", {"status": "finished"})
    rungs.promote(sweep, 0)
    assert len(sweep.rows(1)) == sweep.num_rows(1) == 2 * num_seeds
    for row in sweep.rows(1):
        leave_run(sweep, row, [0.5], val_auc=0.6 if row.trial == "base" else 0.9)
    result = champion.choose_champion(sweep)
    assert result["champion"] == "t001" and "nothing is separable" in result["note"]
    assert "nothing is separable" in write_sweep_page(sweep, result).read_text()


def test_plan_says_how_many_trainings_follow_and_for_how_long(tmp_path, pcam_dir):
    path = tmp_path / "s.yaml"
    path.write_text(yaml.safe_dump(SPACE))
    command = ("sweep.py", "plan", path, "--sweeps", tmp_path, *TINY)
    result = run_script(*command, f"data_dir={pcam_dir}", check=0).json
    # 9 for an epoch, of which 3 for two more, and three seeds of three finalists and the base
    assert result["num_trainings"] == 9 + 12 and result["num_epochs"] == 9 + 3 * 2 + 12 * 3
    assert result["seconds"] > 0
    nowhere = run_script(*command, "--name", "t", "data_dir=nowhere", check=0)
    assert nowhere.json["seconds"] is None and nowhere.json["num_trainings"] == 21


def test_a_failure_quotes_its_error_and_no_line_of_progress(tmp_path):
    sweep = plan(tmp_path)
    row = sweep.rows(0)[0]
    log = trainers.log_of(sweep, row)
    log.parent.mkdir()
    log.write_text("epoch 1/3: 64/640 patches\nerror: no space left on device: x\nepoch 2/3: 1/2\n")
    trainers.note_end(sweep, row, 2)
    leave_run(sweep, row, [], None)
    trainers.note_end(sweep, row, 2)
    assert rungs.outcome(sweep, row)["reason"] == "exit 2: error: no space left on device: x"
    trainers.note_end(sweep, row, -signal.SIGKILL)
    (sweep.folder / "failed" / f"{row}.json").unlink()
    trainers.note_end(sweep, row, -signal.SIGKILL)
    reason = rungs.outcome(sweep, row)["reason"]
    assert reason.startswith("killed by SIGKILL") and "epoch" not in reason


def test_axes_of_aucs_stay_within_what_is_possible_and_colours_have_a_bar():
    ranges = {"lr": {"log": [0.001, 0.1]}, "batch_size": {"choice": [16, 32]}}
    trials = [
        {"lr": lr, "batch_size": size, "AUC": auc}
        for lr, size, auc in ((0.001, 16, 0.1), (0.01, 16, 0.99), (0.1, 32, 0.05), (0.05, 32, 1.0))
    ]
    for axes in page.plot_marginals(ranges, trials).axes:
        assert axes.get_ylim()[0] >= 0 and axes.get_ylim()[1] <= 1
    figure = page.plot_parallel(ranges, trials, np.array([True, False, False, True]))
    bar = figure.axes[-1]
    assert bar.get_ylim() == (0.05, 1.0) and "AUC" in bar.get_ylabel()


def running_trainers(parent: int) -> dict[str, tuple[list[str], dict[str, str]]]:
    """Arguments and environment of the processes that a search has started, by process number."""
    trainers = {}
    children = [
        path.read_text().split() for path in Path(f"/proc/{parent}/task").glob("*/children")
    ]
    for pid in sum(children, []):
        with contextlib.suppress(OSError):  # it ended meanwhile
            arguments, variables = (
                Path(f"/proc/{pid}/{name}").read_text().split("\0")
                for name in ("cmdline", "environ")
            )
            if any(word.endswith("train.py") for word in arguments):
                trainers[pid] = (
                    arguments,
                    dict(pair.split("=", 1) for pair in variables if "=" in pair),
                )
    return trainers


@pytest.mark.slow
def test_a_trial_that_dies_is_a_failure_with_a_reason_and_one_that_is_stopped_is_not(
    tmp_path, pcam_dir
):
    sweep = plan(tmp_path, overrides=[f"data_dir={pcam_dir}", *TINY])
    row = sweep.rows(0)[0]
    command = [
        sys.executable,
        REPOSITORY / "sweep.py",
        "run",
        "s",
        "--row",
        "0",
        "--sweeps",
        tmp_path,
        "--runs",
        tmp_path / "runs",
    ]

    def trainer(process):
        return wait_for(lambda: next(map(int, running_trainers(process.pid)), None), "the trainer")

    process = subprocess.Popen(command, stdout=subprocess.PIPE)
    trainer(process)
    process.send_signal(signal.SIGTERM)
    assert (
        json.loads(process.communicate(timeout=300)[0])["interrupted"] and process.returncode == 130
    )
    assert rungs.outcome(sweep, row)["state"] == "todo"
    process = subprocess.Popen(command, stdout=subprocess.PIPE)
    pid = trainer(process)
    time.sleep(0.1)
    os.kill(pid, signal.SIGKILL)
    assert (
        json.loads(process.communicate(timeout=300)[0])["num_failed"] == 1
        and process.returncode == 1
    )
    assert rungs.outcome(sweep, row)["reason"].startswith("killed by SIGKILL")


@pytest.mark.slow
def test_trials_beside_each_other_share_the_cores_and_take_the_gpus_in_turn(tmp_path, pcam_dir):
    cheap = [pair for pair in TINY if not pair.startswith("threads=")]
    plan(tmp_path, overrides=[f"data_dir={pcam_dir}", *cheap], trials=4)
    command = [
        "run",
        "s",
        "--all",
        "--processes",
        "2",
        "--sweeps",
        tmp_path,
        "--runs",
        tmp_path / "runs",
    ]
    cores = os.environ | {"SLURM_CPUS_PER_TASK": "2"}
    process = subprocess.Popen(
        [sys.executable, REPOSITORY / "sweep.py", *command], stdout=subprocess.PIPE, env=cores
    )
    slots, beside = {}, 0
    while process.poll() is None:
        with contextlib.suppress(OSError):
            trainers = running_trainers(process.pid)
            ranks = {pid: variables["LOCAL_RANK"] for pid, (_, variables) in trainers.items()}
            assert len(set(ranks.values())) == len(ranks), (
                "no two beside each other have one number"
            )
            slots.update(ranks)
            beside = max(beside, len(ranks))
            assert all("threads=1" in arguments for arguments, _ in trainers.values())
        time.sleep(0.02)
    assert (
        process.returncode == 0
        and beside == 2
        and len(slots) == 4
        and set(slots.values()) == {"0", "1"}
    )
    configs = [path.read_text() for path in (tmp_path / "runs").glob("*/config.yaml")]
    assert len(configs) == 4 and all("\nthreads: 1\n" in text for text in configs)


def test_rows_cannot_be_had_before_their_rung_or_without_a_plan(tmp_path):
    plan(tmp_path)
    assert (
        "has no rung 1 yet"
        in sweep_script(tmp_path, "run", "s", "--rung", 1, "--all", check=2).stderr
    )
    assert (
        "they are 0 to 2"
        in sweep_script(tmp_path, "run", "s", "--rung", 3, "--all", check=2).stderr
    )
    assert "is no planned search" in sweep_script(tmp_path, "promote", "t", check=2).stderr
    assert "rung 0 of" in sweep_script(tmp_path, "promote", "s", check=2).stderr
    assert (
        "unrecognized argument --rows"
        in sweep_script(tmp_path, "run", "s", "--all", "--rows", check=2).stderr
    )
