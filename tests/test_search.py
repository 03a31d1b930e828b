"""The search: a plan is frozen, a row is carried out once whatever is killed, and what run folders
say decides.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from conftest import QUICK, REPOSITORY, run_script, write_pcam
from slurm_cluster import wait_for

import sweep as script
from lib import rundir
from lib.command import BadInput
from lib.config import load_config
from lib.files import read_csv, read_json, write_csv, write_json
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
RATES = [0.001, 0.003, 0.01, 1e30]  # with the last one no network stays finite
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
    assert first.plan["trials"] != plan(tmp_path, "other", seed=2).plan["trials"]
    with pytest.raises(BadInput, match="holds another plan"):
        plan(tmp_path, seed=2)
    changed = read_json(first.folder / "plan.json")
    changed["trials"]["t000"]["lr"] = 0.5
    write_json(first.folder / "plan.json", changed)
    with pytest.raises(BadInput, match="was changed after the plan was frozen"):
        rungs.load_sweep(first.folder, tmp_path)


def test_sobol_points_fill_each_range_evenly_and_a_grid_has_every_combination_once(tmp_path):
    trials = list(plan(tmp_path, trials=64).plan["trials"].values())
    for low in (1e-4, 1e-3, 1e-2):
        assert 20 <= sum(low <= trial["lr"] < 10 * low for trial in trials) <= 23
    assert sum(trial["batch_size"] == 16 for trial in trials) == 32
    ranges = {"lr": {"choice": RATES}, "mlp_hidden": {"choice": [[8], [8, 4]]}}
    grid = plan(tmp_path, "grid", design="grid", trials=8, ranges=ranges).plan["trials"]
    assert len({json.dumps(trial) for trial in grid.values()}) == 8


@pytest.mark.parametrize(
    "changes, sentence",
    [
        ({"ranges": {"lrr": {"choice": [1]}}}, "unknown key 'lrr', did you mean 'lr'?"),
        ({"ranges": {"lr": {"log": [0, 1]}}}, "on a sobol design it must be log"),
        ({"ranges": {"lr": {"choice": []}}}, "it must be log"),
        ({"ranges": {"batch_size": {"range": [-9, -1]}}}, "batch_size"),
        ({"ranges": {"epochs": {"choice": [1, 2]}}}, "epochs cannot be searched over"),
        ({"ranges": {}}, "ranges must hold config keys"),
        ({"design": "grid"}, "on a grid design it must be choice"),
        ({"design": "grid", "ranges": {"lr": {"choice": [1, 2]}}}, "the grid has 2 points"),
        ({"design": "random"}, "one of sobol, grid"),
        ({"rungs": [3, 1]}, "rungs must rise"),
        ({"seeds": [1, 1]}, "seeds must differ"),
        ({"seed": 10**20}, "seed"),
        ({"trails": 9}, "unknown key 'trails', did you mean 'trials'?"),
        ({"overrides": ["epochs=3"]}, "epochs: the search sets"),
        ({"name": "a b"}, "'a b' is no name of a search"),
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
    # 9 for an epoch, of which 3 for two more, and three seeds of three finalists and the base
    expected = {"num_trainings": 9 + 12, "num_epochs": 9 + 3 * 2 + 12 * 3}
    code, result, _ = call("plan", path, *TINY, f"data_dir={pcam_dir}")
    assert code == 0 and expected.items() <= result.items() and result["seconds"] > 0
    code, result, _ = call("plan", path, *TINY, "--name", "t", "data_dir=nowhere")
    assert code == 0 and expected.items() <= result.items() and result["seconds"] is None


# what run folders say


def test_the_best_third_goes_on_and_whoever_promotes_again_writes_the_same_bytes(tmp_path):
    sweep = plan(tmp_path)
    rows = sweep.rows(0)
    for row, score in zip(rows, [0.7, 0.9, 0.6, 0.8, 0.9, 0.5, 0.65], strict=False):
        leave_run(sweep, row, [score])
    leave_run(sweep, rows[7], [], "diverged", diverged_step=4)
    with pytest.raises(BadInput, match="1 of 9 rows have no result, the first is row 8"):
        rungs.promote(sweep, 0)
    leave_run(sweep, rows[8], [0.55])
    path = rungs.promote(sweep, 0)
    before = path.read_bytes()
    assert read_json(path)["trials"] == ["t001", "t004", "t003"], "of equal ones the first"
    assert rungs.outcome(sweep, rows[7])["reason"] == "diverged after step 4"
    # what a trial does later changes nothing of what it was promoted for
    epochs = sweep.run_of(rows[1]) / "epochs.csv"
    epochs.write_text(epochs.read_text() + "2,0.1\n3,0.99\n")
    assert rungs.promote(sweep, 0).read_bytes() == before
    shutil.rmtree(sweep.run_of(rows[8]))
    leave_run(sweep, rows[8], [0.99])
    with pytest.raises(BadInput, match="were runs removed or changed"):
        rungs.promote(sweep, 0)


def test_with_several_seeds_the_mean_counts_and_a_trial_that_failed_with_one_is_out(tmp_path):
    sweep = plan(tmp_path, trials=3, seeds=[1, 2])
    for row, score in zip(sweep.rows(0), [0.9, 0.6, 0.8, 0.8, 0.99, "nan"], strict=True):
        leave_run(sweep, row, [score])
    assert rungs.mean_scores(sweep, 0) == {"t001": pytest.approx(0.8), "t000": pytest.approx(0.75)}


HIGH, MIDDLE, LOW = [0.90, 0.901, 0.902], [0.7, 0.701, 0.702], [0.3, 0.35, 0.4]
NONE, ONE = [None] * 3, {"champion_seeds": 1, "finalists": 1}


@pytest.mark.parametrize(
    "scores, space, code, chosen, words",
    [
        (HIGH + MIDDLE + MIDDLE + LOW, {}, 0, "t001", "highest mean AUC, apart from all others"),
        (HIGH + [0.9, 0.94, 0.95] + LOW + LOW, {}, 0, "t002", "not separable from t001: "),
        (MIDDLE + MIDDLE + MIDDLE + HIGH, {}, 1, None, "no trial has a higher mean AUC"),
        (LOW * 4, {}, 1, None, "a constant answer has an AUC of 0.5"),
        (NONE * 3 + HIGH, {}, 1, None, "only finalist with a score; t001, t002, t000 failed"),
        ([0.9, 0.6], ONE, 0, "t001", "but nothing is separable over 1 fresh seeds"),
        ([0.9, 0.8, 0.6, 0.7], ONE | {"champion_seeds": 2}, 0, "t001", "nothing is separable"),
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
    assert read_json(sweep.folder / "champion.json")["finalists"] == result["finalists"]
    best = result["finalists"][0]
    assert result["run"] == (best["run"] if chosen else None)
    if len(scores) > 2:
        assert best["low"] < best["mean"] < best["high"]


def test_axes_of_aucs_stay_within_what_is_possible_and_colours_have_a_bar():
    ranges = {"lr": {"log": [0.001, 0.1]}, "batch_size": {"choice": [16, 32]}}
    rows = []
    for size, auc in ((16, 0.05), (32, 1.0)):
        rows.append({"lr": 0.01, "batch_size": size, "AUC": auc, "trial": f"t{size}"})
    for axes in page.plot_marginals(ranges, rows).axes:
        low, high = axes.get_ylim()
        assert low >= 0 and high <= 1
    bar = page.plot_parallel(ranges, rows, ["t32"]).axes[-1]
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


@pytest.fixture(scope="module")
def killed(tmp_path_factory, pcam_dir) -> rungs.Sweep:
    """A search of which every process was killed half-way, then carried on by two at once."""
    folder = tmp_path_factory.mktemp("sweep")
    space = {"design": "grid", "trials": len(RATES), "ranges": {"lr": {"choice": RATES}}}
    sweep = plan(folder, overrides=[f"data_dir={pcam_dir}", *TINY], **space, rungs=[1, 2])
    process = start_search(folder, "--all")
    rows = sweep.rows(0)
    states = lambda: {rungs.outcome(sweep, row)["state"] for row in rows}  # noqa: E731
    wait_for(lambda: "done" in states(), "a trial", 600)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert states() == {"todo", "done"}
    both = [start_search(folder, "--all", "--processes", "2") for _ in range(2)]
    for process in both:
        result_of(process)
    assert max(process.returncode for process in both) == 1, "a failed trial is a finding"
    return sweep


@pytest.mark.slow
def test_a_killed_search_goes_on_where_it_was_and_each_row_is_done_once(killed):
    rows = killed.rows(0)
    assert len(list(killed.runs_dir.iterdir())) == len(rows), "one run a row"
    *others, last = (rungs.outcome(killed, row) for row in rows)
    assert {outcome["state"] for outcome in others} == {"done"}
    assert last["reason"].startswith("diverged after step")


@pytest.mark.slow
def test_a_promoted_trial_ends_with_the_weights_of_a_run_that_never_paused(
    killed, pcam_dir, tmp_path
):
    rungs.promote(killed, 0)
    row = killed.rows(1)[0]
    trainers.run_rows(killed, [row], 1, [])
    rate, data = f"lr={killed.plan['trials'][row.trial]['lr']}", f"data_dir={pcam_dir}"
    pairs = [data, *TINY, rate, "seed=1", "epochs=2"]
    alone = run_script("train.py", "--runs", tmp_path, *pairs, check=0)
    run = killed.run_of(row)
    assert read_json(run / "summary.json")["weights_sha256"] == alone.json["weights_sha256"]
    assert (
        read_json(run / "meta.json")["start_step"] == 2 and len(read_csv(run / "epochs.csv")) == 2
    )


def test_a_claimed_row_is_left_alone_until_its_last_process_is_gone(tmp_path, pcam_dir, call):
    sweep = plan(tmp_path, overrides=[f"data_dir={pcam_dir}", *TINY])
    row = sweep.rows(0)[0]
    log = trainers.claim(sweep, row)
    assert log and trainers.claim(sweep, row) is None
    _, result, _ = call("run", "s", "--row", 0)
    assert result["num_elsewhere"] == 1 and not sweep.run_of(row)
    # a trainer that outlives the search keeps the row
    orphan = subprocess.Popen(["sleep", "60"], stderr=log)
    log.close()
    assert trainers.claim(sweep, row) is None
    orphan.kill()
    orphan.wait()
    trainers.claim(sweep, row).close()


def test_a_failure_quotes_its_error_and_no_line_of_progress(tmp_path):
    sweep = plan(tmp_path)
    row, other = sweep.rows(0)[:2]
    for failed, code in ((row, 2), (other, -signal.SIGKILL)):
        log = trainers.file_of(sweep, failed, "logs", "err")
        log.write_text("epoch 1/3: 64/640\nerror: no space left on device: x\nepoch 2/3: 1/2\n")
        trainers.note_end(sweep, failed, 2)
        assert rungs.outcome(sweep, failed)["state"] == "todo", "it could not even start"
        leave_run(sweep, failed, [])
        trainers.note_end(sweep, failed, code)
    assert rungs.outcome(sweep, row)["reason"] == "exit 2: error: no space left on device: x"
    reason = rungs.outcome(sweep, other)["reason"]
    assert reason.startswith("killed by SIGKILL") and "epoch" not in reason


@pytest.mark.slow
def test_rows_are_the_plans_and_comparable_or_refused_and_nothing_is_recorded(
    tmp_path, pcam_dir, call
):
    data = shutil.copytree(pcam_dir, tmp_path / "data")
    ranges = {"mlp_hidden": {"choice": [[4], [4, 4]]}}
    sweep = plan(tmp_path, overrides=[f"data_dir={data}", *TINY], ranges=ranges)
    for override, sentence in (
        ("weight_decay=0.7", "weight_decay changes the weights"),
        ("views=8", "views cannot be changed after the plan"),
        ("data_dir=nowhere", "no folder nowhere"),
    ):
        code, _, said = call("run", "s", "--row", 0, override)
        assert code == 2 and sentence in said
    assert not sweep.runs_dir.exists() and not (sweep.folder / "failed").exists()
    assert call("run", "s", "--row", 0)[0] == 0
    write_pcam(data, seed=9)
    assert "is not the data that" in call("run", "s", "--row", 1)[2]


@pytest.mark.parametrize(
    "words, sentence",
    [
        (("run", "s", "--rung", 1, "--all"), "has no rung 1 yet"),
        (("run", "s", "--row", 99), "has the rows 0 to"),
        (("run", "s"), "one of the arguments --row --all is required"),
        (("promote", "t"), "is no planned search"),
        (("promote", "s"), "rung 0 of"),
        (("run", "s", "--all", "--rows"), "unrecognized argument"),
        (("run", "s", "--all", "--finish"), "unrecognized argument"),
    ],
)
def test_what_cannot_be_carried_out_is_said(words, sentence, tmp_path, call):
    plan(tmp_path)
    code, _, said = call(*words)
    assert code == 2 and sentence in said


@pytest.mark.slow
def test_a_trial_that_dies_is_a_failure_with_a_reason_and_one_that_is_stopped_is_not(
    tmp_path, pcam_dir
):
    sweep = plan(tmp_path, overrides=[f"data_dir={pcam_dir}", *TINY], rungs=[200, 201])
    row = sweep.rows(0)[0]
    process = start_search(tmp_path, "--row", "0")
    (meta,) = wait_for(lambda: list(sweep.runs_dir.glob("*/meta.json")), "the trainer")
    process.send_signal(signal.SIGTERM)
    assert result_of(process)["interrupted"] and process.returncode == 130
    assert rungs.outcome(sweep, row)["state"] == "todo"
    stopped = read_json(meta)["pid"]
    process = start_search(tmp_path, "--row", "0")
    wait_for(lambda: read_json(meta)["pid"] != stopped, "the next trainer")
    os.kill(read_json(meta)["pid"], signal.SIGKILL)
    assert result_of(process)["num_failed"] == 1 and process.returncode == 1
    assert rungs.outcome(sweep, row)["reason"].startswith("killed by SIGKILL")


class Trainer:
    """In place of a process: one that is stopped at the third look."""

    def __init__(self, words, env, **_):
        self.slot, self.words, self.num_looks = env["LOCAL_RANK"], words, 0

    def poll(self):
        self.num_looks += 1
        return trainers.EXIT_INTERRUPTED if self.num_looks == 3 else None


def test_trials_beside_each_other_share_the_cores_and_take_the_gpus_in_turn(tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", "2")
    started = []
    start = lambda *words, **options: started.append(Trainer(*words, **options)) or started[-1]  # noqa: E731
    monkeypatch.setattr(trainers.subprocess, "Popen", start)
    sweep = plan(tmp_path, trials=4)
    assert load_config(sweep.folder / "config.yaml").threads == 0
    result = trainers.run_rows(sweep, sweep.rows(0), 2, ["--device", "auto"])
    assert result["num_todo"] == 4 and not result["interrupted"]
    assert [trainer.slot for trainer in started] == ["0", "1", "0", "1"]
    assert all("threads=1" in trainer.words for trainer in started)
