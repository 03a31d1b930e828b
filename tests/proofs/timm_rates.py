"""ResNet-18 beside timm (pip install timm), on this machine: batches of 64, 96x96, bf16, channels
last, in turn.

python tests/proofs/timm_rates.py --data data/sample [--out assets/timm] [--seconds 8] [--rounds 3]
"""

import argparse
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from conftest import REPOSITORY

from lib.command import Parser, script
from lib.config import load_config
from lib.device import choose_device
from lib.machine import keep_freed_memory, num_cores, resolve_threads
from proofs import row, run_parts
from proofs.trainer import Trainer, rate

SIZE, LEAST = 64, 0.95


def timm_steps(device: torch.device):
    """A step of training and one of inference, over one random batch, as timm's own benchmark makes
    them: its model, its optimizer, autocast.
    """
    import timm
    from timm.optim import create_optimizer_v2

    images = torch.randn(SIZE, 3, 96, 96, device=device).to(memory_format=torch.channels_last)
    labels = torch.randint(0, 2, (SIZE,), device=device)
    models = [timm.create_model("resnet18", num_classes=2).to(device) for _ in range(2)]
    trained, applied = (model.to(memory_format=torch.channels_last) for model in models)
    optimizer = create_optimizer_v2(trained, opt="sgd", lr=1e-4)
    trained.train()
    applied.eval()

    def train():
        optimizer.zero_grad()
        with torch.autocast(device.type, torch.bfloat16):
            loss = torch.nn.functional.cross_entropy(trained(images), labels)
        loss.backward()
        optimizer.step()

    @torch.inference_mode()
    def infer():
        with torch.autocast(device.type, torch.bfloat16):
            applied(images)

    return train, infer


def compare(args, _scratch) -> list[dict]:
    """Rows for training with SGD and with the default optimizer, and for inference."""
    device = choose_device(args.device)
    threads = resolve_threads(load_config()).threads
    torch.set_num_threads(threads)
    keep_freed_memory()
    settings = {"model": "resnet18", "batch_size": SIZE, "crop_epochs": 0, "threads": threads}
    ours = {
        optimizer: Trainer(device, args.data, optimizer=optimizer, **settings)
        for optimizer in ("sgd", "muon")
    }
    train, infer = timm_steps(device)
    measures = {
        "timm train": lambda: rate(train, args.seconds, device) * SIZE,
        "sgd": lambda: ours["sgd"].images_per_s(args.seconds),
        "muon": lambda: ours["muon"].images_per_s(args.seconds),
        "timm infer": lambda: rate(infer, args.seconds, device) * SIZE,
        "infer": lambda: ours["sgd"].predicting_images_per_s(args.seconds),
    }
    rates = {name: [] for name in measures}
    for _ in range(args.rounds):
        for name, measure in measures.items():
            rates[name].append(measure())
    medians = {name: statistics.median(values) for name, values in rates.items()}
    where = f"{device.type}, {num_cores()} cores, torch {torch.__version__}"
    rows = []
    for asked, name, reference in (
        ("training, optimizer=sgd", "sgd", "timm train"),
        ("training, the default optimizer", "muon", "timm train"),
        ("inference", "infer", "timm infer"),
    ):
        ratio = medians[name] / medians[reference]
        measured = (
            f"{ratio:.3f}x ({medians[name]:,.1f} and {medians[reference]:,.1f} images/s; {where})"
        )
        rows.append(
            row(f"{asked}: this program against timm, {LEAST} or more", measured, ratio >= LEAST)
        )
    return rows


@script
def main(argv=None) -> int:
    parser = Parser(
        prog="timm_rates.py", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, metavar="DIR")
    parser.add_argument("--out", type=Path, default=REPOSITORY / "assets" / "timm", metavar="FILE")
    parser.add_argument("--device", default="auto", metavar="D")
    parser.add_argument("--seconds", type=float, default=8.0, metavar="S")
    parser.add_argument("--rounds", type=int, default=3, metavar="N")
    args = parser.parse_args(argv)
    args.parts = ["resnet18"]
    return run_parts({"resnet18": compare}, args)


if __name__ == "__main__":
    sys.exit(main())
