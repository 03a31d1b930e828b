"""Calibration of the probabilities and the threshold on them: fitted, judged, and written into a
checkpoint together with the reference statistics of the training data.
"""

import numpy as np
import torch
from torch.nn.functional import binary_cross_entropy_with_logits

from lib.batches import PatchSource, Rows, fold_of_rows
from lib.checkpoint import checkpoint_path, load_model, save_checkpoint
from lib.command import say
from lib.config import Config
from lib.features import MAX_REFERENCE_ROWS, build_reference, measure_features
from lib.groups import groups_for_halves
from lib.metrics import (
    as_arrays,
    compute_log_loss,
    compute_metrics,
    curve_points,
    sigmoid,
)
from lib.pcam import Split
from lib.predict import predict_rows

NUM_BINS = 15
MAX_TEMPERATURE = 100.0  # beyond it a model ranks patches hardly at all
HALF_SCORES = ("recall", "specificity", "precision", "f2")  # of the threshold, in summary.json
NEVER = 1.01  # a threshold above every probability: no patch is called positive


def fit_scaling(labels, logits) -> tuple[float, float]:
    """Temperature T and offset b for which sigmoid(logits / T + b) has the lowest log loss on
    labels (N,) (Guo et al. 2017).

    The targets are those of Platt (1999), which keep T finite where the classes do not overlap. The
    offset corrects a model that calls too few or too many patches positive. The result is (1, 0),
    which changes nothing, for a model that ranks patches in the wrong order, or hardly at all.
    """
    labels, logits = as_arrays(labels, logits)
    num_positive = labels.sum()
    num_negative = len(labels) - num_positive
    targets = np.where(labels, (num_positive + 1) / (num_positive + 2), 1 / (num_negative + 2))
    inputs, targets = torch.tensor(logits), torch.tensor(targets)
    factors = torch.tensor([1.0, 0.0], dtype=torch.float64, requires_grad=True)  # 1 / T and b
    optimizer = torch.optim.LBFGS(
        [factors],
        max_iter=500,
        tolerance_grad=1e-12,
        tolerance_change=1e-15,
        line_search_fn="strong_wolfe",
    )

    def compute_loss() -> torch.Tensor:
        optimizer.zero_grad()
        scaled = factors[0] * inputs + factors[1]
        loss = binary_cross_entropy_with_logits(scaled, targets)
        loss.backward()
        return loss

    optimizer.step(compute_loss)
    slope, offset = factors.tolist()
    return (1 / slope, offset) if slope >= 1 / MAX_TEMPERATURE else (1.0, 0.0)


def calibrate(logits: np.ndarray, calibration: dict | None) -> np.ndarray:
    """Logits float64 (N,) scaled as a checkpoint's `calibration` says, or unchanged without one."""
    logits = np.asarray(logits, np.float64)
    if calibration is None:
        return logits
    return logits / calibration["temperature"] + calibration["offset"]


def find_bins(probs: np.ndarray) -> np.ndarray:
    """The number of the bin of each probability (N,), of NUM_BINS of equal width."""
    return np.minimum((probs * NUM_BINS).astype(np.int64), NUM_BINS - 1)


def calibration_scores(labels, logits) -> dict[str, float]:
    """ece (of the positive class, NUM_BINS bins of equal width), brier (mean squared error) and nll
    (mean log loss, nats) of logits (N,) against labels (N,).
    """
    labels, logits = as_arrays(labels, logits)
    errors = sigmoid(logits) - labels
    gaps = np.bincount(find_bins(sigmoid(logits)), errors)
    ece = float(np.abs(gaps).sum() / len(labels))
    brier = float((errors**2).mean())
    return {"ece": ece, "brier": brier, "nll": compute_log_loss(labels, logits)}


def choose_threshold(
    labels, probs, rule: str, least_recall: float, false_negative_cost: float
) -> float:
    """The threshold on probabilities (N,) that a rule chooses: half-way between two of them, or
    NEVER. The labels must have both classes.

    - f2: the threshold of the highest F2
    - recall: the strictest threshold that finds `least_recall` of the positives
    - cost: the threshold of the lowest cost, where a false positive costs 1 and a false negative
      `false_negative_cost`
    """
    labels, probs = as_arrays(labels, probs)
    points = curve_points(labels, probs)
    # the first one calls no patch positive
    thresholds = np.concatenate([[NEVER], points["threshold"], [0.0]])
    recalls = np.append(0.0, points["recall"])
    hits = recalls * labels.sum()
    misses = labels.sum() - hits
    false_alarms = np.append(0.0, points["false_positive_rate"]) * (~labels).sum()
    if rule == "recall":
        best = np.argmax(recalls >= least_recall)
    elif rule == "cost":
        best = np.argmin(false_negative_cost * misses + false_alarms)
    else:
        best = np.argmax(5 * hits / (5 * hits + 4 * misses + false_alarms))  # F2
    return float(thresholds[best : best + 2].mean()) if best else NEVER


