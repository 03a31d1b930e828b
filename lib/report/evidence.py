"""What a journal cites: files of runs, searches and audits, copied beside it; their digests; and
code as it was at a commit.
"""

import ast
import contextlib
import functools
import json
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from lib.command import BadInput, nearest, one_line, say
from lib.config import HINTS, plain, read_yaml
from lib.files import file_digest, read_csv, read_json, write_csv, write_json
from lib.report.runs import UNCOMPARED_KEYS, list_runs, table_of_runs
from lib.rundir import REPOSITORY

KEPT = "assets/evidence"
CHAMPION = "assets/champion"
RUN_FILES = ("config.yaml", "epochs.csv", "steps.csv", "summary.json")
PRIVATE = {
    "argv",
    "cwd",
    "pid",
    "process_start",
    "submitted",
    "untracked_files",
    "uncommitted_patch",
    "earlier_starts",
}
NUM_SEEDS, MOST_SEEDS = 3, 5
MOST_ROWS, MOST_LINES = 12, 45  # of a finding; of a quoted difference
SAID = dict.fromkeys(("group", "repository", "remark", "search", "audit", "twin"), str)
SAID |= {"members": list, "runs": list, "pictures": dict, "answers": dict}
PICTURES = ("damage", "errors", "remark")
SAID_AS = {str: "text", list: "a list", dict: "names with values"}
NUMBER = re.compile(r"(?<![\w.-])-?\.?\d[\d.,]*\w*%?")  # F2, s1 and SHA-256 are names


@dataclass(frozen=True)
class Evidence:
    """The folder of a journal, the commit whose code it quotes (empty outside of git), and what
    journal.yaml says.
    """

    root: Path
    commit: str
    said: dict

    def names(self, pattern: str) -> list[str]:
        """Files and folders below the root, in order."""
        return sorted(path.relative_to(self.root).as_posix() for path in self.root.glob(pattern))

    def has(self, name: str) -> bool:
        return (self.root / name).is_file()

    def json(self, name: str) -> dict:
        """An object; empty where there is no such file."""
        return read_json(self.root / name) if self.has(name) else {}

    def csv(self, name: str) -> list[dict[str, str]]:
        return read_csv(self.root / name) if self.has(name) else []

    def digest(self, name: str) -> str:
        """The first digits of a file's SHA-256."""
        return file_digest(self.root / name)[:12] if self.has(name) else "missing"

    def findings(self, audit: str, *checks: str) -> list[dict]:
        """Findings of an audit whose check begins with one of `checks`; all without any."""
        found = self.json(f"{KEPT}/{audit}/findings.json").get("findings", [])
        return [row for row in found if not checks or row["check"].startswith(checks)]


def read_said(path) -> dict:
    """What journal.yaml says. Raises BadInput for an unknown key, for a value of the wrong kind,
    and for a number in an answer: numbers come from files."""
    said = read_yaml(path)
    for key, value in said.items():
        if key not in SAID:
            raise BadInput(
                f"{path}: unknown key {key!r}{nearest(key, SAID) or f' (allowed: {sorted(SAID)})'}"
            )
        if value and not isinstance(value, SAID[key]):
            raise BadInput(f"{path}: {key} must be {SAID_AS[SAID[key]]}, not {value!r}")
    for member in said.get("members") or []:
        if not isinstance(member, dict) or not all(
            isinstance(member.get(part), str) for part in ("name", "id")
        ):
            raise BadInput(
                f"{path}: a member is {{name: ..., id: '...'}}, the number in quotes, not"
                f" {member!r}"
            )
    if wrong := [name for name in said.get("runs") or [] if not isinstance(name, str)]:
        raise BadInput(f"{path}: runs names run folders, not {wrong[0]!r}")
    for key, name in (said.get("pictures") or {}).items():
        if (
            key not in PICTURES
            or not isinstance(name, str | None)
            or (name and key != "remark" and not name.endswith(".png"))
        ):
            raise BadInput(
                f"{path}: pictures are {{damage: FILE.png, errors: FILE.png, remark: text}}, not"
                f" {key}: {name!r}"
            )
    for key, text in {**(said.get("answers") or {}), "remark": said.get("remark")}.items():
        if text and not isinstance(text, str):
            raise BadInput(f"{path}: the answer {key} must be text, not {text!r}")
        if number := NUMBER.search(str(text or "")):
            raise BadInput(
                f"{path}: the answer {key} holds the number {number[0]}: numbers come from files,"
                " words from here"
            )
    return said


# git and code


@functools.cache
def git(*arguments: str) -> str:
    """What git says of this repository; empty where it has no answer."""
    command = ["git", "-C", str(REPOSITORY), *arguments]
    result = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    return "" if result.returncode else result.stdout


def read_code(commit: str, name: str) -> str:
    """A file of the repository at a commit, empty where it had none; outside of git as it is
    now.
    """
    return (
        git("show", f"{commit}:{name}")
        if commit
        else (REPOSITORY / name).read_text(encoding="utf-8")
    )


