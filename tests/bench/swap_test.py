"""Type-I error of the swap test under within-set correlation, with McNemar's test beside it.

    python tests/bench/swap_test.py [RUNS] [DRAWS]

Prints one JSON line: the share of p < 0.05 between two equally good models. The swap test should give 0.03 to 0.07.
"""

from __future__ import annotations

import json
import sys

import numpy as np

from r1vfree_cli.eval import stats


def simulate(runs: int, draws: int, seed: int = 0) -> dict:
    """167 sets of 2 to 13 questions, as many sets as are published.

    A question's chance of being right has a part shared by both models (how hard the set is) and a part of model and
    set, which is what makes the questions of a set dependent within the difference.
    """
    rng = np.random.default_rng(seed)
    sizes = rng.integers(2, 14, size=167)
    keys, strata = [(i,) for i in range(167)], np.zeros(167, int)
    swap = naive = 0
    for run in range(runs):
        hard = rng.normal(0, 1, 167)
        right = []
        for _ in range(2):
            chance = 1 / (1 + np.exp(-(0.3 + hard + rng.normal(0, 1.2, 167))))
            right.append([rng.random(n) < c for n, c in zip(sizes, chance)])
        counts = [np.array([[float(x.sum())] for x in some]) for some in right]
        tables = [stats.ClusterTable(["m"], keys, strata, x, sizes[:, None].astype(float)) for x in counts]
        swap += int(stats.swap_p(*tables, draws, run)[0] < 0.05)
        a, b = np.concatenate(right[0]), np.concatenate(right[1])
        naive += int(stats.mcnemar(int((a & ~b).sum()), int((b & ~a).sum())) < 0.05)
    return {"runs": runs, "draws": draws, "swap_type_1": swap / runs, "mcnemar_type_1": naive / runs}


if __name__ == "__main__":
    print(json.dumps(simulate(*(int(a) for a in [*sys.argv[1:], *("4000", "1000")[len(sys.argv) - 1 :]]))))
