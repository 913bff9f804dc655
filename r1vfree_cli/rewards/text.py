"""Rewards that need only the text: the asked form, and equality with a reference answer."""

import re
from collections.abc import Sequence
from typing import Any

from ..core.prompts import parse
from .verify import equivalent

_TAGGED = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)


def completion_text(completion: str | list[dict]) -> str:
    """The text of a completion, which TRL passes as a string or as a list of messages."""
    if isinstance(completion, str):
        return completion
    parts = []
    for message in completion:
        content = message.get("content") or ""
        parts.append(content if isinstance(content, str) else "".join(p.get("text") or "" for p in content))
    return "".join(parts)


def format_reward(completions: Sequence[Any], **_: Any) -> list[float]:
    """1.0 where the reply has exactly the asked form (`prompts.parse` finds no problem), else 0.0."""
    return [1.0 if parse(completion_text(c)).problem is None else 0.0 for c in completions]


def accuracy_reward(completions: Sequence[Any], solution: Sequence[str | None], **_: Any) -> list[float | None]:
    """1.0 where the extracted answer equals the reference, 0.0 where not or where there is none to extract.

    None where the row has no reference: not scored, which is not the same as wrong.
    """
    answers = (parse(completion_text(c)).answer for c in completions)
    pairs = list(zip(map(reference_answer, solution), answers, strict=True))
    found = iter(equivalent([(r, a) for r, a in pairs if r is not None and a is not None]))
    return [None if r is None else 0.0 if a is None else float(next(found)) for r, a in pairs]


def reference_answer(solution: str | None) -> str | None:
    """A row's `solution` as a bare answer: some sources wrap it in <answer> tags. None when there is none."""
    if solution is None:
        return None
    tagged = _TAGGED.findall(str(solution))
    return (tagged[-1] if tagged else str(solution)).strip() or None
