"""Which cases a benchmark times: ways to a batch, a small and a large model over batch sizes,
variants of the small one, the stages of a training step, and what the machine does at most.
"""

import dataclasses
from dataclasses import dataclass
from itertools import product

import torch

from lib.batches import choose_residence
from lib.command import BadInput, nearest
from lib.config import Config
from lib.machine import num_cores
from lib.pcam import open_split
from lib.predict import block_size

SIZES = (1, 8, 16, 32, 64, 128, 256, 512)
LARGE = "resnet18"  # beside the config's model
WORKERS = (0, 1, 2, 4, 8, 16)  # of torchvision's DataLoader


@dataclass(frozen=True)
class Case:
    """One way to be timed: `kind` is its function in cases.py, the config says with what, the flags
    in which variant.
    """

    what: str  # loader | infer | train | stage | limit
    name: str
    kind: str
    cfg: Config
    channels_last: bool = True
    compile: bool = False
    cache: str = "warm"  # the file's pages beforehand: warm | cold
    order: str = "random"  # random | sequential
    num_workers: int = 0
    resident: bool = False  # one batch over and over
    keep_memory: bool = True
    device: str = "cpu"

    @property
    def process(self) -> str:
        """Cases of the same text share a process: those of a model do, and all without one."""
        return "" if self.what in ("loader", "limit") else self.cfg.model

    def vary(self, **changes) -> "Case":
        """This case with other fields, or other keys of its config."""
        fields = {name: changes[name] for name in changes if hasattr(self, name)}
        keys = {name: changes[name] for name in changes if name not in fields}
        return dataclasses.replace(self, cfg=dataclasses.replace(self.cfg, **keys), **fields)


def plan_cases(
    what: str, cfg: Config, sizes: list[int], device: torch.device, names: list[str]
) -> list[Case]:
    """The cases of `loader`, `infer`, `train` or `all`: models over `sizes`, all else at one batch
    size. With `names`, only the cases that are called so. Raises BadInput for a name of none.
    """
    # whole patches, unless a case says otherwise
    at = dataclasses.replace(cfg, crop_epochs=0, batch_size=size_of_variants(cfg, sizes))
    cases = []
    if what in ("loader", "all"):
        for size in sizes if what == "loader" else [at.batch_size]:
            cases += plan_loader(Case("loader", "raw", "raw", at).vary(batch_size=size), device)
    for verb in ("infer", "train"):
        if what in (verb, "all"):
            cases += plan_model(Case(verb, "default", verb, at, device=str(device)), sizes)
    if what in ("train", "all"):
        cases += plan_training(Case("stage", "apart", "apart", at, device=str(device)), cfg)
    if what != "infer":
        cases.append(Case("limit", "memory_copy", "copy", at))
    precisions = {case.cfg.precision for case in cases if case.what in ("infer", "train")}
    limit = Case("limit", "matrix_product", "matrix_product", at, device=str(device))
    cases += [limit.vary(precision=precision) for precision in sorted(precisions)]
    all_names = {case.name for case in cases}
    for name in names:
        if name not in all_names:
            hint = f"{nearest(name, all_names)} ({', '.join(sorted(all_names))})"
            raise BadInput(f"--cases {name}: {what} has no such case{hint}")
    chosen = [case for case in cases if not names or case.name in names]
    # cold ones last: the file is read into memory once for all others
    return sorted(chosen, key=lambda case: (case.process, case.cache == "cold"))


def size_of_variants(cfg: Config, sizes: list[int]) -> int:
    """The batch size at which variants and stages are timed: the config's, or the largest where
    that is not asked for.
    """
    return cfg.batch_size if cfg.batch_size in sizes else sizes[-1]


def plan_loader(raw: Case, device: torch.device) -> list[Case]:
    """Ways to a batch: from where the patches reside by default; from the file, cold and warm,
    random and in order; torchvision's.
    """
    raw = raw.vary(precision="fp32")
    ready = raw.vary(name="ready", kind="ready")
    cases = [raw, ready, ready.vary(precision="bf16")]
    if device.type == "cuda":
        cases.append(ready.vary(name="ready_on_gpu", precision="bf16", device=str(device)))
    for cache in ("warm", "cold"):
        for case, order in product((raw, ready), ("random", "sequential")):
            name = f"{case.name}_file_{order}"
            cases.append(case.vary(name=name, data_residence="disk", cache=cache, order=order))
        for number in WORKERS:
            if number <= num_cores():
                case = raw.vary(name=f"torchvision_{number}_workers", kind="torchvision")
                cases.append(case.vary(num_workers=number, cache=cache, channels_last=False))
    return cases


def plan_model(default: Case, sizes: list[int]) -> list[Case]:
    """A small and a large model over batch sizes, and the small one with one thing changed."""
    models = dict.fromkeys((default.cfg.model, LARGE))
    cases = [default.vary(model=name, batch_size=size) for name, size in product(models, sizes)]
    precisions = ["fp32", "bf16"]
    is_on_gpu = default.device != "cpu"
    if default.kind == "infer":
        size = block_size(torch.device(default.device))
        cases.append(default.vary(name="end_to_end", kind="end_to_end", batch_size=size))
        # training has no scaled loss, without which fp16 does not learn
        precisions += ["fp16"] if is_on_gpu else []
    for precision in precisions:
        if precision != default.cfg.precision:
            cases.append(default.vary(name=precision, precision=precision))
    is_deterministic = default.cfg.deterministic
    name = "not_deterministic" if is_deterministic else "deterministic"
    return [
        *cases,
        default.vary(name=name, deterministic=not is_deterministic),
        default.vary(name="nchw", channels_last=False),
        default.vary(name="compile", compile=True),
    ]


def plan_training(apart: Case, cfg: Config) -> list[Case]:
    """What `train` has besides: techniques, the plain way, and the stages."""
    default = apart.vary(what="train", kind="train")
    plain = default.vary(kind="plain", precision="fp32", channels_last=False)
    cases = [
        apart,
        default.vary(name="resident_batch", resident=True),
        default.vary(name="memory_returned", keep_memory=False),
        plain.vary(name="plain_0_workers"),
        plain.vary(name="plain_2_workers", num_workers=2),
    ]
    if cfg.crop < 96 and cfg.crop_epochs:
        cases.append(default.vary(name=f"centre_{cfg.crop}", crop_epochs=cfg.epochs))
    images = open_split(cfg.data_dir, "train").images
    residence = choose_residence(images, cfg.data_residence, torch.device(apart.device))
    # else all of it is read once, before the first step
    order = "random" if residence == "disk" else "sequential"
    read = apart.vary(name="read", kind="raw", order=order, cache="cold", device="cpu")
    return [*cases, read.vary(data_residence="disk")]
