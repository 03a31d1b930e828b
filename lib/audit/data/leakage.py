"""What one split gives away of another: shared slides, overlapping places on a slide, equal or
overlapping pixels.
"""

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
    for b, later in enumerate(surveys):
        for a, earlier in enumerate(surveys[:b]):
            findings += shared_tissue(a, b, earlier, later, copies)
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
    advice = "scores there are of slides that training has seen; quarantine_reasons takes `leak`"
    index = np.flatnonzero(np.isin(earlier.slides, shared))
    rows = earlier.rows(index, slide=earlier.slides[index], reason="leak", score=0.5)
    measured = (
        f"{len(shared):,} slides are in {both}, with {len(index):,} patches of {earlier.name}:"
        f" {', '.join(shared[:3])}"
    )
    findings = [build_finding("shared slides", "error", measured, "none", advice, rows, both)]
    ours, theirs = overlapping_places(earlier, later, shared, PATCH_SHAPE[0] * unit)
    if len(ours):
        score = np.ones(len(ours))
        rows = leak_rows(earlier, later, ours, theirs, "same place on the slide", score)
        measured = (
            f"{len(ours):,} pairs of {both} lie on each other by their coordinates (a pixel is"
            f" {unit:g}: {how})"
        )
        findings.append(
            build_finding("overlapping coordinates", "error", measured, "none", advice, rows, both)
        )
    return findings


def shared_tissue(a: int, b: int, earlier: Survey, later: Survey, copies: Copies) -> list[dict]:
    """Findings for equal patches of two splits, near copies and overlapping crops.

    Each patch that has a counterpart in the other split is named, with one such counterpart.
    """
    ours, theirs = (members_by_first(copies, number) for number in (a, b))
    equal, near, crops = [], [], []
    for first in sorted(ours.keys() & theirs.keys()):
        equal += pair_up(ours[first], theirs[first], "equal up to a symmetry", 1.0)
    overlaps = copies.overlaps  # they link the first of equal ones, in whichever split that is
    links = zip(overlaps.first.tolist(), overlaps.second.tolist(), strict=True)
    for number, link in enumerate(links):
        similarity = float(overlaps.similarity[number])
        for one, other in (link, link[::-1]):
            if one not in ours or other not in theirs:
                continue
            if overlaps.is_near[number]:
                words = describe_copy(overlaps[[number]])
                near += pair_up(ours[one], theirs[other], words, similarity)
            else:
                words = f"{overlaps.shift[number].tolist()} px off"
                crops += pair_up(ours[one], theirs[other], words, similarity)

    both = f"{earlier.name} and {later.name}"
    advice = "the model is scored on what it was trained on; quarantine_reasons takes `leak`"
    findings = []
    for title, pairs in (
        ("equal patches", equal),
        ("near copies", near),
        ("overlapping crops", crops),
    ):
        if not pairs:
            continue
        mine, other, words, score = (np.array(column) for column in zip(*pairs, strict=True))
        rows = leak_rows(earlier, later, mine, other, words, score)
        measured = (
            f"{len(np.unique(mine)):,} patches of {earlier.name} are {title} of"
            f" {len(np.unique(other)):,} of {later.name}"
        )
        findings.append(
            build_finding(f"leak: {title}", "error", measured, "none", advice, rows, both)
        )
    return findings


def members_by_first(copies: Copies, number: int) -> dict[int, list[int]]:
    """The rows of a split by the first patch, of any split, that they equal."""
    members, mine = {}, np.flatnonzero(copies.split == number)
    for first, row in zip(copies.first[mine].tolist(), copies.row[mine].tolist(), strict=True):
        members.setdefault(first, []).append(row)
    return members


def pair_up(ours: list[int], theirs: list[int], *facts) -> list[tuple]:
    """Each of ours with their first, and each of theirs with our first."""
    return [(row, theirs[0], *facts) for row in ours] + [
        (ours[0], row, *facts) for row in theirs[1:]
    ]


def leak_rows(earlier: Survey, later: Survey, ours, theirs, words, score) -> list[dict]:
    """Rows of pairs across splits, both sides of each."""
    columns = {"kind": words, "reason": "leak", "score": np.round(score, 4)}
    mine = earlier.rows(ours, of=[f"{later.name} {row}" for row in theirs], **columns)
    return mine + later.rows(theirs, of=[f"{earlier.name} {row}" for row in ours], **columns)


def measure_unit(surveys: list[Survey], copies: Copies) -> tuple[float, str]:
    """How much a coordinate grows per pixel, from pairs that overlap by their pixels; 1 where there
    are none.
    """
    ratios = []
    overlaps = copies.overlaps[(copies.overlaps.symmetry == 0) & ~copies.overlaps.is_near]
    for number, survey in enumerate(surveys):
        mine = (copies.split[overlaps.first] == number) & (copies.split[overlaps.second] == number)
        if survey.coords is None or not mine.any():
            continue
        one, other = copies.row[overlaps.first[mine]], copies.row[overlaps.second[mine]]
        same = survey.slides[one] == survey.slides[other]
        step = (survey.coords[other] - survey.coords[one])[same]
        shift = overlaps.shift[mine][same]
        ratios.append((step[np.abs(shift) > 8] / shift[np.abs(shift) > 8]).ravel())
    ratios = np.concatenate(ratios) if ratios else np.empty(0)
    if len(ratios) < 3:
        return 1.0, "taken for granted, no overlapping pixels show it"
    return float(np.round(np.median(ratios), 2)), f"measured on {len(ratios):,} overlaps"


def overlapping_places(
    earlier: Survey, later: Survey, shared, size: float
) -> tuple[np.ndarray, np.ndarray]:
    """Pairs of rows of two splits on one slide whose squares of `size` overlap."""
    pairs = [np.empty((0, 2), np.int64)]
    for slide in shared:
        ours, theirs = (
            np.flatnonzero(earlier.slides == slide),
            np.flatnonzero(later.slides == slide),
        )
        one, other = np.nonzero(
            np.abs(earlier.coords[ours][:, None] - later.coords[theirs][None]).max(2) < size
        )
        pairs.append(np.stack([ours[one], theirs[other]], 1))
    return tuple(np.concatenate(pairs).T)