def find_code(file: str, text: str, name: str) -> tuple[int, str]:
    """First line number and text, with the comment above, of a function, class or constant of
    Python, of a paragraph of prose or a block of another file, by words of its first line; of all
    without a name. (0, "") where there is none."""
    lines = text.splitlines()
    if not name:
        return min(1, len(lines)), text.rstrip()
    first = last = next((number for number, line in enumerate(lines, 1) if name in line), 0)
    if file.endswith(".py"):
        first, last = next(
            (lines_of(node) for node in ast.walk(ast.parse(text)) if name in names_of(node)), (0, 0)
        )
    elif file.endswith(".md"):
        while first > 1 and lines[first - 2].strip() and not lines[first - 1].startswith("- "):
            first -= 1
        while (
            first and last < len(lines) and lines[last].strip() and not lines[last].startswith("- ")
        ):
            last += 1
    else:
        while (
            first and last < len(lines) and indentation(lines[last]) > indentation(lines[first - 1])
        ):
            last += 1
    while first > 1 and lines[first - 2].lstrip().startswith("#"):
        first -= 1
    return first, "\n".join(lines[first - 1 : last]) if first else ""


def names_of(node: ast.AST) -> list[str]:
    """What a statement of Python defines: a function, a class, or constants."""
    if isinstance(node, ast.Assign):
        return [target.id for target in node.targets if isinstance(target, ast.Name)]
    return [node.name] if isinstance(node, (ast.FunctionDef, ast.ClassDef)) else []


def lines_of(node) -> tuple[int, int]:
    return (
        min(each.lineno for each in [node, *getattr(node, "decorator_list", ())]),
        node.end_lineno,
    )


def indentation(line: str) -> int:
    # an empty line ends no block
    return len(line) - len(line.lstrip()) if line.strip() else 1 << 16


def find_conflict(commit: str) -> str:
    """The newest merge that was stopped by two changes of one place, and how it was resolved; empty
    where there is none.
    """
    for merge in git("log", "--merges", "--format=%h", commit, "--").split():
        parts = re.split(
            r"(?m)^(?=diff --git )", git("show", "--remerge-diff", "--format=%h %s", merge)
        )
        if conflicts := [part for part in parts if "<<<<<<<" in part]:
            lines = (parts[0] + min(conflicts, key=len)).splitlines()
            return "\n".join(lines[:MOST_LINES] + ["..."] * (len(lines) > MOST_LINES)) + "\n"
    return ""


# which files, and their copies


def choose_seeds(rows: list[dict], wanted: list[str]) -> list[dict]:
    """Of all runs those that are `wanted`, or the newest finished ones, three or more, that differ
    in the seed alone.
    """
    if wanted:
        there = {row["run"]: row for row in rows}
        return [there[name] for name in wanted] if set(wanted) <= set(there) else []
    groups = {}
    for row in (row for row in rows if row["status"] == "finished"):  # in the order of their starts
        same = repr([row.get(key) for key in sorted({*HINTS, "data"} - UNCOMPARED_KEYS - {"seed"})])
        groups.setdefault(same, {})[row["seed"]] = row
    groups = [
        list(group.values())[-MOST_SEEDS:] for group in groups.values() if len(group) >= NUM_SEEDS
    ]
    return max(groups, key=lambda group: max(row["run"] for row in group), default=[])


def newest(root: Path, said: str | None, pattern: str) -> Path | None:
    """The folder that journal.yaml names, or of those with such a file the one in which it is
    newest.
    """
    if said:
        if (root / said).is_dir():
            return root / said
        say(
            f"note: journal.yaml names {said}, which is not here: what was gathered of it before"
            " stays"
        )
        return None
    found = sorted(root.glob(pattern), key=lambda path: (path.stat().st_mtime, path))
    return found[-1].parent if found else None


