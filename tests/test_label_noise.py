"""lib/audit/label_noise.py: exchanged labels are seen, and a bent calibration is no exchange."""

import numpy as np
import pytest

from lib.audit.label_noise import LEAST_RATE, fit_label_noise
from lib.metrics import sigmoid

NUM = 20_000
GROUPS = np.arange(NUM) // 3


def draw_labels(bend, seed: int, rate: float = 0.0):
    """(labels, logits, is exchanged) of a model whose log odds are `bend` of its logits."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(np.where(rng.random(NUM) < 0.5, 2.0, -2.0), 2.0)
    truth = rng.random(NUM) < sigmoid(bend(logits))
    exchanged = rng.random(NUM) < rate
    return (truth ^ exchanged).astype(np.int64), logits, exchanged


BENDS = {
    "affine": lambda logits: 0.8 * logits + 0.4,
    "flattening": lambda logits: 6 * np.tanh(logits / 6),
    "one side": lambda logits: np.where(logits > 0, 0.7, 1.2) * logits,
}


@pytest.mark.parametrize("bend", BENDS.values(), ids=BENDS)
def test_a_bent_calibration_is_no_exchange_and_an_exchange_is_seen_through_it(bend):
    labels, logits, _ = draw_labels(bend, seed=1)
    _, least, _, _ = fit_label_noise(labels, logits, GROUPS)
    assert least < LEAST_RATE, "these labels are right"
    labels, logits, exchanged = draw_labels(bend, seed=1, rate=0.05)
    rate, least, _, wrong = fit_label_noise(labels, logits, GROUPS)
    assert LEAST_RATE < least < rate == pytest.approx(0.05, abs=0.015)
    most_suspect = np.argsort(-wrong)[: 2 * exchanged.sum()]
    assert exchanged[most_suspect].sum() > 0.5 * exchanged.sum()
    expected = wrong[most_suspect].mean()
    assert exchanged[most_suspect].mean() == pytest.approx(expected, abs=0.1)


def test_copies_of_a_patch_are_one_patch():
    """Of sixty patches three labels are exchanged, and each patch is there two hundred times."""
    labels, logits, _ = draw_labels(BENDS["affine"], seed=2)
    labels[np.argsort(np.abs(logits[:60]))[-3:]] ^= 1
    rows = np.arange(60).repeat(200)
    _, least, _, _ = fit_label_noise(labels[rows], logits[rows], rows)
    _, naive, _, _ = fit_label_noise(labels[rows], logits[rows], np.arange(len(rows)))
    assert least < LEAST_RATE < naive
