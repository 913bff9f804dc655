"""The one HTTP client: reward judges, evaluation endpoints and evaluation judges all ask through `Endpoint`.

Three kinds of trouble, told apart here and nowhere else: the configuration's (`UsageError`: no access, no such model,
no quota), the infrastructure's (`Failure`: this call gave nothing; asked again while that may help), and a reply that
is none (`Failure` too). No other exception that a reply causes leaves this module.

A body is read as bytes under a limit, on the wire and unpacked, and is UTF-8 whatever its headers say. Redirects are
not followed: the key and the images go to the configured origin only.
"""

import asyncio
import json
import os
import random
import re
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar
from urllib.parse import urlsplit

from ..core import console
from ..core.errors import R1VError, UsageError
from ..core.redact import URL_LOGIN, without_key
from . import replies
from .protocol import Failure
from .replies import Reply, error_of, tokens
from .transport import bounded_client, on_loopback, proxy_before, retry_after

T = TypeVar("T")
Job = TypeVar("Job")

OPENAI_URL = "https://api.openai.com/v1"
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.5, 10.0
LONGEST_RETRY_AFTER_S = 120.0  # a server that asks for more is not asked again
CONNECT_S = 10.0
TOLD_CHARS = 200
FORMATS = ("json_schema", "json_object", None)  # how a structured reply is asked for, best first
LIMITS = {"max_tokens": "max_completion_tokens", "max_completion_tokens": None}
_NOT_KNOWN = re.compile(r"(?i)support|recogni[sz]ed|unknown|unexpected|permitted|not allowed|extra|deprecated|instead")
_TOO_MANY = re.compile(r"(?i)too large|at most|maximum|exceed|context length")  # of the number, not of the name
_NO_QUOTA = re.compile(r"(?i)insufficient_quota|exceeded_current_quota|billing|arrearage|insufficient_balance")
_NO_MONEY = re.compile(
    r"(?i)insufficient (?:balance|credits?|funds)|(?:balance|credits?) (?:is|are) (?:too low|insufficient|exhausted)"
)
_FORMAT_WORDS = re.compile(r"(?i)response_format|json_schema|json_object|structured|guided|grammar")


