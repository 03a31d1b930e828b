"""The figures of the data audit, at length, on real patches: a table of what was asked and
measured, as JSON and Markdown.

python tests/proofs/audit.py [PART ...] --data DIR [--full DIR] [--out assets/audit]
"""

import json
import sys
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
from conftest import REPOSITORY
from damaged import KINDS, write_flipped_edition

from lib.audit.data.unusual import COPIES, Detector, describe_all, make_copies
from lib.audit.plant import LEAST_POWER
from lib.audit.survey import FLAT_STD
from lib.command import say
from lib.files import read_csv
from lib.pcam import open_split
from proofs import prove, row, run

QUICK_CHECKS = "files,values,unusual,balance,duplicates,leakage,drift"
# of the kinds of damage: patches, the share damaged, the recall asked of gross ones, and the share
# of other patches that may be listed
NUM_KINDS_ROWS, SHARE, LEAST_GROSS, MOST_ALARMS = 4_000, 0.04, 0.9, 0.005
LEAST_LISTED = 0.6  # of exchanged labels, within a list twice as long
# what of the planted damage has to be found to the last patch
EXACT = ("nan", "range", "black", "white", "constant", "scaled", "duplicate", "trigger")
MOST_FULL_S, MOST_FULL_GB, NUM_FULL = 240, 1.5, 327_680


def audit(data, out: Path, checks: str, *options) -> list[dict]:
    """The findings of audit.py."""
    run("audit.py", "data", data, "--out", out, "--checks", checks, *options)
    return json.loads((out / "findings.json").read_text())


def prove_clean(args, scratch: Path) -> list[dict]:
    """The sample as it is: nothing but what is known of it."""
    findings = audit(args.data, scratch, f"{QUICK_CHECKS},triggers")
    warnings = [finding for finding in findings if finding["severity"] != "note"]
    counts = Counter()
    for finding in warnings:
        counts[finding["check"]] += finding["count"]
    num_flat, num_again = counts.pop("values: flat"), counts.pop("duplicates")
    measured = f"{num_flat} nearly flat; {num_again} equal to others; else: {dict(counts)}"
    asked = "nothing but known facts: 81 nearly flat patches, 922 equal to others, one partly black"
    is_known = (num_flat, num_again, counts) == (81, 922, {"values: partly black": 1})
    return [row(asked, measured, is_known)]


def prove_planted(args, scratch: Path) -> list[dict]:
    """--plant on the real sample."""
    audit(args.data, scratch, "values,duplicates,leakage,triggers", "--plant")
    rows = []
    for power in read_csv(scratch / "power.csv"):
        limit = 1.0 if power["reason"] in EXACT else 0.95
        recall, num_found = float(power["recall"]), int(power["found"])
        precision = num_found / max(num_found + int(power["false_alarms"]), 1)
        measured = f"recall {recall:.3f}, precision {precision:.3f} ({power['num']} planted)"
        asked = f"planted: {power['planted']}: {limit:g} and {limit:g}"
        rows.append(row(asked, measured, min(recall, precision) >= limit))
    return rows


def prove_labels(args, scratch: Path) -> list[dict]:
    """3% of the labels of train exchanged: how many are within a list twice as long; and the list
    of the sample as it is.
    """
    truth = write_flipped_edition(args.data, scratch / "data", 0.03)
    exchanged = {line["index"] for line in truth}
    audit(scratch / "data", scratch / "exchanged", "labels")
    lines = read_csv(scratch / "exchanged/out_of_fold.csv")
    ranked = [int(line["index"]) for line in lines if line["split"] == "train"]
    share = len(exchanged.intersection(ranked[: 2 * len(truth)])) / len(truth)
    asked = "3% exchanged labels: those within twice their number"
    clean = audit(args.data, scratch / "clean", "labels")
    is_quiet = all(finding["severity"] == "note" for finding in clean)
    return [
        row(asked, f"{share:.3f} of {len(truth)}", share >= LEAST_LISTED, LEAST_LISTED),
        row("labels of the sample as it is: no alarm", clean[0]["measured"], is_quiet),
    ]


def prove_full(args, scratch: Path) -> list[dict]:
    """All checks but triggers and labels on files of full size, in --full, made there if need
    be.
    """
    if not Path(args.full).exists():
        sizes = ("--train", 262_144, "--valid", 32_768, "--test", 32_768)
        plants = ("--plant", "shared_slides=0.05", "--plant", "exact=0.02")
        run("prepare.py", "synthetic", "--to", args.full, *sizes, *plants)
    command = ("audit.py", "data", args.full, "--out", scratch, "--checks", QUICK_CHECKS)
    result = run(*command)
    wall_s, peak_gb = result["wall_s"], result["peak_gb"]
    measured = f"{wall_s:.0f} s, {peak_gb:.2f} GB, {NUM_FULL / wall_s:,.0f} patches/s"
    asked = f"full-size files, checks 1-5 and 8: {MOST_FULL_S} s, {MOST_FULL_GB} GB"
    return [row(asked, measured, wall_s < MOST_FULL_S and peak_gb < MOST_FULL_GB)]


def prove_kinds(args, _scratch: Path) -> list[dict]:
    """Each kind of damage alone in 4% of real patches: how many are found, and how many others."""
    rng = np.random.default_rng(0)
    images = open_split(args.data, "train").images
    chosen = np.sort(rng.choice(images.num, NUM_KINDS_ROWS, replace=False))
    patches = images.read(chosen)
    is_flat = patches.std((1, 2)).max(1) < FLAT_STD
    described = describe_all(patches)
    places = rng.permutation(len(patches))[: int(SHARE * len(patches))]
    others = patches[rng.permutation(len(patches))[: len(places)]]
    copies = make_copies(patches[rng.permutation(len(patches))[:COPIES]], rng)
    clean = find_suspects(described, copies) & ~is_flat
    alarms = clean.mean()
    rows = [row("as they are", f"alarms {alarms:.2%}", alarms <= MOST_ALARMS, f"{MOST_ALARMS:.1%}")]
    for kind, (is_gross, function) in KINDS.items():
        pairs = zip(patches[places], others, strict=True)
        damaged = np.stack([np.clip(function(*pair, rng), 0, 255) for pair in pairs])
        altered = described.copy()
        altered[places] = describe_all(damaged.astype(np.uint8))
        is_listed = find_suspects(altered, copies) & ~is_flat
        recall = is_listed[places].mean()
        alarms = np.delete(is_listed & ~clean, places).mean()
        power = "" if recall >= LEAST_POWER else ", no power"
        measured = f"recall {recall:.2f}{power}, alarms {alarms:.2%}"
        limit, is_held = f"alarms {MOST_ALARMS:.1%}", alarms <= MOST_ALARMS
        if is_gross:
            limit = f"recall {LEAST_GROSS:g}, {limit}"
            is_held &= recall >= LEAST_GROSS
        rows.append(row(kind, measured, is_held, limit))
        say(f"{kind}: {measured}")
    return rows


def find_suspects(described: np.ndarray, copies: list) -> np.ndarray:
    """Whether each patch is unusual, bool (N,), by the descriptions (N, D) of all."""
    _, excess = Detector(described, copies)(described)
    return excess >= 0


PARTS = {
    "clean": prove_clean,
    "planted": prove_planted,
    "kinds": prove_kinds,
    "labels": prove_labels,
    "full": prove_full,
}

if __name__ == "__main__":
    data, full = (REPOSITORY / "data" / name for name in ("sample", "full"))
    sys.exit(prove(__doc__, PARTS, "audit", data=data, full=full))
