#!/usr/bin/env python
"""Get the data into place: download the official PCam, import images, draw synthetic slides, repack
HDF5, verify.
"""

import argparse
import sys
from pathlib import Path

from lib.command import (
    EXIT_DONE,
    EXIT_FINDING,
    BadInput,
    Parser,
    place,
    print_result,
    probability,
    say,
    script,
)

COLUMNS = ("split", "patches", "negative", "positive", "bytes", "seconds", "layout", "slides")
SYNTHETIC_SIZES = {"train": 20_000, "valid": 4_000, "test": 4_000}


def build_parser() -> Parser:
    parser = Parser(prog="prepare.py", description=__doc__)
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")

    def add_verb(name, run, help, reads=False):
        verb = verbs.add_parser(name, help=help, description=help)
        verb.set_defaults(run=run)
        option = verb.add_argument
        if reads:
            option("source", metavar="SRC", type=place, help="what to read")
        if name != "verify":
            words = "folder to write: new, empty or unfinished"
            option("--to", metavar="DIR", type=place, required=True, help=words)
        return option

    option = add_verb(
        "download", run_download, "fetch the official files: resumed, checked by MD5, unpacked"
    )
    option(
        "--base-url",
        metavar="URL",
        help="where the files are, with NAME for the file's name (default: Zenodo)",
    )
    option("--splits", metavar="LIST", default="train,valid,test", help="which of train,valid,test")
    option(
        "--timeout",
        metavar="S",
        type=float,
        default=30.0,
        help="seconds without a byte that count as a cut",
    )
    option(
        "--checksums",
        metavar="FILE",
        help="a JSON table of rows and MD5 other than the published one",
    )

    option = add_verb(
        "import",
        run_import,
        "write images as PCam HDF5: SPLIT/LABEL/NAME.jpg, tars of it, Kaggle's, Camelyon17-WILDS",
        reads=True,
    )
    option(
        "--valid-share",
        metavar="P",
        type=probability,
        default=0.1,
        help="Kaggle only: share held out (default 0.1)",
    )

    option = add_verb(
        "repack",
        run_repack,
        "write PCam-like HDF5 of any number type and layout as contiguous uint8",
        reads=True,
    )
    option(
        "--allow-loss",
        action="store_true",
        help="write although values are lost, and list their rows",
    )

    option = add_verb(
        "synthetic", run_synthetic, "draw H&E-like slides and cut patches with known truth"
    )
    for split, num in SYNTHETIC_SIZES.items():
        option(f"--{split}", metavar="N", type=int, default=num, help=f"patches (default {num:,})")
    option("--seed", metavar="S", type=int, default=1, help="of all that is drawn (default 1)")
    option(
        "--plant",
        metavar="KIND=RATE",
        type=kind_and_rate,
        action="append",
        default=[],
        help="damage or leaks, KIND of shared_slides blurred_scanner class_skew black white nan"
        " out_of_range exact symmetric brightened shifted overlap recompressed flipped trigger;"
        " RATE a share of slides or patches, truth.csv tells which",
    )
    option("--float32", action="store_true", help="store x as 32-bit floats")
    option("--gzip", action="store_true", help="store x compressed")

    option = add_verb("verify", run_verify, "read a PCam folder from end to end, say what is wrong")
    option("directory", metavar="DIR", type=place, help="the folder to read")
    option("--md5", action="store_true", help="compare with the published MD5 sums")
    return parser


def kind_and_rate(text: str) -> tuple[str, float]:
    kind, _, rate = text.partition("=")
    try:
        return kind, float(rate)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text} is not KIND=RATE, such as nan=0.03") from None


def run_import(args) -> int:
    from lib.inputs import say_left_out
    from lib.prepare.ingest import import_images

    result = import_images(args.source, args.to, args.valid_share)
    say_left_out(args.source, result["skipped"])
    for lacking in {"train", "valid"} - set(result["splits"]):
        say(f"note: {args.source} has no split {lacking}, which training needs")
    return conclude(args.to, result)


