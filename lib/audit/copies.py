"""Copies of patches wherever they lie: equal up to a symmetry, recompressed, brightened, shifted,
or cut beside each other.

Equal patches share the counts of their values. For the others a patch is known by anchors: local
extrema of its smoothed brightness. Each anchor has codes, the signs of random projections of the
window around it. The window is first turned into the one of eight orientations in which brightness
falls to the right and down. Patches of the same tissue share codes, and a shared code says how one
lies on the other: a candidate, which the pixels then confirm. A hash of the whole patch would not
do: a shift by four pixels changes it as much as another patch does.
"""

from collections.abc import Callable

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from lib.audit.tissue import extreme_around, find_blobs, smooth
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
# similarity of near copies: of 23,000 real patches, no two that were none exceeded 0.41
LEAST_ALIKE = 0.45
# and of overlapping ones: in 23,000 real patches 15,942 pairs have 0.99 and more, others up to 0.77
LEAST_OVERLAPPING = 0.85
# pixels and levels: similarity is of the differences over so many pixels, cut off at so many levels
EDGE_PX, STEEP = 2, 8.0
# of the brightness of near copies: edges of empty glass look alike but for their brightness
MOST_GAIN = 1.35
NEAR_PX = 4  # a copy that lies further off shows other tissue: it overlaps

# tables are record arrays: `prints.codes` is a column, `prints[rows]` are some of the patches
PRINTS = np.dtype(
    [  # what a patch is known by
        ("key", np.uint64),  # equal for equal patches, 0 for those of one colour
        ("place", np.int8, (NUM_ANCHORS, 2)),  # y and x of each anchor
        ("symmetry", np.uint8, NUM_ANCHORS),  # turns the window around it
        ("codes", np.int64, (NUM_ANCHORS, NUM_CODES)),  # -1 where there is no anchor
    ]
)
OVERLAPS = np.dtype(
    [  # two patches that show the same tissue
        ("first", np.int64),  # row numbers, the first is the lower one
        ("second", np.int64),
        ("symmetry", np.int64),  # turns the second
        ("shift", np.int64, 2),  # pixels by which it then lies lower and further right
        ("is_near", bool),  # the same patch but for a few pixels, not two that overlap
        ("similarity", np.float32),  # correlation of the edges where both lie
    ]
)

Prints = Overlaps = np.recarray  # (N,) of PRINTS, and of OVERLAPS

RNG = np.random.default_rng(0)
DIRECTIONS = RNG.standard_normal((len(OFFSETS) ** 2, NUM_CODES * NUM_BITS), np.float32)
DIRECTIONS -= DIRECTIONS.mean(0)  # a brighter patch has the same signs
KEY_FACTORS = RNG.integers(1, 1 << 63, 3 * 256, np.uint64)


def join(parts) -> np.recarray:
    """Consecutive tables of one kind as one."""
    return np.concatenate(parts).view(np.recarray)


def turn(patches: np.ndarray, symmetry: int) -> np.ndarray:
    """Patches (B, H, W, ...) under a symmetry as lib/augment.py numbers them: bit 0 flips x, bit 1
    flips y, then bit 2 transposes.
    """
    if symmetry & 1:
        patches = patches[:, :, ::-1]
    if symmetry & 2:
        patches = patches[:, ::-1]
    return np.swapaxes(patches, 1, 2) if symmetry & 4 else patches


