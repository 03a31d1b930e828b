"""A run is reproducible to the bit: kills, ranks, prefetch, twins, faults; and what that costs.

python tests/proofs/reproducibility.py [PART ...] [--count N] [--data DIR] [--device D] [--out
assets/reproducibility]
"""

import functools
import itertools
import json
import math
import multiprocessing
import os
import random
import socket
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from conftest import QUICK, write_pcam

# imported before the forks, so that a training starts at once; nothing here computes: a fork may
# not inherit threads
import audit
import train
from lib import batches, predict, trace, training
from lib.audit import replay, twin
from lib.command import EXIT_DONE, EXIT_FINDING, positive, print_result, say, script
from lib.config import load_config
from lib.device import choose_device
from lib.files import read_json
from lib.machine import resolve_threads
from lib.models import build_model
from lib.ranks import ALONE
from lib.seeding import set_determinism
from proofs import proof_parser, row, run, run_parts

SIZE = ["limit_train=160", "limit_valid=64", "data_residence=disk"]
TINY = [*QUICK, *SIZE, "shards=4", "dropout=0.2", "checkpoint_every_steps=1"]
STEPS_TIMED = 20  # of the default recipe, in a turn
MAX_PERCENT = 10  # what the trace, four shards and determinism may cost
# number of ranks before a kill, and after it; the same twice: not killed
RANKS = ((2, 2), (4, 4), (4, 1), (1, 2))
FAULTS = ("output", "gradient", "output", "sample", "gradient", "draw")
FORK = multiprocessing.get_context("fork")


def run_child(target, argv, environment: dict, log: Path) -> None:
    os.environ.update(environment)
    with open(log, "wb", buffering=0) as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    code = target([str(argument) for argument in argv])
    sys.stdout.flush()
    os._exit(code)


class Process:
    """`target(argv)` in a process of its own: it can be killed, and shares nothing but files."""

    def __init__(self, argv, target=train.main, **environment):
        self.log = Path(tempfile.mkstemp(suffix=".log")[1])
        arguments = (target, argv, environment, self.log)
        self.process = FORK.Process(target=run_child, args=arguments)
        self.process.start()

    def is_alive(self) -> bool:
        return self.process.is_alive()

    def kill(self) -> bool:
        """SIGKILL; False if it had ended by itself."""
        self.process.kill()
        self.process.join()
        return self.process.exitcode < 0

    def result(self, allowed=(EXIT_DONE,)) -> dict:
        """The last line that it printed, as JSON."""
        self.process.join()
        text = self.log.read_text()
        self.log.unlink()
        assert self.process.exitcode in allowed, f"exit {self.process.exitcode}: {text[-2000:]}"
        lines = [line for line in text.splitlines() if line.startswith("{")]
        return json.loads(lines[-1])


def start_ranks(num: int, argv) -> list[Process]:
    """Training as `num` ranks, with the variables that torchrun sets; the first is rank 0."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    common = {"WORLD_SIZE": str(num), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return [Process(argv, RANK=str(rank), LOCAL_RANK=str(rank), **common) for rank in range(num)]


def wait_for(condition, pause_s: float = 0.0005, patience_s: float = 300.0):
    """The first true value of `condition()`."""
    deadline = time.monotonic() + patience_s
    while time.monotonic() < deadline:
        value = condition()
        if value:
            return value
        time.sleep(pause_s)
    raise AssertionError("waited in vain")


def only_run(runs: Path) -> Path | None:
    """The run folder that a process made in `runs`, as soon as its config is there."""
    return next((path.parent for path in runs.glob("*/config.yaml")), None)


def is_writing(runs: Path) -> bool:
    """Whether a half-written checkpoint lies in the run."""
    return any(runs.glob("*/.*.pt.*.tmp"))


def common_arguments(args, scratch: Path) -> tuple[str, ...]:
    data = args.data or scratch / "data"
    if not args.data and not data.exists():
        write_pcam(data, 64 * STEPS_TIMED, 100)
    return ("--device", args.device, f"data_dir={Path(data).resolve()}")


class Undisturbed:
    """The tiny run that nothing disturbs, and the comparison of others with it."""

    def __init__(self, args, scratch: Path):
        self.scratch, self.common = scratch, common_arguments(args, scratch)
        started_at = time.monotonic()
        self.summary = self.train(scratch / "whole").result()
        self.wall_s = time.monotonic() - started_at
        self.trace = (Path(self.summary["run"]) / "trace.csv").read_text()

    def train(self, runs: Path, target=train.main) -> Process:
        return Process(["--runs", runs, "--trace", *self.common, *TINY], target)

    def is_equal(self, folder: Path) -> bool:
        """Whether a run's weights, scores, and every digest of every step are those of this one."""
        summary = read_json(folder / "summary.json")
        keys = ("weights_sha256", "val_auc", "val_loss")
        same = all(summary[key] == self.summary[key] for key in keys)
        return same and (folder / "trace.csv").read_text() == self.trace

    def kill_one(self, in_training: bool, in_checkpoint: bool) -> Path:
        """Kill a training at a random instant of the process or, `in_training`, of its steps;
        `in_checkpoint` while it writes the next checkpoint after that. Returns the folder of its
        runs. A kill that missed is tried again.
        """
        longest_s = self.wall_s
        if in_training:
            longest_s = self.summary["train_s"] + self.summary["eval_s"]
        while True:
            runs = Path(tempfile.mkdtemp(dir=self.scratch))
            process = self.train(runs)
            if in_training:
                wait_for(lambda runs=runs: any(runs.glob("*/last.pt")))
            time.sleep(random.uniform(0, longest_s))
            while in_checkpoint and process.is_alive() and not is_writing(runs):
                time.sleep(0.0005)
            if process.kill() and (is_writing(runs) or not in_checkpoint):
                return runs


