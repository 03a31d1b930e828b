"""The search: a plan is frozen, a row is carried out once whatever is killed, and what run folders
say decides.
"""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from conftest import QUICK, REPOSITORY, run_script
from slurm_cluster import wait_for

import sweep as script
from lib import rundir
from lib.command import BadInput
from lib.config import load_config
from lib.files import lock_if_possible, read_json, write_csv, write_json
from lib.sweep import design, page, rungs, trainers

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
TINY = ["model=mlp", "mlp_hidden=4", "optimizer=sgd", "limit_train=64", "limit_valid=32"]
TINY += [*QUICK[1:4], "views=1"]


def plan(tmp_path, name="s", overrides=(), **changes) -> rungs.Sweep:
    """A planned search in `tmp_path`, with its runs beside it."""
    path = tmp_path / f"{name}.yaml"
    path.write_text(yaml.safe_dump(SPACE | changes))
    design.freeze(tmp_path / name, path, REPOSITORY / "config.yaml", list(overrides))
    return rungs.load_sweep(tmp_path / name, tmp_path / "runs")


def leave_run(sweep, row, aucs, status=None, **summary) -> None:
    """The run folder that a trial leaves which scored so in its epochs; without a summary where it
    paused.
    """
    overrides = [f"name={sweep.run_name(row.trial)}", f"seed={row.seed}"]
    cfg = load_config(sweep.folder / "config.yaml", overrides)
    run = rundir.create_run(sweep.runs_dir, cfg)
    write_csv(run / "epochs.csv", ["epoch", "val_auc"], enumerate(aucs, 1))
    if status:
        write_json(run / "summary.json", {"status": status, **summary})


def finals(tmp_path, *scores, **changes) -> rungs.Sweep:
    """A search whose finalists, the base last, scored so over their seeds; None: it diverged."""
    sweep = plan(tmp_path, **{"trials": 3, "rungs": [1], **changes})
    for row, auc in zip(sweep.rows(0), (0.6, 0.8, 0.7), strict=True):
        leave_run(sweep, row, [auc], "finished")
    rungs.promote(sweep, 0)
    for row, score in zip(sweep.rows(1), scores, strict=True):
        status = "finished" if score else "diverged"
        leave_run(sweep, row, [0.5], status, val_auc=score, diverged_step=2)
    return sweep


def command(folder, *words) -> list[str]:
    """The arguments of sweep.py for a search in `folder`."""
    return [*map(str, words), "--sweeps", str(folder), "--runs", str(folder / "runs")]


@pytest.fixture
def call(tmp_path, capsys):
    """Runs sweep.py in this process: its exit code, its result, and what it says."""

    def call_script(*words):
        code = script.main(command(tmp_path, *words))
        printed = capsys.readouterr()
        return code, json.loads(printed.out.splitlines()[-1]), printed.err

    return call_script


# the plan


def test_a_plan_is_frozen_and_the_same_seed_makes_the_same_one(tmp_path):
    first, again = plan(tmp_path), plan(tmp_path)
    assert first.plan == again.plan and len(first.plan["trials"]) == 9
    with pytest.raises(BadInput, match="holds another plan"):
        plan(tmp_path, seed=2)
    changed = read_json(first.folder / "plan.json")
    changed["trials"]["t000"]["lr"] = 0.5
    write_json(first.folder / "plan.json", changed)
    with pytest.raises(BadInput, match="was changed after the plan was frozen"):
        rungs.load_sweep(first.folder, tmp_path)


def test_sobol_points_fill_each_range_evenly_and_a_grid_has_every_combination_once(tmp_path):
    trials = list(plan(tmp_path, trials=64).plan["trials"].values())
    assert 20 <= sum(1e-3 <= trial["lr"] < 1e-2 for trial in trials) <= 23, "a third"
    assert sum(trial["batch_size"] == 16 for trial in trials) == 32
    ranges = {"lr": {"choice": [0.01, 0.1, 1.0]}, "mlp_hidden": {"choice": [[8], [8, 4]]}}
    grid = plan(tmp_path, "grid", design="grid", ranges=ranges).plan["trials"]
    assert len({json.dumps(trial) for trial in grid.values()}) == 6


@pytest.mark.parametrize(
    "changes, sentence",
    [
        ({"ranges": {"lrr": {"choice": [1]}}}, "unknown key 'lrr', did you mean 'lr'?"),
        ({"ranges": {"lr": {"log": [0, 1]}}}, "lr is .* it must be"),
        ({"ranges": {"batch_size": {"range": [-9, -1]}}}, "batch_size"),
        ({"ranges": {"epochs": {"choice": [1, 2]}}}, "epochs cannot be searched over"),
        ({"design": "grid"}, "on a grid choice"),
        ({"rungs": [3, 1]}, "rungs must be"),
        ({"trails": 9}, "unknown or missing: trails"),
        ({"overrides": ["epochs=3"]}, "epochs: the search sets"),
    ],
)
def test_a_space_that_cannot_be_meant_is_refused_and_nothing_is_written(
    changes, sentence, tmp_path
):
    with pytest.raises(BadInput, match=sentence):
        plan(tmp_path, **changes)
    assert [entry.suffix for entry in tmp_path.iterdir()] == [".yaml"]


