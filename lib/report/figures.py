"""Figures of a journal: drawn from the files of named runs, or copied from what another script has
drawn.
"""

import contextlib
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from lib.command import BadInput, nearest
from lib.figures import column, figure_png, plot_decisions
from lib.files import atomic_write
from lib.pcam import open_split
from lib.report.drawings import plot_front, plot_patches, plot_runs
from lib.report.evidence import Evidence, Missing
from lib.report.runs import read_run
from lib.report.tables import read_seeds

FOLDER = "assets/journal"
NUM_ERRORS, NUM_FRONT_ERRORS = 5, 4  # of each kind; of both
# of each figure over seeds: its title and its curves, as `plot_runs` takes them
SEED_FIGURES = {
    "gradient-norm": (
        "Global gradient norm per step, before clipping",
        [("steps.csv", "grad_norm", "global gradient norm", "log")],
    ),
    "learning-rate": (
        "Training loss and learning rate per step",
        [
            ("steps.csv", "loss", "training loss (nats)", "linear"),
            ("steps.csv", "lr", "learning rate", "linear"),
        ],
    ),
    "metrics": (
        "Log loss, AUC and F2 on validation after each epoch",
        [
            ("epochs.csv", "val_loss", "log loss (nats)", "linear", "prior_loss"),
            ("epochs.csv", "val_auc", "ROC-AUC", "linear", "constant_auc"),
            ("epochs.csv", "val_f2", "F2 at 0.5", "linear", "always_positive_f2"),
        ],
    ),
}


@dataclass(frozen=True)
class Drawing:
    """A PNG below the folder of the journal. `source` says what it shows, with digests; `draw`
    gives its bytes; a drawing that is a copy has the same bytes as its source.
    """

    name: str
    title: str
    source: str
    draw: Callable
    is_copy: bool = False

    def markdown(self) -> str:
        return f"![{self.title}]({self.name})\n\n*{self.title}.*"

    def is_current(self, root: Path) -> bool:
        """Whether the PNG shows what its sources say now."""
        path = root / self.name
        if not path.is_file():
            return False
        if self.is_copy:
            return path.read_bytes() == self.draw()
        return read_source(path) == self.source

    def write(self, root: Path) -> None:
        """Draw the PNG, unless it is current."""
        if not self.is_current(root):
            path = root / self.name
            path.parent.mkdir(parents=True, exist_ok=True)
            png = self.draw()
            with atomic_write(path) as file:
                file.write(png)


def read_source(path: Path) -> str:
    """What a PNG says that it was drawn from; empty where it is none of this program."""
    try:
        with Image.open(path) as image:
            return image.info.get("Source", "")
    except OSError:
        return ""


def build_figure(e: Evidence, source: str, options: dict) -> Drawing:
    """The drawing of `<!-- figure NAME|FILE.png ... -->`."""
    if source.endswith(".png"):
        return copy_figure(e, source, options)
    if source in SEED_FIGURES:
        return draw_seeds(e, source, options)
    if source not in NAMED_FIGURES:
        allowed = [*SEED_FIGURES, *NAMED_FIGURES]
        hint = nearest(source, allowed)
        raise BadInput(f"no figure {source}{hint} (allowed: {', '.join(allowed)}, or FILE.png)")
    return NAMED_FIGURES[source](e, options)


def make_drawing(e: Evidence, name: str, title: str, files, options: dict, plot) -> Drawing:
    """A drawing that `plot()` gives as a matplotlib figure, from files."""
    source = e.digests(files)
    title = options.get("title", title)
    path = f"{FOLDER}/{name}.png"
    return Drawing(path, title, source, lambda: figure_png(plot(), source=source))


def copy_figure(e: Evidence, source: str, options: dict) -> Drawing:
    """A PNG that another script has drawn. One below assets/ is shown where it lies."""
    name = e.resolve(source)
    path = e.path(name)
    title = options.get("title", path.stem.replace("-", " "))
    target = name if name.startswith("assets/") else f"{FOLDER}/{'-'.join(path.parts[-2:])}"
    return Drawing(target, title, e.digests([name]), path.read_bytes, is_copy=True)


