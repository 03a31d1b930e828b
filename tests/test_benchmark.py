"""The benchmark: what it times is what the program does, what it says is what was measured, and
nothing else is a number.
"""

import itertools
import json
import multiprocessing
import os
import resource
import signal
import time

import pytest
import torch
from conftest import QUICK, run_script

import benchmark
from lib import training
from lib.augment import draw_augmentation, model_input
from lib.benchmark import cases, plan, rounds, timing, verdict
from lib.command import BadInput
from lib.config import load_config
from lib.files import read_json, write_json
from lib.pcam import split_path
from lib.seeding import set_determinism

CPU = torch.device("cpu")
PLAIN = ["symmetries=false", "shift=0", "stain_jitter=0", "brightness_jitter=0"]
JOB = {"partition": "thin_course", "node_type": "rome", "job_id": "7", "gpu": "none"}
OUTCOME = {
    "residence": "host",
    "note": "",
    "cache": "warm",
    "parts": {},
    "memory_bytes": 10**6,
    "others_share": 0.0,
    "power_w": 0.0,
}


@pytest.fixture(autouse=True)
def global_settings():
    """What a case sets for its process stays in its test."""
    threads = torch.get_num_threads()
    yield
    set_determinism(False, threads)
    torch.backends.cudnn.benchmark = False


def case_of(data, kind, *overrides, what="loader", size=8, **fields) -> plan.Case:
    pairs = [f"data_dir={data}", *QUICK[2:], "crop_epochs=0", f"batch_size={size}", *overrides]
    return plan.Case(what, fields.pop("name", kind), kind, load_config(overrides=pairs), **fields)


def start(case):
    """The generator of a case, with what it learns of itself."""
    about = {"parts": {}}
    return cases.TIMED[case.kind](case, CPU, about), about


def outcomes_of(*rates, size=8, **fields) -> list[dict]:
    """The outcomes of repeats at these rates."""
    measured = OUTCOME | fields
    return [measured | {"amount": size * 10, "samples": [size / rate] * 10} for rate in rates]


def row_of(data, outcomes) -> dict:
    (row,) = rounds.build_rows({case_of(data, "train", what="train"): outcomes}, JOB)
    return row


# how a case is timed


@pytest.fixture
def ticks(monkeypatch):
    """Makes batches of 4 images that take so long each, the last duration for ever, on a clock that
    nothing else moves.
    """
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])

    def make(*seconds):
        for second in itertools.chain(seconds, itertools.repeat(seconds[-1])):
            now[0] += second
            yield 4

    return make


def test_a_warm_up_does_not_count_and_a_cold_file_has_none(ticks):
    result = timing.measure(ticks(0.5, 0.4, 0.3, 0.25), 1.0)
    assert result["samples"] == pytest.approx([0.25] * 4) and result["amount"] == 16
    cold = timing.measure(itertools.islice(ticks(0.5, 0.01), 20), 9.0, is_endless=False)
    assert len(cold["samples"]) == 20
    with pytest.raises(BadInput, match="end 2 batches after the first"):
        timing.measure(itertools.islice(ticks(0.0), 2), 1.0, is_endless=False)


def test_a_busy_machine_is_refused(pcam_dir, tmp_path, monkeypatch):
    monkeypatch.setattr(timing, "cores_used_by_others", lambda *_: os.cpu_count())
    arguments = ["loader", "--data", str(pcam_dir), "--out", str(tmp_path / "out")]
    assert benchmark.main(arguments) == 2
    assert not (tmp_path / "out").exists()


# rows


def test_a_row_has_all_that_defends_its_number(pcam_dir):
    row = row_of(pcam_dir, outcomes_of(100, 110, 90, power_w=50.0))
    assert tuple(row) == rounds.COLUMNS and row["status"] == "ok"
    assert row["low"] < 90 < row["images_per_s"] < 110 < row["high"]
    assert row["p50_s"] < row["p90_s"] <= row["p99_s"] <= 8 / 90 + 1e-9
    assert row["energy_j_per_image"] == pytest.approx(50 / row["images_per_s"])
    assert (JOB | {"model": "p4m", "batch_size": 8, "num_repeats": 3}).items() <= row.items()
    disturbed = row_of(pcam_dir, outcomes_of(100, others_share=0.2))
    assert disturbed["status"] == "noisy" and disturbed["images_per_s"]
    assert disturbed["low"] is None and disturbed["energy_j_per_image"] is None
    failure = {"status": cases.OUT_OF_MEMORY, "note": "512 images"}
    failed = row_of(pcam_dir, [*outcomes_of(100, 101), failure])
    assert failure.items() <= failed.items() and not failed["images_per_s"]


