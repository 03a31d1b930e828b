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

from lib.audit.copies import BLOCK
from lib.audit.resampling import draw_weights, estimate, resampled_scores
from lib.audit.tissue import compute_tissue
from lib.batches import fold_of_rows
from lib.features import (
    NAMES,
    colour_statistics,
    compute_features,
    count_values,
    grey_planes,
)
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
LEAST_GROUPS = 8  # that are resampled, the same: a few of them vary too little
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
    half = fold_of_rows(groups, 2)
    rows = np.flatnonzero(half == 0), np.flatnonzero(half == 1)
    weights = tuple(draw_weights(groups[part]) for part in rows)
    return Answers(
        np.asarray(labels, bool),
        np.asarray(probs, np.float64),
        threshold,
        np.asarray(groups),
        rows,
        weights,
    )


def describe_patches(images) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Of each patch of lib.pcam.Images what it looks like, float32 (N,) by name, and its colour
    statistics float64 (N, 9).
    """
    columns, colours = [], []
    with Progress(images.num, "describing patches") as bar:
        for _, block in images.blocks():
            for part in (block[start : start + BLOCK] for start in range(0, len(block), BLOCK)):
                counts = count_values(part)
                columns.append(
                    compute_features(part, counts, grey_planes(part)) | compute_tissue(part)
                )
                colours.append(colour_statistics(counts))
            bar.add(len(block))
    names = (*NAMES, "tissue_share", "nuclear_density")
    return {
        name: np.concatenate([part[name] for part in columns]) for name in names
    }, np.concatenate(colours)


def build_slices(
    features: dict[str, np.ndarray], copies: np.ndarray, first_half: np.ndarray
) -> list[dict]:
    """Slices as {feature, slice, mask bool (N,)}: bins of SLICED features with edges of the first
    half, the two lowest and the two highest together besides, for what is wider than one; and
    whether a patch shares tissue with another, by its group of `copies` (N,)."""
    slices = []
    for name in SLICED:
        values = features[name]
        ends = np.quantile(values[first_half], np.linspace(0, 1, NUM_BINS + 1))
        ends[0], ends[-1] = -np.inf, np.inf
        for low, high in dict.fromkeys(
            [*itertools.pairwise(ends), (-np.inf, ends[2]), (ends[-3], np.inf)]
        ):
            text = f"{low:.3g} to {high:.3g}" if low > -np.inf else f"below {high:.3g}"
            text = f"{low:.3g} or more" if high == np.inf else text
            slices.append(
                {"feature": name, "slice": text, "mask": (values >= low) & (values < high)}
            )
    _, group, sizes = np.unique(copies, return_inverse=True, return_counts=True)
    for text, mask in (
        ("shares tissue with another patch", sizes[group] > 1),
        ("shares none", sizes[group] == 1),
    ):
        slices.append({"feature": "copies", "slice": text, "mask": mask})
    return [part for part in slices if part["mask"].any() and not part["mask"].all()]


def slide_slices(slides: np.ndarray) -> list[dict]:
    """A slice for each slide (N,)."""
    return [
        {"feature": "slide", "slice": str(name), "mask": slides == name}
        for name in np.unique(slides)
    ]


def measure_slices(slices: list[dict], answers: Answers) -> list[dict]:
    """A row a slice: how many patches in each half, its scores with intervals on the second half,
    those of the rest there, and for each score the `finding_gap` by which it falls behind the rest
    on the first half, and the chance `p` that it would."""
    rows = []
    with Progress(len(slices), "judging slices", "slices") as bar:
        for part in slices:
            inside, rest = score_sides(answers, 0, part["mask"])
            shown, others = score_sides(answers, 1, part["mask"])
            picked = [half[part["mask"][half]] for half in answers.rows]
            kept = [answers.labels[index] for index in picked]
            many = min(len(np.unique(answers.groups[index])) for index in picked) >= LEAST_GROUPS
            row = {
                "feature": part["feature"],
                "slice": part["slice"],
                "num_finding": len(kept[0]),
                "num": len(kept[1]),
            }
            row["num_positive"] = int(kept[1].sum())
            row["always_positive_f2"] = (
                5 * row["num_positive"] / max(4 * row["num_positive"] + row["num"], 1) or math.nan
            )
            for name in SHOWN:
                row[name], row[f"{name}_low"], row[f"{name}_high"] = estimate(shown[name])
                row[f"rest_{name}"] = float(others[name][0])
            for name, classes in JUDGED.items():
                enough = many and all(
                    (labels == label).sum() >= LEAST_ROWS for labels in kept for label in classes
                )
                row[f"p_{name}"] = chance_of(rest[name] - inside[name]) if enough else math.nan
                row[f"finding_gap_{name}"] = float(rest[name][0] - inside[name][0])
            rows.append(row)
            bar.add()
    return rows


def score_sides(answers: Answers, half: int, mask: np.ndarray) -> tuple[dict, dict]:
    """The scores of a slice in a half, and of the rest of it, resampled together; of the rest of
    the second half as it is.
    """
    rows, weights = answers.rows[half], answers.weights[half]
    inside = mask[rows]
    return tuple(
        resampled_scores(
            answers.labels[rows[side]], answers.probs[rows[side]], answers.threshold, drawn[:, side]
        )
        for side, drawn in ((inside, weights), (~inside, weights[:1] if half else weights))
    )


def chance_of(gaps: np.ndarray) -> float:
    """How likely a gap as large as the first of (1 + R,) is where there is none, its spread being
    that of the others (normal, one-sided); NaN where it is not defined, or does not vary."""
    spread = np.nanstd(gaps[1:]) if np.isnan(gaps).mean() <= 0.05 else 0.0
    return math.erfc(gaps[0] / spread / math.sqrt(2)) / 2 if spread > 1e-9 else math.nan


def conclude(rows: list[dict]) -> dict | None:
    """Correct each `p` of these rows for their number, in place; note by which scores a slice is
    `found` and `confirmed`, and give the worst confirmed row, with the `measure` by which it is.
    None where nothing is confirmed.

    Found: the corrected p is below FALSE_DISCOVERIES (Benjamini and Hochberg 1995). Confirmed:
    found, and the interval of its score on the other half lies below the score of the rest. Worst:
    the largest gap, on the half that finds. `error_ratio`: its errors for one of the rest on the
    other, for one in as many where the rest has none.
    """
    tried = [(row, name) for row in rows for name in JUDGED if not math.isnan(row[f"p_{name}"])]
    tried.sort(key=lambda pair: pair[0][f"p_{pair[1]}"])
    chances = (
        np.array([row[f"p_{name}"] for row, name in tried])
        * len(tried)
        / np.arange(1, len(tried) + 1)
    )
    for (row, name), chance in zip(tried, np.minimum.accumulate(chances[::-1])[::-1], strict=True):
        row[f"p_{name}"] = float(min(chance, 1))
    worst = None
    for row in rows:
        found = [name for name in JUDGED if row[f"p_{name}"] < FALSE_DISCOVERIES]
        confirmed = [name for name in found if row[f"{name}_high"] < row[f"rest_{name}"]]
        row |= {"found": " ".join(found), "confirmed": " ".join(confirmed), "num_tried": len(tried)}
        for name in confirmed:
            if (
                worst is None
                or row[f"finding_gap_{name}"] > worst[f"finding_gap_{worst['measure']}"]
            ):
                ratio = (1 - row[name]) / max(1 - row[f"rest_{name}"], 1 / max(row["num"], 1))
                worst = row | {"measure": name, "error_ratio": ratio}
    return worst
