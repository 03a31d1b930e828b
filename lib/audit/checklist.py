"""Is a handover folder whole and able to predict, and does a repository hold what is to be
submitted.
"""

import re
import tempfile
from pathlib import Path

from lib.audit import finding
from lib.bundle import RUN_FILES, SUMS, predict_samples, read_wheels, tracked_files
from lib.checkpoint import load_model
from lib.command import EXIT_DONE, EXIT_FINDING, REPOSITORY, BadInput, run_script
from lib.evidence import list_missing
from lib.files import file_digest, read_csv, read_json

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
CHAMPION = "assets/champion"


def judge(check: str, missing: str, evidence: str, advice: str = "", rows=()) -> dict:
    """A finding: an error that says what is missing, or a note with the evidence."""
    return finding(
        check,
        "error" if missing else "note",
        missing or evidence,
        advice=advice if missing else "",
        rows=rows,
    )


def attempt(check, *arguments) -> tuple[str, str]:
    """(error, evidence) of a check that returns its evidence, or raises BadInput."""
    try:
        return "", check(*arguments)
    except BadInput as error:
        return str(error), ""


def verify(folder: Path, *arguments) -> dict:
    """What verify.py prints of a bundle; `error` is there where something is wrong with it."""
    codes = (EXIT_DONE, EXIT_FINDING)
    try:
        return run_script(VERIFY, "--stick", folder, *arguments, codes=codes, timeout_s=SECONDS)
    except BadInput as error:
        return {"error": str(error)}


def check_packages(folder: Path) -> str:
    made_for = read_json(folder / "stick.json")
    packages = read_wheels(folder / "wheels", made_for["machine"], made_for["python"])
    columns = ("package", "version", "licence")
    listed = [[row[name] for name in columns] for row in read_csv(folder / "packages.csv")]
    if listed != [[package[name] for name in columns] for package in packages]:
        raise BadInput("packages.csv does not list what is in wheels/")
    num_bytes = sum(package["bytes"] for package in packages)
    return f"{len(packages)} packages, {num_bytes:,} bytes, for {made_for['platform']}"


def check_card(folder: Path) -> str:
    card = (folder / "MODEL_CARD.md").read_text(encoding="utf-8")
    digest = file_digest(folder / "model" / "best.pt")
    auc = f"{read_json(folder / 'model' / 'summary.json')['val_auc']:.4f}"
    if digest not in card or auc not in card:
        raise BadInput(f"it does not hold the checkpoint's SHA-256 {digest} and AUC {auc}")
    return f"of the checkpoint {digest[:12]}, AUC {auc}"


def check_samples(folder: Path) -> str:
    with tempfile.TemporaryDirectory() as scratch:
        predictions = Path(scratch, "predictions.csv")
        predict_samples(folder, predictions, SECONDS)
        compared = verify(folder, "--predictions", predictions)
    if "error" in compared:
        raise BadInput(compared["error"])
    return f"{compared['num_patches']} probabilities are within {compared['tolerance']:g}"


def audit_folder(folder: Path) -> list[dict]:
    """Findings on a bundle: its files, then, where these are as written, what they can do."""
    verified = verify(folder)
    error = verified.get("error", "")
    evidence = (
        f"{verified.get('num_files')} files are as they were written; {SUMS} has SHA-256"
        f" {verified.get('sha256sums')}"
    )
    wrong = [
        {"file": f"{kind}: {name}"}
        for kind in ("changed", "missing", "additional")
        for name in verified.get(kind, ())
    ]
    findings = [judge("files", error, evidence, "write the handover again", wrong)]
    lacking = [{"file": name} for name in PARTS if not (folder / name).is_file()]
    absent = f"{len(lacking)} parts are not there" if lacking else ""
    findings.append(judge("parts", absent, f"{len(PARTS)} parts", rows=lacking))
    if error or lacking:
        return findings
    findings.append(judge("packages and licences", *attempt(check_packages, folder)))
    findings.append(judge("model card", *attempt(check_card, folder)))
    findings.append(judge("expected predictions", *attempt(check_samples, folder)))
    return findings


def check_champion(folder: Path, names) -> str:
    checkpoint = f"{CHAMPION}/best.pt"
    load_model(folder / CHAMPION)
    if checkpoint not in names:
        raise BadInput(f"{checkpoint} is not tracked")
    return f"{checkpoint}, SHA-256 {file_digest(folder / checkpoint)}"


def check_inference(folder: Path) -> str:
    with tempfile.TemporaryDirectory() as scratch:
        data, folder = Path(scratch, "pcam"), folder.resolve()
        sizes = ("--train", 0, "--valid", 0, "--test", 8)
        run_script("prepare.py", "synthetic", "--to", data, *sizes, timeout_s=SECONDS)
        inputs = ("--ckpt", folder / CHAMPION, data, "--split", "test")
        out = Path(scratch, "predictions.csv")
        run_script(folder / "inference.py", *inputs, "--out", out, timeout_s=SECONDS)
    return "8 drawn patches predicted"


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
    shown = [name for name in ("README.md", "JOURNAL.md") if (folder / name).is_file()]
    texts = {name: (folder / name).read_text(encoding="utf-8", errors="replace") for name in shown}
    journal = texts.get("JOURNAL.md", "")
    front = re.split(r"(?m)^(?:#+ |\*\*)1\b", journal)[0]  # up to section 1
    no_journal = "" if journal else "there is no JOURNAL.md yet"
    advice = "make journal"

    link = re.search(r"(?im)^.*repository.*?((?:https?://|git@)\S+)", front)
    told = no_journal or ("" if link else "no link to it on the front page")
    findings = [judge("repository linked", told, link[1] if link else "", advice)]

    outcome = attempt(check_champion, folder, names)
    findings.append(judge("best checkpoint", *outcome, "make champion RUN=runs/RUN"))
    findings.append(judge("inference.py works", *attempt(check_inference, folder)))

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
        measured = "names, ids or the link of JOURNAL.md are still to be filled in"
        findings.append(finding("front page", "warning", measured, advice="fill them in"))
    if journal and "JOURNAL.md" not in names:
        advice = "git add -f JOURNAL.md assets/journal"
        findings.append(finding("journal", "warning", "git does not track it", advice=advice))
    missing = list_missing(folder)
    measured = f"{len(missing)} pieces of evidence for the journal are missing"
    commands = "; ".join(row["command"] for row in missing)
    severity = "warning" if missing else "note"
    findings.append(finding("evidence", severity, measured, advice=commands, rows=missing))
    return findings
