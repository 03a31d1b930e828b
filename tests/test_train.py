"""train.py: what the run folder holds, that runs repeat and resume to the bit, and how a run ends
that cannot go on.
"""

import contextlib
import io
import json
import os
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import QUICK, draw_patches, write_pcam

import inference
import train
from lib import machine, predict, training
from lib.checkpoint import load_checkpoint, weights_sha256
from lib.config import dump_config, load_config
from lib.device import note_slow_precision
from lib.files import file_digest, read_csv, read_json, write_json
from lib.groups import write_groups
from lib.splitwriter import SplitWriter

STEP_COLUMNS = ("step", "epoch", "loss", "lr", "grad_norm")
TIMES = ("train_s", "eval_s", "images_per_s")
# state of every kind: dropout, momentum, averages, shards, a schedule with a memory, classes drawn
# by the sampler
RICH = "optimizer=sgd lr=0.05 dropout=0.3 shards=2 schedule=plateau decay_epochs=1 decay_factor=0.5"
RICH = [*RICH.split(), "balance=sampler", "batch_size=16", "epochs=3", "warmup_epochs=0.5"]


def call_script(main, *arguments):
    """A script's main in this process: (exit code, last line of stdout parsed, stderr)."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main([str(argument) for argument in arguments])
    return code, json.loads(out.getvalue().strip().splitlines()[-1]), err.getvalue()


def start(runs, data, *overrides, expect=0) -> tuple[Path, dict, str]:
    """Train in this process, later overrides over earlier ones; (run folder, JSON, stderr)."""
    keys = dict(pair.split("=", 1) for pair in (*QUICK, *overrides))
    pairs = [f"{key}={value}" for key, value in keys.items()]
    code, result, err = call_script(train.main, "--runs", runs, f"data_dir={data}", *pairs)
    assert code == expect, err
    return Path(result["run"]), result, err


def resume(run, *arguments, expect=0) -> tuple[dict, str]:
    code, result, err = call_script(train.main, "--resume", run, *arguments)
    assert code == expect, err
    return result, err


def refuse(sentence, runs, *arguments):
    """Call train.py with what it must refuse in one sentence, without a run folder."""
    code, result, err = call_script(train.main, "--runs", runs, *arguments)
    errors = re.findall("(?m)^error: (.*)", err)
    assert code == 2 and len(errors) == 1 and sentence in errors[0] and "Traceback" not in err, err
    assert result == {"error": errors[0], "exit": 2}
    assert not runs.is_dir() or not list(runs.iterdir())


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
    for row, name in [(row, name) for row in epochs for name in TIMES]:
        del row[name]
    best, last = (load_checkpoint(run / name) for name in ("best.pt", "last.pt"))
    weights = [weights_sha256(best["averaged"]), weights_sha256(last["averaged"])]
    digest = read_json(run / "summary.json")["weights_sha256"]
    return digest, steps, epochs, weights, last["progress"]


@pytest.fixture(scope="module")
def whole(pcam_dir, tmp_path_factory) -> Path:
    """The rich run, never stopped."""
    return start(tmp_path_factory.mktemp("whole"), pcam_dir, *RICH)[0]


@pytest.fixture
def unfinished(whole, tmp_path):
    """A copy of the rich run as it is just before summary.json is written."""
    run = shutil.copytree(whole, tmp_path / whole.name)
    (run / "summary.json").unlink()
    return run


def write_skewed(directory) -> Path:
    """PCam with 5 negatives to a positive in train: 80 and 16."""
    write_pcam(directory, 32, 32)
    images, labels = draw_patches(192, 3)
    keep = np.concatenate([np.flatnonzero(labels == 0)[:80], np.flatnonzero(labels == 1)[:16]])
    with SplitWriter(directory, "train", 96) as writer:
        writer.add(images[keep], labels[keep])
    return directory


# ---- the run folder


def test_the_run_folder_holds_what_the_contract_says(pcam_dir, tmp_path):
    run, result, _ = start(tmp_path, pcam_dir)
    assert re.fullmatch(r"\d{8}T\d{6}Z-quick-s1-[0-9a-f]{4}", run.name)
    files = sorted(run.iterdir(), key=lambda entry: entry.stat().st_mtime_ns)
    names = "config.yaml meta.json steps.csv epochs.csv best.pt last.pt report.html summary.json"
    assert {entry.name for entry in files} == set(names.split())
    assert files[-1].name == "summary.json"
    cfg = load_config(overrides=[f"data_dir={pcam_dir}", *QUICK])
    assert (run / "config.yaml").read_text() == dump_config(cfg)
    meta = read_json(run / "meta.json")
    assert {"argv", "commit", "versions", "machine", "job", "identity"} <= meta.keys()
    counts = {"num": 160, "num_negative": 80, "num_positive": 80, "left_out": {}}
    assert meta["rows"]["train"] == counts and len(meta["data"]) == 4

    steps, epochs = read_csv(run / "steps.csv"), read_csv(run / "epochs.csv")
    assert [row["step"] for row in steps] == [*map(str, range(1, 11))]
    assert [(row["epoch"], row["step"]) for row in epochs] == [("1", "5"), ("2", "10")]
    losses = [float(row["loss"]) for row in steps if row["epoch"] == "2"]
    assert float(epochs[1]["train_loss"]) == pytest.approx(np.mean(losses))

    summary = read_json(run / "summary.json")
    best = epochs[summary["best_epoch"] - 1]
    assert result == {"run": str(run), **summary} and summary["status"] == "finished"
    assert best["is_best"] == "1" and summary["val_auc"] == float(best["val_auc"])
    last = load_checkpoint(run / "last.pt")
    assert summary["weights_sha256"] == weights_sha256(last["model"])
    assert summary["always_positive_f2"] == pytest.approx(0.8333, abs=1e-4)


def test_the_summary_scores_the_best_model_over_all_views(pcam_dir, tmp_path):
    run, summary, _ = start(tmp_path, pcam_dir, "views=8", "model=cnn", "cnn_width=8")
    command = ["--ckpt", run, pcam_dir, "--split", "valid", "--out", tmp_path / "p.csv"]
    eight = call_script(inference.main, *command)[1]["scores"]
    one = call_script(inference.main, *command, "--views", 1)[1]["scores"]
    assert (summary["val_auc"], summary["val_pr_auc"]) == (eight["auc"], eight["pr_auc"])
    assert one["auc"] == max(float(row["val_auc"]) for row in read_csv(run / "epochs.csv"))
    assert one["loss"] != pytest.approx(eight["loss"], rel=1e-5)


# ---- the same again


def test_free_keys_and_the_place_of_the_data_change_no_bit_and_the_seed_does(
    quick_run, pcam_dir, tmp_path
):
    data = shutil.copytree(pcam_dir, tmp_path / "moved")
    free = ["data_residence=disk", "eval_batch_size=5", "name=x", "views=8"]
    one = start(tmp_path, data, *free)[0]
    other = start(tmp_path, write_pcam(tmp_path / "other", seed=5), "epochs=1")[0]
    seed = start(tmp_path, pcam_dir, "seed=2")[0]
    assert repeatable(one)[:2] == repeatable(quick_run)[:2] != repeatable(seed)[:2]
    runs = (quick_run, one, other, seed)
    identities = [read_json(run / "meta.json")["identity"] for run in runs]
    assert identities[0] == identities[1] and len(set(identities)) == 3


# ---- stopped and resumed


def test_a_run_stopped_by_signals_and_resumed_equals_one_that_was_not(whole, pcam_dir, tmp_path):
    with stopped_at(1):
        run, result, err = start(tmp_path, pcam_dir, *RICH, expect=130)
    assert result == {"run": str(run), "status": "interrupted", "step": 1}
    assert f"--resume {run}" in err
    # in mid-epoch, at the last step of an epoch, and at the last but one of all
    for step, number in ((14, signal.SIGINT), (20, signal.SIGUSR1), (29, signal.SIGTERM)):
        with stopped_at(step, number):
            assert resume(run, expect=130)[0]["step"] == step
        assert read_json(run / "meta.json")["stopped"]["step"] == step
        assert len(read_csv(run / "steps.csv")) == step and not (run / "summary.json").exists()
    resume(run)
    assert repeatable(run) == repeatable(whole)
    meta = read_json(run / "meta.json")
    assert meta["start_step"] == 29
    assert [one["start_step"] for one in meta["earlier_starts"]] == [0, 1, 14, 20]


class Killed(BaseException):
    """Ends a training as a kill does."""


def test_a_run_killed_after_a_checkpoint_and_resumed_equals_one_that_was_not(
    whole, pcam_dir, tmp_path
):
    def kill():
        raise Killed

    with on_step(15, kill), pytest.raises(Killed):
        start(tmp_path, pcam_dir, *RICH, "checkpoint_every_steps=6")
    (run,) = tmp_path.iterdir()
    assert load_checkpoint(run / "last.pt")["progress"]["num_steps"] == 12
    with open(run / "steps.csv", "a") as file:
        file.write("13,2,0.5,0.1\n14,2,0.")  # what a dying process may leave
    resume(run)
    assert repeatable(run) == repeatable(whole)


def test_a_run_killed_before_its_first_checkpoint_starts_from_its_config(quick_run, tmp_path):
    run = tmp_path / quick_run.name
    run.mkdir()
    for name in ("config.yaml", "meta.json", "steps.csv"):
        shutil.copy(quick_run / name, run)
    resume(run)
    assert repeatable(run) == repeatable(quick_run)


def test_a_run_that_pauses_after_an_epoch_equals_one_that_did_not(quick_run, pcam_dir, tmp_path):
    run, result, _ = start(tmp_path, pcam_dir, "--until-epoch=1")
    assert result == {"run": str(run), "status": "paused", "step": 5}
    assert resume(run, "--until-epoch=1")[0] == result, "it has come that far already"
    resume(run, "--until-epoch=99")
    assert repeatable(run) == repeatable(quick_run)


def test_resuming_a_finished_run_says_so_and_changes_nothing(quick_run):
    before = {entry.name: entry.read_bytes() for entry in quick_run.iterdir()}
    result, err = resume(quick_run)
    assert result == {"run": str(quick_run), "status": "finished"} and "finished" in err
    _, err = resume(quick_run, "epochs=3", "seed=2")
    assert len(err.splitlines()) == 1 and "epochs=3 seed=2 has no effect" in err
    assert before == {entry.name: entry.read_bytes() for entry in quick_run.iterdir()}


def test_a_run_keeps_the_number_of_its_threads_where_there_are_other_cores(
    quick_run, pcam_dir, tmp_path, monkeypatch
):
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", "1")
    run = start(tmp_path, pcam_dir, "threads=0", "--until-epoch=1")[0]
    monkeypatch.delenv("SLURM_CPUS_PER_TASK")
    resume(run)
    assert "\nthreads: 1\n" in (run / "config.yaml").read_text()
    assert repeatable(run)[0] == repeatable(quick_run)[0]


def test_cores_that_others_use_are_noted_while_the_number_of_threads_can_be_chosen(
    pcam_dir, tmp_path, monkeypatch
):
    monkeypatch.setattr(machine, "affinity", lambda: {0, 1})
    monkeypatch.setattr(machine, "others_busy_s", lambda: 2 * time.monotonic())
    run, _, err = start(tmp_path, pcam_dir, "threads=2", "--until-epoch=1")
    assert err.count("note: others use about 2.0 of the 2 cores") == 1
    assert "others use" not in resume(run)[1]


def test_a_cpu_that_is_slow_at_bf16_is_noted(monkeypatch, capsys):
    for capability, precision in (("AVX2", "bf16"), ("AVX2", "fp32"), ("AVX512", "bf16")):
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)  # noqa: B023
        note_slow_precision(precision, torch.device("cpu"))
    assert capsys.readouterr().err.count("precision=fp32 is faster") == 1


def test_what_would_make_a_resumed_run_another_run_is_refused(unfinished, tmp_path):
    for change in ("lr=0.01", "epochs=9", "threads=2", "shards=1"):
        _, err = resume(unfinished, change, expect=2)
        assert change.split("=")[0] in err and "data_dir" in err
    _, err = resume(unfinished, f"data_dir={write_pcam(tmp_path / 'other', seed=9)}", expect=2)
    assert "not the data" in err
    config = unfinished / "config.yaml"
    config.write_text(config.read_text().replace("lr: 0.05", "lr: 0.5"))
    resume(unfinished, expect=2)
    assert not (unfinished / "summary.json").exists()


def test_a_resumed_run_may_change_free_keys_and_hardware_and_says_what_may_change_bits(
    unfinished, whole, pcam_dir, tmp_path
):
    meta = read_json(unfinished / "meta.json")
    meta["machine"] |= {"device": "cuda:0", "host": "another"}
    meta["versions"]["torch"] = "2.0.1"
    write_json(unfinished / "meta.json", meta)
    data = shutil.copytree(pcam_dir, tmp_path / "moved")
    _, err = resume(unfinished, f"data_dir={data}", "checkpoint_every_steps=7", "name=x", "lr=0.05")
    warnings = [line for line in err.splitlines() if line.startswith(f"warning: {unfinished}")]
    assert len(warnings) == 2 and "cuda:0" in warnings[0] and "2.0.1" in warnings[1]
    assert repeatable(unfinished) == repeatable(whole)


def test_a_quarantine_or_groups_that_were_changed_are_not_resumed_as_the_same_run(tmp_path):
    data, listed = write_pcam(tmp_path / "data"), tmp_path / "quarantine.csv"
    listed.write_text("split,index,reason\ntrain,3,black\n")
    keys = ("num_folds=2", "fold=1", f"quarantine={listed}")
    refuse(f"audit.py data {data} --checks groups", tmp_path / "none", f"data_dir={data}", *keys)
    write_groups(data, {"train": np.arange(160) // 4})
    before = (data / "groups.csv").read_text()
    with stopped_at(2):
        run = start(tmp_path / "runs", data, *keys, expect=130)[0]
    assert read_json(run / "meta.json")["groups"] == file_digest(data / "groups.csv")
    (data / "groups.csv").write_text(before.strip() + "0\n")
    resume(run, expect=2)
    (data / "groups.csv").write_text(before)
    listed.write_text("split,index,reason\ntrain,8,black\n")
    resume(run, expect=2)


def test_a_damaged_last_checkpoint_is_refused_in_a_line(pcam_dir, tmp_path):
    with stopped_at(3):
        run = start(tmp_path, pcam_dir, "checkpoint_every_steps=2", expect=130)[0]
    last = run / "last.pt"
    last.write_bytes(last.read_bytes()[:9999])
    _, err = resume(run, expect=2)
    assert "last.pt" in err and len(err.strip().splitlines()) == 1


# ---- classes, schedules and stops, seen from outside


def test_best_pt_is_the_epoch_with_the_best_score_by_the_averaged_weights(
    pcam_dir, tmp_path, monkeypatch
):
    evaluated, aucs = [], iter([0.6, 0.8, 0.7, 0.75])
    evaluate = predict.evaluate

    def scripted(model, *rest):
        evaluated.append(weights_sha256(model.state_dict()))
        return evaluate(model, *rest) | {"auc": next(aucs)}

    monkeypatch.setattr(predict, "evaluate", scripted)
    plateau = ["schedule=plateau", "decay_epochs=1", "decay_factor=0.5", "lr=0.01"]
    stops = ["epochs=6", "early_stop_epochs=2", "warmup_epochs=1"]
    run, result, _ = start(tmp_path, pcam_dir, *stops, *plateau)
    assert result["num_epochs"] == 4 and result["best_epoch"] == 2, "stopped early"
    best, last = load_checkpoint(run / "best.pt"), load_checkpoint(run / "last.pt")
    assert weights_sha256(best["averaged"]) == evaluated[1]
    assert weights_sha256(last["averaged"]) == evaluated[3]
    assert best["progress"]["best_scores"]["auc"] == 0.8 and best["progress"]["num_steps"] == 10
    assert weights_sha256(last["model"]) == result["weights_sha256"] != evaluated[3]
    assert [row["is_best"] for row in read_csv(run / "epochs.csv")] == ["1", "1", "0", "0"]
    rates = [float(row["lr"]) for row in read_csv(run / "steps.csv")]
    assert rates[:5] == pytest.approx([0.002, 0.004, 0.006, 0.008, 0.01])
    assert rates[5:] == pytest.approx([0.01] * 10 + [0.005] * 5), "the schedule follows the score"


def test_a_constant_prediction_raises_the_alarm(pcam_dir, tmp_path, monkeypatch):
    monkeypatch.setattr(predict, "predict_rows", lambda *_: np.full(64, 3.0))
    run, _, err = start(tmp_path, pcam_dir, "epochs=1", "ema_decay=0")
    assert "ALARM: every validation patch is called positive" in err and "0.833" in err
    best = load_checkpoint(run / "best.pt")
    assert weights_sha256(best["averaged"]) == weights_sha256(best["model"])


# ---- a loss that is no number


def test_a_nan_loss_stops_the_run_and_names_step_rows_and_the_last_good_checkpoint(
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
    assert result["diverged_rows"] == poisoned_rows and str(poisoned_rows) in err
    assert re.search(r"error: the loss of step 8 is nan.*last good checkpoint.*last\.pt", err)
    assert len(read_csv(run / "steps.csv")) == 7
    assert load_checkpoint(run / "last.pt")["progress"]["num_steps"] == 7
    assert resume(run, expect=1)[0]["status"] == "diverged", "it is not called finished"


def test_divergence_after_an_epoch_is_not_kept_in_a_checkpoint(pcam_dir, tmp_path):
    options = ["optimizer=sgd", "lr=1e39", "warmup_epochs=0", "batch_size=160"]
    run, result, _ = start(tmp_path, pcam_dir, *options, "checkpoint_every_steps=1", expect=1)
    assert result["status"] == "diverged"
    tensors = [
        value for path in run.glob("*.pt") for value in load_checkpoint(path)["model"].values()
    ]
    assert all(tensor.isfinite().all() for tensor in tensors)


# ---- bad input


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
        ("--runs README.md", "README.md"),
        ("quarantine=nowhere.csv", "nowhere.csv"),
        ("weights=nowhere.pt", "nowhere.pt"),
        ("limit_train=1", "both are needed"),
        ("model=mlp mlp_hidden=[1000000000]", ""),
    ],
)
def test_bad_arguments_get_one_sentence_and_no_run_folder(arguments, sentence, tmp_path, pcam_dir):
    data = [] if arguments.startswith("data_dir") else [f"data_dir={pcam_dir}"]
    quick = ["p4m_width=1", "limit_valid=8"]  # should it not be refused, it is over soon
    refuse(sentence, tmp_path / "runs", *data, *quick, *arguments.split())


@pytest.mark.parametrize("free_kb", [0, 600])
def test_a_full_disk_stops_the_run_with_a_sentence_and_leaves_a_readable_folder(
    free_kb, tmp_path, pcam_dir
):
    disk, readers = tmp_path / "disk", {".pt": load_checkpoint, ".json": read_json}
    readers |= {".csv": read_csv, ".yaml": load_config}
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1000k", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("a tiny file system cannot be mounted here")
    try:
        (disk / "full").write_bytes(bytes((1000 - free_kb) * 1024))
        keys = ["epochs=1", "p4m_width=4", "threads=1", f"data_dir={pcam_dir}", "views=1"]
        code, result, err = call_script(train.main, "--runs", disk / "runs", *keys)
        assert code == 2 and "no space left on device" in result["error"]
        assert err.count("error:") == 1
        for run in (disk / "runs").glob("*"):
            assert (run / "config.yaml").exists() and not (run / "summary.json").exists()
            for path in run.iterdir():
                readers[path.suffix](path)
    finally:
        subprocess.run(["umount", str(disk)], check=True)
