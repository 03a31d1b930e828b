"""Is a handover folder whole and able to predict, and does a repository hold what is to be
submitted.
"""

import re
import tempfile
from pathlib import Path

from lib.audit import finding
from lib.bundle import predict_samples, tracked_files
from lib.checkpoint import load_model
from lib.command import EXIT_DONE, EXIT_FINDING, REPOSITORY, BadInput, run_script
from lib.evidence import list_missing
from lib.files import file_digest

# ours: that of a changed folder may say anything
VERIFY = REPOSITORY / "jobs" / "stick" / "verify.py"
SLURM = re.compile(r"(?m)^#SBATCH |\bSLURM_[A-Z]")  # what only a job knows
SHELL = (".sh", ".sbatch", ".slurm", ".job")
IMAGE = re.compile(r"!\[[^\]]*\]\(\s*<?([^)>\s]+)")
LINK = re.compile(r"(?im)^.*repository.*?((?:https?://|git@)\S+)")
MEMBER = re.compile(r"(?i)[^\W\d]{2,}[^\n|,;]*?\b[a-z]{0,2}\d{4,}\b")  # a name, and s1234567
PLACEHOLDER = re.compile(
    r"(?i)to[- ]be[- ]filled|\b(?:todo|tbd|x{3,}|0{4,}|your|example\.(?:org|com))\b|<[^>]*\bname\b"
)
MOST_NAMED = 20  # files in a sentence
CHAMPION = "assets/champion"
# the weights that this program comes with: those of a team are others
SHIPPED_CHAMPION = "35d5954f64d6f076c38f6529d834f6f9666dca10912ea3623a5f6d789ee253c1"


def judge(check: str, advice: str, function, *arguments) -> dict:
    """A finding: a note with the evidence that a function returns, or an error where it raises
    BadInput.
    """
    try:
        return finding(check, "note", function(*arguments))
    except BadInput as error:
        return finding(check, "error", str(error), "", advice)


def verify(folder: Path, *arguments) -> dict:
    """What verify.py prints of a bundle. Raises BadInput where something is wrong with it."""
    codes = (EXIT_DONE, EXIT_FINDING)
    result = run_script(VERIFY, "--stick", folder, *arguments, codes=codes)
    if "error" in result:
        kinds = ("changed", "missing", "additional")
        names = [f"{kind}: {name}" for kind in kinds for name in result.get(kind, ())]
        raise BadInput("; ".join([result["error"], *names[:MOST_NAMED]]))
    return result


def check_files(folder: Path) -> str:
    verified = verify(folder)
    return f"{verified['num_files']} files are as written; SHA256SUMS is {verified['sha256sums']}"


def check_samples(folder: Path) -> str:
    with tempfile.TemporaryDirectory() as scratch:
        predictions = Path(scratch, "predictions.csv")
        predict_samples(folder, predictions)
        compared = verify(folder, "--predictions", predictions)
    return f"{compared['num_patches']} probabilities are within {compared['tolerance']:g}"


def audit_folder(folder: Path) -> list[dict]:
    """Findings on a bundle: its files, then, where these are as written, what they can do."""
    advice = "write the handover again"
    findings = [judge("files", advice, check_files, folder)]
    if findings[0]["severity"] != "error":
        findings.append(judge("expected predictions", advice, check_samples, folder))
    return findings


def check_champion(folder: Path, names) -> str:
    checkpoint = f"{CHAMPION}/best.pt"
    _, _, fields = load_model(folder / CHAMPION)
    if checkpoint not in names:
        raise BadInput(f"{checkpoint} is not tracked")
    if fields["weights_sha256"] == SHIPPED_CHAMPION:
        raise BadInput(f"{checkpoint} is the one that this program comes with")
    return f"{checkpoint}, SHA-256 {file_digest(folder / checkpoint)}"


def check_inference(folder: Path) -> str:
    with tempfile.TemporaryDirectory() as scratch:
        data = Path(scratch, "pcam")
        folder = folder.resolve()
        sizes = ("--train", 0, "--valid", 0, "--test", 8)
        run_script("prepare.py", "synthetic", "--to", data, *sizes)
        inputs = ("--ckpt", folder / CHAMPION, data, "--split", "test")
        out = Path(scratch, "predictions.csv")
        run_script(folder / "inference.py", *inputs, "--out", out)
    return "8 drawn patches predicted"


def check_scripts(folder: Path, names) -> str:
    """Scripts that speak to Slurm, tracked or below jobs/."""
    below = {path.relative_to(folder).as_posix() for path in folder.glob("jobs/**/*")}
    scripts = []
    for name in sorted(below.union(names)):
        is_script = name.endswith(SHELL) and not name.startswith("jobs/snapshots/")
        if is_script and SLURM.search((folder / name).read_text(errors="replace")):
            scripts.append(name)
    left_out = [name for name in scripts if name not in names]
    if left_out:
        raise BadInput(f"not tracked: {', '.join(left_out)}")
    if not scripts:
        raise BadInput("no shell script that speaks to Slurm")
    return ", ".join(scripts)


def find_filled(pattern: re.Pattern, text: str, what: str) -> str:
    """What a pattern finds in a text. Raises BadInput where that is nothing, or a placeholder."""
    matches = ", ".join(pattern.findall(text))
    if not matches or PLACEHOLDER.search(matches):
        raise BadInput(f"the front page of JOURNAL.md has no {what}")
    return matches


def check_images(journal: str, names) -> str:
    if "JOURNAL.md" not in names:
        raise BadInput("git tracks no JOURNAL.md: git add -f JOURNAL.md assets/journal")
    images = IMAGE.findall(journal)
    wrong = [name for name in images if not name.startswith("assets/") or name not in names]
    if wrong:
        raise BadInput(f"elsewhere, or git does not track them: {', '.join(wrong)}")
    return f"{len(images)} images"


def audit_checklist(folder: Path) -> list[dict]:
    """A finding for each item of the submission checklist, on a repository or on the copy of
    one.
    """
    if folder.resolve() == REPOSITORY:
        names = tracked_files()
    else:  # of a copy, all that it holds
        paths = [path for path in folder.rglob("*") if path.is_file()]
        names = [path.relative_to(folder).as_posix() for path in paths]
    path = folder / "JOURNAL.md"
    journal = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    front = re.split(r"(?m)^(?:#+ |\*\*)1\b", journal)[0]  # up to section 1
    members = front.partition("Members")[2]
    findings = [
        judge("repository linked", path.name, find_filled, LINK, front, "link to the repository"),
        judge("best checkpoint", "make champion RUN=runs/RUN", check_champion, folder, names),
        judge("inference.py works", "", check_inference, folder),
        judge("every Slurm script", "git add jobs/", check_scripts, folder, names),
        judge("images under assets/", path.name, check_images, journal, names),
        judge("names and ids", path.name, find_filled, MEMBER, members, "names with numbers"),
    ]
    missing = list_missing(folder)
    measured = f"{len(missing)} pieces of evidence for the journal are missing"
    severity = "warning" if missing else "note"
    findings.append(finding("evidence", severity, measured, advice="make assignment", rows=missing))
    return findings
