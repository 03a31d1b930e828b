"""Files that survive: replaced whole or not at all, appended by whole rows, read back without a
torn last line.
"""

import contextlib
import hashlib
import os
import stat

import pytest

from lib.command import BadInput
from lib.files import (
    CsvLog,
    atomic_write,
    file_digest,
    read_csv,
    read_edited_csv,
    read_json,
    require_writable,
    write_csv,
    write_json,
)


def test_a_file_is_replaced_whole_or_stays_as_it_was(tmp_path):
    path = tmp_path / "a file.bin"
    path.write_bytes(b"old")
    for error in (RuntimeError(), KeyboardInterrupt(), OSError(28, "No space left on device")):
        with pytest.raises(type(error)) as refusal, atomic_write(path) as file:
            file.write(b"half")
            file.flush()
            raise error
        assert path.read_bytes() == b"old" and os.listdir(tmp_path) == [path.name]
    assert refusal.value.filename == str(path), "a full disk names the file"
    with atomic_write(path) as file:
        file.write(b"new")
        assert path.read_bytes() == b"old", "nothing shows before the end"
    assert path.read_bytes() == b"new" and os.listdir(tmp_path) == [path.name]


def test_a_replaced_file_can_be_read_by_others(tmp_path):
    write_json(tmp_path / "x.json", {})
    umask = os.umask(0)
    os.umask(umask)
    assert stat.S_IMODE((tmp_path / "x.json").stat().st_mode) == 0o666 & ~umask


def test_json_comes_back_equal_and_is_strict(tmp_path):
    path = tmp_path / "x.json"
    write_json(path, {"a": [1, 2.5, "ü"], "b": None, "auc": float("nan")})
    assert read_json(path) == {"a": [1, 2.5, "ü"], "b": None, "auc": None}
    for text in (b"", b"{", b"[1]", b"\xff\xfe", b'"x"'):
        path.write_bytes(text)
        with pytest.raises(BadInput, match=r"x\.json"):
            read_json(path)


ODD_CELLS = ("a,b", 'quoted "x"', "line\nbreak", "re\rturn", "", "ü—漢", " spaces ", "1e-3")


def test_a_csv_comes_back_equal_from_both_readers(tmp_path):
    rows = [{"first": cell, "second": "plain"} for cell in ODD_CELLS]
    write_csv(tmp_path / "t.csv", ["first", "second"], [row.values() for row in rows])
    assert read_csv(tmp_path / "t.csv") == rows
    assert read_edited_csv(tmp_path / "t.csv", ["second"]) == rows


def test_whatever_is_cut_off_the_end_readers_see_only_whole_rows(tmp_path):
    write_csv(tmp_path / "s.csv", ["step", "loss"], [[step, 0.5 + step] for step in range(12)])
    whole, rows = (tmp_path / "s.csv").read_bytes(), read_csv(tmp_path / "s.csv")
    for num_bytes in range(len(whole) + 1):
        (tmp_path / "s.csv").write_bytes(whole[:num_bytes])
        assert read_csv(tmp_path / "s.csv") == rows[: max(0, whole[:num_bytes].count(b"\n") - 1)]


@pytest.mark.parametrize("torn", ["", "3,", "3,0.25"])
def test_a_continued_log_has_one_header_and_the_whole_rows_up_to_the_last(tmp_path, torn):
    path = tmp_path / "s.csv"
    path.write_text(f"step,loss,old\n1,0.5,x\n2,0.4,x\n3,0.9,x\n{torn}")
    header = ["step", "loss", "lr"]  # one column came later, one is gone
    log = CsvLog(path, header, 2)
    log.add(loss=0.3, lr=0.1, step=3)
    log.close()
    assert path.read_text() == "step,loss,lr\n1,0.5,\n2,0.4,\n3,0.3,0.1\n"
    CsvLog(path, header, 3).close()
    assert path.read_text() == "step,loss,lr\n1,0.5,\n2,0.4,\n3,0.3,0.1\n"


def test_rows_wait_in_memory_until_they_are_flushed_or_their_time_comes(tmp_path, monkeypatch):
    log = CsvLog(tmp_path / "s.csv", ["a"], 0)
    log.add(a=1)
    assert read_csv(log.path) == []
    log.flush(sync=True)
    assert read_csv(log.path) == [{"a": "1"}]
    monkeypatch.setattr("lib.files.FLUSH_S", 0)
    log.add(a=2)
    assert read_csv(log.path) == [{"a": "1"}, {"a": "2"}]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a device that is always full")
def test_a_full_disk_names_the_log(tmp_path):
    log = CsvLog(tmp_path / "s.csv", ["a"], 0)
    full = os.open("/dev/full", os.O_WRONLY)
    os.dup2(full, log.file.fileno())
    log.add(a=1)
    with pytest.raises(OSError) as refusal:
        log.flush()
    assert refusal.value.filename == str(log.path)
    with contextlib.suppress(OSError):
        log.close()
    os.close(full)


@pytest.mark.parametrize("kind", ["sha256", "md5"])
def test_a_digest_is_the_files(tmp_path, kind):
    data = os.urandom((1 << 22) + 3)
    (tmp_path / "x").write_bytes(data)
    assert file_digest(tmp_path / "x", kind) == hashlib.new(kind, data).hexdigest()


@pytest.mark.parametrize("text", ['a,b\n1,"2\n3,4\n', "a,c\n1,2\n", "a,b\n1\n", "a,b\n1,2,3\n", ""])
def test_an_edited_csv_that_is_malformed_is_refused_by_name(text, tmp_path):
    (tmp_path / "e.csv").write_text(text)
    with pytest.raises(BadInput, match=r"e\.csv"):
        read_edited_csv(tmp_path / "e.csv", ("a", "b"))


def test_a_place_is_tried_without_a_trace(tmp_path):
    require_writable(tmp_path / "p.csv")
    assert not list(tmp_path.iterdir())
    for path in (tmp_path / "no folder" / "p.csv", tmp_path / ("x" * 250)):
        with pytest.raises(OSError) as refusal:
            require_writable(path)
        assert refusal.value.filename == str(path)
