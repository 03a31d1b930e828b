"""The figures of the data audit, at length, on real patches: a table of what was asked and
measured, as JSON and Markdown.

python tests/proofs/audit.py [PART ...] --data DIR [--full DIR] [--out assets/audit]
"""

import json
import resource
import statistics
import sys
from pathlib import Path

import numpy as np
from conftest import REPOSITORY
from damaged import KINDS, score_quarantine, write_damaged_edition, write_flipped_edition

from lib.audit.data.unusual import Detector, describe_all, make_copies
from lib.audit.plant import LEAST_POWER
from lib.audit.survey import FLAT_STD, survey_split
from lib.command import Parser, say, script
from lib.files import atomic_write, read_csv, read_json
from lib.prepare.verify import require_splits
from proofs import made_now, row, run, run_parts

QUICK_CHECKS = "files,values,unusual,balance,duplicates,leakage,drift"
# of the kinds of damage: patches, the recall asked of gross ones, other patches listed
NUM_KINDS_ROWS, LEAST_GROSS, MOST_ALARMS = 5_000, 0.9, 0.005
EXACT = ("nan", "range", "black", "white", "constant", "scaled")


def prove_clean(args, scratch: Path) -> list[dict]:
    """The sample as it is: nothing but what is known of it."""
    run(
        "audit.py",
        "data",
        args.data,
        "--out",
        scratch / "out",
        "--checks",
        f"{QUICK_CHECKS},triggers",
    )
    findings = [
        f
        for f in json.loads((scratch / "out/findings.json").read_text())
        if f["severity"] != "note"
    ]
    flat = sum(f["count"] for f in findings if f["check"] == "values: flat")
    copies = [row for f in findings if f["check"] == "duplicates" for row in f["rows"]]
    groups = {(row["split"], row["of"]) for row in copies}
    others = sorted({f["check"] for f in findings} - {"values: flat", "duplicates"})
    measured = (
        f"{flat} nearly flat; {len(groups)} groups of {len(groups) + len(copies)} equal patches;"
        f" else: {others or 'nothing'}"
    )
    return [
        row(
            "nothing but known facts: 81 nearly flat patches, groups of equal patches",
            measured,
            flat == 81 and not others,
        )
    ]


def prove_damaged(args, scratch: Path) -> list[dict]:
    """The damaged edition: each kind found exactly, the size explained."""
    truth = write_damaged_edition(args.data, scratch / "data", 12_000)
    run("audit.py", "data", scratch / "data", "--out", scratch / "out", "--checks", QUICK_CHECKS)
    quarantine = read_csv(scratch / "out/quarantine.csv")
    rows = []
    for reason in EXACT[:4]:
        found = score_quarantine(truth, quarantine, reason)
        text = (
            f"recall {found['recall']:.3f}, precision {found['precision']:.3f} ({found['planted']}"
            " planted)"
        )
        rows.append(
            row(
                f"damaged edition, {reason}: 1.0 and 1.0",
                text,
                found["recall"] == found["precision"] == 1,
            )
        )
    size = next(
        f for f in json.loads((scratch / "out/findings.json").read_text()) if f["check"] == "size"
    )
    return [
        *rows,
        row("the size of train_x explained", size["measured"], "bytes" in size["measured"]),
    ]


def prove_planted(args, scratch: Path) -> list[dict]:
    """--plant on the real sample."""
    checks = "values,duplicates,leakage,triggers"
    run("audit.py", "data", args.data, "--out", scratch / "out", "--checks", checks, "--plant")
    rows = []
    for found in read_csv(scratch / "out/power.csv"):
        exact = found["reason"] in (*EXACT, "duplicate", "trigger")
        recall, num, false = float(found["recall"]), int(found["num"]), int(found["false_alarms"])
        precision = int(found["found"]) / max(int(found["found"]) + false, 1)
        text = (
            f"recall {recall:.3f}, precision {precision:.3f} ({num} planted); {found['on_clean']}"
            " on the clean copy"
        )
        limit = 1.0 if exact else 0.95
        rows.append(
            row(
                f"planted: {found['planted']}: {limit:g} and {limit:g}",
                text,
                recall >= limit <= precision,
            )
        )
    return rows


