"""The benchmark: what it times is what the program does, what it says is what was measured, and
nothing else is a number.
"""

import csv
import dataclasses
import gzip
import itertools
import json
import math
import os
import random
import resource
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import QUICK, REPOSITORY, run_script

import benchmark
from lib import batches, training
from lib.augment import draw_augmentation, model_input
from lib.benchmark import cases, plan, rounds, timing, verdict
from lib.centrenet import CentreNet
from lib.command import BadInput
from lib.config import load_config
from lib.files import read_csv, read_json, write_json
from lib.models import build_model
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
    "first_batch_s": 0.1,
    "steady": True,
    "warmup_batches": 5,
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


def config(data, *overrides):
    return load_config(overrides=[f"data_dir={data}", *QUICK[2:], "crop_epochs=0", *overrides])


def case_of(data, kind, *overrides, what="loader", size=8, **fields) -> plan.Case:
    cfg = config(data, *overrides, f"batch_size={size}")
    return plan.Case(what, fields.pop("name", kind), kind, cfg, **fields)


def start(case):
    """The generator of a case, with what it learns of itself."""
    about = {"parts": {}}
    return cases.TIMED[case.kind](case, CPU, about), about


def outcomes_of(*rates, size=8, **fields) -> list[dict]:
    """The outcomes of repeats at these rates."""
    measured = OUTCOME | fields
    return [measured | {"amount": size * 10, "samples": [size / rate] * 10} for rate in rates]


def row_of(data, outcomes, kind="train") -> dict:
    (row,) = rounds.build_rows({case_of(data, kind, what=kind): outcomes}, JOB)
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


def no_wait() -> None:
    pass


def test_a_rate_counts_images_once_the_batches_are_steady(ticks):
    result = timing.measure(ticks(0.5, 0.4, 0.3, 0.25), 1.0, no_wait)
    assert result["steady"] and result["warmup_batches"] == 5, "windows of a batch: falling, alike"
    assert result["samples"] == pytest.approx([0.25] * 4)
    assert timing.rate_of_repeat(result) == pytest.approx(4 / 0.25), "images, not batches"


def test_the_time_that_a_device_still_needs_counts(ticks):
    device = ticks(0.0, 0.5)
    amount, samples = timing.take(ticks(0.0), 0, 4, lambda: next(device))
    assert amount == 16 and samples == pytest.approx([0.0, 0.0, 0.0, 0.5])


def test_what_never_becomes_steady_says_so_and_what_ends_too_early_is_no_number(ticks):
    result = timing.measure(ticks(*(1.1**n for n in range(40))), 1e-6, no_wait)
    assert not result["steady"] and result["warmup_batches"] == timing.MAX_WINDOWS
    with pytest.raises(BadInput, match="end 2 batches after the first"):
        timing.measure(itertools.islice(ticks(0.0), 2), 1.0, no_wait, is_endless=False)


@pytest.mark.parametrize("seconds, steady", [([0.01] * 20, True), ([0.02] * 10 + [0.01], False)])
def test_a_cold_file_has_no_warm_up_and_is_steady_by_its_halves(ticks, seconds, steady):
    stream = itertools.islice(ticks(*seconds), 20)
    result = timing.measure(stream, 9.0, no_wait, is_endless=False)
    assert len(result["samples"]) == 20 and result["warmup_batches"] == 0
    assert result["steady"] == steady


@pytest.fixture
def burners():
    """As many processes as there are cores, each of which keeps one busy."""
    command = [sys.executable, "-c", "while True: pass"]
    processes = [subprocess.Popen(command) for _ in os.sched_getaffinity(0)]
    time.sleep(0.5)
    yield
    for process in processes:
        process.kill()
        process.wait()


