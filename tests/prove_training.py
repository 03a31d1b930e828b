"""What the recipe is worth: trainings whose scores and times are kept in assets/ablation.csv, drawn
and set as a table.

python tests/prove_training.py NAME [--seeds 1 2 3] [--data DIR] [--kept yes|no] [--remark TEXT]
                               [key=value ...]
python tests/prove_training.py NAME --run RUN ...   note finished runs in place of training
python tests/prove_training.py                      draw assets/ablation.png and ablation.md again
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
from conftest import REPOSITORY
from proofs import write_markdown

from lib.figures import COLOURS, figure_png, new_figure
from lib.files import read_csv, read_json, write_csv
from lib.metrics import compute_auc
from lib.pcam import open_split
from lib.rundir import read_run_config

TABLE = REPOSITORY / "assets" / "ablation.csv"
COLUMNS = (
    "name",
    "seed",
    "changes",
    "auc_1_view",
    "auc_8_views",
    "interval",
    "deduplicated",
    "num_images",
    "train_s",
)
COLUMNS += ("by", "kept", "remark")


def run_script(script: str, *arguments) -> dict:
    """A script's JSON, its progress on this terminal."""
    command = [sys.executable, str(REPOSITORY / script), *map(str, arguments)]
    result = subprocess.run(command, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(result.stdout.strip().splitlines()[-1])


def measure_run(run: Path, data: str) -> dict:
    """A row of the table, but for its name and remark: scores of best.pt over one and eight views,
    what its training took.
    """
    command = [
        "inference.py",
        "--ckpt",
        run,
        data,
        "--split",
        "valid",
        "--out",
        run / "predictions.csv",
        "--views",
    ]
    auc_1, auc_8 = (f"{run_script(*command, views)['scores']['auc']:.4f}" for views in (1, 8))
    # of eight views; a row is drawn again for the interval, for want of slides
    rows = read_csv(run / "predictions.csv")
    labels, probs = (
        np.array([float(row[name]) for row in rows]) for name in ("label", "probability")
    )
    draws = np.random.default_rng(0).integers(0, len(rows), (1000, len(rows)))
    interval = np.nanpercentile(
        [compute_auc(labels[draw], probs[draw]) for draw in draws], [2.5, 97.5]
    )
    patches = open_split(data, "valid").images.read(range(len(rows)))
    first = np.unique([patch.tobytes() for patch in patches], return_index=True)[1]
    summary, meta = read_json(run / "summary.json"), read_json(run / "meta.json")
    starts = [*meta.get("earlier_starts", []), meta]
    row = {"seed": read_run_config(run).seed, "auc_1_view": auc_1}
    row |= {
        "interval": "{:.4f} to {:.4f}".format(*interval),
        "deduplicated": f"{compute_auc(labels[first], probs[first]):.4f}",
    }
    row |= {"auc_8_views": auc_8, "num_images": summary["num_steps"] * meta["batch_size"]}
    epochs = read_csv(run / "epochs.csv")  # of all its processes, where it was resumed
    row |= {
        "train_s": round(sum(float(epoch["train_s"]) for epoch in epochs)),
        "by": f"commit {starts[0]['commit'][:10]}",
    }
    return row | {
        "changes": " ".join(
            item for item in starts[0]["argv"][1:] if "=" in item and "data_dir" not in item
        )
    }


def draw() -> None:
    """A dot a training, from the best technique to the worst, and the same as a table."""
    rows = read_csv(TABLE)
    mean_auc = {
        row["name"]: np.mean([float(r["auc_8_views"]) for r in rows if r["name"] == row["name"]])
        for row in rows
    }
    names = sorted(mean_auc, key=mean_auc.get)
    figure, (axes,) = new_figure(1, width=9, height=1.2 + 0.3 * len(names))
    for label, key, colour in (
        ("one view", "auc_1_view", COLOURS[5]),
        ("eight views", "auc_8_views", COLOURS[0]),
    ):
        axes.plot(
            [float(row[key]) for row in rows],
            [names.index(row["name"]) for row in rows],
            "o",
            color=colour,
            label=label,
        )
    axes.set(xlabel="ROC-AUC, valid split of the JPEG sample")
    axes.set_yticks(range(len(names)), names)
    axes.legend(loc="lower right")
    TABLE.with_suffix(".png").write_bytes(figure_png(figure))
    ordered = sorted(rows, key=lambda row: -names.index(row["name"]))
    write_markdown(
        TABLE.with_suffix(".md"), COLUMNS, ([row[column] for column in COLUMNS] for row in ordered)
    )


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("name", nargs="?")
    parser.add_argument("--seeds", nargs="+", type=int, default=[1])
    parser.add_argument("--run", nargs="+", type=Path, default=[])
    parser.add_argument("--data", default="data/sample")
    parser.add_argument("--kept", default="")
    parser.add_argument("--remark", default="")
    parser.add_argument("changes", nargs="*")
    args = parser.parse_intermixed_args(argv)
    rows = [list(row.values()) for row in read_csv(TABLE)] if TABLE.exists() else []
    for seed in args.seeds if args.name and not args.run else ():
        args.run.append(
            Path(
                run_script("train.py", f"data_dir={args.data}", f"seed={seed}", *args.changes)[
                    "run"
                ]
            )
        )
    for run in args.run:
        row = measure_run(run, args.data) | {
            "name": args.name,
            "kept": args.kept,
            "remark": args.remark,
        }
        rows.append([row[column] for column in COLUMNS])
        write_csv(TABLE, COLUMNS, rows)
    draw()
    return 0


if __name__ == "__main__":
    sys.exit(main())
