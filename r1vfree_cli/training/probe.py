"""The part of `r1v doctor` that needs torch: CUDA, the rows' lengths, memory, and the judge's own test.

`python -m r1vfree_cli.training.probe OUT.json [--stage grpo --recipe FILE]` writes a list of checks.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForImageTextToText

from .. import recipes
from ..config import GrpoRecipe, SftRecipe
from ..data.load import ensure_rows, load_rows
from ..embedded import resolve_model, with_seed
from ..errors import R1VError
from ..run_dir import write_json
from .common import attention, load_processor
from .lengths import prompt_lengths

GB = 1e9


def cuda_checks() -> list[dict]:
    """What torch sees of the GPUs."""
    if not torch.cuda.is_available():
        return [_check("cuda", "ok", f"not available to torch {torch.__version__}: CPU only")]
    checks = [_check("cuda", "ok", f"{torch.version.cuda}, torch {torch.__version__}")]
    for i in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(i)
        state = "ok" if free > 0.9 * total else "warning"
        found = f"{torch.cuda.get_device_name(i)}, {free / GB:.0f} of {total / GB:.0f} GB free"
        checks.append(_check(f"gpu {i}", state, found, "another process is using it" if state != "ok" else None))
    return checks


def length_check(recipe: GrpoRecipe | SftRecipe) -> tuple[dict, int]:
    """Prompt lengths (tokens) through the real processor as a histogram, and the longest that is kept."""
    path = with_seed(recipe.data.path, recipe.seed)
    rows = load_rows(str(ensure_rows(path, recipe.data.split)), recipe.data.split, recipe.data.limit)
    lengths = sorted(prompt_lengths(rows, load_processor(recipe.model, recipe.seed)))
    limit = recipe.data.max_prompt_tokens
    kept = [n for n in lengths if limit is None or n <= limit]
    found = (
        f"{len(lengths)} rows: {histogram(lengths)}; {len(lengths) - len(kept)} above data.max_prompt_tokens {limit}"
    )
    if not kept:
        return _check("prompt tokens", "error", found, "raise data.max_prompt_tokens or lower model.max_pixels"), 0
    many = len(kept) < 0.9 * len(lengths)
    hint = "more than a tenth of the rows would be dropped" if many else None
    return _check("prompt tokens", "warning" if many else "ok", found, hint), kept[-1]


def histogram(lengths: list[int], bins: int = 8) -> str:
    """`low-high: count` over equal bins between the shortest and the longest of sorted `lengths`."""
    low, high = lengths[0], lengths[-1]
    width = max(1, -(-(high + 1 - low) // bins))
    counts: dict[int, int] = {}
    for n in lengths:
        counts[(n - low) // width] = counts.get((n - low) // width, 0) + 1
    return ", ".join(f"{low + b * width}-{low + (b + 1) * width - 1}: {c}" for b, c in sorted(counts.items()))


def memory_estimate(recipe: GrpoRecipe | SftRecipe, prompt_tokens: int) -> dict[str, float]:
    """GB a GPU holds at the peak of a step, by part; from the model's config alone, no weights are read.

    AdamW in mixed precision as DeepSpeed keeps it: 16-bit weights and gradients, 32-bit master weights and two
    moments (ZeRO: Rajbhandari et al., 2020, section 3.1); without DeepSpeed the moments have the weights' dtype.
    Activations follow Korthikanti et al. (2022), 34 bytes a token, layer and hidden unit with 16-bit numbers and
    fused attention; with checkpointing 2.
    """
    config = AutoConfig.from_pretrained(resolve_model(recipe.model.name, recipe.seed), revision=recipe.model.revision)
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config)
    total = sum(p.numel() for p in model.parameters())
    trained = total
    if recipe.model.freeze_vision:
        trained -= sum(p.numel() for p in model.model.visual.parameters())
    if recipe.model.lora:
        trained = int(total * 0.01 * recipe.model.lora.r / 16)
    launch, train = recipe.launch, recipe.train.model_extra or {}
    size = 4 if recipe.model.dtype == "float32" else 2
    zero = int(launch.preset[4]) if launch.preset.startswith("zero") else 0
    world = launch.processes
    states = 12 if zero and size == 2 else 2 * size
    parts = {
        "weights": size * total / (world if zero == 3 else 1),
        "gradients": size * trained / (world if zero >= 2 else 1),
        "optimizer": states * trained / (world if zero >= 1 else 1),
    }
    if isinstance(recipe, GrpoRecipe) and train.get("beta", 0) and not recipe.model.lora:
        parts["reference"] = size * total / (world if zero == 3 else 1)
    if launch.preset == "zero3-offload":
        parts = dict.fromkeys(parts, 0.0)
    text = config.get_text_config()
    if isinstance(recipe, GrpoRecipe):
        new = train.get("max_completion_length", 256)
        branches = recipe.train.prompts_per_device * recipe.train.num_generations
        prompts = recipe.train.prompts_per_device if recipe.train.shared_prefix else branches
        tokens, scored = prompts * prompt_tokens + branches * new, branches * new
    else:
        tokens = scored = train.get("per_device_train_batch_size", 8) * prompt_tokens
    per_token = 2 if train.get("gradient_checkpointing", True) else 34
    parts["activations"] = tokens * text.hidden_size * text.num_hidden_layers * per_token * size / 2
    # TRL's fused head works in chunks; one chunk of float32 logits and its gradient.
    parts["logits"] = min(scored, 1024) * text.vocab_size * 8
    return {k: v / GB for k, v in parts.items()}


def memory_check(recipe: GrpoRecipe | SftRecipe, prompt_tokens: int) -> dict:
    """The estimate against what the smallest visible GPU has."""
    parts = memory_estimate(recipe, prompt_tokens)
    need = sum(parts.values())
    found = f"about {need:.2g} GB a process: " + ", ".join(f"{k} {v:.2g}" for k, v in parts.items())
    if recipe.launch.on_cpu or not torch.cuda.is_available():
        return _check("memory", "ok", found)
    have = min(torch.cuda.mem_get_info(i)[1] for i in range(torch.cuda.device_count())) / GB
    if need > have:
        hint = "launch.preset zero3 or zero3-offload, model.lora, a lower model.max_pixels or gradient_checkpointing"
        return _check("memory", "error", f"{found}; a GPU has {have:.0f}", hint)
    return _check("memory", "warning" if need > 0.85 * have else "ok", f"{found}; a GPU has {have:.0f}")


def judge_check(recipe: GrpoRecipe) -> list[dict]:
    """The judge answers, and passes the recipe's canaries."""
    from ..rewards import build_feedback, canaries

    if recipe.feedback is None:
        return []
    settings = recipe.feedback.canaries
    judge = build_feedback(recipe.feedback, seed=recipe.seed)
    try:
        judge.probe()
        checks = [_check("judge", "ok", ", ".join(f"{k} {v}" for k, v in judge.identity().items() if v is not None))]
        if settings is None:
            return [*checks, _check("canaries", "warning", "turned off in the recipe: canaries: null")]
        path = with_seed(recipe.data.path, recipe.seed)
        rows = load_rows(str(ensure_rows(path, recipe.data.split)), recipe.data.split, recipe.data.limit)
        report = canaries.check(judge, rows, settings, recipe.seed)
        found = "passed" if report.ok else " | ".join(report.lines)
        return [*checks, _check("canaries", "ok" if report.ok else "error", found)]
    finally:
        judge.close()


def _check(name: str, state: str, found: str, hint: str | None = None) -> dict:
    return {"name": name, "state": state, "found": found, "hint": hint}


def main() -> None:
    """Write the checks that could be made; an `R1VError` of one becomes its line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("--stage", choices=["grpo", "sft"])
    parser.add_argument("--recipe", type=Path)
    args = parser.parse_args()
    checks = cuda_checks()
    if args.recipe:
        recipe = recipes.validate(args.stage, recipes.load_document(args.recipe), str(args.recipe))
        longest = 512

        def lengths() -> list[dict]:
            nonlocal longest
            check, longest = length_check(recipe)
            return [check]

        parts = {
            "attention": lambda: [_check("attention", "ok", attention(recipe.model))],
            "prompt tokens": lengths,
            "memory": lambda: [memory_check(recipe, longest)],
            "judge": lambda: judge_check(recipe) if isinstance(recipe, GrpoRecipe) else [],
        }
        for name, part in parts.items():
            try:
                checks += part()
            except R1VError as e:
                checks.append(_check(name, "error", " | ".join([e.message, *e.details]), e.hint))
    write_json(args.out, checks)


if __name__ == "__main__":
    main()
