"""The power of the detectors on the user's own data: damage of every kind planted into a copy, and
what of it is found.
"""

from pathlib import Path

import numpy as np
from PIL import Image

from lib.audit import build_finding
from lib.audit.alterations import REASONS, alter
from lib.audit.survey import Survey
from lib.damage import alter_patch, damage_patch
from lib.splitwriter import SplitWriter

MOST_ROWS = {"train": 8_000, "valid": 2_000}
LEAST_POWER = 0.5  # of what is planted: a check that finds less says nothing by finding nothing
# by check: what it calls what it finds
REASONS_OF = {
    "values": ("nan", "range", "black", "white", "constant", "scaled"),
    "unusual": ("colour", "detail", "partial", "blank", "outlier"),
    "duplicates": ("duplicate", "near_duplicate"),
    "leakage": ("leak",),
    "triggers": ("trigger",),
    "labels": ("label", "misaligned"),
}
COPY_REASONS = {
    **dict.fromkeys(("equal", "symmetric"), "duplicate"),
    **dict.fromkeys(
        ("recompressed", "brightened", "shifted", "zoomed", "rotated"), "near_duplicate"
    ),
}
# kind: share of a split's patches, the reason that it is found for
PLANTS = {
    "nan": (0.01, "nan"),
    "out_of_range": (0.01, "range"),
    "scaled": (0.005, "scaled"),
    "black": (0.01, "black"),
    "white": (0.01, "white"),
    "constant": (0.005, "constant"),
    **{kind: (0.005, reason) for kind, reason in REASONS.items()},
    **{kind: (0.01, reason) for kind, reason in COPY_REASONS.items()},
    "leaked": (0.02, "leak"),
    "trigger": (0.01, "trigger"),
    "exchanged label": (0.03, "label"),
    "out of step": (0.04, "misaligned"),
}


def damage(kind: str, patch: np.ndarray, other: np.ndarray, rng) -> np.ndarray:
    """A damaged patch (96, 96, 3), float32 or uint8, from an intact uint8 one; `other` is another
    patch.
    """
    if kind in REASONS:
        return alter(kind, patch, other, rng)
    patch = patch.astype(np.float32)
    if kind == "scaled":
        return patch / 255
    if kind == "constant":
        return np.broadcast_to(rng.integers(1, 255, 3), patch.shape)
    damage_patch(kind, patch, rng)
    return patch


def copy_patch(kind: str, patch: np.ndarray, rng) -> np.ndarray:
    """A patch uint8 (96, 96, 3) as a copy of a kind of COPY_REASONS; of another kind as it is."""
    if kind not in ("shifted", "zoomed", "rotated"):
        return alter_patch(kind, patch, rng)
    picture = Image.fromarray(np.pad(patch, ((8, 8), (8, 8), (0, 0)), "edge"))
    y, x = 8, 8
    if kind == "shifted":
        y, x = 8 + rng.integers(1, 5, 2) * rng.choice((-1, 1), 2)
    elif kind == "zoomed":
        side = round(picture.width * rng.uniform(1.03, 1.08))
        picture = picture.resize((side, side), Image.BILINEAR)
    else:
        picture = picture.rotate(rng.uniform(2, 6) * rng.choice((-1, 1)), Image.BILINEAR)
    size = len(patch)
    return np.asarray(picture)[y : y + size, x : x + size]


def write_copy(surveys: list[Survey], rows_of: dict[str, np.ndarray], folder: Path) -> list[dict]:
    """Write some rows of train and valid with damage planted, as float32; gives rows of kind and
    places: what is planted where, and what it is a copy of.

    `rows_of` names the rows that may be used: intact ones, copies once.
    """
    rng, truth, leaks = np.random.default_rng(0), [], []
    folder.mkdir()
    for survey in surveys:
        if survey.name not in MOST_ROWS:
            continue
        rows = rng.permutation(rows_of[survey.name])[: MOST_ROWS[survey.name]]
        rows.sort()
        patches, labels = survey.read(rows), survey.labels[rows].astype(np.uint8)
        changed, of_split, leaks = plant_split(survey.name, patches, labels, leaks, rng)
        truth += of_split
        with SplitWriter(folder, survey.name, len(patches), np.float32) as writer:
            for place, patch in enumerate(patches):
                patch = changed.get(place, patch).astype(np.float32)
                writer.add(patch[None], labels[place : place + 1])
    return truth


