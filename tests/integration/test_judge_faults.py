"""Whatever a server replies, a call ends as a number, a `Failure` or a named stop: raw bytes on loopback, four shapes."""

from __future__ import annotations

import asyncio
import gzip
import json
import os
import ssl
import zlib

import pytest

from r1vfree_cli.config.rewards import FeedbackReward
from r1vfree_cli.core.errors import UsageError
from r1vfree_cli.eval.hallusion.judge import VERDICTS, LabelJudge
from r1vfree_cli.eval.judgements import Judgement
from r1vfree_cli.judges.chat import ChatJudge
from r1vfree_cli.judges.classify import ClassifyJudge
from r1vfree_cli.judges.client import Endpoint
from r1vfree_cli.judges.protocol import Failure, Question, Verdict
from r1vfree_cli.judges.replies import Reply, error_of, status_in
from r1vfree_cli.judges.transport import on_loopback

SHAPES = ("classify", "chat", "generation", "eval judge")
KEY = "sk-test-0123456789abcdef"


def http(body: bytes, status: str = "200 OK", *headers: str) -> bytes:
    head = "".join(f"{h}\r\n" for h in (*headers, f"Content-Length: {len(body)}", "Connection: close"))
    return f"HTTP/1.1 {status}\r\n{head}\r\n".encode() + body


def good(shape: str, **more) -> bytes:
    if shape == "classify":
        return json.dumps({"data": [{"probs": [0.25, 0.75], "num_classes": 2}], **more}).encode()
    text = '{"score": 0.5}' if shape == "chat" else '{"label": "correct"}'
    return json.dumps({"choices": [{"finish_reason": "stop", "message": {"content": text}}], **more}).encode()


def chat(content="Label: correct", finish="stop", **message) -> bytes:
    return json.dumps({"choices": [{"finish_reason": finish, "message": {"content": content, **message}}]}).encode()


def probs(text: str, classes: object = 2) -> bytes:
    return f'{{"data": [{{"probs": {text}, "num_classes": {json.dumps(classes)}}}]}}'.encode()


# Name -> reply of a shape, and what must come of it: "value", "failure", "stop".
FAULTS = {"good": (lambda s: http(good(s)), "value")}
for name in ("zlib", "bz2", "hex", "idna", "rot13", "utf-16", "no-such", "\x00"):
    FAULTS[f"charset {name!r}"] = (
        lambda s, n=name: http(good(s), "200 OK", f"Content-Type: application/json; charset={n}"),
        "failure" if name == "\x00" else "value",
    )
BODIES = {
    "empty": b"", "html": b"<html>", "null": b"null", "list": b"[1]", "half": b'{"data": [', "latin-1": b'{"a": "\xe9"}',
    "deep": b"[" * 200_000, "many digits": b"1" * 10_000, "large": b'"' + b"x" * 2_000_000 + b'"', "no data": b"{}",
    "twice": b'{"data": [], "data": [], "choices": [], "choices": []}', "error": b'{"error": "overloaded"}',
    "NaN where nobody reads": b'{"x": NaN, "data": [{"probs": [0.25, 0.75]}], "choices": [{"message": {"content": "1"}}]}',
    "error 503": b'{"error": {"code": 503, "message": "down"}}', "bool": b"true", "nulls": b'{"data": null, "choices": null}',
}  # fmt: skip
FAULTS |= {name: (lambda s, b=body: http(b), "failure") for name, body in BODIES.items()}
FAULTS |= {
    f"error {code}": (lambda s, c=code: http(json.dumps({"error": {"code": c}}).encode()), "stop")
    for code in (401, 404)
}
for code in (201, 204, 206, 301, 307, 400, 409, 413, 418, 422, 429, 500, 502, 503, 504, 599):
    FAULTS[str(code)] = (
        lambda s, c=code: http(good(s) if c != 204 else b"", f"{c} X", "Location: http://127.0.0.1:1"),
        "failure",
    )
for code in (401, 402, 403, 404):
    FAULTS[str(code)] = (lambda s, c=code: http(f"no {KEY}".encode(), f"{c} X"), "stop")
