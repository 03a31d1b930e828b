"""The files that a journal shows: read from its folder, each noted with its SHA-256; and whether
what is shown together is of one checkout, one model, one code and one data set.
"""

import json
from pathlib import Path

from lib.command import BadInput, one_line
from lib.config import read_yaml
from lib.evidence import BY_NAME, NUM_SEEDS, find_evidence, find_origin, weights_of
from lib.files import file_digest, read_csv, read_json
from lib.report.quotes import git
from lib.report.runs import differing, group_seeds, list_runs, read_run

CHAMPION = "assets/champion"
NUM_DIGITS = 12  # of a SHA-256 that is shown


class Missing(Exception):
    """What is not there yet, in words that end with the command that makes it."""


def missing(name: str) -> Missing:
    """What to say of a piece of evidence that is not there."""
    piece = BY_NAME[name]
    return Missing(f"this needs {piece.what}: run `{piece.command}`")


class Evidence:
    """The files below the folder of a journal, its runs of several seeds and its champion.

    `sources` has the SHA-256 of each file that was read; `problems` a sentence for each
    disagreement.
    """

    def __init__(self, root: Path):
        self.root = root
        self.seeds: list[str] = []  # folders, relative to the root
        self.champion = CHAMPION
        self.folders: dict[str, str] = {}  # of other evidence, where the journal names them
        self.sources: dict[str, str] = {}
        self.problems: list[str] = []

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
        texts = []
        for name in names:
            self.path(name)
            texts.append(f"{name} {self.sources[name][:NUM_DIGITS]}")
        return ", ".join(texts)

    def csv(self, name: str) -> list[dict[str, str]]:
        return read_csv(self.path(name))

    def document(self, name: str):
        """The content of a JSON or YAML file."""
        path = self.path(name)
        if path.suffix in (".yaml", ".yml"):
            return read_yaml(path)
        try:
            return json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise BadInput(f"{name} is not valid JSON: {error}") from None

    # which files are meant

    def resolve(self, name: str) -> str:
        """A file by its path, whose first part may be a name of EVIDENCE: that stands for the one
        folder that holds it. Raises Missing where there is none, or several to choose from.
        """
        first, _, rest = name.partition("/")
        if first not in BY_NAME:
            return name
        if first == "seeds":
            return f"{self.find_seeds()[0]}/{rest}"
        if first == "champion":
            return f"{self.find_champion()}/{rest}"
        if first in self.folders:
            return f"{self.folders[first]}/{rest}"
        folders = [path.relative_to(self.root) for path in find_evidence(self.root, first)]
        if not folders:
            raise missing(first)
        if len(folders) > 1:
            choice = ", ".join(f"{folder}/{rest}" for folder in folders)
            raise Missing(f"the directive must name one file of {choice}")
        return f"{folders[0]}/{rest}"

    def find_seeds(self) -> list[str]:
        """The runs of several seeds that the journal names; else the one set of them in runs/."""
        if self.seeds:
            return self.seeds
        runs_dir = self.root / "runs"
        rows = list_runs(runs_dir) if runs_dir.is_dir() else []
        groups = [group for group in group_seeds(rows) if len(group) >= NUM_SEEDS]
        if not groups:
            raise missing("seeds")
        if len(groups) > 1:
            choice = "; or ".join(
                " ".join(f"runs/{row['run']}" for row in group) for group in groups
            )
            raise Missing(f"the directive `seeds` must name its runs: {choice}")
        self.seeds = [f"runs/{row['run']}" for row in groups[0]]
        return self.seeds

    def find_champion(self) -> str:
        """The folder of the champion. Raises Missing where there is none of this checkout."""
        folder = self.root / self.champion
        if not (folder / "summary.json").is_file():
            raise missing("champion")
        if not find_origin(folder, self.root / "runs"):
            sentence = f"{self.champion} is of no run in runs/, so it is another team's"
            if self.champion != CHAMPION:
                self.problems.append(sentence)
            piece = BY_NAME["champion"]
            raise Missing(f"{sentence}: run `{piece.command}`")
        return self.champion

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
            if f"\ndiff --git a/{file} " in f"\n{patch}":
                raise BadInput(f"{run} was trained with uncommitted changes of {file}")

    # whether they belong together

    def check(self) -> list[str]:
        """A sentence for each way in which the files that were read do not belong together."""
        rows, problems = [], list(self.problems)
        for run in self.seeds:
            row = read_run(self.root / run)
            if not row:
                problems.append(f"there is no run {run}")
                continue
            rows.append(row)
            if not run.startswith("runs/") and not find_origin(self.root / run, self.root / "runs"):
                problems.append(f"{run} is of no run in runs/, so it is another team's")
        problems += differing(rows, "code", "commit and patch")
        is_shown = any(name.startswith(f"{self.champion}/") for name in self.sources)
        champion = self.root / self.champion
        if is_shown:
            rows += filter(None, [read_run(champion)])
        problems += differing(rows, "data", "data")
        for name in list(self.sources):
            try:
                if name.endswith("/scores.json"):
                    problems += self.check_model_audit(name, champion)
                elif name.startswith("sweeps/") and is_shown:
                    problems += self.check_search(name.rpartition("/")[0], champion)
            except (BadInput, KeyError, TypeError, OSError) as error:
                problems.append(f"{name} cannot be compared: {one_line(error)}")
        return list(dict.fromkeys(problems))

    def check_model_audit(self, name: str, champion: Path) -> list[str]:
        """Whether an audit of a model is of the champion, and on its data."""
        scores = read_json(self.root / name)
        checkpoint = champion / "best.pt"
        audited = scores["checkpoint"]["sha256"]
        problems = []
        if not checkpoint.is_file() or file_digest(checkpoint) != audited:
            sentence = f"{name} is an audit of another checkpoint than {self.champion}/best.pt"
            problems.append(f"{sentence}: run `{BY_NAME['model-audit'].command}`")
        trained_on = read_json(champion / "meta.json").get("data") or {}
        for file, digest in scores["data"]["sha256"].items():
            if trained_on.get(file, digest) != digest:
                problems.append(f"{name} is of another {file} than {self.champion} has seen")
        return problems

    def check_search(self, folder: str, champion: Path) -> list[str]:
        """Whether a search is finished, and the champion is the run that it has chosen. A journal
        that names its champion may hand in another one.
        """
        ended = self.root / folder / "champion.json"
        if not ended.is_file():
            return [f"{folder} is not finished: sweep.py champion {Path(folder).name}"]
        run = read_json(ended)["run"]
        is_named = self.champion != CHAMPION
        if is_named or weights_of(self.root / run) == weights_of(champion):
            return []
        sentence = f"{self.champion} is not {run}, which {folder} has chosen"
        return [f"{sentence}: make champion RUN={run}, or name the run: table champion RUN"]
