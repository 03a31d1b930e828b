"""The mistakes seen in pipelines of this kind (course projects on PCam), one test each, on the
scripts themselves.
"""

import shutil
import time

import numpy as np
import pytest
from conftest import QUICK, write_pcam
from test_train import call_script, start, write_skewed

import inference
import train
from lib import predict, training
from lib.checkpoint import load_checkpoint, save_checkpoint, weights_sha256
from lib.files import read_csv, read_json
from lib.pcam import SPLITS, open_split, split_path


def test_a_validation_step_does_not_train(pcam_dir, tmp_path, monkeypatch):
    evaluate, step, last = predict.evaluate, training.training_step, {}

    def watched_step(state, *rest):
        result = step(state, *rest)
        last["raw"], last["model"] = weights_sha256(state.model.state_dict()), state.model
        return result

    def watched_evaluate(model, *rest, **keys):
        before, mode = weights_sha256(model.state_dict()), model.training
        scores = evaluate(model, *rest, **keys)
        assert weights_sha256(model.state_dict()) == before and model.training == mode
        assert weights_sha256(last["model"].state_dict()) == last["raw"]
        last["evaluated"] = last.get("evaluated", 0) + 1
        return scores

    monkeypatch.setattr(training, "training_step", watched_step)
    monkeypatch.setattr(predict, "evaluate", watched_evaluate)
    for averaging in ("ema_decay=0", "ema_decay=0.9"):
        run = start(tmp_path, pcam_dir, averaging, "epochs=2")[0]
        assert read_json(run / "summary.json")["weights_sha256"] == last["raw"]
    assert last["evaluated"] == 4


def test_the_test_split_is_not_the_validation_file(quick_run, pcam_dir, tmp_path):
    folder = shutil.copytree(pcam_dir, tmp_path / "data")
    arguments = ["--ckpt", quick_run, folder, "--out", tmp_path / "p.csv", "--split"]
    code, _, err = call_script(inference.main, *arguments, "test")
    assert code == 2 and "choose --split from train, valid" in err, (
        "a missing test split is not made up from another"
    )
    other = write_pcam(tmp_path / "other", 16, 40, seed=7)
    for part in ("x", "y"):
        shutil.copy(split_path(other, "valid", part), split_path(folder, "test", part))
    probs_of = {}
    for split in SPLITS:
        assert call_script(inference.main, *arguments, split)[0] == 0
        rows = read_csv(tmp_path / "p.csv")
        assert {row["source"] for row in rows} == {str(split_path(folder, split, "x"))}
        assert [int(row["label"]) for row in rows] == open_split(folder, split).labels.tolist()
        probs_of[split] = tuple(row["probability"] for row in rows)
    assert [len(probs_of[split]) for split in SPLITS] == [160, 64, 40]
    assert len(set(probs_of.values())) == 3


@pytest.mark.parametrize("split", ["train", "valid"])
@pytest.mark.parametrize("part", ["x", "y"])
def test_a_misspelt_file_is_not_skipped_in_silence(split, part, pcam_dir, tmp_path):
    folder = shutil.copytree(pcam_dir, tmp_path / "data")
    path = split_path(folder, split, part)
    path.rename(path.with_name(path.name.replace("split", "spilt")))
    code, _, err = call_script(
        train.main, "--runs", tmp_path / "runs", f"data_dir={folder}", *QUICK
    )
    assert (
        code == 2
        and f"no file {path.name}" in err
        and "did you mean" in err
        and not (tmp_path / "runs").exists()
    )


def test_the_confusion_matrix_adds_up_to_the_split(quick_run, pcam_dir):
    labels = open_split(pcam_dir, "valid").labels
    for row in read_csv(quick_run / "epochs.csv"):
        tp, fp, fn, tn = (int(row[f"val_{name}"]) for name in ("tp", "fp", "fn", "tn"))
        assert tp + fn == labels.sum() and fp + tn == (labels == 0).sum()
        assert float(row["val_accuracy"]) == (tp + tn) / len(labels)
        share = labels.mean()
        assert float(row["always_positive_f2"]) == pytest.approx(5 * share / (4 * share + 1))


def test_f2_of_a_known_confusion_is_the_one_on_paper(pcam_dir, tmp_path, monkeypatch):
    labels = open_split(pcam_dir, "valid").labels.astype(bool)
    logits = np.where(labels, 2.0, -2.0)
    logits[np.flatnonzero(labels)[:8]] = -1.0  # 24 tp, 8 fn
    logits[np.flatnonzero(~labels)[:16]] = 1.0  # 16 fp, 16 tn
    monkeypatch.setattr(predict, "predict_rows", lambda *_: logits)
    row = read_csv(start(tmp_path, pcam_dir, "epochs=1")[0] / "epochs.csv")[0]
    assert [row[f"val_{name}"] for name in ("tp", "fn", "fp", "tn")] == ["24", "8", "16", "16"]
    assert float(row["val_f2"]) == pytest.approx(120 / (120 + 4 * 8 + 16))
    assert float(row["val_f1"]) == pytest.approx(48 / 72)


