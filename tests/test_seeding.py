"""Randomness by position: the same wherever and whenever it is asked for, and random enough to be
used.
"""

import itertools
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


def correlation(a: torch.Tensor, b: torch.Tensor) -> float:
    return abs(float(np.corrcoef(a.numpy(), b.numpy())[0, 1]))


def test_the_mixer_is_splitmix64_for_keys_of_any_size():
    assert reference_mix(0) == 0xE220A8397B1DCDAF, "as published"
    keys = [0, 1, 12345, 2**31, 2**40 + 7, 2**62, 2**63 - 1]
    for position in [(), (0,), (1, 2, 3), (2**31 - 1, 10**6, 201)]:
        bits = position_bits(torch.tensor(keys), *position)
        expected = [reference_bits(key, *position) for key in keys]
        assert [value % 2**64 for value in bits.tolist()] == expected


def test_a_draw_depends_on_its_position_and_on_nothing_else():
    expected, state = position_bits(KEYS, 7, 3, 5), torch.get_rng_state()
    position_permutation(100, 1), position_seed(1)
    assert torch.equal(torch.get_rng_state(), state), "no draw moves a generator"
    shuffled = torch.randperm(len(KEYS))
    assert torch.equal(position_bits(KEYS[shuffled], 7, 3, 5), expected[shuffled])
    parts = [position_bits(part, 7, 3, 5) for part in KEYS.split(1000)]
    assert torch.equal(torch.cat(parts), expected)


def test_every_part_of_a_position_counts_and_so_does_its_place():
    positions = [(), (0,), (1,), (0, 0), (1, 0), (0, 1), (1, 2, 3), (3, 2, 1), (2**31 - 1, 0)]
    draws = [bits_to_uniform(position_bits(KEYS, *position)) for position in positions]
    correlations = [correlation(*pair) for pair in itertools.combinations(draws, 2)]
    assert max(correlations) < 5 / len(KEYS) ** 0.5
    seeds = {position_seed(*position) for position in positions}
    assert len(seeds) == len(positions) and min(seeds) >= 0 and max(seeds) < 2**63


@pytest.mark.parametrize("start", [0, 2**32 - 100, 2**55])
def test_uniform_numbers_are_uniform_and_independent_of_their_neighbours(start):
    bits = position_bits(KEYS + start, 1, 2)
    draws = bits_to_uniform(bits)
    assert draws.dtype == torch.float32 and float(draws.min()) >= 0 and float(draws.max()) < 1
    # the low bits are what the symmetries are drawn from; degrees of freedom: bins - 1
    for counts in (torch.histc(draws, 256, 0, 1), torch.bincount(bits & 7)):
        expected = len(KEYS) / len(counts)
        chi_square = float(((counts - expected) ** 2 / expected).sum())
        assert abs(chi_square - len(counts) + 1) < 5 * (2 * len(counts)) ** 0.5
    assert correlation(draws[1:], draws[:-1]) < 5 / len(KEYS) ** 0.5


@pytest.mark.parametrize("num", [0, 1, 50_000])
def test_a_permutation_has_every_row_once_and_differs_between_epochs(num):
    order, other = position_permutation(num, 1, 0), position_permutation(num, 1, 1)
    assert torch.equal(order.sort().values, torch.arange(num))
    if num > 1:
        assert correlation(order, other) < 5 / num**0.5
        assert correlation(order, KEYS[:num]) < 5 / num**0.5


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
