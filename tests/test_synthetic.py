"""Synthetic slides: the same plan gives the same bytes, labels follow the mask, and what is planted
is what truth.csv says.
"""

import csv
import io
import re
import subprocess
import sys
import time
from collections import Counter

import h5py
import numpy as np
import pytest
from conftest import REPOSITORY, run_script
from PIL import Image

from lib.pcam import open_split
from lib.prepare.synthetic import (
    DUPLICATES,
    PLANTS,
    TRIGGER,
    SyntheticPlan,
    cut_patches,
    draw_slide,
    generate_split,
    write_synthetic,
)

RATES = {
    "black": 0.03,
    "white": 0.03,
    "nan": 0.04,
    "out_of_range": 0.04,
    "flipped": 0.05,
    "trigger": 0.1,
}
RATES |= dict.fromkeys(DUPLICATES, 0.04)


def read_split(directory, split: str):
    stem = f"camelyonpatch_level_2_split_{split}"
    meta = list(csv.DictReader((directory / f"{stem}_meta.csv").read_text().splitlines()))
    with h5py.File(directory / f"{stem}_x.h5") as x, h5py.File(directory / f"{stem}_y.h5") as y:
        return x["x"][:], y["y"][:], meta


def collect(plan: SyntheticPlan, split: str = "train"):
    """(images, labels, meta rows, truth rows) of a whole split."""
    images, labels, meta, truth = zip(*generate_split(plan, split), strict=True)
    return np.concatenate(images), np.concatenate(labels), sum(meta, []), sum(truth, [])


@pytest.fixture(scope="module")
def slide():
    return draw_slide(5, "train", 0)


@pytest.fixture(scope="module")
def clean():
    return collect(SyntheticPlan(240, 0, 0, 3))


@pytest.fixture(scope="module")
def planted():
    return collect(SyntheticPlan(240, 0, 0, 3, tuple(RATES.items()), "float32"))


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    directory = tmp_path_factory.mktemp("synthetic")
    done = []
    summary = write_synthetic(SyntheticPlan(480, 60, 60, 1), directory, done.append)
    print(f"synthetic: {summary['patches_per_s']:,.0f} patches/s", file=sys.stderr)
    assert sum(done) == 600
    return directory


def test_same_plan_same_bytes(tmp_path):
    plan = SyntheticPlan(
        40, 30, 0, 8, (("exact", 0.1), ("out_of_range", 0.1), ("flipped", 0.1)), "float32"
    )
    for name in ("a", "b"):
        write_synthetic(plan, tmp_path / name)
    names = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert names == sorted(path.name for path in (tmp_path / "b").iterdir()) and len(names) == 7
    for name in names:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name


def test_slide_depends_on_its_position_alone(slide):
    again, *others = [
        draw_slide(*position)
        for position in [(5, "train", 0), (6, "train", 0), (5, "valid", 0), (5, "train", 1)]
    ]
    assert np.array_equal(again.image, slide.image) and np.array_equal(again.mask, slide.mask)
    assert all(not np.array_equal(other.mask, slide.mask) for other in others)


def test_patches_and_labels_follow_the_slide(slide):
    images, labels, coords = cut_patches(slide, 100, np.random.default_rng(0), 60)
    assert (
        images.shape == (100, 96, 96, 3)
        and images.dtype == labels.dtype == np.uint8
        and labels.sum() == 60
    )
    partly = 0
    for image, label, (y, x) in zip(images, labels, coords.tolist(), strict=True):
        assert np.array_equal(image, slide.image[y : y + 96, x : x + 96])
        inside = slide.mask[y + 32 : y + 64, x + 32 : x + 64].sum()
        assert label == (inside > 0)
        partly += 0 < inside < 200
    assert partly, "no patch whose centre tumour only touches"


def test_too_few_patches_of_a_class_are_refused():
    normal = draw_slide(5, "train", 3)
    assert not normal.mask.any() and "normal" in normal.name
    with pytest.raises(ValueError, match=normal.name):
        cut_patches(normal, 10, np.random.default_rng(0), 5)


