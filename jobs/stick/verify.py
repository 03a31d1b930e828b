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


def read_rows(path):
    with open(path, encoding="utf-8", newline="") as file:
        return {os.path.basename(row["source"]): row for row in csv.DictReader(file)}


def sha256(path):
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        for block in iter(lambda: file.read(1 << 20), b""):
            digest.update(block)
    return digest.hexdigest()


def is_ours(name):
    return name not in LEFT_BY_SYSTEMS and not name.startswith("._")


def list_files(stick):
    """Names of all files below the stick but SHA256SUMS and what an operating system has left; a
    link counts as a file, it is followed nowhere.
    """
    names = {}
    for folder, folders, files in os.walk(stick):
        folders[:] = filter(is_ours, folders)
        for path in [Path(folder, name) for name in [*filter(is_ours, files), *folders]]:
            if path.is_symlink() or not path.is_dir():
                names[path.relative_to(stick).as_posix()] = path
    del names[SUMS]
    return names


def is_changed(path, digest):
    """Whether a file has another digest, or is none: a pipe would never end."""
    try:
        return path.is_symlink() or not path.is_file() or sha256(path) != digest
    except OSError:  # a medium that cannot be read there any more
        return True


def check_files(stick):
    """{"changed", "missing", "additional": names} against SHA256SUMS."""
    expected = {}
    with open(stick / SUMS, encoding="utf-8", errors="surrogateescape", newline="\n") as file:
        for line in file:
            digest, _, name = line.rstrip("\n").partition("  ")
            expected[name] = digest
    paths = list_files(stick)
    wrong = {"changed": [], "missing": [], "additional": []}
    for name in sorted({*paths, *expected}):
        if name not in paths:
            kind = "missing"
        elif name not in expected:
            kind = "additional"
        elif is_changed(paths[name], expected[name]):
            kind = "changed"
        else:
            continue
        say(f"{kind}: {name}")
        wrong[kind].append(name)
    return dict(wrong, num_files=len(expected), sha256sums=sha256(stick / SUMS))


def check_python(made_for):
    """A sentence if this Python cannot use the wheels, or an empty text."""
    wanted = "Python {python} on {system} {machine}".format(**made_for)
    version = "{}.{}".format(*sys.version_info)
    here = f"Python {version} on {platform.system()} {platform.machine()}"
    remedy = "PCAM_PYTHON=/path/to/python names another"
    if here == wanted:
        return ""
    return f"the wheels on this stick are for {wanted}, this is {here}; {remedy}"


def check_predictions(path, stick, tolerance):
    """Names of the sample patches whose probability is off by more than the tolerance, or whose
    decision differs.
    """
    expected = read_rows(stick / "expected.csv")
    rows = read_rows(path)
    wrong = []
    for name, row in expected.items():
        other = rows.get(name, {"probability": "", "prediction": "none"})
        off = abs(float(row["probability"]) - float(other["probability"] or "nan"))
        if not off <= tolerance or other["prediction"] != row["prediction"]:
            wanted = f"{row['probability']} within {tolerance:g}"
            say(f"{name}: probability {other['probability']}, expected {wanted}")
            wrong.append(name)
    return {"wrong": wrong, "num_patches": len(expected), "tolerance": tolerance}


def judge(args):
    """(exit code, the result as JSON has it, a sentence on what is wrong)."""
    if not (args.stick / SUMS).is_file():
        sentence = "it was not written to its end, or it is no handover folder"
        return 2, {}, f"{args.stick} has no {SUMS}: {sentence}"
    if args.predictions:
        made_for = json.loads((args.stick / "stick.json").read_text(encoding="utf-8"))
        result = check_predictions(args.predictions, args.stick, made_for["tolerance"])
        counts = f"{len(result['wrong'])} of {result['num_patches']}"
        sentence = f"{counts} sample patches get another answer here"
        return (1, result, sentence) if result["wrong"] else (0, result, "")
    result = check_files(args.stick)
    num_wrong = sum(len(result[kind]) for kind in ("changed", "missing", "additional"))
    if num_wrong:
        sentence = "files are not as they were written; nothing is installed or run"
        return 1, result, f"{num_wrong} {sentence}"
    if args.python:
        misfit = check_python(json.loads((args.stick / "stick.json").read_text(encoding="utf-8")))
        if misfit:
            return 2, result, misfit
    say(f"{result['num_files']} files are as they were written")
    return 0, result, ""


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    here = Path(__file__).absolute().parent
    parser.add_argument("--stick", default=here, type=Path, help=argparse.SUPPRESS)
    parser.add_argument(
        "--python", action="store_true", help="does this Python fit the wheels, too"
    )
    parser.add_argument(
        "--predictions", metavar="FILE", help="compare predictions of patches/ instead"
    )
    code, result, sentence = judge(parser.parse_args())
    if sentence:
        say(f"error: {sentence}")
        result["error"] = sentence
    print(json.dumps(result))
    return code


if __name__ == "__main__":
    sys.exit(main())
