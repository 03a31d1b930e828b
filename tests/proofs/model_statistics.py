"""Two statistical choices, measured: what p4m's batch norm leaves out, and how often clean labels
under a bent calibration look exchanged.

python tests/proofs/model_statistics.py [norms] [labels] [--data data/sample]
"""

import copy
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
import torch

from lib.audit.label_noise import LEAST_RATE, fit_label_noise
from lib.augment import PREPROCESSING
from lib.centrenet import GroupBatchNorm
from lib.checkpoint import load_model
from lib.command import script
from lib.groups import groups_for_halves
from lib.metrics import compute_metrics, sigmoid
from lib.pcam import open_split
from lib.predict import predict_batch, ready_to_predict
from proofs import proof_parser, row, run_parts

BATCH, NUM_BATCHES = 64, 24  # as in training
MOST_AUC, MOST_FLIPPED = 0.001, 0.005  # a smaller change does not matter
NUM_SETS, MOST_ALARMS, LEAST_SEEN = 100, 0.05, 0.8
BENDS = {
    "affine": lambda logits: logits,
    "flattening": lambda logits: 6 * np.tanh(logits / 6),
    "steepening": lambda logits: 0.8 * np.sign(logits) * np.abs(logits) ** 1.2,
    "one side": lambda logits: np.where(logits > 0, 0.7, 1.2) * logits,
}


def predict_valid(model, split) -> np.ndarray:
    model = ready_to_predict(model, "fp32")
    logits = []
    for rows in np.array_split(np.arange(len(split)), len(split) // BATCH):
        images = torch.from_numpy(split.images.read(rows))
        logits.append(predict_batch(model, images, "fp32", 1, PREPROCESSING).numpy())
    return np.concatenate(logits)


@torch.no_grad()
def measure_norms(model, images) -> dict[str, dict[str, torch.Tensor]]:
    """Of each GroupBatchNorm the mean, the variance within orientations and the spread of the means
    between them, averaged over batches of training, (num,) each."""
    model = copy.deepcopy(model).train()
    sums = {}

    def watch(name):
        def add(norm, inputs):
            x = inputs[0]
            means = x.mean((0, 2, 3)).view(norm.orientations, -1)
            variances = x.var((0, 2, 3)).view(norm.orientations, -1)
            parts = {"mean": means.mean(0), "within": variances.mean(0)}
            parts["between"] = means.var(0, correction=0)
            for key, value in parts.items():
                of_norm = sums.setdefault(name, {})
                of_norm[key] = of_norm.get(key, 0) + value / NUM_BATCHES

        return add

    for name, module in model.named_modules():
        if isinstance(module, GroupBatchNorm):
            module.register_forward_pre_hook(watch(name))
    mean, std = (torch.tensor(PREPROCESSING[key]).view(3, 1, 1) for key in ("mean", "std"))
    for batch in images.split(BATCH):
        model((batch.permute(0, 3, 1, 2) / 255 - mean) / std)
    return sums


def prove_norms(args, _scratch: Path) -> list[dict]:
    """Predictions with the spread of means between orientations in the variance, and without."""
    model, _, _ = load_model(args.ckpt)
    train, valid = open_split(args.data, "train"), open_split(args.data, "valid")
    rows = np.linspace(0, len(train) - 1, BATCH * NUM_BATCHES).astype(np.int64)
    measured = measure_norms(model, torch.from_numpy(train.images.read(rows)))
    logits = {"as stored": predict_valid(model, valid)}
    for name, keys in (("within", ["within"]), ("with the spread", ["within", "between"])):
        other = copy.deepcopy(model)
        for path, parts in measured.items():
            norm = other.get_submodule(path)
            norm.running_mean.copy_(parts["mean"])
            norm.running_var.copy_(sum(parts[key] for key in keys))
        logits[name] = predict_valid(other, valid)
    scores = {name: compute_metrics(valid.labels, values) for name, values in logits.items()}
    shares = [(parts["between"] / parts["within"]).mean().item() for parts in measured.values()]
    without, spread = logits["within"], logits["with the spread"]
    is_flipped = (without >= 0) != (spread >= 0)
    change = abs(scores["within"]["auc"] - scores["with the spread"]["auc"])
    aucs = ", ".join(f"{name} {values['auc']:.5f}" for name, values in scores.items())
    losses = ", ".join(f"{name} {values['loss']:.4f}" for name, values in scores.items())
    text = f"{min(shares):.2%} to {max(shares):.2%}"
    moved = f"{np.abs(without - spread).mean():.4f} on average, a deviation is {spread.std():.2f}"
    asked = f"AUC on valid with the spread: {aucs}; it changes by"
    return [
        row(asked, f"{change:.5f}", change <= MOST_AUC, MOST_AUC),
        row(
            "decisions at 0.5 that change",
            f"{is_flipped.mean():.3%}",
            is_flipped.mean() <= MOST_FLIPPED,
            MOST_FLIPPED,
        ),
        row("log loss", losses),
        row("move of the logits", moved),
        row("spread over variance, by layer", text),
    ]


def prove_labels(args, _scratch: Path) -> list[dict]:
    """Sets of labels drawn from the champion's logits on valid, under bent calibrations."""
    model, _, _ = load_model(args.ckpt)
    valid = open_split(args.data, "valid")
    logits = predict_valid(model, valid).astype(np.float64)
    _, least, _ = fit_label_noise(valid.labels, logits, groups_for_halves(valid, args.data))
    asked, measured = "the labels of valid as they are give no alarm", f"at least {least:.2%}"
    rows = [row(asked, measured, least < LEAST_RATE, LEAST_RATE)]
    rng = np.random.default_rng(0)
    num = args.num_patches
    for rate, num_sets in ((0.0, NUM_SETS), (0.03, NUM_SETS // 5), (0.08, NUM_SETS // 5)):
        num_alarms = 0
        for number in range(num_sets):
            bend = list(BENDS.values())[number % len(BENDS)]
            drawn = rng.choice(logits, num) + rng.normal(0, 0.3, num)
            labels = rng.random(num) < sigmoid(bend(drawn))
            labels ^= rng.random(num) < rate
            _, least, _ = fit_label_noise(labels, drawn, np.arange(num) // 3)
            num_alarms += least >= LEAST_RATE
        share = num_alarms / num_sets
        asked = f"{rate:.0%} exchanged of {num:,}, {', '.join(BENDS)}: share of sets with an alarm"
        held = share >= LEAST_SEEN if rate else share <= MOST_ALARMS
        limit = LEAST_SEEN if rate else MOST_ALARMS
        rows.append(row(asked, f"{num_alarms} of {num_sets}", held, limit))
    return rows


PARTS = {"norms": prove_norms, "labels": prove_labels}


@script
def main(argv=None) -> int:
    parser = proof_parser("model_statistics.py", __doc__, PARTS, "model_statistics")
    parser.add_argument("--data", default="data/sample", metavar="DIR")
    parser.add_argument("--ckpt", default="assets/champion", metavar="RUN|FILE")
    parser.add_argument("--num-patches", type=int, default=10_000, metavar="N")
    return run_parts(PARTS, parser.parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