def draw_seeds(e: Evidence, name: str, options: dict) -> Drawing:
    """Curves of the seeds and their mean."""
    title, curves = SEED_FIGURES[name]
    rows, file = read_seeds(e, e.find_seeds()), curves[0][0]
    files = [f"{run}/{file}" for run in e.find_seeds()]

    def plot():
        labels = [f"seed {row['seed']}" for row in rows]
        tables = {(label, file): e.csv(path) for label, path in zip(labels, files, strict=True)}
        return plot_runs(tables, curves, with_mean=True)

    return make_drawing(e, name, f"{title}, {len(files)} seeds", files, options, plot)


def draw_front(e: Evidence, options: dict) -> Drawing:
    """Seeds, champion, confusion matrix and, unless `patches=no`, four errors."""
    rows, champion = read_seeds(e, e.find_seeds()), e.find_champion()
    files = [f"{run}/summary.json" for run in [*e.find_seeds(), champion]]
    patches = []
    if options.get("patches") != "no":
        with contextlib.suppress(Missing):  # an audit of the champion comes later
            patches = find_errors(e, NUM_FRONT_ERRORS)
    if patches:
        files.append(e.resolve("model-audit/errors.csv"))

    def plot():
        pairs = itertools.zip_longest(*(group for _, group in patches))
        errors = [error for pair in pairs for error in pair if error][:NUM_FRONT_ERRORS]
        return plot_front(rows, read_run(e.root / champion), read_patches(errors))

    title = "Three seeds and the champion beside constant answers"
    return make_drawing(e, "front", title, files, options, plot)


def draw_errors(e: Evidence, options: dict) -> Drawing:
    """The most confident false positives and false negatives as pictures."""
    groups = find_errors(e, NUM_ERRORS)
    if not groups:
        raise Missing("the patches of the audit are not here: their folder is not on this machine")
    title = "The most confident false positives and false negatives"
    files = [e.resolve("model-audit/errors.csv")]

    def plot():
        return plot_patches([(kind, read_patches(group)) for kind, group in groups])

    return make_drawing(e, "errors", title, files, options, plot)


def find_errors(e: Evidence, num: int) -> list:
    """(kind, [(data folder, row of errors.csv)]) of the most confident errors of the champion;
    empty where the data are not here.
    """
    rows = e.csv(e.resolve("model-audit/errors.csv"))
    scores = e.document(e.resolve("model-audit/scores.json"))
    directory = Path(scores["data"]["directory"])
    if not directory.is_dir():
        return []
    rows.sort(key=lambda row: float(row["probability"]))
    groups = []
    for kind, label, order in (("false positives", "0", -1), ("false negatives", "1", 1)):
        chosen = [row for row in rows if row["label"] == label][::order][:num]
        groups.append((kind, [(directory, row) for row in chosen]))
    return groups


def read_patches(errors: list) -> list[tuple[np.ndarray, str]]:
    """The patches of `find_errors`, each with a caption."""
    patches = []
    for directory, row in errors:
        images = open_split(directory, row["split"]).images
        patch = images.read([int(row["index"])])[0]
        kind = "called tumour" if row["label"] == "0" else "called normal"
        patches.append((patch, f"{kind}, p = {float(row['probability']):.3f}"))
    return patches


def draw_decisions(e: Evidence, options: dict) -> Drawing:
    """ROC, precision-recall and confusion matrix of the champion at its threshold."""
    files = [e.resolve(f"model-audit/{name}") for name in ("predictions.csv", "scores.json")]
    threshold = e.document(files[1])["checkpoint"]["threshold"]

    def plot():
        rows = [row for row in e.csv(files[0]) if row["label"] and row["probability"]]
        labels = column(rows, "label").astype(int)
        return plot_decisions(labels, column(rows, "probability"), threshold)

    title = f"The champion on validation, calibrated, at its threshold {threshold:.3g}"
    return make_drawing(e, "decisions", title, files, options, plot)


NAMED_FIGURES = {
    "front": draw_front,
    "errors": draw_errors,
    "decisions": draw_decisions,
}
