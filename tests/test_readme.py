"""README.md and docs/ against the program: length, sentences, numbers, links, and every command."""

import re
import shlex
import subprocess
import sys

import pytest
from conftest import REPOSITORY
from fill_docs import PAGES, VALUE, fill
from words import long_sentences

from lib.prepare.synthetic import PLANTS

README = (REPOSITORY / "README.md").read_text()
MAKEFILE = (REPOSITORY / "Makefile").read_text()
TARGETS = set(re.findall(r"(?m)^([a-z-]+):", MAKEFILE))
# what other changes bring that are under way: remove a name when it is there
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
    assert len(lines) <= 160
    assert [line for line in lines if len(line) > 120] == []
    for heading in ("Installation", "Data setup", "Training", "Inference"):
        assert f"## {heading}" in lines


def test_no_sentence_is_long():
    found = {path.name: long_sentences(path.read_text()) for path in PROSE}
    assert {name: sentences for name, sentences in found.items() if sentences} == {}


def test_the_counter_of_words_counts():
    words = "word " * 25
    assert long_sentences(f"{words}.") == []
    assert long_sentences(f"{words}more.") and long_sentences(f"| cell | {words}more |")
    assert long_sentences(f"{words}; more\n\n    {words} {words}\n") == []


def test_numbers_and_tables_are_those_of_the_files():
    different = [page.name for page in PAGES if fill(page.read_text()) != page.read_text()]
    assert different == [], "python tests/fill_docs.py"
    assert sum(bool(match[2]) for match in VALUE.finditer(README)) >= 6


def test_a_number_that_a_file_does_not_say_is_noticed():
    right = next(match for match in VALUE.finditer(README) if match[2])
    wrong = README.replace(right[0], f"{right[1]}0.123")
    assert fill(wrong) == README


def test_links_lead_to_files():
    missing = []
    for path in PROSE:
        text = re.sub(r"`[^`]*`", "", path.read_text())
        for link in re.findall(r"\]\(([^)#]+)\)", text):
            if not link.startswith("http") and not (path.parent / link).exists():
                missing.append(f"{path.name}: {link}")
    assert missing == []


def test_make_has_every_target_and_variable_that_is_named():
    wrong = []
    for command in COMMANDS:
        _, target, *words = shlex.split(command) if command.startswith("make ") else ("", "")
        if not target:
            continue
        names = {word.partition("=")[0] for word in words if "=" in word}
        unknown = [name for name in names if not re.search(rf"\b{name}\b", MAKEFILE)]
        if target not in TARGETS or unknown:
            wrong.append(command)
    assert wrong == []


def read_help(script: str, words: list[str]) -> str:
    """--help of a script, and of its verb where the first word is one."""
    command = [sys.executable, str(REPOSITORY / script)]
    text = ""
    for verb in ([], words[:1]):
        result = subprocess.run([*command, *verb, "--help"], capture_output=True, text=True)
        text += result.stdout
    return text


def test_scripts_know_every_verb_and_option_that_is_named():
    wrong, helps = [], {}
    for command in COMMANDS:
        if command.startswith("make "):
            continue
        words = shlex.split(re.sub(r" *\[[^\]]*\]| \.\.\.", "", command))
        script = next(word for word in words if word.endswith(".py"))
        words = words[words.index(script) + 1 :]
        if script.startswith("tests/"):
            assert (REPOSITORY / script).is_file(), command
            continue
        verb = words[:1] if words and re.fullmatch("[a-z]+", words[0]) else []
        key = (script, *verb)
        helps[key] = helps.get(key) or read_help(script, verb)
        options = {word.partition("=")[0] for word in words if word.startswith("--")}
        unknown = [option for option in options if option not in helps[key]]
        if not helps[key] or unknown:
            wrong.append(command)
    assert wrong == []


def test_keys_that_are_named_are_keys_of_the_config():
    keys = set(re.findall(r"(?m)^([a-z_0-9]+):", (REPOSITORY / "config.yaml").read_text()))
    keys |= set(PLANTS)  # --plant nan=0.03
    wrong = []
    for command in COMMANDS:
        named = re.findall(r"(?:^|[ \"])([a-z_0-9]+)=", command)
        wrong += [f"{command}: {name}" for name in named if name not in keys]
    assert wrong == []


def test_make_help_shows_every_target_with_a_word_on_it():
    command = ["make", "-s", "help"]
    listed = subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY).stdout
    shown = {line.split()[1]: line.split()[2:] for line in listed.splitlines() if "  make" in line}
    assert set(shown) == TARGETS
    assert all(len(words) > 1 for words in shown.values())


@pytest.mark.slow
def test_commands_that_are_marked_run(tmp_path):
    """Those below `<!-- run -->`, page by page, in one folder; runs/RUN is the run made there."""
    num_run = 0
    for name in ("data", "training", "inference"):
        text = (REPOSITORY / f"docs/{name}.md").read_text()
        for block in re.findall(r"<!-- run -->\n\n((?:    .*\n)+)", text):
            for line in block.splitlines():
                _, script, *words = shlex.split(line, comments=True)
                runs = sorted(tmp_path.glob("runs/*"))
                words = [
                    word.replace("runs/RUN", str(runs[-1])) if runs else word for word in words
                ]
                command = [sys.executable, str(REPOSITORY / script), *words]
                result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
                assert result.returncode == 0, f"{line}: {result.stderr[-500:]}"
                num_run += 1
    assert num_run > 3
