"""The proof on a GPU, in small, as a process: what was measured stays whatever becomes of the
rest.
"""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import REPOSITORY
from proofs import gpu, run

from lib.command import BadInput
from lib.rundir import process_start

pytestmark = pytest.mark.slow

CPU_ALONE = os.environ | {"CUDA_VISIBLE_DEVICES": ""}


def prove(out, *arguments) -> tuple[dict, str, int]:
    """The proof's JSON, its table and its exit code."""
    command = [sys.executable, "tests/proofs/gpu.py", "--out", str(out), *map(str, arguments)]
    result = subprocess.run(
        command, cwd=REPOSITORY, env=CPU_ALONE, capture_output=True, text=True, timeout=120
    )
    assert json.loads(result.stdout.splitlines()[-1])["table"] == str(out / "gpu.md"), result.stderr
    return (
        json.loads((out / "gpu.json").read_text()),
        (out / "gpu.md").read_text(),
        result.returncode,
    )


def test_a_section_that_fails_or_needs_a_gpu_is_a_row_the_others_run_and_a_second_run_keeps_them(
    tmp_path,
):
    first, table, code = prove(
        tmp_path / "one", "--data", tmp_path / "none", "--sections", "throughput,profile,full_epoch"
    )
    assert code == 1 and {name: found["state"] for name, found in first.items()} == {
        "throughput": "failed",
        "profile": "skipped",
        "full_epoch": "done",
    }
    (failed,), (skipped,), rows = (
        first[name]["rows"] for name in ("throughput", "profile", "full_epoch")
    )
    assert failed["held"] is False and "none" in failed["measured"]
    assert skipped["held"] is None and "no CUDA device" in skipped["measured"]
    assert (
        "s" in rows[-1]["measured"]
        and rows[-1]["torch"] == torch.__version__
        and rows[-1]["seconds"] > 0
    )
    assert all(row["measured"] in table for row in (failed, skipped, *rows))

    # what is done stays; what failed or was skipped is what is left to do
    before = tmp_path / "one" / "gpu.json"
    second, table, code = prove(tmp_path / "two", "--before", before, "--budget", 0)
    assert second["full_epoch"] == first["full_epoch"] and rows[-1]["measured"] in table
    assert second["throughput"] == first["throughput"] and code == 1
    assert "budget" in second["batch_sizes"]["rows"][0]["measured"]


def test_at_its_deadline_a_section_ends_with_all_that_it_began_and_its_rows_stay(tmp_path):
    mark = tmp_path / "pid"

    def endless(_ctx):
        """It never ends"""
        process = subprocess.Popen(["sleep", "60"])
        mark.write_text(str(process.pid))
        yield gpu.figure("one", "row")
        time.sleep(60)

    rows, started = [], time.monotonic()
    ctx = gpu.Context(torch.device("cpu"), True, tmp_path, tmp_path)
    assert gpu.carry_out(endless, ctx, 2.0, rows.append) == "unfinished"
    assert time.monotonic() - started < 20 and [row["measured"] for row in rows][0] == "row"
    assert rows[1]["held"] is False and rows[1]["asked"] == "It never ends"
    assert not process_start(int(mark.read_text()))


@pytest.mark.parametrize("ending", ["killed", "raised"])
def test_a_section_that_breaks_its_process_or_raises_is_a_row(tmp_path, ending):
    def broken(_ctx):
        """It breaks"""
        yield gpu.figure("one", "row")
        if ending == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        raise RuntimeError("no luck\nand much more")

    rows = []
    ctx = gpu.Context(torch.device("cpu"), True, tmp_path, tmp_path)
    assert gpu.carry_out(broken, ctx, 30.0, rows.append) == "failed"
    assert rows[0]["measured"] == "row" and rows[1]["held"] is False
    assert ("no luck" if ending == "raised" else "-9") in rows[1]["measured"]


def test_a_section_can_start_cuda_since_the_process_it_comes_from_has_not_asked_for_it():
    code = """if True:
        import torch
        from proofs import gpu
        child = gpu.FORK.Process(target=lambda: exit(torch.cuda._is_in_bad_fork()))
        child.start()
        child.join()
        exit(child.exitcode)"""
    assert subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY / "tests").returncode == 0


def test_what_a_rank_refused_is_said_although_torchrun_ends_with_the_code_of_a_finding():
    with pytest.raises(BadInput, match="no folder there"):
        run("-c", 'import sys; print(\'{"error": "no folder there", "exit": 2}\'); sys.exit(1)')


def test_time_in_which_kernels_overlap_counts_once():
    spans = [(0, 10), (5, 10), (30, 5), (31, 1)]
    assert gpu.busy_us([{"ts": start, "dur": duration} for start, duration in spans]) == 20
