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
    image = Image.fromarray(np.ascontiguousarray(patch))
    image.save(buffer, "JPEG", quality=int(rng.integers(70, 96)))
    return np.asarray(Image.open(buffer))


def brighten(patch, rng):
    return np.clip(patch * rng.uniform(1.02, 1.1) + 0.5, 0, 255).astype(np.uint8)


def shift(patch, rng):
    dy, dx = rng.choice([(1, 0), (-4, 2), (3, 4), (0, -2)])
    return np.pad(patch, ((4, 4), (4, 4), (0, 0)), "edge")[4 + dy : 100 + dy, 4 + dx : 100 + dx]


def turn_and_recompress(patch, rng):
    return recompress(copies.turn(patch[None], int(rng.integers(1, 8)))[0], rng)


CHANGES = {
    "recompressed": recompress,
    "brightened": brighten,
    "shifted": shift,
    "turned and recompressed": turn_and_recompress,
}


def cut(image, starts) -> np.ndarray:
    """Patches of an image at every pair of `starts`."""
    return np.stack([image[y : y + 96, x : x + 96] for y in starts for x in starts])


@pytest.fixture(scope="module")
def slide() -> np.ndarray:
    return draw_slide(3, "train", 1, 0.0).image


@pytest.fixture(scope="module")
def patches(slide) -> np.ndarray:
    """Patches of one slide that do not overlap."""
    return cut(slide, range(0, 1056, 104))[:NUM]


def compare(*parts):
    patches = np.concatenate(parts)
    return copies.compare_patches(copies.print_patches(patches), lambda rows: patches[rows])


def pairs_of(overlaps) -> list[tuple[int, int]]:
    return list(zip(overlaps.first.tolist(), overlaps.second.tolist(), strict=True))


def pick_busy(patches) -> np.ndarray:
    """The rows of patches that show more than empty glass."""
    return np.flatnonzero(patches.std((1, 2)).max(1) > 6)


def test_turns_are_those_of_the_augmentation(patches):
    for symmetry, view in enumerate(eight_views(torch.from_numpy(patches[:2]), (0, 0))):
        assert np.array_equal(copies.turn(patches[:2], symmetry), view.numpy())


def test_equal_patches_are_found_in_each_symmetry_and_no_others(patches):
    turned = [copies.turn(patches[[symmetry]], symmetry) for symmetry in range(8)]
    almost = patches[[9]].copy()
    almost[0, 50, 50, 1] ^= 1
    black = np.zeros((3, *PATCH_SHAPE), np.uint8)
    first, _ = compare(patches, *turned, almost, black)
    expected = np.arange(NUM + 12)
    expected[NUM : NUM + 8] = np.arange(8)
    assert np.array_equal(first, expected)


@pytest.mark.parametrize("kind", CHANGES)
def test_near_copies_are_found_with_how_they_lie(patches, kind):
    rng = np.random.default_rng(1)
    busy = pick_busy(patches)
    changed = [CHANGES[kind](patches[row], rng) for row in busy]
    _, overlaps = compare(patches, changed)
    near = overlaps[overlaps.is_near]
    pairs = set(pairs_of(near))
    wanted = set(zip(busy.tolist(), range(NUM, NUM + len(busy)), strict=True))
    assert pairs <= wanted and len(pairs) >= 0.95 * len(wanted)
    if kind == "shifted":
        assert np.abs(near.shift).max(1).all() and (near.similarity > 0.99).mean() > 0.9
    if kind == "brightened":
        assert np.median(near.gain) > 1.01


@pytest.mark.parametrize("dy, dx", [(0, 16), (16, 32), (-24, 20)])
def test_overlapping_crops_are_found_by_their_pixels(slide, dy, dx):
    starts = range(40, 1000, 150)
    _, overlaps = compare(cut(slide, starts), cut(np.roll(slide, (-dy, -dx), (0, 1)), starts))
    shifts = dict(zip(pairs_of(overlaps), overlaps.shift.tolist(), strict=True))
    wanted = [(number, number + len(starts) ** 2) for number in range(len(starts) ** 2)]
    measured = [shifts[pair] for pair in wanted if pair in shifts]
    assert len(measured) >= 0.85 * len(wanted)
    assert measured == [[dy, dx]] * len(measured)


def test_unrelated_patches_are_not_taken_for_copies(patches):
    other_slide = draw_slide(4, "train", 3, 0.0).image
    first, overlaps = compare(patches, cut(other_slide, range(0, 1056, 104)))
    assert np.array_equal(first, np.arange(len(first))) and not len(overlaps)


@pytest.mark.parametrize("num", [1, 7, 200])
def test_groups_are_the_connected_parts_of_a_graph(num):
    overlaps = np.zeros(num // 2, copies.OVERLAPS).view(np.recarray)
    overlaps.first, overlaps.second = np.random.default_rng(0).integers(0, num, (2, num // 2))
    linked = np.eye(num, dtype=bool)
    linked[overlaps.first, overlaps.second] = True
    linked[overlaps.second, overlaps.first] = True
    for _ in range(num.bit_length()):
        linked = linked @ linked
    assert np.array_equal(copies.link_groups(np.arange(num), overlaps), linked.argmax(1))


@real_sample
def test_real_patches_have_no_near_copies_but_those_that_are_planted():
    from lib.inputs import list_blocks

    blocks = list_blocks([REAL_SAMPLE / "valid.tar"])
    patches = np.concatenate([decode().images for decode in blocks])
    rng = np.random.default_rng(2)
    sources = rng.choice(pick_busy(patches), 200, replace=False)
    planted = []
    for number, row in enumerate(sources):
        change = list(CHANGES.values())[number % 4]
        planted.append(change(patches[row], rng))
    first, overlaps = compare(patches, planted)
    is_planted = overlaps.second >= len(patches)
    beside = overlaps[~overlaps.is_near & ~is_planted]
    assert len(beside) > 1000, "the same tissue, a multiple of 16 pixels off"
    assert beside.similarity.min() > 0.95
    near = overlaps[overlaps.is_near]
    assert near.second.min() >= len(patches), "real patches that are no copies"
    wanted = set(zip(first[sources].tolist(), range(len(patches), len(first)), strict=True))
    assert len(wanted & set(pairs_of(near))) >= 0.95 * len(wanted)
