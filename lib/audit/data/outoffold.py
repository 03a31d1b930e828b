"""Predictions of labels by a small fast model that has not seen them: fixed features, and a linear
classifier for each fold.

The features are the survey's description of a patch, the stains of its centre, and answers of
filters of 6 x 6 pixels, which are clusters of whitened pieces of the patches (Coates, Lee and Ng
2011). Random features (Rahimi and Recht 2008) of the first two join them. The classifier is a
least-squares one, whose sums over rows are computed once for all folds.
"""

import numpy as np
import torch
import torch.nn.functional as F

from lib.audit.appearance import RandomFeatures
from lib.audit.survey import Survey
from lib.features import DENSITY, UNMIX
from lib.progress import Progress

CROP, SIDE, NUM_FILTERS = 64, 6, 256  # pixels of the patch's centre, then halved
NUM_PIECES, NUM_PATCHES, NUM_ITERATIONS = 60_000, 3_000, 8  # that filters are clustered from
RIDGE = 100.0
# in the second round the classifiers learn without this share of the rows, the most doubtful ones
ROUNDS, DOUBTFUL = 2, 0.06
AROUND = slice(24, 72)  # pixels: the 32 that a label speaks of, and 8 on each side
PART = 4_096  # rows worked on at a time
NUM_FOLDS = 5


def halve_centre(patches: np.ndarray) -> torch.Tensor:
    """The centre of patches uint8 (B, 96, 96, 3) at half resolution, float32 (B, 3, 32, 32)."""
    margin = (patches.shape[1] - CROP) // 2
    centre = np.ascontiguousarray(patches[:, margin:-margin, margin:-margin])
    return F.avg_pool2d(torch.from_numpy(centre).permute(0, 3, 1, 2).float() / 255, 2)


