"""Files that survive a crash: JSON replaced as a whole, CSV appended row by row, and readers that
drop a torn last line.
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
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

from lib.command import BadInput, one_line, say, without_nan

# surrogateescape: the name of a file, which may be any bytes, is written as it is
TEXT = {"encoding": "utf-8", "errors": "surrogateescape", "newline": ""}
GZIP = b"\x1f\x8b"
# how a file begins that was taken for another one, and what to do about it
FOREIGN = {
    b"<!doctype html": "a web page, which a server sent in place of the file: fetch it again",
    b"<html": "a web page, which a server sent in place of the file: fetch it again",
    b"version https://git-lfs": "a pointer of Git LFS: git lfs pull fetches the file",
    GZIP: "packed by gzip: gunzip it",
    b"pk\x03\x04": "a zip archive: unpack it",
}
FLUSH_S = 2.0  # the first row after this time writes out all rows that wait in memory


def utc_now() -> str:
    """The current time, to the second, in the one format that all files use."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


@contextlib.contextmanager
def atomic_path(path):
    """Yield a temporary path beside `path`. When the block ends without an error the file there is
    synced and renamed to `path` (Pillai et al., OSDI 2014); else it is removed. An OSError that
    names no file, such as for a full disk, or the temporary one gets the name `path`.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.urandom(4).hex()}.tmp")
    try:
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename in (None, str(temporary)):
            error.filename = str(path)
        raise
    # makes the rename durable; file systems that cannot sync a folder are left alone
    folder = os.open(path.parent, os.O_RDONLY)
    with contextlib.suppress(OSError):
        os.fsync(folder)
    os.close(folder)


@contextlib.contextmanager
def atomic_write(path, mode="wb"):
    """Yield an open file that becomes `path`, as atomic_path does it."""
    options = {} if mode == "wb" else TEXT
    with atomic_path(path) as temporary, open(temporary, mode, **options) as file:
        yield file


def require_writable(path) -> None:
    """Raise an OSError that names `path` where no file can be made beside it."""
    try:
        tempfile.TemporaryFile(dir=Path(path).parent).close()
    except OSError as error:
        error.filename = str(path)
        raise


def explain_foreign(path, why: str, remedy: str = "fetch it again", allowed: bytes = b"") -> str:
    """Words for why the file at `path` cannot be read: the kind that its first bytes show. Where
    they show none, or the one that is `allowed`, the words are `why` and the remedy.
    """
    with open(path, "rb") as file:
        head = file.read(64).lstrip().lower()
    for start, words in FOREIGN.items():
        if head.startswith(start) and start != allowed:
            return f": it is {words}"
    return f" ({why}): {remedy}"


def require_space(directory, num_bytes: int) -> None:
    """Raise BadInput where fewer than `num_bytes` are free."""
    folder = Path(directory).absolute()
    while not folder.is_dir():
        folder = folder.parent
    needed_mb = num_bytes / 1e6
    free_mb = shutil.disk_usage(folder).free / 1e6
    if needed_mb > free_mb:
        raise BadInput(f"{directory}: {needed_mb:,.1f} MB are needed, {free_mb:,.1f} MB are free")


def lock_if_possible(file, path) -> bool:
    """Lock an open file, or its descriptor, for this process. False if another process holds it.
    Where the file system has no locks, a note about `path` is printed and the answer is True.

    The kernel releases the lock when no process has the file open any more, however they ended.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:  # such as NFS mounted without its lock service
        say(f"{path} cannot be locked ({one_line(error)}): let no other process write there")
    return True


def write_json(path, value) -> None:
    """Replace `path` by `value` as indented JSON; NaN and infinity are written as null."""
    with atomic_write(path, "w") as file:
        file.write(json.dumps(without_nan(value), indent=1) + "\n")


def read_json(path) -> dict:
    """The object in a JSON file. Raises BadInput where it is not valid JSON."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise BadInput(f"{path} is not valid JSON: {error}") from None


def read_cache(path) -> dict:
    """The object in a JSON file, empty where there is none."""
    try:
        return read_json(path)
    except (OSError, BadInput):
        return {}


def cache_folder() -> Path:
    """The user's cache, for what was computed from data whose folder may be read-only."""
    folder = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    if folder.startswith("~"):  # this user has no home: nothing is read or written below a file
        folder = os.devnull
    return Path(folder, "pcam")


