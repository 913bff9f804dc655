"""What the reward server takes and gives: vLLM's chat form of /classify, checked before anything is computed."""

from __future__ import annotations

import asyncio
import base64
import binascii
import hashlib
import io
import time
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal
from weakref import WeakValueDictionary

from PIL import Image
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from .protocol import Failure

MAX_IMAGE_PIXELS = 64_000_000
MAX_TEXT_CHARS = 100_000
MAX_PARTS = 64  # of a message

# The answers of a group come with the same image: it is decoded once as long as one of them waits.
_decoded: WeakValueDictionary[bytes, Image.Image] = WeakValueDictionary()


@dataclass(eq=False)
class Refused(Exception):
    """A request that is answered by an error."""

    status: int
    message: str


class _Url(BaseModel):
    url: str


class _ImagePart(BaseModel):
    type: Literal["image_url"]
    image_url: _Url


class _TextPart(BaseModel):
    type: Literal["text"]
    text: Annotated[str, Field(max_length=MAX_TEXT_CHARS)]


class _Message(BaseModel):
    role: Literal["system", "user", "assistant"]
    content: Annotated[
        list[Annotated[_ImagePart | _TextPart, Field(discriminator="type")]], Field(max_length=MAX_PARTS)
    ]


class _Body(BaseModel):
    """Other keys are ignored. Images come as data URIs: this server fetches nothing."""

    model_config = ConfigDict(extra="ignore")

    messages: list[_Message] = Field(min_length=1, max_length=16)
    add_generation_prompt: bool = False


@dataclass(eq=False)
class Job:
    """A request that can be computed: (images, messages with a placeholder for each), and how many tokens it has."""

    request: tuple[list[Image.Image], list[dict]]
    add_generation_prompt: bool
    tokens: int
    since: float = field(default_factory=time.monotonic)
    result: asyncio.Future = field(init=False)


def parse(body: bytearray, judge: Any, held: Any) -> Job:
    """A request's body as a job; `judge`, a `LocalJudge`, counts its tokens, `held` is a `limits.Room`.

    Raises Refused: what it is not, or that it needs more memory than there is now.
    """
    try:
        asked = _Body.model_validate_json(body)
    except ValidationError as e:
        first = e.errors(include_input=False, include_url=False)[0]
        at = ".".join(map(str, first["loc"]))
        raise Refused(400, f"{at}: {first['msg']}" if at else first["msg"]) from None
    size = len(body)
    body.clear()
    images: list[Image.Image] = []
    messages: list[dict] = []
    try:
        for message in asked.messages:
            content: list[dict] = []
            for part in message.content:
                if isinstance(part, _ImagePart):
                    images.append(decode_image(part.image_url.url, held))
                    content.append({"type": "image"})
                else:
                    content.append(part.model_dump())
            messages.append({"role": message.role, "content": content})
        tokens = judge.length((images, messages), add_generation_prompt=asked.add_generation_prompt)
    except (ValueError, Failure) as e:
        raise Refused(400, str(e)) from None
    held.add(-size)
    return Job((images, messages), asked.add_generation_prompt, tokens)


def decode_image(uri: str, held: Any) -> Image.Image:
    """An RGB image from a data URI.

    Raises ValueError: not a data URI, not base64, not an image, or too large. Refused: no memory for it now.
    """
    key = hashlib.sha256(uri.encode()).digest()
    if (known := _decoded.get(key)) is not None:
        held.add(known.width * known.height * 3)
        return known
    head, comma, data = uri.partition(",")
    if not head.startswith("data:image/") or not head.endswith(";base64") or not comma:
        raise ValueError("image_url must be a data URI: data:image/...;base64,...")
    try:
        image = Image.open(io.BytesIO(base64.b64decode(data, validate=True)))
        if image.width * image.height > MAX_IMAGE_PIXELS:
            raise ValueError(f"image of {image.width} x {image.height} pixels is too large")
        held.add(image.width * image.height * 3)
        _decoded[key] = picture = image.convert("RGB")
        return picture
    except (Refused, MemoryError):
        raise
    except binascii.Error:
        raise ValueError("image cannot be decoded: not base64") from None
    except Exception as e:  # damaged images raise anything
        raise ValueError(f"image cannot be decoded: {e}") from None


def classification(score: float, bounded: bool) -> dict:
    """The one entry of a reply's `data`: P(No) and P(Yes), or a score alone on the model's own scale."""
    probs = [1 - score, score] if bounded else [score]
    label = ("Yes" if score >= 0.5 else "No") if bounded else None
    return {"index": 0, "label": label, "probs": probs, "num_classes": len(probs)}