def test_plan_says_how_many_trainings_follow_and_for_how_long(tmp_path, pcam_dir, call):
    path = tmp_path / "s.yaml"
    path.write_text(yaml.safe_dump(SPACE))
    code, result, _ = call("plan", path, *TINY, f"data_dir={pcam_dir}")
    # 9 for an epoch, of which 3 for two more, and three seeds of three finalists and the base
    assert result["num_trainings"] == 9 + 12 and result["num_epochs"] == 9 + 3 * 2 + 12 * 3
    assert code == 0 and result["seconds"] > 0


# what run folders say


def test_the_best_third_goes_on_and_promoting_again_says_what_is_there(tmp_path, call):
    sweep = plan(tmp_path)
    rows = sweep.rows(0)
    for row, score in zip(rows, [0.7, 0.9, 0.6, 0.8, 0.9, 0.5, 0.65], strict=False):
        leave_run(sweep, row, [score])
    leave_run(sweep, rows[7], [], "diverged", diverged_step=4)
    with pytest.raises(BadInput, match="row 8 has no result"):
        rungs.promote(sweep, 0)
    leave_run(sweep, rows[8], [0.55])
    for _ in range(2):
        code, result, _ = call("promote", "s", "--rung", 0)
        assert code == 0 and result["trials"] == ["t001", "t004", "t003"], "of equal ones the first"
    text = Path(result["page"]).read_text()
    assert "diverged after step 4" in text and "0.55" in text
    # what a trial does later changes nothing of what it was promoted for
    with open(sweep.run_of(rows[1]) / "epochs.csv", "a") as file:
        file.write("2,0.1\n")
    assert rungs.outcome(sweep, rows[1])["score"] == 0.9


HIGH, MIDDLE, LOW = [0.90, 0.901, 0.902], [0.7, 0.701, 0.702], [0.3, 0.35, 0.4]
NONE, ONE = [None] * 3, {"champion_seeds": 1, "finalists": 1}


@pytest.mark.parametrize(
    "scores, space, code, chosen, words",
    [
        (HIGH + MIDDLE + MIDDLE + LOW, {}, 0, "t001", "highest mean AUC, apart from all others"),
        (HIGH + [0.9, 0.94, 0.95] + LOW + LOW, {}, 0, "t002", "not separable from t001: "),
        (MIDDLE + MIDDLE + MIDDLE + HIGH, {}, 1, None, "no trial has a mean AUC above"),
        (LOW * 4, {}, 1, None, "a constant answer, 0.5"),
        (NONE * 3 + HIGH, {}, 1, None, "only finalist with a score; t000, t001, t002 failed"),
        ([0.9, 0.6], ONE, 0, "t001", "but nothing is separable over 1 fresh seeds"),
    ],
)
def test_the_champion_beats_the_base_and_constant_answers_or_there_is_none(
    scores, space, code, chosen, words, tmp_path, call
):
    sweep = finals(tmp_path, *scores, **space)
    assert len(sweep.rows(1)) == sweep.num_rows(1)
    assert {row.seed for row in sweep.rows(1)}.isdisjoint(sweep.plan["seeds"]), "fresh ones"
    exit_code, result, said = call("champion", "s")
    assert exit_code == code and result["champion"] == chosen
    assert words in result["note"] and words in said
    assert result["note"] in Path(result["page"]).read_text()
    best = result["finalists"][0]
    assert result["run"] == (best["run"] if chosen else None)
    if len(scores) > 2:
        assert best["low"] < best["mean"] < best["high"]


def test_the_axis_of_aucs_stays_within_what_is_possible_and_colours_have_a_bar():
    rows = [{"lr": 0.01, "AUC": auc, "trial": "t"} for auc in (0.05, 1.0)]
    axes, bar = page.plot_parallel({"lr": {"log": ["1e-3", 0.1]}}, rows).axes
    assert [text.get_text() for text in axes.texts] == ["1e-3", "0.1", "0.05", "1.0"]
    assert axes.lines[0].get_ydata() == pytest.approx([0.5, 0]), "a logarithmic axis"
    assert bar.get_ylim() == (0.05, 1.0) and "AUC" in bar.get_ylabel()


# rows as real processes


def start_search(folder, *words) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, REPOSITORY / "sweep.py", *command(folder, "run", "s", *words)],
        env=os.environ | {"OMP_NUM_THREADS": "1", "SLURM_CPUS_PER_TASK": "2"},
        stdout=subprocess.PIPE,
        start_new_session=True,
        text=True,
    )


def result_of(process) -> dict:
    return json.loads(process.communicate(timeout=600)[0].splitlines()[-1])


