"""Figures of a journal: drawn from the files of named runs, or copied from what another script has
drawn.
"""

import contextlib
from dataclasses import replace
from pathlib import Path

from PIL import Image

from lib.blocks import Figure
from lib.command import BadInput
from lib.figures import column, figure_png, plot_decisions
from lib.files import file_digest
from lib.pcam import open_split
from lib.report.drawings import (
    GRADIENT_NORM,
    LEARNING_RATE,
    LOSS,
    VAL_AUC,
    VAL_F2,
    VAL_LOSS,
    plot_front,
    plot_runs,
)
from lib.report.evidence import NUM_DIGITS, Evidence, Missing
from lib.report.tables import read_seeds

FOLDER = "assets/journal"
NUM_ERRORS = 2  # of each kind, on the front picture
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


def is_current(figure: Figure, root: Path) -> bool:
    """Whether the PNG of a figure lies at its path."""
    path = root / figure.path
    return path.is_file() and path.read_bytes() == figure.png


def read_source(path: Path) -> str:
    """What a PNG says that it was drawn from; empty where there is none."""
    try:
        with Image.open(path) as image:
            return image.info.get("Source", "")
    except OSError:  # it is not there, or no picture
        return ""


def build_figure(e: Evidence, source: str, *, title: str = "") -> list[Figure]:
    """The drawing of `<!-- figure NAME|FILE.png ... -->`."""
    if source.endswith(".png"):
        figure = copy_figure(e, source)
    elif source in SEED_FIGURES:
        figure = draw_seeds(e, source)
    elif source in FIGURES:
        figure = FIGURES[source](e)
    else:
        names = ", ".join([*FIGURES, *SEED_FIGURES])
        raise BadInput(f"no figure {source} (allowed: {names}, or FILE.png)")
    return [replace(figure, title=title or figure.title)]


def make_figure(e: Evidence, name: str, title: str, files, plot, *arguments) -> Figure:
    """What `plot(*arguments)` gives as PNG below the folder of the journal, with the files that it
    shows and the first digits of their SHA-256. A PNG that was drawn from the same files stays:
    another version of matplotlib draws other bytes.
    """
    sources = []
    for path in map(e.path, files):
        sources.append(f"{path.relative_to(e.root)} {file_digest(path)[:NUM_DIGITS]}")
    source = ", ".join(sources)
    name = f"{FOLDER}/{name}.png"
    path = e.root / name
    is_drawn = read_source(path) == source
    png = path.read_bytes() if is_drawn else figure_png(plot(*arguments), source)
    return Figure(title, png, name)


def copy_figure(e: Evidence, name: str) -> Figure:
    """A PNG that another script has drawn. One below assets/ is shown where it lies."""
    path = e.path(name)
    target = name if name.startswith("assets/") else f"{FOLDER}/{'-'.join(path.parts[-2:])}"
    return Figure(path.stem, path.read_bytes(), target)


def draw_seeds(e: Evidence, name: str) -> Figure:
    """Curves of the seeds and their mean."""
    title, curves = SEED_FIGURES[name]
    folders = e.find("seeds")
    rows = read_seeds(e, folders)
    runs = {f"seed {row['seed']}": e.root / run for row, run in zip(rows, folders, strict=True)}
    files = [f"{run}/{curves[0][0]}" for run in folders]
    title = f"{title}, {len(files)} seeds"
    return make_figure(e, name, title, files, plot_runs, runs, curves, True)


def draw_front(e: Evidence) -> Figure:
    """Seeds, champion, confusion matrix and, where their patches are here, four errors."""
    runs = e.find("seeds")
    (champion,) = e.find("champion")
    files = [f"{run}/summary.json" for run in [*runs, champion]]
    errors = []
    with contextlib.suppress(Missing):  # an audit of the champion comes later
        errors = read_errors(e)
        files.append("model-audit/errors.csv")
    title = "The seeds and the champion beside constant answers"
    shown = (read_seeds(e, runs), e.run(champion), errors)
    return make_figure(e, "front", title, files, plot_front, *shown)


def read_errors(e: Evidence) -> list[tuple]:
    """(patch uint8 (96, 96, 3), caption) of the champion's NUM_ERRORS most confident errors of each
    kind. Raises Missing where the data are not here.
    """
    rows = e.document("model-audit/errors.csv")
    directory = e.root / e.document("model-audit/scores.json")["data"]["directory"]
    if not directory.is_dir():
        raise Missing(f"the patches of the audit are not here: {directory} is no folder")
    errors = []
    for row in rows:
        if int(row["rank"]) <= NUM_ERRORS:
            images = open_split(directory, row["split"]).images
            caption = f"{row['kind']}\np = {float(row['probability']):.3f}"
            errors.append((images.read([int(row["index"])])[0], caption))
    return errors


def draw_decisions(e: Evidence) -> Figure:
    """ROC, precision-recall and confusion matrix of the champion at its threshold."""
    files = ["model-audit/predictions.csv", "model-audit/scores.json"]
    rows = e.document(files[0])
    labels = column(rows, "label").astype(int)
    probs = column(rows, "probability")
    threshold = e.document(files[1])["checkpoint"]["threshold"]
    title = f"The champion on validation, calibrated, at its threshold {threshold:.3g}"
    return make_figure(e, "decisions", title, files, plot_decisions, labels, probs, threshold)


FIGURES = {"front": draw_front, "decisions": draw_decisions}
