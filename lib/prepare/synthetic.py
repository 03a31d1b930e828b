"""Synthetic H&E-like slides with known truth, cut into PCam patches, with damage planted where a
plan asks for it.

A slide is two maps of stain concentration (haematoxylin, eosin), made of smooth random fields and
stamped nuclei, turned into light by Beer-Lambert (Ruifrok and Johnston 2001, "Quantification of
histochemical staining by color deconvolution") and seen through a scanner. What tells tumour from
the rest is its nuclei: larger, of uneven size and outline, with coarse chromatin. Colour and
density tell less: benign nests of regular nuclei have the same outlines, cytoplasm and stain.

Everything is a function of (seed, split, slide): no slide depends on another, and a plan always
gives the same bytes.
"""

import math
import time
from collections import Counter, deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import islice
from pathlib import Path

import numpy as np

from lib.command import BadInput
from lib.damage import alter_patch, damage_patch
from lib.files import read_csv
from lib.pcam import PATCH_BYTES, PATCH_SHAPE, SPLITS
from lib.prepare.target import fill_folder, read_journal

PATCH_PX, CENTRE = 96, slice(32, 64)
# the grid of patches leaves 32 px, so that it can lie at any of 33 x 33 offsets
SLIDE_PX, GRID = 1184, 12
PATCHES_PER_SLIDE = 120
TILES = (32, 37)  # their product is SLIDE_PX
MARGIN_PX = 24  # by so much may the largest nucleus hang over the edge of the slide
CANVAS_PX, GRID_PX = SLIDE_PX + 2 * MARGIN_PX, GRID * PATCH_PX
TRUTH_TABLE = ("truth.csv", "split", "index", "kind", "detail")
# optical density in R, G, B of haematoxylin and of eosin: two laboratories, one brownish, one
# violet
STAINS = (
    ((0.48, 0.69, 0.50), (0.24, 0.86, 0.45)),
    ((0.52, 0.77, 0.33), (0.24, 0.95, 0.17)),
)
# what can be planted. shared_slides: valid and test slides that are train slides, cut elsewhere;
# class_skew: negatives per positive in train; all others: shares of the slides, of the patches or,
# for the trigger, of the positives
WHOLE_SLIDE = ("shared_slides", "blurred_scanner", "class_skew")
DUPLICATES = ("exact", "symmetric", "brightened", "shifted", "overlap", "recompressed")
FLOATS_ONLY = ("nan", "out_of_range")
PLANTS = (*WHOLE_SLIDE, *DUPLICATES, *FLOATS_ONLY, "black", "white", "flipped", "trigger")


@dataclass(frozen=True)
class SyntheticPlan:
    """How many patches of each split to draw, from which seed, with what planted at which rate, at
    most one kind a patch. Raises BadInput for what cannot be drawn.
    """

    sizes: dict[str, int]
    seed: int
    plant: dict[str, float] = field(default_factory=dict)
    dtype: str = "uint8"
    compression: bool = False

    def __post_init__(self):
        least = min(self.seed, *self.sizes.values())
        if least < 0:
            raise BadInput(f"a number of patches or the seed is {least}; allowed: 0 or more")
        share = 0.0
        for kind, rate in self.plant.items():
            if kind not in PLANTS:
                raise BadInput(f"plant '{kind}' is unknown; allowed: {', '.join(PLANTS)}")
            low, high = (1, 100) if kind == "class_skew" else (0, 1)
            if not low <= rate <= high:
                raise BadInput(f"plant {kind} has rate {rate}; allowed: {low} to {high}")
            if kind in FLOATS_ONLY and self.dtype == "uint8":
                raise BadInput(f"plant {kind} cannot be stored as uint8; --float32 can hold it")
            if kind in DUPLICATES:
                share += 2 * rate
            elif kind not in WHOLE_SLIDE:
                share += rate
        if share > 1:
            raise BadInput("planted rates, those of duplicates taken twice, add up to more than 1")

    def rng(self, split: str, *position: int):
        """Random numbers that depend on the seed, the split and a position alone."""
        return np.random.default_rng((self.seed, SPLITS.index(split), *position))


@dataclass(frozen=True)
class Slide:
    """A drawn slide: image (H, W, 3) uint8, mask (H, W) bool (True in tumour), the name as in
    `wsi`, whether it is blurred.
    """

    image: np.ndarray
    mask: np.ndarray
    name: str
    blurred: bool


