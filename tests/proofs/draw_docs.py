"""The two pictures of the documentation: python tests/proofs/draw_docs.py

assets/overview.png shows which script leaves which file. assets/network.png shows the layers of the
default network; its shapes and numbers of parameters are read from the network itself.
"""

import io
import sys
from pathlib import Path

import matplotlib
import torch
from PIL import Image

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPOSITORY))

from lib.config import DEFAULT_PATH, load_config  # noqa: E402
from lib.models import build_model, num_parameters  # noqa: E402

matplotlib.use("Agg")
from matplotlib import pyplot  # noqa: E402

BLUE, GREEN, ORANGE, GREY = "#d6e6f5", "#dcefdc", "#fbe3cf", "#eeeeee"
# column, row, title, what it leaves, colour
BOXES = (
    (
        0,
        1,
        "prepare.py",
        "official files, images,\nHDF5 of other kinds:\none HDF5 pair a split",
        BLUE,
    ),
    (1, 1, "audit.py data", "findings.json,\nquarantine.csv,\naudit.html", ORANGE),
    (
        2,
        1,
        "train.py",
        "runs/RUN: config, meta,\ncurves, checkpoints,\nsummary, report.html",
        GREEN,
    ),
    (3, 1, "inference.py", "predictions.csv", GREEN),
    (2, 2, "sweep.py", "a champion\non fresh seeds", BLUE),
    (3, 2, "benchmark.py", "images/s, scaling,\nthe bottleneck", BLUE),
    (2, 0, "audit.py twin", "identical to the bit,\nor where two runs part", ORANGE),
    (3, 0, "audit.py model", "thresholds, slices,\nshortcuts, errors", ORANGE),
    (4, 1, "report.py", "runs compared,\na journal, a USB stick\nthat predicts offline", GREY),
)
ARROWS = ((0, 1), (1, 2), (2, 3), (4, 2), (2, 6), (2, 7), (2, 5), (3, 8))
WIDTH, HEIGHT = 0.84, 0.62


def save_small(figure, path: Path) -> None:
    """Save a figure as a PNG of few colours, a third of the size."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110, bbox_inches="tight")
    Image.open(buffer).convert("RGB").quantize(32).save(path, optimize=True)


def draw_boxes(axes, boxes, arrows) -> None:
    """Boxes with a title and a text, one unit apart, and arrows between those of given numbers."""
    for column, row, title, text, colour in boxes:
        corner = (column - WIDTH / 2, row - HEIGHT / 2)
        axes.add_patch(pyplot.Rectangle(corner, WIDTH, HEIGHT, facecolor=colour, edgecolor="#666"))
        axes.text(column, row + 0.22, title, ha="center", va="center", weight="bold", fontsize=11)
        axes.text(column, row - 0.07, text, ha="center", va="center", fontsize=8.5)
    for start, end in arrows:
        (x, y), (to_x, to_y) = boxes[start][:2], boxes[end][:2]
        along_x, along_y = to_x - x, to_y - y
        is_level = along_y == 0
        half = (WIDTH / 2, 0) if is_level else (WIDTH / 2 * along_x, HEIGHT / 2 * along_y)
        sign = 1 if along_x >= 0 else -1
        tail = (x + sign * half[0] if is_level else x + half[0], y + half[1])
        head = (to_x - sign * half[0] if is_level else to_x - half[0], to_y - half[1])
        axes.annotate("", head, tail, arrowprops={"arrowstyle": "->", "color": "#444", "lw": 1.5})
    axes.set_axis_off()
    axes.set_aspect("auto")


def draw_overview(path: Path) -> None:
    figure, axes = pyplot.subplots(figsize=(12.5, 5.4))
    draw_boxes(axes, BOXES, ARROWS)
    axes.set_xlim(-0.45, 4.45)
    axes.set_ylim(-0.36, 2.36)
    save_small(figure, path)


def measure_layers() -> list[tuple[str, str, str]]:
    """Name, shape of the result and number of parameters of each layer of the default network."""
    model = build_model(load_config(DEFAULT_PATH)).eval()
    layers = [*model.features, model.head]
    rows = []
    with torch.inference_mode():
        values = torch.zeros(1, 3, 96, 96)
        rows.append(("patch", "3\nx 96 x 96", ""))
        for layer in layers[:-1]:
            values = layer(values)
            _, num_channels, height, width = values.shape
            shape = f"8 x {num_channels // 8}\nx {height} x {width}"
            name = "two 3x3 convolutions,\nshortcut"
            if type(layer).__name__ == "Sequential":
                size = layer[0].size
                name = f"{size}x{size} convolution,\nstride 2"
            rows.append((name, shape, f"{num_parameters(layer):,}"))
    num_features = model.head[-1].in_features
    rows.append(("mean of all cells,\nmean of the centre", f"{num_features}", ""))
    rows.append(("one logit", "1", f"{num_parameters(model.head):,}"))
    rows.append(("", "", f"{num_parameters(model):,} in all"))
    return rows


def draw_network(path: Path) -> None:
    *rows, (_, _, total) = measure_layers()
    figure, axes = pyplot.subplots(figsize=(12.5, 4))
    for number, (name, shape, num) in enumerate(rows):
        colour = GREY if not num else GREEN if "shortcut" in name else BLUE
        axes.add_patch(
            pyplot.Rectangle((number - 0.44, 0), 0.88, 1, facecolor=colour, edgecolor="#666")
        )
        axes.text(number, 0.5, name, rotation=90, ha="center", va="center", fontsize=9)
        axes.text(number, -0.1, shape, ha="center", va="top", fontsize=8)
        axes.text(number, -0.28, num, ha="center", va="top", fontsize=8, color="#555")
    axes.text(-0.5, 1.22, "The default network, p4m", weight="bold", fontsize=11)
    axes.text(
        -0.5,
        1.08,
        f"below each layer: orientations x features x height x width, then its parameters; {total}",
        fontsize=9,
    )
    axes.set_xlim(-0.55, len(rows) - 0.45)
    axes.set_ylim(-0.4, 1.3)
    axes.set_axis_off()
    save_small(figure, path)


def main() -> int:
    draw_overview(REPOSITORY / "assets/overview.png")
    draw_network(REPOSITORY / "assets/network.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
