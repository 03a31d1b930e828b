"""Numbers and tables of README.md and docs/ from the files that hold them: python tests/fill_docs.py

`<!-- value FILE key -->` stands before a number, bold words or code, which is replaced by the value
in a JSON file; a key is a path such as rows.0.measured. The number of decimals stays.
`<!-- table SOURCE ... -->` and `<!-- end -->` stand around a table. SOURCE is the JSON file of a
proof with the parts to show, or one of lib/sources.py, lib/*.py (modules) and lib/*/ (chapters).
"""

import ast
import json
import re
import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))

from lib.blocks import Table  # noqa: E402
from lib.sources import locate_sources  # noqa: E402

PAGES = [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").glob("*.md"))]
CODE = r"`[^`\n]*`"
SHOWN = rf"\*\*[^*]+\*\*|{CODE}|-?[\d,]+(?:\.\d+)?%?"
VALUE = re.compile(rf"{CODE}|(<!-- value (\S+) (\S+) -->)({SHOWN})")
TABLE = re.compile(rf"(?s){CODE}|(<!-- table (.*?) -->\n)(.*?)(<!-- end -->)")


def read_value(name: str, key: str):
    """The value in a JSON file at a path of keys and row numbers."""
    value = json.loads((REPOSITORY / name).read_text())
    for part in key.split("."):
        value = value[int(part) if isinstance(value, list) else part]
    return value


def format_value(value, shown: str) -> str:
    """A value in the form of the text that is there now. Of a text, the number that is shown stays
    where the text still has it; else its first number is taken.
    """
    if isinstance(value, str):
        mark = re.match(r"\*\*|`|", shown)[0]
        if mark:
            return f"{mark}{value}{mark}"
        numbers = re.findall(r"-?\d[\d,]*(?:\.\d+)?%?", value)
        return shown if shown in numbers else numbers[0]
    num_decimals = len(shown.rstrip("%").partition(".")[2])
    if shown.endswith("%"):
        return f"{100 * value:.{num_decimals}f}%"
    return f"{value:,.{num_decimals}f}"


def fill_value(match: re.Match) -> str:
    directive, name, key, shown = match.groups()
    if directive is None:  # code that shows a directive
        return match[0]
    return directive + format_value(read_value(name, key), shown)


def build_proof_table(results: dict) -> Table:
    """The rows of a proof's parts, {part: {rows, date, commit, machine}}, as a table."""
    held_words = {True: "yes", False: "**missed**", None: "-"}
    cells = []
    for part, facts in results.items():
        for row in facts["rows"]:
            origin = [facts["date"], facts["commit"], row.get("card") or facts.get("machine")]
            when = ", ".join(filter(None, origin))
            figures = [row["asked"], row["measured"], row.get("limit", "")]
            cells.append([*figures, held_words[row["held"]], part, when])
    return Table(["asked", "measured", "limit", "held", "part", "date, commit, machine"], cells)


def read_proof(name: str, *parts: str) -> Table:
    """The parts of a proof's JSON file, or all, as a table."""
    results = json.loads((REPOSITORY / name).read_text())
    return build_proof_table({part: results[part] for part in parts or results})


def build_sources_table() -> Table:
    rows = locate_sources(lambda name: (REPOSITORY / name).read_text())
    cells = [[row["source"], row["control"], f"`{row['file']}`"] for row in rows]
    return Table(["source", "control", "file"], cells)


def build_module_table() -> Table:
    """The modules of the core, each with the first sentence of its docstring."""
    rows = []
    for path in sorted((REPOSITORY / "lib").glob("*.py")):
        words = (ast.get_docstring(ast.parse(path.read_text())) or "").split()
        rows.append([path.stem, re.split(r"(?<=\.) ", " ".join(words))[0]])
    return Table(["module", "idea"], rows)


def build_chapter_table() -> Table:
    """The folders below lib/, each with the names of its modules."""
    rows = []
    for init in sorted((REPOSITORY / "lib").rglob("*/__init__.py")):
        names = [path.stem for path in sorted(init.parent.glob("*.py")) if path != init]
        rows.append([f"`{init.parent.relative_to(REPOSITORY)}/`", ", ".join(names)])
    return Table(["folder", "modules"], rows)


TABLES = {
    "lib/sources.py": build_sources_table,
    "lib/*.py": build_module_table,
    "lib/*/": build_chapter_table,
}


def fill_table(match: re.Match) -> str:
    directive, source, _, end = match.groups()
    if directive is None:
        return match[0]
    table = TABLES[source]() if source in TABLES else read_proof(*source.split())
    return f"{directive}\n{table.to_markdown()}\n\n{end}"


def fill(text: str) -> str:
    """A page with its numbers and tables as the files have them."""
    return TABLE.sub(fill_table, VALUE.sub(fill_value, text))


def main() -> int:
    for page in PAGES:
        text = page.read_text()
        filled = fill(text)
        if filled != text:
            page.write_text(filled)
            print(page.relative_to(REPOSITORY))
    return 0


if __name__ == "__main__":
    sys.exit(main())
