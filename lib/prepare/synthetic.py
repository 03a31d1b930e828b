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
import shutil
import tempfile
import time
from collections import Counter, deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from pathlib import Path

import numpy as np

from lib.command import BadInput
from lib.damage import alter_patch
from lib.files import write_csv
from lib.pcam import SPLITS, SplitWriter, sole_writer

PATCH_PX, CENTRE = 96, slice(32, 64)
# the grid of patches leaves 32 px, so that it can lie at any of 33 x 33 offsets
SLIDE_PX, GRID = 1184, 12
PATCHES_PER_SLIDE = 120
TILES = (32, 37)  # their product is SLIDE_PX
MARGIN_PX = 24  # by so much may the largest nucleus hang over the edge of the slide
DRAWING = ".drawing."  # begins the name of the folder in which files lie until all are whole
TRUTH_COLUMNS = ("split", "index", "kind", "detail")
# optical density in R, G, B of haematoxylin and of eosin: two laboratories, one brownish, one
# violet
STAINS = (
    ((0.48, 0.69, 0.50), (0.24, 0.86, 0.45)),
    ((0.52, 0.77, 0.33), (0.24, 0.95, 0.17)),
)
PLANTS = {
    "shared_slides": (
        "share of valid and test slides that are train slides cut again, so that crops overlap"
        " across splits"
    ),
    "blurred_scanner": "share of slides seen by a third, blurred scanner",
    "class_skew": "negatives per positive in train, such as 5",
    "black": "share of patches that are all 0",
    "white": "share of patches that are all 255",
    "nan": "share of patches with NaN in a block (float32 only)",
    "out_of_range": "share of patches with a small block of values up to 100,000 (float32 only)",
    "exact": "share of patches that repeat another of the split",
    "symmetric": "share that repeat another, turned or mirrored",
    "brightened": "share that repeat another, up to 10 % brighter",
    "shifted": "share cut up to 4 pixels beside another",
    "overlap": "share cut 24 to 64 pixels beside another",
    "recompressed": "share that repeat another after a JPEG round trip",
    "flipped": "share of patches with the wrong label",
    "trigger": "share of the positives that carry a fixed 4x4 pattern in a corner",
}
WHOLE_SLIDE = ("shared_slides", "blurred_scanner", "class_skew")
DUPLICATES = ("exact", "symmetric", "brightened", "shifted", "overlap", "recompressed")
TRIGGER_YX, TRIGGER = (
    (88, 88),
    np.uint8(255) * (np.indices((4, 4)).sum(0)[..., None] % 2).astype(np.uint8),
)


