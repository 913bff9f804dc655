"""Groups of completions as packed rows: prompt once, then one branch per completion."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from .attention import PackedLayout, Segment, no_mask

IGNORED = -100  # the label of what is not predicted


@dataclass
class Group:
    """Rows [start, stop) of a batch that share a prompt, with the images that its first row carries.

    pixels, grids: slices into the batch's `pixel_values` and `image_grid_thw`, empty for text alone.
    """

    start: int
    stop: int
    pixels: slice
    grids: slice


def find_groups(
    prompt_ids: torch.Tensor,
    prompt_mask: torch.Tensor,
    num_images: Sequence[int] | None,
    image_grid_thw: torch.Tensor | None,
    patches_per_row: int = 1,
) -> list[Group]:
    """Runs of rows that share prompt and images.

    The first row of a group carries its images, the others have `num_images` 0: a row with the prompt of the row
    before it and no images of its own shares that row's. Rows that all carry images are groups of their own.

    Args:
        prompt_ids, prompt_mask: (B, P), left-padded.
        num_images: images of each row; None when there are none.
        image_grid_thw: (images, 3) in the order of the rows.
        patches_per_row: patches for each row of `pixel_values`: 1, or those merged into one token for encoded images.
    """
    batch = prompt_ids.shape[0]
    same = ((prompt_ids[1:] == prompt_ids[:-1]) & (prompt_mask[1:] == prompt_mask[:-1])).all(dim=1).tolist()
    rows_per_image = [] if image_grid_thw is None else (image_grid_thw.prod(dim=-1) // patches_per_row).tolist()
    groups: list[Group] = []
    pixel = grid = 0
    for row in range(batch):
        own = num_images[row] if num_images is not None else 0
        if row and not own and same[row - 1]:
            groups[-1].stop = row + 1
            continue
        stop = pixel + sum(rows_per_image[grid : grid + own])
        groups.append(Group(row, row + 1, slice(pixel, stop), slice(grid, grid + own)))
        pixel, grid = stop, grid + own
    return groups


def take_rows(batch: dict[str, Any], groups: Sequence[Group]) -> dict[str, Any]:
    """The rows of `groups`, in that order, as a batch of its own: of each group the first row carries the images."""
    index = torch.tensor([row for g in groups for row in range(g.start, g.stop)])
    total = len(batch["prompt_ids"])
    out: dict[str, Any] = {}
    for key, value in batch.items():
        if key == "pixel_values":
            out[key] = torch.cat([value[g.pixels] for g in groups])
        elif key == "image_grid_thw":
            out[key] = torch.cat([value[g.grids] for g in groups])
        elif key == "num_images":
            counts = [[g.grids.stop - g.grids.start] + [0] * (g.stop - g.start - 1) for g in groups]
            out[key] = [n for group in counts for n in group]
        elif isinstance(value, torch.Tensor) and value.ndim > 0 and len(value) == total:
            out[key] = value[index.to(value.device)]
        elif isinstance(value, list) and len(value) == total:
            out[key] = [value[i] for i in index.tolist()]
        else:
            out[key] = value
    if "image_grid_thw" in out and not len(out["image_grid_thw"]):  # a micro-batch of text alone
        del out["pixel_values"], out["image_grid_thw"]
    return out


def cut(groups: Sequence[Group], size: int) -> list[list[Group]]:
    """The groups in parts of `size` rows, in their order; a group that crosses a boundary is in both parts.

    The boundaries depend on numbers of rows only, which all ranks have in common, and not on where their groups
    begin: under ZeRO-3 every rank must make the same number of forward passes.
    """
    parts: list[list[Group]] = []
    taken = 0
    for group in groups:
        start = group.start
        while start < group.stop:
            if taken % size == 0:
                parts.append([])
            stop = min(group.stop, start + size - taken % size)
            parts[-1].append(replace(group, start=start, stop=stop))
            taken += stop - start
            start = stop
    return parts


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


@dataclass
class Tree:
    """A prefix that `branches` go on from; without any it ends in itself.

    grid: (images, 3) `image_grid_thw` of its images, which all lie in the prefix; None for text alone.
    """

    prefix: list[int]
    grid: torch.Tensor | None
    branches: list[list[int]] = field(default_factory=list)


def tree_of(rows: Sequence[list[int]], grid: torch.Tensor | None) -> Tree:
    """What `rows` of token ids have in common, and at least the last token of each as its branch."""
    pairs = zip(min(rows), max(rows), strict=False)  # in the order of lists, the two that differ first
    same = next((i for i, (a, b) in enumerate(pairs) if a != b), len(min(rows)))
    same = min(same, min(map(len, rows)) - 1)
    return Tree(rows[0][:same], grid, [row[same:] for row in rows])


def lay_out(core, trees: Sequence[Tree], device: torch.device) -> tuple[dict[str, Any], PackedLayout, torch.Tensor]:
    """Token ids as one row: the model's inputs without images, the layout, and the places of all last tokens."""
    segments, ids, positions, ends = [], list[int](), [], []
    for tree in trees:
        known = prompt_positions(core, tree.prefix, tree.grid)  # (3, P + 1)
        segments.append(Segment(len(ids), len(tree.prefix), [len(branch) for branch in tree.branches]))
        positions.append(known[:, :-1])
        ids += tree.prefix
        for branch in tree.branches:
            positions.append(known[:, -1:] + torch.arange(len(branch)))
            ids += branch
            ends.append(len(ids) - 1)
        if not tree.branches:
            ends.append(len(ids) - 1)
    inputs = {
        "input_ids": torch.tensor(ids, device=device)[None],  # (1, L)
        "position_ids": torch.cat(positions, dim=1)[:, None].to(device),  # (3, 1, L)
        "attention_mask": no_mask(device),
    }
    return inputs, PackedLayout(segments, device), torch.tensor(ends, device=device)


