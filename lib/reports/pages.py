"""One self-contained HTML file: text, tables and pictures in it, no server, no script from elsewhere."""

import html
from pathlib import Path

from lib.logger import atomic_write
from lib.reports.figures import data_uri

STYLE = """
body{font:16px/1.5 system-ui,sans-serif;color:#1a1a1a;max-width:70rem;margin:2rem auto;padding:0 1rem}
h1{font-size:1.7rem}h2{font-size:1.25rem;margin-top:2.5rem;border-bottom:1px solid #ccc}
img{max-width:100%}table{border-collapse:collapse;margin:1rem 0;display:block;overflow-x:auto}
td,th{padding:.25rem .75rem;border-bottom:1px solid #ddd;text-align:right;font-variant-numeric:tabular-nums}
td:first-child,th:first-child,.words{text-align:left}th{background:#f3f3f3}
.dense{font-size:.8rem;white-space:nowrap}.dense td,.dense th{padding:.2rem .4rem}
.gallery{display:flex;flex-wrap:wrap;gap:.6rem}figure{margin:0}figcaption{font-size:.72rem;line-height:1.25}
.gallery img{width:100%;image-rendering:pixelated;display:block}
.note{color:#555;font-size:.9rem}.alarm{background:#fde7d9;border-left:4px solid #D55E00;padding:.5rem 1rem}
"""


def text(value) -> str:
    """A value as safe HTML text, numbers in four digits, None as nothing."""
    if isinstance(value, float):
        value = f"{value:.4g}" if abs(value) < 1e4 else f"{value:,.0f}"
    elif isinstance(value, int) and not isinstance(value, bool):
        value = f"{value:,}"
    return html.escape("" if value is None else str(value))


def table(header, rows, kind: str = "") -> str:
    """An HTML table of values, numbers on the right; `kind` "dense" for many columns."""
    head = "".join(f"<th>{text(name)}</th>" for name in header)
    cells = ("".join(f"<td{' class=words' * is_words(cell)}>{text(cell)}</td>" for cell in row) for row in rows)
    body = "".join(f"<tr>{row}</tr>" for row in cells)
    return f"<table{' class=' * bool(kind)}{kind}><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def is_words(cell) -> bool:
    return isinstance(cell, str) and (" " in cell or cell[:1].isalpha())


def picture(png: bytes, description: str) -> str:
    """A PNG inside the page; the description is read out where it cannot be seen."""
    return f'<img src="{data_uri(png)}" alt="{html.escape(description)}">'


def gallery(pngs, captions, width: int = 96) -> str:
    """Small pictures in rows, each `width` pixels wide and with a caption."""
    cells = (
        f'<figure style="width:{width}px"><img src="{data_uri(png)}" alt="{words}"><figcaption>{words}</figcaption></figure>'
        for png, words in zip(pngs, map(text, captions), strict=True)
    )
    return f'<div class="gallery">{"".join(cells)}</div>'


def note(sentence: str, kind: str = "note") -> str:
    return f'<p class="{kind}">{text(sentence)}</p>'


def section(title: str, *parts: str) -> str:
    return f"<section><h2>{text(title)}</h2>{''.join(parts)}</section>"


def write_page(path, title: str, sections) -> Path:
    """Write a page atomically."""
    with atomic_write(path, "w") as file:
        file.write(
            f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{text(title)}</title>'
            f'<link rel="icon" href="data:,"><style>{STYLE}</style></head>'
            f"<body><h1>{text(title)}</h1>{''.join(sections)}</body></html>\n"
        )
    return Path(path)
