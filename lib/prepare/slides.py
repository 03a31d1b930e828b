"""Synthetic H&E-like slides with known truth.

A slide is two maps of stain concentration (haematoxylin, eosin), made of smooth random fields and
stamped nuclei, turned into light by Beer-Lambert (Ruifrok and Johnston 2001, "Quantification of
histochemical staining by color deconvolution") and seen through a scanner. What tells tumour from
the rest is its nuclei: larger, of uneven size and outline, with coarse chromatin. Colour and
density tell less: benign nests of regular nuclei have the same outlines, cytoplasm and stain.

Everything is a function of (seed, split, slide): no slide depends on another. All maps are float32
and (SLIDE_PX, SLIDE_PX).
"""

import math
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from lib.pcam import SPLITS

SLIDE_PX = 1184
TILES = (32, 37)  # their product is SLIDE_PX
MARGIN_PX = 24  # by so much may the largest nucleus hang over the edge of the slide
CANVAS_PX = SLIDE_PX + 2 * MARGIN_PX
FAT_STEP_PX = 8  # fat is drawn coarsely; it divides SLIDE_PX
# optical density in R, G, B of haematoxylin and of eosin: two laboratories, one brownish, one
# violet
STAINS = (
    ((0.48, 0.69, 0.50), (0.24, 0.86, 0.45)),
    ((0.52, 0.77, 0.33), (0.24, 0.95, 0.17)),
)
# of each laboratory's scanner: below 0 it sharpens, above it blurs
FOCUS = ((-1.5, -0.4), (-1.0, 0.3))


class Slide(NamedTuple):
    """A drawn slide: image (H, W, 3) uint8, mask (H, W) bool (True in tumour), the name as in
    `wsi`, whether it is blurred.
    """

    image: np.ndarray
    mask: np.ndarray
    name: str
    blurred: bool


def draw_slide(seed: int, split: str, slide: int, blurred_share: float = 0.0) -> Slide:
    """Slide number `slide` of a split, 1184x1184 px of about 1 um, a function of its arguments; a
    share is out of focus.
    """
    rng = np.random.default_rng((seed, SPLITS.index(split), slide))
    laboratory = int(rng.random() < 0.35)
    blurred = bool(rng.random() < blurred_share)
    stains, mask = _draw_tissue(rng, is_tumour_slide(slide))
    image = _scan(rng, stains, laboratory, blurred)
    return Slide(image, mask, slide_name(split, slide), blurred)


def is_tumour_slide(slide: int) -> bool:
    """Every fourth slide of a split is a normal one."""
    return slide % 4 != 3


def slide_name(split: str, slide: int) -> str:
    """The name of a slide as in the official meta CSV."""
    if split == "test":
        return f"camelyon16_test_{slide + 1:03d}"
    # valid is cut from Camelyon16's training slides too: it gets the even numbers
    number = 2 * slide + 1 + (split == "valid")
    kind = "tumor" if is_tumour_slide(slide) else "normal"
    return f"camelyon16_train_{kind}_{number:03d}"


