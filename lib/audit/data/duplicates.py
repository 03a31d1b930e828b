"""Patches that are there more than once: equal, equal under a symmetry, or near copies; within a
split and across splits.
"""

from dataclasses import dataclass

import numpy as np

from lib.audit import build_finding
from lib.audit.copies import Overlaps, compare_patches, join
from lib.audit.survey import Survey
from lib.pcam import PATCH_BYTES

# patches of the published splits that are left when exact copies are taken out
DEDUPLICATED = {
    ("train", 262_144): 220_025,
    ("valid", 32_768): 28_108,
    ("test", 32_768): 29_383,
}
BRIGHTER = 0.015  # a gain that differs from 1 by more is called brighter or darker


@dataclass(frozen=True)
class Copies:
    """Copies over all splits, in numbers that run through them: `first` int64 (N,) equal patch of
    each, `overlaps` of pairs of first ones, `split` int64 (N,) the survey of each and `row` int64
    (N,) its row there."""

    first: np.ndarray
    overlaps: Overlaps
    split: np.ndarray
    row: np.ndarray


def find_copies(surveys: list[Survey]) -> Copies:
    """Compare all patches of all splits with each other."""
    split = np.repeat(np.arange(len(surveys)), [len(survey) for survey in surveys])
    row = np.concatenate([np.arange(len(survey)) for survey in surveys])

    def read(numbers) -> np.ndarray:
        patches = np.empty((len(numbers), 96, 96, 3), np.uint8)
        for number, survey in enumerate(surveys):
            mine = split[numbers] == number
            patches[mine] = survey.read(row[numbers[mine]])
        return patches

    prints = join([survey.prints for survey in surveys])
    # of what is mostly out of range, clipping has left nothing to compare
    for name, survey in enumerate(surveys):
        lost = (
            survey.table["num_nan"] + survey.table["num_below"] + survey.table["num_above"]
            > PATCH_BYTES // 2
        )
        numbers = np.flatnonzero(split == name)[lost]
        prints.key[numbers], prints.codes[numbers] = 0, -1
    first, overlaps = compare_patches(prints, read)
    return Copies(first, overlaps, split, row)


def describe_copy(overlap: Overlaps) -> str:
    """What makes the second of one near pair differ from the first, in words."""
    (dy, dx), gain = overlap.shift[0].tolist(), float(overlap.gain[0])
    words = []
    if dy or dx:
        words.append(f"shifted by {dy} {dx}")
    if abs(gain - 1) > BRIGHTER:
        words.append(f"{'brighter' if gain > 1 else 'darker'} by {abs(gain - 1):.0%}")
    if overlap.symmetry[0]:
        words.append("turned or mirrored")
    return ", ".join(words) or f"recompressed, or noise of {overlap.difference[0]:.1f} levels"


def check_duplicates(surveys: list[Survey], copies: Copies) -> list[dict]:
    """Findings for equal, near and overlapping patches within each split, and for equal ones with
    different labels in any.
    """
    findings = []
    for number, survey in enumerate(surveys):
        first = copies.first[copies.split == number]
        firsts, stays, inverse = np.unique(first, return_index=True, return_inverse=True)
        findings += equal_patches(survey, stays[inverse])
        findings += compare_published(survey, stays[inverse])
        # overlaps link the first of equal patches, which may be in another split
        overlaps = copies.overlaps
        is_here = np.isin(overlaps.first, firsts) & np.isin(overlaps.second, firsts)
        pairs = overlaps[is_here]
        one = stays[np.searchsorted(firsts, pairs.first)]
        other = stays[np.searchsorted(firsts, pairs.second)]
        findings += overlapping_patches(survey, pairs, one, other)
    return findings + label_conflicts(surveys, copies)


def equal_patches(survey: Survey, stays: np.ndarray) -> list[dict]:
    """A finding for patches that are there again; `stays` int64 (N,) is the row of the first one
    equal to each, which is no suspect.
    """
    again = np.flatnonzero(stays != np.arange(len(stays)))
    if not len(again):
        return []
    kinds = []
    for row in again:
        one, other = survey.read([row, stays[row]])
        kinds.append("equal" if np.array_equal(one, other) else "turned or mirrored")
    rows = survey.rows(again, of=stays[again], kind=kinds, reason="duplicate", score=1.0)
    num_groups = len(np.unique(stays[again]))
    num_turned = kinds.count("turned or mirrored")
    measured = (
        f"{num_groups:,} groups of {num_groups + len(again):,} equal patches, {len(again):,} are"
        " there again"
    )
    if num_turned:
        measured += f", {num_turned:,} of them turned or mirrored"
    limit = "published train: 16%"
    advice = "report scores with and without them; quarantine_reasons takes `duplicate`"
    return [build_finding("duplicates", "warning", measured, limit, advice, rows, survey.name)]


