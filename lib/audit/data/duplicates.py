"""Patches that are there more than once: equal, equal under a symmetry, or near copies; within a
split and across splits.
"""

from dataclasses import dataclass

import numpy as np

from lib.audit import build_finding
from lib.audit.copies import Overlaps, compare_patches, join, link_groups
from lib.audit.survey import Survey
from lib.pcam import PATCH_BYTES, PATCH_SHAPE

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

    def of_split(self, number: int, has_overlaps: bool = True) -> np.ndarray:
        """What the rows (N,) of a split are linked with, by near copies alone or all overlaps."""
        overlaps = self.overlaps if has_overlaps else self.overlaps[self.overlaps.is_near]
        return link_groups(self.first, overlaps)[self.split == number]


def find_copies(surveys: list[Survey]) -> Copies:
    """Compare all patches of all splits with each other."""
    split = np.repeat(np.arange(len(surveys)), [len(survey) for survey in surveys])
    row = np.concatenate([np.arange(len(survey)) for survey in surveys])

    def read(numbers) -> np.ndarray:
        patches = np.empty((len(numbers), *PATCH_SHAPE), np.uint8)
        for number, survey in enumerate(surveys):
            mine = split[numbers] == number
            patches[mine] = survey.read(row[numbers[mine]])
        return patches

    prints = join([survey.table["prints"] for survey in surveys])
    # of what is mostly out of range, clipping has left nothing to compare
    is_lost = np.concatenate([survey.table["num_bad"] for survey in surveys]) > PATCH_BYTES // 2
    prints.key[is_lost], prints.codes[is_lost] = 0, -1
    return Copies(*compare_patches(prints, read), split, row)


def describe_copy(overlap: Overlaps) -> str:
    """What makes the second of one near pair differ from the first, in words."""
    dy, dx = overlap.shift
    gain = overlap.gain - 1
    words = []
    if dy or dx:
        words.append(f"shifted by {dy} {dx}")
    if abs(gain) > BRIGHTER:
        words.append(f"{'brighter' if gain > 0 else 'darker'} by {abs(gain):.0%}")
    if overlap.symmetry:
        words.append("turned or mirrored")
    return ", ".join(words) or "recompressed, or with noise"


def check_duplicates(surveys: list[Survey], copies: Copies) -> list[dict]:
    """Findings for equal, near and overlapping patches within each split, and for equal ones with
    different labels in any.
    """
    findings = []
    for number, survey in enumerate(surveys):
        first = copies.first[copies.split == number]
        firsts, stays, inverse = np.unique(first, return_index=True, return_inverse=True)
        findings += equal_patches(survey, stays[inverse])
        # overlaps link the first of equal patches, which may be in another split
        overlaps = copies.overlaps
        is_here = np.isin(overlaps.first, firsts) & np.isin(overlaps.second, firsts)
        pairs = overlaps[is_here]
        one = stays[np.searchsorted(firsts, pairs.first)]
        other = stays[np.searchsorted(firsts, pairs.second)]
        findings += overlapping_patches(survey, pairs, one, other)
    return findings + label_conflicts(surveys, copies)


def equal_patches(survey: Survey, stays: np.ndarray) -> list[dict]:
    """A finding for patches that are there again, and, for a split of the published size, whether
    as many are left without exact copies as in the published files.

    `stays` int64 (N,) is the row of the first one equal to each, which is no suspect.
    """
    findings, kinds, hashes = [], [], set()
    again = np.flatnonzero(stays != np.arange(len(stays)))
    for row in again:
        one, other = (patch.tobytes() for patch in survey.read([row, stays[row]]))
        kinds.append("equal" if one == other else "turned or mirrored")
        hashes |= {hash(one), hash(other)}
    num_groups = len(np.unique(stays[again]))
    if num_groups:
        rows = survey.rows(again, of=stays[again], kind=kinds, reason="duplicate", score=1.0)
        measured = f"{num_groups:,} groups of {num_groups + len(again):,} equal patches,"
        measured += f" {len(again):,} are there again,"
        measured += f" {kinds.count('turned or mirrored'):,} of them turned or mirrored"
        limit = "published train: 16%"
        advice = "report scores with and without them; quarantine_reasons takes `duplicate`"
        findings.append(survey.finding("duplicates", "warning", measured, limit, advice, rows))
    expected = DEDUPLICATED.get((survey.name, len(survey)))
    if expected:
        num_unique = len(survey) - num_groups - len(again) + len(hashes)
        severity, advice = "note", ""
        if num_unique != expected:
            severity, advice = "warning", "these are not the published patches"
        measured = f"{num_unique:,} different patches, {expected:,} in the published files"
        limit = f"{expected:,}"
        findings.append(survey.finding("de-duplication", severity, measured, limit, advice))
    return findings


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
    rows = []
    for patch in np.flatnonzero(has_both[copies.first] & (labels >= 0)):
        other = example[1 - labels[patch], copies.first[patch]]
        of = f"{surveys[copies.split[other]].name} {copies.row[other]}"
        columns = {"of": of, "kind": "equal, labelled both ways", "reason": "label", "score": 1.0}
        rows += surveys[copies.split[patch]].rows([copies.row[patch]], **columns)
    if not rows:
        return []
    measured = f"{has_both.sum():,} groups of equal patches carry both labels"
    names = " and ".join(dict.fromkeys(row["split"] for row in rows))
    advice = "look at them, correct one"
    return [build_finding("label conflicts", "error", measured, "", advice, rows, names)]


def overlapping_patches(survey: Survey, pairs: Overlaps, one, other) -> list[dict]:
    """Findings for pairs of near copies, and for pairs that show some of the same tissue, between
    the rows `one` and `other` int64 (M,).
    """
    findings = []
    near, beside = np.flatnonzero(pairs.is_near), np.flatnonzero(~pairs.is_near)
    if len(near):
        score = pairs.similarity[near].round(4)
        kinds = [describe_copy(pair) for pair in pairs[near]]
        columns = {"of": one[near], "kind": kinds, "reason": "near_duplicate", "score": score}
        rows = survey.rows(other[near], **columns)
        measured = f"{len(near):,} pairs of near copies (similarity {score.min():.2f} or more)"
        advice = "as duplicates; quarantine_reasons takes `near_duplicate`"
        findings.append(survey.finding("near duplicates", "warning", measured, "", advice, rows))
    if len(beside):
        down, right = pairs.shift[beside].T
        columns = {"down": down, "right": right, "similarity": pairs.similarity[beside].round(4)}
        rows = survey.rows(other[beside], of=one[beside], **columns)
        num = len(np.union1d(one[beside], other[beside]))
        measured = f"{num:,} patches overlap with others:"
        measured += f" {len(beside):,} pairs show the same tissue"
        advice = "keep them in one fold; intervals that count patches are too narrow"
        findings.append(survey.finding("overlapping patches", "note", measured, "", advice, rows))
    return findings
