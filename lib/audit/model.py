"""The audit of a model on labelled patches: each is predicted once, and what is chosen on one half
is judged on the other.
"""

import time
from collections import Counter
from pathlib import Path

import numpy as np
import torch

from lib.audit import MODEL_PARTS, finding, require_apart
from lib.audit.evaluation import check_scores, note_opening
from lib.audit.model_page import NUM_PICTURES, PRICED, write_model_page
from lib.audit.resampling import LEAST_GROUPS, estimate, spread
from lib.audit.shortcut import MOST_PROBED, NUM_BLOCKS, check_shortcuts, map_evidence, spaced
from lib.audit.slices import (
    build_slices,
    conclude,
    describe_patches,
    measure_slices,
    split_answers,
)
from lib.batches import PatchSource, fold_of_rows, open_train_valid
from lib.calibration import (
    calibrate,
    calibration_scores,
    choose_threshold,
    complete_checkpoint,
    find_bins,
)
from lib.checkpoint import checkpoint_path, load_model, warn_of_views
from lib.command import BadInput, say, without_nan
from lib.config import change_free_keys
from lib.device import choose_device, precision_to_predict
from lib.files import file_digest, write_csv, write_json
from lib.fingerprint import fingerprint
from lib.groups import groups_for_halves
from lib.metrics import (
    constant_baselines,
    share_interval,
    sigmoid,
)
from lib.pcam import open_split
from lib.predict import predict_batch, ready_to_predict
from lib.progress import Progress, format_duration
from lib.rundir import git_state
from lib.seeding import set_determinism
from lib.splitwriter import sole_writer

WRITTEN = (  # by an audit, each part its own
    *("evaluation.csv", "thresholds.csv", "reliability.csv", "slices.csv", "shortcut.csv"),
    *("errors.csv", "prices.png", "reliability.png", "slices.png", "errors.png", "curves.png"),
)
BEST, STORED, ALWAYS = "F2-optimal", "stored in the checkpoint", "always positive"
RULES = {  # for a threshold, as lib/calibration.py takes them
    BEST: ("f2", 0, 0),
    "recall at least 0.95": ("recall", 0.95, 0),
    "recall at least 0.99": ("recall", 0.99, 0),
    "a miss costs 10 false alarms": ("cost", 0, 10),
}
USED = "as the checkpoint scales them"
MOST_ECE = 0.03
MOST_OUTSIDE = 3  # bins of 15 outside their 95% interval: in 100 calibrated models one has more
BLOCK = 256  # patches that are read and predicted at once
NUM_TIMED = 64  # patches from which the duration is estimated
# passes of the model beside those of the predictions, at most
PASSES = {"shortcut": 3 * MOST_PROBED, "errors": 2 * NUM_PICTURES * NUM_BLOCKS}
KINDS = ("false positive", "false negative")


class Audit:
    """A model, N patches of a split, of which `rows` int64 (N,) says which, and what comes of them.
    `groups` (N,) are kept whole in halves. With a `limit` the patches are so many, evenly spaced.
    """

    def __init__(self, ckpt, directory, split_name: str, overrides, device, limit: int):
        self.path = checkpoint_path(ckpt)
        model, cfg, self.checkpoint = load_model(ckpt)
        self.cfg = change_free_keys(cfg, overrides)
        set_determinism(self.cfg.deterministic)
        warn_of_views(self.checkpoint["calibration"], self.cfg.views)
        self.device = choose_device(device)
        self.precision = precision_to_predict(self.cfg.precision, self.device)
        self.model = ready_to_predict(model.to(self.device), self.precision)
        self.directory = directory
        self.split = open_split(directory, split_name)
        self.rows = spaced(len(self.split), limit or len(self.split))
        self.labels = self.split.labels[self.rows]
        self.groups = groups_for_halves(self.split, directory)[self.rows]
        half = fold_of_rows(self.groups, 2)
        if any(len(np.unique(self.labels[half == side])) < 2 for side in (0, 1)):
            raise BadInput(
                f"{directory}: the slides or groups of split {split_name} do not make two halves"
                " with both labels, 0 and 1, in each"
            )
        self.scores = {}
        self.tables = {}
        self.findings = []

    @property
    def has_intervals(self) -> bool:
        return min(map(len, self.answers.weights)) > 1

    def add(self, *arguments, **options) -> None:
        self.findings.append(finding(*arguments, **options))

    def judge(self, check: str, is_bad: bool, measured: str, limit: str, advice: str, rows=()):
        """Add a warning with advice where what was measured is bad and has an interval, else a
        note."""
        if is_bad and self.has_intervals:
            self.add(check, "warning", measured, limit, advice, rows)
        else:
            self.add(check, "note", measured, limit, "", rows)

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

    def predict(self, patches, views: int) -> np.ndarray:
        """Logits float64 (B,) of patches uint8 (B, 96, 96, 3), before calibration."""
        logits = []
        for part in torch.as_tensor(patches).split(BLOCK):
            part = part.to(self.device)
            logits.append(predict_batch(self.model, part, self.precision, views).cpu())
        return torch.cat(logits).double().numpy()

    def predict_one_view(self, patches) -> np.ndarray:
        """Logits float64 (B,) of one view, as the checkpoint scales them."""
        return calibrate(self.predict(patches, 1), self.checkpoint["calibration"])