@pytest.mark.usefixtures("burners")
def test_load_by_others_is_seen_and_a_busy_machine_is_refused(pcam_dir, tmp_path, capsys):
    busy_s, started_at = timing.others_busy_s(), time.monotonic()
    time.sleep(1)
    assert timing.share_of_others(busy_s, started_at) > 0.5
    arguments = ["loader", "--data", str(pcam_dir), "--out", str(tmp_path / "out")]
    assert benchmark.main(arguments) == 2
    assert "too busy to measure: others use" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_what_the_process_itself_computes_is_no_load_by_others(monkeypatch):
    monkeypatch.setattr(timing.Path, "read_text", lambda _: "cpu0 9 9 9\nintr 7")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0})
    busy_s, until = timing.others_busy_s(), time.process_time() + 0.3
    while time.process_time() < until:
        pass
    assert timing.others_busy_s() <= busy_s - 0.2


def test_the_peak_of_memory_is_that_of_a_case_alone():
    cases.forget_memory(CPU)
    before = cases.peak_memory_bytes(CPU)
    torch.ones(100 << 20, dtype=torch.uint8)
    assert cases.peak_memory_bytes(CPU) > before + (90 << 20)
    cases.forget_memory(CPU)
    assert cases.peak_memory_bytes(CPU) < before + (50 << 20)


# rows


@pytest.mark.parametrize("num", [3, 6])
def test_the_interval_holds_the_mean_as_often_as_it_promises(num):
    draw = random.Random(num)
    num_held = 0
    for _ in range(4000):
        _, low, high = rounds.rate_interval([draw.lognormvariate(1, 0.2) for _ in range(num)])
        num_held += low <= math.e <= high
    assert 0.935 < num_held / 4000 < 0.965


def test_a_row_has_all_that_defends_its_number(pcam_dir):
    row = row_of(pcam_dir, outcomes_of(100, 110, 90, power_w=50.0))
    assert tuple(row) == rounds.COLUMNS and (row["status"], row["note"]) == ("ok", "")
    assert row["low"] < 90 < row["images_per_s"] < 110 < row["high"]
    assert row["p50_s"] < row["p90_s"] <= row["p99_s"] <= 8 / 90 + 1e-9
    assert (row["num_repeats"], row["num_batches"]) == (3, 30)
    assert row["energy_j_per_image"] == pytest.approx(50 / row["images_per_s"])
    assert {name: row[name] for name in JOB} == JOB
    assert (row["model"], row["batch_size"], row["threads"]) == ("p4m", 8, 1)
    one = row_of(pcam_dir, outcomes_of(100))
    assert one["low"] is None and one["images_per_s"] == pytest.approx(100)
    assert one["energy_j_per_image"] is None, "nothing tells it"


@pytest.mark.parametrize(
    "fields, status, words",
    [
        ({"others_share": 0.2}, "noisy", "20% of the cores"),
        ({"steady": False}, "unsteady", "not every repeat"),
        ({"note": "remark"}, "ok", "remark"),
    ],
)
def test_a_repeat_that_was_disturbed_marks_its_row(pcam_dir, fields, status, words):
    row = row_of(pcam_dir, [*outcomes_of(100, 101), *outcomes_of(100, **fields)])
    assert row["status"] == status and words in row["note"] and row["images_per_s"]


def test_a_case_that_failed_once_has_no_number(pcam_dir):
    failure = {"status": cases.OUT_OF_MEMORY, "note": "512 images"}
    row = row_of(pcam_dir, [*outcomes_of(100, 101), failure])
    assert failure.items() <= row.items()
    assert not any(row[name] for name in ("images_per_s", "low", "p50_s", "memory_bytes"))


