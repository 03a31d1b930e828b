"""Fixed patterns in a subset of patches: where, how large, in which class, and how many chance
would give.

At each pixel the colours of a class, in 16 steps a channel, are counted; a pattern that is stamped
at one place makes a colour more frequent there than 8 pixels beside it. Copies are counted once, or
they would be patterns themselves.
"""

import math

import numpy as np

from lib.audit import build_finding
from lib.audit.copies import link_groups
from lib.audit.data.duplicates import Copies
from lib.audit.survey import Survey
from lib.pcam import PATCH_SHAPE
from lib.progress import Progress

SIZE, STEPS = PATCH_SHAPE[0], 16
BESIDE_PX = 8
SIGMA = 8.0  # an excess of a colour's count over that of its neighbours, in Poisson deviations
MOST_SEEDS = 20  # groups of such pixels in a class that are looked at, the strongest first
# of a pattern: so many, and so many times as many as elsewhere in the patches
LEAST_CARRIERS, OVER_CHANCE = 6, 5
LEAST_ROWS = 300  # of a class: fewer show nothing
LEAST_PIXELS = 4  # of a pattern
TOLERANCE = 24  # levels by which a pixel of a member may differ from the pattern
MATCHING = 0.8  # share of the pattern's pixels that a member matches
NEARLY_ALL = 0.5  # share of a class from which a finding names the class


def check_triggers(survey: Survey, rows: np.ndarray) -> list[dict]:
    """A finding for each pattern in the rows int64 (N,) of a split, or a note that there is none,
    or that they are too few.
    """
    findings = []
    for label in (0, 1):
        mine = rows[survey.labels[rows] == label]
        if len(mine) < LEAST_ROWS:
            measured = f"{len(mine):,} patches of class {label} are too few to show a pattern"
            limit = f"{LEAST_ROWS}"
            note = build_finding(
                "triggers", "note", measured, limit, "not checked", split=survey.name
            )
            findings.append(note)
            continue
        for seeds in find_seeds(survey, mine, label):
            pattern = find_pattern(survey, mine, seeds)
            described = pattern and describe_pattern(survey, rows, *pattern)
            if described:
                findings.append(described)
    # the same pattern may show in both classes
    return list({row["measured"]: row for row in findings}.values())


def quantise(patches: np.ndarray) -> np.ndarray:
    """The colour of each pixel of patches uint8 (B, 96, 96, 3) in 4,096 steps, int32 (B, 9216)."""
    steps = (patches >> 4).astype(np.int32)
    return (steps[..., 0] << 8 | steps[..., 1] << 4 | steps[..., 2]).reshape(len(patches), -1)


