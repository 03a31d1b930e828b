"""Files that survive a crash: JSON replaced whole, CSV appended by rows, and readers that forgive a
torn last line.
"""

import contextlib
import csv
import datetime
import fcntl
import hashlib
import io
import json
import os
import shutil
import time
from pathlib import Path
from types import SimpleNamespace

from lib.command import BadInput, one_line, without_nan

# a file's name may be any bytes
TEXT = {"encoding": "utf-8", "errors": "surrogateescape", "newline": ""}


def utc_now() -> str:
    """Now, to the second, as it stands in every file that says when."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


@contextlib.contextmanager
def atomic_write(path, mode="wb"):
    """Yield a file beside `path` that is synced and takes its name when the block ends well (Pillai
    et al., OSDI 2014).
    """
    path, temporary = Path(path), _beside(path)
    try:
        with open(temporary, mode.replace("w", "x"), **({} if "b" in mode else TEXT)) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        if isinstance(error, OSError) and error.filename in (None, temporary):
            # a full disk is reported on a file descriptor: name the file
            error.filename = str(path)
        raise
    sync_folder(path.parent)


def require_writable(path) -> None:
    """Raise the OSError that `atomic_write` would end with where a file cannot be made beside
    `path`; nothing stays there.
    """
    try:
        open(temporary := _beside(path), "x").close()
    except OSError as error:
        error.filename = str(path)
        raise
    os.unlink(temporary)


def _beside(path) -> str:
    path = Path(path)
    return f"{path.parent}/.{path.name}.{os.urandom(4).hex()}.tmp"


def nearest_folder(path) -> Path:
    """`path` or the closest folder above it that is there already."""
    return next(
        folder for folder in (Path(path), *Path(path).absolute().parents) if folder.is_dir()
    )


def require_space(directory, num_bytes: int) -> None:
    """Raise BadInput where fewer than `num_bytes` are free."""
    free = shutil.disk_usage(nearest_folder(directory)).free
    if num_bytes > free:
        raise BadInput(
            f"{directory}: {num_bytes / 1e6:,.1f} MB are needed and {free / 1e6:,.1f} MB are free"
            " there"
        )


def try_lock(file) -> bool:
    """Lock an open file, or its descriptor, for this process: False where another one has it.

    The kernel lets go of it when every process that has it open is gone, however they ended. Raises
    OSError where the file system has no locks.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def sync_folder(path) -> None:
    """Make renames in a folder durable; file systems that cannot sync a folder are left alone."""
    with contextlib.suppress(OSError):
        fd = os.open(path, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


def write_json(path, value) -> None:
    """Replace `path` by `value` as indented JSON; NaN and infinity are written as null."""
    with atomic_write(path, "w") as file:
        file.write(json.dumps(without_nan(value), indent=1) + "\n")


def read_json(path) -> dict:
    """The object in a JSON file. Raises BadInput where it is not one."""
    try:
        with open(path, encoding="utf-8") as file:
            value = json.load(file)
    except ValueError as error:
        raise BadInput(f"{path} is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise BadInput(f"{path} holds a {type(value).__name__}, not a JSON object")
    return value


def cache_file(path) -> Path:
    """Where this user keeps what was learnt about `path`, which may lie where nothing of ours can
    stand.
    """
    folder = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "pcam")
    return folder / f"{hashlib.sha256(os.fsencode(os.path.realpath(path))).hexdigest()[:16]}.json"


def read_cache(path) -> dict:
    """The object in a JSON file, such as `write_cache` leaves one; empty where there is nothing
    that can be used.
    """
    try:
        return read_json(path)
    except (OSError, BadInput):
        return {}


def write_cache(path, value: dict) -> bool:
    """Keep `value` if that can be done: it is found out anew where it cannot."""
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path, "w") as file:
            file.write(json.dumps(value))
    except (OSError, TypeError, ValueError, RecursionError):
        return False
    return True


def read_csv(path) -> list[dict[str, str]]:
    """The rows of a CSV file as dicts of text; a torn last line (no newline, or fields missing) is
    dropped.
    """
    data = Path(path).read_bytes()
    reader = csv.reader(
        io.StringIO(data[: data.rfind(b"\n") + 1].decode("utf-8", errors="replace"))
    )
    header = next(reader, [])
    return [dict(zip(header, row, strict=True)) for row in reader if len(row) == len(header)]


def row_number(text: str) -> int | None:
    """The row that a cell names, None for anything else: isdigit takes a superscript for a digit,
    int does not.
    """
    return int(text) if text.isdecimal() and len(text) < 19 else None


def read_edited_csv(path, needed) -> list[dict[str, str]]:
    """The rows of a CSV that a person may have edited. Raises BadInput where it lacks a column of
    `needed` or is malformed.
    """
    try:
        with open(path, newline="", encoding="utf-8-sig", errors="replace") as file:
            # or an open quote would swallow the rows behind it
            reader = csv.DictReader(file, strict=True)
            header, rows = reader.fieldnames or (), list(reader)
    except csv.Error as error:
        raise BadInput(f"{path} is not a readable CSV ({one_line(error)})") from None
    if lacking := sorted(set(needed) - set(header)):
        raise BadInput(
            f"{path} lacks the column {lacking[0]}; it has: {', '.join(header) or 'nothing'}"
        )
    for number, row in enumerate(rows, 2):
        if None in row or None in row.values():
            raise BadInput(f"{path}: row {number} has not as many fields as the header")
    return rows


def write_csv(path, header, rows) -> None:
    """Replace `path` by a header and rows."""
    with atomic_write(path, "w") as file:
        # with a line end of both characters each of them is quoted in a cell, which may be a file's
        # name
        lines = SimpleNamespace(write=lambda line: file.write(line[:-2] + "\n"))
        csv.writer(lines, lineterminator="\r\n").writerows([header, *rows])


class CsvLog:
    """An append-only CSV written out at most every `flush_s` seconds; of an existing one the rows
    that `keep` wants go on.
    """

    def __init__(self, path, header, flush_s=2.0, keep=None):
        self.path, self.header, self.flush_s = Path(path), list(header), flush_s
        self.rows, self.flushed_at = [], time.monotonic()
        # of rows under another header: a column that came later is empty in them
        rows = (
            [row for row in read_csv(self.path) if self.header[0] in row]
            if self.path.exists()
            else []
        )
        kept = [row for row in rows if keep is None or keep(row)]
        write_csv(
            self.path, self.header, [[row.get(name, "") for name in self.header] for row in kept]
        )
        self.file = open(self.path, "ab")  # noqa: SIM115 (open as long as the log is)

    def add(self, **row) -> None:
        """Append one row; every column of the header must be given."""
        self.rows.append([row[name] for name in self.header])
        if time.monotonic() - self.flushed_at >= self.flush_s:
            self.flush()

    def flush(self, sync: bool = False) -> None:
        """Hand all rows to the system and, with `sync`, to the disk."""
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows(self.rows)
        try:
            # in one piece, so that readers see whole lines
            self.file.write(text.getvalue().encode())
            self.file.flush()
            if sync:
                os.fsync(self.file.fileno())
        except OSError as error:
            error.filename = str(self.path)
            raise
        self.rows, self.flushed_at = [], time.monotonic()

    def close(self) -> None:
        try:
            self.flush()
        finally:
            with contextlib.suppress(OSError):  # what could not be flushed was already reported
                self.file.close()


def file_digest(path, kind="sha256") -> str:
    """Hex digest of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(
            file, lambda: hashlib.new(kind, usedforsecurity=False)
        ).hexdigest()
