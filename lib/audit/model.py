"""The audit of a model on labelled patches: each is predicted once, and what is chosen on one half
is judged on the other.
"""

import math
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from lib.audit import MODEL_PARTS, finding
from lib.audit.copies import link_copies
from lib.audit.model_page import plot_errors, write_model_page
from lib.audit.resampling import (
    LEAST_GROUPS,
    PREVALENCES,
    at_prevalence,
    estimate,
    resampled_curves,
    resampled_scores,
)
from lib.audit.shortcut import MOST_MAPPED, MOST_PROBED, check_shortcuts, map_evidence
from lib.audit.slices import (
    JUDGED,
    Answers,
    build_slices,
    conclude,
    describe_patches,
    measure_slices,
    slide_slices,
    split_answers,
    spread,
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
from lib.command import BadInput, say, without_nan
from lib.config import Config, change_free_keys, parse_overrides
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
from lib.progress import Progress, format_duration
from lib.rundir import git_state
from lib.seeding import set_determinism
from lib.splitwriter import sole_writer

TABLES = ("thresholds", "curves", "reliability", "slices", "shortcut", "errors", "predictions")
PICTURES = ("prices", "curves", "reliability", "slices", "errors")
FILES = (
    "findings.json",
    "scores.json",
    "model.html",
    *(f"{name}.png" for name in PICTURES),
    *(f"{name}.csv" for name in TABLES),
)
RECALLS, COSTS = (0.9, 0.95, 0.99), (1, 5, 10, 50)
MOST_ECE, NUM_SIMULATED = 0.03, 500
NUM_PICTURES, HEAT_STEP_PX = 12, 8  # of false positives, and of false negatives
GRID = np.linspace(0, 1, 101)  # of recall and of the false positive rate
ERROR_COLUMNS = ("split", "index", "label", "probability", "prediction", "kind", "rank", "slide")
BLOCK = 256  # patches that are read at once
NUM_TIMED = 64  # patches from which the duration is estimated
# passes that a patch costs: nine versions and sixteen views; and a map, of blocks of two distances
PROBES, MAP_PROBES, PICTURE_PROBES = 7 + 16, 37, 122


@dataclass
class Subject:
    """A model and N patches of a split: `rows` int64 (N,) says which."""

    split: Split
    rows: np.ndarray
    groups: np.ndarray  # (N,), kept whole in halves
    copies: np.ndarray  # (N,), groups of shared tissue
    model: torch.nn.Module
    device: torch.device
    cfg: Config
    checkpoint: dict
    findings: list[dict] = field(default_factory=list)
    tables: dict[str, list[dict]] = field(default_factory=dict)

    @property
    def labels(self) -> np.ndarray:
        return self.split.labels[self.rows]

    def read(self, places) -> np.ndarray:
        """The patches uint8 (B, 96, 96, 3) at these places of `rows`."""
        return self.split.images.read(self.rows[places])

    def blocks(self, label: str):
        """Yield all patches in blocks uint8 (B, 96, 96, 3), with a bar."""
        with Progress(len(self.rows), label) as bar:
            for start in range(0, len(self.rows), BLOCK):
                block = self.split.images.read(self.rows[start : start + BLOCK])
                yield block
                bar.add(len(block))

    def predict(self, patches, views: int = 1) -> np.ndarray:
        """Logits float64 (B,) of patches uint8 (B, 96, 96, 3), before calibration."""
        preprocessing, logits = self.checkpoint["preprocessing"], []
        for part in torch.as_tensor(patches).split(self.cfg.eval_batch_size):
            part = part.to(self.device)
            answer = predict_batch(self.model, part, self.cfg.precision, views, preprocessing)
            logits.append(answer.cpu().numpy())
        return np.concatenate(logits).astype(np.float64)

    def predict_calibrated(self, patches) -> np.ndarray:
        """Logits float64 (B,) of one view, as the checkpoint scales them."""
        return calibrate(self.predict(patches), self.checkpoint["calibration"])


def audit_model(
    ckpt,
    directory,
    split_name: str,
    out: Path,
    overrides,
    device="auto",
    with_patches=True,
    parts=MODEL_PARTS,
    limit=0,
) -> dict:
    """Audit a checkpoint on a split of a folder, or on `limit` of its patches, into OUT; gives
    counts and the main scores for the terminal.

    Raises BadInput for a checkpoint or data that cannot be used, and where a half of the rows lacks
    a class.
    """
    require_own(directory, out)
    subject = open_subject(ckpt, directory, split_name, overrides, device, limit)
    with sole_writer(out):
        say_duration(subject, parts)
        views, stored = subject.cfg.views, subject.checkpoint["calibration"]
        blocks = subject.blocks(f"predicting {split_name}")
        raw = np.concatenate([subject.predict(block, views) for block in blocks])
        if not np.isfinite(raw).all():
            num_wrong = np.count_nonzero(~np.isfinite(raw))
            raise BadInput(f"the model answers {num_wrong:,} patches with what is no finite number")
        logits, threshold = calibrate(raw, stored), subject.checkpoint["threshold"]
        answers = split_answers(subject.labels, sigmoid(logits), threshold, subject.groups)
        check_rows(subject, directory)
        check_answers(subject, logits, min(len(weights) for weights in answers.weights) > 1)

        scores = describe_audit(subject, ckpt, directory, answers)
        scores["all_rows"] = compute_metrics(subject.labels, logits, threshold)
        scores["parts"] = list(parts)
        if "thresholds" in parts:
            price_thresholds(subject, answers)
            subject.tables["curves"] = draw_curves(answers)
        if "calibration" in parts:
            scores["calibration"] = check_calibration(subject, answers, raw)
        if "slices" in parts or "shortcut" in parts:
            features, colours = describe_patches(subject.blocks("describing patches"))
        if "slices" in parts:
            scores |= check_slices(subject, answers, features)
        if "shortcut" in parts:
            predict, read = subject.predict_calibrated, subject.read
            rows, findings = check_shortcuts(predict, read, answers, logits, colours)
            subject.tables["shortcut"] = rows
            subject.findings += findings
        shown, patches, maps = [], None, []
        if "errors" in parts:
            subject.tables["errors"] = list_errors(subject, answers)
            shown = [row for row in subject.tables["errors"] if row["rank"] <= NUM_PICTURES]
            patches = subject.split.images.read([row["index"] for row in shown])
            heat = torch.from_numpy(patches)
            maps = map_evidence(subject.predict_calibrated, heat, HEAT_STEP_PX)
        subject.tables["predictions"] = list_predictions(subject, answers)
        return write_all(out, scores, subject, shown, patches if with_patches else None, maps)


def open_subject(ckpt, directory, split_name: str, overrides, device, limit: int) -> Subject:
    """The model and the patches of an audit, `limit` of them evenly spaced, or all for 0."""
    device = choose_device(device)
    model, cfg, checkpoint = load_model(ckpt)
    cfg = change_free_keys(cfg, parse_overrides(overrides))
    set_determinism(cfg.deterministic)
    warn_of_views(checkpoint["calibration"], cfg.views)
    split = open_split(directory, split_name)
    rows = np.arange(len(split))
    if 0 < limit < len(rows):
        rows = np.linspace(0, len(rows) - 1, limit).astype(np.int64)
    labels = split.labels[rows]
    if len(np.unique(labels)) < 2:
        raise BadInput(
            f"{directory}: all patches of split {split_name} have the label {labels[0]}, both are"
            " needed"
        )
    groups = groups_for_halves(split, directory)[rows]
    half = fold_of_rows(groups, 2)
    if any(len(np.unique(labels[half == side])) < 2 for side in (0, 1)):
        raise BadInput(
            f"{directory}: the {kind_of_groups(split)} of split {split_name} do not make two halves"
            " with both classes in each"
        )
    copies = groups if split.slides is None else link_copies(split.images)[rows]
    model = ready_to_predict(model.to(device), cfg.precision)
    return Subject(split, rows, groups, copies, model, device, cfg, checkpoint)


def kind_of_groups(split: Split) -> str:
    return "groups that share tissue" if split.slides is None else "slides"


def require_own(directory, out: Path) -> None:
    """Raise BadInput where OUT is the data, or holds files that no audit of a model wrote."""
    if Path(directory).resolve() == out.resolve():
        raise BadInput(f"{directory}: OUT may not be the data themselves")
    foreign = [name for name in FILES if (out / name).exists()]
    if foreign and not (out / "scores.json").exists():
        raise BadInput(
            f"{out} holds a {foreign[0]} that no audit of a model wrote: choose another OUT"
        )


def say_duration(subject: Subject, parts) -> None:
    """Say how long the audit takes, from the time that a few patches take."""
    num = len(subject.rows)
    patches = subject.read(np.arange(min(NUM_TIMED, num)))
    subject.predict(patches)  # the first one is slow
    started = time.perf_counter()
    subject.predict(patches)
    pass_s = (time.perf_counter() - started) / len(patches)
    started = time.perf_counter()
    describe_patches([patches])
    describe_s = (time.perf_counter() - started) / len(patches)
    num_passes = num * subject.cfg.views
    num_judged = num // 2
    if "shortcut" in parts:
        num_passes += min(MOST_PROBED, num_judged) * PROBES
        num_passes += min(MOST_MAPPED, num_judged) * MAP_PROBES
    if "errors" in parts:
        num_passes += 2 * NUM_PICTURES * PICTURE_PROBES
    seconds = num_passes * pass_s
    if "slices" in parts or "shortcut" in parts:
        seconds += num * describe_s
    say(
        f"{num:,} patches, {num_passes:,} passes of the model on {subject.device}: about"
        f" {format_duration(seconds)}, and the resampling (--limit and --parts make it shorter)"
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


def describe_audit(subject: Subject, ckpt, directory, answers: Answers) -> dict:
    """scores.json before its parts: what was audited, and the global scores."""
    path, checkpoint = checkpoint_path(ckpt), subject.checkpoint
    halves = []
    for use, rows in zip(("chosen on", "judged on"), answers.rows, strict=True):
        counts = {"num": len(rows), "num_positive": int(answers.labels[rows].sum())}
        num_groups = len(np.unique(subject.groups[rows]))
        kind = kind_of_groups(subject.split)
        halves.append({"use": use, **counts, "groups": kind, "num_groups": num_groups})
    judged = judge(answers, answers.threshold)
    overall = {}
    for name, values in judged.items():
        overall[name] = dict(zip(("value", "low", "high"), estimate(values), strict=True))
    return {
        "checkpoint": {
            "path": str(path),
            "sha256": file_digest(path),
            "weights_sha256": checkpoint["weights_sha256"],
            "threshold": checkpoint["threshold"],
            "calibration": checkpoint["calibration"],
            "views": subject.cfg.views,
        },
        "data": {
            "directory": str(directory),
            "split": subject.split.name,
            "num": len(subject.rows),
            "sha256": fingerprint(directory, [subject.split.name]),
        },
        "commit": git_state()["commit"],
        "halves": halves,
        "global": overall,
        "constant_baselines": constant_baselines(answers.labels[answers.rows[1]]),
        "worst_confirmed_slice": None,
        "num_slices": 0,
        "calibration": [],
    }


def check_rows(subject: Subject, directory) -> None:
    """Whether the checkpoint has seen these rows before."""
    split = subject.split.name
    digest = fingerprint(directory, [split])[split_path(directory, split, "x").name]
    seen = [path for path, known in subject.checkpoint["data"].items() if known == digest]
    if not seen:
        return
    if "train" in seen[0]:
        measured = "the model was trained on these patches"
        advice = "audit it on patches that it has not seen: --split valid or test"
        subject.findings.append(finding("rows", "warning", measured, "none", advice, split=split))
        return
    measured = (
        "the epoch, and what else the checkpoint stores, was chosen on these patches: scores are"
        " somewhat optimistic"
    )
    subject.findings.append(finding("rows", "note", measured, split=split))


def check_answers(subject: Subject, logits, has_groups: bool) -> None:
    """Whether the answers are a constant, and whether the halves have groups enough."""
    metrics = compute_metrics(subject.labels, logits, subject.checkpoint["threshold"])
    alarm = constant_alarm(metrics, subject.labels)
    if alarm:
        measured = alarm.removeprefix("ALARM: ")
        subject.findings.append(finding("answers", "error", measured, advice="train again"))
    if not has_groups:
        measured = f"a half has too few {kind_of_groups(subject.split)}: no interval and no verdict"
        limit, advice = f"at least {LEAST_GROUPS}", "audit more of them"
        subject.findings.append(finding("groups", "warning", measured, limit, advice))


def judge(answers: Answers, threshold: float) -> dict[str, np.ndarray]:
    """The resampled scores of the second half at a threshold."""
    rows = answers.rows[1]
    labels, probs = answers.labels[rows], answers.probs[rows]
    return resampled_scores(labels, probs, threshold, answers.weights[1])


def price_thresholds(subject: Subject, answers: Answers) -> None:
    """Rows of thresholds, chosen on the first half, with what each costs on the second; and a
    finding on the stored one.
    """
    labels, probs = answers.labels[answers.rows[0]], answers.probs[answers.rows[0]]
    rules = {"F2-optimal": ("f2", 0, 0)}
    for least in RECALLS:
        rules[f"recall at least {least:g}"] = ("recall", least, 0)
    for cost in COSTS:
        rules[f"a miss costs {cost} false alarm{'s' if cost > 1 else ''}"] = ("cost", 0, cost)
    thresholds = {name: choose_threshold(labels, probs, *rule) for name, rule in rules.items()}
    thresholds |= {"stored in the checkpoint": answers.threshold, "one half": 0.5}
    thresholds |= {"always positive": 0.0, "always negative": math.inf}
    rows, f2 = [], {}
    for rule, threshold in thresholds.items():
        scores = judge(answers, threshold)
        f2[rule] = scores["f2"]
        row = {"rule": rule, "threshold": threshold, "num": len(answers.rows[1])}
        for name in ("recall", "specificity", "precision", "f2"):
            row |= spread(name, scores[name])
        for prevalence in PREVALENCES:
            meaning = at_prevalence(row["recall"], row["specificity"], prevalence)
            del meaning["prevalence"]
            for name, value in meaning.items():
                row[f"{name}_at_{prevalence:g}"] = value
        rows.append(row)
    subject.tables["thresholds"] = rows

    best, stored, always = f2["F2-optimal"], f2["stored in the checkpoint"], f2["always positive"]
    lost, low, high = estimate(best - stored)
    measured = (
        f"F2 {stored[0]:.3f} at the stored threshold {answers.threshold:.3g}, {best[0]:.3f} at"
        f" {thresholds['F2-optimal']:.3g} ({lost:+.3f}, {low:+.3f} to {high:+.3f}); always positive"
        f" {always[0]:.3f}"
    )
    is_useless = stored[0] <= always[0] and not math.isnan(low)
    if low > 0 or is_useless:
        fault = "is no better than calling every patch positive" if is_useless else "gives F2 away"
        advice = (
            f"the stored threshold {fault}: inference.py --threshold, with thresholds.csv for the"
            " price of each"
        )
        limit = "the best, within chance"
        subject.findings.append(finding("threshold", "warning", measured, limit, advice))
    else:
        subject.findings.append(finding("threshold", "note", measured))


def reliability(labels, probs) -> list[dict]:
    """The bins of equal width over probabilities (N,) that are not empty: low, high, num,
    mean_probability, positive_share.
    """
    labels, probs = as_arrays(labels, probs)
    bins = find_bins(probs)
    rows = []
    for number in np.unique(bins).tolist():
        inside = bins == number
        row = {"low": number / NUM_BINS, "high": (number + 1) / NUM_BINS, "num": int(inside.sum())}
        row["mean_probability"] = float(probs[inside].mean())
        row["positive_share"] = float(labels[inside].mean())
        rows.append(row)
    return rows


def check_calibration(subject: Subject, answers: Answers, raw: np.ndarray) -> list[dict]:
    """Rows of calibration scores on the second half, from logits (N,) before the calibration of the
    checkpoint; bins of reliability and a finding besides.
    """
    first, second = answers.rows
    labels, prior = answers.labels[second], answers.labels[first].mean()
    stored = subject.checkpoint["calibration"]
    used, fitted = "as the model says", "with a temperature and an offset of the other half"
    scalings = {used: (1.0, 0.0)}
    if stored:
        used = "as the checkpoint scales them"
        scalings[used] = stored["temperature"], stored["offset"]
    scalings[fitted] = fit_scaling(answers.labels[first], raw[first])
    scalings["always the prevalence"] = math.inf, math.log(prior / (1 - prior))
    rows, bins, rng = {}, [], np.random.default_rng(0)
    for name, (temperature, offset) in scalings.items():
        logits = raw[second] / temperature + offset
        probs = sigmoid(logits)
        by_chance = []
        for _ in range(NUM_SIMULATED):
            drawn = rng.random(len(probs)) < probs
            by_chance.append(calibration_scores(drawn, logits)["ece"])
        row = {"probabilities": name, "temperature": temperature, "offset": offset}
        row |= calibration_scores(labels, logits)
        rows[name] = row | {"ece_by_chance": float(np.quantile(by_chance, 0.95))}
        for row in reliability(labels, probs):
            num_positive = round(row["positive_share"] * row["num"])
            low, high = share_interval(num_positive, row["num"])
            ends = {"positive_share_low": low, "positive_share_high": high}
            bins.append({"probabilities": name, **row, **ends})
    subject.tables["reliability"] = bins

    ece, by_chance = rows[used]["ece"], rows[used]["ece_by_chance"]
    limit = max(MOST_ECE, by_chance)
    measured = (
        f"ECE {ece:.3f} {used}, {rows[fitted]['ece']:.3f} {fitted}; by chance up to {by_chance:.3f}"
    )
    is_bad = ece > limit and len(answers.weights[1]) > 1
    severity = "warning" if is_bad else "note"
    advice = "do not read the probabilities as such: calibrate" if is_bad else ""
    subject.findings.append(finding("calibration", severity, measured, f"{limit:.3f}", advice))
    return [*rows.values()]


def draw_curves(answers: Answers) -> list[dict]:
    """Rows of the ROC (x: false positive rate, y: recall) and precision-recall curves (x: recall,
    y: precision).
    """
    rows = answers.rows[1]
    curves = resampled_curves(answers.labels[rows], answers.probs[rows], answers.weights[1], GRID)
    points = []
    for curve, name in (("roc", "recall"), ("pr", "precision")):
        for x, values in zip(GRID.tolist(), curves[name].T, strict=True):
            if x > 0 or curve == "roc":  # where nothing is called there is no precision
                y, low, high = estimate(values)
                points.append({"curve": curve, "x": x, "y": y, "low": low, "high": high})
    return points


def check_slices(subject: Subject, answers: Answers, features: dict) -> dict:
    """The worst confirmed slice and the number of slices; rows of them and a finding besides."""
    rows = measure_slices(build_slices(features, subject.copies, answers.rows[0]), answers)
    if subject.split.slides is not None:
        # a slide lies in one half: its own patches are halved, by what they share
        probs, threshold = answers.probs, answers.threshold
        by_copies = split_answers(answers.labels, probs, threshold, subject.copies)
        rows += measure_slices(slide_slices(subject.split.slides[subject.rows]), by_copies)
    if not rows:
        raise BadInput(
            f"the patches of split {subject.split.name} all look the same, there is nothing to"
            " compare: leave out the part slices"
        )
    worst = conclude(rows)
    subject.tables["slices"] = rows
    tried = f"{rows[0]['num_tried']} comparisons of {len(rows)} slices"
    num_found = sum(bool(row["found"]) for row in rows)
    measured = f"{num_found} of {len(rows)} slices fall behind the rest on one half, "
    if worst is None:
        measured += "none of them for certain on the other too"
        subject.findings.append(finding("slices", "note", measured, tried))
    else:
        keys = ["feature", "slice", "num", "num_positive", "confirmed"]
        for name in JUDGED:
            keys += [name, f"rest_{name}"]
        confirmed = [{key: row[key] for key in keys} for row in rows if row["confirmed"]]
        name = worst["measure"]
        measured += (
            f"{len(confirmed)} of them on the other too; worst, {worst['feature']}"
            f" {worst['slice']}: {name} {worst[name]:.3f} ({worst[f'{name}_low']:.3f} to"
            f" {worst[f'{name}_high']:.3f}), elsewhere {worst[f'rest_{name}']:.3f}"
        )
        advice = "look at their patches: more like them in training, or a threshold of their own"
        limit = f"none of {tried}"
        row = finding("slices", "warning", measured, limit, advice, confirmed)
        subject.findings.append(row)
    return {"worst_confirmed_slice": worst, "num_slices": len(rows)}


def list_errors(subject: Subject, answers: Answers) -> list[dict]:
    """All errors, false positives first, each kind with the most confident first; `rank` counts
    within the kind.
    """
    probs, labels, slides = answers.probs, answers.labels, subject.split.slides
    called = probs >= answers.threshold
    rows = []
    for kind, is_wrong, order in (
        ("false positive", called & ~labels, -probs),
        ("false negative", ~called & labels, probs),
    ):
        places = np.flatnonzero(is_wrong)
        places = places[np.argsort(order[places], kind="stable")]
        for rank, place in enumerate(places.tolist(), 1):
            index = int(subject.rows[place])
            slide = "" if slides is None else str(slides[index])
            answer = int(labels[place]), float(probs[place]), int(called[place])
            cells = (subject.split.name, index, *answer, kind, rank, slide)
            rows.append(dict(zip(ERROR_COLUMNS, cells, strict=True)))
    return rows


def list_predictions(subject: Subject, answers: Answers) -> list[dict]:
    """Rows as inference.py writes them."""
    rows = []
    for index, prob, label in zip(subject.rows, answers.probs, subject.labels, strict=True):
        row = {"source": str(subject.split.images.path), "index": int(index)}
        row |= {"probability": f"{prob:.9g}", "prediction": int(prob >= answers.threshold)}
        rows.append(row | {"label": int(label)})
    return rows


def write_all(out: Path, scores: dict, subject: Subject, shown: list[dict], patches, maps) -> dict:
    """Write every file of an audit, scores.json first and findings.json last, and give what the
    terminal is told.
    """
    for name in FILES[:1] + FILES[2:]:  # of an audit before this one
        (out / name).unlink(missing_ok=True)
    write_json(out / "scores.json", scores)
    for name, rows in subject.tables.items():
        header = list(rows[0]) if rows else ERROR_COLUMNS
        write_csv(out / f"{name}.csv", header, [without_nan(list(row.values())) for row in rows])
    if patches is not None and shown:
        (out / "errors.png").write_bytes(figure_png(plot_errors(shown, patches, maps)))
    findings, tables = subject.findings, subject.tables
    page = write_model_page(out / "model.html", scores, findings, tables, shown, patches, maps)
    write_json(out / "findings.json", findings)
    severities = [found["severity"] for found in findings]
    result = {}
    for name in ("auc", "f2", "recall", "specificity"):
        result[name] = scores["global"][name]["value"]
    return result | {
        "ece": {row["probabilities"]: row["ece"] for row in scores["calibration"]},
        "worst_confirmed_slice": scores["worst_confirmed_slice"],
        "page": str(page),
        "num_errors": severities.count("error"),
        "num_warnings": severities.count("warning"),
    }
