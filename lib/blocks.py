"""A result as a list of blocks: headings, words, tables, figures, galleries, lists and code. Each
block is HTML, most are also Markdown, a table is text for a terminal, and a list of blocks is a
page in one file.
"""

import base64
import html
import io
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from lib.files import atomic_write

MOST_WIDE = 8  # a table of more columns has small print
MOST_HEADINGS = 8  # of a page without a table of contents
ALARMS = ("warning", "error", "failed", "diverged", "dead")  # cells that are coloured
# marks of Markdown within a paragraph; each group is named as its tag in HTML
INLINE = re.compile(
    r"`(?P<code>[^`]+)`|\*\*(?P<b>[^*]+)\*\*|(?<![\w*])\*(?P<i>[^*\s][^*]*)\*(?!\w)"
    r"|\[(?P<text>[^\]]+)\]\((?P<link>[^)\s]+)\)|(?P<a>https?://[^\s)]+)"
)
NUMBER = re.compile(r"[-+]?[\d.,]+ ?%?|-?")
PAGE = """<!doctype html><html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width"><title>{title}</title>
<link rel="icon" href="data:,"><style>{style}</style></head><body><h1>{title}</h1>
"""
STYLE = """
body{font:16px/1.5 system-ui,sans-serif;color:#1a1a1a;max-width:70rem;margin:2rem auto;padding:0 1rem}
h1{font-size:1.7rem}h2{font-size:1.25rem;margin-top:2.5rem;border-bottom:1px solid #ccc}
img{max-width:100%}table{border-collapse:collapse;margin:1rem 0;display:block;overflow-x:auto}
td,th{padding:.25rem .75rem;border-bottom:1px solid #ddd;text-align:right;font-variant-numeric:tabular-nums}
td:first-child,th:first-child,.words{text-align:left}td:not(.words){white-space:nowrap}
th{background:#f3f3f3;cursor:pointer}th[aria-sort=ascending]::after{content:" \\25b2"}
th[aria-sort=descending]::after{content:" \\25bc"}
.dense{font-size:.8rem;white-space:nowrap}.dense td,.dense th{padding:.2rem .4rem}
.gallery{display:flex;flex-wrap:wrap;gap:.6rem}figure{margin:0}figcaption{font-size:.72rem;line-height:1.25}
.gallery img{width:100%;image-rendering:pixelated;display:block}
nav ul{columns:2;font-size:.9rem}pre{background:#f6f6f6;padding:.75rem;overflow-x:auto;font-size:.8rem;line-height:1.35}
.note{color:#555;font-size:.9rem}p.alarm{border-left:4px solid #D55E00;padding:.5rem 1rem}.alarm{background:#fde7d9}
td.words{overflow-wrap:anywhere;min-width:5rem}pre{white-space:pre-wrap;overflow-wrap:anywhere}
@media(max-width:40rem){body{font-size:14px;margin:1rem auto}nav ul{columns:1}td,th{padding:.2rem .35rem}}
@media print{html{font-size:9.5pt}body{font-size:1rem;line-height:1.35;margin:0;max-width:none}table{display:table;font-size:8pt;margin:.5rem 0}
td,th{padding:.1rem .4rem}pre{font-size:7pt;padding:.4rem}img{max-height:5.5cm}h2{margin-top:1rem}h3{margin:.7rem 0 .3rem}p{margin:.4rem 0}
td,th,.dense{white-space:normal!important;
overflow-wrap:anywhere}h2,h3{break-after:avoid}tr,figure,img{break-inside:avoid}nav{display:none}}
"""
# A click, or Enter, on the head of a column sorts the table by it, a second one in reverse. A column
# of numbers is sorted by value.
SORTING = """
for (const head of document.querySelectorAll("th")) {
  head.tabIndex = 0;
  head.onclick = () => {
    const sign = head.ariaSort === "ascending" ? -1 : 1, body = head.closest("table").tBodies[0];
    const cell = row => row.cells[head.cellIndex].textContent;
    const number = row => cell(row) ? parseFloat(cell(row).replaceAll(",", "")) : -1e99;
    const isNumber = [...body.rows].every(row => !cell(row) || /^[-+.,\\de]+$/.test(cell(row)));
    const order = isNumber ? (a, b) => number(a) - number(b) : (a, b) => cell(a).localeCompare(cell(b));
    for (const other of head.parentNode.cells) other.ariaSort = null;
    head.ariaSort = sign > 0 ? "ascending" : "descending";
    body.append(...[...body.rows].sort((a, b) => sign * order(a, b)));
  };
  head.onkeydown = event => { if (event.key === "Enter") head.click(); };
}
"""


@dataclass(frozen=True)
class Heading:
    """A heading of level 2 or 3."""

    text: str
    level: int = 2

    def to_markdown(self) -> str:
        return f"{'#' * self.level} {self.text}"

    def to_html(self) -> str:
        return f'<h{self.level} id="{anchor(self.text)}">{html.escape(self.text)}</h{self.level}>'


@dataclass(frozen=True)
class Words:
    """A paragraph, with `code`, **bold** and links marked as in Markdown.

    The kind is "note" for small print, "alarm" for a warning, or empty.
    """

    text: str
    kind: str = ""

    def to_markdown(self) -> str:
        return self.text

    def to_html(self) -> str:
        return f'<p class="{self.kind}">{inline(self.text)}</p>' if self.text else ""


