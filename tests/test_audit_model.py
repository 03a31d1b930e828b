"""The audit of a model: what is planted is found, what is not is not, and each figure is what another way of counting gives."""

import numpy as np
from conftest import draw_patches

from lib.calibration import resampled_curves
from lib.features import DENSITY, UNMIX, colour_statistics, compute_tissue, count_values
from lib.metrics import curve_points

GRID = np.linspace(0, 1, 101)


def test_a_resampled_curve_begins_at_the_origin_and_a_constant_answer_is_the_diagonal():
    labels = np.arange(100) % 2
    curves = resampled_curves(labels, np.full(100, 0.5), np.ones((1, 100)), GRID)
    np.testing.assert_allclose(curves["recall"][0], GRID)
    np.testing.assert_allclose(curves["precision"][0], 0.5)


def test_precision_on_a_resampled_curve_is_that_of_the_strictest_threshold_with_the_recall():
    labels = np.random.default_rng(0).permutation(np.arange(200) % 2)
    probs = np.linspace(1, 0, 200)
    points = curve_points(labels.astype(bool), probs)
    expected = points["precision"][np.argmax(points["recall"] >= GRID[:, None] - 1e-9, axis=1)]
    np.testing.assert_allclose(resampled_curves(labels, probs, np.ones((1, 200)), GRID)["precision"][0], expected)


def test_nuclei_are_counted_and_tissue_is_told_from_glass():
    patches = np.full((3, 96, 96, 3), (240, 238, 240), np.uint8)
    y, x = np.indices((96, 96))
    patches[1:, :48] = (220, 150, 200)  # cytoplasm
    for at_y, at_x in ((20, 20), (20, 40), (40, 60), (34, 76)):
        patches[2, (y - at_y) ** 2 + (x - at_x) ** 2 <= 12] = (90, 60, 140)
    found = compute_tissue(patches)
    np.testing.assert_array_equal(found["nuclear_density"], [0, 0, 4])
    np.testing.assert_allclose(found["tissue_share"], [0, 0.5, 0.5], atol=0.001)


def test_colour_statistics_are_those_of_the_pixels():
    patches, _ = draw_patches(5, 0)
    found, pixels = colour_statistics(count_values(patches)), patches.reshape(5, -1, 3).astype(np.float64)
    np.testing.assert_allclose(found[:, :6], np.concatenate([pixels.mean(1), pixels.std(1)], 1))
    np.testing.assert_allclose(found[:, 6:], DENSITY[patches].mean((1, 2)) @ UNMIX)
