"""train.py: what the run folder holds, that runs repeat and resume to the bit, and how a run ends
that cannot go on.
"""

import contextlib
import os
import re
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
from conftest import QUICK, call_script, write_pcam

import train
from lib import predict, runpage, training
from lib.checkpoint import load_checkpoint, weights_sha256
from lib.config import dump_config, load_config
from lib.files import read_csv, read_json, write_json
from lib.groups import write_groups

STEP_COLUMNS = ("step", "epoch", "loss", "lr", "grad_norm")
TIMES = ("train_s", "eval_s", "images_per_s")
# state of every kind: dropout, momentum, averages, shards, a schedule with a memory, classes drawn
# by the sampler
RICH = "optimizer=sgd lr=0.05 dropout=0.3 shards=2 schedule=plateau decay_epochs=1 decay_factor=0.5"
RICH = [*RICH.split(), "balance=sampler", "batch_size=16", "epochs=3", "warmup_epochs=0.5"]


def start(runs, data, *overrides, expect=0) -> tuple[Path, dict, str]:
    """Train in this process, later overrides over earlier ones; (run folder, JSON, stderr)."""
    arguments = ("--runs", runs, f"data_dir={data}", *QUICK, *overrides)
    code, result, err = call_script(train.main, *arguments)
    assert code == expect, err
    return Path(result["run"]), result, err


def resume(run, *arguments, expect=0) -> tuple[dict, str]:
    code, result, err = call_script(train.main, "--resume", run, *arguments)
    assert code == expect, err
    return result, err


@contextlib.contextmanager
def on_step(number, action):
    """Within the block let `action()` happen right after optimisation step `number`."""
    step = training.training_step

    def wrapped(state, *arguments):
        result = step(state, *arguments)
        if state.progress["num_steps"] == number:
            action()
        return result

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "training_step", wrapped)
        yield


def stopped_at(number, signal_number=signal.SIGTERM):
    """Within the block a training gets a signal after step `number`."""
    return on_step(number, lambda: os.kill(os.getpid(), signal_number))


def repeatable(run) -> tuple:
    """All that has to be equal in a run that was stopped and resumed and one that was not."""
    steps = [[row[name] for name in STEP_COLUMNS] for row in read_csv(run / "steps.csv")]
    epochs = read_csv(run / "epochs.csv")
    for row in epochs:
        for name in TIMES:
            del row[name]
    best, last = load_checkpoint(run / "best.pt"), load_checkpoint(run / "last.pt")
    weights = weights_sha256(best["averaged"]), weights_sha256(last["averaged"])
    digest = read_json(run / "summary.json")["weights_sha256"]
    return digest, steps, epochs, weights, last["progress"] | {"wall_s": None}


@pytest.fixture(autouse=True)
def no_page(monkeypatch):
    """A page takes longer than these trainings; that of `quick_run` is made."""
    monkeypatch.setattr(runpage, "write_run_page", lambda *_: None)


@pytest.fixture(scope="module")
def whole(pcam_dir, tmp_path_factory) -> Path:
    """The rich run, never stopped."""
    return start(tmp_path_factory.mktemp("whole"), pcam_dir, *RICH)[0]


def test_the_run_folder_holds_what_the_contract_says(quick_run, pcam_dir):
    files = sorted(quick_run.iterdir(), key=lambda entry: entry.stat().st_mtime_ns)
    names = "config.yaml meta.json steps.csv epochs.csv best.pt last.pt report.html summary.json"
    assert {entry.name for entry in files} == set(names.split())
    assert files[-1].name == "summary.json"
    cfg = load_config(overrides=[f"data_dir={pcam_dir}", *QUICK])
    assert (quick_run / "config.yaml").read_text() == dump_config(cfg)
    meta = read_json(quick_run / "meta.json")
    assert {"argv", "commit", "versions", "machine", "job", "identity"} <= meta.keys()
    assert meta["rows"]["train"]["num_positive"] == 80 and len(meta["data"]) == 4

    steps, epochs = read_csv(quick_run / "steps.csv"), read_csv(quick_run / "epochs.csv")
    assert len(steps) == 10 and [row["step"] for row in epochs] == ["5", "10"]
    losses = [float(row["loss"]) for row in steps[5:]]
    assert float(epochs[1]["train_loss"]) == pytest.approx(np.mean(losses))

    summary = read_json(quick_run / "summary.json")
    best, last = epochs[summary["best_epoch"] - 1], load_checkpoint(quick_run / "last.pt")
    assert summary["status"] == "finished" and summary["val_auc"] == float(best["val_auc"])
    assert summary["weights_sha256"] == weights_sha256(last["model"])
    assert summary["always_positive_f2"] == pytest.approx(0.8333, abs=1e-4)


