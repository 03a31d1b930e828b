#!/usr/bin/env python
"""Get the data into place: download the official PCam, import images, draw synthetic slides, repack
HDF5, verify.
"""

import sys
from pathlib import Path

from lib.command import EXIT_DONE, EXIT_FINDING, BadInput, Parser, place, print_result, say, script


def build_parser() -> Parser:
    parser = Parser(prog="prepare.py", description=__doc__)
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")

    def add_verb(name, run, help, needs_source=False, needs_target=True):
        verb = verbs.add_parser(name, help=help, description=help)
        verb.set_defaults(run=run)
        if needs_source:
            verb.add_argument("source", metavar="SRC", type=place, help="what to read")
        if needs_target:
            verb.add_argument(
                "--to",
                metavar="DIR",
                type=place,
                required=True,
                help="folder to write: new, empty or unfinished",
            )
        return verb

    verb = add_verb(
        "download", run_download, "fetch the official files: resumed, checked by MD5, unpacked"
    )
    verb.add_argument(
        "--base-url",
        metavar="URL",
        help="where the files are, with NAME for the file's name (default: Zenodo)",
    )
    verb.add_argument(
        "--splits", metavar="LIST", default="train,valid,test", help="which of train,valid,test"
    )
    verb.add_argument(
        "--timeout",
        metavar="S",
        type=float,
        default=30.0,
        help="seconds without a byte that count as a cut",
    )
    verb.add_argument(
        "--checksums",
        metavar="FILE",
        help="a JSON table of rows and MD5 other than the published one",
    )

    verb = add_verb(
        "import",
        run_import,
        "write images as PCam HDF5: SPLIT/LABEL/NAME.jpg, tars of it, or Kaggle's",
        True,
    )
    verb.add_argument(
        "--valid-share",
        metavar="P",
        type=float,
        default=0.1,
        help="Kaggle only: share held out (default 0.1)",
    )

    verb = add_verb(
        "repack",
        run_repack,
        "write PCam-like HDF5 of any number type and layout as contiguous uint8",
        True,
    )
    verb.add_argument(
        "--allow-loss",
        action="store_true",
        help="write although values are lost, and list their rows",
    )

    verb = add_verb(
        "synthetic", run_synthetic, "draw H&E-like slides and cut patches with known truth"
    )
    for split, num in (("train", 20_000), ("valid", 4_000), ("test", 4_000)):
        verb.add_argument(
            f"--{split}",
            metavar="N",
            type=int,
            default=num,
            help=f"patches of {split} (default {num:,})",
        )
    verb.add_argument(
        "--seed", metavar="S", type=int, default=1, help="of everything that is drawn (default 1)"
    )
    kinds = (
        "shared_slides blurred_scanner class_skew black white nan out_of_range exact symmetric"
        " brightened shifted overlap"
    )
    kinds += (
        " recompressed flipped trigger; RATE a share of slides or patches, truth.csv tells which"
    )
    verb.add_argument(
        "--plant",
        metavar="KIND=RATE",
        action="append",
        default=[],
        help=f"damage or leaks, KIND of {kinds}",
    )
    verb.add_argument("--float32", action="store_true", help="store x as 32-bit floats")
    verb.add_argument("--gzip", action="store_true", help="store x compressed")

    verb = add_verb(
        "verify",
        run_verify,
        "read a PCam folder from end to end, say what is wrong",
        needs_target=False,
    )
    verb.add_argument("directory", metavar="DIR", type=place, help="the folder to read")
    verb.add_argument("--md5", action="store_true", help="compare with the published MD5 sums")
    return parser


def run_import(args) -> int:
    from lib.prepare.ingest import import_images

    if not 0 < args.valid_share < 1:
        raise BadInput(f"--valid-share is {args.valid_share}, it must lie between 0 and 1")
    result = import_images(args.source, args.to, args.valid_share)
    for reason, count in result["skipped"].items():
        say(f"skipped: {count:,} files ({reason})")
    for lacking in {"train", "valid"} - set(result["splits"]):
        say(f"note: {args.source} has no split {lacking}, which training needs")
    return conclude(args.to, result)


