"""One judge for all ranks and hosts: `python -m r1vfree_cli.judges.server --model M --port P`.

LitServe batches the requests of all clients. The wire is vLLM's /classify with chat messages, so that `vllm serve`
can take this server's place. `GET /health` is 200 when the model is loaded, `GET /info` tells what it serves and which prompt that wants.
"""

# No `from __future__ import annotations`: LitServe reads the request's class from the signature of decode_request.
import argparse
import base64
import ctypes
import hmac
import io
import math
import multiprocessing
import os
import signal
import socket
import sys
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, Literal

import litserve
from fastapi import HTTPException, Request
from fastapi.responses import JSONResponse
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field

from ..config.embedded import is_embedded, resolve_model
from ..core import console
from ..core.errors import R1VError, UsageError
from ..core.process import gpu_count
from ..run.checkpoint import fingerprint
from .kinds import detect_kind, prompt_of

MAX_BATCH = 64
BATCH_WAIT_S = 0.02  # how long the first request of a batch waits for more
QUEUE_S = 300.0  # a request that waited longer gets 504
MAX_BODY_BYTES = 64 << 20
MAX_IMAGE_PIXELS = 64_000_000
MAX_TEXT_CHARS = 100_000
LOOPBACK, ANY = "127.0.0.1", "0.0.0.0"
DATA_URI = "data:image/"


# --- the wire --------------------------------------------------------------------------------------------------


class _Url(BaseModel):
    url: str


class _ImagePart(BaseModel):
    type: Literal["image_url"]
    image_url: _Url


class _TextPart(BaseModel):
    type: Literal["text"]
    text: Annotated[str, Field(max_length=MAX_TEXT_CHARS)]


class _Message(BaseModel):
    role: Literal["system", "user", "assistant"]
    content: list[Annotated[_ImagePart | _TextPart, Field(discriminator="type")]]


class ClassifyRequest(BaseModel):
    """vLLM's chat form of a /classify request. Images come as data URIs: this server fetches nothing."""

    model_config = ConfigDict(extra="ignore")

    model: str | None = None
    messages: list[_Message] = Field(min_length=1, max_length=16)
    add_generation_prompt: bool = False

    def split(self) -> tuple[list[str], list[dict]]:
        """The images' URIs in order, and the messages with a placeholder for each."""
        uris: list[str] = []
        messages: list[dict] = []
        for message in self.messages:
            content: list[dict] = []
            for part in message.content:
                if isinstance(part, _ImagePart):
                    uris.append(part.image_url.url)
                content.append({"type": "image"} if isinstance(part, _ImagePart) else part.model_dump())
            messages.append({"role": message.role, "content": content})
        return uris, messages


def decode_image(uri: str) -> Image.Image:
    """An RGB image from a data URI.

    Raises:
        ValueError: not a data URI, not base64, not an image, or too large.
    """
    head, comma, data = uri.partition(",")
    if not head.startswith(DATA_URI) or not head.endswith(";base64") or not comma:
        raise ValueError("image_url must be a data URI: data:image/...;base64,...")
    try:
        image = Image.open(io.BytesIO(base64.b64decode(data, validate=True)))
        if image.width * image.height > MAX_IMAGE_PIXELS:
            raise ValueError(f"image of {image.width} x {image.height} pixels is too large")
        return image.convert("RGB")
    except Exception as e:  # damaged images raise anything
        raise ValueError(f"image cannot be decoded: {e}") from None


@dataclass(frozen=True)
class _Item:
    images: list[Image.Image]
    messages: list[dict]
    add_generation_prompt: bool


@dataclass(frozen=True)
class _Scored:
    score: float
    tokens: int


@dataclass(frozen=True)
class _Refused:
    status: int
    message: str


