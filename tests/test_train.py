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
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import QUICK, REPOSITORY, draw_patches, make_old, run_script, write_pcam

import train
from lib import machine, predict, training
from lib.batches import PatchSource, open_train_valid
from lib.checkpoint import load_checkpoint, load_model, weights_sha256
from lib.config import dump_config, load_config
from lib.device import note_slow_precision
from lib.files import file_digest, read_csv, read_json, write_json
from lib.metrics import compute_metrics
from lib.models import logit_layer
from lib.pcam import split_path
from lib.splitwriter import SplitWriter, write_labels

STEP_SAME, EPOCH_OTHER = (
    ("step", "epoch", "loss", "lr", "grad_norm"),
    ("train_s", "eval_s", "images_per_s"),
)
# state of every kind: dropout, momentum, averages, shards, a schedule with a memory, classes drawn
# by the sampler
RICH = [
    "optimizer=sgd",
    "lr=0.05",
    "dropout=0.3",
    "shards=2",
    "schedule=plateau",
    "decay_epochs=1",
    "decay_factor=0.5",
]
RICH += [
    "balance=sampler",
    "batch_size=16",
    "epochs=3",
    "warmup_epochs=0.5",
    "p4m_width=2",
    "threads=1",
    "precision=fp32",
]


def call_script(main, *arguments):
    """A script's main in this process: (exit code, last line of stdout parsed, stderr)."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main([str(argument) for argument in arguments])
    return code, json.loads(out.getvalue().strip().splitlines()[-1]), err.getvalue()


def start(runs, data, *overrides, expect=0) -> tuple[Path, dict, str]:
    """Train in this process, later overrides over earlier ones; (run folder, JSON, stderr)."""
    keys = dict(pair.split("=", 1) for pair in (*QUICK, *overrides))
    code, result, err = call_script(
        train.main, "--runs", runs, f"data_dir={data}", *(f"{k}={v}" for k, v in keys.items())
    )
    assert code == expect, err
    return Path(result["run"]), result, err


def resume(run, *arguments, expect=0) -> tuple[dict, str]:
    code, result, err = call_script(train.main, "--resume", run, *arguments)
    assert code == expect, err
    return result, err


def on_step(monkeypatch, number, action):
    """Let `action()` happen right after optimisation step `number`."""
    step = training.training_step

    def wrapped(state, *arguments):
        result = step(state, *arguments)
        if state.progress["num_steps"] == number:
            action()
        return result

    monkeypatch.setattr(training, "training_step", wrapped)


def repeatable(run) -> tuple:
    """All that has to be equal in a run that was stopped and resumed and one that was not."""
    steps = [[row[name] for name in STEP_SAME] for row in read_csv(run / "steps.csv")]
    epochs = [
        {k: v for k, v in row.items() if k not in EPOCH_OTHER}
        for row in read_csv(run / "epochs.csv")
    ]
    best, last = (load_checkpoint(run / name) for name in ("best.pt", "last.pt"))
    tensors = [
        weights_sha256(checkpoint[part])
        for checkpoint in (best, last)
        for part in ("model", "averaged")
    ]
    return (
        read_json(run / "summary.json")["weights_sha256"],
        steps,
        epochs,
        tensors,
        last["progress"],
    )


@pytest.fixture(scope="module")
def whole(pcam_dir, tmp_path_factory) -> Path:
    """The rich run, never stopped."""
    return start(tmp_path_factory.mktemp("whole"), pcam_dir, *RICH)[0]


def write_skewed(directory) -> Path:
    """PCam with 5 negatives to a positive in train: 80 and 16."""
    write_pcam(directory, 32, 32)
    images, labels = draw_patches(192, 3)
    keep = np.concatenate([np.flatnonzero(labels == 0)[:80], np.flatnonzero(labels == 1)[:16]])
    with SplitWriter(directory, "train", 96) as writer:
        writer.add(images[keep], labels[keep])
    return directory


# ---- the run folder


@pytest.mark.slow
def test_the_run_folder_holds_what_the_contract_says(quick_run, pcam_dir):
    assert re.fullmatch(r"\d{8}T\d{6}Z-quick-s1-[0-9a-f]{4}", quick_run.name)
    files = {
        "config.yaml",
        "meta.json",
        "steps.csv",
        "epochs.csv",
        "best.pt",
        "last.pt",
        "report.html",
        "summary.json",
    }
    assert {entry.name for entry in quick_run.iterdir()} == files
    newest = max(quick_run.iterdir(), key=lambda entry: entry.stat().st_mtime_ns)
    assert newest.name == "summary.json", "a run without one did not finish"
    cfg = load_config(overrides=[f"data_dir={pcam_dir}", *QUICK])
    assert (quick_run / "config.yaml").read_text() == dump_config(cfg) and len(cfg.as_dict()) > 40

    meta = read_json(quick_run / "meta.json")
    assert Path(meta["argv"][0]).name == "train.py" and f"data_dir={pcam_dir}" in meta["argv"]
    assert len(meta["data"]) == 4 and all(
        re.fullmatch("[0-9a-f]{64}", digest) for digest in meta["data"].values()
    )
    assert {"commit", "uncommitted_patch", "versions", "machine", "job", "identity"} <= meta.keys()
    assert meta["rows"]["train"] == {
        "num": 160,
        "num_negative": 80,
        "num_positive": 80,
        "left_out": {},
    }

    steps, epochs = read_csv(quick_run / "steps.csv"), read_csv(quick_run / "epochs.csv")
    assert [row["step"] for row in steps] == [str(step) for step in range(1, 11)]
    assert [row["epoch"] for row in steps] == ["1"] * 5 + ["2"] * 5
    assert [(row["epoch"], row["step"]) for row in epochs] == [("1", "5"), ("2", "10")]
    for number, row in enumerate(epochs):
        losses = [float(step["loss"]) for step in steps[5 * number : 5 * number + 5]]
        assert float(row["train_loss"]) == pytest.approx(np.mean(losses))
        assert {
            "val_auc",
            "val_f2",
            "val_pr_auc",
            "always_positive_f2",
            "constant_auc",
            "majority_accuracy",
        } <= row.keys()

    summary, best = (
        read_json(quick_run / "summary.json"),
        epochs[int(read_json(quick_run / "summary.json")["best_epoch"]) - 1],
    )
    assert (
        summary["status"] == "finished"
        and summary["val_auc"] == float(best["val_auc"])
        and best["is_best"] == "1"
    )
    assert summary["weights_sha256"] == weights_sha256(
        load_checkpoint(quick_run / "last.pt")["model"]
    )
    assert summary["always_positive_f2"] == pytest.approx(0.8333, abs=1e-4)


def test_the_last_line_of_stdout_is_the_summary_with_the_run(tmp_path, pcam_dir):
    run, result, _ = start(tmp_path, pcam_dir, "epochs=1")
    assert result == {"run": str(run), **read_json(run / "summary.json")}


def test_the_summary_scores_the_best_model_over_all_views(pcam_dir, tmp_path):
    run = start(tmp_path, pcam_dir, "views=8", "model=cnn", "cnn_width=8")[0]
    command = [
        "inference.py",
        "--ckpt",
        run,
        pcam_dir,
        "--split",
        "valid",
        "--out",
        tmp_path / "p.csv",
    ]
    scores = run_script(*command, check=0).json["scores"]
    summary, best = (
        read_json(run / "summary.json"),
        max(float(row["val_auc"]) for row in read_csv(run / "epochs.csv")),
    )
    assert (summary["val_auc"], summary["val_pr_auc"]) == (scores["auc"], scores["pr_auc"])
    one = run_script(*command[:-1], tmp_path / "q.csv", "--views", 1, check=0).json["scores"]
    assert one["auc"] == best and one["loss"] != pytest.approx(scores["loss"], rel=1e-5), (
        "eight views are others"
    )


# ---- the same again


def test_the_same_seed_gives_the_same_bits_and_another_seed_does_not(quick_run, pcam_dir, tmp_path):
    again = start(tmp_path, pcam_dir)[0]  # in this process, the first was one of its own
    assert repeatable(again) == repeatable(quick_run)
    other = start(tmp_path, pcam_dir, "seed=2")[0]
    assert (
        repeatable(other)[0] != repeatable(quick_run)[0]
        and repeatable(other)[1] != repeatable(quick_run)[1]
    )


@pytest.mark.parametrize(
    "free", ["data_residence=disk", "data_residence=host", "eval_batch_size=5", "name=x", "views=8"]
)
def test_what_is_called_free_does_not_change_the_weights(free, quick_run, pcam_dir, tmp_path):
    run = start(tmp_path, pcam_dir, free)[0]
    assert repeatable(run)[:2] == repeatable(quick_run)[:2]
    assert (
        read_json(run / "meta.json")["identity"] == read_json(quick_run / "meta.json")["identity"]
    )


@pytest.mark.slow
def test_the_data_may_lie_elsewhere_but_other_data_are_another_identity(
    quick_run, pcam_dir, tmp_path
):
    shutil.copytree(pcam_dir, tmp_path / "moved")
    one = start(tmp_path, tmp_path / "moved")[0]
    other = start(tmp_path, write_pcam(tmp_path / "other", seed=5))[0]
    identities = [read_json(run / "meta.json")["identity"] for run in (quick_run, one, other)]
    assert identities[0] == identities[1] != identities[2]


# ---- stopped and resumed


# at the first step, in mid-epoch, at the last step of an epoch, at the last but one of all
@pytest.mark.parametrize(
    "step, number",
    [(1, signal.SIGTERM), (14, signal.SIGINT), (20, signal.SIGUSR1), (29, signal.SIGTERM)],
)
def test_a_run_stopped_by_a_signal_and_resumed_equals_one_that_was_not(
    number, step, whole, pcam_dir, tmp_path, monkeypatch
):
    with monkeypatch.context() as patch:
        on_step(patch, step, lambda: os.kill(os.getpid(), number))
        run, result, err = start(tmp_path, pcam_dir, *RICH, expect=130)
    assert result["status"] == "interrupted" and result["step"] == step and f"--resume {run}" in err
    assert read_json(run / "meta.json")["stopped"]["step"] == step
    assert not (run / "summary.json").exists() and len(read_csv(run / "steps.csv")) == step
    resume(run)
    assert repeatable(run) == repeatable(whole)
    meta = read_json(run / "meta.json")
    assert meta["start_step"] == step and [one["start_step"] for one in meta["earlier_starts"]] == [
        0
    ]


@pytest.mark.slow
def test_a_process_stopped_from_outside_and_resumed_equals_one_that_was_not(
    whole, pcam_dir, tmp_path
):
    command = [
        sys.executable,
        str(REPOSITORY / "train.py"),
        "--runs",
        str(tmp_path),
        f"data_dir={pcam_dir}",
        "name=quick",
    ]
    command += [*RICH, "checkpoint_every_steps=1"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )
    deadline = time.monotonic() + 120
    while (
        not list(tmp_path.glob("*/last.pt"))
        and process.poll() is None
        and time.monotonic() < deadline
    ):
        time.sleep(0.005)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in err
    run = Path(json.loads(out.splitlines()[-1])["run"])
    resume(run, "checkpoint_every_steps=0", "data_residence=disk")
    assert repeatable(run) == repeatable(whole)


@pytest.mark.slow
def test_a_process_killed_after_a_checkpoint_and_resumed_equals_one_that_was_not(
    whole, pcam_dir, tmp_path
):
    arguments = [
        "--runs",
        str(tmp_path),
        f"data_dir={pcam_dir}",
        "name=quick",
        *RICH,
        "checkpoint_every_steps=6",
    ]
    code = f"""if True:
        import os, signal, sys
        sys.path[:0] = [{str(REPOSITORY)!r}, {str(REPOSITORY / "tests")!r}]
        import pytest, train, test_train
        test_train.on_step(pytest.MonkeyPatch(), 15, lambda: os.kill(os.getpid(), signal.SIGKILL))
        train.main({arguments!r})"""
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=300
    )
    assert result.returncode == -signal.SIGKILL, result.stderr
    run = next(tmp_path.iterdir())
    assert (
        load_checkpoint(run / "last.pt")["progress"]["num_steps"] == 12
        and len(list(tmp_path.iterdir())) == 1
    )
    with open(run / "steps.csv", "a") as file:
        file.write("13,2,0.5,0.1\n14,2,0.")  # what a dying process may leave
    resume(run)
    assert repeatable(run) == repeatable(whole)


@pytest.mark.slow
def test_a_run_killed_before_its_first_checkpoint_starts_from_its_config(whole, tmp_path):
    run = tmp_path / whole.name
    run.mkdir()
    for name in ("config.yaml", "meta.json", "steps.csv"):
        shutil.copy(whole / name, run)
    resume(run)
    assert repeatable(run) == repeatable(whole)


@pytest.mark.slow
def test_a_run_that_pauses_after_each_epoch_equals_one_that_did_not(whole, pcam_dir, tmp_path):
    run, result, _ = start(tmp_path, pcam_dir, *RICH, "--until-epoch=1")
    assert (
        result == {"run": str(run), "status": "paused", "step": 10}
        and not (run / "summary.json").exists()
    )
    for _ in range(2):  # the second time it has come that far already
        assert resume(run, "--until-epoch=2")[0] == {
            "run": str(run),
            "status": "paused",
            "step": 20,
        }
        assert len(read_csv(run / "epochs.csv")) == 2
    resume(run, "--until-epoch=99")
    assert repeatable(run) == repeatable(whole)


def test_a_run_begun_before_schema_3_goes_on_with_its_last_layer(pcam_dir, tmp_path):
    run, _, _ = start(tmp_path, pcam_dir, "precision=bf16", "--until-epoch=1")
    old = shutil.copytree(run, tmp_path / "old")
    for name in ("best.pt", "last.pt"):
        make_old(old / name)
    for folder in (run, old):
        resume(folder)
        is_new = folder == run
        for name in ("best.pt", "last.pt"):
            assert load_checkpoint(folder / name)["float32_logits"] == is_new
        model, cfg, checkpoint = load_model(folder / "last.pt")
        _, (split, rows) = open_train_valid(cfg)
        source = PatchSource(split.images, "disk", torch.device("cpu"))
        logits = predict.predict_rows(model, source, rows.index, cfg, 1)
        assert np.array_equal(logits, torch.from_numpy(logits).bfloat16().float()) != is_new
        assert compute_metrics(rows.labels, logits) == checkpoint["metrics"], "as the run's own"
    assert repeatable(run)[0] != repeatable(old)[0], "the last layer rounds in training too"
    started = training.build_state(
        load_config(old / "config.yaml", [f"weights={old / 'best.pt'}"]), torch.device("cpu")
    )
    assert logit_layer(started.model).is_float32, (
        "another run that starts from its weights is a new one"
    )


def test_resuming_a_finished_run_says_so_and_changes_nothing(quick_run):
    before = {entry.name: entry.read_bytes() for entry in quick_run.iterdir()}
    result, err = resume(quick_run)
    assert result == {"run": str(quick_run), "status": "finished"} and "finished" in err
    assert before == {entry.name: entry.read_bytes() for entry in quick_run.iterdir()}


def test_a_run_holds_the_number_of_its_threads_and_keeps_it_where_there_are_other_cores(
    pcam_dir, tmp_path, monkeypatch
):
    options = [
        "--runs",
        tmp_path,
        f"data_dir={pcam_dir}",
        *(pair for pair in QUICK if pair != "threads=1"),
    ]
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", "1")
    code, result, err = call_script(train.main, *options, "--until-epoch", 1)
    run = Path(result["run"])
    assert code == 0 and load_checkpoint(run / "last.pt")["config"]["threads"] == 1, err
    before = (run / "config.yaml").read_text()
    monkeypatch.delenv("SLURM_CPUS_PER_TASK")
    result, _ = resume(run)
    assert "\nthreads: 1\n" in before == (run / "config.yaml").read_text()
    named, one, _ = start(tmp_path, pcam_dir)
    assert result["weights_sha256"] == one["weights_sha256"]
    assert read_json(run / "meta.json")["identity"] == read_json(named / "meta.json")["identity"]


def test_cores_that_others_use_are_noted_while_the_number_of_threads_can_be_chosen(
    pcam_dir, tmp_path, monkeypatch
):
    monkeypatch.setattr(machine, "affinity", lambda: {0, 1})
    monkeypatch.setattr(machine, "others_busy_s", lambda: 2 * time.monotonic())
    run, _, err = start(tmp_path, pcam_dir, "threads=2", "--until-epoch=1")
    assert err.count("note: others use about 2.0 of the 2 cores") == 1
    _, err = resume(run)
    assert "others use" not in err


@pytest.mark.parametrize("capability", ["AVX2", "AVX512"])
@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_a_cpu_that_is_slow_at_bf16_is_noted(capability, precision, monkeypatch, capsys):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    note_slow_precision(precision, torch.device("cpu"))
    is_slow = capability == "AVX2" and precision == "bf16"
    assert ("precision=fp32 is faster" in capsys.readouterr().err) == is_slow


@pytest.fixture
def unfinished(whole, tmp_path):
    """A copy of the rich run as it is just before summary.json is written."""
    shutil.copytree(whole, tmp_path / whole.name)
    (tmp_path / whole.name / "summary.json").unlink()
    return tmp_path / whole.name


@pytest.mark.parametrize(
    "change",
    ["lr=0.01", "seed=3", "epochs=9", "batch_size=8", "threads=2", "shards=1", "balance=none"],
)
def test_a_key_that_changes_the_weights_cannot_be_changed_on_resume(change, unfinished):
    result, err = resume(unfinished, change, expect=2)
    assert (
        change.split("=")[0] in err
        and "data_dir" in err
        and not (unfinished / "summary.json").exists()
    )


def test_a_free_key_can_be_changed_on_resume(unfinished, whole, pcam_dir, tmp_path):
    shutil.copytree(pcam_dir, tmp_path / "moved")
    resume(
        unfinished,
        f"data_dir={tmp_path / 'moved'}",
        "checkpoint_every_steps=7",
        "name=x",
        "lr=0.05",
    )
    assert repeatable(unfinished) == repeatable(whole)


def test_resume_on_other_data_is_refused(unfinished, tmp_path):
    result, err = resume(unfinished, f"data_dir={write_pcam(tmp_path / 'other', seed=9)}", expect=2)
    assert "not the data" in err and not (unfinished / "summary.json").exists()


ELSEWHERE = [
    ("machine", "device", "cuda:0"),
    ("versions", "torch", "2.0.1"),
    ("machine", "cpu_capability", "NEON"),
]


@pytest.mark.parametrize("place, key, value", [*ELSEWHERE, ("machine", "host", "another")])
def test_a_run_that_goes_on_with_other_hardware_or_torch_says_so_and_goes_on(
    place, key, value, unfinished, whole
):
    meta = read_json(unfinished / "meta.json")
    meta[place][key] = value
    write_json(unfinished / "meta.json", meta)
    _, err = resume(unfinished)
    warnings = [line for line in err.splitlines() if "warning" in line]
    assert len(warnings) == (key != "host") and all(
        value in warning and str(unfinished) in warning for warning in warnings
    )
    assert repeatable(unfinished) == repeatable(whole)


def test_a_config_that_was_edited_is_not_resumed_as_if_it_were_the_same_run(unfinished):
    path = unfinished / "config.yaml"
    path.write_text(path.read_text().replace("lr: 0.05", "lr: 0.5"))
    resume(unfinished, expect=2)


def test_a_quarantine_that_was_changed_is_not_resumed_as_if_it_were_the_same_run(
    pcam_dir, tmp_path, monkeypatch
):
    listed = tmp_path / "quarantine.csv"
    listed.write_text("split,index,reason,score\ntrain,3,black,1\n")
    with monkeypatch.context() as patch:
        on_step(patch, 7, lambda: os.kill(os.getpid(), signal.SIGTERM))
        run = start(tmp_path / "runs", pcam_dir, f"quarantine={listed}", expect=130)[0]
    assert read_json(run / "meta.json")["rows"]["train"]["left_out"] == {"black": 1}
    listed.write_text("split,index,reason,score\ntrain,8,black,1\n")
    resume(run, expect=2)


@pytest.mark.slow
def test_folds_without_slide_names_need_groups_and_resume_with_the_same(tmp_path, monkeypatch):
    data, folds = write_pcam(tmp_path / "data"), ("num_folds=2", "fold=1")
    refuse(f"audit.py data {data} --checks groups", tmp_path / "runs", f"data_dir={data}", *folds)
    run_script("audit.py", "data", data, "--checks", "groups", cwd=tmp_path, check=0)
    groups = data / "groups.csv"
    with monkeypatch.context() as patch:
        on_step(patch, 3, lambda: os.kill(os.getpid(), signal.SIGTERM))
        run = start(tmp_path / "runs", data, *folds, expect=130)[0]
    meta = read_json(run / "meta.json")
    assert meta["groups"] == file_digest(groups)

    # a last group that is another one could hold out other rows
    before = groups.read_text()
    groups.write_text(before.strip() + "0\n")
    resume(run, expect=2)
    cfg = load_config(run / "config.yaml")
    old = {key: value for key, value in meta.items() if key != "groups"}
    write_json(run / "meta.json", old | {"identity": cfg.identity_digest(meta["data"])})
    resume(run)


@pytest.mark.parametrize("damage", ["empty", "cut", "best"])
def test_a_last_checkpoint_that_cannot_be_resumed_is_refused(damage, unfinished):
    data = {
        "empty": b"",
        "cut": (unfinished / "last.pt").read_bytes()[:9999],
        "best": (unfinished / "best.pt").read_bytes(),
    }
    (unfinished / "last.pt").write_bytes(data[damage])
    result, err = resume(unfinished, expect=2)
    assert "last.pt" in err and len(err.strip().splitlines()) == 1


@pytest.mark.slow
@pytest.mark.parametrize("damage", ["empty", "cut", "gone"])
def test_a_damaged_last_checkpoint_gives_way_to_the_one_before(
    damage, pcam_dir, tmp_path, monkeypatch, quick_run
):
    with monkeypatch.context() as patch:
        on_step(patch, 7, lambda: os.kill(os.getpid(), signal.SIGTERM))
        run = start(tmp_path, pcam_dir, "checkpoint_every_steps=2", expect=130)[0]
    last = run / "last.pt"
    if damage == "gone":
        last.unlink()
    else:
        last.write_bytes(b"" if damage == "empty" else last.read_bytes()[:9999])
    result, err = resume(run)
    assert damage == "gone" or ("warning: " in err and "previous.pt" in err)
    assert result["weights_sha256"] == read_json(quick_run / "summary.json")["weights_sha256"]
    assert not (run / "previous.pt").exists(), "a finished run has no use for it"


# ---- classes, schedules and stops, seen from outside


@pytest.mark.parametrize("balance", ["none", "loss", "sampler"])
def test_balance_changes_training_but_never_the_counts_that_are_reported(
    balance, tmp_path, monkeypatch
):
    batches = []
    step = training.training_step

    def watch(state, batch, cfg, lr, weights, ranks):
        batches.append((batch.labels.mean().item(), weights is not None))
        return step(state, batch, cfg, lr, weights, ranks)

    monkeypatch.setattr(training, "training_step", watch)
    run = start(
        tmp_path, write_skewed(tmp_path / "data"), f"balance={balance}", "epochs=1", "batch_size=16"
    )[0]
    counts = read_json(run / "meta.json")["rows"]["train"]
    assert (counts["num_negative"], counts["num_positive"]) == (80, 16)
    assert np.mean([share for share, _ in batches]) == pytest.approx(
        1 / 2 if balance == "sampler" else 1 / 6
    )
    assert all(weighted == (balance == "loss") for _, weighted in batches)


def test_the_rate_of_each_step_is_the_schedules(pcam_dir, tmp_path):
    options = ["schedule=plateau", "epochs=3", "warmup_epochs=1", "lr=0.01", "ema_decay=0"]
    run = start(tmp_path, pcam_dir, *options, "decay_epochs=1", "decay_factor=0.5")[0]
    rates = [float(row["lr"]) for row in read_csv(run / "steps.csv")]
    assert rates[:5] == pytest.approx([0.002, 0.004, 0.006, 0.008, 0.01])
    aucs = [float(row["val_auc"]) for row in read_csv(run / "epochs.csv")]
    last = 0.01 if aucs[1] > aucs[0] else 0.005
    assert rates[5:] == pytest.approx([0.01] * 5 + [last] * 5)


def test_best_pt_is_the_epoch_with_the_best_score_by_the_averaged_weights(
    pcam_dir, tmp_path, monkeypatch
):
    evaluated, aucs = [], iter([0.6, 0.8, 0.7, 0.75])
    evaluate = predict.evaluate

    def scripted(model, *rest):
        evaluated.append(weights_sha256(model.state_dict()))
        return evaluate(model, *rest) | {"auc": next(aucs)}

    monkeypatch.setattr(predict, "evaluate", scripted)
    run, result, _ = start(tmp_path, pcam_dir, "epochs=6", "early_stop_epochs=2")
    assert result["num_epochs"] == 4 and result["best_epoch"] == 2, "stopped early"
    best, last = load_checkpoint(run / "best.pt"), load_checkpoint(run / "last.pt")
    assert (
        weights_sha256(best["averaged"]) == evaluated[1]
        and weights_sha256(last["averaged"]) == evaluated[3]
    )
    assert best["metrics"]["auc"] == 0.8 and best["progress"]["num_steps"] == 10
    assert weights_sha256(last["model"]) == result["weights_sha256"] != evaluated[3]
    assert [row["is_best"] for row in read_csv(run / "epochs.csv")] == ["1", "1", "0", "0"]


def test_without_averaging_the_raw_weights_are_evaluated(pcam_dir, tmp_path):
    run = start(tmp_path, pcam_dir, "ema_decay=0", "epochs=1")[0]
    assert load_checkpoint(run / "best.pt")["averaged"] is None


@pytest.mark.slow
def test_a_constant_prediction_raises_the_alarm_and_a_real_one_does_not(
    pcam_dir, tmp_path, monkeypatch
):
    run, _, err = start(
        tmp_path, pcam_dir, "lr=1e-12", "epochs=1", "model=mlp", "ema_decay=0", "weight_decay=0"
    )
    constant = read_csv(run / "epochs.csv")[0]["val_positive_share"] in ("0.0", "1.0")
    assert ("ALARM" in err) == constant
    for logits, word in (
        (np.full(64, -3.0), "negative"),
        (np.full(64, 3.0), "positive"),
        (np.linspace(-1, 1, 64), None),
    ):
        monkeypatch.setattr(predict, "predict_rows", lambda *_, logits=logits: logits)
        err = start(tmp_path, pcam_dir, "epochs=1")[2]
        assert (
            (f"ALARM: every validation patch is called {word}" in err and "0.833" in err)
            if word
            else "ALARM" not in err
        )


# ---- a loss that is no number


def all_finite(path) -> bool:
    checkpoint = torch.load(path, weights_only=True)
    tensors = [
        tensor for part in ("model", "averaged") for tensor in (checkpoint[part] or {}).values()
    ]
    return all(bool(tensor.isfinite().all()) for tensor in tensors)


def test_a_nan_loss_stops_the_run_and_names_step_rows_and_the_last_good_checkpoint(
    pcam_dir, tmp_path, monkeypatch
):
    step = training.training_step
    batches = {}

    def poisoned(state, batch, *rest):
        batches[state.progress["num_steps"] + 1] = sorted(batch.keys.tolist())
        if state.progress["num_steps"] == 7:
            next(state.model.parameters()).data.fill_(float("nan"))
        return step(state, batch, *rest)

    monkeypatch.setattr(training, "training_step", poisoned)
    run, result, err = start(tmp_path, pcam_dir, "checkpoint_every_steps=1", expect=1)
    assert (
        result["status"] == "diverged"
        and result["diverged_step"] == 8
        and result["diverged_rows"] == batches[8]
    )
    assert (
        re.search(r"error: the loss of step 8 is nan.*last good checkpoint.*last\.pt", err)
        and str(batches[8])[1:-1] in err
    )
    assert [row["step"] for row in read_csv(run / "steps.csv")] == [
        str(step) for step in range(1, 8)
    ]
    assert load_checkpoint(run / "last.pt")["progress"]["num_steps"] == 7
    assert all_finite(run / "last.pt") and all_finite(run / "best.pt")


# in mid-epoch, between epochs, at the very end
@pytest.mark.parametrize(
    "rate, epochs, size", [("1e30", 2, 32), ("1e39", 2, 160), ("1e30", 1, 160)]
)
def test_divergence_is_never_finished_nor_kept_in_a_checkpoint(
    rate, epochs, size, pcam_dir, tmp_path
):
    options = [
        *QUICK[2:],
        "optimizer=sgd",
        f"lr={rate}",
        "warmup_epochs=0",
        f"epochs={epochs}",
        f"batch_size={size}",
    ]
    options += [f"data_dir={pcam_dir}", "checkpoint_every_steps=1"]
    code, result, _ = call_script(train.main, "--runs", tmp_path, *options)
    assert all(all_finite(path) for path in Path(result["run"]).glob("*.pt"))
    assert code == 1 and result["status"] == "diverged", (
        "the weights are of no use, and exit code and status say so"
    )


def test_resuming_a_diverged_run_does_not_call_it_finished(pcam_dir, tmp_path):
    run = start(tmp_path, pcam_dir, "optimizer=sgd", "lr=1e30", expect=1)[0]
    code, result, _ = call_script(train.main, "--resume", run)
    assert result.get("status") == "diverged" or code != 0


# ---- bad input


def changed(tmp_path, pcam_dir, split="valid", part="x", write=None) -> Path:
    """The PCam folder with one file replaced by what `write(path)` makes, or gone."""
    folder = tmp_path / "changed"
    folder.mkdir()
    for entry in pcam_dir.glob("*.h5"):
        (folder / entry.name).symlink_to(entry)
    path = split_path(folder, split, part)
    path.unlink()
    if write:
        write(path)
    return folder


BAD_DATA = {
    "missing": ("train", "x", None, "no file camelyonpatch_level_2_split_train_x.h5"),
    "short": ("valid", "y", lambda path: write_labels(path, np.arange(60) % 2), "60"),
    "one class": ("valid", "y", lambda path: write_labels(path, [0] * 64), "both are needed"),
    "no hdf5": ("valid", "x", lambda path: path.write_bytes(b"PK" * 999), "split_valid_x.h5"),
}


@pytest.mark.parametrize("case", BAD_DATA)
def test_bad_data_get_one_sentence_and_no_run_folder(case, tmp_path, pcam_dir):
    *place, write, sentence = BAD_DATA[case]
    refuse(sentence, tmp_path / "runs", f"data_dir={changed(tmp_path, pcam_dir, *place, write)}")


def refuse(sentence, runs, *arguments):
    code, result, err = call_script(train.main, "--runs", runs, *arguments)
    errors = [line for line in err.splitlines() if line.startswith("error:")]
    assert code == 2 and len(errors) == 1 and sentence in errors[0] and "Traceback" not in err, err
    assert result == {"error": errors[0].removeprefix("error: "), "exit": 2}
    assert not runs.is_dir() or not list(runs.iterdir()), "nothing is left behind"


BAD_ARGUMENTS = [
    (["data_dir=nowhere"], "nowhere"),
    (["batchsize=3"], "'batch_size'"),
    (["--device", "cuda:77"], "--device cuda:77"),
    (["--config", "nowhere.yaml"], "nowhere.yaml"),
    (["--wrong"], "--wrong"),
    (["--resume", "nothing"], "nothing"),
    (["--resume", "", "epochs=1"], ""),
    (["quarantine=nowhere.csv"], "nowhere.csv"),
    (["weights=nowhere.pt"], "nowhere.pt"),
    (["limit_train=1"], "both are needed"),
    (["model=mlp", "mlp_hidden=[1000000000]"], ""),
]


@pytest.mark.parametrize(
    "arguments, sentence",
    BAD_ARGUMENTS,
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_arguments_get_one_sentence_and_no_run_folder(arguments, sentence, tmp_path, pcam_dir):
    data = (
        []
        if any(argument.startswith("data_dir") for argument in arguments)
        else [f"data_dir={pcam_dir}"]
    )
    quick = ["p4m_width=1", "limit_valid=8"]  # should it not be refused, it is over soon
    refuse(sentence, tmp_path / "runs", *data, *quick, *arguments)


def test_a_runs_folder_that_is_a_file_is_refused(tmp_path, pcam_dir):
    (tmp_path / "runs").touch()
    refuse("runs", tmp_path / "runs", f"data_dir={pcam_dir}")


def test_resuming_a_folder_that_is_no_run_is_refused(tmp_path, pcam_dir):
    refuse("no config.yaml", tmp_path / "runs", "--resume", pcam_dir)


@pytest.mark.parametrize("free_kb", [0, 150, 600])
def test_a_full_disk_stops_the_run_with_a_sentence_and_leaves_a_readable_folder(
    free_kb, tmp_path, pcam_dir
):
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1000k", "tmpfs", str(disk)], capture_output=True
    )
    if mounted.returncode:
        pytest.skip("a tiny file system cannot be mounted here")
    try:
        (disk / "full").write_bytes(bytes((1000 - free_kb) * 1024))
        keys = [
            f"data_dir={pcam_dir}",
            *(pair for pair in QUICK if pair.split("=")[0] not in ("epochs", "p4m_width")),
        ]
        keys += ["epochs=1", "p4m_width=4"]
        code, result, err = call_script(train.main, "--runs", disk / "runs", *keys)
        assert (
            code == 2
            and "no space left on device" in err
            and len(re.findall("(?m)^error:", err)) == 1
        )
        for run in (disk / "runs").glob("*"):
            assert not list(run.glob("*.tmp")) and (run / "config.yaml").exists(), (
                "half a folder is left behind"
            )
            assert not (run / "summary.json").exists()
            for path in run.iterdir():
                {
                    ".pt": load_checkpoint,
                    ".json": read_json,
                    ".csv": read_csv,
                    ".yaml": load_config,
                }[path.suffix](path)
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_a_real_process_refuses_without_a_traceback(tmp_path):
    result = run_script("train.py", "--runs", tmp_path / "runs", "batchsize=3", check=2)
    assert (
        result.stderr.startswith("error: ")
        and len(result.stderr.splitlines()) == 1
        and result.json["exit"] == 2
    )
