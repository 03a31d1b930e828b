"""The model audit on slides of a blurred scanner, and on real patches.

python tests/proofs/model.py [PART ...] --data DIR [--ckpt assets/champion] [--out
assets/model_audit]
"""

import shutil
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from lib.command import script
from lib.files import read_csv, read_json
from proofs import proof_parser, row, run, run_parts

NUM_SLIDES, BLURRED = 120, "blurred_scanner=0.25"  # of 120 patches each
TRAINING = ("epochs=4", "crop_epochs=3", "warmup_epochs=1", "views=1")
MAX_ECE = 0.03


def synthesise(folder: Path, num_train: int, num_valid: int, *options) -> None:
    sizes = ["--train", num_train, "--valid", num_valid, "--test", 0]
    run("prepare.py", "synthetic", "--to", folder, *sizes, *options)


def prove_synthetic(_args, scratch: Path) -> list[dict]:
    """Slides of a blurred scanner, which training has not seen, in valid: found and confirmed as a
    slice by sharpness.
    """
    data, blurred = scratch / "data", scratch / "blurred"
    synthesise(data, 6_000, 240)
    synthesise(blurred, 120, 120 * NUM_SLIDES, "--plant", BLURRED)
    for path in [*blurred.glob("*_valid_*"), blurred / "truth.csv"]:
        shutil.move(path, data / path.name)
    trained = run("train.py", "--runs", scratch / "runs", f"data_dir={data}", *TRAINING)
    out = scratch / "out"
    result = run("audit.py", "model", "--ckpt", trained["run"], data, "--out", out)

    planted = read_csv(data / "truth.csv")
    blurred_rows = {int(line["index"]) for line in planted if line["split"] == "valid"}
    slide_of_row = [line["wsi"] for line in read_csv(next(data.glob("*_valid_meta.csv")))]
    blurred_slides = {slide_of_row[index] for index in blurred_rows}
    confirmed = [line for line in read_csv(out / "slices.csv") if line["confirmed"]]
    by_sharpness, slides, texts = [], [], []
    for line in confirmed:
        if line["feature"] == "sharpness" and line["slice"].startswith("below"):
            by_sharpness.append(line)
        if line["feature"] == "slide":
            slides.append(line["slice"])
    for line in by_sharpness:
        for name in line["confirmed"].split():
            value, rest = float(line[name]), float(line[f"rest_{name}"])
            texts.append(f"{line['slice']}: {name} {value:.3f}, elsewhere {rest:.3f}")
    num_right = len(blurred_slides.intersection(slides))
    return [
        row(
            f"{len(blurred_slides)} blurred slides of {NUM_SLIDES}: confirmed by sharpness",
            "; ".join(texts) or "not",
            bool(by_sharpness),
        ),
        row(
            "slides that are confirmed by themselves, and the blurred ones among them",
            f"{len(slides)}, {num_right}",
        ),
        row("AUC", f"{result['auc']:.3f}"),
    ]


def prove_sample(args, scratch: Path) -> list[dict]:
    """A model on the real sample: calibration, scores, slices and shortcuts."""
    out = scratch / "out"
    command = ("audit.py", "model", "--ckpt", args.ckpt, args.data, "--out", out)
    result = run(*command, "--without-patches")
    scores = read_json(out / "scores.json")
    ece = {line["probabilities"]: line["ece"] for line in scores["calibration"]}
    # as the checkpoint scales them; of one without a calibration, as the other half would
    fitted = ece["with a temperature and an offset of the other half"]
    calibrated = ece.get("as the checkpoint scales them", fitted)
    text = "; ".join(f"{name} {value:.4f}" for name, value in ece.items())
    rows = [row("calibrated ECE on the other half", text, calibrated < MAX_ECE, MAX_ECE)]
    for name in ("auc", "f2", "recall", "specificity"):
        score = scores["global"][name]
        text = f"{score['value']:.3f} ({score['low']:.3f} to {score['high']:.3f})"
        rows.append(row(f"{name} on the other half", text))
    worst, text = result["worst_confirmed_slice"], "none"
    if worst:
        name = worst["measure"]
        text = f"{worst['feature']} {worst['slice']}: {name} {worst[name]:.3f}"
    rows.append(row(f"the worst confirmed of {scores['num_slices']} slices", text))
    for line in read_csv(out / "shortcut.csv"):
        value, low, high = (float(line[key]) for key in ("value", "low", "high"))
        text = f"{value:.3f} ({low:.3f} to {high:.3f})"
        rows.append(row(f"{line['probe']}: {line['measure']}", text))
    return rows


PARTS = {"synthetic": prove_synthetic, "sample": prove_sample}


@script
def main(argv=None) -> int:
    parser = proof_parser("model.py", __doc__, PARTS, "model_audit")
    parser.add_argument("--data", default="data/sample", metavar="DIR", help="the real sample")
    parser.add_argument("--ckpt", default="assets/champion", metavar="RUN|FILE")
    return run_parts(PARTS, parser.parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