def prove_labels(args, scratch: Path) -> list[dict]:
    """3% of the labels of train exchanged: how many are within a list twice as long; and the list
    of the sample as it is.
    """
    truth = write_flipped_edition(args.data, scratch / "data", 0.03)
    rows = []
    for name, data in (("exchanged", scratch / "data"), ("as it is", args.data)):
        out = scratch / name.replace(" ", "_")
        run("audit.py", "data", data, "--out", out, "--checks", "labels")
        found = next(
            f
            for f in json.loads((out / "findings.json").read_text())
            if f["check"] == "labels to review"
        )
        ranked = [
            (row["split"], int(row["index"]))
            for row in read_csv(out / "out_of_fold.csv")[: 2 * len(truth)]
        ]
        if name == "exchanged":
            hits = len(set(ranked) & {(row["split"], row["index"]) for row in truth})
            text = f"{hits / len(truth):.3f} of {len(truth)}; {found['measured']}"
            rows.append(
                row(
                    "3% exchanged labels: 0.6 within twice their number",
                    text,
                    hits / len(truth) >= 0.6,
                )
            )
        else:
            rows.append(
                row(
                    "labels of the sample as it is: no alarm",
                    found["measured"],
                    found["severity"] == "note",
                )
            )
    return rows


def prove_synthetic(_args, scratch: Path) -> list[dict]:
    """Synthetic slides with planted leaks, overlaps and drift: leaks by slide, by place and by
    pixels.
    """
    kinds = ("exact", "symmetric", "recompressed", "brightened", "shifted", "overlap", "trigger")
    plants = [*(f"{kind}=0.02" for kind in kinds), "shared_slides=0.2", "blurred_scanner=0.1"]
    options = [option for plant in plants for option in ("--plant", plant)]
    run(
        "prepare.py",
        "synthetic",
        "--to",
        scratch / "data",
        "--train",
        12_000,
        "--valid",
        3_000,
        "--test",
        0,
        *options,
    )
    run(
        "audit.py",
        "data",
        scratch / "data",
        "--out",
        scratch / "out",
        "--checks",
        f"{QUICK_CHECKS},triggers",
    )
    truth, quarantine = (
        read_csv(scratch / "data/truth.csv"),
        read_csv(scratch / "out/quarantine.csv"),
    )
    listed = {(r["split"], r["index"], r["reason"]) for r in quarantine}
    rows = []
    reasons = {"exact": "duplicate", "symmetric": "duplicate", "shared_slides": "leak"}
    for kind in (*kinds[:5], "shared_slides"):
        reason = reasons.get(kind, "near_duplicate")
        mine = [r for r in truth if r["kind"] == kind]
        if kind == "shared_slides":
            found = sum((r["split"], r["index"], reason) in listed for r in mine)
        else:
            found = sum(
                any((r["split"], i, reason) in listed for i in (r["index"], r["detail"].split()[1]))
                for r in mine
            )
        limit = 1.0 if reason == "duplicate" else 0.95
        text = f"recall {found / len(mine):.3f} of {len(mine)}"
        rows.append(row(f"synthetic slides, {kind}: {limit:g}", text, found >= limit * len(mine)))
    findings = json.loads((scratch / "out/findings.json").read_text())
    beside = [
        r
        for f in findings
        if (f["check"], f["split"]) == ("overlapping patches", "train")
        for r in f["rows"]
    ]
    overlaps = {frozenset((int(r["of"]), r["index"])) for r in beside}
    mine = [r for r in truth if r["kind"] == "overlap" and r["split"] == "train"]
    found = sum(frozenset((int(r["detail"].split()[1]), int(r["index"]))) in overlaps for r in mine)
    text = f"recall {found / len(mine):.3f} of {len(mine)}"
    rows.append(
        row(
            "synthetic slides, cut 24 to 64 pixels beside, by pixels alone (no figure asked)",
            text,
            True,
        )
    )
    for check in ("shared slides", "overlapping coordinates", "triggers", "drift of slides"):
        found = next(
            (f["measured"] for f in findings if f["check"] == check and f["severity"] != "note"),
            "not found",
        )
        rows.append(row(f"synthetic slides: {check}", found, found != "not found"))
    return rows