@dataclass
class Endpoint:
    """A server that speaks OpenAI's HTTP API, or the part of it that its user needs.

    base_url: origin and path prefix; None is OpenAI's own (or $OPENAI_BASE_URL).
    timeout_s: for one attempt, from connecting to the reply's last byte; connecting alone gets at most 10 s.
    max_retries: attempts after the first, where trying again may help. A Retry-After of up to 120 s is honoured.
    api_key_env: the variable that holds the key; each endpoint has its own. None sends none.
    what: what errors call it.
    failures: kind -> the first message, key removed, of calls that failed for good.
    """

    base_url: str | None
    model: str
    timeout_s: float = 60
    max_retries: int = 4
    concurrency: int = 16
    api_key_env: str | None = "OPENAI_API_KEY"
    requests_per_minute: float | None = None
    what: str = "endpoint"
    failures: dict[str, str] = field(default_factory=dict)
    _client: Any = field(default=None, repr=False)
    _answered: bool = False
    _next_start: float = 0.0
    # What the endpoint takes; learned from its first refusal.
    _temperature: bool = True
    _limit: str | None = "max_tokens"
    _format: int = 0

    def __post_init__(self):
        self.api_key = os.environ.get(self.api_key_env or "", "").strip()

    @property
    def url(self) -> str:
        return (self.base_url or os.environ.get("OPENAI_BASE_URL") or OPENAI_URL).rstrip("/")

    @property
    def where(self) -> str:
        """The URL without a login."""
        return URL_LOGIN.sub("***@", self.url)

    def check(self) -> None:
        """What can be known before the first call.

        Raises UsageError: the key that OpenAI's endpoint needs is not set, or cannot be sent; the URL is none.
        """
        if self.base_url is None and not self.api_key:
            hint = "export the key, or name your own endpoint (--judge-base-url, --endpoint)"
            raise UsageError(f"${self.api_key_env} is not set, and no base URL is given", hint=hint)
        if self.api_key and not (self.api_key.isascii() and self.api_key.isprintable()):
            raise UsageError(f"${self.api_key_env} holds characters that no HTTP header may have")
        try:
            parts = urlsplit(self.url)
            _ = parts.port
            usable = parts.scheme in ("http", "https") and bool(parts.hostname)
        except ValueError:
            usable = False
        if not usable:
            raise UsageError(f"the {self.what}'s URL is {self.where!r}", hint="it starts with http:// or https://")

    async def open(self) -> None:
        """Get ready to ask, in this event loop."""
        import httpx2
        import openai

        self.check()
        try:
            http = bounded_client()(
                follow_redirects=False,
                limits=httpx2.Limits(max_connections=self.concurrency),
                timeout=httpx2.Timeout(None, connect=min(CONNECT_S, self.timeout_s / 2)),
                trust_env=not on_loopback(self.url),
            )
        except Exception as e:  # a proxy variable that is no URL, or a SOCKS proxy without its package
            raise UsageError(f"cannot use the proxy of the environment: {self.told(str(e))}") from None
        self._client = openai.AsyncOpenAI(
            api_key=self.api_key or "none",
            base_url=self.url,
            timeout=http.timeout,
            max_retries=0,  # `request` asks again: it knows what a call has cost and which ones may be repeated
            default_headers={"Accept-Encoding": "identity"},
            http_client=http,
        )

    async def close(self) -> None:
        if self._client is not None:
            await self._client.close()
        self._client = None

    # --- asking ------------------------------------------------------------------------------------------------

    async def chat(
        self,
        messages: list[dict],
        max_tokens: int,
        temperature: float,
        read: Callable[[Reply], T] = lambda reply: reply,  # type: ignore[assignment,return-value]
        *,
        schema: dict | None = None,
        more: dict | None = None,
    ) -> T:
        """What `read` finds in one chat completion; raises as `request` does.

        schema: JSON schema of the wanted reply, for which the endpoint is asked as strictly as it can (json_schema,
        json_object, text). more: put into the request's JSON, over the rest.
        """
        more = more or {}

        def make() -> dict:
            body: dict[str, Any] = {"model": self.model, "messages": messages}
            if self._limit and not LIMITS.keys() & more.keys():
                body[self._limit] = max_tokens
            if self._temperature:
                body["temperature"] = temperature
            if schema and FORMATS[self._format] == "json_schema":
                named = {"name": "verdict", "strict": True, "schema": schema}
                body["response_format"] = {"type": "json_schema", "json_schema": named}
            elif schema and FORMATS[self._format] == "json_object":
                # The mode is refused where the messages do not ask for JSON.
                asked = {"role": "user", "content": f"Reply with JSON only, after this schema: {json.dumps(schema)}"}
                body |= {"response_format": {"type": "json_object"}, "messages": [*messages, asked]}
            return body | more

        return await self.request(
            "/chat/completions", make, lambda document: read(replies.read_reply(document, self.model))
        )

    async def request(self, path: str, make: Callable[[], dict] | None, read: Callable[[Any], T]) -> T:
        """What `read` finds in the JSON that answers POST `make()`; asked again where that helps.

        Without `make` it is GET, and None from a server that has nothing there.

        Raises UsageError: every call would fail (no access, model, quota). Failure: this call failed; its tokens are
        what it cost all the same.
        """
        retries, pause = self.max_retries, FIRST_PAUSE_S
        while True:
            body = make() if make else None
            try:
                return await self._attempt(path, body, read)
            except Failure as failure:
                if make and body and failure.status in (400, 422):
                    self._learn(failure.message, body)
                    if make() != body:
                        continue
                failure.message = self.told(failure.message)
                console.detail(f"the {self.what} at {self.where}, a failed call: {failure}")
                if not failure.temporary or retries == 0:
                    self.failures.setdefault(failure.kind, failure.message)
                    raise
                wait = failure.wait
            retries -= 1
            # All who were told to wait come back apart.
            await asyncio.sleep(pause * random.uniform(0.75, 1) if wait is None else wait * random.uniform(1, 1.25))
            pause = min(2 * pause, LONGEST_PAUSE_S)

    def run(
        self, jobs: list[Job], work: Callable[[Job], Awaitable[Any]], done: Callable[[Job, Any], None]
    ) -> Counter[str]:
        """Run `work` over all jobs, `concurrency` at a time; `done(job, result)` is called as each finishes.

        Returns how many jobs failed for good, by kind; `failures` has an example of each. An `R1VError` stops all:
        what is done stays done.

        Raises UsageError: as `request`, or nothing has ever answered at the URL.
        """
        failed: Counter[str] = Counter()
        queue = iter(jobs)

        async def worker() -> None:
            for job in queue:
                try:
                    result = await work(job)
                except Failure as e:
                    if e.kind == "connection" and not self._answered:
                        hint = "start the server, or check the URL; what is finished is kept"
                        raise UsageError(f"no endpoint at {self.where}: {e.message}", hint=hint) from None
                    failed[e.kind] += 1
                    self.failures.setdefault(e.kind, self.told(e.message))
                else:
                    done(job, result)

        async def all_jobs() -> None:
            await self.open()
            try:
                async with asyncio.TaskGroup() as group:
                    for _ in range(min(self.concurrency, len(jobs))):
                        group.create_task(worker())
            except ExceptionGroup as errors:
                raise errors.exceptions[0] from None
            finally:
                await self.close()

        asyncio.run(all_jobs())
        return failed

    # --- one attempt -------------------------------------------------------------------------------------------

    async def _attempt(self, path: str, body: dict | None, read: Callable[[Any], T]) -> T:
        import httpx2

        document = None
        try:
            await self._wait_for_rate()
            async with asyncio.timeout(self.timeout_s):
                status, headers, data = await self._exchange(path, body)
            self._answered = True
            if body is None and status in (404, 405):
                return read(None)
            if status != 200:
                raise self._refusal(status, data.decode("utf-8", "replace"), headers)
            document = replies.strict_json(data)
            if error := error_of(document):
                raise self._refusal(replies.status_in(error), json.dumps(document), {})
            return read(document)
        except R1VError:
            raise
        except Exception as e:
            if isinstance(e, Failure):
                failure = e
            elif isinstance(e, TimeoutError):
                failure = Failure("timeout", f"no complete reply within {self.timeout_s:g} s", temporary=True)
            elif isinstance(e, httpx2.HTTPError):
                # A host that is off does not refuse connections, it does not answer at all.
                late = isinstance(e, httpx2.ConnectTimeout)
                message = "no connection in time" if late else f"{type(e).__name__}: {e}"
                failure = Failure("connection", message + proxy_before(self.url), down=True, temporary=True)
            else:  # a reply can break a library in ways that nobody foresaw
                failure = Failure("unparsable", f"{type(e).__name__}: {e}")
            # What is no verdict was paid for all the same.
            failure.input_tokens, failure.output_tokens = tokens(document)
            raise failure from None

    async def _exchange(self, path: str, body: dict | None) -> tuple[int, Any, bytes]:
        """(status, headers, body), the body unpacked."""
        import httpx2
        import openai

        # The environment's key and organisation are OpenAI's: another server gets what is configured for it only.
        unset: dict[str, Any] = {} if self.api_key else {"Authorization": openai.Omit()}
        if self.base_url is not None:
            unset |= {"OpenAI-Organization": openai.Omit(), "OpenAI-Project": openai.Omit()}
        more = {"cast_to": httpx2.Response, "options": {"headers": unset}}
        try:
            response = await (self._client.post(path, body=body, **more) if body else self._client.get(path, **more))
        except openai.APIStatusError as e:
            response = e.response
        except openai.APIConnectionError as e:
            raise e.__cause__ or e from None
        return response.status_code, response.headers, response.content

    def _refusal(self, status: int, said: str, headers: Any) -> Exception:
        """The error of a status that is not 200; errors in a reply with status 200 come here too."""
        at, code = f"the {self.what} at {self.where}", replies.code_in(said)
        details = [self.told(said)]
        if status == 407:
            return UsageError(f"the proxy refused access (407){proxy_before(self.url)}", details=details)
        if status == 402 or _NO_QUOTA.search(code) or (400 <= status < 500 and _NO_MONEY.search(said)):
            return UsageError(f"{at} has no quota left ({status})", details=details, hint="what is finished is kept")
        if status in (401, 403):
            known = self.api_key_env and f"put its key in {self.api_key_env}, or name another variable"
            hint = known or "it wants a key: name the variable that holds it (api_key_env)"
            return UsageError(f"{at} refused access ({status})", details=details, hint=hint)
        if status == 404:
            hint = f"check the URL (OpenAI-compatible ones end in /v1) and the model's name {self.model!r}"
            return UsageError(f"{at} knows no such path or model (404)", details=details, hint=hint)
        if 300 <= status < 400:
            return Failure("redirect", f"{status} to {headers.get('location', '?')}{proxy_before(self.url)}")
        message = f"{status}: {said}"
        if "content_filter" in code:
            return Failure("content_filter", message)
        wait = retry_after(headers.get("retry-after"))
        if wait is not None and wait > LONGEST_RETRY_AFTER_S:
            return Failure("rate_limited", f"asks to wait {wait:g} s; {message}", status=status)
        if status in (502, 503, 504):
            message = f"{status}{proxy_before(self.url)}: {said}"
            return Failure("unavailable", message, down=True, temporary=True, wait=wait, status=status)
        kind = "rate_limited" if status == 429 else "server_error" if status >= 500 else "rejected"
        # A queue that is full, and says when it will not be, is as good as a server that is down for a while.
        down = status == 429 and wait is not None
        temporary = status >= 500 or status in (408, 409, 425, 429)
        return Failure(kind, message, down=down, temporary=temporary, wait=wait, status=status)

    def _learn(self, said: str, body: dict) -> None:
        """From a refusal: which parameter to leave out, to rename, or to ask for less strictly."""
        before = (self._temperature, self._limit, self._format)
        limit, form = self._limit, body.get("response_format")
        if "temperature" in said and "temperature" in body:
            self._temperature = False
        elif limit and limit in body and limit in said and _NOT_KNOWN.search(said) and not _TOO_MANY.search(said):
            self._limit = LIMITS[limit]
        elif isinstance(form, dict) and form.get("type") == FORMATS[self._format] and _FORMAT_WORDS.search(said):
            self._format += 1
        if before != (self._temperature, self._limit, self._format):
            console.log(f"the {self.what} at {self.where} refuses a parameter, asked without: {self.told(said)}")

    async def _wait_for_rate(self) -> None:
        if self.requests_per_minute is None:
            return
        now = asyncio.get_running_loop().time()
        start = max(now, self._next_start)
        self._next_start = start + 60 / self.requests_per_minute
        await asyncio.sleep(start - now)

    def told(self, text: str) -> str:
        """The beginning of what a server said: one line, without the key, in UTF-8."""
        # JSON can hold half a surrogate pair, files cannot.
        text = without_key(text, self.api_key).encode("utf-8", "replace").decode()
        return " ".join(text.split())[:TOLD_CHARS]
