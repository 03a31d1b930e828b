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
from lib.audit.appearance import FIT_ROWS, RandomFeatures, describe_patches
from lib.audit.copies import in_parts
from lib.audit.survey import FLAT_STD, Survey

COPIES = 400  # of each kind, that a discriminant is fitted to
LEAST_ROWS = 3_000  # of all splits: to fewer a discriminant is fitted too closely
RIDGE = 4e-3
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


def check_unusual(surveys: list[Survey]) -> list[dict]:
    """A finding for each split and reason, whose rows name the kind that the patch looks like."""
    rows_of = [survey.intact for survey in surveys]
    num_all = sum(map(len, rows_of))
    if num_all < LEAST_ROWS:
        measured = f"{num_all:,} patches are too few to tell the unusual ones"
        return [build_finding("unusual", "note", measured, f"{LEAST_ROWS}", "not checked")]
    rng = np.random.default_rng(0)
    descriptions, patches = [], []
    for survey, rows in zip(surveys, rows_of, strict=True):
        descriptions.append(survey.table["appearance"][rows])
        num = min(len(rows), -(-COPIES * len(rows) // num_all))
        patches.append(survey.read(rng.choice(rows, num, replace=False)))
    some = rng.permutation(np.concatenate(descriptions))[:FIT_ROWS]
    detector = Detector(some, make_copies(np.concatenate(patches), rng))
    findings = []
    for survey, rows, described in zip(surveys, rows_of, descriptions, strict=True):
        findings += name_unusual(survey, rows, *detector(described))
    return findings


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
    return np.concatenate(in_parts(describe_patches, patches))


class Judge:
    """Scores patches for one kind of damage, from features of patches (N, E) and of damaged copies
    (M, E); `limit` is infinite where the kind looks like tissue.
    """

    def __init__(self, real: np.ndarray, damaged: np.ndarray) -> None:
        is_clean = np.ones(len(real), bool)
        spread = damaged.T @ damaged / len(damaged) + RIDGE * np.eye(real.shape[1])
        for _ in range(ROUNDS):
            clean = real[is_clean]
            both = clean.T @ clean / len(clean) + spread
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
    """The distance of scaled descriptions (N, D) from all others (Mahalanobis 1936), and a limit
    from its tail.
    """

    def __init__(self, scaled: np.ndarray) -> None:
        is_near = np.ones(len(scaled), bool)
        for _ in range(ROUNDS):
            near = scaled[is_near]
            self.mean = near.mean(0)
            covariance = np.cov(near.T) + 1e-2 * np.eye(scaled.shape[1])
            self.root = np.linalg.cholesky(np.linalg.inv(covariance))
            distances = self.measure(scaled)
            middle, high = np.quantile(distances, (0.5, 0.9))
            is_near = distances < high
        self.limit = middle + DISTANCE_TAIL * (high - middle)

    def measure(self, scaled: np.ndarray) -> np.ndarray:
        """Logarithms of squared distances (B,)."""
        return np.log((((scaled - self.mean) @ self.root) ** 2).sum(1) + 1)


class Detector:
    """Tells which patches are unusual, from the descriptions (N, D) of patches, and of damaged
    copies by kind.
    """

    def __init__(self, fitted: np.ndarray, copies: dict[str, np.ndarray]) -> None:
        self.features = RandomFeatures(fitted, fitted.shape[1])
        real = self.features.expand(fitted)
        self.judges = [Judge(real, self.features.expand(copies[kind])) for kind in PATCH_KINDS]
        self.distance = Distance(self.features.scale(fitted))

    def __call__(self, described: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The likeliest kind's number (N,), how far its limit is exceeded, and how far that of the
        distance is; descriptions are (N, D).
        """
        results = []
        for part in np.split(described, range(FIT_ROWS, len(described), FIT_ROWS)):
            features = self.features.expand(part)
            scores = np.stack([judge.excess(features) for judge in self.judges])
            far = self.distance.measure(self.features.scale(part)) - self.distance.limit
            results.append((scores.argmax(0), scores.max(0), far))
        return tuple(map(np.concatenate, zip(*results, strict=True)))


def name_unusual(survey: Survey, rows: np.ndarray, best, excess, far) -> list[dict]:
    """Findings for the rows int64 (N,) of a split, and what a detector gives for them."""
    is_known = excess >= 0
    kinds = np.where(is_known, np.array([*PATCH_KINDS])[best], "none")
    reasons = np.array([PATCH_KINDS[kind][0] if kind != "none" else "outlier" for kind in kinds])
    scores = np.round(1 - np.exp(-1 - np.where(is_known, excess, far)), 4)
    is_flat = survey.table["deviation"][rows] < FLAT_STD
    is_suspect = (is_known | (far > 0)) & ~is_flat
    findings = []
    for reason, advice in ADVICE.items():
        mine = np.flatnonzero(is_suspect & (reasons == reason))
        if not len(mine):
            continue
        mine = mine[np.argsort(-scores[mine], kind="stable")]
        columns = {"looks_like": kinds[mine], "reason": reason, "score": scores[mine]}
        suspects = survey.rows(rows[mine], **columns)
        share = len(mine) / len(rows)
        names, counts = np.unique(kinds[mine], return_counts=True)
        measured = f"{len(mine):,} patches ({share:.2%}) look unusual"
        likeliest = names[counts.argmax()]
        if likeliest != "none":
            measured += f", most of them as if: {likeliest}"
        severity = "warning" if share > BY_CHANCE else "note"
        limit = f"{BY_CHANCE:.1%} by chance"
        advice += f": look at the gallery; quarantine_reasons takes `{reason}`"
        check = f"unusual: {reason}"
        findings.append(survey.finding(check, severity, measured, limit, advice, suspects))
    return findings
