"""Measure throughput on the user's own files, all cases in turn and several times, and say what
holds it up.

python benchmark.py loader|infer|train|all [--data DIR] [--out OUT] [--batch-sizes 1,8,...]
                                           [key=value ...]
python benchmark.py compare A B
"""

import argparse
import datetime
import sys
import tempfile
from collections import Counter
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
    "loader": "ways to a batch: cold and warm file, random and in order, beside torchvision's PCAM",
    "infer": "a small and a large model over batch sizes, and variants",
    "train": "the step of train.py likewise, its stages, and which of them is the bottleneck",
    "all": "all of these",
}
# of this machine alone: a benchmark is shown to others
PLACES = ("argv", "cwd", "host", "pid", "submitted")


def parse(argv) -> argparse.Namespace:
    parser = Parser(
        prog="benchmark.py",
        usage="python benchmark.py all --data data/mine",
        description="Measure throughput on your own files.",
    )
    verbs = parser.add_subparsers(dest="what", required=True, prog="benchmark.py")
    for what, text in WHAT.items():
        verb = verbs.add_parser(what, help=text)
        add = verb.add_argument
        add("--data", metavar="DIR", type=place, help="PCam folder (default: data_dir)")
        add("--out", type=place, metavar="OUT", help="a folder (default: below bench/)")
        add(
            "--batch-sizes",
            type=batch_sizes,
            default=[],
            metavar="B,...",
            help="infer and train then measure the models at these, and nothing else (default:"
            " 1,8,...,512; of loader: batch_size)",
        )
        add(
            "--cases",
            type=lambda names: names.split(","),
            default=[],
            metavar="LIST",
            help="only these, as rows.csv names them (default: all)",
        )
        add("--seconds", type=float, default=0.4, metavar="S", help="of a case (default: 0.4)")
        add("--repeats", type=positive, default=3, metavar="N", help="of all (default: 3)")
        add("--allow-noise", action="store_true", help="measure on a busy machine, too")
        verb.add_device()
    verb = verbs.add_parser("compare", help="does B differ from A by more than the noise")
    verb.add_argument("before", metavar="A")
    verb.add_argument("after", metavar="B")
    return parser.parse_with_overrides(argv)


def batch_sizes(text: str) -> list[int]:
    """An argument such as 1,8,64."""
    return sorted({positive(size) for size in text.split(",")})


@script
def main(argv=None) -> int:
    args = parse(argv)
    return compare(args.before, args.after) if args.what == "compare" else benchmark(args)


def benchmark(args) -> int:
    """Refuse what cannot be measured, measure all cases in turn, and write rows, tables, plots and
    the verdict.
    """
    from lib.batches import open_train_valid
    from lib.benchmark import plan, rounds
    from lib.benchmark.page import write_benchmark
    from lib.benchmark.timing import require_quiet
    from lib.benchmark.verdict import headline, judge
    from lib.config import load_config
    from lib.device import choose_device, resolve_precision
    from lib.machine import describe_machine, resolve_threads
    from lib.rundir import environment

    data = [f"data_dir={args.data}"] if args.data else []
    if args.seconds <= 0:
        raise BadInput("--seconds must be above 0")
    device = choose_device(args.device)
    cfg = resolve_threads(load_config(overrides=args.overrides + data))
    cfg = resolve_precision(cfg, device)
    sizes, names = args.batch_sizes, args.cases
    if sizes and not names and args.what in ("infer", "train"):
        names = ["default"]
    sizes = sizes or ([cfg.batch_size] if args.what == "loader" else list(plan.SIZES))
    open_train_valid(cfg)
    cases = plan.plan_cases(args.what, cfg, sizes, device, names)
    if not args.allow_noise:
        require_quiet()
    machine = describe_machine(device)
    about = environment()
    job = rounds.describe_job(machine, about)
    out = Path(args.out or default_folder(job))
    for name in PLACES:
        machine.pop(name, None)
        about.pop(name, None)
    result = {
        "what": args.what,
        "seconds": args.seconds,
        "repeats": args.repeats,
        "data": cfg.data_dir,
        "config": cfg.as_dict(),
        "machine": machine,
        "environment": about,
    }
    outcomes = {}

    def keep() -> None:  # after each round, so that a job at its time limit leaves something
        result["rows"] = rounds.build_rows(outcomes, job)
        result["verdict"] = judge(result["rows"])
        write_benchmark(out, result)

    say(f"{len(cases)} cases, {args.repeats} times")
    with tempfile.TemporaryDirectory(prefix="benchmark-") as cache:
        rounds.run_cases(cases, outcomes, args.seconds, args.repeats, cache, keep)
    rows, verdict = result["rows"], result["verdict"]
    statuses = Counter(row["status"] for row in rows)
    say("\n".join(verdict["sentences"]))
    say(f"{out}/benchmark.md: {len(rows)} rows")
    summary = headline(rows, args.what, cfg, plan.size_of_variants(cfg, sizes))
    summary |= {"out": str(out), "statuses": statuses, "verdict": verdict}
    print_result(summary | {"machine": machine, "rows": rows})
    return EXIT_DONE if any(row["p50_s"] for row in rows) else EXIT_FINDING


def default_folder(job: dict) -> str:
    """Where a benchmark is written: after its partition, and its job or the time."""
    number = job["job_id"]
    if number == "none":
        number = datetime.datetime.now(datetime.UTC).strftime("%Y%m%dT%H%M%SZ")
    return f"bench/{job['partition']}-{number}"


def compare(before: str, after: str) -> int:
    """Say for each row of both whether they differ by more than the noise; exit 1 where the second
    one is then slower.
    """
    from lib.benchmark.verdict import compare_rows, read_rows
    from lib.blocks import table_of

    rows = compare_rows(read_rows(before), read_rows(after))
    columns = ("what", "case", "model", "batch_size", "precision", "cache", "ratio", "low", "high")
    say(table_of(rows, (*columns, "status", "B is")).to_text())
    answers = Counter(row["B is"] for row in rows)
    counts = {
        "num_compared": len(rows),
        "num_exceeding": answers["slower"] + answers["faster"],
        "num_slower": answers["slower"],
    }
    say(
        "{num_compared} rows compared, {num_exceeding} differ by more than the noise, in"
        " {num_slower} of them B is slower".format(**counts)
    )
    print_result({**counts, "rows": rows})
    return EXIT_FINDING if answers["slower"] else EXIT_DONE


if __name__ == "__main__":
    sys.exit(main())
