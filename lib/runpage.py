"""The page of one run: what it is, its scores beside constant answers, its curves, its config; and,
of predictions with labels, decisions and examples.
"""

from pathlib import Path

import numpy as np

from lib.blocks import Figure, Gallery, Heading, Table, Words, show, write_page
from lib.command import BadInput
from lib.figures import EPOCH_PANELS, STEP_PANELS, column, figure_png, plot_columns, plot_decisions
from lib.files import read_csv, read_edited_csv, read_json
from lib.metrics import compute_metrics, constant_baselines
from lib.pcam import open_images
from lib.rundir import read_run_config

NUM_EXAMPLES = 24  # patches that the model gets wrong
SHOWN_SCORES = {  # a score and what a constant answer gets
    "AUC": ("auc", "constant_auc"),
    "PR-AUC": ("pr_auc", "constant_pr_auc"),
    "F2": ("f2", "always_positive_f2"),
    "F1": ("f1", "always_positive_f1"),
    "accuracy": ("accuracy", "majority_accuracy"),
    "log loss (nats)": ("loss", "prior_loss"),
}
CONSTANTS = dict(SHOWN_SCORES.values())


def write_run_page(
    run: Path, out, summary: dict, predictions="", threshold: float = 0.5, remark: str = ""
) -> Path:
    """Write the page of a run whose last file is, or will be, `summary`; gives its path.

    `predictions` is a CSV of inference.py with labels, decided at `threshold`. Raises BadInput
    where the run has no finished epoch, and where the predictions cannot be shown.
    """
    epochs = read_csv(run / "epochs.csv")
    if not epochs:
        raise BadInput(f"{run} is {summary.get('status')}: it has no finished epoch to show")
    cfg = read_run_config(run)
    by_epoch = figure_png(plot_columns(epochs, "epoch", EPOCH_PANELS))
    blocks = [
        Words(remark, "note"),
        Heading("The run"),
        fact_table(run, cfg, read_json(run / "meta.json"), summary, epochs),
        Heading("Scores"),
        score_table(summary, summary, "val_"),
        Words("Scores of the best epoch on validation, decided at 0.5.", "note"),
        Heading("Epoch by epoch"),
        Figure("Loss and scores per epoch, beside constant answers", by_epoch),
    ]
    if (run / "steps.csv").exists():  # which a champion does not keep
        by_step = figure_png(plot_columns(read_csv(run / "steps.csv"), "step", STEP_PANELS))
        words = "Loss, gradient norm and learning rate per step"
        blocks += [Heading("Step by step"), Figure(words, by_step)]
    if predictions:
        blocks += prediction_blocks(predictions, threshold)
    blocks += [Heading("Config"), Table(("key", "value"), list(cfg.as_dict().items()))]
    return write_page(out, f"Run {run.name}", blocks)


def fact_table(run: Path, cfg, meta: dict, summary: dict, epochs: list[dict]) -> Table:
    """What was trained on what, where and how fast, in its last epoch."""
    machine = meta["machine"]
    rate = epochs[-1]["images_per_s"]
    num_train = meta["rows"]["train"]["num"]
    facts = [
        ("run", run.name),
        ("status", summary["status"]),
        ("model", f"{cfg.model}, {meta['model']['num_parameters']:,} parameters"),
        ("trained on", f"{num_train:,} patches, {summary['num_epochs']} epochs, seed {cfg.seed}"),
        ("speed", f"{rate} images/s on {machine['cpu']}, {machine['device']}"),
        ("wall time", f"{summary['wall_s']:.0f} s"),
        ("commit", meta["commit"] or "not in a git repository"),
        ("weights SHA-256", summary["weights_sha256"]),
    ]
    return Table(("what", "value"), facts)


def score_table(scores: dict, constants: dict, prefix: str = "") -> Table:
    """Each score beside what a constant answer gets; `prefix` begins a score's name."""
    rows = []
    for title, (name, constant) in SHOWN_SCORES.items():
        value = mark_score(name, scores.get(prefix + name), constants)
        rows.append((title, value, constants[constant]))
    return Table(("score", "model", "constant answer"), rows)


def mark_score(name: str, value, constants: dict, shown: str = ""):
    """`shown`, by default the value itself. A warning is added where the score is worse than that
    of a constant answer.

    `constants` has the scores of constant answers under the names of SHOWN_SCORES.
    """
    constant = constant_of(name, constants)
    shown = shown or value
    if not isinstance(value, float) or constant is None:
        return shown
    is_worse = value > constant if name.endswith("loss") else value < constant
    if not is_worse:
        return shown
    return f"{show(shown)} **(worse than the constant answer, {show(constant)})**"


def constant_of(name: str, constants: dict):
    """The score `name`, such as val_auc, of a constant answer. None where `name` is no score."""
    score = name.removeprefix("val_").removeprefix("half_")
    return constants.get(CONSTANTS.get(score))


def prediction_blocks(path, threshold: float) -> list:
    """Scores, curves and example patches of a predictions.csv. Raises BadInput where it has no
    probabilities with labels.
    """
    columns = ("source", "index", "probability", "label")
    rows = [row for row in read_edited_csv(path, columns) if row["probability"]]
    labels = column(rows, "label")
    if not rows or not np.isin(labels, (0, 1)).all():
        raise BadInput(f"{path} needs rows with a label 0 or 1")
    labels = labels.astype(int)
    probs = column(rows, "probability")
    clipped = np.clip(probs, 1e-12, 1 - 1e-12)
    scores = compute_metrics(labels, np.log(clipped / (1 - clipped)), threshold)
    drawn = figure_png(plot_decisions(labels, probs, threshold))
    wrong = np.flatnonzero((probs >= threshold) != labels)
    order = np.argsort(-np.abs(probs[wrong] - threshold), kind="stable")
    patches, captions = [], []
    for place in wrong[order[:NUM_EXAMPLES]]:
        row = rows[place]
        patches.append(open_images(row["source"]).read([row["index"]])[0])
        captions.append(f"row {row['index']}: {row['label']}, p = {probs[place]:.3f}")
    note = (
        f"Decisions at probability {threshold:g}. An F2 near that of the constant answer says"
        " nothing for the model."
    )
    return [
        Heading(f"Scores on the {len(rows):,} patches of {Path(path).name}"),
        score_table(scores, constant_baselines(labels)),
        Words(note, "note"),
        Figure("ROC, precision-recall and confusion matrix", drawn),
        Heading(f"The most certain of {len(wrong):,} errors, with label and probability"),
        Gallery(patches, captions),
    ]
