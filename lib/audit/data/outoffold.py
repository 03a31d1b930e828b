"""Predictions of labels by a small fast model that has not seen them: fixed features, and a linear
classifier for each fold.

The features are the survey's description of a patch, and answers of filters of 6 x 6 pixels, which
are clusters of whitened pieces of the patches (Coates, Lee and Ng 2011). The classifier is a
least-squares one, whose sums over rows are computed once for all folds.
"""

import numpy as np
import torch
import torch.nn.functional as F

from lib.audit.survey import Survey
from lib.progress import Progress

CROP, SIDE, NUM_FILTERS = 64, 6, 256  # pixels of the patch's centre, then halved
NUM_PIECES, NUM_PATCHES, NUM_ITERATIONS = 60_000, 3_000, 8  # that filters are clustered from
RIDGE = 100.0
PART = 4_096  # rows worked on at a time
NUM_FOLDS = 5
NUM_DESCRIBED = 61  # columns of the survey's description, which come first


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


@torch.inference_mode()
def compute_answers(survey: Survey, rows: np.ndarray, filters, biases) -> np.ndarray:
    """Answers float16 (N, 4 K) of the filters in the rows of a split: their mean, largest and
    root mean square in the middle, and their mean over all.
    """
    parts = []
    with Progress(len(rows), f"features of {survey.name}") as progress:
        for part in np.array_split(rows, -(-len(rows) // 256)):
            answers = torch.relu(F.conv2d(halve_centre(survey.read(part)), filters, biases) - 0.5)
            middle = answers[:, :, 6:21, 6:21]
            pooled = [middle.mean((2, 3)), answers.mean((2, 3)), middle.amax((2, 3))]
            pooled.append(middle.square().mean((2, 3)).sqrt())
            parts.append(torch.cat(pooled, 1).sqrt().half().numpy())
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


class Scale:
    """From inputs (N, D) to features float32 (N, E), scaled robustly by some of the inputs."""

    def __init__(self, inputs: np.ndarray) -> None:
        some = inputs[:: -(-len(inputs) // 8_000)].astype(np.float32)
        low, self.middle, high = np.quantile(some, (0.1, 0.5, 0.9), 0).astype(np.float32)
        self.width = (high - low) / 2 + np.float32(0.01)

    def __call__(self, inputs: np.ndarray) -> np.ndarray:
        scaled = np.clip((inputs.astype(np.float32) - self.middle) / self.width, -5, 5)
        ones = np.ones((len(scaled), 1), np.float32)
        return np.concatenate([ones, scaled, np.abs(scaled[:, :NUM_DESCRIBED])], 1)


class Sums:
    """What a least-squares classifier needs to know of its rows; sums of folds can be added."""

    def __init__(self, scale: Scale, inputs: np.ndarray, labels: np.ndarray) -> None:
        self.squares, self.products = 0.0, 0.0
        for start in range(0, len(inputs), PART):
            features = scale(inputs[start : start + PART])
            self.squares = self.squares + (features.T @ features).astype(np.float64)
            targets = 2.0 * labels[start : start + PART] - 1
            self.products = self.products + features.T.astype(np.float64) @ targets


def fit(sums: list[Sums]) -> np.ndarray:
    """Weights (E,) of the classifier of all rows in `sums`."""
    squares = sum(part.squares for part in sums)
    ridge = RIDGE * np.eye(len(squares))
    return np.linalg.solve(squares + ridge, sum(part.products for part in sums))


def predict(scale: Scale, inputs: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Scores (N,): the higher, the more likely is label 1."""
    parts = range(0, len(inputs), PART)
    scores = [scale(inputs[start : start + PART]) @ weights for start in parts]
    return np.concatenate(scores) if scores else np.empty(0)


def predict_out_of_fold(
    surveys: list[Survey], rows_of: list[np.ndarray], groups_of: list[np.ndarray]
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Scores of the rows of each split, twice: by classifiers of the split's other folds, and by
    one of all other splits, NaN where there is none. No group (N,) is in two folds.
    """
    inputs = compute_inputs(surveys, rows_of)
    scale = Scale(max(inputs, key=len))
    own, sums_of = [], []
    for survey, rows, values, groups in zip(surveys, rows_of, inputs, groups_of, strict=True):
        labels = survey.labels[rows]
        names, group = np.unique(groups, return_inverse=True)
        fold_of_group = np.random.default_rng(0).permutation(len(names)) % NUM_FOLDS
        folds = fold_of_group[group]
        sums = [Sums(scale, values[folds == k], labels[folds == k]) for k in range(NUM_FOLDS)]
        scores = np.zeros(len(rows))
        for k in range(NUM_FOLDS):
            weights = fit([part for number, part in enumerate(sums) if number != k])
            scores[folds == k] = predict(scale, values[folds == k], weights)
        own.append(scores)
        sums_of.append(sums)
    across = []
    for number, values in enumerate(inputs):
        others = [part for at, sums in enumerate(sums_of) if at != number for part in sums]
        scores = np.full(len(values), np.nan)
        across.append(predict(scale, values, fit(others)) if others else scores)
    return own, across