def require_own(out: Path) -> None:
    """Raise BadInput where OUT holds predictions that no audit of a model wrote."""
    if (out / "predictions.csv").exists() and not (out / "scores.json").exists():
        raise BadInput(f"{out} holds a predictions.csv that is no audit's: choose another --out")


def audit_model(
    ckpt,
    directory,
    split_name: str,
    out: Path,
    overrides,
    device: str,
    with_patches: bool,
    parts,
    limit: int,
) -> dict:
    """Audit a checkpoint on a split of a folder, or on `limit` of its patches, into OUT; gives
    counts and the main scores for the terminal.

    Raises BadInput for a checkpoint or data that cannot be used, and where a half of the rows lacks
    a class.
    """
    audit = Audit(ckpt, directory, split_name, overrides, device, limit)
    checks = (
        check_scores,
        price_thresholds,
        check_calibration,
        check_slices,
        check_shortcuts,
        show_errors,
    )
    require_apart(directory, out)
    require_own(out)
    with sole_writer(out):
        say_duration(audit, parts)
        blocks = audit.blocks(f"predicting {split_name}")
        audit.raw = np.concatenate([audit.predict(block, audit.cfg.views) for block in blocks])
        if not np.isfinite(audit.raw).all():
            raise BadInput(f"{ckpt} answers some patches with what is no finite number")
        audit.logits = calibrate(audit.raw, audit.checkpoint["calibration"])
        threshold = audit.checkpoint["threshold"]
        audit.answers = split_answers(audit.labels, sigmoid(audit.logits), threshold, audit.groups)
        audit.scores = describe_audit(audit)
        check_rows(audit)
        for part, check in zip(MODEL_PARTS, checks, strict=True):
            if part in parts:
                check(audit)
        return write_all(audit, out, with_patches)


def say_duration(audit: Audit, parts) -> None:
    """Say how long the audit takes, from the time that a few patches take."""
    patches = audit.read(np.s_[:NUM_TIMED])
    audit.predict(patches, 1)  # the first one is slow
    started_at = time.perf_counter()
    audit.predict(patches, 1)
    pass_s = (time.perf_counter() - started_at) / len(patches)
    num = len(audit.rows)
    num_passes = num * audit.cfg.views + sum(PASSES.get(part, 0) for part in parts)
    say(
        f"{num:,} patches, {num_passes:,} passes of the model on {audit.device}: about"
        f" {format_duration(num_passes * pass_s)}, and the resampling (--limit and --parts make it"
        " shorter)"
    )


def recalibrate(ckpt, directory, overrides, device: str) -> None:
    """Calibrate a checkpoint anew, in place, on a folder's train and valid splits. `overrides` may
    change free keys.
    """
    cfg = change_free_keys(load_model(ckpt)[1], [f"data_dir={directory}", *overrides])
    set_determinism(cfg.deterministic)
    train, valid = open_train_valid(cfg)
    source = PatchSource(valid[0].images, cfg.data_residence, choose_device(device))
    complete_checkpoint(ckpt, train, valid, source, cfg)