def test_factors_and_shares_are_of_this_benchmark(pcam_dir):
    measured = (
        ("default", "train", 8, 100),
        ("default", "train", 1, 50),
        ("nchw", "train", 8, 40),
        ("raw", "loader", 8, 250),
        ("torchvision_0_workers", "loader", 8, 20),
        ("torchvision_1_workers", "loader", 8, 25),
        ("memory_copy", "limit", 8, 1000),
    )
    product = case_of(pcam_dir, "matrix_product", what="limit")
    results = {product: outcomes_of(4e8, 4e8)}
    for name, what, size, rate in measured:
        case = case_of(pcam_dir, "any", what=what, name=name, size=size)
        flops = 1e6 if what == "train" else None
        results[case] = outcomes_of(rate, rate, size=size, flops_per_image=flops)
    rows = {(row["case"], row["batch_size"]): row for row in rounds.build_rows(results, JOB)}
    assert rows["default", 8]["factor"] == pytest.approx(2), "of the smallest batch"
    assert rows["nchw", 8]["factor"] == pytest.approx(0.4), "of the default at this batch size"
    assert rows["raw", 8]["factor"] == pytest.approx(10), "of torchvision's best"
    assert rows["default", 8]["share_of_peak"] == pytest.approx(100 * 1e6 / 4e8)
    assert rows["raw", 8]["share_of_peak"] == pytest.approx(0.25)
    assert rows["matrix_product", 8]["flops_per_s"] == pytest.approx(4e8)
    result = verdict.headline(list(rows.values()), "loader", config(pcam_dir, "batch_size=8"), 8)
    assert result["ratio_raw"] == pytest.approx(10)


# in a process of its own; `case.name` says how that fares
def fare(pipe, _cache_dir):
    while True:
        case, _ = pipe.recv()
        if case.name == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if case.name == "ended":
            os._exit(7)
        pipe.send(outcomes_of(100, process=os.getpid())[0])


def test_a_process_that_dies_is_a_row_and_a_new_one_goes_on(pcam_dir, monkeypatch, tmp_path):
    monkeypatch.setattr(rounds, "work", fare)
    names = ("first", "second", "killed", "third", "ended", "fourth")
    planned = [case_of(pcam_dir, "raw", name=name) for name in names]
    results, num_results = {}, []
    rounds.run_cases(planned, results, 0.1, 1, tmp_path, lambda: num_results.append(len(results)))
    assert num_results == [6], "after the round"
    first, second, killed, third, ended, fourth = (results[case][0] for case in planned)
    assert killed["status"] == cases.OUT_OF_MEMORY and "killed" in killed["note"]
    assert ended["status"] == "error" and "exit code 7" in ended["note"]
    assert first["process"] == second["process"]
    assert len({first["process"], third["process"], fourth["process"]}) == 3


# what is timed


@pytest.mark.parametrize("kind", cases.TIMED)
def test_every_case_says_how_many_images_a_batch_held(kind, pcam_dir, monkeypatch):
    monkeypatch.setattr(cases, "MATRIX_SIDES", (64,))
    monkeypatch.setattr(cases, "CONVOLUTIONS", ((4, 64),))
    stream, about = start(case_of(pcam_dir, kind))
    amounts = [next(stream) for _ in range(3)]
    stream.close()
    if kind == "matrix_product":
        assert amounts[0] in (2 * 64**3, 2 * 64 * 64**2 * 4 * 4 * 9)
    else:
        assert amounts == [8] * 3
    assert set(about["parts"]) == (set(verdict.GROUPS) - {"read"} if kind == "apart" else set())


def test_training_is_timed_on_the_very_step_and_inference_on_the_very_prediction(
    pcam_dir, monkeypatch
):
    calls = []
    expected = {
        "train": (training, "training_step"),
        "apart": (training, "training_step"),
        "infer": (cases, "predict_batch"),
        "end_to_end": (cases, "predict_blocks"),
    }

    def watch(owner, name):
        function = getattr(owner, name)

        def watched(*arguments):
            calls.append(name)
            return function(*arguments)

        monkeypatch.setattr(owner, name, watched)

    for owner, name in set(expected.values()):
        watch(owner, name)
    for kind, (_, name) in expected.items():
        calls.clear()
        stream, _ = start(case_of(pcam_dir, kind))
        next(stream), next(stream)
        stream.close()
        assert set(calls) == {name} and len(calls) == (1 if kind == "end_to_end" else 2)