def relate_symmetries(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """The symmetries that undo the first ones after the second ones were applied, int64 (M,)."""
    flips = first & 3
    transposes = (first ^ second) & 4
    # flips that a transposition follows are flips of the other axis behind it
    flips = np.where(transposes, flips >> 1 | (flips & 1) << 1, flips)
    return flips ^ (second & 3) | transposes


def turn_places(places: np.ndarray, symmetry: np.ndarray) -> np.ndarray:
    """Where symmetries (M,) bring pixels at y and x (M, 2) of a patch."""
    flips = np.stack([symmetry & 2, symmetry & 1], 1)
    places = np.where(flips, SIZE - 1 - places, places)
    return np.where(symmetry[:, None] & 4, places[:, ::-1], places)


def find_prints(counts: np.ndarray, grey: np.ndarray) -> Prints:
    """PRINTS (B,) of patches, from the counts of their values int64 (B, 3, 256) and their grey
    planes float32 (96, 96, B).
    """
    prints = np.zeros(len(counts), PRINTS).view(np.recarray)
    prints.key = counts.reshape(len(counts), -1).astype(np.uint64) @ KEY_FACTORS

    fine = smooth(grey)
    y, x, patch, rank = find_anchors(fine)
    windows, symmetry = cut_windows(fine, y, x, patch)
    prints.place[patch, rank] = np.stack([y, x], 1) + MARGIN
    prints.symmetry[patch, rank] = symmetry
    prints.codes = -1
    prints.codes[patch, rank] = encode(windows)

    has_one_colour = (counts.max(2) == SIZE * SIZE).all(1)
    prints.key[has_one_colour] = 0
    prints.codes[has_one_colour] = -1
    return prints


def find_anchors(fine: np.ndarray) -> np.ndarray:
    """y, x (both less MARGIN), patch and rank of the NUM_ANCHORS strongest blobs of each patch,
    int64 (4, n), from smoothed planes (90, 90, B).
    """
    blob = find_blobs(fine)
    highest = np.maximum(extreme_around(blob, np.maximum, WINDOW), 0)
    lowest = np.minimum(extreme_around(blob, np.minimum, WINDOW), 0)
    is_peak = (blob != 0) & ((blob == highest) | (blob == lowest))
    anchors = np.argwhere(is_peak)
    strength = np.abs(blob[is_peak])
    order = np.lexsort((-strength, anchors[:, 2]))
    y, x, patch = anchors[order].T
    rank = np.arange(len(patch)) - np.searchsorted(patch, patch)
    return np.stack([y, x, patch, rank])[:, rank < NUM_ANCHORS]


def cut_windows(fine: np.ndarray, y, x, patch) -> tuple[np.ndarray, np.ndarray]:
    """The windows float32 (n, 9, 9) around anchors, turned so that brightness falls to the right,
    down, and more to the right; and the symmetries that turned them, int64 (n,).
    """
    reach = OFFSETS[-1] - OFFSETS[0] + 1
    windows = sliding_window_view(fine, (reach, reach), (0, 1))[..., ::2, ::2]
    windows = windows[y, x, patch]
    slope_y = (windows * OFFSETS[:, None]).sum((1, 2))
    slope_x = (windows * OFFSETS).sum((1, 2))
    is_steeper = np.abs(slope_y) > np.abs(slope_x)
    symmetry = (slope_x > 0) + 2 * (slope_y > 0) + 4 * is_steeper
    for number in range(8):
        mine = symmetry == number
        windows[mine] = turn(windows[mine], number)
    return windows, symmetry


def encode(windows: np.ndarray) -> np.ndarray:
    """Codes int64 (n, NUM_CODES) of windows (n, 9, 9)."""
    # eight at a time: for larger products BLAS would start threads that fight with ours
    padded = np.pad(windows, ((0, -len(windows) % 8), (0, 0), (0, 0)))
    eights = padded.reshape(-1, 8, len(OFFSETS) ** 2)
    signs = (eights @ DIRECTIONS).reshape(-1, NUM_CODES, NUM_BITS) > 0
    return (signs[: len(windows)] << np.arange(NUM_BITS)).sum(2)


def in_parts(function: Callable, patches: np.ndarray) -> list:
    """What a function of (patches, the counts of their values, their grey planes) gives for BLOCK
    patches uint8 (N, 96, 96, 3) at a time.
    """
    results = []
    for start in range(0, len(patches), BLOCK):
        part = patches[start : start + BLOCK]
        results.append(function(part, count_values(part), grey_planes(part)))
    return results


def print_patches(patches: np.ndarray) -> Prints:
    """PRINTS (N,) of patches uint8 (N, 96, 96, 3)."""
    return join(in_parts(lambda _, counts, grey: find_prints(counts, grey), patches))


def find_equal(prints: Prints, read: Callable) -> np.ndarray:
    """For each patch the first that is equal to it up to a symmetry, int64 (N,), itself if there is
    none; those of one colour are not compared. `read` gives patches uint8 (B, 96, 96, 3) by their
    numbers.
    """
    first = np.arange(len(prints))
    _, group, sizes = np.unique(prints.key, return_inverse=True, return_counts=True)
    firsts = {}
    for row in np.flatnonzero((sizes[group] > 1) & (prints.key > 0)):
        patch = read(row[None])
        views = [turn(patch, symmetry).tobytes() for symmetry in range(8)]
        first[row] = firsts.setdefault(hash(min(views)), row)
    return first


def match_anchors(codes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Pairs of anchors that share a code and nearly the other, int64 (M,) twice, the lower number
    first, from the codes (A, NUM_CODES) of all anchors.
    """
    pairs = []
    for shared in codes.T:
        anchors = np.argsort(shared, kind="stable")
        anchors = anchors[shared[anchors] >= 0]
        _, group, sizes = np.unique(shared[anchors], return_inverse=True, return_counts=True)
        is_telling = sizes[group] <= MOST_ALIKE
        anchors, group = anchors[is_telling], group[is_telling]
        # every two of a group, by how far apart they stand in it
        for distance in range(1, MOST_ALIKE):
            is_pair = group[:-distance] == group[distance:]
            one, other = anchors[:-distance][is_pair], anchors[distance:][is_pair]
            is_alike = count_bits(codes[one], codes[other]) <= MOST_DIFFERENT
            pairs.append((one * len(codes) + other)[is_alike])
    return np.divmod(np.unique(np.concatenate(pairs)), len(codes))


def count_bits(codes: np.ndarray, others: np.ndarray) -> np.ndarray:
    """In how many bits codes (M, NUM_CODES) differ from others, (M,)."""
    return np.bitwise_count(codes ^ others).sum(1)


def find_candidates(prints: Prints) -> Overlaps:
    """OVERLAPS (M,) of patches by their codes alone, not yet measured.

    Two patches share the codes of two anchors or more that are turned in the same way, or both
    codes of one, but for MOST_LONELY bits.
    """
    codes = prints.codes.reshape(-1, NUM_CODES)
    turned = prints.symmetry.ravel().astype(np.int64)
    place = prints.place.reshape(-1, 2)
    one, other = match_anchors(codes)
    first, second = one // NUM_ANCHORS, other // NUM_ANCHORS
    symmetry = relate_symmetries(turned[one], turned[other])

    # of the anchors that agree on how two patches lie, the one whose codes agree best
    how = (first * len(prints) + second) * 8 + symmetry
    differing = count_bits(codes[one], codes[other])
    order = np.lexsort((differing, how))
    _, start, votes = np.unique(how[order], return_index=True, return_counts=True)
    best = order[start]
    is_sure = (votes > 1) | (differing[best] <= MOST_LONELY)
    best = best[is_sure & (first[best] != second[best])]

    pairs = np.zeros(len(best), OVERLAPS).view(np.recarray)
    pairs.first, pairs.second, pairs.symmetry = first[best], second[best], symmetry[best]
    pairs.shift = place[one[best]] - turn_places(place[other[best]], pairs.symmetry)
    pairs.is_near = np.abs(pairs.shift).max(1, initial=0) <= NEAR_PX
    return pairs


def measure_similarity(pair: np.record, patch: np.ndarray, other: np.ndarray) -> float:
    """How well the edges of two patches (96, 96, 3) correlate where both lie, for one of OVERLAPS;
    0 for near copies that are not as bright.
    """
    weights = np.full(3, 1 / 3, np.float32)
    planes = patch @ weights, turn((other @ weights)[None], pair.symmetry)[0]
    edges, brightness = [], []
    for plane, (dy, dx) in zip(planes, (pair.shift, -pair.shift), strict=True):
        plane = plane[max(dy, 0) : SIZE + min(dy, 0), max(dx, 0) : SIZE + min(dx, 0)]
        down = plane[EDGE_PX:] - plane[:-EDGE_PX]
        right = plane[:, EDGE_PX:] - plane[:, :-EDGE_PX]
        both = np.concatenate([down.ravel(), right.ravel()])
        # cut off: edges that outshine all others would make any two borders of empty glass alike
        edges.append(both.clip(-STEEP, STEEP))
        brightness.append(plane.mean())
    if pair.is_near and max(brightness) > MOST_GAIN * min(brightness):
        return 0.0
    one, other = edges
    return one @ other / np.sqrt(max((one @ one) * (other @ other), 1e-6))


def find_overlaps(prints: Prints, read: Callable) -> Overlaps:
    """OVERLAPS (M,) of patches, confirmed by their pixels; `read` gives them as in find_equal."""
    pairs = find_candidates(prints)
    with Progress(len(pairs), "compare", "candidate pairs") as bar:
        for part in np.array_split(pairs, len(pairs) // 128 + 1):
            patches = zip(part, read(part.first), read(part.second), strict=True)
            part.similarity = [measure_similarity(*pair) for pair in patches]
            bar.add(len(part))
    least = np.where(pairs.is_near, LEAST_ALIKE, LEAST_OVERLAPPING)
    return pairs[pairs.similarity >= least]


def compare_patches(prints: Prints, read: Callable) -> tuple[np.ndarray, Overlaps]:
    """For each patch the first equal one, as find_equal gives it, and the overlaps among these
    first ones.
    """
    first = find_equal(prints, read)
    firsts = prints.copy()
    firsts.codes[first != np.arange(len(first))] = -1
    return first, find_overlaps(firsts, read)


def link_groups(first: np.ndarray, overlaps: Overlaps) -> np.ndarray:
    """The smallest number that each patch is linked with, by equality or by overlaps, if only by
    way of others, int64 (N,).
    """
    group = np.arange(len(first))
    one = np.concatenate([group, first, overlaps.first, overlaps.second])
    other = np.concatenate([first, group, overlaps.second, overlaps.first])
    while True:
        before = group.copy()
        np.minimum.at(group, one, before[other])
        group = group[group]
        if np.array_equal(group, before):
            return group


def link_copies(images) -> np.ndarray:
    """For each patch of lib.pcam.Images the smallest row that shows some of the same tissue, if
    only by way of others: (N,).
    """
    prints = []
    with Progress(images.num, "looking for copies and overlapping patches") as progress:
        for _, block in images.blocks():
            prints.append(print_patches(block))
            progress.add(len(block))
    return link_groups(*compare_patches(join(prints), images.read))
