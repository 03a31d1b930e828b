"""The journal, a team's own Markdown: what its directives ask for is filled in from files, and
compared with them.
"""

import re
import shlex
from dataclasses import dataclass, replace
from pathlib import Path

from lib.blocks import Code, Table, to_markdown, write_page
from lib.command import BadInput, nearest, one_line, say
from lib.evidence import BY_NAME
from lib.files import atomic_write
from lib.report.evidence import NUM_DIGITS, Evidence, Missing
from lib.report.figures import Drawing, build_figure
from lib.report.markdown import COMMENT, parse_markdown
from lib.report.quotes import OF_HISTORY, git, quote_code
from lib.report.start import start_journal
from lib.report.tables import build_seeds, build_table, build_value

# the options of each kind of directive, and the least and the most of its other words
KINDS = {
    "table": ({"columns", "rows", "where", "only", "sort", "at"}, 1, 2),
    "figure": ({"title", "patches", "at"}, 1, 1),
    "code": ({"at"}, 1, 1),
    "value": ({"digits"}, 2, 2),
    "seeds": (set(), 0, 99),
    "sources": (set(), 0, 0),
}
NAMES = "|".join(KINDS)
END = "<!-- end -->"
# a directive and what stands between it and END, if that comes before the next comment
DIRECTIVE = re.compile(
    rf"<!-- (?P<kind>{NAMES})\b(?P<words>[^\n]*?) ?-->"
    rf"(?:(?P<filled>(?:(?!<!--).)*?){END})?",
    re.DOTALL,
)
NO_HINT = re.compile(
    r"<!-- *(?!end\b|hint\b)([A-Za-z]+)[^\n]*"
)  # other comments, and their first word
PART = re.compile(r"[a-z]+=")  # begins an option
AT_COMMIT = {*OF_HISTORY, "non-determinism"}  # are of a commit, which is noted in the directive
# what a file that is damaged, or of another program, provokes
OF_DAMAGE = (BadInput, KeyError, TypeError, ValueError, AttributeError, IndexError, OSError)


@dataclass(frozen=True)
class Directive:
    """A directive as it stands in the journal: where, its words and options, and what is filled in
    below it (None: nothing yet).
    """

    line: int
    heading: str
    kind: str
    words: tuple[str, ...]
    options: dict
    filled: str | None

    def markdown(self, filled: str) -> str:
        """The directive with what it is filled in with."""
        words = [self.kind, *map(shlex.quote, self.words)]
        for name, value in self.options.items():
            values = value if isinstance(value, list) else [value]
            words += [f"{name}={shlex.quote(text)}" for text in values]
        space = "" if self.kind == "value" else "\n\n"
        return f"<!-- {' '.join(words)} -->{space}{filled}{space}{END}"


@dataclass(frozen=True)
class Outcome:
    """A directive with its new content, the drawing that belongs to it, and what is missing or
    wrong.
    """

    directive: Directive
    filled: str
    drawing: Drawing | None = None
    missing: str = ""
    wrong: str = ""


def read_directives(text: str) -> list[Directive]:
    """The directives of a journal, in order. Raises BadInput for one that is none."""
    directives = []
    for match in DIRECTIVE.finditer(text):
        before = text[: match.start()]
        headings = re.findall(r"(?m)^#+ +(.*)$", before)
        place = (before.count("\n") + 1, headings[-1] if headings else "front page")
        words, options = parse_words(match["kind"], match["words"], f"line {place[0]}")
        if match["kind"] == "value" and "\n" in (match["filled"] or ""):
            raise BadInput(f"line {place[0]}: {match[0].splitlines()[0]} lacks its {END}")
        directives.append(Directive(*place, match["kind"], words, options, match["filled"]))
    require_no_leftovers(text)
    return directives


def require_no_leftovers(text: str) -> None:
    """Raise BadInput for an END without its directive, and for a comment that is nearly one."""
    # of the directives only their line ends are left, so that lines keep their numbers
    rest = DIRECTIVE.sub(lambda match: "\n" * match[0].count("\n"), text)
    for number, line in enumerate(rest.splitlines(), 1):
        if END in line:
            raise BadInput(f"line {number}: {END} without its directive: delete it")
        comment = NO_HINT.search(line)
        word = comment[1] if comment else ""
        hint = nearest(word.lower(), KINDS)
        if hint or word.lower() in KINDS:
            raise BadInput(f"line {number}: {comment[0]} is no directive{hint}")