def test_flops_are_those_of_an_image(pcam_dir):
    first, last = 96 * 96 * 3 * 7, 7
    case = case_of(pcam_dir, "infer", "model=mlp", "mlp_hidden=7", size=2)
    assert cases.count_flops(case) == 2 * (first + last)
    step = dataclasses.replace(case, kind="train")
    assert cases.count_flops(step) == 2 * (2 * first + 3 * last), "no gradient for the pixels"


def test_the_plain_way_gives_the_equal_product(pcam_dir):
    """Without augmentation, which both draw for themselves, the batches are the same to the last
    bits of float32.
    """
    case = case_of(pcam_dir, "torchvision", *PLAIN, order="sequential")
    theirs = next(cases.torchvision_batches(case))[0]
    batch = next(cases.open_batches(case, CPU, {}))
    ours = model_input(batch.images, draw_augmentation(batch.keys, 0, case.cfg))
    assert torch.allclose(ours, theirs, atol=1e-5) and ours.dtype == theirs.dtype
    augmented = case_of(pcam_dir, "torchvision", order="sequential")
    assert not torch.allclose(next(cases.torchvision_batches(augmented))[0], theirs, atol=0.01)
    with pytest.raises(BadInput, match="less than a batch of 161"):
        next(cases.torchvision_batches(case_of(pcam_dir, "torchvision", size=161)))


def test_random_order_is_random_and_a_cold_file_is_read_once(pcam_dir):
    def keys(**fields):
        stream = cases.open_batches(case_of(pcam_dir, "raw", **fields), CPU, {})
        return torch.cat([batch.keys for batch in itertools.islice(stream, 45)])

    assert keys(order="sequential")[:160].tolist() == list(range(160))
    random_order = keys()
    assert len(random_order) == 45 * 8, "over and over"
    assert sorted(random_order[:160].tolist()) == list(range(160))
    assert random_order[:160].diff().abs().float().mean() > 20
    assert len(keys(cache="cold")) == 160


def test_a_file_is_cold_where_its_pages_are_gone_and_else_the_row_says_so(pcam_dir, monkeypatch):
    path = split_path(pcam_dir, "train", "x")
    cold = case_of(pcam_dir, "raw", "data_residence=disk", cache="cold", size=1)
    cases.time_case(dataclasses.replace(cold, cache="warm"), 0.01)
    assert cases.resident_share(path) >= cases.WARM_SHARE
    outcome = cases.time_case(cold, 0.01)
    assert (outcome["cache"], outcome["note"]) == ("cold", "")
    monkeypatch.setattr(os, "posix_fadvise", lambda *_: None)  # a file system that does not heed it
    cases.time_case(dataclasses.replace(cold, cache="warm"), 0.01)
    not_cold = cases.time_case(cold, 0.01)
    assert not_cold["cache"] == "eviction requested" and "holds 100%" in not_cold["note"]
    (row,) = rounds.build_rows({cold: [outcome, not_cold]}, JOB)
    assert row["cache"] == "eviction requested" and row["images_per_s"]


def test_variants_differ_in_what_they_are_named_after(pcam_dir):
    planned = plan.plan_cases("all", config(pcam_dir, "batch_size=8"), [1, 8], CPU, [])
    assert len(planned) == len(set(planned))
    changed = {
        "bf16": {"precision": "bf16"},
        "not_deterministic": {"deterministic": False},
        "nchw": {"channels_last": False},
        "compile": {"compile": True},
    }
    for verb in ("infer", "train"):
        cases_of_verb = [case for case in planned if case.what == verb]
        scaling = {}
        for case in cases_of_verb:
            if case.name == "default":
                scaling[case.cfg.model, case.cfg.batch_size] = case
        assert set(scaling) == set(itertools.product(("p4m", "resnet18"), (1, 8)))
        for name, changes in changed.items():
            assert scaling["p4m", 8].vary(name=name, **changes) in cases_of_verb
    products = {case.cfg.precision for case in planned if case.name == "matrix_product"}
    assert products == {"fp32", "bf16"}


