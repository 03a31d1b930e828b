"""Pages and tables from what runs have left on disk.

python report.py run RUN [--predictions FILE] [--threshold T] [--out FILE]
python report.py runs [--runs DIR] [--where 'val_auc>0.9'] [--sort NAME] [--html FILE]
python report.py seeds RUN...|--where ... [--folds RUN...] [--html FILE]
python report.py folds RUN...|--where ... [--seeds RUN...] [--html FILE]
python report.py export --to tensorboard|mlflow --out DIR [--runs DIR] [--where ...]
python report.py handover [RUN] --to DIR [--platform P] [--python 3.X] [--wheels DIR]
python report.py journal [FILE] [--check]
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
    commands = parser.add_subparsers(
        dest="what",
        required=True,
        metavar="run|runs|seeds|folds|export|handover|journal|assignment",
    )
    run = commands.add_parser("run", help="one run as a self-contained HTML page")
    run.add_argument("run", metavar="RUN", help="a run folder")
    run.add_argument(
        "--predictions",
        default="",
        metavar="FILE",
        help="a predictions.csv with labels, for scores and examples",
    )
    run.add_argument(
        "--threshold",
        type=probability,
        metavar="T",
        help="of the decision (default: the stored one)",
    )
    run.add_argument(
        "--remark", default="", metavar="TEXT", help="a sentence for the top of the page"
    )
    run.add_argument("--out", default="", metavar="FILE", help="default: RUN/report.html")
    run.set_defaults(report=report_run)
    runs = commands.add_parser(
        "runs", help="all runs: status, the keys in which they differ, scores"
    )
    runs.add_argument(
        "--sort",
        default="run",
        metavar="NAME",
        help="a column to order by (default: run, which is by start)",
    )
    runs.add_argument("--descending", action="store_true", help="the largest first")
    runs.add_argument(
        "--html", default="", metavar="FILE", help="a page with their curves drawn together"
    )
    runs.set_defaults(report=report_runs)
    spreads = []
    for verb, other in (("seeds", "folds"), ("folds", "seeds")):
        spread = commands.add_parser(
            verb, help=f"the mean over {verb}, its interval and the spread"
        )
        spread.add_argument(
            verb,
            nargs="*",
            metavar="RUN",
            help=f"finished runs that differ in the {verb[:-1]} alone",
        )
        spread.add_argument(
            f"--{other}",
            nargs="+",
            default=[],
            metavar="RUN",
            help=f"the spread over {other}, set beside it",
        )
        spread.add_argument(
            "--html",
            default="",
            metavar="FILE",
            help="a page with gradient norms and learning rates together",
        )
        spread.set_defaults(report=report_spread)
        spreads.append(spread)
    export = commands.add_parser("export", help="runs as TensorBoard or MLflow read them")
    export.add_argument("--to", required=True, choices=("tensorboard", "mlflow"))
    export.add_argument(
        "--out", required=True, type=place, metavar="DIR", help="a new or an empty folder"
    )
    export.set_defaults(report=report_export)
    for chosen in (runs, export, *spreads):
        chosen.add_argument(
            "--runs",
            default="runs",
            type=place,
            metavar="DIR",
            help="the folder that holds them (default: runs)",
        )
        condition = (
            "only runs of which this holds, such as 'val_auc>0.9', seed=1 or status!=dead; all of"
            " several"
        )
        chosen.add_argument(
            "--where", action="append", default=[], metavar="CONDITION", help=condition
        )
    stick = commands.add_parser(
        "handover", help="a folder that predicts on a machine without a network, for a USB stick"
    )
    stick.add_argument(
        "run",
        nargs="?",
        default=CHAMPION,
        metavar="RUN",
        help="a finished run (default: assets/champion)",
    )
    stick.add_argument(
        "--to", required=True, type=place, metavar="DIR", help="a new or an empty folder"
    )
    stick.add_argument(
        "--platform",
        default=f"manylinux_2_28_{platform.machine()}",
        metavar="P",
        help="default: %(default)s",
    )
    here = "{}.{}".format(*sys.version_info)
    stick.add_argument(
        "--python", default=here, type=python_version, metavar="3.X", help="default: %(default)s"
    )
    stick.add_argument(
        "--wheels",
        type=place,
        metavar="DIR",
        help="a folder of wheels to take instead of fetching them",
    )
    stick.set_defaults(report=report_handover)
    journal = commands.add_parser(
        "journal", help="start JOURNAL.md, fill in its directives, and write its page"
    )
    journal.add_argument(
        "file",
        nargs="?",
        default=JOURNAL,
        type=place,
        metavar="FILE",
        help="the journal; its files are found from its folder (default: JOURNAL.md of the"
        " repository)",
    )
    journal.add_argument(
        "--check", action="store_true", help="name what the files no longer say; write nothing"
    )
    journal.set_defaults(report=report_journal)
    assignment = commands.add_parser(
        "assignment", help="what of the journal's evidence is there, and the next command"
    )
    assignment.set_defaults(report=report_assignment)
    return parser.parse_args(argv)


def python_version(text: str) -> str:
    """An argument such as 3.12."""
    if not (text.startswith("3.") and text[2:].isdigit()):
        raise argparse.ArgumentTypeError(f"{text} is no version such as 3.12")
    return text


@script
def main(argv=None) -> int:
    args = parse(argv)
    return args.report(args)


def report_handover(args) -> int:
    """Write a handover folder, and say how large it is."""
    from lib.report.handover import write_handover
    from lib.rundir import find_run

    result = write_handover(
        find_run(args.run), Path(args.to), args.platform, args.python, args.wheels
    )
    say(
        f"{args.to}: {result['num_files']} files, {result['num_bytes'] / 1e6:,.0f} MB, torch"
        f" {result['torch']}"
    )
    print_result(result)
    return EXIT_DONE


def report_journal(args) -> int:
    """Fill in the journal, or compare it with its files. 1 where they do not agree."""
    from lib.report.journal import check_journal, write_journal

    path = Path(args.file)
    result = {"differing": check_journal(path)} if args.check else write_journal(path)
    for kind in ("missing", "differing"):
        for sentence in result.get(kind, ()):
            say(f"{kind}: {sentence}")
    if not args.check:
        say(f"{result['num_filled']} parts are filled in, {len(result['missing'])} things missing")
        say(f"{len(result['unanswered'])} questions have no words yet; page {result['page']}")
    result["num_differing"] = len(result["differing"])
    print_result(result)
    return EXIT_FINDING if result["differing"] else EXIT_DONE


def report_assignment(_args) -> int:
    """Print each piece of evidence that the journal needs, where it lies or the command that makes
    it, and the next command.
    """
    from lib.blocks import Table
    from lib.evidence import EVIDENCE, find_evidence

    rows, commands = [], []
    for piece in EVIDENCE:
        folders = find_evidence(REPOSITORY, piece.name)
        if len(folders) >= piece.num:
            state = str(folders[-1].relative_to(REPOSITORY))
        else:
            state = f"missing: {piece.command}"
            commands.append(piece.command)
        rows.append((piece.questions, piece.what, state))
    say(Table(("question", "evidence", "where, or the command"), rows).to_text())
    next_command = commands[0] if commands else "make journal"
    say(f"next: {next_command}")
    print_result({"num_missing": len(commands), "next": next_command})
    return EXIT_DONE


def report_runs(args) -> int:
    """List runs, and draw their curves together."""
    from lib.report.runs import CURVES, list_runs, select_runs, table_of_runs, write_together

    rows = select_runs(list_runs(args.runs), args.where, args.sort, args.descending)
    shown = table_of_runs(rows)
    say(shown.to_text())
    statuses = Counter(sorted(row["status"] for row in rows))
    result = {"num_runs": len(rows), **statuses}
    if args.html:
        folders = [Path(args.runs, row["run"]) for row in rows]
        page = write_together(args.html, f"Runs in {args.runs}", shown, folders, CURVES)
        result["page"] = str(page)
    print_result(result)
    return EXIT_DONE


def report_spread(args) -> int:
    """Say how far scores lie apart between seeds, and between folds."""
    from lib.blocks import Table
    from lib.report.runs import GRADIENTS, average_scores, differing, read_run, write_together
    from lib.rundir import find_run
    from lib.runpage import SHOWN_SCORES

    names = {args.what: getattr(args, args.what) or choose_runs(args)}
    other = "folds" if args.what == "seeds" else "seeds"
    if getattr(args, other):
        names[other] = getattr(args, other)
    runs = {varied: [find_run(name) for name in named] for varied, named in names.items()}
    rows = {varied: [read_run(run) for run in folders] for varied, folders in runs.items()}
    spreads = {varied: average_scores(rows[varied], varied[:-1]) for varied in runs}
    for sentence in differing(sum(rows.values(), []), "code", "commit and patch"):
        say(f"note: {sentence}")
    first = rows[args.what][0]
    constants = {f"val_{score}": first.get(key) for score, key in SHOWN_SCORES.values()}
    columns = ("mean", "deviation", "low", "high", "num")
    header = [f"{column} over {varied}" for varied in runs for column in columns]
    cells = []
    for name in spreads[args.what]:
        values = [scores[name][column] for scores in spreads.values() for column in columns]
        cells.append([name, constants.get(name), *values])
    shown = Table(["score", "constant answer", *header], cells)
    say(shown.to_text())
    folders = sum(runs.values(), [])
    result = spreads | {"num_runs": len(folders)}
    if args.html:
        title = f"Scores over {' and '.join(runs)}"
        page = write_together(args.html, title, shown, folders, GRADIENTS, SPREAD_NOTE)
        result["page"] = str(page)
    print_result(result)
    return EXIT_DONE


def choose_runs(args) -> list[str]:
    """The paths of the runs that meet `--where`. Raises BadInput where there are none."""
    from lib.report.runs import list_runs, select_runs

    chosen = select_runs(list_runs(args.runs), args.where) if args.where else []
    if not chosen:
        met = f", and none in {args.runs} meets the conditions" if args.where else ""
        raise BadInput(f"{args.what}: no run is named{met}")
    return [str(Path(args.runs, row["run"])) for row in chosen]


def report_export(args) -> int:
    """Write runs for another program."""
    from lib.report.export import export_runs
    from lib.report.runs import list_runs, select_runs

    rows = select_runs(list_runs(args.runs), args.where)
    print_result(
        {"num_runs": export_runs(rows, Path(args.runs), Path(args.out), args.to), "out": args.out}
    )
    return EXIT_DONE


def report_run(args) -> int:
    """Write the page of a run."""
    from lib.checkpoint import load_checkpoint
    from lib.files import read_json
    from lib.rundir import find_run
    from lib.runpage import write_run_page

    run = find_run(args.run)
    if not (run / "summary.json").is_file():
        raise BadInput(f"{run} has no summary.json: it did not finish (train.py --resume {run})")
    threshold = args.threshold
    if args.predictions and threshold is None:
        threshold = load_checkpoint(run / "best.pt")["threshold"]
    out, summary = args.out or run / "report.html", read_json(run / "summary.json")
    page = write_run_page(run, out, summary, args.predictions, threshold, args.remark)
    say(f"page {page}")
    print_result({"page": str(page), "run": str(run)})
    return EXIT_DONE


if __name__ == "__main__":
    sys.exit(main())
