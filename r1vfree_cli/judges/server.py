"""One judge for all ranks and hosts: `python -m r1vfree_cli.judges.server --model M --port P`.

The wire is vLLM's /classify with chat messages, so that `vllm serve` can take this server's place. `GET /health` is 200
once the model is loaded, `GET /info` tells what it serves and which prompt that wants.

One process: the HTTP server in an event loop, and a thread per device that runs the model on what `Queue` gives it. All
that a client can make it hold is bounded: `wire` bounds a request, `limits` its time and the memory of all together.
"""

import argparse
import asyncio
import hmac
import math
import os
import resource
import socket
import sys
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import uvicorn
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response

from ..config.embedded import resolve_model
from ..config.schema import FEWEST_PIXELS, MAX_PIXELS, MIN_PIXELS
from ..core import console
from ..core.errors import R1VError, UsageError
from ..core.machine import refused
from ..core.process import gpu_count
from ..run.checkpoint import fingerprint
from .kinds import detect_kind, prompt_of
from .limits import HEAD_BYTES, MAX_CONNECTIONS, PatientProtocol, Room, read_body
from .protocol import Failure
from .wire import Job, Refused, classification, parse

MAX_BATCH = 64
MAX_REQUESTS = 1024  # at once, whatever they wait for; one more gets 429
BATCH_WAIT_S = 0.01  # how long the first request of an idle server waits for more
PATIENCE_S = 0.5  # a request that waited longer goes before shorter ones in every second batch
LOOPBACK, ANY = "127.0.0.1", "0.0.0.0"
PROBE = (30, 10, 3)  # TCP keep-alive: after how many seconds, how often, how many times
PREPARING = 2  # threads that decode images and count tokens


class Queue:
    """The requests that wait for a device. Short ones go first, so that a long one does not hold up the others; every
    second batch begins with the oldest, so that none waits for ever."""

    def __init__(self, batch: int):
        self._batch, self._waiting = batch, list[Job]()
        self._some, self._short_first = asyncio.Event(), True
        self.seconds_each = 0.1  # a running mean, which Retry-After is made of

    async def score(self, job: Job, request: Request) -> float | Failure:
        """The job's result.

        Raises ClientDisconnect: nobody waits for it any more; it is not computed if it has not begun.
        """
        job.result = asyncio.get_running_loop().create_future()
        self._waiting.append(job)
        self._some.set()
        gone = asyncio.ensure_future(_disconnected(request))
        try:
            await asyncio.wait({job.result, gone}, return_when=asyncio.FIRST_COMPLETED)
            if not job.result.done():
                raise ClientDisconnect
            return job.result.result()
        finally:
            gone.cancel()
            if job in self._waiting:
                self._waiting.remove(job)

    def retry_after(self) -> int:
        """Seconds until about half of what waits is done."""
        return max(1, min(60, math.ceil(len(self._waiting) * self.seconds_each / 2)))

    async def work(self, judge: Any, thread: ThreadPoolExecutor) -> None:
        """Run batches on one device, for ever."""
        while True:
            if not self._waiting:
                self._some.clear()
                await self._some.wait()
                await asyncio.sleep(BATCH_WAIT_S)
            if not self._waiting:  # who was there has left, or another device has it
                continue
            jobs, begin = self._take(), time.monotonic()
            ask = partial(judge.score_messages, add_generation_prompt=jobs[0].add_generation_prompt)
            try:
                scores = await asyncio.get_running_loop().run_in_executor(thread, ask, [job.request for job in jobs])
            except Exception as e:  # the judge names what it knows; this would end the server
                scores = [Failure("error", f"{type(e).__name__}: {e}"[:300])] * len(jobs)
            self.seconds_each += 0.2 * ((time.monotonic() - begin) / len(jobs) - self.seconds_each)
            for job, score in zip(jobs, scores, strict=True):
                if not job.result.done():
                    job.result.set_result(score)

    def _take(self) -> list[Job]:
        """The next batch, of one kind of prompt: from the shortest on, or from the oldest."""
        from .local import next_batch

        oldest, kept = self._waiting[0], self._waiting
        self._short_first = not self._short_first or time.monotonic() - oldest.since < PATIENCE_S
        if not self._short_first:
            kept = [job for job in kept if job.tokens >= oldest.tokens]
        first = min(kept, key=lambda job: job.tokens)
        kept = [job for job in kept if job.add_generation_prompt == first.add_generation_prompt]
        mates = [tuple(map(id, job.request[0])) for job in kept]  # equal images are one object, see `wire`
        taken = [kept[i] for i in next_batch([job.tokens for job in kept], mates, self._batch)]
        self._waiting = [job for job in self._waiting if job not in taken]
        return taken


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


