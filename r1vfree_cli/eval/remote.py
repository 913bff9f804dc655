"""Generation through an OpenAI-compatible endpoint, with the same prompt and pixel limits as a local model."""

from __future__ import annotations

import base64
import io
import math

_FACTOR = 28  # pixels a side of one visual token of Qwen2-VL and Qwen2.5-VL


def fitted(width: int, height: int, min_pixels: int, max_pixels: int) -> tuple[int, int]:
    """(width, height) within the limits, both multiples of 28, near the same shape: Qwen-VL's rule of resizing.

    A server that applies the same or wider limits then leaves the image as it is.
    """
    wide, high = (max(_FACTOR, round(side / _FACTOR) * _FACTOR) for side in (width, height))
    if wide * high > max_pixels:
        scale = math.sqrt(width * height / max_pixels)
        return tuple(max(_FACTOR, math.floor(s / scale / _FACTOR) * _FACTOR) for s in (width, height))  # type: ignore[return-value]
    if wide * high < min_pixels:
        scale = math.sqrt(min_pixels / (width * height))
        return tuple(math.ceil(s * scale / _FACTOR) * _FACTOR for s in (width, height))  # type: ignore[return-value]
    return wide, high


def data_url(image: bytes, min_pixels: int, max_pixels: int) -> str:
    """The image within the limits, as a PNG data URL."""
    from PIL import Image

    with Image.open(io.BytesIO(image)) as opened:
        picture = opened.convert("RGB")
    size = fitted(*picture.size, min_pixels, max_pixels)
    out = io.BytesIO()
    picture.resize(size, Image.Resampling.BICUBIC).save(out, "PNG")
    return "data:image/png;base64," + base64.b64encode(out.getvalue()).decode()


def with_image(messages: list[dict], url: str | None) -> list[dict]:
    """The conversation, its image placeholder replaced by the image."""
    picture = {"type": "image_url", "image_url": {"url": url}}
    return [m | {"content": [picture if part["type"] == "image" else part for part in m["content"]]} for m in messages]
