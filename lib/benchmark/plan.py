"""Which cases a benchmark times: ways to a batch, a small and a large model over batch sizes,
the small one in other precisions, the stages of a training step, and what the machine does at most.
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
from lib.predict import BLOCK_SIZES

SIZES = (1, 8, 16, 32, 64, 128, 256, 512)
LARGE = "resnet18"  # beside the config's model
WORKERS = (0, 1, 2, 4, 8, 16)  # of torchvision's DataLoader


@dataclass(frozen=True)
class Case:
    """One way to be timed: `kind` is its function in cases.py, the config says with what, the other
    fields in which variant.
    """

    what: str  # loader | infer | train | stage | limit
    name: str
    kind: str
    cfg: Config
    cache: str = "warm"  # the file's pages beforehand: warm | cold
    order: str = "random"  # random | sequential
    num_workers: int = 0
    device: str = "cpu"

    @property
    def process(self) -> str:
        """Cases of the same text share a process: those of a model do, and all without one."""
        return "" if self.what in ("loader", "limit") else self.cfg.model

    def vary(self, **changes) -> "Case":
        """This case with other fields, or other keys of its config."""
        keys = {name: changes.pop(name) for name in list(changes) if not hasattr(self, name)}
        return dataclasses.replace(self, cfg=dataclasses.replace(self.cfg, **keys), **changes)


def plan_cases(
    what: str, cfg: Config, sizes: list[int], device: torch.device, names: list[str]
) -> list[Case]:
    """The cases of `loader`, `infer`, `train` or `all`: models over `sizes`, all else at one batch
    size. With `names`, only the cases that are called so. Raises BadInput for a name of none.
    """
    # whole patches, unless a case says otherwise
    whole = dataclasses.replace(cfg, crop_epochs=0, batch_size=size_of_variants(cfg, sizes))
    copy = Case("limit", "memory_copy", "copy", whole)
    base = copy.vary(device=str(device))
    cases = [] if what == "infer" else [copy]
    if what in ("loader", "all"):
        for size in sizes if what == "loader" else [whole.batch_size]:
            cases += plan_loader(copy.vary(batch_size=size), str(device))
    for verb in ("infer", "train"):
        if what in (verb, "all"):
            default = base.vary(what=verb, name="default", kind=verb, order="sequential")
            cases += plan_model(default, sizes)
    precisions = {case.cfg.precision for case in cases if case.what in ("infer", "train")}
    for precision in sorted(precisions):
        cases.append(base.vary(name="matrix_product", kind="matrix_product", precision=precision))
    if what in ("train", "all"):
        images = open_split(cfg.data_dir, "train").images
        cases += plan_stages(base, choose_residence(images, cfg.data_residence, device))
    known_names = sorted({case.name for case in cases})
    for name in names:
        if name not in known_names:
            hint = f"{nearest(name, known_names)} ({', '.join(known_names)})"
            raise BadInput(f"--cases {name}: {what} has no such case{hint}")
    chosen = [case for case in cases if case.name in (names or known_names)]
    # cold ones last: the file is read into memory once for all others
    return sorted(chosen, key=lambda case: (case.process, case.cache == "cold"))


def size_of_variants(cfg: Config, sizes: list[int]) -> int:
    """The batch size at which variants and stages are timed: the config's, or the largest where
    that is not asked for.
    """
    return cfg.batch_size if cfg.batch_size in sizes else sizes[-1]


def plan_loader(base: Case, device: str) -> list[Case]:
    """Ways to a batch: from where the patches reside by default; from the file, cold and warm,
    random and in order; torchvision's.
    """
    raw = base.vary(what="loader", name="raw", kind="raw", precision="fp32")
    ready = raw.vary(name="ready", kind="ready")
    half = ready.vary(name="ready_bf16", precision="bf16")
    cases = [raw, ready, half]
    if device != "cpu":
        cases.append(half.vary(name="ready_on_gpu", device=device))
    for cache in ("warm", "cold"):
        file = raw.vary(data_residence="disk", cache=cache)
        for order in ("random", "sequential"):
            cases.append(file.vary(name=f"raw_file_{order}", order=order))
        for number in WORKERS:
            if number <= num_cores():
                theirs = raw.vary(name=f"torchvision_{number}_workers", kind="torchvision")
                cases.append(theirs.vary(num_workers=number, cache=cache))
    return cases


def plan_model(default: Case, sizes: list[int]) -> list[Case]:
    """A small and a large model over batch sizes, and the small one in other precisions."""
    cfg = default.cfg
    models = dict.fromkeys((cfg.model, LARGE))
    cases = [default.vary(model=name, batch_size=size) for name, size in product(models, sizes)]
    precisions = {"fp32", "bf16"} - {cfg.precision}
    if default.kind == "infer":
        size = BLOCK_SIZES[torch.device(default.device).type]
        cases.append(default.vary(name="end_to_end", kind="end_to_end", batch_size=size))
        if default.device != "cpu":
            # training has no scaled loss, without which fp16 does not learn
            precisions.add("fp16")
    for precision in sorted(precisions):
        cases.append(default.vary(name=precision, precision=precision))
    return cases


def plan_stages(base: Case, residence: str) -> list[Case]:
    """The stages of a step, which a single case times, and the reading of a cold file."""
    apart = base.vary(what="stage", name="apart", kind="apart")
    read = apart.vary(name="read", kind="raw", data_residence="disk", cache="cold", device="cpu")
    if residence != "disk":  # all of it is read once, before the first step
        read = read.vary(order="sequential")
    return [apart, read]
