"""The program on a system with fewer calls than Linux, and in environments that others set up."""

import os
import subprocess
import sys

import pytest
from conftest import QUICK, REPOSITORY, run_script, write_pcam

from lib.files import read_csv


@pytest.mark.slow
def test_training_prediction_and_audit_need_nothing_that_only_linux_has(tmp_path):
    data = write_pcam(tmp_path / "data")

    def run(script, *arguments, codes=(0,)):
        command = ["tests/without_linux.py", REPOSITORY / script, *arguments]
        result = run_script(*command, cwd=tmp_path)
        assert result.returncode in codes, result.stderr
        return result.json

    run("prepare.py", "synthetic", "--to", "drawn", "--train", 8, "--valid", 8, "--test", 0)
    settings = {*QUICK, f"data_dir={data}", "data_residence=disk"} - {"threads=1"}
    trained = run("train.py", "--runs", "runs", *settings)
    run("inference.py", "--ckpt", trained["run"], data, "--split", "valid", "--out", "p.csv")
    assert len(read_csv(tmp_path / "p.csv")) == 64
    checks = ("--checks", "files,values,duplicates")
    run("audit.py", "data", data, *checks, "--out", "audit", codes=(0, 1))


@pytest.mark.slow
def test_a_page_is_drawn_whatever_backend_a_notebook_hands_down(pcam_dir, tmp_path, monkeypatch):
    """A cell `!python ...` inherits the backend of its kernel, which is not installed here."""
    monkeypatch.setenv("MPLBACKEND", "module://no_such_package.backend_inline")
    run_script("audit.py", "data", pcam_dir, "--checks", "values", "--out", tmp_path, check=0)
    assert "data:image/png" in (tmp_path / "audit.html").read_text()


@pytest.mark.slow
def test_a_tilde_that_no_shell_saw_is_the_home_folder(tmp_path, monkeypatch):
    write_pcam(tmp_path / "home" / "pcam", 64, 32)
    (tmp_path / "c.yaml").write_text("data_dir: ~/pcam\n")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    command = ["--config", "~/../c.yaml", *QUICK, "--runs", "~/runs"]
    run_script("train.py", *command, cwd=tmp_path, check=0)
    assert os.listdir(tmp_path / "home" / "runs")
    assert sorted(os.listdir(tmp_path)) == ["c.yaml", "home"]


NO_HOME = """
import os
from lib.command import BadInput, expand_home
from lib.files import cache_folder
os.setuid(54321)
assert not (cache_folder() / "x").exists()
try:
    cache_folder().mkdir(parents=True)
except OSError:
    print("no cache")
try:
    expand_home("~/x")
except BadInput:
    print("no ~")
"""


def test_a_user_without_a_home_gets_no_folder_named_tilde(tmp_path):
    if os.geteuid():
        pytest.skip("needs root, to become a user without an entry in passwd")
    tmp_path.chmod(0o777)
    options = {"env": {"PYTHONPATH": str(REPOSITORY)}, "cwd": tmp_path, "text": True}
    result = subprocess.run([sys.executable, "-c", NO_HOME], capture_output=True, **options)
    assert result.stdout == "no cache\nno ~\n", result.stderr
    assert os.listdir(tmp_path) == []
