"""The figures of reproducibility, at length: a table of what held how often, as JSON and Markdown.

python tests/prove_reproducibility.py [PART] [--count N] [--data DIR] [--device D] [--out
assets/reproducibility]
"""

import contextlib
import functools
import itertools
import json
import math
import multiprocessing
import os
import random
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from conftest import QUICK, REPOSITORY, write_pcam
from proofs import made_now, write_markdown

# imported before the forks, so that a training starts at once; nothing here computes: a fork may
# not inherit threads
import audit
import train
from lib import batches, predict, trace, training  # noqa: F401
from lib.audit import replay, twin
from lib.command import EXIT_DONE, EXIT_FINDING, BadInput, Parser, print_result, say, script
from lib.config import load_config
from lib.device import choose_device
from lib.files import read_json, write_json
from lib.machine import describe_machine, resolve_threads
from lib.models import build_model
from lib.ranks import ALONE
from lib.rundir import package_versions
from lib.seeding import set_determinism

SIZE = ["limit_train=160", "limit_valid=64", "data_residence=disk"]
TINY = [*QUICK, *SIZE, "shards=4", "dropout=0.2", "checkpoint_every_steps=1"]
STEPS_TIMED = 20  # of the default recipe, in a turn
LIMIT_PERCENT = 10  # what the trace and four shards may cost
forked = multiprocessing.get_context("fork")


# ---- processes


def _child(target, argv, environment: dict, log: Path) -> None:
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
        self.log = Path(tempfile.mkstemp(suffix=".log", dir=SCRATCH)[1])
        self.process = forked.Process(target=_child, args=(target, argv, environment, self.log))
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
        assert self.process.exitcode in allowed, f"exit {self.process.exitcode}: {text[-2000:]}"
        return json.loads(
            next(line for line in reversed(text.splitlines()) if line.startswith("{"))
        )


