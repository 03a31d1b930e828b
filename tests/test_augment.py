"""Augmentation: the symmetries of the square, shifts and stains, each a function of (seed, epoch,
sample).
"""

import dataclasses

import numpy as np
import pytest
import torch
from conftest import draw_patches

from lib.augment import (
    PREPROCESSING,
    VIEWS,
    Draws,
    draw_augmentation,
    model_input,
    move_pixels,
    normalise,
    patch_size,
    turned_views,
)
from lib.config import load_config
from lib.predict import predict_batch

IMAGES = torch.from_numpy(draw_patches(37, 5)[0])
MEAN = torch.tensor(PREPROCESSING["mean"]).view(3, 1, 1)
STD = torch.tensor(PREPROCESSING["std"]).view(3, 1, 1)


def configure(*overrides, model="cnn"):
    return load_config(overrides=[f"model={model}", *overrides])


def apply_reference(patch: np.ndarray, symmetry: int, down: int = 0, right: int = 0) -> np.ndarray:
    """Shift with the edge repeated, then bit 0 flips x, bit 1 flips y, bit 2 transposes."""
    wide = np.pad(patch, ((48, 48), (48, 48), (0, 0)), mode="edge")
    patch = wide[48 - down : 144 - down, 48 - right : 144 - right]
    patch = patch[:, ::-1] if symmetry & 1 else patch
    patch = patch[::-1] if symmetry & 2 else patch
    return patch.transpose(1, 0, 2) if symmetry & 4 else patch


def take(draws: Draws, rows) -> Draws:
    return Draws(*(tensor[rows] for tensor in vars(draws).values()))


def equal(a: Draws, b: Draws) -> bool:
    return all(torch.equal(vars(a)[name], vars(b)[name]) for name in vars(a))


def test_the_views_are_the_turns_or_all_symmetries_each_moved_with_the_edge_repeated():
    patch = IMAGES[0].numpy()
    turns = {np.rot90(patch, number).tobytes() for number in range(4)}
    mirrored = {np.rot90(patch[:, ::-1], number).tobytes() for number in range(4)}
    for num, group in ((4, turns), (8, turns | mirrored)):
        views = turned_views(IMAGES[:1], (0, 0), num)
        assert {view.numpy().tobytes() for view in views} == group
    for shift in ((1, 3), (5, 0)):
        views = turned_views(IMAGES[:1].float(), shift)
        for symmetry, view in zip(VIEWS[8], views, strict=True):
            expected = apply_reference(apply_reference(patch, symmetry), 0, *shift)
            assert view.is_contiguous() and np.array_equal(view[0], expected)


@pytest.mark.parametrize("model", ["cnn", "p4m"])
def test_a_shift_repeats_the_edge_and_goes_before_the_symmetry_each_patch_by_its_own_draw(model):
    draws = draw_augmentation(torch.arange(37), 3, configure("shift=48", model=model))
    assert draws.symmetry.any() == (model != "p4m"), "p4m answers all turns alike"
    draws.shift[:3] = torch.tensor([(0, 0), (48, -48), (-48, 48)])
    moved = move_pixels(IMAGES, draws)
    for row, patch in enumerate(moved.numpy()):
        shift = draws.shift[row].tolist()
        assert np.array_equal(patch, apply_reference(IMAGES[row], int(draws.symmetry[row]), *shift))
    assert torch.equal(move_pixels(IMAGES, draws, 64), moved[:, 16:80, 16:80])


def test_only_the_first_epochs_are_cropped_and_never_for_the_mlp():
    cropped = configure("crop=64", "crop_epochs=2")
    assert [patch_size(cropped, epoch) for epoch in range(4)] == [64, 64, 96, 96]
    assert patch_size(dataclasses.replace(cropped, model="mlp"), 0) == 96


def test_a_draw_is_a_function_of_seed_epoch_and_sample_whatever_the_batch():
    cfg = configure()
    keys = torch.arange(5000)
    order = torch.randperm(5000)
    draws = draw_augmentation(keys, 2, cfg)
    assert equal(draw_augmentation(keys[order], 2, cfg), take(draws, order))
    assert equal(draw_augmentation(keys[4711:4712], 2, cfg), take(draws, slice(4711, 4712)))
    others = [(keys, 3, cfg), (keys, 2, configure("seed=2")), (keys + 5000, 2, cfg)]
    for arguments in others:
        other = draw_augmentation(*arguments)
        for name, by_chance in (("symmetry", 1 / 8), ("shift", 1 / 9), ("gain", 0)):
            is_same = vars(draws)[name] == vars(other)[name]
            assert is_same.float().mean() == pytest.approx(by_chance, abs=0.03)


def test_the_draws_have_the_spread_that_the_config_names_and_are_unrelated():
    cfg = configure("stain_jitter=0.2", "brightness_jitter=0.1")
    draws = draw_augmentation(torch.arange(20_000), 0, cfg)
    brightness = draws.offset - (1 - draws.gain)
    assert brightness.std(1).max() < 1e-6, "the same for each channel"
    table = torch.cat([draws.symmetry[:, None], draws.shift, draws.gain, brightness[:, :1]], 1)
    deviations = [(63 / 12) ** 0.5, *[(80 / 12) ** 0.5] * 2, 0.2, 0.2, 0.2, 0.1]  # of uniform ones
    assert table.std(0).tolist() == pytest.approx(deviations, rel=0.03)
    assert table.mean(0).tolist() == pytest.approx([3.5, 0, 0, 1, 1, 1, 0], abs=0.06)
    assert (torch.corrcoef(table.T.double()) - torch.eye(7)).abs().max() < 0.035


def test_normalising_is_the_plain_formula_in_channels_last_in_either_precision():
    images = IMAGES.clone()
    draws = draw_augmentation(torch.arange(37), 1, configure())
    x = images.permute(0, 3, 1, 2) / 255
    expected = (x * draws.gain[..., None, None] + draws.offset[..., None, None] - MEAN) / STD
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 2**-7)):
        out = normalise(images, draws.gain, draws.offset, dtype=dtype)
        assert out.dtype == dtype and out.is_contiguous(memory_format=torch.channels_last)
        assert torch.allclose(out.float(), expected, atol=1e-5, rtol=tolerance)
        one = slice(20, 21)
        alone = normalise(images[one], draws.gain[one], draws.offset[one], dtype=dtype)
        assert torch.equal(out[one], alone)
    assert torch.equal(IMAGES, images), "the source patches stay as they were"


def test_inference_sees_what_training_without_augmentation_sees():
    inputs = []

    def model(batch):  # stands in for a module
        inputs.append(batch)
        return batch.float().mean((1, 2, 3))[:, None]

    predict_batch(model, IMAGES, "bf16", 1)
    plain = configure("symmetries=false", "shift=0", "stain_jitter=0", "brightness_jitter=0")
    draws = draw_augmentation(torch.arange(37), 0, plain)
    assert (draws.gain == 1).all() and not draws.offset.any()
    assert torch.equal(move_pixels(IMAGES, draws), IMAGES)
    trained_on = model_input(IMAGES, draws, dtype=torch.bfloat16)
    assert torch.equal(inputs[0], trained_on) and inputs[0].stride() == trained_on.stride()
