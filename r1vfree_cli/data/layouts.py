"""Layouts of training files, told by a record's columns: r1v's own, and those that other trainers read.

LLaVA and ShareGPT `conversations`, OpenAI `messages` (ms-swift's and LLaMA-Factory's have `images` beside), ms-swift's
`query` and `response`, verl's `prompt` with `reward_model`. Of a conversation the first turn becomes the row.
"""

import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

from ..core.errors import UsageError
from .drops import RowProblem
from .rows import RawRow, clean_solution

TARGETS = {name: name for name in ("id", "problem", "images", "solution", "thinking")}
TARGETS |= {"question": "problem", "image": "images", "answer": "solution"}
ACCEPTED = (
    "problem or question, image or images; optionally id, solution or answer, thinking",
    "conversations: [{from: human, value: ...}, {from: gpt, value: ...}], image or images (LLaVA, ShareGPT, VLM-R1)",
    "messages: [{role: user, content: ...}, {role: assistant, content: ...}], images (OpenAI, ms-swift)",
    "query, response, images (ms-swift)",
    "prompt (messages), images, reward_model: {ground_truth: ...} (verl) or completion (TRL)",
)
_ROLES = {"human": "user", "developer": "system"} | dict.fromkeys(("gpt", "chatgpt", "model", "bot"), "assistant")
_PARTS = (None, "text", "image", "image_url", "input_text", "input_image", "output_text")
_THOUGHT = re.compile(
    r"\s*<(?P<tag>\w*(?:think|thought|reason|rationale|reflect|analysis)\w*)>(.*?)</(?P=tag)>(.*)", re.DOTALL | re.I
)
_LETTERS = "ABCDEFGHIJKLMNOP"
_LETTER = re.compile(r"\(?([A-P])(?:[).:]|$)")
SPLIT_COLUMNS = ("split", "partition", "data_split", "data_subtype")
_UNFILLED = ("<ref-object>", "<bbox>")  # ms-swift puts names and boxes from `objects` there


def first(record: Mapping, *names: str) -> Any:
    """The first of the columns that holds something; else the first that is there at all, though empty."""
    there = [record[name] for name in names if record.get(name) is not None]
    return next((value for value in there if value not in ("", [])), there[0] if there else None)


def is_record(document: Mapping) -> bool:
    """Whether it has a column that tells its layout."""
    return any(document.get(name) is not None for needed, _ in _LAYOUTS for name in needed)


def is_train(record: dict) -> bool | None:
    """What a record's own column of `SPLIT_COLUMNS` says, verl's in `extra_info` too; None when it says nothing known."""
    from .tables import split_of

    extra = parsed(record.get("extra_info"))
    said = [record.get(name) for name in SPLIT_COLUMNS] + [extra.get("split") if isinstance(extra, dict) else None]
    split = next((found for text in said if isinstance(text, str) and (found := split_of(text))), None)
    return None if split is None else split == "train"


def read(record: dict) -> RawRow:
    """A record of any accepted layout. Raises RowProblem: a conversation that is none."""
    layouts = (convert for needed, convert in _LAYOUTS if any(record.get(name) is not None for name in needed))
    return next(layouts, own_rows)(record)


def own_rows(record: dict) -> RawRow:
    """The row's columns, with `question`, `answer`, `image`, `image_path`, `file_name` as other names."""
    solution = first(record, "solution", "answer")
    return RawRow(
        id=record.get("id"),
        images=_images(record),
        problem=_with_choices(record, first(record, "problem", "question"), solution),
        solution=solution,
        thinking=record.get("thinking"),
        layout="problem and solution columns",
    )


def _with_choices(record: dict, problem: Any, solution: Any) -> Any:
    """The question and, below it, the choices that a table holds beside it: a list, or columns A, B, ...

    Raises RowProblem: they are no texts, or the solution is neither a letter nor one of them, as an index is.
    """
    found = parsed(first(record, "choices", "options"))
    found = found.get("text") or list(found.values()) if isinstance(found, dict) else found  # ARC has labels beside
    if found in (None, "", []) or found != found:  # NaN
        found = [record[letter] for letter in _LETTERS if record.get(letter) is not None]
    if not isinstance(problem, str) or not found or len(found) == 1:
        return problem
    if isinstance(found, str):
        return problem if found in problem else f"{problem}\n{found}"
    if not isinstance(found, list) or not all(isinstance(c, str | int | float) for c in found):
        raise RowProblem("choices are not a list of texts")
    texts = [str(choice).strip() for choice in found]
    known = str(clean_solution(solution) or texts[0]).casefold()
    letter = _LETTER.match(known.upper())
    if known not in map(str.casefold, texts) and not (letter and letter[1] in _LETTERS[: len(texts)]):
        raise RowProblem("solution is none of the choices")
    if all(text in problem for text in texts):
        return problem
    lettered = all(_LETTER.match(text) for text in texts)
    lines = texts if lettered else [f"{name}. {text}" for name, text in zip(_LETTERS, texts, strict=False)]
    return "\n".join([problem, *lines])


def _images(record: dict) -> Any:
    images = first(record, "images", "image", "image_path", "file_name")
    return parsed(images) if isinstance(images, str) and images.startswith("[") else images


