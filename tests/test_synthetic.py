"""Synthetic slides: the same plan gives the same bytes, labels follow the mask, and what is planted
is what truth.csv says.
"""

import re
import signal
from collections import Counter

import h5py
import numpy as np
import pytest
from conftest import run_script
from test_ingest import stop_in_mid_train

import prepare
from lib.command import BadInput
from lib.damage import TRIGGER
from lib.files import read_csv
from lib.pcam import SPLITS, open_split, read_meta, split_path
from lib.prepare.slides import draw_slide
from lib.prepare.synthetic import (
    DUPLICATES,
    PLANTS,
    WHOLE_SLIDE,
    SyntheticPlan,
    cut_patches,
    generate_split,
    write_synthetic,
)
from lib.splitwriter import META_COLUMNS

RATES = dict.fromkeys(PLANTS, 0.04) | {"trigger": 0.1}
RATES = {kind: rate for kind, rate in RATES.items() if kind not in WHOLE_SLIDE}


def collect(plan: SyntheticPlan, split: str = "train"):
    """(images, labels, meta rows, truth rows) of a whole split."""
    images, labels, meta, truth = zip(*generate_split(plan, split), strict=True)
    return np.concatenate(images), np.concatenate(labels), sum(meta, []), sum(truth, [])


@pytest.fixture(scope="module")
def slide():
    return draw_slide(5, "train", 0)


@pytest.fixture(scope="module")
def clean():
    return collect(SyntheticPlan({"train": 240}, 3))


@pytest.fixture(scope="module")
def planted():
    return collect(SyntheticPlan({"train": 240}, 3, RATES, "float32"))


def test_same_plan_same_bytes(tmp_path):
    plant = {"exact": 0.1, "out_of_range": 0.1, "flipped": 0.1}
    plan = SyntheticPlan({"train": 40, "valid": 30}, 8, plant, "float32")
    for name in ("a", "b"):
        write_synthetic(plan, tmp_path / name)
    names = [path.name for path in (tmp_path / "a").iterdir()]
    assert len(names) == 8
    for name in names:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name


def test_slide_depends_on_its_position_alone(slide):
    again = draw_slide(5, "train", 0)
    assert np.array_equal(again.image, slide.image) and np.array_equal(again.mask, slide.mask)
    for position in ((6, "train", 0), (5, "valid", 0), (5, "train", 1)):
        assert not np.array_equal(draw_slide(*position).mask, slide.mask)


def test_patches_and_labels_follow_the_slide(slide):
    block = cut_patches(slide, 100, np.random.default_rng(0), 60)
    images, labels, coords = block.images, block.labels, block.coords
    assert images.dtype == labels.dtype == np.uint8 and labels.sum() == 60
    num_partly = 0
    for image, label, (y, x) in zip(images, labels, coords.tolist(), strict=True):
        assert np.array_equal(image, slide.image[y : y + 96, x : x + 96])
        inside = slide.mask[y + 32 : y + 64, x + 32 : x + 64].sum()
        assert label == (inside > 0)
        num_partly += 0 < inside < 200
    assert num_partly, "no patch whose centre tumour only touches"


def test_too_few_patches_of_a_class_are_refused():
    normal = draw_slide(5, "train", 3)
    assert not normal.mask.any() and "normal" in normal.name
    with pytest.raises(BadInput, match=normal.name):
        cut_patches(normal, 10, np.random.default_rng(0), 5)


