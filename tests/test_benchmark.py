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
import statistics
import subprocess
import sys
import time

import pytest
import torch
from conftest import QUICK, REPOSITORY, run_script

import benchmark
from lib import batches, training
from lib.augment import PREPROCESSING
from lib.benchmark import cases, verdict
from lib.benchmark import timing as bench
from lib.command import BadInput
from lib.config import load_config
from lib.device import control_group_limits, layer_precision, num_cores
from lib.files import read_csv, read_json, write_json
from lib.models import build_model
from lib.pcam import open_split, split_path
from lib.predict import predict_batch
from lib.seeding import set_determinism

CPU = torch.device("cpu")
NO_WAIT = lambda: None  # noqa: E731
QUIET = {"host_load": 0.0, "others_share": 0.0, "stolen_share": 0.0, "throttled_share": 0.0}
PLAIN = ["symmetries=false", "shift=0", "stain_jitter=0", "brightness_jitter=0"]


@pytest.fixture(autouse=True)
def global_settings():
    """What a case sets for its process stays in its test."""
    threads = torch.get_num_threads()
    yield
    set_determinism(False, threads)
    torch.backends.cudnn.benchmark = False


def config(pcam_dir, *overrides, **keys):
    return dataclasses.replace(
        load_config(overrides=[f"data_dir={pcam_dir}", *QUICK, *overrides]), crop_epochs=0, **keys
    )


def case_of(pcam_dir, kind, *overrides, what="loader", size=8, **flags) -> bench.Case:
    return bench.Case(
        what, kind, kind, config(pcam_dir, *overrides, batch_size=size), device="cpu", **flags
    )


def start(case):
    """The generator of a case once it is built, with what it says of itself."""
    about, parts = {}, {}
    batches = cases.TIMED[case.kind](case, CPU, about, parts)
    assert next(batches) == 0, "first all is built"
    return batches, about, parts


@pytest.fixture
def ticks(monkeypatch):
    """Makes batches of 4 images that take so long each, the last duration for ever, on a clock that
    nothing else moves.
    """
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])

    def make(*seconds):
        for second in itertools.chain(seconds[:-1], itertools.repeat(seconds[-1])):
            now[0] += second
            yield 4

    return make


def found(*rates, size=8, steady=True, num=10, **more) -> list[dict]:
    """What repeats at these rates would have found."""
    fields = {
        "startup_s": 1.0,
        "first_batch_s": 0.1,
        "warmup_batches": 5,
        "memory_bytes": 10**6,
        "overhead_s": 1e-7,
    } | QUIET
    fields |= {"steady": steady, "residence": "host"} | more
    return [fields | {"amount": size * num, "samples": [size / rate] * num} for rate in rates]


def row(pcam_dir, each) -> dict:
    return bench.build_row(case_of(pcam_dir, "train", what="train"), "train", each, JOB)


JOB = {"partition": "thin_course", "node_type": "rome", "job_id": "7", "gpu": "none"}
JOB |= {"date": "d", "commit": "c", "versions": "v"}


def test_a_rate_counts_images_and_the_first_batch_and_the_warm_up_are_apart(ticks):
    result = bench.measure(ticks(9.0, 0.5, 0.4, 0.3, 0.25), 1.0, NO_WAIT)
    assert result["first_batch_s"] == pytest.approx(9.0)
    assert result["steady"] and result["warmup_batches"] == 6, (
        "windows of a batch: falling, until the last two are alike"
    )
    assert result["samples"] == pytest.approx([0.25] * 4) and result["amount"] == 16
    assert bench.rate_of_repeat(result) == pytest.approx(4 / 0.25), "images, not batches"


def test_the_time_that_a_device_still_needs_counts(ticks):
    device = ticks(0.0, 0.5)
    amount, samples = bench.take(ticks(0.0), 0, 4, lambda: next(device))
    assert amount == 16 and samples == pytest.approx([0.0, 0.0, 0.0, 0.5])


def test_what_never_becomes_steady_says_so_and_what_ends_too_early_is_no_number(ticks, pcam_dir):
    result = bench.measure(ticks(*(1.1**n for n in range(27)), 1.0), 1e-6, NO_WAIT)
    assert not result["steady"] and result["warmup_batches"] == 1 + bench.MOST_WINDOWS
    assert row(pcam_dir, found(100, 101, steady=False))["status"] == "unsteady"
    with pytest.raises(BadInput, match="ended after 3 batches"):
        bench.measure(itertools.islice(ticks(0.0), 3), 1.0, NO_WAIT, is_endless=False)


def test_a_cold_file_has_no_warm_up_and_is_steady_by_its_halves(ticks):
    even = bench.measure(itertools.islice(ticks(0.01), 21), 9.0, NO_WAIT, is_endless=False)
    falling = bench.measure(
        itertools.islice(ticks(*[0.02] * 10, 0.01), 21), 9.0, NO_WAIT, is_endless=False
    )
    assert (
        len(even["samples"]) == 20
        and even["warmup_batches"] == 1
        and even["steady"]
        and not falling["steady"]
    )


