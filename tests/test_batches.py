"""Batches: the same whoever loads them and from wherever, in an order that is a function of (seed,
epoch).
"""

import threading
import time

import h5py
import numpy as np
import pytest
import torch
from conftest import draw_patches

from lib import batches
from lib.batches import (
    PatchSource,
    Rows,
    choose_residence,
    epoch_order,
    fit_batch_size,
    load_batches,
    select_rows,
)
from lib.command import BadInput
from lib.config import load_config
from lib.pcam import Images, Split, open_images, open_split

CPU = torch.device("cpu")
PATCHES, LABELS = draw_patches(60, 11)
TEN = np.arange(10) % 2


def split_of(labels, slides=None, name="train") -> Split:
    labels = np.asarray(labels, np.uint8)
    return Split(name, Images("x.h5", len(labels), None, ""), labels, slides)


def configure(*overrides):
    return load_config(overrides=overrides)


def order_of(labels, epoch=0, *overrides) -> np.ndarray:
    rows = Rows(np.arange(len(labels)), np.asarray(labels, np.uint8), {})
    return epoch_order(rows, len(labels), epoch, configure(*overrides)).numpy()


@pytest.fixture
def quarantine(tmp_path):
    """Write a quarantine.csv; gives the override that names it."""

    def write(*lines, header="split,index,reason,score"):
        (tmp_path / "quarantine.csv").write_text("\n".join([header, *lines]))
        return f"quarantine={tmp_path / 'quarantine.csv'}"

    return write


LAYOUTS = [{}, {"chunks": (8, 96, 96, 3), "compression": "gzip"}]


@pytest.mark.parametrize("residence", ["disk", "host", "device", "auto"])
@pytest.mark.parametrize("options", LAYOUTS)
def test_every_residence_and_layout_gives_what_was_asked_for(tmp_path, residence, options):
    with h5py.File(tmp_path / "x.h5", "w") as file:
        file.create_dataset("x", data=PATCHES, **options)
    source = PatchSource(open_images(tmp_path / "x.h5"), residence, CPU)
    order = torch.randperm(60)
    order[:5] = order[5]
    all_keys = (order + 60 * (torch.arange(60) % 3)).split(17)  # with the repeats of a sampler
    for prefetch in (True, False):
        loaded = load_batches(source, LABELS, all_keys, prefetch)
        for batch, keys in zip(loaded, all_keys, strict=True):
            rows = (keys % 60).numpy()
            assert torch.equal(batch.keys, keys) and np.array_equal(batch.images, PATCHES[rows])
            assert batch.labels.dtype == torch.float32 and batch.labels.tolist() == [*LABELS[rows]]
        assert list(load_batches(source, LABELS, [], prefetch)) == []


def test_a_slow_readers_batch_is_never_overwritten(pcam_dir):
    split = open_split(pcam_dir, "train")
    source = PatchSource(split.images, "disk", CPU)
    for batch in load_batches(source, split.labels, torch.arange(160).split(8)):
        before = batch.images.clone()
        time.sleep(0.005)  # by now the thread has filled every buffer that it may
        assert torch.equal(batch.images, before)


class CountingSource:
    """A source that counts what was gathered and fails at the 20th batch."""

    residence = "disk"
    device = CPU
    num_gathered = 0

    def __len__(self):
        return 60

    def gather(self, _rows, out):
        self.num_gathered += 1
        if self.num_gathered == 20:
            raise BadInput("patch data cannot be decoded")
        return out


def has_thread() -> bool:
    return any(thread.name.startswith("prefetch") for thread in threading.enumerate())


def test_leaving_early_or_an_error_leaves_no_thread_and_reads_no_further_than_the_buffers():
    source = CountingSource()
    loaded = load_batches(source, LABELS, torch.arange(60).split(1), prefetch=True)
    for _ in range(6):
        next(loaded)
    assert has_thread()
    loaded.close()
    assert not has_thread() and source.num_gathered <= 6 + batches.NUM_BUFFERS
    loaded = load_batches(source, LABELS, torch.arange(60).split(1), prefetch=True)
    with pytest.raises(BadInput, match="cannot be decoded"):
        list(loaded)
    assert not has_thread()


@pytest.mark.parametrize("balance", ["none", "sampler"])
def test_an_epoch_is_a_permutation_that_differs_between_epochs_and_seeds(balance):
    labels = np.arange(1000) >= 500
    balance = f"balance={balance}"
    first = order_of(labels, 0, balance)
    for other in (order_of(labels, 1, balance), order_of(labels, 0, balance, "seed=2")):
        assert sorted(other) == sorted(first) == list(range(1000))
        assert (first == other).sum() < 10
    assert np.array_equal(first, order_of(labels, 0, balance, "batch_size=8"))
    num_positive = labels[first].reshape(10, 100).sum(1)
    assert np.abs(num_positive - 50).max() < 25, "a file sorted by class comes up mixed"


