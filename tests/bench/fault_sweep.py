"""What becomes of a judge's or endpoint's faults: `python -m tests.bench.fault_sweep [--only SHAPE]`.

Each fault of a list made apart from `test_judge_faults` is the answer of a real server on loopback to what r1v asks
through its own commands: a feedback reward (classify, chat), canaries, an evaluation's judge, an evaluated endpoint.
It must end as a number (only where the reply is a right one), as unscored, or as an error that names what is wrong.
Prints the count of each; the exit code is 1 when any ended in another way.
"""

from __future__ import annotations

import argparse
import asyncio
import gzip
import json
import os
import socket
import struct
import sys
import tempfile
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "integration")]

SHAPES = ("classify", "chat", "canaries", "eval judge", "eval endpoint")
CRLF = b"\r\n"


def http(body: bytes, status: str = "200 OK", *headers: str, length: str | None = None) -> bytes:
    lines = [f"HTTP/1.1 {status}", *headers, f"Content-Length: {len(body) if length is None else length}"]
    return CRLF.join(line.encode("latin-1") for line in lines) + CRLF * 2 + body


def right(shape: str) -> dict:
    """The document of a judge or model that does what it should."""
    if shape in ("classify", "canaries"):
        return {"data": [{"index": 0, "probs": [0.25, 0.75], "num_classes": 2}], "usage": {"prompt_tokens": 3}}
    text = {"chat": '{"score": 0.75}', "eval judge": "correct", "eval endpoint": "Yes"}[shape]
    message = {"role": "assistant", "content": text}
    return {"model": "m", "choices": [{"index": 0, "finish_reason": "stop", "message": message}]}


def good(shape: str) -> bytes:
    return json.dumps(right(shape)).encode()


def chunked(shape: str, size: str | None = None, end: bytes = b"0\r\n\r\n") -> bytes:
    data = good(shape)
    head = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
    return head + (size or f"{len(data):x}").encode() + CRLF + data + CRLF + end


def reset(link: socket.socket) -> None:
    link.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


def slowly(part: bytes, first: bytes = b"", pause: float = 0.05):
    def send(link: socket.socket, shape: str) -> None:
        link.sendall(first)
        for _ in range(400):
            link.sendall(part)
            time.sleep(pause)

    return send


def cut_and_reset(link: socket.socket, shape: str) -> None:
    link.sendall(http(good(shape))[:-9])
    reset(link)


def within(**change: object):
    """The right document with other parts: of `choices[0]`, its message, or `data[0]`."""

    def made(shape: str) -> bytes:
        document = right(shape)
        part = document["data"][0] if "data" in document else document["choices"][0]
        for name, value in change.items():
            inside = part["message"] if name in part.get("message", {}) or name in MESSAGE else part
            inside[name] = value
        return http(json.dumps(document).encode())

    return made


