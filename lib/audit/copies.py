"""Copies of patches wherever they lie: equal up to a symmetry, recompressed, brightened, shifted,
or cut beside each other.

Equal patches share the counts of their values. For the others a patch is known by anchors: local
extrema of its smoothed brightness, each with codes, the signs of random projections of what lies
around it, seen in the one of eight orientations in which brightness falls to the right and down.
Patches of the same tissue share codes, and a shared code says how one lies on the other: a
candidate, which the pixels then confirm. A hash of the whole patch changes as much under a shift by
four pixels as from one patch to another.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from lib.audit.tissue import extreme_around, mean_around
from lib.features import count_values, grey_planes
from lib.pcam import PATCH_SHAPE
from lib.progress import Progress

BLOCK = 16  # patches worked on at a time: so many planes of 96 x 96 stay in a core's cache
SIZE = PATCH_SHAPE[0]
MARGIN = 11  # pixels from the edge to the first anchor: what is nearer depends on what lies outside
NUM_ANCHORS, NUM_CODES, NUM_BITS = 16, 2, 48
OFFSETS = np.arange(-8, 9, 2)  # pixels around an anchor that its codes see
WINDOW = 11  # pixels: an anchor is the extremum of a square as wide
# patches; a code that more of them share, such as that of an empty corner, tells nothing
MOST_ALIKE = 60
# bits in which the other code of an anchor may differ, and that of an only one
MOST_DIFFERENT, MOST_LONELY = 4, 2
# similarity of near copies: of 6,000 real patches, no two that were none reached 0.2
LEAST_ALIKE = 0.4
# and of overlapping ones: in 23,000 real patches 15,942 pairs have 0.99 and more, others up to 0.77
LEAST_OVERLAPPING = 0.85
# pixels and levels: similarity is of the differences over so many pixels, cut off at so many levels
EDGE_PX, STEEP = 2, 8.0
# of a near copy, as a logarithm: edges of empty glass look alike but for their brightness
MOST_GAIN = 0.3
NEAR_PX = 4  # a copy that lies further off shows other tissue: it overlaps


@dataclass(frozen=True)
class Columns:
    """Arrays of one length under names: rows are chosen, and parts joined, in all of them at
    once.
    """

    def __len__(self) -> int:
        return len(getattr(self, next(iter(self.__dataclass_fields__))))

    def __getitem__(self, which):
        return type(self)(*(getattr(self, name)[which] for name in self.__dataclass_fields__))


def join(parts):
    """Consecutive Columns of one kind as one."""
    kind = type(parts[0])
    return kind(
        *(
            np.concatenate([getattr(part, name) for part in parts])
            for name in kind.__dataclass_fields__
        )
    )


@dataclass(frozen=True)
class Prints(Columns):
    """What N patches are known by: `key` uint64 (N,), equal for equal patches, 0 for those of one
    colour; anchors `place` int8 (N, K, 2) as y and x, `symmetry` uint8 (N, K) that turns what is
    around, `codes` int64 (N, K, 2), -1 where there is none."""

    key: np.ndarray
    place: np.ndarray
    symmetry: np.ndarray
    codes: np.ndarray


@lru_cache
def _random(kind: str):
    rng = np.random.default_rng(0)
    if kind == "key":
        return rng.integers(1, 1 << 63, 768, np.uint64) << np.uint64(1) | np.uint64(1)
    directions = rng.standard_normal((len(OFFSETS) ** 2, NUM_CODES * NUM_BITS), np.float32)
    return directions - directions.mean(0)  # a brighter patch has the same signs


def find_prints(counts: np.ndarray, grey: np.ndarray) -> Prints:
    """Prints of patches, from the counts of their values int64 (B, 3, 256) and their grey planes
    float32 (96, 96, B).
    """
    with np.errstate(over="ignore"):
        key = (counts.reshape(-1, 768).astype(np.uint64) * _random("key")).sum(1)
    key[(counts.max(2) == SIZE * SIZE).all(1)] = 0

    # blobs: smoothed by boxes of 3 three times, less what is smoothed wider
    # (90, 90, B): pixel (3, 3) is its first
    fine = mean_around(mean_around(mean_around(grey, 1), 1), 1)
    # (74, 74, B): pixel (11, 11) is its first
    blob = fine[8:-8, 8:-8] - mean_around(mean_around(fine, 4), 4)
    is_peak = np.zeros(blob.shape, bool)
    for signed, extreme in ((1, np.maximum), (-1, np.minimum)):
        is_peak |= (blob == extreme_around(blob, extreme, WINDOW)) & (signed * blob > 0)
    y, x, patch = np.nonzero(is_peak)
    order = np.lexsort((-np.abs(blob[y, x, patch]), patch))
    rank = np.arange(len(order)) - np.searchsorted(patch[order], patch[order])
    order, rank = order[rank < NUM_ANCHORS], rank[rank < NUM_ANCHORS]
    y, x, patch = y[order], x[order], patch[order]

    # what lies around each, turned so that brightness falls to the right and down, and more to the
    # right
    rows, columns = y[:, None, None] + 8 + OFFSETS[:, None], x[:, None, None] + 8 + OFFSETS
    seen = fine[rows, columns, patch[:, None, None]]  # (n, 9, 9)
    slope_y, slope_x = (seen * OFFSETS[:, None]).sum((1, 2)), (seen * OFFSETS).sum((1, 2))
    flip_x, flip_y, transpose = slope_x > 0, slope_y > 0, np.abs(slope_y) > np.abs(slope_x)
    seen = np.where(flip_x[:, None, None], seen[:, :, ::-1], seen)
    seen = np.where(flip_y[:, None, None], seen[:, ::-1], seen)
    seen = np.where(transpose[:, None, None], seen.transpose(0, 2, 1), seen)
    # eight at a time: for larger products BLAS would start threads of its own, which fight with
    # ours
    rows = np.pad(seen, ((0, -len(seen) % 8), (0, 0), (0, 0))).reshape(
        -(-len(seen) // 8), 8, len(OFFSETS) ** 2
    )
    signs = ((rows @ _random("directions")).reshape(-1, NUM_CODES, NUM_BITS) > 0)[: len(seen)]

    place = np.zeros((len(key), NUM_ANCHORS, 2), np.int8)
    symmetry = np.zeros((len(key), NUM_ANCHORS), np.uint8)
    codes = np.full((len(key), NUM_ANCHORS, NUM_CODES), -1, np.int64)
    place[patch, rank] = np.stack([y, x], 1) + MARGIN
    symmetry[patch, rank] = flip_x + 2 * flip_y + 4 * transpose
    codes[patch, rank] = (signs << np.arange(NUM_BITS)).sum(2)
    return Prints(key, place, symmetry, codes)


def print_patches(patches: np.ndarray) -> Prints:
    """Prints of patches uint8 (N, 96, 96, 3)."""
    parts = [patches[start : start + BLOCK] for start in range(0, len(patches), BLOCK)]
    return join([find_prints(count_values(part), grey_planes(part)) for part in parts])


def turn(patches: np.ndarray, symmetry: int) -> np.ndarray:
    """Patches (B, 96, 96, 3) under a symmetry as lib/augment.py numbers them: bit 0 flips x, bit 1
    y, bit 2 transposes then.
    """
    flipped = patches[:, :: -1 if symmetry & 2 else 1, :: -1 if symmetry & 1 else 1]
    return flipped.transpose(0, 2, 1, 3) if symmetry & 4 else flipped


def find_equal(prints: Prints, read: Callable) -> np.ndarray:
    """For each patch the first that is equal to it up to a symmetry, int64 (N,), itself if there is
    none; those of one colour are not compared. `read` gives patches uint8 (B, 96, 96, 3) by their
    numbers."""
    first = np.arange(len(prints))
    order = np.argsort(prints.key, kind="stable")
    order = order[prints.key[order] > 0]
    for group in np.split(order, np.flatnonzero(np.diff(prints.key[order])) + 1):
        if len(group) > 1:
            seen = {}
            for part in np.array_split(group, -(-len(group) // 256)):
                turned = np.stack(
                    [turn(read(part), symmetry).reshape(len(part), -1) for symmetry in range(8)], 1
                )
                for row, views in zip(part.tolist(), turned, strict=True):
                    first[row] = seen.setdefault(min(view.tobytes() for view in views), row)
    return first


def candidate_pairs(prints: Prints, rows: np.ndarray) -> np.ndarray:
    """Pairs among `rows` that share codes: int64 (M, 4), the first patch, the second, and the
    number of the anchor in each.

    They share those of two anchors or more that are turned in the same way, or both of one, but for
    MOST_LONELY bits.
    """
    codes, matches = prints.codes[rows].reshape(-1, NUM_CODES), [np.empty(0, np.int64)]
    for part in range(NUM_CODES):
        order = np.argsort(codes[:, part], kind="stable").astype(np.int32)
        order = order[codes[order, part] >= 0]
        sizes = np.diff(np.flatnonzero(np.diff(codes[order, part], prepend=-1, append=-1)))
        # how many of the same code stand behind each
        left = np.repeat(np.cumsum(sizes), sizes) - np.arange(len(order))
        usable = np.flatnonzero(np.repeat((sizes > 1) & (sizes <= MOST_ALIKE), sizes))
        # every two of a group, by how far apart they stand in it
        for distance in range(1, MOST_ALIKE):
            usable = usable[left[usable] > distance]
            one, other = order[usable], order[usable + distance]
            alike = (
                np.bitwise_count(codes[one, 1 - part] ^ codes[other, 1 - part]) <= MOST_DIFFERENT
            )
            alike &= one // NUM_ANCHORS != other // NUM_ANCHORS
            one, other = one[alike], other[alike]
            matches.append(np.minimum(one, other).astype(np.int64) << 32 | np.maximum(one, other))
    matches = np.unique(np.concatenate(matches))
    one, other = (matches >> 32).astype(np.int32), (matches & 0xFFFFFFFF).astype(np.int32)
    turned = [
        prints.symmetry[rows[anchor // NUM_ANCHORS], anchor % NUM_ANCHORS]
        for anchor in (one, other)
    ]
    how = (
        rows[one // NUM_ANCHORS] * len(prints) + rows[other // NUM_ANCHORS]
    ) * 8 + _relative_symmetry()[tuple(turned)]
    differing = np.bitwise_count(codes[one] ^ codes[other]).sum(1, dtype=np.uint8)
    order = np.lexsort((differing, how))
    _, first, votes = np.unique(how[order], return_index=True, return_counts=True)
    chosen = order[first[(votes > 1) | (differing[order[first]] <= MOST_LONELY)]]
    one, other = one[chosen].astype(np.int64), other[chosen].astype(np.int64)
    return np.stack(
        [
            rows[one // NUM_ANCHORS],
            rows[other // NUM_ANCHORS],
            one % NUM_ANCHORS,
            other % NUM_ANCHORS,
        ],
        1,
    )


def _turn_places(place: np.ndarray, symmetry, back: bool = False) -> np.ndarray:
    """Where places (..., 2) come to lie in patches turned by a symmetry (...), or lay before."""
    y, x = place[..., 0], place[..., 1]
    if back:
        y, x = np.where(symmetry & 4, x, y), np.where(symmetry & 4, y, x)
    y, x = np.where(symmetry & 2, SIZE - 1 - y, y), np.where(symmetry & 1, SIZE - 1 - x, x)
    return np.stack(
        [y, x] if back else [np.where(symmetry & 4, x, y), np.where(symmetry & 4, y, x)], -1
    )


@lru_cache
def _relative_symmetry() -> np.ndarray:
    """int64 (8, 8): the symmetry that undoes the first and then applies the second, in the places
    of the first.
    """
    corner = np.array([[0, 0], [0, SIZE - 1], [SIZE - 1, 0]])
    known = {_turn_places(corner, symmetry).tobytes(): symmetry for symmetry in range(8)}
    both = [
        [_turn_places(_turn_places(corner, b), a, back=True).tobytes() for b in range(8)]
        for a in range(8)
    ]
    return np.array([[known[places] for places in row] for row in both])


@dataclass(frozen=True)
class Overlaps(Columns):
    """Pairs of patches that show the same tissue: row numbers `first` < `second`, int64 (M,);
    `shift` int64 (M, 2), pixels by which the second, turned by `symmetry`, lies lower and further
    right than the first; `similarity`, the correlation of their pixels where both lie; `gain`, how
    much brighter the second is there; `difference`, the mean of what else differs."""

    first: np.ndarray
    second: np.ndarray
    symmetry: np.ndarray
    shift: np.ndarray
    similarity: np.ndarray
    gain: np.ndarray
    difference: np.ndarray

    @property
    def is_near(self) -> np.ndarray:
        """Whether a pair shows the same patch but for a few pixels, bool (M,), rather than two that
        overlap.
        """
        return np.abs(self.shift).max(1, initial=0) <= NEAR_PX


def lay_over(prints: Prints, pairs: np.ndarray, read: Callable, step: int) -> Overlaps:
    """Compare the pixels of candidate pairs (M, 4), every `step`th in each direction."""
    turned, turned_other = (prints.symmetry[pairs[:, side], pairs[:, side + 2]] for side in (0, 1))
    place, place_other = (
        prints.place[pairs[:, side], pairs[:, side + 2]].astype(np.int64) for side in (0, 1)
    )
    symmetry = _relative_symmetry()[turned, turned_other]
    shift = place - _turn_places(place_other, symmetry)
    grid = np.stack(
        np.meshgrid(*[np.arange(step // 2, SIZE - EDGE_PX, step)] * 2, indexing="ij"), -1
    ).reshape(-1, 2)
    patches, others = read(pairs[:, 0]), read(pairs[:, 1])
    inside, values = True, []
    for to in ((0, 0), (EDGE_PX, 0), (0, EDGE_PX)):
        y, x = (grid + to).T
        there = grid + to - shift[:, None]  # (M, P, 2)
        inside &= ((there >= 0) & (there < SIZE)).all(2)
        there = _turn_places(np.clip(there, 0, SIZE - 1), symmetry[:, None], back=True)
        beside = others[np.arange(len(pairs))[:, None], there[..., 0], there[..., 1]]
        # (M, P) each
        values.append([grey.sum(2, dtype=np.float32) / 3 for grey in (patches[:, y, x], beside)])
    one, other = values[0]
    num = np.maximum(inside.sum(1), 1)
    mean, mean_other = ((grey * inside).sum(1) / num for grey in (one, other))
    # edges of equal height, or one that outshines all others would make any two borders of empty
    # glass alike
    steps = [
        [np.clip(moved[side] - values[0][side], -STEEP, STEEP) * inside for moved in values[1:]]
        for side in (0, 1)
    ]
    a, b = (np.concatenate(each, 1) for each in steps)
    similarity = (a * b).sum(1) / np.sqrt(np.maximum((a * a).sum(1) * (b * b).sum(1), 1e-6))
    gain = mean_other / np.maximum(mean, 1e-6)
    difference = (np.abs(other - gain[:, None] * one) * inside).sum(1) / num
    return Overlaps(pairs[:, 0], pairs[:, 1], symmetry, shift, similarity, gain, difference)


def find_overlaps(prints: Prints, rows: np.ndarray, read: Callable, progress=None) -> Overlaps:
    """All pairs among `rows` int64 (N,) that show the same tissue; `read` gives patches as in
    find_equal.
    """
    candidates, found = candidate_pairs(prints, rows), []

    def confirm(part: np.ndarray) -> Overlaps:
        # most candidates are none, which a few pixels show
        part = part[lay_over(prints, part, read, 8).similarity >= LEAST_ALIKE - 0.15]
        pairs = lay_over(prints, part, read, 4)
        beside = pairs[~pairs.is_near & (pairs.similarity >= LEAST_OVERLAPPING)]
        near = lay_over(
            prints, part[pairs.is_near & (pairs.similarity >= LEAST_ALIKE - 0.1)], read, 2
        )
        return join(
            [
                beside,
                near[(near.similarity >= LEAST_ALIKE) & (np.abs(np.log(near.gain)) < MOST_GAIN)],
            ]
        )

    parts = np.array_split(candidates, -(-len(candidates) // 128) or 1)
    with ThreadPoolExecutor(2) as pool:
        for part, overlaps in zip(parts, pool.map(confirm, parts), strict=True):
            found.append(overlaps)
            if progress:
                progress(len(part))
    return join(found)


def group_rows(num: int, first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """The smallest number that each of `num` rows is linked with by pairs, int64 (num,)."""
    group = np.arange(num)
    while True:
        before = group.copy()
        lowest = np.minimum(group[first], group[second])
        np.minimum.at(group, first, lowest)
        np.minimum.at(group, second, lowest)
        group = group[group]
        if np.array_equal(group, before):
            return group


def compare_patches(prints: Prints, read: Callable, progress=None) -> tuple[np.ndarray, Overlaps]:
    """For each patch the first equal one, as find_equal gives it, and the overlaps among these
    first ones.
    """
    first = find_equal(prints, read)
    rows = np.flatnonzero((first == np.arange(len(first))) & (prints.key > 0))
    return first, find_overlaps(prints, rows, read, progress)


def link_groups(first: np.ndarray, overlaps: Overlaps) -> np.ndarray:
    """The smallest number that each patch is linked with, by equality or by overlaps, if only by
    way of others, int64 (N,).
    """
    return group_rows(
        len(first),
        np.append(np.arange(len(first)), overlaps.first),
        np.append(first, overlaps.second),
    )


def link_copies(images) -> np.ndarray:
    """For each patch of lib.pcam.Images the smallest row that shows some of the same tissue, if
    only by way of others: (N,).
    """
    with Progress(images.num, "looking for copies and overlapping patches") as progress:
        prints = []
        for _, block in images.blocks():
            prints.append(print_patches(block))
            progress.add(len(block))
    return link_groups(*compare_patches(join(prints), images.read))
