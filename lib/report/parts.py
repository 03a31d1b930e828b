"""The parts of a text with evidence, each rendered as Markdown and as HTML from one description."""

import html
import re
from collections.abc import Callable
from dataclasses import dataclass

from lib import blocks as pages
from lib.report.evidence import Evidence

MOST_ROWS = 15  # of a long table, in Markdown
INLINE = re.compile(r"`([^`]+)`|\*\*([^*]+)\*\*|(https?://[^\s)]+)")


@dataclass(frozen=True)
class Words:
    """A paragraph; `code`, **bold** and links in it."""

    text: str
    sources: tuple[str, ...] = ()


@dataclass(frozen=True)
class Grid:
    """A table of values, and the files they come from."""

    header: tuple
    rows: list
    sources: tuple[str, ...] = ()
    sortable: bool = False


@dataclass(frozen=True)
class Code:
    """Text as it stands somewhere; `where` says where that is."""

    text: str
    where: str


@dataclass(frozen=True)
class Figure:
    """A picture under assets/: drawn by `draw` from `sources`, or there already."""

    name: str
    title: str
    sources: tuple[str, ...]
    draw: Callable | None = None


def cite(e: Evidence, sources) -> str:
    """Where numbers come from: each file with its SHA-256."""
    named = ", ".join(f"`{name}` `{e.digest(name)}`" for name in dict.fromkeys(sources))
    return f"From {named}." if named else ""


def to_markdown(part, e: Evidence) -> str:
    """A part as Markdown; a picture is shown by its path, with its own SHA-256."""
    cited = cite(e, getattr(part, "sources", ()))
    match part:
        case Words():
            return f"{part.text} {cited}".strip()
        case Grid():
            num = MOST_ROWS if part.sortable else len(part.rows)
            lines = [part.header, ["---"] * len(part.header), *part.rows[:num]]
            lines = [
                "| " + " | ".join(pages.show(cell).replace("|", "\\|") for cell in line) + " |"
                for line in lines
            ]
            more = [f"And {len(part.rows) - num} more, in journal.html."] * (len(part.rows) > num)
            return "\n\n".join(["\n".join(lines), *more, *[cited] * bool(cited)])
        case Code():
            return f"`{part.where}`:\n\n````\n{part.text}\n````"
        case Figure():
            return (
                f"![{part.title}]({part.name})\n\n*{part.title}.* {cited} Picture"
                f" `{e.digest(part.name)}`."
            )


def to_html(part, e: Evidence) -> str:
    """The same as HTML that needs no other file."""
    cited = pages.paragraph(inline(cite(e, getattr(part, "sources", ()))), "note")
    match part:
        case Words():
            return pages.paragraph(inline(f"{part.text} {cite(e, part.sources)}"))
        case Grid():
            return pages.table(part.header, part.rows, "sortable" if part.sortable else "") + cited
        case Code():
            return (
                pages.paragraph(inline(f"`{part.where}`:"))
                + f"<pre><code>{html.escape(part.text)}</code></pre>"
            )
        case Figure():
            return (
                pages.picture((e.root / part.name).read_bytes(), part.title)
                + pages.note(f"{part.title}.")
                + cited
            )


def inline(text: str) -> str:
    """Text as HTML, with the marks that Markdown knows within a paragraph."""

    def marked(match):
        code, bold, link = match.groups()
        return (
            f"<code>{code}</code>"
            if code
            else f"<b>{bold}</b>"
            if bold
            else f'<a href="{link}">{link}</a>'
        )

    return INLINE.sub(marked, html.escape(text))
