"""What is not the command line's input: replies on the wire, requests to the reward server, weights, records that are
read back, judges, locks, archives and chat templates."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import functools
import io
import json
import math
import os
import socket
import sqlite3
import threading
import zipfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

from . import values
from .data import images
from .harness import Case
from .runs import CLASSIFIED, _chat

Cases = st.SearchStrategy[Case]


def _case(name: str, call: Callable[[], Any]) -> Case:
    """A call that may not raise; what it leaves in its folder does not matter."""
    return Case(name, call=call, codes=(0,), keeps=("",), out="")


# --- replies on the wire ---------------------------------------------------------------------------------------


@functools.cache
def _wire() -> tuple[int, int, dict]:
    """Ports of a server that replies with `said["reply"]`, and of another origin, whose connections are counted."""
    said: dict = {"reply": b"", "strays": 0}
    here, elsewhere = (socket.create_server(("127.0.0.1", 0)) for _ in range(2))

    def answer() -> None:
        while True:
            link, _ = here.accept()
            with link, contextlib.suppress(OSError):
                link.settimeout(5)
                head, _, body = _until(link, b"\r\n\r\n").partition(b"\r\n\r\n")
                lengths = [
                    int(h.split(b":")[1]) for h in head.lower().split(b"\r\n") if h.startswith(b"content-length")
                ]
                while lengths and len(body) < lengths[0]:
                    body += link.recv(1 << 16)
                link.sendall(said["reply"])

    def stray() -> None:
        while True:
            elsewhere.accept()[0].close()
            said["strays"] += 1

    for work in (answer, stray):
        threading.Thread(target=work, daemon=True).start()
    return here.getsockname()[1], elsewhere.getsockname()[1], said


def _until(link: socket.socket, mark: bytes) -> bytes:
    data = b""
    while mark not in data:
        if not (part := link.recv(1 << 16)):
            break
        data += part
    return data


FAILS = ("content_filter", "error", "SAFETY", "cancelled")


def _reply(shape: str, status: str, headers: tuple[str, ...], body: bytes, framing: str) -> Case:
    """A verdict in range, a failed call or a named stop; no other origin is asked; a filtered reply is never a text."""
    port, other, said = _wire()
    lines = [f"HTTP/1.1 {status}", "Connection: close", *(h.replace("OTHER", f"127.0.0.1:{other}") for h in headers)]
    if framing == "chunked":
        lines.append("Transfer-Encoding: chunked")
        body = (
            b"%x;a=b\r\n%s\r\n0\r\nContent-Type: x; charset=zlib\r\n\r\n" % (len(body), body) if body else b"0\r\n\r\n"
        )
    elif framing != "none":
        lines.append(f"Content-Length: {len(body) + (framing == 'long') - (framing == 'short')}")
    reply = "\r\n".join([*lines, "", ""]).encode("utf-8", "surrogatepass") + body

    def call() -> None:
        from r1vfree_cli.config.rewards import FeedbackReward
        from r1vfree_cli.core.errors import UsageError
        from r1vfree_cli.judges.classify import ClassifyJudge
        from r1vfree_cli.judges.client import Endpoint
        from r1vfree_cli.judges.protocol import Failure, Question

        url = f"http://127.0.0.1:{port}"
        settings = {"name": "feedback", "base_url": url, "model": "m", "max_retries": 0, "timeout_s": 5}
        os.environ["R1V_FUZZ_KEY"] = "sk-secret-0123456789"
        reward = FeedbackReward.model_validate(settings | {"api_key_env": "R1V_FUZZ_KEY"})
        judge = ClassifyJudge(reward, url, lambda: False)
        endpoint = Endpoint(url, "m", timeout_s=5, max_retries=0, api_key_env="R1V_FUZZ_KEY")
        asked = judge.endpoint if shape == "classify" else endpoint
        said["reply"] = reply

        async def ask() -> Any:
            await asked.open()
            try:
                return await (judge.ask(Question((), "?", "x")) if shape == "classify" else endpoint.chat([], 8, 0))
            finally:
                await asked.close()

        try:
            found = asyncio.run(ask())
        except (Failure, UsageError) as e:
            assert "sk-secret" not in str(e)
        else:
            assert status.startswith("200")
            if shape == "classify":
                assert abs(found.score) <= 1e4
            else:
                assert not any(f'"{word}"'.encode() in body for word in FAILS) and (found.text.strip() or found.cause)
                found.text.encode()
        assert said["strays"] == 0, "another origin was asked"

    return _case(f"a reply to {shape}: {reply[:200]!r}", call)


def _ended(finish: str, **message: Any) -> bytes:
    document = _chat("half")
    document["choices"][0] |= {"finish_reason": finish}
    document["choices"][0]["message"] |= message
    return json.dumps(document).encode()


STATUSES = ("200 OK", "200", "201 Created", "204 No", "206 Part", "302 Found", "307 T", "400 Bad", "401 No", "404 No", "429 Slow", "500 No", "503 Down", "999 X")  # fmt: skip
HEADERS = (
    *(f"Content-Type: application/json; charset={c}" for c in ("zlib", "bz2", "hex", "idna", "utf-16", "unicode_escape", "\x00", "x" * 3000)),
    *(f"Content-Encoding: {c}" for c in ("gzip", "deflate", "br", "zstd", "gzip, gzip", "identity", "x", "")),
    *(f"Location: {to}" for to in ("http://OTHER/x", "//OTHER/x", "/x", "http://[", "é", "")),
    *(f"Retry-After: {s}" for s in ("nan", "-1", "1e400", "²", "Fri, 31 Dec 9999 23:59:59 GMT", "1e9")),
    "Content-Length: 3", "Transfer-Encoding: gzip", "Set-Cookie: a=b; Expires=x", "X: \x01", "X\x00: y", "no colon", " folded", "X: " + "y" * 100_000,
)  # fmt: skip
_shapes = st.sampled_from(("classify", "generation"))
_bodies = st.one_of(
    st.sampled_from([json.dumps(CLASSIFIED).encode(), json.dumps(_chat("red")).encode()]),
    values.document_files(CLASSIFIED),
    values.document_files(_chat("red")),
)
wire: Cases = st.builds(
    _reply,
    _shapes,
    st.sampled_from(STATUSES + ("200 OK",) * 10),
    st.lists(st.sampled_from(HEADERS), max_size=2).map(tuple),
    _bodies,
    st.sampled_from(("length", "length", "length", "chunked", "none", "long", "short")),
)
WIRE = [
    *(_reply("generation", "200 OK", (), _ended(finish), "length") for finish in FAILS),
    _reply("generation", "200 OK", (), _ended("stop", refusal="error"), "length"),
    *(_reply(s, "302 Found", ("Location: http://OTHER/x",), b"", "length") for s in ("classify", "generation")),
    *(_reply("generation", "200 OK", (h,), json.dumps(_chat("red")).encode(), "chunked") for h in HEADERS[:16]),
]

# --- requests to the reward server -----------------------------------------------------------------------------


@functools.cache
def _judge() -> Any:
    from tempfile import mkdtemp

    from r1vfree_cli.judges.local import LocalJudge
    from tests.integration.tiny_models import save_tiny

    return LocalJudge(str(save_tiny(Path(mkdtemp(prefix="fuzz-judge-")))), device="cpu", pixels=(3136, 12544))


def _data_uri(data: bytes) -> str:
    import base64

    return "data:image/png;base64," + base64.b64encode(data).decode()


ASKED = {
    "model": "m",
    "messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": _data_uri(images()["a.png"])}}, {"type": "text", "text": "Is it red?"}]}],
    "add_generation_prompt": True,
}  # fmt: skip
GOOD = json.dumps({"messages": [{"role": "user", "content": [{"type": "text", "text": "Is it red?"}]}]}).encode()


def _request(method: str, path: str, headers: tuple[tuple[bytes, bytes], ...], parts: tuple[bytes, ...]) -> Case:
    """One answer below 500, of JSON; and the next good request gets its score."""

    def call() -> None:
        from r1vfree_cli.judges.limits import Room
        from r1vfree_cli.judges.server import App

        async def both() -> None:
            with ThreadPoolExecutor(1) as thread:
                app = App([_judge()], [thread], "key", 8, {"name": "m", "prompt": "judge"})
                app.start()
                status, document = await _answer(app, method, path, headers, parts)
                assert status in (200, 400, 401, 404, 405, 413, 429), (status, document)
                if status == 200 and path == "/classify":
                    probs = document["data"][0]["probs"]
                    assert all(0 <= p <= 1 for p in probs) and math.isclose(sum(probs), 1)
                assert status == 200 or set(document) == {"error"}
                status, document = await _answer(
                    app, "POST", "/classify", ((b"authorization", b"Bearer key"),), (GOOD,)
                )
                assert status == 200 and app._requests == 0 and Room._all == 0, (status, document)
                for worker in app._workers:
                    worker.cancel()

        asyncio.run(asyncio.wait_for(both(), 15))

    return _case(f"a request: {method} {path} {headers} {parts[0][:100]!r}", call)


async def _answer(app: Any, method: str, path: str, headers: Any, parts: tuple[bytes, ...]) -> tuple[int, Any]:
    scope = {"type": "http", "method": method, "path": path, "query_string": b"", "headers": list(headers)}
    events = [{"type": "http.request", "body": p, "more_body": i + 1 < len(parts)} for i, p in enumerate(parts)]
    sent: list[dict] = []

    async def receive() -> dict:
        if events:
            return events.pop(0)
        await asyncio.sleep(60)
        return {"type": "http.disconnect"}

    async def send(event: dict) -> None:
        sent.append(event)

    await app(scope, receive, send)
    assert [e["type"] for e in sent[:1]] == ["http.response.start"]
    return sent[0]["status"], json.loads(b"".join(e.get("body", b"") for e in sent[1:]))


_KEYS = ((b"authorization", b"Bearer key"),) * 6 + ((b"authorization", b"Bearer \xff"), (b"x", b"y"), (b"content-length", b"-1"), (b"content-length", b"9" * 30), (b"content-length", b"\xb2"))  # fmt: skip
_SENT = st.one_of(
    values.changed(ASKED, 3).map(values.as_json),
    values.document_files(ASKED),
    st.sampled_from([*images().values()]).map(
        lambda data: json.dumps(values.put(ASKED, ("messages", 0, "content", 0, "image_url", "url"), _data_uri(data))).encode()
    ),
)  # fmt: skip
requests: Cases = st.builds(
    _request,
    st.sampled_from(("POST",) * 8 + ("GET", "HEAD", "DELETE", "")),
    st.sampled_from(("/classify",) * 8 + ("/info", "/docs", "/openapi.json", "/", "", "/classify/", "/../classify")),
    st.lists(st.sampled_from(_KEYS), min_size=1, max_size=2).map(lambda more: ((b"authorization", b"Bearer key"), *more)[-2:]),
    st.one_of(_SENT.map(lambda b: (b,)), _SENT.map(lambda b: (b[:9], b"", b[9:]))),
)  # fmt: skip
REQUESTS = [
    *(_request("POST", "/classify", ((b"authorization", b"Bearer key"),), (b,)) for b in (GOOD, json.dumps(ASKED).encode(), b"[" * 100_000, b"")),
    _request("POST", "/classify", (), (b"x" * 100,)),
    _request("POST", "/classify", ((b"authorization", b"Bearer key"),), (json.dumps(values.put(ASKED, ("messages", 0, "content", 1, "text"), "x " * 49_000)).encode(),)),
]  # fmt: skip

# --- numbers in weights ----------------------------------------------------------------------------------------


@functools.cache
def _healthy() -> tuple[Any, Callable[[], list]]:
    """A generator with its judge, of the same weights, and what they answer."""
    from r1vfree_cli.core.prompts import build_messages
    from r1vfree_cli.eval.generate import Generator, Job

    judge = _judge()
    generator = Generator(judge.name, max_new_tokens=3, device="cpu")
    picture = images()["a.png"]
    jobs = [Job("a", build_messages("Is it red?", 1), picture), Job("b", build_messages("Why?", 0), None)]

    def answers() -> list:
        found: dict[str, str] = {}
        generator.run(jobs, 2, lambda job, answer: found.__setitem__(job.id, answer.text))
        return [found["a"], found["b"]]

    return generator.model, answers


def _weight(which: float, where: float | str, bad: float) -> Case:
    """No answer and no score, or those of the healthy model where the number has no part in them.

    which: of the tensors, the last is the output layer. where: of the tensor, or the judge's word of that name.
    """

    def call() -> None:
        import torch
        from PIL import Image

        from r1vfree_cli.core.errors import DataError
        from r1vfree_cli.judges.protocol import Failure

        model, answers = _healthy()
        items = [([Image.open(io.BytesIO(images()["a.png"])).convert("RGB")], "Is it red?", "yes"), ([], "?", "no")]
        for owner, ask in ((model, answers), (_judge().model, lambda: _judge().score(items))):
            names = [*dict(owner.named_parameters()), "lm_head.weight", "lm_head.weight"]
            tensor = owner.get_parameter(names[int(which * (len(names) - 1))]).data
            flat = tensor.view(-1)
            row = (
                getattr(_judge(), where) * tensor.shape[-1] if isinstance(where, str) else int(where * (len(flat) - 1))
            )
            place, expected = row, ask()
            whole = flat[place].clone()
            flat[place] = bad
            try:
                found = ask()
                wrong = [f for f, e in zip(found, expected, strict=True) if not isinstance(f, Failure) and f != e]
                assert not wrong, (names[int(which * (len(names) - 1))], place, wrong)
            except DataError as e:
                assert "NaN" in e.message
            finally:
                flat[place] = whole
                assert torch.isfinite(flat).all()

    return _case(f"{bad} in a weight at {which}, {where}", call)


_share = st.floats(0, 1)
numbers: Cases = st.builds(_weight, _share, _share, st.sampled_from((math.nan, math.inf, -math.inf)))
NUMBERS = [_weight(which, where, bad) for which in (0, 0.5, 1) for where in (0, 0.3) for bad in (math.nan, -math.inf)]
NUMBERS += [_weight(1, word, bad) for word in ("_yes", "_no") for bad in (math.inf, -math.inf)]

# --- records that are read back --------------------------------------------------------------------------------

METRICS = [{"step": s, "loss": 0.5, "reward": 0.1 * s, "rewards/format/mean": 0.5, "judge/calls": 3, "step_time": 1.5} for s in (1, 2, 3)]  # fmt: skip


def _metrics(content: bytes) -> Case:
    """A resume reads them, the watcher and the end of the run too; the summary is JSON."""

    def call() -> None:
        from r1vfree_cli.core.files import read_json
        from r1vfree_cli.launch.watch import RunView
        from r1vfree_cli.report.load import read_metrics
        from r1vfree_cli.run.run_dir import RunDir
        from r1vfree_cli.training.recorder import summarise_metrics, truncate_lines, update_summary

        run = RunDir(".")
        run.set_status("running", step=0, max_steps=9)
        with RunView("grpo", run) as view:
            run.metrics.write_bytes(content)
            view.update()
            read_metrics(run.metrics, [])
            truncate_lines(run.metrics, 2)
            view.update()
        for line in run.metrics.read_bytes().splitlines():
            json.loads(line, parse_constant=int)  # NaN is no number of JSON's, nor one of Python's int
        update_summary(run, summarise_metrics(run))
        assert read_json(run.summary)["steps"] in (0, 1, 2) or values.as_json(METRICS[0])[:12] not in content

    return _case(f"metrics: {content[:200]!r}", call)


def _cached(score: Any, note: Any) -> Case:
    """A verdict of a cache is a number in range, a known label, or asked again."""

    def call() -> None:
        from r1vfree_cli.judges.cache import JudgementCache

        cache = JudgementCache(Path("cache"))
        cache.put({"a": 0.5, "b": 1.0}, {"raw": "x", "model": "m"})
        with contextlib.suppress(sqlite3.Error, OverflowError, UnicodeEncodeError):  # what SQLite does not hold
            with sqlite3.connect("cache/judgements.sqlite") as db:
                db.execute("UPDATE judgements SET score = ?, note = ? WHERE key = 'a'", (score, note))
            db.close()
        assert all(0 <= s <= 1.001 for s in JudgementCache(Path("cache")).get(["a", "b"], bounded=True).values())
        labels = cache.get_labels(["a", "b"], {"correct": 1, "incorrect": 0})
        assert all(found["label"] in (0, 1) for found in labels.values())
        json.dumps(labels).encode()
        "".join(found["raw"] + found["model"] for found in labels.values()).encode()

    return _case(f"a cached verdict: {score!r:.80} {note!r:.80}", call)


SEALED = {"model.safetensors": b"weights" * 99, "trainer_state.json": b"{}", "global_step1/x.pt": b"shard" * 9}


def _sealed(name: str, content: bytes) -> Case:
    """Whatever byte of a checkpoint changed, its file is named; a list that is damaged is, too, or lists what is there."""

    def call() -> None:
        from r1vfree_cli.run.checkpoint import FILES, damage, lacking, seal

        folder = Path("checkpoint-1")
        for file, data in SEALED.items():
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            (folder / file).write_bytes(data)
        seal(folder)
        assert damage(folder) == lacking(folder) == []
        whole = (folder / (name or FILES)).read_bytes()
        (folder / (name or FILES)).write_bytes(content)
        found = damage(folder)
        assert all(isinstance(line, str) for line in found)
        if name and content != whole:
            assert len(found) == 1 and found[0].startswith(name), found

    return _case(f"a sealed checkpoint with another {name or 'list'}: {content[:200]!r}", call)


_list = {name: {"bytes": len(data), "xxh3_128": "0" * 32} for name, data in SEALED.items()}
_sealed_files = st.one_of(
    *(values.damaged(data).map(functools.partial(_sealed, name)) for name, data in SEALED.items()),
    values.document_files(_list).map(functools.partial(_sealed, "")),
)
_lines = st.one_of(
    values.changed(METRICS, 3).filter(lambda d: isinstance(d, list)).map(lambda d: b"".join(values.as_json(x) + b"\n" for x in d)),
    values.damaged(b"".join(values.as_json(x) + b"\n" for x in METRICS)),
)  # fmt: skip
_cells = st.one_of(values.scalars, st.binary(max_size=9), st.floats())
records: Cases = st.one_of(
    _lines.map(_metrics),
    _sealed_files,
    st.builds(_cached, _cells, st.one_of(_cells, values.document_files({"raw": "x", "model": "m"}).map(lambda b: b.decode("utf-8", "replace")))),
)  # fmt: skip
RECORDS = [
    _metrics(b"\x00" * 99 + b"\n"),
    _metrics(b'{"step": 1, "loss": NaN}\n'),
    _cached(1e39, "{}"),
    _sealed("model.safetensors", b"\0" * 693),
    _cached(1.0, "[" * 99_999),
]

# --- canaries --------------------------------------------------------------------------------------------------


def _canaries(solutions: list[str | None], samples: int, scores: list[float | None], silent: str | None) -> Case:
    """What is asked and not answered is no pass, right over wrong is always asked, and what passes has passed."""

    def call() -> None:
        from PIL import Image

        from r1vfree_cli.config.rewards import Canaries
        from r1vfree_cli.core.errors import UsageError
        from r1vfree_cli.rewards.canaries import check

        rows = [{"images": [Image.new("RGB", (30, 30), (i, 0, 0))], "problem": "What is it?", "solution": s} for i, s in enumerate(solutions)]  # fmt: skip
        settings = Canaries(samples=samples)
        asked: list = []

        class Judge:
            __name__, floor, failures = "feedback", 0.0, ()

            def ask(self, items: Any, **_: Any) -> list[float | None]:
                asked.extend(items)
                return [
                    None if a == silent else scores[(i + len(str(a))) % len(scores)] for i, (*_, a) in enumerate(items)
                ]

        try:
            report = check(Judge(), rows, settings, prompt=_prompt())  # type: ignore[arg-type]
        except UsageError:
            return
        named = {c.name: c for c in report.checks}
        assert {"right over wrong", "own image over another", "template"} <= set(named)
        for c in report.checks:
            assert c.ok is not None or c.of == 0
            assert c.ok is not True or (c.score is not None and 2 * c.n >= c.of)
        assert named["right over wrong"].of and named["own image over another"].of, "not asked"
        if silent and any(a == silent for _, _, a in asked):
            assert not report.ok
        if len(set(scores)) == 1:  # it cannot tell right from wrong
            assert not report.ok

    return _case(f"canaries: {solutions} {samples} {scores} {silent}", call)


def _prompt() -> Any:
    from r1vfree_cli.core.prompts import DEFAULT

    return DEFAULT


canaries: Cases = st.builds(
    _canaries,
    st.lists(st.one_of(st.none(), st.sampled_from(["red", "blue", "a cat", "7", "RED", ""])), min_size=1, max_size=8),
    st.integers(1, 9),
    st.lists(st.one_of(st.none(), st.floats(0, 1)), min_size=1, max_size=5),
    st.sampled_from((None, ":", "Thought process:")),
)
CANARIES = [
    _canaries(s, n, scores, silent)
    for s in (["red"], ["red"] * 8, [None] * 8)
    for n in (1, 8)
    for scores, silent in (([0.3], None), ([None], None), ([0.9, 0.1], ":"))
]

# --- locks -----------------------------------------------------------------------------------------------------


def _locked(name: str, there: str, held: bool) -> Case:
    """The second command is told who holds the folder; else it has it, whatever lies where the lock is."""

    def call() -> None:
        from r1vfree_cli.core.errors import UsageError
        from r1vfree_cli.core.files import lock

        folder = Path("in") / name
        Path("in").mkdir()
        file = folder.resolve().with_name(f".{folder.resolve().name}.lock")
        if there == "folder":
            file.mkdir(parents=True)
        elif there == "link":
            file.symlink_to("nowhere/x")
        elif there == "pipe":
            os.mkfifo(file)
        elif there:
            file.write_text(there)
        with contextlib.ExitStack() as stack:
            if held and there not in ("folder", "link", "pipe"):
                holder = stack.enter_context(open(file, "a+"))
                fcntl.flock(holder, fcntl.LOCK_EX)
                holder.truncate(0)
                holder.write("4711\n")
                holder.flush()
            for _ in range(2):
                try:
                    with lock(folder, "data folder"):
                        assert not held or there in ("folder", "link", "pipe")
                        try:
                            with lock(folder, "data folder"):
                                raise AssertionError("two hold it")
                        except UsageError as e:
                            assert f"(pid {os.getpid()}) is using the data folder" in e.message or there == "pipe"
                except UsageError as e:
                    assert (
                        "(pid 4711) is using" in e.message if held and file.is_file() else "cannot write" in e.message
                    )
        assert not held or there in ("folder", "link", "pipe") or file.exists(), "a holder's lock was deleted"

    return _case(f"a lock: {name!r:.60} {there!r} {held}", call)


_names = st.one_of(st.sampled_from(["a", "a b", ".a", "é", "a.lock", "x" * 200, "..a", "-", "[a]", "a\n", "\u202e"]), st.text(st.characters(exclude_characters="/\0", exclude_categories=("Cs",)), min_size=1, max_size=9)).filter(lambda n: n not in (".", "..") and len(n.encode()) < 240)  # fmt: skip
locks: Cases = st.builds(_locked, _names, st.sampled_from(("", "1\n", "x" * 99, "\x00", "folder", "link", "pipe")), st.booleans())  # fmt: skip
LOCKS = [_locked("a", there, held) for there in ("", "99999999\n", "folder", "link", "pipe") for held in (False, True)]

# --- archives and chat templates -------------------------------------------------------------------------------

MEMBERS = (
    "a.png",
    "A.png",
    "./a.png",
    "b/../a.png",
    "../a.png",
    "/a.png",
    "b\\a.png",
    "b/a.png",
    "a.png/",
    "",
    "é.png",
    "x" * 300,
)


def _archive(names: list[str], lie: int) -> Case:
    """No name is read as another one's, none leaves the archive, none gives more than the limit."""

    def call() -> None:
        from r1vfree_cli.core.errors import DataError, UsageError
        from r1vfree_cli.data import archives

        out = io.BytesIO()
        import warnings

        with warnings.catch_warnings(), zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
            warnings.simplefilter("ignore")
            for i, name in enumerate(names):
                archive.writestr(zipfile.ZipInfo(name), str(i).encode() * 5000)
        data = out.getvalue()
        if lie:  # the directory's word on the sizes
            at = data.rfind(b"PK\1\2") + 24
            data = data[:at] + lie.to_bytes(4, "little") + data[at + 4 :]
        Path("a.zip").write_bytes(data)
        before, archives.MAX_FILE_BYTES = archives.MAX_FILE_BYTES, 4000
        try:
            members = archives.zip_members(Path("a.zip"))
            for read in members.values():
                with contextlib.suppress(DataError):
                    assert len(read()) <= 4000
            assert len(members) == len({n for n in names if not n.endswith("/")}) or "" in names
        except (DataError, UsageError) as e:
            assert "a.zip" in e.message
        finally:
            archives.MAX_FILE_BYTES = before

    return _case(f"an archive: {[n[:20] for n in names]} {lie}", call)


