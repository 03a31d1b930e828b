"""What the repository says: definitions of its code at a commit, and its history."""

import ast
import functools
import re

from lib import rundir
from lib.command import REPOSITORY, BadInput

NUM_COMMITS = 15
MOST_LINES = 45  # of a quoted merge conflict


# a journal asks for the same files and commits many times
git = functools.cache(rundir.git)


def read_code(commit: str, name: str) -> str:
    """A file of the repository at a commit, empty where the commit has none. Without a commit, the
    file as it is now.
    """
    if commit:
        return git("show", f"{commit}:{name}")
    path = REPOSITORY / name
    return path.read_text(encoding="utf-8") if path.is_file() else ""


def quote_code(commit: str, file: str, name: str) -> tuple[int, str]:
    """The number of the first line, and the text, of a definition in a file at a commit: see
    `find_code`. Raises BadInput where there is none.
    """
    if commit and not git("cat-file", "-t", commit):
        raise BadInput(f"commit {commit[:10]} is not in this clone (git fetch --unshallow)")
    text = read_code(commit, file)
    line, quote = find_code(file, text, name)
    if not line:
        raise BadInput(f"{file} has no {name or 'text'} at commit {commit[:10] or 'none'}")
    return line, quote


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
        targets = node.targets if isinstance(node, ast.Assign) else []
        names = [target.id for target in targets if isinstance(target, ast.Name)]
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names = [node.name]
        if name in names:
            decorators = getattr(node, "decorator_list", [])
            return min(part.lineno for part in [node, *decorators]), node.end_lineno
    return 0, 0


def block_lines(lines: list[str], name: str) -> tuple[int, int]:
    """The numbers of the first line that holds `name` and of the last line of its block: the lines
    below it that are indented further.
    """
    first = next((number for number, line in enumerate(lines, 1) if name in line), 0)
    last = first
    while first and last < len(lines) and indentation(lines[last]) > indentation(lines[first - 1]):
        last += 1
    return first, last


def indentation(line: str) -> int:
    """The number of blanks before a line; an empty line ends no block."""
    return len(line) - len(line.lstrip()) if line.strip() else 1 << 16


def find_commits(commit: str) -> str:
    """The graph of the last NUM_COMMITS commits up to a commit; empty outside of a repository."""
    log = git("log", "--graph", f"-{NUM_COMMITS}", "--format=%h %s", commit, "--")
    return "\n".join(line.rstrip() for line in log.splitlines())


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
