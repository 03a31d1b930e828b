"""README.md and make against the program: every command that is shown is taken by the script, or
make target, that it names.
"""

import re
import runpy
import shlex
import subprocess

import pytest
from conftest import REPOSITORY

README = (REPOSITORY / "README.md").read_text()
MAKEFILE = (REPOSITORY / "Makefile").read_text()
TARGETS = set(re.findall(r"(?m)^([a-z-]+):", MAKEFILE))
# a line of a block, or code inside a sentence, that begins like a command; what follows ` #` is
# said about it
SHOWN = re.findall(r"(?m)^    ((?:python|make) .*?)(?: +#.*)?$", README) + re.findall(
    r"`((?:python|make) [^`]+)`", README
)
COMMANDS = sorted({command.strip() for command in SHOWN})


def arguments(command: str) -> tuple[str, list[str]]:
    """Script or target of a command, and the words behind it; what may be left out stands in
    brackets.
    """
    name, *words = shlex.split(re.sub(r" *\[[^\]]*\]| \.\.\.", "", command))[1:]
    return name, words


def test_there_is_something_to_check():
    assert len(COMMANDS) > 40 and {arguments(command)[0] for command in COMMANDS} >= {
        "train.py",
        "inference.py",
        "test",
        "demo",
    }


@pytest.mark.parametrize(
    "command", [command for command in COMMANDS if command.startswith("python")]
)
def test_a_script_takes_its_command(command):
    script, words = arguments(command)
    assert (REPOSITORY / script).is_file(), f"{script} is not there"
    module = runpy.run_path(str(REPOSITORY / script))
    if "parse" in module:
        module["parse"](words)


@pytest.mark.parametrize("command", [command for command in COMMANDS if command.startswith("make")])
def test_make_takes_its_command(command):
    target, words = arguments(command)
    assert target in TARGETS, f"there is no target {target}"
    result = subprocess.run(
        ["make", "-n", target, *words], capture_output=True, text=True, cwd=REPOSITORY
    )
    assert result.returncode == 0, result.stderr
    named = {word.partition("=")[0] for word in words}
    assert all(re.search(rf"\b{name}\b", MAKEFILE) for name in named), (
        f"make knows nothing of {named}"
    )


def test_make_help_shows_every_target_with_a_word_on_it():
    listed = subprocess.run(
        ["make", "-s", "help"], capture_output=True, text=True, cwd=REPOSITORY
    ).stdout
    assert {line.split()[1] for line in listed.splitlines()} == TARGETS
    assert all(len(line.split()) > 3 for line in listed.splitlines())


@pytest.mark.parametrize("path", sorted(set(re.findall(r"\]\(([^)#]+)\)", README))))
def test_a_link_leads_to_a_file(path):
    assert path.startswith("http") or (REPOSITORY / path).exists()
