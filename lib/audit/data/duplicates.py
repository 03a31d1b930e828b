"""Patches that are there more than once: equal, equal under a symmetry, or near copies; within a
split and across splits.
"""

from dataclasses import dataclass

import numpy as np

from lib.audit import finding
from lib.audit.copies import Overlaps, compare_patches, join
from lib.audit.survey import Survey
from lib.pcam import PATCH_BYTES

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
    (dy, dx), gain, symmetry = (
        overlap.shift[0].tolist(),
        float(overlap.gain[0]),
        int(overlap.symmetry[0]),
    )
    words = [f"shifted by {dy} {dx}"] if dy or dx else []
    words += (
        [f"{'brighter' if gain > 1 else 'darker'} by {abs(gain - 1):.0%}"]
        if abs(gain - 1) > BRIGHTER
        else []
    )
    words += ["turned or mirrored"] if symmetry else []
    return ", ".join(words) or f"recompressed, or noise of {overlap.difference[0]:.1f} levels"


def check_duplicates(surveys: list[Survey], copies: Copies) -> list[dict]:
    """Findings for equal, near and overlapping patches within each split, and for equal ones with
    different labels.
    """
    findings = []
    for number, survey in enumerate(surveys):
        mine = np.flatnonzero(copies.split == number)
        first = copies.first[mine]
        # the first of a group in this split stays, the others are suspects
        _, place, inverse, sizes = np.unique(
            first, return_index=True, return_inverse=True, return_counts=True
        )
        stays = place[inverse]
        again = np.flatnonzero((sizes[inverse] > 1) & (stays != np.arange(len(mine))))
        if len(again):
            same = [np.array_equal(*survey.read([row, stays[row]])) for row in again]
            kinds = np.where(same, "equal", "turned or mirrored")
            rows = survey.rows(again, of=stays[again], kind=kinds, reason="duplicate", score=1.0)
            num = len(np.unique(first[again]))
            turned = (
                f", {int((kinds != 'equal').sum()):,} of them turned or mirrored"
                if not all(same)
                else ""
            )
            measured = (
                f"{num:,} groups of {num + len(again):,} equal patches, {len(again):,} are there"
                f" again{turned}"
            )
            advice = "report scores with and without them; quarantine_reasons takes `duplicate`"
            findings.append(
                finding(
                    "duplicates",
                    "warning",
                    measured,
                    "published train: 16%",
                    advice,
                    rows,
                    survey.name,
                )
            )
        both = np.all(
            [
                np.bincount(inverse[survey.labels == label], minlength=len(sizes))
                for label in (0, 1)
            ],
            axis=0,
        )
        conflict = np.flatnonzero(both[inverse] & (survey.labels >= 0))
        if len(conflict):
            rows = survey.rows(
                conflict,
                of=stays[conflict],
                kind="equal, labelled both ways",
                reason="label",
                score=1.0,
            )
            measured = f"{int(both.sum()):,} groups of equal patches carry both labels"
            advice = "look at them, correct one"
            findings.append(
                finding("label conflicts", "error", measured, "none", advice, rows, survey.name)
            )

        within = (copies.split[copies.overlaps.first] == number) & (
            copies.split[copies.overlaps.second] == number
        )
        pairs = copies.overlaps[within]
        near, beside = pairs[pairs.is_near], pairs[~pairs.is_near]
        if len(near):
            of, index = copies.row[near.first], copies.row[near.second]
            kinds = np.array([describe_copy(near[[place]]) for place in range(len(near))])
            rows = survey.rows(
                index, of=of, kind=kinds, reason="near_duplicate", score=near.similarity.round(4)
            )
            measured = (
                f"{len(near):,} pairs of near copies (similarity {near.similarity.min():.2f} or"
                " more)"
            )
            advice = "as duplicates; quarantine_reasons takes `near_duplicate`"
            findings.append(
                finding("near duplicates", "warning", measured, "none", advice, rows, survey.name)
            )
        if len(beside):
            of, index = copies.row[beside.first], copies.row[beside.second]
            columns = {"of": of, "down": beside.shift[:, 0], "right": beside.shift[:, 1]}
            measured = (
                f"{len(np.union1d(of, index)):,} patches overlap with others: {len(beside):,} pairs"
                " show the same tissue"
            )
            advice = "keep them in one fold; intervals that count patches are too narrow"
            rows = survey.rows(index, **columns, similarity=beside.similarity.round(4))
            findings.append(
                finding("overlapping patches", "note", measured, "", advice, rows, survey.name)
            )
    return findings
