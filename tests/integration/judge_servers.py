"""Real HTTP judges on loopback for tests: one that behaves, and the ways in which one does not."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import io
import json
import socket
import struct
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from PIL import Image


def score_of(messages: list[dict]) -> float:
    """A number in [0, 1] that depends on all of the request: text and pixels."""
    digest = hashlib.sha256()
    for message in messages:
        for part in message["content"]:
            if part["type"] == "image_url":
                data = base64.b64decode(part["image_url"]["url"].partition(",")[2])
                digest.update(Image.open(io.BytesIO(data)).tobytes())
            else:
                digest.update(part["text"].encode())
    return digest.digest()[0] / 255


def classify_reply(probs: list[Any]) -> dict:
    return {
        "id": "classify-1",
        "object": "list",
        "created": 0,
        "model": "m",
        "data": [{"index": 0, "label": "Yes", "probs": probs, "num_classes": len(probs)}],
        "usage": {"prompt_tokens": 100, "total_tokens": 100},
    }


def chat_reply(content: str | None, **message: Any) -> dict:
    return {
        "id": "c",
        "object": "chat.completion",
        "choices": [
            {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": content, **message}}
        ],
        "usage": {"prompt_tokens": 100, "completion_tokens": 10, "total_tokens": 110},
    }


class JudgeServer:
    """A judge on 127.0.0.1. `behave(handler, body)` answers each POST; the default is a good judge of either kind.

    requests: the bodies so far, with path and headers under "_path" and "_headers".
    gets: what GET answers, by path; other paths are not found.
    """

    def __init__(self, behave: Callable[[Any, dict], None] | None = None, port: int = 0):
        self.behave = behave or good
        self.requests: list[dict] = []
        self.gets: dict[str, Any] = {}
        self.connections: list[socket.socket] = []
        self.busy = self.most_busy = 0
        lock = threading.Lock()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def setup(self):
                super().setup()
                outer.connections.append(self.connection)

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with lock:
                    outer.requests.append(
                        {**body, "_path": self.path, "_headers": {k.lower(): v for k, v in self.headers.items()}}
                    )
                    outer.busy += 1
                    outer.most_busy = max(outer.busy, outer.most_busy)
                try:
                    outer.behave(self, body)
                except (BrokenPipeError, ConnectionResetError):
                    self.close_connection = True
                finally:
                    with lock:
                        outer.busy -= 1

            def do_GET(self):
                known = self.path in outer.gets
                send(self, 200 if known else 404, json.dumps(outer.gets.get(self.path, {})).encode())

            def log_message(self, *_):
                pass

        ThreadingHTTPServer.allow_reuse_address = True
        self.server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
        self.server.daemon_threads = True
        self.port = self.server.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}"

    def __enter__(self) -> JudgeServer:
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        self.server.shutdown()
        self.server.server_close()
        for connection in self.connections:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)


def send(handler, status: int, data: bytes, content_type: str = "application/json", **headers: str) -> None:
    handler.send_response(status)
    handler.send_header("Content-Type", content_type)
    handler.send_header("Content-Length", str(len(data)))
    for name, value in headers.items():
        handler.send_header(name.replace("_", "-"), value)
    handler.end_headers()
    handler.wfile.write(data)


def reply(handler, document: Any) -> None:
    send(handler, 200, json.dumps(document).encode())


def good(handler, body: dict) -> None:
    score = score_of(body["messages"])
    if handler.path.endswith("/classify"):
        reply(handler, classify_reply([1 - score, score]))
    else:
        reply(handler, chat_reply(json.dumps({"score": score})))


def status(code: int, text: bytes = b'{"error": "no"}', **headers: str):
    return lambda handler, body: send(handler, code, text, **headers)


def raw(data: bytes, content_type: str = "application/json"):
    return lambda handler, body: send(handler, 200, data, content_type)


def hang(seconds: float):
    def behave(handler, body):
        time.sleep(seconds)
        good(handler, body)

    return behave


def reset_mid_body(handler, body) -> None:
    handler.send_response(200)
    handler.send_header("Content-Length", "1000")
    handler.end_headers()
    handler.wfile.write(b'{"data": [{"probs": [0.1, 0.9')
    handler.wfile.flush()
    # Linger 0: the peer gets a reset, not an end.
    handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    handler.connection.close()
    handler.close_connection = True


def classified(probs: list[Any]):
    return lambda handler, body: reply(handler, classify_reply(probs))


def chatted(content: str | None, **message: Any):
    return lambda handler, body: reply(handler, chat_reply(content, **message))