def parse_words(kind: str, text: str, place: str) -> tuple[tuple[str, ...], dict]:
    """The words and the options of a directive. `where` may be given several times."""
    allowed, least, most = KINDS[kind]
    try:
        parts = shlex.split(text)
    except ValueError as error:
        raise BadInput(f"{place}: {kind} {text.strip()}: {error}") from None
    words, options = [], {}
    for part in parts:
        name, sign, value = part.partition("=")
        if not PART.match(part):
            words.append(part)
        elif name not in allowed:
            hint = nearest(name, allowed) or f" (allowed: {', '.join(sorted(allowed)) or 'none'})"
            raise BadInput(f"{place}: {kind} has no option {name}{sign}{hint}")
        elif name == "where":
            options.setdefault(name, []).append(value)
        else:
            options[name] = value
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
    problems = e.check()
    # after everything that is read
    outcomes = [list_sources(e, outcome) for outcome in outcomes]
    parts = iter(outcomes)

    def replace_part(_match) -> str:
        outcome = next(parts)
        return outcome.directive.markdown(outcome.filled)

    return DIRECTIVE.sub(replace_part, text), outcomes, problems


def note_choices(e: Evidence, directive: Directive) -> None:
    """Note the runs, the champion and the folders that a directive names: the others follow it."""
    words = directive.words
    if directive.kind == "seeds" and words and not e.seeds:
        e.seeds = list(words)
    elif directive.kind == "table" and words[0] == "champion" and len(words) > 1:
        e.champion = words[1]
    elif directive.kind in ("table", "figure", "value"):
        folder = words[0].rpartition("/")[0]
        for name, piece in BY_NAME.items():
            marker = piece.pattern.rpartition("/")[2]
            if (
                folder
                and name not in ("seeds", "champion")
                and (e.root / folder / marker).is_file()
            ):
                e.folders.setdefault(name, folder)


def fill_directive(e: Evidence, directive: Directive) -> Outcome:
    """What a directive is filled in with; the names that it left open are put into it."""
    try:
        directive = settle(e, directive)
        if directive.kind == "value":
            return Outcome(directive, build_value(e, *directive.words, directive.options))
        if directive.kind == "figure":
            drawing = build_figure(e, directive.words[0], directive.options)
            return Outcome(directive, drawing.markdown(), drawing)
        return Outcome(directive, to_markdown(build_blocks(e, directive)))
    except Missing as error:
        return Outcome(directive, f"*Missing: {error}.*", missing=str(error))
    except OF_DAMAGE as error:
        sentence = str(error) if isinstance(error, BadInput) else describe(error)
        return Outcome(directive, f"**Cannot be filled in:** {sentence}.", wrong=sentence)


def describe(error: Exception) -> str:
    """A sentence on an error that a damaged file has provoked."""
    return f"a file is damaged, or of another program ({type(error).__name__}: {one_line(error)})"


def settle(e: Evidence, directive: Directive) -> Directive:
    """The directive with the runs, the file or the commit that it left open."""
    words, options = directive.words, directive.options
    if directive.kind == "seeds":
        words = tuple(words or e.find_seeds())
    elif directive.kind in ("table", "figure", "value") and not words[0].startswith("champion"):
        words = (e.resolve(words[0]), *words[1:])
    if words[:1] and words[0] in AT_COMMIT and "at" not in options:
        commit = e.commit() if words[0] == "non-determinism" else git("rev-parse", "HEAD").strip()
        options = options | ({"at": commit[:NUM_DIGITS]} if commit else {})
    return replace(directive, words=words, options=options)


def build_blocks(e: Evidence, directive: Directive) -> list:
    """The blocks of a table, a quote or a comparison of seeds."""
    words, options = directive.words, directive.options
    if directive.kind == "table":
        return build_table(e, words[0], options)
    if directive.kind == "seeds":
        return build_seeds(e, list(words))
    if directive.kind == "code":
        return quote(e, words[0], options)
    return []


