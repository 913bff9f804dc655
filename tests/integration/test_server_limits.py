"""The reward server under clients that are hostile, slow, too many or gone: real sockets, a real tiny judge."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import io
import json
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import psutil
import pytest
from PIL import Image
from tiny_models import draw, save_tiny

from r1vfree_cli.config.rewards import FeedbackReward
from r1vfree_cli.core.errors import DataError
from r1vfree_cli.judges import limits, server
from r1vfree_cli.judges.local import BATCH_TOKENS, LocalJudge, next_batch
from r1vfree_cli.judges.protocol import Failure
from r1vfree_cli.rewards.registry import build_feedback

KEY = "sk-right"
LIMITS = (3136, 401408)


class Gate:
    """The judge, which waits before each batch until it is let go, and notes what it is asked."""

    def __init__(self, judge: LocalJudge):
        self.judge, self.open, self.batches = judge, threading.Event(), list[list[str]]()
        self.max_tokens, self.length = judge.max_tokens, judge.length
        self.open.set()

    def score_messages(self, requests, *, add_generation_prompt):
        self.batches.append([messages[0]["content"][-1]["text"] for _, messages in requests])
        assert self.open.wait(30)
        return self.judge.score_messages(requests, add_generation_prompt=add_generation_prompt)


class Running:
    """The server on a free port of loopback, in a thread."""

    def __init__(self, judge, key: str | None = None):
        self.bound = server._bound("127.0.0.1", 0)
        self.port = self.bound.getsockname()[1]
        said = {"name": "m", "prompt": "judge"}
        self.app = server.App([judge], [ThreadPoolExecutor(1)], key, server.MAX_BATCH, said)
        self.loop = asyncio.new_event_loop()
        self.task = self.loop.create_task(server._run(self.app, self.bound))
        self.thread = threading.Thread(target=self._run, daemon=True)

    def _run(self) -> None:
        with contextlib.suppress(asyncio.CancelledError):
            self.loop.run_until_complete(self.task)

    def __enter__(self) -> Running:
        self.thread.start()
        end = time.monotonic() + 20
        while self.ask("GET", "/health")[0] != 200:
            assert time.monotonic() < end
        return self

    def __exit__(self, *_) -> None:
        self.loop.call_soon_threadsafe(self.task.cancel)
        self.thread.join(20)
        self.bound.close()

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=20)

    def ask(self, method: str, path: str, body: bytes = b"", *headers: str) -> tuple[int, dict, bytes]:
        try:
            with self.connect() as link:
                link.sendall(head(method, path, *headers, f"Content-Length: {len(body)}") + body)
                return reply(link)
        except OSError:
            return 0, {}, b""

    def classify(self, text: str, *uris: str) -> tuple[int, dict, bytes]:
        return self.ask("POST", "/classify", question(text, *uris))


def head(method: str, path: str, *headers: str) -> bytes:
    return "\r\n".join([f"{method} {path} HTTP/1.1", "Host: x", "Connection: close", *headers, "", ""]).encode()


def reply(link: socket.socket) -> tuple[int, dict, bytes]:
    data = b""
    while part := link.recv(1 << 16):
        data += part
    first, _, body = data.partition(b"\r\n\r\n")
    lines = first.decode().split("\r\n")
    return int(lines[0].split()[1]), dict(line.lower().split(": ", 1) for line in lines[1:]), body


def question(text: str, *uris: str) -> bytes:
    content = [{"type": "image_url", "image_url": {"url": uri}} for uri in uris] + [{"type": "text", "text": text}]
    return json.dumps({"messages": [{"role": "user", "content": content}], "add_generation_prompt": True}).encode()


def uri_of(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


@pytest.fixture(scope="module")
def judge(tmp_path_factory):
    return LocalJudge(str(save_tiny(tmp_path_factory.mktemp("judge"))), pixels=LIMITS)


@pytest.fixture()
def running(judge):
    with Running(Gate(judge)) as found:
        found.gate = found.app._judges[0]
        yield found
        found.gate.open.set()


def until(true, seconds: float = 10) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_a_key_is_checked_before_the_body_is_read(judge):
    with Running(judge, KEY) as found:
        process = psutil.Process()
        before = process.memory_info().rss
        with found.connect() as link:
            link.sendall(head("POST", "/classify", "Content-Length: 62914560"))
            status, headers, _ = reply(link)  # not a byte of the body was sent
            assert status == 401 and headers["connection"] == "close"
        for wrong in ("", "Authorization: Bearer sk-wrong", "Authorization: Bearer sk-right2"):
            with found.connect() as link:
                link.sendall(head("POST", "/classify", *filter(None, [wrong]), f"Content-Length: {60 << 20}"))
                with pytest.raises(OSError):
                    for _ in range(600):
                        link.sendall(b"x" * 100_000)
                        time.sleep(0.001)
        assert process.memory_info().rss - before < 20 << 20
        for path in ("/docs", "/openapi.json", "/redoc", "/", "/metrics", "/info", "/classify"):
            assert found.ask("GET", path)[0] == 401
        right = f"Authorization: Bearer {KEY}"
        assert {found.ask("GET", path, b"", right)[0] for path in ("/docs", "/openapi.json", "/redoc", "/")} == {404}
        assert found.ask("GET", "/classify", b"", right)[0] == 405
        assert found.ask("POST", "/classify", question("x"), right)[0] == 200


@pytest.mark.parametrize("said", [b"", b"G", b"POST /classify HTTP/1.1\r\nHost: x\r\nA: ", b"drip", b"second"])
def test_a_head_that_does_not_end_ends_the_connection(running, monkeypatch, said):
    monkeypatch.setattr(limits, "HEAD_S", 0.6)
    with running.connect() as link:
        begin = time.monotonic()
        if said == b"second":
            link.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
            answer = b""
            while not answer.endswith(b"}"):  # head and body may come apart
                answer += link.recv(1000)
            assert b"200" in answer
            link.sendall(b"G")
        elif said == b"drip":
            with pytest.raises(OSError):
                while time.monotonic() - begin < 10:
                    link.sendall(b"GET /health HTTP/1.1\r\nX" if time.monotonic() - begin < 0.1 else b"x")
                    time.sleep(0.15)
        else:
            link.sendall(said)
        if said != b"drip":
            assert link.recv(1000) == b""
        assert 0.4 < time.monotonic() - begin < 4
    assert running.classify("x")[0] == 200


def test_a_head_is_bounded(running):
    status, _, _ = running.ask("GET", "/health", b"", "X: " + "x" * 5_000_000)
    assert status in (0, 400)


def test_a_body_that_does_not_end_is_refused_and_one_that_is_too_large_too(running, monkeypatch):
    monkeypatch.setattr(limits, "BODY_S", 0.5)
    monkeypatch.setattr(limits, "MAX_BODY_BYTES", 1 << 20)
    with running.connect() as link:
        link.sendall(head("POST", "/classify", "Content-Length: 1000") + b"{")
        assert reply(link)[0] == 408
    with running.connect() as link:
        link.sendall(head("POST", "/classify", f"Content-Length: {(1 << 20) + 1}"))
        assert reply(link)[0] == 413
    with running.connect() as link:
        chunk = b"10000\r\n" + b"x" * 65536 + b"\r\n"
        with pytest.raises(OSError):
            link.sendall(head("POST", "/classify", "Transfer-Encoding: chunked"))
            for _ in range(200):
                link.sendall(chunk)
                time.sleep(0.002)
            raise OSError("it took it all")
    until(lambda: limits.Room._all == 0)
    assert running.app._requests == 0 and running.classify("x")[0] == 200


def test_the_queue_is_bounded_and_the_client_comes_again(running, monkeypatch):
    monkeypatch.setattr(server, "MAX_REQUESTS", 4)
    running.gate.open.clear()
    with ThreadPoolExecutor(4) as pool:
        waiting = [pool.submit(running.classify, f"question {i}") for i in range(4)]
        until(lambda: running.app._requests == 4)
        status, headers, body = running.classify("one more")
        assert status == 429 and 1 <= int(headers["retry-after"]) <= 60 and b"wait already" in body
        assert running.ask("GET", "/health")[0] == 200
        settings = {"base_url": f"http://127.0.0.1:{running.port}", "cache": False, "max_retries": 0, "timeout_s": 20}
        reward = build_feedback(FeedbackReward(name="feedback", **settings))
        scores: list = []
        client = threading.Thread(target=lambda: scores.extend(reward.ask([([], "Is it?", f"{i}") for i in range(8)])))
        client.start()
        time.sleep(0.5)
        running.gate.open.set()
        assert [w.result()[0] for w in waiting] == [200] * 4
        client.join(30)
        assert len(scores) == 8 and None not in scores and not list(reward.failures)
        reward.close()


def test_requests_of_clients_that_left_are_not_computed(running):
    running.gate.open.clear()
    first = running.connect()
    first.sendall(head("POST", "/classify", f"Content-Length: {len(question('first'))}") + question("first"))
    until(lambda: len(running.gate.batches) == 1)  # it is being computed: what follows has to wait
    links = {name: running.connect() for name in ("left", "half", "stays")}
    for name, link in links.items():
        link.sendall(head("POST", "/classify", f"Content-Length: {len(question(name))}") + question(name))
    until(lambda: len(running.app._queue._waiting) == 3)
    links["left"].close()
    links["half"].shutdown(socket.SHUT_WR)
    until(lambda: len(running.app._queue._waiting) == 1)
    running.gate.open.set()
    assert reply(links["stays"])[0] == reply(first)[0] == 200
    assert running.gate.batches == [["first"], ["stays"]]
    until(lambda: limits.Room._all == 0)


def test_all_requests_together_hold_bounded_memory(running, monkeypatch):
    uri = uri_of(draw(1, (560, 560)))
    monkeypatch.setattr(limits, "MAX_HELD_BYTES", int(1.5 * 560 * 560 * 3) + len(uri))
    running.gate.open.clear()
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(running.classify, "x", uri)
        until(lambda: len(running.gate.batches) == 1)
        status, headers, body = running.classify("x", uri)
        assert status == 429 and "retry-after" in headers and b"memory" in body
        running.gate.open.set()
        assert waiting.result()[0] == 200
    assert running.classify("x", uri)[0] == 200


def test_long_texts_are_refused_and_hold_nobody_up(running):
    running.classify("warm")
    begin = time.monotonic()
    status, _, body = running.classify("long " * 19_600)  # 98,000 characters
    assert status == 400 and b"at most 2048" in body and time.monotonic() - begin < 5
    assert running.gate.batches == [["warm"]]


def test_megabytes_of_text_are_refused_before_they_are_tokens(running):
    """Half of what a body may have took 50 seconds and 6 GB to be counted and refused."""
    parts = [{"type": "text", "text": "abc " * 24_000}] * 64
    body = json.dumps({"messages": [{"role": "user", "content": parts}] * 5}).encode()
    assert len(body) < limits.MAX_BODY_BYTES
    process, begin = psutil.Process(), time.monotonic()
    before = process.memory_info().rss
    status, _, said = running.ask("POST", "/classify", body)
    assert status == 400 and b"characters" in said
    assert time.monotonic() - begin < 5 and process.memory_info().rss - before < 1 << 29
    assert running.classify("short")[0] == 200


LOOP = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"


def test_a_template_that_loops_is_cut_off_in_the_thread_that_loads_a_judge(tmp_path, monkeypatch):
    monkeypatch.setattr("r1vfree_cli.models.load.TEMPLATE_S", 0.5)
    folder = save_tiny(tmp_path / "m")
    (folder / "chat_template.jinja").write_text(LOOP)
    with (
        ThreadPoolExecutor(1) as pool,
        pytest.raises(DataError, match=r"template of judge .*/m does not work: it took"),
    ):
        pool.submit(LocalJudge, str(folder)).result(20)


def test_a_template_that_loops_or_fails_on_some_requests_costs_those_alone(tmp_path, monkeypatch):
    monkeypatch.setattr("r1vfree_cli.models.load.TEMPLATE_S", 0.5)
    folder = save_tiny(tmp_path / "m")
    file = folder / "chat_template.jinja"
    file.write_text(
        f"{{% if messages|length == 2 %}}{LOOP}{{% elif messages|length == 3 %}}{{{{ raise_exception('odd') }}}}"
        f"{{% endif %}}{file.read_text()}"
    )
    judge = LocalJudge(str(folder))
    turn = {"role": "user", "content": [{"type": "text", "text": "x"}]}
    scores = judge.score_messages([((), [turn] * n) for n in (1, 2, 3)], add_generation_prompt=True)
    assert isinstance(scores[0], float) and [s.kind for s in scores[1:]] == ["template", "template"]
    with Running(judge) as found:
        for turns, status, words in ((2, 400, b"longer than 0.5 s"), (3, 400, b"odd"), (1, 200, b"probs")):
            body = json.dumps({"messages": [turn] * turns, "add_generation_prompt": True}).encode()
            answer = found.ask("POST", "/classify", body)
            assert answer[0] == status and words in answer[2], answer


def test_short_requests_go_first_and_the_oldest_after_its_patience(running, monkeypatch):
    texts = ["word " * 300, "a", "b " * 120, "c"]

    def order() -> list[str]:
        running.gate.batches.clear()
        running.gate.open.clear()
        with ThreadPoolExecutor(6) as pool:
            waiting = [pool.submit(running.classify, "first")]
            until(lambda: len(running.gate.batches) == 1)
            for n, text in enumerate(texts, 1):
                waiting.append(pool.submit(running.classify, text))
                until(lambda n=n: len(running.app._queue._waiting) == n)
            running.gate.open.set()
            assert [w.result()[0] for w in waiting] == [200] * 5
        return [text for batch in running.gate.batches for text in batch]

    assert order() == ["first", "a", "c", texts[2], texts[0]]
    monkeypatch.setattr(server, "PATIENCE_S", 0.0)
    found = order()  # every second batch begins with the oldest
    assert found.index(texts[0]) < found.index(texts[2])


def test_batches_are_bounded_by_padded_tokens():
    lengths = [8000, 30, 7000, 31, 90, 8100, 40, 500, 600, 6000]
    left, batches = list(lengths), []
    while left:
        taken = next_batch(left, [None] * len(left), 64)
        batches.append([left[i] for i in taken])
        left = [length for i, length in enumerate(left) if i not in taken]
    assert sorted(length for batch in batches for length in batch) == sorted(lengths) and batches[0] == [30, 31, 40, 90]
    for batch in batches:
        assert len(batch) * max(batch) <= BATCH_TOKENS or len(batch) == 1
        assert max(batch) <= 2 * min(batch) + 64
    assert next_batch([5] * 100, [None] * 100, 64) == list(range(64))
    assert next_batch([60, 50, 70, 55, 52, 1000], list("abaccb"), 4) == [1, 4, 3, 0], (
        "answers to an image stay together"
    )


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def test_tokens_are_counted_as_the_model_gets_them(tmp_path, family):
    judge = LocalJudge(str(save_tiny(tmp_path, family)), pixels=LIMITS)
    for images in ([], [draw(1)], [draw(1), draw(2, (140, 84))]):
        content = [{"type": "image"} for _ in images] + [{"type": "text", "text": "Is it <|im_end|> red?"}]
        request = images, [{"role": "user", "content": content}]
        before = judge.tokens
        judge.score_messages([request], add_generation_prompt=True)
        assert judge.tokens - before == judge.length(request, add_generation_prompt=True)


def test_a_photo_is_seen_at_the_pixel_limits_of_the_policy(judge, running):
    from transformers import AutoProcessor

    from r1vfree_cli.models import family

    photo = draw(3, (4000, 3000))
    status, _, body = running.classify("What is it?", uri_of(photo))
    assert status == 200 and json.loads(body)["usage"]["prompt_tokens"] < 401408 / 784 + 60
    policy = AutoProcessor.from_pretrained(judge.name)
    family.edge_limits(policy, *LIMITS)
    seen = [p.image_processor(images=[photo], return_tensors="pt")["pixel_values"] for p in (judge.processor, policy)]
    assert seen[0].equal(seen[1])
    assert running.classify("What is it?", uri_of(Image.new("RGB", (5000, 20))))[0] == 400


def test_a_row_that_fails_does_not_take_its_batch_along(judge, monkeypatch):
    real = LocalJudge._forward

    def forward(self, texts, *rest):
        if any("boom" in text for text in texts):
            raise RuntimeError("out of memory")
        return real(self, texts, *rest)

    monkeypatch.setattr(LocalJudge, "_forward", forward)
    asked = [([], "Is it?", answer) for answer in ("red", "boom", "x" * 60_000, "blue")]
    found = judge.score(asked)
    assert [type(score) for score in found] == [float, Failure, Failure, float]
    assert [found[1].kind, found[2].kind] == ["local_error", "too_long"]
