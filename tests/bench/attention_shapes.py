"""How many distinct attention shapes a run has: `python -m tests.bench.attention_shapes`.

GRPO of a tiny Qwen2.5-VL within the limits of the recipes: images of up to 401,408 px and of many sizes, questions of up
to 60 words, groups of 8 completions of 8 to 512 tokens, and a judge of the same class in the same process. The shapes
(batch, queries, keys) that attention kernels are called with are counted over all steps, with lengths rounded up as on a
GPU; with `--plain` as they are, as on the CPU. A decoding step on a GPU is one captured graph without such kernels.
Prints one JSON line; exits 1 where there are more than 8.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
from collections import defaultdict
from pathlib import Path
from unittest.mock import patch

import torch
import torch.nn.functional as F
from datasets import Dataset, Features, Image, List, Value
from transformers import AutoModelForImageTextToText
from trl import GRPOConfig, GRPOTrainer

from r1vfree_cli.core.prompts import user_text
from r1vfree_cli.judges.local import LocalJudge
from r1vfree_cli.shared_prefix import buckets
from r1vfree_cli.shared_prefix.mixin import SharedPrefixMixin
from tests.integration.tiny_models import draw, save_tiny, tiny_processor

PIXELS, LONGEST, GROUP = 401_408, 512, 8


class Uneven(SharedPrefixMixin, GRPOTrainer):
    """Completions end at random lengths."""

    lengths = random.Random(1)

    def _generate_single_turn(self, *args, **kwargs):
        completions, *rest = super()._generate_single_turn(*args, **kwargs)
        return [ids[: self.lengths.randint(8, LONGEST)] for ids in completions], *rest


def rows(count: int) -> Dataset:
    rng = random.Random(0)
    made = []
    for i in range(count):
        size = rng.randint(200, 633), rng.randint(200, 633)
        text = " ".join(["what colour is the square"] + ["please"] * rng.randint(0, 60))
        made.append({"prompt": [{"role": "user", "content": user_text(text)}], "images": [draw(i, size)]})
    features = {"prompt": List({"role": Value("string"), "content": Value("string")}), "images": List(Image())}
    return Dataset.from_list(made, features=Features(features))


def shapes(folder: Path, steps: int, *, rounded: bool) -> dict[str, list[tuple[int, ...]]]:
    """Of each use, the distinct (batch, queries, keys)."""
    found: dict[str, set] = defaultdict(set)
    attention = F.scaled_dot_product_attention

    def seen(q, k, *args, **kwargs):
        mask = kwargs.get("attn_mask")
        use = "prompts" if kwargs.get("is_causal") else "branches" if mask is not None and mask.ndim == 2 else "vision"
        found[use].add((q.shape[0], q.shape[-2], k.shape[-2]))
        return attention(q, k, *args, **kwargs)

    judge = LocalJudge(str(folder), pixels=(784, PIXELS))

    def reward(prompts, completions, images, **_):
        said = [(image, "what is it", turn[0]["content"][:60]) for image, turn in zip(images, completions, strict=True)]
        return judge.score(said)

    processor = tiny_processor("qwen2_5_vl", max_pixels=PIXELS)
    processor.tokenizer.padding_side = "left"
    args = GRPOConfig(
        tempfile.mkdtemp(), use_cpu=True, bf16=False, report_to=[], per_device_train_batch_size=2 * GROUP,
        num_generations=GROUP, max_completion_length=LONGEST, beta=0.04, learning_rate=1e-6, max_steps=steps,
        save_strategy="no", disable_tqdm=True, gradient_checkpointing=False,
        generation_kwargs={"min_new_tokens": LONGEST},
    )  # fmt: skip
    with patch.object(buckets, "wanted", lambda device: rounded), patch.object(F, "scaled_dot_product_attention", seen):
        model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
        trainer = Uneven(model, reward, args=args, train_dataset=rows(2 * steps), processing_class=processor)
        assert trainer.shared_prefix_off is None and judge._shares
        trainer.train()
    return {use: sorted(kinds) for use, kinds in found.items()}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--plain", action="store_true", help="round nothing")
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        folder = save_tiny(Path(scratch) / "model")
        found = shapes(folder, args.steps, rounded=not args.plain)
    total = sum(map(len, found.values()))
    counts = {use: len(kinds) for use, kinds in found.items()}
    print(json.dumps({"steps": args.steps, "distinct": total, **counts, "shapes": found if total <= 8 else "..."}))
    return 0 if total <= 8 else 1


if __name__ == "__main__":
    sys.exit(main())