def quote(e: Evidence, source: str, options: dict) -> list:
    """A definition at the commit of the runs, or at another one that the directive names."""
    if source in OF_HISTORY:
        find, command = OF_HISTORY[source]
        text = find(options.get("at", ""))
        if not text:
            raise Missing(f"the history of this clone has no {source}")
        return [Code(text, command)]
    file, _, name = source.partition(":")
    commit = options.get("at") or e.commit()
    line, text = quote_code(commit, file, name)
    e.require_unpatched(file)
    return [Code(text, f"{file}:{line} at {commit[:10] or 'no commit'}")]


def list_sources(e: Evidence, outcome: Outcome) -> Outcome:
    """The outcome; of `sources` with a table of every file that the journal was filled in from."""
    if outcome.directive.kind != "sources":
        return outcome
    rows = [[name, digest[:NUM_DIGITS]] for name, digest in sorted(e.sources.items())]
    return replace(outcome, filled=Table(["file", "SHA-256"], rows).to_markdown())


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
    for outcome in outcomes:
        if outcome.drawing:
            outcome.drawing.write(path.parent)
    if filled != text:
        # a person may have written between a directive and its end, which is replaced
        path.with_name(f"{path.name}.before").write_text(text, encoding="utf-8")
        with atomic_write(path, "w") as file:
            file.write(filled)
    page = path.parent / "journal.html"
    title = next(iter(re.findall(r"(?m)^# +(.*)$", filled)), path.stem)
    body = re.sub(r"(?m)\A(?s:.*?)^# +.*$", "", filled, count=1)
    write_page(page, title, parse_markdown(body, path.parent))
    missing = {}  # the headings that miss the same
    for outcome in outcomes:
        if outcome.missing:
            headings = missing.setdefault(outcome.missing, [])
            if outcome.directive.heading not in headings:
                headings.append(outcome.directive.heading)
    wrong = [f"{place_of(path, o)}: {o.wrong}" for o in outcomes if o.wrong]
    return {
        "journal": str(path),
        "page": str(page),
        "num_filled": sum(not outcome.missing for outcome in outcomes) - len(wrong),
        "missing": [f"{'; '.join(headings)}: {text}" for text, headings in missing.items()],
        "unanswered": find_unanswered(filled),
        "differing": wrong + problems,
    }


def check_journal(path: Path) -> list[str]:
    """A sentence for each part of the journal that its file no longer says, and for each
    disagreement between the files.
    """
    if not path.is_file():
        raise BadInput(f"there is no {path} yet: report.py journal begins it")
    _, outcomes, problems = fill(path.read_text(encoding="utf-8"), path.parent)
    sentences = []
    for outcome in outcomes:
        sentence = compare(outcome, path.parent)
        if sentence:
            sentences.append(f"{place_of(path, outcome)}: {sentence}")
    return sentences + problems


def compare(outcome: Outcome, root: Path) -> str:
    """How a filled-in part differs from what its files say; empty where it does not."""
    directive, drawing = outcome.directive, outcome.drawing
    if outcome.wrong:
        return outcome.wrong
    if directive.filled is None:
        return "it is not filled in yet: make journal"
    ours, theirs = directive.filled.strip().splitlines(), outcome.filled.splitlines()
    if ours != theirs:
        pairs = zip([*ours, "nothing"], [*theirs, "nothing"], strict=False)
        says, should = next(pair for pair in pairs if pair[0] != pair[1])
        return f"it says `{says}`, the files say `{should}`"
    if drawing and not drawing.is_current(root):
        return f"{drawing.name} was drawn from other files than there are now: {drawing.source}"
    return ""


def place_of(path: Path, outcome: Outcome) -> str:
    """The line, heading and kind of a directive."""
    directive = outcome.directive
    words = " ".join([directive.kind, *directive.words[:1]])
    return f"{path.name}:{directive.line} ({directive.heading}), {words}"


def find_unanswered(text: str) -> list[str]:
    """The headings of questions below which the team has written no words."""
    unanswered = []
    sections = re.split(r"(?m)^(#{2,3}) +(.*)$", DIRECTIVE.sub("", text))
    for level, heading, body in zip(sections[1::3], sections[2::3], sections[3::3], strict=True):
        words = COMMENT.sub("", body).strip()
        if level == "###" and not words:
            unanswered.append(heading)
    return unanswered
