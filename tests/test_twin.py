"""Twins that nothing disturbed are identical; whatever parts them is named, and what are no twins
is refused.
"""

import contextlib
import io
import json
import re
import shutil
from pathlib import Path

import pytest
from conftest import QUICK, REPOSITORY, run_script

import audit
from lib.audit import replay, twin
from lib.files import read_csv, read_json, write_csv, write_json

pytestmark = pytest.mark.slow

LAYER = "features.2.second"  # a convolution
# a draw from a global generator in what training imports would be a source without a control
UNCONTROLLED = re.compile(
    r"torch\.(rand|randn|randint|randperm|bernoulli|multinomial|normal)(_like)?\("
    r"|np\.random\.(?!seed|default_rng\(\w|get_state)\w+|(?<![.\w])random\.(?!seed|getstate)\w+\(|default_rng\(\)"
)
NOT_TRAINING = ("lib/prepare", "lib/report", "lib/benchmark/cases.py")


@pytest.fixture(scope="module")
def twins(pcam_dir, tmp_path_factory):
    """Two traced runs of 6 steps of one configuration, one by a process of its own, that no test
    may change.
    """
    runs = str(tmp_path_factory.mktemp("runs"))
    config = [*QUICK, f"data_dir={pcam_dir}", "dropout=0.2", "checkpoint_every_steps=3"]
    config += ["limit_train=96", "limit_valid=40"]
    run = Path(replay.train(["--runs", runs, "--trace", *config])[0]["run"])
    options = ("--config", run / "config.yaml", "--runs", runs)
    return [run, Path(run_script("train.py", *options, "--trace", check=0).json["run"])]


@pytest.fixture
def copies(twins, tmp_path):
    """Copies of both, to be damaged."""
    return [shutil.copytree(run, tmp_path / name) for run, name in zip(twins, "ab", strict=True)]


@pytest.fixture
def compare(tmp_path, monkeypatch):
    """Run the audit in this process, twins that it makes too: its exit code and result."""
    monkeypatch.setattr(
        twin, "make_run", lambda argv, fault=None: Path(replay.train(argv, fault)[0]["run"])
    )

    def compare(*arguments):
        options = ["--out", str(tmp_path / "out"), "--device", "cpu"]
        with contextlib.redirect_stdout(io.StringIO()) as stdout:
            code = audit.main(["twin", *map(str, arguments), *options])
        return code, json.loads(stdout.getvalue().splitlines()[-1])

    return compare


def change_rows(run, last_step=99, **cells) -> None:
    """End a trace at a step, and change cells of its rows from step 4 on."""
    rows = [row for row in read_csv(run / "trace.csv") if int(row["step"]) <= last_step]
    for row in rows[3:]:
        row.update(cells)
    write_csv(run / "trace.csv", rows[0], [row.values() for row in rows])


def test_untouched_twins_are_identical_and_no_self_test_takes_their_place(twins, compare, tmp_path):
    code, result = compare(*twins, "--seeds", *twins)
    assert (code, result["verdict"], result["num_steps"]) == (0, "identical", 6)
    assert result["weights"] == "equal"
    assert (twins[0] / "trace.csv").read_text() == (twins[1] / "trace.csv").read_text()
    findings = (tmp_path / "out/findings.json").read_text()
    rows = {row["check"]: row for row in json.loads(findings)}
    assert rows["time line"]["severity"] == "note"
    assert all(row["seed_deviation"] == 0 for row in rows["scores"]["rows"])
    page = (tmp_path / "out/twin.html").read_text()
    assert "A and B: identical to the bit over 6 traced steps" in page and "<img" in page
    code, result = compare(twins[0], "--inject", "sample@1")
    assert code == 2 and "holds a real comparison" in result["error"]
    assert (tmp_path / "out/findings.json").read_text() == findings


@pytest.mark.parametrize(
    ("fault", "quantity", "phase"),
    [
        ("gradient:features.3.0@2", "gradients", "backward"),
        ("sample@5", "rows", None),
        (f"output:{LAYER}@5", "buffers", "forward"),
        pytest.param("draw:features.2.norm@1", "rng", "forward", marks=pytest.mark.slow),
    ],
)
def test_a_planted_fault_is_named(twins, compare, tmp_path, fault, quantity, phase):
    layer = fault.partition(":")[2].partition("@")[0]
    step = int(fault.partition("@")[2])
    code, result = compare(twins[0], "--inject", fault)
    assert code == 0 and result["named"]
    assert (result["step"], result["quantity"]) == (step, quantity)
    assert (result["replay"].get("module", ""), result["replay"].get("phase")) == (layer, phase)
    page = (tmp_path / "out/twin.html").read_text()
    assert f"A and B: part at step {step}" in page and "self-test" in page


def test_runs_from_elsewhere_are_compared(copies, compare):
    """B differs, but nothing here makes it so: what differs in the inputs is named, and that no
    replay shows it.
    """
    change_rows(copies[1], loss="0" * 64)  # and no part of it, as where B has one more
    meta = read_json(copies[1] / "meta.json")
    meta["machine"]["cpu_capability"], meta["commit"] = "OTHER", "f00"
    write_json(copies[1] / "meta.json", meta)
    code, result = compare(*copies)
    assert (code, result["step"], result["quantity"], result["replay"]) == (1, 4, "loss", {})
    assert result["weights"] == "equal"
    assert "differ in cpu_capability" in result["cause"] and "differ in commit" in result["cause"]


def test_wrong_use_and_what_are_no_twins_is_refused(twins, copies, compare, tmp_path):
    run = twins[0]
    other = shutil.copytree(run, tmp_path / "other")
    text = (other / "config.yaml").read_text()
    (other / "config.yaml").write_text(text.replace("lr: 0.02", "lr: 0.001"))
    write_json(other / "meta.json", read_json(other / "meta.json") | {"identity": "another"})
    cut, unfinished = copies
    change_rows(cut, last_step=5)
    (unfinished / "summary.json").unlink()
    for sentence, *arguments in (
        ("are no twins: lr is 0.02 in one, 0.001 in the other", run, other),
        ("hold other steps", run, cut),
        ("did not finish", run, unfinished),
        ("it must be output:LAYER, gradient:LAYER, draw:LAYER or", run, "--inject", "flood@1"),
        ("layers of this model are features.0.0, ", run, "--inject", "output:features.9@1"),
        ("@STEP of 1 to 6", run, "--inject", "sample@7"),
        ("--inject needs a run that is made here", *twins, "--inject", "sample@1"),
        ("twin takes two run folders", *twins, "seed=2"),
    ):
        code, result = compare(*arguments)
        assert code == 2 and sentence in result["error"]


def test_every_source_has_its_control(tmp_path, capsys):
    assert audit.main(["twin", "--sources"]) == 0
    assert json.loads(capsys.readouterr().out)["num_missing"] == 0
    shutil.copytree(REPOSITORY / "lib", tmp_path / "lib")
    path = tmp_path / "lib" / "training.py"
    control = "torch.manual_seed(position_seed(*position, shard))"
    path.write_text(path.read_text().replace(control, "pass"))
    findings = twin.find_sources(tmp_path)
    assert [row["check"] for row in findings if row["severity"] == "error"] == ["dropout"]


def test_nothing_that_training_imports_draws_without_control():
    for path in [REPOSITORY / "train.py", *(REPOSITORY / "lib").rglob("*.py")]:
        if not path.relative_to(REPOSITORY).as_posix().startswith(NOT_TRAINING):
            assert not UNCONTROLLED.search(path.read_text()), path
    assert UNCONTROLLED.search("x = torch.rand(3)")
