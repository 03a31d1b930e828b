"""The audit of a model on labelled patches: each is predicted once, and what is chosen on one half
is judged on the other.
"""

import math
from pathlib import Path

import numpy as np
import torch

from lib.audit import finding
from lib.audit.copies import link_copies
from lib.audit.model_page import plot_errors, write_model_page
from lib.audit.resampling import (
    PREVALENCES,
    at_prevalence,
    estimate,
    resampled_curves,
    resampled_scores,
)
from lib.audit.shortcut import check_shortcuts, map_evidence
from lib.audit.slices import (
    JUDGED,
    Answers,
    build_slices,
    conclude,
    describe_patches,
    measure_slices,
    slide_slices,
    split_answers,
)
from lib.batches import PatchSource, fold_of_rows, open_train_valid
from lib.calibration import (
    NUM_BINS,
    calibrate,
    calibration_scores,
    choose_threshold,
    complete_checkpoint,
    find_bins,
    fit_scaling,
)
from lib.checkpoint import checkpoint_path, load_model, warn_of_views
from lib.command import BadInput, without_nan
from lib.config import change_free_keys, parse_overrides
from lib.device import choose_device
from lib.figures import figure_png
from lib.files import file_digest, write_csv, write_json
from lib.fingerprint import fingerprint
from lib.groups import groups_for_halves
from lib.metrics import (
    as_arrays,
    compute_metrics,
    constant_alarm,
    constant_baselines,
    share_interval,
    sigmoid,
)
from lib.pcam import Split, open_split, split_path
from lib.predict import predict_batch, ready_to_predict
from lib.progress import Progress
from lib.rundir import git_state
from lib.seeding import set_determinism
from lib.splitwriter import sole_writer

TABLES = ("thresholds", "curves", "reliability", "slices", "shortcut", "errors", "predictions")
FILES = (
    "findings.json",
    "scores.json",
    "model.html",
    *(f"{name}.png" for name in ("prices", "curves", "reliability", "slices", "errors")),
    *(f"{name}.csv" for name in TABLES),
)
RECALLS, COSTS = (0.9, 0.95, 0.99), (1, 5, 10, 50)
MOST_ECE, NUM_SIMULATED = 0.03, 500
NUM_PICTURES, HEAT_STEP_PX = 12, 8  # of false positives, and of false negatives
ERROR_COLUMNS = ("split", "index", "label", "probability", "prediction", "kind", "rank", "slide")
GRID = np.linspace(0, 1, 101)  # of recall and of the false positive rate


