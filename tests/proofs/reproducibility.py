"""A run is reproducible to the bit: kills and faults; and what that costs.

python tests/proofs/reproducibility.py [PART ...] [--count N] [--data DIR] [--device D] [--out
assets/reproducibility]
"""

import functools
import random
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from conftest import QUICK, write_pcam

from lib import trace
from lib.command import say
from lib.config import load_config
from lib.device import choose_device
from lib.files import read_json
from lib.machine import resolve_threads
from lib.models import build_model
from lib.ranks import ALONE
from proofs import is_writing, kill_midway, prove, row, run
from proofs.trainer import Trainer, median_rates

TINY = [*QUICK, "limit_train=160", "limit_valid=64", "data_residence=disk"]
TINY += ["shards=4", "dropout=0.2"]
SECONDS = 3.0  # of the default recipe, in a turn
MAX_PERCENT = 10  # what the trace, four shards and determinism may cost
FAULTS = ("output", "gradient", "output", "sample", "gradient", "draw")


def train_command(args, scratch: Path, checkpoint_every: int) -> list:
    where = ["--trace", "--device", args.device, f"data_dir={find_data(args, scratch)}"]
    return ["train.py", *where, *TINY, f"checkpoint_every_steps={checkpoint_every}"]


def find_data(args, scratch: Path) -> str:
    return args.data or write_pcam(scratch / "data", 1280, 100)


def read_outcome(folder: Path) -> list:
    """A run's weights and scores, and every digest of every step."""
    summary = read_json(folder / "summary.json")
    names = ("weights_sha256", "val_auc", "val_loss")
    return [summary[name] for name in names] + [(folder / "trace.csv").read_text()]


def prove_kills(args, scratch: Path) -> list[dict]:
    """Kills at random instants, every other one in a checkpoint. One that missed is no kill."""
    command = train_command(args, scratch, 1)
    count = args.count or 100
    whole = run(*command, "--runs", scratch / "whole")
    expected = read_outcome(Path(whole["run"]))
    longest_s = whole["wall_s"]
    num_killed = num_equal = num_torn = 0
    while num_killed < count:
        runs = Path(tempfile.mkdtemp(dir=scratch))
        in_checkpoint = num_killed % 2 == 1
        folder = kill_midway(command, runs, random.uniform(0, longest_s), in_checkpoint)
        if folder:
            num_killed += 1
            num_torn += is_writing(runs)
            run("train.py", "--resume", folder, "--trace", "--device", args.device)
            num_equal += read_outcome(folder) == expected
            say(f"kill {num_killed}/{count}: {num_equal} equal")
    measured = f"{num_equal} of {count}: {num_torn} left a half-written checkpoint"
    asked = "SIGKILL at random, resumed: weights, scores and every digest equal"
    return [row(asked, measured, num_equal == count, count)]


def prove_faults(args, scratch: Path) -> list[dict]:
    """Faults at random steps in every layer in turn: step, quantity and module have to be named."""
    whole = run(*train_command(args, scratch, 3), "--runs", scratch / "faults")
    count = args.count or 30
    modules = build_model(load_config(overrides=TINY)).named_modules()
    layers = [name for name, module in modules if module._parameters]
    num_named = num_rounded = 0
    for number in range(count):
        kind = FAULTS[number % len(FAULTS)]
        where = "" if kind == "sample" else f":{layers[number % len(layers)]}"
        fault = f"{kind}{where}@{random.randint(1, whole['num_steps'])}"
        inject = ("--inject", fault, "--out", scratch / "fault")
        twins = run("audit.py", "twin", whole["run"], *inject)
        num_named += bool(twins["named"])
        # one ULP of a logit may change neither loss nor gradient: then the twins are identical, and
        # have to be called so
        num_rounded += kind == "output" and twins["verdict"] == "identical"
        say(f"{fault}: {'named' if twins['named'] else twins}")
    measured = f"{num_named} of {count}; {num_rounded} rounded away, the twins called identical"
    asked = "planted faults: step, quantity and module named"
    return [row(asked, measured, num_named + num_rounded == count, count)]


def trace_steps(trainer: Trainer, folder: Path) -> None:
    """Let each step of a trainer be traced."""
    traced = trace.Trace(folder, trainer.state, 1, ALONE)
    plain_step = trainer.step

    def step(batch):
        result = plain_step(batch)
        traced.add(batch, result)
        return result

    trainer.step = step


def prove_price(name: str, without: dict, with_it: dict, args, scratch: Path) -> list[dict]:
    """What a thing costs the default recipe's step."""
    count = args.count or 15
    cfg = resolve_threads(load_config())
    device = choose_device(args.device)
    data = find_data(args, scratch)
    trainers = []
    for changes in (without, with_it):
        values = {"threads": cfg.threads, "p4m_width": cfg.p4m_width, **changes}
        trainers.append(Trainer(device, data, **values))
    if name == "the trace":
        trace_steps(trainers[1], scratch)
    measures = [functools.partial(trainer.images_per_s, SECONDS) for trainer in trainers]
    off, on = median_rates(measures, count)
    percent = 100 * (1 - on / off)
    measured = f"{percent:.1f}% ({off:,.0f} to {on:,.0f} images/s, medians of {count} pairs)"
    asked = f"share of the throughput that {name} costs"
    return [row(asked, measured, percent < MAX_PERCENT, f"{MAX_PERCENT}%")]


LARGE = {"batch_size": 256}
PRICES = {
    "trace_price": ("the trace", {}, {}),
    "shards_price": ("shards=4", {}, {"shards": 4}),
    "shards_of_64_price": ("batch_size=256 shards=4", LARGE, LARGE | {"shards": 4}),
    "determinism_price": ("deterministic=true", {"deterministic": False}, {}),
}
PARTS = {"kills": prove_kills, "faults": prove_faults}
for part, price in PRICES.items():
    PARTS[part] = functools.partial(prove_price, *price)

if __name__ == "__main__":
    options = {"count": None, "data": None, "device": "cpu"}
    sys.exit(prove(__doc__, PARTS, "reproducibility", **options))
