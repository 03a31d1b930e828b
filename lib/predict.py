"""A model applied to patches: float32 logits in input order, over one view or averaged over eight
(test-time augmentation).
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import nn

from lib.augment import PREPROCESSING, eight_views, no_augmentation, normalise
from lib.batches import PatchSource, Rows, load_batches
from lib.centrenet import fold_norms
from lib.config import Config
from lib.device import layer_precision
from lib.features import measure_features
from lib.inputs import Block
from lib.metrics import compute_metrics
from lib.ranks import ALONE, Ranks

CPU_BATCH = 64  # patches whose layers still lie in a core's cache
GPU_BATCH = 256  # patches that keep a GPU busy while the next ones are on their way
MAX_WORKERS = 16  # blocks at a time: each takes memory for its layers


def input_dtype(precision: str) -> torch.dtype:
    """The type in which patches enter a model."""
    return torch.bfloat16 if precision == "bf16" else torch.float32


def block_size(device: torch.device) -> int:
    """How many patches `predict_blocks` is to be given in a block."""
    return GPU_BATCH if device.type == "cuda" else CPU_BATCH


def ready_to_predict(model: nn.Module, precision: str) -> nn.Module:
    """A copy of a model that predicts the same, faster, and cannot be trained."""
    return fold_norms(model, input_dtype(precision))


@torch.inference_mode()
def predict_batch(
    model: nn.Module, images: torch.Tensor, precision: str, views: int, preprocessing: dict
) -> torch.Tensor:
    """Logits float32 (B,) of patches uint8 (B, 96, 96, 3) on the model's device: of the patches as
    they are, or with 8 `views` the mean over eight symmetries, each with another shift.
    """
    if images.device.type == "cpu" and len(images) > CPU_BATCH:
        parts = images.split(CPU_BATCH)
        return torch.cat(
            [predict_batch(model, part, precision, views, preprocessing) for part in parts]
        )
    mean, std = preprocessing["mean"], preprocessing["std"]
    plain = no_augmentation(len(images), images.device)
    inputs = normalise(images, plain, mean, std, input_dtype(precision))  # (B, 3, 96, 96)
    views_of_inputs = [inputs]
    if views > 1:  # one view at a time is in memory
        turned = eight_views(inputs.permute(0, 2, 3, 1))
        views_of_inputs = (view.permute(0, 3, 1, 2) for view in turned)
    logits = torch.zeros(len(images), device=images.device)
    for view in views_of_inputs:
        with layer_precision(images.device, precision):
            logits += model(view).float().flatten()
    return logits / views


def predict_blocks(
    model: nn.Module,
    blocks: Iterable[Callable[[], Block]],
    precision: str,
    views: int,
    preprocessing: dict,
) -> Iterator[tuple[Block, np.ndarray, torch.Tensor]]:
    """Yield each block of `lib.inputs.list_blocks` decoded, with its features float64 (B, 6) and
    its logits float32 (B,) on the model's device, for which nothing has waited.

    Blocks are decoded and measured by threads, as many as torch computes with, and a few at a time
    are in memory. On a CPU each thread also predicts its block, alone: threads that share a batch
    wait for each other, the more so where somebody else uses the cores.
    """
    device = next(model.parameters()).device
    on_gpu = device.type == "cuda"

    def predict(images: torch.Tensor) -> torch.Tensor:
        images = images.to(device, non_blocking=True)
        return predict_batch(model, images, precision, views, preprocessing)

    def work(decode: Callable[[], Block]) -> tuple[Block, np.ndarray, torch.Tensor]:
        block = decode()
        features = measure_features(block.images)
        images = torch.from_numpy(block.images)
        return block, features, images.pin_memory() if on_gpu else predict(images)

    num_threads = torch.get_num_threads()
    num_workers = min(num_threads, MAX_WORKERS)
    share = num_threads // num_workers
    with ThreadPoolExecutor(num_workers, "predict", torch.set_num_threads, (share,)) as pool:
        for block, features, result in map_ahead(pool, work, blocks, 2 * num_workers):
            yield block, features, predict(result) if on_gpu else result


def map_ahead(pool, function: Callable, items: Iterable, num_ahead: int) -> Iterator:
    """Yield `function` of each item in their order, computed by the threads of a pool; `num_ahead`
    items or results are in memory.
    """
    pending = deque()
    for item in items:
        pending.append(pool.submit(function, item))
        if len(pending) == num_ahead:
            yield pending.popleft().result()
    for future in pending:
        yield future.result()


def predict_rows(
    model: nn.Module, source: PatchSource, index: np.ndarray, cfg: Config, views: int
) -> np.ndarray:
    """Logits float32 (N,) of the rows `index` int64 (N,) of a split, in that order, in the config's
    precision. The model stays as it is.
    """
    model = ready_to_predict(model, cfg.precision)
    no_labels = np.zeros(len(source), np.uint8)
    rows_of_batches = torch.from_numpy(index).to(source.device).split(cfg.eval_batch_size)
    logits = []
    for batch in load_batches(source, no_labels, rows_of_batches):
        logits.append(predict_batch(model, batch.images, cfg.precision, views, PREPROCESSING))
    return torch.cat(logits).cpu().numpy()  # once: a GPU waits for no batch


def evaluate(
    model: nn.Module, source: PatchSource, rows: Rows, cfg: Config, ranks: Ranks = ALONE
) -> dict[str, float]:
    """The scores of a model on `rows`, one view a patch, at threshold 0.5.

    Each row is predicted by one rank. Ranks take whole batches, so that a row is in the same batch,
    and gets the same bits, however many ranks there are.
    """
    batch_of_row = np.arange(len(rows)) // cfg.eval_batch_size
    is_mine = batch_of_row % ranks.num == ranks.rank
    logits = torch.zeros(len(rows), device=source.device)
    if is_mine.any():
        my_logits = torch.from_numpy(predict_rows(model, source, rows.index[is_mine], cfg, 1))
        logits[torch.from_numpy(is_mine)] = my_logits.to(logits)
    all_logits = sum(ranks.gather(logits))
    return compute_metrics(rows.labels, all_logits.cpu().numpy())
