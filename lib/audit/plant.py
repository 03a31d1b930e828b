"""The power of the detectors on the user's own data: damage of every kind planted into a copy, and
what of it is found.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lib.audit import build_finding
from lib.audit.alterations import PATCH_KINDS, alter
from lib.audit.survey import Survey
from lib.damage import alter_patch, damage_patch
from lib.files import write_csv
from lib.splitwriter import SplitWriter

MOST_ROWS = {"train": 8_000, "valid": 2_000}
LEAST_POWER = 0.5  # of what is planted: a check that finds less says nothing by finding nothing
STRETCH = 0.04  # of a split, its last rows: their labels are out of step
UNUSUAL = "colour detail partial blank outlier"
# kind: share of a split's patches, the reasons that count as found
PLANTS = {
    "nan": (0.01, "nan"),
    "out of range": (0.01, "range"),
    "scaled": (0.005, "scaled"),
    "black": (0.01, "black"),
    "white": (0.01, "white"),
    "one colour": (0.005, "constant"),
    **dict.fromkeys(PATCH_KINDS, (0.005, UNUSUAL)),
    "equal": (0.01, "duplicate"),
    "turned": (0.01, "duplicate"),
    "recompressed": (0.01, "near_duplicate"),
    "brightened": (0.01, "near_duplicate"),
    "shifted": (0.01, "near_duplicate"),
    "zoomed": (0.01, "near_duplicate"),
    "rotated": (0.01, "near_duplicate"),
    "leaked": (0.02, "leak"),
    "trigger": (0.01, "trigger"),
    "exchanged label": (0.03, "label"),
    "out of step": (STRETCH, "misaligned"),
}
COPY_KINDS = ("equal", "turned", "recompressed", "brightened", "shifted", "zoomed", "rotated")
# by check: what it calls what it finds
REASONS_OF = {
    "values": ("nan", "range", "black", "white", "constant", "scaled"),
    "unusual": tuple(UNUSUAL.split()),
    "duplicates": ("duplicate", "near_duplicate"),
    "leakage": ("leak",),
    "triggers": ("trigger",),
    "labels": ("label", "misaligned"),
}


def damage(kind: str, patch: np.ndarray, rng) -> np.ndarray:
    """A damaged patch float32 (96, 96, 3) from an intact one."""
    if kind == "scaled":
        return patch / 255
    if kind == "one colour":
        return np.broadcast_to(rng.integers(1, 255, 3), patch.shape)
    patch = patch.copy()
    damage_patch(kind.replace(" ", "_"), patch, rng)
    return patch


def copy_patch(kind: str, patch: np.ndarray, rng) -> np.ndarray:
    """A patch uint8 (96, 96, 3) as a copy of a kind."""
    if kind == "shifted":
        dy, dx = rng.choice([(dy, dx) for dy in range(-4, 5) for dx in range(-4, 5) if dy or dx])
        return np.pad(patch, ((4, 4), (4, 4), (0, 0)), "edge")[4 + dy : 100 + dy, 4 + dx : 100 + dx]
    if kind == "zoomed":
        return warp(patch, rng.uniform(1.03, 1.08), 0.0)
    if kind == "rotated":
        return warp(patch, 1.0, rng.uniform(2, 6) * rng.choice((-1, 1)))
    return alter_patch("symmetric" if kind == "turned" else kind, patch, rng, least_quality=60)[0]


def warp(patch: np.ndarray, zoom: float, degrees: float) -> np.ndarray:
    """A patch uint8 (96, 96, 3) zoomed and rotated about its centre, bilinear, edges repeated."""
    angle = np.deg2rad(degrees)
    y, x = np.indices(patch.shape[:2]) - (len(patch) - 1) / 2
    source_y = (np.cos(angle) * y - np.sin(angle) * x) / zoom + (len(patch) - 1) / 2
    source_x = (np.sin(angle) * y + np.cos(angle) * x) / zoom + (len(patch) - 1) / 2
    last = len(patch) - 1
    source_y, source_x = source_y.clip(0, last), source_x.clip(0, last)
    top, left = (
        np.minimum(source_y.astype(int), last - 1),
        np.minimum(source_x.astype(int), last - 1),
    )
    down, right = (source_y - top)[..., None], (source_x - left)[..., None]
    upper = patch[top, left] * (1 - right) + patch[top, left + 1] * right
    lower = patch[top + 1, left] * (1 - right) + patch[top + 1, left + 1] * right
    return np.rint(upper * (1 - down) + lower * down).astype(np.uint8)


@dataclass
class Change:
    """What becomes of a row of a copy: `source` is the row that it copies, with its split."""

    kind: str
    source: int | None = None
    source_split: str = ""


class Planter:
    """Some rows of a split, and what is planted in them."""

    def __init__(self, survey: Survey, rows: np.ndarray, rng, train=None) -> None:
        self.survey, self.rng, self.train = survey, rng, train
        most = min(MOST_ROWS[survey.name], len(rows))
        self.rows = np.sort(rng.choice(rows, most, replace=False))
        self.labels = survey.labels[self.rows].astype(np.uint8)
        self.given = self.labels.copy()
        self.changes: dict[int, Change] = {}
        num_stretch = int(STRETCH * len(self.rows))
        self.stretch = range(len(self.rows) - num_stretch, len(self.rows))
        self.free = rng.permutation(self.stretch.start).tolist()
        for kind, (share, _) in PLANTS.items():
            for _ in range(int(share * len(self.rows))):
                self.plan(kind)
        stretch = list(self.stretch)
        self.given[stretch] = np.roll(self.given[stretch], 7)

    def plan(self, kind: str) -> None:
        """Choose a row for a kind, and the row that it copies."""
        if kind == "out of step" or (kind == "leaked" and self.train is None):
            return
        if kind == "trigger":
            positives = [place for place in self.free if self.labels[place] == 1]
            if self.survey.name != "train" or not positives:
                return
            self.free.remove(positives[-1])
            self.changes[positives[-1]] = Change(kind)
            return
        place = self.free.pop()
        change = Change(kind)
        if kind in COPY_KINDS:
            change = Change(kind, self.free.pop(), self.survey.name)
            self.given[place] = self.labels[change.source]
        elif kind == "leaked":
            change = Change(kind, int(self.rng.choice(self.train.free)), "train")
            self.given[place] = self.train.given[change.source]
        elif kind == "exchanged label":
            self.given[place] ^= 1
        self.changes[place] = change

    def truth(self) -> list[dict]:
        """Rows of split, index, kind and of: what is planted where, and what it is a copy of."""
        rows = []
        for place, change in self.changes.items():
            row = {"split": self.survey.name, "index": place, "kind": change.kind}
            rows.append(row | {"of": change.source})
        for place in self.stretch:
            row = {"split": self.survey.name, "index": place, "kind": "out of step"}
            rows.append(row | {"of": None})
        return rows

    def draw(self, place: int) -> np.ndarray:
        """The patch of a row, float32 (96, 96, 3), with what is planted in it."""
        patch = self.survey.read([self.rows[place]])[0]
        change = self.changes.get(place)
        if change is None or change.kind == "exchanged label":
            return patch.astype(np.float32)
        if change.kind == "leaked":
            return self.train.survey.read([self.train.rows[change.source]])[0].astype(np.float32)
        if change.source is not None:
            source = self.survey.read([self.rows[change.source]])[0]
            return copy_patch(change.kind, source, self.rng).astype(np.float32)
        if change.kind in PATCH_KINDS:
            other = self.survey.read([self.rng.choice(self.rows)])[0]
            return alter(change.kind, patch, other, self.rng).astype(np.float32)
        return damage(change.kind, patch.astype(np.float32), self.rng)


def write_copies(
    surveys: list[Survey], rows_of: dict[str, np.ndarray], clean: Path, planted: Path
) -> list[dict]:
    """Write some rows of train and valid twice, as they are and with damage planted, both float32;
    gives what is planted where.

    `rows_of` names the rows that may be used: intact ones, copies once.
    """
    rng, truth, train = np.random.default_rng(0), [], None
    clean.mkdir(parents=True, exist_ok=True)
    planted.mkdir(parents=True, exist_ok=True)
    for survey in (survey for survey in surveys if survey.name in MOST_ROWS):
        planter = Planter(survey, rows_of[survey.name], rng, train)
        if survey.name == "train":
            train = planter
        truth += planter.truth()
        num = len(planter.rows)
        with SplitWriter(clean, survey.name, num, np.float32) as writer:
            for part in np.split(np.arange(num), range(256, num, 256)):
                patches = survey.read(planter.rows[part]).astype(np.float32)
                writer.add(patches, planter.labels[part])
        with SplitWriter(planted, survey.name, num, np.float32) as writer:
            for part in np.split(np.arange(num), range(256, num, 256)):
                patches = np.stack([planter.draw(place) for place in part.tolist()])
                writer.add(patches.astype(np.float32), planter.given[part])
    header = ("split", "index", "kind", "of")
    write_csv(planted / "truth.csv", header, (row.values() for row in truth))
    return truth


def measure_power(truth: list[dict], planted: list[dict], clean: list[dict]) -> list[dict]:
    """Per kind: how much was planted, found and missed, and false alarms, from the quarantine rows
    of both copies.

    A copy counts as found if it, or what it is a copy of, is listed. `false_alarms` are rows of the
    planted copy that nothing was planted in, `on_clean` those of the clean copy; both may be true
    findings of the user's own.
    """
    listed = {(row["split"], int(row["index"]), row["reason"]) for row in planted}
    touched = {place for row in truth for place in places_of(row)}
    rows = []
    for kind, (_, reasons) in PLANTS.items():
        mine = [row for row in truth if row["kind"] == kind]
        num_found = 0
        for row in mine:
            places = [(*place, reason) for place in places_of(row) for reason in reasons.split()]
            num_found += not listed.isdisjoint(places)
        false_alarms = [
            row
            for row in planted
            if row["reason"] in reasons.split() and (row["split"], int(row["index"])) not in touched
        ]
        rows.append(
            {
                "planted": kind,
                "reason": reasons,
                "num": len(mine),
                "found": num_found,
                "recall": num_found / len(mine) if mine else float("nan"),
                "false_alarms": len(false_alarms),
                "on_clean": sum(row["reason"] in reasons.split() for row in clean),
            }
        )
    return rows


def places_of(row: dict) -> list[tuple[str, int]]:
    """Split and row of what was planted and, of a copy, of what it is a copy of: of a leak that is
    in train.
    """
    places = [(row["split"], row["index"])]
    if row["of"] is not None:
        places.append(("train" if row["kind"] == "leaked" else row["split"], row["of"]))
    return places


def judge_power(power: list[dict]) -> list[dict]:
    """A finding for each kind of damage that a check has no power to find in these data, or that
    could not be planted.
    """
    findings = []
    for row in (row for row in power if row["num"] == 0 or row["recall"] < LEAST_POWER):
        measured = (
            f"{row['found']} of {row['num']} planted were found"
            if row["num"]
            else "too few patches to plant any"
        )
        advice = f"that no {row['reason']} is found here says nothing"
        findings.append(
            build_finding(
                f"power: {row['planted']}", "warning", measured, f"{LEAST_POWER:.0%}", advice
            )
        )
    return findings
