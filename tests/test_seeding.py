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
MASK = (1 << 64) - 1


def reference_mix(value: int) -> int:
    """splitmix64 over Python's integers, without torch's signs and shifts."""
    value = (value + 0x9E3779B97F4A7C15) & MASK
    value = ((value ^ value >> 30) * 0xBF58476D1CE4E5B9) & MASK
    value = ((value ^ value >> 27) * 0x94D049BB133111EB) & MASK
    return value ^ value >> 31


def reference_bits(key: int, *position: int) -> int:
    state = 0
    for part in position:
        state = reference_mix(state ^ part)
    return reference_mix(reference_mix(key ^ state) ^ 0xD1B54A32D192ED03)


def test_the_mixer_is_splitmix64_for_keys_of_any_size():
    assert reference_mix(0) == 0xE220A8397B1DCDAF, "as published"
    keys = torch.tensor([0, 12345, 2**40 + 7, 2**63 - 1])
    for position in [(), (1, 2, 3), (2**31 - 1, 10**6, 201)]:
        bits = position_bits(keys, *position).tolist()
        expected = [reference_bits(key, *position) for key in keys.tolist()]
        assert [value % 2**64 for value in bits] == expected


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