MESSAGE = ("content", "refusal", "tool_calls", "reasoning_content", "role")
SILENT = lambda link, shape: time.sleep(8)  # noqa: E731
BAD, OK = False, True
# Name -> (what is sent, whether a number may come of it): bytes, a function of the shape, or of the link and the shape.
WIRE: dict[str, tuple] = {
    "silence": (SILENT, BAD), "closed at once": (b"", BAD), "reset at once": (lambda link, s: reset(link), BAD),
    "reset in the body": (cut_and_reset, BAD), "half a head": (b"HTTP/1.1 200 OK\r\nContent-Le", BAD),
    "a status line only": (b"HTTP/1.1 200 OK\r\n", BAD), "HTTP/0.9": (lambda s: good(s), BAD),
    "HTTP/2": (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", BAD), "TLS": (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc", BAD),
    "zero bytes": (b"\0" * 5000, BAD), "status abc": (b"HTTP/1.1 abc OK\r\n\r\n", BAD),
    "status 99999": (lambda s: http(good(s), "99999 X"), BAD), "status 600": (lambda s: http(good(s), "600 X"), BAD),
    "no length": (lambda s: b"HTTP/1.1 200 OK\r\n\r\n" + good(s), OK), "length too short": (lambda s: http(good(s), length="9"), BAD),
    "length too long": (lambda s: http(good(s), length="99999"), BAD), "length -1": (lambda s: http(good(s), length="-1"), BAD),
    "two lengths": (lambda s: http(good(s), "200 OK", "Content-Length: 3"), BAD), "length 1e999": (lambda s: http(good(s), length="9" * 999), BAD),
    "chunked": (chunked, OK), "chunks cut": (lambda s: chunked(s, end=b""), BAD), "chunk of size x": (lambda s: chunked(s, "xyz"), BAD),
    "chunk of 2^64": (lambda s: chunked(s, "f" * 16), BAD), "negative chunk": (lambda s: chunked(s, "-5"), BAD),
    "endless body": (slowly(b"x" * 200_000, b"HTTP/1.1 200 OK\r\n\r\n", 0), BAD), "endless head": (slowly(b"A: b\r\n" * 500, b"HTTP/1.1 200 OK\r\n", 0), BAD),
    "body in drops": (slowly(b" ", b"HTTP/1.1 200 OK\r\nContent-Length: 9999\r\n\r\n"), BAD),
    "102 for ever": (slowly(b"HTTP/1.1 102 Processing\r\n\r\n"), BAD), "101": (lambda s: http(good(s), "101 Switching"), BAD),
    "gzip in gzip": (lambda s: http(gzip.compress(gzip.compress(good(s))), "200 OK", "Content-Encoding: gzip, gzip"), BAD),
    "gzip bomb": (http(gzip.compress(b"[" * 80_000_000, 1), "200 OK", "Content-Encoding: gzip"), BAD),
    "deflate that is none": (lambda s: http(good(s), "200 OK", "Content-Encoding: deflate"), BAD),
    "zstd": (lambda s: http(good(s), "200 OK", "Content-Encoding: zstd"), BAD), "charset utf-7": (lambda s: http(good(s), "200 OK", "Content-Type: text/html; charset=utf-7"), OK),
}  # fmt: skip
WIRE |= {
    f"{code}{' ' + ' '.join(more) if more else ''}": ((lambda s, c=code, m=more: http(good(s), f"{c} X", *m)), BAD)
    for code, *more in (
        (203,), (205,), (226,), (302, "Location: /"), (302, "Location: http://127.0.0.1:1/"), (308, "Location: ftp://x"),
        (401,), (403,), (404,), (405,), (407,), (410,), (429, "Retry-After: nan"), (429, "Retry-After: -7"),
        (429, "Retry-After: 1e12"), (503, "Retry-After: yesterday"), (501,), (529,),
    )
}  # fmt: skip
BODIES: dict[str, tuple] = {
    "byte order mark": (lambda s: http(b"\xef\xbb\xbf" + good(s)), OK), "UTF-16": (lambda s: http(good(s).decode().encode("utf-16")), BAD),
    "server-sent events": (lambda s: http(b"data: " + good(s) + b"\n\ndata: [DONE]\n\n"), BAD), "two documents": (lambda s: http(good(s) * 2), BAD),
    "a trailing comma": (lambda s: http(good(s)[:-1] + b",}"), BAD), "NaN in usage": (lambda s: http(good(s)[:-1] + b', "x": NaN}'), BAD),
    "error beside it": (lambda s: http(json.dumps(right(s) | {"error": {"message": "overloaded"}}).encode()), BAD),
    "error null": (lambda s: http(json.dumps(right(s) | {"error": None}).encode()), OK), "detail": (http(b'{"detail": "Not Found"}'), BAD),
    "vLLM's error": (http(b'{"object": "error", "message": "x", "code": 400}'), BAD), "a string": (http(b'"correct"'), BAD),
    "deep": (lambda s: http(good(s)[:-1] + b', "x": ' + b"[" * 90_000 + b"]" * 90_000 + b"}"), BAD),
    "empty lists": (http(b'{"data": [], "choices": []}'), BAD), "objects for lists": (http(b'{"data": {}, "choices": {}}'), BAD),
}  # fmt: skip
CHATS: dict[str, tuple] = {
    "content null": (within(content=None), BAD), "content blank": (within(content=" \n"), BAD), "content 7": (within(content=7), BAD),
    "content an object": (within(content={"score": 1}), BAD), "filtered": (within(finish_reason="content_filter"), BAD),
    "finish error": (within(finish_reason="error"), BAD), "refusal": (within(content=None, refusal="I cannot"), BAD),
    "reasoning only": (within(content=None, reasoning_content="correct, yes, 0.75"), BAD),
    "tool call only": (within(content=None, tool_calls=[{"function": {"name": "x"}}]), BAD), "message null": (within(message=None), BAD),
    "no message": (http(b'{"choices": [{"text": "Yes"}]}'), BAD), "half a surrogate": (within(content="\ud800"), OK),
}  # fmt: skip
NUMBERS: dict[str, tuple] = {
    f"probs {probs}": (within(probs=probs, num_classes=len(probs)), BAD)
    for probs in ([1.5, -0.5], [0.3, 0.3], ["0.25", "0.75"], [[0.25], [0.75]], [None, 1], [0.25, 0.75, 0.1], [1e308, 1e308], [], [True, False])
} | {
    "no probs": (http(b'{"data": [{"label": "Yes"}]}'), BAD), "probs of 3": (within(num_classes=3), BAD),
    "probs an object": (within(probs={"Yes": 1}), BAD),
}  # fmt: skip
SAID: dict[str, tuple] = {
    f"score {text}": (within(content=text), BAD)
    for text in ('{"score": 2}', '{"score": -0.01}', '{"score": 1e999}', '{"score": "0.5"}', '{"score": true}',
                 '{"score": null}', '{"score": 0.1, "score": 0.9}', '{"score": {"score": 1}}', "[0.5]", '{"Score": 0.5}')
} | {"cut": (within(content='{"score": 0.75}', finish_reason="length"), BAD)}  # fmt: skip
LABELS: dict[str, tuple] = {
    f"label {text}": (within(content=text), BAD)
    for text in ("not correct or incorrect", "maybe", '{"label": "x"}', '{"label": "correct", "label": "incorrect"}', "0", "It depends.")
}  # fmt: skip


