"""Apply a trained checkpoint to patches and write predictions.csv.

python inference.py --ckpt RUN|FILE INPUT... [--out predictions.csv] [--threshold T] [--views 1|8]
"""

import argparse
import sys
import time
from pathlib import Path

from lib.command import EXIT_DONE, EXIT_FINDING, BadInput, Parser, place, print_result, probability, say, script


def parse(argv) -> argparse.Namespace:
    parser = Parser(prog="inference.py", description="Apply a checkpoint to patches: one row of probability and decision each.")
    parser.add_argument("--ckpt", required=True, metavar="RUN|FILE", help="a run folder (its best.pt is taken) or a checkpoint")
    parser.add_argument(
        "inputs", nargs="+", metavar="INPUT", type=place, help="PCam folder, .h5, image, folder or tar of images"
    )
    parser.add_argument("--split", default="", help="which split of a PCam folder: train, valid or test")
    parser.add_argument("--out", default="predictions.csv", metavar="FILE", help="default: predictions.csv")
    parser.add_argument("--threshold", type=probability, metavar="T", help="positive from here on (default: stored)")
    parser.add_argument("--views", type=int, choices=(1, 8), help="average over the eight symmetries (default: stored)")
    parser.add_argument("--device", default="auto", metavar="D", help="auto, cpu, cuda or cuda:N (default: auto)")
    return parser.parse_intermixed_args(argv)


@script
def main(argv=None) -> int:
    args = parse(argv)

    import numpy as np
    import torch

    from lib.checkpoint import load_model
    from lib.device import choose_device
    from lib.inputs import read_inputs
    from lib.logger import write_csv
    from lib.metrics import compute_metrics, constant_baselines, sigmoid
    from lib.predict import predict_batch
    from lib.progress import Progress

    device = choose_device(args.device)
    if not Path(args.out).absolute().parent.is_dir():
        raise BadInput(f"--out {args.out}: there is no folder {Path(args.out).parent}")
    if Path(args.out).is_dir():
        raise BadInput(f"--out {args.out} is a folder: name a file in it")
    model, cfg, checkpoint = load_model(args.ckpt)
    model.to(device)
    views = args.views or cfg.views
    threshold = checkpoint["threshold"] if args.threshold is None else args.threshold
    temperature = (checkpoint["calibration"] or {}).get("temperature", 1.0)

    started_at = time.monotonic()
    rows, logits, labels = [], [], []
    with Progress(0, "predicting") as bar:
        for block in read_inputs(args.inputs, args.split):
            images = torch.from_numpy(np.ascontiguousarray(block.images)).to(device)
            found = predict_batch(model, images, cfg.precision, views, checkpoint["preprocessing"]).cpu().numpy() / temperature
            logits.append(found)
            labels += block.labels
            rows += zip(block.sources, block.indices, block.errors, strict=True)
            bar.add(len(found))
    logits = np.concatenate(logits)
    probs = sigmoid(logits)

    failed = [error for _, _, error in rows if error]
    if len(failed) == len(rows):
        raise BadInput(f"none of {len(rows)} inputs could be read; the first: {failed[0]}")
    known = np.array([label is not None and not row[2] for label, row in zip(labels, rows, strict=True)])
    further = [*(["label"] if known.any() else []), *(["error"] if failed else [])]

    def cells(row, prob, label):
        source, index, error = row
        yield from (source, index)
        yield from ("", "") if error else (f"{prob:.9g}", int(prob >= threshold))
        if known.any():
            yield "" if label is None else label
        if failed:
            yield error or ""

    header = ["source", "index", "probability", "prediction", *further]
    write_csv(args.out, header, [list(cells(*row)) for row in zip(rows, probs, labels, strict=True)])

    result = {"predictions": args.out, "num": len(rows), "num_failed": len(failed), "threshold": threshold, "views": views}
    good = np.array([not error for _, _, error in rows])
    result |= {"num_positive": int((probs[good] >= threshold).sum()), "wall_s": round(time.monotonic() - started_at, 3)}
    say(f"{args.out}: {len(rows):,} patches, {result['num_positive']:,} called positive at {threshold:g}, {views} view(s)")
    for error in failed[:5]:
        say(f"not read: {error}")
    if known.any():
        truth = np.array([label for label, is_known in zip(labels, known, strict=True) if is_known])
        scores, baselines = compute_metrics(truth, logits[known], threshold), constant_baselines(truth)
        result |= {"scores": scores, "constant_baselines": baselines}
        say(
            f"AUC {scores['auc']:.4f} (constant 0.5), F2 {scores['f2']:.4f} (constant {baselines['always_positive_f2']:.4f}), "
            f"accuracy {scores['accuracy']:.4f} (constant {baselines['majority_accuracy']:.4f})"
        )
    print_result(result)
    return EXIT_FINDING if failed else EXIT_DONE


if __name__ == "__main__":
    sys.exit(main())