def audit_model(
    ckpt, directory, split_name: str, out: Path, overrides, device="auto", with_patches=True
) -> dict:
    """Audit a checkpoint on a split of a folder into OUT; gives counts and the main scores for the
    terminal.

    Raises BadInput for a checkpoint or data that cannot be used, and where a half of the rows lacks
    a class.
    """
    device = choose_device(device)
    model, cfg, checkpoint = load_model(ckpt)
    cfg = change_free_keys(cfg, parse_overrides(overrides))
    set_determinism(cfg.deterministic)
    warn_of_views(checkpoint["calibration"], cfg.views)
    split = open_split(directory, split_name)
    if Path(directory).resolve() == out.resolve():
        raise BadInput(f"{directory}: OUT may not be the data themselves")
    if len(np.unique(split.labels)) < 2:
        raise BadInput(
            f"{directory}: all patches of split {split_name} have the label {split.labels[0]}, both"
            " are needed"
        )
    groups = groups_for_halves(split, directory)
    kind, half = (
        "groups that share tissue" if split.slides is None else "slides",
        fold_of_rows(groups, 2),
    )
    if any(len(np.unique(split.labels[half == side])) < 2 for side in (0, 1)):
        raise BadInput(
            f"{directory}: the {kind} of split {split_name} do not make two halves with both"
            " classes in each"
        )
    copies = groups if split.slides is None else link_copies(split.images)
    model = ready_to_predict(model.to(device), cfg.precision)

    def predict(patches: torch.Tensor, views: int = 1) -> np.ndarray:
        parts = patches.split(cfg.eval_batch_size)
        found = (
            predict_batch(model, part.to(device), cfg.precision, views, checkpoint["preprocessing"])
            for part in parts
        )
        return np.concatenate([logits.cpu().numpy() for logits in found]).astype(np.float64)

    def predict_calibrated(patches: torch.Tensor) -> np.ndarray:
        return calibrate(predict(patches), checkpoint["calibration"])

    if not (out / "scores.json").exists() and (
        foreign := [name for name in FILES if (out / name).exists()]
    ):
        raise BadInput(
            f"{out} holds a {foreign[0]} that no audit of a model wrote: choose another OUT"
        )
    with sole_writer(out):
        raw = predict_split(lambda patches: predict(patches, cfg.views), split)
        logits, threshold = calibrate(raw, checkpoint["calibration"]), checkpoint["threshold"]
        answers = split_answers(split.labels, sigmoid(logits), threshold, groups)
        findings = check_rows(split, directory, checkpoint) + check_answers(
            split.labels, logits, threshold
        )
        tables = {name: [] for name in TABLES}

        def keep(found, **rows) -> None:
            findings.extend(found)
            tables.update(rows)

        thresholds, found = price_thresholds(answers)
        keep(found, thresholds=thresholds, curves=draw_curves(answers))
        calibration, bins, found = check_calibration(answers, raw, checkpoint["calibration"])
        keep(found, reliability=bins)
        features, colours = describe_patches(split.images)
        slices = measure_slices(build_slices(features, copies, answers.rows[0]), answers)
        # a slide lies in one half: its own patches are halved, by what they share
        if split.slides is not None:
            by_copies = split_answers(answers.labels, answers.probs, threshold, copies)
            slices += measure_slices(slide_slices(split.slides), by_copies)
        if not slices:
            raise BadInput(
                f"{directory}: the patches of split {split_name} all look the same, there is"
                " nothing to compare"
            )
        worst = conclude(slices)
        keep(check_slices(slices, worst), slices=slices)
        shortcut, found = check_shortcuts(
            predict_calibrated, split, answers, logits, colours, groups
        )
        keep(found, shortcut=shortcut)
        tables |= {
            "errors": list_errors(split, answers),
            "predictions": list_predictions(split, answers),
        }

        shown = [row for row in tables["errors"] if row["rank"] <= NUM_PICTURES]
        patches = split.images.read([row["index"] for row in shown])
        maps = map_evidence(predict_calibrated, torch.from_numpy(patches), HEAT_STEP_PX)
        scores = {
            "checkpoint": (
                {
                    "path": str(checkpoint_path(ckpt)),
                    "sha256": file_digest(checkpoint_path(ckpt)),
                }
                | {"weights_sha256": checkpoint["weights_sha256"], "threshold": threshold}
                | {"calibration": checkpoint["calibration"], "views": cfg.views}
            ),
            "data": {
                "directory": str(directory),
                "split": split_name,
                "sha256": fingerprint(directory, [split_name]),
            },
            "commit": git_state()["commit"],
            "halves": [
                {"use": use, "num": len(rows), "num_positive": int(answers.labels[rows].sum())}
                | {"groups": kind, "num_groups": len(np.unique(groups[rows]))}
                for use, rows in zip(("chosen on", "judged on"), answers.rows, strict=True)
            ],
            "global": global_scores(answers),
            "constant_baselines": constant_baselines(answers.labels[answers.rows[1]]),
            "worst_confirmed_slice": worst,
            "num_slices": len(slices),
            "calibration": calibration,
            "all_rows": compute_metrics(split.labels, logits, threshold),
        }
        return write_all(
            out, scores, findings, tables, shown, patches if with_patches else None, maps
        )


def recalibrate(ckpt, directory, overrides, device: str) -> None:
    """Calibrate a checkpoint anew, in place, on a folder's train and valid splits. `overrides` may
    change free keys.
    """
    changes = {"data_dir": str(directory), **parse_overrides(overrides)}
    cfg = change_free_keys(load_model(ckpt)[1], changes)
    set_determinism(cfg.deterministic)
    train, valid = open_train_valid(cfg)
    source = PatchSource(valid[0].images, cfg.data_residence, choose_device(device))
    complete_checkpoint(ckpt, train, valid, source, cfg)


