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
from lib.pcam import Split
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
UNDECIDED, EXPLAINED = (
    "share of patches they decide differently",
    "share of the logit's variance they explain",
)
# patches uint8 (B, 96, 96, 3) to calibrated logits float64 (B,), of one view
Predict = Callable[[torch.Tensor], np.ndarray]


def centre_mask() -> torch.Tensor:
    """bool (96, 96, 1): the pixels that the label depends on."""
    mask = torch.zeros(96, 96, 1, dtype=torch.bool)
    mask[32:64, 32:64] = True
    return mask


def mean_colour(patches: torch.Tensor, where: torch.Tensor) -> torch.Tensor:
    """The mean colour of a region of each patch, uint8 (B, 1, 1, 3)."""
    return (
        ((patches * where).sum((1, 2), dtype=torch.float64) / where.sum())
        .round()
        .to(torch.uint8)[:, None, None]
    )


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
    centre = centre_mask()
    order = torch.from_numpy(np.random.default_rng(0).permutation(len(patches)))
    donors = torch.empty_like(order)
    donors[order] = order.roll(1)  # another patch for each
    versions = [("as it is", ~centre, lambda _: patches)]
    for name, where in (("ring", ~centre), ("centre", centre)):
        versions += [
            (f"{name} in its mean colour", where, lambda where: mean_colour(patches, where)),
            (
                f"{name} in the data's mean colour",
                where,
                lambda where: mean_colour(patches, where).double().mean(0).byte(),
            ),
            (f"{name} blurred", where, lambda _: blur(patches)),
            (f"{name} of another patch", where, lambda _: patches[donors]),
        ]
    rows, before = [], None
    with Progress(len(versions), "probing ring and centre", "versions") as bar:
        for probe, where, other in versions:
            probs = sigmoid(predict(torch.where(where, other(where), patches)))
            before = probs if before is None else before
            given = {"AUC": labels}
            if probe.endswith("another patch"):
                given[DONORS] = np.asarray(labels)[donors.numpy()]
            for measure, truth in given.items():
                rows.append(
                    measured(
                        probe,
                        measure,
                        resampled_scores(truth, probs, threshold, weights)["auc"],
                        0.5,
                    )
                )
            if probs is not before:
                rows.append(
                    measured(
                        probe,
                        "mean move of the probability",
                        mean_of(np.abs(probs - before), weights),
                        0.0,
                    )
                )
                changed = (probs >= threshold) != (before >= threshold)
                rows.append(
                    measured(probe, "share of decisions changed", mean_of(changed, weights), 0.0)
                )
            bar.add()
    return rows


def measured(probe: str, measure: str, values: np.ndarray, constant: float) -> dict:
    """A row of shortcut.csv from resampled values; `constant`: what a model scores that always
    answers the same.
    """
    value, low, high = estimate(values)
    return {
        "probe": probe,
        "measure": measure,
        "value": value,
        "low": low,
        "high": high,
        "constant": constant,
    }