@pytest.mark.parametrize("channels_last", [True, False])
def test_a_model_computes_in_the_memory_format_of_the_case(channels_last, pcam_dir):
    case = case_of(pcam_dir, "infer", "model=resnet18", channels_last=channels_last)
    images = torch.zeros(4, 3, 96, 96).to(memory_format=torch.channels_last)
    model, outputs = cases.alter(build_model(case.cfg), case), []
    for module in model.modules():
        if isinstance(module, torch.nn.Conv2d):
            module.register_forward_hook(lambda _, __, output: outputs.append(output))
    model(images)
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    assert outputs
    assert all(output.is_contiguous(memory_format=memory_format) for output in outputs)


# the whole script


@pytest.fixture
def in_process(monkeypatch):
    """Cases in this process, so that a test can slow down what they time."""
    monkeypatch.setattr(rounds.Worker, "time", lambda _, *task: cases.time_case(*task))


def run_benchmark(out, data, what, *arguments, repeats=1):
    quick = ["--seconds", "0.05", "--repeats", str(repeats), "--allow-noise", *QUICK[2:]]
    return benchmark.main([what, "--data", str(data), "--out", str(out), *quick, *arguments])


@pytest.mark.usefixtures("in_process")
@pytest.mark.parametrize(
    "arguments, names",
    [
        (["infer", "--batch-sizes", "1,4"], ["default"] * 4),
        (["train", "--cases", "resident_batch,nchw"], ["nchw", "resident_batch"]),
    ],
)
def test_a_shortened_call_measures_what_it_names_and_its_page_begins_with_that(
    arguments, names, pcam_dir, tmp_path, capsys
):
    small = ["model=mlp", "mlp_hidden=7", "batch_size=4"]
    assert run_benchmark(tmp_path, pcam_dir, *arguments, *small) == 0
    result = json.loads(capsys.readouterr().out)
    assert [row["case"] for row in result["rows"]] == names
    starts = ["# Benchmark", "Batch 1: ", "Best batch: ", "Bottleneck: not", "What to"]
    page = (tmp_path / "benchmark.md").read_text().split("\n\n")
    for paragraph, words in zip(page, starts, strict=False):
        assert paragraph.startswith(words), paragraph


def test_what_was_measured_is_kept_when_interrupted(pcam_dir, tmp_path, monkeypatch):
    answers = iter(outcomes_of(4.0))

    def time_one(*_):
        for answer in answers:
            return answer
        raise KeyboardInterrupt

    monkeypatch.setattr(rounds.Worker, "time", time_one)
    assert run_benchmark(tmp_path, pcam_dir, "loader", "--cases", "raw,ready", repeats=3) == 130
    (row,) = read_json(tmp_path / "benchmark.json")["rows"]
    assert row["num_repeats"] == 1 and row["images_per_s"] == pytest.approx(4.0)