@pytest.mark.parametrize("num", [6, 9, 15])
def test_the_interval_holds_the_median_as_often_as_it_promises(num):
    draw = random.Random(num)
    held = 0
    for _ in range(4000):
        low, high = bench.median_interval([draw.expovariate(1) for _ in range(num)])
        held += low <= math.log(2) <= high
    assert 0.94 < held / 4000 < 0.99
    assert bench.median_interval([3, 1, 2]) == (1, 3)
    assert bench.median_interval(range(15)) == (3, 11), "David and Nagaraja 2003: 96.5%"


def test_a_row_has_all_that_defends_its_number(pcam_dir):
    each = row(pcam_dir, found(100, 110, 90, 105, 95, 101))
    assert tuple(each) == bench.COLUMNS and each["status"] == "ok" and each["note"] == ""
    assert each["images_per_s"] == pytest.approx(100.5) and (
        each["low"],
        each["high"],
    ) == pytest.approx((90, 110))
    assert (
        each["p50_s"] < each["p90_s"] <= each["p99_s"] <= 8 / 90 + 1e-9 and each["num_repeats"] == 6
    )
    assert {name: each[name] for name in JOB} == JOB
    one = row(pcam_dir, found(100))
    assert one["low"] is None and one["images_per_s"] == pytest.approx(100), (
        "one repeat has no interval"
    )
    assert "holds the median with 75.0%" in row(pcam_dir, found(100, 101, 102))["note"]
    assert "harness itself" in row(pcam_dir, found(100, 101, overhead_s=0.01))["note"]


@pytest.mark.parametrize("share", ["others_share", "stolen_share", "throttled_share"])
def test_a_repeat_that_others_disturbed_marks_its_row(pcam_dir, share):
    each = row(pcam_dir, [*found(100, 101, 102, 103, 104), *found(100, **{share: 0.2})])
    assert each["status"] == "noisy" and "20% of the cores" in each["note"] and each["images_per_s"]


def test_what_failed_once_is_no_number(pcam_dir):
    each = row(
        pcam_dir, [*found(100, 101), {"status": "out of memory", "note": "512 images"} | QUIET]
    )
    assert each["status"] == "out of memory" and each["note"] == "512 images"
    assert not any(
        each[name]
        for name in ("images_per_s", "low", "high", "p50_s", "share_of_peak", "memory_bytes")
    )


def test_factors_are_against_the_smallest_batch_and_shares_against_this_machines_limits(pcam_dir):
    results = {}
    for size, rate in ((8, 100), (1, 50), (16, None)):
        case = dataclasses.replace(
            case_of(pcam_dir, "train", what="train", size=size), name="default"
        )
        failed = [{"status": "out of memory", "note": ""} | QUIET]
        results[case] = found(rate, rate, size=size, flops_per_image=1e6) if rate else failed
    results[case_of(pcam_dir, "matrix_product", what="limit")] = found(4e8, 4e8)
    results[case_of(pcam_dir, "memory_copy", what="limit")] = found(1000, 1000)
    results[case_of(pcam_dir, "raw")] = found(250, 250)
    rows = {(each["case"], each["batch_size"]): each for each in bench.build_rows(results, JOB)}
    assert [rows["default", size]["factor"] for size in (1, 8, 16)] == [1, pytest.approx(2), None]
    assert rows["default", 8]["share_of_peak"] == pytest.approx(100 * 1e6 / 4e8)
    assert rows["raw", 8]["share_of_peak"] == pytest.approx(0.25)
    assert (
        rows["matrix_product", 8]["flops_per_s"] == pytest.approx(4e8)
        and not rows["matrix_product", 8]["images_per_s"]
    )


@pytest.fixture
def burners():
    """As many processes as there are cores, each of which keeps one busy."""
    busy = [
        subprocess.Popen([sys.executable, "-c", "while True: pass"])
        for _ in os.sched_getaffinity(0)
    ]
    time.sleep(0.5)
    yield
    for each in busy:
        each.kill()
        each.wait()


@pytest.mark.usefixtures("burners")
def test_load_by_others_is_seen_and_a_busy_machine_is_refused(pcam_dir, tmp_path, capsys):
    before = bench.read_load()
    time.sleep(1)
    assert bench.load_between(before, bench.read_load())["others_share"] > 0.5
    quick = ["--cases", "memory_copy", "--seconds", "0.01", "--repeats", "1"]
    code = benchmark.main(
        ["loader", "--data", str(pcam_dir), "--out", str(tmp_path / "out"), *quick]
    )
    assert (
        code == 2
        and "too busy to measure: others use" in capsys.readouterr().err
        and not (tmp_path / "out").exists()
    )