class App:
    """The ASGI application: a `LocalJudge` a device, and for each the thread in which it was loaded.

    key: what clients must send; None for none. said: what /info tells of the model.
    """

    def __init__(self, judges: list, threads: list[ThreadPoolExecutor], key: str | None, batch: int, said: dict):
        self._judges, self._threads, self._key, self._said = judges, threads, key, said
        self._queue, self._requests = Queue(batch), 0
        self._preparing = asyncio.Semaphore(PREPARING)
        self._workers: list[asyncio.Task] = []

    def start(self) -> None:
        """Begin to take batches, in this event loop."""
        work = map(self._queue.work, self._judges, self._threads)
        self._workers = [asyncio.create_task(each) for each in work]

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        request = Request(scope, receive)
        try:
            response = await self._answer(request)
        except Refused as refusal:
            # What is left of the body is not read: the connection ends.
            headers = {"Connection": "close"} if refusal.status in (401, 404, 405, 408, 413) else {}
            headers |= {"Retry-After": str(self._queue.retry_after())} if refusal.status == 429 else {}
            said = {"message": refusal.message, "type": "error", "code": refusal.status}
            response = JSONResponse({"error": said}, refusal.status, headers)
        except ClientDisconnect:
            return
        await response(scope, receive, send)

    async def _answer(self, request: Request) -> Response:
        path, method = request.scope["path"], request.method
        if path == "/health":
            return JSONResponse({"status": "ok"})
        if self._key is not None:
            given = request.headers.get("authorization", "").removeprefix("Bearer ")
            if not hmac.compare_digest(given.encode(), self._key.encode()):
                raise Refused(401, "wrong or missing API key")
        if path not in ("/info", "/classify"):
            raise Refused(404, "there are /classify, /info and /health")
        if method != ("GET" if path == "/info" else "POST"):
            raise Refused(405, f"{path} does not take {method}")
        if path == "/info":
            return JSONResponse({"model": self._said})
        if self._requests >= MAX_REQUESTS:
            raise Refused(429, f"{self._requests} requests wait already")
        self._requests += 1
        try:
            with Room() as held:
                return await self._classify(request, held)
        finally:
            self._requests -= 1

    async def _classify(self, request: Request, held: Room) -> Response:
        body = await read_body(request, held)
        async with self._preparing:
            if await request.is_disconnected():
                raise ClientDisconnect
            job = await asyncio.to_thread(parse, body, self._judges[0], held)
        score = await self._queue.score(job, request)
        if isinstance(score, Failure):
            raise Refused(500, str(score))
        n, said = job.tokens, self._said
        usage = {"prompt_tokens": n, "total_tokens": n, "completion_tokens": 0, "prompt_tokens_details": None}
        reply = {"id": f"classify-{uuid.uuid4().hex}", "object": "list", "created": int(time.time())}
        reply |= {"model": said["name"], "data": [classification(score, said["prompt"] == "judge")], "usage": usage}
        return JSONResponse(reply)


# --- the process -----------------------------------------------------------------------------------------------


