#!/usr/bin/env python3
"""Is this stick what was written, and does it compute here what it computed there? Needs Python's
standard library alone.

python3 verify.py                      every file against SHA256SUMS: what is changed, missing or
                                       additional is named
python3 verify.py --python             the same, and whether this Python fits the wheels
python3 verify.py --predictions FILE   predictions of patches/ against expected.csv

Exit codes: 0 as it should be, 1 it is not, 2 this stick cannot be used here. It finds damage, not
forgery: who can write here can write SHA256SUMS too, so compare its digest, the last line's
`sha256sums`, with what the sender says.
"""

import sys

if not sys.flags.isolated and sys.path:
    # this folder: a file in it that is called like a module must not be run before it was checked
    sys.path.pop(0)

import argparse
import csv
import hashlib
import json
import os
import platform
from pathlib import Path

SUMS = "SHA256SUMS"
# what macOS and Windows leave on a medium that was plugged into them; none of it is ever run
LEFT_BY_SYSTEMS = {
    ".DS_Store",
    ".Spotlight-V100",
    ".Trashes",
    ".fseventsd",
    "$RECYCLE.BIN",
    "System Volume Information",
    "Thumbs.db",
    "desktop.ini",
}


def say(text):
    print(text, file=sys.stderr, flush=True)


def read_about(stick):
    return json.loads((stick / "stick.json").read_text(encoding="utf-8"))


def read_probabilities(path):
    with open(path, encoding="utf-8", newline="") as file:
        return [float(row["probability"] or "nan") for row in csv.DictReader(file)]


def sha256(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def list_files(stick):
    """Names of all files below the stick but SHA256SUMS and what an operating system has left."""
    names = set()
    for folder, folders, files in os.walk(stick):
        for name in [*folders, *files]:
            path = Path(folder, name)
            if name in LEFT_BY_SYSTEMS or name.startswith("._"):
                folders[:] = [other for other in folders if other != name]
            elif not path.is_dir() or path.is_symlink():
                names.add(path.relative_to(stick).as_posix())
    return names - {SUMS}


def check_files(stick):
    """{"changed", "missing", "additional": names} against SHA256SUMS, and what is wrong."""
    expected = {}
    for line in (stick / SUMS).read_text(encoding="utf-8").splitlines():
        digest, _, name = line.partition("  ")
        expected[name] = digest
    names = list_files(stick)
    both = sorted(names & expected.keys())
    wrong = {
        "changed": [name for name in both if sha256(stick / name) != expected[name]],
        "missing": sorted(expected.keys() - names),
        "additional": sorted(names - expected.keys()),
    }
    for kind in wrong:
        for name in wrong[kind]:
            say(f"{kind}: {name}")
    is_wrong = any(wrong.values())
    error = "files are not as they were written; nothing is installed or run" if is_wrong else ""
    return dict(wrong, num_files=len(expected), sha256sums=sha256(stick / SUMS)), error


def check_python(stick):
    """A sentence if this Python cannot use the wheels, or an empty text."""
    wanted = "Python {python} on {system} {machine}".format(**read_about(stick))
    version = "{}.{}".format(*sys.version_info)
    here = f"Python {version} on {platform.system()} {platform.machine()}"
    if here == wanted:
        return ""
    return f"the wheels are for {wanted}, this is {here}; PCAM_PYTHON=/path/to/python names another"


def check_predictions(path, stick):
    """How many probabilities of the sample patches are those of the sender, and what is wrong."""
    expected = read_probabilities(stick / "expected.csv")
    ours = read_probabilities(path)
    tolerance = read_about(stick)["tolerance"]
    num_alike = 0
    for one, other in zip(expected, ours, strict=False):
        num_alike += abs(one - other) <= tolerance
    result = {"num_patches": len(expected), "num_alike": num_alike, "tolerance": tolerance}
    if num_alike == len(expected) == len(ours):
        return result, ""
    return result, f"{num_alike} of {len(expected)} sample patches get the same answer here"


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    here = Path(__file__).absolute().parent
    parser.add_argument("--stick", default=here, type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--python", action="store_true")
    parser.add_argument("--predictions", metavar="FILE")
    args = parser.parse_args()
    code = 1
    if not (args.stick / SUMS).is_file():
        code = 2
        result = {}
        error = f"{args.stick} has no {SUMS}: it was not written to its end"
    elif args.predictions:
        result, error = check_predictions(args.predictions, args.stick)
    else:
        result, error = check_files(args.stick)
        if args.python and not error:
            code = 2
            error = check_python(args.stick)
    if error:
        say(f"error: {error}")
        result["error"] = error
    print(json.dumps(result))
    return code if error else 0


if __name__ == "__main__":
    sys.exit(main())
