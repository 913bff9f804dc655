"""Keys, values and states while decoding: the prompts' once per group, the branches' own in buffers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from .attention import Layout, Segment
from .delta import States, StepStates

ROOM = 512  # a lasting cache has room for prompts of a multiple of this


class PromptCache:
    """A cache that only records a packed row of prompts, per layer: keys and values, or the states of each segment."""

    def __init__(self) -> None:
        self.layers: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self.states: dict[int, list[States]] = {}

    def update(self, key, value, layer_idx: int, *args: Any, **kwargs: Any):
        self.layers[layer_idx] = (as_used(key, value), value)
        return key, value

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0


class BranchCache(Layout):
    """The cache of all branches.

    Args:
        sizes: how many branches each prompt has; branches are in the order of the prompts.
        max_new: how many tokens a branch can hold.
        static: every step has the same shapes and addresses, over the whole buffers with a mask, as a CUDA graph needs.
    """

    def __init__(self, sizes: Sequence[int], max_new: int, *, static: bool = False) -> None:
        self.sizes, self.max_new, self.static = list(sizes), max_new, static
        self.length = 0  # tokens stored per branch before the current step
        self.prompt: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}  # (N, Hkv, P, D) each
        self.branch: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}  # (B, Hkv, max_new, D) each
        self.states: dict[int, StepStates] = {}  # of layers of linear attention
        self.mask: torch.Tensor | None = None  # (N, 1, 1, P), -inf at padding

    # --- from prompts to branches ------------------------------------------------------------------------------------

    def begin(self, prompts: PromptCache, segments: list[Segment]) -> None:
        """Start from recorded prompts, the segments of a packed row. A static cache keeps its buffers' addresses."""
        lengths = [seg.prompt for seg in segments]
        some = next(iter(prompts.layers.values()))[0]
        room = self.room if self.prompt else -(-max(lengths) // ROOM) * ROOM if self.static else max(lengths)
        for layer, pair in prompts.layers.items():
            if layer not in self.prompt:
                self.prompt[layer] = tuple(  # type: ignore[assignment]
                    x.new_zeros(len(segments), x.shape[1], room, x.shape[3]) for x in pair
                )
            for buffer, x in zip(self.prompt[layer], pair, strict=True):
                for i, seg in enumerate(segments):
                    buffer[i, :, : seg.prompt] = x[0, :, seg.start : seg.start + seg.prompt]
        for layer, states in prompts.states.items():
            begun = StepStates.of(states, self.sizes)
            self.states[layer] = self.states[layer].copied(begun) if layer in self.states else begun
        if self.static or min(lengths) < room:
            ends = torch.tensor(lengths, device=some.device)
            hidden = torch.arange(room, device=some.device)[None] >= ends[:, None]
            mask = torch.zeros(hidden.shape, device=some.device).masked_fill_(hidden, -torch.inf)[:, None, None]
            self.mask = mask if self.mask is None else self.mask.copy_(mask)
        if self.static and not self.branch:
            self.at = torch.zeros(1, dtype=torch.long, device=some.device)
            self.ahead = torch.zeros(self.max_new, device=some.device)  # -inf at tokens still to come
        self._place(some.device)

    @property
    def room(self) -> int:
        """Tokens that a prompt can have."""
        return next(iter(self.prompt.values()))[0].shape[2]

    def _place(self, device: torch.device) -> None:
        """Where each branch stands in a (N, largest group) grid; None where they fill it."""
        widest = max(self.sizes)
        places = [i * widest + j for i, size in enumerate(self.sizes) for j in range(size)]
        full = len(places) == len(self.sizes) * widest
        self.slots = None if full else torch.tensor(places, device=device)

    def keep(self, rows: list[int]) -> None:
        """Go on with the branches `rows` alone, and with the prompts that they have."""
        owners = [i for i, size in enumerate(self.sizes) for _ in range(size)]
        left = [owners[row] for row in rows]
        prompts = list(dict.fromkeys(left))
        device = next(iter(self.prompt.values()))[0].device
        index, groups = torch.tensor(rows, device=device), torch.tensor(prompts, device=device)
        if len(prompts) < len(self.sizes):
            self.prompt = {k: (a[groups], b[groups]) for k, (a, b) in self.prompt.items()}
            self.mask = None if self.mask is None else self.mask[groups]
        self.sizes = [left.count(i) for i in prompts]
        self.branch = {k: (self._rows(a, index), self._rows(b, index)) for k, (a, b) in self.branch.items()}
        self.states = {k: states.keep(index) for k, states in self.states.items()}
        self._place(device)

    def _rows(self, buffer: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        """A branch buffer of the rows `index`; what is not filled yet is not copied."""
        out = buffer.new_empty(len(index), *buffer.shape[1:])
        filled = self.length + 1
        out[:, :, :filled] = buffer[:, :, :filled].index_select(0, index)
        return out

    # --- a step ------------------------------------------------------------------------------------------------------

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

    def scan(self, module, run, hidden: torch.Tensor, cache: Any) -> torch.Tensor:
        """The same of a layer of linear attention; hidden (B, 1, H)."""
        self.layers_seen += 1
        return run(hidden, self.states[module.layer_idx])

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


def as_used(key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """A key in the type of its value: under autocast rotation leaves it in float32, and every product casts it again."""
    return key.to(value.dtype)
