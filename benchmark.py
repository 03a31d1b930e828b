"""Measure throughput on the user's own files: how fast patches come, against torchvision's PCAM giving the equal product.

python benchmark.py loader [--data DIR] [--batch-sizes 128]
"""

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path

from lib.command import EXIT_DONE, BadInput, Parser, print_result, say, script


def parse(argv) -> argparse.Namespace:
    parser = Parser(prog="benchmark.py", description="Measure throughput on your own files.")
    parser.add_argument("what", choices=("loader",), help="loader: patches from disk to batches ready for the model")
    parser.add_argument("--data", metavar="DIR", help="PCam folder (default: data_dir of config.yaml)")
    parser.add_argument("--batch-sizes", default="", metavar="B,...", help="default: batch_size of config.yaml")
    parser.add_argument("--seconds", type=float, default=3.0, metavar="S", help="measured per case and repeat (default: 3)")
    parser.add_argument("--repeats", type=int, default=5, metavar="N", help="of all cases in turn (default: 5)")
    return parser.parse_args(argv)


@script
def main(argv=None) -> int:
    args = parse(argv)

    from lib.config import load_config

    cfg = load_config(overrides=[f"data_dir={args.data}"] if args.data else [])
    try:
        sizes = [int(size) for size in args.batch_sizes.split(",")] if args.batch_sizes else [cfg.batch_size]
    except ValueError:
        raise BadInput(f"--batch-sizes {args.batch_sizes}: must be integers such as 1,8,64") from None
    if min(sizes) < 1 or args.seconds <= 0 or args.repeats < 1:
        raise BadInput("batch sizes, seconds and repeats must be above zero")
    rows = [bench_loader(cfg, size, args.seconds, args.repeats) for size in sizes]
    print_result(rows[-1] | {"rows": rows})
    return EXIT_DONE


def bench_loader(cfg, batch_size: int, seconds: float, repeats: int) -> dict:
    """Images per second of every way to a batch, random order, all ways in turn so that a noisy machine hits them alike."""
    import torch

    from lib.augment import draw_augmentation, model_input
    from lib.batches import PatchSource, load_batches
    from lib.device import describe_machine
    from lib.pcam import open_split
    from lib.seeding import position_permutation, set_determinism

    set_determinism(cfg.deterministic, cfg.threads)
    split = open_split(cfg.data_dir, "train")
    source = PatchSource(split.images, cfg.data_residence, torch.device("cpu"))
    order = position_permutation(len(split), cfg.seed)

    def raw():
        for batch in load_batches(source, split.labels, order.split(batch_size)):
            yield len(batch.keys)

    def ready(dtype):
        for batch in load_batches(source, split.labels, order.split(batch_size)):
            yield len(model_input(batch.images, draw_augmentation(batch.keys, 0, cfg), dtype=dtype))

    def copied():  # what memory allows: the same bytes, from one place to another
        patches = torch.zeros(1024, 96, 96, 3, dtype=torch.uint8)
        target = torch.empty_like(patches[:batch_size])
        while True:
            for part in patches.split(batch_size):
                target[: len(part)].copy_(part)
                yield len(part)

    cases = {
        "raw": raw,
        "ready_fp32": lambda: ready(torch.float32),
        "ready_bf16": lambda: ready(torch.bfloat16),
        "memory_copy": copied,
        "torchvision_0_workers": lambda: torchvision_batches(cfg, batch_size, 0),
        "torchvision_2_workers": lambda: torchvision_batches(cfg, batch_size, 2),
    }
    rates = {name: [] for name in cases}
    for repeat in range(repeats):
        for name, case in cases.items():
            rates[name].append(images_per_s(case, seconds))
            say(f"batch {batch_size}, repeat {repeat + 1}/{repeats}: {name} {rates[name][-1]:,.0f} images/s")
    median = {name: statistics.median(values) for name, values in rates.items()}
    reference = max(median["torchvision_0_workers"], median["torchvision_2_workers"])
    return {
        "batch_size": batch_size,
        "images_per_s": median["ready_fp32"],
        "bf16_images_per_s": median["ready_bf16"],
        "raw_images_per_s": median["raw"],
        "memory_copy_images_per_s": median["memory_copy"],
        "torchvision_images_per_s": reference,
        "ratio": median["ready_fp32"] / reference,
        "ratio_bf16": median["ready_bf16"] / reference,
        "ratio_raw": median["raw"] / reference,
        "samples": rates,
        "data": str(cfg.data_dir),
        "layout": split.images.layout,
        "residence": source.residence,
        "machine": describe_machine(torch.device("cpu")),
    }


def images_per_s(case, seconds: float) -> float:
    """Images per second of a generator of batch sizes, its first batch (start-up, cold pages) not counted."""
    batches = case()
    next(batches)
    count, started_at = 0, time.perf_counter()
    while (elapsed := time.perf_counter() - started_at) < seconds:
        size = next(batches, None)
        if size is None:  # the split is used up: from the start again
            batches.close()
            batches = case()
            continue
        count += size
    batches.close()
    return count / elapsed


def torchvision_batches(cfg, batch_size: int, num_workers: int):
    """Sizes of batches of the same product, the plain way: torchvision's PCAM, a transform per patch, a DataLoader."""
    import torch
    from torch.nn.functional import pad
    from torchvision.datasets import PCAM
    from torchvision.transforms.functional import to_tensor

    from lib.augment import PCAM_MEAN, PCAM_STD

    mean, std = torch.tensor(PCAM_MEAN).view(3, 1, 1), torch.tensor(PCAM_STD).view(3, 1, 1)

    def transform(image):
        patch = to_tensor(image)  # (3, 96, 96) in [0, 1]
        flip_x, flip_y, transpose = torch.rand(3) < 0.5
        patch = patch.flip(2) if flip_x else patch
        patch = patch.flip(1) if flip_y else patch
        patch = patch.transpose(1, 2) if transpose else patch
        if cfg.shift:
            y, x = torch.randint(2 * cfg.shift + 1, (2,)).tolist()
            patch = pad(patch[None], [cfg.shift] * 4, mode="replicate")[0, :, y : y + 96, x : x + 96]
        gain = 1 + cfg.stain_jitter * torch.randn(3, 1, 1)
        offset = 1 - gain + cfg.brightness_jitter * torch.randn(1)
        return (patch * gain + offset - mean) / std

    with tempfile.TemporaryDirectory() as root:
        (Path(root) / "pcam").symlink_to(Path(cfg.data_dir).resolve())
        dataset = PCAM(root, split="train", transform=transform)
        loader = torch.utils.data.DataLoader(dataset, batch_size, shuffle=True, num_workers=num_workers)
        for images, _ in loader:
            yield len(images)


if __name__ == "__main__":
    sys.exit(main())
