"""Synthetic slides: the same plan gives the same bytes, labels follow the mask, and what is planted
is what truth.csv says.
"""

import re
from collections import Counter

import numpy as np
import pytest

from lib.command import BadInput
from lib.files import read_csv
from lib.pcam import open_split, read_meta, split_path
from lib.prepare.slides import draw_slide
from lib.prepare.synthetic import (
    PLANTS,
    WHOLE_SLIDE,
    SyntheticPlan,
    cut_patches,
    write_synthetic,
)

RATES = {kind: 0.04 for kind in PLANTS if kind not in WHOLE_SLIDE} | {"trigger": 0.1}
SPLITS = ("train", "valid", "test")


@pytest.fixture(scope="module")
def clean(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clean")
    write_synthetic(SyntheticPlan({"train": 240, "valid": 60, "test": 60}, 3), folder)
    return folder


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("planted")
    write_synthetic(SyntheticPlan({"train": 240}, 3, RATES, "float32"), folder)
    return folder


def test_same_plan_same_bytes(tmp_path):
    plan = SyntheticPlan({"train": 10, "valid": 10}, 8, {"nan": 0.5, "exact": 0.1}, "float32")
    for name in ("a", "b"):
        write_synthetic(plan, tmp_path / name)
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes(), path


def test_patches_and_labels_follow_the_slide():
    slide = draw_slide(5, "train", 0)
    block = cut_patches(slide, 100, np.random.default_rng(0), 60)
    assert block.images.dtype == block.labels.dtype == np.uint8 and block.labels.sum() == 60
    num_tumour_pixels = []
    for image, (y, x) in zip(block.images, block.coords, strict=True):
        assert np.array_equal(image, slide.image[y : y + 96, x : x + 96])
        num_tumour_pixels.append(slide.mask[y + 32 : y + 64, x + 32 : x + 64].sum())
    assert np.array_equal(block.labels, np.greater(num_tumour_pixels, 0))
    normal = draw_slide(5, "train", 3)
    assert not normal.mask.any() and "normal" in normal.name
    with pytest.raises(BadInput, match=normal.name):
        cut_patches(normal, 10, np.random.default_rng(0), 5)


def test_files_names_and_meta_are_official(clean):
    slides = {}
    for name in SPLITS:
        split = open_split(clean, name)
        assert split.images.mapped is not None and split.labels.mean() == 0.5
        for row, label in zip(
            read_meta(split_path(clean, name, "meta")), split.labels.tolist(), strict=True
        ):
            assert row["center_tumor_patch"] == str(bool(label))
            assert row["tumor_patch"] == "True" or not label
        slides[name] = set(split.slides)
        source = "test" if name == "test" else "train"
        assert all(slide.startswith(f"camelyon16_{source}_") for slide in slides[name])
    assert not slides["train"] & slides["valid"]
    assert (clean / "truth.csv").read_text() == "split,index,kind,detail\n"


def stored_patches(folder):
    return next(open_split(folder, "train").images.stored_blocks())[1]


def test_what_is_planted_is_what_truth_tells_of_and_the_rest_is_untouched(clean, planted):
    before = stored_patches(clean)
    after = stored_patches(planted)
    is_label_equal = open_split(clean, "train").labels == open_split(planted, "train").labels
    truth = read_csv(planted / "truth.csv")
    rows = [int(row["index"]) for row in truth]
    assert len(set(rows)) == len(rows), "no patch has two kinds of damage"
    is_untouched = np.ones(240, bool)
    is_untouched[rows] = False
    assert np.array_equal(before[is_untouched], after[is_untouched])
    assert is_label_equal[is_untouched].all()
    for index, row in zip(rows, truth, strict=True):
        is_same = np.array_equal(before[index], after[index], equal_nan=True)
        assert is_same == (row["kind"] == "flipped"), row
        assert not (is_same and is_label_equal[index]), row
        if row["kind"] == "exact":
            source = int(re.search(r"\d+", row["detail"])[0])
            assert np.array_equal(after[index], before[source])
    counts = Counter(row["kind"] for row in truth)
    for kind in set(RATES) - {"trigger"}:
        assert abs(counts[kind] - 0.04 * 240) <= 2, kind
    assert 6 <= counts["trigger"] <= 18, "a tenth of the positives"
