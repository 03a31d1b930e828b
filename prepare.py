#!/usr/bin/env python
"""Get the data into place: download the official PCam, import images, draw synthetic slides, repack
HDF5, verify.
"""

import argparse
import sys
from collections import Counter

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

SYNTHETIC_SIZES = {"train": 20_000, "valid": 4_000, "test": 4_000}
PLANT_HELP = (
    "damage or leaks, KIND of shared_slides blurred_scanner black white nan out_of_range exact"
    " symmetric brightened shifted recompressed flipped trigger; RATE a share; see truth.csv"
)


def build_parser() -> Parser:
    usage = "python prepare.py verify data/mine [options]"
    parser = Parser(prog="prepare.py", usage=usage, description=__doc__)
    verbs = parser.add_subparsers(required=True, metavar="VERB", prog="prepare.py")

    def add_verb(name, run, help, *places):
        verb = verbs.add_parser(name, help=help, description=help)
        verb.set_defaults(run=run)
        for option in places:
            if option == "--to":
                words = "folder to write: new, empty or unfinished"
                verb.add_argument(option, metavar="DIR", type=place, required=True, help=words)
            else:
                verb.add_argument(option, metavar=option.upper(), type=place, help="what to read")
        return verb.add_argument

    words = "fetch the official files: resumed, checked by MD5, unpacked"
    option = add_verb("download", run_download, words, "--to")
    words = "where the files are, with NAME for the file's name (default: Zenodo)"
    option("--base-url", metavar="URL", help=words)
    words = "seconds without a byte that count as a cut"
    option("--timeout", metavar="S", type=float, default=30.0, help=words)
    words = "a JSON table of rows and MD5 other than the published one"
    option("--checksums", metavar="FILE", help=words)
    option("--splits", metavar="LIST", default="train,valid,test", help="which of train,valid,test")

    words = (
        "write images as PCam HDF5: SPLIT/LABEL/NAME.jpg, tars of it, Kaggle's, Camelyon17-WILDS"
    )
    option = add_verb("import", run_import, words, "src", "--to")
    words = "Kaggle only: share held out (default 0.1)"
    option("--valid-share", metavar="P", type=probability, default=0.1, help=words)

    words = "write PCam-like HDF5 of any number type and layout as contiguous uint8"
    option = add_verb("repack", run_repack, words, "src", "--to")
    words = "write although values are lost, and list their rows"
    option("--allow-loss", action="store_true", help=words)

    words = "draw H&E-like slides and cut patches with known truth"
    option = add_verb("synthetic", run_synthetic, words, "--to")
    for split, num in SYNTHETIC_SIZES.items():
        option(f"--{split}", metavar="N", type=int, default=num, help=f"patches (default {num:,})")
    option("--seed", metavar="S", type=int, default=1, help="of all that is drawn (default 1)")
    plant = {"metavar": "KIND=RATE", "type": kind_and_rate, "action": "append", "default": []}
    option("--plant", help=PLANT_HELP, **plant)
    option("--float32", action="store_true", help="store x as 32-bit floats")

    words = "read a PCam folder from end to end, say what is wrong"
    option = add_verb("verify", run_verify, words, "dir")
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

    splits, skipped = import_images(args.src, args.to, args.valid_share)
    say_left_out(args.src, skipped)
    for lacking in {"train", "valid"} - set(splits):
        say(f"note: {args.src} has no split {lacking}, which training needs")
    return verify(args.to, splits, {"skipped": skipped})


def run_repack(args) -> int:
    from lib.prepare.repack import LOSSES_FILE, repack

    is_written, scales, losses = repack(args.src, args.to, args.allow_loss)
    num_patches = Counter(f"{split} {kind}" for split, _, kind, _ in losses)
    for loss, num in num_patches.items():
        say(f"{num:,} patches of {loss}")
    result = {"written": is_written, "scaled_by": scales, "patches_with_losses": num_patches}
    if is_written:
        say(f"{args.to}/{LOSSES_FILE} lists the rows" if losses else "nothing was lost")
        return verify(args.to, list(scales), result)
    say(
        "nothing was written: uint8 cannot hold these values. --allow-loss writes it, with the"
        " rows concerned in a CSV"
    )
    print_result(result)
    return EXIT_FINDING


def run_download(args) -> int:
    from lib.files import read_json
    from lib.pcam import SPLITS
    from lib.prepare.download import ZENODO, download

    splits = args.splits.split(",")
    for split in splits:
        if split not in SPLITS:
            raise BadInput(f"--splits names '{split}', allowed are {', '.join(SPLITS)}")
    official = read_json(args.checksums) if args.checksums else None
    names = download(args.to, args.base_url or ZENODO, splits, official, args.timeout)
    return verify(args.to, splits, {"fetched": names})


def run_synthetic(args) -> int:
    from lib.prepare.synthetic import SyntheticPlan, write_synthetic

    sizes = {split: getattr(args, split) for split in SYNTHETIC_SIZES}
    dtype = "float32" if args.float32 else "uint8"
    planted = write_synthetic(SyntheticPlan(sizes, args.seed, dict(args.plant), dtype), args.to)
    for kind, num in planted.items():
        say(f"planted {kind}: {num:,}")
    print_result({"to": args.to, "patches": sizes, "planted": planted})
    return EXIT_DONE


def run_verify(args) -> int:
    return verify(args.dir, None, {}, args.md5)


def verify(directory, splits, result: dict, md5: bool = False) -> int:
    """Read a folder; tables and findings for the person, the JSON object with the facts of each
    split for the script; gives the exit code.
    """
    from lib.blocks import table_of
    from lib.prepare.verify import verify_folder

    rows, findings = verify_folder(directory, splits, md5)
    say(table_of(rows).to_text())
    for row in rows:
        layout = row["layout"]
        if layout != "contiguous uint8":
            say(f"note: {row['split']} is read slowly ({layout}); prepare.py repack makes it fast")
    for finding in findings:
        say(f"finding: {finding}")
    facts = {row["split"]: row for row in rows}
    print_result({"directory": directory, **result, "splits": facts, "findings": findings})
    return EXIT_FINDING if findings else EXIT_DONE


@script
def main(argv=None) -> int:
    args = build_parser().parse_args(argv)
    return args.run(args)


if __name__ == "__main__":
    sys.exit(main())