def test_what_the_process_itself_computes_is_no_load_by_others():
    before, until = bench.read_load(), time.process_time() + 0.5
    while time.process_time() < until:
        pass
    load = bench.read_load()
    assert load["own"] - before["own"] >= 0.5 and load["busy"] - before["busy"] >= 0.4
    limits = control_group_limits()
    assert all(limit is None or limit > 0 for limit in limits.values())


def test_a_child_that_dies_is_a_row_with_its_reason(pcam_dir, tmp_path, monkeypatch):
    case = case_of(pcam_dir, "raw")
    deaths = {
        "import os; os.kill(os.getpid(), 9)": "killed by SIGKILL",
        "raise SystemExit('no\\nluck')": "exit 1: luck",
    }
    for code, words in deaths.items():
        monkeypatch.setattr(bench, "CHILD", [sys.executable, "-c", code])
        monkeypatch.setattr(bench, "num_oom_kills", lambda: 0)
        died = bench.run_case(case, 0.1, 0, tmp_path)
        assert died["status"] == "error" and words in died["note"]
    monkeypatch.setattr(bench, "num_oom_kills", iter(range(9)).__next__)
    assert bench.run_case(case, 0.1, 0, tmp_path)["status"] == "out of memory", (
        "the kernel says why"
    )
    monkeypatch.setattr(bench, "CHILD", [sys.executable, "-c", "import time; time.sleep(60)"])
    monkeypatch.setattr(bench, "MOST_S", 0.5)
    assert "no result within" in bench.run_case(case, 0.1, 0, tmp_path)["note"]


# what is timed


@pytest.mark.parametrize("kind", [kind for kind in cases.TIMED if kind != "copy_to_device"])
def test_every_case_says_how_many_images_a_batch_held(kind, pcam_dir):
    stream, about, parts = start(
        case_of(pcam_dir, kind, cache="cold" if kind == "read" else "warm")
    )
    held = [next(stream) for _ in range(3)]
    assert held == [2 * cases.MATRIX_SIDE**3 if kind == "matrix_product" else 8] * 3
    if kind in ("raw", "ready", "infer", "train", "apart", "read"):
        assert about["residence"] in ("host", "disk")
    assert set(parts) == (
        {"gather", "transfer", "forward", "backward", "optimiser", "logging"}
        if kind == "apart"
        else set()
    )
    stream.close()


def test_training_is_timed_on_the_very_step_and_inference_on_the_very_prediction(
    pcam_dir, monkeypatch
):
    calls = []
    step, predict, predict_blocks = (
        training.training_step,
        cases.predict_batch,
        cases.predict_blocks,
    )
    monkeypatch.setattr(
        training, "training_step", lambda *given: calls.append("step") or step(*given)
    )
    monkeypatch.setattr(
        cases, "predict_batch", lambda *given: calls.append("predict") or predict(*given)
    )
    monkeypatch.setattr(
        cases, "predict_blocks", lambda *given: calls.append("blocks") or predict_blocks(*given)
    )
    stream, _, _ = start(case_of(pcam_dir, "end_to_end"))
    next(stream), next(stream)
    assert calls == ["blocks"]
    calls.clear()
    stream.close()
    for kind, calls_a_batch in (("train", ["step"]), ("apart", ["step"]), ("infer", ["predict"])):
        stream, _, _ = start(case_of(pcam_dir, kind))
        next(stream), next(stream)
        assert calls == calls_a_batch * 2
        calls.clear()
        stream.close()


def test_flops_are_those_of_the_batch(pcam_dir):
    stream, _, _ = start(case_of(pcam_dir, "infer", "model=mlp", "mlp_hidden=7"))
    assert cases.count_flops(stream, False) == 2 * (96 * 96 * 3 * 7 + 7)
    step, _, _ = start(case_of(pcam_dir, "train", "model=mlp", "mlp_hidden=7", "optimizer=sgd"))
    assert cases.count_flops(step, False) == 2 * 2 * (96 * 96 * 3 * 7 + 7) + 2 * 7, (
        "no gradient for the pixels"
    )


def test_the_plain_way_gives_the_equal_product(pcam_dir):
    """Without augmentation, which both draw for themselves, the batches are the same to the last
    bits of float32.
    """
    for kind in ("ready", "torchvision"):
        case = case_of(pcam_dir, kind, *PLAIN, order="sequential")
        assert case.cfg.precision == "fp32"
    theirs = next(cases.torchvision_batches(case))[0]
    stream = cases.open_batches(dataclasses.replace(case, kind="ready"), CPU, {})
    batch = next(stream)
    ours = cases.model_input(batch.images, cases.draw_augmentation(batch.keys, 0, case.cfg))
    assert ours.shape == theirs.shape == (8, 3, 96, 96) and ours.dtype == theirs.dtype
    assert torch.allclose(ours, theirs, atol=1e-5)
    moved = case_of(pcam_dir, "torchvision", order="sequential")
    assert not torch.allclose(next(cases.torchvision_batches(moved))[0], theirs, atol=0.01), (
        "it augments when it is asked to"
    )
    with pytest.raises(BadInput, match="less than a batch of 161"):
        next(cases.torchvision_batches(case_of(pcam_dir, "torchvision", size=161)))


