"""Layouts of training files, told by a record's columns: r1v's own, and those that other trainers read.

LLaVA and ShareGPT `conversations`, OpenAI `messages` (ms-swift's and LLaMA-Factory's have `images` beside), ms-swift's
`query` and `response`, verl's `prompt` with `reward_model`. Of a conversation the first turn becomes the row.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

from ..core.errors import UsageError
from .rows import RawRow, RowProblem

TARGETS = {name: name for name in ("id", "problem", "images", "solution", "thinking")}
TARGETS |= {"question": "problem", "image": "images", "answer": "solution"}
ACCEPTED = (
    "problem or question, image or images; optionally id, solution or answer, thinking",
    "conversations: [{from: human, value: ...}, {from: gpt, value: ...}], image or images (LLaVA, ShareGPT, VLM-R1)",
    "messages: [{role: user, content: ...}, {role: assistant, content: ...}], images (OpenAI, ms-swift)",
    "query, response, images (ms-swift)",
    "prompt (messages), images, reward_model: {ground_truth: ...} (verl)",
)
_ROLES = {"human": "user", "gpt": "assistant", "model": "assistant"}
_PARTS = (None, "text", "image", "image_url", "input_text", "input_image")
_THOUGHT = re.compile(r"\s*<think>(.*?)</think>(.*)", re.DOTALL)


def first(record: Mapping, *names: str) -> Any:
    """The first of the columns that holds something; else the first that is there at all, though empty."""
    there = [record[name] for name in names if record.get(name) is not None]
    return next((value for value in there if value not in ("", [])), there[0] if there else None)


def is_record(document: Mapping) -> bool:
    """Whether it has a column that tells its layout."""
    return any(document.get(name) is not None for needed, _ in _LAYOUTS for name in needed)


def read(record: dict) -> RawRow:
    """A record of any accepted layout.

    Raises:
        RowProblem: a conversation that is none.
    """
    for needed, convert in _LAYOUTS:
        if any(record.get(name) is not None for name in needed):
            return convert(record)
    return own_rows(record)


def own_rows(record: dict) -> RawRow:
    """The row's columns, with `question`, `answer`, `image`, `image_path`, `file_name` as other names."""
    return RawRow(
        id=record.get("id"),
        images=_images(record),
        problem=first(record, "problem", "question"),
        solution=first(record, "solution", "answer"),
        thinking=record.get("thinking"),
        layout="problem and solution columns",
    )


def _images(record: dict) -> Any:
    return first(record, "images", "image", "image_path", "file_name")


# --- columns named by the user ---------------------------------------------------------------------------------


def parse_columns(text: str) -> dict[str, str]:
    """`problem=question,image=img` -> {"problem": "question", "images": "img"}.

    Raises:
        UsageError: another form, or a name that is no column of a row.
    """
    found: dict[str, str] = {}
    for part in text.split(","):
        target, _, column = (word.strip() for word in part.partition("="))
        if target not in TARGETS or not column:
            raise UsageError(
                f"--columns {part!r}: want NAME=COLUMN, with a name of {', '.join(TARGETS)}",
                hint="--columns problem=question,image=img",
            )
        found[TARGETS[target]] = column
    return found


def named(columns: dict[str, str]) -> Callable[[dict], RawRow]:
    """Reads records by `columns` (row's column -> record's, `a.b` for one inside another), else by their own names."""

    def convert(record: dict) -> RawRow:
        named_so = {target: column_of(record, column) for target, column in columns.items()}
        return replace(own_rows(record | named_so), layout="named columns")

    return convert


def column_of(record: Any, column: str) -> Any:
    """The value of a column, also `a.b`; None when it is not there."""
    if isinstance(record, dict) and column not in record and "." in column:
        head, _, rest = column.partition(".")
        return column_of(record.get(head), rest)
    return record.get(column) if isinstance(record, dict) else None


# --- conversations ---------------------------------------------------------------------------------------------


