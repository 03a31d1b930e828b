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

VERBS = {
    "plan": "freeze the trials of a search into sweeps/NAME/plan.json",
    "run": "carry out rows of a rung; what is done is not done again",
    "promote": "write the next rung: the best third of one that is over",
    "champion": "the best three and the plain config on fresh seeds; the page",
}
EPILOG = "key=value ...: put over the config; after plan only keys that do not change the weights"


def parse(argv) -> argparse.Namespace:
    parser = Parser(
        prog="sweep.py",
        description="Search for hyper-parameters: plan, run, promote, and choose a champion.",
    )
    commands = parser.add_subparsers(dest="verb", required=True, metavar="|".join(VERBS))
    verbs = {name: commands.add_parser(name, help=text) for name, text in VERBS.items()}
    add = verbs["plan"].add_argument
    add("space", metavar="SPACE", help="YAML of ranges, like assets/space.yaml")
    add("--name", default="", help="of the search (default: that of the file)")
    add("--config", default="", metavar="F", help="what the trials vary (default: config.yaml)")
    which = verbs["run"].add_mutually_exclusive_group(required=True)
    which.add_argument("--row", type=int, metavar="N", help="one row, such as an array's index")
    which.add_argument("--all", action="store_true", help="every row that has no result")
    for name, verb in verbs.items():
        verb.epilog = EPILOG
        verb.set_defaults(row=None, rung=None, finish=name == "run", open_test=False)
        add = verb.add_argument
        add("--sweeps", default="sweeps", metavar="DIR", help="of searches (default: sweeps)")
        if name == "plan":
            continue
        add("name", metavar="NAME", type=place, help="of a planned search")
        add("--runs", default="runs", metavar="DIR", help="of run folders (default: runs)")
        add("--device", default="auto", metavar="D", help="for train.py (default: auto)")
        text = "trials at a time (default: 1)"
        add("--processes", type=positive, default=1, metavar="K", help=text)
        if name != "champion":
            add("--rung", type=int, metavar="R", help="default: the newest one")
        if name != "run":
            text = "first carry out here the rows without a result"
            add("--finish", action="store_true", help=text)
    text = "score it on the test split: once, and on record"
    verbs["champion"].add_argument("--open-test", action="store_true", help=text)
    args, args.overrides = parser.parse_known_args(argv)
    for word in args.overrides:
        if word.startswith("-") or "=" not in word:
            parser.error(f"unrecognized argument {word}")
    return args


@script
def main(argv=None) -> int:
    args = parse(argv)
    if args.verb == "plan":
        return plan(args)

    from lib.sweep import rungs

    sweep = rungs.load_sweep(Path(args.sweeps) / args.name, args.runs)
    if args.verb == "champion":
        return choose(sweep, args)
    rung = args.rung
    if rung is None:
        waits = args.verb == "promote" and not args.finish
        rung = sweep.started_rung() if waits else sweep.newest_rung()
    result = {"rung": rung}
    if args.finish:
        result |= run_rung(sweep, rung, args)
    if args.verb == "promote" and not result.get("interrupted"):
        from lib.sweep.page import write_sweep_page  # matplotlib takes a second to import

        path = rungs.promote(sweep, rung)
        trials, page = sweep.promoted(rung), str(write_sweep_page(sweep))
        result |= {"next": str(path), "trials": trials, "page": page}
        say(f"{path}: {', '.join(trials)}; page {page}")
    print_result(result)
    return exit_code(result)


def exit_code(result: dict) -> int:
    """A finding is a row that failed, or one that has no result and nobody is at."""
    if result.get("interrupted"):
        return EXIT_INTERRUPTED
    num_open = result.get("num_todo", 0) - result.get("num_elsewhere", 0)
    return EXIT_FINDING if result.get("num_failed") or num_open > 0 else EXIT_DONE


def plan(args) -> int:
    """Freeze the trials, and say how many trainings follow and for how long."""
    from lib.config import DEFAULT_PATH, load_config
    from lib.cost import measure_training
    from lib.progress import format_duration
    from lib.sweep.design import freeze
    from lib.sweep.rungs import load_sweep

    folder = Path(args.sweeps) / (args.name or Path(args.space).stem)
    frozen = freeze(folder, args.space, args.config or DEFAULT_PATH, args.overrides)
    sweep = load_sweep(folder, "runs")
    num_rows = [sweep.num_rows(rung) for rung in range(sweep.num_rungs + 1)]
    num_trainings, num_epochs = num_rows[0] + num_rows[-1], sweep.num_epochs()
    say(
        f"{folder}/plan.json: {len(frozen['trials'])} trials, rungs of {frozen['rungs']} epochs,"
        f" SHA-256 {frozen['sha256']}"
    )
    cfg = load_config(folder / "config.yaml")
    try:
        seconds = measure_training(cfg)["seconds"] * num_epochs / cfg.epochs
        duration = f"about {format_duration(seconds)} of the config as it is, one after the other"
    except BadInput as error:
        seconds, duration = None, f"for how long is not known: {error}"
    say(f"{num_trainings} trainings of {num_epochs} epochs in all follow, {duration}")
    print_result(
        {
            "plan": str(folder / "plan.json"),
            "sha256": frozen["sha256"],
            "num_trials": len(frozen["trials"]),
            "num_rows": num_rows,
            "num_trainings": num_trainings,
            "num_epochs": num_epochs,
            "seconds": seconds,
        }
    )
    return EXIT_DONE