def test_free_keys_and_the_place_of_the_data_change_no_bit_and_the_seed_does(
    quick_run, pcam_dir, tmp_path
):
    data = shutil.copytree(pcam_dir, tmp_path / "moved")
    free = ["data_residence=disk", "eval_batch_size=5", "name=x", "views=8"]
    one, seed = start(tmp_path, data, *free)[0], start(tmp_path, pcam_dir, "seed=2")[0]
    assert repeatable(one)[:2] == repeatable(quick_run)[:2] != repeatable(seed)[:2]
    identities = [read_json(run / "meta.json")["identity"] for run in (quick_run, one, seed)]
    assert identities[0] == identities[1] != identities[2]


def test_a_run_stopped_by_signals_and_resumed_equals_one_that_was_not(whole, pcam_dir, tmp_path):
    with stopped_at(1):
        run, result, err = start(tmp_path, pcam_dir, *RICH, expect=130)
    assert result == {"run": str(run), "status": "interrupted", "step": 1}
    assert f"--resume {run}" in err
    # in mid-epoch, and at the last step of an epoch
    for step, number in ((14, signal.SIGINT), (20, signal.SIGUSR1)):
        with stopped_at(step, number):
            assert resume(run, expect=130)[0]["step"] == step
        assert len(read_csv(run / "steps.csv")) == step and not (run / "summary.json").exists()
    resume(run)
    assert repeatable(run) == repeatable(whole)
    earlier = read_json(run / "meta.json")["earlier_starts"]
    assert [meta["stopped"]["step"] for meta in earlier] == [1, 14, 20]


class Killed(BaseException):
    """Ends a training as a kill does."""


def kill():
    raise Killed


def test_a_run_killed_after_a_checkpoint_and_resumed_equals_one_that_was_not(
    whole, pcam_dir, tmp_path
):
    with on_step(15, kill), pytest.raises(Killed):
        start(tmp_path, pcam_dir, *RICH, "checkpoint_every_steps=6")
    (run,) = tmp_path.iterdir()
    assert load_checkpoint(run / "last.pt")["progress"]["num_steps"] == 12
    with open(run / "steps.csv", "a") as file:
        file.write("13,2,0.5,0.1\n14,2,0.")  # what a dying process may leave
    resume(run)
    assert repeatable(run) == repeatable(whole)


def test_a_run_killed_before_a_checkpoint_or_paused_ends_as_one_that_was_not_and_then_stays(
    quick_run, pcam_dir, tmp_path
):
    with on_step(1, kill), pytest.raises(Killed):
        start(tmp_path, pcam_dir)
    (run,) = tmp_path.iterdir()
    paused = {"run": str(run), "status": "paused", "step": 5}
    assert resume(run, "--until-epoch=1")[0] == paused
    assert resume(run, "--until-epoch=1")[0] == paused, "it has come that far already"
    resume(run, "--until-epoch=99")
    assert repeatable(run) == repeatable(quick_run)
    before = {entry.name: entry.read_bytes() for entry in run.iterdir()}
    result, err = resume(run, "epochs=3")
    assert result == {"run": str(run), "status": "finished"} and "nothing to resume" in err
    assert before == {entry.name: entry.read_bytes() for entry in run.iterdir()}


def test_a_resumed_run_may_change_free_keys_and_hardware_but_nothing_that_makes_it_another(
    whole, tmp_path
):
    run = shutil.copytree(whole, tmp_path / whole.name)
    (run / "summary.json").unlink()
    for change in ("lr=0.01", "epochs=9", "threads=2", "shards=1"):
        _, err = resume(run, change, expect=2)
        assert change.split("=")[0] in err and "data_dir" in err
    _, err = resume(run, f"data_dir={write_pcam(tmp_path / 'other', seed=9)}", expect=2)
    assert "not the data" in err
    meta = read_json(run / "meta.json")
    meta["machine"] |= {"device": "cuda:0", "host": "another"}
    meta["versions"]["torch"] = "2.0.1"
    write_json(run / "meta.json", meta)
    _, err = resume(run, "checkpoint_every_steps=7", "name=x", "lr=0.05")
    warnings = [line for line in err.splitlines() if line.startswith("warning: ")]
    assert len(warnings) == 2 and "cuda:0" in warnings[0] and "2.0.1" in warnings[1]
    assert repeatable(run) == repeatable(whole)


