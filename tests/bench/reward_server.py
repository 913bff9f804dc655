"""How much batching saves: 6 client processes x 16 answers against one reward server, batched and one at a time.

Run: python tests/bench/reward_server.py [--model DIR] [--rounds 5]
Prints seconds per round of 96 judgements for both, and their ratio. Without --model a tiny Qwen2.5-VL is made; on a
GPU give a real one. Clients ask through the `classify` backend, as training does, without a cache.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path
from statistics import median

sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parents[1] / "integration")]

CLIENTS, ANSWERS, GROUP = 6, 16, 8


def client(number: int, url: str, rounds: int, barrier, results) -> None:
    """Ask `rounds` times about 2 images x 8 answers, all clients at once."""
    from PIL import Image

    from r1vfree_cli.config.schema import FeedbackReward
    from r1vfree_cli.rewards.registry import build_feedback

    reward = build_feedback(FeedbackReward(name="feedback", base_url=url, cache=False, timeout_s=600))
    for r in range(rounds + 1):
        images = [Image.new("RGB", (56, 56), (40 * number, 20 * r % 256, 90 * i)) for i in range(ANSWERS // GROUP)]
        items = [([images[i // GROUP]], "What colour is the square?", f"answer {i} of {r}") for i in range(ANSWERS)]
        barrier.wait()
        begin = time.monotonic()
        scores = reward.ask(items)
        assert None not in scores
        results.put((r, begin, time.monotonic()))
    reward.close()


def measure(model: str, batch: int, rounds: int) -> float:
    """Median seconds of a round, from the first request to the last reply; the first round warms up."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "r1vfree_cli.judges.server", "--model", model, "--port", str(port)]
    root = str(Path(__file__).parents[2])
    env = {**os.environ, "PYTHONPATH": root}
    server = subprocess.Popen(
        [*command, "--batch", str(batch)], env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        for _ in range(1200):
            try:
                if urllib.request.urlopen(f"{url}/health", timeout=2).status == 200:
                    break
            except OSError:
                time.sleep(0.25)
        context = multiprocessing.get_context("spawn")
        barrier, results = context.Barrier(CLIENTS), context.Queue()
        clients = [context.Process(target=client, args=(i, url, rounds, barrier, results)) for i in range(CLIENTS)]
        for process in clients:
            process.start()
        times = [results.get(timeout=600) for _ in range(CLIENTS * (rounds + 1))]
        for process in clients:
            process.join()
    finally:
        server.terminate()
        server.wait(60)
    spans = [[t for t in times if t[0] == r] for r in range(1, rounds + 1)]
    return median(max(t[2] for t in span) - min(t[1] for t in span) for span in spans)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if not args.model:
            from tiny_models import save_tiny

            args.model = str(save_tiny(folder))
        batched, single = measure(args.model, 64, args.rounds), measure(args.model, 1, args.rounds)
    figures = {"judgements": CLIENTS * ANSWERS, "batched_s": round(batched, 3), "one_at_a_time_s": round(single, 3)}
    print(json.dumps({**figures, "ratio": round(single / batched, 2)}))


if __name__ == "__main__":
    main()
