"""Hyper-parameter search: a frozen design, promotion by halving, a champion on fresh seeds.

python sweep.py plan SPACE [--name NAME] [--config F] [key=value ...]
python sweep.py run NAME --row N | --all [--rung R] [--processes K] [key=value ...]
python sweep.py promote NAME [--rung R] [--finish]
python sweep.py champion NAME [--finish] [--open-test]
"""

import argparse
import getpass
import json
import sys
from pathlib import Path

from lib.command import (
    EXIT_DONE,
    EXIT_FINDING,
    EXIT_INTERRUPTED,
    BadInput,
    Parser,
    place,
    positive,
    print_result,
    run_script,
    say,
    script,
)
from lib.config import DEFAULT_PATH, load_config
from lib.files import read_json, utc_now, write_json
from lib.rundir import git_state
from lib.sweep import search


def parse(argv) -> argparse.Namespace:
    parser = Parser(
        prog="sweep.py",
        description="Search for hyper-parameters: plan, run, promote, and crown a champion.",
    )
    commands = parser.add_subparsers(
        dest="verb", required=True, metavar="plan|run|promote|champion"
    )
    plan = commands.add_parser(
        "plan", help="freeze the trials of a search into sweeps/NAME/plan.json"
    )
    plan.add_argument("space", metavar="SPACE", help="YAML of ranges, like assets/space.yaml")
    plan.add_argument("--name", default="", help="of the search (default: that of the file)")
    plan.add_argument(
        "--config", default="", metavar="F", help="what the trials vary (default: config.yaml)"
    )
    run = commands.add_parser(
        "run", help="carry out rows of a rung; what is done is not done again"
    )
    which = run.add_mutually_exclusive_group(required=True)
    which.add_argument("--row", type=int, metavar="N", help="one row, such as an array's index")
    which.add_argument("--all", action="store_true", help="every row that has no result")
    promote = commands.add_parser(
        "promote", help="write the next rung: the best third of one that is over"
    )
    champion = commands.add_parser(
        "champion", help="the best three and the plain config on fresh seeds; the page"
    )
    champion.add_argument(
        "--open-test", action="store_true", help="score it on the test split: once, and on record"
    )
    for verb in (run, promote, champion):
        verb.add_argument("name", metavar="NAME", type=place, help="of a planned search")
        verb.add_argument(
            "--processes",
            type=positive,
            default=1,
            metavar="K",
            help="trials at a time (default: 1)",
        )
        verb.add_argument(
            "--device", default="auto", metavar="D", help="for train.py (default: auto)"
        )
        verb.add_argument(
            "--runs",
            default="runs",
            metavar="DIR",
            help="where the run folders are (default: runs)",
        )
    for verb in (run, promote):
        verb.add_argument("--rung", type=int, metavar="R", help="default: the newest one")
    for verb in (promote, champion):
        verb.add_argument(
            "--finish", action="store_true", help="first carry out here the rows without a result"
        )
    for verb in (plan, run, promote, champion):
        verb.add_argument(
            "--sweeps",
            default="sweeps",
            metavar="DIR",
            help="where the searches are (default: sweeps)",
        )
        verb.epilog = (
            "key=value ...: put over the config; after plan only keys that do not change the"
            " weights"
        )
    args, args.overrides = parser.parse_known_args(argv)
    if wrong := [word for word in args.overrides if word.startswith("-") or "=" not in word]:
        parser.error(f"unrecognized argument {wrong[0]}")
    return args


@script
def main(argv=None) -> int:
    args = parse(argv)
    folder = Path(args.sweeps) / (args.name or Path(args.space).stem)
    if args.verb == "plan":
        plan = search.freeze(folder, args.space, args.config or DEFAULT_PATH, args.overrides)
        say(
            f"{folder}/plan.json: {len(plan['trials'])} trials, rungs of {plan['rungs']} epochs,"
            f" SHA-256 {plan['sha256']}"
        )
        planned = search.load_sweep(folder, "runs")
        num_rows = [planned.num_rows(rung) for rung in range(planned.num_rungs + 1)]
        print_result(
            {
                "plan": str(folder / "plan.json"),
                "sha256": plan["sha256"],
                "num_trials": len(plan["trials"]),
                "num_rows": num_rows,
            }
        )
        return EXIT_DONE
    sweep = search.load_sweep(folder, args.runs)
    if args.verb == "champion":
        return crown(sweep, args)
    newest = (
        search.started_rung(sweep)
        if args.verb == "promote" and not args.finish
        else sweep.newest_rung()
    )
    rung = newest if args.rung is None else args.rung
    result = {"rung": rung}
    if args.verb == "run" or args.finish:
        result |= run_rung(sweep, rung, args)
    if args.verb == "promote" and not result.get("interrupted"):
        path = search.promote(sweep, rung)
        from lib.sweep.page import write_sweep_page  # matplotlib takes a second to import

        page = write_sweep_page(sweep)
        result |= {"next": str(path), "trials": read_json(path)["trials"], "page": str(page)}
        say(f"{path}: {', '.join(result['trials'])}; page {page}")
    print_result(result)
    return (
        EXIT_INTERRUPTED
        if result.get("interrupted")
        else EXIT_FINDING
        if is_open(result)
        else EXIT_DONE
    )


