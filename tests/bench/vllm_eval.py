"""An evaluation of 200 questions on the 35M model: local generation against `--vllm`, alternating in one run.

    R1V_TEST_VLLM=DIR; $DIR/bin/python -m tests.bench.vllm_eval [--questions 200] [--new-tokens 64] [--rounds 2]

POPE's layout with drawn images of 448 x 448 pixels, a figure for three questions. CPU seconds with one thread, those of the
server's processes included; vLLM's start is counted apart: from the command to the first answer of /health.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path

os.environ |= {"OMP_NUM_THREADS": "1", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}

import psutil
import torch

from r1vfree_cli.eval.options import EvalOptions
from r1vfree_cli.eval.runner import evaluate
from r1vfree_cli.launch import processes
from tests.bench.grpo_step import prepare
from tests.integration.tiny_models import draw

STARTS: list[tuple[float, float]] = []  # (CPU seconds, seconds)


def used() -> float:
    """CPU seconds of this process and of those that it has waited for."""
    return sum(os.times()[:4])


@contextmanager
def timed_server(*args, real=processes.server):
    begin = time.monotonic()
    with real(*args) as server:
        own = psutil.Process(server.process.pid)
        cpu = sum(sum(p.cpu_times()[:2]) for p in [own, *own.children(recursive=True)])
        STARTS.append((cpu, time.monotonic() - begin))
        yield server


def write_questions(folder: Path, count: int) -> None:
    (folder / "val2014").mkdir(parents=True)
    parts = ("random", "popular", "adversarial")
    for i in range(-(-count // 3)):
        draw(i, (448, 448)).save(folder / "val2014" / f"COCO_{i}.jpg")
    for k, part in enumerate(parts):
        ids = range(k, count, 3)
        rows = [
            {"question_id": i, "image": f"COCO_{i // 3}.jpg", "text": f"Is there a {part} thing?", "label": "yes"}
            for i in ids
        ]
        (folder / f"coco_pope_{part}.json").write_text("".join(json.dumps(row) + "\n" for row in rows))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--questions", type=int, default=200)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(1)
    processes.server = timed_server
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        model = prepare(folder)
        asked = folder / "questions"
        write_questions(asked, args.questions)
        told = {"benchmark": "pope", "checkpoint": str(model), "questions": str(asked), "stage": "generate"}
        told |= {"images": asked / "val2014", "max_new_tokens": args.new_tokens, "device": "cpu", "concurrency": 64}
        seen: dict[str, list[float]] = {"local": [], "vLLM": []}
        for turn in range(args.rounds):
            for name, took in seen.items():
                begin = used()
                evaluate(EvalOptions(**told, vllm=name == "vLLM", out=folder / f"{name}{turn}"))
                took.append(used() - begin - (STARTS[-1][0] if name == "vLLM" else 0))
        for name, took in seen.items():
            print(f"{args.questions} questions, {args.new_tokens} tokens, {name}: {min(took):.1f} CPU s", flush=True)
        print("start of vLLM:", ", ".join(f"{cpu:.1f} CPU s in {wall:.0f} s" for cpu, wall in STARTS))


if __name__ == "__main__":
    main()
