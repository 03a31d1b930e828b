"""The audit of a model on labelled patches: each is predicted once, and what is chosen on one half
is judged on the other.
"""

import functools
import math
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from lib.audit import MODEL_PARTS, finding, judged_finding
from lib.audit.copies import link_copies
from lib.audit.model_page import PRICED, plot_errors, write_model_page
from lib.audit.model_plots import ALWAYS, BEST, STORED
from lib.audit.resampling import (
    LEAST_GROUPS,
    PREVALENCES,
    at_prevalence,
    estimate,
    resampled_curves,
    score_cells,
    spread,
)
from lib.audit.shortcut import (
    MOST_MAPPED,
    MOST_PROBED,
    check_shortcuts,
    map_evidence,
    spaced,
)
from lib.audit.slices import (
    Answers,
    build_slices,
    conclude,
    describe_patches,
    measure_slices,
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
from lib.pcam import Split, open_split
from lib.predict import predict_batch, ready_to_predict
from lib.progress import Progress, format_duration
from lib.rundir import git_state
from lib.seeding import set_determinism
from lib.splitwriter import sole_writer

TABLES = ("thresholds", "curves", "reliability", "slices", "shortcut", "errors", "predictions")
PICTURES = ("prices", "curves", "reliability", "slices", "errors")
FILES = (
    "scores.json",
    "findings.json",
    "model.html",
    *(f"{name}.png" for name in PICTURES),
    *(f"{name}.csv" for name in TABLES),
)
RULES = {  # for a threshold, as lib/calibration.py takes them
    BEST: ("f2", 0, 0),
    "recall at least 0.9": ("recall", 0.9, 0),
    "recall at least 0.95": ("recall", 0.95, 0),
    "recall at least 0.99": ("recall", 0.99, 0),
    "a miss costs 1 false alarm": ("cost", 0, 1),
    "a miss costs 5 false alarms": ("cost", 0, 5),
    "a miss costs 10 false alarms": ("cost", 0, 10),
    "a miss costs 50 false alarms": ("cost", 0, 50),
}
MOST_ECE = 0.03
NUM_SIMULATED = 500
NUM_PICTURES = 12  # of false positives, and of false negatives
HEAT_STEP_PX = 8
GRID = np.linspace(0, 1, 101)  # of recall and of the false positive rate
ERROR_COLUMNS = ("split", "index", "label", "probability", "prediction", "kind", "rank", "slide")
BLOCK = 256  # patches that are read at once
NUM_TIMED = 64  # patches from which the duration is estimated
# passes that a patch costs: nine versions and sixteen views; and a map, of blocks of two distances
PROBES = 7 + 16
MAP_PROBES = 37
PICTURE_PROBES = 122


@dataclass
class Audit:
    """A model, N patches of a split, of which `rows` int64 (N,) says which, and what comes of
    them."""

    split: Split
    rows: np.ndarray
    groups: np.ndarray  # (N,), kept whole in halves
    model: torch.nn.Module
    device: torch.device
    cfg: Config
    checkpoint: dict
    raw: np.ndarray | None = None  # logits float64 (N,) before calibration
    logits: np.ndarray | None = None  # and after it
    answers: Answers | None = None
    scores: dict = field(default_factory=dict)
    tables: dict[str, list[dict]] = field(default_factory=dict)
    findings: list[dict] = field(default_factory=list)
    # rows of errors that are shown, with patches uint8 (B, 96, 96, 3) and maps (B, 96, 96)
    gallery: tuple = ([], [], [])

    @property
    def kind_of_groups(self) -> str:
        return "groups that share tissue" if self.split.slides is None else "slides"

    @functools.cached_property
    def features(self) -> dict[str, np.ndarray]:
        return describe_patches(self.blocks("describing patches"))

    def add(self, *arguments, **options) -> None:
        self.findings.append(finding(*arguments, **options))

    def judge(self, *arguments) -> None:
        self.findings.append(judged_finding(*arguments))

    def blocks(self, label: str):
        """Yield all patches in blocks uint8 (B, 96, 96, 3), with a bar."""
        with Progress(len(self.rows), label) as bar:
            for start in range(0, len(self.rows), BLOCK):
                block = self.read(np.s_[start : start + BLOCK])
                yield block
                bar.add(len(block))

    def read(self, places: np.ndarray) -> np.ndarray:
        """The patches uint8 (B, 96, 96, 3) at these places of `rows`."""
        return self.split.images.read(self.rows[places])

    def predict(self, patches, views: int = 1) -> np.ndarray:
        """Logits float64 (B,) of patches uint8 (B, 96, 96, 3), before calibration."""
        logits = []
        for part in torch.as_tensor(patches).split(self.cfg.eval_batch_size):
            options = self.cfg.precision, views, self.checkpoint["preprocessing"]
            part_logits = predict_batch(self.model, part.to(self.device), *options)
            logits.append(part_logits.cpu())
        return torch.cat(logits).double().numpy()

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
    audit = open_audit(ckpt, directory, split_name, overrides, device, limit)
    with sole_writer(out):
        say_duration(audit, parts)
        blocks = audit.blocks(f"predicting {split_name}")
        audit.raw = np.concatenate([audit.predict(block, audit.cfg.views) for block in blocks])
        if not np.isfinite(audit.raw).all():
            raise BadInput(f"{ckpt} answers some patches with what is no finite number")
        audit.logits = calibrate(audit.raw, audit.checkpoint["calibration"])
        probs = sigmoid(audit.logits)
        labels = audit.split.labels[audit.rows]
        threshold = audit.checkpoint["threshold"]
        audit.answers = split_answers(labels, probs, threshold, audit.groups)
        metrics = compute_metrics(labels, audit.logits, threshold)
        audit.scores = describe_audit(audit, checkpoint_path(ckpt), directory)
        audit.scores |= {"all_rows": metrics, "parts": list(parts)}
        check_rows(audit)
        check_answers(audit, metrics)
        list_predictions(audit)
        checks = (price_thresholds, check_calibration, check_slices, check_shortcuts, show_errors)
        for part, check in zip(MODEL_PARTS, checks, strict=True):
            if part in parts:
                check(audit)
        return write_all(audit, out, with_patches)


def open_audit(ckpt, directory, split_name: str, overrides, device, limit: int) -> Audit:
    """The model and the patches of an audit, `limit` of them evenly spaced, or all for 0."""
    device = choose_device(device)
    model, cfg, checkpoint = load_model(ckpt)
    cfg = change_free_keys(cfg, parse_overrides(overrides))
    set_determinism(cfg.deterministic)
    warn_of_views(checkpoint["calibration"], cfg.views)
    split = open_split(directory, split_name)
    rows = spaced(len(split), limit or len(split))
    groups = groups_for_halves(split, directory)[rows]
    model = ready_to_predict(model.to(device), cfg.precision)
    audit = Audit(split, rows, groups, model, device, cfg, checkpoint)
    half = fold_of_rows(groups, 2)
    labels = split.labels[rows]
    if len(np.unique(labels)) < 2:
        raise BadInput(
            f"{directory}: all patches of split {split_name} have the label {labels[0]}, both are"
            " needed"
        )
    if any(len(np.unique(labels[half == side])) < 2 for side in (0, 1)):
        raise BadInput(
            f"{directory}: the {audit.kind_of_groups} of split {split_name} do not make two"
            " halves with both labels, 0 and 1, in each"
        )
    return audit


def require_own(directory, out: Path) -> None:
    """Raise BadInput where OUT is the data, or holds files that no audit of a model wrote."""
    if Path(directory).resolve() == out.resolve():
        raise BadInput(f"{directory}: OUT may not be the data themselves")
    existing = [name for name in FILES if (out / name).exists()]
    if existing and FILES[0] not in existing:
        raise BadInput(
            f"{out} holds a {existing[0]} that no audit of a model wrote: choose another OUT"
        )


def say_duration(audit: Audit, parts) -> None:
    """Say how long the audit takes, from the time that a few patches take."""
    num = len(audit.rows)
    patches = audit.read(np.s_[:NUM_TIMED])
    audit.predict(patches)  # the first one is slow
    started_at = time.perf_counter()
    audit.predict(patches)
    pass_s = (time.perf_counter() - started_at) / len(patches)
    num_passes = num * audit.cfg.views
    num_judged = num // 2
    if "shortcut" in parts:
        num_passes += min(MOST_PROBED, num_judged) * PROBES
        num_passes += min(MOST_MAPPED, num_judged) * MAP_PROBES
    if "errors" in parts:
        num_passes += 2 * NUM_PICTURES * PICTURE_PROBES
    say(
        f"{num:,} patches, {num_passes:,} passes of the model on {audit.device}: about"
        f" {format_duration(num_passes * pass_s)}, and the resampling (--limit and --parts make it"
        " shorter)"
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


def describe_audit(audit: Audit, path: Path, directory) -> dict:
    """scores.json before its parts: what was audited, and the global scores."""
    answers = audit.answers
    checkpoint = audit.checkpoint
    split = audit.split.name
    halves = []
    for use, rows in zip(("chosen on", "judged on"), answers.rows, strict=True):
        half = {
            "use": use,
            "num": len(rows),
            "num_positive": int(answers.labels[rows].sum()),
            "groups": audit.kind_of_groups,
            "num_groups": len(np.unique(audit.groups[rows])),
        }
        halves.append(half)
    overall = answers.score(1, answers.threshold)
    return {
        "checkpoint": {
            "path": str(path),
            "sha256": file_digest(path),
            "weights_sha256": checkpoint["weights_sha256"],
            "threshold": answers.threshold,
            "calibration": checkpoint["calibration"],
            "views": audit.cfg.views,
        },
        "data": {
            "directory": str(directory),
            "split": split,
            "num": len(audit.rows),
            "sha256": fingerprint(directory, [split]),
        },
        "commit": git_state()["commit"],
        "halves": halves,
        "global": {name: score_cells(values) for name, values in overall.items()},
        "constant_baselines": constant_baselines(answers.labels[answers.rows[1]]),
        "worst_confirmed_slice": None,
        "num_slices": 0,
        "calibration": [],
    }


def check_rows(audit: Audit) -> None:
    """Whether the checkpoint has seen these rows before, by the SHA-256 of their file."""
    split = audit.split.name
    known = audit.checkpoint["data"]
    digest = audit.scores["data"]["sha256"][audit.split.images.path.name]
    names = [name for name in known if known[name] == digest]
    if names and "train" in names[0]:
        measured = "the model was trained on these patches"
        advice = "audit it on patches that it has not seen: --split valid or test"
        audit.add("rows", "warning", measured, "", advice, split=split)
    elif names:
        measured = "the epoch, and what else the checkpoint stores, was chosen on these patches"
        audit.add("rows", "note", f"{measured}: scores are somewhat optimistic", split=split)


def check_answers(audit: Audit, metrics: dict) -> None:
    """Whether the answers are a constant, and whether the halves have groups enough."""
    alarm = constant_alarm(metrics)
    if alarm:
        audit.add("answers", "error", alarm.removeprefix("ALARM: "), advice="train again")
    if min(map(len, audit.answers.weights)) == 1:
        measured = f"a half has too few {audit.kind_of_groups}: no interval and no verdict"
        audit.add("groups", "warning", measured, f"at least {LEAST_GROUPS}", "audit more of them")


def price_thresholds(audit: Audit) -> None:
    """Thresholds, chosen on the first half, with what each costs on the second, and a finding on
    the stored one; and curves of the ROC (x: false positive rate, y: recall) and of precision and
    recall (x: recall, y: precision).
    """
    answers = audit.answers
    thresholds = {name: choose_threshold(*answers.half(0), *rule) for name, rule in RULES.items()}
    thresholds |= {STORED: answers.threshold, "one half": 0.5}
    thresholds |= {ALWAYS: 0.0, "always negative": math.inf}
    rows = []
    f2 = {}
    for rule, threshold in thresholds.items():
        scores = answers.score(1, threshold)
        f2[rule] = scores["f2"]
        row = {"rule": rule, "threshold": threshold, "num": len(answers.rows[1])}
        for name in PRICED:
            row |= spread(name, scores[name])
        for prevalence in PREVALENCES:
            meaning = at_prevalence(row["recall"], row["specificity"], prevalence)
            row |= {f"{name}_at_{prevalence:g}": value for name, value in meaning.items()}
        rows.append(row)
    audit.tables["thresholds"] = rows

    lost, low, high = estimate(f2[BEST] - f2[STORED])
    best = f2[BEST][0]
    stored = f2[STORED][0]
    always = f2[ALWAYS][0]
    measured = (
        f"F2 {stored:.3f} at the stored threshold {answers.threshold:.3g}, {best:.3f} at"
        f" {thresholds[BEST]:.3g} ({lost:+.3f}, {low:+.3f} to {high:+.3f}); always positive"
        f" {always:.3f}"
    )
    fault = "gives F2 away"
    is_useless = stored <= always and not math.isnan(low)
    if is_useless:
        fault = "is no better than calling every patch positive"
    price = "inference.py --threshold, with thresholds.csv for the price of each"
    advice = f"the stored threshold {fault}: {price}"
    is_bad = low > 0 or is_useless
    audit.judge("threshold", is_bad, measured, "the best, within chance", advice)

    curves = resampled_curves(*answers.half(1), answers.weights[1], GRID)
    points = []
    for curve, name in (("roc", "recall"), ("pr", "precision")):
        for x, values in zip(GRID.tolist(), curves[name].T, strict=True):
            points.append({"curve": curve, "x": x} | score_cells(values, ("y", "low", "high")))
    # where nothing is called there is no precision
    points = [row for row in points if row["x"] > 0 or row["curve"] == "roc"]
    audit.tables["curves"] = points


def reliability(labels, probs) -> list[dict]:
    """The bins of equal width over probabilities (N,) that are not empty: low, high, num,
    mean_probability, and positive_share with its 95% interval.
    """
    labels, probs = as_arrays(labels, probs)
    bins = find_bins(probs)
    rows = []
    for number in np.unique(bins).tolist():
        inside = bins == number
        num = int(inside.sum())
        low, high = share_interval(labels[inside].sum(), num)
        row = {"low": number / NUM_BINS, "high": (number + 1) / NUM_BINS, "num": num}
        row["mean_probability"] = float(probs[inside].mean())
        row["positive_share"] = float(labels[inside].mean())
        rows.append(row | {"positive_share_low": low, "positive_share_high": high})
    return rows


def check_calibration(audit: Audit) -> None:
    """Rows of calibration scores on the second half, and bins of reliability; and a finding."""
    answers = audit.answers
    raw = audit.raw
    stored = audit.checkpoint["calibration"]
    labels, _ = answers.half(1)
    fitted_labels, _ = answers.half(0)
    prior = fitted_labels.mean()
    used = "as the model says"
    fitted = "with a temperature and an offset of the other half"
    scalings = {used: (1.0, 0.0)}
    if stored:
        used = "as the checkpoint scales them"
        scalings[used] = stored["temperature"], stored["offset"]
    scalings[fitted] = fit_scaling(fitted_labels, raw[answers.rows[0]])
    scalings["always the prevalence"] = math.inf, math.log(prior / (1 - prior))
    rows = {}
    bins = []
    rng = np.random.default_rng(0)
    for name, (temperature, offset) in scalings.items():
        logits = raw[answers.rows[1]] / temperature + offset
        probs = sigmoid(logits)
        by_chance = []  # the ECE of labels that are drawn with these probabilities
        for _ in range(NUM_SIMULATED):
            drawn = rng.random(len(probs)) < probs
            by_chance.append(calibration_scores(drawn, logits)["ece"])
        row = {"probabilities": name, "temperature": temperature, "offset": offset}
        row |= calibration_scores(labels, logits)
        rows[name] = row | {"ece_by_chance": float(np.quantile(by_chance, 0.95))}
        bins += [{"probabilities": name} | row for row in reliability(labels, probs)]
    audit.scores["calibration"] = list(rows.values())
    audit.tables["reliability"] = bins

    ece = rows[used]["ece"]
    by_chance = rows[used]["ece_by_chance"]
    limit = max(MOST_ECE, by_chance)
    measured = (
        f"ECE {ece:.3f} {used}, {rows[fitted]['ece']:.3f} {fitted}; by chance up to {by_chance:.3f}"
    )
    is_bad = ece > limit and len(answers.weights[1]) > 1
    advice = "do not read the probabilities as such: calibrate"
    audit.judge("calibration", is_bad, measured, f"{limit:.3f}", advice)


def check_slices(audit: Audit) -> None:
    """Rows of slices and the worst confirmed one; and a finding."""
    answers = audit.answers
    slides = audit.split.slides
    copies = audit.groups
    if slides is not None:
        copies = link_copies(audit.split.images)[audit.rows]
    rows = measure_slices(build_slices(audit.features, copies, answers.rows[0]), answers)
    if not rows:
        raise BadInput(
            f"the patches of split {audit.split.name} all look the same, there is nothing to"
            " compare: leave out the part slices"
        )
    if slides is not None:
        # a slide lies in one half: its own patches are halved, by what they share
        slides = slides[audit.rows]
        names = np.unique(slides).tolist()
        slices = [{"feature": "slide", "slice": name, "mask": slides == name} for name in names]
        by_copies = split_answers(answers.labels, answers.probs, answers.threshold, copies)
        rows += measure_slices(slices, by_copies)
    worst = conclude(rows)
    audit.tables["slices"] = rows
    audit.scores |= {"worst_confirmed_slice": worst, "num_slices": len(rows)}
    confirmed = [row for row in rows if row["confirmed"]]
    num_found = sum(bool(row["found"]) for row in rows)
    measured = f"{num_found} of {len(rows)} slices fall behind the rest on one half, "
    measured += f"{len(confirmed) or 'none'} of them for certain on the other too"
    limit = f"{rows[0]['num_tried']} comparisons of {len(rows)} slices"
    if worst:
        name = worst["measure"]
        measured += (
            f"; worst, {worst['feature']} {worst['slice']}: {name} {worst[name]:.3f}"
            f" ({worst[f'{name}_low']:.3f} to {worst[f'{name}_high']:.3f}), elsewhere"
            f" {worst[f'rest_{name}']:.3f}"
        )
    advice = "look at their patches: more like them in training, or a threshold of their own"
    audit.judge("slices", worst is not None, measured, limit, advice, confirmed)


def show_errors(audit: Audit) -> None:
    """All errors, false positives first, each kind with the most confident first, of which `rank`
    counts; and maps of the evidence in the first of them.
    """
    answers = audit.answers
    slides = audit.split.slides
    labels = answers.labels
    probs = answers.probs
    wrong = np.flatnonzero((probs >= answers.threshold) != labels)
    signed = np.where(labels, probs, -probs)[wrong]  # the lowest is the most confident
    rows = []
    ranks = [0, 0]
    for place in wrong[np.lexsort((signed, labels[wrong]))].tolist():
        label = int(labels[place])
        index = int(audit.rows[place])
        ranks[label] += 1
        kind = ("false positive", "false negative")[label]
        slide = "" if slides is None else str(slides[index])
        answer = label, float(probs[place]), 1 - label
        cells = (audit.split.name, index, *answer, kind, ranks[label], slide)
        rows.append(dict(zip(ERROR_COLUMNS, cells, strict=True)))
    audit.tables["errors"] = rows
    shown = [row for row in rows if row["rank"] <= NUM_PICTURES]
    patches = audit.split.images.read([row["index"] for row in shown])
    maps = map_evidence(audit.predict_calibrated, torch.from_numpy(patches), HEAT_STEP_PX)
    audit.gallery = shown, patches, maps


def list_predictions(audit: Audit) -> None:
    """Rows as inference.py writes them."""
    answers = audit.answers
    source = str(audit.split.images.path)
    rows = []
    for index, prob, label in zip(audit.rows, answers.probs, answers.labels, strict=True):
        row = {"source": source, "index": int(index), "probability": f"{prob:.9g}"}
        rows.append(row | {"prediction": int(prob >= answers.threshold), "label": int(label)})
    audit.tables["predictions"] = rows


def write_all(audit: Audit, out: Path, with_patches: bool) -> dict:
    """Write every file of an audit, scores.json first and findings.json last, and give what the
    terminal is told.
    """
    for name in FILES[1:]:  # of an audit before this one
        (out / name).unlink(missing_ok=True)
    write_json(out / "scores.json", audit.scores)
    for name, rows in audit.tables.items():
        header = list(rows[0]) if rows else ERROR_COLUMNS
        cells = [without_nan(list(row.values())) for row in rows]
        write_csv(out / f"{name}.csv", header, cells)
    shown, patches, maps = audit.gallery
    if not with_patches:
        patches = None
    elif shown:
        (out / "errors.png").write_bytes(figure_png(plot_errors(shown, patches, maps)))
    gallery = shown, patches, maps
    page = write_model_page(out / "model.html", audit.scores, audit.findings, audit.tables, gallery)
    write_json(out / "findings.json", audit.findings)
    severities = [row["severity"] for row in audit.findings]
    scores = audit.scores
    result = {name: scores["global"][name]["value"] for name in ("auc", *PRICED)}
    return result | {
        "ece": {row["probabilities"]: row["ece"] for row in scores["calibration"]},
        "worst_confirmed_slice": scores["worst_confirmed_slice"],
        "page": str(page),
        "num_errors": severities.count("error"),
        "num_warnings": severities.count("warning"),
    }
