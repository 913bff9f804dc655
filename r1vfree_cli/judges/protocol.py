"""What the reward and the backends say to each other: a question, a verdict, a failure that is not a verdict."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import math
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Protocol

from ..core.prompts import PromptKind

if TYPE_CHECKING:
    from PIL.Image import Image


class JudgeImage:
    """An image on its way to a judge: hashed and encoded once, however many answers are about it."""

    def __init__(self, image: Image):
        self.image = image

    @cached_property
    def digest(self) -> str:
        """sha256 (hex) of mode, size and pixels."""
        digest = hashlib.sha256(f"{self.image.mode} {self.image.size}".encode())
        digest.update(self.image.tobytes())
        return digest.hexdigest()

    @cached_property
    def data_uri(self) -> str:
        """PNG, because a lossy copy would get another score."""
        buffer = io.BytesIO()
        self.image.convert("RGB").save(buffer, "PNG", compress_level=1)
        return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


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


class Failure(Exception):
    """The judge gave no verdict. `down`: it could not be reached, so asking again may help. Tokens: what it cost."""

    def __init__(self, kind: str, message: str, *, down: bool = False):
        super().__init__(f"{kind}: {message}")
        self.kind, self.message, self.down = kind, message, down
        self.input_tokens = self.output_tokens = 0


def checked(score: object, bounded: bool) -> float:
    """`score` as a float.

    Raises:
        Failure: not a number, not finite, or out of [0, 1] where scores are probabilities.
    """
    if isinstance(score, bool) or not isinstance(score, int | float):
        raise Failure("unparsable", f"score {score!r} is not a number")
    try:
        number = float(score)
    except OverflowError:  # an integer of 400 digits
        number = math.inf
    if not math.isfinite(number):
        raise Failure("out_of_range", f"score {number} is not finite")
    # A softmax in half precision may exceed 1 by a rounding error; nothing else may.
    if bounded and not -1e-6 <= number <= 1 + 1e-6:
        raise Failure("out_of_range", f"score {number} is not in [0, 1]")
    return number


class Backend(Protocol):
    """A judge. `prompt` is which form of prompt it gets; with `judge`, scores are probabilities.

    `one_by_one`: questions are asked apart, at most `concurrency` at a time; else all of a step in one call.
    `identity`: what the judge itself, once open, says that it is; part of cache keys.
    """

    prompt: PromptKind
    one_by_one: bool
    identity: dict

    async def open(self) -> None:
        """Get ready; called before the first question, again when it failed.

        Raises:
            UsageError, DataError: the configuration is wrong.
            Failure: the judge cannot be reached.
        """

    async def judge(self, questions: list[Question]) -> list[Verdict | Failure]:
        """One result per question, in order.

        Raises:
            UsageError: the configuration is wrong (no access, no such model).
        """

    async def close(self) -> None:
        """Let go of connections or memory."""