def prove_full(args, scratch: Path) -> list[dict]:
    """Checks 1 to 5 and 8 on files of full size, in --full, made there if need be."""
    full = Path(args.full)
    if not full.exists():
        sizes = (
            "--train",
            262_144,
            "--valid",
            32_768,
            "--test",
            32_768,
            "--plant",
            "shared_slides=0.05",
            "--plant",
            "exact=0.02",
        )
        run("prepare.py", "synthetic", "--to", full, *sizes)
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1e6
    result = run("audit.py", "data", full, "--out", scratch / "out", "--checks", QUICK_CHECKS)
    memory = f"{result['peak_gb']:.2f} GB" + (
        " at most (of an earlier child)" if result["peak_gb"] == before else ""
    )
    text = f"{result['wall_s']:.0f} s, {memory}, {327_680 / result['wall_s']:,.0f} patches/s"
    return [
        row(
            "full-size files, checks 1-5 and 8: 240 s, 1.5 GB",
            text,
            result["wall_s"] < 240 and result["peak_gb"] < 1.5,
        )
    ]


def prove_training(args, scratch: Path) -> list[dict]:
    """The damaged edition, trained with and without its quarantine, over three seeds, scored on
    intact validation patches.
    """
    write_damaged_edition(args.data, scratch / "data", 9_000)
    run("audit.py", "data", scratch / "data", "--out", scratch / "out", "--checks", "files,values")
    scores = {"with": [], "without": []}
    for seed in (1, 2, 3):
        for name, quarantine in (("with", scratch / "out/quarantine.csv"), ("without", "")):
            settings = (
                f"data_dir={scratch / 'data'}",
                f"quarantine={quarantine}",
                f"seed={seed}",
                "epochs=5",
                "crop_epochs=4",
            )
            result = run(
                "train.py", "--runs", scratch / "runs", *settings, "warmup_epochs=1", "views=1"
            )
            scores[name].append(result["val_auc"])
            left_out = read_json(Path(result["run"], "meta.json"))["rows"]["train"]["left_out"]
            say(f"{name} quarantine, seed {seed}: AUC {result['val_auc']:.4f}, left out {left_out}")
    means = {name: statistics.mean(values) for name, values in scores.items()}
    text = "; ".join(
        f"{name} {means[name]:.4f} ({', '.join(f'{v:.4f}' for v in values)})"
        for name, values in scores.items()
    )
    held = all(a > b for a, b in zip(scores["with"], scores["without"], strict=True))
    return [
        row(
            "damaged edition, AUC with quarantine above that without, each of three seeds",
            text,
            held,
        )
    ]


