"""What a patch looks like, in numbers: its colours, its detail, and lines and cells that no tissue
has.
"""

import numpy as np

from lib.pcam import PATCH_SHAPE

SIZE = PATCH_SHAPE[0]
LEVELS = (0.02, 0.25, 0.5, 0.75, 0.98)  # quantiles of each channel
CELL, SEGMENT = 8, 24  # pixels: the side of a cell, the length of a piece of a line
LEAST = 0.02  # added before a logarithm
NUM_HIDDEN, MOST = 400, 8.0  # random features; a scaled value beyond MOST is cut off
FIT_ROWS = 8_000  # that a scale is fitted to


def describe_patches(patches: np.ndarray, counts: np.ndarray, grey: np.ndarray) -> np.ndarray:
    """float16 (B, 61) of patches uint8 (B, 96, 96, 3), the counts of their values int64 (B, 3, 256)
    and their grey planes float32 (96, 96, B).
    """
    quantiles, spread, correlation = describe_colour(patches, counts)
    amounts = scale_log([*describe_detail(patches, grey), *describe_parts(grey)])
    rows = [*quantiles, scale_log(spread), correlation, amounts]
    return np.concatenate(rows).T.astype(np.float16)


def scale_log(amounts: list[np.ndarray]) -> np.ndarray:
    """Amounts (B,) or (3, B) as rows (n, B) of logarithms; what is below 0 counts as 0."""
    rows = np.concatenate([np.atleast_2d(amount) for amount in amounts])
    return np.log(np.maximum(rows, 0) + LEAST)


def describe_colour(patches: np.ndarray, counts: np.ndarray) -> tuple[list, list, np.ndarray]:
    """Rows (3, B): quantiles of the channels; amounts of how their values are spread over 0..255;
    and how the channels go together.
    """
    num_pixels = SIZE * SIZE
    below = counts.cumsum(2)
    quantiles = [(below < level * num_pixels).sum(2).T for level in LEVELS]
    gaps = np.abs(np.diff(counts, 2, axis=2)).sum(2)
    shares = np.stack([gaps, counts.max(2), counts[:, :, 0], counts[:, :, 255]]) / num_pixels
    spread = [(counts > 0).mean(2).T, *shares.swapaxes(1, 2)]

    some = patches[:, ::3, ::3].reshape(len(patches), -1, 3).astype(np.float32)
    some -= some.mean(1, keepdims=True)
    covariance = np.einsum("bpi,bpj->ijb", some, some) / some.shape[1]
    deviation = np.sqrt(np.einsum("iib->ib", covariance) + 1)
    one, other = [0, 0, 1], [1, 2, 2]
    correlation = covariance[one, other] / deviation[one] / deviation[other]
    return quantiles, spread, np.arctanh(correlation.clip(-0.999, 0.999))


def subtract(planes: np.ndarray, step: int, axis: int) -> np.ndarray:
    """How much pixels that lie `step` apart along an axis differ; that axis comes first."""
    planes = np.moveaxis(planes, axis, 0)
    return np.abs(planes[step:] - planes[:-step])


def describe_detail(patches: np.ndarray, grey: np.ndarray) -> list[np.ndarray]:
    """Amounts (B,): differences of pixels at several distances, in brightness and in colour."""
    amounts = [subtract(grey, step, axis).mean((0, 1)) for step in (2, 5) for axis in (0, 1)]
    around = grey[2:, 1:-1] + grey[:-2, 1:-1] + grey[1:-1, 2:] + grey[1:-1, :-2]
    amounts.append(np.abs(4 * grey[1:-1, 1:-1] - around).mean((0, 1)))
    red, green, blue = np.moveaxis(patches[:, ::2].astype(np.int16), 3, 0)
    for plane in (red - green, blue - green):
        for step in (1, 3):
            amounts.append(subtract(plane, step, 2).mean((0, 2), dtype=np.float32))
    return amounts


def describe_parts(grey: np.ndarray) -> list[np.ndarray]:
    """Amounts (B,): straight edges, equal neighbours, a grid of 8 pixels, and cells without
    texture.
    """
    amounts = []
    for axis in (0, 1):
        edges = subtract(grey, 1, axis)
        amounts += [edges.mean((0, 1)), (edges == 0).mean((0, 1))]
        pieces = edges.reshape(SIZE - 1, -1, SEGMENT, edges.shape[-1]).mean(2)
        whole = pieces.mean(1, keepdims=True)
        for lines in (pieces, whole):
            # an edge of an artefact is one pixel wide
            sharp = lines[1:-1] - np.maximum(lines[:-2], lines[2:])
            amounts.append(sharp.max((0, 1)) / (np.median(lines, (0, 1)) + 1))
        amounts.append(whole[7::8].mean((0, 1)) / (whole[3::8].mean((0, 1)) + 1))
    cells = grey.reshape(SIZE // CELL, CELL, SIZE // CELL, CELL, -1)
    mean = cells.mean((1, 3))
    deviation = np.sqrt(np.maximum((cells * cells).mean((1, 3)) - mean**2, 0))
    amounts += [deviation.min((0, 1)), (deviation < 1).mean((0, 1)), deviation.max((0, 1))]
    amounts.append(np.median(deviation, (0, 1)))
    middle = len(mean) // 2
    upper, lower, left, right = mean[:middle], mean[middle:], mean[:, :middle], mean[:, middle:]
    levels = [mean.min((0, 1)), mean.max((0, 1))]
    levels += [np.abs((upper - lower).mean((0, 1))), np.abs((left - right).mean((0, 1)))]
    levels.append(np.abs(mean[4:8, 4:8].mean((0, 1)) - mean.mean((0, 1))))
    return amounts + [level / 16 for level in levels]


class RandomFeatures:
    """Descriptions scaled robustly, their absolute values, and random features of them (Rahimi and
    Recht 2008); fitted to descriptions (N, D).

    Only the first `num_first` columns get absolute values and random features.
    """

    def __init__(self, descriptions: np.ndarray, num_first: int) -> None:
        some = descriptions[:: -(-len(descriptions) // FIT_ROWS)].astype(np.float32)
        low, self.middle, high = np.quantile(some, (0.1, 0.5, 0.9), 0).astype(np.float32)
        self.width = (high - low) / 2 + np.float32(0.025)
        self.num_first = num_first
        rng = np.random.default_rng(0)
        directions = rng.normal(0, 1 / np.sqrt(num_first), (num_first, NUM_HIDDEN))
        self.directions = directions.astype(np.float32)
        self.offsets = rng.normal(0, 1, NUM_HIDDEN).astype(np.float32)

    def scale(self, descriptions: np.ndarray) -> np.ndarray:
        """float32 (B, D)."""
        scaled = (descriptions.astype(np.float32) - self.middle) / self.width
        return scaled.clip(-MOST, MOST)

    def expand(self, descriptions: np.ndarray) -> np.ndarray:
        """float32 (B, 1 + D + num_first + NUM_HIDDEN)."""
        scaled = self.scale(descriptions)
        first = scaled[:, : self.num_first]
        hidden = np.maximum(first @ self.directions + self.offsets, 0)
        ones = np.ones((len(scaled), 1), np.float32)
        return np.concatenate([ones, scaled, np.abs(first), hidden], 1)
