"""The part of `r1v doctor` that needs torch: CUDA, the rows' lengths, memory, and the judge's own test.

`python -m r1vfree_cli.doctor.probe OUT.json [--stage grpo --recipe FILE]` writes a list of checks.
"""

import argparse
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig

from ..config import recipes
from ..config.embedded import resolve_model, with_seed
from ..config.rewards import FeedbackReward
from ..config.schema import GrpoRecipe, SftRecipe
from ..core.errors import R1VError
from ..core.files import write_json
from ..core.machine import library
from ..data.load import ensure_rows, load_rows
from ..launch.disk import GB, adapter_parameters
from ..models import family
from ..models.lengths import prompt_lengths
from ..models.load import attention, auto_class, load_processor
from .checks import ERROR, OK, WARNING, check, failed


def cuda_checks() -> list[dict]:
    if not torch.cuda.is_available():
        return [check("cuda", OK, f"not available to torch {torch.__version__}: CPU only")]
    checks = [check("cuda", OK, f"{torch.version.cuda}, torch {torch.__version__}")]
    for i in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(i)
        used = free <= 0.9 * total
        found = f"{torch.cuda.get_device_name(i)}, {free / GB:.0f} of {total / GB:.0f} GB free"
        checks.append(
            check(f"gpu {i}", WARNING if used else OK, found, "another process is using it" if used else None)
        )
    return checks


def length_check(recipe: GrpoRecipe | SftRecipe) -> tuple[dict, int]:
    """Prompt lengths (tokens) through the real processor as a histogram, and the longest that is kept."""
    lengths = sorted(prompt_lengths(_rows(recipe), load_processor(recipe.model, recipe.seed), recipe.policy_prompt))
    limit = recipe.data.max_prompt_tokens
    kept = [n for n in lengths if limit is None or n <= limit]
    above = f"{len(lengths) - len(kept)} above data.max_prompt_tokens {limit}"
    found = f"{len(lengths)} rows: {histogram(lengths)}; {above}"
    if not kept:
        return check("prompt tokens", ERROR, found, "raise data.max_prompt_tokens or lower model.max_pixels"), 0
    hint = "more than a tenth of the rows would be dropped" if len(kept) < 0.9 * len(lengths) else None
    return check("prompt tokens", WARNING if hint else OK, found, hint), kept[-1]


def _rows(recipe: GrpoRecipe | SftRecipe) -> Any:
    data = recipe.data
    return load_rows(str(ensure_rows(with_seed(data.path, recipe.seed), data.split)), data.split, data.limit)


