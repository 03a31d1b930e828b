"""Synthetic slides: the same plan gives the same bytes, labels follow the mask, and what is planted
is what truth.csv says.
"""

import re
from collections import Counter
from types import SimpleNamespace

import h5py
import numpy as np
import pytest

import prepare
from lib.command import BadInput
from lib.damage import TRIGGER
from lib.pcam import open_split, read_meta, split_path
from lib.prepare.slides import draw_slide
from lib.prepare.synthetic import (
    DUPLICATES,
    PLANTS,
    STEPS_PX,
    WHOLE_SLIDE,
    SyntheticPlan,
    cut_patches,
    generate_split,
    write_synthetic,
)
from lib.published import compare_slide_names

RATES = dict.fromkeys(PLANTS, 0.04) | {"trigger": 0.1}
RATES = {kind: rate for kind, rate in RATES.items() if kind not in WHOLE_SLIDE}


def collect(plan: SyntheticPlan, split: str = "train"):
    """The images, labels, meta rows and truth rows of a whole split."""
    images, labels, meta, truth = zip(*generate_split(plan, split), strict=True)
    images, labels = np.concatenate(images), np.concatenate(labels)
    return SimpleNamespace(images=images, labels=labels, meta=sum(meta, []), truth=sum(truth, []))


@pytest.fixture(scope="module")
def slide():
    return draw_slide(5, "train", 0)


@pytest.fixture(scope="module")
def clean():
    return collect(SyntheticPlan({"train": 240}, 3))


@pytest.fixture(scope="module")
def planted():
    return collect(SyntheticPlan({"train": 240}, 3, RATES, "float32"))


def test_same_plan_same_bytes_in_the_storage_that_is_asked_for(tmp_path):
    plant = {"nan": 0.5, "exact": 0.1, "flipped": 0.1}
    plan = SyntheticPlan({"train": 40, "valid": 30}, 8, plant, "float32", True)
    for name in ("a", "b"):
        write_synthetic(plan, tmp_path / name)
    paths = list((tmp_path / "a").iterdir())
    assert len(paths) == 7
    for path in paths:
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes(), path
    with h5py.File(split_path(tmp_path / "a", "train", "x")) as file:
        x = file["x"]
        assert x.dtype == np.float32 and x.compression == "gzip" and x.chunks == (30, 96, 96, 3)
        assert np.isnan(x[:]).any((1, 2, 3)).sum() == 20


def test_patches_and_labels_follow_the_slide(slide):
    block = cut_patches(slide, 100, np.random.default_rng(0), 60)
    assert block.images.dtype == block.labels.dtype == np.uint8 and block.labels.sum() == 60
    num_partly = 0
    for image, label, (y, x) in zip(block.images, block.labels, block.coords, strict=True):
        assert np.array_equal(image, slide.image[y : y + 96, x : x + 96])
        inside = slide.mask[y + 32 : y + 64, x + 32 : x + 64].sum()
        assert label == (inside > 0)
        num_partly += 0 < inside < 200
    assert num_partly, "no patch whose centre tumour only touches"
    normal = draw_slide(5, "train", 3)
    assert not normal.mask.any() and "normal" in normal.name
    with pytest.raises(BadInput, match=normal.name):
        cut_patches(normal, 10, np.random.default_rng(0), 5)


def test_files_names_and_meta_are_official(tmp_path):
    write_synthetic(SyntheticPlan({"train": 240, "valid": 60, "test": 60}, 1), tmp_path)
    slides = {}
    for name in ("train", "valid", "test"):
        split = open_split(tmp_path, name)
        assert split.images.mapped is not None and split.labels.mean() == 0.5
        rows = read_meta(split_path(tmp_path, name, "meta"))
        for index, (row, label) in enumerate(zip(rows, split.labels.tolist(), strict=True)):
            assert row[""] == str(index) and row["center_tumor_patch"] == str(bool(label))
            assert row["tumor_patch"] == "True" or not label
        assert len({(row["wsi"], row["coord_y"], row["coord_x"]) for row in rows}) == len(split)
        slides[name] = set(split.slides)
        assert compare_slide_names(split) == "match"
    assert not slides["train"] & slides["valid"]
    assert (tmp_path / "truth.csv").read_text() == "split,index,kind,detail\n"


