"""Which labels deserve a second look: predictions of models that have not seen them.

A small model judges each split out of fold, or the runs of a team's folds do. Three questions
follow: can the labels be learnt at all, is a stretch of rows out of step with its labels, and which
single labels disagree with what the model is surest of. The outcome is a list for review, never a
verdict.
"""

from pathlib import Path

import numpy as np

from lib.audit.data.outoffold import predict_out_of_fold
from lib.audit.label_noise import LEAST_RATE, fit_label_noise
from lib.audit.survey import Survey
from lib.files import write_csv
from lib.metrics import compute_auc

LEAST_ROWS = 200  # of each class in a split: fewer teach nothing
BUDGET = 2.0  # the list is so many times as long as the number of labels that seem wrong
# out of fold: below, a disagreement says more about the model than about the label
LEAST_AUC = 0.75
# AUC of a split by a model of the largest one below which their labels contradict each other, and
# out of fold below which labels cannot be learnt
CONTRADICTORY_AUC, UNLEARNT_AUC = 0.35, 0.55
# log likelihood that labels without relation to the patches gain on a stretch of rows
LEAST_EVIDENCE, LEAST_STRETCH, MOST_STRETCHES = 25.0, 40, 8


def check_labels(
    surveys: list[Survey], groups_of: dict[str, np.ndarray], out: Path, logits=None
) -> list[dict]:
    """Findings for each split with labels; OUT/out_of_fold.csv ranks all labels.

    `groups_of` gives the group of each row (N,) of each split. `logits` (N,), of train, come from
    the runs of its folds; without them the small model judges.
    """
    findings, parts, table = [], [], []
    for survey in surveys:
        is_judged = survey.labels >= 0
        if logits is not None:
            is_judged &= np.isfinite(logits) if survey.name == "train" else False
        rows = survey.intact[is_judged[survey.intact]]
        groups = groups_of[survey.name][rows]
        num_least = np.bincount(survey.labels[rows], minlength=2).min()
        # of one group no fold is left to learn from
        if num_least < LEAST_ROWS or len(np.unique(groups)) == 1:
            measured = f"fewer than {LEAST_ROWS} labels of a class, or one slide: too few to judge"
            findings.append(survey.finding("labels", "note", measured, "", "not checked"))
        else:
            parts.append((survey, rows, groups))
    if logits is None:
        parts.sort(key=lambda part: -len(part[1]))  # the largest split first
        scores = predict_out_of_fold(parts)
    else:
        scores = [(logits[rows], None) for _, rows, _ in parts]
    for (survey, rows, groups), (own, across) in zip(parts, scores, strict=True):
        misaligned = find_misaligned(survey, rows, own, across, groups)
        findings += misaligned
        suspects = [row["index"] for finding in misaligned for row in finding["rows"]]
        is_aligned = ~np.isin(rows, suspects)
        if is_aligned.any():
            aligned = rows[is_aligned], own[is_aligned], groups[is_aligned]
            findings.append(review(survey, *aligned, table))
    table.sort(key=lambda row: -row[-1])
    write_csv(out / "out_of_fold.csv", ("split", "index", "label", "probability", "doubt"), table)
    return findings


def review(survey: Survey, rows, scores, groups, table: list) -> dict:
    """The finding for labels that deserve a second look; adds rows of out_of_fold.csv."""
    labels = survey.labels[rows]
    rate, least, probs, doubt = fit_label_noise(labels, scores, groups)
    probs, doubt = probs.round(4), doubt.round(6)
    columns = (rows.tolist(), labels.tolist(), probs.tolist(), doubt.tolist())
    table += [[survey.name, *cells] for cells in zip(*columns, strict=True)]
    auc = compute_auc(labels, scores)
    measured = f"out-of-fold AUC {auc:.4f} on {len(rows):,} patches; "
    severity, suspects = "warning", ()
    if not auc >= LEAST_AUC:
        measured += "models this weak cannot judge labels"
        advice = "--train-folds, or --runs with the runs of your folds"
    elif least < LEAST_RATE:
        measured += f"at least {least:.1%} of the labels fit an exchange, {rate:.1%} fits best"
        severity, advice = "note", "out_of_fold.csv ranks all, should you look nevertheless"
    else:
        num = int(np.ceil(BUDGET * rate * len(rows)))
        chosen = np.argsort(-doubt, kind="stable")[:num]
        measured += f"{rate:.1%} of the labels seem exchanged, the {num:,} likeliest are listed"
        advice = "a list for review, not a verdict: look at each; out_of_fold.csv ranks all"
        columns = {"probability": probs[chosen], "reason": "label", "score": doubt[chosen]}
        suspects = survey.rows(rows[chosen], **columns)
    return survey.finding("labels to review", severity, measured, "", advice, suspects)


def find_misaligned(survey: Survey, rows, own, across, groups) -> list[dict]:
    """Findings for a split whose labels cannot be learnt or contradict those of another split, and
    for stretches of its rows whose labels have no relation to the patches, or the opposite one.

    `own` are scores out of fold (N,), `across` those by a model of the largest split, or None.
    """
    labels = survey.labels[rows]
    auc = compute_auc(labels, own)
    parts = []
    if auc < UNLEARNT_AUC:
        parts.append((rows, f"the labels cannot be learnt (out-of-fold AUC {auc:.3f})"))
    elif across is not None and compute_auc(labels, across) < CONTRADICTORY_AUC:
        parts.append((rows, "the labels contradict those of the largest split"))
    elif auc >= LEAST_AUC:
        _, _, probs, _ = fit_label_noise(labels, own, groups)
        given = np.where(labels == 1, probs, 1 - probs).clip(0.02, 0.98)
        base = np.where(labels == 1, labels.mean(), 1 - labels.mean())
        for start, stop in find_stretches(np.log(base / given)):
            part = rows[start:stop]
            auc = compute_auc(labels[start:stop], own[start:stop])
            relation = "inverted" if auc < CONTRADICTORY_AUC else "without relation to the patches"
            if auc < 0.6:
                words = f"the labels of rows {part[0]:,} to {part[-1]:,} are {relation}"
                parts.append((part, f"{words} (AUC {auc:.3f})"))
    advice = "look how x and y were written; quarantine_reasons takes `misaligned`"
    findings = []
    for part, measured in parts:
        suspects = survey.rows(part, reason="misaligned", score=1.0)
        check = "labels: misaligned"
        findings.append(survey.finding(check, "error", measured, "", advice, suspects))
    return findings


def find_stretches(gain: np.ndarray) -> list[tuple[int, int]]:
    """Stretches (start, stop) of rows with the largest sums of `gain` (N,), in order of rows."""
    gain, stretches = gain.copy(), []
    for _ in range(MOST_STRETCHES):
        sums = np.concatenate([[0], np.cumsum(gain)])
        stop = int((sums - np.minimum.accumulate(sums)).argmax())
        start = int(sums[: stop + 1].argmin())
        if sums[stop] - sums[start] < LEAST_EVIDENCE:
            break
        if stop - start >= LEAST_STRETCH:
            stretches.append((start, stop))
        gain[start:stop] = -1e9
    return sorted(stretches)
