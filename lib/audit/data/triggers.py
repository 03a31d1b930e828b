"""Fixed patterns in a subset of patches: where, how large, in which class, and how many chance
would give.

At each pixel the colours of a class, in 16 steps a channel, are counted; a pattern that is stamped
at one place makes a colour more frequent there than 8 pixels beside it. Copies are counted once, or
they would be patterns themselves.
"""

import itertools
import math

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

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


def check_triggers(surveys: list[Survey], rows_of: dict[str, np.ndarray]) -> list[dict]:
    """A finding for each pattern in the rows int64 (N,) of each split, or a note that they are too
    few.
    """
    findings = []
    for survey, label in itertools.product(surveys, (0, 1)):
        rows = rows_of[survey.name]
        mine = rows[survey.labels[rows] == label]
        if len(mine) < LEAST_ROWS:
            measured = f"{len(mine):,} patches of class {label} are too few to show a pattern"
            limit = f"{LEAST_ROWS}"
            findings.append(survey.finding("triggers", "note", measured, limit, "not checked"))
            continue
        for seeds in find_seeds(count_colours(survey, mine, label)):
            pattern = find_pattern(survey, mine, seeds)
            if pattern:
                findings += describe_pattern(survey, rows, *pattern)
    # the same pattern may show in both classes
    return list({(row["split"], row["measured"]): row for row in findings}.values())


def count_colours(survey: Survey, rows: np.ndarray, label: int) -> np.ndarray:
    """How often each colour, in 4,096 steps, stands at each pixel of some rows, int32 (96, 96,
    4096).
    """
    counts = np.zeros((SIZE, SIZE, STEPS**3), np.int32)
    y, x = np.indices((SIZE, SIZE))
    with Progress(len(rows), f"triggers in {survey.name}, class {label}") as progress:
        for part in np.array_split(rows, math.ceil(len(rows) / 64)):
            colours = (survey.read(part) // STEPS).astype(np.int32) @ (STEPS**2, STEPS, 1)
            for colour in colours:
                counts[y, x, colour] += 1
            progress.add(len(part))
    return counts


def find_seeds(counts: np.ndarray):
    """Yield groups of pixels where a colour is too frequent: each an int64 (P, 3) of y, x and
    colour.
    """
    steps = [step for step in itertools.product((-BESIDE_PX, 0, BESIDE_PX), repeat=2) if any(step)]
    columns = np.arange(SIZE)
    colour, excess = np.zeros((2, SIZE, SIZE))
    for y in range(SIZE):
        # beyond an edge lies the opposite one
        beside = [counts[(y + dy) % SIZE, (columns + dx) % SIZE] for dy, dx in steps]
        expected = sum(beside).astype(np.float32) / len(steps)
        over = (counts[y] - expected) / np.sqrt(expected + 1)
        colour[y], excess[y] = over.argmax(1), over.max(1)
    num_groups = 0
    while excess.max() > SIGMA and num_groups < MOST_SEEDS:
        strongest = np.unravel_index(excess.argmax(), excess.shape)
        y, x = np.nonzero(flood(excess > SIGMA, strongest, 2))
        excess[y, x] = 0
        if len(y) >= LEAST_PIXELS:
            num_groups += 1
            yield np.stack([y, x, colour[y, x]], 1).astype(np.int64)


def find_pattern(survey: Survey, mine: np.ndarray, seeds: np.ndarray) -> tuple | None:
    """From a group of seeds in the rows of a class: where the pattern lies, y and x int64 (P,), its
    colours (P, 3), and the share of patches that carry it by chance. None if it falls apart.
    """
    y, x, code = seeds.T
    steps = np.stack(np.unravel_index(code, (STEPS,) * 3), 1)
    members = find_carriers(survey, mine, y, x, steps * STEPS + STEPS // 2)
    if len(members) < LEAST_CARRIERS:
        return None

    # its extent: where the carriers agree with each other, and not with what lies half a patch off
    some = members[:: math.ceil(len(members) / 2000)]
    patches = survey.read(some).astype(np.int16)
    centre = np.median(patches, 0)
    half, third = SIZE // 2, SIZE // 3
    moved = np.roll(patches, (half, half), (1, 2))
    agreement, chance = (
        (np.abs(values - centre).max(3) <= TOLERANCE).mean(0) for values in (patches, moved)
    )
    is_fixed = (agreement >= MATCHING) & (chance <= 0.5)
    y, x = np.nonzero(flood(is_fixed, (y, x), 1))
    if len(y) < LEAST_PIXELS:
        return None

    # the pattern moved to four other places: there it is by chance
    pattern = centre[y, x]
    some = mine[:20_000]
    num = 0
    for dy, dx in ((half, 0), (0, half), (half, half), (third, third)):
        num += len(find_carriers(survey, some, (y + dy) % SIZE, (x + dx) % SIZE, pattern))
    return y, x, pattern, num / 4 / len(some)


def describe_pattern(survey: Survey, rows: np.ndarray, y, x, pattern, chance: float) -> list[dict]:
    """The finding for a pattern: who carries it, copies included, and in which class; none where
    chance gives as many.
    """
    members = find_carriers(survey, survey.intact, y, x, pattern)
    by_chance = chance * len(rows)
    if len(members) < max(LEAST_CARRIERS, OVER_CHANCE * by_chance):
        return []
    labels = survey.labels
    share = labels[members].mean()
    top, left = int(y.min()), int(x.min())
    height, width = int(np.ptp(y)) + 1, int(np.ptp(x)) + 1
    measured = (
        f"{len(members):,} patches carry one pattern of {height}x{width} pixels at row {top},"
        f" column {left} (elsewhere {by_chance:.1f}); {share:.0%} of them are positive,"
        f" {labels[rows].mean():.0%} of all"
    )
    for label in (0, 1):
        num_in_class = (labels[survey.intact] == label).sum()
        carrying = (labels[members] == label).sum() / max(num_in_class, 1)
        if carrying > NEARLY_ALL:
            measured += f"; it is on {carrying:.0%} of class {label}"
    advice = "find out where it comes from"
    if not 0.1 <= share <= 0.9:
        advice = "a model learns the pattern instead of tissue: leave them out"
    advice += "; quarantine_reasons takes `trigger`"
    columns = {"top": top, "left": left, "height": height, "width": width}
    suspects = survey.rows(members, **columns, reason="trigger", score=1.0)
    return [survey.finding("triggers", "error", measured, "", advice, suspects)]


def find_carriers(survey: Survey, rows: np.ndarray, y, x, pattern) -> np.ndarray:
    """Rows whose pixels at (y, x) match a pattern (P, 3) in MATCHING of them or more."""
    carriers = []
    for part in np.array_split(rows, math.ceil(len(rows) / 512) or 1):
        pixels = survey.read(part)[:, y, x].astype(np.int16)  # (B, P, 3)
        is_close = np.abs(pixels - pattern).max(2) <= TOLERANCE
        carriers.append(part[is_close.mean(1) >= MATCHING])
    return np.concatenate(carriers)


def flood(mask: np.ndarray, start: tuple, reach: int) -> np.ndarray:
    """The part of a mask (96, 96) that is connected with `start`, places (y, x), by steps of up to
    `reach` pixels.
    """
    part = np.zeros_like(mask)
    part[start] = True
    num = 0
    while num != part.sum():
        num = part.sum()
        windows = sliding_window_view(np.pad(part, reach), (2 * reach + 1, 2 * reach + 1))
        part |= windows.any((2, 3)) & mask
    return part & mask
