"""Rollouts of the 35M model by r1v's sampler and by vLLM in the trainer's process, alternating in one run.

    R1V_TEST_VLLM=DIR; $DIR/bin/python -m tests.bench.vllm_decode [--repeats 3] [--eager]

Two prompts with an image of 448 x 448 pixels, G completions each, all of the same length (no early end). Times are CPU
seconds of the process, which computes with one thread; the least over the repeats. vLLM keeps its prefixes: each
repeat has images of its own. Weights are not sent to it again.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from pathlib import Path

os.environ |= {"OMP_NUM_THREADS": "1", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}

import torch
from datasets import Dataset, Features, Image, List, Value
from transformers import AutoModelForImageTextToText, AutoProcessor
from trl import GRPOConfig

from r1vfree_cli.core.prompts import user_text
from r1vfree_cli.training.trainer import R1VGRPOTrainer
from r1vfree_cli.training.vllm_sampler import VLLMSampler
from tests.bench.grpo_step import PROMPTS, QUESTIONS, prepare
from tests.integration.tiny_models import draw

CASES = [(new, g) for new in (64, 256) for g in (8, 16)]  # tokens, completions a prompt
FEATURES = Features({"prompt": List({"role": Value("string"), "content": Value("string")}), "images": List(Image())})


def rows(seed: int) -> list[dict]:
    return [
        {"prompt": [{"role": "user", "content": user_text(q)}], "images": [draw(seed + i, (448, 448))]}
        for i, q in zip(range(PROMPTS), QUESTIONS, strict=True)
    ]


class Sampling:
    """One trainer; only its generation is timed."""

    def __init__(self, folder: Path, *, use_vllm: bool):
        processor = AutoProcessor.from_pretrained(folder)
        args = GRPOConfig(
            tempfile.mkdtemp(), use_cpu=True, bf16=False, report_to=[], beta=0.0, num_generations=16,
            per_device_train_batch_size=16 * PROMPTS, max_completion_length=256, use_vllm=use_vllm,
            vllm_mode="colocate", vllm_max_model_length=1024,
        )  # fmt: skip
        self.trainer = R1VGRPOTrainer(
            model=AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32),
            reward_funcs=[lambda completions, **_: [0.0] * len(completions)],
            args=args,
            train_dataset=Dataset.from_list(rows(0), features=FEATURES),
            processing_class=processor,
            shared_prefix=True,
        )
        self.trainer.model.eval()
        self.seconds = 0.0
        turn = self.trainer._generate_single_turn

        def timed(*args, **kwargs):
            start = time.process_time()
            out = turn(*args, **kwargs)
            self.seconds = time.process_time() - start
            self.lengths = {len(ids) for ids in out[0]}
            return out

        self.trainer._generate_single_turn = timed

    def run(self, seed: int, new: int, g: int) -> float:
        trainer = self.trainer
        trainer.num_generations = trainer.num_generations_eval = g
        if trainer.use_vllm:
            trainer.vllm_generation.max_completion_length = new
            trainer.vllm_generation.generation_kwargs |= {"min_tokens": new, "ignore_eos": True}
            trainer._last_loaded_step = trainer.state.global_step
        else:
            trainer.max_completion_length = new
            trainer.generation_config.max_new_tokens = trainer.generation_config.min_new_tokens = new
        with torch.no_grad():
            trainer._generate(
                [
                    [{"role": "user", "content": [{"type": "image", "image": row["images"][0]},
                                                  {"type": "text", "text": row["prompt"][0]["content"]}]}]
                    for row in rows(seed) for _ in range(g)
                ]
            )  # fmt: skip
        assert self.lengths == {new}, self.lengths
        return self.seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--eager", action="store_true", help="vLLM without torch.compile")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.eager:
        init = VLLMSampler._init_vllm
        VLLMSampler._init_vllm = lambda self: (self._engine.update(enforce_eager=True), init(self))
    with tempfile.TemporaryDirectory() as scratch:
        folder = prepare(Path(scratch))
        both, start = {}, {}
        for name in ("r1v", "vLLM"):
            begin = time.process_time()
            both[name] = Sampling(folder, use_vllm=name == "vLLM")
            start[name] = time.process_time() - begin
        print(f"start: vLLM {start['vLLM']:.1f} CPU s, r1v's sampler {start['r1v']:.1f}", flush=True)
        for new, g in CASES:
            seen = {name: [] for name in both}
            for repeat in range(args.repeats + 1):  # the first warms up
                for name, sampling in both.items():
                    seen[name].append(sampling.run(1000 * new + 100 * g + 10 * repeat, new, g))
            least = {name: min(values[1:]) for name, values in seen.items()}
            line = "  ".join(f"{name} {seconds:.2f} s" for name, seconds in least.items())
            print(f"{new} tokens, G = {g}: {line}  ratio {least['vLLM'] / least['r1v']:.2f}", flush=True)


if __name__ == "__main__":
    main()
