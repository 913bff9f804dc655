"""The one prompt and the one parser of <think>/<answer>: SFT, GRPO, rewards and evaluation all use these."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass

# The question is inserted verbatim; braces in it mean nothing because this is not a format string.
INSTRUCTION = (
    "Look at the image and reason first, inside <think> </think> tags; "
    "then give the final answer alone, inside <answer> </answer> tags."
)


_CONTROL = re.compile(r"<(?=\|[^|<>\s]*\|>)")


def as_text(text: str) -> str:
    """`text` with control tokens (`<|im_end|>`, `<|image_pad|>`) kept from being one: a space follows their `<`.

    Data can then neither end a turn nor claim an image that is not there.
    """
    return _CONTROL.sub("< ", text)


def user_text(problem: str) -> str:
    """The text part of the user's turn: question, then instruction."""
    return f"{as_text(problem).strip()}\n{INSTRUCTION}"


def build_messages(problem: str, num_images: int = 1) -> list[dict]:
    """The conversation for a row, without images: `num_images` placeholders first, then the text.

    This is the form that `apply_chat_template` of a Qwen-VL processor and TRL's trainers take.
    """
    content: list[dict] = [{"type": "image"} for _ in range(num_images)]
    content.append({"type": "text", "text": user_text(problem)})
    return [{"role": "user", "content": content}]


def target_text(thinking: str | None, answer: str) -> str:
    """The assistant's turn for SFT, in the form that `parse` reads back.

    Raises:
        ValueError: `answer` is empty or None; "None" is never trained on.
    """
    if answer is None or not str(answer).strip():
        raise ValueError("an answer is needed for a training target")
    return f"<think>{as_text(thinking or '').strip()}</think><answer>{as_text(str(answer)).strip()}</answer>"


def template_hash() -> str:
    """sha256 (hex) of the prompt's fixed parts; part of the run contract."""
    return hashlib.sha256(user_text("\x00").encode() + target_text("\x01", "\x02").encode()).hexdigest()


@dataclass(frozen=True)
class Parsed:
    """What `parse` found.

    thinking: text inside the first <think>, or None.
    answer: text inside the last <answer>, stripped, or None when missing, empty or unclosed.
    problem: None when the reply has exactly the asked form; else `missing`, `empty`, `unclosed`, `extra text`.
    tag: the tag the problem is about (`think` or `answer`), None for `extra text` and no problem.
    """

    thinking: str | None
    answer: str | None
    problem: str | None
    tag: str | None = None


_EXACT = re.compile(r"\s*<think>(?P<think>.*?)</think>\s*<answer>(?P<answer>.*?)</answer>\s*", re.DOTALL)
_TAGS = ("<think>", "</think>", "<answer>", "</answer>")


def parse(text: str) -> Parsed:
    """Read a reply. The last `<answer>` wins, newlines are ordinary characters, problems of the answer come first."""
    start = text.rfind("<answer>")
    thinking = _first(text, "<think>", "</think>")
    if start < 0:
        return Parsed(thinking, None, "missing", "answer")
    end = text.find("</answer>", start)
    if end < 0:
        return Parsed(thinking, None, "unclosed", "answer")
    answer = text[start + len("<answer>") : end].strip()
    if not answer:
        return Parsed(thinking, None, "empty", "answer")
    if thinking is None:
        problem = "unclosed" if "<think>" in text else "missing"
        return Parsed(None, answer, problem, "think")
    exact = _EXACT.fullmatch(text)
    if exact is None or any(tag in part for part in exact.groups() for tag in _TAGS):
        return Parsed(thinking, answer, "extra text")
    return Parsed(thinking, answer, None)


def _first(text: str, opening: str, closing: str) -> str | None:
    start = text.find(opening)
    end = text.find(closing, start) if start >= 0 else -1
    return text[start + len(opening) : end].strip() if end >= 0 else None
