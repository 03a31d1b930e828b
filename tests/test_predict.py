"""Prediction: eight views are eight turned pictures, order and block size do not matter, and the
model stays as it was.
"""

import copy

import numpy as np
import pytest
import torch
from conftest import draw_patches

from lib.augment import PREPROCESSING
from lib.batches import PatchSource, Rows
from lib.checkpoint import load_model, state_sha256
from lib.config import load_config
from lib.metrics import compute_metrics
from lib.models import build_model
from lib.pcam import open_split
from lib.predict import evaluate, predict_batch, predict_rows

DIHEDRAL = [
    lambda x, k=k, flip=flip: torch.rot90(x.flip(2) if flip else x, k, (1, 2))
    for k in range(4)
    for flip in (0, 1)
]


@pytest.fixture(scope="module")
def trained(quick_run, pcam_dir):
    """(model, config, patch source of valid, labels) of a finished run."""
    model, cfg, _ = load_model(quick_run)
    split = open_split(pcam_dir, "valid")
    return model, cfg, PatchSource(split.images, "disk", torch.device("cpu")), split.labels


def by_hand(model, images):
    """Logits (B,) of uint8 patches, from the definition of the preprocessing."""
    mean, std = torch.tensor(PREPROCESSING["mean"]), torch.tensor(PREPROCESSING["std"])
    with torch.no_grad():
        return model(((images.float() / 255 - mean) / std).permute(0, 3, 1, 2)).float().flatten()


def test_logits_are_those_of_the_normalised_patch(trained):
    images = torch.from_numpy(draw_patches(8, 5)[0])
    found = predict_batch(trained[0], images, "fp32", 1, PREPROCESSING)
    assert found.dtype == torch.float32 and torch.allclose(
        found, by_hand(trained[0], images), atol=1e-5
    )


def shift(images):
    """Patches moved 1 pixel down and 3 to the right, the edge repeated."""
    return images[:, (torch.arange(96) - 1).clamp(0)][:, :, (torch.arange(96) - 3).clamp(0)]


def test_eight_views_are_the_mean_logit_over_the_eight_symmetries_each_shifted():
    images = torch.from_numpy(draw_patches(6, 6)[0])
    # which, unlike p4m, sees a symmetry
    model = build_model(load_config(overrides=["model=cnn", "cnn_width=4"])).eval()
    expected = torch.stack([by_hand(model, shift(turn(images))) for turn in DIHEDRAL])
    assert len({tuple(row.tolist()) for row in expected}) == 8, (
        "the symmetries have to differ for this to say something"
    )
    found = predict_batch(model, images, "fp32", 8, PREPROCESSING)
    assert torch.allclose(found, expected.mean(0), atol=1e-5)
    turned = predict_batch(model, DIHEDRAL[5](images).contiguous(), "fp32", 8, PREPROCESSING)
    assert torch.allclose(found, turned, atol=1e-5), (
        "eight views of a turned patch are the same eight views"
    )


def test_the_preprocessing_is_the_one_that_is_handed_over(trained):
    images = torch.from_numpy(draw_patches(4, 7)[0])
    other = {"mean": [0.1, 0.2, 0.3], "std": [0.5, 0.5, 0.5]}
    found = predict_batch(trained[0], images, "fp32", 1, other)
    assert not torch.allclose(
        found, predict_batch(trained[0], images, "fp32", 1, PREPROCESSING), atol=1e-3
    )


def test_logits_are_float32_in_either_precision(trained):
    images = torch.from_numpy(draw_patches(4, 8)[0])
    full, half = (
        predict_batch(trained[0], images, precision, 1, PREPROCESSING)
        for precision in ("fp32", "bf16")
    )
    assert full.dtype == half.dtype == torch.float32
    assert torch.allclose(full, half, atol=0.05) and not torch.equal(full, half)


def test_logits_follow_the_rows_asked_for_in_blocks_of_any_size(trained):
    model, cfg, source, _ = trained
    rows = np.random.default_rng(0).permutation(len(source))
    whole = predict_rows(model, source, np.arange(len(source)), cfg, 1)
    for size in (7, 64):
        object.__setattr__(changed := copy.copy(cfg), "eval_batch_size", size)
        assert np.allclose(predict_rows(model, source, rows, changed, 1), whole[rows], atol=1e-5)


def test_evaluation_scores_the_logits_and_changes_no_weight_or_buffer(trained):
    model, cfg, source, labels = trained
    model = copy.deepcopy(model).train()  # as it may be in the middle of training
    before = state_sha256(model.state_dict())
    rows = Rows(np.arange(len(labels)), labels, {})
    scores = evaluate(model, source, rows, cfg)
    assert state_sha256(model.state_dict()) == before
    assert scores == compute_metrics(labels, predict_rows(trained[0], source, rows.index, cfg, 1))
