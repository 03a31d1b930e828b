"""Blocks: no text is lost or breaks out of its place, as Markdown or HTML; a page needs nothing
else.
"""

import base64
import io
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from lib.blocks import (
    MOST_ROWS,
    Code,
    Figure,
    Gallery,
    Heading,
    Items,
    Table,
    Words,
    patch_png,
    show,
    table_of,
    to_markdown,
    write_page,
)

NASTY = "<script>alert(1)</script> \"quoted\" 'a' | & <b>"
PATCH = np.arange(6 * 5 * 3, dtype=np.uint8).reshape(6, 5, 3)
BLOCKS = [
    Words(NASTY, "alarm", sources=(NASTY,)),
    Heading(NASTY),
    Heading(NASTY, 3, 'an"chor'),
    Table([NASTY, "n"], [[NASTY, 1.5], ["b", None]], sources=(NASTY,)),
    Figure(NASTY, patch_png(PATCH), "a.png", (NASTY,)),
    Gallery([PATCH], [NASTY]),
    Items([NASTY]),
    Code(NASTY, NASTY),
]
# how often the text stands in each of them, and in what the page itself adds: titles, contents
NUM_TEXTS = 2 + 1 + 1 + 3 + 2 + 1 + 1 + 2
NUM_PAGE_TEXTS = 2 + 2


class Page(HTMLParser):
    """The tags, attributes and text of a page; checks that what is opened is closed."""

    def __init__(self, text: str):
        super().__init__()
        self.open, self.tags, self.attributes, self.text = [], [], [], ""
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in ("meta", "link", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data

    def values(self, *names) -> list[str]:
        return [value for name, value in self.attributes if name in names]


@pytest.fixture
def page(tmp_path):
    return Page(write_page(tmp_path / "p.html", NASTY, BLOCKS).read_text())


def test_a_figure_with_a_path_lies_beside_the_page_too(tmp_path):
    write_page(tmp_path / "p.html", NASTY, BLOCKS)
    assert {path.name for path in tmp_path.iterdir()} == {"p.html", "a.png"}
    assert (tmp_path / "a.png").read_bytes() == patch_png(PATCH)


def test_every_text_of_every_block_is_shown_and_escaped(page):
    assert page.tags.count("script") == 1 and "b" not in page.tags
    assert page.text.count(NASTY) == NUM_TEXTS + NUM_PAGE_TEXTS
    assert page.values("alt") == [NASTY, NASTY]


def test_a_page_fetches_nothing_and_its_links_lead_into_itself(page):
    targets = page.values("src", "href")
    assert page.values("id") == ['an"chor'] and '#an"chor' in targets
    assert all(target.startswith(("data:", "#")) for target in targets)


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: type(block).__name__)
def test_markdown_leaves_no_text_of_a_block_out(block):
    assert NASTY in block.to_markdown().replace("\\|", "|")


def test_a_markdown_table_has_as_many_cells_in_each_line():
    table = Table(["a|b", "c"], [["|", 1], ["", None], [NASTY, 2.0]])
    lines = table.to_markdown().splitlines()
    assert len(lines) == 5 and {len(re.findall(r"(?<!\\)\|", line)) for line in lines} == {3}


def test_a_long_table_names_the_file_that_has_the_rest():
    rows = [[number] for number in range(MOST_ROWS + 4)]
    whole, cut = Table(["n"], rows), Table(["n"], rows, full="all.html")
    assert len(whole.to_markdown().splitlines()) == len(rows) + 2
    assert len(cut.to_markdown().splitlines()) == MOST_ROWS + 2 + 2
    assert re.search(r"4 .*all\.html", cut.to_markdown().splitlines()[-1])
    assert cut.to_html() == whole.to_html()


def test_a_table_of_dicts_has_every_column_that_any_row_has():
    table = table_of([{"a": 1}, {"b": 2, "a": 3}])
    assert table.header == ["a", "b"] and table.rows == [[1, None], [3, 2]]
    assert table_of([{"a": 1, "b": 2}], ("b",)).rows == [[2]]


def test_the_terminal_form_of_a_table_is_aligned():
    lines = Table(["name", "n"], [["long name", 0.123456789], ["b", None]]).to_text().splitlines()
    assert len(lines) == 3 and lines[1].index("0.123457") == lines[0].index("n", 4)


def test_marks_within_words_become_html_and_only_those():
    html = Words("see `a<b **x**` and **c** at https://x.org/?a=1&b=2").to_html()
    assert "<code>a&lt;b **x**</code>" in html and "<b>c</b>" in html
    assert '<a href="https://x.org/?a=1&amp;b=2">' in html


def test_a_warning_is_coloured_and_its_head_is_not():
    html = Table(["severity", "n"], [["warning", 1], ["note", 2]]).to_html()
    assert '<td class="words alarm">warning' in html and html.count("alarm") == 1


def test_a_gallery_holds_the_very_pixels_of_its_patches():
    (data,) = re.findall(r'base64,([^"]*)"', Gallery([PATCH], ["a"]).to_html())
    drawn = np.asarray(Image.open(io.BytesIO(base64.b64decode(data))))
    assert np.array_equal(drawn, PATCH)


def test_numbers_have_four_digits_and_none_is_empty():
    shown = [show(value) for value in (None, 0.123456, 123456.7, 1234567, True, "a")]
    assert shown == ["", "0.1235", "123,457", "1,234,567", "True", "a"]


def test_markdown_is_blocks_apart_by_an_empty_line():
    assert to_markdown([Heading("a", 1), Words("b")]) == "# a\n\nb"
