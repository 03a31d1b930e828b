"""Hyper-parameter search: a frozen design, promotion by halving, a champion on fresh seeds.

python sweep.py plan SPACE [--name NAME] [--config F] [key=value ...]
python sweep.py run NAME --row N | --all [--rung R] [--processes K] [key=value ...]
python sweep.py promote NAME [--rung R] [--finish]
python sweep.py champion NAME
"""

import argparse
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
    say,
    script,
)


def parse(argv) -> argparse.Namespace:
    parser = Parser(
        prog="sweep.py",
        usage="python sweep.py plan assets/space.yaml data_dir=data/mine",
        description="Search for hyper-parameters: plan, then run and promote each rung, champion.",
    )
    verbs = parser.add_subparsers(dest="verb", required=True, prog="sweep.py")

    def add_verb(name: str, text: str, metavar: str = "NAME") -> Parser:
        verb = verbs.add_parser(name, help=text)
        add = verb.add_argument
        add("name", type=place, metavar=metavar, help="of a planned search; plan: a YAML of ranges")
        add("--sweeps", default="sweeps", metavar="DIR", help="of searches (default: sweeps)")
        add("--runs", default="runs", metavar="DIR", help="of run folders (default: runs)")
        add("--processes", type=positive, default=1, metavar="K", help="trials at a time")
        verb.add_device()
        return verb

    verb = add_verb("plan", "freeze the trials of a search into sweeps/NAME/plan.json", "SPACE")
    verb.add_argument("--name", dest="new_name", metavar="NAME", help="default: the file's")
    verb.add_argument("--config", metavar="F", help="what the trials vary (default: config.yaml)")
    verb = add_verb("run", "carry out rows of a rung; what is done is not done again")
    which = verb.add_mutually_exclusive_group(required=True)
    which.add_argument("--row", type=int, metavar="N", help="one, such as an array's index")
    which.add_argument("--all", action="store_true", help="every row that has no result")
    verb.add_argument("--rung", type=int, metavar="R", help="default: the newest one")
    verb = add_verb("promote", "write the next rung: the best third of one that is over")
    verb.add_argument("--rung", type=int, metavar="R", help="default: the newest one")
    verb.add_argument("--finish", action="store_true", help="first run rows without a result")
    add_verb("champion", "the best three and the plain config on fresh seeds; the page")
    return parser.parse_with_overrides(argv)


@script
def main(argv=None) -> int:
    args = parse(argv)
    if args.verb == "plan":
        return plan(args)

    from lib.files import write_json
    from lib.sweep import rungs
    from lib.sweep.champion import choose_champion
    from lib.sweep.page import write_sweep_page

    sweep = rungs.load_sweep(Path(args.sweeps) / args.name, args.runs)
    if args.verb == "champion":
        rung = sweep.num_rungs
        if sweep.newest_rung() < rung:
            rungs.promote(sweep, rung - 1)
    else:
        rung = sweep.newest_rung() if args.rung is None else args.rung
    result = {"rung": rung}
    if args.verb != "promote" or args.finish:
        result |= run_rung(sweep, rung, args)
    if result.get("interrupted"):
        print_result(result)
        return EXIT_INTERRUPTED
    if args.verb == "promote":
        result["next"] = str(rungs.promote(sweep, rung))
        result["trials"] = sweep.promoted(rung)
        result["page"] = str(write_sweep_page(sweep))
        say("{next}: {trials}; page {page}".format(**result))
    if args.verb == "champion":
        champion = choose_champion(sweep)
        write_json(sweep.folder / "champion.json", champion)
        say(champion["note"])
        result |= champion | {"page": str(write_sweep_page(sweep, champion))}
    print_result(result)
    # a finding: a row failed, or has no result and nobody is at it, or there is no champion
    num_open = result.get("num_todo", 0) - result.get("num_elsewhere", 0)
    is_found = result.get("num_failed") or num_open > 0 or not result.get("champion", True)
    return EXIT_FINDING if is_found else EXIT_DONE


def plan(args) -> int:
    """Freeze the trials, and say how many trainings follow and for how long."""
    from lib.config import DEFAULT_PATH, load_config
    from lib.cost import measure_training
    from lib.progress import format_duration
    from lib.sweep.design import freeze
    from lib.sweep.rungs import load_sweep

    folder = Path(args.sweeps) / (args.new_name or Path(args.name).stem)
    freeze(folder, args.name, args.config or DEFAULT_PATH, args.overrides)
    sweep = load_sweep(folder, args.runs)
    epochs = sweep.plan["rungs"]
    num_rows = [sweep.num_rows(rung) for rung in range(sweep.num_rungs + 1)]
    # each rung trains on from the one before, and the finalists from the beginning
    num_epochs = num_rows[-1] * epochs[-1]
    for num, before, after in zip(num_rows, [0, *epochs], epochs, strict=False):
        num_epochs += num * (after - before)
    result = {
        "plan": str(folder / "plan.json"),
        "sha256": sweep.plan["sha256"],
        "num_trials": len(sweep.plan["trials"]),
        "num_rows": num_rows,
        "num_trainings": num_rows[0] + num_rows[-1],
        "num_epochs": num_epochs,
        "seconds": None,
    }
    cfg = load_config(folder / "config.yaml")
    try:
        result["seconds"] = measure_training(cfg)["seconds"] * num_epochs / cfg.epochs
        duration = f"about {format_duration(result['seconds'])}, one after the other"
    except BadInput as error:
        duration = f"for how long is not known: {error}"
    say(
        "{plan}: {num_trials} trials, SHA-256 {sha256}\n{num_trainings} trainings of {num_epochs}"
        " epochs in all follow, {duration}".format(**result, duration=duration)
    )
    print_result(result)
    return EXIT_DONE


def run_rung(sweep, rung: int, args) -> dict:
    """Carry out a rung, or one row of it; the counts of what has become of the rows."""
    from lib.sweep import trainers
    from lib.sweep.rungs import outcome

    rows = sweep.rows(rung)
    if args.verb == "run" and args.row is not None:
        num_rows = sweep.num_rows(rung)
        if args.row not in range(num_rows):
            raise BadInput(f"--row {args.row}: rung {rung} has the rows 0 to {num_rows - 1}")
        # empty where trials failed and so fewer were promoted than planned
        rows = rows[args.row : args.row + 1]
    if any(outcome(sweep, row)["state"] == "todo" for row in rows):
        trainers.require_comparable(sweep, args.overrides)
    arguments = ["--device", args.device, *args.overrides]
    num_elsewhere, is_stopped = trainers.run_rows(sweep, rows, args.processes, arguments)
    result = {"num_done": 0, "num_failed": 0, "num_todo": 0, "num_elsewhere": num_elsewhere}
    for row in rows:
        ending = outcome(sweep, row)
        result[f"num_{ending['state']}"] += 1
        if ending["state"] == "failed":
            say(f"{row} failed: {ending['reason']}")
    counts = "{num_done} done, {num_failed} failed, {num_todo} todo, {num_elsewhere} elsewhere"
    say(f"rung {rung} of {sweep.folder}: {counts.format(**result)}")
    return result | {"interrupted": is_stopped}


if __name__ == "__main__":
    sys.exit(main())
