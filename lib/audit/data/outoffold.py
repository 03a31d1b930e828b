"""Predictions of labels by a small fast model that has not seen them: fixed features, and a linear
classifier for each fold.

The features are the survey's description of a patch, the stains of its centre, and answers of
filters of 6 x 6 pixels there, which are clusters of whitened pieces of the patches (Coates, Lee and
Ng 2011). Random features (Rahimi and Recht 2008) of the first two join them. The classifier is a
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
MIDDLE = slice(6, 21)  # answers of filters where the 32 pixels are that a label speaks of
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
    pieces = F.unfold(halve_centre(patches), SIDE).transpose(1, 2).reshape(-1, 3 * SIDE**2)
    chosen = np.random.default_rng(0).integers(0, len(pieces), NUM_PIECES)
    pieces = pieces[torch.from_numpy(chosen)]
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
def compute_inputs(survey: Survey, rows: np.ndarray, filters, biases) -> np.ndarray:
    """The classifier's inputs float16 (N, 61 + 33 + 4 K) for the rows of a split: the description
    of a patch, the stains of its centre, and of each filter the mean over all, and the mean,
    largest and root mean square in the middle.
    """
    answers, centres = [], []
    with Progress(len(rows), f"features of {survey.name}") as progress:
        for part in np.split(rows, range(256, len(rows), 256)):
            patches = survey.read(part)
            centres.append(measure_centre(patches))
            answer = torch.relu(F.conv2d(halve_centre(patches), filters, biases) - 0.5)
            middle = answer[:, :, MIDDLE, MIDDLE]
            pooled = [answer.mean((2, 3)), middle.mean((2, 3)), middle.amax((2, 3))]
            pooled.append(middle.square().mean((2, 3)).sqrt())
            answers.append(torch.cat(pooled, 1).sqrt().half())
            progress.add(len(part))
    described = survey.table["appearance"][rows]
    return np.concatenate([described, np.concatenate(centres), torch.cat(answers).numpy()], 1)


def predict_out_of_fold(parts: list[tuple]) -> list[tuple]:
    """Scores (N,) of the rows of each split, twice: by classifiers of the split's other folds, and
    by one of the first split, None for that one itself.

    A part is a survey, its rows (N,) and their groups (N,), the largest first; no group is in two
    folds.
    """
    scores, features, weights = [], None, None
    for survey, rows, groups in parts:
        labels, across = survey.labels[rows], None
        if features is None:
            filters = learn_filters(survey.read(rows[:: -(-len(rows) // NUM_PATCHES)]))
        inputs = compute_inputs(survey, rows, *filters)
        if features is None:
            features = RandomFeatures(inputs, inputs.shape[1] - 4 * NUM_FILTERS)
        else:
            across = score(features, inputs, weights)
        own, products = cross_validate(features, inputs, labels, groups)
        if weights is None:
            weights = solve(products)
        scores.append((own, across))
    return scores


def cross_validate(features: RandomFeatures, inputs, labels, groups):
    """Scores (N,) of rows by classifiers of the other folds, and the products of all rows."""
    names, group = np.unique(groups, return_inverse=True)
    fold_of_row = (np.random.default_rng(0).permutation(len(names)) % NUM_FOLDS)[group]
    folds = [np.flatnonzero(fold_of_row == fold) for fold in range(NUM_FOLDS)]
    is_sure, scores = np.ones(len(labels), bool), np.zeros(len(labels))
    for _ in range(ROUNDS):
        products = []
        for rows in folds:
            sure = rows[is_sure[rows]]
            products.append(sum_products(features, inputs[sure], labels[sure]))
        total = sum(products)
        for rows, mine in zip(folds, products, strict=True):
            scores[rows] = score(features, inputs[rows], solve(total - mine))
        agreement = (2.0 * labels - 1) * scores
        is_sure = agreement >= np.quantile(agreement, DOUBTFUL)
    return scores, total


def sum_products(features: RandomFeatures, inputs: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """What a least-squares classifier needs to know of its rows, float64 (E, E + 1): products of
    features with each other and with the label. Those of folds can be added.
    """
    total = 0.0
    for start in range(0, len(inputs), PART):
        expanded = features.expand(inputs[start : start + PART])
        targets = 2 * labels[start : start + PART, None] - np.float32(1)
        total = total + (expanded.T @ np.concatenate([expanded, targets], 1)).astype(np.float64)
    return total


def solve(products: np.ndarray) -> np.ndarray:
    """The classifier's weights (E,)."""
    return np.linalg.solve(products[:, :-1] + RIDGE * np.eye(len(products)), products[:, -1])


def score(features: RandomFeatures, inputs: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Scores (N,): the higher, the more likely is label 1."""
    parts = np.split(inputs, range(PART, len(inputs), PART))
    return np.concatenate([features.expand(part) @ weights for part in parts])
