"""HallusionBench generation against one question at a time through plain transformers, on the tiny model.

    python tests/bench/hallusion_generate.py [--figures 24] [--new-tokens 32] [--batch-size 32]

Both run in this process, on the same questions, greedily and without an early end, alternating over `--rounds`.
Prints one JSON line; exits 1 unless all texts are identical and the best-of-rounds ratio is at least 3.
"""

from __future__ import annotations

import argparse
import io
import json
import logging
import os
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).parents[1] / "integration"))

import torch
from PIL import Image
from tiny_models import draw, load_tiny, save_tiny

from r1vfree_cli.core.prompts import build_messages
from r1vfree_cli.eval.generate import Generator, Job
from r1vfree_cli.judges.replies import Reply
from r1vfree_cli.models import family


def jobs(figures: int) -> list[Job]:
    """About as many questions a figure as published: 951 to 346."""
    found = []
    for i in range(figures):
        out = io.BytesIO()
        draw(i, ((84, 84), (140, 84), (112, 140))[i % 3]).save(out, "PNG")
        for j in range(2 + (i % 4 > 0)):
            text = "Is there a square in this picture?" + " Look again." * ((i + j) % 5)
            found.append(Job(f"q{i}-{j}", build_messages(text, 1), out.getvalue()))
    return found


def plain(model, processor, asked: list[Job], settings) -> dict[str, str]:
    """One question at a time, as a reader of the model card would write it."""
    texts = {}
    for job in asked:
        prompt = processor.apply_chat_template(job.messages, tokenize=False, add_generation_prompt=True)
        image = Image.open(io.BytesIO(job.image or b""))
        inputs = processor(text=[prompt], images=[image], return_tensors="pt")
        with torch.inference_mode():
            out = model.generate(**inputs, generation_config=settings)
        new = out[0, inputs["input_ids"].shape[1] :]
        texts[job.id] = processor.tokenizer.decode(new, skip_special_tokens=True)
    return texts


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--figures", type=int, default=24)
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    limits = (784, 140 * 140)
    with tempfile.TemporaryDirectory() as folder:
        save_tiny(folder)
        generator = Generator(
            folder, min_pixels=limits[0], max_pixels=limits[1], max_new_tokens=args.new_tokens, device="cpu"
        )
        model, processor = load_tiny(folder)
    family.limit_pixels(family.of(model.config), processor, *limits)
    generator.settings.min_new_tokens = args.new_tokens
    model.generation_config = generator.settings
    asked = jobs(args.figures)

    def batched() -> dict[str, str]:
        texts: dict[str, str] = {}

        def done(job: Job, answer: Reply) -> None:
            texts[job.id] = answer.text

        generator.run(asked, args.batch_size, done)
        return texts

    times: dict[str, list[float]] = {"batched": [], "plain": []}
    same = True
    for _ in range(args.rounds):
        started = time.perf_counter()
        ours = batched()
        middle = time.perf_counter()
        theirs = plain(model, processor, asked, generator.settings)
        times["plain"].append(time.perf_counter() - middle)
        times["batched"].append(middle - started)
        same = same and ours == theirs
    ratio = min(times["plain"]) / min(times["batched"])
    print(
        json.dumps(
            {
                "questions": len(asked),
                "figures": args.figures,
                "new_tokens": args.new_tokens,
                "batch_size": args.batch_size,
                "identical": same,
                **{f"{name}_s": [round(t, 2) for t in found] for name, found in times.items()},
                "ratio": round(ratio, 2),
            }
        )
    )
    return 0 if same and ratio >= 3 else 1


if __name__ == "__main__":
    sys.exit(main())
