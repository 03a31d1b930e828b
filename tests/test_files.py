"""Files that survive: replaced whole or not at all, appended by whole rows, read back without a
torn last line.
"""

import os
import stat

import pytest

from lib.command import BadInput
from lib.files import (
    atomic_write,
    read_csv,
    read_edited_csv,
    read_json,
    write_csv,
    write_json,
)


def test_a_file_is_replaced_whole_or_stays_as_it_was(tmp_path):
    path = tmp_path / "a file.bin"
    path.write_bytes(b"old")
    for error in (KeyboardInterrupt(), OSError(28, "No space left on device")):
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
    umask = os.umask(0)
    os.umask(umask)
    assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~umask, "others can read it"


def test_json_comes_back_equal_and_is_strict(tmp_path):
    path = tmp_path / "x.json"
    write_json(path, {"a": [1, 2.5, "ü"], "b": None, "auc": float("nan")})
    assert read_json(path) == {"a": [1, 2.5, "ü"], "b": None, "auc": None}
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(BadInput, match=r"x\.json"):
        read_json(path)


def test_a_csv_comes_back_equal_and_only_an_edited_one_that_is_whole(tmp_path):
    path = tmp_path / "t.csv"
    cells = ("a,b", 'quoted "x"', "line\nbreak", "", "ü—漢", " spaces ", "1e-3")
    rows = [{"first": cell, "second": "plain"} for cell in cells]
    write_csv(path, ["first", "second"], [row.values() for row in rows])
    assert read_csv(path) == read_edited_csv(path, ["second"]) == rows
    path.write_bytes("\ufefffirst;second\r\n1,5;2\r\n".encode())
    assert read_edited_csv(path, ["first"]) == [{"first": "1,5", "second": "2"}], "as Excel saves"
    for text in ('a,b\n1,"2\n3,4\n', "a,c\n1,2\n", "a,b\n1\n", "a,b\n1,2,3\n", ""):
        path.write_text(text)
        with pytest.raises(BadInput, match=r"t\.csv"):
            read_edited_csv(path, ("a", "b"))


def test_whatever_is_cut_off_the_end_readers_see_only_whole_rows(tmp_path):
    path = tmp_path / "s.csv"
    write_csv(path, ["step", "loss"], [[step, 0.5 + step] for step in range(12)])
    whole = path.read_bytes()
    rows = read_csv(path)
    for num_bytes in range(len(whole) + 1):
        path.write_bytes(whole[:num_bytes])
        assert read_csv(path) == rows[: max(0, whole[:num_bytes].count(b"\n") - 1)]
