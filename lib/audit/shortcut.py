"""Does a model look where the label comes from? PCam's own rule says where: the label depends on
the centre 32x32 alone.

Parts of a patch are covered, blurred, or exchanged with those of another, and the answers compared.
A cover of one colour is a shock as well as a loss: a blur, and tissue of another patch, take the
information away and leave the patch plausible.
"""

import itertools
from collections.abc import Callable

import numpy as np
import torch
from torch.nn import functional

from lib.audit import judged_finding
from lib.audit.resampling import draw_weights, resampled_scores, score_cells
from lib.audit.slices import Answers
from lib.augment import VIEW_SHIFT, turned_views
from lib.metrics import sigmoid
from lib.progress import Progress

# patches that are probed, and those of them whose evidence is mapped
MOST_PROBED = 1_000
MOST_MAPPED = 64
BLOCK_PX = 16
BLUR_PX = 31
# of what an AUC has above chance: more without its own centre, or from colours, is worth a warning
MOST_RETAINED = 0.8
MOST_LOST = 0.2  # and so is a loss of more than this by another ring
MOST_EXPLAINED = 0.8  # share of the variance of the logit that colours explain
MOST_UNDECIDED = 0.15  # share of patches on which the views do not agree
LEAST_ABOVE_CHANCE = 0.05  # an AUC nearer to chance than that leaves nothing to be explained
DONORS = "AUC for the labels of the patches that gave it"
MOVED = "mean move of the probability"
CHANGED = "share of decisions changed"
UNDECIDED = "share of patches they decide differently"
EXPLAINED = "share of the logit's variance they explain"
SHIFTED = "eight views, turned and shifted"
COLOURS = "colours alone"
# patches uint8 (B, 96, 96, 3) to calibrated logits float64 (B,), of one view
Predict = Callable[[torch.Tensor], np.ndarray]


def centre_mask() -> torch.Tensor:
    """bool (96, 96, 1): the pixels that the label depends on."""
    mask = torch.zeros(96, 96, 1, dtype=torch.bool)
    mask[32:64, 32:64] = True
    return mask


def blur(patches: torch.Tensor) -> torch.Tensor:
    """Patches in which no nucleus is left: averaged over BLUR_PX x BLUR_PX pixels, twice."""
    planes = patches.permute(0, 3, 1, 2).float()
    for height, width in ((BLUR_PX, 1), (1, BLUR_PX)) * 2:
        padding = height // 2, width // 2
        planes = functional.avg_pool2d(planes, (height, width), 1, padding, False, False)
    return planes.round().to(torch.uint8).permute(0, 2, 3, 1)


def mean_colour(patches: torch.Tensor) -> torch.Tensor:
    """The mean colour uint8 (3,) of patches uint8 (..., 3)."""
    return patches.double().flatten(0, -2).mean(0).round().to(torch.uint8)


def measured(probe: str, measure: str, values: np.ndarray, constant: float) -> dict:
    """A row of shortcut.csv from resampled values; `constant`: what a model scores that always
    answers the same.
    """
    return {"probe": probe, "measure": measure, **score_cells(values), "constant": constant}


