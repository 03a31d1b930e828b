"""The page of one run: what it is, its scores beside constant answers, its curves, its config; and,
of predictions with labels, decisions and examples.
"""

import dataclasses
from pathlib import Path

import numpy as np

from lib.blocks import Figure, Gallery, Heading, Table, Words, write_page
from lib.command import BadInput
from lib.config import plain
from lib.figures import figure_png, plot_decisions, plot_epochs, plot_steps
from lib.files import read_csv, read_edited_csv, read_json, row_number
from lib.inputs import is_image, list_blocks
from lib.metrics import compute_confusion, compute_metrics, constant_baselines
from lib.pcam import open_images
from lib.rundir import read_run_config

NUM_EXAMPLES = 12  # patches of each kind
SHOWN_SCORES = {  # a score and what a constant answer gets
    "AUC": ("auc", "constant_auc"),
    "PR-AUC": ("pr_auc", "constant_pr_auc"),
    "F2": ("f2", "always_positive_f2"),
    "F1": ("f1", "always_positive_f1"),
    "accuracy": ("accuracy", "majority_accuracy"),
    "log loss (nats)": ("loss", "prior_loss"),
}


def write_run_page(
    run: Path, out, summary: dict, predictions="", threshold: float = 0.5, remark: str = ""
) -> Path:
    """Write the page of a run whose last file is, or will be, `summary`; gives its path.

    `predictions` is a CSV of inference.py with labels, decided at `threshold`. Raises BadInput
    where the run has no finished epoch, and where the predictions cannot be shown.
    """
    epochs, steps = read_csv(run / "epochs.csv"), read_csv(run / "steps.csv")
    if not epochs or not steps:
        raise BadInput(f"{run} is {summary.get('status')}: it has no finished epoch to show")
    cfg, meta = read_run_config(run), read_json(run / "meta.json")
    by_epoch, by_step = figure_png(plot_epochs(epochs)), figure_png(plot_steps(steps))
    blocks = [Words(remark, "note")] if remark else []
    blocks += [
        Heading("The run"),
        fact_table(run, cfg, meta, summary),
        Heading("Scores"),
        score_table(summary, summary, "val_"),
        Words("Scores of the best epoch on validation, decided at 0.5.", "note"),
        Heading("Epoch by epoch"),
        Figure("Loss and scores per epoch, beside constant answers", by_epoch),
        Heading("Step by step"),
        Figure("Loss, gradient norm and learning rate per step", by_step),
    ]
    if predictions:
        blocks += prediction_blocks(predictions, threshold)
    values = [(key, plain(value)) for key, value in dataclasses.asdict(cfg).items()]
    blocks += [Heading("Config"), Table(("key", "value"), values)]
    return write_page(out, f"Run {run.name}", blocks)


def fact_table(run: Path, cfg, meta: dict, summary: dict) -> Table:
    """What was trained on what, where and how fast."""
    machine, num_train = meta["machine"], meta["rows"]["train"]["num"]
    speed = f"{summary['images_per_s']:,.0f} images/s" if summary["images_per_s"] else "no step"
    facts = [
        ("run", run.name),
        ("status", summary["status"]),
        ("model", f"{cfg.model}, {meta['model']['num_parameters']:,} parameters"),
        (
            "trained on",
            f"{num_train:,} patches, {summary['num_epochs']} epochs, seed {cfg.seed}",
        ),
        ("speed", f"{speed} on {machine['cpu']}, {machine['device']}"),
        ("wall time", f"{summary['wall_s']:.0f} s"),
        ("commit", meta["commit"] or "not in a git repository"),
        ("weights SHA-256", summary["weights_sha256"]),
    ]
    return Table(("what", "value"), facts)


def score_table(scores: dict, constants: dict, prefix: str = "") -> Table:
    """Each score beside what a constant answer gets; `prefix` begins a score's name."""
    rows = []
    for title, (name, constant) in SHOWN_SCORES.items():
        rows.append((title, scores.get(prefix + name), constants[constant]))
    return Table(("score", "model", "constant answer"), rows)


def prediction_blocks(path, threshold: float) -> list:
    """Scores, curves and example patches of a predictions.csv with labels."""
    rows, labels, probs = read_predictions(path)
    logits = np.log(np.clip(probs, 1e-12, 1)) - np.log(np.clip(1 - probs, 1e-12, 1))
    scores, constants = compute_metrics(labels, logits, threshold), constant_baselines(labels)
    confusion = compute_confusion(labels, probs >= threshold)
    drawn = figure_png(plot_decisions(labels, probs, threshold, confusion))
    note = (
        f"Decisions at probability {threshold:g}. An F2 near that of the constant answer says"
        " nothing for the model."
    )
    blocks = [
        Heading(f"Scores on the {len(rows):,} patches of {Path(path).name}"),
        score_table(scores, constants),
        Words(note, "note"),
        Figure("ROC, precision-recall and confusion matrix", drawn),
        Heading("Example predictions"),
    ]
    certainty = np.where(labels == 1, probs, 1 - probs)  # given to the true class
    for title, label, called, order in (
        ("Found: tumour called tumour, the most certain first", 1, 1, -certainty),
        ("Cleared: normal called normal, the most certain first", 0, 0, -certainty),
        ("Missed: tumour called normal, the most certain errors first", 1, 0, certainty),
        ("False alarms: normal called tumour, the most certain errors first", 0, 1, certainty),
    ):
        places = np.flatnonzero((labels == label) & ((probs >= threshold) == called))
        chosen = places[np.argsort(order[places], kind="stable")][:NUM_EXAMPLES]
        captions = [f"row {rows[place]['index']}, p = {probs[place]:.3f}" for place in chosen]
        patches = [read_patch(rows[place]) for place in chosen]
        blocks.append(Heading(f"{title} ({len(places):,})", 3))
        blocks.append(Gallery(patches, captions) if patches else Words("none", "note"))
    return blocks


def read_predictions(path) -> tuple[list[dict], np.ndarray, np.ndarray]:
    """The rows of a predictions.csv that have a probability, labels int (N,), probabilities float
    (N,).

    Raises BadInput for rows without a label, and for probabilities outside 0 to 1.
    """
    columns = ("source", "index", "probability", "label")
    rows = [row for row in read_edited_csv(path, columns) if row["probability"]]
    try:
        labels = np.array([("0", "1").index(row["label"]) for row in rows])
        probs = np.array([float(row["probability"]) for row in rows])
    except ValueError as error:
        raise BadInput(
            f"{path} needs a label of 0 or 1 and a probability in each row ({error})"
        ) from None
    if not rows or not ((probs >= 0) & (probs <= 1)).all():
        raise BadInput(f"{path} has no row, or a probability outside 0 to 1")
    return rows, labels, probs


def read_patch(row: dict) -> np.ndarray:
    """The patch uint8 (96, 96, 3) that a row of predictions.csv names."""
    source = row["source"]
    if source.endswith((".h5", ".hdf5")):
        images, index = open_images(source), row_number(row["index"])
        if index is None or index >= images.num:
            raise BadInput(f"{source} has no row {row['index'][:40]}, it has {images.num:,}")
        return images.read([index])[0]
    if not is_image(Path(source).name) or Path(source).is_dir():
        raise BadInput(f"the source {source!r} is no HDF5 file and no image")
    decode = next(list_blocks([source]))
    rows, images = decode()
    if rows[0].error:
        raise BadInput(rows[0].error)
    return images[0]