def run_rung(sweep, rung: int, args) -> dict:
    """Carry out a rung, or one row of it; the counts of what has become of the rows."""
    from lib.device import warn_of_unusable_gpu
    from lib.sweep import trainers
    from lib.sweep.rungs import outcome

    rows, num_rows = sweep.rows(rung), sweep.num_rows(rung)
    if args.row is not None:
        if not 0 <= args.row < num_rows:
            where = f"rung {rung} of {sweep.folder} has the rows 0 to {num_rows - 1}"
            raise BadInput(f"--row {args.row}: {where}")
        # empty where trials failed and so fewer were promoted than planned
        rows = rows[args.row : args.row + 1]
    if any(outcome(sweep, row)["state"] == "todo" for row in rows):
        trainers.require_comparable(sweep, args.overrides)
        if args.device == "auto":
            warn_of_unusable_gpu()  # here, since what a trainer says goes to its log
    arguments = ["--device", args.device, *args.overrides]
    result = trainers.run_rows(sweep, rows, args.processes, arguments)
    for row in rows:
        ending = outcome(sweep, row)
        if ending["state"] == "failed":
            say(f"{row} failed: {ending['reason']}")
    names = [name for name in result if name.startswith("num_")]
    counts = ", ".join(f"{result[name]} {name.removeprefix('num_')}" for name in names)
    say(f"rung {rung} of {sweep.folder}: {counts}")
    return result


def choose(sweep, args) -> int:
    """Train the finalists on fresh seeds, where that is not done yet, and say which is the
    champion, if any.
    """
    from lib.files import write_json
    from lib.sweep.champion import choose_champion
    from lib.sweep.page import write_sweep_page
    from lib.sweep.rungs import promote

    if not sweep.rung_file(sweep.num_rungs).is_file():
        promote(sweep, sweep.num_rungs - 1)
    result = run_rung(sweep, sweep.num_rungs, args)
    if not result["interrupted"]:
        champion = choose_champion(sweep)
        write_json(sweep.folder / "champion.json", champion)
        say(champion["note"])
        result |= champion | {"page": str(write_sweep_page(sweep, champion))}
        if args.open_test:
            result["test"] = open_test(sweep, champion, args)
    print_result(result)
    has_none = not result["interrupted"] and not champion["champion"]
    return EXIT_FINDING if has_none else exit_code(result)


def open_test(sweep, champion: dict, args) -> dict:
    """Score the champion's run on the test split, once for these data and folder of searches, and
    write down who did.

    The record comes before the score, so that no crash can hide an opening; without a score the
    same run may be scored again.
    """
    from lib.config import load_config
    from lib.files import read_json, utc_now, write_json
    from lib.fingerprint import fingerprint
    from lib.rundir import git_state

    run = champion["run"]
    if not run:
        raise BadInput(f"{sweep.folder} has no champion: the test split stays closed")
    data = load_config(sweep.folder / "config.yaml", args.overrides).data_dir
    digest = "-".join(value[:8] for value in fingerprint(data, ["test"]).values())
    record = Path(args.sweeps) / f"test-opened-{digest}.json"
    opening = {
        "when_utc": utc_now(),
        "who": getpass.getuser(),
        "commit": git_state()["commit"],
        "search": str(sweep.folder),
        "run": run,
        "auc": None,
    }
    try:
        with open(record, "x") as file:
            file.write(json.dumps(opening))
    except FileExistsError:
        opening = read_json(record)
        if opening["auc"] is not None or opening["run"] != run:
            first = "by {who} at {when_utc} for {run} (commit {commit}): AUC {auc}"
            reason = f"opened once, and was, {first.format(**opening)}; see {record}"
            raise BadInput(f"the test split is {reason}") from None
    out = sweep.folder / "test_predictions.csv"
    arguments = ("--ckpt", run, data, "--split", "test", "--out", out, "--device", args.device)
    try:
        scores = run_script("inference.py", *arguments, shows_progress=True)["scores"]
    except BadInput:  # inference.py has said why
        reason = f"could not be scored on the test split of {data}; the opening stands in {record}"
        raise BadInput(f"{run} {reason}") from None
    opening |= {"auc": scores["auc"], "scores": scores, "predictions": str(out)}
    write_json(record, opening)
    return opening


if __name__ == "__main__":
    sys.exit(main())
