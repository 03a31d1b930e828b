"""Patches that look as no others do: by damage that the audit makes itself to learn its looks, and
by their distance from all others.

For each kind of damage a discriminant (Fisher 1936) on random features (Rahimi and Recht 2008) is
fitted to these patches and to damaged copies of them. A patch looks damaged where it scores as the
copies do: beyond the tail of the patches themselves, or where damage explains how many score so
high. A kind that looks like tissue has no limit.
"""

import numpy as np

from lib.audit import build_finding
from lib.audit.alterations import PATCH_KINDS, alter
from lib.audit.appearance import describe_patches
from lib.audit.copies import BLOCK
from lib.audit.survey import FLAT_STD, Survey
from lib.features import count_values, grey_planes

FIT_ROWS, COPIES = 8_000, 400  # patches, and copies of each kind, that a discriminant is fitted to
LEAST_ROWS = 3_000  # of all splits: to fewer a discriminant is fitted too closely
NUM_FEATURES, RIDGE, MOST = 400, 4e-3, 8.0  # random features; a value beyond MOST is cut off
# the later rounds are without the share of patches that look most damaged in the one before
ROUNDS, TRIMMED = 3, 0.12
# share of the patches as they are beyond an exponential tail's limit; of the copies, how many a
# limit may miss, and how many have to lie beyond the tail
CHANCE, MISSED, LEAST_RECALL = 1e-4, 0.12, 0.6
# of high scores, how many damage has to explain; the copies' quantiles that tell its share
PURITY, CORE = 0.85, (0.3, 0.5, 0.7, 0.85)
MOST_SHARE = 0.2  # of the patches that are damaged in one way: a larger one says that all look so
DISTANCE_TAIL = 4.0  # times the tail from the median to the 90% quantile, of log distances
BY_CHANCE = 0.005  # share of patches that may be unusual without a warning
ADVICE = {
    "colour": "another scanner, or channels in another order",
    "detail": "blurred, noisy or compressed",
    "partial": "part of the patch is missing",
    "blank": "glass without tissue",
    "outlier": "they look as no other patch does",
}


class Scale:
    """Robust scaling of descriptions, and random features of them; fitted to (N, D)."""

    def __init__(self, descriptions: np.ndarray) -> None:
        low, self.middle, high = np.quantile(descriptions, (0.1, 0.5, 0.9), 0)
        self.width = (high - low) / 2 + 0.025
        rng = np.random.default_rng(0)
        num = descriptions.shape[1]
        self.directions = rng.normal(0, 1 / np.sqrt(num), (num, NUM_FEATURES)).astype(np.float32)
        self.offsets = rng.normal(0, 1, NUM_FEATURES).astype(np.float32)

    def __call__(self, descriptions: np.ndarray) -> np.ndarray:
        """float32 (B, D)."""
        scaled = (descriptions.astype(np.float32) - self.middle) / self.width
        return np.clip(scaled, -MOST, MOST).astype(np.float32)

    def expand(self, descriptions: np.ndarray) -> np.ndarray:
        """float32 (B, 1 + 2 D + NUM_FEATURES)."""
        scaled = self(descriptions)
        hidden = np.maximum(scaled @ self.directions + self.offsets, 0)
        ones = np.ones((len(scaled), 1), np.float32)
        return np.concatenate([ones, scaled, np.abs(scaled), hidden], 1)


def check_unusual(surveys: list[Survey]) -> list[dict]:
    """A finding for each split and reason, whose rows name the kind that the patch looks like."""
    rows_of = [survey.intact for survey in surveys]
    descriptions = [
        survey.table["appearance"][rows] for survey, rows in zip(surveys, rows_of, strict=True)
    ]
    if sum(map(len, rows_of)) < LEAST_ROWS:
        measured = "too few patches to tell the unusual ones"
        return [build_finding("unusual", "note", measured, f"{LEAST_ROWS}", "not checked")]
    rng = np.random.default_rng(0)
    everything = np.concatenate(descriptions)
    chosen = np.sort(rng.permutation(len(everything))[:FIT_ROWS])
    copies = make_copies(choose_patches(surveys, rows_of, rng), rng)
    detector = Detector(everything[chosen], copies)
    findings = []
    for survey, rows, described in zip(surveys, rows_of, descriptions, strict=True):
        findings += name_unusual(survey, rows, detector(described))
    return findings


