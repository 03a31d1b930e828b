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
# options that only some verbs have
VERBS_OF = {
    "new_name": ("plan",),
    "config": ("plan",),
    "row": ("run",),
    "all": ("run",),
    "rung": ("run", "promote"),
    "finish": ("promote",),
    "open_test": ("champion",),
}


def parse(argv) -> argparse.Namespace:
    about = "; ".join(f"{name}: {text}" for name, text in VERBS.items())
    parser = Parser(prog="sweep.py", description="Search for hyper-parameters.", epilog=about)
    add = parser.add_argument
    add("verb", choices=VERBS)
    add(
        "name",
        type=place,
        metavar="NAME",
        help="of a planned search; plan: SPACE, a YAML of ranges like assets/space.yaml",
    )
    add("--name", dest="new_name", metavar="NAME", help="plan: of the search (default: the file's)")
    add("--config", default="", metavar="F", help="plan: what the trials vary (config.yaml)")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--row", type=int, metavar="N", help="run: one, such as an array's index")
    which.add_argument("--all", action="store_true", help="run: every row that has no result")
    add("--rung", type=int, metavar="R", help="run, promote: default: the newest one")
    add("--finish", action="store_true", help="promote: first carry out rows without a result")
    add("--open-test", action="store_true", help="champion: score it on test, once, on record")
    add("--sweeps", default="sweeps", metavar="DIR", help="of searches (default: sweeps)")
    add("--runs", default="runs", metavar="DIR", help="of run folders (default: runs)")
    add("--device", default="auto", metavar="D", help="for train.py (default: auto)")
    add("--processes", type=positive, default=1, metavar="K", help="trials at a time (default: 1)")
    add(
        "overrides",
        nargs="*",
        metavar="key=value",
        help="put over the config; after plan only keys that do not change the weights",
    )
    args = parser.parse_intermixed_args(argv)
    for word in args.overrides:
        if "=" not in word:
            parser.error(f"unrecognized argument {word}")
    for name, verbs in VERBS_OF.items():
        is_given = getattr(args, name) != parser.get_default(name)
        if is_given and args.verb not in verbs:
            option = "--" + name.removeprefix("new_").replace("_", "-")
            parser.error(f"{option} is of {' and '.join(verbs)}, not of {args.verb}")
    if args.verb == "run" and args.row is None and not args.all:
        parser.error("run needs --row N or --all")
    return args


@script
def main(argv=None) -> int:
    args = parse(argv)
    if args.verb == "plan":
        return plan(args)

    from lib.sweep import rungs

    sweep = rungs.load_sweep(Path(args.sweeps) / args.name, args.runs)
    rung = args.rung
    if rung is None:
        is_repeated = args.verb == "promote" and not args.finish
        rung = sweep.rung_to_promote() if is_repeated else sweep.newest_rung()
    result = {"rung": rung}
    if args.verb == "champion":
        rung, result = sweep.num_rungs, {}
        if sweep.newest_rung() < rung:
            rungs.promote(sweep, rung - 1)
    if args.verb != "promote" or args.finish:
        result |= run_rung(sweep, rung, args)
    if not result.get("interrupted"):
        if args.verb == "promote":
            result |= promote(sweep, rung)
        if args.verb == "champion":
            result |= choose(sweep, args)
    print_result(result)
    return exit_code(result)


def exit_code(result: dict) -> int:
    """A finding is a row that failed, or one that has no result and nobody is at, or that there is
    no champion.
    """
    if result.get("interrupted"):
        return EXIT_INTERRUPTED
    num_open = result.get("num_todo", 0) - result.get("num_elsewhere", 0)
    is_found = result.get("num_failed") or num_open > 0 or not result.get("champion", True)
    return EXIT_FINDING if is_found else EXIT_DONE


