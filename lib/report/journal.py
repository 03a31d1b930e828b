"""The journal: every question with its answer from files, as JOURNAL.md and as one page; and
whether it agrees with them.
"""

import difflib
import itertools
import os
import re
from pathlib import Path

from PIL import Image

from lib.blocks import Heading, Words, cite, to_markdown, write_page
from lib.command import BadInput, one_line, say
from lib.figures import figure_png
from lib.files import atomic_write
from lib.report.evidence import Evidence, gather, git, read_said
from lib.report.parts import Drawing, to_blocks, with_digests
from lib.report.sections import CANNOT, DRAWN, OF_DAMAGE, PAGE, answer, front_page, read_questions
from lib.rundir import REPOSITORY

NAME, SAID = "JOURNAL.md", "journal.yaml"
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
    drawings = parts_of(sections, Drawing)
    for drawing in drawings:
        write_picture(drawing, e)
    names = {Path(drawing.name).name for drawing in drawings}
    stale = {path.name for path in (root / DRAWN).glob("*.png")} - names
    for name in stale:
        (root / DRAWN / name).unlink()
    text = write_markdown(e, sections)
    with atomic_write(root / NAME, "w") as file:
        file.write(text)
    write_page(root / PAGE, TITLE, to_blocks(e, sections))
    open_questions = text.count("**Not measured yet**")
    say(
        f"{root / NAME} and {root / PAGE}: {len(drawings)} figures, {open_questions} answers not"
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


def citation(drawing: Drawing, e: Evidence) -> str:
    """What stands in a picture as its source."""
    return cite(with_digests(e, drawing.sources))


def write_picture(drawing: Drawing, e: Evidence) -> None:
    """Copy a picture, or draw it, with what it is drawn from in it; the same bytes are not written
    again.
    """
    path = e.root / drawing.name
    if drawing.draw:
        try:
            png = figure_png(drawing.draw(), source=citation(drawing, e))
        except OF_DAMAGE as error:
            raise BadInput(
                f"{path} cannot be drawn, a file is damaged: {', '.join(drawing.sources)}"
                f" ({one_line(error)})"
            ) from None
    else:
        png = (e.root / drawing.sources[0]).read_bytes()
    if not path.is_file() or path.read_bytes() != png:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as file:
            file.write(png)


def write_markdown(e: Evidence, sections) -> str:
    """The text of JOURNAL.md."""
    return to_markdown([Heading(TITLE, 1), *to_blocks(e, sections)]) + "\n"


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
    for drawing in parts_of(sections, Drawing):
        source = source_of_picture(root / drawing.name) if drawing.draw else ""
        if drawing.draw and source != citation(drawing, e):
            told.append(
                f"{drawing.name} was drawn from other files than there are now:"
                f" {source or 'nothing that it names'}"
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
    try:
        with Image.open(path) as image:
            return image.info.get("Source", "")
    except OSError:
        return ""