def test_a_quarantine_or_groups_that_were_changed_are_not_resumed_as_the_same_run(tmp_path):
    data, listed = write_pcam(tmp_path / "data"), tmp_path / "quarantine.csv"
    listed.write_text("split,index,reason\ntrain,3,black\n")
    keys = ("num_folds=2", "fold=1", f"quarantine={listed}")
    err = call_script(train.main, f"data_dir={data}", *keys)[2]
    assert f"audit.py data {data} --checks groups" in err
    write_groups(data, {"train": np.arange(160) // 4})
    with stopped_at(2):
        run = start(tmp_path / "runs", data, *keys, expect=130)[0]
    for path, changed in ((data / "groups.csv", "160"), (listed, "black\ntrain,8,black")):
        before = path.read_text()
        path.write_text(re.sub(r"\w+\s*$", changed, before) + "\n")
        resume(run, expect=2)
        path.write_text(before)


def test_best_pt_is_the_epoch_with_the_best_score_by_the_averaged_weights(
    pcam_dir, tmp_path, monkeypatch
):
    evaluated, aucs = [], iter([0.6, 0.8, 0.7])
    predict_rows, note_epoch = predict.predict_rows, training.note_epoch

    def recording(model, *rest, **options):
        evaluated.append(weights_sha256(model.state_dict()))
        return predict_rows(model, *rest, **options)

    def scripted(progress, scores, cfg):
        return note_epoch(progress, scores | {"auc": next(aucs)}, cfg)

    monkeypatch.setattr(predict, "predict_rows", recording)
    monkeypatch.setattr(training, "note_epoch", scripted)
    run, result, _ = start(tmp_path, pcam_dir, "epochs=6", "early_stop_epochs=1")
    assert result["num_epochs"] == 3 and result["best_epoch"] == 2, "stopped early"
    best = load_checkpoint(run / "best.pt")
    assert weights_sha256(best["averaged"]) == evaluated[1]
    assert best["progress"]["best_scores"]["auc"] == 0.8 and best["progress"]["num_steps"] == 10
    assert result["weights_sha256"] not in evaluated, "those of the last step, not averaged"


def test_a_loss_that_is_no_number_stops_the_run_and_names_step_and_rows(
    pcam_dir, tmp_path, monkeypatch
):
    step, poisoned_rows = training.training_step, []

    def poisoned(state, batch, *rest):
        if state.progress["num_steps"] == 7:
            next(state.model.parameters()).data.fill_(float("nan"))
            poisoned_rows.extend(sorted(batch.keys.tolist()))
        return step(state, batch, *rest)

    monkeypatch.setattr(training, "training_step", poisoned)
    run, result, err = start(tmp_path, pcam_dir, "checkpoint_every_steps=1", expect=1)
    assert (result["status"], result["diverged_step"]) == ("diverged", 8)
    assert result["diverged_rows"] == poisoned_rows and "the loss of step 8 is nan" in err
    assert len(read_csv(run / "steps.csv")) == 7
    assert load_checkpoint(run / "last.pt")["progress"]["num_steps"] == 7
    assert resume(run, expect=1)[0]["status"] == "diverged", "it is not called finished"


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        ("data_dir=nowhere", "nowhere"),
        ("batchsize=3", "'batch_size'"),
        ("--device cuda:77", "--device cuda:77"),
        ("--config nowhere.yaml", "nowhere.yaml"),
        ("--wrong", "--wrong"),
        ("--resume nothing", "nothing"),
        ("--resume tests", "no config.yaml"),
        ("--resume x --config y", "not allowed"),
        ("--runs README.md", "README.md"),
        ("quarantine=nowhere.csv", "nowhere.csv"),
        ("weights=nowhere.pt", "nowhere.pt"),
        ("limit_train=1", "both are needed"),
        ("model=mlp mlp_hidden=[1000000000]", ""),
    ],
)
def test_bad_arguments_get_one_sentence_and_no_run_folder(arguments, sentence, tmp_path, pcam_dir):
    runs = tmp_path / "runs"
    keys = [f"data_dir={pcam_dir}", "p4m_width=1", "limit_valid=8"]  # quick, if not refused
    code, result, err = call_script(train.main, "--runs", runs, *keys, *arguments.split())
    (error,) = re.findall("(?m)^error: (.*)", err)
    assert code == 2 and sentence in error and result == {"error": error, "exit": 2}
    assert not runs.is_dir() or not list(runs.iterdir())
