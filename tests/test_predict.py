"""Prediction: views are turned pictures, order and block size do not matter, and the
model stays as it was.
"""

import copy
import dataclasses
import itertools
from functools import partial

import numpy as np
import pytest
import torch
from conftest import draw_patches

from lib.augment import PREPROCESSING
from lib.batches import PatchSource
from lib.checkpoint import load_model, weights_sha256
from lib.command import BadInput
from lib.config import load_config
from lib.features import measure_features
from lib.inputs import Block, Row
from lib.models import build_model
from lib.pcam import open_split
from lib.predict import predict_batch, predict_blocks, predict_rows


@pytest.fixture(scope="module")
def trained(quick_run, pcam_dir):
    """(model, config, patch source of valid) of a finished run."""
    model, cfg, _ = load_model(quick_run)
    split = open_split(pcam_dir, "valid")
    return model, cfg, PatchSource(split.images, "disk", torch.device("cpu"))


def by_hand(model, images):
    """Logits (B,) of uint8 patches, from the definition of the preprocessing."""
    mean, std = torch.tensor(PREPROCESSING["mean"]), torch.tensor(PREPROCESSING["std"])
    with torch.no_grad():
        return model(((images.float() / 255 - mean) / std).permute(0, 3, 1, 2)).float().flatten()


def predict(model, images, views=1):
    return predict_batch(model, images, "fp32", views)


def turned_and_shifted(images):
    """The eight symmetries of patches, the four turns first, each moved 1 pixel down and 3 to the
    right, the edge repeated.
    """
    for flipped in (images, images.flip(2)):
        for turns in range(4):
            view = torch.rot90(flipped, turns, (1, 2))
            yield view[:, (torch.arange(96) - 1).clamp(0)][:, :, (torch.arange(96) - 3).clamp(0)]


def test_several_views_are_the_mean_logit_over_as_many_symmetries_each_shifted():
    images = torch.from_numpy(draw_patches(6, 6)[0])
    # which, unlike p4m, sees a symmetry
    model = build_model(load_config(overrides=["model=cnn", "cnn_width=4"])).eval()
    assert torch.allclose(predict(model, images), by_hand(model, images), atol=1e-5)
    by_symmetry = torch.stack([by_hand(model, view) for view in turned_and_shifted(images)])
    assert len(by_symmetry.unique(dim=0)) == 8, "else the test says nothing"
    for views in (4, 8):
        logits = predict(model, images, views=views)
        assert torch.allclose(logits, by_symmetry[:views].mean(0), atol=1e-5)


def test_blocks_are_predicted_in_order_a_few_at_a_time_and_one_that_fails_ends_it(trained):
    model, _, source = trained
    images = source.images.read(range(20))
    taken = []

    def take():
        for number in range(20):
            taken.append(number)
            yield partial(Block, [Row("x.h5", number)], images[number : number + 1])

    def fail():
        raise BadInput("cut off")

    blocks = itertools.chain(take(), [fail])
    predicted = predict_blocks(model, blocks, "fp32", 1)
    results = [next(predicted)]
    assert len(taken) <= 2 * torch.get_num_threads()
    results += itertools.islice(predicted, 19)
    with pytest.raises(BadInput, match="cut off"):
        next(predicted)
    assert [block.rows[0].index for block, _, _ in results] == list(range(20))
    for block, features, logits in results:
        assert torch.equal(logits, predict(model, torch.from_numpy(block.images)))
        assert np.array_equal(features, measure_features(block.images))


def test_logits_follow_the_rows_asked_for_and_evaluation_changes_nothing(trained):
    model, cfg, source = trained
    index = np.random.default_rng(0).permutation(len(source))
    whole = predict_rows(model, source, np.arange(len(source)), cfg, 1)
    in_sevens = dataclasses.replace(cfg, eval_batch_size=7)
    assert np.allclose(predict_rows(model, source, index, in_sevens, 1), whole[index], atol=1e-5)
    training = copy.deepcopy(model).train()  # as it may be in the middle of training
    before = weights_sha256(training.state_dict())
    assert np.array_equal(predict_rows(training, source, np.arange(len(source)), cfg, 1), whole)
    assert weights_sha256(training.state_dict()) == before