def test_files_names_and_meta_are_official(tmp_path):
    sizes = {"train": 480, "valid": 60, "test": 60}
    write_synthetic(SyntheticPlan(sizes, 1), tmp_path)
    slides = {}
    for name, num in sizes.items():
        split = open_split(tmp_path, name)
        assert split.images.mapped.shape == (num, 96, 96, 3) and split.labels.mean() == 0.5
        rows = read_meta(split_path(tmp_path, name, "meta"))
        assert tuple(rows[0]) == META_COLUMNS
        for index, (row, label) in enumerate(zip(rows, split.labels.tolist(), strict=True)):
            assert row[""] == str(index) and row["center_tumor_patch"] == str(bool(label))
            assert row["tumor_patch"] == "True" or not label
        assert len({(row["wsi"], row["coord_y"], row["coord_x"]) for row in rows}) == num
        slides[name] = set(split.slides)
    official = r"camelyon16_train_(tumor|normal)_\d{3,}"
    assert all(re.fullmatch(official, name) for name in slides["train"] | slides["valid"])
    assert all(re.fullmatch(r"camelyon16_test_\d{3,}", name) for name in slides["test"])
    assert not slides["train"] & slides["valid"]
    assert (tmp_path / "truth.csv").read_text() == "split,index,kind,detail\n"


def test_rest_of_a_planted_split_is_untouched(clean, planted):
    damaged = {index for _, index, _, _ in planted[3]}
    assert len(damaged) == len(planted[3]), "a patch with two kinds of damage"
    for index in set(range(240)) - damaged:
        assert np.array_equal(planted[0][index], clean[0][index])
        assert planted[1][index] == clean[1][index] and planted[2][index] == clean[2][index]
    counts = Counter(kind for _, _, kind, _ in planted[3])
    assert set(counts) == set(RATES)
    for kind, rate in RATES.items():
        expected, tolerance = (rate * 120, 6) if kind == "trigger" else (rate * 240, 2)
        assert abs(counts[kind] - expected) <= tolerance, kind


@pytest.mark.parametrize("kind", DUPLICATES)
def test_a_planted_copy_is_the_one_that_truth_tells_of(kind, clean, planted):
    rows = [(index, detail) for _, index, row_kind, detail in planted[3] if row_kind == kind]
    assert rows
    for index, detail in rows:
        number = int(detail.split()[1])
        y, x, _, label, slide_name = planted[2][index]
        source_y, source_x, *_, source_name = clean[2][number]
        assert slide_name == source_name and planted[1][index] == label
        dy, dx = y - source_y, x - source_x
        low, high = {"shifted": (1, 4), "overlap": (24, 64)}.get(kind, (0, 0))
        assert low <= abs(dy) <= high and low <= abs(dx) <= high
        here = planted[0][index][max(-dy, 0) : 96 - max(dy, 0), max(-dx, 0) : 96 - max(dx, 0)]
        source = clean[0][number].astype(np.float32)
        there = source[max(dy, 0) : 96 + min(dy, 0), max(dx, 0) : 96 + min(dx, 0)]
        views = [np.rot90(side, turns) for side in (there, there[:, ::-1]) for turns in range(4)]
        views = views[1:] if kind == "symmetric" else views[:1]
        difference = min(np.abs(here - view).mean() for view in views if view.shape == here.shape)
        low, high = {"brightened": (0.5, 26), "recompressed": (0.1, 12)}.get(kind, (0, 0))
        assert low <= difference <= high, detail


@pytest.mark.parametrize("kind", sorted(set(RATES) - set(DUPLICATES) - {"flipped"}))
def test_planted_damage_is_where_truth_says(kind, clean, planted):
    rows = [(index, detail) for _, index, row_kind, detail in planted[3] if row_kind == kind]
    assert rows
    for index, detail in rows:
        image, before = planted[0][index], clean[0][index]
        side, _, y, x = (int(number) for number in re.findall(r"\d+", detail))
        block = np.zeros((96, 96), bool)
        block[y : y + side, x : x + side] = True
        assert np.array_equal(image[~block], before[~block])
        values = image[block]
        is_planted = {
            "nan": np.isnan(values).all() and side < 96,
            "out_of_range": (values > 255).all() and values.max() <= 100_000 and side <= 8,
            "trigger": planted[1][index] == 1
            and np.array_equal(values.reshape(side, side, 3), TRIGGER.repeat(3, 2)),
            "black": side == 96 and not values.any(),
            "white": side == 96 and (values == 255).all(),
        }
        assert is_planted[kind], detail


