"""What a server's reply holds: strict JSON, tokens, errors, a chat completion. All that it is not is a `Failure`."""

from __future__ import annotations

import json
import re
import zlib
from collections import Counter
from dataclasses import dataclass
from typing import Any

from .protocol import Failure

MAX_REPLY_BYTES = 1 << 20
# How a reply ends that is complete, or cut at its limit; and other servers' names for these.
ENDS = (None, "", "stop", "length", "tool_calls", "function_call")
OTHER_NAMES = {"eos": "stop", "eos_token": "stop", "stop_sequence": "stop", "end_turn": "stop", "max_tokens": "length"}
FILTERED = ("content_filter", "safety", "recitation")  # Gemini's names for it too

# Errors by name in a reply with status 200, as the status that OpenAI's server gives them.
_STATUS = dict.fromkeys(("invalid_api_key", "authentication_error", "invalid_authentication_error"), 401)
_STATUS |= {"permission_error": 403, "permission_denied": 403, "rate_limit_exceeded": 429, "rate_limit_error": 429}
_STATUS |= dict.fromkeys(("model_not_found", "not_found_error", "invalid_model"), 404) | {"invalid_request_error": 400}


@dataclass(frozen=True)
class Reply:
    """One chat completion.

    finish: the endpoint's reason, `length` when it was cut.
    cause: why the text is empty: `length` (cut before the answer), `reasoning` (nothing but reasoning), `tool_calls`,
        `empty`; None for a text. Refusals, filtered replies and errors are failed calls, never empty texts.
    """

    text: str
    model: str
    finish: str | None
    prompt_tokens: int
    completion_tokens: int
    cause: str | None = None


def strict_json(data: bytes | str) -> Any:
    """Parse JSON in UTF-8.

    Raises Failure: not UTF-8, not JSON (NaN is none), nested too deeply, or an object that has a key twice.
    """
    try:
        text = data.decode("utf-8") if isinstance(data, bytes) else data
        return json.loads(text, object_pairs_hook=_once_each, parse_constant=_no_number)
    except (ValueError, RecursionError) as e:
        raise Failure("unparsable", f"not JSON ({type(e).__name__}): {data[:4000]!r}") from None


def _no_number(text: str) -> None:
    raise ValueError(f"{text} is no JSON")


def _once_each(pairs: list[tuple[str, Any]]) -> dict:
    found = dict(pairs)
    if len(found) != len(pairs):
        twice = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise Failure("unparsable", f"the key {twice!r} stands twice in one object")
    return found


def unpacked(data: bytes) -> bytes:
    unpacker = zlib.decompressobj(47)  # gzip and zlib
    try:
        found = unpacker.decompress(data, MAX_REPLY_BYTES + 1)
    except zlib.error as e:
        raise Failure("unparsable", f"a broken compressed reply: {e}") from None
    if not unpacker.eof and len(found) <= MAX_REPLY_BYTES:
        raise Failure("unparsable", "a compressed reply that was cut")
    if len(found) > MAX_REPLY_BYTES:
        raise Failure("too_large", f"a reply above {MAX_REPLY_BYTES} bytes, unpacked")
    return found


def tokens(document: Any) -> tuple[int, int]:
    """Input and output tokens of a reply, whatever else it holds; 0 where it does not say."""
    usage = document.get("usage") if isinstance(document, dict) else None

    def count(key: str) -> int:
        found = usage.get(key) if isinstance(usage, dict) else None
        return found if type(found) is int and 0 <= found < 1 << 31 else 0

    return count("prompt_tokens"), count("completion_tokens")


def error_of(document: Any) -> Any:
    """The error in a reply that has no result: under `error`, or the document itself, as some servers have it."""
    if not isinstance(document, dict):
        return None
    if document.get("error"):
        return document["error"]
    names = {"code", "status_code", "error_code", "detail"}
    is_error = not (document.get("choices") or document.get("data")) and names & document.keys()
    return document if is_error or document.get("object") == "error" else None


def code_in(said: str) -> str:
    """Code and type of the error that a refusal holds."""
    try:
        error = error_of(json.loads(said))
    except (ValueError, RecursionError, LookupError, TypeError):
        return ""
    return f"{error.get('code')} {error.get('type')}" if isinstance(error, dict) else ""


def status_in(error: Any) -> int:
    """The status that an error in a reply with status 200 would have had; 500, which is asked again, where it says none."""
    known = error if isinstance(error, dict) else {}
    code = next((known[name] for name in ("code", "status", "status_code", "error_code") if known.get(name)), None)
    code = int(code) if isinstance(code, str) and re.fullmatch(r"[45]\d\d", code) else code
    if type(code) is int and 400 <= code < 600:
        return code
    return next((_STATUS[name] for key in ("code", "type") if (name := str(known.get(key))) in _STATUS), 500)


def read_reply(document: Any, asked: str) -> Reply:
    """The reply in a chat completion; `asked` is the model's name where the document gives none.

    Raises Failure: no chat completion, a refusal, a filtered reply, or the endpoint's error.
    """
    try:
        (choice,) = document["choices"]
        message, finish = choice["message"], choice.get("finish_reason")
        content, refusal, error = message.get("content"), message.get("refusal"), choice.get("error")
    except (LookupError, TypeError, AttributeError, ValueError):
        raise Failure("unparsable", f"no chat completion: {document!r}") from None
    if finish is not None and not isinstance(finish, str):
        raise Failure("unparsable", f"finish_reason is {finish!r}")
    finish = finish and OTHER_NAMES.get(finish.lower(), finish.lower())
    if finish in FILTERED:
        raise Failure("content_filter", f"the reply was filtered: {refusal or content!r}")
    if error or finish in ("error", "abort"):
        raise Failure("server_error", f"the reply ended in an error: {error or content!r}", temporary=True)
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content or []
    if not isinstance(parts, list) or not all(isinstance(part, dict) for part in parts):
        raise Failure("unparsable", f"the content is no text: {content!r}")
    if finish not in ENDS:  # `cancelled`, `insufficient_system_resource`: what is there is not the model's answer
        raise Failure("unfinished", f"finish_reason is {finish!r}: {content!r}", temporary=True)
    refusal = refusal or next((part["refusal"] for part in parts if part.get("refusal")), None)
    if refusal:
        raise Failure("refusal", str(refusal))
    texts = [part.get("text") for part in parts if part.get("type") in ("text", "output_text")]
    if not all(isinstance(text, str) for text in texts):
        raise Failure("unparsable", f"the content is no text: {content!r}")
    # Half a surrogate pair, which JSON can hold and no file can, becomes `?`.
    text = "".join(texts).encode("utf-8", "replace").decode()
    model = document.get("model")
    return Reply(
        text,
        model.encode("utf-8", "replace").decode() if isinstance(model, str) and model else asked,
        finish,
        *tokens(document),
        None if text.strip() else _cause(message, finish),
    )


def _cause(message: dict, finish: Any) -> str:
    if finish == "length":
        return "length"
    if message.get("reasoning_content") or message.get("reasoning"):
        return "reasoning"
    return "tool_calls" if message.get("tool_calls") else "empty"