def parse_columns(text: str) -> dict[str, str]:
    """`problem=question,image=img` -> {"problem": "question", "images": "img"}. Raises UsageError: another form."""
    found: dict[str, str] = {}
    for part in text.split(","):
        name, _, column = (word.strip() for word in part.partition("="))
        if name not in TARGETS or not column:
            what = f"--columns {part!r}: want NAME=COLUMN, with a name of {', '.join(TARGETS)}"
            raise UsageError(what, hint="--columns problem=question,image=img")
        target = TARGETS[name]
        if target in found:
            raise UsageError(f"--columns names two columns for {target}: {found[target]} and {column}")
        found[target] = column
    return found


def named(columns: dict[str, str]) -> Callable[[dict], RawRow]:
    """Reads records by `columns` (row's column -> record's, `a.b` for one inside another), else by their own names."""

    def convert(record: dict) -> RawRow:
        named_so = {target: column_of(record, column) for target, column in columns.items()}
        return replace(read(record | named_so), layout="named columns")

    return convert


def column_of(record: Any, column: str) -> Any:
    """The value of a column, also `a.b`; None when it is not there."""
    if not isinstance(record, dict):
        return None
    head, _, rest = column.partition(".")
    return column_of(record.get(head), rest) if rest and column not in record else record.get(column)


def _conversation(record: dict, layout: str, messages: Any, problem: Any = None, solution: Any = None) -> RawRow:
    """The first turn of a conversation; a `problem` or `solution` that is known otherwise goes before its texts."""
    turns, systems = _turns(messages)
    asked, shown, reply = turns[0]
    images = _images(record) or shown
    marked, later = asked.count("<image>"), any("<image>" in text for text, _, _ in turns[1:])
    if later or (len(turns) > 1 and marked):  # the others belong to later turns
        images = (images if isinstance(images, list) else [images])[:marked]
    if any(mark in f"{asked}{reply}" for mark in _UNFILLED):
        raise RowProblem("placeholders for objects and boxes")
    thought = _THOUGHT.fullmatch(reply or "")
    thinking, answer = thought.groups()[1:] if thought else (None, reply)
    left_out = ["system message"] * (systems or bool(record.get("system")))
    return RawRow(
        id=record.get("id"),
        images=images,
        problem=problem or asked,
        solution=next((s for s in (solution, first(record, "solution", "answer"), answer) if s is not None), None),
        thinking=thinking,
        layout=layout,
        left_out=left_out + ["later turn of a conversation"] * (len(turns) - 1),
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
    messages = parsed(messages)
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise RowProblem("conversation is not a list of messages")
    for message in messages:
        if "human" in message:
            yield "user", message["human"]
            if message.get("assistant") is not None:
                yield "assistant", message["assistant"]
        else:
            role = str(first(message, "role", "from")).lower()
            yield _ROLES.get(role, role), first(message, "content", "value")


def parsed(value: Any) -> Any:
    """What a table's cell holds as JSON text."""
    try:
        return json.loads(value) if isinstance(value, str) else value
    except (ValueError, RecursionError):
        return value


def _content(content: Any) -> tuple[str, list]:
    """Text and images of a message: a text, or a list of parts."""
    texts, images = [], []
    if isinstance(content, int | float) and not isinstance(content, bool):  # a count, as VLM-R1 has it
        content = str(content)
    for part in content if isinstance(content, list) else [content]:
        if isinstance(part, dict) and part.get("type") in _PARTS and ("type" in part or "text" in part):
            image = first(part, "image", "image_url", "path", "url")
            images += [] if image is None else [image]
            # Without an image of its own it stands for the next one of the record's `images`.
            part = "<image>" if image is None and "image" in str(part.get("type")) else part.get("text") or ""
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
    earlier = parsed(record.get("history")) or []
    if not isinstance(earlier, list) or not all(isinstance(turn, list) and len(turn) == 2 for turn in earlier):
        raise RowProblem("history is not a list of questions with answers")
    pairs = [*earlier, (record["query"], record.get("response"))]
    messages = [{"human": asked, "assistant": reply} for asked, reply in pairs]
    return _conversation(record, "ms-swift query and response", messages)


def _verl(record: dict) -> RawRow:
    """`extra_info.question` goes before the prompt, which ends with an instruction on another form of answer.

    TRL's `completion`, or the `chosen` of two, is the reply, as is a `response`.
    """
    prompt, reply = parsed(record["prompt"]), parsed(first(record, "completion", "chosen", "response"))
    extra, reward = (parsed(record.get(name)) for name in ("extra_info", "reward_model"))
    extra, reward = (part if isinstance(part, dict) else {} for part in (extra, reward))
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    if isinstance(messages, list) and reply is not None:
        messages = messages + (reply if isinstance(reply, list) else [{"role": "assistant", "content": reply}])
    truth = next((t for t in (reward.get("ground_truth"), record.get("ground_truth")) if t is not None), None)
    layout = "verl prompt" if reply is None else "TRL prompt"
    return _conversation(record, layout, messages, extra.get("question"), truth)


_LAYOUTS: tuple[tuple[tuple[str, ...], Callable[[dict], RawRow]], ...] = (
    (("problem", "question"), own_rows),
    (("conversations", "conversation"), _conversations),
    (("messages",), _messages),
    (("query",), _query),
    (("prompt",), _verl),
)
