"""What makes a checkpoint fit for use elsewhere: calibration, a threshold, and statistics of the
data it was trained on.
"""

import numpy as np
import torch

from lib.batches import PatchSource, Rows, fold_of_rows, group_of_rows, open_train_valid
from lib.calibration import (
    calibrate,
    calibration_scores,
    choose_threshold,
    decision_scores,
    fit_scaling,
)
from lib.checkpoint import checkpoint_path, load_model, save_checkpoint
from lib.command import say
from lib.config import Config, change_free_keys, parse_overrides
from lib.device import choose_device
from lib.features import MAX_REFERENCE_ROWS, build_reference, measure_features
from lib.metrics import compute_metrics, sigmoid
from lib.pcam import Split
from lib.predict import predict_rows
from lib.seeding import set_determinism


def sample_features(split: Split, index: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Features (B, 6) of some of the rows `index` int64 (N,), drawn evenly, and their places in
    it.
    """
    places = np.linspace(0, len(index) - 1, min(MAX_REFERENCE_ROWS, len(index))).astype(np.int64)
    return measure_features(split.images.read(index[places])), places


def complete_checkpoint(
    ckpt,
    device: torch.device,
    train: tuple[Split, Rows],
    valid: tuple[Split, Rows],
    source: PatchSource,
    cfg: Config,
) -> tuple[dict, dict]:
    """Write calibration, threshold and reference statistics into a checkpoint, in place; `source`
    has the patches of `valid`.

    Both are chosen on one half of the validation rows, slides or groups of copies kept whole, and
    judged on the other. Returns the scores of all rows at 0.5, over the views of the config, and
    what the choice is worth on the other half.
    """
    model, _, checkpoint = load_model(ckpt)
    (train_split, train_rows), (valid_split, valid_rows) = train, valid
    logits = predict_rows(model.to(device), source, valid_rows.index, cfg, cfg.views)
    groups, index, labels = (
        group_of_rows(valid_split, cfg.data_dir),
        valid_rows.index,
        valid_rows.labels,
    )
    # a fold is a stretch of the order that halves are cut from: it is halved by itself
    chosen_on = (
        fold_of_rows(groups[index], 2) if cfg.num_folds else fold_of_rows(groups, 2)[index]
    ) == 0
    groups = groups[index]

    calibration, threshold, told = None, 0.5, {}
    if all(len(np.unique(labels[half])) == 2 for half in (chosen_on, ~chosen_on)):
        temperature, offset = fit_scaling(labels[chosen_on], logits[chosen_on])
        calibration = {"temperature": temperature, "offset": offset, "views": cfg.views}
        calibrated = calibrate(logits, calibration)
        probs = sigmoid(calibrated)
        rule = cfg.threshold_rule, cfg.least_recall, cfg.false_negative_cost
        threshold = choose_threshold(labels[chosen_on], probs[chosen_on], *rule)
        before, after = (
            calibration_scores(labels[~chosen_on], scaled[~chosen_on])
            for scaled in (logits, calibrated)
        )
        decision = decision_scores(labels[~chosen_on], probs[~chosen_on], threshold)
        told = (
            {"threshold": threshold}
            | calibration
            | {"half_ece": after["ece"], "half_ece_raw": before["ece"]}
        )
        calibration |= {"before": before, "after": after, "decision": decision}
        told |= {
            f"half_{name}": decision[name] for name in ("recall", "specificity", "precision", "f2")
        }
    else:
        say(
            "validation cannot be cut into halves with both classes: the threshold stays 0.5,"
            " probabilities are not calibrated"
        )
    train_features, _ = sample_features(train_split, train_rows.index)
    valid_features, places = sample_features(valid_split, valid_rows.index)
    reference = build_reference(train_features, valid_features, groups[places])
    checkpoint |= {"threshold": threshold, "calibration": calibration, "reference": reference}
    # of which the calibration is
    checkpoint["config"] = checkpoint["config"] | {"views": cfg.views}
    save_checkpoint(checkpoint_path(ckpt), checkpoint)
    return compute_metrics(labels, logits), told


def recalibrate(ckpt, directory, overrides, device: str) -> None:
    """Calibrate a checkpoint anew, in place, on a folder's train and valid splits; `overrides` may
    change free keys.
    """
    cfg = change_free_keys(
        load_model(ckpt)[1], {"data_dir": str(directory)} | parse_overrides(overrides)
    )
    set_determinism(cfg.deterministic)
    train, valid = open_train_valid(cfg)
    device = choose_device(device)
    complete_checkpoint(
        ckpt, device, train, valid, PatchSource(valid[0].images, cfg.data_residence, device), cfg
    )
