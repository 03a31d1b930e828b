"""Which kinds of patches a model does worse on than on the rest: found on one half of the rows,
confirmed on the other.

A slice is defined by what can be seen of a patch, never by its label or by what the model says of
it. Slices are judged by AUC, recall and specificity, which do not depend on how many of a slice's
patches are positive, as F2 does.
"""

from dataclasses import dataclass

import numpy as np

from lib.audit.resampling import draw_weights, resampled_scores, spread
from lib.audit.tissue import compute_tissue
from lib.batches import fold_of_rows
from lib.features import NAMES, measure_features
from lib.progress import Progress

JUDGED = ("auc", "recall", "specificity")
NUM_PARTS = 5  # of a feature, with equally many patches


@dataclass(frozen=True)
class Answers:
    """What a model says of N patches: labels bool (N,), probs float64 (N,), called positive from
    `threshold` on. `rows` are two halves, int64 each, that share no group; `weights` uint8 (1 + R,
    A) of each resample them, after a row of ones."""

    labels: np.ndarray
    probs: np.ndarray
    threshold: float
    rows: list
    weights: list

    def half(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """(labels, probs) of one of the halves."""
        rows = self.rows[number]
        return self.labels[rows], self.probs[rows]

    def score(self, half: int, threshold: float, mask=None) -> dict[str, np.ndarray]:
        """The resampled scores of a half at a threshold, or of its rows in a mask bool (N,)."""
        labels, probs = self.half(half)
        inside = slice(None) if mask is None else mask[self.rows[half]]
        weights = self.weights[half][:, inside]
        return resampled_scores(labels[inside], probs[inside], threshold, weights)


def split_answers(labels, probs, threshold: float, groups) -> Answers:
    """Answers in two halves by their groups (N,)."""
    half = fold_of_rows(groups, 2)
    rows = [np.flatnonzero(half == number) for number in (0, 1)]
    weights = [draw_weights(groups[part]) for part in rows]
    return Answers(np.asarray(labels, bool), probs, threshold, rows, weights)


def describe_patches(blocks) -> dict[str, np.ndarray]:
    """What each patch in blocks uint8 (B, 96, 96, 3) looks like, float (N,) by name."""
    parts = []
    for block in blocks:
        features = dict(zip(NAMES, measure_features(block).T, strict=True))
        parts.append(features | compute_tissue(block))
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def build_slices(features: dict[str, np.ndarray], first_half: np.ndarray) -> list[dict]:
    """Slices as {feature, slice, mask bool (N,)}: fifths of each feature (N,), with edges of the
    first half."""
    slices = []
    for name, values in features.items():
        levels = np.arange(1, NUM_PARTS) / NUM_PARTS
        edges = np.quantile(values[first_half], levels)
        part_of_row = np.searchsorted(edges, values, "right")
        texts = [f"{low:.3g} to {high:.3g}" for low, high in zip(edges, edges[1:], strict=False)]
        texts = [f"below {edges[0]:.3g}", *texts, f"{edges[-1]:.3g} or more"]
        for number, text in enumerate(texts):
            mask = part_of_row == number
            if 0 < mask.mean() < 1:
                slices.append({"feature": name, "slice": text, "mask": mask})
    return slices


def measure_slices(slices: list[dict], answers: Answers) -> list[dict]:
    """A row for each slice, as measure_slice gives it."""
    rows = []
    with Progress(len(slices), "judging slices", "slices") as bar:
        for part in slices:
            measures = measure_slice(part["mask"], answers)
            rows.append({"feature": part["feature"], "slice": part["slice"]} | measures)
            bar.add()
    return rows


def measure_slice(mask: np.ndarray, answers: Answers) -> dict:
    """Of the rows in a mask bool (N,): the scores on the second half, those of the rest there, and
    by how much they fall behind the rest: on the first half `finding_gap`, on the second `gap`;
    with intervals."""
    threshold = answers.threshold
    finding = answers.score(0, threshold, mask)
    finding_rest = answers.score(0, threshold, ~mask)
    scores = answers.score(1, threshold, mask)
    rest = answers.score(1, threshold, ~mask)
    judged = answers.rows[1]
    labels = answers.labels[judged[mask[judged]]]
    row = {"num": len(labels), "num_positive": int(labels.sum())}
    for name in JUDGED:
        row |= spread(name, scores[name])
        row[f"rest_{name}"] = float(rest[name][0])
        row |= spread(f"finding_gap_{name}", finding_rest[name] - finding[name])
        row |= spread(f"gap_{name}", rest[name] - scores[name])
    return row


def conclude(rows: list[dict]) -> dict | None:
    """Note by which scores each row of a slice is `confirmed` to be worse, and give the worst such
    row, with the `measure` by which it is. None where nothing is confirmed.

    Confirmed: the 95% interval of the gap to the rest lies above zero on both halves, which chance
    alone does in one of 1,600 comparisons. Worst: the largest gap on the first half.
    """
    worst = None
    for row in rows:
        confirmed = []
        for name in JUDGED:
            if row[f"finding_gap_{name}_low"] > 0 and row[f"gap_{name}_low"] > 0:
                confirmed.append(name)
        row["confirmed"] = " ".join(confirmed)
        for name in confirmed:
            gap = row[f"finding_gap_{name}"]
            if worst is None or gap > worst["finding_gap"]:
                worst = row | {"measure": name, "finding_gap": gap}
    return worst
