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

NUM_SLIDES = 120  # of 120 patches each
TRAINING = ("epochs=4", "crop_epochs=3", "warmup_epochs=1", "views=1")


def prove_synthetic(_args, scratch: Path) -> list[dict]:
    """Valid is of slides of which a quarter are blurred; train has none."""
    data = scratch / "data"
    blurred = scratch / "blurred"
    draw = ("prepare.py", "synthetic", "--test", 0, "--to")
    run(*draw, data, "--train", 6_000, "--valid", 240)
    sizes = ("--train", 120, "--valid", 120 * NUM_SLIDES)
    run(*draw, blurred, *sizes, "--plant", "blurred_scanner=0.25")
    for path in blurred.glob("*_valid_*"):
        shutil.move(path, data / path.name)
    trained = run("train.py", "--runs", scratch / "runs", f"data_dir={data}", *TRAINING)
    out = scratch / "out"
    result = run("audit.py", "model", "--ckpt", trained["run"], data, "--out", out)

    texts = []
    for line in read_csv(out / "slices.csv"):
        if line["feature"] == "sharpness" and line["slice"].startswith("below"):
            for name in line["confirmed"].split():
                value, rest = float(line[name]), float(line[f"rest_{name}"])
                texts.append(f"{line['slice']}: {name} {value:.3f}, elsewhere {rest:.3f}")
    asked = f"a quarter of {NUM_SLIDES} slides in valid is blurred: confirmed by sharpness"
    measured = "; ".join(texts) or "not"
    return [row(asked, measured, bool(texts)), row("AUC", f"{result['auc']:.3f}")]


if __name__ == "__main__":
    sys.exit(prove(__doc__, {"synthetic": prove_synthetic}, "model_audit"))
