"""How many patches of each class there are, against the published counts."""

from lib.audit.survey import Survey
from lib.published import OFFICIAL


def check_balance(surveys: list[Survey]) -> list[dict]:
    """A finding for the class counts of each split."""
    findings = []
    for survey in surveys:
        labels = survey.labels[survey.labels >= 0]
        if not len(labels):
            continue
        num_positive, share = int(labels.sum()), labels.mean()
        num_negative = len(labels) - num_positive
        measured = f"{len(survey):,} patches, {num_negative:,} negative, {num_positive:,} positive"
        measured += f" ({share:.1%}); the published split has {OFFICIAL[survey.name]['rows']:,}"
        severity, advice = "note", ""
        if not 0.4 <= share <= 0.6:
            severity, advice = "warning", "accuracy and F2 say little here: use AUC;"
            advice += " balance=loss or balance=sampler weighs the classes"
        limit = "half and half"
        findings.append(survey.finding("balance", severity, measured, limit, advice))
        if share in (0, 1):
            measured = "all patches are of one class: train.py refuses, and AUC is not defined"
            advice = "split the patches again, so that each split has both classes"
            findings.append(survey.finding("one class", "error", measured, "", advice))
    return findings
