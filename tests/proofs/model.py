"""The model audit on slides of a blurred scanner, which training has not seen: found and confirmed
as a slice by sharpness.

python tests/proofs/model.py [synthetic] [--out assets/model_audit]
"""

import shutil
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from lib.files import read_csv
from proofs import prove, row, run

NUM_TRAIN, NUM_SLIDES, BLURRED = 6_000, 120, "blurred_scanner=0.25"  # of 120 patches each
TRAINING = ("epochs=4", "crop_epochs=3", "warmup_epochs=1", "views=1")


def prove_synthetic(_args, scratch: Path) -> list[dict]:
    """Valid is of slides of which a quarter are blurred; train has none."""
    data, blurred, out = (scratch / name for name in ("data", "blurred", "out"))
    for folder, num_train, num_valid, *plant in (
        (data, NUM_TRAIN, 240),
        (blurred, 120, 120 * NUM_SLIDES, "--plant", BLURRED),
    ):
        sizes = ["--train", num_train, "--valid", num_valid, "--test", 0]
        run("prepare.py", "synthetic", "--to", folder, *sizes, *plant)
    for path in [*blurred.glob("*_valid_*"), blurred / "truth.csv"]:
        shutil.move(path, data / path.name)
    trained = run("train.py", "--runs", scratch / "runs", f"data_dir={data}", *TRAINING)
    result = run("audit.py", "model", "--ckpt", trained["run"], data, "--out", out)

    slide_of_row = [line["wsi"] for line in read_csv(next(data.glob("*_valid_meta.csv")))]
    planted = [line for line in read_csv(data / "truth.csv") if line["split"] == "valid"]
    blurred_slides = {slide_of_row[int(line["index"])] for line in planted}
    slides, texts = [], []
    for line in read_csv(out / "slices.csv"):
        if line["feature"] == "slide" and line["confirmed"]:
            slides.append(line["slice"])
        if line["feature"] == "sharpness" and line["slice"].startswith("below"):
            for name in line["confirmed"].split():
                value, rest = float(line[name]), float(line[f"rest_{name}"])
                texts.append(f"{line['slice']}: {name} {value:.3f}, elsewhere {rest:.3f}")
    num_right = len(blurred_slides.intersection(slides))
    asked = f"{len(blurred_slides)} blurred slides of {NUM_SLIDES} in valid: confirmed by sharpness"
    alone = "slides that are confirmed by themselves, and the blurred ones among them"
    return [
        row(asked, "; ".join(texts) or "not", bool(texts)),
        row(alone, f"{len(slides)}, {num_right}"),
        row("AUC", f"{result['auc']:.3f}"),
    ]


if __name__ == "__main__":
    sys.exit(prove(__doc__, {"synthetic": prove_synthetic}, "model_audit"))
