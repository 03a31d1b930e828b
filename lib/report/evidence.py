"""The files that a journal shows: read from its folder, each noted with its SHA-256; and whether
what is shown together is of one checkout, one model, one code and one data set.
"""

import functools
import json
from pathlib import Path

from lib import rundir
from lib.command import BadInput, one_line
from lib.config import read_yaml
from lib.evidence import (
    BY_NAME,
    NUM_SEEDS,
    command_of,
    find_evidence,
    find_origin,
    weights_of,
)
from lib.files import file_digest, read_csv, read_json
from lib.report.runs import UNREADABLE, differing, group_seeds, list_runs, read_run

CHAMPION = "assets/champion"
NUM_DIGITS = 12  # of a SHA-256 that is shown
# a journal asks for the same files and commits many times
git = functools.cache(rundir.git)


class Missing(Exception):
    """What is not there yet, in words that end with the command that makes it."""


class Evidence:
    """The files below the folder of a journal, its runs of several seeds and its champion.

    `sources` has the SHA-256 of each file that was read.
    """

    def __init__(self, root: Path):
        self.root = root
        self.seeds: list[str] = []  # folders, relative to the root
        self.champion = CHAMPION
        self.folders: dict[str, str] = {}  # of other evidence, where the journal names them
        self.sources: dict[str, str] = {}

    # files

    def path(self, name: str) -> Path:
        """The path of a file, noted as a source. Raises Missing where it is not there."""
        path = self.root / name
        if not path.is_file():
            raise Missing(f"{name} is not here")
        self.sources[name] = file_digest(path)
        return path

    def digests(self, names) -> str:
        """The files with the first digits of their SHA-256, as it stands in a drawn figure."""
        return ", ".join(f"{name} {file_digest(self.path(name))[:NUM_DIGITS]}" for name in names)

    def csv(self, name: str) -> list[dict[str, str]]:
        return read_csv(self.path(name))

    def document(self, name: str):
        """The content of a JSON or YAML file."""
        path = self.path(name)
        is_yaml = path.suffix in (".yaml", ".yml")
        return read_yaml(path) if is_yaml else json.loads(path.read_text(encoding="utf-8"))

    def run(self, folder: str) -> dict:
        """A finished run as `read_run` gives it."""
        for name in ("config.yaml", "meta.json", "summary.json"):
            self.path(f"{folder}/{name}")
        return read_run(self.root / folder)

    # which files are meant

    def missing(self, name: str, reason: str = "") -> Missing:
        """What to say of a piece of evidence that is not there."""
        reason = reason or f"this needs {BY_NAME[name].what}"
        return Missing(f"{reason}: run `{command_of(self.root, name)}`")

    def resolve(self, name: str) -> str:
        """A file by its path, whose first part may be a name of EVIDENCE: that stands for the one
        folder that holds it. Raises Missing where there is none, or several to choose from.
        """
        first, _, rest = name.partition("/")
        if first not in BY_NAME or not rest:
            return name
        if first == "seeds":
            folders = self.find_seeds()[:1]
        elif first == "champion":
            folders = [self.find_champion()]
        elif first in self.folders:
            folders = [self.folders[first]]
        else:
            folders = [path.relative_to(self.root) for path in find_evidence(self.root, first)]
        files = [f"{folder}/{rest}" for folder in folders]
        if not files:
            raise self.missing(first)
        if len(files) > 1:
            raise Missing(f"the directive must name one file of {', '.join(files)}")
        return files[0]

    def find_seeds(self) -> list[str]:
        """The runs of several seeds that the journal names; else the one set of them in runs/."""
        if self.seeds:
            return self.seeds
        runs_dir = self.root / "runs"
        rows = list_runs(runs_dir) if runs_dir.is_dir() else []
        choices = []
        for group in group_seeds(rows):
            if len(group) >= NUM_SEEDS:
                choices.append([f"runs/{row['run']}" for row in group])
        if not choices:
            raise self.missing("seeds")
        if len(choices) > 1:
            choice = "; or ".join(map(" ".join, choices))
            raise Missing(f"the directive `seeds` must name its runs: {choice}")
        self.seeds = choices[0]
        return self.seeds

    def find_champion(self) -> str:
        """The folder of the champion. Raises Missing where there is none of this checkout."""
        if not (self.root / self.champion / "summary.json").is_file():
            raise self.missing("champion")
        foreign = self.why_foreign(self.champion)
        if foreign:
            raise self.missing("champion", foreign)
        return self.champion

    def why_foreign(self, run: str) -> str:
        """A sentence where no run in runs/ has the weights of a run; else empty."""
        if run.startswith("runs/") or find_origin(self.root / run, self.root / "runs"):
            return ""
        return f"{run} is of no run in runs/, so it is another team's"

    def commit(self) -> str:
        """The commit whose code is quoted: that of the seeds' runs, else of the repository."""
        for run in self.seeds:
            commit = read_json(self.path(f"{run}/meta.json")).get("commit")
            if commit:
                return commit
        return git("rev-parse", "HEAD").strip()

    def require_unpatched(self, file: str) -> None:
        """Raise BadInput where a run of the seeds had uncommitted changes of a file of the code."""
        for run in self.seeds:
            patch = read_json(self.path(f"{run}/meta.json")).get("uncommitted_patch") or ""
            if f"diff --git a/{file} " in patch:
                raise BadInput(f"{run} was trained with uncommitted changes of {file}")

    # whether they belong together

    def check(self) -> list[str]:
        """A sentence for each way in which the files that were read do not belong together."""
        rows = []
        problems = []
        for run in self.seeds:
            row = read_run(self.root / run)
            problem = self.why_foreign(run) if row else f"there is no run {run}"
            problems += filter(None, [problem])
            rows += filter(None, [row])
        problems += differing(rows, "code", "commit and patch")
        if self.champion != CHAMPION and (self.root / self.champion / "summary.json").is_file():
            problems += filter(None, [self.why_foreign(self.champion)])
        is_shown = any(name.startswith(f"{self.champion}/") for name in self.sources)
        if is_shown:
            rows += filter(None, [read_run(self.root / self.champion)])
        problems += differing(rows, "data", "data")
        for name in self.sources:
            try:
                if name.endswith("/scores.json"):
                    problems += self.check_model_audit(name)
                elif name.startswith("sweeps/") and is_shown:
                    problems += self.check_search(name.rpartition("/")[0])
            except UNREADABLE as error:
                problems.append(f"{name} cannot be compared: {one_line(error)}")
        return list(dict.fromkeys(problems))

    def check_model_audit(self, name: str) -> list[str]:
        """Whether an audit of a model is of the champion, and on its data."""
        scores = read_json(self.root / name)
        champion = self.root / self.champion
        problems = []
        if file_digest(champion / "best.pt") != scores["checkpoint"]["sha256"]:
            problems.append(
                f"{name} is an audit of another checkpoint than {self.champion}/best.pt: run"
                f" `{command_of(self.root, 'model-audit')}`"
            )
        trained_on = read_json(champion / "meta.json").get("data") or {}
        for file, digest in scores["data"]["sha256"].items():
            if trained_on.get(file, digest) != digest:
                problems.append(f"{name} is of another {file} than {self.champion} has seen")
        return problems

    def check_search(self, folder: str) -> list[str]:
        """Whether a search is finished, and the champion is the run that it has chosen. A journal
        that names its champion may hand in another one.
        """
        path = self.root / folder / "champion.json"
        if not path.is_file():
            return [f"{folder} is not finished: sweep.py champion {Path(folder).name}"]
        run = read_json(path)["run"]
        if not run:  # no trial beats the base, nor the constant answers
            return []
        is_named = self.champion != CHAMPION
        if is_named or weights_of(self.root / run) == weights_of(self.root / self.champion):
            return []
        return [
            f"{self.champion} is not {run}, which {folder} has chosen: make champion RUN={run}, or"
            " name the run: table champion RUN"
        ]
