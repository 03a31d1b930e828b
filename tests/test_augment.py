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
    Draws,
    draw_augmentation,
    eight_views,
    model_input,
    move_pixels,
    no_augmentation,
    normalise,
    patch_size,
)
from lib.config import load_config
from lib.predict import predict_batch

IMAGES = torch.from_numpy(draw_patches(37, 5)[0])
CFG = load_config()
PLAIN_CFG = load_config(
    overrides=["symmetries=false", "shift=0", "stain_jitter=0", "brightness_jitter=0"]
)
MEAN, STD = (
    torch.tensor(PREPROCESSING[name], dtype=torch.float64).view(3, 1, 1) for name in ("mean", "std")
)
FIELDS = [field.name for field in dataclasses.fields(Draws)]


def apply_reference(patch: np.ndarray, symmetry: int, down: int = 0, right: int = 0) -> np.ndarray:
    """Shift with the edge repeated, then bit 0 flips x, bit 1 flips y, bit 2 transposes."""
    patch = np.pad(patch, ((48, 48), (48, 48), (0, 0)), mode="edge")[
        48 - down : 144 - down, 48 - right : 144 - right
    ]
    patch = patch[:, ::-1] if symmetry & 1 else patch
    patch = patch[::-1] if symmetry & 2 else patch
    return patch.transpose(1, 0, 2) if symmetry & 4 else patch


def equal(a: Draws, b: Draws) -> bool:
    return all(torch.equal(getattr(a, name), getattr(b, name)) for name in FIELDS)


def take(draws: Draws, rows) -> Draws:
    return Draws(*(getattr(draws, name)[rows] for name in FIELDS))


def test_the_eight_views_are_the_dihedral_group():
    patch = IMAGES[0].numpy()
    views = [view[0] for view in eight_views(IMAGES[:1], (0, 0))]
    assert all(
        np.array_equal(view, apply_reference(patch, symmetry))
        for symmetry, view in enumerate(views)
    )
    group = {
        np.rot90(side, turns).tobytes() for side in (patch, patch[:, ::-1]) for turns in range(4)
    }
    assert {view.numpy().tobytes() for view in views} == group and len(group) == 8
    twice = {again.numpy().tobytes() for view in views for again in eight_views(view[None], (0, 0))}
    assert twice == group, "closed under composition"


@pytest.mark.parametrize("shift", [(1, 3), (5, 0), (0, 2)])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.bfloat16])
def test_a_view_is_turned_and_then_moved_with_the_edge_repeated(shift, dtype):
    images = IMAGES[:3].to(dtype)
    for symmetry, view in enumerate(eight_views(images, shift)):
        assert view.dtype == dtype and view.is_contiguous()
        for patch, seen in zip(IMAGES[:3].numpy(), view.float().numpy(), strict=True):
            turned = apply_reference(patch, symmetry)
            assert np.array_equal(
                seen,
                torch.from_numpy(apply_reference(turned, 0, *shift).copy())
                .to(dtype)
                .float()
                .numpy(),
            )


def test_a_shift_repeats_the_edge_and_goes_before_the_symmetry_each_patch_by_its_own_draw():
    draws = draw_augmentation(torch.arange(37), 3, load_config(overrides=["shift=48"]))
    draws.shift[:8] = torch.tensor(
        [(0, 0), (1, 0), (0, 1), (-4, 4), (4, -3), (48, -48), (-48, 48), (0, -2)]
    )
    moved = move_pixels(IMAGES, draws).numpy()
    for row in range(37):
        expected = apply_reference(
            IMAGES[row].numpy(), int(draws.symmetry[row]), *draws.shift[row].tolist()
        )
        assert np.array_equal(moved[row], expected), row


@pytest.mark.parametrize("crop", [32, 64])
def test_a_crop_is_the_centre_of_what_was_moved(crop):
    draws, edge = (
        draw_augmentation(torch.arange(37), 3, load_config(overrides=["shift=9"])),
        (96 - crop) // 2,
    )
    whole = move_pixels(IMAGES, draws)[:, edge : 96 - edge, edge : 96 - edge]
    assert torch.equal(move_pixels(IMAGES, draws, crop), whole)
    plain = move_pixels(IMAGES, no_augmentation(37), crop)
    assert torch.equal(plain, IMAGES[:, edge : 96 - edge, edge : 96 - edge])


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
    for other in (draw_augmentation(*arguments) for arguments in others):
        same = [
            float((getattr(draws, name) == getattr(other, name)).float().mean())
            for name in ("symmetry", "shift", "gain")
        ]
        assert same == pytest.approx([1 / 8, 1 / 9, 0], abs=0.03)


