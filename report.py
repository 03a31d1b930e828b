"""Pages and tables from what runs have left on disk.

python report.py run RUN [--predictions FILE] [--threshold T] [--out FILE]
python report.py runs [--runs DIR] [--where 'val_auc>0.9'] [--sort=-val_auc] [--html FILE]
python report.py seeds RUN...|--where ... [--html FILE]
python report.py folds RUN...|--where ... [--html FILE]
python report.py export --to tensorboard|mlflow --out DIR [--runs DIR] [--where ...]
python report.py handover [RUN] --to DIR [--platform P] [--python 3.X] [--wheels DIR]
python report.py journal [FILE] [--check]
python report.py assignment
"""

import argparse
import platform
import sys
from pathlib import Path

from lib.command import (
    EXIT_DONE,
    EXIT_FINDING,
    REPOSITORY,
    BadInput,
    Parser,
    place,
    print_result,
    probability,
    say,
    script,
)

CHAMPION = REPOSITORY / "assets" / "champion"
SPREAD_NOTE = (
    "The interval is that of the mean (Student's t). Folds share most of their training patches, so"
    " that theirs is narrower than it should be (Bengio and Grandvalet 2004)."
)


def parse(argv) -> argparse.Namespace:
    parser = Parser(
        usage="python report.py runs --html runs.html [options]",
        description="Pages and tables from what runs have left on disk.",
    )
    verbs = parser.add_subparsers(dest="what", required=True, prog="report.py")
    commands = {name: verbs.add_parser(name, help=words) for name, (_, words) in COMMANDS.items()}

    add = commands["run"].add_argument
    add("run", metavar="RUN", help="a run folder")
    add("--predictions", metavar="FILE", help="a predictions.csv with labels: scores and examples")
    add("--threshold", type=probability, help="default: the stored one")
    add("--remark", default="", help="a sentence for the top of the page")
    add("--out", metavar="FILE", help="default: RUN/report.html")

    for name in ("runs", "seeds", "folds", "export"):
        add = commands[name].add_argument
        if name in ("seeds", "folds"):
            add("folders", nargs="*", metavar="RUN", help="finished runs that differ in it alone")
        add("--runs", default="runs", metavar="DIR", help="where they are: runs/")
        conditions = (
            "only runs of which this holds, such as 'val_auc>0.9' or seed=1; all of several"
        )
        add("--where", action="append", default=[], help=conditions)
        if name != "export":
            add("--html", metavar="FILE", help="a page with their curves together")
    columns = "a column to order by, the largest first after a - (default: by start)"
    commands["runs"].add_argument("--sort", default="run", help=columns)

    for name in ("export", "handover"):
        add = commands[name].add_argument
        option = "--out" if name == "export" else "--to"
        add(option, required=True, type=new_folder, metavar="DIR", help="a new or an empty folder")
    commands["export"].add_argument("--to", required=True, choices=("tensorboard", "mlflow"))
    add("run", nargs="?", default=CHAMPION, metavar="RUN", help="default: assets/champion")
    system = f"manylinux_2_28_{platform.machine()}"
    add("--platform", default=system, help="default: %(default)s")
    python = f"{sys.version_info.major}.{sys.version_info.minor}"
    add("--python", default=python, help="default: %(default)s")
    add("--wheels", metavar="DIR", help="a folder of wheels, so that none is fetched")

    add = commands["journal"].add_argument
    journal = REPOSITORY / "JOURNAL.md"
    add("file", nargs="?", default=journal, metavar="FILE", help="default: JOURNAL.md")
    add("--check", action="store_true", help="name what the files no longer say; write nothing")
    return parser.parse_args(argv)


def new_folder(text: str) -> str:
    """An argument that names a folder which does not exist yet, or is empty."""
    path = Path(place(text))
    if path.is_file() or any(path.glob("*")):
        raise argparse.ArgumentTypeError(f"{text} holds files already: give a new or empty folder")
    return text


@script
def main(argv=None) -> int:
    args = parse(argv)
    report, _ = COMMANDS[args.what]
    try:
        result = report(args)
    except KeyError as error:
        if "run" not in args:
            raise
        raise BadInput(f"{args.run} is of an older or another program: it has no {error}") from None
    print_result(result)
    return EXIT_FINDING if result.get("num_differing") else EXIT_DONE


def report_handover(args) -> dict:
    """Write a handover folder, and say how large it is."""
    from lib.report.handover import write_handover
    from lib.rundir import find_run

    run = find_run(args.run)
    dest = Path(args.to)
    result = write_handover(run, dest, args.platform, args.python, args.wheels)
    say(f"{dest}: {result['num_files']} files, torch {result['torch']}")
    return result