@lru_cache(maxsize=64)
def _spline_matrix(cell_px: int) -> np.ndarray:
    """(SLIDE_PX, knots): the uniform cubic B-spline between knots `cell_px` apart."""
    knots = np.arange(SLIDE_PX // cell_px + 4)
    distance = np.abs(np.arange(SLIDE_PX)[:, None] / cell_px + 1 - knots)
    near = 2 / 3 - distance**2 + distance**3 / 2
    far = np.clip(2 - distance, 0, None) ** 3 / 6
    return np.where(distance < 1, near, far).astype(np.float32)


def _interpolate(knots: np.ndarray, cell_px: int) -> np.ndarray:
    """A map through square `knots` that lie `cell_px` apart, the first outside the slide."""
    # in tiles: products this small stay below the size from which BLAS starts threads of its own,
    # which would fight with ours
    matrix = _spline_matrix(cell_px)
    num_knots = len(knots)
    rows, columns = TILES
    left = matrix.reshape(-1, 4, num_knots) @ knots
    left = left.reshape(rows, 1, -1, num_knots)
    right = matrix.reshape(columns, -1, num_knots).transpose(0, 2, 1)
    values = np.empty((SLIDE_PX, SLIDE_PX), np.float32)
    tiles = values.reshape(rows, columns, columns, rows).transpose(0, 2, 1, 3)
    np.matmul(left, right, out=tiles)
    return values


def _smooth_field(rng, cell_px: float) -> np.ndarray:
    """A random map of mean 0 and variance about 1 that varies over `cell_px` pixels."""
    cell_px = round(cell_px)
    num_knots = SLIDE_PX // cell_px + 4
    knots = rng.standard_normal((num_knots, num_knots), dtype=np.float32)
    return _interpolate(knots / 0.479, cell_px)  # the mean sum of squares of a spline's weights


def _rough_field(rng, cell_px: float, weight: float, detail_px: float) -> np.ndarray:
    """A smooth field with `weight` of a finer one."""
    return _smooth_field(rng, cell_px) + weight * _smooth_field(rng, detail_px)


def _soft_step(values: np.ndarray, share: float, width: float) -> np.ndarray:
    """1 where a field is among its top `share`, 0 elsewhere, with an edge `width` wide in units of
    the field.
    """
    threshold = np.quantile(values[::8, ::8], 1 - share).astype(np.float32)
    return np.clip((values - threshold) * (1 / width) + 0.5, 0, 1)


def _white_noise(rng, *shape: int) -> np.ndarray:
    """float32 noise, independent from pixel to pixel, of mean 0 and variance 1 (uniform: a third of
    a normal's cost).
    """
    return (rng.random(shape, dtype=np.float32) - 0.5) * 12**0.5


def _blur(values: np.ndarray, passes: int) -> np.ndarray:
    """The last two axes averaged over 3x3 pixels `passes` times: nearly a Gaussian of variance 2/3
    passes px^2.
    """
    for _ in range(2 * passes):
        blurred = values.copy("K")
        total = values[..., 2:] + values[..., :-2] + values[..., 1:-1]
        blurred[..., 1:-1] = total * (1 / 3)
        values = blurred.swapaxes(-1, -2)
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
    per_nucleus = (num, 1, 1)
    radii = radius * np.exp(spread * rng.standard_normal(per_nucleus))
    largest = min(1.7 * radius, 10)
    radii = np.clip(radii, 0.6 * radius, largest).astype(np.float32)
    half = int(np.ceil(radii.max() * aspect**0.5 * (1 + irregular)))
    side = 2 * half + 1
    pixels = np.indices((side, side), np.float32)[:, None] - half
    y, x = pixels + rng.random((2, *per_nucleus), dtype=np.float32) - 0.5
    if angle is None:
        angle = rng.uniform(0, np.pi, num)
    turn = np.exp(-1j * angle).astype(np.complex64)
    stretch = rng.uniform(1, aspect, per_nucleus).astype(np.float32) ** 0.5
    z = (x + 1j * y) * turn[:, None, None]
    z.real /= stretch
    z.imag *= stretch

    # the outline: an ellipse with three harmonics
    distance = np.sqrt(z.real**2 + z.imag**2) + 1e-3
    unit = wave = z / distance
    outline = 1
    for order in (1, 2, 3):
        wave = wave * unit
        drawn = rng.standard_normal((2, *per_nucleus), dtype=np.float32)
        cosine, sine = irregular / order * drawn
        outline = outline + cosine * wave.real + sine * wave.imag
    rho = distance / (radii * np.clip(outline, 0.6, 1.5))

    # the chromatin
    noise = _white_noise(rng, *rho.shape)
    grain = _blur(noise, 1) * 2.8
    pallor = np.clip(1.1 - rho**3, 0, 1)
    density = 1 - vesicular * pallor + clumping * grain
    for _ in range(nucleoli):
        x, y = (rng.random((2, *per_nucleus), dtype=np.float32) - 0.5) * radii
        distance = (z.real - x) ** 2 + (z.imag - y) ** 2
        strength = rng.choice(np.float32([0, 0.9]), per_nucleus)
        density += np.exp(distance / -1.6) * strength
    inside = np.clip((1 - rho) * radii / 0.8 + 0.5, 0, 1)
    return np.clip(density, 0.1, 2) * inside


def _place(rng, pitch: float, chance: np.ndarray) -> np.ndarray:
    """Points (2, N) int32, y and x, of a jittered hexagonal grid `pitch` px apart, each kept with
    the probability `chance` has there.
    """
    num = SLIDE_PX / pitch
    row, column = np.mgrid[0 : num / 0.87, 0:num].astype(np.float32)
    grid = np.stack([row * 0.87, column + row % 2 / 2])
    jitter = rng.normal(0, 0.17, grid.shape)
    points = (grid + jitter) * pitch
    points = np.clip(points, 1, SLIDE_PX - 2).astype(np.int32).reshape(2, -1)
    is_placed = rng.random(points.shape[1], dtype=np.float32) < chance[*points]
    return points[:, is_placed]


def _stamp(canvas, rng, bank, points, gain: float, spread: float, which=None) -> None:
    """Lay a nucleus of the bank on the padded canvas at each point; where nuclei meet, the denser
    one shows.
    """
    (y, x) = points
    side = bank.shape[1]
    if which is None:
        which = rng.integers(0, len(bank), len(y))
    used = np.flatnonzero(bank.max(0))  # the corners of the square are empty in every nucleus
    row, column = np.divmod(used, side)
    corner = MARGIN_PX - side // 2
    window = (row + corner) * CANVAS_PX + column + corner
    values = bank.reshape(len(bank), -1)[:, used][which]
    deviation = rng.standard_normal((len(y), 1), dtype=np.float32)
    values *= gain * np.exp(spread * deviation)
    origins = y * CANVAS_PX + x
    np.maximum.at(canvas.reshape(-1), origins[:, None] + window, values)


def _draw_nuclei(rng, tumour, nest, benign, loose, crowd, phase) -> np.ndarray:
    """A map of the haematoxylin of all nuclei."""
    u = rng.uniform
    canvas = np.zeros((CANVAS_PX, CANVAS_PX), np.float32)
    epithelium = nest + benign

    # lymphocytes
    bank = _nucleus_bank(rng, 192, u(3.3, 4.0), 0.1, 1.4, 0.06, 0.15, 0.2)
    in_stroma = 0.92 * crowd * (1 - 0.7 * loose)
    chance = 0.03 + in_stroma * (1 - epithelium) + u(0, 0.25) * epithelium
    points = _place(rng, u(6.9, 8.4), chance)
    _stamp(canvas, rng, bank, points, u(1.2, 2.4), 0.2)

    # spindles lie along the fibres
    angle = np.arange(96) * np.pi / 96
    bank = _nucleus_bank(rng, 96, 4.0, 0.15, 4.0, 0.05, 0.2, 0.15, angle=angle)
    chance = (1 - epithelium) * (1 - crowd) * 0.4
    y, x = points = _place(rng, 18, chance)
    rise_x = phase[y, x + 1] - phase[y, x - 1]
    rise_y = phase[y - 1, x] - phase[y + 1, x]
    along = np.arctan2(rise_x, rise_y) * (96 / np.pi)
    which = along.astype(np.int32) % 96
    _stamp(canvas, rng, bank, points, 1.1, 0.25, which)

    # regular nuclei of benign nests, and those of tumour
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


def _fat_walls(rng, pitch: float) -> np.ndarray:
    """A map of the distance in px from the nearest wall between fat cells: a Voronoi
    tessellation.
    """
    num = int(SLIDE_PX / pitch) + 3
    jitter = rng.uniform(0, 0.85, (2, num, num))
    seeds = (np.indices((num, num)) + jitter - 1).astype(np.float32) * pitch
    num_steps = SLIDE_PX // FAT_STEP_PX
    pixels = np.indices((num_steps, num_steps), np.float32) * FAT_STEP_PX
    row, column = (pixels / pitch).astype(np.int32)
    distances = []
    for dy, dx in np.ndindex(3, 3):
        y, x = pixels - seeds[:, row + dy, column + dx]
        distances.append(np.sqrt(y**2 + x**2))
    first, second = np.partition(distances, 1, axis=0)[:2]
    knots = np.pad((second - first) / 2, (1, 3), mode="edge")
    return _interpolate(knots, FAT_STEP_PX)


def _draw_nests(rng, share: float) -> np.ndarray:
    """Tumour nests and benign ones (germinal centres, sinuses of histiocytes) come from here: an
    outline tells nothing.
    """
    nests = _smooth_field(rng, rng.uniform(50, 160))
    weight = rng.uniform(0.2, 0.7)
    detail = _smooth_field(rng, rng.uniform(18, 40))
    return _soft_step(nests + weight * detail, share, 0.08)


def _draw_tissue(rng, tumour: bool) -> tuple[np.ndarray, np.ndarray]:
    """Concentrations of haematoxylin and eosin, (2, SLIDE_PX, SLIDE_PX), and the tumour mask,
    bool.
    """
    u = rng.uniform
    noise = _white_noise(rng, SLIDE_PX, SLIDE_PX)
    grain = _blur(noise, 1) * 2.25
    nest = np.zeros_like(grain)
    if tumour:
        nest = _draw_nests(rng, u(0.45, 0.7))
    benign = _draw_nests(rng, u(0.1, 0.6)) * (1 - nest)
    epithelium = nest + benign

    # collagen is stripes along the level lines of a smooth field
    lean = u(0, np.pi)
    x = np.arange(SLIDE_PX, dtype=np.float32)
    phase = 4 * math.cos(lean) * x + 4 * math.sin(lean) * x[:, None]
    phase = phase + 220 * _smooth_field(rng, 110)
    phase = phase + 35 * _smooth_field(rng, 20)
    stripes = rng.standard_normal(683)
    stripes = np.interp(np.arange(8192), np.arange(0, 8193, 12), stripes).astype(np.float32)
    fibre = stripes[phase.astype(np.int32) & 8191]

    # it is loose in places; in others lymphocytes crowd
    field = _rough_field(rng, 120, 0.3, 30)
    loose = _soft_step(field, u(0.05, 0.3), 0.6)
    field = _rough_field(rng, u(80, 200), 0.3, 25)
    crowd = _soft_step(field, u(0.45, 0.95), 0.4)
    field = _smooth_field(rng, u(6, 9))
    gaps = np.clip(field + 0.5 * grain - u(-0.5, 1), 0, 1)
    patchy = 0.15 * _smooth_field(rng, 14) + 0.14 * grain
    stroma = u(0.4, 0.6) + 0.16 * fibre + patchy - u(0.2, 0.6) * loose
    stroma = stroma - u(0.2, 0.9) * crowd * gaps
    cytoplasm = u(0.4, 0.75) + patchy - u(0, 0.6) * gaps
    eosin = np.maximum(stroma + (cytoplasm - stroma) * epithelium, 0)
    share = u(0.05, 0.2) + u(0, 0.25) * epithelium + u(0, 0.2) * crowd
    haematoxylin = eosin * share

    nuclei = _draw_nuclei(rng, tumour, nest, benign, loose, crowd, phase)
    eosin *= 1 - 0.6 * np.minimum(nuclei, 1)
    haematoxylin = np.maximum(haematoxylin, nuclei)

    # what is white, air beside the tissue and fat; then a fold, where two layers of tissue lie on
    # each other
    field = _rough_field(rng, 220, 0.15, 40)
    air = _soft_step(field + 0.3 * patchy, u(0, 0.12), 0.05)
    field = _rough_field(rng, 130, 0.2, 30)
    fat = _soft_step(field, u(0, 0.35), 0.05) * (1 - nest)
    distance = _fat_walls(rng, u(45, 80))
    fat *= np.clip((distance - u(2.0, 3.6)) / 1.5, 0, 1)
    tissue = 1 - np.maximum(air, fat)
    thickness = u(0, 1.3)
    distance = np.abs(_smooth_field(rng, 300) - u(-2, 2))
    fold = np.clip(1.5 - 25 * distance, 0, 1)
    tissue *= 1 + thickness * fold
    return np.stack([haematoxylin, eosin]) * tissue, (nest > 0.5) & (air < 0.5)


def _scan(rng, stains: np.ndarray, laboratory: int, blurred: bool) -> np.ndarray:
    """(H, W, 3) uint8: concentrations seen through a laboratory's stain and its scanner, with the
    slide's own deviations.
    """
    u = rng.uniform
    vectors = np.asarray(STAINS[laboratory]) + rng.normal(0, 0.03, (2, 3))
    # the scanner's gamma multiplies the optical density, and so does the strength of a stain
    gamma = u(0.9, 1.1)
    strength = gamma * np.exp(rng.normal((0.05, -0.05), 0.18))
    strength = strength / np.linalg.norm(vectors, axis=1)
    vectors = (vectors * strength[:, None]).astype(np.float32)
    white = rng.normal((248, 245, 248), 3)
    white = np.clip(white, 230, 255).astype(np.float32)
    noise = _white_noise(rng, SLIDE_PX + 4, SLIDE_PX)
    # level 2 was thinned out from finer pixels: the grain of tissue is sharp to the pixel and grows
    # with the stain
    haematoxylin, eosin = stains * (1 + u(0.03, 0.2) * noise[4:])
    noise *= u(1, 3)
    focus = np.clip(2 * _smooth_field(rng, 350) - 3.2, 0, 2)
    focus = np.minimum(focus + u(*FOCUS[laboratory]), 1)
    image = np.empty((SLIDE_PX, SLIDE_PX, 3), np.uint8)
    for channel, (blue, pink) in enumerate(vectors.T):
        light = np.exp(-haematoxylin * blue - eosin * pink) * white[channel]
        soft = _blur(light, 6 if blurred else 2)
        light = soft if blurred else light + focus * (soft - light)
        light += noise[channel : channel + SLIDE_PX]
        image[..., channel] = np.clip(light, 0, 255)
    return image
