"""Sampling that the recipe owns: pinned generation settings, tokens never sampled, draws that no layout changes."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch
from weakref import WeakKeyDictionary

import numpy as np
import torch
from transformers import GenerationConfig

from . import family as families


def end_tokens(model, tokenizer) -> list[int]:
    """Ids that end a reply: the tokenizer's end token, all that the checkpoint declares, and those of its family."""
    declared = model.generation_config.eos_token_id
    ends = [declared] if isinstance(declared, int) else list(declared or ())
    if tokenizer.eos_token_id not in (None, *ends):
        ends.insert(0, tokenizer.eos_token_id)
    vocabulary = tokenizer.get_vocab()
    of_family = [vocabulary[t] for t in families.of(model.config).end_tokens if t in vocabulary]
    return list(dict.fromkeys(ends + of_family))


def pin_generation(model, tokenizer, **sampling: Any) -> None:
    """Replace the checkpoint's generation config by end, begin and padding tokens, and `sampling`.

    Published Qwen-VL checkpoints carry near-greedy sampling (`temperature` 1e-6, `top_k` 1), and transformers fills
    every field that is left open from there.
    """
    model.generation_config = GenerationConfig(
        eos_token_id=end_tokens(model, tokenizer),
        pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
        bos_token_id=model.generation_config.bos_token_id,
        **sampling,
    )


def never_sampled(config, tokenizer, *, use_vllm: bool) -> dict[str, list]:
    """Generation settings that forbid visual tokens, in the words of transformers or of vLLM."""
    tokens = families.of(config).visual_tokens(config, tokenizer)
    if use_vllm:
        return {"bad_words": sorted(tokens)}
    return {"suppress_tokens": sorted(set(tokens.values()))}


def merge_generation_kwargs(given: dict | None, forbidden: dict[str, list]) -> dict:
    """The recipe's `generation_kwargs` with the forbidden tokens added to its own."""
    merged = dict(given or {})
    return merged | {key: sorted({*(merged.get(key) or []), *values}) for key, values in forbidden.items()}


class KeyedDraws:
    """`torch.multinomial(probs, 1)` with row i's t-th token drawn by a number that only (key, i, t) decides.

    So 1 and N processes sample the same completions, and a resumed run those of an uninterrupted one. The distribution
    is unchanged: inverse transform sampling with independent uniform numbers.

    key: integers, such as (seed, step, micro-step). rows: this process's places in the global batch. tokens: how many
    draws a row there can be.
    """

    def __init__(self, key: tuple[int, ...], rows: Sequence[int], tokens: int) -> None:
        uniform = np.stack([np.random.default_rng([*key, row]).random(tokens) for row in rows])
        # A bound below 1 keeps u * total below total, so that a last token with probability 0 is never chosen.
        self._uniform = torch.from_numpy(uniform.clip(max=1 - 2.0**-40))  # [rows, tokens]
        self._drawn = 0

    def __call__(self, probs: torch.Tensor, num_samples: int, *args: Any, **kwargs: Any) -> torch.Tensor:
        rows = len(self._uniform)
        if num_samples != 1 or probs.dim() != 2 or probs.shape[0] != rows:
            found = f"probabilities of shape {tuple(probs.shape)} and {num_samples} draws"
            raise ValueError(f"keyed draws need one token for each of {rows} rows, found {found}")
        return self.of(probs, torch.arange(rows, device=probs.device))[:, None]

    def of(self, probs: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """The next tokens (b,) of the `rows` (b,) that are left, by their probabilities (b, V)."""
        self._uniform = self._uniform.to(probs.device)
        # Generation may run a step further than asked before it sees that it is done; that token is thrown away.
        u = self._uniform[rows, min(self._drawn, self._uniform.shape[1] - 1)][:, None]
        self._drawn += 1
        cumulative = probs.double().cumsum(-1)  # [b, V]
        index = torch.searchsorted(cumulative, u * cumulative[:, -1:], right=True)
        return index.clamp_(max=probs.shape[1] - 1)[:, 0]


@contextmanager
def keyed_draws(key: tuple[int, ...], rows: Sequence[int], tokens: int) -> Iterator[None]:
    """While active, `torch.multinomial` and `draw` are `KeyedDraws`.

    A patch of the module's function because generation offers no place to pass random numbers in; a `TorchFunctionMode`
    would slow every small operation of the decode loop.
    """
    with patch.object(torch, "multinomial", KeyedDraws(key, rows, tokens)):
        yield


def draw(probs: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """A token (b,) for each of the `rows` (b,) that are left of a batch, by their probabilities (b, V)."""
    if isinstance(torch.multinomial, KeyedDraws):
        return torch.multinomial.of(probs, rows)
    return torch.multinomial(probs, num_samples=1)[:, 0]


def usable(outputs: torch.Tensor) -> torch.Tensor:
    """Where a model's outputs (..., V) say anything (..., 1): finite, and not all alike.

    A state that overflows is infinite for its norm, which divides all by infinity: zeros, and token 0 again and again.
    """
    low, high = outputs.detach().aminmax(dim=-1, keepdim=True)  # NaN where any of them is
    spread = high.float() - low.float()
    return (spread > 0) & (spread < torch.inf)


class LogitsWatch:
    """Whether the logits were `usable`; kept on the device, so that no step waits for the answer."""

    def __init__(self, device: torch.device) -> None:
        self._bad = torch.zeros((), dtype=torch.bool, device=device)

    def _look(self, module, inputs, logits: torch.Tensor) -> torch.Tensor:
        good = usable(logits)
        self._bad.logical_or_(~good.all())  # in place: a captured graph repeats it
        # A GPU's sampler would end the process at a NaN. What is drawn from these zeros is thrown away.
        return logits.masked_fill(~good, 0)

    @property
    def usable(self) -> bool:
        """The answer so far; waits for the device."""
        return not self._bad.item()


_watches: WeakKeyDictionary[Any, LogitsWatch] = WeakKeyDictionary()


@contextmanager
def watch_logits(model) -> Iterator[LogitsWatch]:
    """While active, notice logits of `model` that are NaN, infinite or all alike, from whatever loop generates with it.

    Else a NaN becomes the last token of the vocabulary or token 0, again and again, and that is scored as a reply.
    """
    head = model.get_output_embeddings()
    # One for the model's life: a captured decoding step goes on writing to it.
    watch = _watches.setdefault(head, LogitsWatch(head.weight.device))
    watch._bad.zero_()
    handle = head.register_forward_hook(watch._look)
    try:
        yield watch
    finally:
        handle.remove()
