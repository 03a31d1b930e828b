"""The journal, a team's own Markdown: what its directives ask for is filled in from files, and
compared with them.
"""

import re
import shlex
from dataclasses import dataclass, replace
from pathlib import Path

from lib.blocks import Table, to_markdown, write_page
from lib.command import BadInput, nearest, one_line, say
from lib.evidence import BY_NAME
from lib.files import atomic_write
from lib.report.evidence import NUM_DIGITS, Evidence, Missing
from lib.report.figures import Drawing, build_figure
from lib.report.markdown import COMMENT, parse_markdown
from lib.report.quotes import OF_HISTORY, build_code, git
from lib.report.runs import UNREADABLE
from lib.report.start import start_journal
from lib.report.tables import build_seeds, build_table, build_value

# of each kind of directive: what builds its blocks, its options, and the least and the most of its
# other words
KINDS = {
    "table": (build_table, {"columns", "rows", "where", "only", "sort", "at"}, 1, 2),
    "figure": (build_figure, {"title", "patches"}, 1, 1),
    "code": (build_code, {"at"}, 1, 1),
    "value": (build_value, {"digits"}, 2, 2),
    "seeds": (build_seeds, set(), 0, 99),
    "sources": (lambda _e: [], set(), 0, 0),  # comes after everything that is read
}
OPTION = re.compile(r"([a-z]+)=(.*)", re.DOTALL)
END = "<!-- end -->"
# a directive and what stands between it and END, if that comes before the next comment
DIRECTIVE = re.compile(
    rf"<!-- (?P<kind>{'|'.join(KINDS)})\b ?(?P<text>[^\n]*?) ?-->"
    rf"(?:(?P<filled>(?:(?!<!--).)*?){END})?",
    re.DOTALL,
)
# begins what was filled in, but for a value
FILLED = re.compile(r"\s*(?:\||!\[|\*Missing:|`[^`\n]*`:\n\n````)")
HEADING = re.compile(r"(?m)^(#{2,3}) +(.*)$")
# other comments, and their first word
NO_HINT = re.compile(r"<!-- *(?!end\b|hint\b)([A-Za-z]+)[^\n]*")
AT_COMMIT = {*OF_HISTORY, "non-determinism"}  # are of a commit, which is noted in the directive


@dataclass(frozen=True)
class Directive:
    """A directive as it stands in the journal: where, its text, the words and options in that, and
    what is filled in below it (None: nothing yet).
    """

    line: int
    heading: str
    kind: str
    text: str
    words: tuple[str, ...]
    options: dict
    filled: str | None

    def to_markdown(self, filled: str) -> str:
        """The directive with what it is filled in with."""
        space = "" if self.kind == "value" else "\n\n"
        return f"<!-- {self.kind} {self.text}".rstrip() + f" -->{space}{filled}{space}{END}"


@dataclass
class Outcome:
    """A directive with its new content, the drawings in that, and what is missing or wrong."""

    directive: Directive
    filled: str
    drawings: list[Drawing]
    missing: str = ""
    wrong: str = ""


def read_directives(text: str) -> list[Directive]:
    """The directives of a journal, in order. Raises BadInput for one that is none, and for one
    whose END was deleted.
    """
    directives = []
    for match in DIRECTIVE.finditer(text):
        before = text[: match.start()]
        line = before.count("\n") + 1
        # what is filled in may quote code, whose comments look like headings
        headings = HEADING.findall(DIRECTIVE.sub("", before))
        heading = headings[-1][1] if headings else "front page"
        kind = match["kind"]
        filled = match["filled"]
        words, options = parse_words(kind, match["text"], f"line {line}")
        is_open = filled is None and FILLED.match(text, match.end())
        if kind == "value":  # may stand before a table, or in one
            is_open = is_open and text.startswith("*Missing:", match.end())
        if is_open or (kind == "value" and "\n" in (filled or "")):
            raise BadInput(
                f"line {line}: {match[0].splitlines()[0]} lacks its {END}: write it where the part"
                " ends that was filled in"
            )
        directives.append(Directive(line, heading, kind, match["text"], words, options, filled))
    require_no_leftovers(text)
    return directives


