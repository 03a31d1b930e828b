"""Pages and tables from what runs have left on disk.

python report.py run RUN [--predictions FILE] [--threshold T] [--out FILE]
python report.py runs [--runs DIR] [--where 'val_auc>0.9'] [--sort NAME] [--html FILE]
python report.py seeds RUN...|--where ... [--folds RUN...] [--html FILE]
python report.py folds RUN...|--where ... [--seeds RUN...] [--html FILE]
python report.py export --to tensorboard|mlflow --out DIR [--runs DIR] [--where ...]
python report.py handover [RUN] --to DIR [--platform P] [--python 3.X] [--wheels DIR]
python report.py journal [FILE] [--check]
python report.py assignment
"""

import argparse
import platform
import sys
from collections import Counter
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

JOURNAL = REPOSITORY / "JOURNAL.md"
CHAMPION = REPOSITORY / "assets" / "champion"
SPREAD_NOTE = (
    "Low and high bound the 95% interval of the mean (Student's t). Folds share most of their"
    " training patches, so that theirs is narrower than it should be (Bengio and Grandvalet 2004)."
)


def parse(argv) -> argparse.Namespace:
    parser = Parser(
        prog="report.py", description="Pages and tables from what runs have left on disk."
    )
    verbs = parser.add_subparsers(dest="what", required=True, metavar="|".join(COMMANDS))
    commands = {name: verbs.add_parser(name, help=words) for name, (_, words) in COMMANDS.items()}

    add = commands["run"].add_argument
    add("run", metavar="RUN", help="a run folder")
    add(
        "--predictions",
        metavar="FILE",
        help="a predictions.csv with labels, for scores and examples",
    )
    add(
        "--threshold",
        type=probability,
        metavar="T",
        help="of the decision (default: the stored one)",
    )
    add("--remark", default="", metavar="TEXT", help="a sentence for the top of the page")
    add("--out", metavar="FILE", help="default: RUN/report.html")

    add = commands["runs"].add_argument
    add(
        "--sort",
        default="run",
        metavar="NAME",
        help="a column to order by (default: run, which is by start)",
    )
    add("--descending", action="store_true", help="the largest first")

    for varied, other in (("seeds", "folds"), ("folds", "seeds")):
        add = commands[varied].add_argument
        add(
            varied,
            nargs="*",
            metavar="RUN",
            help=f"finished runs that differ in the {varied[:-1]} alone",
        )
        add(f"--{other}", nargs="+", metavar="RUN", help=f"the spread over {other}, set beside it")

    add = commands["export"].add_argument
    add("--to", required=True, choices=("tensorboard", "mlflow"))
    add("--out", required=True, type=new_folder, metavar="DIR", help="a new or an empty folder")

    for name in ("runs", "seeds", "folds", "export"):
        add = commands[name].add_argument
        add(
            "--runs",
            default="runs",
            type=place,
            metavar="DIR",
            help="the folder that holds them (default: runs)",
        )
        add(
            "--where",
            action="append",
            default=[],
            metavar="CONDITION",
            help="only runs of which this holds, such as 'val_auc>0.9', seed=1 or status!=dead;"
            " all of several",
        )
        if name != "export":
            add("--html", metavar="FILE", help="a page with their curves together")

    add = commands["handover"].add_argument
    add(
        "run",
        nargs="?",
        default=CHAMPION,
        metavar="RUN",
        help="a finished run (default: assets/champion)",
    )
    add("--to", required=True, type=new_folder, metavar="DIR", help="a new or an empty folder")
    system = f"manylinux_2_28_{platform.machine()}"
    add("--platform", default=system, metavar="P", help="default: %(default)s")
    python = f"{sys.version_info.major}.{sys.version_info.minor}"
    add("--python", default=python, metavar="3.X", help="default: %(default)s")
    add(
        "--wheels",
        type=place,
        metavar="DIR",
        help="a folder of wheels to take instead of fetching them",
    )

    add = commands["journal"].add_argument
    add(
        "file",
        nargs="?",
        default=JOURNAL,
        type=place,
        metavar="FILE",
        help="the journal; its files are found from its folder (default: JOURNAL.md of the"
        " repository)",
    )
    add("--check", action="store_true", help="name what the files no longer say; write nothing")
    return parser.parse_args(argv)


def new_folder(text: str) -> str:
    """An argument that names a folder which does not exist yet, or is empty."""
    path = Path(place(text))
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise argparse.ArgumentTypeError(f"{text} holds files already: give a new or empty folder")
    return text


@script
def main(argv=None) -> int:
    args = parse(argv)
    report, _ = COMMANDS[args.what]
    return report(args)


def report_handover(args) -> int:
    """Write a handover folder, and say how large it is."""
    from lib.report.handover import write_handover
    from lib.rundir import find_run

    run = find_run(args.run)
    dest = Path(args.to)
    result = write_handover(run, dest, args.platform, args.python, args.wheels)
    size = f"{result['num_files']} files, {result['num_bytes'] / 1e6:,.0f} MB"
    say(f"{dest}: {size}, torch {result['torch']}")
    print_result(result)
    return EXIT_DONE


def report_journal(args) -> int:
    """Fill in the journal, or compare it with its files. 1 where they do not agree."""
    from lib.report.journal import check_journal, write_journal

    path = Path(args.file)
    result = check_journal(path) if args.check else write_journal(path)
    for kind in ("missing", "differing"):
        for sentence in result.get(kind, ()):
            say(f"{kind}: {sentence}")
    if not args.check:
        say(f"{result['num_filled']} parts are filled in, {len(result['missing'])} things missing")
        say(f"{len(result['unanswered'])} questions have no words yet; page {result['page']}")
    elif not result["differing"]:
        say(f"{path}: what is filled in agrees with its files")
    result["num_differing"] = len(result["differing"])
    print_result(result)
    return EXIT_FINDING if result["differing"] else EXIT_DONE


