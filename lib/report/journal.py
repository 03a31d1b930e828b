"""The journal, a team's own Markdown: what its directives ask for is filled in from files, and
compared with them.
"""

import contextlib
import difflib
import inspect
import itertools
import re
import shlex
from dataclasses import dataclass, field
from pathlib import Path

from lib.blocks import Figure, Table, to_markdown, write_page
from lib.command import BadInput, say
from lib.evidence import BY_NAME
from lib.files import atomic_write
from lib.report.evidence import NUM_DIGITS, Evidence, Missing
from lib.report.figures import build_figure, is_current
from lib.report.markdown import parse_markdown
from lib.report.quotes import HISTORY, build_code, git
from lib.report.runs import UNREADABLE
from lib.report.tables import build_seeds, build_table, build_value

TEMPLATE = Path(__file__).parent / "template.md"
# what builds the blocks of each kind of directive, from its words and options
KINDS = {
    "table": build_table,
    "figure": build_figure,
    "code": build_code,
    "value": build_value,
    "seeds": build_seeds,
    "sources": lambda _e: [],  # comes after everything that is read
}
END = "<!-- end -->"
# a directive and what stands between it and END, if that comes before the next comment
DIRECTIVE = re.compile(
    rf"<!-- (?P<kind>{'|'.join(KINDS)})\b ?(?P<text>[^\n]*?) ?-->"
    rf"(?:(?P<filled>(?:(?!<!--).)*?){END})?",
    re.DOTALL,
)
HEADING = re.compile(r"(?m)^#{2,3} +(.*)$")
TITLE = re.compile(r"(?m)^# +(.*)$")
COMMENT = re.compile(r"<!-- *([A-Za-z]+)")


@dataclass
class Directive:
    """A directive as it stands in the journal: where, its text, the words and options in that, and
    what is filled in below it (None: nothing yet). Then what it is to be filled in with, the
    figures in that, and what is missing or wrong.
    """

    place: str
    heading: str
    kind: str
    text: str
    words: list[str]
    options: dict
    before: str | None
    filled: str = ""
    figures: list[Figure] = field(default_factory=list)
    missing: str = ""
    wrong: str = ""

    def to_markdown(self) -> str:
        """The directive with what it is filled in with."""
        space = "" if self.kind == "value" else "\n\n"
        return f"<!-- {self.kind} {self.text}".rstrip() + f" -->{space}{self.filled}{space}{END}"


def read_directives(text: str) -> list[Directive]:
    """The directives of a journal, in order. Raises BadInput for one that is none, and for an END
    without its directive.
    """
    directives = []
    for match in DIRECTIVE.finditer(text):
        before = text[: match.start()]
        line = before.count("\n") + 1
        heading = ["front page", *HEADING.findall(before)][-1]
        if match["kind"] == "value" and "\n" in (match["filled"] or ""):
            raise BadInput(f"line {line}: write {END} where the value ends")
        words, options = parse_words(match["kind"], match["text"], line)
        place = f"line {line} ({heading}), {match['kind']}"
        directive = (place, heading, match["kind"], match["text"], words, options, match["filled"])
        directives.append(Directive(*directive))
    # of the directives only their line ends are left, so that lines keep their numbers
    rest = DIRECTIVE.sub(lambda match: "\n" * match[0].count("\n"), text)
    for number, line in enumerate(rest.splitlines(), 1):
        for word in COMMENT.findall(line):
            if word == "end" or difflib.get_close_matches(word.lower(), KINDS, 1, 0.75):
                sentence = "is no directive, or an end without one: mend or delete it"
                raise BadInput(f"line {number}: {line.strip()} {sentence}")
    return directives


def parse_words(kind: str, text: str, line: int) -> tuple[list[str], dict]:
    """The words and the options of a directive. `where` may be given several times."""
    words = []
    options = {}
    try:
        for part in shlex.split(text):
            name, equals, value = part.partition("=")
            if name == "where":
                options.setdefault(name, []).append(value)
            elif equals:
                options[name] = value
            else:
                words.append(part)
        inspect.signature(KINDS[kind]).bind(None, *words, **options)
    except (TypeError, ValueError) as error:
        raise BadInput(f"line {line}: {kind} {text}: {error}") from None
    return words, options


def fill(text: str, root: Path) -> tuple[str, list[Directive], list[str]]:
    """A journal's text filled in from the files below `root`, its directives, and a sentence for
    each disagreement between the files.
    """
    e = Evidence(root)
    directives = read_directives(text)
    for directive in directives:
        note_choices(e, directive)
    if any(directive.kind == "code" for directive in directives):
        with contextlib.suppress(Missing):
            e.find("seeds")  # whose commit is quoted
    for directive in directives:
        fill_directive(e, directive)
    rows = [[name, digest[:NUM_DIGITS]] for name, digest in sorted(e.sources.items())]
    for directive in directives:
        if directive.kind == "sources":
            directive.filled = Table(["file", "SHA-256"], rows).to_markdown()
    parts = iter([directive.to_markdown() for directive in directives])
    return DIRECTIVE.sub(lambda _: next(parts), text), directives, e.check()


