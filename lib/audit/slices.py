"""Which kinds of patches a model does worse on than on the rest: found on one half of the rows,
confirmed on the other.

A slice is defined by what can be seen of a patch, or where it comes from, never by its label or by
what the model says of it. Slices are judged by AUC, recall and specificity, which do not depend on
how many of a slice's patches are positive, as F2 does.
"""

import itertools
import math
import operator
from dataclasses import dataclass

import numpy as np

from lib.audit.resampling import draw_weights, estimate, resampled_scores
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


def split_answers(labels, probs, threshold: float, groups) -> Answers:
    """Answers in two halves by their groups (N,)."""
    groups = np.asarray(groups)
    half = fold_of_rows(groups, 2)
    rows = np.flatnonzero(half == 0), np.flatnonzero(half == 1)
    weights = draw_weights(groups[rows[0]]), draw_weights(groups[rows[1]])
    labels, probs = np.asarray(labels, bool), np.asarray(probs, np.float64)
    return Answers(labels, probs, threshold, groups, rows, weights)


def describe_patches(blocks) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Of each patch in blocks uint8 (B, 96, 96, 3) what it looks like, float32 (N,) by name, and
    its colour statistics float64 (N, 9).
    """
    columns, colours = [], []
    for block in blocks:
        counts = count_values(block)
        features = compute_features(block, counts, grey_planes(block))
        columns.append(features | compute_tissue(block))
        colours.append(colour_statistics(counts))
    features = {name: np.concatenate([part[name] for part in columns]) for name in columns[0]}
    return features, np.concatenate(colours)


def build_slices(
    features: dict[str, np.ndarray], copies: np.ndarray, first_half: np.ndarray
) -> list[dict]:
    """Slices as {feature, slice, mask bool (N,)}: bins of SLICED features with edges of the first
    half, the two lowest and the two highest together besides, for what is wider than one; and
    whether a patch shares tissue with another, by its group of `copies` (N,)."""
    slices = []
    for name in SLICED:
        values = features[name]
        inner = np.quantile(values[first_half], np.arange(1, NUM_BINS) / NUM_BINS).tolist()
        ends = [-np.inf, *inner, np.inf]
        pairs = [*itertools.pairwise(ends), (-np.inf, ends[2]), (ends[-3], np.inf)]
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
    for text, mask in (
        ("shares tissue with another patch", is_shared),
        ("shares none", ~is_shared),
    ):
        slices.append({"feature": "copies", "slice": text, "mask": mask})
    return [part for part in slices if part["mask"].any() and not part["mask"].all()]


def slide_slices(slides: np.ndarray) -> list[dict]:
    """A slice for each slide (N,)."""
    slices = []
    for name in np.unique(slides):
        slices.append({"feature": "slide", "slice": str(name), "mask": slides == name})
    return slices


def measure_slices(slices: list[dict], answers: Answers) -> list[dict]:
    """A row a slice: how many patches in each half, its scores with intervals on the second half,
    those of the rest there, and by how much it falls behind the rest: on the first half
    `finding_gap` with the chance `p` of it, on the second `gap` with its interval."""
    rows = []
    with Progress(len(slices), "judging slices", "slices") as bar:
        for part in slices:
            mask = part["mask"]
            finding, finding_rest = score_sides(answers, 0, mask)
            scores, rest = score_sides(answers, 1, mask)
            labels = [answers.labels[half[mask[half]]] for half in answers.rows]
            num, num_positive = len(labels[1]), int(labels[1].sum())
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
                row[f"p_{name}"] = chance_of(gaps) if min(counts) >= LEAST_ROWS else math.nan
                row |= spread(f"gap_{name}", rest[name] - scores[name])
            rows.append(row)
            bar.add()
    return rows


def spread(name: str, values: np.ndarray) -> dict[str, float]:
    """A resampled score as cells of a row: its value, and its interval as _low and _high."""
    return dict(zip((name, f"{name}_low", f"{name}_high"), estimate(values), strict=True))


def score_sides(answers: Answers, half: int, mask: np.ndarray) -> tuple[dict, dict]:
    """The scores of a slice in a half, and of the rest of it, resampled together."""
    rows, weights = answers.rows[half], answers.weights[half]
    sides = []
    for side in (mask[rows], ~mask[rows]):
        labels, probs = answers.labels[rows[side]], answers.probs[rows[side]]
        sides.append(resampled_scores(labels, probs, answers.threshold, weights[:, side]))
    return tuple(sides)


def chance_of(gaps: np.ndarray) -> float:
    """How likely a gap as large as the first of (1 + R,) is where there is none, its spread being
    that of the others (normal, one-sided); NaN where it has no interval, or does not vary."""
    value, low, _ = estimate(gaps)
    deviation = 0.0 if math.isnan(low) else np.nanstd(gaps[1:])
    return math.erfc(value / deviation / math.sqrt(2)) / 2 if deviation > 1e-9 else math.nan


def conclude(rows: list[dict]) -> dict | None:
    """Correct each `p` of these rows for their number, in place; note by which scores a slice is
    `found` and `confirmed`, and give the worst confirmed row, with the `measure` by which it is.
    None where nothing is confirmed.

    Found: the corrected p is below FALSE_DISCOVERIES (Benjamini and Hochberg 1995). Confirmed:
    found, and the interval of its gap to the rest on the other half lies above zero. Worst: the
    largest gap, on the half that finds. `error_ratio`: its errors for one of the rest on the other,
    for one in as many where the rest has none.
    """
    tried = [(row, name) for row in rows for name in JUDGED if not math.isnan(row[f"p_{name}"])]
    tried.sort(key=lambda pair: pair[0][f"p_{pair[1]}"], reverse=True)
    lowest = 1.0
    for rank, (row, name) in zip(range(len(tried), 0, -1), tried, strict=True):
        lowest = min(lowest, row[f"p_{name}"] * len(tried) / rank)
        row[f"p_{name}"] = lowest
    confirmed = []
    for row in rows:
        found = [name for name in JUDGED if row[f"p_{name}"] < FALSE_DISCOVERIES]
        certain = [name for name in found if row[f"gap_{name}_low"] > 0]
        row |= {"found": " ".join(found), "confirmed": " ".join(certain), "num_tried": len(tried)}
        confirmed += [(row[f"finding_gap_{name}"], row, name) for name in certain]
    if not confirmed:
        return None
    _, row, name = max(confirmed, key=operator.itemgetter(0))
    ratio = (1 - row[name]) / max(1 - row[f"rest_{name}"], 1 / max(row["num"], 1))
    return row | {"measure": name, "error_ratio": ratio}
