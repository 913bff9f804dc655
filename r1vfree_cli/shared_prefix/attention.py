"""Attention for groups of completions that share a prompt: the prompt's keys and values are held once.

It is reached through transformers' attention interface, so no model class is patched: the text part's implementation
is registered under a name of its own, and behaves as the original until a call passes `shared_prefix=` (a
`PackedLayout` or a `BranchCache`), which travels to every layer with the other keyword arguments.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ..models import family
from . import buckets
from .delta import States, install_scan, layers_of, takes_layout

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
    """What travels to every layer as `shared_prefix=`, and counts the layers that it reached.

    A layer of attention calls its `attend`, one of linear attention its `scan`, where `run(hidden, states)` is the
    layer's own forward.
    """

    layers_seen = 0

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

    Inside attention branches of unequal length are padded to the longest of their group; the padding lies behind the
    branch's own tokens, so causality hides it.
    """

    segments: list[Segment]
    device: torch.device

    def __post_init__(self) -> None:
        self._branches = [_Branches.of(seg, self.device) for seg in self.segments]
        self._rooms = self._branches
        if buckets.wanted(self.device):
            self._rooms = [_Branches.of(seg, self.device, rounded=True) for seg in self.segments]

    def attend(self, module, query, key, value, dropout: float, scaling: float | None) -> torch.Tensor:
        """Attention output (1, L, H, D) for query (1, H, L, D), key and value (1, Hkv, L, D)."""
        self.layers_seen += 1
        heads = query.shape[1] // key.shape[1]
        outputs = []
        for seg, room in zip(self.segments, self._rooms, strict=True):
            middle = seg.start + seg.prompt
            prompt_q, prompt_k, prompt_v = (
                _filled(x[:, :, seg.start : middle], room.prompt) for x in (query, key, value)
            )  # (1, H or Hkv, P, D)
            if seg.prompt:
                out = F.scaled_dot_product_attention(
                    prompt_q,
                    repeat_heads(prompt_k, heads),
                    repeat_heads(prompt_v, heads),
                    dropout_p=dropout,
                    scale=scaling,
                    is_causal=True,
                )
                outputs.append(out[0, :, : seg.prompt].transpose(0, 1))  # (tokens, H, D)
            if not seg.lengths:
                continue
            branch_q, branch_k, branch_v = (
                room.fold(x[0, :, middle : seg.end]) for x in (query, key, value)
            )  # (G, H or Hkv, C, D)
            out = F.scaled_dot_product_attention(
                branch_q,
                repeat_heads(torch.cat([prompt_k.expand(room.count, -1, -1, -1), branch_k], dim=2), heads),
                repeat_heads(torch.cat([prompt_v.expand(room.count, -1, -1, -1), branch_v], dim=2), heads),
                attn_mask=room.mask,
                dropout_p=dropout,
                scale=scaling,
            )
            outputs.append(room.unfold(out.transpose(1, 2).flatten(0, 1)))  # (tokens, H, D)
        return torch.cat(outputs)[None]

    def scan(self, module, run, hidden: torch.Tensor, cache: Any) -> torch.Tensor:
        """Output (1, L, H) of linear attention; branches start from the states that their prompt ends with."""
        self.layers_seen += 1
        outputs = []
        for seg, rows in zip(self.segments, self._branches, strict=True):
            states, middle = States(), seg.start + seg.prompt
            if seg.prompt:
                outputs.append(run(hidden[:, seg.start : middle], states)[0])  # (P, H)
            if cache is not None:
                cache.states.setdefault(module.layer_idx, []).append(states)
            if not seg.lengths:
                continue
            branches = rows.fold(hidden[:, middle : seg.end])[:, 0]  # (G, C, H)
            alone = branches.shape[1] == 1  # the kernel for single tokens has no gradients
            branches = branches.expand(-1, 2, -1) if alone else branches
            out = run(branches, states.expand(rows.count))[:, : 1 if alone else None].flatten(0, 1)
            outputs.append(rows.unfold(out))
        return torch.cat(outputs)[None]


@dataclass
class _Branches:
    """How the branches of a segment lie side by side.

    prompt, count: room for prompt tokens, and for branches.
    mask: (C, P + C) what a branch sees: its prompt, and itself up to the token.
    scatter, gather: places of the padded tokens (G * C) among the branches' tokens, and theirs among the padded; None
        where none is padded.
    """

    prompt: int
    count: int
    mask: torch.Tensor
    scatter: torch.Tensor | None = None
    gather: torch.Tensor | None = None

    @classmethod
    def of(cls, seg: Segment, device: torch.device, *, rounded: bool = False) -> _Branches:
        """With the room that is needed, or `rounded` up to one of few sizes."""
        prompt, count, width = seg.prompt, len(seg.lengths), max(seg.lengths, default=0)
        if rounded:
            prompt, count = buckets.rounded(prompt, buckets.PROMPT), buckets.rounded(count, buckets.BRANCHES)
            width = buckets.rounded(width, buckets.BRANCH) if width else 0
        mask = torch.ones(width, prompt + width, dtype=torch.bool, device=device).tril(prompt)
        mask[:, seg.prompt : prompt] = False
        if set(seg.lengths) <= {width} and count == len(seg.lengths):
            return cls(prompt, count, mask)
        lengths = torch.tensor(seg.lengths + [0] * (count - len(seg.lengths)))
        inside = torch.arange(width)[None] < lengths[:, None]  # (G, C)
        flat = torch.zeros(inside.shape, dtype=torch.long)
        flat[inside] = torch.arange(sum(seg.lengths))  # padding repeats the first token; nobody sees it
        return cls(prompt, count, mask, flat.view(-1).to(device), inside.view(-1).nonzero()[:, 0].to(device))

    def fold(self, x: torch.Tensor) -> torch.Tensor:
        """(H, tokens of all branches, D) to (G, H, C, D)."""
        x = x if self.scatter is None else x.index_select(1, self.scatter)
        return x.unflatten(1, (self.count, -1)).transpose(0, 1)

    def unfold(self, x: torch.Tensor) -> torch.Tensor:
        """(G * C, ...) to (tokens of all branches, ...)."""
        return x if self.gather is None else x.index_select(0, self.gather)


def _filled(x: torch.Tensor, length: int) -> torch.Tensor:
    """(..., n, D) with zeros behind up to `length`."""
    return x if x.shape[-2] == length else F.pad(x, (0, 0, 0, length - x.shape[-2]))


def repeat_heads(x: torch.Tensor, times: int) -> torch.Tensor:
    """(B, Hkv, L, D) to (B, Hkv * times, L, D), each head repeated in place, as grouped-query attention needs."""
    return x if times == 1 else x.repeat_interleave(times, dim=1)


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


def not_shared(model) -> str | None:
    """Why prefixes cannot be shared in passes of a model, in words; None when they can."""
    if not family.of(model.config).shares_prefix:
        return f"models of type {model.config.model_type} cannot share one"
    if "sliding_attention" in (getattr(model.config.get_text_config(), "layer_types", None) or []):
        return "sliding-window attention is not supported"
    if not all(map(takes_layout, layers_of(model))):
        return "this transformers tells linear attention nothing of it"
    return None


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
    parts = {"text_config": name}
    if getattr(model.config, "vision_config", None) and model.config.vision_config._attn_implementation == "sdpa":
        AttentionInterface.register(buckets.VISION, buckets.vision_attention)
        parts["vision_config"] = buckets.VISION
    model.set_attn_implementation(parts)
    for module in layers_of(model):
        install_scan(module)
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