def report_journal(args) -> dict:
    """Fill in the journal, or compare it with its files."""
    from lib.report.journal import check_journal, write_journal

    path = Path(args.file)
    result = check_journal(path) if args.check else write_journal(path)
    result["num_differing"] = len(result["differing"])
    for kind in ("missing", "differing"):
        for sentence in result.get(kind, ()):
            say(f"{kind}: {sentence}")
    if not args.check:
        counts = f"{result['num_filled']} parts are filled in, {len(result['missing'])} missing"
        say(f"{counts}; page {result['page']}")
    elif not result["differing"]:
        say(f"{path}: what is filled in agrees with its files")
    return result


def report_assignment(_args) -> dict:
    """Print each piece of evidence that the journal needs, where it lies or the command that makes
    it, and the next command.
    """
    from lib.blocks import table_of
    from lib.evidence import list_evidence

    rows = list_evidence(REPOSITORY)
    say(table_of(rows).to_text())
    commands = [row["command"] for row in rows if "command" in row]
    next_command = [*commands, "make journal"][0]
    say(f"next: {next_command}")
    return {"num_missing": len(commands), "next": next_command}


def report_runs(args) -> dict:
    """List runs, and draw their curves together."""
    from lib.report.runs import list_runs, select_runs, table_of_runs

    rows = select_runs(list_runs(args.runs), args.where, args.sort)
    table = table_of_runs(rows)
    say(table.to_text())
    result = {"num_runs": len(rows)}
    if args.html:
        from lib.report.drawings import TRAIN_LOSS, VAL_AUC, VAL_LOSS, write_together

        folders = [Path(args.runs, row["run"]) for row in rows]
        curves = (TRAIN_LOSS, VAL_LOSS, VAL_AUC)
        result["page"] = write_together(args.html, f"Runs in {args.runs}", table, folders, curves)
    return result


def report_spread(args) -> dict:
    """Say how far scores lie apart between seeds, or between folds."""
    from lib.report.drawings import GRADIENT_NORM, LEARNING_RATE, LOSS, write_together
    from lib.report.runs import average_scores, differing, list_runs, read_run, select_runs
    from lib.report.tables import spread_table
    from lib.rundir import find_run

    folders = [find_run(name) for name in args.folders]
    if args.where:
        chosen = select_runs(list_runs(args.runs), args.where)
        folders += [Path(args.runs, row["run"]) for row in chosen]
    rows = [read_run(folder) for folder in folders]
    spreads = average_scores(rows, args.what.removesuffix("s"))
    for sentence in differing(rows, "code"):
        say(f"note: {sentence}")
    table = spread_table(spreads, rows[0], args.what)
    say(table.to_text())
    result = {args.what: spreads, "num_runs": len(rows)}
    if args.html:
        title = f"Scores over {args.what}"
        curves = (LOSS, GRADIENT_NORM, LEARNING_RATE)
        words = (True, SPREAD_NOTE)
        result["page"] = write_together(args.html, title, table, folders, curves, *words)
    return result


def report_export(args) -> dict:
    """Write runs for another program."""
    from lib.report.export import export_runs
    from lib.report.runs import list_runs, select_runs

    rows = select_runs(list_runs(args.runs), args.where)
    num_runs = export_runs(rows, Path(args.runs), Path(args.out), args.to)
    return {"num_runs": num_runs, "out": args.out}


def report_run(args) -> dict:
    """Write the page of a run."""
    from lib.checkpoint import load_checkpoint
    from lib.files import read_json
    from lib.rundir import find_run
    from lib.runpage import write_run_page

    run = find_run(args.run)
    threshold = args.threshold
    if args.predictions and threshold is None:
        threshold = load_checkpoint(run / "best.pt")["threshold"]
    out = args.out or run / "report.html"
    summary = read_json(run / "summary.json")
    page = write_run_page(run, out, summary, args.predictions, threshold, args.remark)
    say(f"page {page}")
    return {"page": str(page), "run": str(run)}


COMMANDS = {
    "run": (report_run, "one run as a self-contained HTML page"),
    "runs": (report_runs, "all runs: status, the keys in which they differ, scores"),
    "seeds": (report_spread, "the mean over seeds, its interval and the spread"),
    "folds": (report_spread, "the mean over folds, its interval and the spread"),
    "export": (report_export, "runs as TensorBoard or MLflow read them"),
    "handover": (report_handover, "a folder for a USB stick, to predict without a network"),
    "journal": (report_journal, "start JOURNAL.md, fill in its directives, and write its page"),
    "assignment": (report_assignment, "what of the journal's evidence is there, what is next"),
}

if __name__ == "__main__":
    sys.exit(main())
