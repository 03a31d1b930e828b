"""Apply a trained checkpoint to patches and write predictions.csv.

python inference.py --ckpt RUN|FILE INPUT... [--out predictions.csv] [--threshold T] [--views 1|4|8]
"""

import argparse
import sys
import time
from pathlib import Path

import numpy as np

from lib.command import (
    EXIT_DONE,
    EXIT_FINDING,
    BadInput,
    Parser,
    place,
    print_result,
    printable,
    probability,
    say,
    script,
)
from lib.files import require_writable, write_csv

MAX_ERRORS_SHOWN = 5  # inputs that could not be read


def parse(argv) -> argparse.Namespace:
    parser = Parser(
        prog="inference.py",
        description="Apply a checkpoint to patches: one row of probability and decision each.",
    )
    parser.add_argument(
        "--ckpt",
        required=True,
        metavar="RUN|FILE",
        help="a run folder (its best.pt is taken) or a checkpoint",
    )
    parser.add_argument(
        "inputs",
        nargs="+",
        metavar="INPUT",
        type=place,
        help="PCam folder, .h5, image, folder or tar of images",
    )
    parser.add_argument(
        "--split", default="", help="which split of a PCam folder: train, valid or test"
    )
    parser.add_argument(
        "--out", default="predictions.csv", metavar="FILE", help="default: predictions.csv"
    )
    parser.add_argument(
        "--threshold", type=probability, metavar="T", help="positive from here on (default: stored)"
    )
    parser.add_argument(
        "--views",
        type=int,
        choices=(1, 4, 8),
        help="test-time augmentation: 4 or 8 turned and shifted (default: stored)",
    )
    parser.add_argument(
        "--device", default="auto", metavar="D", help="auto, cpu, cuda or cuda:N (default: auto)"
    )
    return parser.parse_intermixed_args(argv)


@script
def main(argv=None) -> int:
    args = parse(argv)

    from lib.checkpoint import load_model, warn_of_views
    from lib.device import choose_device
    from lib.machine import keep_freed_memory
    from lib.seeding import set_determinism

    # load
    device = choose_device(args.device)
    keep_freed_memory()
    require_output_file(args.out)
    model, cfg, checkpoint = load_model(args.ckpt)
    set_determinism(cfg.deterministic)
    views = args.views or cfg.views
    threshold = checkpoint["threshold"] if args.threshold is None else args.threshold
    warn_of_views(checkpoint["calibration"], views)

    # predict
    started_at = time.monotonic()
    rows, features, logits = predict_inputs(args, model.to(device), cfg, checkpoint, views)
    is_read = np.array([not row.error for row in rows])
    failed = [row.error for row in rows if row.error]
    if not is_read.any():
        raise BadInput(f"none of {len(rows)} inputs could be read; the first: {failed[0]}")

    # write a row for each input
    reference = checkpoint["reference"]
    columns = prediction_columns(rows, is_read, features, logits, threshold, reference)
    write_csv(args.out, list(columns), zip(*columns.values(), strict=True))

    # report
    result = {
        "predictions": args.out,
        "num": len(rows),
        "num_failed": len(failed),
        "threshold": threshold,
        "views": views,
        "num_positive": int((columns["prediction"] == "1").sum()),
        "wall_s": round(time.monotonic() - started_at, 3),
        "calibrated": checkpoint["calibration"] is not None,
        "weights_sha256": checkpoint["weights_sha256"],
    }
    say(
        f"{args.out}: {len(rows):,} patches, {result['num_positive']:,} called positive at"
        f" {threshold:g}, {views} view(s)"
    )
    if not result["calibrated"]:
        say("warning: this checkpoint is not calibrated; take its probabilities as ranks")
    for error in failed[:MAX_ERRORS_SHOWN]:
        say(f"not read: {printable(error)}")
    if reference:
        result["drift"] = report_drift(features[is_read], reference)
    if "label" in columns:
        is_labelled = columns["label"] != ""
        labels = columns["label"][is_labelled].astype(int)
        result |= report_scores(labels, logits[is_labelled], threshold)
    print_result(result)
    return EXIT_FINDING if failed else EXIT_DONE