def test_the_sampler_balances_5_to_1_and_gives_every_repeat_a_key_of_its_own():
    labels = np.arange(1201) % 6 == 0
    keys = order_of(labels, 0, "balance=sampler")
    others = order_of(labels, 1, "balance=sampler")
    rows = keys % 1201
    assert np.bincount(labels[rows]).tolist() == [600, 600] and len(set(keys)) == 1200
    times = np.bincount(rows, minlength=1201)
    assert set(times[labels]) <= {2, 3}, "copies differ by one at most"
    assert set(times[~labels]) <= {0, 1}
    assert set(rows) != set(others % 1201), "the larger class takes turns"


def test_quarantined_rows_are_left_out_of_training_and_counted_by_reason(quarantine):
    lines = ["3,nan,1", "3,black,1", "5,black,1", "7,label,0.9", "0,nan,2"]
    listed = quarantine("valid,6,nan,1", *(f"train,{line}" for line in lines))
    rows = select_rows(split_of(TEN), configure(listed))
    assert rows.index.tolist() == [1, 2, 4, 6, 7, 8, 9]
    counts = {"num": 7, "num_negative": 4, "num_positive": 3, "left_out": {"nan": 2, "black": 1}}
    assert rows.describe() == counts
    labels_only = select_rows(split_of(TEN), configure(listed, "quarantine_reasons=label"))
    assert labels_only.left_out == {"label": 1}
    held_out = select_rows(split_of(TEN, name="valid"), configure(listed), held_out=True)
    assert len(held_out) == 10 and held_out.left_out == {}, "validation stays comparable"


@pytest.mark.parametrize(
    "lines, words",
    [
        (["train,10,nan,1"], "row '10' of split train, which has 10"),
        (["valid,1,nan,1", "train,-1,nan,1"], "row '-1'"),
        (["train,1,nan", "train,2,nan,1"], "row 2"),
        ([f"train,{row},nan,1" for row in range(0, 10, 2)], "both are needed"),
    ],
)
def test_a_quarantine_that_does_not_fit_is_refused(quarantine, lines, words):
    with pytest.raises(BadInput, match=words):
        select_rows(split_of(TEN), configure(quarantine(*lines)))


def test_folds_are_disjoint_exhaustive_of_near_equal_size_and_keep_slides_together():
    rng = np.random.default_rng(0)
    slides = rng.permutation(np.repeat(np.arange(60), rng.integers(5, 60, 60)))
    split = split_of(rng.integers(0, 2, len(slides)), slides)
    fold_of_row = np.full(len(split), -1)
    for fold in range(5):
        cfg = configure("num_folds=5", f"fold={fold}")
        valid = select_rows(split, cfg, held_out=True).index
        train = select_rows(split, cfg).index
        assert np.array_equal(np.union1d(train, valid), np.arange(len(split)))
        assert not set(slides[train]) & set(slides[valid])
        assert abs(len(valid) - len(split) / 5) <= 60, "by one slide at most"
        fold_of_row[valid] = fold
    assert fold_of_row.min() == 0


def test_a_limit_is_nested_independent_of_the_seed_and_fair_to_a_sorted_file():
    train = split_of(np.arange(2000) >= 1000)

    def limited(limit, seed=1) -> list[int]:
        cfg = configure(f"limit_train={limit}", f"seed={seed}")
        return select_rows(train, cfg).index.tolist()

    few = limited(100)
    some = limited(400)
    assert len(few) == 100 and set(few) < set(some) and some == sorted(some)
    assert 150 < sum(row >= 1000 for row in some) < 250
    assert some == limited(400, seed=9) and limited(5000) == list(range(2000))


def test_a_small_split_gives_a_smaller_batch():
    assert [fit_batch_size(configure("batch_size=64"), num) for num in (1000, 10)] == [64, 10]
    assert fit_batch_size(configure("batch_size=64", "shards=4"), 11) == 8
    with pytest.raises(BadInput, match="too few"):
        fit_batch_size(configure("batch_size=64", "shards=4"), 3)


def test_auto_reads_from_the_disk_what_is_more_than_half_of_the_free_memory(monkeypatch):
    huge = Images("x.h5", 100_000, None, "")  # 2.8 GB
    small = Images("x.h5", 100, None, "")
    assert choose_residence(huge, "auto", CPU) == "disk"
    assert choose_residence(small, "auto", CPU) == choose_residence(huge, "host", CPU) == "host"
    monkeypatch.setattr(batches, "memory_limit_bytes", lambda: 2 * small.num_bytes)
    assert choose_residence(small, "auto", CPU) == "disk"