def gather(root: Path, said: dict, commit: str) -> None:
    """Copy what the journal will cite into assets/evidence; what was copied before, and is not
    here, stays.

    Raises BadInput for a run that journal.yaml names and that is in neither place.
    """
    kept = root / KEPT
    rows = list_runs(root / "runs") if (root / "runs").is_dir() else []
    seeds = choose_seeds(rows, said.get("runs") or [])
    # the table of a clone's first tries replaces none of evidence
    if seeds or (rows and not (kept / "runs.csv").exists()):
        # of which a name is published, not where it lies
        paths = ("data_dir", "quarantine", "weights")
        shown = [row | {key: Path(row[key]).name for key in paths if row.get(key)} for row in rows]
        table = table_of_runs(shown)
        summaries = [root / "runs" / row["run"] / "summary.json" for row in rows]
        digests = [file_digest(path)[:12] if path.is_file() else "" for path in summaries]
        cells = [
            [*map(plain, row), digest] for row, digest in zip(table.rows, digests, strict=True)
        ]
        kept.mkdir(parents=True, exist_ok=True)
        write_csv(kept / "runs.csv", [*table.header, "summary_sha256"], cells)
    if seeds:
        with replaced(kept / "seeds") as target:
            for row in seeds:
                gather_run(root / "runs" / row["run"], target / row["run"], root)
    elif missing := [
        name for name in said.get("runs") or [] if not (kept / "seeds" / name).is_dir()
    ]:
        raise BadInput(
            f"journal.yaml: runs names {missing[0]}, which is neither in {root / 'runs'} nor in"
            f" {kept / 'seeds'}"
        )

    if search := newest(root, said.get("search"), "sweeps/*/rung-1.json"):
        with replaced(kept / "search") as target:
            copy_files(search, target, "plan.json", "champion.json", "rung-*.json", "trials.png")
            for path in {target / "plan.json", *target.glob("*.json")}:
                read_json(path)
    if audit := newest(root, said.get("audit"), "audit-*/quarantine.csv"):
        with replaced(kept / "audit") as target:
            gather_findings(audit, target, root)
            copy_files(audit, target, "histograms.csv", "power.csv", "counts.png", "histograms.png")
    if twin := newest(root, said.get("twin"), "audit-*/twin.html"):
        with replaced(kept / "twin") as target:
            findings = gather_findings(twin, target, root)
            copy_files(twin, target, "timeline.png")
            folders = [
                row["folder"]
                for found in findings
                if found["check"] == "runs"
                for row in found["rows"]
            ]
            gather_timeline(
                *(REPOSITORY / folder / "trace.csv" for folder in folders), target / "timeline.csv"
            )
    for kind in PICTURES[:2]:
        name = (said.get("pictures") or {}).get(kind)
        if name and (root / name).is_file():
            (kept / "pictures").mkdir(parents=True, exist_ok=True)
            shutil.copy(root / name, kept / "pictures" / f"{kind}.png")
    if conflict := find_conflict(commit):
        with replaced(kept / "git") as target:
            (target / "conflict.diff").write_text(conflict, encoding="utf-8")


@contextlib.contextmanager
def replaced(folder: Path):
    """An empty folder to fill, which takes the place of `folder` once it is filled; after an error
    that stays as it was.
    """
    filled = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(filled, ignore_errors=True)
    filled.mkdir(parents=True)
    try:
        yield filled
        shutil.rmtree(folder, ignore_errors=True)
        filled.rename(folder)
    finally:
        shutil.rmtree(filled, ignore_errors=True)


def copy_files(source: Path, target: Path, *patterns: str) -> None:
    for path in (path for pattern in patterns for path in sorted(source.glob(pattern))):
        shutil.copy(path, target)


def gather_run(run: Path, target: Path, root: Path) -> None:
    """A run's small files, and of meta.json what may be published: no folders, no host, no
    patch.
    """
    target.mkdir()
    copy_files(run, target, *RUN_FILES)
    meta = read_json(run / "meta.json")
    machine = {key: value for key, value in meta["machine"].items() if key != "host"}
    kept = {key: value for key, value in meta.items() if key not in PRIVATE} | {"machine": machine}
    patched = {"patched": bool(meta.get("uncommitted_patch"))}
    write_json(target / "meta.json", {"of": source_of(run / "meta.json", root)} | kept | patched)
    text = (target / "config.yaml").read_text(encoding="utf-8")
    if str(Path.home()) in text or str(REPOSITORY) in text:
        say(
            f"note: {target}/config.yaml names folders of this machine: think of it before you"
            " publish it"
        )


def gather_findings(audit: Path, target: Path, root: Path) -> list[dict]:
    """Findings with the first of their rows; gives them whole."""
    try:
        findings = json.loads((audit / "findings.json").read_text(encoding="utf-8"))
        if not all(
            found["check"] and found["severity"] and isinstance(found["rows"], list)
            for found in findings
        ):
            raise ValueError("no findings")
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise BadInput(
            f"{audit} holds no whole findings.json ({one_line(error)}): run that audit again"
        ) from None
    cut = [
        found | {"rows": [public(row) for row in found["rows"][:MOST_ROWS]]} for found in findings
    ]
    write_json(
        target / "findings.json", {"of": source_of(audit / "findings.json", root), "findings": cut}
    )
    return findings


def gather_timeline(a: Path, b: Path, target: Path) -> None:
    """Of two traces, step by step and quantity by quantity: equal, or not."""
    if not (a.is_file() and b.is_file()):
        say(f"note: no time line of the twins: {a if b.is_file() else b} is gone (make twin)")
        return
    ours, theirs = read_csv(a), read_csv(b)
    header = [name for name in ours[0] if "." not in name]
    pairs = zip(ours, theirs, strict=True)
    write_csv(
        target,
        header,
        [[row["step"], *(int(row[n] == other[n]) for n in header[1:])] for row, other in pairs],
    )


def public(row: dict) -> dict:
    return {key: value for key, value in row.items() if key not in ("host", "folder")}


def source_of(path: Path, root: Path) -> dict:
    """Which file an extract was made from."""
    shown = (
        path.relative_to(root) if path.is_relative_to(root) else Path(path.parent.name, path.name)
    )
    return {"file": shown.as_posix(), "sha256": file_digest(path)}