def plant_split(name: str, patches, labels, leaks: list[tuple], rng) -> tuple[dict, list, list]:
    """Plant every kind into patches uint8 (N, 96, 96, 3) and, in place, their labels (N,): changed
    patches by place, the truth as write_copy gives it, and what later splits may leak, as
    (split, place, patch, label).
    """
    num = len(labels)
    num_in_step = num - int(PLANTS["out of step"][0] * num)
    free = rng.permutation(num_in_step).tolist()
    # a quarter of the places stays as it is, for copies
    origins = [(name, place, patches[place], labels[place]) for place in free[: num // 4]]
    free = free[num // 4 :]
    changed, truth = {}, []
    kinds = [kind for kind, (share, _) in PLANTS.items() for _ in range(int(share * num))]
    for kind in kinds:
        # a trigger is on positives of train, and leaks are of an earlier split
        places = free
        if kind == "trigger":
            places = [place for place in free if labels[place] == 1 and name == "train"]
        if kind == "out of step" or not places or (kind == "leaked" and not leaks):
            continue
        place = places[-1]
        free.remove(place)
        planted = [(name, place)]
        if kind == "exchanged label":
            labels[place] ^= 1
        elif kind == "leaked" or kind in COPY_REASONS:
            origin = (leaks if kind == "leaked" else origins).pop()
            split, source, patch, labels[place] = origin
            changed[place] = copy_patch(kind, patch, rng)
            planted.append((split, source))
        else:
            changed[place] = damage(kind, patches[place], patches[rng.integers(num)], rng)
        truth.append({"kind": kind, "places": planted})
    labels[num_in_step:] = np.roll(labels[num_in_step:], 7)
    for place in range(num_in_step, num):
        truth.append({"kind": "out of step", "places": [(name, place)]})
    return changed, truth, origins


def measure_power(truth: list[dict], quarantine: list[dict], reasons: set[str]) -> list[dict]:
    """Per kind of one of `reasons`: how much was planted and found, and false alarms, from the rows
    of the quarantine.

    A copy counts as found if it, or what it is a copy of, is listed. `false_alarms` are rows that
    nothing was planted in; they may be true findings of the user's own.
    """
    touched = {place for row in truth for place in row["places"]}
    power = []
    for kind, (_, reason) in PLANTS.items():
        if reason not in reasons:
            continue
        accepted = REASONS_OF["unusual"] if kind in REASONS else (reason,)
        suspects = [row for row in quarantine if row["reason"] in accepted]
        listed = {(row["split"], row["index"]) for row in suspects}
        places_of = [row["places"] for row in truth if row["kind"] == kind]
        num, num_found = len(places_of), sum(not listed.isdisjoint(places) for places in places_of)
        recall = num_found / num if num else float("nan")
        row = {"planted": kind, "reason": reason, "num": num, "found": num_found, "recall": recall}
        power.append(row | {"false_alarms": len(listed - touched)})
    return power


def judge_power(power: list[dict]) -> list[dict]:
    """A finding for each kind of damage that a check has no power to find in these data, or that
    could not be planted.
    """
    findings = []
    for row in power:
        if not row["recall"] >= LEAST_POWER:
            measured = f"{row['found']:,} of {row['num']:,} planted were found"
            advice = f"that no {row['reason']} is found here says nothing"
            check, limit = f"power: {row['planted']}", f"{LEAST_POWER:.0%}"
            findings.append(build_finding(check, "warning", measured, limit, advice))
    return findings
