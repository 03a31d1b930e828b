"""A model applied to patches: float32 logits in input order, over one view, or averaged over four
or eight (test-time augmentation).
"""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import nn

from lib.augment import normalise, turned_views
from lib.batches import PatchSource, load_batches, map_ahead
from lib.centrenet import fold_norms
from lib.config import Config
from lib.device import input_dtype, layer_precision
from lib.features import measure_features
from lib.inputs import Block

CPU_BATCH = 64  # so few patches that their activations stay in a core's cache
# the number of patches in a block for `predict_blocks`. 256 keep a GPU busy while the next ones are
# copied to it
BLOCK_SIZES = {"cpu": CPU_BATCH, "cuda": 256}
MAX_WORKERS = 16  # the most blocks predicted at a time: each needs memory for activations


def ready_to_predict(model: nn.Module, precision: str) -> nn.Module:
    """A copy of a model that predicts the same up to rounding, faster, and cannot be trained."""
    return fold_norms(model, input_dtype(precision))


@torch.inference_mode()
def predict_batch(
    model: nn.Module, images: torch.Tensor, precision: str, views: int
) -> torch.Tensor:
    """Logits float32 (B,) of patches uint8 (B, 96, 96, 3) on the model's device. With 4 or 8
    `views` they are the mean over so many symmetries of a patch, each of them shifted.
    """
    if images.device.type == "cpu" and len(images) > CPU_BATCH:
        parts = images.split(CPU_BATCH)
        return torch.cat([predict_batch(model, part, precision, views) for part in parts])
    gain = torch.ones(len(images), 3, device=images.device)
    inputs = normalise(images, gain, 1 - gain, dtype=input_dtype(precision))  # (B, 3, 96, 96)
    pixels = inputs.permute(0, 2, 3, 1)
    # generators, so that one view at a time is in memory
    turned = turned_views(pixels, num=views) if views > 1 else [pixels]
    logits = torch.zeros(len(images), device=images.device)
    for view in turned:
        with layer_precision(images.device, precision):
            logits += model(view.permute(0, 3, 1, 2)).float().flatten()
    return logits / views


def predict_blocks(
    model: nn.Module,
    blocks: Iterable[Callable[[], Block]],
    precision: str,
    views: int,
) -> Iterator[tuple[Block, np.ndarray, torch.Tensor]]:
    """Yield (block, features float64 (B, 6), logits float32 (B,)) for each of `blocks`, functions
    from `lib.inputs.list_blocks` that decode a block. The logits are on the model's device, and the
    host has not waited for them.

    As many threads as torch uses decode and measure blocks, a few of which are in memory. On a CPU
    each thread also predicts its block alone. Threads that share a batch would wait for each other,
    above all where others use the cores.
    """
    device = next(model.parameters()).device
    on_gpu = device.type == "cuda"

    def predict(images: torch.Tensor) -> torch.Tensor:
        images = images.to(device, non_blocking=True)
        return predict_batch(model, images, precision, views)

    def work(decode: Callable[[], Block]) -> tuple[Block, np.ndarray, torch.Tensor]:
        block = decode()
        features = measure_features(block.images)
        images = torch.from_numpy(block.images)
        # the images, for a GPU; on a CPU already the logits
        return block, features, images.pin_memory() if on_gpu else predict(images)

    num_threads = torch.get_num_threads()
    num_workers = min(num_threads, MAX_WORKERS)
    share = num_threads // num_workers  # of torch's threads, for each worker
    with ThreadPoolExecutor(num_workers, "predict", torch.set_num_threads, (share,)) as pool:
        for block, features, result in map_ahead(pool, work, blocks, 2 * num_workers):
            yield block, features, predict(result) if on_gpu else result


def predict_rows(
    model: nn.Module, source: PatchSource, index: np.ndarray, cfg: Config, views: int
) -> np.ndarray:
    """Logits float32 (N,) of the rows `index` int64 (N,) of a split, in that order and in the
    config's precision. The model is not changed.
    """
    model = ready_to_predict(model, cfg.precision)
    rows_of_batches = torch.from_numpy(index).to(source.device).split(cfg.eval_batch_size)
    logits = []
    for batch in load_batches(source, np.zeros(len(source)), rows_of_batches):
        logits.append(predict_batch(model, batch.images, cfg.precision, views))
    return torch.cat(logits).cpu().numpy()  # one copy at the end: no batch waits for it
