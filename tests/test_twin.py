"""Twins that nothing disturbed are identical; whatever parts them is named, and what are no twins
is refused.
"""

import functools
import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from conftest import QUICK, REPOSITORY, run_script

import audit
from lib import batches
from lib.audit import replay, twin
from lib.checkpoint import load_checkpoint, save_checkpoint
from lib.files import read_csv, write_csv

LAYER = "features.2.second"  # a convolution
# a draw from a global generator in what training imports would be a source without a control
UNCONTROLLED = re.compile(
    r"torch\.(rand|randn|randint|randperm|bernoulli|multinomial|normal)(_like)?\("
    r"|np\.random\.(?!seed|default_rng\(\w|get_state)\w+|(?<![.\w])random\.(?!seed|getstate)\w+\(|default_rng\(\)"
)
NOT_TRAINING = ("lib/prepare", "lib/report", "lib/benchmark/cases.py")


@pytest.fixture(scope="module")
def argv(pcam_dir):
    return [
        f"data_dir={pcam_dir}",
        *QUICK,
        "dropout=0.2",
        "checkpoint_every_steps=3",
        "limit_valid=40",
    ]


@pytest.fixture(scope="module")
def train_here(argv, tmp_path_factory):
    """Train in this process, which is faster than a new one: the run folder."""

    def train_here(*arguments):
        kept = [
            item
            for item in argv
            if not any(new.startswith(item.partition("=")[0] + "=") for new in arguments)
        ]
        return Path(
            replay.train(["--runs", str(tmp_path_factory.mktemp("runs")), *kept, *arguments])[0][
                "run"
            ]
        )

    return train_here


@pytest.fixture(scope="module")
def twins(argv, train_here, tmp_path_factory):
    """Two traced runs of one configuration, one by a process of its own, that no test may
    change.
    """
    runs = tmp_path_factory.mktemp("runs")
    return [
        Path(run_script("train.py", "--runs", runs, "--trace", *argv, check=0).json["run"]),
        train_here("--trace"),
    ]


@pytest.fixture
def copies(twins, tmp_path):
    """Copies of both, to be damaged."""
    return [shutil.copytree(run, tmp_path / name) for run, name in zip(twins, "ab", strict=True)]


@pytest.fixture
def compare(tmp_path, capsys, monkeypatch):
    """Run the audit in this process, twins that it makes too: its exit code and result."""
    monkeypatch.setattr(
        twin, "make_run", lambda argv, fault=None: Path(replay.train(argv, fault)[0]["run"])
    )

    def compare(*arguments):
        code = audit.main(
            ["twin", *map(str, arguments), "--out", str(tmp_path / "out"), "--device", "cpu"]
        )
        return code, json.loads(capsys.readouterr().out.strip().splitlines()[-1])

    return compare


def change_rows(run, keep=bool, **cells) -> None:
    """Keep some rows of a trace, and change cells of those from step 4 on."""
    rows = [row for row in read_csv(run / "trace.csv") if keep(int(row["step"]))]
    rows = [row | cells if int(row["step"]) >= 4 else row for row in rows]
    write_csv(run / "trace.csv", list(rows[0]), [list(row.values()) for row in rows])


@pytest.mark.slow
def test_untouched_twins_are_identical(twins, compare, tmp_path):
    code, result = compare(*twins)
    assert (
        code == 0
        and result["verdict"] == "identical"
        and result["num_steps"] == 10
        and result["weights"] == "equal"
    )
    assert (twins[0] / "trace.csv").read_text() == (twins[1] / "trace.csv").read_text()
    findings = json.loads((tmp_path / "out/findings.json").read_text())
    assert [found["severity"] for found in findings if found["check"] != "inputs"] == [
        "note",
        "note",
        "note",
    ]
    assert [row["folder"] for row in findings[0]["rows"]] == [result["a"], result["b"]]
    assert "identical to the bit over 10 traced steps" in (tmp_path / "out/twin.html").read_text()