def predict_split(predict, split: Split) -> np.ndarray:
    """Logits float64 (N,) of a split. Raises BadInput where the model gives one that is not a
    number.
    """
    parts = []
    with Progress(len(split), f"predicting {split.name}") as bar:
        for _, block in split.images.blocks(256):
            parts.append(predict(torch.from_numpy(np.ascontiguousarray(block))))
            bar.add(len(block))
    logits = np.concatenate(parts)
    if not np.isfinite(logits).all():
        raise BadInput(
            f"the model answers {np.count_nonzero(~np.isfinite(logits)):,} patches with what is no"
            " finite number"
        )
    return logits


def check_rows(split: Split, directory, checkpoint: dict) -> list[dict]:
    """Whether the checkpoint has seen these rows before."""
    name = split_path(directory, split.name, "x").name
    digest = fingerprint(directory, [split.name])[name]
    seen = [path for path, known in checkpoint["data"].items() if known == digest]
    if not seen:
        return []
    if "train" in seen[0]:
        advice = "audit it on patches that it has not seen: --split valid or test"
        return [
            finding(
                "rows",
                "warning",
                "the model was trained on these patches",
                "none",
                advice,
                split=split.name,
            )
        ]
    measured = (
        "the epoch, and what else the checkpoint stores, was chosen on these patches: scores are"
        " somewhat optimistic"
    )
    return [finding("rows", "note", measured, split=split.name)]


def check_answers(labels, logits, threshold: float) -> list[dict]:
    alarm = constant_alarm(compute_metrics(labels, logits, threshold), labels)
    return (
        [finding("answers", "error", alarm.removeprefix("ALARM: "), advice="train again")]
        if alarm
        else []
    )


def judge(answers: Answers, threshold: float) -> dict[str, np.ndarray]:
    """The resampled scores of the second half at a threshold."""
    rows = answers.rows[1]
    return resampled_scores(
        answers.labels[rows], answers.probs[rows], threshold, answers.weights[1]
    )


def global_scores(answers: Answers) -> dict[str, dict]:
    drawn = judge(answers, answers.threshold).items()
    return {
        name: dict(zip(("value", "low", "high"), estimate(values), strict=True))
        for name, values in drawn
    }


def price_thresholds(answers: Answers) -> tuple[list[dict], list[dict]]:
    """Rows of thresholds, chosen on the first half, with what each costs on the second; and
    findings on the stored one.
    """
    labels, probs = (values[answers.rows[0]] for values in (answers.labels, answers.probs))
    rules = {"F2-optimal": ("f2", 0, 0)} | {
        f"recall at least {least:g}": ("recall", least, 0) for least in RECALLS
    }
    rules |= {
        f"a miss costs {cost} false alarm{'s' * (cost > 1)}": ("cost", 0, cost) for cost in COSTS
    }
    thresholds = {name: choose_threshold(labels, probs, *rule) for name, rule in rules.items()}
    thresholds |= {"stored in the checkpoint": answers.threshold, "one half": 0.5}
    thresholds |= {"always positive": 0.0, "always negative": math.inf}
    rows, f2 = [], {}
    for rule, threshold in thresholds.items():
        drawn = judge(answers, threshold)
        row, f2[rule] = (
            {"rule": rule, "threshold": threshold, "num": len(answers.rows[1])},
            drawn["f2"],
        )
        for name in ("recall", "specificity", "precision", "f2"):
            row[name], row[f"{name}_low"], row[f"{name}_high"] = estimate(drawn[name])
        for prevalence in PREVALENCES:
            meaning = at_prevalence(row["recall"], row["specificity"], prevalence)
            row |= {
                f"{name}_at_{prevalence:g}": value
                for name, value in meaning.items()
                if name != "prevalence"
            }
        rows.append(row)
    best, stored, always = (
        f2[name] for name in ("F2-optimal", "stored in the checkpoint", "always positive")
    )
    lost, low, high = estimate(best - stored)
    measured = (
        f"F2 {stored[0]:.3f} at the stored threshold {answers.threshold:.3g}, {best[0]:.3f} at "
    )
    measured += (
        f"{thresholds['F2-optimal']:.3g} ({lost:+.3f}, {low:+.3f} to {high:+.3f}); always positive"
        f" {always[0]:.3f}"
    )
    if low > 0 or stored[0] <= always[0]:
        what = (
            "is no better than calling every patch positive"
            if stored[0] <= always[0]
            else "gives F2 away"
        )
        advice = (
            f"the stored threshold {what}: inference.py --threshold, with thresholds.csv for the"
            " price of each"
        )
        return rows, [finding("threshold", "warning", measured, "the best, within chance", advice)]
    return rows, [finding("threshold", "note", measured)]


