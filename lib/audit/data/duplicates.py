"""Patches that are there more than once, within a split and across splits: equal, near copies, and
crops that share tissue; and slides that two splits share.
"""

import itertools
from collections import defaultdict

import numpy as np

from lib.audit import build_finding
from lib.audit.copies import compare_patches, join, link_groups
from lib.audit.survey import Survey
from lib.pcam import PATCH_BYTES, PATCH_SHAPE

# patches of the published splits that are left when exact copies are taken out
DEDUPLICATED = {
    ("train", 262_144): 220_025,
    ("valid", 32_768): 28_108,
    ("test", 32_768): 29_383,
}


class Copies:
    """Copies over all splits, in numbers that run through them.

    - first: int64 (N,), the first patch that each equals
    - overlaps: OVERLAPS of pairs of first ones
    - split: int64 (N,), the number of each patch's survey
    - rows: for (number of a survey, first patch) the rows there that equal it
    """

    def __init__(self, surveys: list[Survey]) -> None:
        """Compare all patches of all splits with each other."""
        self.split = np.repeat(np.arange(len(surveys)), [len(survey) for survey in surveys])
        row = np.concatenate([np.arange(len(survey)) for survey in surveys])

        def read(numbers) -> np.ndarray:
            patches = np.empty((len(numbers), *PATCH_SHAPE), np.uint8)
            for number, survey in enumerate(surveys):
                mine = self.split[numbers] == number
                patches[mine] = survey.read(row[numbers[mine]])
            return patches

        prints = join([survey.table["prints"] for survey in surveys])
        # of what is mostly out of range, clipping has left nothing to compare
        num_bad = np.concatenate([survey.table["num_bad"] for survey in surveys])
        is_lost = num_bad > PATCH_BYTES // 2
        prints.key[is_lost], prints.codes[is_lost] = 0, -1
        self.first, self.overlaps = compare_patches(prints, read)
        self.rows = defaultdict(list)
        places = zip(self.split.tolist(), self.first.tolist(), row.tolist(), strict=True)
        for number, first, row_there in places:
            self.rows[number, first].append(row_there)

    def groups_of(self, number: int) -> np.ndarray:
        """The smallest number that each row (N,) of a split is linked with by shared tissue."""
        return link_groups(self.first, self.overlaps)[self.split == number]

    def links(self, a: int, b: int):
        """Yield for every two patches that overlap the rows of split `a` that equal the first, and
        those of `b` that equal the second, with what OVERLAPS say of them.
        """
        for overlap in self.overlaps:
            ours = self.rows.get((a, int(overlap.first)))
            theirs = self.rows.get((b, int(overlap.second)))
            if ours and theirs:
                yield ours, theirs, overlap


def check_duplicates(surveys: list[Survey], copies: Copies) -> list[dict]:
    """Findings for equal, near and overlapping patches within each split, and for equal ones with
    different labels in any.
    """
    findings = []
    for number, survey in enumerate(surveys):
        groups = [rows for (split, _), rows in copies.rows.items() if split == number]
        findings += find_equal(survey, [rows for rows in groups if len(rows) > 1])
        near, beside = [], []
        for ours, theirs, overlap in copies.links(number, number):
            score = float(overlap.similarity)
            columns = {"of": ours[0], "kind": describe_link(overlap), "score": score}
            if overlap.is_near:
                near += survey.rows(theirs[:1], reason="near_duplicate", **columns)
            else:
                beside += survey.rows(theirs[:1], **columns)
        if near:
            measured = f"{len(near):,} pairs of near copies"
            advice = "as duplicates; quarantine_reasons takes `near_duplicate`"
            findings.append(
                survey.finding("near duplicates", "warning", measured, "", advice, near)
            )
        if beside:
            measured = f"{len(beside):,} pairs of patches show the same tissue"
            advice = "keep them in one fold; intervals that count patches are too narrow"
            check = "overlapping patches"
            findings.append(survey.finding(check, "note", measured, "", advice, beside))
    return findings + find_conflicts(surveys, copies)


def find_equal(survey: Survey, groups: list[list[int]]) -> list[dict]:
    """A finding for groups of rows that are equal up to a symmetry, of which the first is no
    suspect. A split of the published size is also held against the published number of copies.
    """
    rows, num_unique = [], len(survey)
    for group in groups:
        texts = [patch.tobytes() for patch in survey.read(group)]
        num_unique -= len(texts) - len(set(texts))
        kinds = ["equal" if text == texts[0] else "turned or mirrored" for text in texts[1:]]
        rows += survey.rows(group[1:], of=group[0], kind=kinds, reason="duplicate", score=1.0)
    findings = []
    if rows:
        num_turned = sum(row["kind"] != "equal" for row in rows)
        measured = f"{len(groups):,} groups of {len(groups) + len(rows):,} equal patches,"
        measured += f" {len(rows):,} are there again, {num_turned:,} of them turned or mirrored"
        limit = "published train: 16%"
        advice = "report scores with and without them; quarantine_reasons takes `duplicate`"
        findings.append(survey.finding("duplicates", "warning", measured, limit, advice, rows))
    expected = DEDUPLICATED.get((survey.name, len(survey)))
    if expected:
        severity, advice = "note", ""
        if num_unique != expected:
            severity, advice = "warning", "these are not the published patches"
        measured = f"{num_unique:,} different patches, {expected:,} in the published files"
        findings.append(survey.finding("de-duplication", severity, measured, "", advice))
    return findings