def test_random_order_is_random_and_a_cold_file_is_read_once(pcam_dir):
    def keys(**flags):
        case = case_of(pcam_dir, "raw", "data_residence=disk", **flags)
        stream = cases.open_batches(case, CPU, {})
        return torch.cat([batch.keys for batch in itertools.islice(stream, 45)])

    assert keys(order="sequential")[:160].tolist() == list(range(160)), "and then from the start"
    random_order = keys()
    assert (
        random_order[:160].sort().values.tolist() == list(range(160))
        and len(random_order) == 45 * 8
    )
    assert (random_order[1:160] - random_order[:159]).abs().float().mean() > 20
    assert len(keys(cache="cold")) == 160


def test_cold_and_warm_are_told_apart_by_the_pages(pcam_dir, monkeypatch):
    path = split_path(pcam_dir, "train", "x")
    for _ in range(2):
        assert (
            cases.prepare_pages(path, "cold") == {}
            and cases.resident_share(path) < cases.COLD_SHARE
        )
        assert (
            cases.prepare_pages(path, "warm") == {}
            and cases.resident_share(path) >= cases.WARM_SHARE
        )
    monkeypatch.setattr(os, "posix_fadvise", lambda *_: None)  # a file system that does not heed it
    with pytest.raises(BadInput, match="cannot be made cold: (9[0-9]|100)% of it stays"):
        cases.prepare_pages(path, "cold")


def test_bytes_read_from_the_file_are_those_of_the_patches(pcam_dir, monkeypatch):
    patches, seen, read = open_split(pcam_dir, "train").images.read(range(160)), [], os.preadv

    def watched(fd, buffers, offset):
        count = read(fd, buffers, offset)
        seen.append(bytes(buffers[0].reshape(-1))[:count])
        return count

    monkeypatch.setattr(os, "preadv", watched)
    for order in ("random", "sequential"):
        case = case_of(pcam_dir, "read", cache="cold", order=order)
        stream, _, _ = start(case)
        assert next(stream) == 8
        assert b"".join(seen) == patches[cases.order_of(case, 160)[:8].numpy()].tobytes()
        seen.clear()


def test_variants_differ_in_what_they_are_named_after(pcam_dir):
    planned, probed = cases.plan_cases("all", config(pcam_dir, batch_size=8), [1, 8], CPU, [])
    assert len(planned) == len(set(planned)) and len(
        {tuple(vars(each).values()) for each in planned}
    ) == len(planned)
    assert [len(each) for each in probed] == [num_cores() + 1]
    for verb in ("infer", "train"):
        of_verb = [each for each in planned if each.what == verb]
        scaled = [
            (each.cfg.model, each.cfg.batch_size) for each in of_verb if each.name == "default"
        ]
        assert scaled == [("p4m", 1), ("p4m", 8), ("resnet18", 1), ("resnet18", 8)]
        default = next(
            each for each in of_verb if each.name == "default" and each.cfg.batch_size == 8
        )
        changes = {
            "bf16": "precision",
            "not_deterministic": "deterministic",
            "all_cores": "threads",
        }
        for each in of_verb:
            if each.name in changes:
                value = getattr(each.cfg, changes[each.name])
                assert (
                    dataclasses.replace(default.cfg, **{changes[each.name]: value})
                    == each.cfg
                    != default.cfg
                )
        assert {each.name for each in of_verb} >= {"nchw", "compile", "bf16", "not_deterministic"}
    assert not next(each for each in planned if each.name == "nchw").channels_last
    limits = {
        (each.cfg.precision, each.cfg.threads) for each in planned if each.name == "matrix_product"
    }
    assert limits == {
        (each.cfg.precision, each.cfg.threads)
        for each in planned
        if each.kind in ("infer", "train")
    }
    with pytest.raises(BadInput, match="no such case, did you mean 'nchw'"):
        cases.plan_cases("infer", config(pcam_dir), [8], CPU, ["nwch"])


