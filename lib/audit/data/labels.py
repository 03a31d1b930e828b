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

LEAST_ROWS = 100  # of each class in a split: fewer teach nothing
NUM_BINS = 60  # of a calibration
BUDGET = 2.0  # the list is so many times as long as the number of labels that seem wrong
# out of fold: below, a disagreement says more about the model than about the label
LEAST_AUC = 0.75
# AUC of a split by a model of the others below which their labels contradict each other, and out
# of fold below which labels cannot be learnt
CONTRADICTORY_AUC, UNLEARNT_AUC = 0.35, 0.6
# log likelihood that labels without relation to the patches gain on a stretch of rows
LEAST_EVIDENCE, LEAST_STRETCH, MOST_STRETCHES = 25.0, 40, 8
MOST_LAG = 5  # rows by which labels may be out of step


def check_labels(
    surveys: list[Survey], groups_of: dict[str, np.ndarray], out: Path, logits=None
) -> list[dict]:
    """Findings for each split with labels; OUT/out_of_fold.csv ranks all labels.

    `groups_of` gives the group of each row (N,) of each split. `logits` (N,), of train, come from
    the runs of its folds; without them the small model judges.
    """
    findings, judged, rows_of, groups = [], [], [], []
    for survey in surveys:
        rows = survey.intact
        rows = rows[survey.labels[rows] >= 0]
        if logits is not None:
            rows = rows[~np.isnan(logits[rows])] if survey.name == "train" else rows[:0]
        group = groups_of[survey.name][rows]
        is_alone = logits is None and len(np.unique(group)) == 1  # no fold is left to learn from
        if np.bincount(survey.labels[rows], minlength=2).min() >= LEAST_ROWS and not is_alone:
            judged.append(survey)
            rows_of.append(rows)
            groups.append(group)
        else:
            measured = "too few labels to learn from"
            limit = f"{LEAST_ROWS} of each class, of two slides or more"
            findings.append(survey.finding("labels", "note", measured, limit, "not checked"))
    if not judged:
        return findings
    if logits is None:
        own, across = predict_out_of_fold(judged, rows_of, groups)
        blame_smallest(judged, rows_of, across)
    else:
        own = [logits[rows_of[0]]]
        across = [np.full(len(rows_of[0]), np.nan)]
    table = []
    for survey, rows, scores, others, group in zip(
        judged, rows_of, own, across, groups, strict=True
    ):
        misaligned = find_misaligned(survey, rows, scores, others)
        findings += misaligned
        suspects = [row["index"] for finding in misaligned for row in finding["rows"]]
        is_aligned = ~np.isin(rows, suspects)
        if is_aligned.any():
            aligned = rows[is_aligned]
            findings.append(review(survey, aligned, scores[is_aligned], group[is_aligned], table))
    table.sort(key=lambda row: -row[-1])
    write_csv(out / "out_of_fold.csv", ("split", "index", "label", "probability", "doubt"), table)
    return findings


def blame_smallest(judged: list[Survey], rows_of: list, across: list) -> None:
    """Where splits contradict each other, leave the scores `across` them to the smallest alone: of
    two splits with opposite labels, the larger one is more likely right.
    """
    contradictory = []
    for number, (survey, rows) in enumerate(zip(judged, rows_of, strict=True)):
        if compute_auc(survey.labels[rows], across[number]) < CONTRADICTORY_AUC:
            contradictory.append(number)
    contradictory.sort(key=lambda number: len(rows_of[number]))
    for number in contradictory[1:]:
        across[number] = np.full(len(rows_of[number]), np.nan)


