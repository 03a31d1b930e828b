"""What every script promises to the shell: exit codes, one sentence for bad input, one JSON object
at the end.
"""

import argparse
import contextlib
import difflib
import functools
import json
import os
import re
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
NEW_LINE = "\r\033[K"  # begins the line of a terminal anew
# sent by Ctrl-C; at preemption or by scancel; before the time limit
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
EXIT_DONE, EXIT_FINDING, EXIT_USAGE, EXIT_INTERRUPTED = 0, 1, 2, 130


class BadInput(Exception):
    """Input that cannot be used. Its text is one sentence: what, where, what is allowed."""


class Reported(BadInput):
    """Bad input of a program that this one has run, which has said so at the terminal itself."""


class Parser(argparse.ArgumentParser):
    """argparse, with wrong use reported as one sentence instead of the whole usage, and with `~`
    expanded at the start of an argument, where quotes kept it from the shell.
    """

    def parse_known_args(self, args=None, namespace=None):
        words = sys.argv[1:] if args is None else args
        return super().parse_known_args([expand_home(word) for word in words], namespace)

    def parse_with_overrides(self, argv=None) -> argparse.Namespace:
        """The arguments, and as `overrides` all words `key=value`, wherever they stand."""
        words = sys.argv[1:] if argv is None else argv
        overrides = [word for word in words if re.match(r"\w+=", word)]
        args = self.parse_args([word for word in words if word not in overrides])
        args.overrides = overrides
        return args

    def add_device(self) -> None:
        text = "auto, cpu, cuda or cuda:N (default: auto)"
        self.add_argument("--device", default="auto", metavar="D", help=text)

    def error(self, message):
        raise BadInput(f"{message} (see {self.prog} --help)")


def expand_home(path: str) -> str:
    """A path as the shell expands it. Raises BadInput for `~` of a user without a home folder:
    otherwise a folder named `~` would be made.
    """
    expanded = os.path.expanduser(path)
    if f"{expanded}/".startswith("~/"):
        raise BadInput(f"{path}: this user has no home folder for ~ (HOME is not set)")
    return expanded


def probability(text: str) -> float:
    """An argument that must lie between 0 and 1."""
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not between 0 and 1")
    return value


def positive(text: str) -> int:
    """An argument that counts something."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not 1 or more")
    return value


def place(text: str) -> str:
    """An argument that names a file or folder: an empty one would mean the working folder."""
    if not text:
        raise argparse.ArgumentTypeError("an empty text names no file or folder")
    return text


def one_line(error) -> str:
    """The first line of an exception's text; libraries append pages of internals to theirs."""
    return str(error).strip().partition("\n")[0].rstrip(".") or type(error).__name__


def last_line(text: str) -> str:
    """The last line of a program's output, where its error stands."""
    return one_line(text.strip().rpartition("\n")[2] or "it says nothing")


def printable(text) -> str:
    """A text as one line for a terminal: a file's name may hold line ends, and characters that
    steer it.
    """
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in str(text))


def nearest(name, allowed) -> str:
    """A hint such as `, did you mean 'lr'?` or an empty string."""
    match = difflib.get_close_matches(str(name), list(allowed), n=1, cutoff=0.5)
    return f", did you mean '{match[0]}'?" if match else ""


def say(text) -> None:
    """Print a line on stderr for the person at the terminal; stdout is kept for the result."""
    with contextlib.suppress(OSError):  # a terminal that was closed does not end the program
        start = NEW_LINE if sys.stderr.isatty() else ""  # over a progress bar
        print(f"{start}{text}", file=sys.stderr, flush=True)


def without_nan(value):
    """`value` as JSON gives it back, with None for NaN and infinity, which JSON does not have."""
    return json.loads(json.dumps(value), parse_constant=lambda _word: None)


