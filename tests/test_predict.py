"""Prediction: views are turned pictures, order and block size do not matter, and the
model stays as it was.
"""

import copy
import itertools
from functools import partial

import numpy as np
import pytest
import torch
from conftest import draw_patches

from lib.augment import PREPROCESSING
from lib.batches import PatchSource, Rows
from lib.checkpoint import load_model, state_sha256
from lib.command import BadInput
from lib.config import load_config
from lib.features import measure_features
from lib.inputs import Block, Row
from lib.metrics import compute_metrics
from lib.models import build_model
from lib.pcam import open_split
from lib.predict import evaluate, predict_batch, predict_blocks, predict_rows

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


def predict(model, images, precision="fp32", views=1, preprocessing=PREPROCESSING):
    return predict_batch(model, images, precision, views, preprocessing)


def test_logits_are_those_of_the_normalised_patch(trained):
    images = torch.from_numpy(draw_patches(8, 5)[0])
    logits = predict(trained[0], images)
    assert logits.dtype == torch.float32
    assert torch.allclose(logits, by_hand(trained[0], images), atol=1e-5)


def shift(images):
    """Patches moved 1 pixel down and 3 to the right, the edge repeated."""
    return images[:, (torch.arange(96) - 1).clamp(0)][:, :, (torch.arange(96) - 3).clamp(0)]


def test_several_views_are_the_mean_logit_over_as_many_symmetries_each_shifted():
    images = torch.from_numpy(draw_patches(6, 6)[0])
    # which, unlike p4m, sees a symmetry
    model = build_model(load_config(overrides=["model=cnn", "cnn_width=4"])).eval()
    by_symmetry = torch.stack([by_hand(model, shift(turn(images))) for turn in DIHEDRAL])
    assert len(by_symmetry.unique(dim=0)) == 8, "else the test says nothing"
    turned = DIHEDRAL[2](images).contiguous()  # whose views are the same
    for views, expected in ((8, by_symmetry), (4, by_symmetry[::2])):  # the second are the turns
        logits = predict(model, images, views=views)
        assert torch.allclose(logits, expected.mean(0), atol=1e-5)
        assert torch.allclose(logits, predict(model, turned, views=views), atol=1e-5)


def test_preprocessing_and_precision_are_those_that_are_handed_over(trained):
    images = torch.from_numpy(draw_patches(4, 7)[0])
    logits = predict(trained[0], images)
    other = {"mean": [0.1, 0.2, 0.3], "std": [0.5, 0.5, 0.5]}
    changed = predict(trained[0], images, preprocessing=other)
    assert not torch.allclose(logits, changed, atol=1e-3)
    half = predict(trained[0], images, precision="bf16")
    assert half.dtype == torch.float32
    assert torch.allclose(logits, half, atol=0.05) and not torch.equal(logits, half)


@pytest.fixture
def blocks(trained):
    """A list of which blocks have been taken, and a generator of 20 blocks of one patch."""
    taken, images = [], trained[2].images.read(range(20))

    def take():
        for number in range(20):
            taken.append(number)
            yield partial(Block, [Row("x.h5", number)], images[number : number + 1])

    return taken, take()


def test_blocks_are_predicted_in_their_order_and_a_few_at_a_time(trained, blocks):
    taken, generator = blocks
    predicted = predict_blocks(trained[0], generator, "fp32", 1, PREPROCESSING)
    results = [next(predicted)]
    assert len(taken) <= 2 * torch.get_num_threads()
    results += predicted
    assert [block.rows[0].index for block, _, _ in results] == list(range(20))
    for block, features, logits in results:
        assert torch.equal(logits, predict(trained[0], torch.from_numpy(block.images)))
        assert np.array_equal(features, measure_features(block.images))


def test_a_block_that_cannot_be_decoded_ends_the_prediction_with_its_error(trained, blocks):
    def fail():
        raise BadInput("cut off")

    generator = itertools.chain(itertools.islice(blocks[1], 3), [fail], blocks[1])
    predicted = predict_blocks(trained[0], generator, "fp32", 1, PREPROCESSING)
    assert len([next(predicted) for _ in range(3)]) == 3
    with pytest.raises(BadInput, match="cut off"):
        next(predicted)


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
