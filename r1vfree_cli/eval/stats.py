"""Intervals and tests that respect a benchmark's clusters (HallusionBench's sets, images, ...), not its questions.

Every metric is a sum over clusters divided by a sum over clusters, so resampling or swapping clusters is linear
algebra on their [numerator, denominator] a metric.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

DRAWS = 10_000
LEVEL = 0.95  # of intervals
_CELLS = 20_000_000  # draws x clusters in memory
Score = Callable[[Sequence[Any]], dict[str, list[int]]]


class ClusterTable(NamedTuple):
    """right, total: (clusters, metrics) numerators and denominators; strata: (clusters,) index of the stratum."""

    metrics: list[str]
    clusters: list[tuple]
    strata: np.ndarray
    right: np.ndarray
    total: np.ndarray


def cluster_table(judged: Sequence[Any], score: Score) -> ClusterTable:
    """Counts a cluster and metric, clusters in sorted order. A cluster's key but its last part is its stratum."""
    members: dict[tuple, list] = {}
    for j in judged:
        members.setdefault(j.cluster, []).append(j)
    clusters = sorted(members)
    strata = sorted({key[:-1] for key in clusters})
    rows = [score(members[key]) for key in clusters]
    metrics = list(rows[0])
    right, total = (np.array([[float(r[m][k]) for m in metrics] for r in rows]) for k in (0, 1))
    return ClusterTable(metrics, clusters, np.array([strata.index(key[:-1]) for key in clusters]), right, total)


def bootstrap_weights(strata: np.ndarray, draws: int, seed: int) -> np.ndarray:
    """(draws, clusters): how often each cluster is drawn when each stratum is resampled with replacement to its own size."""
    rng = np.random.default_rng(seed)
    weights = np.empty((draws, len(strata)))
    for stratum in np.unique(strata):
        members = np.flatnonzero(strata == stratum)
        weights[:, members] = rng.multinomial(len(members), np.full(len(members), 1 / len(members)), size=draws)
    return weights


def _quantiles(drawn: np.ndarray) -> list[float] | None:
    drawn = drawn[np.isfinite(drawn)]
    tail = (1 - LEVEL) / 2
    return [float(q) for q in np.quantile(drawn, [tail, 1 - tail])] if len(drawn) else None


def intervals(judged: Sequence[Any], score: Score, *, draws: int = DRAWS, seed: int = 0) -> dict:
    """Metric -> [low, high] in percent: percentile bootstrap over clusters within strata; None when it counts nothing."""
    table = cluster_table(judged, score)
    weights = bootstrap_weights(table.strata, _affordable(draws, table), seed)
    with np.errstate(divide="ignore", invalid="ignore"):
        drawn = 100 * (weights @ table.right) / (weights @ table.total)
    return {metric: _quantiles(drawn[:, m]) for m, metric in enumerate(table.metrics)}


def _affordable(draws: int, table: ClusterTable) -> int:
    return min(draws, max(1000, _CELLS // len(table.clusters)))


def _points(a: np.ndarray, b: np.ndarray, of_a: np.ndarray, of_b: np.ndarray) -> np.ndarray:
    """a / of_a - b / of_b in percentage points, in one division; NaN where one counts nothing."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return 100 * (a * of_b - b * of_a) / (of_a * of_b)


def swap_p(a: ClusterTable, b: ClusterTable, draws: int = DRAWS, seed: int = 0) -> np.ndarray:
    """Two-sided p of a swap test, one a metric. Under the null hypothesis the two models' answers to a cluster can be
    exchanged, by a coin toss each. p = (1 + draws at least as extreme) / (1 + draws)."""
    rng = np.random.default_rng(seed)
    signs = rng.integers(0, 2, size=(draws, len(a.clusters))).astype(np.float64) * 2 - 1

    def swapped(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        both, moved = (x + y).sum(axis=0), signs @ (x - y)
        return (both + moved) / 2, (both - moved) / 2

    (right_a, right_b), (total_a, total_b) = swapped(a.right, b.right), swapped(a.total, b.total)
    observed = _points(a.right.sum(axis=0), b.right.sum(axis=0), a.total.sum(axis=0), b.total.sum(axis=0))
    extreme = ~(np.abs(_points(right_a, right_b, total_a, total_b)) < np.abs(observed) - 1e-9)
    return (1 + extreme.sum(axis=0)) / (1 + draws)


def mcnemar(only_a: int, only_b: int) -> float:
    """Exact two-sided McNemar p from the two discordant counts. It ignores sets, so it is shown beside `swap_p` only."""
    n = only_a + only_b
    tail = sum(math.comb(n, k) for k in range(min(only_a, only_b) + 1))
    return min(1.0, 2 * tail / 2**n)


def compare(a: Sequence[Any], b: Sequence[Any], score: Score, *, draws: int = DRAWS, seed: int = 0) -> dict:
    """The paired comparison of two results over the same questions, `a` minus `b`. Raises ValueError: they differ.

    Returns `metrics`: metric -> {difference (percentage points), interval, p_swap}; `mcnemar`: {gained, lost, p};
    `gained`, `lost`: question ids only `a`, only `b` has right; `sets` (clusters), `draws`, `seed`, `level`.
    """
    ok_a, ok_b = ({j.id: j.ok for j in judged} for judged in (a, b))
    if ok_a.keys() != ok_b.keys():
        raise ValueError("the two results have different questions")
    table_a, table_b = cluster_table(a, score), cluster_table(b, score)
    draws = _affordable(draws, table_a)
    weights = bootstrap_weights(table_a.strata, draws, seed)
    counts = (table_a.right, table_b.right, table_a.total, table_b.total)
    drawn, observed = _points(*(weights @ x for x in counts)), _points(*(x.sum(axis=0) for x in counts))
    p = swap_p(table_a, table_b, draws, seed)
    metrics: dict[str, dict] = {}
    for m, metric in enumerate(table_a.metrics):
        difference, p_swap = (float(observed[m]), float(p[m])) if np.isfinite(observed[m]) else (None, None)
        metrics[metric] = {"difference": difference, "interval": _quantiles(drawn[:, m]), "p_swap": p_swap}
    gained = [key for key in ok_a if ok_a[key] and not ok_b[key]]
    lost = [key for key in ok_a if ok_b[key] and not ok_a[key]]
    test = {"gained": len(gained), "lost": len(lost), "p": mcnemar(len(gained), len(lost))}
    found = {"metrics": metrics, "mcnemar": test, "gained": gained, "lost": lost}
    return found | {"sets": len(table_a.clusters), "draws": draws, "seed": seed, "level": LEVEL}
