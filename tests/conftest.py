"""What tests share: a small synthetic PCam made once per test run, a small trained run, and scripts
as real processes.
"""

import contextlib
import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

REPOSITORY = Path(__file__).resolve().parent.parent
REAL_SAMPLE = REPOSITORY.parent / "shared" / "pcam-sample"
sys.path.insert(0, str(REPOSITORY))

# `make test` hands its own variables on, and a test that calls make as a user does has none of them
for line in re.findall(r"(?m)^variables [:+]= (.*)$", (REPOSITORY / "Makefile").read_text()):
    for name in [*line.split(), "IGNORED", "MAKEFLAGS", "MFLAGS", "MAKELEVEL"]:
        os.environ.pop(name, None)

# a configuration that trains in a second or two on one thread
QUICK = [
    "epochs=2",
    "batch_size=32",
    "threads=1",
    "precision=fp32",
    "p4m_width=2",
    "views=1",
    "name=quick",
]

# the files that take longest begin first, so that no worker is left alone with one at the end
LONGEST = ("test_slurm.py", "test_search.py", "test_train.py", "test_audit_data.py")


def draw_patches(num: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Patches uint8 (num, 96, 96, 3) in random order of class, positive ones with a dark, bluish
    centre: easy, not trivial.
    """
    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.arange(num) % 2).astype(np.uint8)
    images = rng.normal([180, 140, 176], 30, (num, 96, 96, 3)) + rng.normal(0, 15, (num, 1, 1, 3))
    images[:, 32:64, 32:64] -= labels[:, None, None, None] * np.array([40, 30, 5])
    return np.clip(images, 0, 255).astype(np.uint8), labels


def write_pcam(directory, num_train=160, num_valid=64, seed=0) -> Path:
    """A PCam folder with train and valid splits of such patches."""
    from lib.splitwriter import SplitWriter

    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    for split, num in (("train", num_train), ("valid", num_valid)):
        with SplitWriter(directory, split, num) as writer:
            writer.add(*draw_patches(num, seed + (split == "valid")))
    return directory


def run_script(script: str, *arguments, check=None, cwd=REPOSITORY, **options):
    """Run a script as a user would; the result gets `.json`, the last line of its stdout parsed."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(REPOSITORY / script), *map(str, arguments)]
    result = subprocess.run(
        command, capture_output=True, text=True, cwd=cwd, env=environment, timeout=300, **options
    )
    if check is not None:
        assert result.returncode == check, f"exit {result.returncode}: {result.stderr[-2000:]}"
    assert "Traceback" not in result.stderr, result.stderr
    lines = result.stdout.strip().splitlines()
    result.json = json.loads(lines[-1]) if lines else None
    return result


def call_script(main, *arguments) -> tuple[int, dict, str]:
    """A script's main in this process: (exit code, last line of stdout parsed, stderr)."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main([str(argument) for argument in arguments])
    return code, json.loads(out.getvalue().splitlines()[-1]), err.getvalue()


def make_old(path) -> None:
    """Rewrite a checkpoint as it was before schema 3, when no field said how the last layer
    computes.
    """
    from lib.checkpoint import FIELDS, KIND, load_checkpoint

    checkpoint = load_checkpoint(path)
    fields = {name: checkpoint[name] for name in FIELDS if name != "float32_logits"}
    torch.save({"kind": KIND, "schema": 2, **fields}, path)


def pytest_collection_modifyitems(items) -> None:
    items.sort(key=lambda item: item.path.name not in LONGEST)


@pytest.fixture(scope="session")
def pcam_dir(tmp_path_factory) -> Path:
    """A small PCam folder that no test may change."""
    return write_pcam(tmp_path_factory.mktemp("pcam"))


@pytest.fixture(scope="session")
def quick_run(pcam_dir, tmp_path_factory) -> Path:
    """A finished run on `pcam_dir` that no test may change."""
    import train

    runs = tmp_path_factory.mktemp("runs")
    return Path(call_script(train.main, "--runs", runs, f"data_dir={pcam_dir}", *QUICK)[1]["run"])