class ClassifyAPI(litserve.LitAPI):
    """LitServe's hooks around `LocalJudge`. Each device has a worker process, which runs `setup` and `predict`."""

    def __init__(self, model: str, revision: str | None, key_variable: str | None, batch: int, url: str):
        super().__init__(max_batch_size=batch, batch_timeout=BATCH_WAIT_S if batch > 1 else 0.0, api_path="/classify")
        self._model, self._revision, self._key_variable, self._url = model, revision, key_variable, url
        self._judge: Any = None
        # The answers of a group come with the same image; an lru_cache does not survive the way to the worker.
        self._decode: Callable[[str], Image.Image] = decode_image

    def authorize(self, request: Request) -> None:
        """Every route but /health wants the key, where one is set."""
        if self._key_variable is None or request.url.path == "/health":
            return
        given = request.headers.get("authorization", "").removeprefix("Bearer ")
        if not hmac.compare_digest(given.encode(), os.environ[self._key_variable].encode()):
            raise HTTPException(401, "wrong or missing API key")

    def setup(self, device: str) -> None:
        die_with_parent(signal.SIGKILL)
        # Imported in the worker only: this process and the HTTP server start sooner and stay small without torch.
        from .local import LocalJudge

        self._decode = lru_cache(maxsize=32)(decode_image)
        self._judge = LocalJudge(self._model, revision=self._revision, device=device, batch_size=MAX_BATCH)
        console.log(f"serving {self._model} on {device} at {self._url}")

    def decode_request(self, request: ClassifyRequest) -> _Item | _Refused:
        # Nothing is raised here: LitServe would fail the whole batch.
        uris, messages = request.split()
        try:
            return _Item([self._decode(uri) for uri in uris], messages, request.add_generation_prompt)
        except ValueError as e:
            return _Refused(400, str(e))

    def predict(self, x: Any) -> Any:
        """A `_Scored` or `_Refused` per request; one that fails does not take the others along."""
        batch = x if isinstance(x, list) else [x]
        results: dict[int, _Scored | _Refused] = {i: r for i, r in enumerate(batch) if isinstance(r, _Refused)}
        for asked in (False, True):
            places = [i for i, r in enumerate(batch) if isinstance(r, _Item) and r.add_generation_prompt is asked]
            results.update(zip(places, self._score([batch[i] for i in places]), strict=True))
        found = [results[i] for i in range(len(batch))]
        return found if isinstance(x, list) else found[0]

    def _score(self, items: list[_Item]) -> list[_Scored | _Refused]:
        if not items:
            return []
        before = self._judge.tokens
        try:
            scores = self._judge.score_messages(
                [(item.images, item.messages) for item in items],
                add_generation_prompt=items[0].add_generation_prompt,
            )
        except Exception as e:
            if len(items) > 1:
                return [result for item in items for result in self._score([item])]
            return [_Refused(500, f"{type(e).__name__}: {e}"[:300])]
        tokens = (self._judge.tokens - before) // len(items)
        # NaN is not JSON: raised in `encode_response`, that would fail the whole batch too.
        return [
            _Scored(score, tokens) if math.isfinite(score) else _Refused(500, f"the model's score is {score}")
            for score in scores
        ]

    def encode_response(self, output: _Scored | _Refused) -> JSONResponse:
        if isinstance(output, _Refused):
            return JSONResponse({"error": {"message": output.message, "code": output.status}}, output.status)
        score, tokens = output.score, output.tokens
        probs = [1 - score, score] if self._judge.prompt == "judge" else [score]
        label = "Yes" if score >= 0.5 else "No"
        data = {"index": 0, "label": label if len(probs) == 2 else None, "probs": probs, "num_classes": len(probs)}
        return JSONResponse(
            {
                "id": f"classify-{uuid.uuid4().hex}",
                "object": "list",
                "created": int(time.time()),
                "model": self._model,
                "data": [data],
                "usage": {
                    "prompt_tokens": tokens,
                    "total_tokens": tokens,
                    "completion_tokens": 0,
                    "prompt_tokens_details": None,
                },
            }
        )


# --- the process -----------------------------------------------------------------------------------------------


