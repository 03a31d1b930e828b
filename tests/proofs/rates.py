"""The program's rates beside those of plain loops, fairly tuned, in turn on this machine: inference.py
beside torchvision's PCAM in a DataLoader, and ResNet-18 beside timm's (pip install timm).

python tests/proofs/rates.py [views] [inference] [timm] [--data data/sample] [--run assets/champion]
"""

import functools
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import h5py
import numpy as np
import torch
from conftest import REPOSITORY
from torch import nn
from torchvision.datasets import PCAM
from torchvision.models import resnet18
from torchvision.transforms import Compose, Normalize, ToTensor

from lib.augment import PCAM_MEAN, PCAM_STD, VIEWS, turned_views
from lib.calibration import calibrate
from lib.checkpoint import load_model
from lib.config import load_config
from lib.device import choose_device
from lib.files import read_csv
from lib.machine import keep_freed_memory, num_cores, resolve_threads
from lib.metrics import compute_auc, sigmoid
from lib.pcam import open_split
from proofs import prove, row, run
from proofs.trainer import Trainer, median_rates, rate

NUM_WORKERS = (0, 1, 2)  # of the loop's DataLoader
MIN_RATIO, MIN_TIMM_RATIO = 6.0, 0.95  # asked for
MAX_AUC_CHANGE = 0.0005
TIMM_BATCH = 64  # 96x96, bf16, channels last


class PlainPatches(torch.utils.data.Dataset):
    """A PCam split as most would read it: by h5py, a patch at a time, the file opened by each
    worker.
    """

    def __init__(self, path, labels):
        self.path, self.labels, self.file = path, torch.from_numpy(labels).float(), None

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, row):
        if self.file is None:
            self.file = h5py.File(self.path, "r")
        return torch.from_numpy(self.file["x"][row]), self.labels[row]


def plain_images_per_s(
    split, device: torch.device, num_workers: int, size: int, seconds: float
) -> float:
    """The rate of the usual training of torchvision's ResNet-18: DataLoader, pinned memory,
    autocast, channels last, fused SGD.

    Patches are normalised and flipped on the device.
    """
    model = resnet18(num_classes=1).to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(
        model.parameters(), lr=0.01, momentum=0.9, nesterov=True, fused=True
    )
    dataset = PlainPatches(split.images.path, split.labels)
    sampler = torch.utils.data.RandomSampler(dataset, replacement=True, num_samples=10**6)
    pin = device.type == "cuda"
    loader = torch.utils.data.DataLoader(
        dataset, size, sampler=sampler, num_workers=num_workers, pin_memory=pin
    )
    loaded = iter(loader)
    mean, std = (
        torch.tensor(values, device=device).view(1, 3, 1, 1) for values in (PCAM_MEAN, PCAM_STD)
    )

    def step():
        patches, labels = (tensor.to(device, non_blocking=True) for tensor in next(loaded))
        images = (patches.permute(0, 3, 1, 2).float() / 255 - mean) / std
        for axis in (2, 3):
            chosen = torch.rand(len(images), 1, 1, 1, device=device) < 0.5
            images = torch.where(chosen, images.flip(axis), images)
        with torch.autocast(device.type, torch.bfloat16):
            logits = model(images.contiguous(memory_format=torch.channels_last))
        loss = nn.functional.binary_cross_entropy_with_logits(logits.float().flatten(), labels)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()

    return rate(step, seconds, device) * size


def predict_plainly(run_folder, data: Path, views: int, num_workers: int):
    """Seconds and probabilities of torchvision's PCAM in a DataLoader, the model in float32 and
    NCHW, batches of 64, over 1 or 8 views.
    """
    model, _, checkpoint = load_model(run_folder)
    model = model.to(memory_format=torch.contiguous_format).eval()
    transform = Compose([ToTensor(), Normalize(PCAM_MEAN, PCAM_STD)])
    logits = []
    with tempfile.TemporaryDirectory() as root, torch.inference_mode():
        Path(root, "pcam").symlink_to(data.resolve())
        patches = PCAM(root, split="val", transform=transform)
        loader = torch.utils.data.DataLoader(patches, 64, num_workers=num_workers)
        started_at = time.perf_counter()
        for images, _ in loader:
            turned = [images.permute(0, 2, 3, 1)]
            if views == 8:
                turned = turned_views(turned[0])
            answers = [model(view.permute(0, 3, 1, 2).contiguous()) for view in turned]
            logits.append(torch.stack(answers).mean(0).flatten())
        seconds = time.perf_counter() - started_at
    return seconds, sigmoid(calibrate(torch.cat(logits).numpy(), checkpoint["calibration"]))


def compare_inference(args, scratch: Path) -> list[dict]:
    """inference.py in turn with the loop: over one view, and over the default number of views
    beside the usual eight.
    """
    out = scratch / "predictions.csv"
    default = compare_speed(args, out, load_config().views, 8)
    return [*compare_speed(args, out, 1, 1), *default]