def test_rest_of_a_planted_split_is_untouched(clean, planted):
    damaged = {index for _, index, _, _ in planted.truth}
    assert len(damaged) == len(planted.truth), "a patch with two kinds of damage"
    for index in set(range(240)) - damaged:
        assert np.array_equal(planted.images[index], clean.images[index])
        assert planted.labels[index] == clean.labels[index]
        assert planted.meta[index] == clean.meta[index]
    counts = Counter(kind for _, _, kind, _ in planted.truth)
    assert set(counts) == set(RATES)
    for kind, rate in RATES.items():
        expected, tolerance = (rate * 120, 6) if kind == "trigger" else (rate * 240, 2)
        assert abs(counts[kind] - expected) <= tolerance, kind


def test_what_is_planted_is_what_truth_tells_of(clean, planted):
    for _, index, kind, detail in planted.truth:
        numbers = [int(number) for number in re.findall(r"-?\d+", detail)]
        image, before = planted.images[index], clean.images[index]
        assert np.array_equal(image, before) == (kind == "flipped")
        if kind == "flipped":
            assert planted.labels[index] == 1 - clean.labels[index]
        elif kind in DUPLICATES:
            source = clean.images[numbers[0]]
            step = np.subtract(planted.meta[index][:2], clean.meta[numbers[0]][:2])
            assert step.tolist() == (numbers[1:] if kind in STEPS_PX else [0, 0])
            assert np.array_equal(image, source) == (kind == "exact")
            if kind == "symmetric":
                assert np.array_equal(np.sort(image, axis=None), np.sort(source, axis=None))
        else:
            side, _, y, x = numbers
            block = image[y : y + side, x : x + side]
            is_planted = {
                "nan": np.isnan(block).all(),
                "out_of_range": (block > 255).all(),
                "trigger": side == 4 and (block == TRIGGER).all(),
                "black": side == 96 and not block.any(),
                "white": side == 96 and (block == 255).all(),
            }
            assert is_planted[kind], detail


def test_skew_sharing_and_a_blurred_scanner():
    plant = {"class_skew": 5, "shared_slides": 1, "blurred_scanner": 0.5}
    plan = SyntheticPlan({"train": 240, "valid": 120}, 2, plant)
    train, valid = collect(plan), collect(plan, "valid")
    assert train.labels.sum() == 40 and valid.labels.sum() == 60
    assert {row[4] for row in valid.meta} <= {row[4] for row in train.meta}
    assert Counter(kind for _, _, kind, _ in valid.truth)["shared_slides"] == 120
    blurred = np.zeros(240, bool)
    blurred[[index for _, index, kind, _ in train.truth if kind == "blurred_scanner"]] = True
    assert blurred.sum() == 120, "one of the two slides of this seed is blurred"
    edges = np.abs(np.diff(train.images.astype(np.int16), axis=2)).mean((1, 2, 3))
    assert np.median(edges[blurred]) < 0.5 * np.median(edges[~blurred])


@pytest.mark.parametrize(
    ("plan", "text"),
    [
        (({"train": 10}, 0, {"sepia": 0.1}), "sepia"),
        (({"train": 10}, 0, {"black": 1.5}), "1.5"),
        (({"train": 10}, 0, {"nan": 0.1}), "float32"),
        (({"train": 10, "valid": -1}, 0), "-1"),
    ],
)
def test_impossible_plans_are_refused(plan, text):
    with pytest.raises(BadInput, match=text):
        SyntheticPlan(*plan)


def test_the_help_names_every_plant(capsys):
    prepare.main(["synthetic", "--help"])
    assert set(PLANTS) <= set(re.findall(r"\w+", capsys.readouterr().out))
