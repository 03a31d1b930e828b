"""A journal's Markdown as blocks: headings, paragraphs, lists, tables, figures and code."""

import re
from pathlib import Path

from lib.blocks import Code, Figure, Heading, Items, Table, Words

COMMENT = re.compile(r"<!--.*?-->", re.DOTALL)
IMAGE = re.compile(r"!\[([^\]]*)\]\(([^)]+)\)")
ITEM = re.compile(r"(?:[-*]|\d+\.) +(.*)")
PLACEHOLDER = "\0"  # stands for a fenced text while comments are taken out


def parse_markdown(text: str, root: Path) -> list:
    """The blocks of a Markdown text; the paths of its images begin at `root`."""
    fenced = []

    def hide(match):
        fenced.append(match[2])
        return PLACEHOLDER

    text = re.sub(r"(?ms)^(`{3,})[^\n]*\n(.*?)\n?^\1`*$", hide, text)
    text = COMMENT.sub("", text)
    blocks, waiting = [], iter(fenced)
    for paragraph in re.split(r"\n\s*\n", text):
        if paragraph.strip() == PLACEHOLDER:
            blocks.append(Code(next(waiting), ""))
        elif paragraph.strip():
            lines = paragraph.strip().splitlines()
            if not (blocks and is_caption(lines, blocks[-1])):
                blocks += parse_paragraph(lines, root, len(blocks))
    return blocks


def is_caption(lines: list[str], block) -> bool:
    """Whether lines are the caption of a figure, which shows its title by itself."""
    return isinstance(block, Figure) and lines == [f"*{block.title}.*"]


def parse_paragraph(lines: list[str], root: Path, number: int) -> list:
    """The blocks of lines without an empty one between them."""
    heading = re.match(r"(#+) +(.*)", lines[0])
    if heading:
        level = min(3, max(2, len(heading[1])))
        rest = parse_paragraph(lines[1:], root, number + 1) if lines[1:] else []
        anchor = f"section-{number}" if level == 2 else ""
        return [Heading(heading[2], level, anchor), *rest]
    image = IMAGE.fullmatch(lines[0])
    if image:
        path = root / image[2]
        png = path.read_bytes() if path.is_file() else b""
        caption = " ".join(lines[1:])
        return [Figure(image[1], png), *([Words(caption)] if caption else [])]
    if lines[0].startswith("|"):
        return [parse_table(lines)]
    if ITEM.match(lines[0]):
        return [parse_items(lines)]
    return [Words(" ".join(line.strip() for line in lines))]


def parse_table(lines: list[str]) -> Table:
    """A table; its second line is the rule below the head."""
    rows = []
    for line in lines:
        cells = re.split(r"(?<!\\)\|", line.strip().strip("|"))
        rows.append([cell.strip().replace("\\|", "|") for cell in cells])
    header, body = rows[0], rows[2:]
    width = len(header)
    return Table(header, [(row + [""] * width)[:width] for row in body])


def parse_items(lines: list[str]) -> Items:
    """A list; a line without a mark goes on with the item before it."""
    items = []
    for line in lines:
        item = ITEM.match(line.strip())
        if item:
            items.append(item[1])
        else:
            items[-1] += f" {line.strip()}"
    return Items(items, is_ordered=lines[0][0].isdigit())