@dataclass
class Packed:
    """Groups as one row for the model, and the way back.

    inputs: keyword arguments of the model, without images.
    source: (T,) places of the scored tokens in the packed row.
    target: (T,) their places in the flattened (rows, completion) result.
    """

    inputs: dict[str, Any]
    layout: PackedLayout
    source: torch.Tensor
    target: torch.Tensor
    rows: int

    def unpack(self, values: torch.Tensor, width: int) -> torch.Tensor:
        """Per-token values of the packed row (1, L) as (rows, width), 0 where there is no token."""
        flat = values.new_zeros(self.rows * width)
        return flat.index_copy(0, self.target, values[0].index_select(0, self.source)).view(self.rows, width)


def pack(
    core,
    groups: Sequence[Group],
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    keep: int,
    image_grid_thw: torch.Tensor | None,
    device: torch.device,
) -> Packed:
    """Lay out `groups` of the batch in one row on `device`, without padding.

    A branch is the prompt's last token and all completion tokens but the last: the token that a position predicts is
    then always the next one of the same branch, also for the first token of a completion.

    Args:
        input_ids, attention_mask: (B, P + C) on the host, prompts left-padded, completions right-padded.
        keep: C.
        image_grid_thw: (images, 3) of the complete batch, on the host.
    """
    width = input_ids.shape[1] - keep  # P
    prompts = attention_mask[:, :width].sum(dim=1).tolist()
    completions = attention_mask[:, width:].sum(dim=1).tolist()
    trees = list[Tree]()
    labels, source, target = list[int](), list[int](), list[int]()
    rows = 0
    for group in groups:
        *prefix, last = input_ids[group.start, width - prompts[group.start] : width].tolist()
        tree = Tree(prefix, None if image_grid_thw is None else image_grid_thw[group.grids])
        labels += [IGNORED] * len(prefix)
        for member in range(group.start, group.stop):
            tokens = input_ids[member, width : width + completions[member]].tolist()
            tree.branches.append([last, *tokens[:-1]])
            source += range(len(labels), len(labels) + len(tokens))
            target += range(rows * keep, rows * keep + len(tokens))
            # A completion that is masked as a whole keeps one unscored token, so that no micro-batch becomes empty.
            labels += tokens or [IGNORED]
            rows += 1
        trees.append(tree)
    inputs, layout, _ = lay_out(core, trees, device)
    inputs["shift_labels"] = torch.tensor(labels, device=device)[None]  # (1, L)
    scored, places = (torch.tensor(x, dtype=torch.long, device=device) for x in (source, target))
    return Packed(inputs, layout, scored, places, rows)
