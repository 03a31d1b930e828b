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

TABLES = (("steps.csv", "train"), ("epochs.csv", "epoch"))
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
    if out.exists() and any(out.iterdir()):
        raise BadInput(f"--out {out} holds files already: give a new or an empty folder")
    out.mkdir(parents=True, exist_ok=True)
    rows = [row for row in rows if row["status"] != "unreadable"]
    write = writer(library, out, runs_dir)
    with Progress(len(rows), program, "runs") as bar:
        for row in rows:
            run = runs_dir / row["run"]
            steps = (
                (prefix, point)
                for name, prefix in TABLES
                if (run / name).is_file()
                for point in read_csv(run / name)
            )
            points = [
                (f"{prefix}/{name}", float(value), int(point["step"]))
                for prefix, point in steps
                for name, value in point.items()
                if value and name not in ("step", "epoch")
            ]
            config = {key: plain(row[key]) for key in HINTS if key in row}
            scores = {
                f"final/{key}": value
                for key, value in row.items()
                if key.startswith("val_") and value is not None
            }
            write(run, row, points, config, scores)
            bar.add()
    return len(rows)


def tensorboard_writer(library, out: Path, _):
    """Scalars against the step, the config as hyper-parameters with the final scores."""

    def write(run, row, points, config, scores):
        with library.SummaryWriter(str(out / run.name)) as writer:
            for name, value, step in points:
                writer.add_scalar(name, value, step)
            writer.add_hparams(config | {"status": row["status"]}, scores, run_name=".")

    return write


def mlflow_writer(library, out: Path, runs_dir: Path):
    """An experiment in MLflow's store of files, a run in it for each of ours, under our names."""
    # or MLflow 3 wants a database, and packages for it
    os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
    client = library.MlflowClient(tracking_uri=out.resolve().as_uri())
    experiment = client.create_experiment(runs_dir.resolve().name)

    def write(run, row, points, config, scores):
        meta = read_json(run / "meta.json") if (run / "meta.json").is_file() else {}
        tags = {
            "mlflow.source.git.commit": meta.get("commit") or "",
            "mlflow.source.name": " ".join(meta.get("argv", [])),
        }
        started = row["started_utc"] and datetime.datetime.fromisoformat(row["started_utc"])
        start_ms = int(started.timestamp() * 1000) if started else 0
        end_ms = start_ms + int(1000 * (row.get("wall_s") or 0))
        made = client.create_run(
            experiment,
            start_time=start_ms,
            tags=tags | {"status": row["status"]},
            run_name=run.name,
        )
        metrics = [
            library.entities.Metric(name, value, end_ms, step) for name, value, step in points
        ]
        metrics += [
            library.entities.Metric(name, value, end_ms, row["num_steps"])
            for name, value in scores.items()
        ]
        client.log_batch(
            made.info.run_id, params=[library.entities.Param(*item) for item in config.items()]
        )
        for first in range(0, len(metrics), MOST_AT_ONCE):
            client.log_batch(made.info.run_id, metrics=metrics[first : first + MOST_AT_ONCE])
        client.set_terminated(made.info.run_id, MLFLOW_STATUS.get(row["status"], "FAILED"), end_ms)

    return write


PROGRAMS = {
    "tensorboard": ("torch.utils.tensorboard", "tensorboard", tensorboard_writer),
    "mlflow": ("mlflow", "mlflow-skinny", mlflow_writer),
}
