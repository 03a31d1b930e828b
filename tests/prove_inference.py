"""How fast inference.py is against the obvious loop, and whether both decide alike, on real
patches.

python tests/prove_inference.py --data data/sample [--ckpt assets/champion] [--repeats 3] [--out
assets/inference]
"""

import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from conftest import REPOSITORY
from proofs import made_now, write_markdown

from lib.augment import PCAM_MEAN, PCAM_STD, eight_views
from lib.calibration import calibrate
from lib.checkpoint import load_model
from lib.command import EXIT_DONE, EXIT_FINDING, Parser, positive, print_result, say, script
from lib.files import read_csv, write_json
from lib.machine import describe_machine
from lib.metrics import sigmoid

LEAST_RATIO = 5.0  # asked for


def obvious_loop(ckpt, data, views: int, num_workers: int) -> tuple[float, np.ndarray]:
    """Seconds and probabilities of torchvision's PCAM in a DataLoader, the model in float32 and
    NCHW, batches of 64.
    """
    import torch
    from torchvision.datasets import PCAM
    from torchvision.transforms import Compose, Normalize, ToTensor

    model, _, checkpoint = load_model(ckpt)
    model = model.to(memory_format=torch.contiguous_format).eval()
    normalise = Normalize(PCAM_MEAN, PCAM_STD)
    with tempfile.TemporaryDirectory() as root, torch.inference_mode():
        (Path(root) / "pcam").symlink_to(Path(data).resolve())
        transform = Compose([ToTensor(), normalise])
        loader = torch.utils.data.DataLoader(
            PCAM(root, split="val", transform=transform), 64, num_workers=num_workers
        )
        started_at, logits = time.perf_counter(), []
        for images, _ in loader:
            if views == 1:
                logits.append(model(images).flatten())
                continue
            # the same eight views: turned, and shifted by some pixels
            whole = (
                (
                    (
                        images * torch.tensor(PCAM_STD).view(3, 1, 1)
                        + torch.tensor(PCAM_MEAN).view(3, 1, 1)
                    )
                    * 255
                )
                .round()
                .byte()
            )
            whole = whole.permute(0, 2, 3, 1).contiguous()
            seen = (
                normalise(patches.permute(0, 3, 1, 2).contiguous().float() / 255)
                for patches in eight_views(whole)
            )
            logits.append(sum(model(patches).flatten() for patches in seen) / 8)
        seconds = time.perf_counter() - started_at
    return seconds, sigmoid(calibrate(torch.cat(logits).numpy(), checkpoint["calibration"]))


@script
def main(argv=None) -> int:
    parser = Parser(prog="prove_inference.py", description="inference.py against the obvious loop.")
    parser.add_argument(
        "--data",
        required=True,
        metavar="DIR",
        help="the real patches; their split valid is predicted",
    )
    parser.add_argument("--ckpt", default=REPOSITORY / "assets" / "champion", metavar="RUN")
    parser.add_argument("--repeats", type=positive, default=3, metavar="N")
    parser.add_argument(
        "--out",
        default=REPOSITORY / "assets" / "inference",
        type=Path,
        metavar="OUT",
        help="OUT.json, .md",
    )
    args = parser.parse_args(argv)

    import torch

    made, rows, table = made_now(), [], []
    args.ckpt, args.data = str(Path(args.ckpt).resolve()), str(Path(args.data).resolve())
    with tempfile.TemporaryDirectory() as folder:
        for views in (1, 8):
            command = [
                sys.executable,
                str(REPOSITORY / "inference.py"),
                "--ckpt",
                str(args.ckpt),
                args.data,
                "--split",
                "valid",
            ]
            command += ["--out", f"{folder}/p.csv", "--views", str(views)]
            ours, plain = [], {workers: [] for workers in (0, 1, 2)}
            for repeat in range(args.repeats):
                told = subprocess.run(
                    command, capture_output=True, text=True, check=True, cwd=REPOSITORY
                ).stdout
                told = json.loads(told.splitlines()[-1])
                ours.append(told["wall_s"])
                for workers, seconds in plain.items():
                    took, probs = obvious_loop(args.ckpt, args.data, views, workers)
                    seconds.append(took)
                say(
                    f"{views} view(s), repeat {repeat + 1}: {ours[-1]:.2f} s, the loop"
                    f" {[s[-1] for s in plain.values()]}"
                )
            found = np.array([float(row["probability"]) for row in read_csv(f"{folder}/p.csv")])
            best = min(plain, key=lambda workers: statistics.median(plain[workers]))
            ratio = statistics.median(plain[best]) / statistics.median(ours)
            differ = int(((found >= told["threshold"]) != (probs >= told["threshold"])).sum())
            row = {
                "views": views,
                "num": len(found),
                "seconds": ours,
                "loop_seconds": plain,
                "best_num_workers": best,
            }
            row |= {
                "ratio": ratio,
                "images_per_s": len(found) / statistics.median(ours),
                "num_decisions_that_differ": differ,
            }
            rows.append(row | {"largest_difference": float(np.abs(found - probs).max())})
            table.append(
                (
                    f"{views} view(s): images/s, against the loop with its best of 0, 1, 2 workers",
                    f"{row['images_per_s']:.0f}, {ratio:.2f}x ({best} workers)",
                    "yes" if ratio >= LEAST_RATIO else "NO",
                    f"{made['date']}, {made['commit']}",
                )
            )
            table.append(
                (
                    f"{views} view(s): decisions that differ; largest difference of a probability",
                    f"{differ} of {len(found):,}; {rows[-1]['largest_difference']:.4f}",
                    "-",
                    f"{made['date']}, {made['commit']}",
                )
            )
    write_json(
        args.out.with_suffix(".json"),
        made | {"machine": describe_machine(torch.device("cpu")), "rows": rows},
    )
    write_markdown(args.out.with_suffix(".md"), ("what", "measured", "held", "date, commit"), table)
    held = all(row["ratio"] >= LEAST_RATIO for row in rows)
    print_result({"held": held, "ratios": [row["ratio"] for row in rows]})
    return EXIT_DONE if held else EXIT_FINDING


if __name__ == "__main__":
    sys.exit(main())
