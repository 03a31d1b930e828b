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
import torch
from conftest import QUICK, REPOSITORY, run_script

import audit
from lib.audit import replay, twin
from lib.files import read_csv, read_json, write_csv, write_json

LAYER = "features.2.second"  # a convolution
# a draw from a global generator in what training imports would be a source without a control
UNCONTROLLED = re.compile(
    r"torch\.(rand|randn|randint|randperm|bernoulli|multinomial|normal)(_like)?\("
    r"|np\.random\.(?!seed|default_rng\(\w|get_state)\w+|(?<![.\w])random\.(?!seed|getstate)\w+\(|default_rng\(\)"
)
NOT_TRAINING = ("lib/prepare", "lib/report", "lib/benchmark/cases.py")


@pytest.fixture(scope="module")
def train_here(pcam_dir, tmp_path_factory):
    """Train in this process, which is faster than a new one: the run folder."""
    config = [f"data_dir={pcam_dir}", *QUICK, "dropout=0.2", "checkpoint_every_steps=3"]

    def train_here(*arguments, fault=None) -> Path:
        runs = str(tmp_path_factory.mktemp("runs"))
        argv = ["--runs", runs, *config, "limit_valid=40", *arguments]
        return Path(replay.train(argv, fault)[0]["run"])

    return train_here


@pytest.fixture(scope="module")
def twins(train_here, tmp_path_factory):
    """Two traced runs of one configuration, one by a process of its own, that no test may
    change.
    """
    run = train_here("--trace")
    options = ("--config", run / "config.yaml", "--runs", tmp_path_factory.mktemp("runs"))
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


def change_rows(run, keep=bool, **cells) -> None:
    """Keep some rows of a trace, and change cells of those from step 4 on."""
    rows = [row for row in read_csv(run / "trace.csv") if keep(int(row["step"]))]
    rows = [row | cells if int(row["step"]) >= 4 else row for row in rows]
    write_csv(run / "trace.csv", list(rows[0]), [list(row.values()) for row in rows])


def test_untouched_twins_are_identical_and_no_self_test_takes_their_place(twins, compare, tmp_path):
    code, result = compare(*twins)
    assert (code, result["verdict"], result["num_steps"]) == (0, "identical", 10)
    assert result["weights"] == "equal"
    assert (twins[0] / "trace.csv").read_text() == (twins[1] / "trace.csv").read_text()
    findings = (tmp_path / "out/findings.json").read_text()
    assert all(
        row["severity"] == "note" or row["check"] == "inputs" for row in json.loads(findings)
    )
    page = (tmp_path / "out/twin.html").read_text()
    assert "A and B: identical to the bit over 10 traced steps" in page
    code, result = compare(twins[0], "--inject", "sample@1")
    assert code == 2 and "holds a real comparison" in result["error"]
    assert (tmp_path / "out/findings.json").read_text() == findings


@pytest.mark.slow
def test_a_fault_is_found_by_the_command(twins, tmp_path):
    """The whole way: a twin with a fault is trained, compared and replayed in processes as a user
    starts them.
    """
    options = ("--inject", f"output:{LAYER}@5", "--out", tmp_path / "out", "--seeds", *twins)
    result = run_script("audit.py", "twin", twins[0], *options, check=0).json
    assert (result["step"], result["quantity"], result["named"]) == (5, "buffers", True)
    replayed = result["replay"]
    expected = {"phase": "forward", "module": LAYER, "what": "output", "max_ulp": 1}
    assert replayed | expected == replayed
    assert replayed["num_unequal"] == replayed["num_elements"]
    assert replayed["replayed_from"].endswith("trace/00000003.pt")
    page = (tmp_path / "out/twin.html").read_text()
    assert (
        "A and B: part at step 5" in page and "seed_deviation" in page and page.count("<img") == 2
    )
    assert "nan" not in re.sub("<img[^>]*>", "", page)


