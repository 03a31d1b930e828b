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
    no_augmentation,
    normalise,
    patch_size,
    turned_views,
)
from lib.config import load_config
from lib.predict import predict_batch

IMAGES = torch.from_numpy(draw_patches(37, 5)[0])
CFG = load_config(overrides=["model=cnn"])
PLAIN = ["symmetries=false", "shift=0", "stain_jitter=0", "brightness_jitter=0"]
MEAN = torch.tensor(PREPROCESSING["mean"], dtype=torch.float64).view(3, 1, 1)
STD = torch.tensor(PREPROCESSING["std"], dtype=torch.float64).view(3, 1, 1)


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
        views = list(turned_views(IMAGES[:1], (0, 0), num))
        assert len(group) == num and {view.numpy().tobytes() for view in views} == group
    for shift in ((1, 3), (5, 0), (0, 2)):
        views = turned_views(IMAGES[:3].bfloat16(), shift)
        for symmetry, view in zip(VIEWS[8], views, strict=True):
            assert view.dtype == torch.bfloat16 and view.is_contiguous()
            for image, moved in zip(IMAGES[:3].numpy(), view, strict=True):
                expected = apply_reference(apply_reference(image, symmetry), 0, *shift)
                assert torch.equal(moved, torch.from_numpy(expected.copy()).bfloat16())


@pytest.mark.parametrize("symmetries", ["true", "false"])
def test_a_shift_repeats_the_edge_and_goes_before_the_symmetry_each_patch_by_its_own_draw(
    symmetries,
):
    cfg = load_config(overrides=["model=cnn", "shift=48", f"symmetries={symmetries}"])
    draws = draw_augmentation(torch.arange(37), 3, cfg)
    edges = [(0, 0), (1, 0), (0, 1), (-4, 4), (4, -3), (48, -48), (-48, 48), (0, -2)]
    draws.shift[:8] = torch.tensor(edges)
    moved = move_pixels(IMAGES, draws)
    for image, symmetry, shift, seen in zip(
        IMAGES, draws.symmetry, draws.shift, moved, strict=True
    ):
        expected = apply_reference(image.numpy(), int(symmetry), *shift.tolist())
        assert np.array_equal(seen.numpy(), expected)
    for crop in (32, 64):
        edge = (96 - crop) // 2
        centre = moved[:, edge : 96 - edge, edge : 96 - edge]
        assert torch.equal(move_pixels(IMAGES, draws, crop), centre)


def test_patches_are_turned_for_every_model_but_p4m_which_answers_all_turns_alike():
    keys = torch.arange(64)
    for model, is_turned in (("cnn", True), ("resnet18", True), ("p4m", False)):
        draws = draw_augmentation(keys, 0, load_config(overrides=[f"model={model}"]))
        assert bool(draws.symmetry.any()) == is_turned and draws.shift.any()


def test_only_the_first_epochs_are_cropped_and_never_for_the_mlp():
    cropped = load_config(overrides=["crop=64", "crop_epochs=2"])
    assert [patch_size(cropped, epoch) for epoch in range(4)] == [64, 64, 96, 96]
    assert patch_size(dataclasses.replace(cropped, model="mlp"), 0) == 96


def test_a_draw_is_a_function_of_seed_epoch_and_sample_whatever_the_batch():
    keys, order = torch.arange(5000), torch.randperm(5000)
    draws = draw_augmentation(keys, 2, CFG)
    assert equal(draw_augmentation(keys[order], 2, CFG), take(draws, order))
    assert equal(draw_augmentation(keys[4711:4712], 2, CFG), take(draws, slice(4711, 4712)))
    others = [(keys, 3, CFG), (keys, 2, dataclasses.replace(CFG, seed=2)), (keys + 5000, 2, CFG)]
    for arguments in others:
        other = draw_augmentation(*arguments)
        for name, by_chance in (("symmetry", 1 / 8), ("shift", 1 / 9), ("gain", 0)):
            is_same = vars(draws)[name] == vars(other)[name]
            assert is_same.float().mean() == pytest.approx(by_chance, abs=0.03)


