"""What the reward and the backends say to each other: a question, a verdict, a failure that is not a verdict."""

from __future__ import annotations

import base64
import hashlib
import io
import json
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL.Image import Image


JPEG_QUALITY = 95
MAX_SCORE = 1e4  # of a reward model's own scale: a number beyond it is a broken judge's, and would rule its group


class JudgeImage:
    """An image on its way to a judge: hashed and encoded once, however many answers are about it."""

    def __init__(self, image: Image):
        self.image = image

    @cached_property
    def digest(self) -> str:
        return image_digest(self.image)

    @cached_property
    def data_uri(self) -> str:
        """PNG, because a lossy copy would get another score."""
        return image_url(self.image)


def image_digest(image: Image) -> str:
    """sha256 (hex) of mode, size and pixels."""
    digest = hashlib.sha256(f"{image.mode} {image.size}".encode())
    digest.update(image.tobytes())
    return digest.hexdigest()


def image_url(image: Image, max_bytes: int | None = None) -> str:
    """The image as a data URL: PNG, or JPEG of quality 95 where the PNG has more than `max_bytes`."""
    picture, kind, buffer = image.convert("RGB"), "png", io.BytesIO()
    picture.save(buffer, "PNG", compress_level=1)
    if max_bytes is not None and buffer.tell() > max_bytes:
        kind, buffer = "jpeg", io.BytesIO()
        picture.save(buffer, "JPEG", quality=JPEG_QUALITY)
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def with_images(messages: list[dict], urls: Iterable[str]) -> list[dict]:
    """A conversation as HTTP has it: the next of `urls` in place of each placeholder for an image."""
    left = iter(urls)

    def sent(part: dict) -> dict:
        return {"type": "image_url", "image_url": {"url": next(left)}} if part["type"] == "image" else part

    return [m | {"content": [sent(part) for part in m["content"]]} for m in messages]


@dataclass(frozen=True)
class Question:
    """What a judge is asked: is `answer` right for `problem`, given the images?"""

    images: tuple[JudgeImage, ...]
    problem: str
    answer: str

    def key(self, identity: dict) -> str:
        """sha256 (hex) of all that decides the score: the judge's identity, the images' content, the texts."""
        content = [identity, [i.digest for i in self.images], self.problem, self.answer]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class Verdict:
    """A score, and what it cost in tokens and in seconds from request to reply, retries included."""

    score: float
    input_tokens: int = 0
    output_tokens: int = 0
    seconds: float = 0.0


@dataclass(eq=False)
class Failure(Exception):
    """A call that gave nothing usable; `kind` is counted.

    down: it could not be reached, so asking again later may help. temporary: asking again now may. wait: seconds that
    the server asks for. status: of HTTP. Tokens: what it cost.
    """

    kind: str
    message: str
    down: bool = False
    temporary: bool = False
    wait: float | None = None
    status: int | None = None
    input_tokens: int = 0
    output_tokens: int = 0

    def __str__(self) -> str:
        return f"{self.kind}: {self.message}"


def checked(score: object, bounded: bool) -> float:
    """`score` as a float.

    Raises Failure: not a number, not finite, beyond `MAX_SCORE`, or out of [0, 1] where scores are probabilities.
    """
    if isinstance(score, bool) or not isinstance(score, int | float):
        raise Failure("unparsable", f"score {score!r} is not a number")
    # A softmax in half precision may exceed 1 by a rounding error; nothing else may. NaN fits no range.
    low, high = (-1e-6, 1 + 1e-6) if bounded else (-MAX_SCORE, MAX_SCORE)
    if not low <= score <= high:
        shown = f"{score:.6g}" if isinstance(score, float) else f"an integer of {score.bit_length()} bits"
        raise Failure("out_of_range", f"score {shown} is not in [{low:.0f}, {high:.0f}]")
    return float(score)