def require_no_leftovers(text: str) -> None:
    """Raise BadInput for an END without its directive, and for a comment that is nearly one."""
    # of the directives only their line ends are left, so that lines keep their numbers
    rest = DIRECTIVE.sub(lambda match: "\n" * match[0].count("\n"), text)
    for number, line in enumerate(rest.splitlines(), 1):
        if END in line:
            raise BadInput(f"line {number}: {END} without its directive: delete it")
        for comment in NO_HINT.finditer(line):
            hint = nearest(comment[1].lower(), KINDS)
            if hint:
                raise BadInput(f"line {number}: {comment[0]} is no directive{hint}")


def parse_words(kind: str, text: str, place: str) -> tuple[tuple[str, ...], dict]:
    """The words and the options of a directive. `where` may be given several times."""
    _, allowed, least, most = KINDS[kind]
    try:
        parts = shlex.split(text)
    except ValueError as error:
        raise BadInput(f"{place}: {kind} {text}: {error}") from None
    words = []
    options = {}
    for part in parts:
        option = OPTION.fullmatch(part)
        if not option:
            words.append(part)
            continue
        name, value = option.groups()
        if name not in allowed:
            hint = nearest(name, allowed) or f" (allowed: {', '.join(sorted(allowed)) or 'none'})"
            raise BadInput(f"{place}: {kind} has no option {name}={hint}")
        if name in ("rows", "digits"):
            if not value.isdecimal():
                raise BadInput(f"{place}: {part} must be a whole number")
            value = int(value)
        options[name] = [*options.get(name, []), value] if name == "where" else value
    if not least <= len(words) <= most:
        raise BadInput(f"{place}: {kind} takes {least} to {most} names, not {len(words)}")
    return tuple(words), options


def fill(text: str, root: Path) -> tuple[str, list[Outcome], list[str]]:
    """A journal's text filled in from the files below `root`, what has become of each directive,
    and a sentence for each disagreement between the files.
    """
    e = Evidence(root)
    directives = read_directives(text)
    for directive in directives:
        note_choices(e, directive)
    outcomes = [fill_directive(e, directive) for directive in directives]
    rows = [[name, digest[:NUM_DIGITS]] for name, digest in sorted(e.sources.items())]
    for outcome in outcomes:
        if outcome.directive.kind == "sources":
            outcome.filled = Table(["file", "SHA-256"], rows).to_markdown()
    parts = iter([outcome.directive.to_markdown(outcome.filled) for outcome in outcomes])
    return DIRECTIVE.sub(lambda _: next(parts), text), outcomes, e.check()


def note_choices(e: Evidence, directive: Directive) -> None:
    """Note the runs, the champion and the folders that a directive names: the others follow it."""
    words = directive.words
    if directive.kind == "seeds":
        e.seeds = e.seeds or list(words)
    elif directive.kind == "table" and words[0] == "champion" and len(words) > 1:
        e.champion = words[1]
    elif directive.kind in ("table", "figure", "value"):
        folder = words[0].rpartition("/")[0]
        for name, piece in BY_NAME.items():
            marker = piece.pattern.rpartition("/")[2]
            is_choice = folder and name not in ("seeds", "champion")
            if is_choice and (e.root / folder / marker).is_file():
                e.folders.setdefault(name, folder)


def fill_directive(e: Evidence, directive: Directive) -> Outcome:
    """What a directive is filled in with; the names that it left open are put into it."""
    try:
        directive = settle(e, directive)
        build = KINDS[directive.kind][0]
        blocks = build(e, *directive.words, **directive.options)
        drawings = [block for block in blocks if isinstance(block, Drawing)]
        return Outcome(directive, to_markdown(blocks), drawings)
    except Missing as error:
        return Outcome(directive, f"*Missing:* {error}.", [], missing=str(error))
    except BadInput as error:
        sentence = str(error)
    except UNREADABLE as error:
        sentence = (
            f"a file is damaged, or of another program ({type(error).__name__}: {one_line(error)})"
        )
    return Outcome(directive, f"**Cannot be filled in:** {sentence}.", [], wrong=sentence)


