"""Blocks: no text is lost or breaks out of its place, as Markdown or HTML; a page needs nothing
else.
"""

import base64
import html
import io
import re

import numpy as np
from PIL import Image

from lib.blocks import (
    Code,
    Figure,
    Gallery,
    Heading,
    Items,
    Table,
    Words,
    patch_png,
    table_of,
    write_page,
)

NASTY = "<script>alert(1)</script> \"quoted\" 'a' | & <b>"
PATCH = np.arange(6 * 5 * 3, dtype=np.uint8).reshape(6, 5, 3)
BLOCKS = [
    Words(NASTY, "alarm"),
    Heading(NASTY),
    Table([NASTY, "severity"], [[NASTY, "warning"], ["b", None]]),
    Figure(NASTY, patch_png(PATCH), "a.png"),
    Code(NASTY, NASTY),
    Gallery([PATCH], [NASTY]),
    Items([NASTY]),
]


def test_a_page_shows_and_escapes_every_text_and_fetches_nothing(tmp_path):
    page = write_page(tmp_path / "p.html", NASTY, BLOCKS).read_text()
    escaped = html.escape(NASTY)
    for block in BLOCKS:
        assert escaped in block.to_html() and block.to_html() in page
    assert page.count("<script>") == 1 and "<b>" not in page and f"<h1>{escaped}</h1>" in page
    sources = re.findall(r'(?:src|href)="([^"]{0,30})', page)
    assert len(sources) == 3 and all(source.startswith("data:") for source in sources)
    assert '<td class="words alarm">warning' in page
    assert (tmp_path / "a.png").read_bytes() == patch_png(PATCH), "a figure lies beside it, too"
    for block in BLOCKS[:5]:
        assert NASTY in block.to_markdown().replace("\\|", "|")
    (image,) = re.findall(r'base64,([^"]*)"', Gallery([PATCH], ["a"]).to_html())
    drawn = np.asarray(Image.open(io.BytesIO(base64.b64decode(image))))
    assert np.array_equal(drawn, PATCH), "a patch keeps its very pixels"


def test_a_long_page_begins_with_links_to_its_sections(tmp_path):
    headings = [Heading(f"part {number}") for number in range(12)]
    page = write_page(tmp_path / "p.html", "long", headings).read_text()
    assert page.count('<a href="#part-7">') == page.count('id="part-7"') == 1


def test_a_table_is_aligned_on_a_terminal_and_whole_in_markdown():
    table = table_of([{"a|b": 0.123456789}, {"n": 1234567, "a|b": "|"}])
    head, first, _ = table.to_text().splitlines()
    assert first.index("0.1235") == head.index("a|b")
    cells = ["| a\\|b | n |", "| --- | --- |", "| 0.1235 |  |", "| \\| | 1,234,567 |"]
    assert table.to_markdown().splitlines() == cells


def test_marks_within_words_become_html_and_only_those():
    text = Words("see `a<b **x**` and **c** at https://x.org/?a=1&b=2").to_html()
    assert "<code>a&lt;b **x**</code>" in text and "<b>c</b>" in text
    assert '<a href="https://x.org/?a=1&amp;b=2">' in text
