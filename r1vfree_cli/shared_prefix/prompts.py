"""The distinct prompts of a batch and their images, each processed once however many completions it has."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers.modeling_outputs import BaseModelOutputWithPooling

from ..models import family


class RowsByReference(torch.utils.data.Dataset):
    """A dataset that loads each distinct row of a batch once and repeats it by reference.

    TRL's sampler asks for every row once per completion, and for the same batch again for every step that reuses its
    completions; a row holds decoded images.
    """

    def __init__(self, rows) -> None:
        self.rows = rows
        self._last: dict[int, Any] = {}

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int):
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: list[int]) -> list:
        self._last = {i: self._last[i] if i in self._last else self.rows[i] for i in dict.fromkeys(indices)}
        return [self._last[i] for i in indices]


def has_image(prompt: list[dict]) -> bool:
    """Whether a conversation, as TRL prepares it, shows an image."""
    return any(
        part.get("type") == "image" for turn in prompt if isinstance(turn["content"], list) for part in turn["content"]
    )


@dataclass
class DistinctPrompts:
    """What the processor made of the distinct prompts of a batch.

    ids: token ids of each.
    images: the images of each, or None.
    fields: the processor's other outputs: `pixel_values` and `image_grid_thw` over all images, lists per prompt.
    sizes: how many rows of the batch each prompt has; they are adjacent.
    encoded: `pixel_values` holds what the vision tower made of the images.
    """

    ids: list[list[int]]
    images: list | None
    fields: dict[str, Any]
    sizes: list[int]
    encoded: bool = False

    def repeat(self, values: Sequence) -> list:
        """One value per prompt to one per row."""
        return [v for v, size in zip(values, self.sizes, strict=True) for _ in range(size)]

    def lead_images(self) -> list[list] | None:
        """Images per row as the passes take them: only the first row of a prompt has them."""
        if self.images is None:
            return None
        return [row for x, size in zip(self.images, self.sizes, strict=True) for row in [x or []] + [[]] * (size - 1)]

    def grids(self) -> list[torch.Tensor | None]:
        """`image_grid_thw` of each prompt."""
        grid = self.fields.get("image_grid_thw")
        if grid is None or self.images is None:
            return [None] * len(self.ids)
        return list(torch.split(grid, [len(x or []) for x in self.images]))

    def repeated_fields(self) -> dict[str, Any]:
        """The fields as the processor would have made them of all rows."""
        out = dict(self.fields)
        if self.images is not None and "pixel_values" in out:
            grids = torch.split(out["image_grid_thw"], [len(x or []) for x in self.images])
            patches = torch.split(out["pixel_values"], [int(g.prod(-1).sum()) for g in grids])
            out["pixel_values"] = torch.cat(self.repeat(patches))
            out["image_grid_thw"] = torch.cat(self.repeat(grids))
        return {k: self.repeat(v) if isinstance(v, list) else v for k, v in out.items()}


class PreparedProcessor:
    """Stands in for a processor whose next call is for inputs that are known already."""

    def __init__(self, processor, prepared: Callable[[], dict[str, torch.Tensor]]) -> None:
        self._processor = processor
        self._prepared = prepared

    def __getattr__(self, name: str):
        return getattr(self._processor, name)

    def __call__(self, *args: Any, **kwargs: Any) -> dict[str, torch.Tensor]:
        return self._prepared()


# --- images through the vision tower -----------------------------------------------------------------------------


def encode_images(whole, pixel_values: torch.Tensor, grid: torch.Tensor) -> torch.Tensor:
    """What the vision tower of `whole` makes of the images: (image tokens, H), levels side by side for DeepStack."""
    out = whole.get_image_features(pixel_values, grid, return_dict=True)
    levels = [out.pooler_output, *(getattr(out, "deepstack_features", None) or [])]
    return torch.cat([torch.cat(tuple(x)) for x in levels], dim=-1)


def model_images(
    whole, pixel_values: torch.Tensor | None, grid: torch.Tensor | None, *, encoded: bool
) -> dict[str, Any]:
    """Keyword arguments that show the images to the model: raw, or as `encode_images` left them."""
    if pixel_values is None or not len(pixel_values):
        return {}
    if not encoded:
        return {"pixel_values": pixel_values, "image_grid_thw": grid}
    first, *deeper = pixel_values.split(whole.config.get_text_config().hidden_size, dim=-1)
    output: Any = BaseModelOutputWithPooling(pooler_output=(first,))  # type: ignore[arg-type]
    output["deepstack_features"] = [(x,) for x in deeper]
    return {"mm_encoder_outputs": {"image": output}}


def same_frozen_vision(policy, reference) -> bool:
    """Whether the vision tower is not trained and the reference has the same one, so that its output serves both."""
    kind = family.of(policy.config)
    if not kind.takes_features(policy):
        return False

    def weights(model) -> dict[str, Any]:
        return {f"{i}.{n}": p for i, m in enumerate(kind.vision_modules(model)) for n, p in m.named_parameters()}

    def values(p: Any) -> torch.Tensor:
        return getattr(p, "ds_tensor", p).detach().cpu()  # under ZeRO-3 the shard of this rank

    own = weights(policy)
    if any(p.requires_grad for p in own.values()):
        return False
    if reference is None:
        return True
    other = weights(reference)
    return own.keys() == other.keys() and all(torch.equal(values(own[k]), values(other[k])) for k in own)
