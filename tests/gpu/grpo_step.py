"""A GRPO step with real Qwen2.5-VL shapes on one GPU, r1v against TRL: `python -m tests.gpu.grpo_step`.

Random weights, drawn images, nothing is downloaded. All weights are trained, completions end at different lengths, and
no layer is computed twice unless `--checkpointing` asks for it. First it checks that the captured decoding step takes
the tokens of the uncaptured one. Then each trainer's seconds and peak memory by part, the distinct attention shapes of
a step (a library that plans by shape plans each anew) and the kernels of one decoded token; TRL with vLLM too, where
vLLM is installed. One JSON document with `--out`.
"""

from __future__ import annotations

import argparse
import gc
import importlib.metadata
import importlib.util
import json
import random
import tempfile
import time
from pathlib import Path

import torch
from peft import LoraConfig
from torch.profiler import ProfilerActivity, profile
from transformers import LogitsProcessor, LogitsProcessorList, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

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
VISION = {"depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16}
FIRST_WORD = 60  # the first token of branch r is FIRST_WORD + r: ordinary text, and the branch's name
ENGINES = {
    "trl": {"shared": False},
    "r1v": {"shared": True},
    "trl-vllm": {"shared": False, "use_vllm": True, "vllm_mode": "colocate", "vllm_gpu_memory_utilization": 0.2},
}
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def write_model(folder: Path, size: str) -> None:
    processor = tiny_processor("qwen2_5_vl", max_pixels=4096 * 4096)
    ids = processor.tokenizer.convert_tokens_to_ids
    tiny = size == "tiny"
    text = SIZES[size] | {
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}
        | {"mrope_section": [8, 12, 12] if tiny else [16, 24, 24]},
        "bos_token_id": ids("<|endoftext|>"),
        "eos_token_id": ids("<|im_end|>"),
    }
    vision = VISION | (
        {"depth": 4, "fullatt_block_indexes": [1, 3]} if tiny else {"fullatt_block_indexes": [7, 15, 23, 31]}
    )
    config = Qwen2_5_VLConfig(
        text_config=text,
        vision_config=vision | {"out_hidden_size": text["hidden_size"]},
        image_token_id=ids("<|image_pad|>"),
        video_token_id=ids("<|video_pad|>"),
        vision_start_token_id=ids("<|vision_start|>"),
        vision_end_token_id=ids("<|vision_end|>"),
        tie_word_embeddings=size != "7b",
    )
    torch.set_default_dtype(torch.bfloat16)
    with torch.device(DEVICE):
        model = Qwen2_5_VLForConditionalGeneration(config)
    torch.set_default_dtype(torch.float32)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    del model
    clear()


def clear() -> None:
    gc.collect()
    if DEVICE == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


class EndAt(LogitsProcessor):
    """Each branch's completion has the length that is written for it, whatever else leaves the batch before it."""

    def __init__(self, lengths: list[int], end: int) -> None:
        self.lengths, self.end, self.width = torch.tensor(lengths, device=DEVICE), end, 0

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if len(input_ids) == len(self.lengths) and (not self.width or input_ids.shape[1] <= self.width):
            self.width = input_ids.shape[1]  # the first step of a call: name the branches
            names = FIRST_WORD + torch.arange(len(scores), device=DEVICE)
            return torch.full_like(scores, -torch.inf).scatter_(1, names[:, None], 0.0)
        last = input_ids.shape[1] - self.width + 1 >= self.lengths[input_ids[:, self.width] - FIRST_WORD]
        only_end = torch.full_like(scores, -torch.inf)
        only_end[:, self.end] = 0.0
        scores = scores.clone()
        scores[:, self.end] = -torch.inf
        return torch.where(last[:, None], only_end, scores)


