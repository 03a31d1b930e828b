"""A search on real patches through a real Slurm, its tasks killed once on the way, against the full
grid of its trials.

python tests/proofs/search.py --data data/sample [--out assets/search] [key=value ...]     needs
slurm-wlm and munge
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from conftest import REPOSITORY
from slurm_cluster import kill_job, run, running_cluster, wait_for

from lib.command import EXIT_DONE, EXIT_FINDING, Parser, print_result, say, script
from lib.files import read_json, write_json
from lib.sweep import rungs, trainers
from proofs import made_now, write_markdown

NAME, SPACE = "proof", "assets/space.yaml"
# put over config.yaml: a network and patches small enough for the whole grid to be trained beside
# the search
SMALL = [
    "model=cnn",
    "limit_train=4000",
    "limit_valid=2000",
    "crop_epochs=18",
    "warmup_epochs=1",
    "threads=1",
]
CPUS = 8  # of the 16 that the cluster claims to have: two tasks at a time
# asked for: at most so much AUC below the grid's best, at most this share of its epochs
LOSS, COST = 0.005, 0.30
HOURS = 4 * 3600


def make(environment, *words) -> dict:
    """`make TARGET NAME=value ...` on the cluster, to its result."""
    result = subprocess.run(
        ["make", "-s", *words], cwd=REPOSITORY, env=environment, capture_output=True, text=True
    )
    if result.returncode:
        raise SystemExit(result.stderr)
    return json.loads(result.stdout.splitlines()[-1])


def search_through_slurm(environment, overrides) -> None:
    """Carry the search out, and leave beside its files how that went."""
    started_at = time.monotonic()
    words = [
        f"PYTHON={sys.executable}",
        f"SPACE={SPACE}",
        f"SEARCH={NAME}",
        f"CPUS={CPUS}",
        f"ARGS={' '.join(overrides)}",
    ]
    jobs = make(environment, "sweep", *words)["jobs"]
    sweep = open_sweep()
    rows = sweep.rows(0)
    wait_for(
        lambda: sum(rungs.outcome(sweep, row)["state"] != "todo" for row in rows) >= len(rows) // 2,
        "half a rung",
        HOURS,
    )
    victim = run(["squeue", "-h", "-r", "-t", "RUNNING", "-o", "%A"], environment).split()[0]
    killed = {"job": victim, "utc": made_now()["date"], "num_processes": kill_job(victim)}
    write_json(sweep.folder / "killed.json", killed)
    say(f"job {victim} killed, all of its {killed['num_processes']} processes")
    ending = REPOSITORY / f"jobs/logs/{jobs[-1]}.exit"
    wait_for(ending.is_file, "the champion", HOURS)
    told = {
        "jobs": len(jobs),
        "exit": ending.read_text().strip(),
        "wall_s": round(time.monotonic() - started_at),
    }
    write_json(sweep.folder / "slurm.json", told)


def open_sweep() -> rungs.Sweep:
    return rungs.load_sweep(REPOSITORY / "sweeps" / NAME, REPOSITORY / "runs")


def finish_grid(sweep: rungs.Sweep, arguments) -> None:
    """Every trial to its last epoch: a run that halving left goes on as if it had never paused."""
    last = sweep.plan["rungs"][-1]
    rows = [
        rungs.Row(trial, seed, last, False)
        for trial in sweep.plan["trials"]
        for seed in sweep.plan["seeds"]
    ]
    trainers.run_rows(sweep, rows, 2, arguments)


def compare(sweep: rungs.Sweep) -> dict:
    """The best trial that halving found, the best of the grid, and what each cost in epochs."""
    seeds, last = sweep.plan["seeds"], sweep.plan["rungs"][-1]
    of_grid = {}
    for trial in sweep.plan["trials"]:
        found = [rungs.outcome(sweep, rungs.Row(trial, seed, last, False)) for seed in seeds]
        if all(each["state"] == "done" for each in found):
            of_grid[trial] = sum(each["score"] for each in found) / len(found)
    halving = rungs.mean_scores(sweep, sweep.num_rungs - 1)
    epochs = [0, *sweep.plan["rungs"]]
    cost = sum(
        len(sweep.rows(rung)) * (epochs[rung + 1] - epochs[rung]) for rung in range(sweep.num_rungs)
    )
    full = last * len(sweep.plan["trials"]) * len(seeds)
    best, chosen = max(of_grid, key=of_grid.get), next(iter(halving))
    return {
        "grid_best": best,
        "grid_auc": of_grid[best],
        "halving_best": chosen,
        "halving_auc": halving[chosen],
        "loss": of_grid[best] - halving[chosen],
        "epochs": cost,
        "grid_epochs": full,
        "cost": cost / full,
        "grid": of_grid,
    }


@script
def main(argv=None) -> int:
    parser = Parser(
        prog="search.py",
        description="A search through Slurm, killed once, against the full grid.",
    )
    parser.add_argument("--data", required=True, metavar="DIR", help="the real patches")
    parser.add_argument(
        "--out",
        default=REPOSITORY / "assets" / "search",
        type=Path,
        metavar="OUT",
        help="OUT.json, .md, .html",
    )
    parser.add_argument(
        "overrides",
        nargs="*",
        default=SMALL,
        metavar="key=value",
        help=f"default: {' '.join(SMALL)}",
    )
    parser.add_argument(
        "--again", action="store_true", help="the search is over: compare what it left"
    )
    args = parser.parse_args(argv)
    overrides, made = [f"data_dir={args.data}", *args.overrides], made_now()
    if not args.again:
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # the cluster is ended then, too
        with (
            tempfile.TemporaryDirectory(prefix="slurm-") as folder,
            running_cluster(Path(folder)) as environment,
        ):
            search_through_slurm(environment | {"OMP_NUM_THREADS": "1"}, overrides)
    sweep = open_sweep()
    told, killed = (read_json(sweep.folder / name) for name in ("slurm.json", "killed.json"))
    shutil.copy(sweep.folder / "sweep.html", args.out.with_suffix(".html"))
    say("now the grid, on this machine")
    os.environ["OMP_NUM_THREADS"] = "1"
    finish_grid(sweep, [])
    found, champion = compare(sweep), read_json(sweep.folder / "champion.json")
    base = next(each for each in champion["finalists"] if each["trial"] == rungs.BASE)
    result = made | {
        "overrides": overrides,
        "space": SPACE,
        "slurm": told,
        "killed": killed,
        **found,
        "champion": champion,
    }
    write_json(args.out.with_suffix(".json"), result)

    def spread(each):
        return f"{each['mean']:.4f} ({each['low']:.4f} to {each['high']:.4f})"

    rows = [
        ("trials, rungs", f"{len(sweep.plan['trials'])}, {sweep.plan['rungs']} epochs", "-"),
        (
            "through Slurm, to a champion",
            (
                f"{told['jobs']} jobs, {told['wall_s']} s; of one task all"
                f" {killed['num_processes']} processes killed on the way"
            ),
            "yes" if told["exit"] == "0" else "NO",
        ),
        (
            "halving's best, AUC below the grid's best",
            f"{found['loss']:.4f}",
            "yes" if found["loss"] <= LOSS else "NO",
        ),
        (
            "epochs, as a share of the grid's",
            f"{found['epochs']} of {found['grid_epochs']}, {found['cost']:.0%}",
            "yes",
        ),
        (
            "champion, mean AUC over fresh seeds (95%), against the config as it is",
            f"{champion['champion']} {spread(champion)}, {spread(base)}; {champion['note']}",
            "yes" if champion["low"] > base["high"] else "NO",
        ),
    ]
    table = [(*row, f"{made['date']}, {made['commit']}") for row in rows]
    write_markdown(args.out.with_suffix(".md"), ("what", "measured", "held", "date, commit"), table)
    held = found["loss"] <= LOSS and found["cost"] <= COST and told["exit"] == "0"
    print_result(
        {"held": held, "loss": found["loss"], "cost": found["cost"], "champion": champion["note"]}
    )
    return EXIT_DONE if held else EXIT_FINDING


if __name__ == "__main__":
    sys.exit(main())
