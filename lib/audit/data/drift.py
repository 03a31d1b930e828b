"""Whether splits, and slides, look alike: brightness, saturation, stain, sharpness; how well a
classifier tells them apart.
"""

import numpy as np

from lib.audit import finding
from lib.audit.survey import Survey
from lib.features import NAMES
from lib.metrics import compute_auc

MOST_ROWS, NUM_PERMUTATIONS = 20_000, 200
# standard deviations and AUC from which a drift is worth a warning
LEAST_EFFECT, LEAST_AUC = 0.35, 0.65
# robust deviations of a slide's mean among slides, of slides with so many patches
SLIDE_DEVIATIONS, LEAST_PATCHES = 4.0, 10


def check_drift(surveys: list[Survey]) -> list[dict]:
    """A finding for each split against train, and one for slides that stand out."""
    train = [survey for survey in surveys if survey.name == "train"]
    findings = [
        compare_splits(train[0], survey) for survey in surveys if train and survey.name != "train"
    ]
    if slides := [
        row for survey in surveys if survey.slides is not None for row in outlying_slides(survey)
    ]:
        measured = (
            f"{len(slides):,} slides stand out, the most {slides[0]['slide']} in"
            f" {slides[0]['feature']}"
        )
        advice = "another scanner, stain or focus: look, and score these slides apart"
        findings.append(
            finding(
                "drift of slides",
                "warning",
                measured,
                f"{SLIDE_DEVIATIONS:g} deviations",
                advice,
                slides,
            )
        )
    return findings


def feature_matrix(survey: Survey) -> tuple[np.ndarray, np.ndarray]:
    """Features float64 (N, 6) of the intact patches of a split, at most MOST_ROWS of them, drawn
    evenly, and the slide of each, or a name of its own."""
    rows = survey.intact
    rows = rows[np.linspace(0, len(rows) - 1, min(MOST_ROWS, len(rows))).astype(np.int64)]
    slides = (
        np.char.add(f"{survey.name} ", rows.astype(str))
        if survey.slides is None
        else survey.slides[rows]
    )
    return np.stack([survey.table[name][rows] for name in NAMES], 1).astype(np.float64), slides


def compare_splits(train: Survey, other: Survey) -> dict:
    """Differences of means in standard deviations, Kolmogorov-Smirnov distances, and the AUC of a
    linear classifier on features and their squares, fitted on one half and measured on the other,
    with the interval that exchanged split names give."""
    (ours, slides), (theirs, other_slides) = feature_matrix(train), feature_matrix(other)
    if min(len(ours), len(theirs)) < 4 * len(NAMES):
        measured = f"{len(ours):,} and {len(theirs):,} intact patches are too few to compare"
        return finding(
            "drift", "warning", measured, f"{4 * len(NAMES)}", "not checked", split=other.name
        )
    rows = []
    for name, a, b in zip(NAMES, ours.T, theirs.T, strict=True):
        spread = np.sqrt((a.var() + b.var()) / 2)
        both = np.sort(np.concatenate([a, b]))
        below = [np.searchsorted(np.sort(values), both, "right") / len(values) for values in (a, b)]
        row = {"feature": name, "train": float(a.mean()), other.name: float(b.mean())}
        rows.append(
            row
            | {
                "effect": float((b.mean() - a.mean()) / max(spread, 1e-9)),
                "ks": float(np.ptp(below, 0).max()),
            }
        )

    values = np.concatenate([ours, theirs])
    values = (values - values.mean(0)) / np.maximum(values.std(0), 1e-9)
    values = np.concatenate([np.ones((len(values), 1)), values, values**2], 1)
    member = np.repeat([0.0, 1.0], [len(ours), len(theirs)])
    rng = np.random.default_rng(0)
    half = rng.permutation(len(values)) % 2 == 0
    inverse = np.linalg.pinv(values[half])

    def auc(member) -> float:
        return compute_auc(member[~half], values[~half] @ (inverse @ member[half]))

    found = auc(member)
    # whole slides change sides where they are known: patches of one slide look alike anyway
    _, unit = np.unique(np.concatenate([slides, other_slides]), return_inverse=True)
    sides = np.zeros(unit.max() + 1)
    sides[unit[len(ours) :]] = 1
    low, high = np.quantile(
        [auc(rng.permutation(sides)[unit]) for _ in range(NUM_PERMUTATIONS)], (0.025, 0.975)
    )
    worst = max(rows, key=lambda row: abs(row["effect"]))
    drifted = found > high and (found > LEAST_AUC or abs(worst["effect"]) > LEAST_EFFECT)
    chance = f"by chance {low:.3f} to {high:.3f}" + (
        ", slides exchanged" if train.slides is not None else ""
    )
    measured = f"a classifier tells {other.name} from train with AUC {found:.3f} ({chance})"
    measured += f"; most of all by {worst['feature']}, {worst['effect']:+.2f} deviations"
    limit = f"AUC {LEAST_AUC:g}, {LEAST_EFFECT:g} deviations"
    advice = (
        "a threshold set here may not hold there: compare calibration on both" if drifted else ""
    )
    return finding(
        "drift", "warning" if drifted else "note", measured, limit, advice, rows, other.name
    )


def outlying_slides(survey: Survey) -> list[dict]:
    """Slides whose mean of a feature lies far from those of the others, by the median absolute
    deviation; farthest first.
    """
    names, inverse = np.unique(survey.slides[survey.intact], return_inverse=True)
    sizes, rows = np.bincount(inverse), []
    for name in NAMES:
        means = np.bincount(inverse, survey.table[name][survey.intact]) / sizes
        centre = np.median(means)
        deviation = 1.4826 * np.median(np.abs(means - centre))
        far = np.abs(means - centre) / max(deviation, 1e-9)
        for slide in np.flatnonzero((far > SLIDE_DEVIATIONS) & (sizes >= LEAST_PATCHES)):
            row = {
                "split": survey.name,
                "slide": str(names[slide]),
                "feature": name,
                "patches": int(sizes[slide]),
            }
            rows.append(
                row
                | {
                    "mean": float(means[slide]),
                    "median": float(centre),
                    "deviations": float(far[slide]),
                }
            )
    return sorted(rows, key=lambda row: -row["deviations"])