def describe_audit(audit: Audit) -> dict:
    """scores.json before its parts: what was audited, and the global scores."""
    answers = audit.answers
    checkpoint = audit.checkpoint
    split = audit.split.name
    judged = answers.rows[1]
    overall = {}
    for name, values in answers.score(1, answers.threshold).items():
        overall[name] = dict(zip(("value", "low", "high"), estimate(values), strict=True))
    return {
        "checkpoint": {
            "path": str(audit.path),
            "sha256": file_digest(audit.path),
            "weights_sha256": checkpoint["weights_sha256"],
            "threshold": answers.threshold,
            "calibration": checkpoint["calibration"],
            "views": audit.cfg.views,
        },
        "data": {
            "directory": str(audit.directory),
            "split": split,
            "num": len(audit.rows),
            "sha256": fingerprint(audit.directory, [split]),
        },
        "commit": git_state()["commit"],
        "num_judged": len(judged),
        "num_groups": len(np.unique(audit.groups[judged])),
        "global": overall,
        "constant_baselines": constant_baselines(answers.labels[judged]),
        "worst_confirmed_slice": None,
        "num_slices": 0,
        "calibration": [],
    }


def check_rows(audit: Audit) -> None:
    """Whether the checkpoint has seen these rows before, by the SHA-256 of their file, and whether
    the halves have groups enough.
    """
    split = audit.split.name
    digest = audit.scores["data"]["sha256"][audit.split.images.path.name]
    names = [name for name, known in audit.checkpoint["data"].items() if known == digest]
    if names and "train" in names[0]:
        measured = "the model was trained on these patches"
        advice = "audit it on patches that it has not seen: --split valid or test"
        audit.add("rows", "warning", measured, "", advice, split=split)
    elif names:
        measured = "the epoch, and what else the checkpoint stores, was chosen on these patches"
        audit.add("rows", "note", f"{measured}: scores are somewhat optimistic", split=split)
    if split == "test":
        note_opening(audit, digest)
    if not audit.has_intervals:
        measured = "a half has too few slides or groups: no interval and no verdict"
        audit.add("groups", "warning", measured, f"at least {LEAST_GROUPS}", "audit more of them")


def price_thresholds(audit: Audit) -> None:
    """Thresholds, chosen on the first half, with what each costs on the second, and a finding on
    the stored one.
    """
    answers = audit.answers
    thresholds = {name: choose_threshold(*answers.half(0), *rule) for name, rule in RULES.items()}
    thresholds |= {STORED: answers.threshold, "one half": 0.5, ALWAYS: 0.0}
    rows = []
    f2 = {}
    for rule, threshold in thresholds.items():
        scores = answers.score(1, threshold)
        f2[rule] = scores["f2"]
        row = {"rule": rule, "threshold": threshold}
        for name in PRICED:
            row |= spread(name, scores[name])
        rows.append(row)
    audit.tables["thresholds"] = rows

    lost, low, high = estimate(f2[BEST] - f2[STORED])
    best, stored, always = (f2[rule][0] for rule in (BEST, STORED, ALWAYS))
    measured = (
        f"F2 {stored:.3f} at the stored threshold {answers.threshold:.3g}, {best:.3f} at"
        f" {thresholds[BEST]:.3g} ({lost:+.3f}, {low:+.3f} to {high:+.3f}); always positive"
        f" {always:.3f}"
    )
    advice = "choose another with thresholds.csv, for inference.py --threshold"
    is_bad = low > 0 or stored <= always
    audit.judge("threshold", is_bad, measured, "the best, within chance", advice)


def reliability(labels, probs) -> list[dict]:
    """The bins of equal width over probabilities (N,) that are not empty: num, mean_probability,
    and positive_share with its 95% interval.
    """
    bins = find_bins(probs)
    rows = []
    for number in np.unique(bins):
        inside = bins == number
        num = int(inside.sum())
        low, high = share_interval(labels[inside].sum(), num)
        row = {
            "num": num,
            "mean_probability": float(probs[inside].mean()),
            "positive_share": float(labels[inside].mean()),
            "positive_share_low": low,
            "positive_share_high": high,
        }
        rows.append(row)
    return rows


