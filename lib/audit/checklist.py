"""Is a handover folder whole and able to predict, and does a repository hold what is to be
submitted.
"""

import re
import tempfile
from pathlib import Path

from lib.audit import finding
from lib.bundle import RUN_FILES, SUMS, predict_samples, read_wheels, tracked_files
from lib.checkpoint import load_checkpoint, load_model
from lib.command import EXIT_DONE, EXIT_FINDING, REPOSITORY, BadInput, run_script
from lib.evidence import list_missing
from lib.files import file_digest, read_json

PARTS = (
    "run.sh",
    "verify.py",
    "stick.json",
    "expected.csv",
    "packages.csv",
    "MODEL_CARD.md",
    "wheels/requirements.txt",
    "code/inference.py",
    "code/config.yaml",
    *(f"model/{name}" for name in RUN_FILES),
)
# ours: that of a changed folder may say anything
VERIFY = REPOSITORY / "jobs" / "stick" / "verify.py"
SLURM = re.compile(r"(?m)^#SBATCH |\bSLURM_[A-Z]")  # what only a job knows
SHELL = (".sh", ".sbatch", ".slurm", ".job")
IMAGE = re.compile(r"!\[[^\]]*\]\(\s*<?([^)>\s]+)|<img\s[^>]*src=[\"']?([^\"'\s>]+)")
LINK = re.compile(r"(?im)^.*repository.*?((?:https?://|git@)\S+)")
MEMBER = re.compile(r"(?i)[^\W\d]{2,}[^\n|,;]*?\b[a-z]{0,2}\d{4,}\b")  # a name, and s1234567
PLACEHOLDER = re.compile(
    r"(?i)to[- ]be[- ]filled|\b(?:todo|tbd|x{3,}|0{4,}|your|example\.(?:org|com))\b|<[^>]*\bname\b"
)
SECONDS = 300
CHAMPION = "assets/champion"
# the weights that this program comes with: those of a team are others
SHIPPED_CHAMPION = "35d5954f64d6f076c38f6529d834f6f9666dca10912ea3623a5f6d789ee253c1"


class Lacking(BadInput):
    """An item that is not as it must be, because of some files."""

    def __init__(self, text: str, files=()):
        super().__init__(text)
        self.rows = [{"file": name} for name in files]


def judge(check: str, advice: str, function, *arguments) -> dict:
    """A finding: a note with the evidence that a function returns, or an error where it raises
    BadInput.
    """
    try:
        return finding(check, "note", function(*arguments))
    except BadInput as error:
        return finding(check, "error", str(error), "", advice, getattr(error, "rows", ()))


def verify(folder: Path, *arguments) -> dict:
    """What verify.py prints of a bundle. Raises Lacking where something is wrong with it."""
    codes = (EXIT_DONE, EXIT_FINDING)
    result = run_script(VERIFY, "--stick", folder, *arguments, codes=codes, timeout_s=SECONDS)
    if "error" in result:
        kinds = ("changed", "missing", "additional")
        files = [f"{kind}: {name}" for kind in kinds for name in result.get(kind, ())]
        raise Lacking(result["error"], files)
    return result


def check_files(folder: Path) -> str:
    verified = verify(folder)
    sums = f"{SUMS} has SHA-256 {verified['sha256sums']}"
    return f"{verified['num_files']} files are as they were written; {sums}"


def check_parts(folder: Path) -> str:
    lacking = [name for name in PARTS if not (folder / name).is_file()]
    if lacking:
        raise Lacking(f"{len(lacking)} parts are not there", lacking)
    return f"{len(PARTS)} parts"


def check_packages(folder: Path) -> str:
    made_for = read_json(folder / "stick.json")
    packages = read_wheels(folder / "wheels", made_for["machine"], made_for["python"])
    num_bytes = sum(package["bytes"] for package in packages)
    return f"{len(packages)} packages, {num_bytes:,} bytes, for {made_for['platform']}"


def check_card(folder: Path) -> str:
    card = (folder / "MODEL_CARD.md").read_text(encoding="utf-8")
    digest = file_digest(folder / "model" / "best.pt")
    if digest not in card:
        raise BadInput(f"it does not hold the checkpoint's SHA-256 {digest}")
    return f"of the checkpoint {digest[:12]}"


def check_samples(folder: Path) -> str:
    with tempfile.TemporaryDirectory() as scratch:
        predictions = Path(scratch, "predictions.csv")
        predict_samples(folder, predictions, SECONDS)
        compared = verify(folder, "--predictions", predictions)
    return f"{compared['num_patches']} probabilities are within {compared['tolerance']:g}"