def choose_patches(surveys: list[Survey], rows_of: list[np.ndarray], rng) -> np.ndarray:
    """Some COPIES patches uint8 (B, 96, 96, 3) of the rows of all splits."""
    num_all = sum(map(len, rows_of))
    patches = []
    for survey, rows in zip(surveys, rows_of, strict=True):
        num = min(len(rows), -(-COPIES * len(rows) // num_all))
        patches.append(survey.read(np.sort(rng.choice(rows, num, replace=False))))
    return np.concatenate(patches)


def make_copies(patches: np.ndarray, rng) -> dict[str, np.ndarray]:
    """Descriptions (B, D) of damaged copies of patches uint8 (B, 96, 96, 3), by kind of damage."""
    descriptions = {}
    for kind in PATCH_KINDS:
        others = patches[rng.permutation(len(patches))]
        pairs = zip(patches, others, strict=True)
        damaged = np.stack([alter(kind, patch, other, rng) for patch, other in pairs])
        descriptions[kind] = describe_all(damaged)
    return descriptions


def describe_all(patches: np.ndarray) -> np.ndarray:
    """Descriptions float16 (N, D) of patches uint8 (N, 96, 96, 3)."""
    parts = np.split(patches, range(BLOCK, len(patches), BLOCK))
    described = [describe_patches(part, count_values(part), grey_planes(part)) for part in parts]
    return np.concatenate(described)


class Judge:
    """Scores patches for one kind of damage; `limit` is infinite where none is in the data."""

    def __init__(self, scale: Scale, fitted: np.ndarray, copies: np.ndarray) -> None:
        real, damaged = scale.expand(fitted), scale.expand(copies)
        is_clean = np.ones(len(real), bool)
        spread = damaged.T @ damaged / len(damaged)
        for _ in range(ROUNDS):
            clean = real[is_clean]
            both = clean.T @ clean / len(clean) + spread + RIDGE * np.eye(real.shape[1])
            self.weights = np.linalg.solve(both, damaged.mean(0) - clean.mean(0))
            scores, of_copies = real @ self.weights, damaged @ self.weights
            is_clean = scores < np.quantile(scores, 1 - TRIMMED)
        self.limit = find_limit(scores, of_copies)
        self.width = of_copies.std()

    def excess(self, features: np.ndarray) -> np.ndarray:
        """How far each patch lies beyond the limit (B,), in deviations of the damage's scores."""
        return (features @ self.weights - self.limit) / self.width


def find_limit(real: np.ndarray, copies: np.ndarray) -> float:
    """The score from which a patch looks damaged; infinite where the kind looks like tissue."""
    return min(limit_by_tail(real, copies), limit_by_mixture(real, copies))


def limit_by_tail(real: np.ndarray, copies: np.ndarray) -> float:
    """A score that nearly all copies exceed, and that an exponential tail of the patches would
    leave to CHANCE of them.
    """
    middle, high = np.quantile(real, (0.5, 0.85))
    scale = (high - middle) / np.log(0.5 / 0.15)
    tail = high + scale * np.log(0.15 / CHANCE)
    if (copies > tail).mean() < LEAST_RECALL:
        return np.inf
    return float(max(tail, np.quantile(copies, MISSED)))


def limit_by_mixture(real: np.ndarray, copies: np.ndarray) -> float:
    """The lowest score beyond which a share of copies among the patches explains PURITY of them.

    Of damaged patches as many score high as the copies predict, of others ever fewer.
    """
    levels = np.array(CORE)
    beyond = (real[:, None] >= np.quantile(copies, levels)).mean(0)
    share = (beyond / (1 - levels)).min()
    if not 0 < share <= MOST_SHARE:
        return np.inf
    for level in np.linspace(0.01, 1 - LEAST_RECALL, 40):
        limit = np.quantile(copies, level)
        if share * (1 - level) >= PURITY * (real >= limit).mean():
            return float(limit)
    return np.inf


class Distance:
    """The distance of patches from all others (Mahalanobis 1936), and a limit from its tail."""

    def __init__(self, scale: Scale, fitted: np.ndarray) -> None:
        scaled = scale(fitted)
        for _ in range(ROUNDS):
            self.mean = scaled.mean(0)
            covariance = np.cov(scaled.T) + 1e-2 * np.eye(scaled.shape[1])
            self.root = np.linalg.cholesky(np.linalg.inv(covariance))
            distances = self.measure(scale(fitted))
            scaled = scaled[self.measure(scaled) < np.quantile(distances, 0.9)]
        middle, high = np.quantile(distances, (0.5, 0.9))
        self.limit = middle + DISTANCE_TAIL * (high - middle)

    def measure(self, scaled: np.ndarray) -> np.ndarray:
        """Logarithms of squared distances (B,)."""
        return np.log((((scaled - self.mean) @ self.root) ** 2).sum(1) + 1)


class Detector:
    """Tells which patches are unusual, from the descriptions (N, D) of patches, and of damaged
    copies by kind.
    """

    def __init__(self, fitted: np.ndarray, copies: dict[str, np.ndarray]) -> None:
        self.scale = Scale(fitted)
        self.judges = [Judge(self.scale, fitted, copies[kind]) for kind in PATCH_KINDS]
        self.distance = Distance(self.scale, fitted)

    def __call__(self, described: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The likeliest kind's number (N,), how far its limit is exceeded, and how far that of the
        distance is; descriptions are (N, D).
        """
        best, excess, far = [], [], []
        for start in range(0, len(described), FIT_ROWS):
            part = described[start : start + FIT_ROWS]
            features = self.scale.expand(part)
            scores = np.stack([judge.excess(features) for judge in self.judges], 1)
            best.append(scores.argmax(1))
            excess.append(scores.max(1))
            far.append(self.distance.measure(self.scale(part)) - self.distance.limit)
        return np.concatenate(best), np.concatenate(excess), np.concatenate(far)


def name_unusual(survey: Survey, rows: np.ndarray, detected: tuple) -> list[dict]:
    """Findings for the rows int64 (N,) of a split, and what a detector gives for them."""
    best, excess, far = detected
    kinds = [*PATCH_KINDS]
    is_known = excess >= 0
    is_flat = survey.table["deviation"][rows] < FLAT_STD
    suspects = np.flatnonzero((is_known | (far > 0)) & ~is_flat)
    by_reason = {}
    for place in suspects:
        kind = kinds[best[place]] if is_known[place] else "none"
        reason = PATCH_KINDS[kind][0] if is_known[place] else "outlier"
        by_reason.setdefault(reason, []).append((place, kind))
    findings = []
    for reason, members in by_reason.items():
        places = np.array([place for place, _ in members])
        names = [kind for _, kind in members]
        beyond = np.where(is_known, excess, far)[places]
        scores = np.round(1 - np.exp(-1 - beyond), 4)
        columns = {"looks_like": names, "reason": reason, "score": scores}
        found = survey.rows(rows[places], **columns)
        found.sort(key=lambda row: -row["score"])
        share = len(found) / len(rows)
        severity = "warning" if share > BY_CHANCE else "note"
        likeliest = max(set(names), key=names.count)
        measured = f"{len(found):,} patches ({share:.2%}) look unusual"
        measured += f", most of them as if: {likeliest}" if likeliest != "none" else ""
        limit = f"{BY_CHANCE:.1%} by chance"
        advice = f"{ADVICE[reason]}: look at the gallery; quarantine_reasons takes `{reason}`"
        check = f"unusual: {reason}"
        findings.append(build_finding(check, severity, measured, limit, advice, found, survey.name))
    return findings
