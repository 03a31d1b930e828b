"""Apply a trained checkpoint to patches and write predictions.csv.

python inference.py --ckpt RUN|FILE INPUT... [--out predictions.csv] [--threshold T] [--views 1|8]
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
        choices=(1, 8),
        help="test-time augmentation: 8 turned and shifted (default: stored)",
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
    failed = [row.error for row in rows if row.error]
    if len(failed) == len(rows):
        raise BadInput(f"none of {len(rows)} inputs could be read; the first: {failed[0]}")
    require_finite(logits, rows, args.ckpt)

    # write a row for each input
    columns = prediction_columns(rows, features, logits, threshold, checkpoint["reference"])
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
    result |= report_drift(rows, features, checkpoint["reference"])
    result |= report_scores(rows, logits, threshold)
    print_result(result)
    return EXIT_FINDING if failed else EXIT_DONE


def predict_inputs(args, model, cfg, checkpoint: dict, views: int) -> tuple:
    """(rows, features float64 (N, 6), calibrated logits float32 (N,)) of all patches in the inputs,
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
    return rows, np.concatenate(features), logits


def require_finite(logits: np.ndarray, rows: list, ckpt: str) -> None:
    """Raise BadInput where the answer to a row is no number."""
    is_finite = np.isfinite(logits)
    if not is_finite.all():
        source = rows[is_finite.argmin()].source
        raise BadInput(f"{ckpt} answers {source} with no number: its weights are damaged")


def is_read(rows: list) -> np.ndarray:
    """Which rows, bool (N,), hold a patch that could be read."""
    return np.array([not row.error for row in rows])


def prediction_columns(
    rows: list, features: np.ndarray, logits: np.ndarray, threshold: float, reference: dict | None
) -> dict:
    """The columns of predictions.csv, {name: values (N,)}. The columns label, drift, unlike and
    error are left out where nothing is known.
    """
    from lib.features import farthest_features, patch_scores
    from lib.metrics import sigmoid

    read, probs = is_read(rows), sigmoid(logits)
    columns = {
        "source": [row.source for row in rows],
        "index": [row.index for row in rows],
        "probability": np.where(read, [f"{prob:.9g}" for prob in probs], ""),
        "prediction": np.where(read, (probs >= threshold).astype(int), ""),
    }
    labels = ["" if row.label is None or row.error else row.label for row in rows]
    if any(label != "" for label in labels):
        columns["label"] = labels
    if reference:
        distances = patch_scores(features, reference)  # from the training data
        is_unlike = read & (distances > reference["limit"])
        columns["drift"] = np.where(read, [f"{distance:.4g}" for distance in distances], "")
        columns["unlike"] = np.where(is_unlike, farthest_features(features, reference), "")
    if not read.all():
        columns["error"] = [row.error or "" for row in rows]
    return columns


def report_drift(rows: list, features: np.ndarray, reference: dict | None) -> dict:
    """Warn where the patches, as a batch, do not look like the training data; the result's part on
    it, empty without a reference.
    """
    from lib.features import judge_batch

    if not reference:
        return {}
    drift = judge_batch(features[is_read(rows)], reference)
    if drift["drifted"]:
        say(
            "WARNING: these patches do not look like those the model was trained on: mean"
            f" {drift['feature']} is {drift['shift']:+.2f} deviations away (limit"
            f" {drift['shift_limit']:.2f}), {drift['share_beyond']:.1%} are beyond the limit of"
            " a single patch; probabilities and threshold may not hold"
        )
    return {"drift": drift}


def report_scores(rows: list, logits: np.ndarray, threshold: float) -> dict:
    """Print the scores of the patches that have a label; the result's part on them, empty where
    none has.
    """
    from lib.metrics import compute_metrics, constant_baselines

    is_labelled = is_read(rows) & np.array([row.label is not None for row in rows])
    if not is_labelled.any():
        return {}
    labels = np.array([row.label for row in rows])[is_labelled].astype(int)
    scores = compute_metrics(labels, logits[is_labelled], threshold)
    baselines = constant_baselines(labels)
    say(
        f"AUC {scores['auc']:.4f} (constant 0.5), F2 {scores['f2']:.4f} (constant"
        f" {baselines['always_positive_f2']:.4f}), accuracy {scores['accuracy']:.4f} (constant"
        f" {baselines['majority_accuracy']:.4f})"
    )
    return {"scores": scores, "constant_baselines": baselines}


def require_output_file(out: str) -> None:
    """Raise BadInput or OSError where `out` cannot be written, and BadInput where it would replace
    a file that is no CSV, such as an input.
    """
    path = Path(out)
    if not path.absolute().parent.is_dir():
        raise BadInput(f"--out {out}: there is no folder {path.parent}")
    if path.exists() and not (path.is_file() and path.suffix.lower() == ".csv"):
        raise BadInput(f"--out {out} is there and is no CSV file: name a .csv file")
    require_writable(out)


if __name__ == "__main__":
    sys.exit(main())