def test_memory_formats_and_precisions_are_what_the_model_computes_in(pcam_dir):
    for channels_last, memory_format in (
        (True, torch.channels_last),
        (False, torch.contiguous_format),
    ):
        case = case_of(pcam_dir, "infer", channels_last=channels_last)
        seen, model = [], cases.alter(build_model(case.cfg).eval(), case)
        for module in model.modules():
            if type(module).__name__ == "GroupConv":
                module.register_forward_hook(lambda _, __, out, seen=seen: seen.append(out))
        predict_batch(model, torch.zeros(4, 96, 96, 3, dtype=torch.uint8), "bf16", 1, PREPROCESSING)
        assert seen and all(out.is_contiguous(memory_format=memory_format) for out in seen)
        assert all(out.dtype == torch.bfloat16 for out in seen)
    with layer_precision(CPU, "fp16"):
        assert torch.nn.Linear(4, 4)(torch.ones(1, 4)).dtype == torch.float16


# the whole script


@pytest.fixture
def in_process(monkeypatch):
    """Repeats in this process, so that a test can slow down what they time."""

    def run_case(case, seconds, repeat, _cache):
        task = {
            "case": dataclasses.asdict(case),
            "seconds": seconds,
            "repeat": repeat,
            "started_at": time.time(),
        }
        return cases.time_case(json.loads(json.dumps(task))) | QUIET

    monkeypatch.setattr(bench, "run_case", run_case)


def run_benchmark(out, data, what, *arguments, repeats=1):
    quick = [
        "--seconds",
        "0.05",
        "--repeats",
        str(repeats),
        "--batch-sizes",
        "8",
        "--allow-noise",
        *QUICK[2:],
    ]
    return benchmark.main([what, "--data", str(data), "--out", str(out), *quick, *arguments])


def test_what_was_measured_is_kept_when_interrupted_in_the_first_round(
    pcam_dir, tmp_path, monkeypatch
):
    measured = {
        "amount": 8.0,
        "samples": [0.1] * 20,
        "first_batch_s": 1.0,
        "warmup_batches": 2,
        "steady": True,
    }
    measured |= {
        "overhead_s": 0.0,
        "startup_s": 1.0,
        "memory_bytes": 1,
        "partition": "none",
        "host_load": 0.0,
    } | QUIET
    answers = iter([measured])

    def run_case(*_):
        if (answer := next(answers, None)) is None:
            raise KeyboardInterrupt
        return answer

    monkeypatch.setattr(bench, "run_case", run_case)
    assert (
        run_benchmark(tmp_path / "out", pcam_dir, "loader", "--cases", "raw,ready", repeats=3)
        == 130
    )
    (row,) = read_json(tmp_path / "out" / "benchmark.json")["rows"]
    assert row["num_repeats"] == 1 and row["images_per_s"] == pytest.approx(4.0)


STAGES = "apart,overlapped,read,memory_copy,sequential_read,matrix_product"


@pytest.mark.usefixtures("in_process")
@pytest.mark.parametrize("slowed", ["loader", "model"])
def test_the_verdict_names_what_was_slowed(slowed, pcam_dir, tmp_path, monkeypatch):
    gather, forward = (
        batches.PatchSource.gather,
        cases.build_model(config(pcam_dir)).forward.__func__,
    )

    def slow(function):
        return lambda *given: time.sleep(0.2) or function(*given)

    if slowed == "loader":
        monkeypatch.setattr(batches.PatchSource, "gather", slow(gather))
    else:
        monkeypatch.setattr("lib.centrenet.CentreNet.forward", slow(forward))
    for residence in ("host", "disk"):
        assert (
            run_benchmark(
                tmp_path, pcam_dir, "train", "--cases", STAGES, f"data_residence={residence}"
            )
            == 0
        )
        judged = read_json(tmp_path / "benchmark.json")["verdict"]
        assert [judged[epoch]["bottleneck"] for epoch in ("first_epoch", "later_epochs")] == [
            slowed
        ] * 2
        later = judged["later_epochs"]
        slept_s = later["stage_s"][{"loader": "gather", "model": "forward"}[slowed]]
        assert 0.19 < slept_s < 0.4, (
            "a sleep is at least as long as was asked for; the rest is the machine's"
        )
        assert later["overlapped_s"] > 0.19 and verdict.NAMES[slowed] in judged["sentence"]
        assert "times that" in judged["sentence"] and later["limit_s"] < later["overlapped_s"]
        if residence == "host":
            rows = {
                each["case"]: each
                for each in read_json(tmp_path / "benchmark.json")["rows"]
                if each["what"] == "stage"
            }
            parts = sum(
                rows[name]["batch_size"] / rows[name]["images_per_s"] for name in later["stage_s"]
            )
            assert parts == pytest.approx(8 / rows["apart"]["images_per_s"], rel=0.02), (
                "stages leave nothing out"
            )


