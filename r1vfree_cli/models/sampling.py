"""Sampling that the recipe owns: pinned generation settings, tokens never sampled, draws that no layout changes."""

from __future__ import annotations

from contextlib import contextmanager
from unittest.mock import patch

import numpy as np
import torch
from transformers import GenerationConfig

# A Qwen-VL vocabulary's tokens that stand for image or video input. One of them in a completion would be taken for
# an image that is not there.
VISION_TOKENS = ("<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>")
VISION_ID_FIELDS = (
    "image_token_id",
    "video_token_id",
    "vision_start_token_id",
    "vision_end_token_id",
    "vision_token_id",
)


def pin_generation(model, tokenizer) -> None:
    """Replace the checkpoint's generation config by end, begin and padding tokens alone.

    Published Qwen-VL checkpoints carry near-greedy sampling (`temperature` 1e-6, `top_k` 1), and transformers fills
    every field that is left open from there. End tokens: the tokenizer's and all that the checkpoint declares.
    """
    ends = model.generation_config.eos_token_id
    ends = [] if ends is None else [ends] if isinstance(ends, int) else list(ends)
    if tokenizer.eos_token_id is not None and tokenizer.eos_token_id not in ends:
        ends.insert(0, tokenizer.eos_token_id)
    model.generation_config = GenerationConfig(
        eos_token_id=ends,
        pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
        bos_token_id=model.generation_config.bos_token_id,
    )


def vision_tokens(config, tokenizer) -> dict[str, int]:
    """Token -> id of everything that stands for visual input: by the config's fields and by Qwen's names."""
    found = {}
    for name in VISION_ID_FIELDS:
        number = getattr(config, name, None)
        if isinstance(number, int) and 0 <= number < len(tokenizer):
            found[tokenizer.convert_ids_to_tokens(number)] = number
    vocabulary = tokenizer.get_vocab()
    return found | {t: vocabulary[t] for t in VISION_TOKENS if t in vocabulary}


def never_sampled(config, tokenizer, *, use_vllm: bool) -> dict[str, list]:
    """Generation settings that forbid visual tokens, in the words of transformers or of vLLM."""
    tokens = vision_tokens(config, tokenizer)
    if use_vllm:
        return {"bad_words": sorted(tokens)}
    return {"suppress_tokens": sorted(set(tokens.values()))}


def merge_generation_kwargs(given: dict | None, forbidden: dict[str, list]) -> dict:
    """The recipe's `generation_kwargs` with the forbidden tokens added to its own."""
    merged = dict(given or {})
    for key, values in forbidden.items():
        merged[key] = sorted({*(merged.get(key) or []), *values})
    return merged


@contextmanager
def keyed_draws(key: tuple[int, ...], *, first: int, rows: int, tokens: int):
    """While active, `torch.multinomial(probs, 1)` draws row i's t-th token by a number that only (key, i, t) decides.

    So a rollout depends on the seed, the step and its place in the global batch, not on how many processes share the
    work or on what was drawn before: 1 and N processes sample the same completions, and a resumed run those of an
    uninterrupted one. The distribution is unchanged: inverse transform sampling with independent uniform numbers.
    It is a patch of the module's function because generation offers no place to pass random numbers in; a
    `TorchFunctionMode` would do the same and slow every small operation of the decode loop.

    Args:
        key: integers, such as (seed, step, micro-step).
        first: number of this process's first row in the global batch.
        rows, tokens: how many rows and draws a row there can be.
    """
    # A bound below 1 keeps u * total below total, so that a last token with probability 0 is never chosen.
    uniform = np.stack([np.random.default_rng([*key, first + i]).random(tokens) for i in range(rows)])
    uniform = uniform.clip(max=1 - 2.0**-40)  # [rows, tokens]
    draws = 0

    def multinomial(probs: torch.Tensor, num_samples: int, *args, **kwargs) -> torch.Tensor:
        nonlocal draws
        if num_samples != 1 or probs.dim() != 2 or probs.shape[0] != rows:
            raise ValueError(
                f"keyed draws need one token for each of {rows} rows, found probabilities of shape "
                f"{tuple(probs.shape)} and {num_samples} draws"
            )
        # Generation may run a step further than asked before it sees that it is done; that token is thrown away.
        u = torch.as_tensor(uniform[:, min(draws, tokens - 1)], device=probs.device)[:, None]
        draws += 1
        cumulative = probs.double().cumsum(-1)  # [rows, vocabulary]
        index = torch.searchsorted(cumulative, u * cumulative[:, -1:], right=True)
        return index.clamp_(max=probs.shape[1] - 1)

    with patch.object(torch, "multinomial", multinomial):
        yield
