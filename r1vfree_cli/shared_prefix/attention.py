"""Attention for groups of completions that share a prompt: the prompt's keys and values are held once.

It is reached through transformers' attention interface, so no model class is patched: the text part's implementation
is registered under a name of its own, and behaves as the original until a call passes `shared_prefix=` (a
`PackedLayout` or a `BranchCache`), which travels to every layer with the other keyword arguments.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

PREFIX = "r1v_shared_prefix_over_"


@dataclass
class Segment:
    """One group inside a packed row: its prompt tokens, then its branches.

    start: index of the group's first token in the row.
    prompt: number of prompt tokens; every branch sees all of them.
    lengths: number of tokens of each branch, in the order in which they follow the prompt.
    """

    start: int
    prompt: int
    lengths: list[int] = field(default_factory=list)

    @property
    def end(self) -> int:
        return self.start + self.prompt + sum(self.lengths)


class Layout:
    """What travels to every layer as `shared_prefix=`, and counts the layers that it reached."""

    layers_seen = 0

    def attend(self, module, query, key, value, dropout: float, scaling: float | None) -> torch.Tensor:
        raise NotImplementedError

    def assert_used(self, layers: int) -> None:
        """Raise when a forward pass did not go through this layout in each of its `layers` text layers."""
        if self.layers_seen != layers:
            raise RuntimeError(
                f"shared-prefix attention ran in {self.layers_seen} of {layers} layers: the model's attention "
                "implementation was changed after the trainer was built"
            )


@dataclass
class PackedLayout(Layout):
    """Which tokens of a packed row see which: a prompt sees itself, a branch sees its prompt and itself, causally.

    Branches of unequal length are padded to the longest of their group inside attention only; the padding lies behind
    the branch's own tokens, so causality hides it.
    """

    segments: list[Segment]
    device: torch.device
    _masks: list[torch.Tensor | None] = field(default_factory=list)
    _scatter: list[torch.Tensor | None] = field(default_factory=list)
    _gather: list[torch.Tensor | None] = field(default_factory=list)

    def __post_init__(self) -> None:
        for seg in self.segments:
            if not seg.lengths:
                self._masks.append(None)
                self._scatter.append(None)
                self._gather.append(None)
                continue
            width, count = max(seg.lengths), len(seg.lengths)
            own = torch.ones(width, width, dtype=torch.bool, device=self.device).tril()  # (C, C)
            self._masks.append(torch.cat([own.new_ones(width, seg.prompt), own], dim=1))  # (C, P + C)
            if min(seg.lengths) == width:
                self._scatter.append(None)
                self._gather.append(None)
                continue
            lengths = torch.tensor(seg.lengths)
            inside = torch.arange(width)[None] < lengths[:, None]  # (G, C)
            flat = torch.zeros(count, width, dtype=torch.long)
            flat[inside] = torch.arange(int(lengths.sum()))  # padding repeats the first token; nobody sees it
            self._scatter.append(flat.view(-1).to(self.device))
            self._gather.append(inside.view(-1).nonzero()[:, 0].to(self.device))

    def attend(self, module, query, key, value, dropout: float, scaling: float | None) -> torch.Tensor:
        """Attention output (1, L, H, D) for query (1, H, L, D), key and value (1, Hkv, L, D)."""
        self.layers_seen += 1
        heads = query.shape[1] // key.shape[1]
        outputs = []
        for seg, mask, scatter, gather in zip(self.segments, self._masks, self._scatter, self._gather, strict=True):
            middle = seg.start + seg.prompt
            prompt_k, prompt_v = (x[:, :, seg.start : middle] for x in (key, value))
            if seg.prompt:
                out = F.scaled_dot_product_attention(
                    query[:, :, seg.start : middle],
                    repeat_heads(prompt_k, heads),
                    repeat_heads(prompt_v, heads),
                    dropout_p=dropout,
                    scale=scaling,
                    is_causal=True,
                )
                outputs.append(out[0].transpose(0, 1))  # (P, H, D)
            if mask is None:
                continue
            count = len(seg.lengths)
            branch_q, branch_k, branch_v = (
                _fold(x[0, :, middle : seg.end], count, scatter) for x in (query, key, value)
            )  # (G, H or Hkv, C, D)
            out = F.scaled_dot_product_attention(
                branch_q,
                repeat_heads(torch.cat([prompt_k.expand(count, -1, -1, -1), branch_k], dim=2), heads),
                repeat_heads(torch.cat([prompt_v.expand(count, -1, -1, -1), branch_v], dim=2), heads),
                attn_mask=mask,
                dropout_p=dropout,
                scale=scaling,
            )
            out = out.transpose(1, 2).flatten(0, 1)  # (G * C, H, D)
            outputs.append(out if gather is None else out.index_select(0, gather))
        return torch.cat(outputs)[None]


def _fold(x: torch.Tensor, count: int, scatter: torch.Tensor | None) -> torch.Tensor:
    """(H, tokens of all branches, D) to (G, H, C, D)."""
    if scatter is not None:
        x = x.index_select(1, scatter)
    return x.unflatten(1, (count, -1)).transpose(0, 1)


def repeat_heads(x: torch.Tensor, times: int) -> torch.Tensor:
    """(B, Hkv, L, D) to (B, Hkv * times, L, D), each head repeated in place, as grouped-query attention needs."""
    return x if times == 1 else x.repeat_interleave(times, dim=1)


def as_used(key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """A key in the type of its value: under autocast rotation leaves it in float32, and every product casts it again."""
    return key.to(value.dtype)


class PromptCache:
    """A cache that only records: the keys and values of a packed row of prompts, per layer."""

    def __init__(self) -> None:
        self.layers: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def update(self, key, value, layer_idx: int, *args: Any, **kwargs: Any):
        self.layers[layer_idx] = (as_used(key, value), value)
        return key, value

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0


class BranchCache(Layout):
    """Keys and values while decoding: the prompts' once per group, the branches' own in buffers of full length.

    Args:
        prompts: the recorded prompts of a packed row with the segments `segments`.
        sizes: how many branches each prompt has; branches are in the order of the prompts.
        max_new: how many tokens a branch can hold.
        static: every step has the same shapes, over the whole buffers with a mask, as a CUDA graph needs.
    """

    def __init__(
        self, prompts: PromptCache, segments: list[Segment], sizes: Sequence[int], max_new: int, *, static: bool = False
    ) -> None:
        self.length = 0  # tokens stored per branch before the current step
        self.max_new = max_new
        self.static = static
        self.sizes = list(sizes)
        self.uniform = len(set(sizes)) == 1
        first = prompts.layers[0][0]
        longest = max(seg.prompt for seg in segments)
        self.prompt: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        for layer, pair in prompts.layers.items():
            padded = []
            for x in pair:  # (1, Hkv, L, D)
                out = x.new_zeros(len(segments), x.shape[1], longest, x.shape[3])
                for i, seg in enumerate(segments):
                    out[i, :, : seg.prompt] = x[0, :, seg.start : seg.start + seg.prompt]
                padded.append(out)
            self.prompt[layer] = (padded[0], padded[1])
        self.mask: torch.Tensor | None = None  # (N, 1, 1, P), -inf at padding
        if any(seg.prompt != longest for seg in segments):
            lengths = torch.tensor([seg.prompt for seg in segments], device=first.device)
            hidden = torch.arange(longest, device=first.device)[None] >= lengths[:, None]
            self.mask = torch.zeros(hidden.shape, device=first.device).masked_fill_(hidden, -torch.inf)[:, None, None]
        self.slots: torch.Tensor | None = None  # place of each branch in a (N, largest group) grid
        if not self.uniform:
            widest = max(sizes)
            places = [i * widest + j for i, size in enumerate(sizes) for j in range(size)]
            self.slots = torch.tensor(places, device=first.device)
        self.branch: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self.at = torch.zeros(1, dtype=torch.long, device=first.device)
        self.ahead = torch.zeros(max_new, device=first.device)  # static: -inf at tokens still to come

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.length

    def advance(self, length: int) -> None:
        """Begin the step of a token that comes after `length` others of its branch."""
        self.length = length
        if self.static:
            self.at.fill_(length)
            self.ahead.zero_()[length + 1 :] = -torch.inf

    def update(self, key, value, layer_idx: int, *args: Any, **kwargs: Any):
        """Store the step's key and value (B, Hkv, 1, D)."""
        key = as_used(key, value)
        if layer_idx not in self.branch:
            batch, heads, _, dim = key.shape
            self.branch[layer_idx] = (
                key.new_zeros(batch, heads, self.max_new, dim),
                value.new_zeros(batch, heads, self.max_new, dim),
            )
        for buffer, x in zip(self.branch[layer_idx], (key, value), strict=True):
            if self.static:
                buffer.index_copy_(2, self.at, x)
            else:
                buffer[:, :, self.length] = x[:, :, 0]
        return key, value

    def attend(self, module, query, key, value, dropout: float, scaling: float | None) -> torch.Tensor:
        """Attention output (B, 1, H, D) of one new token per branch; query (B, H, 1, D)."""
        self.layers_seen += 1
        batch, heads, _, dim = query.shape
        prompt_k, prompt_v = self.prompt[module.layer_idx]  # (N, Hkv, P, D)
        kv_heads = prompt_k.shape[1]
        stop = self.max_new if self.static else self.length + 1
        branch_k, branch_v = (x[:, :, :stop] for x in self.branch[module.layer_idx])  # (B, Hkv, t, D)
        scale = dim**-0.5 if scaling is None else scaling
        query = (query * scale).view(batch, kv_heads, heads // kv_heads, dim)  # (B, Hkv, R, D)
        own = query @ branch_k.transpose(2, 3)  # (B, Hkv, R, t)
        if self.static:
            own = own + self.ahead
        shared = self._to_groups(query) @ prompt_k.transpose(2, 3)  # (N, Hkv, G * R, P)
        if self.mask is not None:
            shared = shared + self.mask
        scores = torch.cat([self._to_rows(shared, batch), own], dim=-1)  # (B, Hkv, R, P + t)
        weights = torch.softmax(scores, dim=-1, dtype=torch.float32).to(branch_v.dtype)
        on_prompt, on_own = weights.split([prompt_k.shape[2], stop], dim=-1)
        out = self._to_rows(self._to_groups(on_prompt) @ prompt_v, batch) + on_own @ branch_v
        return out.reshape(batch, 1, heads, dim)

    def _to_groups(self, x: torch.Tensor) -> torch.Tensor:
        """(B, Hkv, R, X) to (N, Hkv, G * R, X): the branches of a prompt side by side, to use its keys once."""
        if self.slots is not None:
            grid = x.new_zeros(len(self.sizes) * max(self.sizes), *x.shape[1:])
            x = grid.index_copy(0, self.slots, x)
        return x.unflatten(0, (len(self.sizes), -1)).transpose(1, 2).flatten(2, 3)

    def _to_rows(self, x: torch.Tensor, batch: int) -> torch.Tensor:
        """The reverse of `_to_groups`."""
        x = x.unflatten(2, (max(self.sizes), -1)).transpose(1, 2).flatten(0, 1)
        return x if self.slots is None else x.index_select(0, self.slots)


def _attention(
    module, query, key, value, attention_mask, dropout=0.0, scaling=None, shared_prefix=None, *, base: str, **kwargs
):
    if shared_prefix is not None:
        return shared_prefix.attend(module, query, key, value, dropout, scaling), None
    original = ALL_ATTENTION_FUNCTIONS.get(base)
    if original is None:  # every model file carries its own eager version
        original = sys.modules[type(module).__module__].eager_attention_forward
    name = module.config._attn_implementation
    module.config._attn_implementation = base  # flash attention finds its kernels by it
    try:
        return original(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs)
    finally:
        module.config._attn_implementation = name


def install(model) -> None:
    """Give the text part of `model` (a Qwen-VL model for conditional generation) the attention of this module.

    Without `shared_prefix=` in the call it does what the implementation it replaces did, masks included.
    """
    base = model.config.get_text_config()._attn_implementation or "eager"
    if base.startswith(PREFIX):
        return
    name = PREFIX + base
    AttentionInterface.register(name, partial(_attention, base=base))
    # Without a mask function of its own, an unknown name gets no mask at all, and padding would be seen.
    AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS[base])
    model.set_attn_implementation({"text_config": name})
    assert_installed(model)


def assert_installed(model) -> None:
    """Raise when a packed pass through `model` would silently ignore the layout."""
    found = model.config.get_text_config()._attn_implementation
    if not (found or "").startswith(PREFIX):
        raise RuntimeError(f"the text part's attention is {found!r}, not the shared-prefix one")


def no_mask(device: torch.device) -> torch.Tensor:
    """What to pass as `attention_mask` with a layout: models pass a 4-D mask on as it is, and any other attention
    function fails on its shape instead of ignoring the layout."""
    return torch.empty(1, 1, 0, 0, dtype=torch.bool, device=device)
