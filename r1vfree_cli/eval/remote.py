"""Generation through an OpenAI-compatible endpoint, with the same prompt and pixel limits as a local model."""

import io
import itertools
import math

from ..config.schema import TOKEN_SIDE
from ..judges.protocol import image_url, with_images


def fitted(width: int, height: int, min_pixels: int, max_pixels: int) -> tuple[int, int]:
    """(width, height) within the limits, both multiples of 28, near the same shape: Qwen-VL's rule of resizing.

    A server that applies the same or wider limits then leaves the image as it is, unless no such shape is between them
    (`is_settled`): 300 x 200 at 3136 to 3136 becomes 56 x 28, and then 84 x 56.
    """
    wide, high = (max(TOKEN_SIDE, round(side / TOKEN_SIDE) * TOKEN_SIDE) for side in (width, height))
    if wide * high > max_pixels:
        scale = math.sqrt(width * height / max_pixels)
        return tuple(max(TOKEN_SIDE, math.floor(s / scale / TOKEN_SIDE) * TOKEN_SIDE) for s in (width, height))  # type: ignore[return-value]
    if wide * high < min_pixels:
        scale = math.sqrt(min_pixels / (width * height))
        return tuple(math.ceil(s * scale / TOKEN_SIDE) * TOKEN_SIDE for s in (width, height))  # type: ignore[return-value]
    return wide, high


def size_of(image: bytes) -> tuple[int, int]:
    """(width, height)"""
    from PIL import Image

    with Image.open(io.BytesIO(image)) as opened:
        return opened.size


def is_settled(width: int, height: int, min_pixels: int, max_pixels: int) -> bool:
    """Whether the fitted image stays as it is when a server fits it once more."""
    once = fitted(width, height, min_pixels, max_pixels)
    return fitted(*once, min_pixels, max_pixels) == once


def data_url(image: bytes, limits: tuple[int, int] | None, max_bytes: int | None = None) -> str:
    """The image, within the limits on its pixels if any, as a data URL: PNG, or JPEG where the PNG is too large."""
    from PIL import Image

    with Image.open(io.BytesIO(image)) as opened:
        picture = opened.convert("RGB")
    if limits is not None:
        picture = picture.resize(fitted(*picture.size, *limits), Image.Resampling.BICUBIC)
    return image_url(picture, max_bytes)


def with_image(messages: list[dict], url: str | None) -> list[dict]:
    """The conversation, its image placeholder replaced by the image; a turn without one is a plain string."""
    turns = with_images(messages, itertools.repeat(url or ""))
    for turn in turns:
        if all(part["type"] == "text" for part in turn["content"]):
            turn["content"] = "".join(part["text"] for part in turn["content"])
    return turns
