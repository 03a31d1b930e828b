"""A journal's Markdown as blocks: headings, paragraphs, lists, tables, figures and code."""

import re
from pathlib import Path

from lib.blocks import Code, Figure, Heading, Items, Table, Words

COMMENT = re.compile(r"<!--.*?-->", re.DOTALL)
FENCED = re.compile(r"(?ms)^(`{3,})[^\n]*\n(.*?)\n?^\1`*$")
# the mark at the start of a paragraph, which says what it is
HEADING = re.compile(r"(#+) +(.*)")
IMAGE = re.compile(r"!\[([^\]]*)\]\(([^)]+)\)")
ITEM = re.compile(r"(?m)^ *(?:[-*]|\d+\.) +")


def parse_markdown(text: str, root: Path) -> list:
    """The blocks of a Markdown text; the paths of its images begin at `root`."""
    blocks = []
    # parts: text, the marks of a fence, what is fenced, text, ...
    parts = FENCED.split(text)
    for number in range(0, len(parts), 3):
        for paragraph in re.split(r"\n\s*\n", COMMENT.sub("", parts[number])):
            if paragraph.strip() and not is_caption(paragraph.strip(), blocks):
                blocks += parse_paragraph(paragraph.strip(), root, len(blocks))
        if number + 2 < len(parts):
            blocks.append(Code(parts[number + 2], ""))
    return blocks


def is_caption(paragraph: str, blocks: list) -> bool:
    """Whether a paragraph is the caption of the figure before it, which shows its title itself."""
    return bool(blocks) and paragraph == f"*{getattr(blocks[-1], 'title', None)}.*"


def parse_paragraph(text: str, root: Path, number: int) -> list:
    """The blocks of lines without an empty one between them."""
    first, _, rest = text.partition("\n")
    heading = HEADING.fullmatch(first)
    image = IMAGE.fullmatch(first)
    if heading:
        level = min(3, max(2, len(heading[1])))
        blocks = [Heading(heading[2], level, f"section-{number}" if level == 2 else "")]
    elif image:
        path = root / image[2]
        blocks = [Figure(image[1], path.read_bytes() if path.is_file() else b"")]
    elif first.startswith("|"):
        return [parse_table(text)]
    elif ITEM.match(text):
        items = [" ".join(item.split()) for item in ITEM.split(text)[1:]]
        return [Items(items, is_ordered=text[0].isdigit())]
    else:
        return [Words(" ".join(text.split()))]
    return blocks + parse_paragraph(rest, root, number + 1) if rest else blocks


def parse_table(text: str) -> Table:
    """A table; its second line is the rule below the head."""
    rows = []
    for line in text.splitlines():
        cells = re.split(r"(?<!\\)\|", line.strip().strip("|"))
        rows.append([cell.strip().replace("\\|", "|") for cell in cells])
    header = rows[0]
    body = rows[2:]
    width = len(header)
    return Table(header, [(row + [""] * width)[:width] for row in body])
