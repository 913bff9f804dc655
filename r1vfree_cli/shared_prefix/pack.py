"""Groups of completions as packed rows: prompt once, then one branch per completion."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .attention import PackedLayout, Segment, no_mask
from .decode import prompt_positions


@dataclass
class Group:
    """Rows [start, stop) of a batch that share a prompt, with the images that its first row carries.

    pixels, grids: slices into the batch's `pixel_values` and `image_grid_thw`, empty for text alone.
    """

    start: int
    stop: int
    pixels: slice
    grids: slice

    def part(self, start: int, stop: int) -> Group:
        """The same prompt for the rows [start, stop) only."""
        return Group(start, stop, self.pixels, self.grids)


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


def split_by_groups(batch: dict[str, Any], groups: Sequence[Group], chunks: int) -> list[dict[str, Any]]:
    """The batch in `chunks` parts of equal size, rows in the order of `groups`; a group may be cut at a boundary."""
    size = sum(g.stop - g.start for g in groups) // chunks
    parts: list[list[Group]] = [[]]
    room = size
    for group in groups:
        start = group.start
        while start < group.stop:
            if not room:
                parts.append([])
                room = size
            stop = min(group.stop, start + room)
            parts[-1].append(group.part(start, stop))
            room -= stop - start
            start = stop
    return [take_rows(batch, part) for part in parts[:chunks]]


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
    *,
    blank_image: bool = False,
) -> Packed:
    """Lay out `groups` of the batch in one row without padding.

    A branch is the prompt's last token and all completion tokens but the last: the token that a position predicts is
    then always the next one of the same branch, also for the first token of a completion.

    Args:
        core: the model inside the one for conditional generation.
        input_ids, attention_mask: (B, P + C), prompts left-padded, completions right-padded.
        keep: C.
        image_grid_thw: (images, 3) of the whole batch.
        blank_image: end the row with the one token of a blank image, seen by nothing (see `blank_image`).
    """
    device = input_ids.device
    total = input_ids.shape[1]
    width = total - keep
    prompt_lengths = attention_mask[:, :width].sum(dim=1).tolist()
    lengths = attention_mask[:, width:].sum(dim=1).tolist()
    ids = input_ids.cpu()
    segments, positions, index, labels, source, target = [], [], [], [], [], []
    start = row = 0
    for group in groups:
        prompt = prompt_lengths[group.start]
        grid = None if image_grid_thw is None else image_grid_thw[group.grids]
        known = prompt_positions(core, ids[group.start, width - prompt : width].tolist(), grid)  # (3, prompt + 1)
        at = group.start * total
        index.append(torch.arange(at + width - prompt, at + width - 1))
        labels.append(torch.full((prompt - 1,), -1))
        positions.append(known[:, : prompt - 1])
        segment = Segment(start, prompt - 1, [])
        start += prompt - 1
        for member in range(group.start, group.stop):
            # A completion that is masked as a whole keeps one unscored token, so that no micro-batch becomes empty.
            length = max(1, lengths[member])
            at = member * total + width
            index.append(torch.arange(at - 1, at - 1 + length))
            positions.append(torch.cat([known[:, -2:-1], known[:, -1:] + torch.arange(length - 1)], dim=1))
            labels.append(torch.arange(at, at + length) if lengths[member] else torch.full((1,), -1))
            source.append(torch.arange(start, start + lengths[member]))
            target.append(torch.arange(row * keep, row * keep + lengths[member]))
            segment.lengths.append(length)
            start += length
            row += 1
        segments.append(segment)
    flat = input_ids.reshape(-1)
    if blank_image:
        segments.append(Segment(start, 1))
        index.append(torch.tensor([len(flat)]))
        labels.append(torch.tensor([-1]))
        positions.append(torch.zeros(3, 1, dtype=torch.long))
        flat = torch.cat([flat, flat.new_tensor([core.config.image_token_id])])
    where = torch.cat(labels).to(device)
    return Packed(
        inputs={
            "input_ids": flat[torch.cat(index).to(device)][None],
            "position_ids": torch.cat(positions, dim=1)[:, None].to(device),  # (3, 1, L)
            "attention_mask": no_mask(device),
            "shift_labels": torch.where(where < 0, -100, flat[where.clamp(min=0)])[None],
        },
        layout=PackedLayout(segments, device),
        source=torch.cat(source).to(device),
        target=torch.cat(target).to(device),
        rows=row,
    )
