"""Intervals and tests that respect the benchmark's sets: questions of one set share figures and are not independent.

The unit everywhere is the set (category, subcategory, set_id). All five metrics count groups inside a set, so a set
is fully described by its [right, total] a metric, and resampling or swapping sets is linear algebra.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from .hallusion.score import METRICS, Item, groups

DRAWS = 10_000


@dataclass(frozen=True)
class SetTable:
    """right, total: (sets, metrics) counts; strata: (sets,) index of category_subcategory."""

    sets: list[tuple]
    strata: np.ndarray
    right: np.ndarray
    total: np.ndarray


def set_table(items: list[Item]) -> SetTable:
    """Counts a set and metric, sets in sorted order."""
    sets = sorted({item.set_key for item in items})
    row = {key: i for i, key in enumerate(sets)}
    names = sorted({key[:2] for key in sets})
    right = np.zeros((len(sets), len(METRICS)))
    total = np.zeros_like(right)
    for m, metric in enumerate(METRICS):
        for key, oks in groups(metric, items).items():
            total[row[key[:3]], m] += 1
            right[row[key[:3]], m] += all(oks)
    return SetTable(sets, np.array([names.index(key[:2]) for key in sets]), right, total)


def bootstrap_weights(strata: np.ndarray, draws: int, seed: int) -> np.ndarray:
    """(draws, sets): how often each set is drawn when each stratum is resampled with replacement to its own size."""
    rng = np.random.default_rng(seed)
    weights = np.empty((draws, len(strata)))
    for stratum in np.unique(strata):
        members = np.flatnonzero(strata == stratum)
        weights[:, members] = rng.multinomial(len(members), np.full(len(members), 1 / len(members)), size=draws)
    return weights


def _interval(numerator: np.ndarray, denominator: np.ndarray, level: float) -> list[float] | None:
    drawn = denominator > 0
    if not drawn.any():
        return None
    tail = (1 - level) / 2
    low, high = np.quantile(100 * numerator[drawn] / denominator[drawn], [tail, 1 - tail])
    return [float(low), float(high)]


def intervals(items: list[Item], *, draws: int = DRAWS, seed: int = 0, level: float = 0.95) -> dict:
    """Metric -> [low, high] in percent: percentile bootstrap over sets within strata; None when it counts nothing."""
    table = set_table(items)
    weights = bootstrap_weights(table.strata, draws, seed)
    right, total = weights @ table.right, weights @ table.total
    return {metric: _interval(right[:, m], total[:, m], level) for m, metric in enumerate(METRICS)}


def swap_p(difference: np.ndarray, draws: int = DRAWS, seed: int = 0) -> np.ndarray:
    """Two-sided p of a swap test, one a column.

    Under the null hypothesis the two models' answers to a set can be exchanged, so the sign of each set's
    difference is a coin toss. p = (1 + draws at least as extreme) / (1 + draws).

    Args:
        difference: (sets, columns) right answers of one model minus the other's.
    """
    rng = np.random.default_rng(seed)
    signs = rng.integers(0, 2, size=(draws, len(difference))).astype(np.float64) * 2 - 1
    extreme = np.abs(signs @ difference) >= np.abs(difference.sum(axis=0)) - 1e-9
    return (1 + extreme.sum(axis=0)) / (1 + draws)


def mcnemar(only_a: int, only_b: int) -> float:
    """Exact two-sided McNemar p from the two discordant counts. It ignores sets, so it is shown beside `swap_p` only."""
    n = only_a + only_b
    tail = sum(math.comb(n, k) for k in range(min(only_a, only_b) + 1))
    return min(1.0, 2 * tail / 2**n)


def compare(a: list[Item], b: list[Item], *, draws: int = DRAWS, seed: int = 0, level: float = 0.95) -> dict:
    """The paired comparison of two results over the same questions, `a` minus `b`.

    Returns:
        `metrics`: metric -> {difference (percentage points), interval, p_swap}; `mcnemar`: {gained, lost, p};
        `gained`, `lost`: question ids only `a`, only `b` has right; `sets`, `draws`, `seed`, `level`.

    Raises:
        ValueError: the questions differ.
    """
    ok_a, ok_b = ({item.id: item.ok for item in items} for items in (a, b))
    if ok_a.keys() != ok_b.keys():
        raise ValueError("the two results have different questions")
    table_a, table_b = set_table(a), set_table(b)
    difference = table_a.right - table_b.right
    weights = bootstrap_weights(table_a.strata, draws, seed)
    drawn, total = weights @ difference, weights @ table_a.total
    p = swap_p(difference, draws, seed)
    sums = table_a.total.sum(axis=0)
    metrics = {}
    for m, metric in enumerate(METRICS):
        metrics[metric] = {
            "difference": float(100 * difference[:, m].sum() / sums[m]) if sums[m] else None,
            "interval": _interval(drawn[:, m], total[:, m], level),
            "p_swap": float(p[m]) if sums[m] else None,
        }
    gained = [key for key in ok_a if ok_a[key] and not ok_b[key]]
    lost = [key for key in ok_a if ok_b[key] and not ok_a[key]]
    return {
        "metrics": metrics,
        "mcnemar": {"gained": len(gained), "lost": len(lost), "p": mcnemar(len(gained), len(lost))},
        "gained": gained,
        "lost": lost,
        "sets": len(table_a.sets),
        "draws": draws,
        "seed": seed,
        "level": level,
    }
