"""The figures of the model audit, at length: a table of what was asked and measured, as JSON and
Markdown.

python tests/prove_model.py [PART ...] --data DIR [--ckpt assets/champion] [--out
assets/model_audit]
"""

import shutil
import sys
from pathlib import Path

from proofs import row, run, run_parts

from lib.command import Parser, script
from lib.files import read_csv, read_json

NUM_SLIDES, BLURRED = 120, "blurred_scanner=0.25"  # of 120 patches each
TRAINING = ("epochs=4", "crop_epochs=3", "warmup_epochs=1", "views=1")
MOST_ECE = 0.03


def prove_synthetic(_args, scratch: Path) -> list[dict]:
    """Slides of a blurred scanner, which training has not seen, in valid: found and confirmed as a
    slice by sharpness.
    """
    run(
        "prepare.py",
        "synthetic",
        "--to",
        scratch / "data",
        "--train",
        6_000,
        "--valid",
        240,
        "--test",
        0,
    )
    run(
        "prepare.py",
        "synthetic",
        "--to",
        scratch / "seen",
        "--train",
        120,
        "--valid",
        120 * NUM_SLIDES,
        "--test",
        0,
        "--plant",
        BLURRED,
    )
    for path in (*(scratch / "seen").glob("*_valid_*"), scratch / "seen" / "truth.csv"):
        shutil.move(path, scratch / "data" / path.name)
    trained = run("train.py", "--runs", scratch / "runs", f"data_dir={scratch / 'data'}", *TRAINING)
    result = run(
        "audit.py", "model", "--ckpt", trained["run"], scratch / "data", "--out", scratch / "out"
    )

    blurred = {
        r["index"] for r in read_csv(scratch / "data" / "truth.csv") if r["split"] == "valid"
    }
    slices = read_csv(scratch / "out" / "slices.csv")
    by_sharpness = [
        r
        for r in slices
        if r["feature"] == "sharpness" and r["slice"].startswith("below") and r["confirmed"]
    ]
    text = "; ".join(
        f"{r['feature']} {r['slice']}: {name} {float(r[name]):.3f}, elsewhere"
        f" {float(r[f'rest_{name}']):.3f}"
        for r in by_sharpness
        for name in r["confirmed"].split()
    )
    slides = [r["slice"] for r in slices if r["feature"] == "slide" and r["confirmed"]]
    meta = read_csv(next((scratch / "data").glob("*_valid_meta.csv")))
    blurred_slides = {r["wsi"] for place, r in enumerate(meta) if str(place) in blurred}
    right = sum(name in blurred_slides for name in slides)
    rows = [
        row(
            f"{len(blurred_slides)} blurred slides of {NUM_SLIDES} in valid: confirmed by"
            " sharpness",
            text or "not",
            by_sharpness,
        )
    ]
    text = f"{len(slides)}, of which {right} are blurred"
    rows.append(
        row(
            "slides that are confirmed by themselves: blurred ones among them (no figure asked)",
            text,
            True,
        )
    )
    worst = result["worst_confirmed_slice"] or {
        "feature": "none",
        "slice": "",
        "measure": "auc",
        "auc": float("nan"),
    }
    text = (
        f"AUC {result['auc']:.3f}; {worst['feature']} {worst['slice']}: {worst['measure']}"
        f" {worst[worst['measure']]:.3f}"
    )
    return [
        *rows,
        row("the global figure beside the worst confirmed slice", text, worst["feature"] != "none"),
    ]


def prove_sample(args, scratch: Path) -> list[dict]:
    """The champion on the real sample: calibration, slices, shortcuts."""
    result = run(
        "audit.py",
        "model",
        "--ckpt",
        args.ckpt,
        args.data,
        "--out",
        scratch / "out",
        "--without-patches",
    )
    scores = read_json(scratch / "out" / "scores.json")
    ece = {found["probabilities"]: found["ece"] for found in scores["calibration"]}
    text = "; ".join(f"{name} {value:.4f}" for name, value in ece.items())
    calibrated = ece.get(
        "as the checkpoint scales them", ece["with a temperature and an offset of the other half"]
    )
    rows = [row(f"calibrated ECE on the other half under {MOST_ECE}", text, calibrated < MOST_ECE)]
    for name in ("auc", "f2", "recall", "specificity"):
        found = scores["global"][name]
        text = f"{found['value']:.3f} ({found['low']:.3f} to {found['high']:.3f})"
        rows.append(row(f"{name} on the other half (no figure asked)", text, True))
    worst = result["worst_confirmed_slice"]
    text = "none confirmed"
    if worst:
        name = worst["measure"]
        text = (
            f"{worst['feature']} {worst['slice']}: {name} {worst[name]:.3f}"
            f" ({worst[f'{name}_low']:.3f} to "
        )
        text += f"{worst[f'{name}_high']:.3f}), elsewhere {worst[f'rest_{name}']:.3f}"
    rows.append(
        row(f"the worst confirmed of {scores['num_slices']} slices (no figure asked)", text, True)
    )
    for found in read_csv(scratch / "out" / "shortcut.csv"):
        value, low, high = (float(found[key]) for key in ("value", "low", "high"))
        if found["measure"] != "mean move of the probability":
            text = f"{value:.3f} ({low:.3f} to {high:.3f})"
            rows.append(row(f"{found['probe']}: {found['measure']} (no figure asked)", text, True))
    return rows


PARTS = {
    name.removeprefix("prove_"): part
    for name, part in list(globals().items())
    if name.startswith("prove_")
}


@script
def main(argv=None) -> int:
    parser = Parser(
        prog="prove_model.py",
        description="The figures of the model audit, on drawn slides and real patches.",
    )
    parser.add_argument("parts", nargs="*", help=f"some of {', '.join(PARTS)} (default: all)")
    parser.add_argument(
        "--data",
        default="data/sample",
        metavar="DIR",
        help="the imported real sample (default: data/sample)",
    )
    parser.add_argument(
        "--ckpt", default="assets/champion", metavar="RUN|FILE", help="default: assets/champion"
    )
    parser.add_argument(
        "--out", default="assets/model_audit", type=Path, metavar="OUT", help="OUT.json and OUT.md"
    )
    args = parser.parse_args(argv)
    return run_parts(PARTS, args)


if __name__ == "__main__":
    sys.exit(main())