def calibrate(labels: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """Probabilities (N,) of label 1, above 0 and below 1: the share of positives among patches of
    like scores, made monotone.
    """
    bins = np.array_split(np.argsort(scores, kind="stable"), min(NUM_BINS, len(scores)))
    shares = np.array([(labels[part].sum() + 0.5) / (len(part) + 1) for part in bins])
    highest_below = np.maximum.accumulate(shares)
    lowest_above = np.minimum.accumulate(shares[::-1])[::-1]
    middles = [scores[part].mean() for part in bins]
    return np.interp(scores, middles, (highest_below + lowest_above) / 2)


def review(survey: Survey, rows, scores, groups, table: list) -> dict:
    """The finding for labels that deserve a second look; adds rows of out_of_fold.csv."""
    labels = survey.labels[rows]
    probs = calibrate(labels, scores).round(4)
    rate, least, doubt = fit_label_noise(labels, scores, groups)
    doubt = doubt.round(6)
    columns = (rows.tolist(), labels.tolist(), probs.tolist(), doubt.tolist())
    table += [[survey.name, *cells] for cells in zip(*columns, strict=True)]
    auc = compute_auc(labels, scores)
    measured = f"out-of-fold AUC {auc:.4f} on {len(rows):,} patches; "
    severity, limit, suspects = "warning", "", ()
    if not auc >= LEAST_AUC:
        measured += "models this weak cannot judge labels"
        limit = f"{LEAST_AUC:g}"
        advice = "--train-folds, or --runs with the runs of your folds"
    elif least < LEAST_RATE:
        measured += f"at least {least:.1%} of the labels fit an exchange, {rate:.1%} fits best"
        severity, limit = "note", f"{LEAST_RATE:.0%}"
        advice = "out_of_fold.csv ranks all, should you look nevertheless"
    else:
        num = int(np.ceil(BUDGET * rate * len(rows)))
        chosen = np.argsort(-doubt, kind="stable")[:num]
        measured += f"{rate:.1%} of the labels seem exchanged, the {num:,} likeliest are listed"
        advice = "a list for review, not a verdict: look at each; out_of_fold.csv ranks all"
        columns = {"probability": probs[chosen], "reason": "label", "score": doubt[chosen]}
        suspects = survey.rows(rows[chosen], **columns)
    return survey.finding("labels to review", severity, measured, limit, advice, suspects)


def find_misaligned(survey: Survey, rows, scores, others) -> list[dict]:
    """Findings for a split whose labels cannot be learnt or contradict those of other splits, and
    for stretches of its rows whose labels have no relation to the patches, or the opposite one.
    """
    labels = survey.labels[rows]
    own_auc = compute_auc(labels, scores)
    other_auc = compute_auc(labels, others)  # 0.5 where there are none
    if own_auc < UNLEARNT_AUC:
        lag = find_lag(labels, others)
        measured = f"the labels cannot be learnt (out-of-fold AUC {own_auc:.3f}){lag}"
        return [report(survey, rows, measured)]
    if other_auc < CONTRADICTORY_AUC:
        measured = f"a model of the other splits has AUC {other_auc:.3f} here: labels are"
        measured += " inverted, here or there"
        return [report(survey, rows, measured)]
    if own_auc < LEAST_AUC:
        return []
    probs = calibrate(labels, scores).clip(0.02, 0.98)
    base = labels.mean()
    gain = np.log(np.where(labels == 1, base / probs, (1 - base) / (1 - probs)))
    findings = []
    for start, stop in find_stretches(gain):
        part = slice(start, stop)
        auc = compute_auc(labels[part], scores[part])
        if auc > UNLEARNT_AUC:
            continue
        relation = "inverted" if auc < CONTRADICTORY_AUC else "without relation to the patches"
        lag = find_lag(labels[part], scores[part])
        measured = f"the labels of rows {rows[start]:,} to {rows[stop - 1]:,} are {relation}"
        measured += f" (AUC {auc:.3f}, {own_auc:.3f} in all){lag}"
        findings.append(report(survey, rows[part], measured))
    return findings


def report(survey: Survey, rows: np.ndarray, measured: str) -> dict:
    advice = "look how x and y were written; quarantine_reasons takes `misaligned`"
    suspects = survey.rows(rows, reason="misaligned", score=1.0)
    return survey.finding("labels: misaligned", "error", measured, "", advice, suspects)


def find_stretches(gain: np.ndarray) -> list[tuple[int, int]]:
    """Stretches (start, stop) of rows with the largest sums of `gain` (N,), in order of rows."""
    gain, stretches = gain.copy(), []
    for _ in range(MOST_STRETCHES):
        sums = np.concatenate([[0], np.cumsum(gain)])
        lowest = np.minimum.accumulate(sums)
        stop = int((sums - lowest).argmax())
        start = int(sums[: stop + 1].argmin())
        if sums[stop] - sums[start] < LEAST_EVIDENCE:
            break
        if stop - start >= LEAST_STRETCH:
            stretches.append((start, stop))
        gain[start:stop] = -1e9
    return sorted(stretches)


def find_lag(labels: np.ndarray, scores: np.ndarray) -> str:
    """Words for the number of rows by which labels (N,) are out of step with the scores (N,), or
    nothing.
    """
    lags = [lag for lag in range(-MOST_LAG, MOST_LAG + 1) if lag]
    aucs = [compute_auc(np.roll(labels, lag), scores) for lag in lags]
    best = int(np.argmax(aucs))
    if not aucs[best] > LEAST_AUC:
        return ""
    return f"; the labels {-lags[best]:+d} rows further fit (AUC {aucs[best]:.3f})"