def _conversation(record: dict, layout: str, messages: Any, problem: Any = None, solution: Any = None) -> RawRow:
    """The first turn of a conversation; a `problem` or `solution` that is known otherwise goes before its texts."""
    turns, systems = _turns(messages)
    asked, shown, reply = turns[0]
    images = _images(record) or shown
    marked = asked.count("<image>")
    if len(turns) > 1 and isinstance(images, list) and 0 < marked < len(images):
        images = images[:marked]  # the others belong to later turns
    thought = _THOUGHT.fullmatch(reply or "")
    thinking, answer = thought.groups() if thought else (None, reply)
    return RawRow(
        id=record.get("id"),
        images=images,
        problem=problem or asked,
        solution=next((s for s in (solution, first(record, "solution", "answer"), answer) if s is not None), None),
        thinking=thinking,
        layout=layout,
        left_out=["system message"] * systems + ["later turn of a conversation"] * (len(turns) - 1),
    )


def _turns(messages: Any) -> tuple[list[tuple[str, list, str | None]], int]:
    """[(question, images, reply)], at least one, and how many system messages there are."""
    turns: list[tuple[str, list, str | None]] = []
    systems = 0
    for role, content in _said(messages):
        if role == "system":
            systems += 1
            continue
        text, images = _content(content)
        if role == "user":
            turns.append((text, images, None))
        elif role == "assistant" and turns and turns[-1][2] is None:
            turns[-1] = (*turns[-1][:2], text)
        else:
            raise RowProblem("conversation is not question and answer in turn")
    if not turns:
        raise RowProblem("conversation without a question")
    return turns, systems


def _said(messages: Any) -> Iterator[tuple[str, Any]]:
    """(role, content) in order."""
    messages = _parsed(messages)
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise RowProblem("conversation is not a list of messages")
    for message in messages:
        if "human" in message:
            yield "user", message["human"]
            if message.get("assistant") is not None:
                yield "assistant", message["assistant"]
        else:
            role = str(first(message, "role", "from"))
            yield _ROLES.get(role, role), first(message, "content", "value")


def _parsed(value: Any) -> Any:
    """What a table's cell holds as JSON text."""
    try:
        return json.loads(value) if isinstance(value, str) else value
    except (ValueError, RecursionError):
        return value


def _content(content: Any) -> tuple[str, list]:
    """Text and images of a message: a text, or a list of parts."""
    texts, images = [], []
    for part in content if isinstance(content, list) else [content]:
        if isinstance(part, dict) and part.get("type") in _PARTS:
            image = first(part, "image", "image_url", "path", "url")
            image = image.get("url") if isinstance(image, dict) and "url" in image else image
            images += [] if image is None else [image]
            part = part.get("text") or ""
        if not isinstance(part, str | None):
            raise RowProblem("message part is neither text nor image")
        texts.append(part or "")
    return "\n".join(text for text in texts if text), images


def _conversations(record: dict) -> RawRow:
    layout = "LLaVA conversations" if record.get("image") is not None else "ShareGPT conversations"
    return _conversation(record, layout, first(record, "conversations", "conversation"))


def _messages(record: dict) -> RawRow:
    layout = "OpenAI messages" if record.get("images") is None else "ms-swift messages"
    return _conversation(record, layout, record["messages"])


def _query(record: dict) -> RawRow:
    earlier = _parsed(record.get("history")) or []
    if not isinstance(earlier, list) or not all(isinstance(turn, list) and len(turn) == 2 for turn in earlier):
        raise RowProblem("history is not a list of questions with answers")
    pairs = [*earlier, (record["query"], record.get("response"))]
    messages = [{"human": asked, "assistant": reply} for asked, reply in pairs]
    return _conversation(record, "ms-swift query and response", messages)


def _verl(record: dict) -> RawRow:
    """`extra_info.question` goes before the prompt, which ends with an instruction on another form of answer."""
    prompt = _parsed(record["prompt"])
    extra, reward = (_parsed(record.get(name)) for name in ("extra_info", "reward_model"))
    extra, reward = (part if isinstance(part, dict) else {} for part in (extra, reward))
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    return _conversation(record, "verl prompt", messages, extra.get("question"), reward.get("ground_truth"))


_LAYOUTS: tuple[tuple[tuple[str, ...], Callable[[dict], RawRow]], ...] = (
    (("problem", "question"), own_rows),
    (("conversations", "conversation"), _conversations),
    (("messages",), _messages),
    (("query",), _query),
    (("prompt",), _verl),
)