def serve(
    model: str,
    *,
    host: str = LOOPBACK,
    port: int = 8000,
    devices: list[int] | None = None,
    revision: str | None = None,
    api_key_env: str | None = None,
    seed: int = 42,
    batch: int = MAX_BATCH,
) -> None:
    """Serve until SIGTERM or SIGINT.

    Args:
        model: folder, hub name or `embedded:tiny-judge`.
        host: 127.0.0.1, or 0.0.0.0 or :: for all interfaces.
        devices: GPUs, one copy of the model on each; by default all that are visible, else the CPU.
        api_key_env: environment variable that holds the key which clients must send.
        seed: of an embedded model.
        batch: most requests in one batch; 1 turns batching off.

    Raises:
        UsageError, DataError: the model cannot be served, no key is set, or the port is taken.
    """
    if api_key_env and not os.environ.get(api_key_env):
        raise UsageError(f"--api-key-env {api_key_env}: the variable is not set")
    if host not in (LOOPBACK, ANY, "::"):
        raise UsageError(f"--host {host}: not an address to bind to", hint=f"{LOOPBACK}, {ANY} or ::")
    _check_free(host, port)
    path = resolve_model(model, seed) if is_embedded(model) else model
    kind = detect_kind(path, revision)
    said = {"name": model, "revision": revision, "kind": kind, "prompt": prompt_of(kind)}
    if Path(path).is_dir():
        said["files"] = fingerprint(Path(path))
    gpu = gpu_count() > 0
    api = ClassifyAPI(
        path, revision, api_key_env, batch, f"http://{f'[{host}]' if ':' in host else host}:{port}/classify"
    )
    server = litserve.LitServer(
        api,
        accelerator="cuda" if gpu else "cpu",
        devices=(devices or "auto") if gpu else 1,
        timeout=QUEUE_S,
        max_payload_size=MAX_BODY_BYTES,
        model_metadata=said,
    )
    _end_with_this_process()
    server.run(
        host=host, port=port, num_api_servers=1, generate_client_file=False, log_level="warning", access_log=False
    )


def _check_free(host: str, port: int) -> None:
    """Known before the model is loaded; the HTTP server would only say so after that."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as s:
        s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            s.bind((host, port))
        except OSError as e:
            raise UsageError(f"cannot listen on {host}, port {port}: {e.strerror}", hint="another --port") from None


def _end_with_this_process() -> None:
    """LitServe's child processes end with this one, whatever ends it, and this one ends in order on SIGTERM."""
    os.environ["PYTHONWARNINGS"] = "ignore:resource_tracker"  # LitServe lets it clean up; each end would say so
    # The manager and the HTTP server are forked; the workers, which are spawned, say it themselves in `setup`.
    multiprocessing.set_start_method("fork", force=True)
    os.register_at_fork(after_in_child=_in_child)
    signal.signal(signal.SIGTERM, _interrupt)


def _in_child() -> None:
    die_with_parent(signal.SIGKILL)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def die_with_parent(number: int) -> None:
    """Ask Linux to send signal `number` to this process when its parent dies; does nothing elsewhere."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, number)  # PR_SET_PDEATHSIG


def _interrupt(*_: Any) -> None:
    # LitServe shuts down in order on KeyboardInterrupt only. A second signal must not cut that short.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise KeyboardInterrupt


def main(argv: list[str] | None = None) -> int:
    """The command line of `python -m r1vfree_cli.judges.server`; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m r1vfree_cli.judges.server", description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--revision")
    parser.add_argument("--host", default=LOOPBACK)
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--devices", help="GPUs, as in 6,7")
    parser.add_argument("--api-key-env")
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--batch", type=int, default=MAX_BATCH)
    given = vars(parser.parse_args(argv))
    try:
        devices = given.pop("devices")
        serve(given.pop("model"), devices=[int(d) for d in devices.split(",")] if devices else None, **given)
    except R1VError as e:
        console.error(e)
        return e.exit_code
    except (ValueError, SystemExit) as e:
        print(f"error: {e}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