def print_result(result: dict) -> None:
    """Print `result` as the last line of stdout: one JSON object or, on a terminal, two lines for a
    person. A pipe that its reader has closed is no error.
    """
    text = json.dumps(without_nan(result))
    if sys.stdout.isatty():
        words = [f"{name} {value}" for name, value in result.items() if not isinstance(value, dict)]
        text = textwrap.fill(", ".join(words), width=100, max_lines=2)
    try:
        print(text, flush=True)
    except OSError:
        # stdout leads nowhere from here on, or the interpreter would fail when it flushes it
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


def run_script(name, *arguments, codes=(EXIT_DONE,), shows_progress=False) -> dict:
    """Run a Python program and return the JSON object that it prints last. `name` is the program's
    path, absolute or below the repository.

    With `shows_progress` the program writes to this process's stderr. No .pyc is written beside it.
    Raises BadInput with the program's error, or the last line of its stderr, where it prints no
    object or its exit code is not among `codes`.
    """
    command = [sys.executable, "-B", str(REPOSITORY / name), *map(str, arguments)]
    pipes = {"stdout": subprocess.PIPE, "stderr": None if shows_progress else subprocess.PIPE}
    completed = subprocess.run(command, **pipes, text=True, errors="replace")
    try:
        result = json.loads(completed.stdout.strip().rpartition("\n")[2])
    except ValueError:
        result = {}
    if completed.returncode in codes and result:
        return result
    if shows_progress and "error" in result:
        raise Reported(result["error"])
    last_words = last_line(completed.stderr or "").removeprefix("error: ")
    raise BadInput(result.get("error") or last_words)


def is_out_of_memory(error: Exception) -> bool:
    """Whether the memory of the machine or of a GPU has run out. torch raises a RuntimeError for
    both, which only its text tells from others.
    """
    words = ("allocate memory", "enough memory", "out of memory")
    return isinstance(error, MemoryError) or any(word in str(error) for word in words)


def explain(error: BaseException) -> str:
    """An error as one sentence for the user: bad input, or what the system refuses. Empty for a
    bug.
    """
    if isinstance(error, BadInput):
        return str(error)
    if isinstance(error, KeyboardInterrupt):
        return "interrupted"
    if isinstance(error, ModuleNotFoundError) and not str(error.name).startswith("lib."):
        remedy = "make setup, then . .venv/bin/activate"
        return f"{sys.executable} lacks the package {error.name}: {remedy}"
    if isinstance(error, OSError) and error.errno is not None:
        sentence = one_line(error.strerror or error).lower()
        return f"{sentence}: {error.filename}" if error.filename else sentence
    if is_out_of_memory(error):
        remedy = "smaller batches (batch_size, eval_batch_size) or data_residence=disk take less"
        return f"not enough memory ({one_line(error)[:200]}); {remedy}"
    return ""


def script(main):
    """Wrap `main(argv=None) -> int` so that errors become exit codes.

    BadInput and the operating system's refusals (a full disk, a missing permission) become one
    sentence on stderr and 2. Ctrl-C, and the signals that Slurm sends before it kills, become 130.
    Any other error is a bug and keeps its traceback.
    """

    @functools.wraps(main)
    def wrapper(argv=None) -> int:
        # signals that nobody handles raise KeyboardInterrupt, so that open files are tidied up
        for number in STOP_SIGNALS:
            if signal.getsignal(number) is signal.SIG_DFL:
                signal.signal(number, signal.default_int_handler)
        try:
            return main(argv)
        except SystemExit as stop:  # argparse leaves this way after --help
            return int(stop.code or 0)
        except (Exception, KeyboardInterrupt) as error:
            sentence = printable(explain(error))
            if not sentence:
                raise
            if not isinstance(error, Reported):
                say(f"error: {sentence}")
            code = EXIT_INTERRUPTED if isinstance(error, KeyboardInterrupt) else EXIT_USAGE
            if not sys.stdout.isatty():  # a person has read it
                print_result({"error": sentence, "exit": code})
            return code

    return wrapper