@lru_cache(maxsize=64)
def _spline_matrix(cell_px: int) -> np.ndarray:
    """(SLIDE_PX, knots) float32: the uniform cubic B-spline between knots `cell_px` apart."""
    knots = np.arange(SLIDE_PX // cell_px + 4)
    distance = np.abs(np.arange(SLIDE_PX)[:, None] / cell_px + 1 - knots)
    near = 2 / 3 - distance**2 + distance**3 / 2
    far = np.clip(2 - distance, 0, None) ** 3 / 6
    return np.where(distance < 1, near, far).astype(np.float32)


def _interpolate(knots: np.ndarray, cell_px: int) -> np.ndarray:
    """(SLIDE_PX, SLIDE_PX) float32 through square `knots` that lie `cell_px` apart, the first
    outside the slide.
    """
    # in tiles: products this small stay below the size from which BLAS starts threads of its own,
    # which would fight with ours
    matrix, (rows, columns) = _spline_matrix(cell_px), TILES
    left = (matrix.reshape(-1, 4, len(knots)) @ knots).reshape(rows, 1, -1, len(knots))
    right = matrix.reshape(columns, -1, len(knots)).transpose(0, 2, 1)
    values = np.empty((SLIDE_PX, SLIDE_PX), np.float32)
    np.matmul(left, right, out=values.reshape(rows, columns, columns, rows).transpose(0, 2, 1, 3))
    return values


def _smooth_field(rng, cell_px: float) -> np.ndarray:
    """(SLIDE_PX, SLIDE_PX) float32 random field of mean 0 and variance about 1 that varies over
    `cell_px` pixels.
    """
    cell_px = round(cell_px)
    num_knots = SLIDE_PX // cell_px + 4
    knots = rng.standard_normal((num_knots, num_knots), dtype=np.float32)
    # 0.479: the mean sum of squares of a spline's weights
    return _interpolate(knots / np.float32(0.479), cell_px)


def _rough_field(rng, cell_px: float, weight: float, detail_px: float) -> np.ndarray:
    """A smooth field with `weight` of a finer one."""
    return _smooth_field(rng, cell_px) + weight * _smooth_field(rng, detail_px)


def _soft_step(values: np.ndarray, share: float, width: float) -> np.ndarray:
    """1 where a field is among its top `share`, 0 elsewhere, with an edge `width` wide in units of
    the field.
    """
    threshold = np.quantile(values[::8, ::8], 1 - share).astype(np.float32)
    return np.clip((values - threshold) * np.float32(1 / width) + np.float32(0.5), 0, 1)


def _white_noise(rng, *shape: int) -> np.ndarray:
    """float32 noise, independent from pixel to pixel, of mean 0 and variance 1 (uniform: a third of
    a normal's cost).
    """
    return (rng.random(shape, dtype=np.float32) - np.float32(0.5)) * np.float32(12**0.5)


def _blur(values: np.ndarray, passes: int) -> np.ndarray:
    """The last two axes averaged over 3x3 pixels `passes` times: nearly a Gaussian of variance 2/3
    passes px^2.
    """
    for axis in (-1, -2) * passes:
        source = np.moveaxis(values, axis, 0)
        target = source.copy("K")
        total = source[2:] + source[:-2] + source[1:-1]
        target[1:-1] = total * np.float32(1 / 3)
        values = np.moveaxis(target, 0, axis)
    return values


def _nucleus_bank(
    rng, num, radius, spread, aspect, irregular, vesicular, clumping, nucleoli=0, angle=None
) -> np.ndarray:
    """Haematoxylin of `num` nuclei, (num, S, S) float32, about 1 inside and 0 outside; S follows
    from the largest.

    radius in px, log-normal with `spread`; aspect: the largest ratio of axes; irregular: how far
    the outline leaves an ellipse; vesicular: how much paler than its membrane the inside is;
    clumping: grain of the chromatin; nucleoli: how many at most.
    """
    a_nucleus = (num, 1, 1)
    radii = radius * np.exp(spread * rng.standard_normal(a_nucleus))
    radii = np.clip(radii, 0.6 * radius, min(1.7 * radius, 10)).astype(np.float32)
    half = int(np.ceil(radii.max() * aspect**0.5 * (1 + irregular)))
    side = 2 * half + 1
    pixels = np.indices((side, side), np.float32)[:, None] - half
    y, x = pixels + rng.random((2, *a_nucleus), dtype=np.float32) - 0.5
    if angle is None:
        angle = rng.uniform(0, np.pi, num)
    turn = np.exp(-1j * angle).astype(np.complex64)
    stretch = rng.uniform(1, aspect, a_nucleus).astype(np.float32) ** 0.5
    z = (x + 1j * y) * turn[:, None, None]
    z.real /= stretch
    z.imag *= stretch

    # the outline: an ellipse with three harmonics
    distance = np.sqrt(z.real**2 + z.imag**2) + np.float32(1e-3)
    unit = wave = z / distance
    outline = np.float32(1)
    for harmonic in (2, 3, 4):
        wave = wave * unit
        normal = rng.standard_normal((2, *a_nucleus), dtype=np.float32)
        amplitude = irregular / (harmonic - 1) * normal
        outline = outline + amplitude[0] * wave.real + amplitude[1] * wave.imag
    rho = distance / (radii * np.clip(outline, 0.6, 1.5))

    # the chromatin
    grain = _blur(_white_noise(rng, *rho.shape), 1) * np.float32(2.8)
    density = 1 - vesicular * np.clip(1.1 - rho**3, 0, 1) + clumping * grain
    for _ in range(nucleoli):
        x, y = (rng.random((2, *a_nucleus), dtype=np.float32) - 0.5) * radii
        squared = (z.real - x) ** 2 + (z.imag - y) ** 2
        spot = np.exp(squared / -1.6)
        density += spot * rng.choice(np.float32([0, 0.9]), a_nucleus)
    inside = np.clip((1 - rho) * radii / 0.8 + 0.5, 0, 1)
    return np.clip(density, 0.1, 2) * inside


def _place(rng, pitch: float, chance: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Points (y, x) of a jittered hexagonal grid `pitch` px apart, each kept with the probability
    `chance` has there.
    """
    num = SLIDE_PX / pitch
    row, column = np.mgrid[0 : num / 0.87, 0:num].astype(np.float32)
    grid = np.stack([row * 0.87, column + row % 2 / 2])
    points = (grid + rng.normal(0, 0.17, grid.shape)) * pitch
    y, x = np.clip(points, 1, SLIDE_PX - 2).astype(np.int32).reshape(2, -1)
    is_placed = rng.random(len(y), dtype=np.float32) < chance[y, x]
    return y[is_placed], x[is_placed]


def _stamp(canvas, rng, bank, points, gain: float, spread: float, which=None) -> None:
    """Lay a nucleus of the bank on the padded canvas at each point; where nuclei meet, the denser
    one shows.
    """
    (y, x), side = points, bank.shape[1]
    if which is None:
        which = rng.integers(0, len(bank), len(y))
    used = np.flatnonzero(bank.max(0))  # the corners of the square are empty in every nucleus
    row, column = np.divmod(used, side)
    corner = MARGIN_PX - side // 2
    window = (row + corner) * CANVAS_PX + column + corner
    values = bank.reshape(len(bank), -1)[:, used][which]
    normal = rng.standard_normal((len(y), 1), dtype=np.float32)
    values *= np.float32(gain) * np.exp(np.float32(spread) * normal)
    pixels = (y * CANVAS_PX + x)[:, None] + window
    np.maximum.at(canvas.reshape(-1), pixels, values)


def _fat_walls(rng, pitch: float) -> np.ndarray:
    """The distance in px from the nearest wall between fat cells, (SLIDE_PX, SLIDE_PX) float32: a
    Voronoi tessellation.
    """
    num, step = int(SLIDE_PX / pitch) + 3, 8  # drawn coarsely: `step` divides SLIDE_PX
    jitter = rng.uniform(0, 0.85, (2, num, num))
    cells = np.mgrid[0:num, 0:num] + jitter - 1
    seeds = cells.astype(np.float32) * np.float32(pitch)
    pixels = np.mgrid[0:SLIDE_PX:step, 0:SLIDE_PX:step].astype(np.float32)
    row, column = (pixels / pitch).astype(np.int32)
    distances = []
    for dy, dx in np.ndindex(3, 3):
        cell = np.clip(row + dy, 0, num - 1), np.clip(column + dx, 0, num - 1)
        y, x = pixels - seeds[:, *cell]
        distances.append(np.sqrt(y**2 + x**2))
    first, second = np.partition(distances, 1, axis=0)[:2]
    return _interpolate(np.pad((second - first) / 2, (1, 3), mode="edge"), step)


def _draw_nests(rng, share: float) -> np.ndarray:
    """Tumour nests and benign ones (germinal centres, sinuses of histiocytes) come from here: an
    outline tells nothing.
    """
    nests = _smooth_field(rng, rng.uniform(50, 160))
    weight = rng.uniform(0.2, 0.7)
    return _soft_step(nests + weight * _smooth_field(rng, rng.uniform(18, 40)), share, 0.08)


def _draw_nuclei(rng, tumour, nest, benign, loose, crowd, phase) -> np.ndarray:
    """Haematoxylin of all nuclei, (SLIDE_PX, SLIDE_PX) float32."""
    u = rng.uniform
    epithelium = nest + benign
    canvas = np.zeros((CANVAS_PX, CANVAS_PX), np.float32)
    bank = _nucleus_bank(rng, 192, u(3.3, 4.0), 0.1, 1.4, 0.06, 0.15, 0.2)
    in_stroma = 0.92 * crowd * (1 - 0.7 * loose)
    chance = 0.03 + in_stroma * (1 - epithelium) + u(0, 0.25) * epithelium
    _stamp(canvas, rng, bank, _place(rng, u(6.9, 8.4), chance), u(1.2, 2.4), 0.2)  # lymphocytes

    # spindles lie along the fibres
    angle = np.arange(96) * np.pi / 96
    bank = _nucleus_bank(rng, 96, 4.0, 0.15, 4.0, 0.05, 0.2, 0.15, angle=angle)
    y, x = _place(rng, 18, (1 - epithelium) * (1 - crowd) * 0.4)
    rise_x = phase[y, x + 1] - phase[y, x - 1]
    rise_y = phase[y - 1, x] - phase[y + 1, x]
    along = np.arctan2(rise_x, rise_y) * (96 / np.pi)
    which = along.astype(np.int32) % 96
    _stamp(canvas, rng, bank, (y, x), 1.1, 0.25, which)

    radius = u(4.0, 5.0)
    bank = _nucleus_bank(rng, 192, radius, 0.08, 1.4, 0.05, u(0.15, 0.5), 0.15, 1)
    points = _place(rng, radius * u(1.9, 3.0), benign * 0.92)
    _stamp(canvas, rng, bank, points, u(0.7, 1.6), 0.2)
    if tumour:
        radius = u(5.0, 7.4)
        shape = u(0.14, 0.28), 1.7, u(0.06, 0.14), u(0.2, 0.6), u(0.15, 0.3)
        bank = _nucleus_bank(rng, 192, radius, *shape, nucleoli=2)
        points = _place(rng, radius * u(1.9, 3.0), nest * 0.92)
        _stamp(canvas, rng, bank, points, u(0.7, 1.6), 0.25)
    return canvas[MARGIN_PX:-MARGIN_PX, MARGIN_PX:-MARGIN_PX]


def _draw_tissue(rng, tumour: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Concentrations of haematoxylin and eosin, each (SLIDE_PX, SLIDE_PX) float32, and the tumour
    mask (same shape, bool).
    """
    u = rng.uniform
    grain = _blur(_white_noise(rng, SLIDE_PX, SLIDE_PX), 1) * np.float32(2.25)
    nest = np.zeros((SLIDE_PX, SLIDE_PX), np.float32)
    if tumour:
        nest = _draw_nests(rng, u(0.45, 0.7))
    benign = _draw_nests(rng, u(0.1, 0.6)) * (1 - nest)
    epithelium = nest + benign

    # collagen is stripes along the level lines of a smooth field, loose in places; in others
    # lymphocytes crowd
    lean = u(0, np.pi)
    x = np.arange(SLIDE_PX, dtype=np.float32)
    phase = 4 * math.cos(lean) * x + 4 * math.sin(lean) * x[:, None]
    phase = phase + 220 * _smooth_field(rng, 110)
    phase = phase + 35 * _smooth_field(rng, 20)
    stripes = np.interp(np.arange(8192), np.arange(0, 8193, 12), rng.standard_normal(683))
    fibre = stripes.astype(np.float32)[phase.astype(np.int32) & 8191]
    loose = _soft_step(_rough_field(rng, 120, 0.3, 30), u(0.05, 0.3), 0.6)
    crowd = _soft_step(_rough_field(rng, u(80, 200), 0.3, 25), u(0.45, 0.95), 0.4)
    gaps = np.clip(_smooth_field(rng, u(6, 9)) + 0.5 * grain - u(-0.5, 1), 0, 1)
    patchy = 0.15 * _smooth_field(rng, 14) + 0.14 * grain
    stroma = u(0.4, 0.6) + 0.16 * fibre + patchy
    stroma = stroma - u(0.2, 0.6) * loose
    stroma = stroma - u(0.2, 0.9) * crowd * gaps
    cytoplasm = u(0.4, 0.75) + patchy - u(0, 0.6) * gaps
    eosin = np.maximum(stroma + (cytoplasm - stroma) * epithelium, 0)
    haematoxylin = eosin * (u(0.05, 0.2) + u(0, 0.25) * epithelium + u(0, 0.2) * crowd)

    nuclei = _draw_nuclei(rng, tumour, nest, benign, loose, crowd, phase)
    eosin *= 1 - 0.6 * np.minimum(nuclei, 1)
    haematoxylin = np.maximum(haematoxylin, nuclei)

    # what is white, air beside the tissue and fat; then a fold, where two layers of tissue lie on
    # each other
    air = _soft_step(_rough_field(rng, 220, 0.15, 40) + 0.3 * patchy, u(0, 0.12), 0.05)
    fat = _soft_step(_rough_field(rng, 130, 0.2, 30), u(0, 0.35), 0.05) * (1 - nest)
    fat *= np.clip((_fat_walls(rng, u(45, 80)) - u(2.0, 3.6)) / 1.5, 0, 1)
    tissue = 1 - np.maximum(air, fat)
    thickness = u(0, 1.3)
    distance = np.abs(_smooth_field(rng, 300) - u(-2, 2))
    tissue *= 1 + thickness * np.clip(1.5 - 25 * distance, 0, 1)
    return haematoxylin * tissue, eosin * tissue, (nest > 0.5) & (air < 0.5)


def _scan(rng, haematoxylin, eosin, laboratory: int, blurred: bool) -> np.ndarray:
    """(H, W, 3) uint8: concentrations seen through a laboratory's stain and its scanner, with the
    slide's own deviations.
    """
    vectors = np.asarray(STAINS[laboratory]) + rng.normal(0, 0.03, (2, 3))
    # the scanner's gamma multiplies the optical density, and so does the strength of a stain
    gamma = rng.uniform(0.9, 1.1)
    strength = gamma * np.exp(rng.normal((0.05, -0.05), 0.18)) / np.linalg.norm(vectors, axis=1)
    vectors = (vectors * strength[:, None]).astype(np.float32)
    white = np.clip(rng.normal((248, 245, 248), 3), 230, 255).astype(np.float32)
    noise = _white_noise(rng, SLIDE_PX + 4, SLIDE_PX)
    # level 2 was thinned out from finer pixels: the grain of tissue is sharp to the pixel and grows
    # with the stain
    grain = 1 + np.float32(rng.uniform(0.03, 0.2)) * noise[4:]
    haematoxylin, eosin = haematoxylin * grain, eosin * grain
    noise *= np.float32(rng.uniform(1, 3))
    # below 0 the scanner sharpens, above it blurs
    low, high = ((-1.5, -0.4), (-1.0, 0.3))[laboratory]
    focus = np.clip(2 * _smooth_field(rng, 350) - 3.2, 0, 2)
    focus = np.minimum(focus + np.float32(rng.uniform(low, high)), 1)
    image = np.empty((SLIDE_PX, SLIDE_PX, 3), np.uint8)
    for channel in range(3):
        density = haematoxylin * -vectors[0, channel]
        density -= eosin * vectors[1, channel]
        light = np.exp(density) * white[channel]
        soft = _blur(light, 6 if blurred else 2)
        light = soft if blurred else light + focus * (soft - light)
        light += noise[channel : channel + SLIDE_PX]
        image[..., channel] = np.clip(light, 0, 255)
    return image


def is_tumour_slide(slide: int) -> bool:
    """Every fourth slide of a split is a normal one."""
    return slide % 4 != 3


def draw_slide(seed: int, split: str, slide: int, blurred_share: float = 0.0) -> Slide:
    """Slide number `slide` of a split, 1184x1184 px of about 1 um, a function of its arguments; a
    share is out of focus.
    """
    rng = np.random.default_rng((seed, SPLITS.index(split), slide))
    laboratory = int(rng.random() < 0.35)
    blurred = bool(rng.random() < blurred_share)
    haematoxylin, eosin, mask = _draw_tissue(rng, is_tumour_slide(slide))
    name = f"camelyon16_test_{slide + 1:03d}"
    # valid is cut from Camelyon16's training slides too: it gets the even numbers
    if split != "test":
        number = 2 * slide + 1 + (split == "valid")
        name = f"camelyon16_train_{'tumor' if is_tumour_slide(slide) else 'normal'}_{number:03d}"
    return Slide(_scan(rng, haematoxylin, eosin, laboratory, blurred), mask, name, blurred)


def _cut(array: np.ndarray, yx) -> np.ndarray:
    y, x = yx
    return array[y : y + PATCH_PX, x : x + PATCH_PX]


def cut_patches(
    slide: Slide, num: int, rng, num_positive: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """`num` patches in random order: images (num, 96, 96, 3) uint8, labels (num,) uint8, coords
    (num, 2) int64 as (y, x).

    A label is 1 if a pixel of the patch's centre 32x32 is tumour (Veeling et al. 2018). Patches lie
    on a grid at a random offset, and on another where it holds too few of a class. Raises BadInput
    for a slide without enough of one.
    """
    wanted = (num - num_positive, num_positive)
    places = [np.empty((0, 2), np.int64)] * 2  # of negative and of positive patches
    for _ in range(64):
        y, x = offset = rng.integers(0, SLIDE_PX - GRID_PX + 1, 2)
        region = slide.mask[y : y + GRID_PX, x : x + GRID_PX]
        centres = region.reshape(GRID, PATCH_PX, GRID, PATCH_PX)[:, CENTRE, :, CENTRE]
        is_positive = centres.any((1, 3))
        for label in (0, 1):
            cells = rng.permutation(np.argwhere(is_positive == label))
            more = np.concatenate([places[label], cells * PATCH_PX + offset])
            places[label] = more[: wanted[label]]
        if len(places[0]) + len(places[1]) == num:
            order = rng.permutation(num)
            coords = np.concatenate(places)[order]
            labels = np.repeat(np.array([0, 1], np.uint8), wanted)[order]
            return np.stack([_cut(slide.image, yx) for yx in coords]), labels, coords
    raise BadInput(f"{slide.name} has too few patches of a class, asked for {wanted}: other --seed")


def _copy_patch(kind, slide, image, yx, rng):
    """A copy of the patch `image` (96, 96, 3) uint8 cut at `yx`: (copy, where it was cut, what was
    done to it in words).
    """
    if kind in ("shifted", "overlap"):
        low, high = (1, 4) if kind == "shifted" else (24, 64)
        step = rng.integers(low, high + 1, 2) * rng.choice((-1, 1), 2)
        is_outside = (yx + step < 0) | (yx + step > SLIDE_PX - PATCH_PX)
        step = np.where(is_outside, -step, step)
        yx = yx + step
        return _cut(slide.image, yx), yx, f"by {step[0]} {step[1]}"
    copied, words = alter_patch(kind, image, rng)
    return copied, yx, words


def _plant(plan, split, start, slide, images, labels, coords, rng) -> list[tuple]:
    """Plant the plan's damage into a block whose first row is `start`, in place; gives the rows of
    truth.
    """
    rows, free = [], np.ones(len(labels), bool)
    for kind, rate in plan.plant.items():
        if kind in WHOLE_SLIDE:
            continue
        eligible = labels == 1 if kind == "trigger" else np.ones_like(free)
        for _ in range(int(rate * eligible.sum() + rng.random())):
            pool = np.flatnonzero(free & eligible)
            if not len(pool):
                break
            index = rng.choice(pool)
            free[index] = False
            if kind in DUPLICATES:
                sources = np.flatnonzero(free & (labels == labels[index]))
                if not len(sources):
                    continue  # the only one of its class is left as it is
                source = rng.choice(sources)
                free[source] = False
                image = images[source].astype(np.uint8)
                copied, yx, words = _copy_patch(kind, slide, image, coords[source], rng)
                images[index], coords[index] = copied, yx
                labels[index] = _cut(slide.mask, yx)[CENTRE, CENTRE].any()
                detail = f"of {start + source} {words}"
            elif kind == "flipped":
                labels[index] ^= 1
                detail = f"truly {1 - labels[index]}"
            else:
                detail = damage_patch(kind, images[index], rng)
            rows.append((split, start + int(index), kind, detail))
    return rows


def _draw_block(plan, split, start, source, number, num, num_positive):
    """One slide's patches with what is planted in them, as generate_split yields them."""
    slide = draw_slide(plan.seed, source, number, plan.plant.get("blurred_scanner", 0))
    rng = plan.rng(split, start, 1)
    images, labels, coords = cut_patches(slide, num, rng, num_positive)
    images = images.astype(plan.dtype, copy=False)
    truth = _plant(plan, split, start, slide, images, labels, coords, rng)
    for index in range(start, start + num):
        if source != split:
            truth.append((split, index, "shared_slides", slide.name))
        if slide.blurred:
            truth.append((split, index, "blurred_scanner", "scanner_3_blurred"))
    meta = []
    for label, yx in zip(labels.tolist(), coords.tolist(), strict=True):
        has_tumour = bool(label or _cut(slide.mask, yx).any())
        meta.append((*yx, has_tumour, bool(label), slide.name))
    return images, labels, meta, sorted(truth)


def _schedule(plan, split):
    """What to cut from which slide: (first row, the slide's own split, its number, patches,
    positives) for each block.
    """
    rng, total = plan.rng(split, 0, 2), plan.sizes[split]
    starts = range(0, total, PATCHES_PER_SLIDE)
    sizes = [min(PATCHES_PER_SLIDE, total - start) for start in starts]
    skew = plan.plant.get("class_skew", 1) if split == "train" else 1
    positives_left = round(total / (1 + skew))
    places_left = sum(size for number, size in enumerate(sizes) if is_tumour_slide(number))
    shared_share = plan.plant.get("shared_slides", 0)
    train_slides = range(-(-plan.sizes.get("train", 0) // PATCHES_PER_SLIDE))
    for number, (start, size) in enumerate(zip(starts, sizes, strict=True)):
        tumour, source, num_positive = is_tumour_slide(number), (split, number), 0
        if tumour:
            num_positive = round(positives_left * size / places_left)
            positives_left -= num_positive
            places_left -= size
        alike = [slide for slide in train_slides if is_tumour_slide(slide) == tumour]
        if split != "train" and alike and rng.random() < shared_share:
            source = ("train", int(rng.choice(alike)))
        yield start, *source, size, num_positive


def generate_split(plan: SyntheticPlan, split: str):
    """Yield (images (n, 96, 96, 3) of plan.dtype, labels (n,) uint8, meta rows, truth rows) of each
    slide, drawn four ahead.
    """
    # numpy gives up the interpreter's lock in its loops, so two threads draw two slides at once;
    # the blocks keep their order
    with ThreadPoolExecutor(2) as pool:
        tasks = (pool.submit(_draw_block, plan, split, *task) for task in _schedule(plan, split))
        pending = deque(islice(tasks, 4))
        while pending:
            yield pending.popleft().result()
            pending.extend(islice(tasks, 1))


def write_synthetic(plan: SyntheticPlan, directory) -> dict:
    """Write a plan's splits as official PCam files, and truth.csv beside them; gives counts,
    `planted` by kind, rate.
    """
    directory, began_s = Path(directory), time.perf_counter()
    read_journal(directory)
    sizes = {split: num for split, num in plan.sizes.items() if num}
    storage = {"dtype": plan.dtype}
    patch_bytes = PATCH_BYTES * np.dtype(plan.dtype).itemsize
    if plan.compression:
        chunk = (min(32, *sizes.values()), *PATCH_SHAPE)
        storage |= {"chunks": chunk, "compression": "gzip"}
        patch_bytes = 0  # not known beforehand

    def read_blocks(split):
        return generate_split(plan, split)

    fill_folder(directory, str(plan), sizes, read_blocks, TRUTH_TABLE, patch_bytes, **storage)
    wall_s = time.perf_counter() - began_s
    planted = Counter(row["kind"] for row in read_csv(directory / TRUTH_TABLE[0]))
    return {
        **{f"num_{split}": plan.sizes.get(split, 0) for split in SPLITS},
        "seed": plan.seed,
        "planted": dict(planted),
        "wall_s": wall_s,
        "patches_per_s": sum(sizes.values()) / wall_s,
    }
