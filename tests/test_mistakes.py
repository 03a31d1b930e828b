"""The mistakes seen in pipelines of this kind (course projects on PCam), one test each, on the
scripts themselves.
"""

import time

import numpy as np
import pytest
from conftest import QUICK
from test_train import call_script, start

import inference
import train
from lib import predict, training
from lib.checkpoint import load_checkpoint, save_checkpoint
from lib.files import read_csv, read_json
from lib.pcam import open_split


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
    assert float(row["val_accuracy"]) == 40 / 64
    assert float(row["always_positive_f2"]) == pytest.approx(5 / 6)


def test_throughput_counts_the_images_of_a_batch(pcam_dir, tmp_path, monkeypatch):
    step = training.training_step

    def slow(*arguments):
        time.sleep(0.05)
        return step(*arguments)

    monkeypatch.setattr(training, "training_step", slow)
    run = start(tmp_path, pcam_dir, "batch_size=16", "epochs=1")[0]
    rows, epoch = read_csv(run / "steps.csv"), read_csv(run / "epochs.csv")[0]
    rates = [float(row["images_per_s"]) for row in rows]
    assert len(rates) == 10 and max(rates) <= 16 / 0.05
    train_s = float(epoch["train_s"])
    assert sum(16 / rate for rate in rates) == pytest.approx(train_s, rel=0.15)
    assert float(epoch["images_per_s"]) == pytest.approx(160 / train_s, rel=0.01)
    summary = read_json(run / "summary.json")
    assert summary["images_per_s"] == pytest.approx(160 / summary["train_s"], rel=0.01)


def test_inference_preprocesses_as_training_did(quick_run, pcam_dir, tmp_path):
    fields, ckpt = load_checkpoint(quick_run / "best.pt"), tmp_path / "c.pt"
    train_loss = read_json(quick_run / "summary.json")["val_loss"]
    arguments = ["--ckpt", ckpt, pcam_dir, "--split", "valid", "--out", tmp_path / "p.csv"]
    stored = fields["preprocessing"]
    other = {"mean": [0.5] * 3, "std": [0.5] * 3}
    for preprocessing in (stored, other, {**stored, "std": [0.1, 0.2, 0.3]}):
        changes = {"calibration": None, "preprocessing": preprocessing}
        save_checkpoint(ckpt, {**fields, **changes})
        _, result, _ = call_script(inference.main, *arguments)
        difference = abs(result["scores"]["loss"] - train_loss)
        assert difference < 1e-7 if preprocessing is stored else difference > 1e-4


def test_a_quarantine_that_is_not_there_is_named_by_its_key(pcam_dir, tmp_path):
    arguments = ["--runs", tmp_path, f"data_dir={pcam_dir}", *QUICK, "quarantine=nope.csv"]
    code, _, err = call_script(train.main, *arguments)
    assert code == 2 and err.startswith("error: quarantine=nope.csv: ")
