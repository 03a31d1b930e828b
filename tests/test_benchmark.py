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


def test_a_rate_counts_images_once_the_batches_are_steady(ticks, monkeypatch):
    result = timing.measure(ticks(0.5, 0.4, 0.3, 0.25), 1.0)
    assert result["steady"] and result["warmup_batches"] == 5, "windows of a batch: falling, alike"
    assert result["samples"] == pytest.approx([0.25] * 4) and result["amount"] == 16
    restless = timing.measure(ticks(*(1.1**n for n in range(40))), 1e-6)
    assert not restless["steady"] and restless["warmup_batches"] == timing.MAX_WINDOWS
    device = ticks(0.0, 0.5)
    monkeypatch.setattr(timing, "finish", lambda: next(device))
    _, samples = timing.take(ticks(0.0), 0, 4)
    assert samples == pytest.approx([0.0, 0.0, 0.0, 0.5]), "what a device still needs counts"


def test_a_cold_file_has_no_warm_up_and_is_steady_by_its_halves(ticks):
    for seconds, is_steady in (([0.01] * 20, True), ([0.02] * 10 + [0.01] * 10, False)):
        stream = itertools.islice(ticks(*seconds), 20)
        result = timing.measure(stream, 9.0, is_endless=False)
        assert len(result["samples"]) == 20 and result["warmup_batches"] == 0
        assert result["steady"] == is_steady
    with pytest.raises(BadInput, match="end 2 batches after the first"):
        timing.measure(itertools.islice(ticks(0.0), 2), 1.0, is_endless=False)


def test_a_busy_machine_is_refused(pcam_dir, tmp_path, monkeypatch):
    monkeypatch.setattr(timing, "cores_used_by_others", lambda *_: os.cpu_count())
    arguments = ["loader", "--data", str(pcam_dir), "--out", str(tmp_path / "out")]
    assert benchmark.main(arguments) == 2
    assert not (tmp_path / "out").exists()


def test_the_peak_of_memory_is_that_of_a_case_alone():
    cases.forget_memory(CPU)
    before = cases.peak_memory_bytes(CPU)
    torch.ones(100 << 20, dtype=torch.uint8)
    assert cases.peak_memory_bytes(CPU) > before + (90 << 20)
    cases.forget_memory(CPU)
    assert cases.peak_memory_bytes(CPU) < before + (50 << 20)


# rows


def test_a_row_has_all_that_defends_its_number(pcam_dir):
    row = row_of(pcam_dir, outcomes_of(100, 110, 90, power_w=50.0))
    assert tuple(row) == rounds.COLUMNS and (row["status"], row["note"]) == ("ok", "")
    assert row["low"] < 90 < row["images_per_s"] < 110 < row["high"]
    assert row["p50_s"] < row["p90_s"] <= row["p99_s"] <= 8 / 90 + 1e-9
    assert row["energy_j_per_image"] == pytest.approx(50 / row["images_per_s"])
    expected = JOB | {"model": "p4m", "batch_size": 8, "num_repeats": 3, "num_batches": 30}
    assert expected.items() <= row.items()
    one = row_of(pcam_dir, outcomes_of(100))
    assert one["low"] is None and one["energy_j_per_image"] is None, "nothing tells it"


def test_a_repeat_that_was_disturbed_marks_its_row_and_one_that_failed_leaves_no_number(pcam_dir):
    for fields, status, words in (
        ({"others_share": 0.2}, "noisy", "20% of the cores"),
        ({"steady": False}, "unsteady", "not every repeat"),
        ({"note": "remark"}, "ok", "remark"),
    ):
        row = row_of(pcam_dir, [*outcomes_of(100, 101), *outcomes_of(100, **fields)])
        assert row["status"] == status and words in row["note"] and row["images_per_s"]
    failure = {"status": cases.OUT_OF_MEMORY, "note": "512 images"}
    row = row_of(pcam_dir, [*outcomes_of(100, 101), failure])
    assert failure.items() <= row.items()
    assert not any(row[name] for name in ("images_per_s", "low", "p50_s", "memory_bytes"))