def test_factors_and_shares_are_of_this_benchmark(pcam_dir):
    results = {case_of(pcam_dir, "matrix_product", what="limit"): outcomes_of(4e8)}
    for name, size, rate in (("default", 8, 100), ("default", 1, 50), ("fp32", 8, 40)):
        case = case_of(pcam_dir, "train", what="train", name=name, size=size)
        results[case] = outcomes_of(rate, size=size, flops_per_image=1e6)
    _, large, small, variant = rounds.build_rows(results, JOB)
    assert large["factor"] == pytest.approx(2) and small["factor"] == 1, "of the smallest batch"
    assert variant["factor"] == pytest.approx(0.4), "of the default at this batch size"
    assert large["share_of_peak"] == pytest.approx(100 * 1e6 / 4e8)


# in a process of its own; `case.name` says how that fares
def fare(case, _seconds):
    if case.name == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    return {"status": "error"} if case.name == "failed" else {"process": os.getpid()}


def test_a_process_that_dies_is_a_row_and_a_new_one_goes_on(pcam_dir, monkeypatch, tmp_path):
    fork = multiprocessing.get_context("fork")  # which knows of `fare`
    monkeypatch.setattr(multiprocessing, "set_start_method", lambda *_, **__: None)
    monkeypatch.setattr(multiprocessing, "get_context", lambda _: fork)
    monkeypatch.setattr(rounds, "time_case", fare)
    names = ("first", "second", "killed", "third", "failed", "fourth")
    planned = [case_of(pcam_dir, "raw", name=name) for name in names]
    outcomes = list(rounds.time_group(planned, 0.1, str(tmp_path)))
    assert [outcome.get("status") for outcome in outcomes[2::2]] == [cases.OUT_OF_MEMORY, "error"]
    first, second, _, third, _, fourth = (outcome.get("process") for outcome in outcomes)
    assert first == second and len({first, third, fourth}) == 3


# what is timed


@pytest.mark.parametrize("kind", cases.TIMED)
def test_every_case_says_what_a_batch_held_and_trains_with_the_very_step(
    kind, pcam_dir, monkeypatch
):
    monkeypatch.setitem(cases.MATRIX_SIDES, "cpu", (64,))
    function, steps = training.training_step, []
    step = lambda *arguments: steps.append(kind) or function(*arguments)  # noqa: E731
    monkeypatch.setattr(training, "training_step", step)
    stream, about = start(case_of(pcam_dir, kind))
    amounts = [next(stream) for _ in range(3)]
    stream.close()
    sizes = {"matrix_product": 2 * 64**3, "copy": cases.NUM_COPIED}
    assert amounts == [sizes.get(kind, 8)] * 3
    assert len(steps) == (3 if kind in ("train", "apart") else 0)
    assert set(about["parts"]) == (set(verdict.GROUPS) - {"read"} if kind == "apart" else set())


def test_flops_are_those_of_an_image(pcam_dir):
    first, last = 96 * 96 * 3 * 7, 7
    cfg = case_of(pcam_dir, "infer", "model=mlp", "mlp_hidden=7").cfg
    assert cases.count_flops(cfg, False) == 2 * (first + last)
    assert cases.count_flops(cfg, True) == 2 * (2 * first + 3 * last), "no gradient for the pixels"


def test_the_plain_way_gives_the_equal_product(pcam_dir):
    """Without augmentation, which both draw for themselves, the batches are the same to the last
    bits of float32.
    """
    case = case_of(pcam_dir, "torchvision", *PLAIN, order="sequential")
    theirs = next(cases.torchvision_batches(case))[0]
    batch = next(cases.open_batches(case, CPU, {}))
    ours = model_input(batch.images, draw_augmentation(batch.keys, 0, case.cfg))
    assert torch.allclose(ours, theirs, atol=1e-5) and ours.dtype == theirs.dtype


