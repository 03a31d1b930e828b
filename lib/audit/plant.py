"""The power of the detectors on the user's own data: damage of every kind planted into a copy, and
what of it is found.
"""

from pathlib import Path

import numpy as np

from lib.audit import finding
from lib.audit.survey import Survey
from lib.damage import alter_patch, damage_patch
from lib.files import write_csv
from lib.splitwriter import SplitWriter

MOST_ROWS = {"train": 8_000, "valid": 2_000}
LEAST_POWER = 0.5  # of what is planted: a check that finds less says nothing by finding nothing
# kind: share of a split's patches, the reasons that count as found
PLANTS = {
    "nan": (0.01, "nan"),
    "out of range": (0.01, "range"),
    "scaled": (0.005, "scaled"),
    "black": (0.01, "black"),
    "white": (0.01, "white"),
    "one colour": (0.005, "constant"),
    "equal": (0.01, "duplicate"),
    "turned": (0.01, "duplicate"),
    "recompressed": (0.01, "near_duplicate"),
    "brightened": (0.01, "near_duplicate"),
    "shifted": (0.01, "near_duplicate"),
    "leaked": (0.02, "leak"),
    "trigger": (0.01, "trigger"),
    "exchanged label": (0.03, "label"),
}
# by check: what it calls what it finds
REASONS_OF = {
    "values": ("nan", "range", "black", "white", "constant", "scaled"),
    "duplicates": ("duplicate", "near_duplicate"),
    "leakage": ("leak",),
    "triggers": ("trigger",),
    "labels": ("label",),
}


def damage(kind: str, patch: np.ndarray, rng) -> None:
    """Damage a patch float32 (96, 96, 3) in place."""
    if kind == "scaled":
        patch /= 255
    elif kind == "one colour":
        patch[:] = rng.integers(1, 255, 3)
    elif kind != "exchanged label":
        damage_patch(kind.replace(" ", "_"), patch, rng)


def copy_patch(kind: str, patch: np.ndarray, rng) -> np.ndarray:
    """A patch uint8 (96, 96, 3) as a copy of a kind."""
    if kind == "shifted":
        dy, dx = rng.choice([(dy, dx) for dy in range(-4, 5) for dx in range(-4, 5) if dy or dx])
        return np.pad(patch, ((4, 4), (4, 4), (0, 0)), "edge")[4 + dy : 100 + dy, 4 + dx : 100 + dx]
    return alter_patch("symmetric" if kind == "turned" else kind, patch, rng, least_quality=60)[0]


def write_copies(
    surveys: list[Survey], rows_of: dict[str, np.ndarray], clean: Path, planted: Path
) -> list[dict]:
    """Write some rows of train and valid twice, as they are and with damage planted, both float32;
    gives what is planted where.

    `rows_of` names the rows that may be used: intact ones, copies once.
    """
    rng, truth, train = np.random.default_rng(0), [], None
    for survey in (survey for survey in surveys if survey.name in MOST_ROWS):
        rows = rows_of[survey.name]
        rows = np.sort(rng.choice(rows, min(MOST_ROWS[survey.name], len(rows)), replace=False))
        labels, free = survey.labels[rows].astype(np.uint8), rng.permutation(len(rows)).tolist()
        changes, given = {}, labels.copy()
        for kind, (share, _) in PLANTS.items():
            if kind == "leaked" and (train is None or survey.name == "train"):
                continue
            for _ in range(int(share * len(rows))):
                place = (
                    free.pop()
                    if kind != "trigger"
                    else next((i for i in reversed(free) if labels[i] == 1), free[-1])
                )
                if kind == "trigger":
                    free.remove(place)
                source = (
                    free.pop()
                    if kind in ("equal", "turned", "recompressed", "brightened", "shifted")
                    else None
                )
                source = int(rng.choice(train[3])) if kind == "leaked" else source
                if kind == "trigger" and survey.name != "train":
                    continue
                changes[place] = kind, source
                if kind == "exchanged label":
                    given[place] ^= 1
                elif source is not None:
                    given[place] = train[2][source] if kind == "leaked" else labels[source]
                truth.append({"split": survey.name, "index": place, "kind": kind, "of": source})
        for folder in (clean, planted):
            folder.mkdir(parents=True, exist_ok=True)
            with SplitWriter(folder, survey.name, len(rows), np.float32) as writer:
                for start in range(0, len(rows), 256):
                    part = range(start, min(start + 256, len(rows)))
                    patches = survey.read(rows[part]).astype(np.float32)
                    for place in part if folder == planted else ():
                        kind, source = changes.get(place, (None, None))
                        if kind == "leaked":
                            patches[place - start] = train[0].read([train[1][source]])[0]
                        elif source is not None:
                            patches[place - start] = copy_patch(
                                kind, survey.read([rows[source]])[0], rng
                            )
                        elif kind:
                            damage(kind, patches[place - start], rng)
                    writer.add(patches, (given if folder == planted else labels)[part])
        if survey.name == "train":
            train = survey, rows, given, free
    write_csv(
        planted / "truth.csv", ("split", "index", "kind", "of"), (row.values() for row in truth)
    )
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
    for kind, (_, reason) in PLANTS.items():
        mine = [row for row in truth if row["kind"] == kind]
        num_found = 0
        for row in mine:
            num_found += any((*place, reason) in listed for place in places_of(row))
        false_alarms = [
            row
            for row in planted
            if row["reason"] == reason and (row["split"], int(row["index"])) not in touched
        ]
        rows.append(
            {
                "planted": kind,
                "reason": reason,
                "num": len(mine),
                "found": num_found,
                "recall": num_found / len(mine) if mine else float("nan"),
                "false_alarms": len(false_alarms),
                "on_clean": sum(row["reason"] == reason for row in clean),
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
            finding(f"power: {row['planted']}", "warning", measured, f"{LEAST_POWER:.0%}", advice)
        )
    return findings