def reliability(labels, probs) -> list[dict]:
    """The bins of equal width over probabilities (N,) that are not empty: low, high, num,
    mean_probability, positive_share.
    """
    labels, probs = as_arrays(labels, probs)
    bins = find_bins(probs)
    rows = []
    for number in np.unique(bins).tolist():
        inside = bins == number
        row = {
            "low": number / NUM_BINS,
            "high": (number + 1) / NUM_BINS,
            "num": int(inside.sum()),
            "mean_probability": float(probs[inside].mean()),
            "positive_share": float(labels[inside].mean()),
        }
        rows.append(row)
    return rows


def check_calibration(
    answers: Answers, raw: np.ndarray, stored: dict | None
) -> tuple[list[dict], list[dict], list[dict]]:
    """Rows of calibration scores on the second half, bins of reliability there, and findings, from
    logits (N,) before the `stored` calibration of the checkpoint."""
    first, second = answers.rows
    labels, prior = answers.labels[second], answers.labels[first].mean()
    scaled = {"as the model says": (1.0, 0.0)}
    scaled |= (
        {"as the checkpoint scales them": (stored["temperature"], stored["offset"])}
        if stored
        else {}
    )
    used, fitted = list(scaled)[-1], "with a temperature and an offset of the other half"
    chosen_on = answers.labels[first], raw[first]
    scaled["with a temperature of the other half"] = fit_scaling(*chosen_on, with_offset=False)
    scaled[fitted] = fit_scaling(*chosen_on)
    scaled["always the prevalence"] = math.inf, math.log(prior / (1 - prior))
    rows, bins, rng = {}, [], np.random.default_rng(0)
    for name, (temperature, offset) in scaled.items():
        logits = raw[second] / temperature + offset
        probs = sigmoid(logits)
        by_chance = [
            calibration_scores(rng.random(len(probs)) < probs, logits)["ece"]
            for _ in range(NUM_SIMULATED)
        ]
        rows[name] = {"probabilities": name, "temperature": temperature, "offset": offset}
        rows[name] |= calibration_scores(labels, logits) | {
            "ece_by_chance": float(np.quantile(by_chance, 0.95))
        }
        for row in reliability(labels, probs):
            low, high = share_interval(round(row["positive_share"] * row["num"]), row["num"])
            bins.append(
                {"probabilities": name}
                | row
                | {"positive_share_low": low, "positive_share_high": high}
            )
    limit = max(MOST_ECE, rows[used]["ece_by_chance"])
    measured = (
        f"ECE {rows[used]['ece']:.3f} {used}, {rows[fitted]['ece']:.3f} {fitted}; by chance up to "
    )
    measured += f"{rows[used]['ece_by_chance']:.3f}"
    bad = rows[used]["ece"] > limit
    advice = "do not read the probabilities as such: calibrate" if bad else ""
    return (
        [*rows.values()],
        bins,
        [finding("calibration", "warning" if bad else "note", measured, f"{limit:.3f}", advice)],
    )


def draw_curves(answers: Answers) -> list[dict]:
    """Rows of the ROC (x: false positive rate, y: recall) and precision-recall curves (x: recall,
    y: precision).
    """
    rows = answers.rows[1]
    curves = resampled_curves(answers.labels[rows], answers.probs[rows], answers.weights[1], GRID)
    points = []
    for curve, name in (("roc", "recall"), ("pr", "precision")):
        for x, values in zip(GRID.tolist(), curves[name].T, strict=True):
            if x == 0 and curve == "pr":
                continue  # where nothing is called there is no precision
            points.append(
                {
                    "curve": curve,
                    "x": x,
                    **dict(zip(("y", "low", "high"), estimate(values), strict=True)),
                }
            )
    return points


