"""The evidence that the journal, JOURNAL.md, needs: where each piece lies in a checkout, and which
command makes it.
"""

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

from lib.config import read_yaml
from lib.files import read_cache

NUM_SEEDS = 3
# audits of some checks alone
NO_EVIDENCE = re.compile(r"^audit-(groups|part)-")


@dataclass(frozen=True)
class Evidence:
    """A piece of evidence: its short name in a directive, what it is, a pattern of the file that
    shows it, the command that makes it, and the questions of the journal that it answers.
    """

    name: str
    what: str
    pattern: str
    command: str
    questions: str


EVIDENCE = [
    Evidence(
        "twin",
        "a comparison of two equal trainings",
        "audit-*/twin.html",
        "make twin DATA=data/pcam",
        "1",
    ),
    Evidence(
        "data-audit",
        "an audit of the data",
        "audit-*/quarantine.csv",
        "make audit DATA=data/pcam",
        "2",
    ),
    Evidence(
        "seeds",
        "three finished runs that differ in the seed alone",
        "runs/*/summary.json",
        "make seeds SEEDS=1,2,3 DATA=data/pcam",
        "3, 4, 5.1",
    ),
    Evidence(
        "search",
        "a finished search",
        "sweeps/*/champion.json",
        "make sweep SPACE=assets/space.yaml DATA=data/pcam",
        "5.2",
    ),
    Evidence(
        "champion",
        "a champion from a run of this checkout",
        "assets/champion/summary.json",
        "make champion RUN=sweeps/NAME",
        "5.2",
    ),
    Evidence(
        "model-audit",
        "an audit of the champion",
        "audit-*/scores.json",
        "make audit-model DATA=data/pcam",
        "5.2, 6",
    ),
    Evidence(
        "benchmark",
        "a benchmark",
        "bench/*/benchmark.json",
        "make bench PARTITION=thin_course DATA=data/pcam",
        "8",
    ),
]
BY_NAME = {piece.name: piece for piece in EVIDENCE}


def find_evidence(root: Path, name: str) -> list[Path]:
    """The folders below `root` that hold a piece of evidence, in order.

    A champion that no run of this checkout has trained does not count. Neither does an audit of a
    part, a self-test of the comparison of twins, nor a second run with the seed of another.
    """
    folders = sorted(path.parent for path in root.glob(BY_NAME[name].pattern))
    if name == "twin":
        folders = [folder for folder in folders if not holds_self_test(folder)]
    if name == "champion":
        folders = [folder for folder in folders if find_origin(folder, root / "runs")]
    if name == "seeds":
        # a name ends like -s1-4239
        seeds = {folder.name.rpartition("-s")[2].partition("-")[0]: folder for folder in folders}
        folders = sorted(seeds.values())
    return [folder for folder in folders if not NO_EVIDENCE.search(folder.name)]


def holds_self_test(folder: Path) -> bool:
    """Whether a comparison of twins is a self-test with a planted fault."""
    path = folder / "findings.json"
    return path.is_file() and '"self-test"' in path.read_text()


def find_origin(folder: Path, runs_dir: Path) -> Path | None:
    """The run in `runs_dir` whose final weights a run folder holds; None where there is none."""
    digest = weights_of(folder)
    for path in sorted(runs_dir.glob("*/summary.json")):
        if digest and weights_of(path.parent) == digest:
            return path.parent
    return None


def weights_of(run: Path) -> str:
    """`weights_sha256` of a finished run; empty for a run that is not finished."""
    return read_cache(run / "summary.json").get("weights_sha256") or ""


def command_of(root: Path, name: str) -> str:
    """The command that makes a piece of evidence, on the data of the newest run of `root`."""
    configs = sorted(root.glob("runs/*/config.yaml"))
    data_dir = read_yaml(configs[-1]).get("data_dir") if configs else None
    return BY_NAME[name].command.replace("data/pcam", shlex.quote(data_dir or "data/pcam"))


def list_evidence(root: Path) -> list[dict]:
    """A row for each piece of evidence: evidence, questions, and its newest folder in `root`, or
    the command that makes it.
    """
    rows = []
    for piece in EVIDENCE:
        folders = find_evidence(root, piece.name)
        row = {"questions": piece.questions, "evidence": piece.what}
        if len(folders) < (NUM_SEEDS if piece.name == "seeds" else 1):
            row["command"] = command_of(root, piece.name)
        else:
            row["folder"] = str(folders[-1].relative_to(root))
        rows.append(row)
    return rows


def list_missing(root: Path) -> list[dict]:
    """The rows of the evidence that `root` lacks."""
    return [row for row in list_evidence(root) if "command" in row]
