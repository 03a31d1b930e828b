"""The proof on a GPU, in small, as a process: what was measured stays whatever becomes of the
rest.
"""

import json
import os
import subprocess
import sys

import pytest
import torch
from conftest import REPOSITORY
from proofs import run

from lib.command import BadInput

pytestmark = pytest.mark.slow


def prove(out, *arguments) -> tuple[dict, str, int]:
    """The proof's JSON, its table and its exit code."""
    command = [sys.executable, "tests/proofs/gpu.py", "--out", str(out), *map(str, arguments)]
    env = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    result = subprocess.run(command, cwd=REPOSITORY, env=env, capture_output=True, text=True)
    assert json.loads(result.stdout.splitlines()[-1])["table"] == str(out / "gpu.md"), result.stderr
    table = (out / "gpu.md").read_text()
    return json.loads((out / "gpu.json").read_text()), table, result.returncode


def test_a_section_that_fails_or_needs_a_gpu_is_a_row_and_a_second_run_keeps_what_is_done(
    tmp_path,
):
    sections = ["--sections", "throughput,profile,full_epoch"]
    first, table, code = prove(tmp_path / "one", "--data", tmp_path / "none", *sections)
    states = {name: result["state"] for name, result in first.items()}
    assert states == {"throughput": "failed", "profile": "skipped", "full_epoch": "done"}
    names = ("throughput", "profile", "full_epoch")
    (failed,), (skipped,), rows = (first[name]["rows"] for name in names)
    assert code == 1 and failed["held"] is False and "none" in failed["measured"]
    assert skipped["held"] is None and "no CUDA device" in skipped["measured"]
    assert rows[-1]["torch"] == torch.__version__ and rows[-1]["seconds"] > 0
    assert all(line["measured"] in table for line in (failed, skipped, *rows))

    # what is done stays; what failed or was skipped is what is left to do
    second, table, code = prove(tmp_path / "one", "--budget", 0)
    assert second["full_epoch"] == first["full_epoch"] and rows[-1]["measured"] in table
    assert second["throughput"] == first["throughput"] and code == 1
    assert "budget" in second["twins"]["rows"][0]["measured"]


def test_a_section_can_start_cuda_since_the_process_it_comes_from_has_not_asked_for_it():
    code = """if True:
        import torch
        from proofs import gpu
        child = gpu.FORK.Process(target=lambda: exit(torch.cuda._is_in_bad_fork()))
        child.start()
        child.join()
        exit(child.exitcode)"""
    subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY / "tests", check=True)


def test_what_a_rank_refused_is_said_although_torchrun_ends_with_the_code_of_a_finding():
    with pytest.raises(BadInput, match="no folder there"):
        run("-c", 'import sys; print(\'{"error": "no folder there", "exit": 2}\'); sys.exit(1)')
