"""Apply a trained checkpoint to patches and write predictions.csv.

python inference.py --ckpt RUN|FILE INPUT... [--out predictions.csv] [--threshold T] [--views 1|8]
"""

import argparse
import sys
import time
from pathlib import Path

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

    import numpy as np
    import torch

    from lib.calibration import calibrate
    from lib.checkpoint import load_model, warn_of_views
    from lib.device import choose_device
    from lib.features import farthest_features, judge_batch, patch_scores
    from lib.inputs import list_blocks
    from lib.machine import keep_freed_memory
    from lib.metrics import compute_metrics, constant_baselines, sigmoid
    from lib.predict import block_size, predict_blocks, ready_to_predict
    from lib.progress import Progress
    from lib.seeding import set_determinism

    # load
    device = choose_device(args.device)
    keep_freed_memory()
    require_output_file(args.out)
    model, cfg, checkpoint = load_model(args.ckpt)
    set_determinism(cfg.deterministic)
    model = ready_to_predict(model.to(device), cfg.precision)
    views = args.views or cfg.views
    threshold = checkpoint["threshold"] if args.threshold is None else args.threshold
    calibration, reference = checkpoint["calibration"], checkpoint["reference"]
    warn_of_views(calibration, views)

    # predict block by block, in the order of the inputs; the logits stay on the device until all
    # are there
    started_at = time.monotonic()
    blocks = list_blocks(args.inputs, args.split, block_size(device))
    predicted = predict_blocks(model, blocks, cfg.precision, views, checkpoint["preprocessing"])
    rows, features, logits = [], [], []
    with Progress(0, "predicting") as bar:
        for block, block_features, block_logits in predicted:
            rows += block.rows
            features.append(block_features)
            logits.append(block_logits)
            bar.add(len(block.rows))
    features = np.concatenate(features)
    logits = calibrate(torch.cat(logits).cpu().numpy(), calibration)

    failed = [row.error for row in rows if row.error]
    if len(failed) == len(rows):
        raise BadInput(f"none of {len(rows)} inputs could be read; the first: {failed[0]}")
    is_number = np.isfinite(logits)
    if not is_number.all():
        source = rows[is_number.argmin()].source
        raise BadInput(
            f"{args.ckpt} answers {source} with no number: its weights are damaged or diverged"
        )
    probs = sigmoid(logits)
    is_positive = probs >= threshold
    is_read = np.array([not row.error for row in rows])
    is_labelled = is_read & np.array([row.label is not None for row in rows])

    # write a row for each input; some columns are left out where nothing is known
    columns = {
        "source": [row.source for row in rows],
        "index": [row.index for row in rows],
        "probability": np.where(is_read, [f"{prob:.9g}" for prob in probs], ""),
        "prediction": np.where(is_read, is_positive.astype(int), ""),
    }
    if is_labelled.any():
        columns["label"] = ["" if row.label is None else row.label for row in rows]
    if reference:
        distances = patch_scores(features, reference)  # from the training data
        is_unlike = is_read & (distances > reference["limit"])
        texts = [f"{distance:.4g}" for distance in distances]
        columns["drift"] = np.where(is_read, texts, "")
        columns["unlike"] = np.where(is_unlike, farthest_features(features, reference), "")
    if failed:
        columns["error"] = [row.error or "" for row in rows]
    write_csv(args.out, list(columns), zip(*columns.values(), strict=True))

    # report
    num_positive = int(is_positive[is_read].sum())
    result = {
        "predictions": args.out,
        "num": len(rows),
        "num_failed": len(failed),
        "threshold": threshold,
        "views": views,
        "num_positive": num_positive,
        "wall_s": round(time.monotonic() - started_at, 3),
        "calibrated": calibration is not None,
        "weights_sha256": checkpoint["weights_sha256"],
    }
    say(
        f"{args.out}: {len(rows):,} patches, {num_positive:,} called positive at {threshold:g},"
        f" {views} view(s)"
    )
    for error in failed[:MAX_ERRORS_SHOWN]:
        say(f"not read: {printable(error)}")
    if reference:
        result["drift"] = judge_batch(features[is_read], reference)
        warn_of_drift(result["drift"])
    if is_labelled.any():
        truth = np.array([row.label for row in rows])[is_labelled].astype(int)
        result["scores"] = compute_metrics(truth, logits[is_labelled], threshold)
        result["constant_baselines"] = constant_baselines(truth)
        say_scores(result["scores"], result["constant_baselines"])
    print_result(result)
    return EXIT_FINDING if failed else EXIT_DONE


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


def warn_of_drift(drift: dict) -> None:
    """Say so where the patches, as a batch, do not look like the training data."""
    if drift["drifted"]:
        say(
            "WARNING: these patches do not look like those the model was trained on: mean"
            f" {drift['feature']} is {drift['shift']:+.2f} deviations away (limit"
            f" {drift['shift_limit']:.2f}), {drift['share_beyond']:.1%} are beyond the limit of"
            " a single patch; probabilities and threshold may not hold"
        )


def say_scores(scores: dict, baselines: dict) -> None:
    say(
        f"AUC {scores['auc']:.4f} (constant 0.5), F2 {scores['f2']:.4f} (constant"
        f" {baselines['always_positive_f2']:.4f}), accuracy {scores['accuracy']:.4f} (constant"
        f" {baselines['majority_accuracy']:.4f})"
    )


if __name__ == "__main__":
    sys.exit(main())