def report_assignment(_args) -> int:
    """Print each piece of evidence that the journal needs, where it lies or the command that makes
    it, and the next command.
    """
    from lib.blocks import Table
    from lib.evidence import EVIDENCE, command_of, find_evidence

    rows = []
    commands = []
    for piece in EVIDENCE:
        folders = find_evidence(REPOSITORY, piece.name)
        if len(folders) >= piece.num:
            state = str(folders[-1].relative_to(REPOSITORY))
        else:
            commands.append(command_of(REPOSITORY, piece.name))
            state = f"missing: {commands[-1]}"
        rows.append((piece.questions, piece.what, state))
    say(Table(("question", "evidence", "where, or the command"), rows).to_text())
    next_command = [*commands, "make journal"][0]
    say(f"next: {next_command}")
    print_result({"num_missing": len(commands), "next": next_command})
    return EXIT_DONE


def report_runs(args) -> int:
    """List runs, and draw their curves together."""
    from lib.report.runs import list_runs, select_runs, table_of_runs

    rows = select_runs(list_runs(args.runs), args.where, args.sort, args.descending)
    table = table_of_runs(rows)
    say(table.to_text())
    result = {"num_runs": len(rows), **Counter(sorted(row["status"] for row in rows))}
    if args.html:
        from lib.report.drawings import LOSS, VAL_AUC, VAL_LOSS, write_together

        folders = [Path(args.runs, row["run"]) for row in rows]
        curves = (LOSS, VAL_LOSS, VAL_AUC)
        result["page"] = write_together(args.html, f"Runs in {args.runs}", table, folders, curves)
    print_result(result)
    return EXIT_DONE


def report_spread(args) -> int:
    """Say how far scores lie apart between seeds, and between folds."""
    from lib.report.drawings import GRADIENT_NORM, LEARNING_RATE, LOSS, write_together
    from lib.report.runs import average_scores, differing, read_run
    from lib.report.tables import tabulate_spreads
    from lib.rundir import find_run

    names = {args.what: getattr(args, args.what) or choose_runs(args)}
    other = "folds" if args.what == "seeds" else "seeds"
    if getattr(args, other):
        names[other] = getattr(args, other)
    folders = []
    rows = []
    spreads = {}
    for varied in names:
        runs = [find_run(name) for name in names[varied]]
        folders += runs
        rows += [read_run(run) for run in runs]
        spreads[varied] = average_scores(rows[-len(runs) :], varied[:-1])
    for sentence in differing(rows, "code", "commit and patch"):
        say(f"note: {sentence}")
    table = tabulate_spreads(spreads, rows[0])
    say(table.to_text())
    result = spreads | {"num_runs": len(folders)}
    if args.html:
        title = f"Scores over {' and '.join(names)}"
        curves = (LOSS, GRADIENT_NORM, LEARNING_RATE)
        result["page"] = write_together(args.html, title, table, folders, curves, SPREAD_NOTE)
    print_result(result)
    return EXIT_DONE


def choose_runs(args) -> list[Path]:
    """The folders of the runs that meet `--where`. Raises BadInput where there are none."""
    from lib.report.runs import list_runs, select_runs

    chosen = select_runs(list_runs(args.runs), args.where) if args.where else []
    if not chosen:
        met = f", and none in {args.runs} meets the conditions" if args.where else ""
        raise BadInput(f"{args.what}: no run is named{met}")
    return [Path(args.runs, row["run"]) for row in chosen]


def report_export(args) -> int:
    """Write runs for another program."""
    from lib.report.export import export_runs
    from lib.report.runs import list_runs, select_runs

    rows = select_runs(list_runs(args.runs), args.where)
    num_runs = export_runs(rows, Path(args.runs), Path(args.out), args.to)
    print_result({"num_runs": num_runs, "out": args.out})
    return EXIT_DONE


def report_run(args) -> int:
    """Write the page of a run."""
    from lib.checkpoint import load_checkpoint
    from lib.files import read_json
    from lib.rundir import find_run, is_finished
    from lib.runpage import write_run_page

    run = find_run(args.run)
    if not is_finished(run):
        raise BadInput(f"{run} has no summary.json: it did not finish (train.py --resume {run})")
    threshold = args.threshold
    if args.predictions and threshold is None:
        threshold = load_checkpoint(run / "best.pt")["threshold"]
    out = args.out or run / "report.html"
    summary = read_json(run / "summary.json")
    page = write_run_page(run, out, summary, args.predictions, threshold, args.remark)
    say(f"page {page}")
    print_result({"page": str(page), "run": str(run)})
    return EXIT_DONE


COMMANDS = {
    "run": (report_run, "one run as a self-contained HTML page"),
    "runs": (report_runs, "all runs: status, the keys in which they differ, scores"),
    "seeds": (report_spread, "the mean over seeds, its interval and the spread"),
    "folds": (report_spread, "the mean over folds, its interval and the spread"),
    "export": (report_export, "runs as TensorBoard or MLflow read them"),
    "handover": (
        report_handover,
        "a folder that predicts on a machine without a network, for a USB stick",
    ),
    "journal": (report_journal, "start JOURNAL.md, fill in its directives, and write its page"),
    "assignment": (report_assignment, "what of the journal's evidence is there, what is next"),
}

if __name__ == "__main__":
    sys.exit(main())
