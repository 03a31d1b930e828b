"""A search on real patches against the full grid of its trials.

python tests/proofs/search.py [--data data/sample] [--out assets/search]
"""

import os
import re
import shutil
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from conftest import REPOSITORY

from lib.files import read_csv, read_json
from proofs import prove, row, run

SPACE = REPOSITORY / "assets" / "space.yaml"
# put over config.yaml: a network and patches small enough for the whole grid to be trained
SMALL = "model=cnn limit_train=4000 limit_valid=2000 crop_epochs=18 warmup_epochs=1 threads=1"
# asked for: at most so much AUC below the grid's best, at most this share of its epochs
LOSS, COST = 0.005, 0.30


def search(space: Path, data, scratch: Path) -> tuple[Path, int, float]:
    """Search a space by halving: the search's folder, the epochs of all trials and the best AUC of
    those that were trained to the last one.
    """
    name, runs = space.stem, scratch / f"runs-{space.stem}"
    run("sweep.py", "plan", space, "--sweeps", scratch, f"data_dir={data}", *SMALL.split())
    where = [name, "--sweeps", scratch, "--runs", runs]
    folder = scratch / name
    for _ in read_json(folder / "plan.json")["rungs"]:
        run("sweep.py", "promote", "--finish", "--processes", 2, *where)
    tables = [read_csv(path) for path in runs.glob("*/epochs.csv")]
    last = max(map(len, tables))
    best = max(float(rows[-1]["val_auc"]) for rows in tables if len(rows) == last)
    return folder, sum(map(len, tables)), best


def describe(finalist: dict) -> str:
    return f"{finalist['mean']:.4f} ({finalist['low']:.4f} to {finalist['high']:.4f})"


def prove_search(args, scratch: Path) -> list[dict]:
    """The best trial that halving found, the best of the grid, and what each cost in epochs."""
    os.environ["OMP_NUM_THREADS"] = "1"
    grid = scratch / "grid.yaml"
    # one rung alone: every trial is trained to the last epoch
    grid.write_text(re.sub(r"rungs: \[.*, (\d+)\]", r"rungs: [\1]", SPACE.read_text()))
    folder, num_epochs, auc = search(SPACE, args.data, scratch)
    _, num_grid_epochs, best = search(grid, args.data, scratch)
    runs = scratch / f"runs-{SPACE.stem}"
    run("sweep.py", "champion", folder.name, "--sweeps", scratch, "--runs", runs)
    shutil.copy(folder / "sweep.html", args.out.with_suffix(".html"))
    finalists = read_json(folder / "champion.json")["finalists"]
    best_one = finalists[0]
    base = next(line for line in finalists if line["trial"] == "base")
    cost = num_epochs / num_grid_epochs
    loss = f"{best - auc:.4f} ({auc:.4f} and {best:.4f})"
    share = f"{cost:.0%} ({num_epochs} of {num_grid_epochs})"
    plan = read_json(folder / "plan.json")
    asked = f"best, {best_one['trial']}, fresh seeds: AUC above that of the config as it is"
    return [
        row("trials, rungs", f"{len(plan['trials'])}, {plan['rungs']} epochs"),
        row("halving's best, AUC below the grid's best", loss, best - auc <= LOSS, LOSS),
        row("epochs, as a share of the grid's", share, cost <= COST, f"{COST:.0%}"),
        row(asked, describe(best_one), best_one["low"] > base["high"], describe(base)),
    ]


if __name__ == "__main__":
    sys.exit(prove(__doc__, {"search": prove_search}, "search", data="data/sample"))
