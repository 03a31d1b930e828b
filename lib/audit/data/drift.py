"""Whether splits, and slides, look alike: brightness, contrast, saturation, stains, sharpness."""

import numpy as np

from lib.audit import build_finding
from lib.audit.survey import Survey
from lib.features import NAMES

NUM_PERMUTATIONS = 200
LEAST_EFFECT = 0.35  # standard deviations from which a drift is worth a warning
# robust deviations of a slide's mean among slides, of slides with so many patches
SLIDE_DEVIATIONS, LEAST_PATCHES = 4.0, 10


def check_drift(surveys: list[Survey]) -> list[dict]:
    """A finding for each split against train, and one for slides that stand out."""
    findings, outlying = [], []
    trains = [survey for survey in surveys if survey.name == "train" and len(survey.intact)]
    for survey in surveys:
        if trains and survey.name != "train" and len(survey.intact):
            findings.append(compare_splits(trains[0], survey))
        if survey.slides is not None:
            outlying += find_outlying_slides(survey)
    if outlying:
        outlying.sort(key=lambda row: -row["deviations"])
        farthest = outlying[0]
        num_slides = len({(row["split"], row["slide"]) for row in outlying})
        measured = f"{num_slides:,} slides stand out, the most {farthest['slide']} of"
        measured += f" {farthest['split']} in {farthest['feature']}"
        limit = f"{SLIDE_DEVIATIONS:g} deviations"
        advice = "another scanner, stain or focus: look, and score these slides apart"
        check = "drift of slides"
        findings.append(build_finding(check, "warning", measured, limit, advice, outlying))
    return findings


def compare_splits(train: Survey, other: Survey) -> dict:
    """The finding for the features of two splits: differences of means in standard deviations,
    against those that exchanged slides give.
    """
    ours, theirs = number_slides(train), number_slides(other)
    num_ours = ours.max() + 1
    slides = np.concatenate([ours, theirs + num_ours])
    is_other = np.arange(slides.max() + 1) >= num_ours  # by slide
    features = np.concatenate([stack_features(train), stack_features(other)])
    effect, worst = find_effect(features, is_other[slides])
    # whole slides change sides: patches of one slide look alike anyway
    rng, by_chance = np.random.default_rng(0), []
    for _ in range(NUM_PERMUTATIONS):
        by_chance.append(find_effect(features, rng.permutation(is_other)[slides])[0])
    limit = max(LEAST_EFFECT, np.quantile(by_chance, 0.95))
    measured = f"{other.name} differs from train most in {NAMES[worst]}, by {effect:.2f}"
    severity, advice = "note", ""
    if effect > limit:
        severity = "warning"
        advice = "a threshold set here may not hold there: compare calibration on both"
    return other.finding("drift", severity, measured, f"{limit:.2f} deviations", advice)


def number_slides(survey: Survey) -> np.ndarray:
    """The slide of each intact row, int64 (N,) from 0; without names each row is its own."""
    rows = survey.intact
    slides = rows if survey.slides is None else survey.slides[rows]
    return np.unique(slides, return_inverse=True)[1]


def stack_features(survey: Survey) -> np.ndarray:
    """Features float64 (N, 6) of the intact rows."""
    columns = [survey.table[name][survey.intact] for name in NAMES]
    return np.stack(columns, 1).astype(np.float64)


def find_effect(features: np.ndarray, is_other: np.ndarray) -> tuple[float, int]:
    """How far the means of features (N, 6) lie apart on both sides of `is_other` (N,), in standard
    deviations, at most, and the number of that feature.
    """
    ours, theirs = features[~is_other], features[is_other]
    spread = np.sqrt((ours.var(0) + theirs.var(0)) / 2)
    effects = np.abs(theirs.mean(0) - ours.mean(0)) / np.maximum(spread, 1e-9)
    return effects.max(), effects.argmax()


def find_outlying_slides(survey: Survey) -> list[dict]:
    """A row for each slide and feature where the slide's mean lies far from those of the others, by
    the median absolute deviation.
    """
    intact, rows = survey.intact, []
    names, slide_of_row = np.unique(survey.slides[intact], return_inverse=True)
    sizes = np.bincount(slide_of_row)
    for feature in NAMES:
        means = np.bincount(slide_of_row, survey.table[feature][intact]) / sizes
        away = np.abs(means - np.median(means))
        deviations = away / max(1.4826 * np.median(away), 1e-9)
        for slide in np.flatnonzero((deviations > SLIDE_DEVIATIONS) & (sizes >= LEAST_PATCHES)):
            row = {"split": survey.name, "slide": str(names[slide]), "feature": feature}
            rows.append(row | {"mean": float(means[slide]), "deviations": float(deviations[slide])})
    return rows