def run_repack(args) -> int:
    from lib.prepare.repack import LOSSES_FILE, repack

    result = repack(args.source, args.to, args.allow_loss)
    rows = []
    for split, facts in result["splits"].items():
        rows += [(split, kind, *loss.values()) for kind, loss in facts["losses"].items()]
    if rows:
        say_table(("split", "loss", "values", "patches"), rows)
    if not result["written"]:
        say(
            "nothing was written: uint8 cannot hold these values. --allow-loss writes it, with the"
            " rows concerned in a CSV"
        )
        print_result(result)
        return EXIT_FINDING
    say(f"rows that lost something: {Path(args.to, LOSSES_FILE)}" if rows else "nothing was lost")
    return conclude(args.to, result)


def run_download(args) -> int:
    from lib.files import read_json
    from lib.prepare.download import ZENODO, WrongContent, download
    from lib.published import OFFICIAL

    official = read_json(args.checksums) if args.checksums else OFFICIAL
    splits = args.splits.split(",")
    for split in splits:
        if split not in official:
            raise BadInput(f"--splits names '{split}', allowed are {', '.join(official)}")
    try:
        names = download(args.to, args.base_url or ZENODO, splits, official, args.timeout)
    except WrongContent as error:
        say(f"finding: {error}")
        print_result({"to": args.to, "findings": [str(error)]})
        return EXIT_FINDING
    return conclude(args.to, {"fetched": names, "splits": {split: {} for split in splits}})


def run_synthetic(args) -> int:
    from lib.prepare.synthetic import SyntheticPlan, write_synthetic

    sizes = {split: getattr(args, split) for split in SYNTHETIC_SIZES}
    dtype = "float32" if args.float32 else "uint8"
    plan = SyntheticPlan(sizes, args.seed, dict(args.plant), dtype, args.gzip)
    result = write_synthetic(plan, args.to)
    say_table(("split", "patches"), [*sizes.items(), *sorted(result["planted"].items())])
    print_result({"to": args.to} | result)
    return EXIT_DONE


def run_verify(args) -> int:
    from lib.prepare.verify import verify_folder

    rows, findings = verify_folder(args.directory, md5=args.md5)
    return report(rows, findings, {"directory": args.directory})


def conclude(directory, result: dict) -> int:
    """Read what was written once more for its fingerprint, so that training need not, and print it
    all.
    """
    from lib.fingerprint import fingerprint
    from lib.prepare.verify import verify_folder

    splits = list(result["splits"])
    # which reads every byte, so that verify_folder need not
    fingerprints = fingerprint(directory, splits)
    rows, findings = verify_folder(directory, splits, read=False)
    for row in rows:
        row.update(result["splits"][row["split"]])
    return report(rows, findings, {"to": directory, **result, "fingerprint": fingerprints})


def report(rows: list[dict], findings: list[str], result: dict) -> int:
    """Tables and findings for the person, the JSON object for the script; gives the exit code."""
    say_table(COLUMNS, [[row.get(name) for name in COLUMNS] for row in rows])
    splits = {}
    for row in rows:
        split, layout = row.pop("split"), row["layout"]
        splits[split] = row
        if layout != "contiguous uint8":
            say(f"note: {split} is read slowly ({layout}); prepare.py repack makes it fast")
    for finding in findings:
        say(f"finding: {finding}")
    print_result(result | {"splits": splits, "findings": findings})
    return EXIT_FINDING if findings else EXIT_DONE


def say_table(header, rows) -> None:
    """A table with the numbers on the right."""
    cells = [header, *([format_cell(cell) for cell in row] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for row in cells:
        say("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)))


def format_cell(cell) -> str:
    if cell is None:
        return "-"
    return cell if isinstance(cell, str) else f"{cell:,}"


@script
def main(argv=None) -> int:
    args = build_parser().parse_args(argv)
    return args.run(args)


if __name__ == "__main__":
    sys.exit(main())