def check_slices(rows: list[dict], worst: dict | None) -> list[dict]:
    """Whether slices are confirmed to be worse than the rest: a finding with a row for each of
    them.
    """
    tried, num_found = (
        f"{rows[0]['num_tried']} comparisons of {len(rows)} slices",
        sum(bool(row["found"]) for row in rows),
    )
    measured = f"{num_found} of {len(rows)} slices fall behind the rest on one half, "
    if worst is None:
        return [
            finding("slices", "note", f"{measured}none of them for certain on the other too", tried)
        ]
    keys = (
        "feature",
        "slice",
        "num",
        "num_positive",
        "confirmed",
        *(end + name for name in JUDGED for end in ("", "rest_")),
    )
    confirmed = [{key: row[key] for key in keys} for row in rows if row["confirmed"]]
    name = worst["measure"]
    measured += (
        f"{len(confirmed)} of them on the other too; worst, {worst['feature']} {worst['slice']}:"
        f" {name} "
    )
    measured += (
        f"{worst[name]:.3f} ({worst[f'{name}_low']:.3f} to {worst[f'{name}_high']:.3f}), elsewhere "
    )
    measured += f"{worst[f'rest_{name}']:.3f}"
    advice = "look at their patches: more like them in training, or a threshold of their own"
    return [finding("slices", "warning", measured, f"none of {tried}", advice, confirmed)]


def list_errors(split: Split, answers: Answers) -> list[dict]:
    """All errors, false positives first, each kind with the most confident first; `rank` counts
    within the kind.
    """
    probs, rows = answers.probs, []
    called = probs >= answers.threshold
    for kind, wrong, order in (
        ("false positive", called & (split.labels == 0), -probs),
        ("false negative", ~called & (split.labels == 1), probs),
    ):
        index = np.flatnonzero(wrong)
        for rank, row in enumerate(index[np.argsort(order[index], kind="stable")].tolist(), 1):
            known = {
                "split": split.name,
                "index": row,
                "label": int(split.labels[row]),
                "probability": float(probs[row]),
            }
            slide = "" if split.slides is None else str(split.slides[row])
            rows.append(
                known | {"prediction": int(called[row]), "kind": kind, "rank": rank, "slide": slide}
            )
    return rows


def list_predictions(split: Split, answers: Answers) -> list[dict]:
    """Rows as inference.py writes them."""
    where = {"source": str(split.images.path)}
    cells = enumerate(zip(answers.probs.tolist(), split.labels.tolist(), strict=True))
    told = (
        (row, {"probability": f"{prob:.9g}", "prediction": int(prob >= answers.threshold)}, label)
        for row, (prob, label) in cells
    )
    return [where | {"index": row} | said | {"label": label} for row, said, label in told]


def write_all(
    out: Path, scores: dict, findings: list[dict], tables: dict, shown, patches, maps
) -> dict:
    """Write every file of an audit, scores.json first and findings.json last, and give what the
    terminal is told.
    """
    for name in ("findings.json", "errors.png"):  # of an audit before this one
        (out / name).unlink(missing_ok=True)
    write_json(out / "scores.json", scores)
    for name, rows in tables.items():
        header = list(rows[0]) if rows else ERROR_COLUMNS
        write_csv(out / f"{name}.csv", header, [without_nan(list(row.values())) for row in rows])
    if patches is not None and shown:
        (out / "errors.png").write_bytes(figure_png(plot_errors(shown, patches, maps)))
    page = write_model_page(out / "model.html", scores, findings, tables, shown, patches, maps)
    write_json(out / "findings.json", findings)
    told = {
        name: scores["global"][name]["value"] for name in ("auc", "f2", "recall", "specificity")
    }
    told |= {"ece": {row["probabilities"]: row["ece"] for row in scores["calibration"]}}
    told |= {"worst_confirmed_slice": scores["worst_confirmed_slice"], "page": str(page)}
    return told | {
        f"num_{kind}s": sum(found["severity"] == kind for found in findings)
        for kind in ("error", "warning")
    }
