"""README.md and docs/ against the program: length, sentences, numbers, links, and every command."""

import functools
import importlib
import re
import shlex
import subprocess
import sys

import pytest
from conftest import REPOSITORY, call_script
from fill_docs import PAGES, VALUE, fill
from words import long_sentences

from lib.prepare.synthetic import PLANTS

README = (REPOSITORY / "README.md").read_text()
MAKEFILE = (REPOSITORY / "Makefile").read_text()
PROSE = [*PAGES, *(REPOSITORY / name for name in ("CONTRIBUTING.md", "CHANGELOG.md"))]


def find_commands(path) -> list[str]:
    """Commands of a page: lines of a block, without what follows ` #`, and code in a sentence."""
    text = re.sub(r"(?s)<!-- table .*?<!-- end -->", "", path.read_text())
    start = r"(?:python|make|torchrun) "
    in_blocks = re.findall(rf"(?m)^    (?:\$ )?({start}.*?)(?: +#.*)?$", text)
    return in_blocks + re.findall(rf"`({start}[^`]+)`", text)


COMMANDS = sorted({command for path in PROSE for command in find_commands(path)})


def test_the_readme_is_short():
    lines = README.splitlines()
    assert len(lines) <= 160 and max(map(len, lines)) <= 120
    for heading in ("Installation", "Data setup", "Training", "Inference"):
        assert f"## {heading}" in lines


def test_no_sentence_is_long():
    for path in PROSE:
        assert long_sentences(path.read_text()) == [], path.name
    words = "word " * 25
    assert long_sentences(f"{words}; more\n\n    {words} {words}\n") == []
    assert long_sentences(f"{words}more.") and long_sentences(f"| cell | {words}more |")


def test_numbers_and_tables_are_those_of_the_files_and_another_number_is_noticed():
    different = [page.name for page in PAGES if fill(page.read_text()) != page.read_text()]
    assert different == [], "python tests/fill_docs.py"
    values = [match for match in VALUE.finditer(README) if match[2]]
    assert len(values) >= 6
    assert fill(README.replace(values[0][0], f"{values[0][1]}0.123")) == README


def test_links_lead_to_files():
    for path in PROSE:
        text = re.sub(r"`[^`]*`", "", path.read_text())
        for link in re.findall(r"\]\(([^)#]+)\)", text):
            assert link.startswith("http") or (path.parent / link).exists(), f"{path.name}: {link}"


def test_make_has_every_target_and_variable_that_is_named_and_help_shows_all_targets():
    targets = set(re.findall(r"(?m)^([a-z-]+):", MAKEFILE))
    for command in COMMANDS:
        program, target, *words = shlex.split(command)
        if program == "make":
            names = [word.partition("=")[0] for word in words if "=" in word]
            unknown = [name for name in names if not re.search(rf"\b{name}\b", MAKEFILE)]
            assert target in targets and not unknown, command
    command = ["make", "-s", "help"]
    listed = subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY).stdout
    assert set(re.findall(r"(?m)^  make (\S+) +\S", listed)) == targets


@functools.cache
def read_help(*words: str) -> str:
    command = [sys.executable, *words, "--help"]
    return subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY).stdout


def test_scripts_know_every_verb_option_and_key_that_is_named():
    keys = set(re.findall(r"(?m)^([a-z_0-9]+):", (REPOSITORY / "config.yaml").read_text()))
    keys |= set(PLANTS)  # --plant nan=0.03
    for command in COMMANDS:
        names = set(re.findall(r"(?:^|[ \"])([a-z_0-9]+)=", command))
        assert names <= keys, command
        words = shlex.split(re.sub(r" *\[[^\]]*\]| \.\.\.", "", command))
        if words[0] == "make":
            continue
        while not words[0].endswith(".py"):
            words.pop(0)
        script, *words = words
        if script.startswith("tests/"):
            assert (REPOSITORY / script).is_file(), command
            continue
        verb = words[:1] if words and re.fullmatch("[a-z]+", words[0]) else []
        text = read_help(script) + read_help(script, *verb)
        options = {word.partition("=")[0] for word in words if word.startswith("--")}
        assert text and all(option in text for option in options), command


@pytest.mark.slow
def test_commands_that_are_marked_run(tmp_path, monkeypatch):
    """Those below `<!-- run -->`, page by page, in one folder; runs/RUN is the run made there."""
    monkeypatch.chdir(tmp_path)
    num_run = 0
    for name in ("data", "training", "inference"):
        text = (REPOSITORY / f"docs/{name}.md").read_text()
        for block in re.findall(r"<!-- run -->\n\n((?:    .*\n)+)", text):
            for line in block.splitlines():
                runs = sorted(map(str, tmp_path.glob("runs/*"))) or [""]
                _, script, *words = shlex.split(line.replace("runs/RUN", runs[-1]), comments=True)
                if script == "train.py":
                    words += ["p4m_width=2", "precision=fp32"]  # quick
                main = importlib.import_module(script.removesuffix(".py")).main
                code, _, err = call_script(main, *words)
                assert code == 0, f"{line}: {err}"
                num_run += 1
    assert num_run > 3
