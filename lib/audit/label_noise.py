"""How many labels are exchanged, at least, and which: from logits of a model that has not seen
them.

Where labels are exchanged at random, the surest answers disagree with them as often as the next
ones (Natarajan et al. 2013). A bent calibration can look so, too. Hence the calibration is fitted
together with the rate: a monotone curve with a slope of its own on each side, and a power.
"""

import math

import numpy as np
import torch

NUM_BINS = 50  # of logits, with equally many patches; the fit needs their counts alone
NUM_RESAMPLES = 20  # of groups
POWERS = (0.6, 1.6)  # of the calibration: 1 is affine, below it the log odds flatten
LEAST_RATE = 0.01  # confident errors of a model on the real sample alone look like 0.5%


def fit_label_noise(labels, logits, groups) -> tuple[float, float, np.ndarray, np.ndarray]:
    """(rate, least rate, probs, wrong): the share of exchanged labels, the lower end of its 90%
    interval over resampled groups (N,), and for each label the probabilities (N,) that it is 1 and
    that it is exchanged.

    Labels are 0 and 1, (N,), logits are out of fold, (N,).
    """
    labels, logits = np.asarray(labels, np.int64), np.asarray(logits, np.float64)
    scaled = 2 * (logits - np.median(logits)) / max(logits.std(), 1e-9)
    edges = np.quantile(scaled, np.linspace(0, 1, NUM_BINS + 1)[1:-1])
    bins = np.searchsorted(edges, scaled)
    centres = np.bincount(bins, scaled, NUM_BINS) / np.maximum(np.bincount(bins), 1)

    names, group = np.unique(groups, return_inverse=True)
    equal = np.full(len(names), 1 / len(names))
    resamples = np.random.default_rng(0).multinomial(len(names), equal, NUM_RESAMPLES)
    counts = []
    for times in (np.ones(len(names)), *resamples):
        counts.append(np.bincount(2 * bins + labels, times[group], 2 * NUM_BINS))
    factors = fit_factors(np.stack(counts).reshape(-1, NUM_BINS, 2), centres)
    rates, _ = compute_probs(factors, torch.from_numpy(centres))
    least = float(np.quantile(rates[1:].numpy(), 0.05))
    rate, probs = compute_probs(factors[:1], torch.from_numpy(scaled))

    rate, probs = rate.item(), probs[0].numpy()
    given = np.where(labels == 1, probs, 1 - probs)  # of the label that is there
    true = (given - rate) / max(1 - 2 * rate, 1e-9)
    wrong = np.clip(rate * (1 - true) / given, 0, 1)
    return rate, least, probs, wrong


def compute_probs(factors: torch.Tensor, logits: torch.Tensor):
    """Rates (R,) and P(label 1) (R, B) of logits (B,) under factors (R, 5): the offset, the log
    slopes of both sides, and power and rate as logits.

    P(label 1) = rate + (1 - 2 rate) sigmoid(slope_side |z - offset|^power), signed as the side.
    """
    offset, right, left, power, rate = factors.split(1, 1)  # (R, 1) each
    distance = logits - offset
    slope = torch.where(distance > 0, right, left).exp()
    power = torch.lerp(*torch.tensor(POWERS).double(), torch.sigmoid(power))
    log_odds = slope * distance.sign() * (distance.abs() + 1e-9) ** power
    rate = torch.sigmoid(rate) / 2
    probs = rate + (1 - 2 * rate) * torch.sigmoid(log_odds)
    return rate[:, 0], probs.clamp(1e-9, 1 - 1e-9)


def fit_factors(counts: np.ndarray, centres: np.ndarray) -> torch.Tensor:
    """The likeliest factors (R, 5) for counts of labels (R, B, 2) in bins of logits around
    `centres` (B,)."""
    counts, centres = torch.from_numpy(counts).double(), torch.from_numpy(centres)
    shares = counts / counts.sum((1, 2), keepdim=True)
    affine = math.log((1 - POWERS[0]) / (POWERS[1] - 1))  # power 1, and a rate near 0, at first
    factors = torch.tensor([0.0, 0.0, 0.0, affine, -3.5]).double().repeat(len(counts), 1)
    factors.requires_grad_()
    optimizer = torch.optim.LBFGS([factors], max_iter=150, line_search_fn="strong_wolfe")

    def compute_loss():
        optimizer.zero_grad()
        _, probs = compute_probs(factors, centres)
        loss = -(shares * torch.stack([1 - probs, probs], 2).log()).sum()
        loss.backward()
        return loss

    optimizer.step(compute_loss)
    return factors.detach()
