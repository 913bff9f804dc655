"""The row, and what a raw record must pass to become one; images are the bytes of PNG or JPEG files.

What cannot become a row raises `RowProblem`, whose reason is counted: nothing is repaired by guessing.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..core import prompts
from .drops import RowProblem
from .images import image_bytes, normalise_image

SCHEMA_VERSION = 1
COLUMNS = ("id", "images", "problem", "solution", "thinking", "source")

# Markers that datasets put into a question to say where the image goes. The prompt puts images first, itself.
_IMAGE_MARKER = re.compile(
    r"</?image(?:[_ ]?\d+)?>|<\|image(?:_\d+)?\|>|<\|vision_start\|>(?:<\|image_pad\|>)*<\|vision_end\|>", re.IGNORECASE
)
_TAGS = ("<think>", "</think>", "<answer>", "</answer>")


@dataclass(frozen=True)
class RawRow:
    """A record in the row's terms, not yet checked; any field may hold anything.

    images: bytes, a path, base64, a data URL or {"bytes", "path"}, or a list of these. layout: what it was read as.
    left_out: reasons to count for what is not part of the row, such as later turns of a conversation.
    """

    id: Any = None
    images: Any = None
    problem: Any = None
    solution: Any = None
    thinking: Any = None
    layout: str = "rows"
    left_out: list[str] = field(default_factory=list)


def clean_problem(value: Any) -> str:
    """The question without image markers (`<image>`, `<image_1>`, Qwen's own) and outer white space.

    Other control tokens of chat templates are left as they are: the prompt sees that a tokenizer reads them as text.

    Raises RowProblem: not a string, empty, or not encodable.
    """
    if not isinstance(value, str):
        raise RowProblem("question missing" if value is None else "question is not a string")
    parts = [part.strip() for part in _IMAGE_MARKER.split(value)]
    text = _encodable(" ".join(part for part in parts if part))
    if not text:
        raise RowProblem("empty question")
    return text


def clean_solution(value: Any) -> str | None:
    """The bare reference answer: `<answer> 3 </answer>` becomes `3`; None when there is none, as for NaN.

    Raises RowProblem: neither text nor a finite number, or an answer with tags in it.
    """
    value = _known(value)
    if value is None:
        return None
    if isinstance(value, int | float) and not isinstance(value, bool):
        if value in (math.inf, -math.inf):
            raise RowProblem("solution is not finite")
        # A column of integers with gaps is read as floats.
        value = str(int(value) if abs(value) < 2**53 and float(value).is_integer() else value)
    if not isinstance(value, str):
        raise RowProblem("solution is neither text nor a number")
    parsed = prompts.parse(value)
    return _untagged(value if parsed.answer is None and parsed.problem != "empty" else parsed.answer or "")


def clean_thinking(value: Any) -> str | None:
    """The reasoning without its `<think>` tags; None when there is none.

    Raises RowProblem: not text, or other tags in it, which would teach a wrong format.
    """
    if not isinstance(value, str | None):
        raise RowProblem("thinking is not text")
    return _untagged((value or "").strip().removeprefix("<think>").removesuffix("</think>"))


def _untagged(text: str) -> str | None:
    text = _encodable(text.strip())
    if any(tag in text.lower() for tag in _TAGS):
        raise RowProblem("tags inside the reference answer")
    return text or None


def _encodable(text: str) -> str:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:  # half of a surrogate pair, which JSON can carry and UTF-8 cannot
        raise RowProblem("text is not valid Unicode") from None
    return text


def clean_id(value: Any, fallback: str) -> str:
    """The record's id as text; `fallback` when it has none. Whole floats are integers: tables with gaps hold such.

    Raises RowProblem: neither a string nor a number.
    """
    if value is None or value == "":
        return fallback
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise RowProblem("id is neither a string nor a number")
    return _encodable(str(int(value) if isinstance(value, float) and value.is_integer() else value))


def make_row(
    raw: RawRow, *, source: str, fallback_id: str, roots: Sequence[Path] = (), text_only: bool = False
) -> dict:
    """Check and normalise one record: a dict with the keys of `COLUMNS`; `images` is a list of bytes.

    NaN anywhere in it, as tables with gaps hold, is none. `fallback_id`: of a record without one. `roots`: folders that
    image paths are looked for in, none when images must come as bytes. `text_only`: whether a row may have no image.

    Raises RowProblem: with the reason to count.
    """
    items = _known(raw.images)
    if isinstance(items, str | bytes | dict) or not isinstance(items, Sequence):
        items = [] if items is None else [items]
    row = {
        "id": clean_id(_known(raw.id), fallback_id),
        "problem": clean_problem(_known(raw.problem)),
        "solution": clean_solution(_known(raw.solution)),
        "thinking": clean_thinking(_known(raw.thinking)),
        "source": source,
    }
    if not items and not text_only:
        raise RowProblem("no image")
    if str(raw.problem).count("<image>") > max(1, len(items)):
        raise RowProblem("fewer images than <image> markers")
    return row | {"images": [normalise_image(image_bytes(item, roots)) for item in items]}


def _known(value: Any) -> Any:
    return None if isinstance(value, float) and math.isnan(value) else value