def test_random_order_is_random_and_a_cold_file_is_read_once(pcam_dir):
    def keys(**fields):
        stream = cases.open_batches(case_of(pcam_dir, "raw", **fields), CPU, {})
        return torch.cat([batch.keys for batch in itertools.islice(stream, 45)]).tolist()

    in_order = list(range(160))
    assert keys(order="sequential")[:160] == in_order
    random_order = keys()
    assert len(random_order) == 45 * 8, "over and over"
    assert sorted(random_order[:160]) == in_order != random_order[:160]
    assert len(keys(cache="cold")) == 160


def test_a_file_is_cold_where_its_pages_are_gone_and_else_the_row_says_so(pcam_dir, monkeypatch):
    cold = case_of(pcam_dir, "raw", "data_residence=disk", cache="cold", size=1)
    outcome = cases.time_case(cold, 0.01)
    assert (outcome["cache"], outcome["note"]) == ("cold", "")
    monkeypatch.setattr(os, "posix_fadvise", lambda *_: None)  # a file system that does not heed it
    cases.time_case(cold.vary(cache="warm"), 0.01)
    assert cases.resident_share(split_path(pcam_dir, "train", "x")) >= cases.WARM_SHARE
    not_cold = cases.time_case(cold, 0.01)
    assert not_cold["cache"] == "eviction requested" and "holds 100%" in not_cold["note"]
    (row,) = rounds.build_rows({cold: [outcome, not_cold]}, JOB)
    assert row["cache"] == "eviction requested" and row["images_per_s"]


# the whole script


def time_here(group, seconds, _cache_dir):
    """Cases in this process, so that a test can slow down what they time."""
    for case in group:
        yield cases.time_case(case, seconds)


def run_benchmark(out, data, what, *arguments, repeats=1):
    quick = ["--seconds", "0.05", "--repeats", str(repeats), "--allow-noise", *QUICK[2:]]
    return benchmark.main([what, "--data", str(data), "--out", str(out), *quick, *arguments])


