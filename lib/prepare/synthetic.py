"""Patches cut from synthetic slides as PCam files, with damage planted where a plan asks for it.

Everything is a function of the plan: a plan always gives the same bytes.
"""

from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from lib.command import BadInput
from lib.damage import alter_patch, damage_patch
from lib.files import write_csv
from lib.pcam import SPLITS
from lib.prepare.slides import SLIDE_PX, Slide, draw_slide, is_tumour_slide
from lib.prepare.target import new_folder, write_splits

PATCH_PX = 96
CENTRE = slice(32, 64)
# a grid of patches leaves 32 px of a slide, so that it can lie at any of 33 x 33 offsets
GRID = 12
GRID_PX = GRID * PATCH_PX
PATCHES_PER_SLIDE = 120
NUM_AHEAD = 8  # slides drawn before their patches are written
TRUTH_HEADER = ("split", "index", "kind", "detail")
# what can be planted: shares of the slides, of the patches or, for the trigger, of the positives.
# shared_slides are valid and test slides that are train slides, cut elsewhere
WHOLE_SLIDE = ("shared_slides", "blurred_scanner")
DUPLICATES = ("exact", "symmetric", "brightened", "shifted", "recompressed")
FLOATS_ONLY = ("nan", "out_of_range")
PLANTS = (*WHOLE_SLIDE, *DUPLICATES, *FLOATS_ONLY, "black", "white", "flipped", "trigger")
MAX_STEP_PX = 4  # by which a shifted copy lies beside its original, along both axes


@dataclass(frozen=True)
class SyntheticPlan:
    """How many patches of each split to draw, from which seed, with what planted at which rate, at
    most one kind a patch. Raises BadInput for what cannot be drawn.
    """

    sizes: dict[str, int]
    seed: int
    plant: dict[str, float] = field(default_factory=dict)
    dtype: str = "uint8"

    def __post_init__(self):
        least = min(self.seed, *self.sizes.values())
        if least < 0:
            raise BadInput(f"a number of patches or the seed is {least}; allowed: 0 or more")
        for kind, rate in self.plant.items():
            if kind not in PLANTS:
                raise BadInput(f"plant '{kind}' is unknown; allowed: {', '.join(PLANTS)}")
            if not 0 <= rate <= 1:
                raise BadInput(f"plant {kind} has rate {rate}; allowed: 0 to 1")
            if kind in FLOATS_ONLY and self.dtype == "uint8":
                raise BadInput(f"plant {kind} cannot be stored as uint8; --float32 can hold it")

    def rng(self, split: str, *position: int):
        """Random numbers that depend on the seed, the split and a position alone."""
        return np.random.default_rng((self.seed, SPLITS.index(split), *position))


@dataclass
class Block:
    """The patches of one slide: images (N, 96, 96, 3), labels (N,) uint8, where they were cut,
    coords (N, 2) as (y, x).
    """

    slide: Slide
    images: np.ndarray
    labels: np.ndarray
    coords: np.ndarray


def cut(array: np.ndarray, yx, size: int = PATCH_PX) -> np.ndarray:
    """The square of an image or a mask with its upper left corner at `yx`."""
    y, x = yx
    return array[y : y + size, x : x + size]


def cut_patches(slide: Slide, num: int, rng, num_positive: int) -> Block:
    """`num` patches of a slide in random order.

    A label is 1 if a pixel of the patch's centre 32x32 is tumour (Veeling et al. 2018). Patches lie
    on a grid at a random offset, and on another where it holds too few of a class. Raises BadInput
    for a slide without enough of one.
    """
    wanted = (num - num_positive, num_positive)
    places = [np.empty((0, 2), np.int64)] * 2  # of negative and of positive patches
    for _ in range(64):
        offset = rng.integers(0, SLIDE_PX - GRID_PX + 1, 2)
        cells = cut(slide.mask, offset, GRID_PX).reshape(GRID, PATCH_PX, GRID, PATCH_PX)
        is_positive = cells[:, CENTRE, :, CENTRE].any((1, 3))
        for label in (0, 1):
            corners = rng.permutation(np.argwhere(is_positive == label)) * PATCH_PX + offset
            places[label] = np.concatenate([places[label], corners])[: wanted[label]]
        coords = np.concatenate(places)
        if len(coords) == num:
            order = rng.permutation(num)
            coords = coords[order]
            labels = np.repeat(np.uint8([0, 1]), wanted)[order]
            return Block(slide, np.stack([cut(slide.image, yx) for yx in coords]), labels, coords)
    raise BadInput(f"{slide.name} has too few patches of a class, asked for {wanted}: other --seed")