def compare_speed(args, out: Path, views: int, loop_views: int) -> list[dict]:
    command = ["inference.py", "--ckpt", args.run, args.data, "--split", "valid", "--out", out]
    loop_probs = {}

    def own() -> float:
        result = run(*command, "--views", views)
        return result["num"] / result["wall_s"]

    def loop(num_workers: int) -> float:
        seconds, probs = predict_plainly(args.run, Path(args.data), loop_views, num_workers)
        loop_probs[num_workers] = probs
        return len(probs) / seconds

    measures = [own, *(functools.partial(loop, num) for num in NUM_WORKERS)]
    images_per_s, *loop_rates = median_rates(measures, args.count)
    best = max(loop_rates)
    num_workers = NUM_WORKERS[loop_rates.index(best)]
    measured = f"{images_per_s / best:.2f}x, {images_per_s:.0f} images/s ({num_workers} workers)"
    name = f"{views} view(s), the loop over {loop_views}"
    is_held = images_per_s >= MIN_RATIO * best
    speed = row(f"{name}: speed against the loop", measured, is_held, f"{MIN_RATIO:g}x")
    labels = open_split(args.data, "valid").labels
    probs = np.array([float(line["probability"]) for line in read_csv(out)])
    auc, loop_auc = compute_auc(labels, probs), compute_auc(labels, loop_probs[0])
    is_held = abs(auc - loop_auc) <= MAX_AUC_CHANGE
    asked = f"{name}: AUC of inference.py and of the loop"
    return [speed, row(asked, f"{auc:.5f} and {loop_auc:.5f}", is_held, f"{MAX_AUC_CHANGE:g}")]


def compare_views(args, scratch: Path) -> list[dict]:
    """The AUC on valid over one, four and eight views."""
    out = scratch / "predictions.csv"
    command = ["inference.py", "--ckpt", args.run, args.data, "--split", "valid", "--out", out]
    auc = {views: run(*command, "--views", views)["scores"]["auc"] for views in VIEWS}
    measured = ", ".join(f"{value:.5f} over {views}" for views, value in auc.items())
    asked = "AUC on valid over four views, at half the computing of eight"
    is_held = abs(auc[4] - auc[8]) <= MAX_AUC_CHANGE
    return [row(asked, measured, is_held, f"within {MAX_AUC_CHANGE} of eight")]


def build_timm_steps(device: torch.device):
    """A step of training and one of inference, over one random batch, as timm's own benchmark makes
    them: its model, its optimizer, autocast.
    """
    import timm
    from timm.optim import create_optimizer_v2

    images = torch.randn(TIMM_BATCH, 3, 96, 96, device=device)
    images = images.to(memory_format=torch.channels_last)
    labels = torch.randint(0, 2, (TIMM_BATCH,), device=device)
    models = [timm.create_model("resnet18", num_classes=2).to(device) for _ in range(2)]
    trained, applied = (model.to(memory_format=torch.channels_last) for model in models)
    optimizer = create_optimizer_v2(trained, opt="sgd", lr=1e-4)
    trained.train()
    applied.eval()

    def train():
        optimizer.zero_grad()
        with torch.autocast(device.type, torch.bfloat16):
            loss = nn.functional.cross_entropy(trained(images), labels)
        loss.backward()
        optimizer.step()

    @torch.inference_mode()
    def infer():
        with torch.autocast(device.type, torch.bfloat16):
            applied(images)

    return train, infer


def compare_with_timm(args, _scratch) -> list[dict]:
    """Rows for training with SGD and with the default optimizer, and for inference."""
    device = choose_device(args.device)
    threads = resolve_threads(load_config()).threads
    torch.set_num_threads(threads)
    keep_freed_memory()
    settings = {"model": "resnet18", "batch_size": TIMM_BATCH, "crop_epochs": 0}
    sgd, muon = (
        Trainer(device, args.data, optimizer=optimizer, threads=threads, **settings)
        for optimizer in ("sgd", "muon")
    )
    train, infer = build_timm_steps(device)
    measures = {
        "timm, training": lambda: rate(train, args.seconds, device) * TIMM_BATCH,
        "timm, inference": lambda: rate(infer, args.seconds, device) * TIMM_BATCH,
        "training, optimizer=sgd": lambda: sgd.images_per_s(args.seconds),
        "training, the default optimizer": lambda: muon.images_per_s(args.seconds),
        "inference": lambda: sgd.predicting_images_per_s(args.seconds),
    }
    timm_training, timm_inference, *ours = median_rates(list(measures.values()), args.count)
    where = f"{device.type}, {num_cores()} cores, torch {torch.__version__}"
    rows = []
    for name, images_per_s in zip([*measures][2:], ours, strict=True):
        theirs = timm_inference if name == "inference" else timm_training
        ratio = images_per_s / theirs
        measured = f"{ratio:.3f}x ({images_per_s:,.1f} and {theirs:,.1f} images/s; {where})"
        asked = f"{name}: this program against timm, {MIN_TIMM_RATIO} or more"
        rows.append(row(asked, measured, ratio >= MIN_TIMM_RATIO))
    return rows


PARTS = {
    "views": compare_views,
    "inference": compare_inference,
    "timm": compare_with_timm,
}

if __name__ == "__main__":
    champion = REPOSITORY / "assets" / "champion"
    options = {"data": "data/sample", "run": champion, "count": 3, "device": "auto", "seconds": 8.0}
    sys.exit(prove(__doc__, PARTS, "rates", **options))