def start_ranks(num: int, argv) -> list[Process]:
    """Training as `num` ranks, with the variables that torchrun sets; the first is rank 0."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        common = {
            "WORLD_SIZE": str(num),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(free.getsockname()[1]),
        }
    return [Process(argv, RANK=str(rank), LOCAL_RANK=str(rank), **common) for rank in range(num)]


def wait_for(condition, pause_s: float = 0.0005, patience_s: float = 300.0):
    deadline = time.monotonic() + patience_s
    while not (value := condition()):
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(pause_s)
    return value


def only_run(runs: Path) -> Path | None:
    """The run folder that a process made in `runs`, as soon as its config is there."""
    return next((path.parent for path in runs.glob("*/config.yaml")), None)


# ---- the parts: each gives its rows, `held` in each, and a remark


@functools.cache
def train_whole(common: tuple) -> tuple[dict, str, float]:
    """The summary and trace of the tiny run that nothing disturbs, and its seconds."""
    started = time.monotonic()
    result = Process(["--runs", SCRATCH / "whole", "--trace", *common, *TINY]).result()
    return result, (Path(result["run"]) / "trace.csv").read_text(), time.monotonic() - started


def is_equal(run: Path, common: tuple) -> int:
    """Whether the run's weights, scores, and every digest of every step are those of the
    undisturbed one.
    """
    whole, whole_trace, _ = train_whole(common)
    summary = read_json(run / "summary.json")
    same = all(summary[key] == whole[key] for key in ("weights_sha256", "val_auc", "val_loss"))
    return int(same and (run / "trace.csv").read_text() == whole_trace)


def kill_one(
    folder: Path, common: tuple, in_training: bool, in_checkpoint: bool
) -> tuple[Path, bool]:
    """Kill a training at a random instant of the process or, `in_training`, of its steps;
    `in_checkpoint` while it writes the next checkpoint after that.

    Returns the folder of its runs and whether a half-written checkpoint was left. A kill that
    missed is tried again.
    """
    whole, _, wall_s = train_whole(common)
    while True:
        runs = Path(tempfile.mkdtemp(dir=folder))
        process = Process(["--runs", runs, "--trace", *common, *TINY])
        if in_training:
            wait_for(lambda runs=runs: any(runs.glob("*/last.pt")))
        time.sleep(random.uniform(0, whole["train_s"] + whole["eval_s"] if in_training else wall_s))
        if in_checkpoint:
            wait_for(
                lambda runs=runs, process=process: (
                    any(runs.glob("*/.*.pt.*.tmp")) or not process.is_alive()
                )
            )
        killed, torn = process.kill(), any(runs.glob("*/.*.pt.*.tmp"))
        if killed and (torn or not in_checkpoint):
            return runs, torn


def prove_kills(common, count: int) -> tuple[list[dict], str]:
    """SIGKILL at random instants, of four kills one anywhere in the process, two of three others in
    a checkpoint; resumed.
    """
    rows = []
    for number in range(1, count + 1):
        runs, torn = kill_one(SCRATCH, common, number % 4 != 0, number % 4 in (1, 2))
        run = only_run(runs)
        had_checkpoint = bool(
            run and ((run / "last.pt").exists() or (run / "previous.pt").exists())
        )
        # killed before there was a run
        argv = ["--resume", run, *common] if run else ["--runs", runs, *common, *TINY]
        Process([*argv, "--trace"]).result()
        run = run or only_run(runs)
        start_step = read_json(run / "meta.json")["start_step"]
        row = {
            "kill": number,
            "half_written_checkpoint": int(torn),
            "had_checkpoint": int(had_checkpoint),
        }
        rows.append(row | {"resumed_from_step": start_step, "held": is_equal(run, common)})
        say(f"kill {number}/{count}: {rows[-1]}")
    torn, resumed = (
        sum(row[key] for row in rows) for key in ("half_written_checkpoint", "had_checkpoint")
    )
    return (
        rows,
        (
            f"{torn} left a half-written checkpoint, {resumed} went on from a checkpoint, the"
            " others from the start"
        ),
    )


def prove_ranks(common, _count: int) -> tuple[list[dict], str]:
    """Two and four ranks against one, and a change of their number on resumption after SIGKILL."""
    rows = []
    for before, after in ((2, 2), (4, 4), (4, 1), (1, 2)):
        runs = SCRATCH / f"ranks-{before}-{after}"
        processes = start_ranks(before, ["--runs", runs, "--trace", *common, *TINY])
        if before != after:
            run = wait_for(functools.partial(only_run, runs))
            wait_for((run / "previous.pt").exists)
            for process in processes:
                process.kill()
            assert not (run / "summary.json").exists(), "it had ended before it was killed"
            processes = start_ranks(after, ["--resume", run, "--trace", *common])
        processes[0].result()
        run = only_run(runs)
        row = {"ranks": before, "resumed_on": after if after != before else ""}
        row["resumed_from_step"] = read_json(run / "meta.json")["start_step"]
        rows.append(row | {"held": is_equal(run, common)})
        say(f"ranks: {rows[-1]}")
    return rows, "weights, scores and every step's trace against one rank"


def train_with_prefetch(prefetch: bool, argv) -> int:
    batches.load_batches = predict.load_batches = functools.partial(
        batches.load_batches, prefetch=prefetch
    )
    return train.main(argv)


def prove_prefetch(common, _count: int) -> tuple[list[dict], str]:
    """Batches gathered by the background thread, and without it."""
    rows = []
    for prefetch in (True, False):
        runs = SCRATCH / f"prefetch-{prefetch}"
        Process(
            ["--runs", runs, "--trace", *common, *TINY],
            functools.partial(train_with_prefetch, prefetch),
        ).result()
        rows.append({"prefetch": int(prefetch), "held": is_equal(only_run(runs), common)})
    return rows, "forced on and off"


def prove_twins(common, count: int) -> tuple[list[dict], str]:
    """Untouched twins, each a train.py of its own, compared with the first by audit.py."""
    runs, rows = [], []
    for number in range(count + 1):
        command = [
            sys.executable,
            REPOSITORY / "train.py",
            "--runs",
            SCRATCH / "twins",
            "--trace",
            *common,
            *TINY,
        ]
        runs.append(train_script(command)["run"])
        if number:
            argv = ["twin", runs[0], runs[-1], "--out", SCRATCH / "twin"]
            found = Process(argv, audit.main).result((EXIT_DONE, EXIT_FINDING))
            rows.append(
                {
                    "twin": number,
                    "num_steps": found["num_steps"],
                    "held": int(found["verdict"] == "identical"),
                }
            )
            say(f"twin {number}/{count}: {found['verdict']}")
    return rows, f"{rows[0]['num_steps']} steps of {len(trace.QUANTITIES)} quantities each"


def audit_here(argv) -> int:
    """audit.py, whose twins are trained in this process: no import of torch for each."""
    twin.make_run = lambda argv, fault=None: Path(replay.train(argv, fault)[0]["run"])
    return audit.main(argv)


def prove_faults(common, count: int) -> tuple[list[dict], str]:
    """Faults at random steps in every layer in turn: step, quantity and module have to be named."""
    overrides = [item for item in TINY if not item.startswith("checkpoint")] + [
        "checkpoint_every_steps=3"
    ]
    whole = Process(["--runs", SCRATCH / "faults", "--trace", *common, *overrides]).result()
    layers = [
        name
        for name, module in build_model(load_config(overrides=overrides)).named_modules()
        if module._parameters
    ]
    rows, next_layer = [], itertools.cycle(layers)
    kinds = itertools.cycle(("output", "gradient", "output", "sample", "gradient", "draw"))
    for number, kind in zip(range(1, count + 1), kinds, strict=False):
        where = "" if kind == "sample" else f":{next(next_layer)}"
        planted = f"{kind}{where}@{random.randint(1, whole['num_steps'])}"
        argv = ["twin", whole["run"], "--inject", planted, "--out", SCRATCH / "fault"]
        found = Process(argv, audit_here).result((EXIT_DONE, EXIT_FINDING))
        row = {"planted": planted, **{key: found.get(key) for key in ("step", "quantity")}}
        row |= {
            key: found.get("replay", {}).get(key, "")
            for key in ("phase", "module", "what", "max_ulp", "num_unequal")
        }
        # one ULP of a logit may change neither loss nor gradient: then the twins are identical, and
        # have to be called so
        row["rounded_away"] = int(
            kind == "output" and found["verdict"] == "identical" and found["weights"] == "equal"
        )
        rows.append(row | {"held": int(found["named"] or row["rounded_away"])})
        say(f"fault {number}/{count}: {planted}: {'named' if found['named'] else found}")
    away = sum(row["rounded_away"] for row in rows)
    return rows, f"step, quantity and module; {away} rounded away, and the twins called identical"


def train_script(command) -> dict:
    """The result of a train.py started as a user would."""
    done = subprocess.run(
        [str(word) for word in command],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert done.returncode == EXIT_DONE, f"exit {done.returncode}: {done.stdout}"
    return json.loads(done.stdout.splitlines()[-1])


def time_steps(case: str, count: int, argv) -> int:
    """Print images/s of the default recipe's steps without and with something, in turn and in one
    process, so that a noisy machine hits both alike: [[without, with], ...]."""
    device, data_dir = choose_device(argv[1]), argv[2]
    without, with_case = {
        "trace": ((), ()),
        "shards": ((), ("shards=4",)),
        "shards_of_64": (("batch_size=256",), ("batch_size=256", "shards=4")),
        "determinism": (("deterministic=false",), ()),
    }[case]
    sides, rates = [], []
    for changes in (without, with_case):
        cfg = resolve_threads(
            load_config(overrides=[data_dir, f"limit_train={64 * STEPS_TIMED}", *changes])
        )
        (split, rows), _ = batches.open_train_valid(cfg)
        keys = batches.epoch_order(rows, len(split), 0, cfg).split(cfg.batch_size)
        state, source = (
            training.build_state(cfg, device),
            batches.PatchSource(split.images, cfg.data_residence, device),
        )
        traced = trace.Trace(
            Path(tempfile.mkdtemp(dir=SCRATCH)), state, int(case == "trace" and len(sides)), ALONE
        )
        sides.append((cfg, state, source, split.labels, keys, traced))
    for _ in range(count + 1):
        pair = []
        for cfg, state, source, labels, keys, traced in sides:
            set_determinism(cfg.deterministic, cfg.threads)
            started, result = time.perf_counter(), None
            for batch in batches.load_batches(source, labels, keys):
                loss = result and float(result.loss)  # read one step late, as train.py does
                result = training.training_step(state, batch, cfg, cfg.lr)
                traced.add(batch, result)
            traced.flush()
            assert math.isfinite(loss + float(result.loss))
            pair.append(round(sum(map(len, keys)) / (time.perf_counter() - started), 1))
        rates.append(pair)
    print_result({"rates": rates[1:]})  # the first round warms up
    return EXIT_DONE


def compare_speed(case: str, common, count: int) -> tuple[list[dict], str]:
    """What a thing costs the default recipe's step."""
    rates = Process(common, functools.partial(time_steps, case, count)).result()["rates"]
    rows = [
        {
            "images_per_s_without": off,
            "images_per_s_with": on,
            "percent": round(100 * (1 - on / off), 2),
        }
        for off, on in rates
    ]
    percent = statistics.median(row["percent"] for row in rows)
    off, on = (statistics.median(pair[side] for pair in rates) for side in (0, 1))
    held = int(percent < LIMIT_PERCENT)
    return [
        row | {"held": held} for row in rows
    ], f"{percent:.1f}% of throughput ({off:,.0f} to {on:,.0f} images/s, medians)"


