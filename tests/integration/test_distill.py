"""`r1v prepare-data distill` against a real HTTP server: what is kept, what is asked again, what it may cost."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path

import pytest
from judge_servers import JudgeServer, chat_reply, reply, send
from PIL import Image
from tiny_models import draw_rows, tiny_processor, write_rows
from typer.testing import CliRunner

from r1vfree_cli.cli import app
from r1vfree_cli.core.errors import DataError, UsageError
from r1vfree_cli.core.prompts import ANSWER
from r1vfree_cli.data.load import load_rows
from r1vfree_cli.rewards.distill import distill
from r1vfree_cli.training.sft import Collator, select_rows

GOOD = "Sure. <think>It is {0}, I see.</think><answer>{0}</answer>"
SAID = {  # problem -> (solution, what the teacher says)
    "Which colour?": ("red", GOOD.format("Red")),
    "How many?": ("2", GOOD.format("3")),
    "Open question?": (None, GOOD.format("a cat")),
    "No tags?": ("red", "red"),
    "No thought?": ("red", "<think> </think><answer>red</answer>"),
    "Long?": ("red", "<think>It is long, and"),
}


def answer(handler, body) -> None:
    text = body["messages"][0]["content"][-1]["text"]
    problem = text.partition("\n")[0]
    document = chat_reply(SAID[problem][1])
    if problem == "Long?":
        document["choices"][0]["finish_reason"] = "length"
    reply(handler, document)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("R1V_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def rows(tmp_path) -> str:
    found = draw_rows(len(SAID))
    for row, (problem, (solution, _)) in zip(found, SAID.items(), strict=True):
        row |= {"problem": problem, "solution": solution, "thinking": None}
    return str(write_rows(tmp_path / "rows", found))


def test_what_parses_and_is_right_is_kept_and_feeds_sft(rows, tmp_path, monkeypatch):
    monkeypatch.setenv("R1V_ENDPOINT_KEY", "sesame")
    with JudgeServer(answer) as server:
        options = ["--endpoint", server.url, "--model", "m", "--json", "--out", str(tmp_path / "out")]
        result = CliRunner().invoke(app, ["prepare-data", "distill", "--input", rows, *options])
        assert result.exit_code == 0, result.output
        summary = json.loads(result.stdout)
        first = next(r for r in server.requests if "Which colour?" in str(r))
    assert (summary["rows"], summary["requests"], summary["cached"]) == (2, 6, 0)
    wanted = {"wrong answer": 1, "reasoning or answer not in tags": 2, "cut off": 1}
    assert summary["dropped"] == wanted
    assert first["_headers"]["authorization"] == "Bearer sesame" and first["temperature"] == 0
    image, text = first["messages"][0]["content"]
    data = base64.b64decode(image["image_url"]["url"].partition(",")[2])
    assert Image.open(io.BytesIO(data)).size == load_rows(rows)[0]["images"][0].size and ANSWER in text["text"]

    kept = load_rows(str(tmp_path / "out"))
    assert list(kept["solution"]) == ["red", "a cat"]  # the row's own where it has one
    assert list(kept["thinking"]) == ["It is Red, I see.", "It is a cat, I see."]
    processor = tiny_processor()
    chosen, dropped = select_rows(kept, processor, max_prompt_tokens=512, max_length=None)
    batch = Collator(processor)([chosen[0]])
    told = processor.tokenizer.decode([i for i in batch["labels"][0].tolist() if i >= 0])
    assert not dropped and told.startswith("<think>It is Red, I see.</think><answer>red</answer>")


def test_replies_are_asked_once_and_failures_again(rows, tmp_path):
    broken = {"How many?", "Open question?"}

    def behave(handler, body):
        bad = any(problem in str(body) for problem in broken)
        send(handler, 400, b'{"error": "no"}') if bad else answer(handler, body)

    with JudgeServer(behave) as server:
        first = distill(tmp_path / "one", input=rows, endpoint=server.url, model="m")
        assert first["rows"] == 1 and first["dropped"]["not answered"] == 2
        broken.clear()
        server.requests.clear()
        (file,) = Path(tmp_path / "cache" / "distill").glob("*.jsonl")
        with open(file, "a") as f:
            f.write('7\n{"key": "x"}\n{"key": [], "text": "x", "finish": "stop"}\n\0\0\n')  # of an editor
            f.write('{"key": "half')  # of a run that was killed
        again = distill(tmp_path / "two", input=rows, endpoint=server.url, model="m")
        assert (again["requests"], again["cached"], again["rows"]) == (2, 4, 2) and len(server.requests) == 2
        distill(tmp_path / "three", input=rows, endpoint=server.url, model="m")
        assert len(server.requests) == 2
        with pytest.raises(UsageError, match="not empty"):  # before anything is paid for
            distill(tmp_path / "three", input=rows, endpoint=server.url, model="another")
        assert len(server.requests) == 2


def test_what_it_may_cost(rows, tmp_path):
    common = {"input": rows, "model": "m", "concurrency": 1, "price": "1000,10000"}
    with JudgeServer(answer) as server:
        most = distill(tmp_path / "no", endpoint=server.url, estimate=True, max_tokens=100, **common)
        assert most["requests"] == 6 and most["completion_tokens_at_most"] == 600 and 6 < most["cost_at_most"] < 7
        assert not server.requests and not (tmp_path / "no").exists()
        # A reply has 100 + 10 tokens and costs 0.2: the second one reaches the ceiling.
        found = distill(tmp_path / "out", endpoint=server.url, max_tokens=100, max_cost=0.3, **common)
        assert len(server.requests) == 2 and found["cost"] == pytest.approx(0.4)
        assert found["dropped"]["not answered"] == 4
        more = distill(tmp_path / "more", endpoint=server.url, max_tokens=100, max_cost=9, **common)
        assert (more["cached"], more["rows"]) == (2, 2)


def test_mistakes_are_told(rows, tmp_path):
    with pytest.raises(UsageError, match="--input, --endpoint and --model"):
        distill(tmp_path / "out", input=rows, endpoint=None, model="m")
    for wrong in ({"price": "1"}, {"price": "a,b"}, {"max_cost": 1.0}):
        with pytest.raises(UsageError, match="--price"):
            distill(tmp_path / "out", input=rows, endpoint="http://127.0.0.1:9", model="m", **wrong)
    result = CliRunner().invoke(app, ["prepare-data", "shapes", "--out", str(tmp_path / "s"), "--model", "m"])
    assert isinstance(result.exception, UsageError) and "of distill" in result.exception.message
    server = JudgeServer(lambda handler, body: reply(handler, chat_reply("I see.")))
    with server, pytest.raises(DataError, match="no reply of the teacher") as caught:
        distill(tmp_path / "out", input=rows, endpoint=server.url, model="m")
    assert "a reply: 'I see.'" in caught.value.details
