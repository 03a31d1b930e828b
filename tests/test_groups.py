"""groups.csv: what is written is what is read, from the folder or from the cache, or it is
refused.
"""

import numpy as np
import pytest
from conftest import write_pcam

from lib import groups
from lib.command import BadInput
from lib.groups import group_of_rows, groups_for_folds, groups_for_halves, write_groups
from lib.pcam import open_split

NAMES = {"train": np.array(["b", "a", "b", "c"] * 5), "valid": np.arange(12) // 3}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return write_pcam(tmp_path / "my data", num_train=20, num_valid=12)


def read_only(monkeypatch, folder) -> None:
    """No file can be made in the folder: root is not kept out by its mode."""
    write_csv = groups.write_csv

    def refuse(path, *arguments):
        if path.parent == folder:
            raise PermissionError(13, "Permission denied", str(path))
        write_csv(path, *arguments)

    monkeypatch.setattr(groups, "write_csv", refuse)


@pytest.mark.parametrize("is_cached", [False, True])
def test_what_is_written_is_read_again(folder, monkeypatch, is_cached):
    if is_cached:
        read_only(monkeypatch, folder)
    write_groups(folder, NAMES)
    assert (folder / "groups.csv").exists() != is_cached
    for name, expected in NAMES.items():
        split = open_split(folder, name)
        for find in (group_of_rows, groups_for_folds, groups_for_halves):
            assert find(split, folder).tolist() == expected.astype(str).tolist()
        assert len(groups.groups_digest(split, folder)) == 64


def test_the_cache_is_of_these_very_patches(folder, monkeypatch):
    read_only(monkeypatch, folder)
    write_groups(folder, NAMES)
    write_pcam(folder, num_train=20, num_valid=12, seed=5)
    assert group_of_rows(open_split(folder, "train"), folder) is None


def test_a_file_that_cannot_be_replaced_is_not_passed_over(folder, monkeypatch):
    write_groups(folder, NAMES)
    read_only(monkeypatch, folder)
    with pytest.raises(PermissionError):
        write_groups(folder, NAMES)


def test_without_a_file_folds_are_refused_and_halves_take_single_rows(folder, capsys):
    split = open_split(folder, "train")
    command = f"audit.py data '{folder}' --checks groups"
    with pytest.raises(BadInput, match=command):
        groups_for_folds(split, folder)
    assert groups_for_halves(split, folder).tolist() == list(range(20))
    assert command in capsys.readouterr().err
    assert groups.groups_digest(split, folder) is None


@pytest.mark.parametrize(
    "old, new",
    [
        ("train,7,c\n", ""),
        ("train,7,c\n", "train,6,c\n"),
        ("train,7,c\n", "train,7,c\ntrain,20,d\n"),
        ("train,7,c\n", 'train,7,"c\n'),
        ("train", "treain"),
        ("group", "name"),
    ],
)
def test_a_file_that_does_not_fit_is_refused_with_what_mends_it(folder, old, new):
    write_groups(folder, NAMES)
    path = folder / "groups.csv"
    path.write_text(path.read_text().replace(old, new))
    for use in (groups_for_folds, groups_for_halves, groups.groups_digest):
        with pytest.raises(BadInput, match="groups.csv .*--checks groups"):
            use(open_split(folder, "train"), folder)


def test_rows_may_stand_in_any_order(folder):
    write_groups(folder, NAMES)
    path = folder / "groups.csv"
    header, *lines = path.read_text().splitlines()
    path.write_text("\n".join([header, *lines[::-1]]))
    assert group_of_rows(open_split(folder, "train"), folder).tolist() == NAMES["train"].tolist()
