"""Pages and tables from what runs have left on disk.

python report.py run RUN [--predictions FILE] [--threshold T] [--out FILE]
"""

import argparse
import sys

from lib.command import EXIT_DONE, Parser, print_result, probability, say, script


def parse(argv) -> argparse.Namespace:
    parser = Parser(prog="report.py", description="Pages and tables from what runs have left on disk.")
    commands = parser.add_subparsers(dest="what", required=True, metavar="run")
    run = commands.add_parser("run", help="one run as a self-contained HTML page")
    run.add_argument("run", metavar="RUN", help="a run folder")
    run.add_argument("--predictions", default="", metavar="FILE", help="a predictions.csv with labels, for scores and examples")
    run.add_argument("--threshold", type=probability, default=0.5, metavar="T", help="of the decision (default: 0.5)")
    run.add_argument("--remark", default="", metavar="TEXT", help="a sentence for the top of the page")
    run.add_argument("--out", default="", metavar="FILE", help="default: RUN/report.html")
    return parser.parse_args(argv)


@script
def main(argv=None) -> int:
    args = parse(argv)

    from lib.reports.run_page import write_run_page
    from lib.rundir import find_run

    run = find_run(args.run)
    page = write_run_page(run, args.predictions, args.threshold, args.out or run / "report.html", args.remark)
    say(f"page {page}")
    print_result({"page": str(page), "run": str(run)})
    return EXIT_DONE


if __name__ == "__main__":
    sys.exit(main())
