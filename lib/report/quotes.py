"""What the repository says: definitions of its code at a commit, and its history."""

import ast
import itertools
import re

from lib.blocks import Code
from lib.command import REPOSITORY, BadInput
from lib.report.evidence import Evidence, Missing, git

NUM_COMMITS = 15
MOST_LINES = 45  # of a quoted merge conflict


def read_code(commit: str, name: str) -> str:
    """A file of the repository at a commit, empty where the commit has none. Without a commit, the
    file as it is now.
    """
    if commit:
        return git("show", f"{commit}:{name}")
    path = REPOSITORY / name
    return path.read_text(encoding="utf-8") if path.is_file() else ""


def build_code(e: Evidence, source: str, at: str = "") -> list:
    """The block of `<!-- code FILE:NAME -->`: a definition at the commit of the runs, or at another
    one that the directive names; or a part of the history.
    """
    if source in OF_HISTORY:
        find, command = OF_HISTORY[source]
        text = find(at)
        if not text:
            raise Missing(f"the history of this clone has no {source}")
        return [Code(text, command)]
    file, _, name = source.partition(":")
    commit = at or e.commit()
    if commit and not git("cat-file", "-t", commit):
        raise BadInput(f"commit {commit[:10]} is not in this clone (git fetch --unshallow)")
    line, text = find_code(file, read_code(commit, file), name)
    where = f"at {commit[:10] or 'no commit'}"
    if not line:
        raise BadInput(f"{file} has no {name or 'text'} {where}")
    e.require_unpatched(file)
    return [Code(text, f"{file}:{line} {where}")]


def find_code(file: str, text: str, name: str) -> tuple[int, str]:
    """The number of the first line, and the text, of a function, class or constant of Python with
    the comment above it; elsewhere of the block that begins with a line that holds `name`.

    The whole file without a name; (0, "") where there is none.
    """
    lines = text.splitlines()
    if not name:
        return min(1, len(lines)), text.rstrip()
    if file.endswith(".py"):
        first, last = python_lines(text, name)
    else:
        first, last = block_lines(lines, name)
    while first > 1 and lines[first - 2].lstrip().startswith("#"):
        first -= 1
    return first, "\n".join(lines[first - 1 : last]) if first else ""


def python_lines(text: str, name: str) -> tuple[int, int]:
    """The numbers of the first and the last line of what defines a name; (0, 0) where nothing
    does.
    """
    for node in ast.walk(ast.parse(text)):
        names = [ast.unparse(target) for target in getattr(node, "targets", [])]
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names = [node.name]
        if name in names:
            parts = [node, *getattr(node, "decorator_list", [])]
            return min(part.lineno for part in parts), node.end_lineno
    return 0, 0


def block_lines(lines: list[str], name: str) -> tuple[int, int]:
    """The numbers of the first line that holds `name` and of the last line of its block: the lines
    below it that are empty, or indented further.
    """
    for first, line in enumerate(lines, 1):
        if name in line:
            deeper = re.compile(rf"\s{{{len(line) - len(line.lstrip()) + 1}}}|\s*$")
            block = itertools.takewhile(deeper.match, lines[first:])
            return first, first + len(list(block))
    return 0, 0


def find_commits(commit: str) -> str:
    """The graph of the last NUM_COMMITS commits up to a commit; empty outside of a repository."""
    log = git("log", "--graph", f"-{NUM_COMMITS}", "--format=%h %s", commit, "--")
    return "\n".join(map(str.rstrip, log.splitlines()))


def find_conflict(commit: str) -> str:
    """The newest merge that two changes of one place have stopped, and how it was resolved; empty
    where there is none.
    """
    for merge in git("log", "--merges", "--format=%h", commit, "--").split():
        difference = git("show", "--remerge-diff", "--format=%h %s", merge)
        header, *files = re.split(r"(?m)^(?=diff --git )", difference)
        conflicts = [part for part in files if "<<<<<<<" in part]
        if conflicts:
            lines = (header + min(conflicts, key=len)).splitlines()
            cut = ["..."] if len(lines) > MOST_LINES else []
            return "\n".join(lines[:MOST_LINES] + cut)
    return ""


# what `code NAME` quotes, and the command that shows it
OF_HISTORY = {
    "commits": (find_commits, f"git log --graph -{NUM_COMMITS}"),
    "conflict": (find_conflict, "git show --remerge-diff"),
}
