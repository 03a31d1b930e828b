"""The model card of a handover (Mitchell et al. 2019), every number of it from the run's files."""

from pathlib import Path

from lib.files import file_digest, read_json
from lib.metrics import share_interval
from lib.runpage import score_table

CARD = """# Model card: {run}

## Use

`sh run.sh PATCHES [--out FILE]` on Linux verifies the stick, installs from it, tests itself and
predicts. PATCHES are images of 96x96 pixels, a folder or tar of them, an .h5 or a PCam folder;
predictions.csv gets a row for each. It runs on torch {torch} and was trained on {trained_torch}.

## Intended use

Research and teaching: ranking 96x96 patches of H&E-stained lymph node sections by the probability
that their centre 32x32 holds tumour. It is not a medical device; no diagnosis, and no decision
about a patient, may rest on it.

## Model

`{cfg.model}`, {num_parameters:,} parameters, {cfg.precision}, {cfg.views} view(s) a patch,
positive from probability {threshold:g}. best.pt: SHA-256 `{digest}`.

## Data

PatchCamelyon (Veeling et al. 2018, from Camelyon16, CC0) or patches in its format, folder
`{folder}`; validation: {valid[num]:,} patches, {valid[num_positive]:,} of them positive. {trained}
{files}

## Training

Epoch {summary[best_epoch]} of {summary[num_epochs]}, chosen by {cfg.select_metric} on the
validation split; {summary[num_steps]:,} steps of {cfg.batch_size} patches, {cfg.optimizer},
learning rate {cfg.lr:g}, seed {cfg.seed}. Commit {commit}. All parameters: `model/config.yaml`.

## Scores

On the validation split, at threshold 0.5:

{scores}

95% intervals over patches: {intervals}. That of the AUC is after Hanley and McNeil (1982), those of
shares after Wilson (1927). They take patches for independent; patches of one slide are not, so the
truth is less certain.

The constant answers always positive; for accuracy it is the larger class, for the log loss the
prevalence.
{decision}

## Limits

- The epoch was chosen on the patches that are scored here, so the scores flatter. They are no
  scores on PatchCamelyon's official test split; patches that were recompressed as JPEG, or
  sampled, compare with no published score.
- Another scanner, laboratory, stain or magnification shifts the colours and may cost any part of
  the score. predictions.csv has a drift score a patch, and a batch unlike the training data gets
  a warning: it knows brightness, colour and sharpness, nothing else. Only the centre 32x32 was
  labelled.
- Another processor or build of torch rounds otherwise: the self-test compares with
  `expected.csv`, within the tolerance in `stick.json`. Its patches are drawn, and say nothing
  about tissue.

## Software

{num_packages} packages with versions and licences: `packages.csv`. Program and weights: MIT,
`code/LICENSE`.
"""


def model_card(run: Path, cfg, checkpoint: dict, packages: list[dict]) -> str:
    """The model card as Markdown."""
    summary = read_json(run / "summary.json")
    meta = read_json(run / "meta.json")
    versions = {package["package"]: package["version"] for package in packages}
    trained = "Trained on {num:,} patches, {num_positive:,} positive."
    files = [f"- {name}: SHA-256 `{digest}`" for name, digest in checkpoint["data"].items()]
    return CARD.format(
        run=run.resolve().name,
        torch=versions["torch"],
        trained_torch=meta["versions"]["torch"],
        cfg=cfg,
        num_parameters=meta["model"]["num_parameters"],
        threshold=checkpoint["threshold"],
        digest=file_digest(run / "best.pt"),
        folder=Path(cfg.data_dir).name,
        valid=meta["rows"]["valid"],
        trained=trained.format(**meta["rows"]["train"]),
        files="\n".join(files),
        summary=summary,
        commit=meta["commit"] or "not recorded",
        scores=score_table(summary, summary, "val_").to_markdown(),
        intervals=describe_intervals(summary),
        decision=describe_decision(checkpoint),
        num_packages=len(packages),
    )


def describe_intervals(summary: dict) -> str:
    """The 95% intervals of AUC, sensitivity and specificity on validation."""
    tp, fn, tn, fp = (summary[f"val_{name}"] for name in ("tp", "fn", "tn", "fp"))
    intervals = {
        "AUC": auc_interval(summary["val_auc"], tp + fn, tn + fp),
        "sensitivity (recall)": share_interval(tp, tp + fn),
        "specificity": share_interval(tn, tn + fp),
    }
    bounds = [f"{name} {low:.4f} to {high:.4f}" for name, (low, high) in intervals.items()]
    return ", ".join(bounds)


def describe_decision(checkpoint: dict) -> str:
    """What the stored threshold means, where a checkpoint says so."""
    if not checkpoint["calibration"]:
        return "Probabilities are not calibrated."
    return (
        "Threshold {threshold:.4f} and calibration were chosen on half of the validation patches."
        " On the other half: recall {recall:.4f}, specificity {specificity:.4f}, precision"
        " {precision:.4f}, f2 {f2:.4f}; expected calibration error {ece:.4f}."
    ).format(**checkpoint["calibration"]["decision"], ece=checkpoint["calibration"]["after"]["ece"])


def auc_interval(auc: float, num_positive: int, num_negative: int) -> tuple[float, float]:
    """95% interval of an AUC from the counts of the classes alone.

    The AUC is the share of pairs in the right order. The interval is Wilson's for as many
    independent pairs as have the variance of Hanley and McNeil (1982).
    """
    same_positive = (num_positive - 1) * (1 - auc) / (2 - auc)
    same_negative = (num_negative - 1) * auc / (1 + auc)
    num_independent = num_positive * num_negative / (1 + same_positive + same_negative)
    return share_interval(auc * num_independent, num_independent)