def run_repack(args) -> int:
    from lib.prepare.repack import LOSS_KINDS, LOSSES_FILE, repack

    result = repack(args.source, args.to, args.allow_loss)
    losses = [
        (split, kind, stats["losses"].get(kind))
        for split, stats in result["splits"].items()
        for kind in LOSS_KINDS
    ]
    losses = [
        (split, kind, lost["values"], lost["patches"]) for split, kind, lost in losses if lost
    ]
    if losses:
        say_table(("split", "loss", "values", "patches"), losses)
    if not result["written"]:
        say(
            "nothing was written: uint8 cannot hold these values. --allow-loss writes it, with the"
            " rows concerned in a CSV"
        )
        print_result(result)
        return EXIT_FINDING
    say(f"rows that lost something: {Path(args.to, LOSSES_FILE)}" if losses else "nothing was lost")
    return conclude(args.to, result)


def run_download(args) -> int:
    from lib.files import read_json
    from lib.pcam import SPLITS
    from lib.prepare.download import ZENODO, WrongContent, download
    from lib.published import OFFICIAL

    splits = args.splits.split(",")
    if wrong := [split for split in splits if split not in SPLITS]:
        raise BadInput(f"--splits names '{wrong[0]}', allowed are {', '.join(SPLITS)}")
    official = read_json(args.checksums) if args.checksums else OFFICIAL
    if lacking := [
        split for split in splits if not {"rows", "x", "y", "meta"} <= set(official.get(split, ()))
    ]:
        raise BadInput(f"{args.checksums} lacks rows, x, y or meta of '{lacking[0]}'")
    try:
        fetched = download(args.to, args.base_url or ZENODO, splits, official, args.timeout)
    except WrongContent as error:
        say(f"finding: {error}")
        print_result({"to": args.to, "findings": [str(error)]})
        return EXIT_FINDING
    return conclude(args.to, {"fetched": fetched, "splits": {split: {} for split in splits}})


def run_synthetic(args) -> int:
    from lib.files import require_space
    from lib.pcam import PATCH_BYTES
    from lib.prepare.synthetic import SyntheticPlan, write_synthetic
    from lib.progress import Progress

    try:
        plant = tuple(
            (kind, float(rate)) for kind, _, rate in (item.partition("=") for item in args.plant)
        )
    except ValueError:
        raise BadInput(
            f"--plant is {' '.join(args.plant)}, it must be KIND=RATE, such as nan=0.03"
        ) from None
    try:
        plan = SyntheticPlan(
            args.train,
            args.valid,
            args.test,
            args.seed,
            plant,
            "float32" if args.float32 else "uint8",
            args.gzip,
        )
    except ValueError as error:
        raise BadInput(str(error)) from None
    patch_bytes = 0 if args.gzip else PATCH_BYTES * (4 if args.float32 else 1)
    require_space(args.to, sum(map(plan.num, ("train", "valid", "test"))) * patch_bytes)
    with Progress(args.train + args.valid + args.test, "draw") as progress:
        result = write_synthetic(plan, args.to, progress.add)
    rows = [(split, result[f"num_{split}"]) for split in ("train", "valid", "test")]
    say_table(("split", "patches"), rows + sorted(result["planted"].items()))
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
    from lib.pcam import fingerprint
    from lib.prepare.verify import verify_folder

    splits = list(result["splits"])
    # which reads every byte, so that verify_folder need not
    fingerprints = fingerprint(directory, splits)
    rows, findings = verify_folder(directory, splits, read=False)
    for row in rows:
        row.update(result["splits"][row["split"]])
    return report(rows, findings, {"to": str(directory), **result, "fingerprint": fingerprints})


def report(rows: list[dict], findings: list[str], result: dict) -> int:
    """Tables and findings for the person, the JSON object for the script; gives the exit code."""
    columns = (
        "split",
        "patches",
        "negative",
        "positive",
        "bytes",
        "seconds",
        "layout",
        "slides",
        "slide_names",
    )
    columns = [name for name in columns if any(row.get(name) is not None for row in rows)]
    say_table(columns, [[row.get(name) for name in columns] for row in rows])
    for row in rows:
        if row["layout"] != "contiguous uint8":
            say(
                f"note: {row['split']} is read slowly ({row['layout']}); prepare.py repack makes it"
                " contiguous uint8"
            )
    for finding in findings:
        say(f"finding: {finding}")
    print_result(result | {"splits": {row.pop("split"): row for row in rows}, "findings": findings})
    return EXIT_FINDING if findings else EXIT_DONE


def say_table(header, rows) -> None:
    """A table with the numbers on the right."""
    cells = [
        [f"{cell:,}" if isinstance(cell, (int, float)) else str(cell or "-") for cell in row]
        for row in (header, *rows)
    ]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for row in cells:
        say("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)))


@script
def main(argv=None) -> int:
    args = build_parser().parse_args(argv)
    return args.run(args)


if __name__ == "__main__":
    sys.exit(main())
