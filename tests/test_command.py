"""The promises to the shell: exit codes, one sentence, one JSON object, and bugs that are not
dressed up as bad input.
"""

import errno
import json
import math
import os
import subprocess
import sys

import pytest
from conftest import REPOSITORY

from lib import command
from lib.command import BadInput, Parser, print_result, run_script, script

REFUSALS = [
    (BadInput("x has 3 rows"), 2, "x has 3 rows"),
    (OSError(errno.ENOSPC, "No space left", "/full/x.h5"), 2, "no space left: /full/x.h5"),
    (KeyboardInterrupt(), 130, "interrupted"),
    (MemoryError("3 GB"), 2, "not enough memory (3 GB)"),
    (RuntimeError("CUDA out of memory. Tried"), 2, "not enough memory (CUDA out of memory."),
    (ModuleNotFoundError(name="PIL"), 2, f"{sys.executable} lacks the package PIL"),
]
BUGS = [ValueError("x"), RuntimeError("x"), ModuleNotFoundError(name="lib.x")]


def raising(error):
    """A script's main that raises an error."""

    @script
    def main(_argv=None):
        raise error

    return main


def test_a_refusal_is_one_sentence_and_one_object_and_a_bug_keeps_its_traceback(capsys):
    for error, code, sentence in REFUSALS:
        assert raising(error)([]) == code
        printed = capsys.readouterr()
        assert printed.err.startswith(f"error: {sentence}") and printed.err.count("\n") == 1
        assert f"error: {json.loads(printed.out)['error']}\n" == printed.err
    for bug in BUGS:
        with pytest.raises(type(bug)):
            raising(bug)([])


def test_help_is_0_wrong_use_is_2_and_overrides_stand_anywhere(capsys):
    parser = Parser(prog="x.py")
    parser.add_argument("--runs")
    main = script(lambda argv=None: len(parser.parse_with_overrides(argv).overrides))
    assert main(["a=1", "--runs", "x", "b=~"]) == 2
    assert main(["--help"]) == 0
    assert main(["--nonsense"]) == 2
    assert capsys.readouterr().err == (
        "error: unrecognized arguments: --nonsense (see x.py --help)\n"
    )


def test_the_result_is_strict_json_or_on_a_terminal_two_lines(capsys, monkeypatch):
    print_result({"auc": math.nan, "rows": [math.inf, 1.5, (2, -math.inf)], "name": "nan"})
    result = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    assert result == {"auc": None, "rows": [None, 1.5, [2, None]], "name": "nan"}
    monkeypatch.setattr(command.sys.stdout, "isatty", lambda: True)
    print_result({"run": "runs/x"} | dict.fromkeys(map(str, range(99)), "word"))
    assert capsys.readouterr().out.count("\n") == 2


REFUSING = """
import sys
from lib.command import BadInput, script

@script
def main(_argv=None):
    raise BadInput("no such thing")

code = main([])
assert not {"torch", "numpy", "yaml"} & set(sys.modules)
sys.exit(code)
"""


def test_a_reader_that_has_gone_away_leaves_a_refusal_clear_and_no_library_was_needed_for_it():
    reader, writer = os.pipe()
    os.close(reader)
    words = [sys.executable, "-c", REFUSING]
    options = {"stderr": subprocess.PIPE, "text": True, "cwd": REPOSITORY}
    result = subprocess.run(words, stdout=writer, **options)
    os.close(writer)
    assert (result.returncode, result.stderr) == (2, "error: no such thing\n")


FAILING = {
    'print(\'{"error": "no such run"}\'); raise SystemExit(2)': "no such run",
    "import absent_module": "absent_module",
    "raise SystemExit('error: no disk')": "^no disk$",
    "print('{\"rows\": 3}'); raise SystemExit(1)": None,
    "print('half a line')": None,
}
TALKING = """
import json, sys
print(json.dumps({"arguments": sys.argv[1:]}))
print("a line", file=sys.stderr)
"""


def test_of_another_program_the_last_line_is_read_and_a_failure_is_told_once_in_its_words(
    tmp_path, capfd
):
    program = tmp_path / "program.py"
    for code, last_words in FAILING.items():
        program.write_text(code)
        with pytest.raises(BadInput, match=last_words):
            run_script(program)
    program.write_text(TALKING)
    for shows_progress in (False, True):
        result = run_script(program, "a", 1, shows_progress=shows_progress)
        assert result == {"arguments": ["a", "1"]}
        assert capfd.readouterr().err == "a line\n" * shows_progress
    program.write_text('print(\'{"error": "no"}\'); raise SystemExit("error: no")')
    main = script(lambda _argv: run_script(program, shows_progress=True))
    assert main([]) == 2 and capfd.readouterr().err == "error: no\n"
    assert os.listdir(tmp_path) == ["program.py"], "no .pyc beside it"
