"""A model applied to patches: float32 logits in input order, over one view or averaged over eight
(test-time augmentation).
"""

import numpy as np
import torch
from torch import nn

from lib.augment import PREPROCESSING, eight_views, no_augmentation, normalise
from lib.batches import PatchSource, Rows, load_batches
from lib.centrenet import fold_norms
from lib.device import layer_precision
from lib.metrics import compute_metrics
from lib.ranks import ALONE, Ranks

CPU_BATCH = 64  # patches whose layers still lie in a core's cache


def ready_to_predict(model: nn.Module, precision: str) -> nn.Module:
    """A copy of a model that predicts the same, faster, and cannot be trained."""
    return fold_norms(model, torch.bfloat16 if precision == "bf16" else torch.float32)


@torch.inference_mode()
def predict_batch(
    model: nn.Module, images: torch.Tensor, precision: str, views: int, preprocessing: dict
) -> torch.Tensor:
    """Logits float32 (B,) of patches uint8 (B, 96, 96, 3): of the patches as they are, or the mean
    over eight views, each another symmetry and shift."""
    if images.device.type == "cpu" and len(images) > CPU_BATCH:
        return torch.cat(
            [
                predict_batch(model, part, precision, views, preprocessing)
                for part in images.split(CPU_BATCH)
            ]
        )
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    plain = no_augmentation(len(images), images.device)
    inputs = normalise(images, plain, preprocessing["mean"], preprocessing["std"], dtype)
    seen = [inputs]
    if views > 1:
        seen = (view.permute(0, 3, 1, 2) for view in eight_views(inputs.permute(0, 2, 3, 1)))
    logits = torch.zeros(len(images), device=images.device)
    for view in seen:
        with layer_precision(images.device, precision):
            logits += model(view).float().flatten()
    return logits / views


def predict_rows(
    model: nn.Module, source: PatchSource, index: np.ndarray, cfg, views: int
) -> np.ndarray:
    """Logits float32 (N,) of the rows `index` int64 (N,) of a split, in that order, in the config's
    precision.

    The model is changed in nothing.
    """
    model = ready_to_predict(model, cfg.precision)
    no_labels = np.zeros(len(source), np.uint8)  # prediction knows none
    batches = load_batches(
        source, no_labels, torch.from_numpy(index).to(source.device).split(cfg.eval_batch_size)
    )
    logits = [
        predict_batch(model, batch.images, cfg.precision, views, PREPROCESSING) for batch in batches
    ]
    return torch.cat(logits).cpu().numpy()  # once: a GPU waits for no batch


def evaluate(
    model: nn.Module, source: PatchSource, rows: Rows, cfg, ranks: Ranks = ALONE, views=1
) -> dict[str, float]:
    """Scores of a model on `rows` at threshold 0.5, each row seen by one rank.

    Ranks take whole batches, so that a row is in the same batch, and gets the same bits, however
    many they are.
    """
    batches = np.arange(len(rows)) // cfg.eval_batch_size
    mine = batches % ranks.num == ranks.rank
    logits = torch.zeros(len(rows), device=source.device)
    if mine.any():
        found = torch.from_numpy(predict_rows(model, source, rows.index[mine], cfg, views))
        logits[torch.from_numpy(mine)] = found.to(logits)
    return compute_metrics(rows.labels, sum(ranks.gather(logits)).cpu().numpy())