def mean_of(values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """The mean of values (B,) for each resample, (1 + R,)."""
    weights = weights.astype(np.float64)
    sums = weights @ values.astype(np.float64)
    return sums / np.maximum(weights.sum(1), 1)


def probe_regions(
    predict: Predict, patches: torch.Tensor, labels, threshold: float, weights: np.ndarray
) -> list[dict]:
    """Rows {probe, measure, value, low, high, constant} of what covering, blurring and exchanging
    ring and centre does to the answers for patches uint8 (B, 96, 96, 3) with labels (B,). `weights`
    (1 + R, B) resample them, after a row of ones."""
    order = np.random.default_rng(0).permutation(len(patches))
    donors = np.empty_like(order)
    donors[order] = np.roll(order, 1)  # another patch for each
    covers = {
        "in the data's mean colour": mean_colour(patches),
        "blurred": blur(patches),
        "of another patch": patches[torch.from_numpy(donors)],
    }
    centre = centre_mask()

    def auc_row(probe: str, measure: str, truth, probs) -> dict:
        values = resampled_scores(truth, probs, threshold, weights)["auc"]
        return measured(probe, measure, values, 0.5)

    with Progress(1 + 2 * len(covers), "probing ring and centre", "versions") as bar:
        before = sigmoid(predict(patches))
        rows = [auc_row("as it is", "AUC", labels, before)]
        bar.add()
        for region, where in (("ring", ~centre), ("centre", centre)):
            for how, cover in covers.items():
                probe = f"{region} {how}"
                probs = sigmoid(predict(torch.where(where, cover, patches)))
                rows.append(auc_row(probe, "AUC", labels, probs))
                if how == "of another patch":
                    rows.append(auc_row(probe, DONORS, labels[donors], probs))
                moves = np.abs(probs - before)
                is_changed = (probs >= threshold) != (before >= threshold)
                rows.append(measured(probe, MOVED, mean_of(moves, weights), 0.0))
                rows.append(measured(probe, CHANGED, mean_of(is_changed, weights), 0.0))
                bar.add()
    return rows


def probe_views(
    predict: Predict, patches: torch.Tensor, threshold: float, weights: np.ndarray
) -> list[dict]:
    """How much the eight views of a patch disagree: when it is turned and mirrored, and when it is
    shifted too, as it is in prediction. A network that turns with its input (p4m) disagrees over
    shifts alone."""
    rows = []
    for probe, shift in (("eight views, turned", (0, 0)), (SHIFTED, VIEW_SHIFT)):
        views = [sigmoid(predict(view)) for view in turned_views(patches, shift)]
        views = np.stack(views)  # (8, B)
        called = views >= threshold
        is_undecided = called.any(0) & ~called.all(0)
        ranges = mean_of(np.ptp(views, axis=0), weights)
        rows.append(measured(probe, "mean range of the probability", ranges, 0.0))
        rows.append(measured(probe, UNDECIDED, mean_of(is_undecided, weights), 0.0))
    return rows


def map_evidence(predict: Predict, patches: torch.Tensor, step: int) -> np.ndarray:
    """float64 (B, 96, 96): by how much the logit falls where a pixel is hidden, the mean over all
    blocks of BLOCK_PX, `step` apart and of the patch's mean colour, that hide it (Zeiler and Fergus
    2014). Above 0: evidence for tumour."""
    starts = range(0, 96 - BLOCK_PX + 1, step)
    blocks = torch.zeros(len(starts) ** 2, 96, 96, 1, dtype=torch.bool)
    for block, (y, x) in zip(blocks, itertools.product(starts, starts), strict=True):
        block[y : y + BLOCK_PX, x : x + BLOCK_PX] = True
    is_hidden = blocks.squeeze(3).numpy()
    maps = np.zeros((len(patches), 96, 96))
    with Progress(len(patches), "mapping evidence") as bar:
        for evidence, patch in zip(maps, patches, strict=True):
            versions = torch.where(blocks, mean_colour(patch), patch)
            *logits, whole = predict(torch.cat([versions, patch[None]]))
            for logit, block in zip(logits, is_hidden, strict=True):
                evidence[block] += whole - logit
            bar.add()
    return maps / is_hidden.sum(0)


def probe_evidence(predict: Predict, patches: torch.Tensor, weights: np.ndarray) -> dict:
    """The share of a patch's evidence, for or against, that lies in its centre."""
    strength = np.abs(map_evidence(predict, patches, BLOCK_PX))
    inside = strength[:, 32:64, 32:64].sum((1, 2))
    share = inside / np.maximum(strength.sum((1, 2)), 1e-12)
    measure = "share of the evidence in the centre"
    return measured("occlusion", measure, mean_of(share, weights), 1 / 9)


def probe_colours(colours: np.ndarray, answers: Answers, logits: np.ndarray) -> list[dict]:
    """What colours alone tell of the label and of the model's logits (N,): a linear regression on
    colour statistics (N, D) and their squares, fitted on one half and judged on the other."""
    (first, second), (_, weights) = answers.rows, answers.weights
    deviation = np.maximum(colours[first].std(0), 1e-6)
    values = (colours - colours[first].mean(0)) / deviation
    values = np.clip(values, -5, 5)
    constant = np.ones((len(values), 1))
    values = np.concatenate([constant, values, values**2], 1)
    targets = np.stack([answers.labels, logits], 1)
    fitted = values[first]
    gram = fitted.T @ fitted + np.eye(values.shape[1])  # with a small ridge
    slopes = np.linalg.solve(gram, fitted.T @ targets[first])
    label, logit = (values[second] @ slopes).T
    auc = resampled_scores(answers.labels[second], label, 0.0, weights)["auc"]
    truth = logits[second]
    errors = mean_of((truth - logit) ** 2, weights)
    variance = mean_of(truth**2, weights) - mean_of(truth, weights) ** 2
    explained = 1 - errors / np.maximum(variance, 1e-12)
    return [
        measured(COLOURS, "AUC", auc, 0.5),
        measured(COLOURS, EXPLAINED, explained, 0.0),
    ]


def check_shortcuts(audit) -> None:
    """Rows of shortcut.csv, of patches drawn evenly from the half that judges, and findings, in an
    Audit of lib/audit/model.py.
    """
    answers = audit.answers
    predict = audit.predict_calibrated
    threshold = answers.threshold
    judging = answers.rows[1]
    rows = judging[spaced(len(judging), MOST_PROBED)]
    patches = torch.from_numpy(audit.read(rows))
    weights = draw_weights(answers.groups[rows])
    measures = probe_regions(predict, patches, answers.labels[rows], threshold, weights)
    measures += probe_views(predict, patches, threshold, weights)
    few = spaced(len(rows), MOST_MAPPED)
    few_weights = draw_weights(answers.groups[rows[few]])
    measures.append(probe_evidence(predict, patches[few], few_weights))
    measures += probe_colours(audit.features["colours"], answers, audit.logits)
    audit.tables["shortcut"] = measures
    if len(weights) > 1:
        audit.findings += judge_shortcuts(measures)


def spaced(num: int, most: int) -> np.ndarray:
    """At most so many of `num` places, evenly spaced, int64."""
    return np.linspace(0, num - 1, min(most, num)).astype(np.int64)


def judge_shortcuts(rows: list[dict]) -> list[dict]:
    """Findings from rows of shortcut.csv: warnings where the ring, colours or shifts explain
    much.
    """
    value = {(row["probe"], row["measure"]): row["value"] for row in rows}
    probes = ("as it is", "centre of another patch", "ring of another patch", COLOURS)
    whole, centre, ring, colours = (value[probe, "AUC"] for probe in probes)
    above_chance = max(whole - 0.5, LEAST_ABOVE_CHANCE)
    retained = (centre - 0.5) / above_chance
    retained_by_colours = (colours - 0.5) / above_chance
    lost = 1 - (ring - 0.5) / above_chance
    donors = value["ring of another patch", DONORS]
    explained = value[COLOURS, EXPLAINED]
    undecided = value[SHIFTED, UNDECIDED]
    checks = (
        (
            "ring",
            retained > MOST_RETAINED,
            f"with the centre of another patch AUC is {centre:.3f}: {retained:.0%} of what it has"
            f" above chance with its own ({whole:.3f}) stays",
            f"{MOST_RETAINED:.0%}",
            "patches are judged by what surrounds the centre, on which alone the label depends:"
            " expect errors at borders",
        ),
        (
            "other ring",
            lost > MOST_LOST,
            f"with the ring of another patch AUC is {ring:.3f}, {lost:.0%} less above chance; for"
            f" the labels of the patches that gave it {donors:.3f}",
            f"{MOST_LOST:.0%}",
            "the surroundings sway the answer: where they differ from those of training, expect"
            " other scores",
        ),
        (
            "colours",
            retained_by_colours > MOST_RETAINED or explained > MOST_EXPLAINED,
            f"colours alone reach AUC {colours:.3f}, and explain {explained:.0%} of the variance of"
            " the logit",
            f"{MOST_RETAINED:.0%} of the AUC above chance, {MOST_EXPLAINED:.0%}",
            "a change of stain or scanner may undo this model: more stain_jitter, other slides",
        ),
        (
            "views",
            undecided > MOST_UNDECIDED,
            f"the eight views do not agree on {undecided:.1%} of the patches",
            f"{MOST_UNDECIDED:.0%}",
            "answers hang on where a patch happens to be cut: keep several views",
        ),
    )
    return [judged_finding(f"shortcut: {name}", *check) for name, *check in checks]