@pytest.mark.slow
def test_a_fault_is_found_by_the_command(twins, tmp_path):
    """The whole way: a twin with a fault is trained, compared and replayed in processes as a user
    starts them.
    """
    arguments = (
        "twin",
        twins[0],
        "--inject",
        f"output:{LAYER}@5",
        "--out",
        tmp_path / "out",
        "--seeds",
        twins[0],
        twins[1],
    )
    result = run_script("audit.py", *arguments, check=0).json
    assert (result["step"], result["quantity"], result["named"]) == (5, "buffers", True)
    found = result["replay"]
    assert (found["phase"], found["module"], found["what"], found["max_ulp"]) == (
        "forward",
        LAYER,
        "output",
        1,
    )
    assert found["num_unequal"] == found["num_elements"] and found["replayed_from"].endswith(
        "trace/00000003.pt"
    )
    page = (tmp_path / "out/twin.html").read_text()
    assert (
        page.count("<img") == 2
        and "seed_deviation" in page
        and "nan" not in re.sub("<img[^>]*>", "", page)
    )


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
    layer, step = fault.partition(":")[2].partition("@")[0], int(fault.partition("@")[2])
    code, result = compare(twins[0], "--inject", fault)
    assert code == 0 and result["named"]
    assert (result["step"], result["quantity"]) == (step, quantity)
    assert (result["replay"].get("module", ""), result["replay"].get("phase")) == (layer, phase)
    if quantity == "gradients":
        assert result["layer"] == f"{layer}.weight" and result["replay"]["max_ulp"] == 1


def test_a_self_test_leaves_a_real_comparison_alone(twins, compare, tmp_path):
    compare(*twins)
    before = (tmp_path / "out/findings.json").read_bytes()
    code, result = compare(twins[0], "--inject", "sample@1")
    assert code == 2 and "holds a real comparison" in result["error"]
    assert (tmp_path / "out/findings.json").read_bytes() == before


@pytest.mark.slow
def test_a_fault_between_traced_steps_is_found_by_the_replay(train_here):
    """With every fourth step traced, the replay of the steps between says which one it was."""
    run = train_here("--trace-every", "4", "epochs=4")
    assert [row["step"] for row in read_csv(run / "trace.csv")] == ["4", "8", "12", "16", "20"]
    fault = replay.Fault("output", LAYER, 6)
    other = replay.train(
        ["--runs", str(run.parent), "--trace-every", "4", "--config", str(run / "config.yaml")],
        fault,
    )[0]["run"]
    report, _ = twin.compare(twin.read_side(run), twin.read_side(other), fault, "cpu")
    assert (report["step"], report["equal_step"]) == (8, 4)
    assert (report["replay"]["step"], report["replay"]["module"]) == (6, LAYER)


def test_runs_from_elsewhere_are_compared(copies, compare):
    """B differs, but nothing here makes it so: what differs in the inputs is named, and that no
    replay shows it.
    """
    change_rows(copies[1], loss="0" * 64)
    meta = json.loads((copies[1] / "meta.json").read_text())
    meta["machine"]["cpu_capability"], meta["commit"] = "OTHER", "f00"
    (copies[1] / "meta.json").write_text(json.dumps(meta))
    code, result = compare(*copies)
    assert code == 1 and (
        result["step"],
        result["quantity"],
        result["weights"],
        result["replay"],
    ) == (4, "loss", "equal", {})
    assert "differ in cpu_capability" in result["cause"] and "differ in commit" in result["cause"]


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (
            lambda run: change_rows(run, lambda step: step not in (4, 5)),
            "is cut: of 10 steps, every 1th, it lacks step 4",
        ),
        (
            lambda run: change_rows(run, lambda step: step < 9),
            "is cut: of 10 steps, every 1th, it lacks step 9",
        ),
        (
            lambda run: change_rows(run, lambda step: step % 2 == 0),
            "are of other lengths: 10 steps up to 10, and 5 steps",
        ),
        (lambda run: (run / "summary.json").unlink(), "did not finish"),
        (lambda run: (run / "trace.csv").unlink(), "has no trace.csv"),
        (
            lambda run: (run / "trace.csv").write_text("step,rows\n1,1\n"),
            "is of another version: it lacks the column images",
        ),
    ],
)
def test_a_damaged_trace_is_refused(copies, compare, damage, sentence):
    damage(copies[1])
    code, result = compare(*copies)
    assert code == 2 and sentence in result["error"]