def stage_rows(gpu="none", residence="disk", **seconds):
    """Rows of stages that take so long a batch of 64, and of the limits."""
    common = {
        "batch_size": 64,
        "gpu": gpu,
        "residence": residence,
        "precision": "bf16",
        "threads": 2,
        "flops_per_s": None,
    }
    common |= {"flops_per_image": 1e6}
    rows = [
        common | {"what": "stage", "case": name, "images_per_s": 64 / second}
        for name, second in seconds.items()
    ]
    limits = {"memory_copy": 1e6, "sequential_read": 2e5, "copy_to_device": 5e5}
    rows += [
        common | {"what": "limit", "case": name, "images_per_s": rate}
        for name, rate in limits.items()
    ]
    return [
        *rows,
        common
        | {
            "what": "limit",
            "case": "matrix_product",
            "images_per_s": None,
            "flops_per_s": 1e11,
        },
    ]


STEP = {
    "transfer": 2.0,
    "forward": 3.0,
    "backward": 6.0,
    "optimiser": 1.0,
    "logging": 0.1,
    "gather": 0.5,
    "read": 1.0,
}


@pytest.mark.parametrize(
    "changes, first, later, limit",
    [
        ({}, "model", "model", 1e5),
        ({"read": 20.0}, "disk", "model", 1e5),
        ({"gather": 13.0}, "loader", "loader", 1e6),
        ({"transfer": 11.0}, "transfer", "transfer", 5e5),
        ({"logging": 11.0}, "logging", "logging", None),
        # background threads: read and gather together outlast the model, though each is shorter
        ({"read": 7.0, "gather": 6.0}, "disk", "model", 1e5),
        # on a CPU without a background thread
        ({"gather": 11.0, "residence": "host"}, "loader", "loader", 1e6),
        ({"read": 11.0, "residence": "host"}, "disk", "model", 1e5),
        (
            {"gather": 8.0, "transfer": 7.0, "gpu": "H100", "residence": "host"},
            "loader",
            "loader",
            1e6,
        ),
        (
            {"gather": 0.1, "transfer": 7.0, "gpu": "H100", "residence": "host"},
            "model",
            "model",
            1e5,
        ),
        (
            {"gather": 4.0, "transfer": 1.0, "read": 6.0, "gpu": "H100", "residence": "host"},
            "model",
            "model",
            1e5,
        ),
    ],
)
def test_the_bottleneck_is_the_largest_part_of_what_a_batch_waits_for(changes, first, later, limit):
    judged = verdict.judge(stage_rows(**STEP | {"overlapped": 12.5} | changes))
    assert (judged["first_epoch"]["bottleneck"], judged["later_epochs"]["bottleneck"]) == (
        first,
        later,
    )
    assert judged["later_epochs"]["limit_s"] == (limit and pytest.approx(64 / limit))
    told = judged["sentence"].split("From memory, ")
    assert told[0].count(verdict.NAMES[first]) == 1 and told[1].startswith(verdict.NAMES[later])


def test_the_limit_of_a_disk_is_its_faster_way():
    rows = stage_rows(**STEP | {"read": 20.0, "overlapped": 20.0})
    first = verdict.judge(rows)["first_epoch"]
    assert (first["limit"], first["limit_s"]) == ("sequential read", pytest.approx(64 / 2e5))
    next(each for each in rows if each["case"] == "sequential_read")["images_per_s"] = 1.0
    first = verdict.judge(rows)["first_epoch"]
    assert (first["limit"], first["limit_s"]) == ("read", pytest.approx(20.0))


def test_a_verdict_needs_its_stages_and_says_where_they_do_not_explain_the_pipeline():
    rows = stage_rows(**{name: second for name, second in STEP.items() if name != "backward"})
    judged = verdict.judge(rows)
    assert (
        judged.keys() == {"sentence"}
        and "No verdict: the stage backward has no number" in judged["sentence"]
    )
    explained, unexplained = (
        verdict.judge(stage_rows(**STEP, overlapped=second))["sentence"] for second in (12.2, 20.0)
    )
    assert (
        "3 images/s, where the stages alone predict 5;" in unexplained
        and "predict" not in explained
    )


