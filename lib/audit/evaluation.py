"""The scores of a model on a whole split, raw and of one of each group of equal patches, and the
published ones; and when a checkpoint first saw the test split.
"""

import contextlib

import numpy as np

from lib.audit.copies import find_equal, join, print_patches
from lib.audit.resampling import draw_weights, resampled_scores, spread
from lib.files import read_cache, utc_now, write_json
from lib.metrics import constant_baselines
from lib.published import compare_md5

# on the official test split: who (source), accuracy in percent, AUC
PUBLISHED = [
    ("P4M-DenseNet, from scratch (Veeling et al. 2018)", "89.8", 0.963),
    ("ResNet-50 / DenseNet-121 / WideResNet-50, toolbox, tuned", "F1 89.2 / 89.7 / 90.1", None),
    ("HAGCA-Net, tuned threshold, 8 views", "92.3", 0.9765),
    ("DINOv3 ViT-S/16, fine-tuned at 224", "92.0", 0.98),
    ("Hibou-L, linear probe", "balanced 95.5", None),
    ("Virchow2, trained head, 27,704 de-duplicated patches", "93.7", 0.981),
    ("DSF-CNN, steerable, from scratch (arXiv 2004.03037)", None, 0.975),
    ("C8-equivariant, 26,000 patches (arXiv 2605.07270)", "85.5 to 87.2", "0.941 to 0.945"),
]


def check_scores(audit) -> None:
    """Rows of evaluation.csv: the scores at the checkpoint's threshold, with intervals resampled by
    group; and a finding for each file of an Audit of lib/audit/model.py that is not
    that of the official test split.
    """
    answers = audit.answers
    blocks = audit.blocks("looking for equal patches")
    prints = join([print_patches(block) for block in blocks])
    first = find_equal(prints, audit.read)
    rows = []
    for name, places in (("raw", np.arange(len(first))), ("de-duplicated", np.unique(first))):
        labels = answers.labels[places]
        weights = draw_weights(audit.groups[places])
        scores = resampled_scores(labels, answers.probs[places], answers.threshold, weights)
        row = {"rows": name, "num": len(places)}
        scores["sensitivity"] = scores["recall"]
        for score in ("auc", "f2", "sensitivity", "specificity"):
            row |= spread(score, scores[score])
        row["always_positive_f2"] = constant_baselines(labels)["always_positive_f2"]
        rows.append(row)
    audit.tables["evaluation"] = rows
    audit.scores["evaluation"] = rows
    raw, unique = (row["auc"] for row in rows)
    measured = f"AUC {raw:.4f} on all patches, {unique:.4f} without copies"
    audit.add("scores", "note", measured, split=audit.split.name)
    if audit.split.name == "test":
        for difference in compare_md5(audit.directory, "test"):
            audit.add("official", "note", f"no official test: {difference}", split="test")


def note_opening(audit, digest: str) -> None:
    """Note in openings.json, beside the checkpoint, when its weights saw test patches of this
    SHA-256; a finding where they have before.
    """
    path = audit.path.with_name("openings.json")
    key = f"{audit.checkpoint['weights_sha256']} {digest}"
    openings = read_cache(path)
    if key in openings:
        measured = f"this checkpoint has opened these patches before, on {openings[key]}"
        audit.add("opened", "note", measured, split="test")
        return
    with contextlib.suppress(OSError):  # in a read-only folder nothing is remembered
        write_json(path, openings | {key: utc_now()})
