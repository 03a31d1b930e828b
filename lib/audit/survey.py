"""One pass over a split: of each patch what its values are, what it looks like, what it is known
by. All checks read from here.

Files are taken as they are: what cannot be read becomes a finding with its row or byte, and the
rest is surveyed.
"""

import contextlib
import os
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lib.audit import build_finding
from lib.audit.appearance import describe_patches
from lib.audit.copies import BLOCK, Prints, find_prints, join
from lib.command import BadInput, one_line
from lib.features import compute_features, count_values, grey_planes
from lib.pcam import (
    PATCH_BYTES,
    PATCH_SHAPE,
    SPLITS,
    open_patches,
    read_label_values,
    read_meta,
    read_rows,
    split_path,
    to_uint8,
)
from lib.progress import Progress

READ_ROWS = 256  # patches read at a time
FLAT_STD = 6.0  # of every channel: 81 of 23,000 real patches are flatter
# in order: a patch has the first that holds
DAMAGE = ("nan", "range", "scaled", "black", "white", "constant", "flat", "unreadable")


@dataclass(frozen=True)
class Survey:
    """A split as it is: labels int8 (N,), -1 where unknown; slide names and coordinates int64 (N,
    2) as y and x where there are any; `table` holds columns (N,) by name; `boxes` int16 (N, 4) the
    first and last rows and columns of values that are none; `heat` int64 (96, 96) by kind of damage
    how often it hits a pixel; `read` gives uint8 patches by their rows."""

    name: str
    path: Path
    layout: dict
    labels: np.ndarray
    slides: np.ndarray | None
    coords: np.ndarray | None
    table: dict[str, np.ndarray]
    boxes: np.ndarray
    heat: dict[str, np.ndarray]
    prints: Prints
    read: Callable

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def damage(self) -> np.ndarray:
        """For each row its place in DAMAGE, or -1, int8 (N,)."""
        return self.table["damage"]

    @property
    def intact(self) -> np.ndarray:
        """Rows whose pixels can be believed: not damaged, flat ones included; int64."""
        return np.flatnonzero((self.damage < 0) | (self.damage == DAMAGE.index("flat")))

    def rows(self, index, **columns) -> list[dict]:
        """Rows of a finding: split, index, label and the columns given."""
        index = np.asarray(index, np.int64)
        known = {"index": index, "label": self.labels[index]} | columns
        values = [
            [value] * len(index) if np.isscalar(value) else np.asarray(value).tolist()
            for value in known.values()
        ]
        return [
            {"split": self.name, **dict(zip(known, row, strict=True))}
            for row in zip(*values, strict=True)
        ]


def survey_folder(directory, work) -> tuple[list[Survey], list[dict]]:
    """Survey the splits of a folder, and findings for what in its files cannot be read; `work`
    takes temporary files.

    Raises BadInput for a folder with no split at all.
    """
    surveys, findings = [], []
    present = [
        name
        for name in SPLITS
        if any(split_path(directory, name, part).exists() for part in ("x", "y"))
    ]
    if not present:
        raise BadInput(
            f"{directory} holds no {split_path('', 'train', 'x').name} or the like: it is no PCam"
            " folder"
        )
    for name in dict.fromkeys(("train", "valid", *present)):
        try:
            surveys.append(survey_split(directory, name, work, findings))
        except BadInput as error:
            advice = "mend or fetch this file; the other splits were audited"
            findings.append(
                build_finding("unreadable split", "error", str(error), advice=advice, split=name)
            )
    return surveys, findings


