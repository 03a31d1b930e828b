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

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from conftest import REPOSITORY
from damaged import KINDS, score_quarantine, write_damaged_edition, write_flipped_edition

from lib.audit.data.unusual import COPIES, Detector, describe_all, make_copies
from lib.audit.plant import LEAST_POWER
from lib.audit.survey import FLAT_STD
from lib.command import say, script
from lib.files import atomic_write, read_csv, read_json
from lib.pcam import open_split
from lib.prepare.verify import require_splits
from proofs import HELD, made_now, proof_parser, row, run, run_parts, write_markdown

QUICK_CHECKS = "files,values,unusual,balance,duplicates,leakage,drift"
# of the kinds of damage: patches, the share damaged, the recall asked of gross ones, and the share
# of other patches that may be listed
NUM_KINDS_ROWS, SHARE, LEAST_GROSS, MOST_ALARMS = 4_000, 0.04, 0.9, 0.005
LEAST_LISTED = 0.6  # of exchanged labels, within a list twice as long
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
    exchanged = {line["index"] for line in truth}
    found = review_labels(scratch / "data", scratch / "exchanged")
    lines = read_csv(scratch / "exchanged/out_of_fold.csv")
    ranked = [int(line["index"]) for line in lines if line["split"] == "train"]
    share = len(exchanged & set(ranked[: 2 * len(truth)])) / len(truth)
    asked = "3% exchanged labels: those within twice their number"
    measured = f"{share:.3f} of {len(truth)}; {found['measured']}"
    clean = review_labels(args.data, scratch / "clean")
    is_quiet = clean["severity"] == "note"
    return [
        row(asked, measured, share >= LEAST_LISTED, LEAST_LISTED),
        row("labels of the sample as it is: no alarm", clean["measured"], is_quiet),
    ]


def review_labels(data: Path, out: Path) -> dict:
    """The finding for the labels of train."""
    run("audit.py", "data", data, "--out", out, "--checks", "labels")
    findings = read_json(out / "findings.json")
    reviews = [found for found in findings if found["check"] == "labels to review"]
    return next(found for found in reviews if found["split"] == "train")


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
        limit = f"alarms {MOST_ALARMS:.1%}"
        held = alarms <= MOST_ALARMS
        if is_gross:
            limit = f"recall {LEAST_GROSS:g}, {limit}"
            held &= recall >= LEAST_GROSS
        rows.append(row(kind, measured, held, limit))
        say(f"{kind}: {measured}")
    write_kinds(rows)
    return rows


def find_suspects(described: np.ndarray, copies: dict) -> np.ndarray:
    """Whether each patch is unusual, bool (N,), by the descriptions (N, D) of all."""
    _, excess, far = Detector(described, copies)(described)
    return (excess >= 0) | (far > 0)


def write_kinds(rows: list[dict]) -> None:
    """Write docs/audit-damage.md."""
    made = made_now()
    path = REPOSITORY / "docs/audit-damage.md"
    cells = [(line["asked"], line["measured"], line["limit"], HELD[line["held"]]) for line in rows]
    write_markdown(path, ("damage", "measured", "limit", "held"), cells)
    text = (
        "# Kinds of damage, and what the data audit finds of them",
        "",
        f"Each kind is planted alone into {SHARE:.0%} of {NUM_KINDS_ROWS:,} real patches. Other code"
        " draws it than the code that the audit learns from.",
        "Alarms are other patches that are listed only with the damage. Below a recall of"
        f" {LEAST_POWER:g} the check has no power.",
        "The table is of the check `unusual` alone. The check `values` lists patches that are black"
        " in part besides.",
        "",
        f"`python tests/proofs/audit.py kinds --data data/sample`, {made['date']}, commit"
        f" {made['commit']}. The planted damage of `--plant` stands in"
        " [assets/audit.md](../assets/audit.md).",
        "",
        path.read_text(),
    )
    with atomic_write(path, "w") as file:
        file.write("\n".join(text))


PARTS = {
    "clean": prove_clean,
    "damaged": prove_damaged,
    "planted": prove_planted,
    "kinds": prove_kinds,
    "labels": prove_labels,
    "synthetic": prove_synthetic,
    "full": prove_full,
    "training": prove_training,
}


@script
def main(argv=None) -> int:
    parser = proof_parser("audit.py", __doc__, PARTS, "audit")
    parser.add_argument("--data", required=True, metavar="DIR", help="the imported real sample")
    parser.add_argument(
        "--full", default="data/full", metavar="DIR", help="files of full size (default: data/full)"
    )
    args = parser.parse_args(argv)
    args.data = Path(args.data).resolve()
    require_splits(args.data)
    return run_parts(PARTS, args)


if __name__ == "__main__":
    sys.exit(main())