def plant_damage(plan: SyntheticPlan, block: Block, start: int, rng) -> list[tuple]:
    """Plant the plan's damage into a block whose first row is `start`, in place; gives (row, kind,
    detail) of each.
    """
    labels = block.labels
    rows = []
    is_free = np.ones(len(labels), bool)
    for kind, rate in plan.plant.items():
        if kind in WHOLE_SLIDE:
            continue
        is_eligible = labels == 1 if kind == "trigger" else np.ones_like(is_free)
        for _ in range(int(rate * is_eligible.sum() + rng.random())):
            pool = np.flatnonzero(is_free & is_eligible)
            if not len(pool):
                break
            index = int(rng.choice(pool))
            is_free[index] = False
            if kind in DUPLICATES:
                alike = np.flatnonzero(is_free & (labels == labels[index]))
                if not len(alike):
                    continue  # the only one of its class is left as it is
                source = rng.choice(alike)
                is_free[source] = False
                copy_patch(kind, block, source, index, rng)
                detail = f"of {start + source}"
            elif kind == "flipped":
                labels[index] ^= 1
                detail = f"truly {1 - labels[index]}"
            else:
                detail = damage_patch(kind, block.images[index], rng)
            rows.append((start + index, kind, detail))
    return rows


def copy_patch(kind: str, block: Block, source: int, index: int, rng) -> None:
    """Replace the patch `index` of a block by a copy of the patch `source`."""
    yx = block.coords[source]
    if kind == "shifted":
        step = rng.integers(1, MAX_STEP_PX + 1, 2) * rng.choice((-1, 1), 2)
        is_inside = (yx + step >= 0) & (yx + step <= SLIDE_PX - PATCH_PX)
        yx = yx + np.where(is_inside, step, -step)
        image = cut(block.slide.image, yx)
    else:
        image = alter_patch(kind, block.images[source].astype(np.uint8), rng)
    block.images[index] = image
    block.coords[index] = yx
    block.labels[index] = cut(block.slide.mask, yx)[CENTRE, CENTRE].any()


def draw_block(plan, split, start, source, number, num, num_positive):
    """One slide's patches with what is planted in them, as generate_split yields them."""
    slide = draw_slide(plan.seed, source, number, plan.plant.get("blurred_scanner", 0))
    rng = plan.rng(split, start, 1)
    block = cut_patches(slide, num, rng, num_positive)
    block.images = block.images.astype(plan.dtype, copy=False)
    truth = [(split, *row) for row in plant_damage(plan, block, start, rng)]
    for row in range(start, start + num):
        if source != split:
            truth.append((split, row, "shared_slides", slide.name))
        if slide.blurred:
            truth.append((split, row, "blurred_scanner", slide.name))
    meta = []
    for label, yx in zip(block.labels, block.coords, strict=True):
        has_tumour = label or cut(slide.mask, yx).any()
        meta.append((*yx.tolist(), bool(has_tumour), bool(label), slide.name))
    return block.images, block.labels, meta, sorted(truth)


def schedule(plan: SyntheticPlan, split: str):
    """What to cut from which slide: (first row, the slide's own split, its number, patches,
    positives) for each block.
    """
    rng = plan.rng(split, 0, 2)
    total = plan.sizes[split]
    starts = range(0, total, PATCHES_PER_SLIDE)
    sizes = [min(PATCHES_PER_SLIDE, total - start) for start in starts]
    positives_left = round(total / 2)
    places_left = sum(size for number, size in enumerate(sizes) if is_tumour_slide(number))
    train_slides = range(-(-plan.sizes.get("train", 0) // PATCHES_PER_SLIDE))
    for number, (start, size) in enumerate(zip(starts, sizes, strict=True)):
        is_tumour = is_tumour_slide(number)
        num_positive = 0
        if is_tumour:
            num_positive = round(positives_left * size / places_left)
            positives_left -= num_positive
            places_left -= size
        source = (split, number)
        alike = [other for other in train_slides if is_tumour_slide(other) == is_tumour]
        if split != "train" and alike and rng.random() < plan.plant.get("shared_slides", 0):
            source = ("train", int(rng.choice(alike)))
        yield start, *source, size, num_positive


def generate_split(plan: SyntheticPlan, split: str):
    """Yield (images (n, 96, 96, 3) of plan.dtype, labels (n,) uint8, meta rows, truth rows) of each
    slide.
    """
    tasks = [(plan, split, *task) for task in schedule(plan, split)]
    # numpy gives up the interpreter's lock in its loops, so two threads draw two slides at once
    with ThreadPoolExecutor(2) as pool:
        for start in range(0, len(tasks), NUM_AHEAD):
            yield from pool.map(draw_block, *zip(*tasks[start : start + NUM_AHEAD], strict=True))


def write_synthetic(plan: SyntheticPlan, directory) -> dict:
    """Write a plan's splits as official PCam files, and truth.csv beside them; gives how much was
    planted, by kind.
    """
    directory = Path(directory)

    def read_blocks(split):
        return generate_split(plan, split)

    with new_folder(directory):
        truth = write_splits(directory, plan.sizes, read_blocks, plan.dtype)
        write_csv(directory / "truth.csv", TRUTH_HEADER, truth)
    return Counter(kind for _, _, kind, _ in truth)
