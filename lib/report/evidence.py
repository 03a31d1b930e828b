"""The files that a journal shows: read from its folder, each noted with its SHA-256; and whether
what is shown together is of one checkpoint, one code and one data set.
"""

import functools
from pathlib import Path

from lib import rundir
from lib.command import BadInput
from lib.config import read_yaml
from lib.evidence import BY_NAME, NUM_SEEDS, command_of, find_evidence, find_origin, weights_of
from lib.files import file_digest, read_csv, read_json
from lib.report.runs import UNREADABLE, differing, group_seeds, list_runs, read_run

CHAMPION = "assets/champion"
NUM_DIGITS = 12  # of a SHA-256 that is shown
# a journal asks for the same files and commits many times
git = functools.cache(rundir.git)


class Missing(Exception):
    """What is not there yet, in words that end with the command that makes it."""


class Evidence:
    """The files below the folder of a journal.

    `choices` has the folders of each piece of evidence that the journal names, relative to the
    root; `sources` the SHA-256 of each file that was read.
    """

    def __init__(self, root: Path):
        self.root = root
        self.choices: dict[str, list[str]] = {}
        self.sources: dict[str, str] = {}

    def find(self, name: str) -> list[str]:
        """The folders of a piece of evidence: those that the journal names, else the only ones.
        Raises Missing where there are none, or several to choose from.
        """
        if name in self.choices:
            return self.choices[name]
        if name == "seeds":
            runs_dir = self.root / "runs"
            groups = group_seeds(list_runs(runs_dir)) if runs_dir.is_dir() else []
            groups = [group for group in groups if len(group) >= NUM_SEEDS]
            candidates = [[f"runs/{row['run']}" for row in group] for group in groups]
        else:
            folders = find_evidence(self.root, name)
            candidates = [[str(folder.relative_to(self.root))] for folder in folders]
        if not candidates:
            command = command_of(self.root, name)
            raise Missing(f"this needs {BY_NAME[name].what}: run `{command}`")
        if len(candidates) > 1:
            choice = "; or ".join(map(" ".join, candidates))
            raise Missing(f"a directive must name which {name} it shows: {choice}")
        self.choices[name] = candidates[0]
        return candidates[0]

    def path(self, name: str) -> Path:
        """The path of a file, noted as a source. The first part of its name may be that of a piece
        of evidence. Raises Missing where the file is not there.
        """
        first, _, rest = name.partition("/")
        if rest and first in BY_NAME:
            name = f"{self.find(first)[0]}/{rest}"
        path = self.root / name
        if not path.is_file():
            raise Missing(f"{name} is not here")
        self.sources[name] = file_digest(path)
        return path

    def document(self, name: str):
        """The content of a CSV, YAML or JSON file."""
        path = self.path(name)
        readers = {".csv": read_csv, ".yaml": read_yaml}
        return readers.get(path.suffix, read_json)(path)

    def run(self, folder: str) -> dict:
        """A finished run as `read_run` gives it."""
        for name in ("config.yaml", "meta.json", "summary.json"):
            self.path(f"{folder}/{name}")
        return read_run(self.root / folder)

    def commit(self, file: str = "") -> str:
        """The commit whose code is quoted: that of the seeds' runs, else of the repository. Raises
        BadInput where a run had uncommitted changes of the file.
        """
        commits = []
        for run in self.choices.get("seeds", ()):
            meta = read_json(self.path(f"{run}/meta.json"))
            if f"diff --git a/{file} " in (meta.get("uncommitted_patch") or ""):
                raise BadInput(f"{run} was trained with uncommitted changes of {file}")
            commits.append(meta.get("commit"))
        return next(filter(None, commits), git("rev-parse", "HEAD").strip())

    def check(self) -> list[str]:
        """A sentence for each way in which the files that were read do not belong together."""
        seeds = self.choices.get("seeds", [])
        champion = self.choices.get("champion", [CHAMPION])[0]
        folders = sorted({name.rpartition("/")[0] for name in self.sources})
        audits = [folder for folder in folders if (self.root / folder / "scores.json").is_file()]
        is_shown = champion in folders or bool(audits)
        problems = []
        rows = []
        for run in [*seeds, champion] if is_shown else seeds:
            row = read_run(self.root / run)
            if not row:
                problems.append(f"there is no run {run}")
            elif not find_origin(self.root / run, self.root / "runs"):
                problems.append(f"{run} is of no run in runs/, so it is another team's")
            rows.append(row | {"run": run})
        problems += differing(rows, "data")
        for folder in folders:
            try:
                if folder in audits:
                    problems += self.check_model_audit(f"{folder}/scores.json", champion)
                elif folder.startswith("sweeps/") and is_shown:
                    problems += self.check_search(folder, champion)
            except UNREADABLE as error:
                problems.append(f"{folder} cannot be compared: {error!r}")
        return problems

    def check_model_audit(self, name: str, champion: str) -> list[str]:
        """Whether an audit of a model is of the champion, and on its data."""
        scores = read_json(self.root / name)
        problems = []
        if file_digest(self.root / champion / "best.pt") != scores["checkpoint"]["sha256"]:
            command = command_of(self.root, "model-audit")
            checkpoint = f"another checkpoint than {champion}/best.pt"
            problems.append(f"{name} is an audit of {checkpoint}: run `{command}`")
        trained_on = read_json(self.root / champion / "meta.json").get("data") or {}
        for file, digest in scores["data"]["sha256"].items():
            if trained_on.get(file, digest) != digest:
                problems.append(f"{name} is of another {file} than {champion} has seen")
        return problems

    def check_search(self, folder: str, champion: str) -> list[str]:
        """Whether a search is finished, and the champion is the run that it has chosen. A journal
        that names its champion may hand in another one.
        """
        path = self.root / folder / "champion.json"
        if not path.is_file():
            return [f"{folder} is not finished: sweep.py champion {Path(folder).name}"]
        run = read_json(path)["run"]
        if not run or champion != CHAMPION:  # no trial beats the base, or the team has chosen
            return []
        if weights_of(self.root / run) == weights_of(self.root / champion):
            return []
        remedy = f"make champion RUN={run}, or name the run: table champion RUN"
        return [f"{champion} is not {run}, which {folder} has chosen: {remedy}"]