@dataclass(frozen=True)
class Table:
    """Rows of values under a header. A table of many columns has small print."""

    header: list
    rows: list[list]

    def to_text(self) -> str:
        """Aligned columns for a terminal."""
        lines = [list(map(show, row)) for row in (self.header, *self.rows)]
        widths = [max(map(len, texts)) for texts in zip(*lines, strict=True)]
        return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)

    def to_markdown(self) -> str:
        lines = []
        for row in (self.header, ["---"] * len(self.header), *self.rows):
            # a bar would end the cell
            cells = [show(cell).replace("|", "\\|") for cell in row]
            lines.append(f"| {' | '.join(cells)} |")
        return "\n".join(lines)

    def to_html(self) -> str:
        first_row = self.rows[0] if self.rows else self.header
        head = html_row(self.header, first_row, "th")  # aligned like the cells below
        body = "".join(html_row(row, row, "td") for row in self.rows)
        kind = "dense" if len(self.header) > MOST_WIDE else "wide"
        return f'<table class="{kind}"><thead>{head}</thead><tbody>{body}</tbody></table>'


@dataclass(frozen=True)
class Figure:
    """A PNG with a title. `path` is where it lies, seen from the page."""

    title: str
    png: bytes = b""
    path: str = ""

    def to_markdown(self) -> str:
        return f"![{self.title}]({self.path})\n\n*{self.title}.*"

    def to_html(self) -> str:
        return html_image(self.png, self.title) + Words(f"{self.title}.", "note").to_html()


@dataclass(frozen=True)
class Gallery:
    """Patches uint8 (H, W, 3), each with a caption, for a page."""

    patches: list[np.ndarray]
    captions: list[str]

    def to_html(self) -> str:
        figures = []
        for patch, caption in zip(self.patches, self.captions, strict=True):
            image = html_image(patch_png(patch), caption)
            text = f"<figcaption>{html.escape(caption)}</figcaption>"
            figures.append(f'<figure style="width:{patch.shape[1]}px">{image}{text}</figure>')
        return f'<div class="gallery">{"".join(figures)}</div>'


@dataclass(frozen=True)
class Items:
    """A list of paragraphs, with numbers or without, for a page."""

    texts: list[str]
    is_ordered: bool = False

    def to_html(self) -> str:
        tag = "ol" if self.is_ordered else "ul"
        items = "".join(f"<li>{inline(text)}</li>" for text in self.texts)
        return f"<{tag}>{items}</{tag}>"


@dataclass(frozen=True)
class Code:
    """Text quoted from a file; `where` names the file, or is empty."""

    text: str
    where: str

    def to_markdown(self) -> str:
        where = f"`{self.where}`:\n\n" if self.where else ""
        return f"{where}````\n{self.text}\n````"

    def to_html(self) -> str:
        where = f"<p>{inline(f'`{self.where}`:')}</p>" if self.where else ""
        return f"{where}<pre><code>{html.escape(self.text)}</code></pre>"


def table_of(rows: list[dict], columns=()) -> Table:
    """A Table of dicts, with the given columns or else those of all rows."""
    columns = columns or list(dict.fromkeys(name for row in rows for name in row))
    return Table(columns, [[row.get(name) for name in columns] for row in rows])


def to_markdown(blocks) -> str:
    """Blocks as one Markdown text, without a line end at its end."""
    return "\n\n".join(block.to_markdown() for block in blocks)


def write_page(path, title: str, blocks) -> Path:
    """Write blocks as one HTML page that needs no other file, atomically, and return its path.

    A long page begins with its headings of level 2 as links. Figures that have a path are written
    there too.
    """
    links = []
    for block in blocks:
        if isinstance(block, Figure) and block.path:
            with atomic_write(Path(path).parent / block.path) as file:
                file.write(block.png)
        if isinstance(block, Heading) and block.level == 2:
            links.append(f"[{block.text}](#{anchor(block.text)})")
    parts = [PAGE.format(title=html.escape(title), style=STYLE)]
    if len(links) > MOST_HEADINGS:
        parts.append(f"<nav>{Items(links).to_html()}</nav>")
    parts += [block.to_html() for block in blocks]
    parts.append(f"<script>{SORTING}</script></body></html>\n")
    with atomic_write(path, "w") as file:
        file.write("\n".join(parts))
    return Path(path)


def anchor(text: str) -> str:
    """The name of a heading in the page: links may not hold spaces."""
    return re.sub(r"\W+", "-", text)


def show(value) -> str:
    """A value as text: floats with four digits, None as an empty text."""
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 1e4 else f"{value:,.0f}"
    if type(value) is int:
        return f"{value:,}"
    return str(value)


def html_row(cells, values, tag: str) -> str:
    """A row of cells, each with the CSS classes that fit its value: `words` are on the left and
    wrap; `alarm` is a verdict of ALARMS.
    """
    texts = []
    for cell, value in zip(cells, values, strict=True):
        is_number = not isinstance(value, str) or NUMBER.fullmatch(value)
        kind = "number" if is_number else "words"
        if cell in ALARMS:
            kind += " alarm"
        texts.append(f'<{tag} class="{kind}">{inline(show(cell))}</{tag}>')
    return f"<tr>{''.join(texts)}</tr>"


def html_image(png: bytes, description: str) -> str:
    """A PNG as part of the page; the description is for those who cannot see it."""
    data = base64.b64encode(png).decode()
    return f'<img src="data:image/png;base64,{data}" alt="{html.escape(description)}">'


def patch_png(patch: np.ndarray) -> bytes:
    """A patch uint8 (H, W, 3) as PNG, without scaling its colours."""
    buffer = io.BytesIO()
    Image.fromarray(patch).save(buffer, format="png")
    return buffer.getvalue()


def inline(text: str) -> str:
    """Text as HTML, in which Markdown's marks of INLINE have become tags."""
    return INLINE.sub(replace_mark, html.escape(text))


def replace_mark(match) -> str:
    tag, text = match.lastgroup, match[match.lastgroup]
    if tag in ("a", "link"):
        return f'<a href="{text}">{match["text"] or text}</a>'
    return f"<{tag}>{text}</{tag}>"