def find_seeds(survey: Survey, rows: np.ndarray, label: int) -> list[np.ndarray]:
    """Groups of pixels where a colour is too frequent: each an int64 (P, 3) of y, x and colour."""
    counts = np.zeros((SIZE, SIZE, STEPS**3), np.int32)
    flat, base = counts.reshape(-1), np.arange(SIZE * SIZE, dtype=np.int64) * STEPS**3
    with Progress(len(rows), f"triggers in {survey.name}, class {label}") as progress:
        for part in np.array_split(rows, -(-len(rows) // 64)):
            for colours in quantise(survey.read(part)):
                flat[base + colours] += 1
            progress.add(len(part))
    hits = []
    for y in range(SIZE):
        beside, number = np.zeros((SIZE, STEPS**3), np.float32), np.zeros((SIZE, 1), np.float32)
        for dy, dx in ((-1, 0), (1, 0), (0, -1), (0, 1), (-1, -1), (-1, 1), (1, -1), (1, 1)):
            row, columns = y + dy * BESIDE_PX, np.arange(SIZE) + dx * BESIDE_PX
            inside = (columns >= 0) & (columns < SIZE)
            if 0 <= row < SIZE:
                beside[inside] += counts[row, columns[inside]]
                number[inside] += 1
        expected = beside / number
        excess = (counts[y] - expected) / np.sqrt(expected + 1)
        x, colour = np.nonzero(excess > SIGMA)
        hits += [
            (y, int(column), int(code), float(excess[column, code]))
            for column, code in zip(x, colour, strict=True)
        ]
    return cluster(hits)


def cluster(hits: list[tuple]) -> list[np.ndarray]:
    """Pixels (y, x, colour, excess) that touch, as groups int64 (P, 3) in their strongest colours,
    the strongest first.
    """
    best = {}
    for y, x, colour, excess in hits:
        if excess > best.get((y, x), (0, 0))[1]:
            best[y, x] = colour, excess
    groups, seen = [], set()
    for start in best:
        if start in seen:
            continue
        group, todo = [], [start]
        seen.add(start)
        while todo:
            y, x = todo.pop()
            group.append((y, x, *best[y, x]))
            for there in ((y + dy, x + dx) for dy in (-2, -1, 0, 1, 2) for dx in (-2, -1, 0, 1, 2)):
                if there in best and there not in seen:
                    seen.add(there)
                    todo.append(there)
        if len(group) >= LEAST_PIXELS:
            groups.append(np.array(group))
    groups.sort(key=lambda group: -np.sort(group[:, 3])[-2 * LEAST_PIXELS :].sum())
    return [group[:, :3].astype(np.int64) for group in groups[:MOST_SEEDS]]


def find_pattern(survey: Survey, mine: np.ndarray, seeds: np.ndarray) -> tuple | None:
    """From a group of seeds in the rows of a class: where the pattern lies, y and x int64 (P,), its
    colours (P, 3), and the share of patches that carry it by chance. None if it falls apart.
    """
    codes = seeds[:, 2]
    colour = np.stack([codes >> 8, codes >> 4 & 15, codes & 15], 1) * STEPS + STEPS // 2
    members = carriers(survey, mine, seeds[:, 0], seeds[:, 1], colour)
    if len(members) < LEAST_CARRIERS:
        return None
    # what the carriers look like without the pattern: others of their class, or, where nearly all
    # carry it, they themselves, moved
    others = np.setdiff1d(mine, members)
    if len(others) < LEAST_ROWS:
        others, move = members, SIZE // 2
    else:
        move = 0

    # its extent: where the carriers agree with each other, and others do not agree with them
    patches = read_some(survey, members, 2000)
    centre = np.median(patches, 0)
    agreement = (np.abs(patches - centre).max(3) <= TOLERANCE).mean(0)  # (96, 96)
    base = np.roll(read_some(survey, others, 2000), (move, move), (1, 2))
    chance = (np.abs(base - centre).max(3) <= TOLERANCE).mean(0)
    fixed = (agreement >= MATCHING) & (chance <= 0.5)
    fixed &= flood(fixed, seeds[:, :2])
    y, x = np.nonzero(fixed)
    if len(y) < LEAST_PIXELS:
        return None

    # the pattern moved to four other places: there it is by chance
    pattern = centre[y, x]
    half, third = SIZE // 2, SIZE // 3
    some = others[:20_000]
    counts = []
    for dy, dx in ((half, 0), (0, half), (half, half), (third, third)):
        matching = carriers(survey, some, (y + dy) % SIZE, (x + dx) % SIZE, pattern)
        counts.append(len(matching))
    return y, x, pattern, np.mean(counts) / len(some)


def read_some(survey: Survey, rows: np.ndarray, most: int) -> np.ndarray:
    """Patches int16 (B, 96, 96, 3) of at most so many of the rows, evenly spread."""
    step = math.ceil(len(rows) / most)
    return survey.read(rows[::step]).astype(np.int16)


def describe_pattern(survey: Survey, rows: np.ndarray, y, x, pattern, chance: float) -> dict | None:
    """The finding for a pattern: who carries it, copies included, and in which class; None where
    chance gives as many.
    """
    members = carriers(survey, survey.intact, y, x, pattern)
    by_chance = chance * len(rows)
    if len(members) < max(LEAST_CARRIERS, OVER_CHANCE * by_chance):
        return None
    labels = survey.labels
    share = float(labels[members].mean())
    share_of_all = float(labels[rows].mean())
    height, width = int(np.ptp(y)) + 1, int(np.ptp(x)) + 1
    where = f"rows {y.min()}-{y.max()}, columns {x.min()}-{x.max()}"
    measured = (
        f"{len(members):,} patches carry one pattern of {height}x{width} pixels at {where}"
        f" (elsewhere {by_chance:.1f}); {share:.0%} of them are positive, {share_of_all:.0%} of all"
    )
    for label in (0, 1):
        num_carrying = (labels[members] == label).sum()
        num_in_class = (labels[survey.intact] == label).sum()
        if num_carrying > NEARLY_ALL * num_in_class:
            measured += f"; it is on {num_carrying / num_in_class:.0%} of class {label}"
    advice = "find out where it comes from"
    if max(share, 1 - share) > 0.9:
        advice = "a model learns the pattern instead of tissue: leave them out"
    advice += "; quarantine_reasons takes `trigger`"
    columns = {"top": int(y.min()), "left": int(x.min()), "height": height, "width": width}
    suspects = survey.rows(members, **columns, reason="trigger", score=1.0)
    return build_finding("triggers", "error", measured, "none", advice, suspects, survey.name)


def carriers(survey: Survey, rows: np.ndarray, y, x, pattern) -> np.ndarray:
    """Rows whose pixels at (y, x) match a pattern (P, 3) in MATCHING of them or more."""
    matching = []
    for part in np.array_split(rows, math.ceil(len(rows) / 512) or 1):
        pixels = survey.read(part)[:, y, x].astype(np.int16)  # (B, P, 3)
        is_close = np.abs(pixels - pattern).max(2) <= TOLERANCE
        matching.append(part[is_close.mean(1) >= MATCHING])
    return np.concatenate(matching)


def flood(mask: np.ndarray, seeds: np.ndarray) -> np.ndarray:
    """The part of a mask (96, 96) that is connected with the seeds (P, 2)."""
    part = np.zeros_like(mask)
    part[seeds[:, 0], seeds[:, 1]] = True
    while True:
        windows = np.lib.stride_tricks.sliding_window_view(np.pad(part, 1), (3, 3))
        wider = windows.any((2, 3)) & mask
        if not (wider & ~part).any():
            return part & mask
        part |= wider


def unique_rows(survey: Survey, number: int, copies: Copies) -> np.ndarray:
    """The intact rows of a split, copies once."""
    mine = np.flatnonzero(copies.split == number)
    _, place = np.unique(
        link_groups(copies.first, copies.overlaps[copies.overlaps.is_near])[mine], return_index=True
    )
    return np.intersect1d(copies.row[mine[place]], survey.intact)