def test_a_shortened_call_measures_what_it_names_and_its_page_begins_with_that(
    pcam_dir, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(rounds, "time_group", time_here)
    small = ["model=mlp", "mlp_hidden=7", "batch_size=4"]
    assert run_benchmark(tmp_path, pcam_dir, "infer", "--batch-sizes", "4", *small) == 0
    result = json.loads(capsys.readouterr().out)
    names = {(row["case"], row["model"]) for row in result["rows"]}
    assert names == {("default", "mlp"), ("default", "resnet18")}
    starts = ["# Benchmark", "Batch 1: ", "Best batch: ", "Bottleneck: not", "What to"]
    paragraphs = (tmp_path / "benchmark.md").read_text().split("\n\n")
    for paragraph, words in zip(paragraphs, starts, strict=False):
        assert paragraph.startswith(words), paragraph


@pytest.mark.slow
def test_the_loader_stands_beside_torchvisions_best(pcam_dir, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(rounds, "time_group", time_here)
    options = ["--cases", "torchvision_0_workers,ready,raw", "batch_size=8"]
    assert run_benchmark(tmp_path, pcam_dir, "loader", *options) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    warm = [row for row in result["rows"] if row["cache"] == "warm"]
    rates = {row["case"]: row["images_per_s"] for row in warm}
    torchvision = rates["torchvision_0_workers"]
    assert result["images_per_s"] == rates["ready"]
    assert result["torchvision_images_per_s"] == torchvision
    assert result["ratio"] == pytest.approx(rates["ready"] / torchvision)
    assert result["ratio_raw"] == pytest.approx(rates["raw"] / torchvision)


def test_what_was_measured_is_kept_when_interrupted(pcam_dir, tmp_path, monkeypatch):
    def time_one(*_):
        yield outcomes_of(4.0)[0]
        raise KeyboardInterrupt

    monkeypatch.setattr(rounds, "time_group", time_one)
    assert run_benchmark(tmp_path, pcam_dir, "loader", "--cases", "raw,ready", repeats=3) == 130
    (row,) = read_json(tmp_path / "benchmark.json")["rows"]
    assert row["num_repeats"] == 1 and row["images_per_s"] == pytest.approx(4.0)


STEP = {
    "augment": 2.0,
    "forward": 3.0,
    "backward": 6.0,
    "optimiser": 1.0,
    "gather": 0.5,
    "read": 1.0,
}


def test_the_bottleneck_is_the_largest_part_of_what_a_batch_waits_for():
    common = dict.fromkeys(rounds.COLUMNS) | {"what": "stage", "model": "p4m", "batch_size": 64}
    common |= {"gpu": "none", "residence": "disk", "cache": "cold"}
    for changes, first, later in (
        ({}, "model", "model"),
        ({"read": 20.0}, "disk", "model"),
        # in the background, reading and gathering together outlast the model
        ({"read": 12.5, "gather": 5.0}, "disk", "model"),
        # on a CPU without a background thread
        ({"gather": 11.0, "residence": "host"}, "loader", "loader"),
        ({"gather": 11.0, "gpu": "H100", "residence": "host"}, "model", "model"),
    ):
        rows = [common | changes | {"case": "apart", "images_per_s": 1.0}]
        for name, seconds in (STEP | changes).items():
            if name in STEP:
                rows.append(common | {"case": name, "images_per_s": 64 / seconds})
        judged = verdict.judge(rows)
        epochs = (judged["first_epoch"], judged["later_epochs"])
        assert [epoch["bottleneck"] for epoch in epochs] == [first, later], changes
        assert verdict.ADVICE[later] in judged["sentences"][-1]


@pytest.mark.slow
def test_a_benchmark_through_real_processes(pcam_dir, tmp_path, monkeypatch):
    """Two sizes, one of which needs more memory than the process may have, on the one core of a
    job.
    """
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", "1")
    limit = {"preexec_fn": lambda: resource.setrlimit(resource.RLIMIT_AS, (6 << 30, 6 << 30))}
    words = ["infer", "--data", pcam_dir, "--out", tmp_path, "--batch-sizes", "4,200000"]
    words += ["--seconds", "0.05", "--repeats", "2", "--allow-noise", "model=resnet18"]
    result = run_script("benchmark.py", *words, "precision=fp32", check=0, **limit)
    small, large = result.json["rows"]
    assert large["status"] == "out of memory" and not large["images_per_s"] and large["note"]
    assert large["num_repeats"] == 1, "it is not tried again"
    assert small["low"] <= small["images_per_s"] <= small["high"] and small["flops_per_image"] > 1e8
    assert 5e7 < small["memory_bytes"] < 2**34 and small["threads"] == 1


# two benchmarks


def test_compare_says_whether_a_difference_exceeds_the_noise(tmp_path, capsys):
    def write(name, *rates, num_repeats=3) -> str:
        common = dict.fromkeys(rounds.COLUMNS) | {"status": "ok", "num_repeats": num_repeats}
        rows = []
        for size, rate in enumerate(rates):
            interval = {"low": 0.98 * rate, "high": 1.02 * rate}
            rows.append(common | {"batch_size": size, "images_per_s": rate} | interval)
        write_json(tmp_path / name, {"rows": rows})
        return str(tmp_path / name)

    before, after = write("a", 10, 10, 10, 10), write("b", 10.3, 11, 9, 0)
    assert benchmark.main(["compare", before, after]) == 1
    rows = json.loads(capsys.readouterr().out)["rows"]
    answers = ["within the noise", "faster", "slower", "cannot be told"]
    assert [row["B is"] for row in rows] == answers
    once = write("c", 5, num_repeats=2)
    assert benchmark.main(["compare", before, once]) == 0, "two repeats tell nothing"


# what cannot be measured


def test_bad_input_is_one_sentence(pcam_dir, tmp_path, capsys):
    out = tmp_path / "out"
    assert run_benchmark(out, pcam_dir, "train", "--cases", "defualt") == 2
    assert "did you mean 'default'" in capsys.readouterr().err and not out.exists()