def label_conflicts(surveys: list[Survey], copies: Copies) -> list[dict]:
    """A finding for equal patches of which some are labelled 0 and some 1, in one split or in
    several.
    """
    labels = np.concatenate([survey.labels for survey in surveys])
    example = np.full((2, len(labels)), -1)  # by label and group, a patch
    for label in (0, 1):
        mine = np.flatnonzero(labels == label)
        example[label, copies.first[mine]] = mine
    has_both = (example >= 0).all(0)
    conflict = np.flatnonzero(has_both[copies.first] & (labels >= 0))
    if not len(conflict):
        return []
    others = example[1 - labels[conflict], copies.first[conflict]]
    rows = []
    for patch, other in zip(conflict, others, strict=True):
        columns = {"of": f"{surveys[copies.split[other]].name} {copies.row[other]}"}
        columns |= {"kind": "equal, labelled both ways", "reason": "label", "score": 1.0}
        rows += surveys[copies.split[patch]].rows([copies.row[patch]], **columns)
    measured = f"{has_both.sum():,} groups of equal patches carry both labels"
    advice = "look at them, correct one"
    names = " and ".join(dict.fromkeys(row["split"] for row in rows))
    return [build_finding("label conflicts", "error", measured, "none", advice, rows, names)]


def compare_published(survey: Survey, stays: np.ndarray) -> list[dict]:
    """A finding for a split of the published size: whether as many patches are left without exact
    copies as in the published files. `stays` is as in equal_patches.
    """
    expected = DEDUPLICATED.get((survey.name, len(survey)))
    if expected is None:
        return []
    is_first = stays == np.arange(len(stays))
    num_unique = int(is_first.sum())
    digests = {}
    for row in np.flatnonzero(~is_first):
        group = digests.setdefault(stays[row], {survey.read([stays[row]]).tobytes()})
        group.add(survey.read([row]).tobytes())
    num_unique += sum(len(group) - 1 for group in digests.values())
    severity = "note" if num_unique == expected else "warning"
    measured = f"{num_unique:,} different patches, {expected:,} in the published files"
    advice = "" if num_unique == expected else "these are not the published patches"
    limit = f"{expected:,}"
    check = "de-duplication"
    return [build_finding(check, severity, measured, limit, advice, split=survey.name)]


def overlapping_patches(survey: Survey, pairs: Overlaps, one, other) -> list[dict]:
    """Findings for pairs of near copies, and for pairs that show some of the same tissue, between
    the rows `one` and `other` int64 (M,).
    """
    findings = []
    near, beside = np.flatnonzero(pairs.is_near), np.flatnonzero(~pairs.is_near)
    if len(near):
        similarity = pairs.similarity[near]
        kinds = [describe_copy(pairs[[pair]]) for pair in near]
        columns = {"kind": kinds, "reason": "near_duplicate", "score": similarity.round(4)}
        rows = survey.rows(other[near], of=one[near], **columns)
        measured = f"{len(near):,} pairs of near copies (similarity {similarity.min():.2f} or more)"
        advice = "as duplicates; quarantine_reasons takes `near_duplicate`"
        findings.append(
            build_finding("near duplicates", "warning", measured, "none", advice, rows, survey.name)
        )
    if len(beside):
        down, right = pairs.shift[beside].T
        columns = {"down": down, "right": right, "similarity": pairs.similarity[beside].round(4)}
        rows = survey.rows(other[beside], of=one[beside], **columns)
        num = len(np.union1d(one[beside], other[beside]))
        measured = (
            f"{num:,} patches overlap with others: {len(beside):,} pairs show the same tissue"
        )
        advice = "keep them in one fold; intervals that count patches are too narrow"
        findings.append(
            build_finding("overlapping patches", "note", measured, "", advice, rows, survey.name)
        )
    return findings