def predict_inputs(args, model, cfg, checkpoint: dict, views: int) -> tuple:
    """(rows, features float64 (N, 6), calibrated logits float64 (N,)) of all patches in the inputs,
    in their order. They are predicted block by block. The logits stay on the device until all are
    there.
    """
    import torch

    from lib.calibration import calibrate
    from lib.inputs import list_blocks
    from lib.predict import block_size, predict_blocks, ready_to_predict
    from lib.progress import Progress

    device = next(model.parameters()).device
    model = ready_to_predict(model, cfg.precision)
    blocks = list_blocks(args.inputs, args.split, block_size(device))
    predicted = predict_blocks(model, blocks, cfg.precision, views, checkpoint["preprocessing"])
    rows, features, logits = [], [], []
    with Progress(0, "predicting") as bar:
        for block, block_features, block_logits in predicted:
            rows += block.rows
            features.append(block_features)
            logits.append(block_logits)
            bar.add(len(block.rows))
    logits = calibrate(torch.cat(logits).cpu().numpy(), checkpoint["calibration"])
    if not np.isfinite(logits).all():
        raise BadInput(f"{args.ckpt} answers a patch with no number: its weights are damaged")
    return rows, np.concatenate(features), logits


def prediction_columns(
    rows: list,
    is_read: np.ndarray,
    features: np.ndarray,
    logits: np.ndarray,
    threshold: float,
    reference: dict | None,
) -> dict:
    """The columns of predictions.csv, {name: values (N,)}. The columns label, drift, unlike and
    error are left out where nothing is known. `unlike` names the feature in which a patch beyond
    the reference's limit differs most.
    """
    from lib.features import farthest_features, patch_scores
    from lib.metrics import sigmoid

    probs = sigmoid(logits)
    columns = {
        "source": [row.source for row in rows],
        "index": [row.index for row in rows],
        "probability": np.where(is_read, [f"{prob:.9g}" for prob in probs], ""),
        "prediction": np.where(is_read, (probs >= threshold).astype(int), ""),
    }
    labels = np.array(["" if row.label is None or row.error else str(row.label) for row in rows])
    if (labels != "").any():
        columns["label"] = labels
    if reference:
        distances = patch_scores(features, reference)  # from the training data
        is_unlike = is_read & (distances > reference["limit"])
        columns["drift"] = np.where(is_read, [f"{distance:.4g}" for distance in distances], "")
        columns["unlike"] = np.where(is_unlike, farthest_features(features, reference), "")
    if not is_read.all():
        columns["error"] = [row.error or "" for row in rows]
    return columns


def report_drift(features: np.ndarray, reference: dict) -> dict:
    """Warn where patches with these features (N, 6), as a batch, do not look like the training
    data; the verdict.
    """
    from lib.features import judge_batch

    drift = judge_batch(features, reference)
    if drift["drifted"]:
        say(
            "WARNING: these patches do not look like those the model was trained on: mean"
            f" {drift['feature']} is {drift['shift']:+.2f} deviations away (limit"
            f" {drift['shift_limit']:.2f}), {drift['share_beyond']:.1%} are beyond the limit of"
            " a single patch; probabilities and threshold may not hold"
        )
    return drift


def report_scores(labels: np.ndarray, logits: np.ndarray, threshold: float) -> dict:
    """Print the scores of logits (N,) against labels (N,), and return them for the result."""
    from lib.metrics import compute_metrics, constant_baselines

    scores = compute_metrics(labels, logits, threshold)
    baselines = constant_baselines(labels)
    say(
        f"AUC {scores['auc']:.4f} (constant 0.5), F2 {scores['f2']:.4f} (constant"
        f" {baselines['always_positive_f2']:.4f}), accuracy {scores['accuracy']:.4f} (constant"
        f" {baselines['majority_accuracy']:.4f})"
    )
    return {"scores": scores, "constant_baselines": baselines}


def require_output_file(out: str) -> None:
    """Raise OSError where `out` cannot be written, and BadInput where it would replace a file that
    is no CSV, such as an input.
    """
    path = Path(out)
    if path.exists() and not (path.is_file() and path.suffix.lower() == ".csv"):
        raise BadInput(f"--out {out} is there and is no CSV file: name a .csv file")
    require_writable(out)


if __name__ == "__main__":
    sys.exit(main())