def audit_folder(folder: Path) -> list[dict]:
    """Findings on a bundle: its files, then, where these are as written, what they can do."""
    findings = []
    for checks in (
        {"files": check_files, "parts": check_parts},
        {
            "packages and licences": check_packages,
            "model card": check_card,
            "expected predictions": check_samples,
        },
    ):
        if all(row["severity"] != "error" for row in findings):
            for name, check in checks.items():
                findings.append(judge(name, "write the handover again", check, folder))
    return findings


def check_champion(folder: Path, names) -> str:
    checkpoint = f"{CHAMPION}/best.pt"
    load_model(folder / CHAMPION)
    if checkpoint not in names:
        raise BadInput(f"{checkpoint} is not tracked")
    if load_checkpoint(folder / checkpoint)["weights_sha256"] == SHIPPED_CHAMPION:
        raise BadInput(f"{checkpoint} is the one that this program comes with")
    return f"{checkpoint}, SHA-256 {file_digest(folder / checkpoint)}"


def check_inference(folder: Path) -> str:
    with tempfile.TemporaryDirectory() as scratch:
        data = Path(scratch, "pcam")
        folder = folder.resolve()
        sizes = ("--train", 0, "--valid", 0, "--test", 8)
        run_script("prepare.py", "synthetic", "--to", data, *sizes, timeout_s=SECONDS)
        inputs = ("--ckpt", folder / CHAMPION, data, "--split", "test")
        out = Path(scratch, "predictions.csv")
        run_script(folder / "inference.py", *inputs, "--out", out, timeout_s=SECONDS)
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
        raise Lacking(f"{len(left_out)} are not tracked", left_out)
    if not scripts:
        raise BadInput("no shell script that speaks to Slurm")
    return ", ".join(scripts)


def front_page(texts: dict[str, str]) -> str:
    """The journal up to its section 1. Raises BadInput without a journal."""
    if "JOURNAL.md" not in texts:
        raise BadInput("there is no JOURNAL.md yet")
    return re.split(r"(?m)^(?:#+ |\*\*)1\b", texts["JOURNAL.md"])[0]


def check_link(texts: dict[str, str]) -> str:
    link = LINK.search(front_page(texts))
    if not link or PLACEHOLDER.search(link[1]):
        raise BadInput(f"no link to it on the front page{f', {link[1]} is none' if link else ''}")
    return link[1]


def check_images(texts: dict[str, str], names) -> str:
    front_page(texts)
    images = []
    for text in texts.values():
        images += [markdown or html for markdown, html in IMAGE.findall(text)]
    wrong = [name for name in images if not name.startswith("assets/") or name not in names]
    if wrong:
        raise Lacking(
            f"{len(wrong)} of {len(images)} are elsewhere, or git does not track them", wrong
        )
    return f"{len(images)} images"


def check_members(texts: dict[str, str]) -> str:
    members = MEMBER.findall(front_page(texts).partition("Members")[2])
    if not members or PLACEHOLDER.search(" ".join(members)):
        raise BadInput("names with numbers are missing after `Members` on the front page")
    return f"{len(members)} members with an id"


def audit_checklist(folder: Path) -> list[dict]:
    """A finding for each item of the submission checklist, on a repository or on the copy of
    one.
    """
    if folder.resolve() == REPOSITORY:
        names = tracked_files()
    else:  # of a copy, all that it holds
        paths = [path for path in folder.rglob("*") if path.is_file()]
        names = [path.relative_to(folder).as_posix() for path in paths]
    texts = {}
    for name in ("README.md", "JOURNAL.md"):
        if (folder / name).is_file():
            texts[name] = (folder / name).read_text(encoding="utf-8", errors="replace")
    journal = "JOURNAL.md"
    findings = [
        judge("repository linked", journal, check_link, texts),
        judge("best checkpoint", "make champion RUN=runs/RUN", check_champion, folder, names),
        judge("inference.py works", "", check_inference, folder),
        judge("every Slurm script", "git add jobs/", check_scripts, folder, names),
        judge("images under assets/", journal, check_images, texts, names),
        judge("names and ids", journal, check_members, texts),
    ]
    if journal in texts and journal not in names:
        advice = "git add -f JOURNAL.md assets/journal"
        findings.append(finding("journal", "warning", "git does not track it", advice=advice))
    missing = list_missing(folder)
    measured = f"{len(missing)} pieces of evidence for the journal are missing"
    commands = "; ".join(row["command"] for row in missing)
    severity = "warning" if missing else "note"
    findings.append(finding("evidence", severity, measured, advice=commands, rows=missing))
    return findings