def prove_kills(args, scratch: Path) -> list[dict]:
    """Of four kills one anywhere in the process, and two of the three others in a checkpoint."""
    whole, count = Undisturbed(args, scratch), args.count or 100
    num_held = num_torn = num_resumed = 0
    for number in range(1, count + 1):
        runs = whole.kill_one(number % 4 != 0, number % 4 in (1, 2))
        num_torn += is_writing(runs)
        folder = only_run(runs)
        if folder:
            Process(["--resume", folder, "--trace", *whole.common]).result()
        else:  # killed before there was a run
            whole.train(runs).result()
            folder = only_run(runs)
        num_resumed += read_json(folder / "meta.json")["start_step"] > 0
        num_held += whole.is_equal(folder)
        say(f"kill {number}/{count}: {num_held} equal")
    text = (
        f"{num_held} of {count}: {num_torn} left a half-written checkpoint, {num_resumed} went on"
        " from a checkpoint, the others from the start"
    )
    asked = "SIGKILL at random, resumed: weights, scores and every digest equal"
    return [row(asked, text, num_held == count, count)]


def prove_ranks(args, scratch: Path) -> list[dict]:
    """Several ranks against one, and a change of their number on resumption after SIGKILL."""
    whole, rows = Undisturbed(args, scratch), []
    for before, after in RANKS:
        runs = scratch / f"ranks-{before}-{after}"
        processes = start_ranks(before, ["--runs", runs, "--trace", *whole.common, *TINY])
        name = f"{before} ranks"
        if before != after:
            name = f"{before} ranks, killed, resumed as {after}"
            folder = wait_for(functools.partial(only_run, runs))
            wait_for((folder / "previous.pt").exists)
            for process in processes:
                process.kill()
            assert not (folder / "summary.json").exists(), "it had ended before it was killed"
            processes = start_ranks(after, ["--resume", folder, "--trace", *whole.common])
        processes[0].result()
        folder = only_run(runs)
        start_step = read_json(folder / "meta.json")["start_step"]
        text = f"from step {start_step}: weights, scores and every digest"
        rows.append(row(f"{name}: equal to one rank", text, whole.is_equal(folder)))
    return rows


def train_with_prefetch(prefetch: bool, argv) -> int:
    load = functools.partial(batches.load_batches, prefetch=prefetch)
    batches.load_batches = predict.load_batches = load
    return train.main(argv)


def prove_prefetch(args, scratch: Path) -> list[dict]:
    """Batches gathered by the background thread, and without it."""
    whole, are_equal = Undisturbed(args, scratch), []
    for prefetch in (True, False):
        runs = scratch / f"prefetch-{prefetch}"
        whole.train(runs, functools.partial(train_with_prefetch, prefetch)).result()
        are_equal.append(whole.is_equal(only_run(runs)))
    text = f"{sum(are_equal)} of {len(are_equal)}"
    return [row("prefetch on and off: equal", text, all(are_equal))]


def prove_twins(args, scratch: Path) -> list[dict]:
    """Untouched twins, each a train.py of its own, compared with the first by audit.py."""
    common, count = common_arguments(args, scratch), args.count or 20
    runs, num_held = [], 0
    for number in range(count + 1):
        command = ["train.py", "--runs", scratch / "twins", "--trace", *common, *TINY]
        runs.append(run(*command)["run"])
        if number:
            twins = run("audit.py", "twin", runs[0], runs[-1], "--out", scratch / "twin")
            num_held += twins["verdict"] == "identical"
    num_digests = len(trace.QUANTITIES)
    text = f"{num_held} of {count}, in {twins['num_steps']} steps of {num_digests} quantities"
    return [row("untouched twins are identical", text, num_held == count, count)]


def audit_here(argv) -> int:
    """audit.py, whose twins are trained in this process: no import of torch for each."""
    twin.make_run = lambda argv, fault=None: Path(replay.train(argv, fault)[0]["run"])
    return audit.main(argv)


