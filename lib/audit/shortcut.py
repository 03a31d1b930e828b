"""Does a model look where the label comes from? PCam's own rule says where: the label depends on
the centre 32x32 alone.

Centre and ring are exchanged with those of another patch, which takes the information away and
leaves the patch plausible. A cover of one colour would be a shock as well as a loss.
"""

import itertools
from collections.abc import Callable

import numpy as np
import torch

from lib.audit.resampling import draw_weights, resampled_scores, spread
from lib.progress import Progress

MOST_PROBED = 1_000  # patches
BLOCK_PX = 16
NUM_BLOCKS = (96 // BLOCK_PX) ** 2
# of what an AUC has above chance: more without its own centre is worth a warning
MOST_RETAINED = 0.8
LEAST_ABOVE_CHANCE = 0.05  # an AUC nearer to chance than that leaves nothing to be explained
# patches uint8 (B, 96, 96, 3) to calibrated logits float64 (B,), of one view
Predict = Callable[[torch.Tensor], np.ndarray]


def centre_mask() -> torch.Tensor:
    """bool (96, 96, 1): the pixels that the label depends on."""
    mask = torch.zeros(96, 96, 1, dtype=torch.bool)
    mask[32:64, 32:64] = True
    return mask


def probe_regions(
    predict: Predict, patches: torch.Tensor, labels, weights: np.ndarray
) -> list[dict]:
    """Rows {probe, auc, auc_low, auc_high} for patches uint8 (B, 96, 96, 3) with labels
    (B,): as they are, and with the centre or the ring of another patch. `weights` (1 + R, B)
    resample them, after a row of ones."""
    order = np.random.default_rng(0).permutation(len(patches))
    others = patches.clone()
    others[order] = patches[np.roll(order, 1)]  # another patch for each
    centre = centre_mask()
    versions = {
        "as it is": patches,
        "centre of another patch": torch.where(centre, others, patches),
        "ring of another patch": torch.where(centre, patches, others),
    }
    rows = []
    for probe, version in versions.items():
        scores = resampled_scores(labels, predict(version), 0.0, weights)
        rows.append({"probe": probe} | spread("auc", scores["auc"]))
    return rows


def check_shortcuts(audit) -> None:
    """Rows of shortcut.csv, of patches drawn evenly from the half that judges, and a finding, in
    an Audit of lib/audit/model.py.
    """
    answers = audit.answers
    judging = answers.rows[1]
    places = judging[spaced(len(judging), MOST_PROBED)]
    patches = torch.from_numpy(audit.read(places))
    weights = draw_weights(audit.groups[places])
    rows = probe_regions(audit.predict_one_view, patches, answers.labels[places], weights)
    audit.tables["shortcut"] = rows
    whole, centre, ring = (row["auc"] for row in rows)
    retained = (centre - 0.5) / max(whole - 0.5, LEAST_ABOVE_CHANCE)
    audit.judge(
        "shortcut",
        retained > MOST_RETAINED,
        f"AUC {whole:.3f}; with the centre of another patch {centre:.3f}, {retained:.0%} of what it"
        f" has above chance; with the ring of another patch {ring:.3f}",
        f"{MOST_RETAINED:.0%}",
        "patches are judged by what surrounds the centre, on which alone the label depends: expect"
        " errors at borders",
    )


def map_evidence(predict: Predict, patches: torch.Tensor) -> np.ndarray:
    """float64 (B, 96, 96): by how much the logit falls where a block of pixels has the patch's mean
    colour (Zeiler and Fergus 2014). Above 0: evidence for tumour."""
    whole = predict(patches)
    colours = patches.double().mean((1, 2), keepdim=True).round().to(torch.uint8)
    maps = np.zeros((len(patches), 96, 96))
    starts = range(0, 96, BLOCK_PX)
    with Progress(NUM_BLOCKS, "mapping evidence", "blocks") as bar:
        for y, x in itertools.product(starts, starts):
            block = np.s_[:, y : y + BLOCK_PX, x : x + BLOCK_PX]
            hidden = patches.clone()
            hidden[block] = colours
            evidence = whole - predict(hidden)
            maps[block] = evidence[:, None, None]
            bar.add()
    return maps


def spaced(num: int, most: int) -> np.ndarray:
    """At most so many of `num` places, evenly spaced, int64."""
    return np.linspace(0, num - 1, min(most, num)).astype(np.int64)