def test_factors_and_shares_are_of_this_benchmark(pcam_dir):
    product = case_of(pcam_dir, "matrix_product", what="limit")
    results = {product: outcomes_of(4e8, 4e8)}
    for name, size, rate in (("default", 8, 100), ("default", 1, 50), ("nchw", 8, 40)):
        case = case_of(pcam_dir, "train", what="train", name=name, size=size)
        results[case] = outcomes_of(rate, rate, size=size, flops_per_image=1e6)
    rows = {(row["case"], row["batch_size"]): row for row in rounds.build_rows(results, JOB)}
    assert rows["default", 8]["factor"] == pytest.approx(2), "of the smallest batch"
    assert rows["nchw", 8]["factor"] == pytest.approx(0.4), "of the default at this batch size"
    assert rows["default", 8]["share_of_peak"] == pytest.approx(100 * 1e6 / 4e8)


# in a process of its own; `case.name` says how that fares
def fare(case, _seconds):
    if case.name == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if case.name == "failed":
        return {"status": "error", "note": "why"}
    return outcomes_of(100, process=os.getpid())[0]


def test_a_process_that_dies_is_a_row_and_a_new_one_goes_on(pcam_dir, monkeypatch, tmp_path):
    fork = multiprocessing.get_context("fork")  # which knows of `fare`
    monkeypatch.setattr(multiprocessing, "get_context", lambda _: fork)
    monkeypatch.setattr(rounds, "time_case", fare)
    names = ("first", "second", "killed", "third", "failed", "fourth")
    planned = [case_of(pcam_dir, "raw", name=name) for name in names]
    results, num_results = {}, []
    keep = lambda: num_results.append(len(results))  # noqa: E731
    rounds.run_cases(planned, results, 0.1, 1, str(tmp_path), keep)
    assert num_results == [6], "after the round"
    outcomes = {case.name: outcome for case, (outcome,) in results.items()}
    assert outcomes["killed"]["status"] == cases.OUT_OF_MEMORY and outcomes["killed"]["note"]
    assert outcomes["failed"]["note"] == "why"
    pids = [outcomes[name]["process"] for name in ("first", "second", "third", "fourth")]
    assert pids[0] == pids[1] and len(set(pids)) == 3


# what is timed


@pytest.mark.parametrize("kind", cases.TIMED)
def test_every_case_says_how_many_images_a_batch_held(kind, pcam_dir, monkeypatch):
    """And trains with the very step of train.py, and predicts as inference.py does."""
    monkeypatch.setattr(cases, "MATRIX_SIDES", (64,))
    calls = []

    def watch(owner, name):
        function = getattr(owner, name)
        watched = lambda *arguments: calls.append(name) or function(*arguments)  # noqa: E731
        monkeypatch.setattr(owner, name, watched)

    watch(training, "training_step")
    watch(cases, "predict_batch")
    watch(cases, "predict_blocks")
    stream, about = start(case_of(pcam_dir, kind))
    amounts = [next(stream) for _ in range(3)]
    stream.close()
    step = ["training_step"] * 3
    expected = {"train": step, "apart": step, "infer": ["predict_batch"] * 3}
    assert calls == (expected | {"end_to_end": ["predict_blocks"]}).get(kind, [])
    if kind == "matrix_product":
        assert amounts == [2 * 64**3] * 3
    else:
        assert amounts == [8] * 3
    assert set(about["parts"]) == (set(verdict.GROUPS) - {"read"} if kind == "apart" else set())


def test_flops_are_those_of_an_image(pcam_dir):
    first, last = 96 * 96 * 3 * 7, 7
    case = case_of(pcam_dir, "infer", "model=mlp", "mlp_hidden=7", size=2)
    assert cases.count_flops(case) == 2 * (first + last)
    step = case.vary(kind="train")
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
    cold = case_of(pcam_dir, "raw", "data_residence=disk", cache="cold", size=1)
    warm = cold.vary(cache="warm")
    cases.time_case(warm, 0.01)
    assert cases.resident_share(split_path(pcam_dir, "train", "x")) >= cases.WARM_SHARE
    outcome = cases.time_case(cold, 0.01)
    assert (outcome["cache"], outcome["note"]) == ("cold", "")
    monkeypatch.setattr(os, "posix_fadvise", lambda *_: None)  # a file system that does not heed it
    cases.time_case(warm, 0.01)
    not_cold = cases.time_case(cold, 0.01)
    assert not_cold["cache"] == "eviction requested" and "holds 100%" in not_cold["note"]
    (row,) = rounds.build_rows({cold: [outcome, not_cold]}, JOB)
    assert row["cache"] == "eviction requested" and row["images_per_s"]