def survey_split(directory, name: str, work, findings: list[dict]) -> Survey:
    """Survey a split. Raises BadInput where its x file cannot be read at all; lesser damage goes
    into `findings`.
    """
    path, lost = split_path(directory, name, "x"), []
    with open_patches(path) as dataset:
        layout = describe_layout(dataset, path)
        labels, slides, coords = read_companions(directory, name, len(dataset), findings)
        # what is packed is unpacked once, to be read at random later
        plain, offset, dtype = path, layout["offset"], dataset.dtype
        if offset is None:
            plain, offset, dtype = (
                Path(work, f"{name}.{os.urandom(4).hex()}"),
                0,
                np.dtype(np.uint8),
            )
        with (
            open(os.devnull if plain == path else plain, "wb") as unpacked,
            Progress(len(dataset), f"survey {name}") as bar,
        ):
            parts = []
            for patches, part in measure_blocks(dataset, lost):
                parts.append(part)
                if plain != path:
                    unpacked.write(patches.tobytes())
                bar.add(len(patches))
    tables, boxes, prints, heats = zip(*parts, strict=True)
    table = {column: np.concatenate([part[column] for part in tables]) for column in tables[0]}
    heat = {
        kind: sum(part.get(kind, np.zeros(PATCH_SHAPE[:2], np.int64)) for part in heats)
        for kind in ("nan", "range")
    }
    if lost:
        table["damage"][[row for row, _ in lost]] = DAMAGE.index("unreadable")
        measured = (
            f"{len(lost):,} rows cannot be decoded, the first is row {lost[0][0]:,}: {lost[0][1]}"
        )
        rows = [
            {"split": name, "index": row, "why": why, "reason": "black", "score": 1.0}
            for row, why in lost
        ]
        advice = "fetch the file again; training stops at these rows unless they are left out"
        findings.append(
            build_finding(
                "unreadable rows", "error", measured, advice=advice, rows=rows, split=name
            )
        )
    fd, size = os.open(plain, os.O_RDONLY), PATCH_BYTES * dtype.itemsize

    def read(rows) -> np.ndarray:
        """Patches uint8 (B, 96, 96, 3); by pread, for mapped pages would count as memory of this
        process.
        """
        data = b"".join(os.pread(fd, size, offset + int(row) * size) for row in rows)
        raw = np.frombuffer(data, dtype).reshape(-1, *PATCH_SHAPE)
        return raw if dtype == np.uint8 else bring_to_uint8(raw, find_range(raw)[-1])

    return Survey(
        name,
        path,
        layout,
        labels,
        slides,
        coords,
        table,
        np.concatenate(boxes),
        heat,
        join(prints),
        read,
    )


def measure_blocks(dataset, lost: list):
    """Yield what `measure` gives for block after block of an x: this thread reads, two measure."""
    with ThreadPoolExecutor(2) as pool:
        pending = deque()
        # a chunk once
        step = (
            READ_ROWS
            if dataset.chunks is None
            else max(READ_ROWS, min(dataset.chunks[0], 4 * READ_ROWS))
        )
        for start in range(0, len(dataset), step):
            block = read_tolerantly(dataset, start, min(start + step, len(dataset)), lost)
            pending.extend(
                pool.submit(measure, block[at : at + READ_ROWS])
                for at in range(0, len(block), READ_ROWS)
            )
            while len(pending) > 3:
                yield pending.popleft().result()
        for task in pending:
            yield task.result()


def describe_layout(dataset, path: Path) -> dict:
    """How an x is stored; `offset` is that of the first patch where they lie one behind the
    other.
    """
    plain = (
        dataset.chunks is None
        and not dataset.external
        and not dataset.is_virtual
        and dataset.dtype.isnative
    )
    return {
        "rows": len(dataset),
        "dtype": str(dataset.dtype),
        "itemsize": dataset.dtype.itemsize,
        "chunks": dataset.chunks and list(dataset.chunks),
        "compression": dataset.compression,
        "offset": dataset.id.get_offset() if plain else None,
        "stored_bytes": dataset.id.get_storage_size(),
        "file_bytes": path.stat().st_size,
    }


def read_companions(directory, name: str, num: int, findings: list[dict]):
    """Labels int8 (N,), slide names and coordinates of a split; what is wrong with y and meta goes
    into `findings`.
    """
    labels, slides, coords = np.full(num, -1, np.int8), None, None
    try:
        values = read_label_values(split_path(directory, name, "y"))
        if len(values) != num:
            measured = f"x has {num:,} patches, y has {len(values):,} labels"
            findings.append(
                build_finding(
                    "agreement of x and y",
                    "error",
                    measured,
                    "equal",
                    "fetch both again",
                    split=name,
                )
            )
        known = np.isin(values[:num], (0, 1))
        labels[: len(known)][known] = values[:num][known]
        if not known.all():
            rows = [
                {"split": name, "index": int(row), "value": float(values[row])}
                for row in np.flatnonzero(~known)
            ]
            measured = (
                f"{len(rows):,} labels are neither 0 nor 1, the first {rows[0]['value']:g} at row"
                f" {rows[0]['index']:,}"
            )
            findings.append(
                build_finding(
                    "labels", "error", measured, "0 or 1", "these patches have no label", rows, name
                )
            )
    except BadInput as error:
        findings.append(
            build_finding(
                "labels", "error", str(error), advice="without them no check by class", split=name
            )
        )
    try:
        if (path := split_path(directory, name, "meta")).exists():
            rows = read_meta(path)
            if len(rows) != num:
                raise BadInput(f"{path} has {len(rows):,} rows for {num:,} patches")
            places = np.array([(float(row["coord_y"]), float(row["coord_x"])) for row in rows])
            names = np.array([row["wsi"] for row in rows])
            if not np.isfinite(places).all() or not names.all():
                raise BadInput(f"{path} has rows without a coordinate or a slide name")
            slides, coords = names, places.astype(np.int64)
    except (BadInput, ValueError) as error:
        findings.append(
            build_finding(
                "meta",
                "error",
                one_line(error),
                advice="checks by slide are not possible",
                split=name,
            )
        )
    return labels, slides, coords