def test_files_names_and_meta_are_official(written):
    slides = {}
    for split, num in (("train", 480), ("valid", 60), ("test", 60)):
        x, y, meta = read_split(written, split)
        assert (
            x.shape == (num, 96, 96, 3)
            and x.dtype == np.uint8
            and y.shape == (num, 1, 1, 1)
            and y.dtype == np.uint8
        )
        assert y.mean() == 0.5
        assert list(meta[0]) == [
            "",
            "coord_y",
            "coord_x",
            "tumor_patch",
            "center_tumor_patch",
            "wsi",
        ]
        assert [int(row[""]) for row in meta] == list(range(num))
        assert [row["center_tumor_patch"] for row in meta] == [
            str(bool(label)) for label in y.ravel()
        ]
        assert all(
            row["tumor_patch"] == "True" for row in meta if row["center_tumor_patch"] == "True"
        )
        assert len({(row["wsi"], row["coord_y"], row["coord_x"]) for row in meta}) == num
        slides[split] = {row["wsi"] for row in meta}
    official = r"camelyon16_train_(tumor|normal)_\d{3,}"
    assert all(re.fullmatch(official, name) for name in slides["train"] | slides["valid"])
    assert all(re.fullmatch(r"camelyon16_test_\d{3,}", name) for name in slides["test"])
    assert not slides["train"] & slides["valid"]
    with h5py.File(written / "camelyonpatch_level_2_split_train_x.h5") as file:
        assert file["x"].chunks is None and file["x"].id.get_offset() is not None
    assert (written / "truth.csv").read_text() == "split,index,kind,detail\n"


def test_rest_of_a_planted_split_is_untouched(clean, planted):
    damaged = {index for _, index, _, _ in planted[3]}
    assert len(damaged) == len(planted[3]), "a patch with two kinds of damage"
    for index in set(range(240)) - damaged:
        assert (
            np.array_equal(planted[0][index], clean[0][index])
            and planted[1][index] == clean[1][index]
        )
        assert planted[2][index] == clean[2][index]
    counts = Counter(kind for _, _, kind, _ in planted[3])
    assert set(counts) == set(RATES)
    for kind, rate in RATES.items():
        expected = rate * (120 if kind == "trigger" else 240)
        assert abs(counts[kind] - expected) <= (6 if kind == "trigger" else 2), kind


@pytest.mark.parametrize("kind", sorted(RATES))
def test_truth_is_what_the_pixels_show(kind, clean, planted):
    rows = [(index, detail) for _, index, row_kind, detail in planted[3] if row_kind == kind]
    assert rows
    for index, detail in rows:
        image, before = planted[0][index], clean[0][index]
        numbers = [int(number) for number in re.findall(r"-?\d+", detail)]
        if kind in DUPLICATES:
            source, meta, source_meta = (
                clean[0][numbers[0]],
                planted[2][index],
                clean[2][numbers[0]],
            )
            assert meta[4] == source_meta[4] and planted[1][index] == meta[3]
            moved = meta[0] - source_meta[0], meta[1] - source_meta[1]
            assert moved == (tuple(numbers[1:]) if kind in ("shifted", "overlap") else (0, 0))
        if kind == "exact":
            assert np.array_equal(image, source)
        elif kind == "symmetric":
            views = [
                np.rot90(side, turns) for side in (source, source[:, ::-1]) for turns in range(4)
            ]
            assert any(np.array_equal(image, view) for view in views[1:])
        elif kind == "brightened":
            factor = float(detail.split()[-1])
            assert (
                1.02 <= factor <= 1.1
                and np.abs(image - np.minimum(source * factor, 255)).max() <= 0.7
            )
        elif kind in ("shifted", "overlap"):
            low, high = (1, 4) if kind == "shifted" else (24, 64)
            assert all(low <= abs(step) <= high for step in moved)
            dy, dx = moved
            here = image[max(-dy, 0) : 96 - max(dy, 0), max(-dx, 0) : 96 - max(dx, 0)]
            assert np.array_equal(
                here, source[max(dy, 0) : 96 + min(dy, 0), max(dx, 0) : 96 + min(dx, 0)]
            )
        elif kind == "recompressed":
            buffer = io.BytesIO()
            Image.fromarray(source).save(buffer, "JPEG", quality=numbers[1])
            assert np.array_equal(image, np.asarray(Image.open(buffer)))
            assert not np.array_equal(image, source)
        elif kind == "flipped":
            assert (
                np.array_equal(image, before)
                and planted[1][index] == 1 - clean[1][index] == 1 - numbers[0]
            )
        else:
            side, _, y, x = numbers
            block = np.zeros((96, 96), bool)
            block[y : y + side, x : x + side] = True
            assert np.array_equal(image[~block], before[~block])
            values = image[block]
            if kind == "nan":
                assert np.isnan(values).all() and not block.all()
            elif kind == "out_of_range":
                assert (values > 255).all() and values.max() <= 100_000 and side <= 8
            elif kind == "trigger":
                assert planted[1][index] == 1 and np.array_equal(
                    values, np.broadcast_to(TRIGGER, (4, 4, 3)).reshape(-1, 3)
                )
            else:
                assert block.all() and (values == (0 if kind == "black" else 255)).all()


