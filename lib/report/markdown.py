"""A journal's Markdown as blocks: headings, paragraphs, lists, tables, figures and code."""

import re
from pathlib import Path

from lib.blocks import Code, Figure, Heading, Items, Table, Words

FENCED = re.compile(r"(?ms)^(`{3,})[^\n]*\n(.*?)\n?^\1`*$")
# a comment, and the caption of a figure, which shows its title itself
LEFT_OUT = re.compile(r"(?s)<!--.*?-->|(?<=\))\n\n\*[^*\n]+\*$", re.MULTILINE)
# the mark at the start of a paragraph, which says what it is
HEADING = re.compile(r"(#+) +(.*)\n?")
IMAGE = re.compile(r"!\[([^\]]*)\]\(([^)]+)\)\n?")
ITEM = re.compile(r"(?m)^ *(?:[-*]|\d+\.) +")
CELL_END = re.compile(r"(?<!\\)\|")


def parse_markdown(text: str, root: Path) -> list:
    """The blocks of a Markdown text; the paths of its images begin at `root`."""
    blocks = []
    # parts: text, the marks of a fence, what is fenced, text, ...
    for number, part in enumerate(FENCED.split(text)):
        if number % 3 == 0:
            for paragraph in re.split(r"\n\s*\n", LEFT_OUT.sub("", part)):
                blocks += parse_paragraph(paragraph.strip(), root)
        elif number % 3 == 2:
            blocks.append(Code(part, ""))
    return blocks


def parse_paragraph(text: str, root: Path) -> list:
    """The blocks of lines without an empty one between them."""
    heading = HEADING.match(text)
    mark = heading or IMAGE.match(text)
    if heading:
        blocks = [Heading(heading[2], min(3, max(2, len(heading[1]))))]
    elif mark:
        path = root / mark[2]
        blocks = [Figure(mark[1], path.read_bytes() if path.is_file() else b"")]
    if mark:
        return blocks + parse_paragraph(text[mark.end() :], root)
    if text.startswith("|"):
        return [parse_table(text)]
    if ITEM.match(text):
        items = [" ".join(item.split()) for item in ITEM.split(text)[1:]]
        return [Items(items, is_ordered=text[0].isdigit())]
    return [Words(" ".join(text.split()))] if text else []


def parse_table(text: str) -> Table:
    """A table; its second line is the rule below the head."""
    rows = []
    for line in text.splitlines():
        cells = CELL_END.split(line.strip().strip("|"))
        rows.append([cell.strip().replace("\\|", "|") for cell in cells])
    header = rows[0]
    blank = [""] * len(header)
    return Table(header, [(row + blank)[: len(header)] for row in rows[2:]])