def prove_faults(args, scratch: Path) -> list[dict]:
    """Faults at random steps in every layer in turn: step, quantity and module have to be named."""
    common, count = common_arguments(args, scratch), args.count or 30
    overrides = [key for key in TINY if not key.startswith("checkpoint")]
    overrides.append("checkpoint_every_steps=3")
    argv = ["--runs", scratch / "faults", "--trace", *common, *overrides]
    whole = Process(argv).result()
    modules = build_model(load_config(overrides=overrides)).named_modules()
    layers = itertools.cycle([name for name, module in modules if module._parameters])
    num_named = num_rounded = 0
    for number, kind in zip(range(1, count + 1), itertools.cycle(FAULTS), strict=False):
        where = "" if kind == "sample" else f":{next(layers)}"
        planted = f"{kind}{where}@{random.randint(1, whole['num_steps'])}"
        argv = ["twin", whole["run"], "--inject", planted, "--out", scratch / "fault"]
        twins = Process(argv, audit_here).result((EXIT_DONE, EXIT_FINDING))
        # one ULP of a logit may change neither loss nor gradient: then the twins are identical, and
        # have to be called so
        is_same = twins["verdict"] == "identical" and twins["weights"] == "equal"
        num_named += bool(twins["named"])
        num_rounded += kind == "output" and is_same and not twins["named"]
        say(f"fault {number}/{count}: {planted}: {'named' if twins['named'] else twins}")
    text = f"{num_named} of {count}; {num_rounded} rounded away, the twins called identical"
    asked = "planted faults: step, quantity and module named"
    return [row(asked, text, num_named + num_rounded == count, count)]


def time_steps(changes: dict, count: int, argv) -> int:
    """Print images/s of the default recipe's steps with each of two lists of `changes`, in turn and
    in one process, so that a noisy machine hits both alike.
    """
    device, data_dir = choose_device(argv[1]), argv[2]
    sides, rates = [], []
    for overrides in changes["keys"]:
        limit = f"limit_train={64 * STEPS_TIMED}"
        cfg = resolve_threads(load_config(overrides=[data_dir, limit, *overrides]))
        (split, rows), _ = batches.open_train_valid(cfg)
        keys = batches.epoch_order(rows, len(split), 0, cfg).split(cfg.batch_size)
        state = training.build_state(cfg, device)
        source = batches.PatchSource(split.images, cfg.data_residence, device)
        every = int(changes["trace"] and bool(sides))
        traced = trace.Trace(Path(tempfile.mkdtemp(dir=changes["folder"])), state, every, ALONE)
        sides.append((cfg, state, source, split.labels, keys, traced))
    for _ in range(count + 1):
        pair = []
        for cfg, state, source, labels, keys, traced in sides:
            set_determinism(cfg.deterministic, cfg.threads)
            started_at, result = time.perf_counter(), None
            for batch in batches.load_batches(source, labels, keys):
                loss = result and float(result.loss)  # read one step late, as train.py does
                result = training.training_step(state, batch, cfg, cfg.lr)
                traced.add(batch, result)
            traced.flush()
            assert math.isfinite(loss + float(result.loss))
            num_images = sum(len(batch_keys) for batch_keys in keys)
            pair.append(num_images / (time.perf_counter() - started_at))
        rates.append(pair)
    print_result({"rates": rates[1:]})  # the first round warms up
    return EXIT_DONE


def prove_price(without, with_case, has_trace: bool, args, scratch: Path) -> list[dict]:
    """What a thing costs the default recipe's step."""
    count = args.count or 15
    changes = {"keys": (without, with_case), "trace": has_trace, "folder": scratch}
    target = functools.partial(time_steps, changes, count)
    rates = Process(common_arguments(args, scratch), target).result()["rates"]
    percent = statistics.median(100 * (1 - on / off) for off, on in rates)
    off, on = (statistics.median(pair[side] for pair in rates) for side in (0, 1))
    text = f"{percent:.1f}% ({off:,.0f} to {on:,.0f} images/s, medians of {count} pairs)"
    name = "the trace" if has_trace else " ".join(with_case) or "deterministic=true"
    asked = f"share of the throughput that {name} costs"
    return [row(asked, text, percent < MAX_PERCENT, f"{MAX_PERCENT}%")]


def price(without=(), with_case=(), has_trace=False):
    return functools.partial(prove_price, without, with_case, has_trace)


PARTS = {
    "kills": prove_kills,
    "ranks": prove_ranks,
    "prefetch": prove_prefetch,
    "faults": prove_faults,
    "twins": prove_twins,
    "trace_price": price(has_trace=True),
    "shards_price": price(with_case=("shards=4",)),
    "shards_of_64_price": price(("batch_size=256",), ("batch_size=256", "shards=4")),
    "determinism_price": price(("deterministic=false",)),
}


@script
def main(argv=None) -> int:
    parser = proof_parser("reproducibility.py", __doc__, PARTS, "reproducibility")
    parser.add_argument(
        "--count", type=positive, help="kills, faults, twins or pairs of timings (default: 15-100)"
    )
    parser.add_argument("--data", metavar="DIR", help="PCam folder (default: drawn patches)")
    parser.add_argument("--device", default="cpu", metavar="D", help="cpu or cuda (default: cpu)")
    set_determinism(True, 1)  # imports half of torch: once, before the forks
    return run_parts(PARTS, parser.parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