def check_calibration(audit: Audit) -> None:
    """Calibration scores on the second half, and bins of reliability; and a finding."""
    labels, probs = audit.answers.half(1)
    judged = audit.answers.rows[1]
    rows = []
    for name, logits in (("as the model says", audit.raw), (USED, audit.logits)):
        rows.append({"probabilities": name} | calibration_scores(labels, logits[judged]))
    audit.scores["calibration"] = rows
    bins = reliability(labels, probs)
    audit.tables["reliability"] = bins

    is_inside = [
        row["positive_share_low"] <= row["mean_probability"] <= row["positive_share_high"]
        for row in bins
    ]
    num_outside = is_inside.count(False)
    before, after = (row["ece"] for row in rows)
    measured = (
        f"ECE {after:.3f} {USED}, {before:.3f} before; the share of positives is another than the"
        f" probability in {num_outside} of {len(bins)} bins"
    )
    is_bad = after > MOST_ECE and num_outside > MOST_OUTSIDE
    limit = f"ECE {MOST_ECE:g}, {MOST_OUTSIDE} bins"
    advice = "do not read the probabilities as such: calibrate"
    audit.judge("calibration", is_bad, measured, limit, advice)


def check_slices(audit: Audit) -> None:
    """Rows of slices and the worst confirmed one; and a finding."""
    answers = audit.answers
    features = describe_patches(audit.blocks("describing patches"))
    rows = measure_slices(build_slices(features, answers.rows[0]), answers)
    worst = conclude(rows)
    audit.tables["slices"] = rows
    audit.scores |= {"worst_confirmed_slice": worst, "num_slices": len(rows)}
    confirmed = [row for row in rows if row["confirmed"]]
    measured = f"{len(confirmed)} of {len(rows)} slices are worse than the rest, on both halves"
    if worst:
        name = worst["measure"]
        measured += (
            f"; worst, {worst['feature']} {worst['slice']}: {name} {worst[name]:.3f}, elsewhere"
            f" {worst[f'rest_{name}']:.3f}"
        )
    advice = "look at their patches: more like them in training, or a threshold of their own"
    audit.judge("slices", worst is not None, measured, "none", advice, confirmed)


def show_errors(audit: Audit) -> None:
    """All errors, false positives first, each kind with the most confident first, of which `rank`
    counts; and maps of the evidence in the first of them.
    """
    labels = audit.answers.labels
    probs = audit.answers.probs
    errors = np.abs(probs - labels)
    wrong = np.flatnonzero((probs >= audit.answers.threshold) != labels)
    wrong = wrong[np.lexsort((-errors[wrong], labels[wrong]))]
    rows = []
    ranks = Counter()
    for place in wrong.tolist():
        label = int(labels[place])
        kind = KINDS[label]
        ranks[kind] += 1
        row = {"split": audit.split.name, "index": int(audit.rows[place]), "label": label}
        rows.append(row | {"probability": probs[place], "kind": kind, "rank": ranks[kind]})
    audit.tables["errors"] = rows
    shown = [row["index"] for row in rows if row["rank"] <= NUM_PICTURES]
    if shown:
        audit.patches = audit.split.images.read(shown)
        audit.maps = map_evidence(audit.predict_one_view, torch.from_numpy(audit.patches))


def write_all(audit: Audit, out: Path, with_patches: bool) -> dict:
    """Write every file of an audit, scores.json first and findings.json last, and give what the
    terminal is told.
    """
    for name in WRITTEN:  # of an audit before this one
        (out / name).unlink(missing_ok=True)
    write_json(out / "scores.json", audit.scores)
    answers = audit.answers
    source = str(audit.split.images.path)
    predictions = []
    for index, prob, label in zip(audit.rows, answers.probs, answers.labels, strict=True):
        is_called = prob >= answers.threshold
        predictions.append([source, index, f"{prob:.9g}", int(is_called), int(label)])
    header = ("source", "index", "probability", "prediction", "label")  # as inference.py has it
    write_csv(out / "predictions.csv", header, predictions)
    for name, rows in audit.tables.items():
        header = rows[0] if rows else ()
        write_csv(out / f"{name}.csv", header, [without_nan(list(row.values())) for row in rows])
    page = write_model_page(out / "model.html", audit, with_patches)
    write_json(out / "findings.json", audit.findings)
    severities = [row["severity"] for row in audit.findings]
    result = {name: audit.scores["global"][name]["value"] for name in ("auc", *PRICED)}
    return result | {
        "evaluation": audit.tables.get("evaluation"),
        "page": str(page),
        "num_errors": severities.count("error"),
        "num_warnings": severities.count("warning"),
    }
