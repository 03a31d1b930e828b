"""The journal that a team begins with: the questions, and what an earlier journal.yaml says."""

import re
from pathlib import Path

from lib.command import say
from lib.config import read_yaml
from lib.files import atomic_write

TEMPLATE = Path(__file__).parent / "template.md"
MADE = "Made by `report.py journal` from the files"  # of a journal that was generated as a whole


def start_journal(path: Path) -> bool:
    """Write an empty journal where there is none; True if it did.

    A journal.yaml beside it, from before a journal was the team's own text, is converted once: its
    words are put below their questions. It, and the journal that was made from it, are kept under
    the names *.old.
    """
    old = path.with_name("journal.yaml")
    if path.is_file():
        if not (old.is_file() and MADE in path.read_text(encoding="utf-8")):
            return False
        path.rename(f"{path}.old")
    text = TEMPLATE.read_text(encoding="utf-8")
    if old.is_file():
        text = convert(text, read_yaml(old))
        old.rename(f"{old}.old")
        say(f"{old} was converted; it, and the journal made from it, are kept as *.old")
    with atomic_write(path, "w") as file:
        file.write(text)
    return True


def convert(text: str, values: dict) -> str:
    """The empty journal with the values of a journal.yaml."""
    members = [f"- {member['name']} ({member['id']})" for member in values.get("members") or []]
    runs = [f"runs/{name}" for name in values.get("runs") or []]
    changes = {
        "Group: to be filled in": f"Group: {values.get('group') or 'to be filled in'}",
        "https://example.org/to-be-filled-in": values.get("repository"),
        "- to be filled in (0000000)": "\n".join(members),
        "<!-- seeds -->": f"<!-- {' '.join(['seeds', *runs])} -->",
    }
    for name, folder in (("audit", "data-audit"), ("twin", "twin"), ("search", "search")):
        changes[f" {folder}/"] = values.get(name) and f" {values[name]}/"
    for before, after in changes.items():
        text = text.replace(before, after or before)
    answers = {**(values.get("answers") or {}), "remark": values.get("remark")}
    for key, words in answers.items():
        hint = re.search(rf"<!-- hint {re.escape(key)}: .*? -->", text)
        if words:
            text = text.replace(hint[0], words.strip()) if hint else f"{text}\n{words.strip()}\n"
    return text
