"""prepare.py as a user runs it: exit codes, one sentence for bad input, one JSON object last."""

import json
import os

import h5py
import numpy as np
import pytest
from conftest import write_pcam
from PIL import Image

import prepare
from lib.pcam import open_split, split_path
from lib.splitwriter import write_meta


@pytest.fixture
def run(capsys):
    """Run prepare.py in this process; gives the JSON object and stderr."""

    def run(*arguments, check):
        assert prepare.main([str(argument) for argument in arguments]) == check
        output = capsys.readouterr()
        return json.loads(output.out.splitlines()[-1]), output.err

    return run


def test_what_import_prints_is_what_it_wrote(tmp_path, run):
    path = tmp_path / "in" / "train" / "1" / "0.png"
    path.parent.mkdir(parents=True)
    Image.new("RGB", (96, 96)).save(path)
    (tmp_path / "in" / "notes.txt").touch()
    result, stderr = run("import", tmp_path / "in", "--to", tmp_path / "deep" / "out", check=1)
    facts = result["splits"]["train"]
    assert (facts["patches"], facts["negative"], facts["positive"]) == (1, 0, 1)
    assert result["skipped"] == {"not an image: .txt": 1} and ".txt" in stderr
    assert "no split valid" in stderr
    assert "one value 0" in result["findings"][0], "an all black split is a finding"


def test_verify_exits_0_for_fine_1_for_a_finding_and_2_for_what_is_not_whole(tmp_path, run):
    folder = write_pcam(tmp_path, 20, 10)
    assert run("verify", folder, check=0)[0]["splits"]["valid"]["patches"] == 10
    assert len(run("verify", folder, "--md5", check=1)[0]["findings"]) == 4
    rows = [(0, 0, "True", "True", "camelyon16_test_001")] * 10
    write_meta(split_path(folder, "valid", "meta"), rows)
    assert "exchanged" in run("verify", folder, check=1)[1]
    os.truncate(split_path(folder, "train", "x"), 200_000)
    assert "train_x.h5" in run("verify", folder, check=2)[0]["error"]


def test_repack_exits_1_and_writes_nothing_until_the_loss_is_allowed(tmp_path, run):
    folder = write_pcam(tmp_path / "a", 20, 10)
    images = open_split(folder, "train").images.mapped.astype(np.float32)
    images[3, 5, 5] = np.nan
    with h5py.File(split_path(folder, "train", "x"), "w") as file:
        file["x"] = images
    assert "repack makes it" in run("verify", folder, check=0)[1]
    command = ["repack", folder, "--to", tmp_path / "b"]
    result, _ = run(*command, check=1)
    assert result["patches_with_losses"] == {"train not_finite": 1}
    assert not result["written"] and not (tmp_path / "b").exists()
    assert run(*command, "--allow-loss", check=0)[0]["written"]


WRONG_USE = {
    "invalid choice: 'imprt'": ["imprt"],
    "required: --to": ["import", "x"],
    "SRC: an empty text names no": ["import", "", "--to", "out"],
    "no file or folder nowhere": ["import", "nowhere", "--to", "out"],
    "--valid-share": ["import", "x", "--to", "out", "--valid-share", "1.5"],
    "--splits names 'val'": ["download", "--to", "out", "--splits", "train,val"],
    "is not KIND=RATE": ["synthetic", "--to", "out", "--plant", "nan"],
    "plant 'fog' is unknown; allowed": ["synthetic", "--to", "out", "--plant", "fog=1"],
    "no folder nowhere": ["verify", "nowhere"],
}


def test_wrong_use_is_one_sentence_and_2(tmp_path, run, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for text, arguments in WRONG_USE.items():
        result, stderr = run(*arguments, check=2)
        assert text in result["error"] and stderr.count("\n") == 1
    assert not any(tmp_path.iterdir())