PARTS = (
    "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "{% for a in range(99999) %}{{ 'x' * 99 }}{% endfor %}",
    "{{ 'x' * 10 ** 8 }}",
    "{{ 'x' * 10 ** 12 }}",
    "{{ ''|center(10 ** 12) }}",
    "{% set n = namespace(s='x') %}{% for a in range(30) %}{% set n.s = n.s + n.s %}{% endfor %}{{ n.s }}",
    "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "{{ messages.__class__.__mro__ }}",
    "{{ raise_exception('no') }}",
    "{{ x.y.z }}",
    "{{ 1 // 0 }}",
    "{% for m in messages %}{{ m.content }}{% endfor %}",
    "{{ [messages] * 3 }}",
    "{{ 'x' }}",
    "<|vision_start|><|image_pad|><|vision_end|>",
    "?",
    "{%",
    "{{",
    "\x00",
    "{% include '/etc/hostname' %}",
)


def _template(parts: list[str], thread: bool) -> Case:
    """A text of bounded length within the time limit, or an error that names the judge; in any thread."""

    def call() -> None:
        import time

        from r1vfree_cli.core.errors import DataError
        from r1vfree_cli.core.prompts import build_messages
        from r1vfree_cli.models import load

        processor = _judge().processor
        saved = processor.chat_template, load.TEMPLATE_S
        processor.chat_template, load.TEMPLATE_S = "".join(parts), 0.2

        def render() -> str:
            try:
                return load.render(processor, build_messages("?"), what="judge j")
            except DataError as e:
                assert "the chat template of judge j" in e.message
                return ""

        start = time.monotonic()
        try:
            with ThreadPoolExecutor(1) as pool:
                text = pool.submit(render).result() if thread else render()
            assert len(text) <= load.TEMPLATE_CHARS
            assert time.monotonic() - start < 8
        finally:
            processor.chat_template, load.TEMPLATE_S = saved

    return _case(f"a chat template: {parts}", call)


templates: Cases = st.builds(_template, st.lists(st.sampled_from(PARTS), min_size=1, max_size=3), st.booleans())
archives: Cases = st.builds(_archive, st.lists(st.sampled_from(MEMBERS), max_size=4), st.sampled_from((0, 0, 1, 2**31)))
names: Cases = st.one_of(templates, archives)
NAMES = [
    *(_template([part], thread) for part in PARTS[:2] for thread in (False, True)),
    *(_archive([a, b], 0) for a in MEMBERS[:3] for b in MEMBERS[:3]),
    _archive(["a.png"], 1),
]