def read_tolerantly(dataset, start: int, stop: int, lost: list) -> np.ndarray:
    """Rows of an x as stored; those that cannot be decoded are zeros and go into `lost` as (row,
    why).
    """
    with contextlib.suppress(BadInput):
        return read_rows(dataset, slice(start, stop))
    block = np.zeros((stop - start, *PATCH_SHAPE), dataset.dtype)
    for row in range(start, stop):
        try:
            block[row - start] = read_rows(dataset, row)
        except BadInput as error:
            where = ""
            # what the file says about a chunk that is damaged may be damaged too
            with contextlib.suppress(Exception):
                where = (
                    " in the chunk at byte"
                    f" {dataset.id.get_chunk_info_by_coord((row, 0, 0, 0)).byte_offset:,}"
                )
            lost.append((row, f"{error}{where}"))
    return block


def find_range(raw: np.ndarray):
    """Of patches as they are stored: lowest and highest value float64 (B,), NaN where one is, how
    many are no integers, and whether they are scaled to [0, 1] or [-1, 1] instead of 0..255."""
    flat = raw.reshape(len(raw), PATCH_BYTES)
    low, high = flat.min(1).astype(np.float64), flat.max(1).astype(np.float64)
    num_fractional = (
        (flat != np.rint(flat)).sum(1, dtype=np.int32)
        if raw.dtype.kind == "f"
        else np.zeros(len(raw), np.int32)
    )
    return low, high, num_fractional, (low >= -1) & (high <= 1) & (num_fractional > 0)


def bring_to_uint8(raw: np.ndarray, scaled: np.ndarray) -> np.ndarray:
    """Patches as uint8: rounded and clipped, NaN as 0; those scaled to [0, 1] or [-1, 1] brought
    back.
    """
    if scaled.any():
        raw = raw.astype(np.float32)
        shifted = scaled & (raw.reshape(len(raw), PATCH_BYTES).min(1) < 0)
        raw[shifted] = raw[shifted] / 2 + 0.5
        raw[scaled] *= 255
    return to_uint8(raw)


def measure(raw: np.ndarray):
    """Some patches (B, 96, 96, 3), as they are stored, as uint8, and their columns of the table,
    boxes, prints and heat.
    """
    boxes, heat = np.full((len(raw), 4), -1, np.int16), {}
    with np.errstate(invalid="ignore"):
        low, high, num_fractional, scaled = find_range(raw)
        counts = {
            name: np.zeros(len(raw), np.int32) for name in ("num_nan", "num_below", "num_above")
        }
        counts["num_fractional"] = num_fractional
        for row in np.flatnonzero(~((low >= 0) & (high <= 255)) & ~scaled):
            patch = raw[row]
            finite = np.isfinite(patch)
            below, above = finite & (patch < 0), finite & (patch > 255)
            for name, mask in (("num_nan", ~finite), ("num_below", below), ("num_above", above)):
                counts[name][row] = mask.sum()
            if finite.any():
                low[row], high[row] = patch[finite].min(), patch[finite].max()
            kind = "nan" if counts["num_nan"][row] else "range"
            bad = (~finite if kind == "nan" else below | above).any(2)
            heat[kind] = heat.get(kind, 0) + bad
            y, x = np.flatnonzero(bad.any(1)), np.flatnonzero(bad.any(0))
            boxes[row] = y[0], y[-1], x[0], x[-1]
    patches = bring_to_uint8(raw, scaled)
    prints, features = [], []
    for start in range(0, len(patches), BLOCK):
        part = patches[start : start + BLOCK]
        values, grey = count_values(part), grey_planes(part)
        prints.append(find_prints(values, grey))
        # all(3) would take ten times as long
        is_black = (part[..., 0] | part[..., 1] | part[..., 2]) == 0
        features.append(
            compute_features(part, values, grey)
            | {
                "black_share": is_black.mean((1, 2), dtype=np.float32),
                "appearance": describe_patches(part, values, grey),
            }
        )
    prints = join(prints)
    columns = counts | {"low": low, "high": high}
    columns |= {name: np.concatenate([part[name] for part in features]) for name in features[0]}
    has_one_colour = prints.key == 0
    conditions = {
        "nan": counts["num_nan"] > 0,
        "range": counts["num_below"] + counts["num_above"] > 0,
        "scaled": scaled,
        "black": has_one_colour & (high <= 0),
        "white": has_one_colour & (low >= 255),
        "constant": has_one_colour,
        "flat": columns["deviation"] < FLAT_STD,
    }
    columns["damage"] = np.select(
        [*conditions.values()], [DAMAGE.index(kind) for kind in conditions], -1
    ).astype(np.int8)
    return patches, (columns, boxes, prints, heat)