@pytest.mark.usefixtures("in_process")
@pytest.mark.parametrize("slowed", ["loader", "model"])
@pytest.mark.parametrize("residence", ["host", "disk"])
def test_the_verdict_names_what_was_slowed(slowed, residence, pcam_dir, tmp_path, monkeypatch):
    owner, name, stage = batches.PatchSource, "gather", "gather"
    if slowed == "model":
        owner, name, stage = CentreNet, "forward", "forward"
    function = getattr(owner, name)

    def slow(*arguments):
        time.sleep(0.5)  # far more than the rest takes on a busy machine
        return function(*arguments)

    monkeypatch.setattr(owner, name, slow)
    options = ["--batch-sizes", "8", "--cases", "apart,read", "model=cnn", "cnn_width=2"]
    options.append(f"data_residence={residence}")
    assert run_benchmark(tmp_path, pcam_dir, "train", *options) == 0
    result = read_json(tmp_path / "benchmark.json")
    judged = result["verdict"]
    for epoch in ("first_epoch", "later_epochs"):
        assert judged[epoch]["bottleneck"] == slowed
    assert judged["sentence"].count(verdict.NAMES[slowed]) == 2
    stage_s = judged["later_epochs"]["stage_s"]
    assert 0.45 < stage_s[stage] < 2.0
    rows = {row["case"]: row for row in result["rows"]}
    whole_s = sum(stage_s.values()) + stage_s["augment"]  # the input is made twice
    assert whole_s == pytest.approx(8 / rows["apart"]["images_per_s"], rel=0.05), "nothing left out"


def stage_rows(gpu="none", residence="disk", **seconds):
    """Rows of stages that take so long a batch of 64."""
    common = dict.fromkeys(rounds.COLUMNS) | {
        "what": "stage",
        "model": "p4m",
        "batch_size": 64,
        "gpu": gpu,
        "residence": residence,
        "status": "ok",
        "cache": "cold",
    }
    rows = [common | {"case": name, "images_per_s": 64 / seconds[name]} for name in seconds]
    return [*rows, common | {"case": "apart", "images_per_s": 1.0}]


STEP = {
    "augment": 2.0,
    "forward": 3.0,
    "backward": 6.0,
    "optimiser": 1.0,
    "logging": 0.1,
    "gather": 0.5,
    "read": 1.0,
}


@pytest.mark.parametrize(
    "changes, first, later",
    [
        ({}, "model", "model"),
        ({"read": 20.0}, "disk", "model"),
        ({"gather": 13.0}, "loader", "loader"),
        ({"augment": 11.0}, "augment", "augment"),
        ({"logging": 11.0}, "logging", "logging"),
        # in the background, reading and gathering together outlast the model
        ({"read": 12.5, "gather": 5.0}, "disk", "model"),
        # on a CPU without a background thread
        ({"gather": 11.0, "residence": "host"}, "loader", "loader"),
        ({"read": 11.0, "residence": "host"}, "disk", "model"),
        ({"gather": 11.0, "gpu": "H100", "residence": "host"}, "model", "model"),
        ({"gather": 14.0, "gpu": "H100", "residence": "host"}, "loader", "loader"),
    ],
)
def test_the_bottleneck_is_the_largest_part_of_what_a_batch_waits_for(changes, first, later):
    judged = verdict.judge(stage_rows(**STEP | changes))
    assert judged["first_epoch"]["bottleneck"] == first
    assert judged["later_epochs"]["bottleneck"] == later
    assert verdict.ADVICE[later] in judged["sentences"][-1]


