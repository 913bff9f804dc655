"""How many killed runs resume exactly: `python -m tests.bench.kill_loop [--kills 25]`.

Each is a run of its own through the real command line: 8 GRPO steps of a tiny random model on the CPU, the whole
process tree killed by SIGKILL at a random moment (one in five while it starts up, the others from the first step to
the end of the last save), resumed by the same command, then compared with the uninterrupted run: final weights and
metrics bit for bit, every step logged once, every rollout there once with the same prompt. The last line is JSON; the
exit code is 1 unless all were exact. About 25 s a kill.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import sys
import tempfile
import time
from pathlib import Path

from r1vfree_cli.run.run_dir import FINISHED, RUNNING, RunDir
from tests.integration import kills
from tests.integration.tiny_models import draw_rows, save_tiny, write_rows

PAUSE_S = 0.002


def training(run: RunDir) -> bool:
    """Whether the first attempt has begun to train."""
    return run.status.get("state") == RUNNING


def finished(run: RunDir) -> bool:
    """Whether nothing is left to do but to print the result."""
    return run.status.get("state") == FINISHED


def uninterrupted(recipe: Path, run: RunDir) -> tuple[float, float]:
    """Finish a run that nobody kills; returns seconds from its start to the first step, and from there to its end."""
    begin = time.monotonic()
    r1v = kills.cli(recipe, run.path)
    kills.until(lambda: training(run) or r1v.poll() is not None, pause=PAUSE_S)
    middle = time.monotonic()
    kills.until(lambda: finished(run) or r1v.poll() is not None, pause=PAUSE_S)
    end = time.monotonic()
    if r1v.wait(kills.LIMIT_S):
        sys.exit(kills.show(run))
    return middle - begin, end - middle


def kill_once(recipe: Path, run: RunDir, rng: random.Random, startup_s: float, training_s: float) -> str | None:
    """Start a run and kill it at a random moment; returns where it was, None when it had finished."""
    r1v = kills.cli(recipe, run.path)
    if rng.random() < 0.2:
        delay = rng.uniform(0, startup_s)
    else:
        kills.until(lambda: training(run) or r1v.poll() is not None, pause=PAUSE_S)
        delay = rng.uniform(0, training_s)
    deadline = time.monotonic() + delay
    kills.until(lambda: time.monotonic() >= deadline or r1v.poll() is not None, pause=PAUSE_S)
    pids = kills.kill_tree(r1v.pid) if r1v.poll() is None else []
    r1v.wait()
    if finished(run):
        return None
    kills.until(lambda: not kills.alive(pids), pause=0.05, limit=30)
    steps = run.metrics.read_bytes().count(b"\n") if run.metrics.is_file() else 0
    where = f"{len(pids)} processes, {run.status.get('state', 'no status')}, {steps} steps logged"
    if any(run.checkpoints.glob(".writing/*")):
        where += ", in a checkpoint"
    return where + (", in the final save" if any(run.path.glob(".final-writing")) else "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=25)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    rng, exact, done, begin = random.Random(args.seed), 0, 0, time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        os.environ["R1V_CACHE"] = str(home / "cache")
        save_tiny(home / "model")
        write_rows(home / "data", draw_rows(8))
        recipe = kills.write_recipe(home, "plain", kills.document(home))
        whole = RunDir(home / "whole")
        spans = uninterrupted(recipe, whole)
        while done < args.kills:
            run = RunDir(home / "run")
            shutil.rmtree(run.path, ignore_errors=True)
            where = kill_once(recipe, run, rng, *spans)
            if where is None:
                continue
            done += 1
            code = kills.cli(recipe, run.path).wait()
            found = kills.differences(run, whole) if code == 0 else [f"the resume ended with {code}", kills.show(run)]
            exact += not found
            print(f"{done:3}  {where}: {'exact' if not found else '; '.join(found)}", flush=True)
    print(json.dumps({"kills": done, "resumed_exactly": exact, "seconds": round(time.monotonic() - begin)}))
    sys.exit(exact != done)


if __name__ == "__main__":
    main()
