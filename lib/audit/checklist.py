"""Is a handover folder whole and able to predict, and does a repository hold what is to be
submitted.
"""

import re
import subprocess
import sys
import tempfile
from pathlib import Path

from lib.audit import finding
from lib.checkpoint import load_model
from lib.command import BadInput, last_line
from lib.files import file_digest, read_csv, read_json
from lib.report.handover import RUN_FILES, SUMS, read_wheels, tracked_files
from lib.rundir import REPOSITORY

PARTS = (
    "run.sh",
    "verify.py",
    "stick.json",
    "expected.csv",
    "packages.csv",
    "MODEL_CARD.md",
    "wheels/requirements.txt",
)
PARTS += ("code/inference.py", "code/config.yaml", *(f"model/{name}" for name in RUN_FILES))
# ours: that of a changed folder may say anything
VERIFY = REPOSITORY / "jobs" / "stick" / "verify.py"
SLURM = re.compile(r"(?m)^#SBATCH |\bSLURM_[A-Z]")  # what only a job knows
IMAGE = re.compile(r"!\[[^\]]*\]\(\s*<?([^)>\s]+)|<img\s[^>]*src=[\"']?([^\"'\s>]+)")
SECONDS = 300


def judge(check: str, missing: str, evidence: str, advice: str = "", rows=()) -> dict:
    """A finding: an error that says what is missing, or a note with the evidence."""
    return finding(
        check,
        "error" if missing else "note",
        missing or evidence,
        advice=advice if missing else "",
        rows=rows,
    )


def run_python(*arguments, folder=None) -> subprocess.CompletedProcess:
    """A Python program run to its end, nothing written beside it."""
    command = [sys.executable, "-B", *map(str, arguments)]
    try:
        return subprocess.run(
            command, capture_output=True, text=True, cwd=folder, timeout=SECONDS, check=False
        )
    except subprocess.TimeoutExpired:
        return subprocess.CompletedProcess(
            command, 1, "", f"error: it did not end within {SECONDS} s"
        )


def audit_folder(folder: Path) -> list[dict]:
    """Findings on a handover folder: its files, then, where these are as written, what they can
    do.
    """
    verified = run_python(VERIFY, "--stick", folder)
    wrong = [
        {"file": line}
        for line in verified.stderr.splitlines()
        if re.match("changed|missing|additional", line)
    ]
    told = last_line(verified.stderr).removeprefix("error: ")
    evidence = (
        f"{told}; {SUMS} has SHA-256 {file_digest(folder / SUMS)}"
        if (folder / SUMS).is_file()
        else told
    )
    findings = [
        judge(
            "files",
            told if verified.returncode else "",
            evidence,
            "write the handover again",
            wrong,
        )
    ]
    lacking = [{"file": name} for name in PARTS if not (folder / name).is_file()]
    findings.append(
        judge(
            "parts",
            f"{len(lacking)} parts are not there" * bool(lacking),
            f"{len(PARTS)} parts",
            rows=lacking,
        )
    )
    if verified.returncode or lacking:
        return findings
    made_for = read_json(folder / "stick.json")
    try:
        packages = read_wheels(folder / "wheels", made_for["machine"], made_for["python"])
        listed = [
            (row["package"], row["version"], row["licence"])
            for row in read_csv(folder / "packages.csv")
        ]
        found = [(row["package"], row["version"], row["licence"]) for row in packages]
        unequal = "" if listed == found else "packages.csv does not list what is in wheels/"
        size = (
            f"{len(found)} packages, {sum(row['bytes'] for row in packages):,} bytes, for"
            f" {made_for['platform']}"
        )
    except BadInput as error:
        unequal, size = str(error), ""
    findings.append(judge("packages and licences", unequal, size))
    card, digest = (
        (folder / "MODEL_CARD.md").read_text(encoding="utf-8"),
        file_digest(folder / "model" / "best.pt"),
    )
    auc = f"{read_json(folder / 'model' / 'summary.json')['val_auc']:.4f}"
    off = (
        ""
        if digest in card and auc in card
        else f"it does not hold the checkpoint's SHA-256 {digest} and AUC {auc}"
    )
    findings.append(judge("model card", off, f"of the checkpoint {digest[:12]}, AUC {auc}"))
    with tempfile.TemporaryDirectory() as scratch:
        command = (
            folder.resolve() / "code/inference.py",
            "--ckpt",
            folder.resolve() / "model",
            folder.resolve() / "patches",
        )
        predicted = run_python(*command, "--device", "cpu", "--out", "p.csv", folder=scratch)
        verify = (VERIFY, "--stick", folder, "--predictions", Path(scratch, "p.csv"))
        compared = predicted if predicted.returncode else run_python(*verify)
    told = last_line(compared.stdout if not compared.returncode else compared.stderr)
    findings.append(judge("expected predictions", told if compared.returncode else "", told))
    return findings


