"""A GRPO step with real Qwen2.5-VL shapes on one GPU, shared prefixes against TRL: `python -m tests.gpu.grpo_step`.

Random weights, drawn images, nothing is downloaded. Prints seconds by part and peak memory of both, and first checks
that the captured decoding step samples the tokens of the uncaptured one.
"""

from __future__ import annotations

import argparse
import gc
import json
import tempfile
from pathlib import Path

import torch
from peft import LoraConfig
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from r1vfree_cli.shared_prefix import decode as shared_prefix_decode
from tests.bench.grpo_step import PARTS, PROMPTS, Steps, total
from tests.integration.tiny_models import tiny_processor

# The published configurations' sizes.
SIZES = {
    "tiny": {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 4, "num_attention_heads": 8}
    | {"num_key_value_heads": 2, "vocab_size": 4096},
    "3b": {"hidden_size": 2048, "intermediate_size": 11008, "num_hidden_layers": 36, "num_attention_heads": 16}
    | {"num_key_value_heads": 2, "vocab_size": 151936},
    "7b": {"hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28}
    | {"num_key_value_heads": 4, "vocab_size": 152064},
}


def write_model(folder: Path, size: str) -> None:
    processor = tiny_processor("qwen2_5_vl", max_pixels=4096 * 4096)
    ids = processor.tokenizer.convert_tokens_to_ids
    text = SIZES[size] | {
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
        "bos_token_id": ids("<|endoftext|>"),
        "eos_token_id": ids("<|im_end|>"),
    }
    if size == "tiny":
        text["rope_parameters"]["mrope_section"] = [8, 12, 12]
    vision = {"depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16}
    config = Qwen2_5_VLConfig(
        text_config=text,
        vision_config=vision | {"out_hidden_size": text["hidden_size"], "fullatt_block_indexes": [7, 15, 23, 31]},
        image_token_id=ids("<|image_pad|>"),
        video_token_id=ids("<|video_pad|>"),
        vision_start_token_id=ids("<|vision_start|>"),
        vision_end_token_id=ids("<|vision_end|>"),
        tie_word_embeddings=size != "7b",
    )
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"):
        model = Qwen2_5_VLForConditionalGeneration(config)
    torch.set_default_dtype(torch.float32)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    del model
    clear()


def clear() -> None:
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()


def tokens_of(steps: Steps) -> list[list[int]]:
    torch.manual_seed(0)
    kept = []
    trainer, original = steps.trainer, steps.trainer._generate_single_turn

    def keep(*args, **kwargs):
        kept.append(original(*args, **kwargs))
        return kept[-1]

    trainer._generate_single_turn = keep
    trainer.model.train()
    trainer._generate_and_score_completions(steps.batch)
    trainer._generate_single_turn = original
    return kept[0][0]


def check_graph(make) -> None:
    """The captured step against the plain one, in f32: at the same random numbers, the same tokens."""
    captured = tokens_of(make())
    graphed = shared_prefix_decode._GraphedStep
    shared_prefix_decode._GraphedStep = shared_prefix_decode._Step
    try:
        plain = tokens_of(make())
    finally:
        shared_prefix_decode._GraphedStep = graphed
    same = sum(a == b for a, b in zip(captured, plain, strict=True))
    print(f"captured decoding: {same} of {len(plain)} completions are those of the uncaptured one")
    if same != len(plain):
        raise SystemExit(1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split(":")[0])
    parser.add_argument("--size", choices=SIZES, default="3b")
    parser.add_argument("--side", type=int, default=616, help="pixels; 616 are 484 visual tokens")
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--completions", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--full", action="store_true", help="train all weights; otherwise LoRA")
    parser.add_argument("--model", type=Path, help="folder for the weights, to use them again")
    args = parser.parse_args()
    folder = args.model or Path(tempfile.mkdtemp())
    if not (folder / "config.json").exists():
        write_model(folder, args.size)
    tiny = Path(tempfile.mkdtemp())
    write_model(tiny, "tiny")
    check_graph(lambda: Steps(tiny, 448, 32, 4, shared=True, model_dtype=torch.float32))
    clear()

    names, result = ("trl", "r1v"), {}
    for name in names:  # one after the other: two trainers of a large model do not fit side by side
        steps = Steps(
            folder,
            args.side,
            args.tokens,
            args.completions,
            shared=name == "r1v",
            peft_config=None if args.full else LoraConfig(r=16, target_modules=["q_proj", "k_proj", "v_proj"]),
            gradient_checkpointing=True,
            bf16=True,
            model_dtype=torch.bfloat16,
        )
        steps.step()  # warm up
        clear()
        runs = [steps.timed() for _ in range(args.repeats)]
        result[name] = min(runs, key=total)
        result[f"{name}_peak_gb"] = torch.cuda.max_memory_allocated() / 1e9
        del steps
        clear()
    print(f"{torch.cuda.get_device_name()}: {args.size}, {args.side} px, {args.tokens} tokens, {args.completions} of "
          f"each of {PROMPTS} prompts, {'all weights' if args.full else 'LoRA'}")  # fmt: skip
    for part in PARTS:
        print(f"  {part:<11}" + "".join(f"{result[n].get(part, 0):>10.3f} s" for n in names))
    whole = {n: total(result[n]) for n in names}
    print(f"  {'whole step':<11}" + "".join(f"{whole[n]:>10.3f} s" for n in names))
    peaks = {n: round(result[f"{n}_peak_gb"], 1) for n in names}
    print("  " + json.dumps({"ratio": round(whole["trl"] / whole["r1v"], 2), "peak_gb": peaks}))


if __name__ == "__main__":
    main()