def note_choices(e: Evidence, directive: Directive) -> None:
    """Note the runs, the champion and the folders that a directive names: the others follow it."""
    words = directive.words
    if directive.kind == "seeds" and words:
        e.choices.setdefault("seeds", words)
    elif directive.kind == "table" and words[0] == "champion" and words[1:]:
        e.choices["champion"] = words[1:]
    elif directive.kind in ("table", "figure", "value"):
        folder = words[0].rpartition("/")[0]
        for name, piece in BY_NAME.items():
            marker = piece.pattern.rpartition("/")[2]
            is_choice = folder and marker != "summary.json"
            if is_choice and (e.root / folder / marker).is_file():
                e.choices.setdefault(name, [folder])


def fill_directive(e: Evidence, directive: Directive) -> None:
    """Fill in a directive; the runs or the commit that it left open are put into its text."""
    kind = directive.kind
    words = directive.words
    try:
        if kind == "seeds":
            directive.words = words or e.find("seeds")
            directive.text = shlex.join(directive.words)
        elif kind == "code" and words[0] in HISTORY and not directive.options:
            commit = git("rev-parse", "HEAD")[:NUM_DIGITS]
            directive.options = {"at": commit}
            directive.text = f"{words[0]} at={commit}"
        blocks = KINDS[kind](e, *directive.words, **directive.options)
    except Missing as error:
        directive.missing = str(error)
        directive.filled = f"*Missing:* {error}."
    except UNREADABLE as error:
        is_said = isinstance(error, BadInput)
        damage = f"a file is damaged, or of another program ({error!r})"
        directive.wrong = str(error) if is_said else damage
        directive.filled = f"**Cannot be filled in:** {directive.wrong}."
    else:
        # a quoted comment would count as a directive, or as the end of this one
        directive.filled = to_markdown(blocks).replace("<!--", "<!\N{ZERO WIDTH SPACE}--")
        directive.figures = [block for block in blocks if isinstance(block, Figure)]


def write_journal(path: Path) -> dict:
    """Fill in the journal, draw its figures and write its page; an empty one is begun where there
    is none. What is missing, and what does not agree, is in the result.
    """
    if not path.is_file():
        path.write_bytes(TEMPLATE.read_bytes())
        say(f"{path}: a new journal, with a place for every question")
    text = path.read_text(encoding="utf-8")
    filled, directives, problems = fill(text, path.parent)
    missing = {}  # the headings that miss the same
    for directive in directives:
        for figure in directive.figures:
            if not is_current(figure, path.parent):
                (path.parent / figure.path).parent.mkdir(parents=True, exist_ok=True)
                (path.parent / figure.path).write_bytes(figure.png)
        if directive.missing:
            missing.setdefault(directive.missing, {})[directive.heading] = True
    if filled != text:
        # a person may have written between a directive and its end, which is replaced
        path.with_name(f"{path.name}.before").write_text(text, encoding="utf-8")
        with atomic_write(path, "w") as file:
            file.write(filled)
    title = (TITLE.findall(filled) or [path.stem])[0]
    blocks = parse_markdown(TITLE.sub("", filled, count=1), path.parent)
    page = write_page(path.with_name("journal.html"), title, blocks)
    wrong = [f"{it.place}: {it.wrong}" for it in directives if it.wrong]
    return {
        "page": str(page),
        "num_filled": sum(not (it.missing or it.wrong) for it in directives),
        "missing": [f"{'; '.join(headings)}: {text}" for text, headings in missing.items()],
        "differing": wrong + problems,
    }


def check_journal(path: Path) -> dict:
    """{"differing"}: a sentence for each part of the journal that its file no longer says, and for
    each disagreement between the files.
    """
    if not path.is_file():
        raise BadInput(f"there is no {path}: report.py journal begins it")
    _, directives, problems = fill(path.read_text(encoding="utf-8"), path.parent)
    sentences = []
    for directive in directives:
        sentence = compare(directive, path.parent)
        if sentence:
            sentences.append(f"{directive.place}: {sentence}")
    return {"differing": sentences + problems}


def compare(directive: Directive, root: Path) -> str:
    """How a filled-in part differs from what its files say; empty where it does not."""
    if directive.wrong:
        return directive.wrong
    if directive.before is None:
        return "it is not filled in yet: make journal"
    ours = directive.before.strip().splitlines()
    theirs = directive.filled.splitlines()
    for says, should in itertools.zip_longest(ours, theirs, fillvalue="nothing"):
        if says != should:
            return f"it says `{says}`, the files say `{should}`"
    for figure in directive.figures:
        if not is_current(figure, root):
            return f"{figure.path} was drawn from other files than there are now"
    return ""
