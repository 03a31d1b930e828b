"""Which kinds of patches a model does worse on than on the rest: found on one half of the rows,
confirmed on the other.

A slice is defined by what can be seen of a patch, or where it comes from, never by its label or by
what the model says of it. Slices are judged by AUC, recall and specificity, which do not depend on
how many of a slice's patches are positive, as F2 does.
"""

import itertools
import math
from dataclasses import dataclass

import numpy as np

from lib.audit.resampling import draw_weights, estimate, resampled_scores, spread
from lib.audit.tissue import compute_tissue
from lib.batches import fold_of_rows
from lib.features import colour_statistics, compute_features, count_values, grey_planes
from lib.progress import Progress

SLICED = (
    "brightness",
    "saturation",
    "haematoxylin",
    "eosin",
    "sharpness",
    "tissue_share",
    "nuclear_density",
)
JUDGED = {"auc": (0, 1), "recall": (1,), "specificity": (0,)}  # and the classes that each rests on
SHOWN = ("f2", *JUDGED)
NUM_BINS = 5  # of a feature, with equally many patches
# of each class that a score rests on, in both halves, or nothing is concluded from it
LEAST_ROWS = 10
FALSE_DISCOVERIES = 0.05  # the share of what is found on the first half that may be found by chance


@dataclass(frozen=True)
class Answers:
    """What a model says of N patches: labels bool (N,), probs float64 (N,), called positive from
    `threshold` on. `rows` are two halves, int64 each, `groups` (N,) kept whole; `weights` uint8 (1
    + R, A) of each resample them, after a row of ones."""

    labels: np.ndarray
    probs: np.ndarray
    threshold: float
    groups: np.ndarray
    rows: tuple[np.ndarray, np.ndarray]
    weights: tuple[np.ndarray, np.ndarray]

    def half(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """(labels, probs) of one of the halves."""
        rows = self.rows[number]
        return self.labels[rows], self.probs[rows]

    def score(self, half: int, threshold: float, mask=None) -> dict[str, np.ndarray]:
        """The resampled scores of a half at a threshold, or of its rows in a mask bool (N,)."""
        rows = self.rows[half]
        weights = self.weights[half]
        if mask is not None:
            weights = weights[:, mask[rows]]
            rows = rows[mask[rows]]
        return resampled_scores(self.labels[rows], self.probs[rows], threshold, weights)


def split_answers(labels, probs, threshold: float, groups) -> Answers:
    """Answers in two halves by their groups (N,)."""
    half = fold_of_rows(groups, 2)
    rows = [np.flatnonzero(half == number) for number in (0, 1)]
    weights = [draw_weights(groups[part]) for part in rows]
    return Answers(np.asarray(labels, bool), probs, threshold, groups, rows, weights)


def describe_patches(blocks) -> dict[str, np.ndarray]:
    """Of each patch in blocks uint8 (B, 96, 96, 3) what it looks like, float32 (N,) by name, and
    its colour statistics, `colours` float64 (N, 9).
    """
    parts = []
    for block in blocks:
        counts = count_values(block)
        features = compute_features(block, counts, grey_planes(block)) | compute_tissue(block)
        parts.append(features | {"colours": colour_statistics(counts)})
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def build_slices(
    features: dict[str, np.ndarray], copies: np.ndarray, first_half: np.ndarray
) -> list[dict]:
    """Slices as {feature, slice, mask bool (N,)}: bins of SLICED features with edges of the first
    half, the two lowest and the two highest together besides, for what is wider than one; and
    whether a patch shares tissue with another, by its group of `copies` (N,)."""
    slices = []
    for name in SLICED:
        values = features[name]
        levels = np.arange(1, NUM_BINS) / NUM_BINS
        inner = np.quantile(values[first_half], levels).tolist()
        ends = [-np.inf, *inner, np.inf]
        pairs = list(itertools.pairwise(ends))
        pairs.append((-np.inf, ends[2]))
        pairs.append((ends[-3], np.inf))
        for low, high in dict.fromkeys(pairs):
            text = f"{low:.3g} to {high:.3g}"
            if low == -np.inf:
                text = f"below {high:.3g}"
            elif high == np.inf:
                text = f"{low:.3g} or more"
            mask = (values >= low) & (values < high)
            slices.append({"feature": name, "slice": text, "mask": mask})
    _, group, sizes = np.unique(copies, return_inverse=True, return_counts=True)
    is_shared = sizes[group] > 1
    text = "shares tissue with another patch"
    slices.append({"feature": "copies", "slice": text, "mask": is_shared})
    slices.append({"feature": "copies", "slice": "shares none", "mask": ~is_shared})
    return [part for part in slices if 0 < part["mask"].mean() < 1]


def measure_slices(slices: list[dict], answers: Answers) -> list[dict]:
    """A row a slice: how many patches in each half, its scores with intervals on the second half,
    those of the rest there, and by how much it falls behind the rest: on the first half
    `finding_gap` with the chance `p` of it, on the second `gap` with its interval."""
    rows = []
    with Progress(len(slices), "judging slices", "slices") as bar:
        for part in slices:
            mask = part["mask"]
            threshold = answers.threshold
            finding = answers.score(0, threshold, mask)
            finding_rest = answers.score(0, threshold, ~mask)
            scores = answers.score(1, threshold, mask)
            rest = answers.score(1, threshold, ~mask)
            labels = [answers.labels[half[mask[half]]] for half in answers.rows]
            num = len(labels[1])
            num_positive = int(labels[1].sum())
            row = {"feature": part["feature"], "slice": part["slice"]}
            row |= {"num_finding": len(labels[0]), "num": num, "num_positive": num_positive}
            always = 5 * num_positive / max(4 * num_positive + num, 1)
            row["always_positive_f2"] = always or math.nan
            for name in SHOWN:
                row |= spread(name, scores[name])
                row[f"rest_{name}"] = float(rest[name][0])
            for name, classes in JUDGED.items():
                counts = [(half == label).sum() for half in labels for label in classes]
                gaps = finding_rest[name] - finding[name]
                row[f"finding_{name}"] = float(finding[name][0])
                row[f"finding_gap_{name}"] = float(gaps[0])
                is_judged = min(counts) >= LEAST_ROWS
                row[f"p_{name}"] = chance_of(gaps) if is_judged else math.nan
                judged_gaps = rest[name] - scores[name]
                row |= spread(f"gap_{name}", judged_gaps)
            rows.append(row)
            bar.add()
    return rows


def chance_of(gaps: np.ndarray) -> float:
    """How likely a gap as large as the first of (1 + R,) is where there is none, its spread being
    that of the others (normal, one-sided); NaN where it has no interval, or does not vary."""
    value, low, _ = estimate(gaps)
    deviation = 0.0 if math.isnan(low) else np.nanstd(gaps[1:])
    if deviation < 1e-9:
        return math.nan
    num_deviations = value / deviation
    return math.erfc(num_deviations / math.sqrt(2)) / 2


def conclude(rows: list[dict]) -> dict | None:
    """Correct each `p` of these rows for their number, in place; note by which scores a slice is
    `found` and `confirmed`, and give the worst confirmed row, with the `measure` by which it is.
    None where nothing is confirmed.

    Found: the corrected p is below FALSE_DISCOVERIES (Benjamini and Hochberg 1995). Confirmed:
    found, and the interval of its gap to the rest on the other half lies above zero. Worst: the
    largest gap, on the half that finds. `error_ratio`: its errors for one of the rest on the other,
    for one in as many where the rest has none.
    """
    tried = [(row, f"p_{name}") for row in rows for name in JUDGED]
    tried = [(row, key) for row, key in tried if not math.isnan(row[key])]
    tried.sort(key=lambda pair: pair[0][pair[1]])
    lowest = 1.0
    for rank in range(len(tried), 0, -1):
        row, key = tried[rank - 1]
        lowest = min(lowest, row[key] * len(tried) / rank)
        row[key] = lowest
    confirmed = []
    for row in rows:
        worse_by = [name for name in JUDGED if row[f"p_{name}"] < FALSE_DISCOVERIES]
        certain = [name for name in worse_by if row[f"gap_{name}_low"] > 0]
        row |= {"found": " ".join(worse_by), "confirmed": " ".join(certain)}
        row["num_tried"] = len(tried)
        confirmed += [(row[f"finding_gap_{name}"], row, name) for name in certain]
    if not confirmed:
        return None
    _, row, name = max(confirmed, key=lambda entry: entry[0])
    rest_errors = max(1 - row[f"rest_{name}"], 1 / row["num"])
    return row | {"measure": name, "error_ratio": (1 - row[name]) / rest_errors}
