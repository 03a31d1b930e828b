"""Files that survive a crash: JSON replaced whole, CSV appended by rows, and readers that forgive a torn last line."""

import contextlib
import csv
import hashlib
import io
import json
import os
import tempfile
import time
from pathlib import Path

from lib.command import BadInput, one_line, without_nan

BLOCK_BYTES = 1 << 22
TEXT = {"encoding": "utf-8", "errors": "surrogateescape", "newline": ""}  # a file's name may be any bytes


@contextlib.contextmanager
def atomic_write(path, mode="wb"):
    """Yield a file that becomes `path` when the block ends well; otherwise `path` stays as it was.

    Written under a temporary name beside it, synced, renamed, and the folder synced, so that a power cut leaves the old
    file or the new one (Pillai et al., OSDI 2014).
    """
    path = Path(path)
    try:
        fd, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    except OSError as error:
        error.filename = str(path)
        raise
    try:
        with os.fdopen(fd, mode, **({} if "b" in mode else TEXT)) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_UMASK)
        os.replace(temporary, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        if isinstance(error, OSError) and error.filename in (None, temporary):
            error.filename = str(path)  # a full disk is reported on a file descriptor: name the file
        raise
    sync_folder(path.parent)


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
        json.dump(without_nan(value), file, indent=1)
        file.write("\n")


def read_json(path) -> dict:
    """The object in a JSON file. Raises BadInput where it is not one."""
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise BadInput(f"{path} is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise BadInput(f"{path} holds a {type(value).__name__}, not a JSON object")
    return value


def read_csv(path) -> list[dict[str, str]]:
    """The rows of a CSV file as dicts of text; a torn last line (no newline, or fields missing) is dropped."""
    data = Path(path).read_bytes()
    lines = data[: data.rfind(b"\n") + 1].decode("utf-8", errors="replace")
    reader = csv.reader(io.StringIO(lines))
    header = next(reader, [])
    return [dict(zip(header, row, strict=True)) for row in reader if len(row) == len(header)]


def read_edited_csv(path, needed) -> list[dict[str, str]]:
    """The rows of a CSV file that a person may have edited: nothing is dropped.

    Raises BadInput for a column of `needed` that is missing and for a row whose fields do not match the header.
    """
    with open(path, newline="", encoding="utf-8-sig", errors="replace") as file:
        reader = csv.DictReader(file)
        if lacking := sorted(set(needed) - set(reader.fieldnames or ())):
            raise BadInput(f"{path} lacks the column {lacking[0]}; it has: {', '.join(reader.fieldnames or ()) or 'nothing'}")
        try:
            rows = list(reader)
        except csv.Error as error:
            raise BadInput(f"{path} is not a readable CSV ({one_line(error)})") from None
    for number, row in enumerate(rows, 2):
        if None in row or None in row.values():
            raise BadInput(f"{path}: row {number} has not as many fields as the header")
    return rows


def write_csv(path, header, rows) -> None:
    """Replace `path` by a header and rows."""
    with atomic_write(path, "w") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(header)
        writer.writerows(rows)


class CsvLog:
    """An append-only CSV whose rows are kept in memory and written out at most every `flush_s` seconds.

    Opening an existing file continues it: rows for which `keep(row)` is false (steps that a resumed run repeats) and a
    torn last line are cut off first.
    """

    def __init__(self, path, header, flush_s=2.0, keep=None):
        self.path, self.header, self.flush_s = Path(path), list(header), flush_s
        self.rows, self.flushed_at = [], time.monotonic()
        if not self.path.exists():
            write_csv(self.path, self.header, [])
        else:
            rows = [row for row in read_csv(self.path) if list(row) == self.header]
            kept = [list(row.values()) for row in rows if keep is None or keep(row)]
            write_csv(self.path, self.header, kept)
        self.file = open(self.path, "ab")  # noqa: SIM115 (open as long as the log is)

    def add(self, **row) -> None:
        """Append one row; every column of the header must be given."""
        self.rows.append([row[name] for name in self.header])
        if time.monotonic() - self.flushed_at >= self.flush_s:
            self.flush()

    def flush(self) -> None:
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows(self.rows)
        try:
            # unbuffered after this: one write of whole lines, so that readers see whole lines
            self.file.write(text.getvalue().encode())
            self.file.flush()
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


def file_digest(path, kind="sha256", on_block=None) -> str:
    """Hex digest of a file, read in order in blocks; `on_block(num_bytes)` hears of progress."""
    digest = hashlib.new(kind, usedforsecurity=False)
    with open(path, "rb") as file:
        while block := file.read(BLOCK_BYTES):
            digest.update(block)
            if on_block:
                on_block(len(block))
    return digest.hexdigest()


def _current_umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


_UMASK = _current_umask()  # read once: setting it, even for an instant, is seen by every thread
