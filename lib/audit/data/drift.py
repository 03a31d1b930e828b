"""Whether splits, and slides, look alike: brightness, saturation, stain, sharpness; how well a
classifier tells them apart.
"""

import numpy as np

from lib.audit import build_finding
from lib.audit.survey import Survey
from lib.features import NAMES
from lib.metrics import compute_auc

MOST_ROWS, NUM_PERMUTATIONS = 20_000, 200
LEAST_ROWS = 4 * len(NAMES)  # of a split
# standard deviations and AUC from which a drift is worth a warning
LEAST_EFFECT, LEAST_AUC = 0.35, 0.65
# robust deviations of a slide's mean among slides, of slides with so many patches
SLIDE_DEVIATIONS, LEAST_PATCHES = 4.0, 10


def check_drift(surveys: list[Survey]) -> list[dict]:
    """A finding for each split against train, and one for slides that stand out."""
    findings, rows = [], []
    trains = [survey for survey in surveys if survey.name == "train"]
    for survey in surveys:
        if trains and survey.name != "train":
            findings.append(compare_splits(trains[0], survey))
        if survey.slides is not None:
            rows += outlying_slides(survey)
    if rows:
        rows.sort(key=lambda row: -row["deviations"])
        num_slides = len({(row["split"], row["slide"]) for row in rows})
        measured = f"{num_slides:,} slides stand out, the most {rows[0]['slide']} of"
        measured += f" {rows[0]['split']} in {rows[0]['feature']}"
        limit = f"{SLIDE_DEVIATIONS:g} deviations"
        advice = "another scanner, stain or focus: look, and score these slides apart"
        findings.append(build_finding("drift of slides", "warning", measured, limit, advice, rows))
    return findings


def feature_matrix(survey: Survey) -> tuple[np.ndarray, np.ndarray]:
    """Features float64 (N, 6) of the intact patches of a split, at most MOST_ROWS of them, drawn
    evenly, and the slide of each, or a name of its own; no two splits share a name."""
    rows = survey.intact
    places = np.linspace(0, len(rows) - 1, min(MOST_ROWS, len(rows))).astype(np.int64)
    rows = rows[places]
    features = np.stack([survey.table[name][rows] for name in NAMES], 1).astype(np.float64)
    names = rows if survey.slides is None else survey.slides[rows]
    return features, np.char.add(f"{survey.name} ", names.astype(str))


def compare_splits(train: Survey, other: Survey) -> dict:
    """Differences of means in standard deviations, and the AUC of a linear classifier on features
    and their squares, fitted on one half and measured on the other, with the interval that
    exchanged split names give.
    """
    (ours, our_slides), (theirs, their_slides) = feature_matrix(train), feature_matrix(other)
    if min(len(ours), len(theirs)) < LEAST_ROWS:
        measured = f"{len(ours):,} and {len(theirs):,} intact patches are too few to compare"
        return other.finding("drift", "warning", measured, f"{LEAST_ROWS}", "not checked")
    rows = compare_features(ours, theirs, other.name)
    auc, low, high = tell_apart(ours, theirs, np.concatenate([our_slides, their_slides]))
    worst = max(rows, key=lambda row: abs(row["effect"]))
    measured = (
        f"a classifier tells {other.name} from train with AUC {auc:.3f} (by chance {low:.3f} to"
        f" {high:.3f}); most of all by {worst['feature']}, {worst['effect']:+.2f} deviations"
    )
    limit = f"AUC {LEAST_AUC:g}, {LEAST_EFFECT:g} deviations"
    severity, advice = "note", ""
    if auc > high and (auc > LEAST_AUC or abs(worst["effect"]) > LEAST_EFFECT):
        severity = "warning"
        advice = "a threshold set here may not hold there: compare calibration on both"
    return other.finding("drift", severity, measured, limit, advice, rows)


def compare_features(ours: np.ndarray, theirs: np.ndarray, other: str) -> list[dict]:
    """A row for each feature: means, and their difference in standard deviations."""
    rows = []
    for name, a, b in zip(NAMES, ours.T, theirs.T, strict=True):
        spread = np.sqrt((a.var() + b.var()) / 2)
        row = {"feature": name, "train": a.mean(), other: b.mean()}
        rows.append(row | {"effect": (b.mean() - a.mean()) / max(spread, 1e-9)})
    return rows


def tell_apart(
    ours: np.ndarray, theirs: np.ndarray, slides: np.ndarray
) -> tuple[float, float, float]:
    """The AUC of the classifier, and the interval that 95% of exchanges of split names give. Whole
    slides change sides: patches of one slide look alike anyway.
    """
    values = np.concatenate([ours, theirs])
    values = (values - values.mean(0)) / np.maximum(values.std(0), 1e-9)
    values = np.concatenate([np.ones((len(values), 1)), values, values**2], 1)
    rng = np.random.default_rng(0)
    half = rng.permutation(len(values)) % 2 == 0
    inverse = np.linalg.pinv(values[half])
    _, slide_of_row = np.unique(slides, return_inverse=True)
    sides = np.zeros(slide_of_row.max() + 1)
    sides[slide_of_row[len(ours) :]] = 1

    def held_out_auc(sides) -> float:
        is_theirs = sides[slide_of_row]
        return compute_auc(is_theirs[~half], values[~half] @ (inverse @ is_theirs[half]))

    by_chance = [held_out_auc(rng.permutation(sides)) for _ in range(NUM_PERMUTATIONS)]
    low, high = np.quantile(by_chance, (0.025, 0.975))
    return held_out_auc(sides), low, high


def outlying_slides(survey: Survey) -> list[dict]:
    """A row for each slide and feature where the slide's mean lies far from those of the others, by
    the median absolute deviation.
    """
    intact, rows = survey.intact, []
    names, inverse, sizes = np.unique(
        survey.slides[intact], return_inverse=True, return_counts=True
    )
    for feature in NAMES:
        means = np.bincount(inverse, survey.table[feature][intact]) / sizes
        median = np.median(means)
        deviation = 1.4826 * np.median(np.abs(means - median))
        far = np.abs(means - median) / max(deviation, 1e-9)
        for slide in np.flatnonzero((far > SLIDE_DEVIATIONS) & (sizes >= LEAST_PATCHES)).tolist():
            row = {"split": survey.name, "slide": str(names[slide]), "feature": feature}
            row |= {"patches": int(sizes[slide]), "mean": float(means[slide])}
            rows.append(row | {"median": float(median), "deviations": float(far[slide])})
    return rows
