"""Does a model look where the label comes from? PCam's own rule says where: the label depends on
the centre 32x32 alone.

Parts of a patch are covered, blurred, or exchanged with those of another, and the answers compared.
A cover of one colour is a shock as well as a loss: a blur, and tissue of another patch, take the
information away and leave the patch plausible.
"""

from collections.abc import Callable

import numpy as np
import torch
from torch.nn import functional

from lib.audit import finding
from lib.audit.resampling import draw_weights, estimate, resampled_scores
from lib.audit.slices import Answers
from lib.augment import VIEW_SHIFT, eight_views
from lib.metrics import sigmoid
from lib.progress import Progress

# patches that are probed, and those of them whose evidence is mapped
MOST_PROBED, MOST_MAPPED = 1_000, 64
BLOCK_PX, BLUR_PX = 16, 31
# of what an AUC has above chance: more without its own centre, or from colours, is worth a warning
MOST_RETAINED = 0.8
MOST_LOST = 0.2  # and so is a loss of more than this by another ring
MOST_EXPLAINED = 0.8  # share of the variance of the logit that colours explain
MOST_UNDECIDED = 0.15  # share of patches on which the views do not agree
LEAST_ABOVE_CHANCE = 0.05  # an AUC nearer to chance than that leaves nothing to be explained
DONORS = "AUC for the labels of the patches that gave it"
MOVED, CHANGED = "mean move of the probability", "share of decisions changed"
UNDECIDED = "share of patches they decide differently"
EXPLAINED = "share of the logit's variance they explain"
SHIFTED, COLOURS = "eight views, turned and shifted", "colours alone"
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
    for size in ((BLUR_PX, 1), (1, BLUR_PX)) * 2:
        planes = functional.avg_pool2d(
            planes, size, 1, (size[0] // 2, size[1] // 2), count_include_pad=False
        )
    return planes.round().to(torch.uint8).permute(0, 2, 3, 1)


def probe_regions(
    predict: Predict, patches: torch.Tensor, labels, threshold: float, weights: np.ndarray
) -> list[dict]:
    """Rows {probe, measure, value, low, high, constant} of what covering, blurring and exchanging
    ring and centre does to the answers for patches uint8 (B, 96, 96, 3) with labels (B,). `weights`
    (1 + R, B) resample them, after a row of ones."""
    labels = np.asarray(labels)
    order = torch.from_numpy(np.random.default_rng(0).permutation(len(patches)))
    donors = torch.empty_like(order)
    donors[order] = order.roll(1)  # another patch for each
    covers = {
        "in the data's mean colour": patches.double().mean((0, 1, 2)).round().to(torch.uint8),
        "blurred": blur(patches),
        "of another patch": patches[donors],
    }
    centre = centre_mask()
    rows = []

    def add_auc(probe: str, measure: str, truth, probs) -> None:
        values = resampled_scores(truth, probs, threshold, weights)["auc"]
        rows.append(measured(probe, measure, values, 0.5))

    with Progress(1 + 2 * len(covers), "probing ring and centre", "versions") as bar:
        before = sigmoid(predict(patches))
        add_auc("as it is", "AUC", labels, before)
        bar.add()
        for region, where in (("ring", ~centre), ("centre", centre)):
            for how, cover in covers.items():
                probe = f"{region} {how}"
                probs = sigmoid(predict(torch.where(where, cover, patches)))
                add_auc(probe, "AUC", labels, probs)
                if how == "of another patch":
                    add_auc(probe, DONORS, labels[donors.numpy()], probs)
                moves = mean_of(np.abs(probs - before), weights)
                is_changed = (probs >= threshold) != (before >= threshold)
                rows.append(measured(probe, MOVED, moves, 0.0))
                rows.append(measured(probe, CHANGED, mean_of(is_changed, weights), 0.0))
                bar.add()
    return rows


def measured(probe: str, measure: str, values: np.ndarray, constant: float) -> dict:
    """A row of shortcut.csv from resampled values; `constant`: what a model scores that always
    answers the same.
    """
    value, low, high = estimate(values)
    row = {"probe": probe, "measure": measure, "value": value, "low": low, "high": high}
    return row | {"constant": constant}


def mean_of(values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """The mean of values (B,) for each resample, (1 + R,)."""
    sums = weights.astype(np.float64) @ np.asarray(values, np.float64)
    return sums / np.maximum(weights.sum(1, dtype=np.int64), 1)


def probe_views(
    predict: Predict, patches: torch.Tensor, threshold: float, weights: np.ndarray
) -> list[dict]:
    """How much the eight views of a patch disagree: when it is turned and mirrored, and when it is
    shifted too, as it is in prediction. A network that turns with its input (p4m) disagrees over
    shifts alone."""
    rows = []
    for probe, shift in (("eight views, turned", (0, 0)), (SHIFTED, VIEW_SHIFT)):
        views = np.stack([sigmoid(predict(seen)) for seen in eight_views(patches, shift)])  # (8, B)
        share_called = (views >= threshold).mean(0)
        is_undecided = (share_called > 0) & (share_called < 1)
        ranges = mean_of(np.ptp(views, axis=0), weights)
        rows.append(measured(probe, "mean range of the probability", ranges, 0.0))
        rows.append(measured(probe, UNDECIDED, mean_of(is_undecided, weights), 0.0))
    return rows


def map_evidence(predict: Predict, patches: torch.Tensor, step: int) -> np.ndarray:
    """float64 (B, 96, 96): by how much the logit falls where a pixel is hidden, the mean over all
    blocks of BLOCK_PX, `step` apart and of the patch's mean colour, that hide it (Zeiler and Fergus
    2014). Above 0: evidence for tumour."""
    starts = range(0, 96 - BLOCK_PX + 1, step)
    blocks = [np.s_[y : y + BLOCK_PX, x : x + BLOCK_PX] for y in starts for x in starts]
    maps, num_hidden = np.zeros((len(patches), 96, 96)), np.zeros((96, 96))
    for block in blocks:
        num_hidden[block] += 1
    with Progress(len(patches), "mapping evidence") as bar:
        for evidence, patch in zip(maps, patches, strict=True):
            versions = patch.repeat(len(blocks) + 1, 1, 1, 1)  # the last one as it is
            mean_colour = patch.double().mean((0, 1)).round().to(torch.uint8)
            for version, block in zip(versions, blocks, strict=False):
                version[block] = mean_colour
            *hidden, whole = predict(versions)
            for logit, block in zip(hidden, blocks, strict=True):
                evidence[block] += whole - logit
            bar.add()
    return maps / num_hidden


def probe_evidence(predict: Predict, patches: torch.Tensor, weights: np.ndarray) -> dict:
    """The share of a patch's evidence, for or against, that lies in its centre."""
    strength = np.abs(map_evidence(predict, patches, BLOCK_PX))
    share = strength[:, 32:64, 32:64].sum((1, 2)) / np.maximum(strength.sum((1, 2)), 1e-12)
    measure = "share of the evidence in the centre"
    return measured("occlusion", measure, mean_of(share, weights), 1 / 9)


def fit_logistic(values: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Coefficients (D,) of a logistic regression of labels (N,) on values (N, D), with a small
    ridge: Newton's method under the bound of the curvature, with which no step goes too far
    (Boehning and Lindsay 1988)."""
    step = np.linalg.inv(values.T @ values / 4 + np.eye(values.shape[1]))
    coefficients = np.zeros(values.shape[1])
    for _ in range(500):
        errors = sigmoid(values @ coefficients) - labels
        coefficients = coefficients - step @ (values.T @ errors + coefficients)
    return coefficients


def probe_colours(colours: np.ndarray, answers: Answers, logits: np.ndarray) -> list[dict]:
    """What colours alone tell, fitted on one half of the rows and judged on the other: of the
    label, by a logistic regression on colour statistics (N, D) and their squares, and of the
    model's logits (N,), by a linear one."""
    (first, second), (_, weights) = answers.rows, answers.weights
    deviation = np.maximum(colours[first].std(0), 1e-6)
    values = np.clip((colours - colours[first].mean(0)) / deviation, -5, 5)
    values = np.concatenate([np.ones((len(values), 1)), values, values**2], 1)
    fitted, judged = values[first], values[second]
    scores = judged @ fit_logistic(fitted, answers.labels[first])
    auc = resampled_scores(answers.labels[second], scores, 0.0, weights)["auc"]
    gram = fitted.T @ fitted + np.eye(values.shape[1])
    slopes = np.linalg.solve(gram, fitted.T @ logits[first])
    errors = mean_of((logits[second] - judged @ slopes) ** 2, weights)
    variance = mean_of(logits[second] ** 2, weights) - mean_of(logits[second], weights) ** 2
    explained = 1 - errors / np.maximum(variance, 1e-12)
    return [
        measured(COLOURS, "AUC", auc, 0.5),
        measured(COLOURS, EXPLAINED, explained, 0.0),
    ]


def check_shortcuts(predict: Predict, read, answers: Answers, logits, colours) -> tuple:
    """Rows of shortcut.csv and findings, of patches drawn evenly from the half that judges.

    `read` gives the patches of rows; colours (N, D) and logits (N,) are of all rows.
    """
    judging = answers.rows[1]
    rows = judging[spaced(len(judging), MOST_PROBED)]
    patches = torch.from_numpy(read(rows))
    weights = draw_weights(answers.groups[rows])
    measures = probe_regions(predict, patches, answers.labels[rows], answers.threshold, weights)
    measures += probe_views(predict, patches, answers.threshold, weights)
    few = spaced(len(rows), MOST_MAPPED)
    measures.append(probe_evidence(predict, patches[few], draw_weights(answers.groups[rows[few]])))
    measures += probe_colours(colours, answers, logits)
    return measures, judge_shortcuts(measures) if len(weights) > 1 else []


def spaced(num: int, most: int) -> np.ndarray:
    """At most so many of `num` places, evenly spaced, int64."""
    return np.linspace(0, num - 1, min(most, num)).astype(np.int64)


def judge_shortcuts(rows: list[dict]) -> list[dict]:
    """Findings from rows of shortcut.csv: warnings where the ring, colours or shifts explain
    much.
    """
    value = {(row["probe"], row["measure"]): row["value"] for row in rows}
    centre, ring = "centre of another patch", "ring of another patch"
    auc = {probe: value[probe, "AUC"] for probe in ("as it is", centre, ring, COLOURS)}
    above_chance = max(auc["as it is"] - 0.5, LEAST_ABOVE_CHANCE)
    kept = {probe: (number - 0.5) / above_chance for probe, number in auc.items()}
    lost, explained = 1 - kept[ring], value[COLOURS, EXPLAINED]
    undecided = value[SHIFTED, UNDECIDED]
    checks = (
        (
            "ring",
            kept[centre] > MOST_RETAINED,
            f"with the centre of another patch AUC is {auc[centre]:.3f}: {kept[centre]:.0%} of what"
            f" it has above chance with its own ({auc['as it is']:.3f}) stays",
            f"{MOST_RETAINED:.0%}",
            "patches are judged by what surrounds the centre, on which alone the label depends:"
            " expect errors at borders",
        ),
        (
            "other ring",
            lost > MOST_LOST,
            f"with the ring of another patch AUC is {auc[ring]:.3f}, {lost:.0%} less above chance;"
            f" for the labels of the patches that gave it {value[ring, DONORS]:.3f}",
            f"{MOST_LOST:.0%}",
            "the surroundings sway the answer: where they differ from those of training, expect"
            " other scores",
        ),
        (
            "colours",
            kept[COLOURS] > MOST_RETAINED or explained > MOST_EXPLAINED,
            f"colours alone reach AUC {auc[COLOURS]:.3f}, and explain {explained:.0%} of the"
            " variance of the logit",
            f"{MOST_RETAINED:.0%} of the AUC above chance, {MOST_EXPLAINED:.0%}",
            "a change of stain or scanner may undo this model: more stain_jitter, other slides",
        ),
        (
            "views",
            undecided > MOST_UNDECIDED,
            f"the eight views do not agree on {undecided:.1%} of the patches",
            f"{MOST_UNDECIDED:.0%}",
            "answers hang on where a patch happens to be cut: keep views=8",
        ),
    )
    findings = []
    for check, is_bad, words, limit, advice in checks:
        severity, advice = ("warning", advice) if is_bad else ("note", "")
        findings.append(finding(f"shortcut: {check}", severity, words, limit, advice))
    return findings
