"""Which labels deserve a second look: predictions of models that have not seen them, and how likely
a disagreement is an error.

Training is cross-validated: each patch is predicted by a model of the other folds. The outcome is a
ranked list for review, never a verdict.
"""

from pathlib import Path

import numpy as np

from lib.audit import finding
from lib.audit.label_noise import LEAST_RATE, fit_label_noise
from lib.audit.survey import Survey
from lib.audit.twin import make_run
from lib.batches import PatchSource, open_train_valid
from lib.checkpoint import load_model
from lib.command import say
from lib.config import load_config, parse_overrides
from lib.device import choose_device
from lib.files import write_csv
from lib.groups import groups_for_halves
from lib.metrics import compute_auc, sigmoid
from lib.predict import predict_rows
from lib.rundir import resume_config

# what a fold learns from, all epochs together
NUM_FOLDS, PATCHES_PER_FOLD, MOST_EPOCHS = 4, 120_000, 12
BUDGET = 2.0  # the list is so many times as long as the number of labels that seem wrong
# of the folds: below, a disagreement says more about the model than about the label
LEAST_AUC = 0.75


def check_labels(
    directory, survey: Survey, out: Path, overrides: list[str], device: str
) -> list[dict]:
    """Train the folds in OUT/runs, predict each held-out patch, rank the disagreements. Raises
    BadInput as train.py does.
    """
    num_folds = load_config(overrides=overrides).num_folds or NUM_FOLDS
    num_train = len(survey) * (num_folds - 1) // num_folds
    epochs = int(np.clip(PATCHES_PER_FOLD // max(num_train, 1), 1, MOST_EPOCHS))
    settings = {
        "name": "fold",
        "epochs": epochs,
        "crop_epochs": epochs,
        "views": 1,
        "quarantine": out / "quarantine.csv",
    }
    settings |= {"limit_train": min(PATCHES_PER_FOLD, num_train)} | parse_overrides(overrides)
    settings |= {"data_dir": directory, "num_folds": num_folds}
    logits = np.full(len(survey), np.nan)
    for fold in range(num_folds):
        say(
            f"training fold {fold + 1} of {num_folds}, to predict its patches by a model that has"
            " not seen them"
        )
        overridden = [f"{key}={value}" for key, value in settings.items()]
        run = make_run(
            ["--runs", str(out / "runs"), "--device", device, *overridden, f"fold={fold}"]
        )
        run_cfg = resume_config(run, [])
        _, (split, rows) = open_train_valid(run_cfg)
        target = choose_device(device)
        source = PatchSource(split.images, run_cfg.data_residence, target)
        logits[rows.index] = predict_rows(
            load_model(run)[0].to(target), source, rows.index, run_cfg, run_cfg.views
        )
    usable = np.intersect1d(np.flatnonzero(~np.isnan(logits)), survey.intact)
    groups = groups_for_halves(split, directory)[usable]
    return rank_labels(survey, usable, logits[usable], groups, out)


def rank_labels(survey: Survey, rows: np.ndarray, logits, groups, out: Path) -> list[dict]:
    """The review list from out-of-fold logits (N,) of rows (N,) in groups (N,), written whole to
    OUT/out_of_fold.csv.
    """
    labels = survey.labels[rows]
    rate, least, wrong = fit_label_noise(labels, logits, groups)
    order = np.argsort(-wrong, kind="stable")
    probs = sigmoid(logits)
    cells = (
        [survey.name, int(rows[i]), int(labels[i]), f"{probs[i]:.6f}", f"{wrong[i]:.6f}"]
        for i in order
    )
    write_csv(out / "out_of_fold.csv", ("split", "index", "label", "probability", "wrong"), cells)
    auc = compute_auc(labels, logits)
    measured = f"out-of-fold AUC {auc:.4f} on {len(rows):,} patches; "
    if not auc >= LEAST_AUC:
        advice = "more patches, or epochs=, for the folds"
        measured += "models this weak cannot judge labels"
        return [
            finding(
                "labels to review", "warning", measured, f"{LEAST_AUC:g}", advice, split=survey.name
            )
        ]
    if least < LEAST_RATE:
        measured += f"at least {least:.1%} of the labels fit an exchange, {rate:.1%} fits best"
        advice = "out_of_fold.csv ranks all, should you look nevertheless"
        limit = f"{LEAST_RATE:.0%}"
        return [finding("labels to review", "note", measured, limit, advice, split=survey.name)]
    chosen = order[: int(np.ceil(BUDGET * rate * len(rows)))]
    expected = wrong[chosen].mean()
    measured += (
        f"{rate:.1%} of the labels seem exchanged; of the {len(chosen):,} listed {expected:.0%}"
        " should be wrong"
    )
    advice = "a list for review, not a verdict: look at each; out_of_fold.csv ranks all"
    rows = survey.rows(
        rows[chosen],
        probability=probs[chosen].round(4),
        reason="label",
        score=wrong[chosen].round(4),
    )
    return [finding("labels to review", "warning", measured, "none", advice, rows, survey.name)]