def faults(shape: str) -> dict[str, tuple]:
    more = {"classify": NUMBERS, "canaries": NUMBERS, "chat": CHATS | SAID, "eval judge": CHATS | LABELS}
    return {"right": (lambda s: http(good(s)), OK)} | WIRE | BODIES | more.get(shape, CHATS)


class Server:
    """Answers every request with one fault."""

    def __init__(self, fault, shape: str):
        self.fault, self.shape = fault, shape
        self.bound = socket.create_server(("127.0.0.1", 0), backlog=64)
        self.url = f"http://127.0.0.1:{self.bound.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                link, _ = self.bound.accept()
            except OSError:
                return
            threading.Thread(target=self._answer, args=(link,), daemon=True).start()

    def _answer(self, link: socket.socket) -> None:
        try:
            with link, link.makefile("rb") as reader:
                length = 0
                while (line := reader.readline()).strip():
                    length = int(line.split(b":")[1]) if line.lower().startswith(b"content-length:") else length
                reader.read(length)
                made = self.fault
                if callable(made):
                    try:
                        made = made(self.shape)
                    except TypeError:
                        made = made(link, self.shape) or b""
                link.sendall(made)
        except OSError:
            return


def end(shape: str, url: str, folder: Path, timeout_s: float) -> tuple[str, str]:
    """(how it ended, the words of its error): "number", "unscored", "mixed", "stop N", or what must not be."""
    from r1vfree_cli.core.errors import DataError, R1VError

    try:
        return ASK[shape](url, folder, timeout_s)
    except DataError as e:
        return "unscored", f"{e.message} {e.details}"
    except R1VError as e:
        return f"stop {e.exit_code}", f"{e.message} {e.details}"
    except BaseException as e:
        return "BROKE", repr(e)


def _feedback(url: str, timeout_s: float, backend: str):
    from r1vfree_cli.config.rewards import FeedbackReward
    from r1vfree_cli.rewards.registry import build_feedback

    settings = {"name": "feedback", "backend": backend, "base_url": url, "cache": False, "max_retries": 0}
    settings |= {"timeout_s": timeout_s, "step_deadline_s": 2 * timeout_s} | (
        {"model": "m"} if backend == "chat" else {}
    )
    return build_feedback(FeedbackReward.model_validate(settings))


def _reward(backend: str):
    def ask(url: str, folder: Path, timeout_s: float) -> tuple[str, str]:
        from PIL import Image

        judge = _feedback(url, timeout_s, backend)
        try:
            texts = ["red", "blue"]
            scores = asyncio.run(
                judge(
                    prompts=[[{"role": "user", "content": "p"}]] * 2,
                    completions=[[{"role": "assistant", "content": f"<think>x</think><answer>{t}</answer>"}] for t in texts],
                    completion_ids=[[1]] * 2, images=[[Image.new("RGB", (28, 28))]] * 2, problem=["What colour?"] * 2,
                    id=["0", "1"], solution=[None] * 2, trainer_state=None,
                )
            )  # fmt: skip
            told = "; ".join(judge.failures)
        finally:
            judge.close()
        if scores == [None, None]:
            return ("unscored", told) if told else ("BROKE", "unscored without a reason")
        return ("number", "") if scores == [0.75, 0.75] else ("BROKE", f"scores {scores}")

    return ask


