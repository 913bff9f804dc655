"""Generation for groups: each distinct prompt is prefilled once, then all branches are decoded together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist

from .attention import BranchCache, PackedLayout, PromptCache, Segment, assert_installed, no_mask


@dataclass
class Prompts:
    """The distinct prompts of a generation call, in order.

    ids: token ids of each.
    grids: for each its rows of `image_grid_thw` (images, 3), or None for text alone.
    sizes: how many completions are wanted of each; the completions of a prompt stand side by side.
    images: what the model needs to see the images of all prompts (`pixel_values` ..., or encoded images).
    blank: `images` is a blank image instead, shown to nobody (see `blank_image`).
    """

    ids: list[list[int]]
    grids: list[torch.Tensor | None]
    sizes: list[int]
    images: dict[str, Any] = field(default_factory=dict)
    blank: bool = False


def prompt_positions(core, ids: Sequence[int], grid: torch.Tensor | None) -> torch.Tensor:
    """Positions (3, P + 1) of a prompt's tokens and of the first token after it, as the model alone would count them.

    `core` is the model inside the one for conditional generation (it owns `get_rope_index`); they are passed to every
    call, so that nothing depends on what an earlier call left in `core.rope_deltas`.
    """
    if grid is None or not len(grid):
        return torch.arange(len(ids) + 1).expand(3, -1)
    # One text token more, whose position is that of the first completion token.
    tokens = torch.tensor([*ids, 0])[None]
    tokens[0, -1] = -1
    kinds = (tokens == core.config.image_token_id).int()
    positions, _ = core.get_rope_index(
        tokens, mm_token_type_ids=kinds, image_grid_thw=grid.cpu(), attention_mask=torch.ones_like(tokens)
    )
    return positions[:, 0]


def decode_groups(
    model,
    input_ids: torch.Tensor,
    logits_processor,
    stopping_criteria,
    generation_config,
    *,
    prompts: Prompts,
    all_ranks: bool = False,
    **_: Any,
) -> torch.Tensor:
    """The decoding loop for `generate(custom_generate=...)`: samples or takes the best token, as `generate` does.

    Args:
        model: the model for conditional generation.
        input_ids: the prompts of all branches, left-padded (B, P); only the processors and criteria read them.
        prompts: the same prompts, each once.
        all_ranks: go on until all ranks have finished (`generate` does not hand its own such switch to a loop).

    Returns:
        (B, P + new): prompts and completions, padded behind the end token.
    """
    assert_installed(model)
    device = input_ids.device
    batch, width = input_ids.shape
    max_new = generation_config.max_length - width
    sequences = torch.cat([input_ids, input_ids.new_full((batch, max_new), generation_config.pad_token_id)], dim=1)
    graphed = device.type == "cuda" and not all_ranks
    logits, cache, positions = _prefill(model, prompts, max_new, device, static=graphed)
    forward = (_GraphedStep if graphed else _Step)(model, cache, positions)

    running = torch.ones(batch, dtype=torch.bool, device=device)
    step, finished = 0, False
    while True:
        if not finished:
            seen = sequences[:, : width + step]
            scores = logits_processor(seen, logits.to(copy=True, dtype=torch.float32))
            if generation_config.do_sample:
                tokens = torch.multinomial(torch.softmax(scores, dim=-1), num_samples=1)[:, 0]
            else:
                tokens = scores.argmax(dim=-1)
            tokens = torch.where(running, tokens, generation_config.pad_token_id)
            sequences[:, width + step] = tokens
            step += 1
            running = running & ~stopping_criteria(sequences[:, : width + step], scores)
            finished = step == max_new or not bool(running.any())
        # Under ZeRO-3 a forward pass gathers weights from all ranks: none may stop before the last has finished.
        if not _any_rank(not finished, device) if all_ranks else finished:
            return sequences[:, : width + step]
        logits = forward(tokens, min(step - 1, max_new - 1))


def _prefill(model, prompts: Prompts, max_new: int, device: torch.device, *, static: bool):
    """One pass over the packed prompts: (logits (B, V) after them, cache for the branches, next positions (B,))."""
    segments, positions, start = [], [], 0
    for ids, grid in zip(prompts.ids, prompts.grids, strict=True):
        segments.append(Segment(start, len(ids)))
        positions.append(prompt_positions(model.base_model, ids, grid))
        start += len(ids)
    tokens = [token for ids in prompts.ids for token in ids]
    places = [p[:, :-1] for p in positions]
    shown = list(segments)
    if prompts.blank:
        tokens.append(model.config.image_token_id)
        places.append(torch.zeros(3, 1, dtype=torch.long))
        shown.append(Segment(start, 1))
    layout, recorded = PackedLayout(shown, device), PromptCache()
    logits = model(
        input_ids=torch.tensor(tokens, device=device)[None],
        position_ids=torch.cat(places, dim=1)[:, None].to(device),
        attention_mask=no_mask(device),
        past_key_values=recorded,
        use_cache=True,
        shared_prefix=layout,
        logits_to_keep=torch.tensor([seg.end - 1 for seg in segments], device=device),
        return_dict=True,
        **prompts.images,
    ).logits[0]  # (N, V)
    layout.assert_used(model.config.get_text_config().num_hidden_layers)
    sizes = torch.tensor(prompts.sizes, device=device)
    following = torch.tensor([int(p[0, -1]) for p in positions], device=device)
    cache = BranchCache(recorded, segments, prompts.sizes, max_new, static=static)
    return logits.repeat_interleave(sizes, dim=0), cache, following.repeat_interleave(sizes)


class _Step:
    """The forward pass of one token per branch.

    Args:
        positions: (B,) position of each branch's first token.
    """

    def __init__(self, model, cache: BranchCache, positions: torch.Tensor) -> None:
        self.model, self.cache, self.positions = model, cache, positions

    def __call__(self, tokens: torch.Tensor, length: int) -> torch.Tensor:
        """Logits (B, V) after `tokens` (B,), of which each branch has `length` before."""
        self.cache.advance(length)
        return self._run(tokens[:, None], (self.positions + length).expand(3, -1)[..., None])

    def _run(self, tokens: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        self.cache.layers_seen = 0
        logits = self.model(
            input_ids=tokens,  # (B, 1)
            position_ids=positions,  # (3, B, 1)
            attention_mask=no_mask(tokens.device),
            past_key_values=self.cache,
            use_cache=True,
            shared_prefix=self.cache,
            return_dict=True,
        ).logits[:, -1]
        self.cache.assert_used(self.model.config.get_text_config().num_hidden_layers)
        return logits


class _GraphedStep(_Step):
    """The same, captured once per call as a CUDA graph: a step is then one launch instead of thousands."""

    def __init__(self, model, cache: BranchCache, positions: torch.Tensor) -> None:
        super().__init__(model, cache, positions)
        self.tokens = torch.zeros(len(positions), 1, dtype=torch.long, device=positions.device)
        self.at = positions.expand(3, -1)[..., None].clone()
        self.graph: torch.cuda.CUDAGraph | None = None

    def __call__(self, tokens: torch.Tensor, length: int) -> torch.Tensor:
        self.cache.advance(length)
        self.tokens.copy_(tokens[:, None])
        self.at.copy_((self.positions + length).expand(3, -1)[..., None])
        if self.graph is None:
            # Kernels choose their work space in runs before the capture. They write what the captured run writes.
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(2):
                    self._run(self.tokens, self.at)
            torch.cuda.current_stream().wait_stream(side)
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                self.logits = self._run(self.tokens, self.at)
        self.graph.replay()
        return self.logits


def _any_rank(value: bool, device: torch.device) -> bool:
    flag = torch.tensor(float(value), device=device)
    dist.all_reduce(flag)
    return bool(flag.item())
