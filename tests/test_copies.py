"""Copies are found however they were made, and nothing else is."""

import numpy as np
import pytest
import torch

from lib.audit import copies
from lib.audit.plant import copy_patch
from lib.augment import turned_views
from lib.pcam import PATCH_SHAPE
from lib.prepare.synthetic import draw_slide

NUM = 60
CHANGES = ("brightened", "shifted", "turned and recompressed")


def change(kind: str, patch: np.ndarray, rng) -> np.ndarray:
    if kind.startswith("turned"):
        kind, patch = "recompressed", copies.turn(patch[None], rng.integers(1, 8))[0]
    return copy_patch(kind, np.ascontiguousarray(patch), rng)


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
    for symmetry, view in enumerate(turned_views(torch.from_numpy(patches[:2]), (0, 0))):
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
    changed = np.stack([change(kind, patches[row], rng) for row in busy])
    _, overlaps = compare(patches, changed)
    near = overlaps[overlaps.is_near]
    pairs = set(pairs_of(near))
    wanted = set(zip(busy.tolist(), range(NUM, NUM + len(busy)), strict=True))
    assert pairs <= wanted and len(pairs) >= 0.95 * len(wanted)
    if kind == "shifted":
        assert np.abs(near.shift).max(1).all() and (near.similarity > 0.99).mean() > 0.9


@pytest.mark.parametrize("dy, dx", [(0, 16), (-24, 20)])
def test_overlapping_crops_are_found_by_their_pixels(slide, dy, dx):
    starts = range(40, 1000, 150)
    _, overlaps = compare(cut(slide, starts), cut(np.roll(slide, (-dy, -dx), (0, 1)), starts))
    num = len(starts) ** 2
    shifts = [
        shift
        for (first, second), shift in zip(pairs_of(overlaps), overlaps.shift.tolist(), strict=True)
        if second == first + num
    ]
    assert len(shifts) >= 0.85 * num and shifts == [[dy, dx]] * len(shifts)


def test_unrelated_patches_are_not_taken_for_copies(patches):
    other_slide = draw_slide(4, "train", 3, 0.0).image
    first, overlaps = compare(patches, cut(other_slide, range(0, 1056, 104)))
    assert np.array_equal(first, np.arange(len(first))) and not len(overlaps)


def test_groups_are_the_connected_parts_of_a_graph():
    overlaps = np.zeros(100, copies.OVERLAPS).view(np.recarray)
    overlaps.first, overlaps.second = np.random.default_rng(0).integers(0, 200, (2, 100))
    linked = np.eye(200, dtype=bool)
    linked[overlaps.first, overlaps.second] = True
    linked |= linked.T
    for _ in range(8):
        linked = linked @ linked
    assert np.array_equal(copies.link_groups(np.arange(200), overlaps), linked.argmax(1))