@pytest.mark.slow
def test_a_benchmark_through_real_processes(pcam_dir, tmp_path, monkeypatch):
    """Two sizes, one of which needs more memory than the process may have, on the one core of a
    job.
    """
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", "1")
    num_bytes = address_space_needed() + (2 << 30)
    arguments = ["infer", "--data", pcam_dir, "--out", tmp_path, "--batch-sizes", "4,200000"]
    arguments += ["--seconds", "0.05", "--repeats", "2", "--allow-noise"]
    limit = {"preexec_fn": lambda: resource.setrlimit(resource.RLIMIT_AS, (num_bytes, num_bytes))}
    options = ["model=resnet18", "precision=fp32"]
    result = run_script("benchmark.py", *arguments, *options, check=0, **limit)
    small, large = result.json["rows"]
    assert large["status"] == "out of memory" and not large["images_per_s"] and large["note"]
    assert large["num_repeats"] == 1, "it is not tried again"
    assert small["low"] <= small["images_per_s"] <= small["high"] and small["flops_per_image"] > 1e8
    assert 5e7 < small["memory_bytes"] < 2**34 and small["threads"] == 1
    table = read_csv(tmp_path / "rows.csv")
    assert tuple(table[0]) == rounds.COLUMNS and table[1]["images_per_s"] == ""
    assert float(table[0]["images_per_s"]) == small["images_per_s"]
    with gzip.open(tmp_path / "samples.json.gz") as file:
        seconds = json.load(file)[0]["samples"]
    assert len(seconds[0]) + len(seconds[1]) == small["num_batches"]
    page = (tmp_path / "benchmark.md").read_text()
    assert "## Scaling: infer, resnet18" in page and "out of memory" in page
    assert (tmp_path / "scaling.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_torchvisions_loader_has_workers_in_a_process_of_a_benchmark(pcam_dir, tmp_path):
    arguments = ["loader", "--data", pcam_dir, "--out", tmp_path, "--seconds", "0.01"]
    arguments += ["--cases", "torchvision_1_workers", "--repeats", "1", "--allow-noise"]
    rows = run_script("benchmark.py", *arguments, "batch_size=8", check=0).json["rows"]
    assert all(row["images_per_s"] for row in rows) and len(rows) == 2


def address_space_needed() -> int:
    """What the program takes of address space before it measures anything."""
    code = (
        "import lib.benchmark.rounds, lib.benchmark.page;"
        " print(open('/proc/self/status').read().split('VmPeak:')[1].split()[0])"
    )
    options = {"cwd": REPOSITORY, "env": os.environ | {"OMP_NUM_THREADS": "1"}}
    return int(subprocess.check_output([sys.executable, "-c", code], **options)) * 1024


@pytest.mark.usefixtures("in_process")
def test_the_loader_stands_beside_torchvisions_best(pcam_dir, tmp_path, capsys):
    options = ["--cases", "torchvision_0_workers,ready,raw", "batch_size=8"]
    assert run_benchmark(tmp_path, pcam_dir, "loader", *options) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    rates = {}
    for row in result["rows"]:
        rates[row["case"], row["precision"], row["cache"]] = row["images_per_s"]
    torchvision = rates["torchvision_0_workers", "fp32", "warm"]
    assert result["images_per_s"] == rates["ready", "fp32", "warm"]
    assert result["torchvision_images_per_s"] == pytest.approx(torchvision)
    assert result["ratio"] == pytest.approx(result["images_per_s"] / torchvision)
    assert "times torchvision's best" in result["verdict"]["sentences"][-1]


# two benchmarks


def written(folder, *changes, num_repeats: int = 3) -> str:
    """A benchmark of three rows, changed."""
    common = dict.fromkeys(rounds.COLUMNS) | {"what": "train", "case": "default"}
    common |= {"status": "ok", "num_repeats": num_repeats}
    rows = []
    for size, change in itertools.zip_longest((1, 8, 64), changes, fillvalue=1.0):
        rate = change and size * change
        rates = {"images_per_s": rate, "low": rate and 0.98 * rate, "high": rate and 1.02 * rate}
        rows.append(common | {"batch_size": size} | rates)
    folder.mkdir()
    write_json(folder / "benchmark.json", {"rows": rows})
    return str(folder)


@pytest.mark.parametrize(
    "changes, code, words",
    [
        ((), 0, ["within"] * 3),
        ((1.03, 0.97), 0, ["within"] * 3),
        ((1.1,), 0, ["faster", "within", "within"]),
        ((1.1, 0.9), 1, ["faster", "slower", "within"]),
        ((None,), 0, ["cannot", "within", "within"]),
        ((0.5,), 0, ["cannot"] * 3),
    ],
)
def test_compare_says_whether_a_difference_exceeds_the_noise(
    changes, code, words, tmp_path, capsys
):
    num_repeats = 3 if "within" in words else 2
    before = written(tmp_path / "a")
    after = written(tmp_path / "b", *changes, num_repeats=num_repeats)
    assert benchmark.main(["compare", before, f"{after}/benchmark.json"]) == code
    printed = capsys.readouterr()
    lines = printed.err.splitlines()
    assert all(word in line for word, line in zip(words, lines[1:], strict=False)), printed.err
    result = json.loads(printed.out)
    assert result["num_compared"] == 3 and result["num_slower"] == words.count("slower")
    assert result["num_exceeding"] == words.count("slower") + words.count("faster")


def test_chance_alone_rarely_makes_a_difference():
    draw, num_exceeding = random.Random(0), 0

    def drawn():
        rates = [draw.lognormvariate(5, 0.3) for _ in range(3)]
        rate, low, high = rounds.rate_interval(rates)
        measured = {"images_per_s": rate, "low": low, "high": high, "num_repeats": 3, "key": ()}
        return dict.fromkeys(rounds.COLUMNS) | measured

    for _ in range(5000):
        (comparison,) = verdict.compare_rows([drawn()], [drawn()])
        num_exceeding += comparison["B is"] != "within the noise"
    assert num_exceeding < 0.02 * 5000


# what cannot be measured


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["loader", "--data", "nowhere"], "no folder nowhere"),
        (["loader", "--batch-sizes", "8,x"], "--batch-sizes"),
        (["train", "--batch-sizes", "0"], "0 is not 1 or more"),
        (["train", "--seconds", "0"], "seconds must be above 0"),
        (["train", "--seconds", "nan"], "seconds must be above 0"),
        (["train", "--repeats", "0"], "not 1 or more"),
        (["train", "shards=2"], "batch size 1 must be a multiple of shards"),
        (["train", "--device", "tpu"], "--device tpu"),
        (["train", "modell=cnn"], "did you mean 'model'"),
        (["train", "--cases", "defualt"], "did you mean 'default'"),
        (["guess"], "invalid choice"),
        (["compare", "a"], "takes two benchmarks"),
        (["compare", "nowhere", "there"], "nowhere: no such benchmark"),
    ],
)
def test_bad_input_is_one_sentence(arguments, words, pcam_dir, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if "--data" not in arguments and arguments[0] != "compare":
        arguments = [*arguments, "--data", str(pcam_dir), "--allow-noise"]
    assert benchmark.main(arguments) == 2
    printed = capsys.readouterr()
    assert words in printed.err and printed.err.count("error: ") == 1
    assert "exit" in json.loads(printed.out) and not (tmp_path / "bench").exists()


@pytest.mark.parametrize(
    "content, words",
    [({"rows": []}, "no row in common"), ({"rows": [{}]}, "no benchmark"), ({}, "no benchmark")],
)
def test_two_benchmarks_without_a_common_row_are_refused(content, words, tmp_path, capsys):
    (tmp_path / "b").mkdir()
    write_json(tmp_path / "b/benchmark.json", content)
    assert benchmark.main(["compare", written(tmp_path / "a"), str(tmp_path / "b")]) == 2
    assert words in capsys.readouterr().err


def test_rows_csv_is_what_a_spreadsheet_reads(pcam_dir, tmp_path):
    from lib.benchmark.page import write_benchmark

    outcomes = {case_of(pcam_dir, "raw"): outcomes_of(5, 6, note="a|b, c")}
    rows = rounds.build_rows(outcomes, JOB | {"gpu": "NVIDIA A100 MIG 1g.5gb"})
    result = {"rows": rows, "verdict": verdict.judge(rows), "machine": {"mig": True}, "data": "d"}
    write_benchmark(tmp_path, result | {"repeats": 2, "seconds": 1.0}, outcomes)
    with open(tmp_path / "rows.csv", newline="") as file:
        assert [line["note"] for line in csv.DictReader(file)] == ["a|b, c"]
    page = (tmp_path / "benchmark.md").read_text()
    assert "a\\|b, c" in page and "NVIDIA A100 MIG 1g.5gb" in page
    assert "there is none here" not in page