def test_models_are_planned_over_batch_sizes_and_no_case_twice(pcam_dir):
    planned = plan.plan_cases("all", case_of(pcam_dir, "raw").cfg, [1, 8], CPU, [])
    assert len(planned) == len(set(planned))
    for verb in ("infer", "train"):
        scaling = [case for case in planned if (case.what, case.name) == (verb, "default")]
        sizes = {(case.cfg.model, case.cfg.batch_size) for case in scaling}
        assert sizes == set(itertools.product(("p4m", "resnet18"), (1, 8)))


@pytest.mark.parametrize("channels_last", [True, False])
def test_a_model_computes_in_the_memory_format_of_the_case(channels_last, pcam_dir):
    case = case_of(pcam_dir, "infer", "model=resnet18", channels_last=channels_last)
    images = torch.zeros(4, 3, 96, 96).to(memory_format=torch.channels_last)
    model, outputs = cases.alter(build_model(case.cfg), case), []
    model.conv1.register_forward_hook(lambda _, __, output: outputs.append(output))
    model(images)
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    assert outputs[0].is_contiguous(memory_format=memory_format)


# the whole script


def time_here(group, seconds, _cache_dir):
    """Cases in this process, so that a test can slow down what they time."""
    for case in group:
        yield cases.time_case(case, seconds)


def run_benchmark(out, data, what, *arguments, repeats=1):
    quick = ["--seconds", "0.05", "--repeats", str(repeats), "--allow-noise", *QUICK[2:]]
    return benchmark.main([what, "--data", str(data), "--out", str(out), *quick, *arguments])


