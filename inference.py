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

MOST_LOGIT = 1e30  # which float32 can still be scaled


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
    from lib.device import choose_device, keep_freed_memory
    from lib.features import farthest_features, judge_batch, measure_features, patch_scores
    from lib.files import require_writable, write_csv
    from lib.inputs import read_inputs
    from lib.metrics import compute_metrics, constant_baselines, sigmoid
    from lib.predict import predict_batch, ready_to_predict
    from lib.progress import Progress
    from lib.seeding import set_determinism

    device = choose_device(args.device)
    keep_freed_memory()
    if not Path(args.out).absolute().parent.is_dir():
        raise BadInput(f"--out {args.out}: there is no folder {Path(args.out).parent}")
    if Path(args.out).is_dir():
        raise BadInput(f"--out {args.out} is a folder: name a file in it")
    if Path(args.out).exists() and not Path(args.out).is_file():
        raise BadInput(
            f"--out {args.out} is a device or a pipe, which a file would replace: name a file"
        )
    if Path(args.out).exists() and Path(args.out).suffix.lower() != ".csv":
        raise BadInput(
            f"--out {args.out} is there and is no CSV, it may be an input: name a .csv file"
        )
    require_writable(args.out)  # before the work
    model, cfg, checkpoint = load_model(args.ckpt)
    set_determinism(cfg.deterministic)
    model = ready_to_predict(model.to(device), cfg.precision)
    views = args.views or cfg.views
    threshold = checkpoint["threshold"] if args.threshold is None else args.threshold
    calibration, reference = checkpoint["calibration"], checkpoint["reference"]
    warn_of_views(calibration, views)

    started_at = time.monotonic()
    rows, logits, labels, features = [], [], [], []
    with Progress(0, "predicting") as bar:
        for block in read_inputs(args.inputs, args.split):
            images = torch.from_numpy(np.ascontiguousarray(block.images)).to(device)
            found = (
                predict_batch(model, images, cfg.precision, views, checkpoint["preprocessing"])
                .cpu()
                .numpy()
            )
            if not (sound := np.abs(found) < MOST_LOGIT).all():
                source = block.sources[sound.argmin()]
                raise BadInput(
                    f"{args.ckpt} answers {source} with no number: its weights are damaged or"
                    " diverged"
                )
            logits.append(calibrate(found, calibration))
            if reference:
                features.append(measure_features(block.images))
            labels += block.labels
            rows += zip(block.sources, block.indices, block.errors, strict=True)
            bar.add(len(found))
    logits = np.concatenate(logits)
    probs = sigmoid(logits)

    failed = [error for _, _, error in rows if error]
    if len(failed) == len(rows):
        raise BadInput(f"none of {len(rows)} inputs could be read; the first: {failed[0]}")
    good = np.array([not error for _, _, error in rows])
    known = good & np.array([label is not None for label in labels])

    # a column for each thing that is known; cells of what could not be read stay empty
    columns = {
        "probability": [f"{prob:.9g}" for prob in probs],
        "prediction": (probs >= threshold).astype(int).tolist(),
    }
    if reference:
        features = np.concatenate(features)
        drift = patch_scores(features, reference)
        columns["drift"] = [f"{score:.4g}" for score in drift]
        columns["unlike"] = np.where(
            drift > reference["limit"], farthest_features(features, reference), ""
        ).tolist()
    columns = {
        name: [cell if is_good else "" for cell, is_good in zip(c, good, strict=True)]
        for name, c in columns.items()
    }
    if known.any():
        columns["label"] = ["" if label is None else label for label in labels]
    if failed:
        columns["error"] = [error or "" for _, _, error in rows]
    names = [
        name
        for name in ("probability", "prediction", "label", "drift", "unlike", "error")
        if name in columns
    ]
    places = [(source, index) for source, index, _ in rows]
    cells = zip(*(columns[name] for name in names), strict=True)
    write_csv(
        args.out,
        ["source", "index", *names],
        [(*p, *c) for p, c in zip(places, cells, strict=True)],
    )

    result = {
        "predictions": args.out,
        "num": len(rows),
        "num_failed": len(failed),
        "threshold": threshold,
        "views": views,
    }
    result |= {
        "num_positive": int((probs[good] >= threshold).sum()),
        "wall_s": round(time.monotonic() - started_at, 3),
    }
    result |= {
        "calibrated": calibration is not None,
        "weights_sha256": checkpoint["weights_sha256"],
    }
    say(
        f"{args.out}: {len(rows):,} patches, {result['num_positive']:,} called positive at"
        f" {threshold:g}, {views} view(s)"
    )
    for error in failed[:5]:
        say(f"not read: {printable(error)}")
    if reference:
        result["drift"] = batch = judge_batch(features[good], reference)
        if batch["drifted"]:
            say(
                "WARNING: these patches do not look like those the model was trained on: mean"
                f" {batch['feature']} is {batch['shift']:+.2f} deviations away (limit"
                f" {batch['shift_limit']:.2f}), {batch['share_beyond']:.1%} are beyond the limit of"
                " a single patch; probabilities and threshold may not hold"
            )
    if known.any():
        truth = np.array([label for label, is_known in zip(labels, known, strict=True) if is_known])
        scores, baselines = (
            compute_metrics(truth, logits[known], threshold),
            constant_baselines(truth),
        )
        result |= {"scores": scores, "constant_baselines": baselines}
        say(
            f"AUC {scores['auc']:.4f} (constant 0.5), F2 {scores['f2']:.4f} (constant"
            f" {baselines['always_positive_f2']:.4f}), accuracy {scores['accuracy']:.4f} (constant"
            f" {baselines['majority_accuracy']:.4f})"
        )
    print_result(result)
    return EXIT_FINDING if failed else EXIT_DONE


if __name__ == "__main__":
    sys.exit(main())