def serve(
    model: str,
    *,
    host: str = LOOPBACK,
    port: int = 8000,
    revision: str | None = None,
    api_key_env: str | None = None,
    seed: int = 42,
    batch: int = MAX_BATCH,
    min_pixels: int = MIN_PIXELS,
    max_pixels: int = MAX_PIXELS,
    max_tokens: int | None = None,
) -> None:
    """Serve until SIGTERM or SIGINT, with a copy of the model on each visible GPU, else on the CPU.

    Args:
        model: folder, hub name or `embedded:tiny-judge`, of which `seed` is.
        api_key_env: environment variable that holds the key which clients must send.
        min_pixels, max_pixels: of an image after resizing: those of the policy, which then sees the same picture.

    Raises UsageError, DataError: the model cannot be served, no key is set, or the port is taken.
    """
    if api_key_env and not os.environ.get(api_key_env):
        raise UsageError(f"--api-key-env {api_key_env}: the variable is not set")
    if host not in (LOOPBACK, ANY, "::"):
        raise UsageError(f"--host {host}: not an address to bind to", hint=f"{LOOPBACK}, {ANY} or ::")
    if not FEWEST_PIXELS <= min_pixels <= max_pixels:
        found = f"--min-pixels {min_pixels}, --max-pixels {max_pixels}"
        raise UsageError(f"{found}: {FEWEST_PIXELS} <= min <= max is allowed")
    pixels = (min_pixels, max_pixels)
    # Taken before the model is loaded, listened on after: until then connections are refused.
    with _bound(host, port) as bound:
        path = resolve_model(model, seed)
        kind = detect_kind(path, revision)
        said = {"name": model, "revision": revision, "kind": kind, "prompt": prompt_of(kind), "pixels": list(pixels)}
        if Path(path).is_dir():
            said["files"] = fingerprint(Path(path))
        devices = [f"cuda:{i}" for i in range(gpu_count())] or ["cpu"]
        threads = [ThreadPoolExecutor(1, f"r1v-{device}") for device in devices]
        load = partial(_load, path, revision=revision, batch_size=batch, pixels=pixels, max_tokens=max_tokens)
        judges = [task.result() for task in [t.submit(load, d) for t, d in zip(threads, devices, strict=True)]]
        said["max_tokens"] = judges[0].max_tokens
        app = App(judges, threads, os.environ[api_key_env] if api_key_env else None, batch, said)
        at = f"[{host}]" if ":" in host else host
        console.log(f"serving {model} on {', '.join(devices)} at http://{at}:{port}/classify")
        asyncio.run(_run(app, bound))


def _load(path: str, device: str, **options: Any) -> Any:
    """A judge, loaded in the thread that will run it: CUDA's current device belongs to a thread."""
    import torch

    from .local import LocalJudge

    if device == "cpu":
        torch.set_num_threads(max(1, (os.cpu_count() or 2) - 1))  # the HTTP server needs a core of its own
    else:
        torch.cuda.set_device(device)
    return LocalJudge(path, device=device, **options)


async def _run(app: App, bound: socket.socket) -> None:
    app.start()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(hard, 2 * MAX_CONNECTIONS)), hard))
    config = uvicorn.Config(
        app,
        http=PatientProtocol,
        ws="none",
        lifespan="off",
        log_level="warning",
        access_log=False,
        server_header=False,
        limit_concurrency=MAX_CONNECTIONS,
        h11_max_incomplete_event_size=HEAD_BYTES,
        timeout_graceful_shutdown=3,
    )
    await uvicorn.Server(config).serve(sockets=[bound])


def _bound(host: str, port: int) -> socket.socket:
    bound = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    # Connections inherit these: a peer that is gone is seen after a minute.
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in zip(("TCP_KEEPIDLE", "TCP_KEEPINTVL", "TCP_KEEPCNT"), PROBE, strict=True):
        if hasattr(socket, name):
            bound.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
    try:
        bound.bind((host, port))
    except OSError as e:
        bound.close()
        raise UsageError(f"cannot listen on {host}, port {port}: {e.strerror}", hint="another --port") from None
    return bound


def main(argv: list[str] | None = None) -> int:
    """The command line of `python -m r1vfree_cli.judges.server`; returns the exit code."""
    parser = argparse.ArgumentParser("python -m r1vfree_cli.judges.server", argument_default=argparse.SUPPRESS)
    parser.add_argument("--model", required=True)
    for text in ("--revision", "--host", "--api-key-env"):
        parser.add_argument(text)
    for number in ("--port", "--seed", "--batch", "--min-pixels", "--max-pixels", "--max-tokens"):
        parser.add_argument(number, type=int)
    try:
        serve(**vars(parser.parse_args(argv)))
    except KeyboardInterrupt:
        return 130
    except Exception as e:
        error = e if isinstance(e, R1VError) else refused(e)
        if error is None:
            raise
        console.error(error)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
