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


def list_files(stick):
    """Names of all files below the stick but SHA256SUMS and what an operating system has left; a
    link counts as a file, it is followed nowhere.
    """

    def is_ours(name):
        return name not in LEFT_BY_SYSTEMS and not name.startswith("._")

    for folder, folders, files in os.walk(stick):
        folders[:] = filter(is_ours, folders)
        files = list(filter(is_ours, files))
        for name in files + [
            name for name in folders if os.path.islink(os.path.join(folder, name))
        ]:
            path = os.path.relpath(os.path.join(folder, name), stick).replace(os.sep, "/")
            if path != SUMS:
                yield path


def fail(code, sentence, result):
    say(f"error: {sentence}")
    return code, dict(result, error=sentence)


def check_files(stick):
    """{"changed", "missing", "additional": names} against SHA256SUMS."""
    with open(
        os.path.join(stick, SUMS), encoding="utf-8", errors="surrogateescape", newline="\n"
    ) as file:
        expected = {
            name: digest for digest, _, name in (line.rstrip("\n").partition("  ") for line in file)
        }
    there, wrong = set(list_files(stick)), {"changed": [], "missing": [], "additional": []}
    for name in sorted(there.union(expected)):
        path = os.path.join(stick, name)
        if name not in there:
            kind = "missing"
        elif name not in expected:
            kind = "additional"
        else:
            try:
                # a pipe would never end
                is_plain = os.path.isfile(path) and not os.path.islink(path)
                kind = "" if is_plain and sha256(path) == expected[name] else "changed"
            except OSError:  # a medium that cannot be read there any more
                kind = "changed"
        if kind:
            say(f"{kind}: {name}")
            wrong[kind].append(name)
    return dict(wrong, num_files=len(expected), sha256sums=sha256(os.path.join(stick, SUMS)))


def check_python(made_for):
    """A sentence if this Python cannot use the wheels, or an empty text."""
    here = {
        "python": "{}.{}".format(*sys.version_info),
        "system": platform.system(),
        "machine": platform.machine(),
    }
    if all(here[key] == made_for[key] for key in here):
        return ""
    wanted, found = (
        "Python {python} on {system} {machine}".format(**values) for values in (made_for, here)
    )
    return (
        f"the wheels on this stick are for {wanted}, this is {found}; PCAM_PYTHON=/path/to/python"
        " names another"
    )


def check_predictions(path, stick, tolerance):
    """Names of the sample patches whose probability is off by more than the tolerance, or whose
    decision differs.
    """
    expected, found, wrong = read_rows(os.path.join(stick, "expected.csv")), read_rows(path), []
    for name, row in expected.items():
        other = found.get(name) or {"probability": "nan", "prediction": "none"}
        off = abs(float(row["probability"]) - float(other["probability"] or "nan"))
        if not off <= tolerance or other["prediction"] != row["prediction"]:
            say(
                f"{name}: probability {other['probability']}, expected {row['probability']} within"
                f" {tolerance:g}"
            )
            wrong.append(name)
    return {"wrong": wrong, "num_patches": len(expected), "tolerance": tolerance}


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--stick", default=os.path.dirname(os.path.abspath(__file__)), help=argparse.SUPPRESS
    )
    parser.add_argument(
        "--python", action="store_true", help="does this Python fit the wheels, too"
    )
    parser.add_argument(
        "--predictions", metavar="FILE", help="compare predictions of patches/ instead"
    )
    args = parser.parse_args()
    if not os.path.isfile(os.path.join(args.stick, SUMS)):
        sentence = "it was not written to its end, or it is no handover folder"
        return fail(2, f"{args.stick} has no {SUMS}: {sentence}", {})
    if args.predictions:
        with open(os.path.join(args.stick, "stick.json"), encoding="utf-8") as file:
            result = check_predictions(args.predictions, args.stick, json.load(file)["tolerance"])
        if result["wrong"]:
            counts = f"{len(result['wrong'])} of {result['num_patches']}"
            return fail(1, f"{counts} sample patches get another answer here", result)
        return 0, result
    result = check_files(args.stick)
    num_wrong = sum(len(result[kind]) for kind in ("changed", "missing", "additional"))
    if num_wrong:
        sentence = "files are not as they were written; nothing is installed or run"
        return fail(1, f"{num_wrong} {sentence}", result)
    if args.python:
        with open(os.path.join(args.stick, "stick.json"), encoding="utf-8") as file:
            misfit = check_python(json.load(file))
        if misfit:
            return fail(2, misfit, result)
    say(f"{result['num_files']} files are as they were written")
    return 0, result


if __name__ == "__main__":
    code, result = main()
    print(json.dumps(result))
    sys.exit(code)