def is_open(result: dict) -> bool:
    """Whether a row failed, or has no result and nobody is at it."""
    return bool(
        result.get("num_failed") or result.get("num_todo", 0) > result.get("num_elsewhere", 0)
    )


def run_rung(sweep, rung: int, args) -> dict:
    """Carry out a rung, or one row of it; the counts of what has become of the rows."""
    rows, row = sweep.rows(rung), getattr(args, "row", None)
    if row is not None:
        if not 0 <= row < sweep.num_rows(rung):
            raise BadInput(
                f"--row {row}: rung {rung} of {sweep.folder} has the rows 0 to"
                f" {sweep.num_rows(rung) - 1}"
            )
        # empty where trials failed and so fewer were promoted than planned
        rows = rows[row : row + 1]
    if any(search.outcome(sweep, each)["state"] == "todo" for each in rows):
        search.require_comparable(sweep, args.overrides)
        if args.device == "auto":
            from lib.device import warn_of_unusable_gpu

            warn_of_unusable_gpu()  # here, since what a trainer says goes to its log
    result = search.run_rows(
        sweep, rows, args.processes, ["--device", args.device, *args.overrides]
    )
    for each in rows:
        if (found := search.outcome(sweep, each))["state"] == "failed":
            say(f"{each} failed: {found['reason']}")
    counts = ", ".join(
        f"{value} {key.removeprefix('num_')}"
        for key, value in result.items()
        if key.startswith("num_")
    )
    say(f"rung {rung} of {sweep.folder}: {counts}")
    return result


def crown(sweep, args) -> int:
    """Train the finalists on fresh seeds, where that is not done yet, and say which is the
    champion.
    """
    if not sweep.rung_file(sweep.num_rungs).is_file():
        search.promote(sweep, sweep.num_rungs - 1)
    result = run_rung(sweep, sweep.num_rungs, args)
    if not result["interrupted"]:
        from lib.sweep.page import write_sweep_page

        champion = search.choose_champion(sweep)
        write_json(sweep.folder / "champion.json", champion)
        say(champion["note"])
        result |= champion | {"page": str(write_sweep_page(sweep, champion))}
        if args.open_test:
            result["test"] = open_test(sweep, champion, args)
    print_result(result)
    return (
        EXIT_INTERRUPTED
        if result["interrupted"]
        else EXIT_FINDING
        if is_open(result)
        else EXIT_DONE
    )


def open_test(sweep, champion: dict, args) -> dict:
    """Score the champion's run on the test split, once for these data and folder of searches, and
    write down who did.

    The record comes before the score, so that no crash can hide an opening; without a score the
    same run may be scored again.
    """
    from lib.fingerprint import fingerprint

    data = load_config(sweep.folder / "config.yaml", args.overrides).data_dir
    digest = "-".join(value[:8] for value in fingerprint(data, ["test"]).values())
    record = Path(args.sweeps) / f"test-opened-{digest}.json"
    opening = {"when_utc": utc_now(), "who": getpass.getuser()}
    opening |= {
        "commit": git_state()["commit"],
        "search": str(sweep.folder),
        "run": champion["run"],
        "auc": None,
    }
    try:
        with open(record, "x") as file:
            file.write(json.dumps(opening))
    except FileExistsError:
        first = read_json(record)
        if first["auc"] is not None or first["run"] != champion["run"]:
            what = (
                f"by {first['who']} at {first['when_utc']} for {first['run']} (commit"
                f" {first['commit']}): AUC {first['auc']}"
            )
            raise BadInput(
                f"the test split is opened once, and was, {what}; see {record}"
            ) from None
        opening = first
    out = sweep.folder / "test_predictions.csv"
    inputs = ("--ckpt", champion["run"], data, "--split", "test")
    outputs = ("--out", out, "--device", args.device)
    try:
        scores = run_script("inference.py", *inputs, *outputs, shows_progress=True)["scores"]
    except BadInput:  # inference.py has said why
        raise BadInput(
            f"{champion['run']} could not be scored on the test split of {data}; the opening stands"
            f" in {record}"
        ) from None
    opening |= {"auc": scores["auc"], "scores": scores, "predictions": str(out)}
    write_json(record, opening)
    return opening


if __name__ == "__main__":
    sys.exit(main())
