"""The reward server under 1, 8, 32 and 64 clients: latency and memory, with and without a text that is too long.

Run: python tests/bench/reward_server.py [--model DIR] [--seconds 8] [--batch 64] [--root CHECKOUT]
Prints a line for each number of clients: requests per second, p50 and p99 in milliseconds, the server's peak memory in
MiB, all processes together; `alone` without, `beside` with one more client that sends a text of 98,000 characters again
and again. Without --model a tiny Qwen2.5-VL is made; on a GPU give a real one. --batch 1 turns batching off; --root
measures the server of another checkout.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import contextlib
import io
import json
import os
import random
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

import httpx2
import psutil

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "integration")]

CLIENTS = (1, 8, 32, 64)
LONG = "a long text " * 8167  # 98,004 characters


def bodies(count: int) -> list[bytes]:
    """Requests about images of two sizes, with answers of 5 to 1,500 characters."""
    from PIL import Image

    draw, found = random.Random(0), []
    for i in range(count):
        buffer = io.BytesIO()
        Image.new("RGB", (draw.choice((56, 224)),) * 2, (i % 256, 40, 90)).save(buffer, "PNG")
        url = "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
        found.append(request(f"Is it {'red ' * draw.choice((1, 5, 40, 375))}{i}?", url))
    return found


def request(text: str, *urls: str) -> bytes:
    content = [{"type": "image_url", "image_url": {"url": url}} for url in urls] + [{"type": "text", "text": text}]
    return json.dumps({"messages": [{"role": "user", "content": content}], "add_generation_prompt": True}).encode()


async def load(url: str, clients: int, seconds: float, beside: bool) -> list[float]:
    """Latencies in seconds of the good requests of `clients`, each of which sends one after the other."""
    found, sent = [], bodies(512)
    headers = {"Content-Type": "application/json"}
    limits = httpx2.Limits(max_connections=None, max_keepalive_connections=None)
    async with httpx2.AsyncClient(base_url=url, headers=headers, timeout=300, limits=limits, trust_env=False) as client:
        end = time.monotonic() + seconds

        async def one(number: int) -> None:
            for body in sent[number * 8 :] + sent:
                if (begin := time.monotonic()) > end:
                    return
                reply = await client.post("/classify", content=body)
                assert reply.status_code == 200, reply.text
                found.append(time.monotonic() - begin)

        async def long() -> None:
            while time.monotonic() < end:
                reply = await client.post("/classify", content=request(LONG))
                assert reply.status_code in (200, 400, 500), reply.text

        await asyncio.gather(*(one(i) for i in range(clients)), *([long()] if beside else []))
    return sorted(found)


def measure(url: str, process: psutil.Process, clients: int, seconds: float, beside: bool) -> dict:
    async def both() -> tuple[list[float], int]:
        work, peak = asyncio.ensure_future(load(url, clients, seconds, beside)), 0
        while not work.done():
            held = 0
            for member in (process, *process.children(recursive=True)):
                with contextlib.suppress(psutil.NoSuchProcess):
                    held += member.memory_info().rss
            peak = max(peak, held)
            await asyncio.sleep(0.1)
        return work.result(), peak

    found, peak = asyncio.run(both())
    p50, p99 = (1000 * found[min(len(found) - 1, int(q * len(found)))] for q in (0.5, 0.99))
    return {"per_s": round(len(found) / seconds, 1), "p50": round(p50), "p99": round(p99), "MiB": peak >> 20}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model")
    parser.add_argument("--seconds", type=float, default=8)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--root", default=str(ROOT))
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, socket.socket() as s:
        if not args.model:
            from tiny_models import save_tiny

            args.model = str(save_tiny(folder))
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
        s.close()
        command = [sys.executable, "-m", "r1vfree_cli.judges.server", "--model", args.model, "--port", str(port)]
        env = {**os.environ, "PYTHONPATH": args.root}
        server = psutil.Popen([*command, "--batch", str(args.batch)], cwd=args.root, env=env, stderr=subprocess.DEVNULL)
        url = f"http://127.0.0.1:{port}"
        try:
            for _ in range(1200):
                try:
                    if urllib.request.urlopen(f"{url}/health", timeout=2).status == 200:
                        break
                except OSError:
                    time.sleep(0.25)
            asyncio.run(load(url, 8, 2, False))
            for clients in CLIENTS:
                alone, beside = (measure(url, server, clients, args.seconds, long) for long in (False, True))
                print(json.dumps({"clients": clients, "alone": alone, "beside": beside}), flush=True)
        finally:
            server.terminate()
            server.wait(60)


if __name__ == "__main__":
    main()
