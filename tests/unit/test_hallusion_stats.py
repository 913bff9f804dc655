"""Bootstrap and swap test: against slow references, and the swap test's type-I error under within-set correlation."""

from __future__ import annotations

import itertools
import math
import random
import runpy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from r1vfree_cli.eval import stats
from r1vfree_cli.eval.benchmark import percent
from r1vfree_cli.eval.hallusion.score import METRICS, Item, counts


def questions(sets: int = 12, strata: int = 3) -> list[Item]:
    """Sets of a VD layout, 2 figures x (1 to 4) questions, over several strata."""
    return [
        Item("VD", f"s{s % strata}", str(s), str(f), str(q), 1 + f, (s + f + q) % 2)
        for s in range(sets)
        for f in range(2)
        for q in range(1 + s % 4)
    ]


def answered(items: list[Item], rng: random.Random, skill: float = 0.6) -> list[Item]:
    shift = {item.cluster: rng.gauss(0, 0.25) for item in items}
    return [replace(i, code=int(rng.random() < skill + shift[i.cluster]), same=0) for i in items]


def test_the_table_adds_up_to_the_scores():
    items = answered(questions(), random.Random(0))
    table = stats.cluster_table(items, counts)
    expected = counts(items)
    for m, metric in enumerate(METRICS):
        assert [table.right[:, m].sum(), table.total[:, m].sum()] == expected[metric]


def test_bootstrap_draws_whole_strata():
    strata = np.array([0, 0, 0, 1, 2, 2])
    weights = stats.bootstrap_weights(strata, 500, 0)
    for s, size in ((0, 3), (1, 1), (2, 2)):
        assert (weights[:, strata == s].sum(axis=1) == size).all()
    assert weights[:, 0].std() > 0


def test_intervals_agree_with_a_bootstrap_loop_over_questions():
    items = answered(questions(24), random.Random(1))
    fast = stats.intervals(items, counts, draws=4000, seed=0)
    rng = random.Random(5)
    by_stratum: dict = {}
    for item in items:
        by_stratum.setdefault(item.subcategory, {}).setdefault(item.cluster, []).append(item)
    drawn: dict[str, list[float]] = {m: [] for m in METRICS}
    for _ in range(600):
        sample = []
        for sets in by_stratum.values():
            for copy, key in enumerate(rng.choices(sorted(sets), k=len(sets))):
                sample += [replace(i, set_id=f"{i.set_id}-{copy}") for i in sets[key]]
        for metric, value in percent(counts(sample)).items():
            drawn[metric].append(value)
    for metric in METRICS:
        low, high = np.quantile(drawn[metric], [0.025, 0.975])
        assert fast[metric][0] == pytest.approx(low, abs=3)
        assert fast[metric][1] == pytest.approx(high, abs=3)


def tables(difference: np.ndarray) -> list[stats.ClusterTable]:
    """Two results that differ so, of as many questions each."""
    n = len(difference)
    total = np.full_like(difference, 9.0)
    sides = (difference.clip(0), (-difference).clip(0))
    return [stats.ClusterTable(["m"], [(i,) for i in range(n)], np.zeros(n, int), x, total) for x in sides]


def test_swap_p_agrees_with_all_sign_patterns():
    difference = np.array([[3.0], [-1], [2], [0], [1], [4], [-2], [1]])
    observed = abs(difference.sum())
    patterns = itertools.product((-1, 1), repeat=len(difference))
    exact = np.mean([abs((np.array(s) * difference[:, 0]).sum()) >= observed for s in patterns])
    assert stats.swap_p(*tables(difference), 20_000, 0)[0] == pytest.approx(exact, abs=0.015)


def test_mcnemar_is_the_exact_binomial():
    assert stats.mcnemar(0, 0) == 1
    assert stats.mcnemar(5, 5) == 1
    assert stats.mcnemar(0, 6) == pytest.approx(2 / 64)
    assert stats.mcnemar(10, 2) == pytest.approx(2 * sum(math.comb(12, k) for k in range(3)) / 2**12)


def test_identical_results_show_no_difference():
    items = answered(questions(), random.Random(0))
    doc = stats.compare(items, list(reversed(items)), counts)
    assert doc["gained"] == doc["lost"] == []
    assert doc["mcnemar"]["p"] == 1
    for entry in doc["metrics"].values():
        assert entry == {"difference": 0, "interval": [0, 0], "p_swap": 1}


def test_a_clear_difference_is_found_and_signed():
    rng = random.Random(2)
    base = questions(60)
    good, bad = answered(base, rng, 0.9), answered(base, rng, 0.4)
    entry = stats.compare(good, bad, counts)["metrics"]["aAcc"]
    assert entry["difference"] > 20 and entry["interval"][0] > 0 and entry["p_swap"] < 0.001
    mirrored = stats.compare(bad, good, counts)["metrics"]["aAcc"]
    assert mirrored["difference"] == -entry["difference"] and mirrored["p_swap"] == entry["p_swap"]


def test_comparison_is_seeded_and_refuses_other_questions():
    rng = random.Random(3)
    base = questions()
    a, b = answered(base, rng), answered(base, rng)
    assert stats.compare(a, b, counts, seed=1) == stats.compare(a, b, counts, seed=1)
    with pytest.raises(ValueError, match="different questions"):
        stats.compare(a, b[1:], counts)


def test_swap_test_keeps_its_type_1_error_and_mcnemar_does_not():
    simulate = runpy.run_path(str(Path(__file__).parents[1] / "bench" / "swap_test.py"))["simulate"]
    found = simulate(runs=300, draws=300)
    assert 0.03 <= found["swap_type_1"] <= 0.07
    assert found["mcnemar_type_1"] > 0.1
