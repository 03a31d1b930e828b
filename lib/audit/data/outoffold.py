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

from lib.audit.survey import Survey
from lib.features import DENSITY, UNMIX
from lib.progress import Progress

CROP, SIDE, NUM_FILTERS = 64, 6, 256  # pixels of the patch's centre, then halved
NUM_PIECES, NUM_PATCHES, NUM_ITERATIONS = 60_000, 3_000, 8  # that filters are clustered from
NUM_COMPONENTS, NUM_HIDDEN, RIDGE = 50, 600, 100.0
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


class Scale:
    """From inputs (N, D) to features float32 (N, E), scaled robustly by some of the inputs; the
    first columns are not answers of filters.
    """

    def __init__(self, inputs: np.ndarray) -> None:
        some = inputs[:: -(-len(inputs) // 8_000)].astype(np.float32)
        low, self.middle, high = np.quantile(some, (0.1, 0.5, 0.9), 0).astype(np.float32)
        self.width = (high - low) / 2 + np.float32(0.01)
        self.num_first = some.shape[1] - 4 * NUM_FILTERS
        first = self.scale(some)[:, : self.num_first]
        values, vectors = np.linalg.eigh(np.cov(first.T))
        largest = vectors[:, -NUM_COMPONENTS:] / np.sqrt(values[-NUM_COMPONENTS:] + 0.05)
        rng = np.random.default_rng(0)
        random = rng.normal(0, 1 / np.sqrt(NUM_COMPONENTS), (largest.shape[1], NUM_HIDDEN))
        self.directions = (largest @ random).astype(np.float32)
        self.offsets = rng.normal(0, 1, NUM_HIDDEN).astype(np.float32)
        self.offsets -= first.mean(0) @ self.directions

    def scale(self, inputs: np.ndarray) -> np.ndarray:
        return np.clip((inputs.astype(np.float32) - self.middle) / self.width, -5, 5)

    def __call__(self, inputs: np.ndarray) -> np.ndarray:
        scaled = self.scale(inputs)
        first = scaled[:, : self.num_first]
        hidden = np.maximum(first @ self.directions + self.offsets, 0)
        ones = np.ones((len(scaled), 1), np.float32)
        return np.concatenate([ones, scaled, np.abs(first), hidden], 1)


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
        is_sure = np.ones(len(rows), bool)
        scores = np.zeros(len(rows))
        for _ in range(ROUNDS):
            sums = []
            for k in range(NUM_FOLDS):
                taught = (folds == k) & is_sure
                sums.append(Sums(scale, values[taught], labels[taught]))
            for k in range(NUM_FOLDS):
                weights = fit([part for number, part in enumerate(sums) if number != k])
                scores[folds == k] = predict(scale, values[folds == k], weights)
            agreement = (2.0 * labels - 1) * scores
            is_sure = agreement >= np.quantile(agreement, DOUBTFUL)
        own.append(scores)
        sums_of.append(sums)
    across = []
    for number, values in enumerate(inputs):
        others = [part for at, sums in enumerate(sums_of) if at != number for part in sums]
        scores = np.full(len(values), np.nan)
        across.append(predict(scale, values, fit(others)) if others else scores)
    return own, across
