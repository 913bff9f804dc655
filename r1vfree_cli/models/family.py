"""What is special to each model family: one `Family` an entry, looked up by `model_type` of the checkpoint's config.

A user adds one by `model.family: my_family.py:FAMILY`. A model without an entry trains by plain TRL, with its image
processor's own limits. Imports no torch.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ..core import console
from ..core.errors import UsageError
from ..core.user_code import load_named

# Fields of a config that name tokens which stand for visual input.
_TOKEN_FIELDS = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id", "vision_token_id")


def edge_limits(processor, min_pixels: int, max_pixels: int) -> None:
    """Qwen's resizing: pixels an image, as `size`; the attributes `min_pixels` and `max_pixels` are lost on save."""
    size, limits = processor.image_processor.size, {"shortest_edge": min_pixels, "longest_edge": max_pixels}
    processor.image_processor.size = limits if isinstance(size, dict) else type(size)(**limits)


def tile_limits(processor, min_pixels: int, max_pixels: int) -> None:
    """InternVL's tiling: an image becomes a grid of tiles of a fixed size and, beside more than one, a thumbnail."""
    images = processor.image_processor
    tile = images.size["height"] * images.size["width"]
    images.max_patches = max(1, max_pixels // tile - 1)
    images.min_patches = min(images.max_patches, max(1, min_pixels // tile))


@dataclass(frozen=True)
class Family:
    """One family of vision-language models.

    model_types: values of `config.model_type` that belong to it.
    vision: modules of the base model that make text-width vectors of pixels: what `freeze_vision` freezes.
    placeholders: tokens that stand for visual input, beside those that the config names. They are never sampled: in a
        completion they would be taken for an image that is not there.
    end_tokens: what ends the assistant's turn, beside the tokenizer's end token and the checkpoint's own.
    set_pixel_limits: (processor, min_pixels, max_pixels) -> None, kept by `save_pretrained`; None: it has no limits.
    loader: the class of transformers that loads it.
    shares_prefix: whether `shared_prefix` knows its attention and positions; else groups go through plain TRL.
    encodes_apart: `get_image_features(pixel_values, image_grid_thw)` gives one tensor an image, which the model takes
        as `mm_encoder_outputs`.
    """

    name: str
    model_types: tuple[str, ...]
    vision: tuple[str, ...]
    placeholders: tuple[str, ...] = ()
    end_tokens: tuple[str, ...] = ()
    set_pixel_limits: Callable[[Any, int, int], None] | None = None
    loader: str = "AutoModelForImageTextToText"
    shares_prefix: bool = False
    encodes_apart: bool = False

    @property
    def edges(self) -> bool:
        """Whether its pixel limits are Qwen's, which vLLM takes too, as far as is known."""
        return self.set_pixel_limits in (None, edge_limits)

    @property
    def lora_exclusion(self) -> str:
        """The pattern (PEFT matches it against complete module names) that keeps adapters off a frozen tower."""
        return rf"(.*\.)?({'|'.join(self.vision)})\..*"

    def vision_modules(self, model) -> list:
        """The modules of `vision` in a model for conditional generation. Raises UsageError: it has none."""
        if not self.vision or not all(hasattr(model.base_model, name) for name in self.vision):
            what = f"where the vision tower of a {model.config.model_type} model is, is not known"
            hint = "model.freeze_vision: false, or describe the family: model.family: my_family.py:FAMILY"
            raise UsageError(what, hint=hint)
        return [getattr(model.base_model, name) for name in self.vision]

    def takes_features(self, model) -> bool:
        """Whether an image can be encoded apart from the model's pass; transformers has it since 5.19."""
        return self.encodes_apart and "mm_encoder_outputs" in inspect.signature(type(model).forward).parameters

    def visual_tokens(self, config, tokenizer) -> dict[str, int]:
        """Token -> id of all that stands for visual input, by the config's fields and by `placeholders`."""
        ids = [getattr(config, field, None) for field in _TOKEN_FIELDS]
        known = {tokenizer.convert_ids_to_tokens(i): i for i in ids if isinstance(i, int) and 0 <= i < len(tokenizer)}
        vocabulary = tokenizer.get_vocab()
        return known | {t: vocabulary[t] for t in self.placeholders if t in vocabulary}


_FAMILIES: dict[str, Family] = {}


def register(family: Family) -> Family:
    """Make a family known; a later one takes the place of an earlier one of the same `model_type`."""
    _FAMILIES.update(dict.fromkeys(family.model_types, family))
    return family


def of(config) -> Family:
    """The family of a transformers config, or one that knows nothing special of it."""
    return of_type(config.model_type)


def of_type(model_type: str) -> Family:
    """The family of a `model_type`."""
    return _FAMILIES.get(model_type) or Family(model_type, (), ())


def use(spec: str | None) -> None:
    """Register the family that a recipe's `model.family` names. Raises UsageError: not importable, or no `Family`."""
    if spec is None:
        return
    found = load_named(spec, "model.family")
    if not isinstance(found, Family):
        raise UsageError(f"model.family {spec} is a {type(found).__name__}, not a r1vfree_cli.models.family.Family")
    register(found)


def limit_pixels(family: Family, processor, min_pixels: int, max_pixels: int) -> None:
    """Set the recipe's limits on the pixels of an image after resizing, or say that the family has none."""
    if family.set_pixel_limits is None:
        console.warn(f"model.min_pixels and max_pixels do nothing: r1v does not know how {family.name} resizes images")
    else:
        family.set_pixel_limits(processor, min_pixels, max_pixels)


_QWEN: dict[str, Any] = {
    "vision": ("visual",),
    "placeholders": ("<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>"),
    "end_tokens": ("<|im_end|>",),
    "set_pixel_limits": edge_limits,
    "shares_prefix": True,
    "encodes_apart": True,
}
_QWENS = {"Qwen2-VL": "qwen2_vl", "Qwen2.5-VL": "qwen2_5_vl", "Qwen3-VL": "qwen3_vl", "Qwen3.5": "qwen3_5"}
for _name, _type in _QWENS.items():
    register(Family(_name, (_type,), **_QWEN))
register(
    Family(
        "InternVL",
        ("internvl",),
        vision=("vision_tower", "multi_modal_projector"),
        placeholders=("<img>", "</img>", "<IMG_CONTEXT>", "<video>"),
        end_tokens=("<|im_end|>",),
        set_pixel_limits=tile_limits,
    )
)