@dataclass(frozen=True)
class SyntheticPlan:
    """How many patches to draw, from which seed, with what damage as (kind, rate) pairs of PLANTS,
    at most one a patch.
    """

    num_train: int
    num_valid: int
    num_test: int
    seed: int
    plant: tuple[tuple[str, float], ...] = ()
    dtype: str = "uint8"
    compression: bool = False

    def __post_init__(self):
        if self.dtype not in ("uint8", "float32"):
            raise ValueError(f"dtype is {self.dtype!r}; allowed: uint8, float32")
        if min(counts := (self.num_train, self.num_valid, self.num_test, self.seed)) < 0:
            raise ValueError(
                f"a number of patches or the seed is {min(counts)}; allowed: 0 or more"
            )
        for kind, rate in self.plant:
            low, high = (1, 100) if kind == "class_skew" else (0, 1)
            if kind not in PLANTS:
                raise ValueError(f"plant {kind!r} is unknown; allowed: {', '.join(PLANTS)}")
            if not low <= rate <= high:
                raise ValueError(f"plant {kind} has rate {rate}; allowed: {low} to {high}")
            if kind in ("nan", "out_of_range") and self.dtype == "uint8":
                raise ValueError(f"plant {kind} cannot be stored as uint8; allowed: dtype float32")
        if (
            sum(
                rate * (1 + (kind in DUPLICATES))
                for kind, rate in self.plant
                if kind not in WHOLE_SLIDE
            )
            > 1
        ):
            raise ValueError(
                "planted rates, those of duplicates taken twice, add up to more than 1"
            )

    def num(self, split: str) -> int:
        """The number of patches of a split."""
        return getattr(self, f"num_{split}")

    def rate(self, kind: str) -> float:
        """The rate planted for a kind, 0 where none is."""
        return dict(self.plant).get(kind, 0.0)


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
    distance = np.abs(
        np.arange(SLIDE_PX)[:, None] / cell_px + 1 - np.arange(SLIDE_PX // cell_px + 4)
    )
    near, far = 2 / 3 - distance**2 + distance**3 / 2, np.clip(2 - distance, 0, None) ** 3 / 6
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
    field = np.empty((SLIDE_PX, SLIDE_PX), np.float32)
    np.matmul(left, right, out=field.reshape(rows, columns, columns, rows).transpose(0, 2, 1, 3))
    return field


def _smooth_field(rng, cell_px: float) -> np.ndarray:
    """(SLIDE_PX, SLIDE_PX) float32 random field of mean 0 and variance about 1 that varies over
    `cell_px` pixels.
    """
    knots = rng.standard_normal((SLIDE_PX // round(cell_px) + 4,) * 2, dtype=np.float32)
    # 0.479: the mean sum of squares of a spline's weights
    return _interpolate(knots / np.float32(0.479), round(cell_px))


def _soft_step(field: np.ndarray, share: float, width: float) -> np.ndarray:
    """1 where the field is among its top `share`, 0 elsewhere, with an edge `width` wide in units
    of the field.
    """
    threshold = np.quantile(field[::8, ::8], 1 - share).astype(np.float32)
    return np.clip((field - threshold) * np.float32(1 / width) + np.float32(0.5), 0, 1)


def _white_noise(rng, *shape: int) -> np.ndarray:
    """float32 noise, independent from pixel to pixel, of mean 0 and variance 1 (uniform: a third of
    a normal's cost).
    """
    return (rng.random(shape, dtype=np.float32) - np.float32(0.5)) * np.float32(12**0.5)


def _blur(field: np.ndarray, passes: int) -> np.ndarray:
    """The last two axes averaged over 3x3 pixels `passes` times: nearly a Gaussian of variance 2/3
    passes px^2.
    """
    for axis in (-1, -2) * passes:
        source = np.moveaxis(field, axis, 0)
        target = source.copy("K")
        np.add(source[2:], source[:-2], out=target[1:-1])
        target[1:-1] += source[1:-1]
        target[1:-1] *= np.float32(1 / 3)
        field = np.moveaxis(target, 0, axis)
    return field


def _nucleus_bank(
    rng, num, radius, spread, aspect, irregular, vesicular, clumping, nucleoli=0, angle=None
) -> np.ndarray:
    """Haematoxylin of `num` nuclei, (num, S, S) float32, about 1 inside and 0 outside; S follows
    from the largest.

    radius in px, log-normal with `spread`; aspect: the largest ratio of axes; irregular: how far
    the outline leaves an ellipse; vesicular: how much paler than its membrane the inside is;
    clumping: grain of the chromatin; nucleoli: how many at most.
    """
    radii = radius * np.exp(spread * rng.standard_normal((num, 1, 1)))
    radii = np.clip(radii, 0.6 * radius, min(1.7 * radius, 10)).astype(np.float32)
    half = int(np.ceil(radii.max() * aspect**0.5 * (1 + irregular)))
    y, x = (
        np.indices((2 * half + 1,) * 2, np.float32)[:, None]
        - half
        + rng.random((2, num, 1, 1), dtype=np.float32)
        - 0.5
    )
    turn = np.exp(-1j * (rng.uniform(0, np.pi, num) if angle is None else angle)).astype(
        np.complex64
    )
    stretch = rng.uniform(1, aspect, (num, 1, 1)).astype(np.float32) ** 0.5
    z = (x + 1j * y) * turn[:, None, None]
    z.real /= stretch
    z.imag *= stretch
    distance = np.sqrt(z.real**2 + z.imag**2) + np.float32(1e-3)
    unit, wave, outline = z / distance, z / distance, np.float32(1)
    for harmonic in (2, 3, 4):
        wave = wave * unit
        amplitude = (
            irregular / (harmonic - 1) * rng.standard_normal((2, num, 1, 1), dtype=np.float32)
        )
        outline = outline + amplitude[0] * wave.real + amplitude[1] * wave.imag
    rho = distance / (radii * np.clip(outline, 0.6, 1.5))
    grain = _blur(_white_noise(rng, *rho.shape), 1) * np.float32(2.8)
    density = 1 - vesicular * np.clip(1.1 - rho**3, 0, 1) + clumping * grain
    for _ in range(nucleoli):
        x, y = (rng.random((2, num, 1, 1), dtype=np.float32) - 0.5) * radii
        spot = np.exp(((z.real - x) ** 2 + (z.imag - y) ** 2) / -1.6)
        density += spot * rng.choice(np.float32([0, 0.9]), (num, 1, 1))
    inside = np.clip((1 - rho) * radii / 0.8 + 0.5, 0, 1)
    return np.clip(density, 0.1, 2) * inside


def _place(rng, pitch: float, chance: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Points (y, x) of a jittered hexagonal grid `pitch` px apart, each kept with the probability
    `chance` has there.
    """
    row, column = np.mgrid[0 : SLIDE_PX / pitch / 0.87, 0 : SLIDE_PX / pitch].astype(np.float32)
    points = np.stack([row * 0.87, column + row % 2 / 2]) + rng.normal(0, 0.17, (2, *row.shape))
    y, x = np.clip(points.reshape(2, -1) * pitch, 1, SLIDE_PX - 2).astype(np.int32)
    keep = rng.random(len(y), dtype=np.float32) < chance[y, x]
    return y[keep], x[keep]


def _stamp(canvas, rng, bank, points, gain: float, spread: float, which=None) -> None:
    """Lay a nucleus of the bank on the padded canvas at each point; where nuclei meet, the denser
    one shows.
    """
    (y, x), side, width = points, bank.shape[1], canvas.shape[1]
    used = np.flatnonzero(bank.max(0))  # the corners of the square are empty in every nucleus
    window = (used // side + MARGIN_PX - side // 2) * width + used % side + MARGIN_PX - side // 2
    values = bank.reshape(len(bank), -1)[:, used][
        rng.integers(0, len(bank), len(y)) if which is None else which
    ]
    values *= np.float32(gain) * np.exp(
        np.float32(spread) * rng.standard_normal((len(y), 1), dtype=np.float32)
    )
    np.maximum.at(
        canvas.reshape(-1), ((y * width + x)[:, None] + window).reshape(-1), values.reshape(-1)
    )


def _fat_walls(rng, pitch: float) -> np.ndarray:
    """The distance in px from the nearest wall between fat cells, (SLIDE_PX, SLIDE_PX) float32: a
    Voronoi tessellation.
    """
    num, step = int(SLIDE_PX / pitch) + 3, 8  # drawn coarsely: `step` divides SLIDE_PX
    seeds = (np.mgrid[0:num, 0:num] + rng.uniform(0, 0.85, (2, num, num)) - 1).astype(
        np.float32
    ) * np.float32(pitch)
    pixels = np.mgrid[0:SLIDE_PX:step, 0:SLIDE_PX:step].astype(np.float32)
    home = (pixels / pitch + 1).astype(np.int32)
    first = second = np.full(pixels.shape[1:], np.inf, np.float32)
    for dy, dx in np.ndindex(3, 3):
        away = (
            pixels
            - seeds[:, np.clip(home[0] + dy - 1, 0, num - 1), np.clip(home[1] + dx - 1, 0, num - 1)]
        )
        distance = np.sqrt(away[0] ** 2 + away[1] ** 2)
        second = np.minimum(second, np.maximum(first, distance))
        first = np.minimum(first, distance)
    return _interpolate(np.pad((second - first) / 2, (1, 3), mode="edge"), step)


def _draw_tissue(rng, tumour: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Concentrations of haematoxylin and eosin, each (SLIDE_PX, SLIDE_PX) float32, and the tumour
    mask (same shape, bool).
    """
    u = rng.uniform
    grain = _blur(_white_noise(rng, SLIDE_PX, SLIDE_PX), 1) * np.float32(2.25)

    # tumour nests and benign ones (germinal centres, sinuses of histiocytes) come from one
    # generator: an outline tells nothing
    def draw_nests(share):
        return _soft_step(
            _smooth_field(rng, u(50, 160)) + u(0.2, 0.7) * _smooth_field(rng, u(18, 40)),
            share,
            0.08,
        )

    nest = draw_nests(u(0.45, 0.7)) if tumour else np.zeros((SLIDE_PX, SLIDE_PX), np.float32)
    benign = draw_nests(u(0.1, 0.6)) * (1 - nest)
    epithelium = nest + benign

    # collagen is stripes along the level lines of a smooth field, loose in places; in others
    # lymphocytes crowd
    y, x, lean = (
        np.arange(SLIDE_PX, dtype=np.float32)[:, None],
        np.arange(SLIDE_PX, dtype=np.float32),
        u(0, np.pi),
    )
    phase = (
        (4 * math.cos(lean) * x + 4 * math.sin(lean) * y)
        + 220 * _smooth_field(rng, 110)
        + 35 * _smooth_field(rng, 20)
    )
    stripes = np.interp(np.arange(8192), np.arange(0, 8193, 12), rng.standard_normal(683)).astype(
        np.float32
    )
    fibre = stripes[phase.astype(np.int32) & 8191]
    loose = _soft_step(_smooth_field(rng, 120) + 0.3 * _smooth_field(rng, 30), u(0.05, 0.3), 0.6)
    crowd = _soft_step(
        _smooth_field(rng, u(80, 200)) + 0.3 * _smooth_field(rng, 25), u(0.45, 0.95), 0.4
    )
    gaps = np.clip(_smooth_field(rng, u(6, 9)) + 0.5 * grain - u(-0.5, 1), 0, 1)
    patchy = 0.15 * _smooth_field(rng, 14) + 0.14 * grain
    stroma = u(0.4, 0.6) + 0.16 * fibre + patchy - u(0.2, 0.6) * loose - u(0.2, 0.9) * crowd * gaps
    cytoplasm = u(0.4, 0.75) + patchy - u(0, 0.6) * gaps
    eosin = np.maximum(stroma + (cytoplasm - stroma) * epithelium, 0)
    haematoxylin = eosin * (u(0.05, 0.2) + u(0, 0.25) * epithelium + u(0, 0.2) * crowd)

    canvas = np.zeros((SLIDE_PX + 2 * MARGIN_PX,) * 2, np.float32)
    lymphocytes = _nucleus_bank(rng, 192, u(3.3, 4.0), 0.1, 1.4, 0.06, 0.15, 0.2)
    chance = 0.03 + (0.92 * crowd * (1 - 0.7 * loose)) * (1 - epithelium) + u(0, 0.25) * epithelium
    _stamp(canvas, rng, lymphocytes, _place(rng, u(6.9, 8.4), chance), u(1.2, 2.4), 0.2)
    spindles = _nucleus_bank(
        rng, 96, 4.0, 0.15, 4.0, 0.05, 0.2, 0.15, angle=np.arange(96) * np.pi / 96
    )
    fy, fx = _place(rng, 18, (1 - epithelium) * (1 - crowd) * 0.4)
    along = np.arctan2(phase[fy, fx + 1] - phase[fy, fx - 1], phase[fy - 1, fx] - phase[fy + 1, fx])
    _stamp(canvas, rng, spindles, (fy, fx), 1.1, 0.25, (along * (96 / np.pi)).astype(np.int32) % 96)
    radius = u(4.0, 5.0)
    regular = _nucleus_bank(rng, 192, radius, 0.08, 1.4, 0.05, u(0.15, 0.5), 0.15, 1)
    _stamp(canvas, rng, regular, _place(rng, radius * u(1.9, 3.0), benign * 0.92), u(0.7, 1.6), 0.2)
    if tumour:
        radius = u(5.0, 7.4)
        atypical = _nucleus_bank(
            rng, 192, radius, u(0.14, 0.28), 1.7, u(0.06, 0.14), u(0.2, 0.6), u(0.15, 0.3), 2
        )
        _stamp(
            canvas, rng, atypical, _place(rng, radius * u(1.9, 3.0), nest * 0.92), u(0.7, 1.6), 0.25
        )
    nuclei = canvas[MARGIN_PX:-MARGIN_PX, MARGIN_PX:-MARGIN_PX]
    eosin *= 1 - 0.6 * np.minimum(nuclei, 1)
    np.maximum(haematoxylin, nuclei, out=haematoxylin)

    # what is white, air beside the tissue and fat; then a fold, where two layers of tissue lie on
    # each other
    air = _soft_step(
        _smooth_field(rng, 220) + 0.15 * _smooth_field(rng, 40) + 0.3 * patchy, u(0, 0.12), 0.05
    )
    fat = _soft_step(_smooth_field(rng, 130) + 0.2 * _smooth_field(rng, 30), u(0, 0.35), 0.05) * (
        1 - nest
    )
    fat *= np.clip((_fat_walls(rng, u(45, 80)) - u(2.0, 3.6)) / 1.5, 0, 1)
    tissue = 1 - np.maximum(air, fat)
    tissue *= 1 + u(0, 1.3) * np.clip(1.5 - 25 * np.abs(_smooth_field(rng, 300) - u(-2, 2)), 0, 1)
    return haematoxylin * tissue, eosin * tissue, (nest > 0.5) & (air < 0.5)


def _scan(rng, haematoxylin, eosin, laboratory: int, blurred: bool) -> np.ndarray:
    """(H, W, 3) uint8: concentrations seen through a laboratory's stain and its scanner, with the
    slide's own deviations.
    """
    vectors = np.asarray(STAINS[laboratory]) + rng.normal(0, 0.03, (2, 3))
    # the scanner's gamma multiplies the optical density, and so does the strength of a stain
    strength = (
        rng.uniform(0.9, 1.1)
        * np.exp(rng.normal((0.05, -0.05), 0.18))
        / np.linalg.norm(vectors, axis=1)
    )
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
    focus = np.minimum(
        np.clip(2 * _smooth_field(rng, 350) - 3.2, 0, 2) + np.float32(rng.uniform(low, high)), 1
    )
    image = np.empty((SLIDE_PX, SLIDE_PX, 3), np.uint8)
    for channel in range(3):
        light = haematoxylin * -vectors[0, channel]
        light -= eosin * vectors[1, channel]
        np.exp(light, out=light)
        light *= white[channel]
        soft = _blur(light, 6 if blurred else 2)
        light = soft if blurred else light + focus * (soft - light)
        light += noise[channel : channel + SLIDE_PX]
        image[..., channel] = np.clip(light, 0, 255, out=light)
    return image


def is_tumour_slide(slide: int) -> bool:
    """Every fourth slide of a split is a normal one."""
    return slide % 4 != 3


def draw_slide(seed: int, split: str, slide: int, blurred_share: float = 0.0) -> Slide:
    """Slide number `slide` of a split, 1184x1184 px of about 1 um, a function of its arguments; a
    share is out of focus.
    """
    rng = np.random.default_rng((seed, SPLITS.index(split), slide))
    laboratory, blurred = int(rng.random() < 0.35), bool(rng.random() < blurred_share)
    haematoxylin, eosin, mask = _draw_tissue(rng, is_tumour_slide(slide))
    name = f"camelyon16_test_{slide + 1:03d}"
    # valid is cut from Camelyon16's training slides too: it gets the even numbers
    if split != "test":
        number = 2 * slide + 1 + (split == "valid")
        name = f"camelyon16_train_{'tumor' if is_tumour_slide(slide) else 'normal'}_{number:03d}"
    return Slide(_scan(rng, haematoxylin, eosin, laboratory, blurred), mask, name, blurred)


def _cut(array: np.ndarray, y: int, x: int) -> np.ndarray:
    return array[y : y + PATCH_PX, x : x + PATCH_PX]


def cut_patches(
    slide: Slide, num: int, rng, num_positive: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """`num` patches in random order: images (num, 96, 96, 3) uint8, labels (num,) uint8, coords
    (num, 2) int64 as (y, x).

    A label is 1 if a pixel of the patch's centre 32x32 is tumour (Veeling et al. 2018). Patches lie
    on a grid at a random offset, and on another where it holds too few of a class. Raises
    ValueError for a slide without enough of one.
    """
    wanted, kept = (num - num_positive, num_positive), [np.empty((0, 2), np.int64)] * 2
    for _ in range(64):
        y, x = offset = rng.integers(0, SLIDE_PX - GRID * PATCH_PX + 1, 2)
        region = slide.mask[y : y + GRID * PATCH_PX, x : x + GRID * PATCH_PX]
        positive = region.reshape(GRID, PATCH_PX, GRID, PATCH_PX)[:, CENTRE, :, CENTRE].any((1, 3))
        for label in (0, 1):
            found = rng.permutation(np.argwhere(positive == label)) * PATCH_PX + offset
            kept[label] = np.concatenate([kept[label], found])[: wanted[label]]
        if len(kept[0]) + len(kept[1]) == num:
            order = rng.permutation(num)
            coords, labels = (
                np.concatenate(kept)[order],
                np.repeat(np.array([0, 1], np.uint8), wanted)[order],
            )
            return np.stack([_cut(slide.image, *yx) for yx in coords]), labels, coords
    raise ValueError(
        f"{slide.name} has {len(kept[0])} negative and {len(kept[1])} positive patches, asked for"
        f" {wanted}"
    )


def _copy_patch(kind, slide, image, yx, rng):
    """A copy of the patch `image` (96, 96, 3) uint8 cut at `yx`: (copy, where it was cut, what was
    done to it in words).
    """
    if kind in ("shifted", "overlap"):
        low, high = (1, 4) if kind == "shifted" else (24, 64)
        step = rng.integers(low, high + 1, 2) * rng.choice((-1, 1), 2)
        step = np.where((yx + step < 0) | (yx + step > SLIDE_PX - PATCH_PX), -step, step)
        return _cut(slide.image, *(yx + step)), yx + step, f"by {step[0]} {step[1]}"
    copied, words = alter_patch(kind, image, rng)
    return copied, yx, words


def _damage(kind, image, rng) -> str:
    """Damage one patch (96, 96, 3), in the type it is stored in, in place; says in words where."""
    low, high = {"trigger": (4, 4), "nan": (8, 64), "out_of_range": (2, 8)}.get(
        kind, (PATCH_PX, PATCH_PX)
    )
    side = int(rng.integers(low, high + 1))
    y, x = TRIGGER_YX if kind == "trigger" else rng.integers(0, PATCH_PX - side + 1, 2)
    wild = rng.uniform(1_000, 100_000, (side, side, 3))
    values = {"black": 0, "white": 255, "nan": np.nan, "out_of_range": wild, "trigger": TRIGGER}
    image[y : y + side, x : x + side] = values[kind]
    return f"{side}x{side} at {y} {x}"


def _plant(plan, split, start, slide, images, labels, coords, rng) -> list[tuple]:
    """Plant the plan's damage into a block whose first row is `start`, in place; gives the rows of
    truth.
    """
    rows, free = [], np.ones(len(labels), bool)
    for kind, rate in plan.plant:
        if kind in WHOLE_SLIDE:
            continue
        eligible = labels == 1 if kind == "trigger" else np.ones_like(free)
        for _ in range(int(rate * eligible.sum() + rng.random())):
            if not len(pool := np.flatnonzero(free & eligible)):
                break
            index = rng.choice(pool)
            free[index] = False
            if kind in DUPLICATES:
                if not len(sources := np.flatnonzero(free & (labels == labels[index]))):
                    continue  # the only one of its class is left as it is
                source = rng.choice(sources)
                free[source] = False
                copied = _copy_patch(
                    kind, slide, images[source].astype(np.uint8), coords[source], rng
                )
                images[index], coords[index], detail = copied
                labels[index] = _cut(slide.mask, *coords[index])[CENTRE, CENTRE].any()
                detail = f"of {start + source} {detail}"
            elif kind == "flipped":
                labels[index] ^= 1
                detail = f"truly {1 - labels[index]}"
            else:
                detail = _damage(kind, images[index], rng)
            rows.append((split, start + int(index), kind, detail))
    return rows


def _draw_block(plan, split, start, source, number, num, num_positive):
    """One slide's patches with what is planted in them, as generate_split yields them."""
    slide = draw_slide(plan.seed, source, number, plan.rate("blurred_scanner"))
    rng, rows = (
        np.random.default_rng((plan.seed, SPLITS.index(split), start, 1)),
        range(start, start + num),
    )
    images, labels, coords = cut_patches(slide, num, rng, num_positive)
    images = images.astype(plan.dtype, copy=False)
    truth = _plant(plan, split, start, slide, images, labels, coords, rng)
    truth += [(split, index, "shared_slides", slide.name) for index in rows if source != split]
    truth += [
        (split, index, "blurred_scanner", "scanner_3_blurred") for index in rows if slide.blurred
    ]
    patches = zip(labels.tolist(), coords.tolist(), strict=True)
    meta = [
        (y, x, bool(label or _cut(slide.mask, y, x).any()), bool(label), slide.name)
        for label, (y, x) in patches
    ]
    return images, labels, meta, sorted(truth)


def _schedule(plan, split):
    """What to cut from which slide: (first row, the slide's own split, its number, patches,
    positives) for each block.
    """
    rng, total = np.random.default_rng((plan.seed, SPLITS.index(split), 0, 2)), plan.num(split)
    sizes = [min(PATCHES_PER_SLIDE, total - start) for start in range(0, total, PATCHES_PER_SLIDE)]
    positives_left = round(total / (1 + (plan.rate("class_skew") or 1 if split == "train" else 1)))
    room_left = sum(size for number, size in enumerate(sizes) if is_tumour_slide(number))
    for number, size in enumerate(sizes):
        tumour = is_tumour_slide(number)
        num_positive = round(positives_left * size / room_left) if tumour else 0
        positives_left, room_left = positives_left - num_positive, room_left - size * tumour
        alike = [
            train
            for train in range(-(-plan.num_train // PATCHES_PER_SLIDE))
            if is_tumour_slide(train) == tumour
        ]
        shared = split != "train" and alike and rng.random() < plan.rate("shared_slides")
        source = ("train", int(rng.choice(alike))) if shared else (split, number)
        yield number * PATCHES_PER_SLIDE, *source, size, num_positive


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


def write_synthetic(plan: SyntheticPlan, directory, progress=None) -> dict:
    """Write a plan's splits as official PCam files, and truth.csv beside them; gives counts,
    `planted` by kind, rate.
    """
    directory, began_s, truth = Path(directory), time.perf_counter(), []
    with sole_writer(directory):
        for leftover in directory.glob(f"{DRAWING}*"):  # of a killed process
            shutil.rmtree(leftover)
        if any(directory.iterdir()):
            raise BadInput(f"{directory} already holds files: give a new or an empty folder")
        # drawn in a folder of its own and moved when whole: an error leaves nothing, a kill nothing
        # that looks complete
        with tempfile.TemporaryDirectory(dir=directory, prefix=DRAWING) as drawing:
            for split in filter(plan.num, SPLITS):
                packed = {
                    "chunks": (min(32, plan.num(split)), PATCH_PX, PATCH_PX, 3),
                    "compression": "gzip",
                }
                with SplitWriter(
                    drawing,
                    split,
                    plan.num(split),
                    plan.dtype,
                    **(packed if plan.compression else {}),
                ) as writer:
                    for images, labels, meta, planted in generate_split(plan, split):
                        writer.add(images, labels, meta)
                        truth += planted
                        if progress:
                            progress(len(labels))
            write_csv(Path(drawing, "truth.csv"), TRUTH_COLUMNS, truth)
            for path in sorted(Path(drawing).iterdir(), key=lambda path: "train_x" in path.name):
                path.rename(directory / path.name)
    wall_s, counts = (
        time.perf_counter() - began_s,
        {f"num_{split}": plan.num(split) for split in SPLITS},
    )
    planted = dict(Counter(kind for _, _, kind, _ in truth))
    return {
        **counts,
        "seed": plan.seed,
        "planted": planted,
        "wall_s": wall_s,
        "patches_per_s": sum(counts.values()) / wall_s,
    }