def fit_calibration(labels, logits, is_fitted: np.ndarray, cfg: Config) -> dict | None:
    """Temperature, offset, views and, in `decision`, threshold: fitted to the rows where
    `is_fitted` bool (N,) and judged on the other rows. None where either half lacks a class.

    `after` holds the calibration scores on the other rows, and `decision` the scores of the
    threshold there.
    """
    fitted, judged = labels[is_fitted], labels[~is_fitted]
    if min(len(np.unique(fitted)), len(np.unique(judged))) < 2:
        return None
    temperature, offset = fit_scaling(fitted, logits[is_fitted])
    calibration = {"temperature": temperature, "offset": offset, "views": cfg.views}
    scaled = calibrate(logits, calibration)
    rule = cfg.threshold_rule, cfg.least_recall, cfg.false_negative_cost
    threshold = choose_threshold(fitted, sigmoid(scaled[is_fitted]), *rule)
    scores = compute_metrics(judged, scaled[~is_fitted], threshold)
    calibration["after"] = calibration_scores(judged, scaled[~is_fitted])
    calibration["decision"] = {"threshold": threshold, **scores}
    return calibration


def complete_checkpoint(
    ckpt,
    train: tuple[Split, Rows],
    valid: tuple[Split, Rows],
    source: PatchSource,
    cfg: Config,
) -> tuple[dict, dict]:
    """Write calibration, threshold and reference statistics into a checkpoint, in place. `source`
    has the patches of `valid`; its device predicts.

    Calibration and threshold are fitted to one half of the validation rows and judged on the other.
    Slides, or groups of copies, stay whole. Returns (scores, summary). `scores` are those of all
    rows at threshold 0.5, over the views of the config and before calibration. `summary` is what
    summary.json says of the calibration, or the threshold alone without one.
    """
    model, _, checkpoint = load_model(ckpt)
    split, rows = valid
    logits = predict_rows(model.to(source.device), source, rows.index, cfg, cfg.views)
    groups = groups_for_halves(split, cfg.data_dir)
    # Halves and folds are cut from the same order of groups. A fold could lie within one half of
    # the whole split, so with folds its own rows alone are cut.
    if cfg.num_folds:
        half_of_row = fold_of_rows(groups[rows.index], 2)
    else:
        half_of_row = fold_of_rows(groups, 2)[rows.index]
    calibration = fit_calibration(rows.labels, logits, half_of_row == 0, cfg)
    if calibration:
        decision = calibration["decision"]
        summary = {
            "threshold": decision["threshold"],
            "temperature": calibration["temperature"],
            "offset": calibration["offset"],
            "views": calibration["views"],
            "half_ece": calibration["after"]["ece"],
            **{f"half_{name}": decision[name] for name in HALF_SCORES},
        }
    else:
        summary = {"threshold": 0.5}
        say(
            "validation cannot be cut into halves with both classes: the threshold stays 0.5,"
            " probabilities are not calibrated"
        )
    train_features, _ = sample_features(*train)
    valid_features, sampled = sample_features(*valid)
    checkpoint["reference"] = build_reference(train_features, valid_features, groups[sampled])
    checkpoint["calibration"] = calibration
    checkpoint["threshold"] = summary["threshold"]
    checkpoint["config"]["views"] = cfg.views  # the number that the calibration was fitted to
    save_checkpoint(checkpoint_path(ckpt), checkpoint)
    return compute_metrics(rows.labels, logits), summary


def sample_features(split: Split, rows: Rows) -> tuple[np.ndarray, np.ndarray]:
    """(features float64 (B, 6), row numbers int64 (B,)) of at most MAX_REFERENCE_ROWS of the rows,
    evenly spaced.
    """
    num = min(MAX_REFERENCE_ROWS, len(rows))
    sampled = rows.index[np.linspace(0, len(rows) - 1, num).astype(np.int64)]
    return measure_features(split.images.read(sampled)), sampled