def prove_kinds(args, scratch: Path) -> list[dict]:
    """Each kind of damage alone in 4% of real patches: how many are found, and how many others."""
    rng = np.random.default_rng(0)
    survey = survey_split(args.data, "train", scratch, [])
    rows = np.sort(rng.choice(survey.intact, NUM_KINDS_ROWS, replace=False))
    patches = survey.read(rows)
    described = survey.table["appearance"][rows].copy()
    deviation = survey.table["deviation"][rows]
    places = rng.permutation(len(rows))[: int(0.04 * len(rows))]
    others = patches[rng.permutation(len(rows))[: len(places)]]
    copies = make_copies([survey], [rows], rng)
    clean = find_suspects(described, deviation, copies)
    rows = [kind_row("none", True, 0.0, clean.mean())]
    for kind, (is_gross, function) in KINDS.items():
        pairs = zip(patches[places], others, strict=True)
        damaged = np.stack([np.clip(function(*pair, rng), 0, 255) for pair in pairs])
        altered = described.copy()
        altered[places] = describe_all(damaged.astype(np.uint8))
        is_listed = find_suspects(altered, deviation, copies)
        recall = is_listed[places].mean()
        is_new = np.delete(is_listed & ~clean, places)
        rows.append(kind_row(kind, is_gross, recall, is_new.mean()))
        say(f"{kind}: {rows[-1]['measured']}")
        write_kinds(rows)
    return rows


def find_suspects(described: np.ndarray, deviation: np.ndarray, copies: dict) -> np.ndarray:
    """Whether each patch is unusual, bool (N,), by its description (N, D)."""
    detector = Detector(described, copies)
    _, excess, far = detector(described)
    return ((excess >= 0) | (far > 0)) & (deviation >= FLAT_STD)


def kind_row(kind: str, is_gross: bool, recall: float, alarms: float) -> dict:
    """A row of the proof for one kind of damage."""
    if kind == "none":
        asked = "the patches as they are: few are listed"
        held = alarms <= MOST_ALARMS
        limit = f"alarms {MOST_ALARMS:.1%}"
        measured = f"alarms {alarms:.2%}"
    else:
        asked = f"4% damaged: {kind}" + (", gross" if is_gross else "")
        held = alarms <= MOST_ALARMS and (recall >= LEAST_GROSS or not is_gross)
        limit = f"recall {LEAST_GROSS if is_gross else 0:g}, alarms {MOST_ALARMS:.1%}"
        power = "" if recall >= LEAST_POWER else ", no power"
        measured = f"recall {recall:.2f}{power}, alarms {alarms:.2%}"
    return row(asked, measured, held) | {"limit": limit}


def write_kinds(rows: list[dict]) -> None:
    """Write docs/audit-damage.md."""
    made = made_now()
    lines = [
        "# What the data audit finds of damage",
        "",
        "Each kind is planted alone into 4% of real patches. Alarms are other patches that are",
        "listed then, and not without the damage. The kinds are drawn by other code than the audit",
        "learns from. A kind of which less than half is found counts as no power.",
        "",
        f"Command: `python tests/proofs/audit.py kinds --data data/sample` ({NUM_KINDS_ROWS:,} patches,",
        f"{made['date']}, commit {made['commit']}).",
        "",
        "| damage | measured | asked | held |",
        "|---|---|---|---|",
    ]
    for found in rows:
        held = "yes" if found["held"] else "NO"
        lines.append(f"| {found['asked']} | {found['measured']} | {found['limit']} | {held} |")
    with atomic_write(REPOSITORY / "docs/audit-damage.md", "w") as file:
        file.write("\n".join(lines) + "\n")


PARTS = {
    name.removeprefix("prove_"): part
    for name, part in list(globals().items())
    if name.startswith("prove_")
}


@script
def main(argv=None) -> int:
    parser = Parser(prog="audit.py", description="The figures of the data audit, on real patches.")
    parser.add_argument("parts", nargs="*", help=f"some of {', '.join(PARTS)} (default: all)")
    parser.add_argument("--data", required=True, metavar="DIR", help="the imported real sample")
    parser.add_argument(
        "--full", default="data/full", metavar="DIR", help="files of full size (default: data/full)"
    )
    parser.add_argument(
        "--out", default="assets/audit", type=Path, metavar="OUT", help="OUT.json and OUT.md"
    )
    args = parser.parse_args(argv)
    args.data = Path(args.data).resolve()
    require_splits(args.data)
    return run_parts(PARTS, args)


if __name__ == "__main__":
    sys.exit(main())