PARTS = {  # name: (proof, default count)
    "kills": (prove_kills, 100),
    "ranks": (prove_ranks, 4),
    "prefetch": (prove_prefetch, 2),
    "faults": (prove_faults, 30),
    "twins": (prove_twins, 20),
    "trace_price": (functools.partial(compare_speed, "trace"), 15),
    "shards_price": (functools.partial(compare_speed, "shards"), 15),
    "shards_of_64_price": (functools.partial(compare_speed, "shards_of_64"), 15),
    "determinism_price": (functools.partial(compare_speed, "determinism"), 15),
}


def write_table(args, name: str, rows: list[dict], remark: str, seconds: float) -> dict:
    """Put a part's result into OUT.json, where those of earlier parts stay, and all of them into
    OUT.md.
    """
    path = args.out.with_suffix(".json")
    results = read_json(path) if path.exists() else {}
    machine = describe_machine(choose_device(args.device))
    held = sum(row["held"] for row in rows)
    results[name] = {
        "held": held,
        "count": len(rows),
        "remark": remark,
        "command": (
            f"python tests/prove_reproducibility.py {name} --count {len(rows)}"
            + (f" --data {args.data}" * bool(args.data))
        ),
        "data": args.data or "synthetic",
        **made_now(),
        "machine": machine,
        "torch": package_versions()["torch"],
        "wall_s": round(seconds, 1),
        "rows": rows,
    }
    results = {key: results[key] for key in PARTS if key in results}
    write_json(path, results)
    write_results(args.out.with_suffix(".md"), results)
    return results[name]


