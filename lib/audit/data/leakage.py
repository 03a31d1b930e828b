"""What one split gives away of another: shared slides, overlapping places on a slide, equal or
overlapping pixels.
"""

import itertools
from collections import defaultdict

import numpy as np

from lib.audit import build_finding
from lib.audit.data.duplicates import Copies, describe_copy
from lib.audit.survey import Survey
from lib.pcam import PATCH_SHAPE


def check_leakage(surveys: list[Survey], copies: Copies) -> list[dict]:
    """Findings for every two splits. Rows name both sides; training leaves out what the earlier
    split has of it.
    """
    findings = []
    unit, how = measure_unit(surveys, copies)
    members = [members_by_first(copies, number) for number in range(len(surveys))]
    for a, b in itertools.combinations(range(len(surveys)), 2):
        earlier, later = surveys[a], surveys[b]
        findings += shared_tissue(earlier, later, members[a], members[b], copies.overlaps)
        if earlier.coords is not None and later.coords is not None:
            findings += shared_places(earlier, later, unit, how)
    return findings


def shared_places(earlier: Survey, later: Survey, unit: float, how: str) -> list[dict]:
    """Findings for slides that are in two splits, and for patches that lie on each other there; a
    pixel is `unit` of the coordinates.
    """
    both = f"{earlier.name} and {later.name}"
    shared = np.intersect1d(earlier.slides, later.slides)
    if not len(shared):
        return []
    index = np.flatnonzero(np.isin(earlier.slides, shared))
    rows = earlier.rows(index, slide=earlier.slides[index], reason="leak", score=0.5)
    measured = f"{len(shared):,} slides are in {both}, with {len(index):,} patches of"
    measured += f" {earlier.name}: {', '.join(shared[:3])}"
    advice = "scores there are of slides that training has seen; quarantine_reasons takes `leak`"
    findings = [build_finding("shared slides", "error", measured, "", advice, rows, both)]
    pairs = []
    for slide in shared:
        ours, theirs = (np.flatnonzero(survey.slides == slide) for survey in (earlier, later))
        away = np.abs(earlier.coords[ours][:, None] - later.coords[theirs]).max(2)
        one, other = np.nonzero(away < PATCH_SHAPE[0] * unit)
        pairs += zip(ours[one], theirs[other], strict=True)
    if pairs:
        rows = leak_rows(earlier, later, pairs, "same place on the slide", 1.0)
        measured = f"{len(pairs):,} pairs of {both} lie on each other by their coordinates"
        measured += f" (a pixel is {unit:g}: {how})"
        check = "overlapping coordinates"
        findings.append(build_finding(check, "error", measured, "", advice, rows, both))
    return findings


def shared_tissue(earlier: Survey, later: Survey, ours: dict, theirs: dict, overlaps) -> list[dict]:
    """Findings for equal patches of two splits, near copies and overlapping crops, from what
    members_by_first gives for both.

    Each patch that has a counterpart in the other split is named, with one such counterpart.
    """
    rows_of = {"equal patches": [], "near copies": [], "overlapping crops": []}
    links = [(first, first, None) for first in sorted(ours.keys() & theirs.keys())]
    # overlaps link the first of equal ones, in whichever split that is
    for overlap in overlaps:
        one, other = int(overlap.first), int(overlap.second)
        links += [(one, other, overlap), (other, one, overlap)]
    for one, other, overlap in links:
        if one not in ours or other not in theirs:
            continue
        title, words, score = "equal patches", "equal up to a symmetry", 1.0
        if overlap is not None:
            title, words = "overlapping crops", f"{overlap.shift.tolist()} px off"
            score = round(float(overlap.similarity), 4)
            if overlap.is_near:
                title, words = "near copies", describe_copy(overlap)
        pairs = [(row, theirs[other][0]) for row in ours[one]]
        pairs += [(ours[one][0], row) for row in theirs[other][1:]]
        rows_of[title] += leak_rows(earlier, later, pairs, words, score)

    findings = []
    both = f"{earlier.name} and {later.name}"
    advice = "the model is scored on what it was trained on; quarantine_reasons takes `leak`"
    for title, rows in rows_of.items():
        if rows:
            named = {(row["split"], row["index"]) for row in rows}
            num_ours = sum(split == earlier.name for split, _ in named)
            measured = f"{num_ours:,} patches of {earlier.name} are {title} of"
            measured += f" {len(named) - num_ours:,} of {later.name}"
            check = f"leak: {title}"
            findings.append(build_finding(check, "error", measured, "", advice, rows, both))
    return findings


def members_by_first(copies: Copies, number: int) -> dict[int, list[int]]:
    """The rows of a split by the first patch, of any split, that they equal."""
    members, mine = defaultdict(list), np.flatnonzero(copies.split == number)
    for first, row in zip(copies.first[mine].tolist(), copies.row[mine].tolist(), strict=True):
        members[first].append(row)
    return members


def leak_rows(earlier: Survey, later: Survey, pairs, words: str, score: float) -> list[dict]:
    """Rows of pairs (row, row) across splits, both sides of each."""
    ours, theirs = zip(*pairs, strict=True)
    columns = {"kind": words, "reason": "leak", "score": score}
    mine = earlier.rows(ours, of=[f"{later.name} {row}" for row in theirs], **columns)
    return mine + later.rows(theirs, of=[f"{earlier.name} {row}" for row in ours], **columns)


def measure_unit(surveys: list[Survey], copies: Copies) -> tuple[float, str]:
    """How much a coordinate grows per pixel, from pairs that overlap by their pixels; 1 where there
    are none.
    """
    ratios = []
    overlaps = copies.overlaps[(copies.overlaps.symmetry == 0) & ~copies.overlaps.is_near]
    for number, survey in enumerate(surveys):
        if survey.coords is None:
            continue
        ends = np.stack([overlaps.first, overlaps.second])
        is_here = (copies.split[ends] == number).all(0)
        one, other = copies.row[ends[:, is_here]]
        is_same = survey.slides[one] == survey.slides[other]
        step = (survey.coords[other] - survey.coords[one])[is_same]
        shift = overlaps.shift[is_here][is_same]
        is_far = np.abs(shift) > 8
        ratios += (step[is_far] / shift[is_far]).tolist()
    if len(ratios) < 3:
        return 1.0, "taken for granted, no overlapping pixels show it"
    return round(float(np.median(ratios)), 2), f"measured on {len(ratios):,} overlaps"
