"""Measure throughput on the user's own files: how fast patches come and how fast a model learns from them, and what each
technique gives, against the plain way: torchvision's PCAM in a DataLoader, float32, NCHW.

python benchmark.py loader|train [--data DIR] [--batch-sizes 64,128] [key=value ...]
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
    parser.add_argument(
        "what", choices=("loader", "train"), help="loader: batches ready for the model; train: optimisation steps"
    )
    parser.add_argument("--data", metavar="DIR", help="PCam folder (default: data_dir of config.yaml)")
    parser.add_argument("--batch-sizes", default="", metavar="B,...", help="default: batch_size of config.yaml")
    parser.add_argument("--seconds", type=float, default=3.0, metavar="S", help="measured per case and repeat (default: 3)")
    parser.add_argument("--repeats", type=int, default=5, metavar="N", help="of all cases in turn (default: 5)")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="put over the config, e.g. model=resnet18 threads=1")
    return parser.parse_intermixed_args(argv)


@script
def main(argv=None) -> int:
    args = parse(argv)

    from lib.config import load_config

    cfg = load_config(overrides=args.overrides + ([f"data_dir={args.data}"] if args.data else []))
    try:
        sizes = [int(size) for size in args.batch_sizes.split(",")] if args.batch_sizes else [cfg.batch_size]
    except ValueError:
        raise BadInput(f"--batch-sizes {args.batch_sizes}: must be integers such as 1,8,64") from None
    if min(sizes) < 1 or args.seconds <= 0 or args.repeats < 1:
        raise BadInput("batch sizes, seconds and repeats must be above zero")
    bench = {"loader": bench_loader, "train": bench_train}[args.what]
    rows = [bench(cfg, size, args.seconds, args.repeats) for size in sizes]
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

    def torchvision_sizes(num_workers):
        for images, _ in torchvision_loader(cfg, batch_size, num_workers):
            yield len(images)

    cases = {
        "raw": raw,
        "ready_fp32": lambda: ready(torch.float32),
        "ready_bf16": lambda: ready(torch.bfloat16),
        "memory_copy": copied,
        "torchvision_0_workers": lambda: torchvision_sizes(0),
        "torchvision_2_workers": lambda: torchvision_sizes(2),
    }
    rates, median = in_turn(cases, batch_size, seconds, repeats)
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


def bench_train(cfg, batch_size: int, seconds: float, repeats: int) -> dict:
    """Images per second of the very step of train.py on whole patches, of it with one technique left out or added, and of the
    same model trained the plain way."""
    import dataclasses

    import torch

    from lib import training
    from lib.batches import PatchSource, epoch_order, load_batches, open_train_valid
    from lib.device import describe_machine, keep_freed_memory
    from lib.seeding import set_determinism

    cfg = dataclasses.replace(cfg, crop_epochs=0, epochs=10**9, batch_size=batch_size)
    set_determinism(cfg.deterministic, cfg.threads)
    cpu = torch.device("cpu")
    (split, rows), _ = open_train_valid(cfg)
    source = PatchSource(split.images, cfg.data_residence, cpu)
    keys = epoch_order(rows, len(split), 0, cfg).split(batch_size)
    startup_s = {}

    def steps(cfg=cfg, alter=None, resident=False, keep_memory=True):
        keep_freed_memory(keep_memory)
        state = training.build_state(cfg, cpu)
        if alter:
            alter(state)
        batches = load_batches(source, split.labels, [keys[0]] * 10**6 if resident else keys)
        for batch in [next(batches)] * 10**6 if resident else batches:
            training.training_step(state, batch, cfg, cfg.lr)
            yield batch_size
        keep_freed_memory(True)

    def nchw(state):
        state.model.to(memory_format=torch.contiguous_format)
        state.model.register_forward_pre_hook(lambda _, inputs: (inputs[0].contiguous(),))

    def unfused(state):
        for group in state.optimizer.param_groups:
            group |= {"fused": False, "foreach": False}

    def compiled(state):
        state.model.compile()
        started_at = time.perf_counter()
        batch = next(load_batches(source, split.labels, keys[:1]))
        training.training_step(state, batch, cfg, 0.0)
        startup_s.setdefault("compile", time.perf_counter() - started_at)  # later repeats find it compiled

    cases = {
        "default": steps,
        "resident_batch": lambda: steps(resident=True),
        "centre_64": lambda: steps(dataclasses.replace(cfg, crop=64, crop_epochs=10**9)),
        "fp32": lambda: steps(dataclasses.replace(cfg, precision="fp32")),
        "nchw": lambda: steps(alter=nchw),
        "unfused_optimizer": lambda: steps(alter=unfused),
        "memory_returned": lambda: steps(keep_memory=False),
        "compile": lambda: steps(alter=compiled),
        "plain_0_workers": lambda: plain_steps(cfg, 0),
        "plain_2_workers": lambda: plain_steps(cfg, 2),
    }
    rates, median = in_turn(cases, batch_size, seconds, repeats)
    plain = max(median["plain_0_workers"], median["plain_2_workers"])
    return {
        "batch_size": batch_size,
        "images_per_s": median["default"],
        "plain_images_per_s": plain,
        "ratio": median["default"] / plain,
        "ratio_resident": median["default"] / median["resident_batch"],
        "against_default": {name: rate / median["default"] for name, rate in median.items()},
        "startup_s": startup_s,
        "samples": rates,
        "data": str(cfg.data_dir),
        "model": cfg.model,
        "threads": cfg.threads,
        "machine": describe_machine(cpu),
    }


def plain_steps(cfg, num_workers: int):
    """Sizes of batches that the config's model learns from the plain way: float32, NCHW, torchvision's PCAM, a DataLoader."""
    import torch
    from torch.nn.functional import binary_cross_entropy_with_logits

    from lib.models import build_model
    from lib.optimizers import build_optimizer

    model = build_model(cfg).to(memory_format=torch.contiguous_format).train()
    optimizer = build_optimizer(model, cfg)
    for images, labels in torchvision_loader(cfg, cfg.batch_size, num_workers):
        loss = binary_cross_entropy_with_logits(model(images).flatten(), labels.float().flatten())
        model.zero_grad()
        loss.backward()
        optimizer.step()
        yield len(images)


def in_turn(cases: dict, batch_size: int, seconds: float, repeats: int) -> tuple[dict, dict]:
    """Images per second of each case {name: [rate of a repeat]}, all cases in turn, and the medians {name: rate}."""
    rates = {name: [] for name in cases}
    for repeat in range(repeats):
        for name, case in cases.items():
            rates[name].append(images_per_s(case, seconds))
            say(f"batch {batch_size}, repeat {repeat + 1}/{repeats}: {name} {rates[name][-1]:,.0f} images/s")
    return rates, {name: statistics.median(values) for name, values in rates.items()}


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


def torchvision_loader(cfg, batch_size: int, num_workers: int):
    """Batches of the same product, the plain way: torchvision's PCAM, a transform per patch, a DataLoader."""
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
        yield from loader


if __name__ == "__main__":
    sys.exit(main())
