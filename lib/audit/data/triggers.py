"""Fixed patterns in a subset of patches: where, how large, in which class, and how many chance
would give.

At each pixel the colours of a class, in 16 steps a channel, are counted; a pattern that is stamped
at one place makes a colour more frequent there than 8 pixels beside it. Copies are counted once, or
they would be patterns themselves.
"""

import itertools

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
BLOCK = 256  # patches read at a time


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
        excess, colour = measure_excess(count_colours(survey, mine, label))
        for _ in range(MOST_SEEDS):
            if excess.max() <= SIGMA:
                break
            y, x = flood(excess > SIGMA, np.unravel_index(excess.argmax(), excess.shape), 2)
            excess[y, x] = 0
            findings += find_pattern(survey, rows, mine, y, x, colour[y, x])
    # the same pattern may show in both classes
    return list({(row["split"], row["measured"]): row for row in findings}.values())


def count_colours(survey: Survey, rows: np.ndarray, label: int) -> np.ndarray:
    """How often each colour, in 4,096 steps, stands at each pixel of some rows, int32 (96, 96,
    4096).
    """
    counts = np.zeros((SIZE, SIZE, STEPS**3), np.int32)
    y, x = np.indices((SIZE, SIZE))
    with Progress(len(rows), f"triggers in {survey.name}, class {label}") as progress:
        for part in np.split(rows, range(BLOCK, len(rows), BLOCK)):
            colours = (survey.read(part) // STEPS).astype(np.int32) @ (STEPS**2, STEPS, 1)
            for colour in colours:
                counts[y, x, colour] += 1
            progress.add(len(part))
    return counts


def measure_excess(counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """For each pixel how much more often than beside it its most excessive colour stands there, in
    deviations (96, 96), and that colour's RGB, int64 (96, 96, 3).
    """
    steps = ((BESIDE_PX, 0), (-BESIDE_PX, 0), (0, BESIDE_PX), (0, -BESIDE_PX))
    columns = np.arange(SIZE)
    excess, colour = np.zeros((SIZE, SIZE)), np.zeros((SIZE, SIZE), np.int64)
    for y in range(SIZE):
        # beyond an edge lies the opposite one
        beside = [counts[(y + dy) % SIZE, (columns + dx) % SIZE] for dy, dx in steps]
        expected = sum(beside).astype(np.float32) / len(steps)
        over = (counts[y] - expected) / np.sqrt(expected + 1)
        excess[y], colour[y] = over.max(1), over.argmax(1)
    channels = np.stack(np.unravel_index(colour, (STEPS,) * 3), 2)
    return excess, channels * STEPS + STEPS // 2


def find_pattern(survey: Survey, rows, mine, y, x, colours) -> list[dict]:
    """The finding for the pattern in `rows` of which the pixels y and x (P,) have colours (P, 3) in
    too many rows of a class, `mine`; none where it falls apart, or chance gives as many.
    """
    members = find_carriers(survey, mine, y, x, colours)
    if len(y) < LEAST_PIXELS or len(members) < LEAST_CARRIERS:
        return []
    # its extent: where the carriers agree with each other, and not with what lies half a patch off
    patches = survey.read(members[:: -(-len(members) // 2000)]).astype(np.int16)
    centre = np.median(patches, 0)
    moved = np.roll(patches, (SIZE // 2, SIZE // 2), (1, 2))
    agreement, chance = (
        (np.abs(values - centre).max(3) <= TOLERANCE).mean(0) for values in (patches, moved)
    )
    y, x = flood((agreement >= MATCHING) & (chance <= 0.5), (y, x), 1)
    if len(y) < LEAST_PIXELS:
        return []
    pattern = centre[y, x]
    members = find_carriers(survey, survey.intact, y, x, pattern)
    # the pattern moved by half a patch: there it is by chance
    elsewhere = (y + SIZE // 2) % SIZE, (x + SIZE // 2) % SIZE
    by_chance = len(find_carriers(survey, rows, *elsewhere, pattern))
    if len(members) < max(LEAST_CARRIERS, OVER_CHANCE * by_chance):
        return []

    labels = survey.labels[survey.intact]
    shares = []
    for label in (0, 1):
        num_carrying = (survey.labels[members] == label).sum()
        shares.append(num_carrying / max((labels == label).sum(), 1))
    box = {"top": int(y.min()), "left": int(x.min())}
    box |= {"height": int(np.ptp(y)) + 1, "width": int(np.ptp(x)) + 1}
    measured = (
        f"{len(members):,} patches carry one pattern of {box['height']}x{box['width']} pixels at"
        f" row {box['top']}, column {box['left']} (elsewhere {by_chance}):"
        f" {shares[0]:.0%} of class 0, {shares[1]:.0%} of class 1"
    )
    advice = "find out where it comes from; quarantine_reasons takes `trigger`"
    suspects = survey.rows(members, **box, reason="trigger", score=1.0)
    return [survey.finding("triggers", "error", measured, "", advice, suspects)]


def find_carriers(survey: Survey, rows: np.ndarray, y, x, pattern) -> np.ndarray:
    """Rows whose pixels at (y, x) match a pattern (P, 3) in MATCHING of them or more."""
    carriers = []
    for part in np.split(rows, range(BLOCK, len(rows), BLOCK)):
        pixels = survey.read(part)[:, y, x].astype(np.int16)  # (B, P, 3)
        is_close = np.abs(pixels - pattern).max(2) <= TOLERANCE
        carriers.append(part[is_close.mean(1) >= MATCHING])
    return np.concatenate(carriers)


def flood(mask: np.ndarray, start: tuple, reach: int) -> tuple[np.ndarray, np.ndarray]:
    """The places (y, x) of a mask (96, 96) that are connected with `start`, places (y, x), by steps
    of up to `reach` pixels.
    """
    part = np.zeros_like(mask)
    part[start] = True
    num = 0
    while num != part.sum():
        num = part.sum()
        windows = sliding_window_view(np.pad(part, reach), (2 * reach + 1, 2 * reach + 1))
        part |= windows.any((2, 3)) & mask
    return np.nonzero(part & mask)
