"""Answers a second of a local judge with shared prefixes and without: `python -m tests.bench.judge`.

G answers each to two images of 448 px, the model of `grpo_step`, one thread, both ways alternating in one process, in
seconds of its CPU. Prints one JSON line; exits 1 where scores differ by more than 1e-5 or the ratio is below 3.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

import torch

from r1vfree_cli.judges.local import LocalJudge
from tests.bench.grpo_step import QUESTIONS, now, prepare
from tests.integration.tiny_models import draw


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--answers", type=int, default=8)
    parser.add_argument("--side", type=int, default=448)
    parser.add_argument("--rounds", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        judge = LocalJudge(str(prepare(Path(folder))), pixels=(784, 1024 * 1024))
    items = [
        ([draw(i, (args.side, args.side))], question, f"There are {j} red circles to the left of it")
        for i, question in enumerate(QUESTIONS)
        for j in range(args.answers)
    ]
    seconds: dict[bool, list[float]] = {True: [], False: []}
    scores = {}
    for _ in range(args.rounds):
        for shares in (True, False):
            judge._shares = shares
            begin = now()
            scores[shares] = judge.score(items)
            seconds[shares].append(now() - begin)
    ratio = min(seconds[False]) / min(seconds[True])
    apart = max(abs(a - b) for a, b in zip(*scores.values(), strict=True))
    shown = {f"{name}_s": [round(s, 2) for s in seconds[name == "shared"]] for name in ("shared", "plain")}
    print(json.dumps({"answers": len(items), **shown, "ratio": round(ratio, 2), "largest_difference": apart}))
    return 0 if apart <= 1e-5 and ratio >= 3 else 1


if __name__ == "__main__":
    sys.exit(main())