def test_the_draws_have_the_spread_that_the_config_names_and_are_unrelated():
    num = 20_000
    jitter = ["model=cnn", "stain_jitter=0.2", "brightness_jitter=0.1"]
    draws = draw_augmentation(torch.arange(num), 0, load_config(overrides=jitter))
    for numbers, num_values in ((draws.symmetry, 8), *((axis + 4, 9) for axis in draws.shift.T)):
        counts = torch.bincount(numbers, minlength=num_values)
        assert len(counts) == num_values and counts.min() > num / num_values * 0.93
    brightness = draws.offset - (1 - draws.gain)
    assert draws.gain.std(0).tolist() == pytest.approx([0.2] * 3, rel=0.03)
    assert draws.gain.mean() == pytest.approx(1, abs=0.005)
    assert brightness.std(0).tolist() == pytest.approx([0.1] * 3, rel=0.03)
    assert brightness.std(1).max() < 1e-6, "the same for each channel"
    table = torch.cat([draws.symmetry[:, None], draws.shift, draws.gain, brightness[:, :1]], 1)
    assert (torch.corrcoef(table.T.double()) - torch.eye(7)).abs().max() < 5 / num**0.5


@pytest.mark.parametrize("num", [1, 16, 37])
def test_normalising_is_the_plain_formula_in_channels_last_in_either_precision(num):
    images, draws = IMAGES[:num].clone(), draw_augmentation(torch.arange(num), 1, CFG)
    out, bf16 = normalise(images, draws), normalise(images, draws, dtype=torch.bfloat16)
    x = images.permute(0, 3, 1, 2).double() / 255
    expected = (x * draws.gain[..., None, None] + draws.offset[..., None, None] - MEAN) / STD
    assert out.dtype == torch.float32 and torch.allclose(out.double(), expected, atol=5e-6)
    assert bf16.dtype == torch.bfloat16 and torch.allclose(bf16.float(), out, rtol=2**-8, atol=1e-6)
    for tensor in (out, bf16):
        assert tensor.shape == (num, 3, 96, 96)
        assert tensor.is_contiguous(memory_format=torch.channels_last)
    ones = [slice(row, row + 1) for row in range(num)]
    assert torch.equal(out, torch.cat([normalise(images[one], take(draws, one)) for one in ones]))
    assert torch.equal(IMAGES[:num], images), "the source patches stay as they were"


def test_white_stays_white_when_stains_fade_and_changes_only_with_brightness():
    white = torch.full((64, 96, 96, 3), 255, dtype=torch.uint8)
    expected = normalise(white, no_augmentation(64))
    for stain, brightness, least_changed in ((0.5, 0, 0), (0, 0.2, 60)):
        jitter = [f"stain_jitter={stain}", f"brightness_jitter={brightness}"]
        draws = draw_augmentation(torch.arange(64), 0, load_config(overrides=jitter))
        difference = (model_input(white, draws) - expected).abs().amax((1, 2, 3))
        num_changed = int((difference > 1e-3).sum())
        assert num_changed >= least_changed and (num_changed > 0) == (least_changed > 0)


@pytest.mark.parametrize("precision, dtype", [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_inference_sees_what_training_without_augmentation_sees(precision, dtype):
    seen = []

    def model(inputs):  # stands in for a module
        seen.append(inputs)
        return inputs.float().mean((1, 2, 3))[:, None]

    predict_batch(model, IMAGES, precision, 1, PREPROCESSING)
    draws = draw_augmentation(torch.arange(37), 0, load_config(overrides=PLAIN))
    assert equal(draws, no_augmentation(37)) and torch.equal(move_pixels(IMAGES, draws), IMAGES)
    trained_on = model_input(IMAGES, draws, dtype=dtype)
    assert seen[0].dtype == dtype and seen[0].stride() == trained_on.stride()
    assert torch.equal(seen[0], trained_on)
    x = (IMAGES.permute(0, 3, 1, 2).double() / 255 - MEAN) / STD
    close = torch.allclose(trained_on.double(), x, atol=1e-5, rtol=2**-7)
    assert close, "intensities are from 0 to 1"