def slurm_scripts(folder: Path, names) -> list[str]:
    """Those of `names` that are job scripts: shell that speaks to Slurm."""
    scripts = [name for name in names if name.endswith((".sh", ".sbatch", ".slurm", ".job"))]
    return [name for name in scripts if SLURM.search((folder / name).read_text(errors="replace"))]


def audit_checklist(folder: Path) -> list[dict]:
    """A finding for each item of the submission checklist, on a repository or on the copy of
    one.
    """
    is_own = folder.resolve() == REPOSITORY  # what is tracked; of a copy, all that it holds
    names = (
        tracked_files()
        if is_own
        else [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
    )
    shown = [name for name in names if name in ("README.md", "JOURNAL.md")]
    texts = {name: (folder / name).read_text(encoding="utf-8", errors="replace") for name in shown}
    journal = texts.get("JOURNAL.md", "")
    front = re.split(r"(?m)^(?:#+ |\*\*)1\b", journal)[0]  # up to section 1
    no_journal = "" if journal else "there is no JOURNAL.md yet"
    advice = "make journal"

    link = re.search(r"(?im)^.*repository.*?((?:https?://|git@)\S+)", front)
    told = no_journal or ("" if link else "no link to it on the front page")
    findings = [judge("repository linked", told, link[1] if link else "", advice)]

    checkpoint, champion = "assets/champion/best.pt", folder / "assets" / "champion"
    try:
        load_model(champion)
        absent = "" if checkpoint in names else f"{checkpoint} is not tracked"
    except BadInput as error:
        absent = str(error)
    digest = "" if absent else f"{checkpoint}, SHA-256 {file_digest(folder / checkpoint)}"
    findings.append(judge("best checkpoint", absent, digest, "sweep.py champion"))

    with tempfile.TemporaryDirectory() as scratch:
        sizes = ("--train", 0, "--valid", 0, "--test", 8)
        drawn = run_python(
            REPOSITORY / "prepare.py", "synthetic", "--to", "pcam", *sizes, folder=scratch
        )
        command = (
            folder.resolve() / "inference.py",
            "--ckpt",
            champion.resolve(),
            "pcam",
            "--split",
            "test",
        )
        predicted = run_python(*command, folder=scratch) if not drawn.returncode else drawn
    told = last_line(predicted.stderr) if predicted.returncode else ""
    findings.append(judge("inference.py works", told, "8 drawn patches predicted"))

    scripts = slurm_scripts(folder, names)
    beside = (path.relative_to(folder).as_posix() for path in folder.glob("jobs/**/*"))
    on_disk = slurm_scripts(
        folder, (name for name in beside if not name.startswith("jobs/snapshots/"))
    )
    left_out = [{"file": name} for name in on_disk if name not in names]
    told = (
        f"{len(left_out)} are not tracked"
        if left_out
        else ""
        if scripts
        else "no shell script that speaks to Slurm"
    )
    findings.append(
        judge("every Slurm script", told, ", ".join(scripts), "git add jobs/", left_out)
    )

    images = [
        {"text": name, "image": a or b}
        for name, text in texts.items()
        for a, b in IMAGE.findall(text)
    ]
    wrong = [
        row for row in images if not row["image"].startswith("assets/") or row["image"] not in names
    ]
    told = no_journal or (
        f"{len(wrong)} of {len(images)} are elsewhere, or not there" if wrong else ""
    )
    findings.append(judge("images under assets/", told, f"{len(images)} images", advice, wrong))

    members = re.findall(r"(?i)[^\W\d]{2,}[^\n|,;]*?\b(\d{4,})\b", front.partition("Members")[2])
    told = no_journal or ("" if members else "no member with a number after `Members`")
    findings.append(judge("names and ids", told, f"{len(members)} members with an id", advice))
    if "to be filled in" in front or "to-be-filled-in" in front:
        measured = (
            "names, ids or the link of the front page are still to be filled in, in journal.yaml"
        )
        findings.append(
            finding("front page", "warning", measured, advice="fill them in, then make journal")
        )
    return findings