def learn_filters(patches: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    """Filters (K, 3, 6, 6) and their biases (K,), from patches uint8 (B, 96, 96, 3)."""
    rng = np.random.default_rng(0)
    pieces = F.unfold(halve_centre(patches), SIDE).transpose(1, 2).reshape(-1, 3 * SIDE**2)
    pieces = pieces[torch.from_numpy(rng.integers(0, len(pieces), NUM_PIECES))]
    mean = pieces.mean(0)
    values, vectors = torch.linalg.eigh(torch.cov((pieces - mean).T))
    whiten = vectors @ torch.diag((values + 1e-3).rsqrt()) @ vectors.T
    whitened = F.normalize((pieces - mean) @ whiten)
    centres = whitened[:NUM_FILTERS]
    for _ in range(NUM_ITERATIONS):
        nearest = (whitened @ centres.T).argmax(1)
        centres = F.normalize(torch.zeros_like(centres).index_add_(0, nearest, whitened))
    filters = centres @ whiten
    return filters.reshape(-1, 3, SIDE, SIDE), -(filters @ mean)


def measure_centre(patches: np.ndarray) -> np.ndarray:
    """Quantiles and deviations of the stains in the centre of patches, and quantiles around it,
    float16 (B, 33).
    """
    stains = DENSITY.astype(np.float32)[patches[:, AROUND, AROUND]] @ UNMIX.astype(np.float32)
    inner = stains[:, 8:40, 8:40].reshape(len(patches), -1, 3)
    outer = np.concatenate([stains[:, :8], stains[:, 40:]], 1).reshape(len(patches), -1, 3)
    middle = np.quantile(inner[:, ::2], (0.05, 0.2, 0.35, 0.5, 0.65, 0.8, 0.95), 1)
    beside = np.quantile(outer[:, ::2], (0.1, 0.5, 0.9), 1)
    columns = [*middle, *beside, inner.std(1)]
    return np.concatenate(columns, 1).astype(np.float16)


@torch.inference_mode()
def compute_answers(survey: Survey, rows: np.ndarray, filters, biases) -> np.ndarray:
    """float16 (N, 33 + 4 K) for the rows of a split: the stains of the centre, and of each filter
    the mean, largest and root mean square in the middle, and the mean over all.
    """
    parts = []
    with Progress(len(rows), f"features of {survey.name}") as progress:
        for part in np.array_split(rows, -(-len(rows) // 256)):
            patches = survey.read(part)
            answers = torch.relu(F.conv2d(halve_centre(patches), filters, biases) - 0.5)
            middle = answers[:, :, 6:21, 6:21]
            pooled = [middle.mean((2, 3)), answers.mean((2, 3)), middle.amax((2, 3))]
            pooled.append(middle.square().mean((2, 3)).sqrt())
            pooled = torch.cat(pooled, 1).sqrt().half().numpy()
            parts.append(np.concatenate([measure_centre(patches), pooled], 1))
            progress.add(len(part))
    return np.concatenate(parts)


def compute_inputs(surveys: list[Survey], rows_of: list[np.ndarray]) -> list[np.ndarray]:
    """The classifier's inputs float16 (N, D) for the rows of each split."""
    first, rows = max(zip(surveys, rows_of, strict=True), key=lambda pair: len(pair[1]))
    step = -(-len(rows) // NUM_PATCHES)
    filters, biases = learn_filters(first.read(rows[::step]))
    inputs = []
    for survey, rows in zip(surveys, rows_of, strict=True):
        answers = compute_answers(survey, rows, filters, biases)
        inputs.append(np.concatenate([survey.table["appearance"][rows], answers], 1))
    return inputs


def sum_products(features: RandomFeatures, inputs: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """What a least-squares classifier needs to know of its rows, float64 (E, E + 1): products of
    features with each other and with the label. Those of folds can be added.
    """
    total = 0.0
    for start in range(0, len(inputs), PART):
        expanded = features.expand(inputs[start : start + PART])
        targets = 2 * labels[start : start + PART, None] - np.float32(1)
        products = expanded.T @ np.concatenate([expanded, targets], 1)
        total = total + products.astype(np.float64)
    return total


def predict(features: RandomFeatures, inputs: np.ndarray, products: list) -> np.ndarray:
    """Scores (N,) by the classifier of all rows in `products`: the higher, the more likely is
    label 1.
    """
    total = sum(products)
    ridge = RIDGE * np.eye(len(total))
    weights = np.linalg.solve(total[:, :-1] + ridge, total[:, -1])
    parts = np.split(inputs, range(PART, len(inputs), PART))
    return np.concatenate([features.expand(part) @ weights for part in parts])


def predict_out_of_fold(
    surveys: list[Survey], rows_of: list[np.ndarray], groups_of: list[np.ndarray]
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Scores of the rows of each split, twice: by classifiers of the split's other folds, and by
    one of all other splits, NaN where there is none. No group (N,) is in two folds.
    """
    inputs = compute_inputs(surveys, rows_of)
    largest = max(inputs, key=len)
    features = RandomFeatures(largest, largest.shape[1] - 4 * NUM_FILTERS)
    own, products_of = [], []
    for survey, rows, values, groups in zip(surveys, rows_of, inputs, groups_of, strict=True):
        labels = survey.labels[rows]
        names, group = np.unique(groups, return_inverse=True)
        folds = (np.random.default_rng(0).permutation(len(names)) % NUM_FOLDS)[group]
        is_sure, scores = np.ones(len(rows), bool), np.zeros(len(rows))
        for _ in range(ROUNDS):
            products = []
            for fold in range(NUM_FOLDS):
                is_taught = (folds == fold) & is_sure
                products.append(sum_products(features, values[is_taught], labels[is_taught]))
            for fold in range(NUM_FOLDS):
                others = products[:fold] + products[fold + 1 :]
                scores[folds == fold] = predict(features, values[folds == fold], others)
            agreement = (2.0 * labels - 1) * scores
            is_sure = agreement >= np.quantile(agreement, DOUBTFUL)
        own.append(scores)
        products_of.append(sum(products))
    across = []
    for number, values in enumerate(inputs):
        others = products_of[:number] + products_of[number + 1 :]
        is_alone = not others
        across.append(
            np.full(len(values), np.nan) if is_alone else predict(features, values, others)
        )
    return own, across