def write_results(path: Path, results: dict) -> None:
    """The results of the parts as a table."""
    rows = []
    for key, found in results.items():
        text = f"{found['held']} of {found['count']}"
        if key.endswith("_price"):
            text = (
                "under" if found["held"] == found["count"] else "NOT under"
            ) + f" {LIMIT_PERCENT}%, {found['count']} pairs"
        device = found["machine"].get(
            "gpu", f"{found['machine']['num_cores']} cores of {found['machine']['cpu']}"
        )
        made = f"{found['data']}, {device}, {found['date']}, {found['commit']}"
        rows.append((key.replace("_", " "), text, found["remark"], f"`{found['command']}`", made))
    write_markdown(path, ("proof", "held", "remark", "command", "data, device, date, commit"), rows)


@script
def main(argv=None) -> int:
    parser = Parser(
        prog="prove_reproducibility.py",
        description="Prove, at length, that a run is reproducible to the bit.",
    )
    parser.add_argument(
        "part", nargs="?", default="all", help=f"{', '.join(PARTS)}, or all (default)"
    )
    parser.add_argument(
        "--count",
        type=int,
        help="kills, faults, twins, or pairs of timings (default: as the issue asks)",
    )
    parser.add_argument(
        "--data", default="", metavar="DIR", help="PCam folder (default: a small synthetic one)"
    )
    parser.add_argument("--device", default="cpu", metavar="D", help="cpu or cuda (default: cpu)")
    parser.add_argument(
        "--out",
        default="assets/reproducibility",
        type=Path,
        metavar="OUT",
        help="OUT.json and OUT.md",
    )
    args = parser.parse_args(argv)
    if args.part not in (*PARTS, "all") or (args.count is not None and args.count < 1):
        raise BadInput(
            f"{args.part} --count {args.count}: the part is one of {', '.join(PARTS)}, all; the"
            " count 1 or more"
        )

    set_determinism(True, 1)  # imports half of torch: once, before the forks
    args.out.parent.mkdir(parents=True, exist_ok=True)
    data = Path(args.data or write_pcam(SCRATCH / "data", 64 * STEPS_TIMED, 100)).resolve()
    common = ("--device", args.device, f"data_dir={data}")
    failed = []
    for name in PARTS if args.part == "all" else [args.part]:
        proof, count = PARTS[name]
        started = time.monotonic()
        rows, remark = proof(common, args.count or count)
        result = write_table(args, name, rows, remark, time.monotonic() - started)
        say(f"{name}: {result['held']} of {result['count']} held; {remark}; {result['wall_s']} s")
        failed += [name] if result["held"] < result["count"] else []
    print_result({"failed": failed, "table": str(args.out.with_suffix(".md"))})
    return EXIT_FINDING if failed else EXIT_DONE


if __name__ == "__main__":
    with contextlib.ExitStack() as stack:
        SCRATCH = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="proof-")))
        code = main()
    sys.exit(code)
