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
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from typing import Any, Literal

import httpx2
import openai
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ..config.schema import FeedbackReward
from ..core.errors import UsageError
from ..core.prompts import PromptKind
from ..core.redact import without_key
from .protocol import Failure, Question, Verdict

MAX_REPLY_BYTES = 1 << 20
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.5, 10.0


class Reply(BaseModel):
    """Base of the shapes that replies are validated against: other keys are ignored, types are not bent."""

    model_config = ConfigDict(extra="ignore", strict=True)


class _Usage(Reply):
    prompt_tokens: int = Field(0, ge=0)
    completion_tokens: int | None = Field(0, ge=0)


class _Used(Reply):
    usage: _Usage


class HttpJudge:
    """A judge at `base_url`. Subclasses say where to post, what to send, and how to read the reply.

    Args:
        reward: the recipe's feedback reward.
        base_url: origin and path prefix.
        api_key: sent as a bearer token; None sends none of value.
        stopping: whether the run is asked to end; then a judge that is down is not waited for.
    """

    path = ""
    prompt: PromptKind = "judge"
    one_by_one = True

    def __init__(self, reward: FeedbackReward, base_url: str, api_key: str | None, stopping: Callable[[], bool]):
        self.reward, self.base_url, self._api_key = reward, base_url.rstrip("/"), api_key
        self.identity: dict = {}
        self._stopping = stopping
        self._client: Any = None
        self._next_start = 0.0

    def body(self, question: Question) -> dict:
        """The request's JSON."""
        raise NotImplementedError

    def read(self, document: Any) -> float:
        """The score in a reply's JSON; pydantic's ValidationError and `Failure` mean that there is none."""
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
                trust_env=not _on_loopback(self.base_url),
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
                if not failure.down or self._stopping():
                    return failure
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
        document = None
        try:
            document = _json(text)
            return Verdict(self.read(document), *_tokens(document))
        except ValidationError as e:
            first = e.errors(include_input=False, include_url=False)[0]
            where = ".".join(str(p) for p in first["loc"])
            failure = Failure("unparsable", f"{where}: {first['msg']}")
        except Failure as e:
            failure = Failure(e.kind, self._said(e.message))
        # What is no verdict was paid for all the same.
        failure.input_tokens, failure.output_tokens = _tokens(document)
        raise failure

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
        except openai.APITimeoutError as e:
            # A host that is off does not refuse connections, it does not answer at all.
            down = isinstance(e.__cause__, httpx2.ConnectTimeout)
            raise Failure("timeout", f"no reply within {self.reward.timeout_s:g} s", down=down) from None
        except openai.APIConnectionError as e:
            cause = e.__cause__ or e
            raise Failure("connection", self._said(f"{type(cause).__name__}: {cause}"), down=True) from None
        except _RefusedReplyError as e:
            raise Failure("too_large", str(e)) from None
        return reply.text

    def _status(self, error: openai.APIStatusError, path: str) -> Exception:
        status, where = error.status_code, f"{self.base_url}{path}"
        said = self._said(error.response.text)
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
            return Failure("redirect", f"{status} to {self._said(error.response.headers.get('location', '?'))}")
        if status == 429:
            return Failure("rate_limited", said)
        if status in (502, 503, 504):
            return Failure("unavailable", f"{status}: {said}", down=True)
        return Failure("server_error" if status >= 500 else "rejected", f"{status}: {said}")

    def _said(self, text: str) -> str:
        """The beginning of what a server said, in one line."""
        # JSON can hold half a surrogate pair, files cannot.
        text = without_key(text, self._api_key).encode("utf-8", "replace").decode()
        return " ".join(text.split())[:200]


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


def _on_loopback(url: str) -> bool:
    """A judge on this machine is not asked through a proxy of the environment, which would not find it."""
    host = httpx2.URL(url).host
    return host in ("localhost", "::1") or host.startswith("127.")


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise Failure("unparsable", f"not JSON: {text!r}") from None


def _tokens(document: Any) -> tuple[int, int]:
    """Input and output tokens of a reply, whatever else it holds; 0 where it does not say."""
    try:
        usage = _Used.model_validate(document).usage
    except ValidationError:
        return 0, 0
    return usage.prompt_tokens, usage.completion_tokens or 0


def key_of(reward: FeedbackReward) -> str | None:
    """The API key to send, from the environment.

    A key that the environment holds for OpenAI goes to chat endpoints only: a classify server gets one when
    `api_key_env` names a variable of its own.
    """
    if reward.serve or (reward.backend == "classify" and reward.api_key_env == "OPENAI_API_KEY"):
        return None
    return os.environ.get(reward.api_key_env) or None
