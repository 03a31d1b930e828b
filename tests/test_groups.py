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


def require_names(folder) -> None:
    """The groups in NAMES are those of the folder, whoever asks for them."""
    for name, expected in NAMES.items():
        split = open_split(folder, name)
        for find in (group_of_rows, groups_for_folds, groups_for_halves):
            assert find(split, folder).tolist() == expected.astype(str).tolist()
        assert len(groups.groups_digest(split, folder)) == 64


def test_what_is_written_is_read_again_in_any_order(folder):
    write_groups(folder, NAMES)
    path = folder / "groups.csv"
    header, *lines = path.read_text().splitlines()
    for rows in (lines, lines[::-1]):
        path.write_text("\n".join([header, *rows]))
        require_names(folder)


def test_a_folder_that_cannot_be_written_has_its_groups_in_a_cache_of_these_very_patches(
    folder, monkeypatch
):
    """Root is not kept out by the mode of a folder."""
    write_csv = groups.write_csv

    def refuse(path, *arguments):
        if path.parent == folder:
            raise PermissionError(13, "Permission denied", str(path))
        write_csv(path, *arguments)

    monkeypatch.setattr(groups, "write_csv", refuse)
    write_groups(folder, NAMES)
    assert not (folder / "groups.csv").exists()
    require_names(folder)
    write_pcam(folder, num_train=20, num_valid=12, seed=5)
    assert group_of_rows(open_split(folder, "train"), folder) is None
    (folder / "groups.csv").touch()
    with pytest.raises(PermissionError):  # one that cannot be replaced is not passed over
        write_groups(folder, NAMES)


def test_without_a_file_folds_are_refused_and_halves_take_single_rows(folder, capsys):
    split = open_split(folder, "train")
    command = f"audit.py data '{folder}' --checks groups"
    with pytest.raises(BadInput, match=command):
        groups_for_folds(split, folder)
    assert groups_for_halves(split, folder).tolist() == list(range(20))
    assert command in capsys.readouterr().err
    assert groups.groups_digest(split, folder) is None


@pytest.mark.parametrize("row", ["", "train,6,c\n", "trian,7,c\n"])
def test_a_file_that_does_not_fit_is_refused_with_what_mends_it(folder, row):
    write_groups(folder, NAMES)
    path = folder / "groups.csv"
    path.write_text(path.read_text().replace("train,7,c\n", row))
    for use in (groups_for_folds, groups_for_halves, groups.groups_digest):
        with pytest.raises(BadInput, match="groups.csv .*--checks groups"):
            use(open_split(folder, "train"), folder)