@pytest.mark.slow
def test_a_benchmark_through_real_processes(pcam_dir, tmp_path):
    """Two sizes, one of which needs more memory than the process may have."""
    out, room = tmp_path / "out", address_space_needed() + (2 << 30)
    arguments = [
        "infer",
        "--data",
        pcam_dir,
        "--out",
        out,
        "--cases",
        "default",
        "--batch-sizes",
        "4,200000",
        "--seconds",
        "0.05",
    ]
    arguments += [
        "--repeats",
        "2",
        "--allow-noise",
        "model=resnet18",
        "precision=fp32",
        "threads=1",
    ]
    limit = {"preexec_fn": lambda: resource.setrlimit(resource.RLIMIT_AS, (room, room))}
    result = run_script("benchmark.py", *arguments, check=0, **limit)
    small, large = result.json["rows"]
    assert (small["batch_size"], large["batch_size"]) == (4, 200_000) and small["status"] in (
        "ok",
        "noisy",
        "unsteady",
    )
    assert (
        large["status"] == "out of memory"
        and not large["images_per_s"]
        and large["num_repeats"] == 1
        and large["note"]
    )
    assert small["low"] <= small["images_per_s"] <= small["high"] and small["flops_per_image"] > 1e8
    assert small["startup_s"] > 0.1 and 5e7 < small["memory_bytes"] < 2**34
    table = read_csv(out / "rows.csv")
    assert [each["status"] for each in table] == [small["status"], "out of memory"] and tuple(
        table[0]
    ) == bench.COLUMNS
    assert (
        float(table[0]["images_per_s"]) == small["images_per_s"] and table[1]["images_per_s"] == ""
    )
    with gzip.open(out / "samples.json.gz") as file:
        samples = json.load(file)
    assert sum(map(len, samples[0]["samples"])) == small["num_batches"] and samples[1][
        "samples"
    ] == [None]
    page = (out / "benchmark.md").read_text()
    assert (
        "## Scaling: infer, resnet18" in page
        and "out of memory" in page
        and "not measured: there is no GPU" in page
    )
    assert (out / "scaling.png").read_bytes().startswith(b"\x89PNG")
    assert read_json(out / "benchmark.json")["machine"]["num_cores"]


@pytest.mark.slow
def test_a_benchmark_computes_with_the_cores_that_it_was_given(pcam_dir, tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", "1")
    arguments = [
        "infer",
        "--data",
        pcam_dir,
        "--out",
        tmp_path / "out",
        "--cases",
        "default",
        "--batch-sizes",
        "4",
    ]
    arguments += ["--seconds", "0.01", "--repeats", "1", "--allow-noise", "model=resnet18"]
    (row,) = run_script("benchmark.py", *arguments, check=0).json["rows"]
    assert row["threads"] == 1 and row["images_per_s"]


def address_space_needed() -> int:
    """What the program takes of address space before it measures anything."""
    code = (
        "import lib.benchmark.cases, lib.benchmark.page;"
        " print(open('/proc/self/status').read().split('VmPeak:')[1].split()[0])"
    )
    command = [sys.executable, "-c", code]
    result = subprocess.run(
        command,
        capture_output=True,
        text=True,
        cwd=REPOSITORY,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    return int(result.stdout) * 1024


@pytest.mark.usefixtures("in_process")
def test_torchvisions_best_number_of_workers_is_looked_for_and_measured_anew(
    pcam_dir, tmp_path, capsys
):
    assert (
        run_benchmark(
            tmp_path, pcam_dir, "loader", "--cases", "torchvision,ready,raw,memory_copy", repeats=2
        )
        == 0
    )
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    tried = [
        each
        for each in result["rows"]
        if each["case"].startswith("torchvision") and each["cache"] == "warm"
    ]
    numbers = range(len(os.sched_getaffinity(0)) + 1)
    assert sorted(each["case"] for each in tried) == [
        f"torchvision_{num}_workers" for num in numbers
    ]
    best = next(each for each in tried if each["num_repeats"] == 2)
    assert result["torchvision_images_per_s"] == best["images_per_s"]
    assert (
        result["ratio"] == result["images_per_s"] / best["images_per_s"] and result["ratio_raw"] > 0
    )
    cold = next(
        each for each in result["rows"] if each["case"] == best["case"] and each["cache"] == "cold"
    )
    assert cold["images_per_s"] or cold["status"] == "error"
    shown = (tmp_path / "benchmark.md").read_text()
    assert "x torchvision" in shown and "## Loader" in shown


# two benchmarks


def written(folder, *changes, num_repeats: int = 6) -> str:
    """A benchmark of a few rows, changed."""
    common = dict.fromkeys(bench.COLUMNS) | {
        "what": "train",
        "case": "default",
        "model": "p4m",
        "cache": "warm",
    }
    common |= {"status": "ok", "num_repeats": num_repeats}
    sizes = {1: 50.0, 8: 100.0, 64: 300.0}
    rows = [
        common | {"batch_size": size, "images_per_s": r, "low": 0.98 * r, "high": 1.02 * r}
        for size, r in sizes.items()
    ]
    for each, change in zip(rows, changes, strict=False):
        rate = change if change is None else each["images_per_s"] * change
        each |= {"images_per_s": rate, "low": rate and 0.98 * rate, "high": rate and 1.02 * rate}
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
    ],
)
def test_compare_says_whether_a_difference_exceeds_the_noise(
    changes, code, words, tmp_path, capsys
):
    before, after = written(tmp_path / "a"), written(tmp_path / "b", *changes)
    assert benchmark.main(["compare", before, f"{after}/benchmark.json"]) == code
    told = capsys.readouterr()
    lines = told.err.splitlines()
    assert all(word in line for word, line in zip(words, lines[1:], strict=False)), told.err
    result = json.loads(told.out)
    assert result["num_compared"] == 3 and result["num_slower"] == words.count("slower")
    assert result["num_exceeding"] == words.count("slower") + words.count("faster")


