"""Weights and predictions are, to the bit, those that were written down: a rewrite changes nothing that is computed.

Bits belong to a processor and a build of torch: where no record is of these, the test is skipped. `python tests/test_record.py`
writes the record of this machine, which is written anew only where a change of bits is meant.
"""

import json
import re
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import REPOSITORY, run_script, write_pcam

from lib.machine import describe_machine

pytestmark = pytest.mark.slow

RECORD = REPOSITORY / "tests" / "record.json"
SHORT = "epochs=2 crop_epochs=1 warmup_epochs=1 batch_size=32 threads=2 eval_batch_size=32"
COMMANDS = (
    "model=p4m",
    "model=p4m p4m_width=4 shards=2 dropout=0.3 grad_clip=1 precision=fp32",
    "model=cnn cnn_width=8 balance=sampler schedule=plateau optimizer=adamw lr=1e-3",
    "model=resnet18 optimizer=sgd lr=0.01 limit_train=64 label_smoothing=0.1 balance=loss",
    "model=mlp symmetries=false shift=0 num_folds=2 fold=1 ema_decay=0 schedule=step",
)


def machine() -> dict:
    facts = describe_machine(torch.device("cpu"))
    kind = {key: facts[key] for key in ("cpu", "cpu_capability")}
    path = Path("/proc/cpuinfo")
    if path.is_file():
        fields = r"(?m)^(cpu family|model|stepping)\s*: (.+)$"
        kind |= dict(re.findall(fields, path.read_text()))
    return {"torch": torch.__version__, "numpy": np.__version__, **kind}


def train_shortly(folder: Path, command: str) -> str:
    """The weights_sha256 of a short training."""
    data = write_pcam(folder / "data")
    slides = "\n".join(f"{row},0,0,1,1,slide{row % 8}" for row in range(160))
    (data / "camelyonpatch_level_2_split_train_meta.csv").write_text(
        f",coord_y,coord_x,tumor_patch,center_tumor_patch,wsi\n{slides}\n"
    )
    places = ("--device", "cpu", "--runs", folder / "runs", f"data_dir={data}")
    arguments = [*places, *SHORT.split(), *command.split()]
    return run_script("train.py", *arguments, check=0).json["weights_sha256"]


def predict_by_champion(folder: Path) -> list[str]:
    """The probabilities of drawn patches by assets/champion, as inference.py writes them."""
    data, out = write_pcam(folder, num_train=32, num_valid=24, seed=5), folder / "p.csv"
    model = ("--ckpt", "assets/champion", "--device", "cpu")
    run_script("inference.py", *model, data, "--split", "valid", "--out", out, check=0)
    return [line.split(",")[2] for line in out.read_text().splitlines()[1:]]


def read_records() -> list[dict]:
    return json.loads(RECORD.read_text())


@pytest.fixture(scope="module")
def record() -> dict:
    for record in read_records():
        if record["machine"] == machine():
            return record
    pytest.skip(f"no record is of {machine()}")


@pytest.mark.parametrize("command", COMMANDS)
def test_a_training_ends_with_the_weights_that_were_written_down(command, record, tmp_path):
    if command not in record["weights_sha256"]:
        pytest.skip("its bits were changed since, and not written down on this machine")
    assert train_shortly(tmp_path, command) == record["weights_sha256"][command]


def test_the_champion_predicts_as_was_written_down(record, tmp_path):
    assert predict_by_champion(tmp_path) == record["champion"]


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        weights = {}
        for number, command in enumerate(COMMANDS):
            weights[command] = train_shortly(Path(scratch, str(number)), command)
        champion = predict_by_champion(Path(scratch, "champion"))
    facts = {"machine": machine(), "weights_sha256": weights, "champion": champion}
    others = [record for record in read_records() if record["machine"] != machine()]
    RECORD.write_text(json.dumps([*others, facts], indent=1) + "\n")
