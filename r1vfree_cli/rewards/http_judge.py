"""Judges behind HTTP: what `classify` and `chat` share. The openai client sends and retries; replies are validated.

Three kinds of trouble, told apart here: the configuration's (`UsageError`), the judge being down (asked again until
the step's deadline), and a reply that is no verdict (`Failure`). Redirects are not followed: the key and the images
go to the configured origin only.
"""

from __future__ import annotations

import asyncio
import json
import os
import time
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any, Literal

import httpx2
import openai
from pydantic import BaseModel, ConfigDict, ValidationError

from ..config import FeedbackReward
from ..errors import UsageError
from .judge_prompt import PromptKind
from .judging import Failure, Question, Verdict

MAX_REPLY_BYTES = 1 << 20
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.5, 10.0


class Reply(BaseModel):
    """Base of the shapes that replies are validated against: other keys are ignored, types are not bent."""

    model_config = ConfigDict(extra="ignore", strict=True)


class Usage(Reply):
    prompt_tokens: int = 0
    completion_tokens: int | None = 0


class HttpJudge:
    """A judge at `base_url`. Subclasses say where to post, what to send, and how to read the reply.

    Args:
        reward: the recipe's feedback reward.
        base_url: origin and path prefix.
        api_key: sent as a bearer token; None sends none of value.
    """

    path = ""
    prompt: PromptKind = "judge"
    one_by_one = True

    def __init__(self, reward: FeedbackReward, base_url: str, api_key: str | None):
        self.reward, self.base_url, self._api_key = reward, base_url.rstrip("/"), api_key
        self._client: Any = None
        self._next_start = 0.0

    def body(self, question: Question) -> dict:
        """The request's JSON."""
        raise NotImplementedError

    def read(self, document: Any) -> Verdict:
        """The verdict in a reply's JSON; pydantic's ValidationError and `Failure` mean that there is none."""
        raise NotImplementedError

    async def open(self) -> None:
        self._client = openai.AsyncOpenAI(
            base_url=self.base_url,
            api_key=self._api_key or "none",
            timeout=self.reward.timeout_s,
            max_retries=self.reward.max_retries,
            default_headers={"Accept-Encoding": "identity"},
            http_client=openai.DefaultAsyncHttpxClient(
                follow_redirects=False,
                event_hooks={"response": [_limit]},
                limits=httpx2.Limits(max_connections=self.reward.concurrency),
                timeout=self.reward.timeout_s,
            ),
        )

    async def close(self) -> None:
        if self._client is not None:
            await self._client.close()

    async def judge(self, questions: list[Question]) -> list[Verdict | Failure]:
        return [await self._judge_one(question) for question in questions]

    async def _judge_one(self, question: Question) -> Verdict | Failure:
        """Ask until there is a reply; the caller sets the deadline by cancelling."""
        pause = FIRST_PAUSE_S
        while True:
            try:
                await self._wait_for_rate()
                begin = time.monotonic()
                verdict = await self._ask(question)
                return replace(verdict, seconds=time.monotonic() - begin)
            except Failure as failure:
                if not failure.down:
                    return Failure(failure.kind, self._without_key(failure.message))
            await asyncio.sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE_S)

    async def _wait_for_rate(self) -> None:
        if self.reward.requests_per_minute is None:
            return
        now = asyncio.get_running_loop().time()
        start = max(now, self._next_start)
        self._next_start = start + 60 / self.reward.requests_per_minute
        await asyncio.sleep(start - now)

    async def _ask(self, question: Question) -> Verdict:
        text = await self._send("POST", self.path, self.body(question))
        try:
            return self.read(_json(text))
        except ValidationError as e:
            first = e.errors(include_input=False, include_url=False)[0]
            where = ".".join(str(p) for p in first["loc"])
            raise Failure("unparsable", f"{where}: {first['msg']}") from None

    async def _send(
        self, method: Literal["GET", "POST"], path: str, body: dict | None = None, *, optional: bool = False
    ) -> str:
        """The text of a reply with status 200; with `optional`, "null" from a server that does not know the path.

        Raises:
            UsageError, Failure
        """
        try:
            if method == "GET":
                reply = await self._client.get(path, cast_to=httpx2.Response)
            else:
                reply = await self._client.post(path, body=body, cast_to=httpx2.Response)
        except openai.APIStatusError as e:
            if optional and e.status_code in (404, 405):
                return "null"
            raise self._status(e, path) from None
        except openai.APITimeoutError:
            raise Failure("timeout", f"no reply within {self.reward.timeout_s:g} s") from None
        except openai.APIConnectionError as e:
            cause = e.__cause__ or e
            raise Failure("connection", f"{type(cause).__name__}: {cause}", down=True) from None
        except _RefusedReplyError as e:
            raise Failure("too_large", str(e)) from None
        return reply.text

    def _status(self, error: openai.APIStatusError, path: str) -> Exception:
        status, where = error.status_code, f"{self.base_url}{path}"
        said = self._without_key(_shorten(error.response.text))
        if status in (401, 403):
            return UsageError(
                f"the judge at {where} refused access ({status})",
                details=[said],
                hint=f"put the key in {self.reward.api_key_env}, or name its variable in api_key_env",
            )
        if status == 404:
            return UsageError(
                f"the judge at {where} knows no such path or model (404)",
                details=[said],
                hint="check base_url and model",
            )
        if 300 <= status < 400:
            return Failure("redirect", f"{status} to {error.response.headers.get('location', '?')[:200]}")
        if status == 429:
            return Failure("rate_limited", said)
        if status in (502, 503, 504):
            return Failure("unavailable", f"{status}: {said}", down=True)
        return Failure("server_error" if status >= 500 else "rejected", f"{status}: {said}")

    def _without_key(self, text: str) -> str:
        """A server or a gateway may show the request that it got."""
        return text.replace(self._api_key, "***") if self._api_key else text


class _RefusedReplyError(openai.OpenAIError):
    """A reply that is not read to its end. The openai client passes its own errors through and does not retry."""


class _Limited(httpx2.AsyncByteStream):
    def __init__(self, stream: Any):
        self._stream = stream

    async def __aiter__(self) -> AsyncIterator[bytes]:
        size = 0
        async for chunk in self._stream:
            size += len(chunk)
            if size > MAX_REPLY_BYTES:
                raise _RefusedReplyError(f"a reply above {MAX_REPLY_BYTES} bytes")
            yield chunk

    async def aclose(self) -> None:
        await self._stream.aclose()


async def _limit(response: httpx2.Response) -> None:
    # The limit counts bytes on the wire, so nothing may be packed into them.
    if response.headers.get("content-encoding", "identity") != "identity":
        raise _RefusedReplyError("a compressed reply that was not asked for")
    response.stream = _Limited(response.stream)


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise Failure("unparsable", f"not JSON: {_shorten(text)!r}") from None


def _shorten(text: str) -> str:
    return " ".join(text.split())[:200]


def key_of(reward: FeedbackReward) -> str | None:
    """The API key to send, from the environment.

    A key that the environment holds for OpenAI goes to chat endpoints only: a classify server gets one when
    `api_key_env` names a variable of its own.
    """
    if reward.serve or (reward.backend == "classify" and reward.api_key_env == "OPENAI_API_KEY"):
        return None
    return os.environ.get(reward.api_key_env) or None
