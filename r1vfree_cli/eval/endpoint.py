"""Calls to an OpenAI-compatible endpoint: many at once, retried by the client library, failures told apart by fault."""

from __future__ import annotations

import asyncio
import json
import os
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

from ..core.errors import R1VError, UsageError
from ..core.redact import without_key

Job = TypeVar("Job")


@dataclass(frozen=True)
class Reply:
    """One chat completion; the text may be empty. `finish` is the endpoint's reason, `length` when it was cut."""

    text: str
    model: str
    finish: str | None
    prompt_tokens: int
    completion_tokens: int


class CallFailed(Exception):
    """A call that failed for good, for a reason of the infrastructure. `kind` is counted."""

    def __init__(self, kind: str, message: str):
        super().__init__(message)
        self.kind = kind


def read_reply(body: bytes, asked: str) -> Reply:
    """The reply in the body of a chat completion; `asked` is the model's name where the body gives none.

    No or null content is an empty text. Half a surrogate pair, which JSON can hold and no file can, becomes `?`.

    Raises:
        CallFailed: not JSON, or no text where the reply should be.
    """
    try:
        document = json.loads(body)
        choice = document["choices"][0]
        text, finish = choice["message"].get("content"), choice.get("finish_reason")
    except (ValueError, RecursionError, LookupError, TypeError, AttributeError):
        raise CallFailed("bad reply", "no chat completion") from None
    if not isinstance(text, str | None):
        raise CallFailed("bad reply", f"the content is a {type(text).__name__}, not a text")
    usage, model = document.get("usage"), document.get("model")

    def tokens(key: str) -> int:
        count = usage.get(key) if isinstance(usage, dict) else None
        return count if isinstance(count, int) else 0

    return Reply(
        (text or "").encode("utf-8", "replace").decode(),
        model if isinstance(model, str) and model else asked,
        finish if isinstance(finish, str) else None,
        tokens("prompt_tokens"),
        tokens("completion_tokens"),
    )


@dataclass
class Endpoint:
    """Where to ask. `base_url` None is OpenAI's own; the key is in the environment variable `api_key_env`."""

    base_url: str | None
    model: str
    timeout_s: float = 60
    max_retries: int = 4
    concurrency: int = 16
    api_key_env: str = "OPENAI_API_KEY"
    _client: Any = field(default=None, repr=False)
    _answered: int = 0
    # Newer models refuse a temperature, or want another name for the length limit; learned from the first refusal.
    _temperature: bool = True
    _limit: str = "max_tokens"

    def check(self) -> None:
        """Raises UsageError when the key that OpenAI's endpoint needs is not set."""
        if self.base_url is None and not os.environ.get(self.api_key_env):
            raise UsageError(
                f"${self.api_key_env} is not set, and no base URL is given",
                hint="export the key, or name your own endpoint (--judge-base-url, --endpoint)",
            )

    async def ask(self, messages: list[dict], max_tokens: int, temperature: float) -> Reply:
        """One call.

        Raises:
            UsageError: the endpoint is down, refuses the key, or has no such model: every call would fail.
            CallFailed: this call failed.
        """
        import openai

        while True:
            options: dict[str, Any] = {self._limit: max_tokens}
            if self._temperature:
                options["temperature"] = temperature
            try:
                # The raw body: the client library builds objects from whatever JSON comes, and fails on what is none.
                create = self._client.chat.completions.with_raw_response.create
                body = (await create(model=self.model, messages=messages, **options)).content
                break
            except openai.BadRequestError as e:
                if not self._learn(str(e), options):
                    raise CallFailed("bad request", self._line(e)) from None
            except (openai.AuthenticationError, openai.PermissionDeniedError, openai.NotFoundError) as e:
                raise UsageError(
                    f"{self.where} refuses the call ({e.status_code}): {self._line(e)}",
                    hint=f"check the model name {self.model!r}, the URL (it ends in /v1) and ${self.api_key_env}",
                ) from None
            except openai.APITimeoutError:
                raise CallFailed("timeout", f"no answer in {self.timeout_s:g} s") from None
            except openai.APIConnectionError as e:
                if not self._answered:
                    raise UsageError(
                        f"no endpoint at {self.where}: {self._line(e.__cause__ or e)}",
                        hint="start the server, or check the URL; what is finished is kept",
                    ) from None
                raise CallFailed("connection", self._line(e.__cause__ or e)) from None
            except openai.APIStatusError as e:
                raise CallFailed(f"status {e.status_code}", self._line(e)) from None
            except openai.OpenAIError as e:
                raise CallFailed("bad reply", self._line(e)) from None
        self._answered += 1
        return read_reply(body, self.model)

    def _learn(self, message: str, used: dict) -> bool:
        """Whether the refusal is of a parameter that can be left out or renamed; the next call does so."""
        if "temperature" in message and "temperature" in used:
            self._temperature = False
            return True
        if "max_completion_tokens" in message and "max_tokens" in used:
            self._limit = "max_completion_tokens"
            return True
        return False

    def _line(self, error: object) -> str:
        text = without_key(str(error), os.environ.get(self.api_key_env))
        return next(iter(text.strip().splitlines()), type(error).__name__)[:300]

    @property
    def where(self) -> str:
        return self.base_url or "the OpenAI API"

    def run(
        self,
        jobs: list[Job],
        work: Callable[[Job], Awaitable[Any]],
        done: Callable[[Job, Any], None],
    ) -> Counter:
        """Run `work` over all jobs, `concurrency` at a time; `done(job, result)` is called as each finishes.

        Returns how many jobs failed for good, by kind. An `R1VError` stops all: what is done stays done.
        """
        return asyncio.run(self._run(jobs, work, done))

    async def _run(self, jobs, work, done) -> Counter:
        import openai

        failed: Counter = Counter()
        queue = iter(jobs)

        async def worker() -> None:
            for job in queue:
                try:
                    result = await work(job)
                except CallFailed as e:
                    failed[e.kind] += 1
                else:
                    done(job, result)

        key = os.environ.get(self.api_key_env) or "none"
        async with openai.AsyncOpenAI(
            base_url=self.base_url, api_key=key, timeout=self.timeout_s, max_retries=self.max_retries
        ) as self._client:
            tasks = [asyncio.create_task(worker()) for _ in range(max(1, min(self.concurrency, len(jobs))))]
            try:
                await asyncio.gather(*tasks)
            except R1VError:
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)
                raise
        return failed