def uneven(steps: Steps, lengths: list[int]) -> EndAt:
    """Let the trainer's completions end where `lengths` says."""
    trainer = steps.trainer
    ends = EndAt(lengths, trainer.processing_class.tokenizer.convert_tokens_to_ids("<|im_end|>"))
    sample = trainer.model.generate

    def ended(*args, **kwargs):
        ends.width = 0
        return sample(*args, logits_processor=LogitsProcessorList([ends]), **kwargs)

    trainer.model.generate = ended
    trainer.generation_config.min_new_tokens = None
    return ends


def with_memory(steps: Steps) -> dict[str, float]:
    """GB at the peak of each part of the steps that follow."""
    parts, peaks = steps.parts, {}
    switch = parts._switch

    def measured() -> None:
        if parts._stack:
            name = parts._stack[-1]
            peaks[name] = max(peaks.get(name, 0.0), round(torch.cuda.max_memory_allocated() / 1e9, 1))
        torch.cuda.reset_peak_memory_stats()
        switch()

    if DEVICE == "cuda":
        parts._switch = measured
    return peaks


def attention_shapes(steps: Steps) -> int:
    """Distinct (queries, keys) shapes that attention kernels are called with in one step."""
    shapes, attention = set(), torch.nn.functional.scaled_dot_product_attention

    def seen(q, k, *args, **kwargs):
        shapes.add((tuple(q.shape), tuple(k.shape)))
        return attention(q, k, *args, **kwargs)

    torch.nn.functional.scaled_dot_product_attention = seen
    try:
        steps.step()
    finally:
        torch.nn.functional.scaled_dot_product_attention = attention
    return len(shapes)


def kernels_a_token(steps: Steps, ends: EndAt, few: int = 8, many: int = 16) -> dict[str, float]:
    """Kernels that run, and launches by the host, for each further decoded token of a batch."""
    counts = []
    for new in (few, many):
        ends.lengths = torch.full_like(ends.lengths, new)
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as seen:
            generate(steps)
        events = seen.events()
        kernels = sum(e.device_type == torch.autograd.DeviceType.CUDA for e in events)
        launches = sum(e.name.startswith(("cudaLaunchKernel", "cuLaunchKernel", "cudaGraphLaunch")) for e in events)
        counts.append((kernels, launches))
    return {
        name: (counts[1][i] - counts[0][i]) / (many - few) for i, name in enumerate(("kernels", "launches by the host"))
    }


def generate(steps: Steps) -> list[list[int]]:
    """The completions of one call of the trainer's sampler, at the same random numbers each time."""
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


def check_graph(make) -> str:
    """The captured step against the plain one, in f32: at the same random numbers, the same tokens."""
    captured = generate(make())
    graphed = shared_prefix_decode._GraphedStep
    shared_prefix_decode._GraphedStep = shared_prefix_decode._Step
    try:
        plain = generate(make())
    finally:
        shared_prefix_decode._GraphedStep = graphed
    same = sum(a == b for a, b in zip(captured, plain, strict=True))
    if same != len(plain):
        raise SystemExit(f"captured decoding: only {same} of {len(plain)} completions are those of the uncaptured one")
    return f"{same} of {len(plain)}"