@pytest.mark.slow
def test_a_search_goes_on_when_stopped_or_killed_and_a_promoted_trial_as_if_it_never_paused(
    tmp_path, pcam_dir, call
):
    rates = [0.003, 1e30]  # with the last one no network stays finite
    space = {"design": "grid", "ranges": {"lr": {"choice": rates}}, "rungs": [30, 31]}
    sweep = plan(tmp_path, overrides=[f"data_dir={pcam_dir}", *TINY], **space)
    rows = sweep.rows(0)

    def states():
        return [rungs.outcome(sweep, row)["state"] for row in rows]

    process = start_search(tmp_path, "--all")
    (meta,) = wait_for(lambda: list(sweep.runs_dir.glob("*/meta.json")), "the trainer")
    process.send_signal(signal.SIGTERM)
    assert result_of(process)["interrupted"] and process.returncode == 130
    assert states() == ["todo", "todo"], "no failure"
    process = start_search(tmp_path, "--all")
    wait_for(lambda: read_json(meta).get("earlier_starts"), "the next trainer")
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    both = [start_search(tmp_path, "--all", "--processes", "2") for _ in range(2)]
    for process in both:
        result_of(process)
    assert max(process.returncode for process in both) == 1, "a failed trial is a finding"
    assert len(list(sweep.runs_dir.iterdir())) == 2, "one run a row"
    assert states() == ["done", "failed"]
    assert call("promote", "s", "--rung", 0)[0] == 0
    assert call("run", "s", "--all")[0] == 0
    pairs = [f"data_dir={pcam_dir}", *TINY, f"lr={rates[0]}", "seed=1", "epochs=31"]
    alone = run_script("train.py", "--runs", tmp_path / "alone", *pairs, check=0)
    summary = read_json(sweep.run_of(rows[0]) / "summary.json")
    assert summary["weights_sha256"] == alone.json["weights_sha256"]


def test_a_claimed_row_is_left_alone_until_its_last_process_is_gone(tmp_path, monkeypatch):
    sweep = plan(tmp_path)
    row = sweep.rows(0)[0]
    # a trainer that outlives the search keeps the row
    with open(sweep.log_of(row), "ab") as log:
        assert lock_if_possible(log, "log")
        orphan = subprocess.Popen(["sleep", "60"], stderr=log)
    assert trainers.run_rows(sweep, [row], 1, []) == (1, False)
    orphan.kill()
    orphan.wait()
    monkeypatch.setattr(trainers, "start_trainer", lambda *_: subprocess.Popen(["true"]))
    assert trainers.run_rows(sweep, [row], 1, []) == (0, False)


def test_a_failure_quotes_its_error_and_no_line_of_progress(tmp_path):
    sweep = plan(tmp_path)
    rows = sweep.rows(0)[:3]
    for row, code in zip(rows, (2, -signal.SIGKILL, 130), strict=True):
        sweep.log_of(row).write_text("epoch 1/3: 64/640\nerror: disk full\nepoch 2/3: 1/2\n")
        leave_run(sweep, row, [])
        trainers.note_end(sweep, row, code)
    reasons = [rungs.outcome(sweep, row).get("reason") for row in rows]
    assert reasons[0] == "exit 2: error: disk full" and reasons[1].startswith("killed by signal 9")
    assert reasons[2] is None, "it was told to stop"


@pytest.mark.parametrize(
    "words, sentence",
    [
        (("run", "s", "--rung", 1, "--all"), "rung-1.json"),
        (("run", "s"), "one of the arguments --row --all is required"),
        (("promote", "s"), "rung 0 of"),
        (("run", "s", "--all", "--rows"), "unrecognized argument"),
        (("run", "s", "--row", 0, "weight_decay=0.7"), "weight_decay changes the weights"),
        (("run", "s", "--row", 0, "views=8"), "views cannot be changed after the plan"),
        (("run", "s", "--row", 0, "data_dir=nowhere"), "no folder nowhere"),
    ],
)
def test_what_cannot_be_carried_out_is_said_and_nothing_is_recorded(
    words, sentence, tmp_path, call
):
    sweep = plan(tmp_path)
    code, _, said = call(*words)
    assert code == 2 and sentence in said
    assert not sweep.runs_dir.exists() and not any((sweep.folder / "failed").iterdir())


def test_trials_beside_each_other_share_the_cores_and_take_the_gpus_in_turn(tmp_path, monkeypatch):
    started = []

    def start(_sweep, _row, _log, _arguments, threads, slot):
        started.append((threads, slot))
        return subprocess.Popen(["sleep", "0.3"])

    monkeypatch.setenv("SLURM_CPUS_PER_TASK", "2")
    monkeypatch.setattr(trainers, "start_trainer", start)
    sweep = plan(tmp_path, trials=4)
    assert load_config(sweep.folder / "config.yaml").threads == 0
    rows = sweep.rows(0)
    assert trainers.run_rows(sweep, rows, 2, ["--device", "auto"]) == (0, False)
    assert {rungs.outcome(sweep, row)["state"] for row in rows} == {"failed"}
    assert set(started[:2]) == {(1, 0), (1, 1)} and len(started) == 4