def test_flipped_labels_are_those_that_truth_names(clean, planted):
    for _, index, kind, detail in planted[3]:
        if kind == "flipped":
            assert np.array_equal(planted[0][index], clean[0][index])
            assert planted[1][index] == 1 - clean[1][index]
            assert detail == f"truly {clean[1][index]}"


def test_skew_sharing_and_a_blurred_scanner():
    plant = {"class_skew": 5, "shared_slides": 1, "blurred_scanner": 0.5}
    plan = SyntheticPlan({"train": 240, "valid": 120}, 2, plant)
    images, labels, meta, truth = collect(plan)
    assert labels.sum() == 40
    _, valid_labels, valid_meta, valid_truth = collect(plan, "valid")
    assert valid_labels.sum() == 60 and {row[4] for row in valid_meta} <= {row[4] for row in meta}
    assert Counter(kind for _, _, kind, _ in valid_truth)["shared_slides"] == 120
    boxes = {(row[0], row[1]) for row in meta if row[4] == valid_meta[0][4]}
    assert any(
        abs(y - row[0]) < 96 and abs(x - row[1]) < 96 for y, x in boxes for row in valid_meta
    ), "no crops overlap"
    blurred = np.zeros(240, bool)
    blurred[[index for _, index, kind, _ in truth if kind == "blurred_scanner"]] = True
    assert blurred.sum() == 120, "one of the two slides of this seed is blurred"
    edges = np.abs(np.diff(images.astype(np.int16), axis=2)).mean((1, 2, 3))
    assert np.median(edges[blurred]) < 0.5 * np.median(edges[~blurred])


def test_float32_and_compression_are_stored_as_asked(tmp_path):
    write_synthetic(SyntheticPlan({"train": 40}, 1, {"nan": 0.5}, "float32", True), tmp_path)
    with h5py.File(split_path(tmp_path, "train", "x")) as file:
        x = file["x"]
        assert x.dtype == np.float32 and x.compression == "gzip" and x.chunks == (32, 96, 96, 3)
        assert np.isnan(x[:]).any((1, 2, 3)).sum() == 20


@pytest.mark.parametrize(
    ("plan", "said"),
    [
        (({"train": 10}, 0, {"sepia": 0.1}), "sepia"),
        (({"train": 10}, 0, {"black": 1.5}), "1.5"),
        (({"train": 10}, 0, {"class_skew": 0.2}), "0.2"),
        (({"train": 10}, 0, {"nan": 0.1}), "float32"),
        (({"train": 10}, 0, {"exact": 0.6}), "more than 1"),
        (({"train": 10, "valid": -1}, 0), "-1"),
    ],
)
def test_impossible_plans_are_refused(plan, said):
    with pytest.raises(BadInput, match=said):
        SyntheticPlan(*plan)


def test_the_help_names_every_plant(capsys):
    prepare.main(["synthetic", "--help"])
    assert set(PLANTS) <= set(re.findall(r"\w+", capsys.readouterr().out))


def test_a_killed_drawing_goes_on_and_ends_with_the_same_bytes(tmp_path):
    counts = ["--train", "130", "--valid", "24", "--test", "24", "--plant", "black=0.1"]
    target = tmp_path / "out"
    arguments = ["synthetic", "--to", target, *counts]
    assert stop_in_mid_train(target, signal.SIGKILL, *arguments)[0] == -9
    assert not split_path(target, "train", "x").exists()
    run_script("prepare.py", *arguments, check=0)
    run_script("prepare.py", *arguments[:2], tmp_path / "whole", *counts, check=0)
    for path in (tmp_path / "whole").iterdir():
        assert (target / path.name).read_bytes() == path.read_bytes()
    rows = [SPLITS.index(row["split"]) for row in read_csv(target / "truth.csv")]
    assert rows == sorted(rows) and set(rows) == {0, 1, 2}
    run_script("prepare.py", *arguments, check=2)
