"""Runs as TensorBoard and MLflow read them, written by these programs' own libraries, which are no
part of this program.
"""

import datetime
import importlib
import os
from pathlib import Path

from lib.command import BadInput, one_line
from lib.config import HINTS, plain
from lib.files import read_csv
from lib.progress import Progress
from lib.rundir import read_meta

TABLES = {"steps.csv": "train", "epochs.csv": "epoch"}
MOST_AT_ONCE = 1000  # metrics that MLflow takes in a call; of params a hundred


def export_runs(rows: list[dict], runs_dir: Path, out: Path, program: str) -> int:
    """Write the runs of these rows into the new folder `out`; how many. Raises BadInput where the
    program is not installed.
    """
    module, package, build_writer = PROGRAMS[program]
    try:
        library = importlib.import_module(module)
    except ImportError as error:
        sentence = f"--to {program} needs the package {package}, which is not installed"
        raise BadInput(f"{sentence} ({one_line(error)})") from None
    rows = [row for row in rows if row["status"] != "unreadable"]
    out.mkdir(parents=True, exist_ok=True)
    write = build_writer(library, out, runs_dir.resolve().name)
    with Progress(len(rows), program, "runs") as bar:
        for row in rows:
            run = runs_dir / row["run"]
            config = {key: plain(row[key]) for key in HINTS if key in row}
            names = [key for key in row if key.startswith("val_")]
            scores = {f"final/{name}": row[name] for name in names}
            write(run, row, config, scores, read_points(run))
            bar.add()
    return len(rows)


def read_points(run: Path) -> list[tuple[str, float, int]]:
    """(name, value, step) of each number in a run's tables."""
    points = []
    for file, prefix in TABLES.items():
        for row in read_csv(run / file) if (run / file).is_file() else []:
            step = int(row.pop("step"))
            points += [(f"{prefix}/{name}", float(row[name]), step) for name in row if row[name]]
    return points


def tensorboard_writer(library, out: Path, _):
    """Scalars against the step, the config as hyper-parameters with the final scores."""

    def write(run, row, config, scores, points):
        with library.SummaryWriter(str(out / run.name)) as writer:
            for point in points:
                writer.add_scalar(*point)
            writer.add_hparams(config | {"status": row["status"]}, scores, run_name=".")

    return write


def mlflow_writer(library, out: Path, name: str):
    """An experiment in MLflow's store of files, a run in it for each of ours, under our names."""
    # or MLflow 3 wants a database, and packages for it
    os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
    client = library.MlflowClient(tracking_uri=out.resolve().as_uri())
    experiment = client.create_experiment(name)
    states = {"finished": "FINISHED", "running": "RUNNING"}  # every other one is FAILED

    def write(run, row, config, scores, points):
        meta = read_meta(run)
        started = meta.get("started_utc", "1970-01-01T00:00:00+00:00")
        start_ms = int(datetime.datetime.fromisoformat(started).timestamp() * 1000)
        end_ms = start_ms + int(1000 * row.get("wall_s", 0))
        tags = {"mlflow.source.git.commit": meta.get("commit") or ""}
        created = client.create_run(experiment, start_ms, tags, run.name)
        run_id = created.info.run_id
        params = [library.entities.Param(*item) for item in config.items()]
        client.log_batch(run_id, params=params)
        last_step = max([step for _, _, step in points], default=0)
        points = points + [(name, value, last_step) for name, value in scores.items()]
        metrics = []
        for name, value, step in points:
            metrics.append(library.entities.Metric(name, value, end_ms, step))
        for first in range(0, len(metrics), MOST_AT_ONCE):
            client.log_batch(run_id, metrics=metrics[first : first + MOST_AT_ONCE])
        client.set_terminated(run_id, states.get(row["status"], "FAILED"), end_ms)

    return write


PROGRAMS = {
    "tensorboard": ("torch.utils.tensorboard", "tensorboard", tensorboard_writer),
    "mlflow": ("mlflow", "mlflow-skinny", mlflow_writer),
}
