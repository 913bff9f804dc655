"""Attention on a GPU in few shapes: lengths are rounded up inside it, for libraries that plan each new shape anew.

What is added is masked or cut off again, so that no number changes. On the CPU nothing is added.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from dataclasses import dataclass

import torch
import torch.nn.functional as F

# Least room for a prompt's tokens, for branches and for the tokens of one: within the limits of the recipes one shape of
# prompts and three of branches.
PROMPT, BRANCHES, BRANCH = 1024, 8, 128
WINDOW, WINDOWS, IMAGE = 64, 32, 1024  # patches of a window of the vision tower, windows a call, patches of an image
# Transformers hands a vision tower's implementation all images in one call only where its name has "flash" in it.
VISION = "r1v_images_as_for_flash"


def wanted(device: torch.device) -> bool:
    return device.type == "cuda"


def rounded(length: int, least: int) -> int:
    """The first of `least`, 2 `least`, 4 `least`, ... that holds `length`."""
    return least << (-(-max(length, 1) // least) - 1).bit_length()


@dataclass
class _Chunks:
    """Parts of a packed sequence that see themselves alone, in batches of equal lengths.

    batches: places (B, n) in the sequence, and what of them is there (B, 1, 1, n); None for all, which is faster.
    back: (L,) the sequence's places in what all batches give.
    """

    batches: list[tuple[torch.Tensor, torch.Tensor | None]]
    back: torch.Tensor

    @classmethod
    def of(cls, ends: list[int], device: torch.device) -> _Chunks:
        """Args: ends: 0 and the end of each chunk."""
        bounds, by_size, batches = list(itertools.pairwise(ends)), defaultdict(list), []
        for start, end in bounds:
            by_size[WINDOW if end - start <= WINDOW else rounded(end - start, IMAGE)].append((start, end))
        back, done = torch.empty(ends[-1], dtype=torch.long), 0
        for size, chunks in by_size.items():
            many = WINDOWS if size == WINDOW else 1
            for first in range(0, len(chunks), many):
                places = torch.zeros(many, size, dtype=torch.long)
                inside = torch.zeros(many, size, dtype=torch.bool)
                inside[:, 0] = True  # where there is no chunk, too: a softmax over nothing is NaN
                for row, (start, end) in enumerate(chunks[first : first + many]):
                    places[row, : end - start] = torch.arange(start, end)
                    inside[row, : end - start] = True
                    back[start:end] = torch.arange(end - start) + done + row * size
                mask = None if inside.all() else inside[:, None, None].to(device)
                batches.append((places.to(device), mask))
                done += many * size
        return cls(batches, back.to(device))


def vision_attention(module, query, key, value, attention_mask, scaling=None, dropout=0.0, **kwargs):
    """(1, L, H, D) for (1, H, L, D) of all images, of which each chunk between two `cu_seq_lens_q` sees itself."""
    ends = kwargs["cu_seq_lens_q"]
    if not wanted(query.device):
        chunks = zip(*(x.split(ends.diff().tolist(), dim=2) for x in (query, key, value)), strict=True)
        parts = [F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, scale=scaling) for q, k, v in chunks]
        return torch.cat(parts, dim=2).transpose(1, 2), None
    plan = getattr(ends, "r1v_chunks", None)
    if plan is None:  # all layers are handed the same tensor
        plan = ends.r1v_chunks = _Chunks.of(ends.tolist(), query.device)
    outputs = []
    for places, inside in plan.batches:
        q, k, v = (x[0][:, places].transpose(0, 1) for x in (query, key, value))  # (B, H, n, D) each
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=inside, dropout_p=dropout, scale=scaling)
        outputs.append(out.transpose(1, 2).flatten(0, 1))  # (B * n, H, D)
    return torch.cat(outputs).index_select(0, plan.back)[None], None