def measure(make, lengths: list[int], repeats: int) -> dict:
    """Seconds and memory of a trainer's step, or what stopped it."""
    try:
        steps = make()
        ends = uneven(steps, lengths)
        shapes = attention_shapes(steps)  # and a warm-up
        clear()
        peaks = with_memory(steps)
        runs = [steps.timed() for _ in range(repeats)]
        seconds = min(runs, key=total)
        return {
            "seconds": {k: round(v, 3) for k, v in seconds.items()},
            "step": round(total(seconds), 3),
            "steps": [round(total(run), 3) for run in runs],
            "peak_gb": max(peaks.values(), default=0.0),
            "peak_gb_by_part": dict(peaks),
            "attention_shapes": shapes,
            "a decoded token": kernels_a_token(steps, ends) if DEVICE == "cuda" else {},
        }
    except torch.cuda.OutOfMemoryError:
        return {"stopped": "out of memory"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split(":")[0])
    parser.add_argument("--size", choices=SIZES, default="3b")
    parser.add_argument("--side", type=int, default=616, help="pixels; 616 are 484 visual tokens")
    parser.add_argument("--tokens", type=int, default=256, help="of the longest completion; the shortest has an eighth")
    parser.add_argument("--completions", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--lora", action="store_true", help="train an adapter instead of all weights")
    parser.add_argument("--checkpointing", action="store_true", help="gradient checkpointing")
    parser.add_argument("--model", type=Path, help="folder for the weights, to use them again")
    parser.add_argument("--out", type=Path, help="a file for the results as JSON")
    args = parser.parse_args()
    begin = time.monotonic()
    folder = args.model or Path(tempfile.mkdtemp())
    if not (folder / "config.json").exists():
        write_model(folder, args.size)
    tiny = Path(tempfile.mkdtemp())
    write_model(tiny, "tiny")
    branches = PROMPTS * args.completions
    lengths = torch.linspace(args.tokens / 8, args.tokens, branches).round().int().tolist()
    random.Random(0).shuffle(lengths)

    def steps(new: int, **options) -> Steps:
        return Steps(
            folder,
            args.side,
            new,
            args.completions,
            peft_config=LoraConfig(r=16, target_modules=["q_proj", "k_proj", "v_proj"]) if args.lora else None,
            gradient_checkpointing=args.checkpointing,
            bf16=DEVICE == "cuda",
            model_dtype=torch.bfloat16,
            **options,
        )

    result = {
        "device": torch.cuda.get_device_name() if DEVICE == "cuda" else "cpu",
        "versions": {n: importlib.metadata.version(n) for n in ("torch", "transformers", "trl", "accelerate")},
        "case": {k: v for k, v in vars(args).items() if k not in ("model", "out")} | {"lengths": lengths},
        "captured decoding": check_graph(lambda: Steps(tiny, 448, 32, 4, shared=True, model_dtype=torch.float32)),
    }
    clear()
    # One after the other: two trainers of a large model do not fit side by side.
    for name, options in ENGINES.items():
        print(f"{name} after {time.monotonic() - begin:.0f} s", flush=True)
        if name == "trl-vllm" and not importlib.util.find_spec("vllm"):
            result[name] = {"stopped": "vllm is not installed"}
            continue
        result[name] = measure(lambda o=options: steps(args.tokens, **o), lengths, args.repeats)
        if args.out:  # what is there is kept, should the next one fail
            args.out.write_text(json.dumps(result, indent=1))
        clear()
    result["minutes"] = round((time.monotonic() - begin) / 60, 1)
    if args.out:
        args.out.write_text(json.dumps(result, indent=1))
    show(result)


def show(result: dict) -> None:
    print(f"{result['device']}: {json.dumps(result['case'])}\n{json.dumps(result['versions'])}")
    print(f"captured decoding: {result['captured decoding']} completions are those of the uncaptured one")
    print("  " + "".join(f"{n:>22}" for n in ("part", *ENGINES)))
    for part in (*PARTS, "step"):
        cells = []
        for name in ENGINES:
            found = result[name]
            seconds = found.get("step") if part == "step" else found.get("seconds", {}).get(part)
            gb = found.get("peak_gb" if part == "step" else "peak_gb_by_part", 0)
            gb = gb if part == "step" else (gb or {}).get(part, 0)
            cells.append("-" if seconds is None else f"{seconds:.3f} s {gb:5.1f} GB")
        print("  " + "".join(f"{cell:>22}" for cell in (part, *cells)))
    for name in ENGINES:
        rest = {
            k: v for k, v in result[name].items() if k in ("stopped", "attention_shapes", "a decoded token", "steps")
        }
        print(f"  {name}: {json.dumps(rest)}")
    if "step" in result["trl"] and "step" in result["r1v"]:
        print(f"  r1v takes 1/{result['trl']['step'] / result['r1v']['step']:.2f} of TRL's time")
    print(f"  {result['minutes']} minutes in all")


if __name__ == "__main__":
    main()
