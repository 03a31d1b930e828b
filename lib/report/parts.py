"""The parts of a journal as blocks: sources with their SHA-256, drawings as they lie on disk."""

import dataclasses
from collections.abc import Callable

from lib.blocks import Figure, Heading
from lib.report.evidence import Evidence


@dataclasses.dataclass(frozen=True)
class Drawing:
    """A picture under assets/: drawn by `draw` from `sources`, or a copy of the first of them."""

    name: str
    title: str
    sources: tuple[str, ...]
    draw: Callable | None = None


def with_digests(e: Evidence, sources) -> tuple[str, ...]:
    """Each file with the first digits of its SHA-256."""
    return tuple(f"`{name}` `{e.digest(name)}`" for name in sources)


def resolve(part, e: Evidence):
    """The block of a part, its sources with their SHA-256."""
    sources = with_digests(e, getattr(part, "sources", ()))
    if isinstance(part, Drawing):
        png = (e.root / part.name).read_bytes() if e.has(part.name) else b""
        return Figure(part.title, png, part.name, sources, f"Picture `{e.digest(part.name)}`.")
    return dataclasses.replace(part, sources=sources) if sources else part


def to_blocks(e: Evidence, sections: dict[str, list[tuple[str, str, list]]]) -> list:
    """The blocks of {section: [(key, question, parts)]}; a question's key is its anchor."""
    blocks = []
    for title, questions in sections.items():
        if title:
            blocks.append(Heading(title))
        for key, question, parts in questions:
            if question:
                blocks.append(Heading(question, 3, key))
            blocks += [resolve(part, e) for part in parts]
    return blocks