def test_two_repeats_a_side_tell_no_difference(tmp_path, capsys):
    """Chance alone sets one pair in three apart."""
    before, after = (
        written(tmp_path / name, change, num_repeats=2) for name, change in (("a", 1.0), ("b", 0.5))
    )
    assert benchmark.main(["compare", before, after]) == 0
    result = json.loads(capsys.readouterr().out)
    assert (
        result["num_compared"] == 3
        and result["num_exceeding"] == 0
        and {row["exceeds"] for row in result["rows"]} == {None}
    )


def test_a_stage_that_fails_later_is_a_row_without_a_number():
    case = bench.Case("stage", "apart", "apart", load_config(REPOSITORY / "config.yaml"))
    found = {
        "samples": [0.1] * 3,
        "parts": {"gather": [0.1] * 3},
        "amount": 3,
        "steady": True,
        "overhead_s": 0.0,
    }
    rows = bench.build_rows({case: [found, {"status": bench.OUT_OF_MEMORY, "note": "killed"}]}, {})
    assert [row["case"] for row in rows] == ["gather", "apart"]
    assert all(row["status"] == bench.OUT_OF_MEMORY and row["images_per_s"] is None for row in rows)


def test_chance_alone_rarely_makes_a_difference():
    """Repeats of one distribution: two medians differ by more than the noise in about 2 of 924
    comparisons.
    """
    draw, num_exceeding = random.Random(0), 0

    def drawn():
        rates = sorted(draw.lognormvariate(5, 0.3) for _ in range(6))
        low, high = bench.median_interval(rates)
        told = {
            "images_per_s": statistics.median(rates),
            "low": low,
            "high": high,
            "num_repeats": len(rates),
        }
        return dict.fromkeys(bench.COLUMNS) | told

    for _ in range(5000):
        num_exceeding += verdict.compare_rows([drawn()], [drawn()])[0]["exceeds"]
    assert 2 <= num_exceeding <= 22


# what cannot be measured


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["loader", "--data", "nowhere"], "no folder nowhere"),
        (["loader", "--batch-sizes", "8,x"], "must be integers"),
        (["train", "--batch-sizes", "0"], "batch sizes must be 1 or more"),
        (["train", "--seconds", "0"], "seconds above 0"),
        (["train", "--seconds", "nan"], "seconds above 0"),
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
    more = (
        []
        if "--data" in arguments or arguments[0] == "compare"
        else ["--data", str(pcam_dir), "--allow-noise"]
    )
    assert benchmark.main([*arguments, *more]) == 2
    told = capsys.readouterr()
    assert words in told.err and told.err.count("error: ") == 1 and "exit" in json.loads(told.out)
    assert not (tmp_path / "bench").exists()


def test_two_benchmarks_without_a_common_row_are_refused(tmp_path, capsys):
    (tmp_path / "b").mkdir()
    before = written(tmp_path / "a")
    for content, words in (
        ({"rows": []}, "no row in common"),
        ({"rows": [{}]}, "is no benchmark"),
        ({}, "is no benchmark"),
    ):
        write_json(tmp_path / "b/benchmark.json", content)
        assert (
            benchmark.main(["compare", before, str(tmp_path / "b")]) == 2
            and words in capsys.readouterr().err
        )


def test_rows_csv_is_what_a_spreadsheet_reads(pcam_dir, tmp_path):
    from lib.benchmark.page import write_benchmark

    machine = {
        "host": "h",
        "cpu": "c",
        "num_cores": 2,
        "system": "s",
        "cgroup_cpus": None,
        "cgroup_memory_bytes": None,
    }
    machine |= {
        "gpu": "NVIDIA A100 MIG 1g.5gb",
        "mig": True,
        "gpu_memory_bytes": 2**32,
        "num_multiprocessors": 14,
    }
    machine |= {"driver": "550", "cuda": "12.8", "cudnn": 9}
    results = {
        case_of(pcam_dir, "train", what="train"): found(100, 101),
        case_of(pcam_dir, "raw"): found(5, 6, note="a|b, c"),
    }
    rows = bench.build_rows(results, JOB)
    result = {
        "rows": rows,
        "verdict": verdict.judge(rows),
        "machine": machine,
        "data": "d",
        "repeats": 2,
        "seconds": 1.0,
    }
    write_benchmark(tmp_path, result, bench.samples_of(results))
    with open(tmp_path / "rows.csv", newline="") as file:
        assert [line["note"][:6] for line in csv.DictReader(file)][1] == "a|b, c"
    page = (tmp_path / "benchmark.md").read_text()
    assert (
        "a\\|b, c" in page
        and "NVIDIA A100 MIG 1g.5gb (a MIG slice, 4,096 MiB, 14 multiprocessors, driver 550" in page
    )
    assert "not measured" not in page
