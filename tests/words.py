"""Sentences of more than 25 words in Markdown files: python tests/words.py README.md docs/*.md

A full stop, a question mark, a semicolon and a colon end a sentence. Code in backticks is one word.
Blocks of code, and tables that a script has filled in, are not counted.
"""

import re
import sys
from pathlib import Path

MOST_WORDS = 25
CODE_BLOCKS = (r"(?ms)^```.*?^```", r"(?m)^(    .*\n)+")
HIDDEN = (r"(?s)<!-- table .*?<!-- end -->", r"(?s)<!--.*?-->", r"!\[[^\]]*\]\([^)]*\)")
ENDS = re.compile(r"[.?!;:][)\"”*_]*(?=\s|$)")


def find_units(text: str) -> list[str]:
    """Paragraphs, list items, headings and cells of a Markdown text, without code and comments."""
    for pattern in CODE_BLOCKS:
        text = re.sub(pattern, "\n", text)
    text = re.sub(r"`[^`]*`", "CODE", text)
    for pattern in HIDDEN:
        text = re.sub(pattern, "", text)
    text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", text)
    # a new unit begins at a list item, a heading, a row of a table and each of its cells
    text = re.sub(r"(?m)^\s*([-*]|\d+\.|#+) ", "\n\n", text)
    text = re.sub(r"(?m)^\|(.*)\|$", lambda row: row[1].replace("|", "\n\n") + "\n\n", text)
    return re.split(r"\n\s*\n", text)


def long_sentences(text: str, most: int = MOST_WORDS) -> list[str]:
    """Sentences of a Markdown text that have more than `most` words."""
    sentences = []
    for unit in find_units(text):
        sentences += ENDS.split(unit)
    return [
        " ".join(sentence.split())
        for sentence in sentences
        if len(re.findall(r"\S*\w\S*", sentence)) > most
    ]


def main(paths: list[str]) -> int:
    num_found = 0
    for path in paths:
        for sentence in long_sentences(Path(path).read_text()):
            print(f"{path}: {len(sentence.split())} words: {sentence}")
            num_found += 1
    return min(num_found, 1)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
