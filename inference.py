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

COLUMNS = ("source", "index", "probability", "prediction", "label", "drift", "unlike", "error")
MAX_ERRORS_SHOWN = 5  # inputs that could not be read


def parse(argv) -> argparse.Namespace:
    parser = Parser(
        prog="inference.py",
        usage="python inference.py --ckpt runs/RUN INPUT... [options]",
        description="Apply a checkpoint to patches: one row of probability and decision each.",
    )
    add = parser.add_argument
    add(
        "--ckpt",
        required=True,
        metavar="RUN|FILE",
        help="a run folder (its best.pt is taken) or a checkpoint",
    )
    add(
        "inputs",
        nargs="+",
        metavar="INPUT",
        type=place,
        help="PCam folder, .h5, image, folder or tar of images",
    )
    add("--split", default="", help="which split of a PCam folder: train, valid or test")
    add("--out", default="predictions.csv", metavar="FILE", help="default: predictions.csv")
    add(
        "--threshold", type=probability, metavar="T", help="positive from here on (default: stored)"
    )
    add(
        "--views",
        type=int,
        choices=(1, 4, 8),
        help="test-time augmentation: 4 or 8 turned and shifted (default: stored)",
    )
    parser.add_device()
    return parser.parse_intermixed_args(argv)


@script
def main(argv=None) -> int:
    args = parse(argv)

    from lib.checkpoint import load_model, warn_of_views
    from lib.device import choose_device
    from lib.features import judge_batch
    from lib.machine import keep_freed_memory
    from lib.metrics import compute_metrics, constant_baselines, sigmoid
    from lib.rundir import describe_scores
    from lib.seeding import set_determinism

    # load
    device = choose_device(args.device)
    keep_freed_memory()
    is_csv = Path(args.out).is_file() and args.out.lower().endswith(".csv")
    if Path(args.out).exists() and not is_csv:
        raise BadInput(f"--out {args.out} is there and is no CSV file: name a .csv file")
    require_writable(args.out)
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
    probs = sigmoid(logits)
    reference = checkpoint["reference"]
    write_predictions(args.out, rows, features, probs, threshold, reference)

    # report
    num_positive = int((probs[is_read] >= threshold).sum())
    result = {
        "predictions": args.out,
        "num": len(rows),
        "num_failed": len(failed),
        "threshold": threshold,
        "views": views,
        "num_positive": num_positive,
        "wall_s": round(time.monotonic() - started_at, 3),
        "calibrated": checkpoint["calibration"] is not None,
        "weights_sha256": checkpoint["weights_sha256"],
    }
    say(
        f"{args.out}: {len(rows):,} patches, {num_positive:,} called positive at {threshold:g},"
        f" {views} view(s)"
    )
    if not result["calibrated"]:
        say("warning: this checkpoint is not calibrated; take its probabilities as ranks")
    for error in failed[:MAX_ERRORS_SHOWN]:
        say(f"not read: {printable(error)}")
    if reference:
        drift = result["drift"] = judge_batch(features[is_read], reference)
        if drift["drifted"]:
            say(
                "WARNING: these patches do not look like those the model was trained on: mean"
                f" {drift['feature']} is {drift['shift']:+.2f} deviations away (limit"
                f" {drift['shift_limit']:.2f}), {drift['share_beyond']:.1%} are beyond the limit of"
                " a single patch; probabilities and threshold may not hold"
            )
    labelled = np.array([row.label is not None for row in rows]) & is_read
    if labelled.any():
        labels = np.array([row.label for row in rows])[labelled].astype(int)
        scores = compute_metrics(labels, logits[labelled], threshold)
        baselines = constant_baselines(labels)
        say(describe_scores(scores, baselines))
        result |= {"scores": scores, "constant_baselines": baselines}
    print_result(result)
    return EXIT_FINDING if failed else EXIT_DONE


def predict_inputs(args, model, cfg, checkpoint: dict, views: int) -> tuple:
    """(rows, features float64 (N, 6), calibrated logits float64 (N,)) of all patches in the inputs,
    in their order. They are predicted block by block. The logits stay on the device until all are
    there.
    """
    import torch

    from lib.calibration import calibrate
    from lib.device import precision_to_predict
    from lib.inputs import list_blocks
    from lib.predict import BLOCK_SIZES, predict_blocks, ready_to_predict
    from lib.progress import Progress

    device = next(model.parameters()).device
    precision = precision_to_predict(cfg.precision, device)
    model = ready_to_predict(model, precision)
    blocks = list_blocks(args.inputs, args.split, BLOCK_SIZES[device.type])
    predicted = predict_blocks(model, blocks, precision, views)
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


def write_predictions(
    path, rows: list, features: np.ndarray, probs: np.ndarray, threshold: float, reference
) -> None:
    """Write predictions.csv. Columns of which nothing is known are left out. `unlike` names the
    feature in which a patch beyond the reference's limit differs most.
    """
    from lib.features import farthest_features, patch_scores

    if reference:
        distances = patch_scores(features, reference)  # from the training data
        unlike = np.where(
            distances > reference["limit"], farthest_features(features, reference), ""
        )
    lines = []
    for number, row in enumerate(rows):
        line = {"source": row.source, "index": row.index}
        lines.append(line)
        if row.error:
            line["error"] = row.error
            continue
        line["probability"] = f"{probs[number]:.9g}"
        line["prediction"] = int(probs[number] >= threshold)
        if row.label is not None:
            line["label"] = row.label
        if reference:
            line["drift"] = f"{distances[number]:.4g}"
            line["unlike"] = unlike[number]
    known = set().union(*lines)
    header = [name for name in COLUMNS if name in known]
    write_csv(path, header, ([line.get(name, "") for name in header] for line in lines))


if __name__ == "__main__":
    sys.exit(main())