@pytest.mark.parametrize(
    ("fault", "quantity", "phase"),
    [
        ("gradient:features.3.0@2", "gradients", "backward"),
        ("sample@7", "rows", None),
        (f"draw:{LAYER}@6", "rng", "forward"),
        ("draw:features.2.norm@1", "rng", "forward"),
    ],
)
def test_a_planted_fault_is_named(twins, compare, fault, quantity, phase):
    layer = fault.partition(":")[2].partition("@")[0]
    step = int(fault.partition("@")[2])
    code, result = compare(twins[0], "--inject", fault)
    assert code == 0 and result["named"]
    assert (result["step"], result["quantity"]) == (step, quantity)
    assert (result["replay"].get("module", ""), result["replay"].get("phase")) == (layer, phase)
    if quantity == "gradients":
        assert result["layer"] == f"{layer}.weight" and result["replay"]["max_ulp"] == 1


@pytest.mark.slow
def test_a_fault_between_traced_steps_is_found_by_the_replay(train_here):
    """With every fourth step traced, the replay of the steps between says which one it was."""
    run = train_here("--trace-every", "4")
    assert [row["step"] for row in read_csv(run / "trace.csv")] == ["4", "8"]
    fault = replay.Fault("output", LAYER, 6)
    other = train_here("--trace-every", "4", fault=fault)
    report, _ = twin.compare(twin.read_side(run), twin.read_side(other), fault, "cpu")
    assert (report["step"], report["equal_step"]) == (8, 4)
    assert (report["replay"]["step"], report["replay"]["module"]) == (6, LAYER)


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


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (lambda run: change_rows(run, lambda step: step < 9), "trace.csv is cut"),
        (lambda run: change_rows(run, lambda step: step % 2 == 0), "are of other lengths"),
        (lambda run: (run / "summary.json").unlink(), "did not finish"),
        (lambda run: write_csv(run / "trace.csv", ["step"], [[1]]), "it lacks the column rows"),
    ],
)
def test_a_damaged_trace_is_refused(copies, compare, damage, sentence):
    damage(copies[1])
    code, result = compare(*copies)
    assert code == 2 and sentence in result["error"]


def test_wrong_use_is_refused(twins, train_here, compare):
    run = twins[0]
    other = train_here("--trace", "lr=1e-3")
    for sentence, *arguments in (
        ("are no twins: lr is 0.02 in one, 0.001 in the other", run, other),
        ("it must be output:LAYER, gradient:LAYER, draw:LAYER or", run, "--inject", "flood@1"),
        ("layers of this model are features.0.0, ", run, "--inject", "output:features.9@1"),
        ("@STEP of 1 to 10", run, "--inject", "sample@11"),
        ("--inject needs a run that is made here", *twins, "--inject", "sample@1"),
        ("twin takes two run folders", *twins, "seed=2"),
    ):
        code, result = compare(*arguments)
        assert code == 2 and sentence in result["error"]


def test_distance_in_ulp():
    values = torch.tensor([-1.0, -0.0, 0.0, 3.5, 1e30])
    for kind in (values, values.bfloat16()):
        assert replay.ulp_distance(kind, replay.next_float(kind)).tolist() == [1] * 5
    smallest = torch.tensor([1.4e-45])
    assert replay.ulp_distance(-smallest, smallest) == 2


def test_every_source_has_its_control(tmp_path, capsys):
    assert audit.main(["twin", "--sources"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["num_sources"] >= 25 and result["num_missing"] == 0
    shutil.copytree(REPOSITORY / "lib", tmp_path / "lib")
    path = tmp_path / "lib" / "training.py"
    control = "torch.manual_seed(position_seed(*position, shard))"
    path.write_text(path.read_text().replace(control, "pass"))
    findings = twin.find_sources(tmp_path)
    assert [row["check"] for row in findings if row["severity"] == "error"] == ["dropout"]


def test_nothing_that_training_imports_draws_without_control():
    uncontrolled = []
    for path in [REPOSITORY / "train.py", *(REPOSITORY / "lib").rglob("*.py")]:
        if not path.relative_to(REPOSITORY).as_posix().startswith(NOT_TRAINING):
            lines = path.read_text().splitlines()
            uncontrolled += [(path.name, line) for line in lines if UNCONTROLLED.search(line)]
    assert not uncontrolled
    assert UNCONTROLLED.search("x = torch.rand(3)") and UNCONTROLLED.search("random.shuffle(x)")
