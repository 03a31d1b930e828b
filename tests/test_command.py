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

from lib.command import BadInput, Parser, print_result, run_script, script

SMALLER = "smaller batches (batch_size, eval_batch_size) or data_residence=disk take less"


@pytest.mark.parametrize(
    "error, code, sentence",
    [
        (BadInput("x has 3 rows"), 2, "error: x has 3 rows"),
        (
            OSError(errno.ENOSPC, "No space left on device", "/full/x.h5"),
            2,
            "error: no space left on device: /full/x.h5",
        ),
        (KeyboardInterrupt(), 130, "error: interrupted"),
        (MemoryError("3 GB"), 2, f"error: not enough memory (3 GB); {SMALLER}"),
        (
            RuntimeError("CUDA out of memory. Tried"),
            2,
            f"error: not enough memory (CUDA out of memory. Tried); {SMALLER}",
        ),
        (
            ModuleNotFoundError(name="PIL"),
            2,
            f"error: {sys.executable} lacks the package PIL: make setup, then . .venv/bin/activate",
        ),
    ],
)
def test_a_refusal_is_one_sentence_on_stderr_and_one_object_on_stdout(
    error, code, sentence, capsys
):
    @script
    def main(_argv=None):
        raise error

    assert main([]) == code
    printed = capsys.readouterr()
    assert printed.err == sentence + "\n"
    assert json.loads(printed.out) == {"error": sentence.removeprefix("error: "), "exit": code}


@pytest.mark.parametrize(
    "bug",
    [
        ValueError("x"),
        KeyError("x"),
        RuntimeError("x"),
        ModuleNotFoundError(name="lib.x"),
        AssertionError("x"),
        OSError("without a number"),
    ],
)
def test_a_bug_keeps_its_traceback(bug):
    @script
    def main(_argv=None):
        raise bug

    with pytest.raises(type(bug)):
        main([])


def test_help_is_0_wrong_use_is_2_and_other_codes_pass_through(capsys):
    main = script(lambda argv=None: Parser(prog="x.py").parse_args(argv) and 1)
    assert (main([]), main(["--help"])) == (1, 0)
    capsys.readouterr()
    assert main(["--nonsense"]) == 2
    assert (
        capsys.readouterr().err == "error: unrecognized arguments: --nonsense (see x.py --help)\n"
    )


def test_the_result_is_strict_json_whatever_is_not_finite(capsys):
    print_result({"auc": math.nan, "rows": [math.inf, 1.5, (2, -math.inf)], "name": "nan"})
    result = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    assert result == {"auc": None, "rows": [None, 1.5, [2, None]], "name": "nan"}


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
    command = [sys.executable, "-c", REFUSING]
    options = {"stderr": subprocess.PIPE, "text": True, "cwd": REPOSITORY}
    result = subprocess.run(command, stdout=writer, **options)
    os.close(writer)
    assert (result.returncode, result.stderr) == (2, "error: no such thing\n")


@pytest.mark.parametrize(
    "code, last_words",
    [
        ('print(\'{"error": "no such run"}\'); raise SystemExit(2)', "no such run"),
        ("import absent_module", "absent_module"),
        ("raise SystemExit('error: no disk')", "^no disk$"),
        ("print('{\"rows\": 3}'); raise SystemExit(1)", None),
        ("print('half a line')", None),
    ],
)
def test_a_program_that_fails_is_bad_input_in_its_own_words(code, last_words, tmp_path):
    (tmp_path / "program.py").write_text(code)
    with pytest.raises(BadInput, match=last_words):
        run_script(tmp_path / "program.py")


def test_a_program_that_does_not_end_is_stopped(tmp_path):
    (tmp_path / "program.py").write_text("import time; time.sleep(60)")
    with pytest.raises(BadInput, match="program.py"):
        run_script(tmp_path / "program.py", timeout_s=0.5)


TALKING = """
import json, sys
print("text")
print(json.dumps({"arguments": sys.argv[1:]}))
print("a line", file=sys.stderr)
sys.exit(1)
"""


@pytest.mark.parametrize("shows_progress", [False, True])
def test_of_a_program_the_last_line_is_read(shows_progress, tmp_path, capfd):
    (tmp_path / "program.py").write_text(TALKING)
    result = run_script(
        tmp_path / "program.py", "a", 1, codes=(0, 1), shows_progress=shows_progress
    )
    assert result == {"arguments": ["a", "1"]}
    assert capfd.readouterr().err == "a line\n" * shows_progress
    assert len(list(tmp_path.iterdir())) == 1, "no .pyc beside it"