def mean_of(values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """The mean of values (B,) for each resample, (1 + R,)."""
    return (
        weights.astype(np.float64)
        @ np.asarray(values, np.float64)
        / np.maximum(weights.sum(1, dtype=np.int64), 1)
    )


def probe_views(
    predict: Predict, patches: torch.Tensor, threshold: float, weights: np.ndarray
) -> list[dict]:
    """How much the eight views of a patch disagree: when it is turned and mirrored, and when it is
    shifted too, as it is in prediction. A network that turns with its input (p4m) disagrees over
    shifts alone."""
    rows = []
    for probe, shift in (
        ("eight views, turned", (0, 0)),
        ("eight views, turned and shifted", VIEW_SHIFT),
    ):
        views = np.stack([sigmoid(predict(seen)) for seen in eight_views(patches, shift)])  # (8, B)
        called = (views >= threshold).mean(0)
        rows.append(
            measured(
                probe, "mean range of the probability", mean_of(np.ptp(views, axis=0), weights), 0.0
            )
        )
        rows.append(measured(probe, UNDECIDED, mean_of((called > 0) & (called < 1), weights), 0.0))
    return rows


def map_evidence(predict: Predict, patches: torch.Tensor, step: int) -> np.ndarray:
    """float64 (B, 96, 96): by how much the logit falls where a pixel is hidden, the mean over all
    blocks of BLOCK_PX, `step` apart and of the patch's mean colour, that hide it (Zeiler and Fergus
    2014). Above 0: evidence for tumour."""
    corners = [
        (y, x) for y in range(0, 96 - BLOCK_PX + 1, step) for x in range(0, 96 - BLOCK_PX + 1, step)
    ]
    maps, hidden = np.zeros((len(patches), 96, 96)), np.zeros((96, 96))
    with Progress(len(patches), "mapping evidence") as bar:
        for number, patch in enumerate(patches):
            versions = patch.repeat(len(corners) + 1, 1, 1, 1)  # the last one as it is
            grey = mean_colour(patch[None], torch.ones(96, 96, 1, dtype=torch.bool))[0]
            for version, (y, x) in zip(versions, corners, strict=False):
                version[y : y + BLOCK_PX, x : x + BLOCK_PX] = grey
            logits = predict(versions)
            for logit, (y, x) in zip(logits, corners, strict=False):
                maps[number, y : y + BLOCK_PX, x : x + BLOCK_PX] += logits[-1] - logit
            bar.add()
    for y, x in corners:
        hidden[y : y + BLOCK_PX, x : x + BLOCK_PX] += 1
    return maps / hidden


def probe_evidence(predict: Predict, patches: torch.Tensor, weights: np.ndarray) -> dict:
    """The share of a patch's evidence, for or against, that lies in its centre."""
    strength = np.abs(map_evidence(predict, patches, BLOCK_PX))
    share = strength[:, 32:64, 32:64].sum((1, 2)) / np.maximum(strength.sum((1, 2)), 1e-12)
    return measured(
        "occlusion", "share of the evidence in the centre", mean_of(share, weights), 1 / 9
    )


def fit_logistic(values: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Coefficients (D,) of a logistic regression of labels (N,) on values (N, D), with a small
    ridge: Newton's method under the bound of the curvature, with which no step goes too far
    (Boehning and Lindsay 1988)."""
    coefficients, step = (
        np.zeros(values.shape[1]),
        np.linalg.inv(values.T @ values / 4 + np.eye(values.shape[1])),
    )
    for _ in range(500):
        coefficients = coefficients - step @ (
            values.T @ (sigmoid(values @ coefficients) - labels) + coefficients
        )
    return coefficients


def probe_colours(colours: np.ndarray, answers: Answers, logits: np.ndarray) -> list[dict]:
    """What colours alone tell, fitted on one half of the rows and judged on the other: of the
    label, by a logistic regression on colour statistics (N, D) and their squares, and of the
    model's logits (N,), by a linear one."""
    (first, second), (_, weights) = answers.rows, answers.weights
    values = np.clip(
        (colours - colours[first].mean(0)) / np.maximum(colours[first].std(0), 1e-6), -5, 5
    )
    values = np.concatenate([np.ones((len(values), 1)), values, values**2], 1)
    scores = values[second] @ fit_logistic(values[first], answers.labels[first])
    auc = resampled_scores(answers.labels[second], scores, 0.0, weights)["auc"]
    gram = values[first].T @ values[first] + np.eye(values.shape[1])
    errors = (
        logits[second] - values[second] @ np.linalg.solve(gram, values[first].T @ logits[first])
    ) ** 2
    variance = mean_of(logits[second] ** 2, weights) - mean_of(logits[second], weights) ** 2
    explained = 1 - mean_of(errors, weights) / np.maximum(variance, 1e-12)
    return [
        measured("colours alone", "AUC", auc, 0.5),
        measured("colours alone", EXPLAINED, explained, 0.0),
    ]


def check_shortcuts(
    predict: Predict,
    split: Split,
    answers: Answers,
    logits: np.ndarray,
    colours: np.ndarray,
    groups,
) -> tuple:
    """Rows of shortcut.csv and findings, of patches drawn evenly from the half that judges; colours
    of all.
    """
    judging = answers.rows[1]
    rows = judging[
        np.linspace(0, len(judging) - 1, min(MOST_PROBED, len(judging))).astype(np.int64)
    ]
    patches, weights = (
        torch.from_numpy(split.images.read(rows)),
        draw_weights(groups[rows]),
    )
    found = probe_regions(predict, patches, answers.labels[rows], answers.threshold, weights)
    found += probe_views(predict, patches, answers.threshold, weights)
    few = np.linspace(0, len(rows) - 1, min(MOST_MAPPED, len(rows))).astype(np.int64)
    found.append(probe_evidence(predict, patches[few], draw_weights(groups[rows[few]])))
    found += probe_colours(colours, answers, logits)
    return found, judge_shortcuts(found)


def judge_shortcuts(rows: list[dict]) -> list[dict]:
    """Findings from rows of shortcut.csv: warnings where the ring, colours or shifts explain
    much.
    """
    value = {(row["probe"], row["measure"]): row["value"] for row in rows}
    auc = {probe: number for (probe, measure), number in value.items() if measure == "AUC"}
    above_chance = max(auc["as it is"] - 0.5, LEAST_ABOVE_CHANCE)
    kept = {probe: (number - 0.5) / above_chance for probe, number in auc.items()}
    centre, ring, colours = "centre of another patch", "ring of another patch", "colours alone"
    lost, explained = 1 - kept[ring], value[colours, EXPLAINED]
    undecided, findings = value["eight views, turned and shifted", UNDECIDED], []

    def judge(check: str, is_bad: bool, words: str, limit: str, advice: str) -> None:
        findings.append(
            finding(
                f"shortcut: {check}",
                "warning" if is_bad else "note",
                words,
                limit,
                advice if is_bad else "",
            )
        )

    words = (
        f"with the centre of another patch AUC is {auc[centre]:.3f}: of what it has above chance"
        " with its own "
    )
    words += f"({auc['as it is']:.3f}) {kept[centre]:.0%} stays"
    advice = (
        "patches are judged by what surrounds the centre, on which alone the label depends: expect"
        " errors at borders"
    )
    judge("ring", kept[centre] > MOST_RETAINED, words, f"{MOST_RETAINED:.0%}", advice)
    words = (
        f"with the ring of another patch AUC is {auc[ring]:.3f}, {lost:.0%} less above chance; for"
        " the labels of the "
    )
    words += f"patches that gave it {value[ring, DONORS]:.3f}"
    advice = (
        "the surroundings sway the answer: where they differ from those of training, expect other"
        " scores"
    )
    judge("other ring", lost > MOST_LOST, words, f"{MOST_LOST:.0%}", advice)
    words = (
        f"colours alone reach AUC {auc[colours]:.3f}, and explain {explained:.0%} of the variance"
        " of the logit"
    )
    is_bad, limit = (
        kept[colours] > MOST_RETAINED or explained > MOST_EXPLAINED,
        "{:.0%} of the AUC above chance, {:.0%}",
    )
    advice = "a change of stain or scanner may undo this model: more stain_jitter, other slides"
    judge("colours", is_bad, words, limit.format(MOST_RETAINED, MOST_EXPLAINED), advice)
    words = f"the eight views do not agree on {undecided:.1%} of the patches"
    advice = "answers hang on where a patch happens to be cut: keep views=8"
    judge("views", undecided > MOST_UNDECIDED, words, f"{MOST_UNDECIDED:.0%}", advice)
    return findings