@pytest.mark.parametrize(
    "arguments, names",
    [
        (["infer", "--batch-sizes", "1,4"], ["default"] * 4),
        (["train", "--cases", "resident_batch,nchw"], ["nchw", "resident_batch"]),
    ],
)
def test_a_shortened_call_measures_what_it_names_and_its_page_begins_with_that(
    arguments, names, pcam_dir, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(rounds, "time_group", time_here)
    small = ["model=mlp", "mlp_hidden=7", "batch_size=4"]
    assert run_benchmark(tmp_path, pcam_dir, *arguments, *small) == 0
    result = json.loads(capsys.readouterr().out)
    assert sorted(row["case"] for row in result["rows"]) == names
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
    rates = {}
    for row in result["rows"]:
        if (row["precision"], row["cache"]) == ("fp32", "warm"):
            rates[row["case"]] = row["images_per_s"]
    torchvision = rates["torchvision_0_workers"]
    names = ("images_per_s", "torchvision_images_per_s", "ratio", "ratio_raw")
    expected = [rates["ready"], torchvision, rates["ready"] / torchvision]
    expected.append(rates["raw"] / torchvision)
    assert [result[name] for name in names] == pytest.approx(expected)
    assert "times torchvision's best" in result["verdict"]["sentences"][-1]


def test_what_was_measured_is_kept_when_interrupted(pcam_dir, tmp_path, monkeypatch):
    def time_one(*_):
        yield outcomes_of(4.0)[0]
        raise KeyboardInterrupt

    monkeypatch.setattr(rounds, "time_group", time_one)
    assert run_benchmark(tmp_path, pcam_dir, "loader", "--cases", "raw,ready", repeats=3) == 130
    (row,) = read_json(tmp_path / "benchmark.json")["rows"]
    assert row["num_repeats"] == 1 and row["images_per_s"] == pytest.approx(4.0)


@pytest.mark.slow
@pytest.mark.parametrize(
    "slowed, residence, owner, stage",
    [
        ("loader", "disk", batches.PatchSource, "gather"),
        ("model", "host", CentreNet, "forward"),
    ],
)
def test_the_verdict_names_what_was_slowed(
    slowed, residence, owner, stage, pcam_dir, tmp_path, monkeypatch
):
    function = getattr(owner, stage)

    def slow(*arguments):
        time.sleep(0.5)  # far more than the rest takes on a busy machine
        return function(*arguments)

    monkeypatch.setattr(owner, stage, slow)
    monkeypatch.setattr(rounds, "time_group", time_here)
    options = ["--batch-sizes", "8", "--cases", "apart,read", "model=cnn", "cnn_width=2"]
    options.append(f"data_residence={residence}")
    assert run_benchmark(tmp_path, pcam_dir, "train", *options) == 0
    result = read_json(tmp_path / "benchmark.json")
    judged = result["verdict"]
    assert judged["first_epoch"]["bottleneck"] == judged["later_epochs"]["bottleneck"] == slowed
    stage_s = judged["later_epochs"]["stage_s"]
    assert 0.45 < stage_s[stage] < 2.0
    (rate,) = (row["images_per_s"] for row in result["rows"] if row["case"] == "apart")
    whole_s = sum(stage_s.values()) + stage_s["augment"]  # the input is made twice
    assert whole_s == pytest.approx(8 / rate, rel=0.05), "nothing left out"


STEP = {
    "augment": 2.0,
    "forward": 3.0,
    "backward": 6.0,
    "optimiser": 1.0,
    "logging": 0.1,
    "gather": 0.5,
    "read": 1.0,
}


def test_the_bottleneck_is_the_largest_part_of_what_a_batch_waits_for():
    common = dict.fromkeys(rounds.COLUMNS) | {"what": "stage", "model": "p4m", "batch_size": 64}
    common |= {"gpu": "none", "residence": "disk", "status": "ok", "cache": "cold"}
    for changes, first, later in (
        ({}, "model", "model"),
        ({"read": 20.0}, "disk", "model"),
        ({"gather": 13.0}, "loader", "loader"),
        ({"augment": 11.0}, "augment", "augment"),
        ({"logging": 11.0}, "logging", "logging"),
        # in the background, reading and gathering together outlast the model
        ({"read": 12.5, "gather": 5.0}, "disk", "model"),
        # on a CPU without a background thread
        ({"gather": 11.0, "residence": "host"}, "loader", "loader"),
        ({"gather": 11.0, "gpu": "H100", "residence": "host"}, "model", "model"),
        ({"gather": 14.0, "gpu": "H100", "residence": "host"}, "loader", "loader"),
    ):
        rows = [common | changes | {"case": "apart", "images_per_s": 1.0}]
        for name in STEP:
            seconds = changes.get(name, STEP[name])
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
    table = read_csv(tmp_path / "rows.csv")
    assert tuple(table[0]) == rounds.COLUMNS and table[1]["images_per_s"] == ""
    text = (tmp_path / "benchmark.md").read_text()
    assert "## Scaling: infer, resnet18" in text and "out of memory" in text


@pytest.mark.slow
def test_torchvisions_loader_has_workers_in_a_process_of_a_benchmark(pcam_dir, tmp_path):
    arguments = ["loader", "--data", pcam_dir, "--out", tmp_path, "--seconds", "0.01"]
    arguments += ["--cases", "torchvision_1_workers", "--repeats", "1", "--allow-noise"]
    rows = run_script("benchmark.py", *arguments, "batch_size=8", check=0).json["rows"]
    assert all(row["images_per_s"] for row in rows) and len(rows) == 2


# two benchmarks


def written(folder, *rates, num_repeats: int = 3) -> str:
    """A benchmark of a row for each rate."""
    common = dict.fromkeys(rounds.COLUMNS) | {"status": "ok", "num_repeats": num_repeats}
    rows = []
    for size, rate in enumerate(rates):
        interval = {"low": rate and 0.98 * rate, "high": rate and 1.02 * rate}
        rows.append(common | {"batch_size": size, "images_per_s": rate} | interval)
    folder.mkdir()
    write_json(folder / "benchmark.json", {"rows": rows})
    return str(folder)


def test_compare_says_whether_a_difference_exceeds_the_noise(tmp_path, capsys):
    before = written(tmp_path / "a", 10, 10, 10, 10, 10)
    after = written(tmp_path / "b", 10.3, 9.7, 11, 9, None)
    assert benchmark.main(["compare", before, f"{after}/benchmark.json"]) == 1
    printed = capsys.readouterr()
    words = ("within", "within", "faster", "slower", "cannot")
    for word, line in zip(words, printed.err.splitlines()[1:], strict=False):
        assert word in line
    result = json.loads(printed.out)
    names = ("num_compared", "num_exceeding", "num_slower")
    assert [result[name] for name in names] == [5, 2, 1]
    once = written(tmp_path / "c", 5, num_repeats=2)
    assert benchmark.main(["compare", before, once]) == 0, "two repeats tell nothing"
    capsys.readouterr()
    for content, words in (({"rows": []}, "no row in common"), ({}, "no benchmark")):
        write_json(tmp_path / "d.json", content)
        assert benchmark.main(["compare", before, str(tmp_path / "d.json")]) == 2
        assert words in capsys.readouterr().err


# what cannot be measured


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["train", "--cases", "defualt"], "did you mean 'default'"),
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
