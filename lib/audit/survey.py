"""One pass over a split: of each patch what its values are, what it looks like, what it is known
by. All checks read from here.

Files are taken as they are: what cannot be read becomes a finding, and the rest is surveyed.
"""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lib.audit import build_finding
from lib.audit.appearance import describe_patches
from lib.audit.copies import find_prints, in_parts
from lib.batches import map_ahead
from lib.command import BadInput
from lib.features import compute_features
from lib.pcam import (
    PATCH_BYTES,
    PATCH_SHAPE,
    SPLITS,
    open_patches,
    read_label_values,
    read_meta,
    read_rows,
    require_rows,
    split_path,
    to_uint8,
)
from lib.progress import Progress

READ_ROWS, MEASURE_ROWS = 1024, 256  # patches read, and measured, at a time
FLAT_STD = 6.0  # of every channel: 81 of 23,000 real patches are flatter


@dataclass(frozen=True)
class Survey:
    """A split as it is.

    - layout: how x is stored
    - labels: int8 (N,), -1 where unknown
    - slides: names (N,), where the meta CSV gives them
    - table: columns (N, ...) by name. `damage` is a reason of values, empty, or "unreadable";
      `prints` are PRINTS
    - read: gives patches uint8 (B, 96, 96, 3) by their rows
    """

    name: str
    layout: dict
    labels: np.ndarray
    slides: np.ndarray | None
    table: dict[str, np.ndarray]
    read: Callable

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def intact(self) -> np.ndarray:
        """Rows whose pixels can be believed: not damaged, flat ones included; int64."""
        return np.flatnonzero(np.isin(self.table["damage"], ("", "flat")))

    def rows(self, index, **columns) -> list[dict]:
        """Rows of a finding: split, index, label and the columns given, arrays or one value."""
        index = np.asarray(index, np.int64)
        columns = {"split": self.name, "index": index, "label": self.labels[index]} | columns
        values = [np.broadcast_to(column, index.shape).tolist() for column in columns.values()]
        return [dict(zip(columns, row, strict=True)) for row in zip(*values, strict=True)]

    def finding(self, check, severity, measured, limit="", advice="", rows=()) -> dict:
        """A finding about this split."""
        return build_finding(check, severity, measured, limit, advice, rows, self.name)


def survey_folder(directory, work) -> tuple[list[Survey], list[dict]]:
    """Survey the splits of a folder, and findings for what in its files cannot be read; `work`
    takes temporary files.

    Raises BadInput for a folder with no split at all.
    """
    surveys, findings, present = [], [], []
    for name in SPLITS:
        if any(split_path(directory, name, part).exists() for part in ("x", "y")):
            present.append(name)
    if not present:
        example = split_path("", "train", "x").name
        raise BadInput(f"{directory} holds no {example} or the like: it is no PCam folder")
    for name in dict.fromkeys(("train", "valid", *present)):
        try:
            surveys.append(survey_split(directory, name, work, findings))
        except BadInput as error:
            advice = "mend or fetch this file; the other splits were audited"
            check = "unreadable split"
            findings.append(build_finding(check, "error", str(error), "", advice, split=name))
    return surveys, findings


def survey_split(directory, name: str, work, findings: list[dict]) -> Survey:
    """Survey a split. Raises BadInput where its x file cannot be read at all; lesser damage goes
    into `findings`.
    """
    path = split_path(directory, name, "x")
    lost, parts = {}, []
    with open_patches(path) as dataset:
        layout = describe_layout(dataset, path)
        labels = read_labels(directory, name, len(dataset), findings)
        slides = read_slides(directory, name, len(dataset), findings)
        # what is no plain uint8 is unpacked once, to be read at random later
        plain, unpacked, offset = path, os.devnull, dataset.id.get_offset()
        if not layout["is_plain"]:
            plain = unpacked = Path(work, f"{name}.uint8")
            offset = 0
        bar = Progress(len(dataset), f"survey {name}")
        with open(unpacked, "wb") as file, bar, ThreadPoolExecutor(2) as pool:
            for patches, columns in map_ahead(pool, measure, read_blocks(dataset, lost), 3):
                parts.append(columns)
                file.write(patches)
                bar.add(len(patches))
    table = concatenate_columns(parts)
    file_number = os.open(plain, os.O_RDONLY)

    def read(rows) -> np.ndarray:
        """By pread, for mapped pages would count as memory of this process."""
        places = [offset + PATCH_BYTES * int(row) for row in rows]
        parts = [os.pread(file_number, PATCH_BYTES, place) for place in places]
        return np.frombuffer(b"".join(parts), np.uint8).reshape(-1, *PATCH_SHAPE)

    survey = Survey(name, layout, labels, slides, table, read)
    if lost:
        table["damage"][[*lost]] = "unreadable"
        rows = survey.rows([*lost], why=[*lost.values()], reason="black", score=1.0)
        measured = f"{len(lost):,} rows cannot be decoded: {rows[0]['why']}"
        advice = "fetch the file again; training stops at these rows unless they are left out"
        findings.append(survey.finding("unreadable rows", "error", measured, "", advice, rows))
    return survey


def describe_layout(dataset, path: Path) -> dict:
    """How an x is stored. `is_plain` says that its patches lie as uint8 one behind the other."""
    chunks = f"chunks of {dataset.chunks}" if dataset.chunks else "contiguous"
    return {
        "words": f"{dataset.dtype}, {chunks}, compression {dataset.compression}",
        "itemsize": dataset.dtype.itemsize,
        "is_plain": dataset.dtype == np.uint8 and dataset.id.get_offset() is not None,
        "stored_bytes": dataset.id.get_storage_size(),
        "file_bytes": path.stat().st_size,
    }