def test_skew_sharing_and_a_blurred_scanner():
    plan = SyntheticPlan(
        240, 120, 0, 2, (("class_skew", 5), ("shared_slides", 1), ("blurred_scanner", 0.5))
    )
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
    write_synthetic(SyntheticPlan(40, 0, 0, 1, (("nan", 0.5),), "float32", True), tmp_path)
    with h5py.File(tmp_path / "camelyonpatch_level_2_split_train_x.h5") as file:
        assert (
            file["x"].dtype == np.float32
            and file["x"].compression == "gzip"
            and file["x"].chunks == (32, 96, 96, 3)
        )
        assert np.isnan(file["x"][:]).any((1, 2, 3)).sum() == 20


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"plant": (("sepia", 0.1),)}, "sepia"),
        ({"plant": (("black", 1.5),)}, "1.5"),
        ({"plant": (("class_skew", 0.2),)}, "0.2"),
        ({"plant": (("nan", 0.1),)}, "float32"),
        ({"plant": (("exact", 0.6),)}, "more than 1"),
        ({"dtype": "float64"}, "float64"),
        ({"num_valid": -1}, "-1"),
    ],
)
def test_impossible_plans_are_refused(arguments, said):
    with pytest.raises(ValueError, match=said):
        SyntheticPlan(**{"num_train": 10, "num_valid": 0, "num_test": 0, "seed": 0} | arguments)


def test_every_plant_has_help_and_is_tested():
    assert set(PLANTS) == set(RATES) | {"class_skew", "shared_slides", "blurred_scanner"}
    assert all(PLANTS.values())
    command = [sys.executable, str(REPOSITORY / "prepare.py"), "synthetic", "--help"]
    shown = subprocess.run(command, capture_output=True, text=True).stdout
    assert all(kind in shown.split() or f"{kind};" in shown.split() for kind in PLANTS), (
        "the help names each"
    )


def test_a_killed_drawing_leaves_nothing_that_looks_complete_and_can_be_repeated(tmp_path):
    target = tmp_path / "drawn here"
    command = [sys.executable, str(REPOSITORY / "prepare.py"), "synthetic", "--to", str(target)]
    counts = ["--train", "4000", "--valid", "60", "--test", "60"]
    process = subprocess.Popen(
        [*command, *counts], stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 60
    while not list(target.glob(".drawing.*/.train_x.*")) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.kill()
    process.wait()
    assert (
        target.is_dir()
        and not list(target.glob("camelyonpatch*"))
        and not (target / "truth.csv").exists()
    )
    run_script(
        "prepare.py",
        "synthetic",
        "--to",
        target,
        "--train",
        "96",
        "--valid",
        "48",
        "--test",
        "48",
        check=0,
    )
    assert len(list(target.iterdir())) == 10 and len(open_split(target, "train")) == 96
    run_script("prepare.py", "synthetic", "--to", target, "--train", "96", check=2)
