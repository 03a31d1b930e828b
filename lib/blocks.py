"""One self-contained HTML file: text, tables and pictures in it, no server, no script from
elsewhere.
"""

import base64
import html
from pathlib import Path

from lib.config import plain
from lib.files import atomic_write

STYLE = """
body{font:16px/1.5 system-ui,sans-serif;color:#1a1a1a;max-width:70rem;margin:2rem auto;padding:0 1rem}
h1{font-size:1.7rem}h2{font-size:1.25rem;margin-top:2.5rem;border-bottom:1px solid #ccc}
img{max-width:100%}table{border-collapse:collapse;margin:1rem 0;display:block;overflow-x:auto}
td,th{padding:.25rem .75rem;border-bottom:1px solid #ddd;text-align:right;font-variant-numeric:tabular-nums}
td:first-child,th:first-child,.words{text-align:left}th{background:#f3f3f3}
.dense{font-size:.8rem;white-space:nowrap}.dense td,.dense th{padding:.2rem .4rem}
.gallery{display:flex;flex-wrap:wrap;gap:.6rem}figure{margin:0}figcaption{font-size:.72rem;line-height:1.25}
.gallery img{width:100%;image-rendering:pixelated;display:block}
nav ul{columns:2;font-size:.9rem}pre{background:#f6f6f6;padding:.75rem;overflow-x:auto;font-size:.8rem;line-height:1.35}
.sortable th{cursor:pointer}.sortable th[aria-sort=ascending]::after{content:" \\25b2"}
.sortable td:first-child{white-space:nowrap}.sortable th[aria-sort=descending]::after{content:" \\25bc"}
.note{color:#555;font-size:.9rem}.alarm{background:#fde7d9;border-left:4px solid #D55E00;padding:.5rem 1rem}
"""
# a click on a table's head, or Enter, orders its rows: numbers as numbers, and once more the other
# way round
SORTING = """
for (const head of document.querySelectorAll(".sortable th")) {
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


def show(value) -> str:
    """A value as text, numbers in four digits, None as nothing."""
    if isinstance(value, float):
        value = f"{value:.4g}" if abs(value) < 1e4 else f"{value:,.0f}"
    elif isinstance(value, int) and not isinstance(value, bool):
        value = f"{value:,}"
    return "" if value is None else str(value)


def text(value) -> str:
    """A value as safe HTML text."""
    return html.escape(show(value))


def table(header, rows, kind: str = "") -> str:
    """An HTML table of values, numbers on the right; of the kind sortable clicks order it
    (SORTING), dense has many columns.
    """
    rows = [[*row] for row in rows]
    heads = zip(header, rows[0] if rows else header, strict=True)
    head = "".join(
        f"<th{' class=words' * is_words(cell)}>{text(name)}</th>" for name, cell in heads
    )
    cells = (
        "".join(f"<td{' class=words' * is_words(cell)}>{text(cell)}</td>" for cell in row)
        for row in rows
    )
    body = "".join(f"<tr>{row}</tr>" for row in cells)
    return f"<table{f' class={kind}' * bool(kind)}><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def text_table(header, cells) -> str:
    """Aligned columns for a terminal; numbers in six digits."""
    lines = [
        [f"{cell:.6g}" if isinstance(cell, float) else plain(cell) for cell in row]
        for row in (header, *cells)
    ]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)


def is_words(cell) -> bool:
    return isinstance(cell, str) and (" " in cell or cell[:1].isalpha())


def data_uri(png: bytes) -> str:
    """A PNG as the text that an <img> takes in place of a file."""
    return "data:image/png;base64," + base64.b64encode(png).decode()


def picture(png: bytes, description: str) -> str:
    """A PNG inside the page; the description is read out where it cannot be seen."""
    return f'<img src="{data_uri(png)}" alt="{html.escape(description)}">'


def gallery(pngs, captions, width: int = 96) -> str:
    """Small pictures in rows, each `width` pixels wide and with a caption."""
    cells = (
        f'<figure style="width:{width}px"><img src="{data_uri(png)}"'
        f' alt="{words}"><figcaption>{words}</figcaption></figure>'
        for png, words in zip(pngs, map(text, captions), strict=True)
    )
    return f'<div class="gallery">{"".join(cells)}</div>'


def note(sentence: str, kind: str = "note") -> str:
    return paragraph(text(sentence), kind)


def paragraph(content: str, kind: str = "") -> str:
    """HTML as a paragraph; nothing where there is none."""
    return f"<p{f' class={kind}' * bool(kind)}>{content}</p>" if content else ""


def section(title: str, *parts: str, anchor: str = "") -> str:
    return (
        f"<section{f' id={anchor}' * bool(anchor)}><h2>{text(title)}</h2>{''.join(parts)}</section>"
    )


def write_page(path, title: str, sections, script: str = "") -> Path:
    """Write a page atomically; `script` is JavaScript of ours."""
    with atomic_write(path, "w") as file:
        file.write(
            '<!doctype html><html lang="en"><head><meta'
            f' charset="utf-8"><title>{text(title)}</title>'
            f'<link rel="icon" href="data:,"><style>{STYLE}</style></head>'
            f"<body><h1>{text(title)}</h1>{''.join(sections)}{f'<script>{script}</script>' * bool(script)}</body></html>\n"
        )
    return Path(path)
