"""The audit of a model: what is planted is found, what is not is not, and each figure is what another way of counting gives."""

import numpy as np

from lib.calibration import resampled_curves
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