def read_labels(directory, name: str, num: int, findings: list[dict]) -> np.ndarray:
    """Labels int8 (N,) of a split, -1 where unknown; what is wrong with y goes into `findings`."""
    path = split_path(directory, name, "y")
    labels, measured = np.full(num, -1, np.int8), ""
    try:
        values = read_label_values(path)
        require_rows(path, values, num)
        is_label = np.isin(values, (0, 1))
        labels[is_label] = values[is_label]
        wrong = np.flatnonzero(~is_label)
        if len(wrong):
            measured = f"{len(wrong):,} labels are neither 0 nor 1, the first"
            measured += f" {values[wrong[0]]:g} at row {wrong[0]:,}"
    except BadInput as error:
        measured = str(error)
    if measured:
        advice = "fetch x and y again; patches without a label are in no check by class"
        findings.append(build_finding("labels", "error", measured, "", advice, split=name))
    return labels


def read_slides(directory, name: str, num: int, findings: list[dict]) -> np.ndarray | None:
    """Slide names (N,) of a split, or None; what is wrong with meta goes into `findings`."""
    path = split_path(directory, name, "meta")
    if not path.exists():
        return None
    try:
        slides = np.array([row["wsi"] for row in read_meta(path)])
        require_rows(path, slides, num)
    except BadInput as error:
        advice = "checks by slide are not possible"
        findings.append(build_finding("meta", "error", str(error), "", advice, split=name))
        return None
    return slides


def read_blocks(dataset, lost: dict[int, str]):
    """Yield all rows of an x as stored, MEASURE_ROWS at a time. Those that cannot be decoded are
    zeros, and go into `lost` with the reason.
    """
    for start in range(0, len(dataset), READ_ROWS):
        stop = min(start + READ_ROWS, len(dataset))
        try:
            block = read_rows(dataset, slice(start, stop))
        except BadInput:
            block = np.zeros((stop - start, *PATCH_SHAPE), dataset.dtype)
            for row in range(start, stop):
                try:
                    block[row - start] = read_rows(dataset, row)
                except BadInput as error:
                    lost[row] = str(error)
        yield from np.split(block, range(MEASURE_ROWS, len(block), MEASURE_ROWS))


def concatenate_columns(parts: list[dict]) -> dict[str, np.ndarray]:
    """Parts of one table as one."""
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def measure(raw: np.ndarray) -> tuple[np.ndarray, dict]:
    """Some patches (B, 96, 96, 3), as they are stored: as uint8, and their columns of the table.

    Patches scaled to [0, 1] or [-1, 1] are brought back to 0..255.
    """
    num = len(raw)
    flat = raw.reshape(num, PATCH_BYTES)
    low, high = flat.min(1).astype(np.float64), flat.max(1).astype(np.float64)
    damage = np.full(num, "", "U10")
    num_bad = np.zeros(num, np.int32)
    box = np.zeros((num, 4), np.int16)  # top, left, height and width of what is bad
    is_scaled = (low >= -1) & (high <= 1)
    if is_scaled.any():  # not where all values are 0 or 1
        is_scaled &= (flat != np.rint(flat)).any(1)
    is_within = (low >= 0) & (high <= 255)  # not where there are NaN
    for row in np.flatnonzero(~is_within & ~is_scaled):
        patch = raw[row]
        damage[row] = "nan"
        is_bad = ~np.isfinite(patch)
        if not is_bad.any():
            damage[row] = "range"
            is_bad = (patch < 0) | (patch > 255)
        elif not is_bad.all():
            low[row], high[row] = patch[~is_bad].min(), patch[~is_bad].max()
        num_bad[row] = is_bad.sum()
        y, x, _ = np.nonzero(is_bad)
        box[row] = y.min(), x.min(), np.ptp(y) + 1, np.ptp(x) + 1
    if is_scaled.any():
        damage[is_scaled] = "scaled"
        raw = raw.astype(np.float32)
        is_centred = is_scaled & (low < 0)
        raw[is_centred] = raw[is_centred] / 2 + 0.5
        raw[is_scaled] *= 255

    patches = to_uint8(raw)
    columns = concatenate_columns(in_parts(measure_intact, patches))
    has_one_colour = columns["prints"]["key"] == 0
    conditions = {
        "black": has_one_colour & (high <= 0),
        "white": has_one_colour & (low >= 255),
        "constant": has_one_colour,
        "flat": columns["deviation"] < FLAT_STD,
    }
    # a patch has the first that holds
    others = np.select([*conditions.values()], [*conditions], "")
    damage = np.where(damage == "", others, damage).astype("U10")
    columns |= {"low": low, "high": high, "num_bad": num_bad, "box": box, "damage": damage}
    return patches, columns


def measure_intact(patches: np.ndarray, counts: np.ndarray, grey: np.ndarray) -> dict:
    """Columns of the table that a few patches' pixels give; arguments as of describe_patches."""
    red, green, blue = np.moveaxis(patches, 3, 0)
    is_black = (red | green | blue) == 0  # all(3) would take ten times as long
    return compute_features(patches, counts, grey) | {
        "prints": find_prints(counts, grey),
        "black_share": is_black.mean((1, 2), dtype=np.float32),
        "appearance": describe_patches(patches, counts, grey),
    }
