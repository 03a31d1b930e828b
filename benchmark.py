"""Measure throughput on the user's own files, each case several times in processes of their own,
and say what holds it up.

python benchmark.py loader|infer|train|all [--data DIR] [--out OUT] [--batch-sizes 1,8,...]
                                           [key=value ...]
python benchmark.py compare A B
"""

import argparse
import dataclasses
import datetime
import functools
import json
import sys
import tempfile
from pathlib import Path

from lib.command import (
    EXIT_DONE,
    EXIT_FINDING,
    BadInput,
    Parser,
    place,
    positive,
    print_result,
    say,
    script,
)

WHAT = {
    "loader": (
        "ways to a batch: cold and warm file, random and in order, beside torchvision's PCAM and"
        " the memory's limit"
    ),
    "infer": "a small and a large model over batch sizes, and variants",
    "train": (
        "the step of train.py likewise, its stages apart and overlapped, and which of them is the"
        " bottleneck"
    ),
    "all": "all of these",
}


# of this machine alone: a benchmark is shown to others
PLACES = ("argv", "cwd", "host", "pid", "process_start", "submitted")


def parse(argv) -> argparse.Namespace:
    about = "; ".join(f"{name}: {text}" for name, text in WHAT.items())
    parser = Parser(
        prog="benchmark.py", description="Measure throughput on your own files.", epilog=about
    )
    parser.add_argument(
        "what",
        choices=(*WHAT, "compare"),
        help="compare A B: does B differ from A by more than the noise",
    )
    parser.add_argument(
        "--data", metavar="DIR", type=place, help="PCam folder (default: data_dir of config.yaml)"
    )
    parser.add_argument(
        "--out",
        type=place,
        metavar="OUT",
        help="a folder (default: bench/ and the partition and job, or a date)",
    )
    parser.add_argument(
        "--batch-sizes",
        default="",
        metavar="B,...",
        help="default: 1,8,...,512; of loader: batch_size",
    )
    parser.add_argument(
        "--cases",
        default="",
        metavar="LIST",
        help="some of them, as rows.csv names them (default: all)",
    )
    parser.add_argument(
        "--seconds",
        type=float,
        default=1.0,
        metavar="S",
        help="measured per case and repeat (default: 1)",
    )
    parser.add_argument(
        "--repeats", type=positive, default=6, metavar="N", help="of all cases in turn (default: 6)"
    )
    parser.add_argument("--device", default="auto", metavar="D", help="for models (default: auto)")
    parser.add_argument(
        "--allow-noise",
        action="store_true",
        help="measure on a busy machine too, and mark the rows",
    )
    parser.add_argument(
        "rest",
        nargs="*",
        metavar="key=value",
        help="put over the config, e.g. model=cnn threads=1; compare: A B",
    )
    args = parser.parse_intermixed_args(argv)
    if args.what == "compare" and len(args.rest) != 2:
        parser.error(f"compare takes two benchmarks, {len(args.rest)} given")
    try:
        args.batch_sizes = (
            sorted({int(size) for size in args.batch_sizes.split(",")}) if args.batch_sizes else []
        )
    except ValueError:
        parser.error(f"--batch-sizes {args.batch_sizes}: must be integers such as 1,8,64")
    if not 0 < args.seconds <= 600 or min(args.batch_sizes, default=1) < 1:
        parser.error("batch sizes must be 1 or more, seconds above 0 and at most 600")
    return args


