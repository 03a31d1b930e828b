"""The power of the detectors on the user's own data: damage of every kind planted into a copy, and
what of it is found.
"""

from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np
from PIL import Image

from lib.audit import build_finding
from lib.audit.alterations import PATCH_KINDS, alter
from lib.audit.survey import Survey
from lib.damage import alter_patch, damage_patch
from lib.pcam import split_path
from lib.splitwriter import SplitWriter, write_labels

MOST_ROWS = {"train": 8_000, "valid": 2_000}
LEAST_POWER = 0.5  # of what is planted: a check that finds less says nothing by finding nothing
STRETCH = 0.04  # of a split, its last rows: their labels are out of step
# by check: what it calls what it finds
REASONS_OF = {
    "values": "nan range black white constant scaled",
    "unusual": "colour detail partial blank outlier",
    "duplicates": "duplicate near_duplicate",
    "leakage": "leak",
    "triggers": "trigger",
    "labels": "label misaligned",
}
# kind: share of a split's patches, the reasons that count as found
PLANTS = {
    "nan": (0.01, "nan"),
    "out of range": (0.01, "range"),
    "scaled": (0.005, "scaled"),
    "black": (0.01, "black"),
    "white": (0.01, "white"),
    "one colour": (0.005, "constant"),
    **dict.fromkeys(PATCH_KINDS, (0.005, REASONS_OF["unusual"])),
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


def damage(kind: str, patch: np.ndarray, rng) -> np.ndarray:
    """A damaged patch float32 (96, 96, 3) from an intact one, which may be changed."""
    if kind == "scaled":
        return patch / 255
    if kind == "one colour":
        return np.broadcast_to(rng.integers(1, 255, 3), patch.shape)
    damage_patch(kind.replace(" ", "_"), patch, rng)
    return patch


def copy_patch(kind: str, patch: np.ndarray, rng) -> np.ndarray:
    """A patch uint8 (96, 96, 3) as a copy of one of COPY_KINDS."""
    if kind not in ("shifted", "zoomed", "rotated"):
        altered = "symmetric" if kind == "turned" else kind
        return alter_patch(altered, patch, rng, least_quality=60)
    picture = Image.fromarray(np.pad(patch, ((8, 8), (8, 8), (0, 0)), "edge"))
    shift = np.zeros(2, np.int64)
    if kind == "shifted":
        shift = rng.integers(1, 5, 2) * rng.choice((-1, 1), 2)
    elif kind == "zoomed":
        side = round(picture.width * rng.uniform(1.03, 1.08))
        picture = picture.resize((side, side), Image.BILINEAR)
    else:
        picture = picture.rotate(rng.uniform(2, 6) * rng.choice((-1, 1)), Image.BILINEAR)
    size = len(patch)
    y, x = (picture.width - size) // 2 + shift
    return np.asarray(picture)[y : y + size, x : x + size]


@dataclass
class Part:
    """Some rows of a split, the labels that their copies get, and places among them that nothing
    is planted in.
    """

    survey: Survey
    rows: np.ndarray
    labels: np.ndarray
    free: list[int]

    def read(self, places) -> np.ndarray:
        """Patches uint8 (B, 96, 96, 3) of the rows at places, as they are."""
        return self.survey.read(self.rows[places])


def write_copies(
    surveys: list[Survey], rows_of: dict[str, np.ndarray], clean: Path, planted: Path
) -> list[dict]:
    """Write some rows of train and valid twice, as they are and with damage planted, both float32;
    gives rows of kind and places: what is planted where, and what it is a copy of.

    `rows_of` names the rows that may be used: intact ones, copies once.
    """
    rng, truth, train = np.random.default_rng(0), [], None
    clean.mkdir(parents=True, exist_ok=True)
    planted.mkdir(parents=True, exist_ok=True)
    for survey in surveys:
        name, rows = survey.name, rows_of[survey.name]
        if name not in MOST_ROWS:
            continue
        rows = np.sort(rng.choice(rows, min(MOST_ROWS[name], len(rows)), replace=False))
        num_in_step = len(rows) - int(STRETCH * len(rows))
        free = rng.permutation(num_in_step).tolist()
        part = Part(survey, rows, survey.labels[rows].astype(np.uint8), free)
        for folder in (clean, planted):
            with SplitWriter(folder, name, len(rows), np.float32) as writer:
                for start in range(0, len(rows), 256):
                    places = slice(start, start + 256)
                    writer.add(part.read(places).astype(np.float32), part.labels[places])
        with h5py.File(split_path(planted, name, "x"), "r+") as file:
            truth += plant_split(part, file["x"], train, rng)
        part.labels[num_in_step:] = np.roll(part.labels[num_in_step:], 7)
        for place in range(num_in_step, len(rows)):
            truth.append({"kind": "out of step", "places": [(name, place)]})
        write_labels(split_path(planted, name, "y"), part.labels)
        if name == "train":
            train = part
    return truth


def plant_split(part: Part, patches, train: Part | None, rng) -> list[dict]:
    """Plant every kind into the h5py dataset `patches` of a part, and its labels; gives the truth
    as write_copies does. Leaks come from `train`.
    """
    truth, name = [], part.survey.name
    kinds = [
        kind for kind, (share, _) in PLANTS.items() for _ in range(int(share * len(part.rows)))
    ]
    for kind in kinds:
        free = part.free
        if kind == "trigger":  # on positives of train
            free = [place for place in free if part.labels[place] == 1 and train is None]
        if kind == "out of step" or (kind == "leaked" and train is None) or not free:
            continue
        place = free[-1]
        part.free.remove(place)
        (patch,) = part.read([place])
        places = [(name, place)]
        if kind == "exchanged label":
            part.labels[place] ^= 1
        elif kind == "leaked" or kind in COPY_KINDS:
            origin = train if kind == "leaked" else part
            source = int(rng.choice(origin.free))
            part.labels[place] = origin.labels[source]
            places.append((origin.survey.name, source))
            patch = origin.read([source])[0]
            if kind != "leaked":
                part.free.remove(source)
                patch = copy_patch(kind, patch, rng)
        elif kind in PATCH_KINDS:
            (other,) = part.read([rng.integers(len(part.rows))])
            patch = alter(kind, patch, other, rng)
        else:
            patch = damage(kind, patch.astype(np.float32), rng)
        patches[place] = patch
        truth.append({"kind": kind, "places": places})
    return truth


def measure_power(truth: list[dict], planted: list[dict], clean: list[dict]) -> list[dict]:
    """Per kind: how much was planted, found and missed, and false alarms, from the quarantine rows
    of both copies.

    A copy counts as found if it, or what it is a copy of, is listed. `false_alarms` are rows of the
    planted copy that nothing was planted in, `on_clean` those of the clean copy; both may be true
    findings of the user's own.
    """
    touched = {place for row in truth for place in row["places"]}
    rows = []
    for kind, (_, reasons) in PLANTS.items():
        places_of = [row["places"] for row in truth if row["kind"] == kind]
        flagged = [row for row in planted if row["reason"] in reasons.split()]
        listed = {(row["split"], int(row["index"])) for row in flagged}
        num_found = sum(not listed.isdisjoint(places) for places in places_of)
        rows.append(
            {
                "planted": kind,
                "reason": reasons,
                "num": len(places_of),
                "found": num_found,
                "recall": num_found / len(places_of) if places_of else float("nan"),
                "false_alarms": len(listed - touched),
                "on_clean": sum(row["reason"] in reasons.split() for row in clean),
            }
        )
    return rows


def judge_power(power: list[dict]) -> list[dict]:
    """A finding for each kind of damage that a check has no power to find in these data, or that
    could not be planted.
    """
    findings = []
    for row in power:
        if row["recall"] >= LEAST_POWER:
            continue
        measured = "nothing could be planted: the check's power is unknown"
        if row["num"]:
            measured = f"{row['found']:,} of {row['num']:,} planted were found"
        advice = f"that no {row['reason']} is found here says nothing"
        limit = f"{LEAST_POWER:.0%}"
        check = f"power: {row['planted']}"
        findings.append(build_finding(check, "warning", measured, limit, advice))
    return findings