def _canaries(url: str, folder: Path, timeout_s: float) -> tuple[str, str]:
    from test_canaries import rows

    from r1vfree_cli.config.rewards import Canaries
    from r1vfree_cli.rewards.canaries import check

    judge = _feedback(url, timeout_s, "classify")
    try:
        report = check(judge, rows(), Canaries(samples=2), 1)
    finally:
        judge.close()
    return ("BROKE", "a judge that says 0.75 to all passed") if report.ok else ("number", "judged, and refused")


def _eval_judge(url: str, folder: Path, timeout_s: float) -> tuple[str, str]:
    from test_hallusion import prediction_file

    from r1vfree_cli.eval.options import EvalOptions
    from r1vfree_cli.eval.runner import evaluate

    text = f"<answer>Yes {folder.name}</answer>"  # known judgements are not asked again
    options = EvalOptions(
        predictions=prediction_file(folder / "p.json", text), out=folder / "e", judge="chat", judge_model="m",
        judge_base_url=url, max_retries=0, timeout_s=timeout_s, limit=3,
    )  # fmt: skip
    return ("number", "") if evaluate(options)["metrics"] else ("BROKE", "no metrics")


def _eval_endpoint(url: str, folder: Path, timeout_s: float) -> tuple[str, str]:
    from r1vfree_cli.core.files import read_jsonl
    from r1vfree_cli.eval.options import EvalOptions
    from r1vfree_cli.eval.runner import evaluate

    options = EvalOptions(
        benchmark="pope", endpoint=url, model="m", questions=str(folder.parent / "coco"), images=folder.parent / "val2014",
        out=folder / "e", max_retries=0, timeout_s=timeout_s, limit=3, max_empty=10,
    )  # fmt: skip
    result = evaluate(options)
    texts = {record["model_prediction"] for _, record in read_jsonl(folder / "e" / "predictions.jsonl")}
    return ("number", "") if result["metrics"] and texts in ({"Yes"}, {"?"}) else ("BROKE", f"answers {texts}")


ASK = {
    "classify": _reward("classify"), "chat": _reward("chat"), "canaries": _canaries, "eval judge": _eval_judge,
    "eval endpoint": _eval_endpoint,
}  # fmt: skip


def questions(home: Path) -> None:
    """POPE's layout, three questions a part."""
    from tiny_models import draw

    (home / "val2014").mkdir()
    draw(0, (56, 56)).save(home / "val2014" / "COCO_0.jpg")
    (home / "coco").mkdir()
    for part in ("random", "popular", "adversarial"):
        rows = [{"question_id": i, "image": "COCO_0.jpg", "text": f"{part} {i}?", "label": "yes"} for i in (1, 2, 3)]
        (home / "coco" / f"coco_pope_{part}.json").write_text("".join(json.dumps(r) + "\n" for r in rows))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=SHAPES)
    parser.add_argument("--loud", action="store_true", help="each fault's end, not the wrong ones only")
    args = parser.parse_args()
    sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    wrong = 0
    with tempfile.TemporaryDirectory() as temporary:
        home = Path(temporary)
        os.environ["R1V_CACHE"] = str(home / "cache")
        os.environ.pop("OPENAI_API_KEY", None)
        questions(home)
        for shape in (args.only,) if args.only else SHAPES:

            def one(item: tuple[int, tuple[str, tuple]], shape: str = shape) -> tuple[str, str, str]:
                number, (name, (fault, ok)) = item
                folder = home / f"{shape}-{number}"
                folder.mkdir()
                server = Server(fault, shape)
                try:
                    how, told = end(shape, server.url, folder, 40 if ok else 4)
                finally:
                    server.bound.close()
                if how == "number" and not ok:
                    how = "BROKE"
                return name, how, told

            one((999, ("right", faults(shape)["right"])))  # imports
            with ThreadPoolExecutor(8) as pool:
                found = list(pool.map(one, enumerate(faults(shape).items())))
            counts = Counter(how for _, how, _ in found)
            print(f"{shape}: {len(found)} faults: {dict(sorted(counts.items()))}", flush=True)
            for name, how, told in found:
                if args.loud or how == "BROKE":
                    print(f"  {how:9} {name}: {told[:200]}", flush=True)
            wrong += counts["BROKE"]
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