@script
def main(argv=None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    if argv == ["case"]:  # a repeat, in a process of its own
        from lib.benchmark.cases import time_case

        print_result(time_case(json.load(sys.stdin)))
        return EXIT_DONE
    args = parse(argv)
    return compare(*args.rest) if args.what == "compare" else benchmark(args)


def benchmark(args) -> int:
    """Refuse what cannot be measured, measure all cases in turn, and write rows, samples, tables,
    plots and the verdict.
    """
    from lib.batches import open_train_valid
    from lib.benchmark import cases
    from lib.benchmark import timing as bench
    from lib.benchmark.page import write_benchmark
    from lib.benchmark.verdict import headline, judge
    from lib.config import load_config
    from lib.device import choose_device, control_group_limits, describe_machine, resolve_threads
    from lib.rundir import environment

    cfg = resolve_threads(
        load_config(overrides=args.rest + ([f"data_dir={args.data}"] if args.data else []))
    )
    device = choose_device(args.device)
    sizes = args.batch_sizes or ([cfg.batch_size] if args.what == "loader" else list(cases.SIZES))
    if wrong := [size for size in sizes if size % cfg.shards]:
        raise BadInput(f"batch size {wrong[0]} must be a multiple of shards ({cfg.shards})")
    open_train_valid(cfg)
    if not args.allow_noise:
        bench.require_quiet()
    job = bench.describe_job(machine := describe_machine(device))
    about, machine = (
        {name: value for name, value in each.items() if name not in PLACES}
        for each in (environment(), machine)
    )
    stamp = datetime.datetime.now(datetime.UTC).strftime("%Y%m%dT%H%M%SZ")
    out = Path(
        args.out
        or f"bench/{job['partition']}-{stamp if job['job_id'] == 'none' else job['job_id']}"
    )
    result = {
        "what": args.what,
        "seconds": args.seconds,
        "repeats": args.repeats,
        "data": cfg.data_dir,
    }
    result |= {
        "config": cfg.as_dict(),
        "machine": machine | control_group_limits(),
        "environment": about,
    }
    measured = {}

    def keep() -> None:  # after each round, so that a job at its time limit leaves something
        result["rows"] = bench.build_rows(measured, job)
        result["verdict"] = judge(result["rows"])
        write_benchmark(out, result, bench.samples_of(measured))
        say(f"{out}: {sum(map(len, measured.values()))} repeats are kept")

    planned, probed = cases.plan_cases(
        args.what, cfg, sizes, device, args.cases.split(",") if args.cases else []
    )
    with tempfile.TemporaryDirectory(prefix="compiled-") as cache:
        run = functools.partial(
            bench.run_cases, results=measured, seconds=args.seconds, cache_dir=cache, keep=keep
        )
        for probes in probed:
            run(probes, repeats=1)
            best = max(probes, key=lambda case: bench.rate_of(measured[case]))
            del measured[best]  # what it was chosen by does not count
            planned += [best, dataclasses.replace(best, cache="cold")]
        run(planned, repeats=args.repeats)
    rows, verdict = result["rows"], result["verdict"]
    states = {
        state: sum(row["status"] == state for row in rows)
        for state in dict.fromkeys(row["status"] for row in rows)
    }
    say(verdict["sentence"])
    say(f"{out}/benchmark.md: " + ", ".join(f"{num} rows {state}" for state, num in states.items()))
    found = headline(rows, args.what, cfg.model, cases.size_of_variants(cfg, sizes))
    print_result(
        found
        | {
            "out": str(out),
            "statuses": states,
            "verdict": verdict,
            "machine": result["machine"],
            "rows": rows,
        }
    )
    return EXIT_DONE if any(row["p50_s"] for row in rows) else EXIT_FINDING


def compare(before: str, after: str) -> int:
    """Say for each row of both whether they differ by more than the noise; exit 1 where the second
    one is then slower.
    """
    from lib.benchmark.verdict import compare_rows, read_rows
    from lib.blocks import text_table

    rows = compare_rows(read_rows(before), read_rows(after))
    words = {None: "cannot be told", False: "within the noise"}
    header = [
        "what",
        "case",
        "model",
        "batch_size",
        "precision",
        "cache",
        "ratio",
        "low",
        "high",
        "status",
    ]
    cells = [[row[name] for name in header] for row in rows]
    for cell, row in zip(cells, rows, strict=True):
        cell.append(
            words.get(row["exceeds"], "slower" if row["exceeds"] and row["ratio"] < 1 else "faster")
        )
    say(text_table([*header, "B is"], cells))
    slower = [row for row in rows if row["exceeds"] and row["ratio"] < 1]
    exceeding = sum(bool(row["exceeds"]) for row in rows)
    say(
        f"{len(rows)} rows compared, {exceeding} differ by more than the noise, in {len(slower)} of"
        " them B is slower"
    )
    print_result(
        {
            "num_compared": len(rows),
            "num_exceeding": exceeding,
            "num_slower": len(slower),
            "rows": rows,
        }
    )
    return EXIT_FINDING if slower else EXIT_DONE


if __name__ == "__main__":
    sys.exit(main())