def find_conflicts(surveys: list[Survey], copies: Copies) -> list[dict]:
    """A finding for equal patches of which some are labelled 0 and some 1, in one split or in
    several.
    """
    examples = {}  # by first patch and label: a patch in words
    for (number, first), rows in copies.rows.items():
        for row in rows:
            example = f"{surveys[number].name} {row}"
            examples.setdefault((first, int(surveys[number].labels[row])), example)
    conflicts = []
    for (number, first), rows in copies.rows.items():
        survey = surveys[number]
        for row in rows:
            label = int(survey.labels[row])
            if label >= 0 and (first, 1 - label) in examples:
                columns = {"of": examples[first, 1 - label], "reason": "label", "score": 1.0}
                conflicts += survey.rows([row], kind="equal, labelled both ways", **columns)
    if not conflicts:
        return []
    measured = f"{len(conflicts):,} patches equal others of the other class"
    names = " and ".join(dict.fromkeys(row["split"] for row in conflicts))
    advice = "look at them, correct one"
    return [build_finding("label conflicts", "error", measured, "", advice, conflicts, names)]


def describe_link(overlap) -> str:
    """How the second patch of one of OVERLAPS differs from the first, in words."""
    dy, dx = overlap.shift
    turned = ", turned or mirrored" if overlap.symmetry else ""
    return f"shifted by {dy} {dx}{turned}"


def check_leakage(surveys: list[Survey], copies: Copies) -> list[dict]:
    """Findings for what every two splits share: slides, and equal, near or overlapping patches."""
    findings = []
    for a, b in itertools.combinations(range(len(surveys)), 2):
        earlier, later = surveys[a], surveys[b]
        leaks = {"equal patches": [], "near copies": [], "overlapping crops": []}
        for (number, first), rows in copies.rows.items():
            if number == a and (b, first) in copies.rows:
                words = "equal up to a symmetry"
                pair = earlier, rows, later, copies.rows[b, first]
                leaks["equal patches"] += list_leaks(*pair, words, 1.0)
        for one, other in ((a, b), (b, a)):
            for ours, theirs, overlap in copies.links(one, other):
                title = "near copies" if overlap.is_near else "overlapping crops"
                pair = surveys[one], ours, surveys[other], theirs
                leak = list_leaks(*pair, describe_link(overlap), float(overlap.similarity))
                leaks[title] += leak
        both = f"{earlier.name} and {later.name}"
        advice = "the model is scored on what it was trained on; quarantine_reasons takes `leak`"
        for title, rows in leaks.items():
            if rows:
                num = len({(row["split"], row["index"]) for row in rows})
                measured = f"{num:,} patches of {both} are {title} of the other split's"
                check = f"leak: {title}"
                findings.append(build_finding(check, "error", measured, "", advice, rows, both))
        findings += find_shared_slides(earlier, later)
    return findings


def list_leaks(one: Survey, ours, other: Survey, theirs, kind: str, score: float) -> list[dict]:
    """Rows for patches of two splits that show the same tissue, each with one counterpart."""
    columns = {"kind": kind, "reason": "leak", "score": score}
    rows = one.rows(ours, of=f"{other.name} {theirs[0]}", **columns)
    return rows + other.rows(theirs, of=f"{one.name} {ours[0]}", **columns)


def find_shared_slides(earlier: Survey, later: Survey) -> list[dict]:
    """A finding for slides that are in two splits; its rows are those of the earlier split."""
    if earlier.slides is None or later.slides is None:
        return []
    shared = np.intersect1d(earlier.slides, later.slides)
    if not len(shared):
        return []
    index = np.flatnonzero(np.isin(earlier.slides, shared))
    rows = earlier.rows(index, slide=earlier.slides[index], reason="leak", score=0.5)
    both = f"{earlier.name} and {later.name}"
    measured = f"{len(shared):,} slides are in {both}, with {len(index):,} patches of"
    measured += f" {earlier.name}: {', '.join(shared[:3])}"
    advice = "scores there are of slides that training has seen; quarantine_reasons takes `leak`"
    return [build_finding("shared slides", "error", measured, "", advice, rows, both)]
