"""The two pictures of the documentation: python tests/proofs/draw_docs.py

assets/overview.png shows which script leaves which file. assets/network.png shows the layers of the
default network; its shapes and numbers of parameters are read from the network itself.
"""

import io
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import matplotlib
import torch
from conftest import REPOSITORY
from PIL import Image

from lib.config import load_config
from lib.models import build_model, num_parameters

matplotlib.use("Agg")
from matplotlib import pyplot  # noqa: E402

BLUE, GREEN, ORANGE, GREY = "#d6e6f5", "#dcefdc", "#fbe3cf", "#eeeeee"
# title: (column, row, what it leaves, colour)
BOXES = {
    "prepare.py": (
        0,
        1,
        "official files, images,\nHDF5 of other kinds:\none HDF5 pair a split",
        BLUE,
    ),
    "audit.py data": (1, 1, "findings.json,\nquarantine.csv,\naudit.html", ORANGE),
    "train.py": (
        2,
        1,
        "runs/RUN: config, meta,\ncurves, checkpoints,\nsummary, report.html",
        GREEN,
    ),
    "inference.py": (3, 1, "predictions.csv", GREEN),
    "report.py": (4, 1, "runs compared,\na journal, a USB stick\nthat predicts offline", GREY),
    "sweep.py": (2, 2, "a champion\non fresh seeds", BLUE),
    "benchmark.py": (3, 2, "images/s, scaling,\nthe bottleneck", BLUE),
    "audit.py twin": (2, 0, "identical to the bit,\nor where two runs part", ORANGE),
    "audit.py model": (3, 0, "thresholds, slices,\nshortcuts, errors", ORANGE),
}
ARROWS = (
    ("prepare.py", "audit.py data"),
    ("audit.py data", "train.py"),
    ("train.py", "inference.py"),
    ("sweep.py", "train.py"),
    ("train.py", "audit.py twin"),
    ("train.py", "audit.py model"),
    ("train.py", "benchmark.py"),
    ("inference.py", "report.py"),
)


def draw_box(axes, left: float, bottom: float, width: float, height: float, colour: str):
    """A framed box; gives the patch, at which an arrow may end."""
    box = pyplot.Rectangle((left, bottom), width, height, facecolor=colour, edgecolor="#666")
    return axes.add_patch(box)


def save_small(figure, axes, path: Path) -> None:
    """Save a figure as a PNG of few colours, a third of the size."""
    axes.autoscale_view()
    axes.set_axis_off()
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110, bbox_inches="tight")
    Image.open(buffer).convert("RGB").quantize(32).save(path, optimize=True)


def draw_overview(path: Path) -> None:
    figure, axes = pyplot.subplots(figsize=(12.5, 5.4))
    boxes = {}
    for title, (column, row, text, colour) in BOXES.items():
        boxes[title] = draw_box(axes, column - 0.42, row - 0.31, 0.84, 0.62, colour)
        axes.text(column, row + 0.22, title, ha="center", va="center", weight="bold", fontsize=11)
        axes.text(column, row - 0.07, text, ha="center", va="center", fontsize=8.5)
    for start, end in ARROWS:
        style = {"arrowstyle": "->", "color": "#444", "lw": 1.5}
        ends = {"patchA": boxes[start], "patchB": boxes[end], "shrinkA": 0, "shrinkB": 0}
        axes.annotate("", BOXES[end][:2], BOXES[start][:2], arrowprops=style | ends)
    save_small(figure, axes, path)


def measure_layers() -> list[tuple[str, str, str, str]]:
    """Name, shape of the result, number of parameters and colour of each layer of the default
    network.
    """
    model = build_model(load_config()).eval()
    rows = [("patch", "3\nx 96 x 96", "", GREY)]
    values = torch.zeros(1, 3, 96, 96)
    for layer in model.features:
        with torch.inference_mode():
            values = layer(values)
        _, num_channels, height, width = values.shape
        shape = f"8 x {num_channels // 8}\nx {height} x {width}"
        name, colour = "two 3x3 convolutions,\nshortcut", GREEN
        if isinstance(layer, torch.nn.Sequential):
            size = layer[0].size
            name, colour = f"{size}x{size} convolution,\nstride 2", BLUE
        rows.append((name, shape, f"{num_parameters(layer):,}", colour))
    means = f"{model.head[-1].in_features}"
    rows.append(("mean of all cells,\nmean of the centre", means, "", GREY))
    rows.append(("one logit", "1", f"{num_parameters(model.head):,}", BLUE))
    return rows


def draw_network(path: Path) -> None:
    figure, axes = pyplot.subplots(figsize=(12.5, 4))
    for number, (name, shape, num, colour) in enumerate(measure_layers()):
        draw_box(axes, number - 0.44, 0, 0.88, 1, colour)
        axes.text(number, 0.5, name, rotation=90, ha="center", va="center", fontsize=9)
        axes.text(number, -0.1, shape, ha="center", va="top", fontsize=8)
        axes.text(number, -0.28, num, ha="center", va="top", fontsize=8, color="#555")
    total = num_parameters(build_model(load_config()))
    legend = (
        "The default network, p4m\nbelow each layer: orientations x features x height x width,"
        f" then its parameters; {total:,} in all"
    )
    axes.text(-0.5, 1.08, legend, fontsize=9)
    save_small(figure, axes, path)


if __name__ == "__main__":
    draw_overview(REPOSITORY / "assets/overview.png")
    draw_network(REPOSITORY / "assets/network.png")