def read_csv(path) -> list[dict[str, str]]:
    """The rows of a CSV file that a program appends to, as dicts of text; a torn last line (no
    newline, or fields missing) is dropped.
    """
    text = Path(path).read_bytes().decode("utf-8", errors="replace")
    whole_lines = text[: text.rfind("\n") + 1]
    return [row for row in csv.DictReader(io.StringIO(whole_lines)) if is_whole(row)]


def is_whole(row: dict) -> bool:
    """Whether a row of csv.DictReader has as many fields as the header."""
    return None not in row and None not in row.values()


def read_edited_csv(path, needed) -> list[dict[str, str]]:
    """The rows of a CSV file that a person may have edited. Raises BadInput where it lacks a column
    of `needed` or is malformed.
    """
    text = Path(path).read_text(encoding="utf-8-sig", errors="replace")
    header = text.partition("\n")[0]
    # Excel writes ; where the comma is the decimal point
    delimiter = ";" if ";" in header and "," not in header else ","
    # strict: otherwise a quote that is not closed takes the next rows into its cell
    reader = csv.DictReader(io.StringIO(text), strict=True, delimiter=delimiter)
    try:
        rows = list(reader)
    except csv.Error as error:
        raise BadInput(f"{path} is not a readable CSV ({one_line(error)})") from None
    columns = reader.fieldnames or []
    for column in needed:
        if column not in columns:
            raise BadInput(f"{path} lacks the column {column}; it has: {', '.join(columns)}")
    for number, row in enumerate(rows, 2):
        if not is_whole(row):
            raise BadInput(f"{path}: row {number} has not as many fields as the header")
    return rows


def row_number(text: str) -> int | None:
    """The row number in a cell, None for any other text. isdigit would accept superscripts, which
    int refuses.
    """
    return int(text) if text.isdecimal() and len(text) < 19 else None


def write_csv(path, header, rows) -> None:
    """Replace `path` by a header and rows."""
    with atomic_write(path, "w") as file:
        # a writer quotes a cell with a carriage return only where its lines end with one
        lines = SimpleNamespace(write=lambda line: file.write(line[:-2] + "\n"))
        csv.writer(lines, lineterminator="\r\n").writerows([header, *rows])


class CsvLog:
    """An append-only CSV, written out at most every FLUSH_S seconds.

    The first column is a counter. Rows of an existing file stay if their counter is at most `last`.
    """

    def __init__(self, path, header, last: int):
        self.path = Path(path)
        rows = []
        for row in read_csv(path) if self.path.exists() else []:
            if int(row[header[0]]) <= last:
                # an older program may have had other columns
                rows.append([row.get(name, "") for name in header])
        write_csv(path, header, rows)
        # the buffer is larger than what FLUSH_S seconds write: only whole lines reach the file
        self.file = open(path, "a", buffering=1 << 20, **TEXT)  # noqa: SIM115 (open with the log)
        self.writer = csv.DictWriter(self.file, header, lineterminator="\n")
        self.flushed_at = time.monotonic()

    def add(self, **row) -> None:
        """Append one row. Raises ValueError for a column that is not in the header."""
        self.writer.writerow(row)
        if time.monotonic() - self.flushed_at >= FLUSH_S:
            self.flush()

    def flush(self, sync: bool = False) -> None:
        """Hand all rows to the system and, with `sync`, to the disk."""
        self.file.flush()
        if sync:
            os.fsync(self.file.fileno())
        self.flushed_at = time.monotonic()

    def close(self) -> None:
        self.flush()
        self.file.close()


def file_digest(path, kind="sha256") -> str:
    """Hex digest of a file."""
    with open(path, "rb") as file:
        # a machine in FIPS mode allows md5 only as a plain checksum, which it is here
        digest = hashlib.file_digest(file, lambda: hashlib.new(kind, usedforsecurity=False))
    return digest.hexdigest()
