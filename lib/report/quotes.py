"""What the repository says: definitions of its code at a commit, and its history."""

import ast

from lib.blocks import Code
from lib.command import BadInput
from lib.report.evidence import Evidence, Missing, git

MOST_LINES = 45  # of a quoted merge conflict
# what `code NAME` quotes of the history, as arguments of git
HISTORY = {
    "commits": ("log", "--graph", "-15", "--format=%h %s"),
    # the newest merge in which two changes of one place met, and how it was resolved
    "conflict": ("log", "--merges", "-1", "--remerge-diff", "-G<<<<<<<", "--format=%h %s"),
}


def read_code(commit: str, name: str) -> str:
    """A file of the repository at a commit, empty where the commit has none."""
    return git("show", f"{commit}:{name}")


def build_code(e: Evidence, source: str, *, at: str = "") -> list:
    """The block of `<!-- code FILE:NAME -->`: a definition at the commit of the runs; or a part of
    the history up to the commit `at`.
    """
    if source in HISTORY:
        return [quote_history(source, at)]
    file, _, name = source.partition(":")
    commit = e.commit(file)
    line, text = find_code(file, read_code(commit, file), name)
    where = f"at {commit[:10]}"
    if not line:
        remedy = "git fetch --unshallow gets commits that this clone lacks"
        raise BadInput(f"{file} has no {name} {where}; {remedy}")
    return [Code(text, f"{file}:{line} {where}")]


def quote_history(name: str, commit: str) -> Code:
    """The output of a command of HISTORY. Raises Missing where there is none."""
    lines = [line.rstrip() for line in git(*HISTORY[name], commit, "--").splitlines()]
    if not lines:
        raise Missing(f"the history of this clone has no {name}")
    return Code("\n".join(lines[:MOST_LINES]), " ".join(["git", *HISTORY[name]]))


def find_code(file: str, text: str, name: str) -> tuple[int, str]:
    """The number of the first line, and the text, of what defines a name in Python; in other files
    the first line that holds it. (0, "") where there is none.
    """
    lines = text.splitlines()
    if not file.endswith(".py"):
        numbers = [number for number, line in enumerate(lines) if name in line]
        return (numbers[0] + 1, lines[numbers[0]]) if numbers else (0, "")
    for node in ast.walk(ast.parse(text)):
        names = [ast.unparse(target) for target in getattr(node, "targets", [])]
        if name in [*names, getattr(node, "name", "")]:
            return node.lineno, "\n".join(lines[node.lineno - 1 : node.end_lineno])
    return 0, ""
