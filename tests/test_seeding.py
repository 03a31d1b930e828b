"""Randomness by position: the same wherever and whenever it is asked for, and random enough to be
used.
"""

import random

import numpy as np
import pytest
import torch

from lib.seeding import (
    bits_to_uniform,
    position_bits,
    position_permutation,
    position_seed,
    seed_everything,
    set_determinism,
)

KEYS = torch.arange(1 << 16)


def test_a_draw_depends_on_its_position_and_on_nothing_else():
    state = torch.get_rng_state()
    draws = position_bits(KEYS, 7, 3, 5)
    position_permutation(100, 1)
    position_seed(1)
    assert torch.equal(torch.get_rng_state(), state), "no draw moves a generator"
    order = torch.randperm(len(KEYS))
    assert torch.equal(position_bits(KEYS[order], 7, 3, 5), draws[order])


def test_uniform_numbers_are_uniform_and_independent_of_other_positions_and_neighbours():
    positions = [(0,), (0, 1), (1, 0), (1, 2, 3)]
    rows = []
    for position in positions:
        bits = position_bits(KEYS + 2**32 - 100, *position)
        draws = bits_to_uniform(bits)
        assert draws.dtype == torch.float32 and draws.min() >= 0 and draws.max() < 1
        # the low bits are what the symmetries are drawn from; degrees of freedom: bins - 1
        for counts in (torch.histc(draws, 256, 0, 1), torch.bincount(bits & 7)):
            expected = len(KEYS) / len(counts)
            chi_square = float(((counts - expected) ** 2 / expected).sum())
            assert abs(chi_square - len(counts) + 1) < 5 * (2 * len(counts)) ** 0.5
        rows += [draws, draws.roll(1)]
    correlation = np.corrcoef(torch.stack(rows)) - np.eye(len(rows))
    assert np.abs(correlation).max() < 5 / len(KEYS) ** 0.5
    assert len({position_seed(*position) for position in positions}) == len(positions)


@pytest.mark.parametrize("num", [0, 1, 50_000])
def test_a_permutation_has_every_row_once_and_differs_between_epochs(num):
    order = position_permutation(num, 1, 0)
    other = position_permutation(num, 1, 1)
    assert torch.equal(order.sort().values, torch.arange(num))
    assert (order == other).sum() <= 10


def test_seed_everything_repeats_all_generators_and_determinism_can_be_switched():
    draws = []
    for seed in (2**31 - 1, 2**31 - 1, 4):
        seed_everything(seed)
        draws.append((random.random(), float(np.random.rand()), float(torch.rand(()))))
    assert draws[0] == draws[1] and not set(draws[0]) & set(draws[2])
    for deterministic in (True, False):
        set_determinism(deterministic, 1)
        assert torch.get_num_threads() == 1
        assert torch.are_deterministic_algorithms_enabled() is deterministic
        assert torch.backends.cudnn.deterministic is deterministic