def test_the_draws_have_the_spread_that_the_config_names_and_are_unrelated():
    draws = draw_augmentation(
        torch.arange(20_000),
        0,
        load_config(overrides=["stain_jitter=0.2", "brightness_jitter=0.1"]),
    )
    assert torch.bincount(draws.symmetry, minlength=8).min() > 20_000 / 8 * 0.93
    counts = torch.stack([torch.bincount(draws.shift[:, axis] + 4, minlength=9) for axis in (0, 1)])
    assert counts.shape == (2, 9) and counts.min() > 20_000 / 9 * 0.93
    brightness = draws.offset - (1 - draws.gain)
    assert (
        draws.gain.std(0).tolist() == pytest.approx([0.2] * 3, rel=0.03)
        and abs(draws.gain.mean() - 1) < 0.005
    )
    assert (
        brightness.std(0).tolist() == pytest.approx([0.1] * 3, rel=0.03)
        and brightness.std(1).max() < 1e-6
    )
    table = torch.cat([draws.symmetry[:, None], draws.shift, draws.gain, brightness[:, :1]], 1)
    assert (torch.corrcoef(table.T.double()) - torch.eye(7)).abs().max() < 5 / 20_000**0.5


@pytest.mark.parametrize("num", [1, 16, 37])
def test_normalising_is_the_plain_formula_in_channels_last_in_either_precision(num):
    before, draws = IMAGES.clone(), draw_augmentation(torch.arange(num), 1, CFG)
    out, bf16 = normalise(IMAGES[:num], draws), normalise(IMAGES[:num], draws, dtype=torch.bfloat16)
    x = IMAGES[:num].permute(0, 3, 1, 2).double() / 255
    expected = (x * draws.gain[..., None, None] + draws.offset[..., None, None] - MEAN) / STD
    assert out.dtype == torch.float32 and torch.allclose(out.double(), expected, atol=5e-6)
    assert bf16.dtype == torch.bfloat16 and torch.allclose(bf16.float(), out, rtol=2**-8, atol=1e-6)
    assert all(
        t.shape == (num, 3, 96, 96) and t.is_contiguous(memory_format=torch.channels_last)
        for t in (out, bf16)
    )
    assert torch.equal(
        out,
        torch.cat([normalise(IMAGES[i : i + 1], take(draws, slice(i, i + 1))) for i in range(num)]),
    )
    assert torch.equal(IMAGES, before), "the source patches stay as they were"


def test_white_stays_white_when_stains_fade_and_changes_only_with_brightness():
    white = torch.full((64, 96, 96, 3), 255, dtype=torch.uint8)
    expected, num_changed = normalise(white, no_augmentation(64)), []
    for jitter in (
        ["stain_jitter=0.5", "brightness_jitter=0"],
        ["stain_jitter=0", "brightness_jitter=0.2"],
    ):
        seen = model_input(
            white, draw_augmentation(torch.arange(64), 0, load_config(overrides=jitter))
        )
        num_changed.append(int(((seen - expected).abs().amax((1, 2, 3)) > 1e-3).sum()))
    assert num_changed[0] == 0 and num_changed[1] > 60


@pytest.mark.parametrize("precision, dtype", [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_inference_sees_what_training_without_augmentation_sees(precision, dtype):
    seen = []
    model = lambda x: seen.append(x) or x.float().mean((1, 2, 3))[:, None]  # noqa: E731 (stands in for a module)
    predict_batch(model, IMAGES, precision, 1, PREPROCESSING)
    draws = draw_augmentation(torch.arange(37), 0, PLAIN_CFG)
    trained_on = model_input(IMAGES, draws, dtype=dtype)
    assert equal(draws, no_augmentation(37)) and torch.equal(move_pixels(IMAGES, draws), IMAGES)
    assert (
        seen[0].dtype == dtype
        and torch.equal(seen[0], trained_on)
        and seen[0].stride() == trained_on.stride()
    )
    x = (IMAGES.permute(0, 3, 1, 2).double() / 255 - MEAN) / STD
    assert torch.allclose(trained_on.double(), x, atol=1e-5, rtol=2**-7), (
        "intensities are from 0 to 1"
    )