def histogram(lengths: list[int]) -> str:
    """`low-high: count` over eight equal bins between the shortest and the longest of sorted `lengths`."""
    low, high = lengths[0], lengths[-1]
    width = max(1, -(-(high + 1 - low) // 8))
    counts = Counter((n - low) // width for n in lengths)
    return ", ".join(f"{low + b * width}-{low + (b + 1) * width - 1}: {c}" for b, c in sorted(counts.items()))


def memory_estimate(recipe: GrpoRecipe | SftRecipe, prompt_tokens: int) -> dict[str, float]:
    """GB a process holds at the peak of a step, by part; from the model's config alone, no weights are read.

    `host` is what `zero3-offload` keeps in host memory instead. AdamW in mixed precision as DeepSpeed keeps it: weights
    and gradients in the model's dtype, 32-bit master weights and two moments (ZeRO: Rajbhandari et al., 2020, section
    3.1); without DeepSpeed all are float32, and DDP's buckets hold the gradients once more. Not counted:
    fragmentation, vLLM.

    Raises DataError: the model's config cannot be read.
    """
    model = _weightless(recipe)
    config, launch, train, lora = model.config, recipe.launch, recipe.trl, recipe.model.lora
    size = 4 if recipe.model.dtype == "float32" else 2
    zero = launch.preset.startswith("zero")
    parts = _states(recipe, model)
    if isinstance(recipe, GrpoRecipe):
        new = train.get("max_completion_length") or 512  # TRL's default
        branches = recipe.train.prompts_per_device * recipe.train.num_generations
        prompts = recipe.train.prompts_per_device if recipe.train.shared_prefix else branches
        tokens, scored = prompts * prompt_tokens + branches * new, branches * new
        seen = branches * (prompt_tokens + new)
    else:
        prompts = train.get("per_device_train_batch_size", 8)
        tokens = scored = seen = prompts * prompt_tokens
    kept = train.get("gradient_checkpointing", True)
    text, vision = config.get_text_config(), config.vision_config
    queries = text.num_attention_heads * (
        getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    )
    # Qwen3 normalises queries, in 32 bits.
    wide = queries * (13 if any(name.endswith("q_norm.weight") for name, _ in model.named_parameters()) else 5)
    # Keys and values of all that a branch sees, repeated for each query head.
    repeated = 2 * seen * queries * size * (1 if kept else text.num_hidden_layers)
    parts["activations"] = tokens * _per_token(text, text.num_hidden_layers, 16, kept, wide) * size / 2 + repeated
    if not recipe.model.freeze_vision:
        patches = prompts * recipe.model.max_pixels / vision.patch_size**2
        parts["activations"] += patches * _per_token(vision, vision.depth, 31, kept) * size / 2
    # TRL's fused head works in chunks; one chunk of float32 logits and its gradient.
    parts["logits"] = min(scored, 1024) * text.vocab_size * 8
    if not lora:
        parts["logits"] += 4 * text.hidden_size * text.vocab_size  # it sums the head's gradient in 32 bits
    if not launch.on_cpu:
        # CUDA's context and NCCL; DeepSpeed's two buckets of 5e8 numbers.
        parts["runtime"] = 2 * GB + (2 * 5e8 * size if zero else 0)
    return {k: v / GB for k, v in parts.items()}


def _states(recipe: GrpoRecipe | SftRecipe, model: Any) -> dict[str, float]:
    """Bytes of weights, gradients, optimizer and reference policy."""
    total = trained = sum(p.numel() for p in model.parameters())
    lora, launch, train = recipe.model.lora, recipe.launch, recipe.trl
    if recipe.model.freeze_vision:
        trained -= sum(p.numel() for m in family.of(model.config).vision_modules(model) for p in m.parameters())
    held = 4 if recipe.weights_dtype == "float32" else 2
    stored: float = held
    if lora:
        trained = adapter_parameters(total, lora.r)
        stored = {"4bit": 0.5, "8bit": 1}.get(lora.quantize or "", held)
    zero = int(launch.preset[4]) if launch.preset.startswith("zero") else 0
    world = launch.processes
    copies = 1 if zero or world == 1 else 2
    parts = {
        "weights": stored * total / (world if zero == 3 else 1),
        "gradients": copies * held * trained / (world if zero >= 2 else 1),
        "optimizer": (12 if zero else 8) * trained / (world if zero >= 1 else 1),
    }
    if isinstance(recipe, GrpoRecipe) and train.get("beta", 0) and not lora:
        parts["reference"] = held * total / (world if zero == 3 else 1)
    if launch.preset == "zero3-offload":
        parts = {"host": sum(parts.values())}
    return parts


def _weightless(recipe: GrpoRecipe | SftRecipe) -> Any:
    family.use(recipe.model.family)
    with library(f"cannot read the config of model {recipe.model.name}"):
        where = resolve_model(recipe.model.name, recipe.seed)
        config = AutoConfig.from_pretrained(where, revision=recipe.model.revision)
        with torch.device("meta"):
            return auto_class(config).from_config(config)


def _per_token(config, layers: int, norms: int, checkpointing: bool, wide: int = 0) -> float:
    """Bytes a token (or patch) leaves for the backward pass of a tower in 16-bit numbers.

    A layer keeps four tensors as wide as its MLP, `norms` bytes a hidden unit and `wide` bytes for the rest: counted on
    the families' layers under saved-tensor hooks (tests/real/test_fake_gpu.py). With checkpointing it keeps its input,
    and one layer at a time all.
    """
    width = getattr(config, "embed_dim", None) or config.hidden_size  # Qwen2-VL's vision tower says embed_dim
    inner = getattr(config, "intermediate_size", None) or 4 * width
    whole = 8 * inner + norms * width + wide
    return 2 * width * layers + whole if checkpointing else whole * layers


def memory_check(recipe: GrpoRecipe | SftRecipe, prompt_tokens: int) -> dict:
    """The estimate against what the smallest visible GPU has."""
    parts = memory_estimate(recipe, prompt_tokens)
    need = sum(v for k, v in parts.items() if k != "host")
    found = f"about {need:.2g} GB a process: " + ", ".join(f"{k} {v:.2g}" for k, v in parts.items())
    if recipe.launch.on_cpu or not torch.cuda.is_available():
        return check("memory", OK, found)
    have = min(torch.cuda.mem_get_info(i)[1] for i in range(torch.cuda.device_count())) / GB
    hint = "launch.preset zero3 or zero3-offload, model.lora, a lower model.max_pixels or gradient_checkpointing"
    state = ERROR if need > have else WARNING if need > 0.85 * have else OK
    return check("memory", state, f"{found}; a GPU has {have:.0f}", hint if state == ERROR else None)


def judge_check(recipe: GrpoRecipe, url: str | None) -> list[dict]:
    """Each judge answers, and passes the recipe's canaries."""
    several = len(recipe.judges) > 1
    return [line for r in recipe.judges for line in _judge(recipe, r, f" {r.key}" if several else "", url)]


def _judge(recipe: GrpoRecipe, reward: FeedbackReward, which: str, url: str | None) -> list[dict]:
    from ..rewards import canaries
    from ..rewards.registry import build_feedback

    pixels, name = (recipe.model.min_pixels, recipe.model.max_pixels), f"canaries{which}"
    judge = build_feedback(reward, seed=recipe.seed, served_url=url, pixels=pixels)
    try:
        judge.probe()
        known = ", ".join(f"{k} {v}" for k, v in judge.identity().items() if v is not None)
        answers = check(f"judge{which}", OK, known)
        if reward.canaries is None:
            return [answers, check(name, WARNING, "turned off in the recipe: canaries: null")]
        report = canaries.check(judge, _rows(recipe), reward.canaries, recipe.seed, recipe.policy_prompt)
        return [answers, check(name, OK, "passed") if report.ok else failed(name, report.error())]
    finally:
        judge.close()


def main() -> None:
    """Write the checks that could be made; an `R1VError` of one becomes its line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("--stage", choices=["grpo", "sft"])
    parser.add_argument("--recipe", type=Path)
    parser.add_argument("--without-judge", action="store_true")
    parser.add_argument("--reward-url")
    args = parser.parse_args()
    checks = cuda_checks()
    if args.recipe:
        recipe = recipes.validate(args.stage, recipes.load_document(args.recipe), str(args.recipe))
        longest = recipe.data.max_prompt_tokens or 512
        asked = recipe if isinstance(recipe, GrpoRecipe) and not args.without_judge else None

        def lengths() -> list[dict]:
            nonlocal longest
            told, longest = length_check(recipe)
            return [told]

        parts = {
            "attention": lambda: [check("attention", OK, attention(recipe.model))],
            "prompt tokens": lengths,
            "memory": lambda: [memory_check(recipe, longest)],
            "judge": lambda: judge_check(asked, args.reward_url) if asked else [],
        }
        for name, part in parts.items():
            try:
                checks += part()
            except R1VError as e:
                checks.append(failed(name, e))
    write_json(args.out, checks)


if __name__ == "__main__":
    main()
