"""Copies are found however they were made, and nothing else is."""

import io

import numpy as np
import pytest
import torch
from conftest import REAL_SAMPLE, real_sample
from PIL import Image

from lib.audit import copies
from lib.augment import eight_views
from lib.pcam import PATCH_SHAPE
from lib.prepare.synthetic import draw_slide

NUM = 60


def recompress(patch, rng):
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(patch)).save(
        buffer, "JPEG", quality=int(rng.integers(70, 96))
    )
    return np.asarray(Image.open(buffer))


def brighten(patch, rng):
    return np.clip(patch * rng.uniform(1.02, 1.1) + 0.5, 0, 255).astype(np.uint8)


def shift(patch, rng):
    dy, dx = rng.choice([(dy, dx) for dy in range(-4, 5) for dx in range(-4, 5) if dy or dx])
    return np.pad(patch, ((4, 4), (4, 4), (0, 0)), "edge")[4 + dy : 100 + dy, 4 + dx : 100 + dx]


def turn_and_recompress(patch, rng):
    return recompress(copies.turn(patch[None], int(rng.integers(1, 8)))[0], rng)


CHANGES = {
    "recompressed": recompress,
    "brightened": brighten,
    "shifted": shift,
    "turned and recompressed": turn_and_recompress,
}


@pytest.fixture(scope="module")
def slide():
    return draw_slide(3, "train", 1, 0.0)


@pytest.fixture(scope="module")
def patches(slide) -> np.ndarray:
    """Patches of one slide that do not overlap."""
    places = [(y, x) for y in range(0, 1056, 104) for x in range(0, 1056, 104)][:NUM]
    return np.stack([slide.image[y : y + 96, x : x + 96] for y, x in places])


def compare(patches):
    return copies.compare_patches(copies.print_patches(patches), lambda rows: patches[rows])


def test_turns_are_those_of_the_augmentation(patches):
    for symmetry in range(8):
        expected = list(eight_views(torch.from_numpy(patches[:2]), (0, 0)))[symmetry].numpy()
        assert np.array_equal(copies.turn(patches[:2], symmetry), expected)


def test_equal_patches_are_found_in_each_symmetry_and_no_others(patches):
    turned = np.concatenate([copies.turn(patches[[symmetry]], symmetry) for symmetry in range(8)])
    almost = patches[[9]].copy()
    almost[0, 50, 50, 1] ^= 1
    black = np.zeros((3, *PATCH_SHAPE), np.uint8)
    first, _ = compare(np.concatenate([patches, turned, almost, black]))
    expected = np.arange(NUM + 12)
    expected[NUM : NUM + 8] = np.arange(8)
    assert np.array_equal(first, expected)


@pytest.mark.parametrize("kind", CHANGES)
def test_near_copies_are_found_with_how_they_lie(patches, kind):
    rng = np.random.default_rng(1)
    busy = np.flatnonzero(patches.std((1, 2)).max(1) > 6)
    changed = np.stack([CHANGES[kind](patches[row], rng) for row in busy])
    _, found = compare(np.concatenate([patches, changed]))
    near = found[found.is_near]
    pairs = set(zip(near.first.tolist(), near.second.tolist(), strict=True))
    wanted = {(int(row), NUM + place) for place, row in enumerate(busy)}
    assert len(pairs & wanted) >= 0.95 * len(wanted)
    assert not pairs - wanted
    if kind == "shifted":
        assert (np.abs(near.shift).max(1) > 0).all() and (near.similarity > 0.99).mean() > 0.9
    if kind == "brightened":
        assert np.median(near.gain) > 1.01


@pytest.mark.parametrize("step", [(0, 16), (16, 32), (-24, 20)])
def test_overlapping_crops_are_found_by_their_pixels(slide, step):
    places = [(y, x) for y in range(40, 1000, 150) for x in range(40, 1000, 150)]
    cut = [
        slide.image[y + dy : y + dy + 96, x + dx : x + dx + 96]
        for dy, dx in ((0, 0), step)
        for y, x in places
    ]
    _, found = compare(np.stack(cut))
    pairs = {
        (int(a), int(b)): tuple(shift)
        for a, b, shift in zip(found.first, found.second, found.shift.tolist(), strict=True)
    }
    wanted = {(number, number + len(places)) for number in range(len(places))}
    assert len(wanted & set(pairs)) >= 0.85 * len(wanted)
    assert all(pairs[pair] == step for pair in wanted & set(pairs))


def test_unrelated_patches_are_not_taken_for_copies(patches):
    other = draw_slide(4, "train", 3, 0.0).image
    unrelated = np.stack(
        [other[y : y + 96, x : x + 96] for y in range(0, 1056, 104) for x in range(0, 1056, 104)]
    )
    first, found = compare(np.concatenate([patches, unrelated]))
    assert np.array_equal(first, np.arange(len(first))) and not len(found)


def test_groups_are_the_connected_parts_of_a_graph():
    rng = np.random.default_rng(0)
    for num in (1, 7, 200):
        first, second = rng.integers(0, num, (2, num // 2))
        group = copies.group_rows(num, first, second)
        linked = np.eye(num, dtype=bool)
        linked[first, second] = linked[second, first] = True
        for _ in range(num.bit_length()):
            linked = linked @ linked
        assert np.array_equal(group, linked.argmax(1))


@real_sample
def test_real_patches_have_no_near_copies_but_those_that_are_planted():
    from lib.inputs import list_blocks

    blocks = list_blocks([REAL_SAMPLE / "valid.tar"])
    patches = np.concatenate([decode().images for decode in blocks])
    rng = np.random.default_rng(2)
    sources = rng.choice(np.flatnonzero(patches.std((1, 2)).max(1) > 6), 200, replace=False)
    kinds = [CHANGES[kind] for kind in CHANGES]
    planted = np.stack([kinds[number % 4](patches[row], rng) for number, row in enumerate(sources)])
    first, found = compare(np.concatenate([patches, planted]))
    beside = found[~found.is_near & (found.second < len(patches))]
    assert len(beside) > 1000 and beside.similarity.min() > 0.95, (
        "the same tissue, a multiple of 16 pixels off"
    )
    near = found[found.is_near]
    pairs = {
        (int(first[a]), int(b))
        for a, b in zip(near.first, near.second, strict=True)
        if b >= len(patches)
    }
    wanted = {(int(first[row]), len(patches) + place) for place, row in enumerate(sources)}
    assert len(pairs & wanted) >= 0.95 * len(wanted)
    assert sum(int(b) < len(patches) for b in near.second) == 0, "real patches that are no copies"
