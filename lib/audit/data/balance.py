"""How many patches of each class there are: in the files, against the published counts, and in what
a sampler would draw.
"""

import dataclasses

import numpy as np

from lib.audit import build_finding
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
    findings, share = [], {}
    for survey in surveys:
        known = survey.labels[survey.labels >= 0]
        if not len(known):
            continue
        negative, positive = np.bincount(known, minlength=2).tolist()
        share[survey.name] = positive / len(known), len(known)
        official = OFFICIAL[survey.name]["rows"]
        measured = (
            f"{len(survey):,} patches, {negative:,} negative, {positive:,} positive"
            f" ({positive / len(known):.1%})"
        )
        measured += f"; the published split has {official:,}" + (
            ", as many" if len(survey) == official else ""
        )
        rows = [
            {"split": survey.name, "label": label, "count": count}
            for label, count in enumerate((negative, positive))
        ]
        even = 0.4 <= positive / len(known) <= 0.6
        advice = (
            ""
            if even
            else (
                "accuracy and F2 say little here: use AUC; balance=loss or balance=sampler weighs"
                " the classes"
            )
        )
        findings.append(
            build_finding(
                "balance",
                "note" if even else "warning",
                measured,
                "half and half",
                advice,
                rows,
                survey.name,
            )
        )
        if not (negative and positive):
            measured = "all patches are of one class: train.py refuses, and AUC is not defined"
            advice = "split the patches again, so that each split has both classes"
            findings.append(
                build_finding("one class", "error", measured, advice=advice, split=survey.name)
            )
        if survey.name == "train" and negative and positive:
            index = np.flatnonzero(survey.labels >= 0)
            rows = Rows(index, survey.labels[index].astype(np.uint8), {})
            keys = epoch_order(
                rows, len(survey), 0, dataclasses.replace(cfg, balance="sampler")
            ).numpy() % len(survey)
            drawn = np.bincount(survey.labels[keys], minlength=2)
            measured = (
                f"an epoch with balance=sampler draws {drawn[0]:,} negative and {drawn[1]:,}"
                " positive"
            )
            measured += (
                f", a patch up to {np.bincount(keys).max()} times: that is the sampler's balance,"
                " not the data's"
            )
            table = [
                {"split": "train", "label": label, "count": int(count)}
                for label, count in enumerate(drawn)
            ]
            findings.append(
                build_finding("balance after sampling", "note", measured, rows=table, split="train")
            )
    for name in share:
        if name != "train" and "train" in share:
            (ours, num), (theirs, other) = share["train"], share[name]
            pooled = (ours * num + theirs * other) / (num + other)
            sigma = abs(ours - theirs) / max(
                np.sqrt(pooled * (1 - pooled) * (1 / num + 1 / other)), 1e-12
            )
            shifted = sigma > PRIOR_SIGMA and abs(ours - theirs) > PRIOR_SHIFT
            measured = f"{ours:.1%} positive in train, {theirs:.1%} in {name} ({sigma:.1f} sigma)"
            advice = (
                "probabilities of a model trained on the one are too high or low on the other"
                if shifted
                else ""
            )
            findings.append(
                build_finding(
                    "prior shift",
                    "warning" if shifted else "note",
                    measured,
                    advice=advice,
                    split=name,
                )
            )
    return findings
