"""Runs as TensorBoard and MLflow read them, written by these programs' own libraries, which are no
part of this program.
"""

import datetime
import importlib
import os
from pathlib import Path

from lib.command import BadInput, one_line
from lib.config import HINTS, plain
from lib.files import read_csv, read_json
from lib.progress import Progress

TABLES = {"steps.csv": "train", "epochs.csv": "epoch"}
# every other status is FAILED
MLFLOW_STATUS = {
    "finished": "FINISHED",
    "running": "RUNNING",
    "interrupted": "KILLED",
    "paused": "KILLED",
}
MOST_AT_ONCE = 1000  # metrics that MLflow takes in a call; of params a hundred


def export_runs(rows: list[dict], runs_dir: Path, out: Path, program: str) -> int:
    """Write the runs of these rows into the new folder `out`; how many. Raises BadInput where the
    program is not installed.
    """
    module, package, writer = PROGRAMS[program]
    try:
        library = importlib.import_module(module)
    except ImportError as error:
        raise BadInput(
            f"--to {program} needs the package {package}, which is not installed"
            f" ({one_line(error)})"
        ) from None
    out.mkdir(parents=True, exist_ok=True)
    rows = [row for row in rows if row.get("started_utc")]  # the others have nothing to read
    write = writer(library, out, runs_dir)
    with Progress(len(rows), program, "runs") as bar:
        for row in rows:
            run = runs_dir / row["run"]
            config = {key: plain(row[key]) for key in HINTS if key in row}
            names = [key for key in row if key.startswith("val_") and row[key] is not None]
            scores = {f"final/{name}": row[name] for name in names}
            write(run, row, read_points(run), config, scores)
            bar.add()
    return len(rows)


def read_points(run: Path) -> list[tuple[str, float, int]]:
    """(name, value, step) of each number in a run's tables."""
    points = []
    for file, prefix in TABLES.items():
        for row in read_csv(run / file) if (run / file).is_file() else []:
            step = int(row.pop("step"))
            row.pop("epoch")
            points += [(f"{prefix}/{name}", float(row[name]), step) for name in row if row[name]]
    return points


def tensorboard_writer(library, out: Path, _):
    """Scalars against the step, the config as hyper-parameters with the final scores."""

    def write(run, row, points, config, scores):
        with library.SummaryWriter(str(out / run.name)) as writer:
            for point in points:
                writer.add_scalar(*point)
            writer.add_hparams(config | {"status": row["status"]}, scores, run_name=".")

    return write


def mlflow_writer(library, out: Path, runs_dir: Path):
    """An experiment in MLflow's store of files, a run in it for each of ours, under our names."""
    # or MLflow 3 wants a database, and packages for it
    os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
    client = library.MlflowClient(tracking_uri=out.resolve().as_uri())
    experiment = client.create_experiment(runs_dir.resolve().name)

    def write(run, row, points, config, scores):
        meta = read_json(run / "meta.json")
        started = datetime.datetime.fromisoformat(row["started_utc"])
        start_ms = int(started.timestamp() * 1000)
        end_ms = start_ms + int(1000 * (row.get("wall_s") or 0))
        tags = {
            "status": row["status"],
            "mlflow.source.git.commit": meta["commit"] or "",
            "mlflow.source.name": " ".join(meta["argv"]),
        }
        options = {"start_time": start_ms, "tags": tags, "run_name": run.name}
        run_id = client.create_run(experiment, **options).info.run_id
        params = [library.entities.Param(*item) for item in config.items()]
        client.log_batch(run_id, params=params)
        points = points + [(name, value, row["num_steps"]) for name, value in scores.items()]
        metrics = []
        for name, value, step in points:
            metrics.append(library.entities.Metric(name, value, end_ms, step))
        for first in range(0, len(metrics), MOST_AT_ONCE):
            client.log_batch(run_id, metrics=metrics[first : first + MOST_AT_ONCE])
        client.set_terminated(run_id, MLFLOW_STATUS.get(row["status"], "FAILED"), end_ms)

    return write


PROGRAMS = {
    "tensorboard": ("torch.utils.tensorboard", "tensorboard", tensorboard_writer),
    "mlflow": ("mlflow", "mlflow-skinny", mlflow_writer),
}