def settle(e: Evidence, directive: Directive) -> Directive:
    """The directive with the runs, the file or the commit that it left open."""
    text = directive.text
    words = directive.words
    options = directive.options
    if directive.kind == "seeds":
        words = tuple(words or e.find_seeds())
        text = shlex.join(words)
    elif directive.kind in ("table", "figure", "value"):
        file = e.resolve(words[0])
        if file != words[0] and not words[0].startswith("champion/"):
            text = text.replace(words[0], shlex.quote(file), 1)
        words = (file, *words[1:])
    if words and words[0] in AT_COMMIT and "at" not in options:
        commit = e.commit() if words[0] == "non-determinism" else git("rev-parse", "HEAD")
        options = options | {"at": commit[:NUM_DIGITS]}
        text = f"{text} at={commit[:NUM_DIGITS]}" if commit else text
    return replace(directive, text=text, words=words, options=options)


def write_journal(path: Path) -> dict:
    """Fill in the journal, draw its figures and write its page; an empty one is begun where there
    is none. What is missing, and what does not agree, is in the result.
    """
    if not path.parent.is_dir():
        raise BadInput(f"no folder {path.parent}")
    if start_journal(path):
        say(f"{path}: a new journal, with a place for every question")
    text = path.read_text(encoding="utf-8")
    filled, outcomes, problems = fill(text, path.parent)
    missing = {}  # the headings that miss the same
    for outcome in outcomes:
        for drawing in outcome.drawings:
            drawing.write(path.parent)
        if outcome.missing:
            missing.setdefault(outcome.missing, {})[outcome.directive.heading] = True
    if filled != text:
        # a person may have written between a directive and its end, which is replaced
        path.with_name(f"{path.name}.before").write_text(text, encoding="utf-8")
        with atomic_write(path, "w") as file:
            file.write(filled)
    title = re.search(r"(?m)^# +(.*)$", filled)
    body = filled[title.end() :] if title else filled
    blocks = parse_markdown(body, path.parent)
    page = write_page(path.with_name("journal.html"), title[1] if title else path.stem, blocks)
    wrong = [f"{place_of(path, outcome)}: {outcome.wrong}" for outcome in outcomes if outcome.wrong]
    return {
        "journal": str(path),
        "page": str(page),
        "num_filled": sum(not (outcome.missing or outcome.wrong) for outcome in outcomes),
        "missing": [f"{'; '.join(headings)}: {text}" for text, headings in missing.items()],
        "unanswered": find_unanswered(filled),
        "differing": wrong + problems,
    }


def check_journal(path: Path) -> dict:
    """{"differing"}: a sentence for each part of the journal that its file no longer says, and for
    each disagreement between the files.
    """
    if not path.is_file():
        raise BadInput(f"there is no {path} yet: report.py journal begins it")
    _, outcomes, problems = fill(path.read_text(encoding="utf-8"), path.parent)
    sentences = []
    for outcome in outcomes:
        sentence = compare(outcome, path.parent)
        if sentence:
            sentences.append(f"{place_of(path, outcome)}: {sentence}")
    return {"differing": sentences + problems}


def compare(outcome: Outcome, root: Path) -> str:
    """How a filled-in part differs from what its files say; empty where it does not."""
    directive = outcome.directive
    if outcome.wrong:
        return outcome.wrong
    if directive.filled is None:
        return "it is not filled in yet: make journal"
    ours = directive.filled.strip().splitlines()
    theirs = outcome.filled.splitlines()
    for says, should in zip([*ours, "nothing"], [*theirs, "nothing"], strict=False):
        if says != should:
            return f"it says `{says}`, the files say `{should}`"
    for drawing in outcome.drawings:
        if not drawing.is_current(root):
            return f"{drawing.name} was drawn from other files than there are now: {drawing.source}"
    return ""


def place_of(path: Path, outcome: Outcome) -> str:
    """The line, heading and kind of a directive."""
    directive = outcome.directive
    words = " ".join([directive.kind, *directive.words[:1]])
    return f"{path.name}:{directive.line} ({directive.heading}), {words}"


def find_unanswered(text: str) -> list[str]:
    """The headings of questions below which the team has written no words."""
    sections = HEADING.split(COMMENT.sub("", DIRECTIVE.sub("", text)))
    levels = sections[1::3]
    headings = sections[2::3]
    bodies = sections[3::3]
    parts = zip(levels, headings, bodies, strict=True)
    return [heading for level, heading, body in parts if level == "###" and not body.strip()]
