"""Figures of a journal: drawn from the files of named runs, or copied from what another script has
drawn.
"""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from PIL import Image

from lib.blocks import Figure
from lib.command import BadInput, nearest
from lib.figures import column, figure_png, plot_decisions
from lib.files import atomic_write
from lib.pcam import open_split
from lib.report.drawings import (
    GRADIENT_NORM,
    LEARNING_RATE,
    LOSS,
    VAL_AUC,
    VAL_F2,
    VAL_LOSS,
    plot_front,
    plot_patches,
    plot_runs,
)
from lib.report.evidence import Evidence, Missing
from lib.report.tables import read_seeds

FOLDER = "assets/journal"
# of each kind
NUM_ERRORS = 5
NUM_FRONT_ERRORS = 2
# of each figure over seeds: its title and its curves, as `plot_runs` takes them
SEED_FIGURES = {
    "gradient-norm": ("Global gradient norm per step, before clipping", [GRADIENT_NORM]),
    "learning-rate": ("Training loss and learning rate per step", [LOSS, LEARNING_RATE]),
    "metrics": (
        "Log loss, AUC and F2 on validation after each epoch",
        [
            (*VAL_LOSS, "prior_loss"),
            (*VAL_AUC, "constant_auc"),
            (*VAL_F2, "always_positive_f2"),
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

    def to_markdown(self) -> str:
        return Figure(self.title, path=self.name).to_markdown()

    def is_current(self, root: Path) -> bool:
        """Whether the PNG shows what its sources say now."""
        path = root / self.name
        if self.is_copy:
            return path.is_file() and path.read_bytes() == self.draw()
        try:
            with Image.open(path) as image:
                return image.info.get("Source") == self.source
        except OSError:  # it is not there, or no picture
            return False

    def write(self, root: Path) -> None:
        """Draw the PNG, unless it is current."""
        if not self.is_current(root):
            path = root / self.name
            path.parent.mkdir(parents=True, exist_ok=True)
            png = self.draw()
            with atomic_write(path) as file:
                file.write(png)


def build_figure(e: Evidence, source: str, title: str = "", patches: str = "yes") -> list[Drawing]:
    """The drawing of `<!-- figure NAME|FILE.png ... -->`."""
    if source.endswith(".png"):
        drawing = copy_figure(e, source)
    elif source in FIGURES:
        drawing = FIGURES[source](e, source, patches != "no")
    else:
        raise BadInput(
            f"no figure {source}{nearest(source, FIGURES)}"
            f" (allowed: {', '.join(FIGURES)}, or FILE.png)"
        )
    return [replace(drawing, title=title or drawing.title)]


def make_drawing(e: Evidence, name: str, title: str, files, plot, *arguments) -> Drawing:
    """A drawing of the matplotlib figure that `plot(*arguments)` gives, from files."""
    source = e.digests(files)
    path = f"{FOLDER}/{name}.png"
    return Drawing(path, title, source, lambda: figure_png(plot(*arguments), source))


def copy_figure(e: Evidence, name: str) -> Drawing:
    """A PNG that another script has drawn. One below assets/ is shown where it lies."""
    path = e.path(name)
    target = name if name.startswith("assets/") else f"{FOLDER}/{'-'.join(path.parts[-2:])}"
    title = path.stem.replace("-", " ")
    return Drawing(target, title, e.digests([name]), path.read_bytes, is_copy=True)


def draw_seeds(e: Evidence, name: str, _has_patches: bool) -> Drawing:
    """Curves of the seeds and their mean."""
    title, curves = SEED_FIGURES[name]
    file = curves[0][0]
    tables = {}
    files = [f"{run}/{file}" for run in e.find_seeds()]
    for row, path in zip(read_seeds(e, e.find_seeds()), files, strict=True):
        tables[f"seed {row['seed']}", file] = e.csv(path)
    title = f"{title}, {len(files)} seeds"
    return make_drawing(e, name, title, files, plot_runs, tables, curves, True)


def draw_front(e: Evidence, name: str, has_patches: bool) -> Drawing:
    """Seeds, champion, confusion matrix and, unless `patches=no`, four errors."""
    runs = e.find_seeds()
    champion = e.find_champion()
    files = [f"{run}/summary.json" for run in [*runs, champion]]
    errors = {}
    if has_patches:
        with contextlib.suppress(Missing):  # an audit of the champion comes later
            errors = read_errors(e, NUM_FRONT_ERRORS)
    if errors:
        files.append(e.resolve("model-audit/errors.csv"))
    title = "Three seeds and the champion beside constant answers"
    shown = (read_seeds(e, runs), e.run(champion), sum(errors.values(), []))
    return make_drawing(e, name, title, files, plot_front, *shown)


def draw_errors(e: Evidence, name: str, _has_patches: bool) -> Drawing:
    """The most confident false positives and false negatives as pictures."""
    errors = read_errors(e, NUM_ERRORS)
    if not errors:
        raise Missing("the patches of the audit are not here: their folder is not on this machine")
    title = "The most confident false positives and false negatives"
    files = [e.resolve("model-audit/errors.csv")]
    return make_drawing(e, name, title, files, plot_patches, errors)


def read_errors(e: Evidence, num: int) -> dict[str, list]:
    """{kind: [(patch uint8 (96, 96, 3), caption)]} of the champion's `num` most confident errors of
    each kind; empty where the data are not here.
    """
    rows = e.csv(e.resolve("model-audit/errors.csv"))
    scores = e.document(e.resolve("model-audit/scores.json"))
    directory = Path(scores["data"]["directory"])
    errors = {}
    for row in rows if directory.is_dir() else []:
        if int(row["rank"]) <= num:
            images = open_split(directory, row["split"]).images
            patch = images.read([int(row["index"])])[0]
            caption = f"{row['kind']}, p = {float(row['probability']):.3f}"
            errors.setdefault(f"{row['kind']}s", []).append((patch, caption))
    return errors


def draw_decisions(e: Evidence, name: str, _has_patches: bool) -> Drawing:
    """ROC, precision-recall and confusion matrix of the champion at its threshold."""
    files = [e.resolve(f"model-audit/{file}") for file in ("predictions.csv", "scores.json")]
    rows = [row for row in e.csv(files[0]) if row["label"] and row["probability"]]
    labels = column(rows, "label").astype(int)
    probs = column(rows, "probability")
    threshold = e.document(files[1])["checkpoint"]["threshold"]
    title = f"The champion on validation, calibrated, at its threshold {threshold:.3g}"
    return make_drawing(e, name, title, files, plot_decisions, labels, probs, threshold)


FIGURES = dict.fromkeys(SEED_FIGURES, draw_seeds) | {
    "front": draw_front,
    "errors": draw_errors,
    "decisions": draw_decisions,
}
