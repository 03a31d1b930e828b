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


def correlation(a: torch.Tensor, b: torch.Tensor) -> float:
    return abs(float(np.corrcoef(a.numpy(), b.numpy())[0, 1]))


def test_the_mixer_is_splitmix64_for_keys_of_any_size():
    assert [reference_mix(0), reference_mix(0x9E3779B97F4A7C15)] == [
        0xE220A8397B1DCDAF,
        0x6E789E6AA1B965F4,
    ], "as published"
    keys = [0, 1, 12345, 2**31, 2**40 + 7, 2**62, 2**63 - 1]
    for position in [(), (0,), (1, 2, 3), (2**31 - 1, 10**6, 201)]:
        assert [bits % 2**64 for bits in position_bits(torch.tensor(keys), *position).tolist()] == [
            reference_bits(key, *position) for key in keys
        ]


def test_a_draw_depends_on_its_position_and_on_nothing_else():
    expected, state = position_bits(KEYS, 7, 3, 5), torch.get_rng_state()
    position_bits(KEYS, 1), position_permutation(100, 1), position_seed(1)
    assert torch.equal(torch.get_rng_state(), state), "no draw moves a generator"
    shuffled = torch.randperm(len(KEYS))
    assert torch.equal(position_bits(KEYS[shuffled], 7, 3, 5), expected[shuffled]), (
        "order of the keys"
    )
    assert torch.equal(
        torch.cat([position_bits(part, 7, 3, 5) for part in KEYS.split(1000)]), expected
    ), "batches"


def test_every_part_of_a_position_counts_and_so_does_its_place():
    positions = [
        (),
        (0,),
        (1,),
        (0, 0),
        (1, 0),
        (0, 1),
        (1, 2, 3),
        (3, 2, 1),
        (1, 2),
        (2**31 - 1, 0),
        (0, 2**31 - 1),
    ]
    draws = [bits_to_uniform(position_bits(KEYS, *position)) for position in positions]
    assert (
        max(correlation(a, b) for i, a in enumerate(draws) for b in draws[:i])
        < 5 / len(KEYS) ** 0.5
    )
    assert len({position_seed(*position) for position in positions}) == len(positions)
    assert all(0 <= position_seed(*position) < 2**63 for position in positions)


@pytest.mark.parametrize("start", [0, 2**32 - 100, 2**55], ids=["small", "past 32 bits", "large"])
def test_uniform_numbers_are_uniform_and_independent_of_their_neighbours(start):
    draws = bits_to_uniform(position_bits(KEYS + start, 1, 2))
    assert draws.dtype == torch.float32 and float(draws.min()) >= 0 and float(draws.max()) < 1
    # 255 degrees of freedom
    chi_square = float(((torch.histc(draws, 256, 0, 1).double() - 256) ** 2 / 256).sum())
    assert (
        abs(chi_square - 255) < 5 * (2 * 255) ** 0.5
        and abs(float(draws.double().mean()) - 0.5) < 0.005
    )
    assert correlation(draws[1:], draws[:-1]) < 5 / len(KEYS) ** 0.5
    # what the symmetries are drawn from
    low_bits = torch.bincount(position_bits(KEYS + start, 1, 2) & 7, minlength=8)
    assert float((low_bits - len(KEYS) / 8).abs().max()) < 5 * (len(KEYS) * 7 / 64) ** 0.5


def test_flipping_one_bit_of_a_key_or_of_the_seed_flips_half_of_the_draw():
    keys = KEYS[:4096] * 1_000_003
    others = [(bit, position_bits(keys ^ (1 << bit), 5, 1)) for bit in range(63)]
    others += [(bit, position_bits(keys, 5 ^ (1 << bit), 1)) for bit in range(31)]
    for bit, other in others:
        flipped = (
            np.unpackbits((position_bits(keys, 5, 1) ^ other).numpy().view(np.uint8))
            .reshape(-1, 64)
            .mean(0)
        )
        assert abs(flipped.mean() - 0.5) < 0.01 and np.abs(flipped - 0.5).max() < 0.05, bit


@pytest.mark.parametrize("num", [0, 1, 2, 50_000])
def test_a_permutation_has_every_row_once_and_differs_between_epochs(num):
    order, other = position_permutation(num, 1, 0), position_permutation(num, 1, 1)
    assert torch.equal(order.sort().values, torch.arange(num)) and torch.equal(
        order, position_permutation(num, 1, 0)
    )
    if num > 2:
        assert (order == other).sum() < 10 and max(
            correlation(order, other), correlation(order, KEYS[:num])
        ) < 5 / num**0.5


def test_seed_everything_repeats_all_generators_and_determinism_can_be_switched():
    draws = []
    for seed in (2**31 - 1, 2**31 - 1, 4):
        seed_everything(seed)
        draws.append((random.random(), float(np.random.rand()), float(torch.rand(()))))
    assert draws[0] == draws[1] and not set(draws[0]) & set(draws[2])
    for deterministic in (True, False):
        set_determinism(deterministic, 1)
        assert (
            torch.get_num_threads() == 1
            and torch.are_deterministic_algorithms_enabled() is deterministic
        )
        assert (
            torch.backends.cudnn.deterministic
            is deterministic
            is not torch.backends.cudnn.benchmark
        )
