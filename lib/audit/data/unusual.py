"""Patches that look as no others do: by damage that the audit makes itself to learn its looks, and
by their distance from all others.

For each kind of damage a discriminant (Fisher 1936) on random features (Rahimi and Recht 2008) is
fitted to these patches and to damaged copies of them. A patch looks damaged where it scores as the
copies do, and damage explains how many patches score so high. A kind that looks like tissue has no
limit.
"""

import numpy as np

from lib.audit import build_finding
from lib.audit.alterations import REASONS, alter
from lib.audit.appearance import FIT_ROWS, RandomFeatures, describe_patches
from lib.audit.copies import in_parts
from lib.audit.survey import FLAT_STD, Survey

COPIES = 400  # of each kind, that a discriminant is fitted to
LEAST_ROWS = 3_000  # of all splits: to fewer a discriminant is fitted too closely
RIDGE = 4e-3
# the later rounds are without the share of patches that look most damaged in the one before
ROUNDS, TRIMMED = 3, 0.12
# of high scores, how many damage has to explain; of the copies, how many a limit may miss, and the
# quantiles that tell the share of damage
PURITY, MOST_MISSED, CORE = 0.85, 0.4, (0.3, 0.5, 0.7, 0.85)
MOST_SHARE = 0.2  # of the patches that are damaged in one way: a larger one says that all look so
DISTANCE_TAIL = 4.0  # times the tail from the median to the 90% quantile, of log distances
BY_CHANCE = 0.005  # share of patches that may be unusual without a warning
KINDS = REASONS | {"unlike all others": "outlier"}
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


def make_copies(patches: np.ndarray, rng) -> list[np.ndarray]:
    """Descriptions (B, D) of damaged copies of patches uint8 (B, 96, 96, 3), for each kind of
    REASONS.
    """
    descriptions = []
    for kind in REASONS:
        pairs = zip(patches, rng.permutation(patches), strict=True)
        damaged = [alter(kind, patch, other, rng) for patch, other in pairs]
        descriptions.append(describe_all(np.stack(damaged)))
    return descriptions


def describe_all(patches: np.ndarray) -> np.ndarray:
    """Descriptions float16 (N, D) of patches uint8 (N, 96, 96, 3)."""
    return np.concatenate(in_parts(describe_patches, patches))


class Detector:
    """Tells which patches are unusual, from the descriptions (N, D) of patches, and of damaged
    copies of each kind.
    """

    def __init__(self, fitted: np.ndarray, copies: list[np.ndarray]) -> None:
        self.features = RandomFeatures(fitted, fitted.shape[1])
        real = self.features.expand(fitted)
        self.judges = [fit_judge(real, self.features.expand(damaged)) for damaged in copies]
        self.distance = fit_distance(self.features.scale(fitted))

    def __call__(self, described: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """For descriptions (N, D) the number in KINDS of the likeliest one, and how far its limit
        is exceeded.
        """
        kinds, excesses = [], []
        for part in np.split(described, range(FIT_ROWS, len(described), FIT_ROWS)):
            features = self.features.expand(part)
            excess = [judge(features) for judge in self.judges]
            kind, largest = np.argmax(excess, 0), np.max(excess, 0)
            far = self.distance(self.features.scale(part))
            is_known = largest >= 0
            kinds.append(np.where(is_known, kind, len(REASONS)))
            excesses.append(np.where(is_known, largest, far))
        return np.concatenate(kinds), np.concatenate(excesses)


def fit_judge(real: np.ndarray, damaged: np.ndarray):
    """A function that gives how far features (B, E) lie beyond the limit of a kind of damage, in
    deviations of the damage's scores, from features of patches (N, E) and of damaged copies (M, E).
    """
    is_clean = np.ones(len(real), bool)
    spread = damaged.T @ damaged / len(damaged) + RIDGE * np.eye(real.shape[1])
    for _ in range(ROUNDS):
        clean = real[is_clean]
        both = clean.T @ clean / len(clean) + spread
        weights = np.linalg.solve(both, damaged.mean(0) - clean.mean(0))
        scores = real @ weights
        is_clean = scores < np.quantile(scores, 1 - TRIMMED)
    of_copies = damaged @ weights
    limit, width = find_limit(scores, of_copies), of_copies.std()
    return lambda features: (features @ weights - limit) / width


def find_limit(real: np.ndarray, copies: np.ndarray) -> float:
    """The lowest score beyond which a share of copies among the patches explains PURITY of them;
    infinite where the kind looks like tissue.

    Of damaged patches as many score high as the copies predict, of others ever fewer.
    """
    levels = np.array(CORE)
    beyond = (real[:, None] >= np.quantile(copies, levels)).mean(0)
    share = (beyond / (1 - levels)).min()
    if 0 < share <= MOST_SHARE:
        for level in np.linspace(0.01, MOST_MISSED, 40):
            limit = np.quantile(copies, level)
            if share * (1 - level) >= PURITY * (real >= limit).mean():
                return limit
    return np.inf


def fit_distance(scaled: np.ndarray):
    """A function that gives how far scaled descriptions (B, D) lie beyond a limit of their distance
    from the descriptions (N, D) of all patches (Mahalanobis 1936), in logarithms.
    """
    is_near = np.ones(len(scaled), bool)
    for _ in range(ROUNDS):
        near = scaled[is_near]
        mean = near.mean(0)
        covariance = np.cov(near.T) + 1e-2 * np.eye(scaled.shape[1])
        root = np.linalg.cholesky(np.linalg.inv(covariance))
        distances = np.log((((scaled - mean) @ root) ** 2).sum(1) + 1)
        middle, high = np.quantile(distances, (0.5, 0.9))
        is_near = distances < high
    limit = middle + DISTANCE_TAIL * (high - middle)
    return lambda others: np.log((((others - mean) @ root) ** 2).sum(1) + 1) - limit


def name_unusual(survey: Survey, rows: np.ndarray, kinds, excess) -> list[dict]:
    """Findings for the rows int64 (N,) of a split, and what a detector gives for them."""
    is_suspect = (excess >= 0) & (survey.table["deviation"][rows] >= FLAT_STD)
    names, reasons = np.array([*KINDS])[kinds], np.array([*KINDS.values()])[kinds]
    scores = np.round(1 - np.exp(-1 - excess), 4)
    findings = []
    for reason, advice in ADVICE.items():
        mine = np.flatnonzero(is_suspect & (reasons == reason))
        if not len(mine):
            continue
        columns = {"looks_like": names[mine], "reason": reason, "score": scores[mine]}
        suspects = survey.rows(rows[mine], **columns)
        share = len(mine) / len(rows)
        measured = f"{len(mine):,} patches ({share:.2%}) look unusual"
        severity, limit = "warning" if share > BY_CHANCE else "note", f"{BY_CHANCE:.1%} by chance"
        advice += f": look at the gallery; quarantine_reasons takes `{reason}`"
        check = f"unusual: {reason}"
        findings.append(survey.finding(check, severity, measured, limit, advice, suspects))
    return findings
