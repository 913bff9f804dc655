"""What a decoded token costs where completions end at different lengths: `python -m tests.bench.decode`.

16 completions of one prompt of 448 px, of 8 to 128 tokens, the model of `grpo_step`, one thread, in CPU seconds of the
process, prefill left out. Three ways, alternating in one process: as r1v decodes ("now"), with rows that have finished
staying in the batch ("stay"), and so with weights that are not packed too ("plain"). Prints one JSON line; exits 1
where the completions differ or plain decoding takes less than 1.3 times as long.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from contextlib import nullcontext
from pathlib import Path
from unittest.mock import patch

import torch
from transformers import LogitsProcessor, LogitsProcessorList

from r1vfree_cli.core.prompts import build_messages
from r1vfree_cli.models.load import load_model
from r1vfree_cli.shared_prefix import decode
from r1vfree_cli.shared_prefix.attention import install
from r1vfree_cli.shared_prefix.pack import Tree
from tests.bench.grpo_step import QUESTIONS, now, prepare
from tests.integration.tiny_models import draw, tiny_processor


class Ends(LogitsProcessor):
    """Row i begins with token 100 + i, by which it is known, and ends after `lengths[i]` tokens, not before."""

    def __init__(self, width: int, lengths: list[int], end: int) -> None:
        self.width, self.lengths, self.end = width, torch.tensor(lengths), end

    def __call__(self, input_ids, scores):
        step = input_ids.shape[1] - self.width
        scores[:, self.end] = -torch.inf
        if not step:
            chosen = 100 + torch.arange(len(scores))
            return torch.full_like(scores, -torch.inf).scatter_(1, chosen[:, None], 0.0)
        scores[:, self.end].masked_fill_(step + 1 >= self.lengths[input_ids[:, self.width] - 100], torch.inf)
        return scores


class Staying(decode._Step):
    rows_leave = False


class Timed(decode.Sampler):
    """Notes the CPU seconds from the first decoded token on."""

    def _start(self, *args):
        out = super()._start(*args)
        self.begun = now()
        return out


WAYS = {
    "now": {"_Step": decode._Step},
    "stay": {"_Step": Staying},
    "plain": {"_Step": Staying, "packed_weights": lambda model: nullcontext()},
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    torch.set_num_threads(1)
    processor = tiny_processor("qwen2_5_vl", max_pixels=1024 * 1024)
    with tempfile.TemporaryDirectory() as folder:
        model = load_model(str(prepare(Path(folder))), what="bench", dtype="float32").eval()
    install(model)
    text = processor.apply_chat_template(build_messages(QUESTIONS[0], 1), tokenize=False, add_generation_prompt=True)
    inputs = processor(text=[text], images=[draw(0, (448, 448))], return_tensors="pt")
    ids, images = inputs["input_ids"], {k: inputs[k] for k in ("pixel_values", "image_grid_thw")}
    lengths = [8 * (i + 1) for i in range(16)]
    end = processor.tokenizer.eos_token_id
    told = {"trees": [Tree(ids[0].tolist(), images["image_grid_thw"])], "sizes": [16], "images": images}
    seconds: dict[str, list[float]] = {name: [] for name in WAYS}
    found = {}
    for _ in range(args.rounds):
        for name, changes in WAYS.items():
            sampler = Timed()
            with torch.inference_mode(), patch.multiple(decode, **changes):
                found[name] = model.generate(
                    input_ids=ids.repeat(16, 1), attention_mask=torch.ones(16, ids.shape[1], dtype=torch.long),
                    custom_generate=sampler, **told, do_sample=False, max_new_tokens=128, eos_token_id=end,
                    pad_token_id=0, logits_processor=LogitsProcessorList([Ends(ids.shape[1], lengths, end)]),
                )  # fmt: skip
            seconds[name].append(now() - sampler.begun)
    same = all(torch.equal(found["now"], other) for other in found.values())
    best = {name: min(runs) for name, runs in seconds.items()}
    each = {f"{name}_ms_a_token": round(1e3 * s / sum(lengths), 2) for name, s in best.items()}
    ratios = {"stay_to_now": round(best["stay"] / best["now"], 2), "ratio": round(best["plain"] / best["now"], 2)}
    shown = {"completions": 16, "tokens": sum(lengths), "prompt": ids.shape[1], **each}
    print(json.dumps({**shown, "identical": same, **ratios}))
    return 0 if same and ratios["ratio"] >= 1.3 else 1


if __name__ == "__main__":
    sys.exit(main())