def test_a_trace_of_another_config_is_refused(twins, train_here, compare):
    code, result = compare(twins[0], train_here("--trace", "lr=1e-3"))
    assert code == 2 and "are no twins: lr is 0.02 in one, 0.001 in the other" in result["error"]


def rewrite(path, **fields):
    torch.save(torch.load(path) | fields, path)


def of_another(path, **changes):
    checkpoint = load_checkpoint(path)
    save_checkpoint(
        path, checkpoint | {key: checkpoint[key] | value for key, value in changes.items()}
    )


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (
            lambda path: path.write_bytes(path.read_bytes()[:-999]),
            "is not a readable checkpoint, it may be cut off",
        ),
        (lambda path: rewrite(path, schema=99), "has the schema 99, this program reads 1 to"),
        (
            lambda path: of_another(path, config={"model": "mlp"}),
            "is no checkpoint of this run: model is mlp there, p4m in",
        ),
        (
            lambda path: of_another(path, data={"camelyonpatch_level_2_split_train_x.h5": "0"}),
            "is no checkpoint of this run: camelyonpatch_level_2_split_train_x.h5 is 0 there",
        ),
    ],
)
def test_a_bad_checkpoint_is_refused(copies, compare, damage, sentence):
    change_rows(copies[1], loss="0" * 64)
    damage(copies[0] / "trace" / "00000003.pt")
    code, result = compare(*copies)
    assert code == 2 and sentence in result["error"]


def test_wrong_use_is_refused(twins, compare):
    for arguments, sentence in (
        (
            [twins[0], "--inject", "flood@1"],
            "it must be output:LAYER, gradient:LAYER, draw:LAYER or sample",
        ),
        ([twins[0], "--inject", "output:features.9@1"], "layers of this model are features.0.0, "),
        ([twins[0], "--inject", "sample@11"], "@STEP of 1 to 10"),
        ([*twins, "--inject", "sample@1"], "--inject needs a run that is made here"),
        ([*twins, "seed=2"], "twin takes two run folders"),
    ):
        code, result = compare(*arguments)
        assert code == 2 and sentence in result["error"]
    assert (
        run_script("train.py", "--trace-every", "-1", check=2)
        .json["error"]
        .startswith("argument --trace-every")
    )


@pytest.mark.parametrize("prefetch", [True, False])
def test_prefetch_changes_nothing(twins, train_here, monkeypatch, prefetch):
    monkeypatch.setattr(
        batches, "load_batches", functools.partial(batches.load_batches, prefetch=prefetch)
    )
    assert (train_here("--trace") / "trace.csv").read_text() == (twins[0] / "trace.csv").read_text()


def test_distance_in_ulp():
    for dtype in (torch.float32, torch.bfloat16):
        values = torch.tensor([-1.0, -0.0, 0.0, 3.5, 1e30], dtype=dtype)
        assert replay.ulp_distance(values, replay.next_float(values)).tolist() == [1, 1, 1, 1, 1]
    smallest = torch.tensor([1.0]).nextafter(torch.tensor([0.0]))
    assert replay.ulp_distance(torch.tensor([1.0]), smallest) == 1
    assert replay.ulp_distance(torch.tensor([-1.4e-45]), torch.tensor([1.4e-45])) == 2


def test_every_source_has_its_control(tmp_path, capsys):
    assert audit.main(["twin", "--sources"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["num_sources"] >= 25 and result["num_missing"] == 0
    shutil.copytree(REPOSITORY / "lib", tmp_path / "lib")
    path = tmp_path / "lib" / "training.py"
    path.write_text(
        path.read_text().replace("torch.manual_seed(position_seed(*position, shard))", "pass")
    )
    assert [
        found["check"] for found in twin.find_sources(tmp_path) if found["severity"] == "error"
    ] == ["dropout"]


def test_nothing_that_training_imports_draws_without_control():
    found = []
    for path in [REPOSITORY / "train.py", *sorted((REPOSITORY / "lib").rglob("*.py"))]:
        if not path.relative_to(REPOSITORY).as_posix().startswith(NOT_TRAINING):
            found += [
                f"{path.name}: {line}"
                for line in path.read_text().splitlines()
                if UNCONTROLLED.search(line)
            ]
    assert not found
    assert UNCONTROLLED.search("x = torch.rand(3)") and UNCONTROLLED.search("random.shuffle(x)")
