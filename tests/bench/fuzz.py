"""Thousands of bad inputs through the command line: `python -m tests.bench.fuzz --cases 5000 [--seed 1] [--only recipes]`.

Prints how many were run, how they ended, the slowest, and every kind of problem with the first case that showed it.
The exit code is 1 when there was any.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--cases", type=int, default=5000)
    parser.add_argument("--seed", type=int, default=None, help="other cases than CI's")
    parser.add_argument("--only", help="one category")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        os.environ |= {"R1V_CACHE": str(Path(folder) / "cache"), "HF_HUB_OFFLINE": "1", "COLUMNS": "200"}
        from tests.fuzz import suite
        from tests.fuzz.harness import Tally

        tally = Tally()
        start = time.monotonic()
        suite.run(tally, args.cases, Path(folder) / "pieces", seed=args.seed, only=args.only, every=True)
        print(tally.report())
        print(f"{time.monotonic() - start:.0f} s")
    return int(bool(tally.found))


if __name__ == "__main__":
    sys.exit(main())