def plan(args) -> int:
    """Freeze the trials, and say how many trainings follow and for how long."""
    import numpy as np

    from lib.config import DEFAULT_PATH, load_config
    from lib.cost import measure_training
    from lib.progress import format_duration
    from lib.sweep.design import freeze
    from lib.sweep.rungs import load_sweep

    folder = Path(args.sweeps) / (args.new_name or Path(args.name).stem)
    freeze(folder, args.name, args.config or DEFAULT_PATH, args.overrides)
    sweep = load_sweep(folder, args.runs)
    path, epochs, sha256 = folder / "plan.json", sweep.plan["rungs"], sweep.plan["sha256"]
    num_trials = len(sweep.plan["trials"])
    say(f"{path}: {num_trials} trials, rungs of {epochs} epochs, SHA-256 {sha256}")
    num_rows = [sweep.num_rows(rung) for rung in range(sweep.num_rungs + 1)]
    num_trainings = num_rows[0] + num_rows[-1]
    # each rung trains on from the one before, and the finalists from the beginning
    num_epochs = int(np.dot(num_rows, [*np.diff(epochs, prepend=0), epochs[-1]]))
    cfg = load_config(folder / "config.yaml")
    try:
        seconds = measure_training(cfg)["seconds"] * num_epochs / cfg.epochs
        duration = f"about {format_duration(seconds)} of the config as it is, one after the other"
    except BadInput as error:
        seconds, duration = None, f"for how long is not known: {error}"
    say(f"{num_trainings} trainings of {num_epochs} epochs in all follow, {duration}")
    result = {"plan": str(path), "sha256": sha256, "num_trials": num_trials, "num_rows": num_rows}
    result |= {"num_trainings": num_trainings, "num_epochs": num_epochs, "seconds": seconds}
    print_result(result)
    return EXIT_DONE


def run_rung(sweep, rung: int, args) -> dict:
    """Carry out a rung, or one row of it; the counts of what has become of the rows."""
    from lib.device import warn_of_unusable_gpu
    from lib.sweep import trainers
    from lib.sweep.rungs import outcome

    rows = sweep.rows(rung)
    if args.row is not None:
        num_rows = sweep.num_rows(rung)
        if args.row not in range(num_rows):
            raise BadInput(f"--row {args.row}: rung {rung} has the rows 0 to {num_rows - 1}")
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
    counts = [f"{num} {name[4:]}" for name, num in result.items() if name.startswith("num_")]
    say(f"rung {rung} of {sweep.folder}: {', '.join(counts)}")
    return result


def promote(sweep, rung: int) -> dict:
    """Write the next rung, and the page as it is then."""
    from lib.sweep import rungs
    from lib.sweep.page import write_sweep_page

    path = rungs.promote(sweep, rung)
    trials, page = sweep.promoted(rung), str(write_sweep_page(sweep))
    say(f"{path}: {', '.join(trials)}; page {page}")
    return {"next": str(path), "trials": trials, "page": page}


def choose(sweep, args) -> dict:
    """Say which of the trained finalists is the champion, if any."""
    from lib.files import write_json
    from lib.sweep.champion import choose_champion
    from lib.sweep.page import write_sweep_page

    champion = choose_champion(sweep)
    write_json(sweep.folder / "champion.json", champion)
    say(champion["note"])
    result = champion | {"page": str(write_sweep_page(sweep, champion))}
    if args.open_test:
        result["test"] = open_test(sweep, champion["run"], args)
    return result


def open_test(sweep, run: str | None, args) -> dict:
    """Score the champion's run on the test split, once for these data and folder of searches, and
    write down who did.

    The record comes before the score, so that no crash can hide an opening. Without a score the
    same run may be tried again.
    """
    from lib.config import load_config
    from lib.files import read_json, utc_now, write_json
    from lib.fingerprint import fingerprint
    from lib.rundir import git_state

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
        with open(record, "x") as file:  # of two at once one gets it
            file.write(json.dumps(opening))
    except FileExistsError:
        opening = read_json(record)
        if opening["auc"] is not None or opening["run"] != run:
            first = "by {who} at {when_utc} for {run} (commit {commit}): AUC {auc}"
            reason = f"opened once, and was, {first.format(**opening)}; see {record}"
            raise BadInput(f"the test split is {reason}") from None
    out = sweep.folder / "test_predictions.csv"
    arguments = ("--ckpt", run, data, "--split", "test", "--out", out, "--device", args.device)
    scores = run_script("inference.py", *arguments, shows_progress=True)["scores"]
    opening |= {"auc": scores["auc"], "scores": scores, "predictions": str(out)}
    write_json(record, opening)
    return opening


if __name__ == "__main__":
    sys.exit(main())
