"""What the recipe is worth: trainings whose scores and times are kept in assets/ablation.csv, drawn
and set as a table.

python tests/proofs/ablation.py NAME [--seeds 1 2 3] [--data DIR] [--kept yes|no] [--remark TEXT]
                                [key=value ...]
python tests/proofs/ablation.py NAME --run RUN ...   note finished runs in place of training
python tests/proofs/ablation.py                      draw assets/ablation.png and ablation.md again
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
from conftest import REPOSITORY

from lib.blocks import table_of
from lib.command import EXIT_DONE, Parser, script
from lib.figures import COLOURS, column, figure_png, new_figure
from lib.files import read_csv, read_json, write_csv
from lib.metrics import compute_auc
from lib.pcam import open_split
from lib.rundir import read_run_config
from proofs import run

TABLE = REPOSITORY / "assets" / "ablation.csv"
NUM_DRAWS = 1000  # of all rows, for an interval


def measure_run(folder: Path, data: str) -> dict:
    """A row of the table, but for its name and remark: scores of best.pt, what its training took."""
    aucs, out = [], folder / "predictions.csv"
    for views in (1, 8):
        command = ["inference.py", "--ckpt", folder, data, "--split", "valid", "--out", out]
        aucs.append(run(*command, "--views", views)["scores"]["auc"])
    rows = read_csv(out)  # of eight views; rows are drawn for the interval, for want of slides
    labels, probs = column(rows, "label"), column(rows, "probability")
    draws = np.random.default_rng(0).integers(0, len(rows), (NUM_DRAWS, len(rows)))
    drawn_aucs = [compute_auc(labels[draw], probs[draw]) for draw in draws]
    low, high = np.nanpercentile(drawn_aucs, [2.5, 97.5])
    patches = open_split(data, "valid").images.read(range(len(rows)))
    first = np.unique([patch.tobytes() for patch in patches], return_index=True)[1]
    summary, meta = read_json(folder / "summary.json"), read_json(folder / "meta.json")
    start = [*meta.get("earlier_starts", []), meta][0]
    changes = [text for text in start["argv"][1:] if "=" in text and "data_dir" not in text]
    # of all its processes, where it was resumed
    train_s = column(read_csv(folder / "epochs.csv"), "train_s").sum()
    return {
        "seed": read_run_config(folder).seed,
        "changes": " ".join(changes),
        "auc_1_view": f"{aucs[0]:.4f}",
        "auc_8_views": f"{aucs[1]:.4f}",
        "interval": f"{low:.4f} to {high:.4f}",
        "deduplicated": f"{compute_auc(labels[first], probs[first]):.4f}",
        "num_images": summary["num_steps"] * meta["batch_size"],
        "train_s": f"{train_s:.0f}",
        "by": f"commit {start['commit'][:10]}",
    }


def draw(rows: list[dict]) -> None:
    """A dot a training, from the best technique to the worst, and the same as a table."""
    aucs = {}
    for line in rows:
        aucs.setdefault(line["name"], []).append(float(line["auc_8_views"]))
    names = sorted(aucs, key=lambda name: np.mean(aucs[name]))
    figure, (axes,) = new_figure(1, width=9, height=1.2 + 0.3 * len(names))
    heights = [names.index(line["name"]) for line in rows]
    labels = {"auc_1_view": ("one view", 5), "auc_8_views": ("eight views", 0)}
    for key, (label, colour) in labels.items():
        axes.plot(column(rows, key), heights, "o", color=COLOURS[colour], label=label)
    axes.set(xlabel="ROC-AUC, valid split of the JPEG sample")
    axes.set_yticks(range(len(names)), names)
    axes.legend(loc="lower right")
    TABLE.with_suffix(".png").write_bytes(figure_png(figure))
    ordered = sorted(rows, key=lambda line: -names.index(line["name"]))
    TABLE.with_suffix(".md").write_text(table_of(ordered).to_markdown() + "\n")


@script
def main(argv=None) -> int:
    parser = Parser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("name", nargs="?")
    parser.add_argument("--seeds", nargs="+", type=int, default=[1])
    parser.add_argument("--run", nargs="+", type=Path, default=[])
    parser.add_argument("--data", default="data/sample")
    parser.add_argument("--kept", default="")
    parser.add_argument("--remark", default="")
    parser.add_argument("changes", nargs="*")
    args = parser.parse_intermixed_args(argv)
    runs, rows = args.run, read_csv(TABLE)
    for seed in args.seeds if args.name and not runs else ():
        result = run("train.py", f"data_dir={args.data}", f"seed={seed}", *args.changes)
        runs.append(Path(result["run"]))
    remarks = {"name": args.name, "kept": args.kept, "remark": args.remark}
    columns = list(rows[0])
    for folder in runs:
        rows.append(measure_run(folder, args.data) | remarks)
        write_csv(TABLE, columns, [[line[column] for column in columns] for line in rows])
    draw(rows)
    return EXIT_DONE


if __name__ == "__main__":
    sys.exit(main())