def test_the_seed_is_used_for_weights_order_and_augmentation(pcam_dir, tmp_path, monkeypatch):
    seen = []
    step, draw = training.training_step, training.draw_at

    def watched(state, batch, *rest):
        if state.progress["num_steps"] == 0:
            seen.append([weights_sha256(state.model.state_dict()), tuple(batch.keys.tolist())])
        return step(state, batch, *rest)

    def drawn(position, keys, cfg):
        if len(seen[-1]) == 2:
            fixed = draw(position, keys.sort().values, cfg)
            seen[-1].append((tuple(fixed.symmetry.tolist()), tuple(fixed.gain.flatten().tolist())))
        return draw(position, keys, cfg)

    monkeypatch.setattr(training, "training_step", watched)
    monkeypatch.setattr(training, "draw_at", drawn)
    for seed in (1, 1, 2, 3):
        start(tmp_path, pcam_dir, f"seed={seed}", "epochs=1", "limit_train=32")
    assert seen[0] == seen[1]
    for what in range(3):
        assert len({values[what] for values in seen}) == 3, ("weights", "order", "augmentation")[
            what
        ]


def test_seeds_do_not_share_a_folder_even_when_started_in_the_same_second(pcam_dir, tmp_path):
    runs = [
        start(tmp_path, pcam_dir, f"seed={seed}", "epochs=1", "limit_train=32")[0]
        for seed in (1, 2, 1)
    ]
    assert len(set(runs)) == 3 and [run.name.split("-")[-2] for run in runs] == ["s1", "s2", "s1"]
    assert all(len(read_csv(run / "steps.csv")) == 1 for run in runs), (
        "nobody appends to somebody else's rows"
    )


@pytest.mark.parametrize("size, num_steps", [(16, 10), (80, 2)])
def test_throughput_counts_the_images_of_a_batch(size, num_steps, pcam_dir, tmp_path, monkeypatch):
    step = training.training_step

    def slow(*arguments):
        time.sleep(0.05)
        return step(*arguments)

    monkeypatch.setattr(training, "training_step", slow)
    run = start(tmp_path, pcam_dir, f"batch_size={size}", "epochs=1")[0]
    rows, epoch = read_csv(run / "steps.csv"), read_csv(run / "epochs.csv")[0]
    rates = [float(row["images_per_s"]) for row in rows]
    assert len(rates) == num_steps and max(rates) <= size / 0.05
    assert sum(size / rate for rate in rates) == pytest.approx(float(epoch["train_s"]), rel=0.15), (
        "batch size over step time"
    )
    assert float(epoch["images_per_s"]) == pytest.approx(160 / float(epoch["train_s"]), rel=0.01)
    summary = read_json(run / "summary.json")
    assert summary["images_per_s"] == pytest.approx(160 / summary["train_s"], rel=0.01)
    assert all(0 <= float(row["wait_share"]) <= 1 for row in rows)


def test_inference_preprocesses_as_training_did(quick_run, pcam_dir, tmp_path):
    fields = load_checkpoint(quick_run / "best.pt")
    train_loss = read_json(quick_run / "summary.json")["val_loss"]

    def loss_difference(preprocessing) -> float:
        ckpt = tmp_path / "c.pt"
        changes = {"calibration": None, "preprocessing": preprocessing}
        save_checkpoint(ckpt, {**fields, **changes})
        arguments = ["--ckpt", ckpt, pcam_dir, "--split", "valid", "--out", tmp_path / "p.csv"]
        _, result, _ = call_script(inference.main, *arguments)
        return abs(result["scores"]["loss"] - train_loss)

    stored = fields["preprocessing"]
    assert loss_difference(stored) < 1e-7
    assert loss_difference({"mean": [0.5] * 3, "std": [0.5] * 3}) > 1e-4
    assert loss_difference({**stored, "std": [0.1, 0.2, 0.3]}) > 1e-4


def test_an_empty_checkpoint_is_refused_wherever_one_is_read(quick_run, pcam_dir, tmp_path):
    run = shutil.copytree(quick_run, tmp_path / "run")
    (run / "summary.json").unlink()
    for name in ("best.pt", "last.pt"):
        (run / name).write_bytes(b"")
    for main, *arguments in (
        (inference.main, "--ckpt", run, pcam_dir, "--split", "valid", "--out", tmp_path / "p.csv"),
        (train.main, "--resume", run),
        (
            train.main,
            "--runs",
            tmp_path / "runs",
            f"data_dir={pcam_dir}",
            *QUICK,
            f"weights={run / 'best.pt'}",
        ),
    ):
        code, _, err = call_script(main, *arguments)
        assert code == 2 and ".pt is not a readable" in err and err.strip().count("\n") == 0
    assert (
        not (tmp_path / "p.csv").exists()
        and not (tmp_path / "runs").exists()
        and not (run / "summary.json").exists()
    )


def test_a_samplers_output_is_not_reported_as_the_class_balance(tmp_path):
    run, _, err = start(
        tmp_path, write_skewed(tmp_path / "data"), "balance=sampler", "epochs=1", "batch_size=16"
    )
    meta = read_json(run / "meta.json")
    assert (meta["rows"]["train"]["num_negative"], meta["rows"]["train"]["num_positive"]) == (
        80,
        16,
    ) and "96 patches" in err
    valid = open_split(tmp_path / "data", "valid").labels
    assert meta["constant_baselines"]["prevalence"] == valid.mean()
