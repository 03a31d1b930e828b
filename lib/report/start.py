"""The journal that a team begins with: the questions, and what an earlier journal.yaml says."""

import re
from pathlib import Path

from lib.command import say
from lib.config import read_yaml
from lib.files import atomic_write

TEMPLATE = Path(__file__).parent / "template.md"
OLD = "journal.yaml"
MADE = "Made by `report.py journal` from the files"  # of a journal that was generated as a whole


def start_journal(path: Path) -> bool:
    """Write an empty journal where there is none; True if it did.

    A journal.yaml beside it, from before a journal was the team's own text, is converted once: its
    words are put below their questions. It, and the journal that was made from it, are kept under
    the names *.old.
    """
    old = path.parent / OLD
    if path.is_file() and old.is_file() and MADE in path.read_text(encoding="utf-8"):
        path.rename(path.with_name(f"{path.name}.old"))
        say(f"{path} was made from {old}: kept as {path.name}.old")
    if path.is_file():
        return False
    text = TEMPLATE.read_text(encoding="utf-8")
    if old.is_file():
        text = convert(text, read_yaml(old))
        old.rename(old.with_name(f"{OLD}.old"))
        say(f"{old} was converted, and is kept as {OLD}.old")
    with atomic_write(path, "w") as file:
        file.write(text)
    return True


def convert(text: str, values: dict) -> str:
    """The empty journal with the values of a journal.yaml."""
    for name in ("group", "repository"):
        if values.get(name):
            line = f"{name.capitalize()}: {values[name]}"
            empty = re.search(rf"(?m)^{name.capitalize()}: .*$", text)[0]
            text = text.replace(empty, line, 1)
    members = [f"- {member['name']} ({member['id']})" for member in values.get("members") or []]
    if members:
        text = text.replace("- to be filled in (0000000)", "\n".join(members))
    if values.get("runs"):
        runs = " ".join(f"runs/{name}" for name in values["runs"])
        text = text.replace("<!-- seeds -->", f"<!-- seeds {runs} -->")
    for name, first in (("audit", "data-audit/"), ("twin", "twin/"), ("search", "search/")):
        if values.get(name):
            text = text.replace(f" {first}", f" {values[name]}/")
    for key, words in {**(values.get("answers") or {}), "remark": values.get("remark")}.items():
        if words:
            hint = re.search(rf"<!-- hint {re.escape(key)}: .*? -->", text)
            text = text.replace(hint[0], words.strip()) if hint else f"{text}\n{words.strip()}\n"
    return text