FAULTS |= {
    "no quota": (lambda s: http(b'{"error": {"code": "insufficient_quota"}}', "429 X"), "stop"),
    "gzip": (lambda s: http(gzip.compress(good(s)), "200 OK", "Content-Encoding: gzip"), "value"),
    "bomb": (lambda s: http(zlib.compress(b" " * 50_000_000), "200 OK", "Content-Encoding: deflate"), "failure"),
    "gzip, cut": (lambda s: http(gzip.compress(good(s))[:-6], "200 OK", "Content-Encoding: gzip"), "failure"),
    "no gzip": (lambda s: http(good(s), "200 OK", "Content-Encoding: gzip"), "failure"),
    "brotli": (lambda s: http(good(s), "200 OK", "Content-Encoding: br"), "failure"),
    "no http": (lambda s: b"hello\r\n\r\n", "failure"),
    "closed": (lambda s: b"", "failure"),
    "cut": (lambda s: http(good(s))[:-5], "failure"),
    "huge header": (lambda s: http(good(s), "200 OK", "X: " + "x" * 300_000), "failure"),
    "usage of 400 digits": (
        lambda s: http(good(s, usage={"prompt_tokens": 10**400, "completion_tokens": -1})),
        "value",
    ),
    "drip": (lambda s: "drip", "failure"),
    "endless 100 Continue": (lambda s: "continue", "failure"),
}
FAULTS |= {
    f"probs {text} of {classes}": (lambda s, t=text, c=classes: http(probs(t, c)), "failure")
    for text, classes in (
        ("[NaN, 1]", 2), ("[1e39, 0]", 2), ("[0, 1e39]", 2), ("[0.5, 0.5]", 3), ("[0.5]", 2), ("[0.2, 0.2]", 2),
        ("[]", 0), ("[0.5, 0.5]", 2.0), ("[0.5]", True), ("[-Infinity]", 1), ("[0.5, 0.5]", "2"), ("[true, 0]", 2),
    )
}  # fmt: skip
CHATS = {
    "content_filter": chat(None, "content_filter"), "finish error": chat("", "error"), "refusal": chat("", refusal="no"),
    "content number": chat(1), "content list": chat(["x"]), "abort": chat("x", "abort"),
    "finish 5": chat('{"score": 0.5}', 5), "finish {}": chat('{"label": "correct"}', {}),
}  # fmt: skip
FAULTS |= {name: (lambda s, b=body: http(b), "failure") for name, body in CHATS.items()}


async def ask(shape: str, url: str, timeout_s: float) -> object:
    os.environ["JUDGE_KEY"] = KEY
    settings = {"name": "feedback", "base_url": url, "model": "m", "max_retries": 0, "timeout_s": timeout_s}
    settings["api_key_env"] = "JUDGE_KEY"
    if shape in ("classify", "chat"):
        kind = ClassifyJudge if shape == "classify" else ChatJudge
        judge = kind(FeedbackReward.model_validate(settings | {"backend": shape}), url, lambda: False)
        await judge.endpoint.open()
        try:
            return await judge.ask(Question((), "What colour?", "red"))
        finally:
            await judge.close()
    endpoint = Endpoint(url, "m", timeout_s=timeout_s, max_retries=0, api_key_env="JUDGE_KEY")
    await endpoint.open()
    try:
        if shape == "generation":
            return await endpoint.chat([{"role": "user", "content": "?"}], 8, 0)
        return await LabelJudge(endpoint).ask("k", "?", VERDICTS, Judgement(id="q", key="k"))
    finally:
        await endpoint.close()


