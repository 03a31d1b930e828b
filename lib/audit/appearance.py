"""What a patch looks like, in numbers: its colours, its detail, and lines and cells that no tissue
has.
"""

import numpy as np

from lib.pcam import PATCH_SHAPE

SIZE = PATCH_SHAPE[0]
LEVELS = (0.02, 0.25, 0.5, 0.75, 0.98)  # quantiles of each channel
CELL, SEGMENT = 8, 24  # pixels: the side of a cell, the length of a piece of a line
LEAST = 0.02  # added before a logarithm


def scale_log(values) -> np.ndarray:
    """The logarithm float32 of values that are 0 or more; what is below 0 counts as 0."""
    return np.log(np.maximum(values, 0) + np.float32(LEAST)).astype(np.float32)


def describe_patches(patches: np.ndarray, counts: np.ndarray, grey: np.ndarray) -> np.ndarray:
    """float16 (B, 61) of patches uint8 (B, 96, 96, 3), the counts of their values int64 (B, 3, 256)
    and their grey planes float32 (96, 96, B).
    """
    columns = [*describe_colour(patches, counts), *describe_detail(patches, grey)]
    columns += [column[:, None] for column in describe_parts(grey)]
    return np.concatenate(columns, 1).astype(np.float16)


def describe_colour(patches: np.ndarray, counts: np.ndarray) -> list[np.ndarray]:
    """Columns (B, 3): quantiles of the channels, how their values are spread over 0..255, and how
    the channels go together.
    """
    num_pixels = SIZE * SIZE
    below = counts.cumsum(2)
    columns = [(below < level * num_pixels).sum(2) for level in LEVELS]
    gaps = np.abs(np.diff(counts, 2, axis=2)).sum(2)
    shares = (gaps, counts.max(2), counts[:, :, 0], counts[:, :, 255])
    columns.append(scale_log((counts > 0).mean(2)))
    columns += [scale_log(share / num_pixels) for share in shares]

    some = patches[:, ::3, ::3].reshape(len(patches), -1, 3).astype(np.float32)
    some -= some.mean(1, keepdims=True)
    covariance = np.einsum("bpi,bpj->bij", some, some) / some.shape[1]
    deviation = np.sqrt(np.einsum("bii->bi", covariance) + 1)
    pairs = ((0, 1), (0, 2), (1, 2))
    correlations = [covariance[:, i, j] / deviation[:, i] / deviation[:, j] for i, j in pairs]
    columns.append(np.arctanh(np.clip(np.stack(correlations, 1), -0.999, 0.999)))
    return columns


def describe_detail(patches: np.ndarray, grey: np.ndarray) -> list[np.ndarray]:
    """Columns (B, n): differences of pixels at several distances, in brightness and in colour."""
    columns = []
    for step in (2, 5):
        columns.append(np.abs(grey[step:] - grey[:-step]).mean((0, 1)))
        columns.append(np.abs(grey[:, step:] - grey[:, :-step]).mean((0, 1)))
    around = grey[2:, 1:-1] + grey[:-2, 1:-1] + grey[1:-1, 2:] + grey[1:-1, :-2]
    columns.append(np.abs(4 * grey[1:-1, 1:-1] - around).mean((0, 1)))
    red, green, blue = np.moveaxis(patches[:, ::2].astype(np.int16), 3, 0)
    for plane in (red - green, blue - green):
        for step in (1, 3):
            difference = np.abs(plane[:, :, step:] - plane[:, :, :-step])
            columns.append(difference.mean((1, 2), dtype=np.float32))
    return [scale_log(np.stack(columns, 1))]


def describe_parts(grey: np.ndarray) -> list[np.ndarray]:
    """Columns (B,): straight edges, equal neighbours, a grid of 8 pixels, and cells without
    texture.
    """
    columns = []
    down, right = np.abs(grey[1:] - grey[:-1]), np.abs(grey[:, 1:] - grey[:, :-1])
    for edges in (down, right.swapaxes(0, 1)):
        columns.append(edges.mean((0, 1)))
        columns.append((edges == 0).mean((0, 1)))
        pieces = edges.reshape(SIZE - 1, -1, SEGMENT, edges.shape[-1]).mean(2)
        for lines in (pieces, pieces.mean(1, keepdims=True)):
            # an edge of an artefact is one pixel wide
            sharp = lines[1:-1] - np.maximum(lines[:-2], lines[2:])
            columns.append(sharp.max((0, 1)) / (np.median(lines, (0, 1)) + 1))
        lines = lines[:, 0]
        columns.append(lines[7::8].mean(0) / (lines[3::8].mean(0) + 1))
    cells = grey.reshape(SIZE // CELL, CELL, SIZE // CELL, CELL, -1)
    mean = cells.mean((1, 3))
    deviation = np.sqrt(np.maximum((cells * cells).mean((1, 3)) - mean**2, 0))
    columns += [deviation.min((0, 1)), (deviation < 1).mean((0, 1)), deviation.max((0, 1))]
    columns += [np.median(deviation, (0, 1)), mean.min((0, 1)) / 16, mean.max((0, 1)) / 16]
    middle = len(mean) // 2
    halves = (mean[:middle] - mean[middle:], mean[:, :middle] - mean[:, middle:])
    columns += [np.abs(half.mean((0, 1))) / 16 for half in halves]
    columns.append(np.abs(mean[4:8, 4:8].mean((0, 1)) - mean.mean((0, 1))) / 16)
    return [scale_log(column) for column in columns]
