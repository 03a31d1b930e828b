"""How many patches of each class there are: in the files, against the published counts, and in what
a sampler would draw.
"""

import dataclasses

import numpy as np

from lib.audit.survey import Survey
from lib.batches import Rows, epoch_order
from lib.config import Config
from lib.published import OFFICIAL

# a shift of prior counts if it is beyond chance and larger than this
PRIOR_SIGMA, PRIOR_SHIFT = 4, 0.03


def check_balance(surveys: list[Survey], cfg: Config) -> list[dict]:
    """Class counts, prior shift between train and the others, and what an epoch of train draws with
    `balance: sampler`.
    """
    findings, train = [], None
    for survey in surveys:
        labels = survey.labels[survey.labels >= 0]
        if not len(labels):
            continue
        counts, share = np.bincount(labels, minlength=2), labels.mean()
        official = OFFICIAL[survey.name]["rows"]
        measured = f"{len(survey):,} patches, {counts[0]:,} negative, {counts[1]:,} positive"
        measured += f" ({share:.1%}); the published split has {official:,}"
        severity, advice = "note", ""
        if not 0.4 <= share <= 0.6:
            severity, advice = "warning", "accuracy and F2 say little here: use AUC;"
            advice += " balance=loss or balance=sampler weighs the classes"
        rows = count_rows(survey, counts)
        findings.append(
            survey.finding("balance", severity, measured, "half and half", advice, rows)
        )
        if not counts.all():
            measured = "all patches are of one class: train.py refuses, and AUC is not defined"
            advice = "split the patches again, so that each split has both classes"
            findings.append(survey.finding("one class", "error", measured, "", advice))
        if survey.name == "train":
            train = labels
            if counts.all():
                findings.append(draw_epoch(survey, cfg))
        elif train is not None:
            findings.append(compare_priors(survey, labels, train))
    return findings


def count_rows(survey: Survey, counts: np.ndarray) -> list[dict]:
    return [
        {"split": survey.name, "label": label, "count": count}
        for label, count in enumerate(counts.tolist())
    ]


def draw_epoch(survey: Survey, cfg: Config) -> dict:
    """The finding for what an epoch with `balance: sampler` draws of train."""
    index = np.flatnonzero(survey.labels >= 0)
    rows = Rows(index, survey.labels[index].astype(np.uint8), {})
    cfg = dataclasses.replace(cfg, balance="sampler")
    drawn = epoch_order(rows, len(survey), 0, cfg).numpy() % len(survey)
    counts = np.bincount(survey.labels[drawn], minlength=2)
    measured = f"an epoch with balance=sampler draws {counts[0]:,} negative and {counts[1]:,}"
    measured += f" positive, a patch up to {np.bincount(drawn).max()} times: that is the sampler's"
    measured += " balance, not the data's"
    rows = count_rows(survey, counts)
    return survey.finding("balance after sampling", "note", measured, rows=rows)


def compare_priors(survey: Survey, labels: np.ndarray, train: np.ndarray) -> dict:
    """The finding for the share of positives among labels (N,) of a split, against train's (M,)."""
    difference = abs(train.mean() - labels.mean())
    pooled = np.concatenate([train, labels]).mean()
    error = np.sqrt(pooled * (1 - pooled) * (1 / len(train) + 1 / len(labels)))
    sigma = difference / max(error, 1e-12)
    measured = f"{train.mean():.1%} positive in train, {labels.mean():.1%} in {survey.name}"
    measured += f" ({sigma:.1f} sigma)"
    if sigma > PRIOR_SIGMA and difference > PRIOR_SHIFT:
        advice = "probabilities of a model trained on the one are too high or low on the other"
        return survey.finding("prior shift", "warning", measured, "", advice)
    return survey.finding("prior shift", "note", measured)
