"""The journal: every question with its answer from files, as JOURNAL.md and as one page; and
whether it agrees with them.
"""

import difflib
import itertools
import os
import re
from pathlib import Path

from lib import blocks as pages
from lib.command import BadInput, one_line, say
from lib.figures import figure_png
from lib.files import atomic_write
from lib.report.evidence import Evidence, gather, git, read_said
from lib.report.parts import Figure, Words, cite, to_html, to_markdown
from lib.report.sections import CANNOT, DRAWN, OF_DAMAGE, answer, front_page, read_questions
from lib.rundir import REPOSITORY

NAME, PAGE, SAID = "JOURNAL.md", "journal.html", "journal.yaml"
TITLE = "Journal of a PCam pipeline"
COMMIT = re.compile(r"at commit `([0-9a-f]{40}|none)`")


def build(e: Evidence) -> dict[str, list[tuple[str, str, list]]]:
    """{section: [(key, question, parts)]}, the front page first, without a title."""
    front = [(question.split(" ")[0].lower(), question, parts) for question, parts in front_page(e)]
    return {"": front} | {
        title: [
            (key, question, answer(e, key, target, code))
            for key, question, target, code in questions
        ]
        for title, questions in read_questions().items()
    }


def open_evidence(root: Path, commit: str) -> Evidence:
    """What a journal in `root` is made from: its own journal.yaml, or the repository's."""
    if not root.is_dir():
        raise BadInput(f"no folder {root}")
    said = root / SAID if (root / SAID).is_file() else REPOSITORY / SAID
    return Evidence(root, "" if commit == "none" else commit, read_said(said))


def write_journal(root: Path) -> dict:
    """Gather the evidence, draw, and write both texts; gives what was written and how much is not
    measured yet.
    """
    e = open_evidence(root, git("rev-parse", "HEAD").strip())
    gather(root, e.said, e.commit)
    sections = build(e)
    if wrong := [part.text for part in parts_of(sections, Words) if CANNOT in part.text]:
        raise BadInput(wrong[0])
    figures = parts_of(sections, Figure)
    for figure in figures:
        if figure.draw:
            draw(figure, e)
    stale = {path.name for path in (root / DRAWN).glob("*.png")} - {
        Path(figure.name).name for figure in figures
    }
    for name in stale:
        (root / DRAWN / name).unlink()
    text = write_markdown(e, sections)
    with atomic_write(root / NAME, "w") as file:
        file.write(text)
    write_page(root / PAGE, e, sections)
    open_questions = text.count("**Not measured yet**")
    say(
        f"{root / NAME} and {root / PAGE}: {len(figures)} figures, {open_questions} answers not"
        " measured yet"
    )
    return {
        "journal": str(root / NAME),
        "page": str(root / PAGE),
        "not_measured": open_questions,
        "commit": e.commit,
    }


def parts_of(sections, kind: type) -> list:
    """The parts of one kind in all answers, in order."""
    return [
        part
        for questions in sections.values()
        for _, _, parts in questions
        for part in parts
        if isinstance(part, kind)
    ]


def draw(figure: Figure, e: Evidence) -> None:
    """Draw a figure, with what it is drawn from in it; the same bytes are not written again."""
    path = e.root / figure.name
    try:
        png = figure_png(figure.draw(), source=cite(e, figure.sources))
    except OF_DAMAGE as error:
        raise BadInput(
            f"{path} cannot be drawn, a file is damaged: {', '.join(figure.sources)}"
            f" ({one_line(error)})"
        ) from None
    if not path.is_file() or path.read_bytes() != png:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as file:
            file.write(png)


def write_markdown(e: Evidence, sections) -> str:
    """The text of JOURNAL.md."""
    blocks = [f"# {TITLE}"]
    for title, questions in sections.items():
        blocks += [f"## {title}"] if title else []
        for _, question, parts in questions:
            blocks += [f"### {question}"] * bool(question) + [
                to_markdown(part, e) for part in parts
            ]
    return "\n\n".join(blocks) + "\n"


def write_page(path: Path, e: Evidence, sections) -> Path:
    """The same as one page with a table of contents."""
    items, blocks = [], []
    for title, questions in sections.items():
        for key, question, parts in questions:
            items += (
                [f'<li><a href="#{key}">{pages.text(f"{title}: {question}".strip(": "))}</a></li>']
                if question
                else []
            )
            heading = f"<h3 id={key}>{pages.text(question)}</h3>" if question else ""
            blocks.append((title, heading + "".join(to_html(part, e) for part in parts)))
    shown = [
        pages.section(title, *(block for name, block in blocks if name == title))
        for title in sections
        if title
    ]
    front, *others = (block for name, block in blocks if not name)
    return pages.write_page(
        path,
        TITLE,
        [front, f"<nav><ul>{''.join(items)}</ul></nav>", *others, *shown],
        pages.SORTING,
    )


def check_journal(root: Path) -> list[str]:
    """A sentence for each place where JOURNAL.md does not say what the files and the code of its
    commit say.
    """
    if not (root / NAME).is_file():
        raise BadInput(f"{root} has no {NAME} yet: report.py journal writes it")
    text = (root / NAME).read_text(encoding="utf-8", errors="replace")
    if not (found := COMMIT.search(text)):
        raise BadInput(
            f"{root / NAME} does not name the commit that it was made at: report.py journal writes"
            " it anew"
        )
    if found[1] != "none" and not git("cat-file", "-t", found[1]):
        raise BadInput(
            f"{NAME} quotes commit {found[1]}, which is not in this clone (git fetch --unshallow)"
        )
    e = open_evidence(root, found[1])
    sections = build(e)
    told = []
    for figure in parts_of(sections, Figure):
        if figure.draw and (said := source_of_picture(root / figure.name)) != cite(
            e, figure.sources
        ):
            told.append(
                f"{figure.name} was drawn from other files than there are now:"
                f" {said or 'nothing that it names'}"
            )
    return told + compare_lines(text.splitlines(), write_markdown(e, sections).splitlines())


def compare_lines(ours: list[str], theirs: list[str]) -> list[str]:
    """A sentence for each block of lines in which a journal and what it should say differ."""
    told = []
    for kind, start, stop, first, last in difflib.SequenceMatcher(
        None, ours, theirs, autojunk=False
    ).get_opcodes():
        if kind == "equal":
            continue
        heading = next(
            (line.strip("# ") for line in reversed(ours[: start + 1]) if re.match("###? ", line)),
            "front page",
        )
        pairs = itertools.zip_longest(ours[start:stop], theirs[first:last], fillvalue="nothing")
        for place, (says, should) in enumerate(pairs, start):
            if {says, should} - {"", "nothing"}:
                told.append(f"{NAME}:{min(place, stop) + 1} ({heading}): {excerpt(says, should)}")
    return told


def excerpt(says: str, should: str, reach: int = 60) -> str:
    """Two lines from shortly before the place where they part."""
    at = len(os.path.commonprefix([says, should]))
    says, should = (
        f"{'...' * (at > reach)}{line[max(0, at - reach) : at + reach]}" for line in (says, should)
    )
    return f"it says `{says}`, the files say `{should}`"


def source_of_picture(path: Path) -> str:
    """What a PNG says that it was drawn from; empty where it is no PNG of ours."""
    from PIL import Image

    try:
        with Image.open(path) as image:
            return image.info.get("Source", "")
    except OSError:
        return ""
