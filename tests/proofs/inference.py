"""inference.py beside the obvious loop: how fast, and whether both decide alike, on real patches.

python tests/proofs/inference.py --data data/sample [--ckpt assets/champion] [--repeats 3] [--out
assets/inference]
"""

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
import torch
from conftest import REPOSITORY
from torchvision.datasets import PCAM
from torchvision.transforms import Compose, Normalize, ToTensor

from lib.augment import PCAM_MEAN, PCAM_STD, eight_views
from lib.calibration import calibrate
from lib.checkpoint import load_model
from lib.command import Parser, positive, say, script
from lib.files import read_csv
from lib.metrics import compute_auc, sigmoid
from proofs import row, run, run_parts

MIN_RATIO = 6.0  # asked for
NUM_WORKERS = (0, 1, 2)  # of the loop's DataLoader


def obvious_loop(ckpt, data: Path, views: int, num_workers: int) -> tuple[float, np.ndarray]:
    """Seconds and probabilities of torchvision's PCAM in a DataLoader, the model in float32 and
    NCHW, batches of 64.
    """
    model, _, checkpoint = load_model(ckpt)
    model = model.to(memory_format=torch.contiguous_format).eval()
    transform = Compose([ToTensor(), Normalize(PCAM_MEAN, PCAM_STD)])
    logits = []
    with tempfile.TemporaryDirectory() as root, torch.inference_mode():
        (Path(root) / "pcam").symlink_to(data.resolve())
        patches = PCAM(root, split="val", transform=transform)
        loader = torch.utils.data.DataLoader(patches, 64, num_workers=num_workers)
        started_at = time.perf_counter()
        for images, _ in loader:
            total = 0
            for view in views_of(images, views):
                total = total + model(view).flatten()
            logits.append(total / views)
        seconds = time.perf_counter() - started_at
    return seconds, sigmoid(calibrate(torch.cat(logits).numpy(), checkpoint["calibration"]))


def views_of(images: torch.Tensor, views: int):
    """The views (B, 3, 96, 96) of normalised images that inference.py averages over."""
    if views == 1:
        return [images]
    turned = eight_views(images.permute(0, 2, 3, 1))
    return [view.permute(0, 3, 1, 2).contiguous() for view in turned]


def compare(views: int, args, scratch: Path) -> list[dict]:
    """One number of views, in turn with the loop."""
    predict = ["inference.py", "--ckpt", args.ckpt, args.data, "--split", "valid"]
    predict += ["--out", scratch / "p.csv", "--views", views]
    own_s, loop_s = [], {workers: [] for workers in NUM_WORKERS}
    for repeat in range(args.repeats):
        own_s.append(run(*predict)["wall_s"])
        for workers, seconds in loop_s.items():
            took_s, loop_probs = obvious_loop(args.ckpt, args.data, views, workers)
            seconds.append(took_s)
        latest = [f"{seconds[-1]:.2f}" for seconds in loop_s.values()]
        say(f"{views} view(s), repeat {repeat + 1}: {own_s[-1]:.2f} s, the loop {latest} s")
    rows = read_csv(scratch / "p.csv")
    probs = np.array([float(line["probability"]) for line in rows])
    labels = np.array([int(line["label"]) for line in rows])
    threshold = load_model(args.ckpt)[2]["threshold"]
    best = min(loop_s, key=lambda workers: statistics.median(loop_s[workers]))
    ratio = statistics.median(loop_s[best]) / statistics.median(own_s)
    rate = len(probs) / statistics.median(own_s)
    num_differ = int(((probs >= threshold) != (loop_probs >= threshold)).sum())
    auc_gap = abs(compute_auc(labels, probs) - compute_auc(labels, loop_probs))
    name = f"{views} view(s)"
    return [
        row(
            f"{name}: speed against the loop with its best number of workers",
            f"{ratio:.2f}x, {rate:.0f} images/s ({best} workers)",
            ratio >= MIN_RATIO,
            f"{MIN_RATIO:g}x",
        ),
        row(f"{name}: the AUC of both differs by", f"{auc_gap:.5f}", auc_gap <= 0.0005, "0.0005"),
        row(f"{name}: decisions that differ", f"{num_differ} of {len(probs):,}"),
    ]


@script
def main(argv=None) -> int:
    parser = Parser(
        prog="inference.py", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--data", required=True, type=Path, metavar="DIR", help="PCam folder")
    parser.add_argument("--ckpt", default=REPOSITORY / "assets" / "champion", metavar="RUN")
    parser.add_argument("--repeats", type=positive, default=3, metavar="N")
    out = REPOSITORY / "assets" / "inference"
    parser.add_argument("--out", default=out, type=Path, metavar="OUT", help="OUT.json and OUT.md")
    args = parser.parse_args(argv)
    args.data, args.parts = args.data.resolve(), []
    parts = {}
    for views in (1, 8):
        parts[f"views_{views}"] = lambda args, scratch, views=views: compare(views, args, scratch)
    return run_parts(parts, args)


if __name__ == "__main__":
    sys.exit(main())