async def one(shape: str, reply) -> tuple[str, str]:
    async def serve(reader, writer):
        try:
            head = await reader.readuntil(b"\r\n\r\n")
            length = next(
                (int(h.split(b":")[1]) for h in head.split(b"\r\n") if h.lower().startswith(b"content-length")), 0
            )
            await reader.readexactly(length)
            if isinstance(reply, bytes):
                writer.write(reply)
            else:
                writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n" if reply == "drip" else b"")
                for _ in range(200):
                    writer.write(b" " if reply == "drip" else b"HTTP/1.1 100 Continue\r\n\r\n")
                    await writer.drain()
                    await asyncio.sleep(0.05)
            await writer.drain()
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    try:
        timeout_s = 30 if isinstance(reply, bytes) else 2
        found = await ask(shape, f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", timeout_s)
    except Failure as e:
        return "failure", str(e)
    except UsageError as e:
        return "stop", f"{e.message} {e.details}"
    finally:
        server.close()
    if isinstance(found, Verdict):
        assert 0 <= found.score <= 1 and found.input_tokens >= 0
    elif isinstance(found, Reply):
        assert found.text or found.cause
    else:
        assert found["label"] in (0, 1, 2)
    return "value", ""


@pytest.mark.parametrize("shape", SHAPES)
def test_every_fault_ends_as_a_number_a_failed_call_or_a_named_stop(shape, tmp_path, monkeypatch):
    monkeypatch.setenv("R1V_CACHE", str(tmp_path))
    monkeypatch.setattr(ssl.SSLContext, "load_verify_locations", lambda *_, **__: None)  # 50 ms a client; all is HTTP
    names = list(FAULTS)

    async def all_of_them():
        await one(shape, FAULTS["good"][0](shape))  # imports and certificates take their time once
        slots = asyncio.Semaphore(8)

        async def guarded(name):
            async with slots:
                return await one(shape, FAULTS[name][0](shape))

        return await asyncio.gather(*map(guarded, names), return_exceptions=True)

    found = dict(zip(names, asyncio.run(all_of_them()), strict=True))
    wrong = {n: f for n, f in found.items() if not isinstance(f, tuple) or f[0] != FAULTS[n][1] or KEY in f[1]}
    assert not wrong and len(found) >= 60


@pytest.mark.parametrize("header", ["Retry-After: \u00b2", "Location: \u00e9", "X: \u00ff"])
def test_a_header_that_is_no_ascii_hides_no_status(header):
    reply = http(b"", "429 Slow Down" if "Retry" in header else "302 Found", header)
    assert asyncio.run(one("chat", reply))[1].startswith(("rate_limited: 429", "redirect: 302"))


def test_loopback_is_known_in_every_spelling():
    here = ("127.0.0.1", "127.1", "0x7f000001", "2130706433", "[::1]", "[::ffff:127.0.0.1]", "0.0.0.0", "[::]")
    assert all(on_loopback(f"http://{host}:8000/v1") for host in (*here, "localhost", "LOCALHOST.", "a.localhost"))
    there = ("10.0.0.1", "example.org", "127.0.0.1.example.org", "[2001:db8::1]", "localhost.example.org")
    assert not any(on_loopback(f"http://{host}:8000/v1") for host in there)


@pytest.mark.parametrize(
    ("said", "kind", "temporary"),
    [
        ({"object": "error", "code": 503, "message": "down"}, "unavailable", True),  # vLLM and FastChat of old
        ({"code": "429", "msg": "slow down"}, "rate_limited", True),
        ({"error_code": 336501, "error_msg": "busy"}, "server_error", True),
        ({"status_code": 400, "choices": None, "message": "too long"}, "rejected", False),
        ({"detail": "overloaded"}, "server_error", True),
        ({"error": {"code": "rate_limit_exceeded"}}, "rate_limited", True),
        ({"code": "Arrearage", "message": "overdue"}, None, None),
        ({"error": {"type": "exceeded_current_quota_error"}}, None, None),
        ({"error": {"code": 400, "message": "Your credit balance is too low"}}, None, None),
        ({"error": {"code": 403, "message": "Sorry, your account balance is insufficient"}}, None, None),
        ({"error": {"code": "invalid_api_key"}}, "refused access", None),
        ({"error": {"code": None, "type": "authentication_error"}}, "refused access", None),
        ({"error": {"code": "model_not_found", "type": "invalid_request_error"}}, "no such path or model", None),
        ({"error": {"type": "invalid_request_error", "message": "no"}}, "rejected", False),
        ({"choices": [{"message": {"content": "Yes"}}], "code": 0}, "value", None),
    ],
)
def test_an_error_in_a_reply_of_status_200_is_one(said, kind, temporary):
    error = error_of(said)
    if kind == "value":
        assert error is None
        return
    found = Endpoint("http://127.0.0.1:1/v1", "m")._refusal(status_in(error), json.dumps(said), {})
    if temporary is None:
        assert isinstance(found, UsageError) and (kind or "no quota left") in found.message
    else:
        assert isinstance(found, Failure) and (found.kind, found.temporary) == (kind, temporary)


@pytest.mark.parametrize(
    ("said", "limit", "temperature"),
    [
        ("Unsupported parameter: 'max_tokens'. Use 'max_completion_tokens' instead.", "max_completion_tokens", True),
        ('{"loc": ["body", "max_tokens"], "msg": "Extra inputs are not permitted"}', "max_completion_tokens", True),
        ("max_tokens is too large: 5000. This model supports at most 4096 completion tokens", "max_tokens", True),
        ("'max_tokens' is too large: the maximum context length of this model supports 99", "max_tokens", True),
        ("'temperature' does not support 0 with this model", "max_tokens", False),
    ],
)
def test_a_parameter_is_left_out_only_where_its_name_is_refused(said, limit, temperature):
    endpoint = Endpoint("http://127.0.0.1:1/v1", "m")
    endpoint._learn(said, {"max_tokens": 5000, "temperature": 0})
    assert (endpoint._limit, endpoint._temperature) == (limit, temperature)
