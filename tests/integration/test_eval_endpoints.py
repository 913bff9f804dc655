"""What an evaluation tells of its endpoints, and what it tells them: reasons, keys, images, and what is asked again."""

from __future__ import annotations

import base64
import io
import json
import random
import signal
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path

import pytest
from PIL import Image
from test_benchmarks import asking, lines, pope  # noqa: F401
from test_hallusion import Server, prediction_file, records

from r1vfree_cli.core import console
from r1vfree_cli.core.errors import DataError, UsageError
from r1vfree_cli.core.files import read_json, read_jsonl, write_json
from r1vfree_cli.eval.options import EvalOptions
from r1vfree_cli.eval.runner import evaluate

KEYS = {"R1V_ENDPOINT_KEY": "sk-generation-0123456789", "OPENAI_API_KEY": "sk-judge-0123456789abc"}


class Strict(Server):
    """Keeps each request's key; `reply` may also give (status, message)."""

    def __init__(self, reply):
        super().__init__(reply)
        self.keys: list[str | None] = []
        inner = self.RequestHandlerClass

        class Telling(inner):  # type: ignore[valid-type,misc]
            def do_POST(self):
                self.server.keys.append(self.headers.get("Authorization"))
                super().do_POST()

            def send(self, status, document):
                if status == 413:
                    document = {
                        "error": {"message": f"too large for {self.headers.get('Authorization')}: {next(numbers)}"}
                    }
                super().send(status, document)

        numbers = iter(range(10_000))
        self.RequestHandlerClass = Telling


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("R1V_CACHE", str(tmp_path / "cache"))
    for name, key in KEYS.items():
        monkeypatch.setenv(name, key)
    monkeypatch.setattr(console, "debugging", False)


@pytest.fixture
def serve():
    servers = []

    def start(reply) -> Strict:
        servers.append(Strict(reply))
        return servers[-1]

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def test_the_reason_is_told_in_the_terminal_in_the_eval_dir_and_each_with_debug(pope, serve, capsys, monkeypatch):  # noqa: F811
    server = serve(lambda prompt, body: 413 if "popular" in prompt else 500 if "random 1" in prompt else "Yes")
    with pytest.raises(DataError) as e:
        evaluate(asking(pope, server))
    told = "\n".join(e.value.details)
    assert "8 x rejected: 413" in told and "too large for Bearer ***: " in told and "2 x server_error: 500" in told
    kept = read_json(pope / "e" / "eval.json")["failures"]["generate"]
    assert (
        kept["rejected"]["n"] == len(kept["rejected"]["questions"]) == 8 and "too large" in kept["rejected"]["example"]
    )
    assert "too large" not in capsys.readouterr().err
    monkeypatch.setattr(console, "debugging", True)
    with pytest.raises(DataError):
        evaluate(asking(pope, server))
    err = capsys.readouterr().err
    assert err.count("too large for Bearer ***: ") == 8 and err.count("server_error: 500") == 2
    assert not any(key in err + told + (pope / "e" / "eval.json").read_text() for key in KEYS.values())
    server.reply = lambda prompt, body: "Yes"
    evaluate(asking(pope, server))
    assert read_json(pope / "e" / "eval.json")["failures"] == {}


def test_the_judges_reasons_are_told_too(tmp_path, serve):
    server = serve(
        lambda prompt, body: 413 if "Number 00" in prompt else "hardly correct" if "Number 01" in prompt else "correct"
    )
    options = EvalOptions(
        predictions=prediction_file(tmp_path / "p.json"), out=tmp_path / "e", judge="chat", judge_model="j",
        judge_base_url=server.url, max_retries=0,
    )  # fmt: skip
    with pytest.raises(DataError, match="unjudged") as e:
        evaluate(options)
    told = "\n".join(e.value.details)
    assert "x rejected: 413" in told and "Bearer ***" in told and "x no label: hardly correct" in told
    kept = read_json(tmp_path / "e" / "eval.json")["failures"]["judge"]
    assert set(kept) == {"rejected", "no label"} and kept["no label"]["example"] == "hardly correct"


def test_debug_of_the_command_line_tells_every_failed_call(pope, serve):  # noqa: F811
    server = serve(lambda prompt, body: 413)
    base = [sys.executable, "-m", "r1vfree_cli", "eval", "pope", "--endpoint", server.url, "--model", "m", "--limit", "5",
            "--questions", str(pope / "coco"), "--images", str(pope / "val2014"), "--max-retries", "0", "--out", str(pope / "d")]  # fmt: skip
    quiet, loud = (
        subprocess.run([*base, *more], capture_output=True, text=True, timeout=60) for more in ([], ["--debug"])
    )
    assert quiet.returncode == 3 and quiet.stderr.count("too large for") == 1
    assert loud.stderr.count("too large for") >= 5 and not any(
        key in quiet.stderr + loud.stderr for key in KEYS.values()
    )


def test_ctrl_c_says_what_is_kept_and_how_to_go_on(pope, serve):  # noqa: F811
    held = threading.Event()
    server = serve(lambda prompt, body: "Yes" if len(server.prompts) < 3 else held.wait(30) or "Yes")
    argv = [sys.executable, "-m", "r1vfree_cli", "eval", "pope", "--endpoint", server.url, "--model", "m", "--questions",
            str(pope / "coco"), "--images", str(pope / "val2014"), "--concurrency", "1", "--out", str(pope / "i")]  # fmt: skip
    # Jobs in the background of a script ignore it, and so would their children.
    hears = partial(signal.signal, signal.SIGINT, signal.default_int_handler)
    r1v = subprocess.Popen(argv, stderr=subprocess.PIPE, text=True, preexec_fn=hears)
    kept = pope / "i" / "predictions.jsonl"
    while r1v.poll() is None and (not kept.exists() or kept.read_text().count("\n") < 3):
        time.sleep(0.05)
    r1v.send_signal(signal.SIGINT)
    _, err = r1v.communicate(timeout=30)
    held.set()
    assert r1v.returncode == 130 and "interrupted: 3 of 24 questions" in err and "the same command asks the rest" in err


def test_each_endpoint_gets_its_own_key_only(tmp_path, serve):
    write_json(tmp_path / "q.json", [r for r in records() if r["visual_input"] == "0"])
    model, judge = serve(lambda prompt, body: "Yes"), serve(lambda prompt, body: "correct")
    options = EvalOptions(
        endpoint=model.url, model="m", questions=str(tmp_path / "q.json"), out=tmp_path / "e", judge="chat",
        judge_model="j", judge_base_url=judge.url,
    )  # fmt: skip
    evaluate(options)
    assert set(model.keys) == {"Bearer " + KEYS["R1V_ENDPOINT_KEY"]} and set(judge.keys) == {
        "Bearer " + KEYS["OPENAI_API_KEY"]
    }


def test_without_its_variable_an_endpoint_gets_no_key(tmp_path, serve, monkeypatch):
    monkeypatch.delenv("R1V_ENDPOINT_KEY")
    write_json(tmp_path / "q.json", [r for r in records() if r["visual_input"] == "0"])
    model = serve(lambda prompt, body: "Yes")
    evaluate(EvalOptions(endpoint=model.url, model="m", questions=str(tmp_path / "q.json"), out=tmp_path / "e"))
    assert set(model.keys) == {None}
    monkeypatch.setenv("MINE", "k")
    options = {"questions": str(tmp_path / "q.json"), "out": tmp_path / "f", "api_key_env": "MINE"}
    evaluate(EvalOptions(endpoint=model.url, model="m", **options))
    assert model.keys[-1] == "Bearer k"


def test_large_images_go_as_jpeg_of_a_stated_quality(pope, serve):  # noqa: F811
    noise = random.Random(0).randbytes(3 * 448 * 448)
    Image.frombytes("RGB", (448, 448), noise).save(pope / "val2014" / "COCO_0.jpg", quality=95)
    server = serve(lambda prompt, body: "Yes")
    doc = evaluate(asking(pope, server, max_image_bytes=100_000))
    urls = [body["messages"][0]["content"][0]["image_url"]["url"] for body in server.bodies]
    jpegs = [u for u in urls if u.startswith("data:image/jpeg;base64,")]
    assert len(jpegs) == 6 and len(urls) == 24 and all(u.startswith("data:image/png") for u in urls if u not in jpegs)
    with Image.open(io.BytesIO(base64.b64decode(jpegs[0].partition(",")[2]))) as sent:
        assert sent.size == (448, 448)
    assert {k: doc["settings"][k] for k in ("jpeg_images", "jpeg_quality", "max_image_bytes")} == {
        "jpeg_images": 6, "jpeg_quality": 95, "max_image_bytes": 100_000,
    }  # fmt: skip


def test_limits_at_which_an_endpoint_would_resize_again_are_refused(pope, serve):  # noqa: F811
    """Qwen-VL's rule is not idempotent where no size of whole tokens is between narrow limits."""
    from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize

    from r1vfree_cli.eval.remote import fitted, is_settled

    def theirs(width, height, low, high):
        return smart_resize(height, width, 28, low, high)[::-1]

    rng = random.Random(0)
    unsettled = 0
    for _ in range(2000):
        size = rng.randrange(28, 1200), rng.randrange(28, 1200)
        for limits in ((3136, 401408), (3136, 3136), (1568, 6272)):
            once = theirs(*size, *limits)
            assert fitted(*size, *limits) == once
            assert is_settled(*size, *limits) == (theirs(*once, *limits) == once)
            unsettled += not is_settled(*size, *limits)
        assert is_settled(*size, 3136, 401408)
    assert unsettled > 100
    server = serve(lambda prompt, body: "Yes")
    Image.new("RGB", (300, 200)).save(pope / "val2014" / "COCO_0.jpg")
    with pytest.raises(UsageError, match="300 x 200 image"):
        evaluate(asking(pope, server, min_pixels=3136, max_pixels=3136))
    assert not server.bodies


def test_turns_without_an_image_are_plain_strings(tmp_path, serve):
    write_json(tmp_path / "q.json", [r for r in records() if r["visual_input"] == "0"])
    server = serve(lambda prompt, body: "Yes")
    evaluate(EvalOptions(endpoint=server.url, model="m", questions=str(tmp_path / "q.json"), out=tmp_path / "e"))
    contents = [m["content"] for body in server.bodies for m in body["messages"]]
    assert contents and all(isinstance(c, str) and "image" not in c.lower() for c in contents)
    from r1vfree_cli.core.prompts import Prompt, build_messages
    from r1vfree_cli.eval.remote import with_image

    twice = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "and"}, {"type": "image"}]}]
    assert [p.get("image_url") for p in with_image(twice, "data:x")[0]["content"]] == [
        {"url": "data:x"},
        None,
        {"url": "data:x"},
    ]
    system, user = with_image(build_messages("Is it?", 1, Prompt(system="Be brief.")), "data:x")
    assert system == {"role": "system", "content": "Be brief."}
    assert [part["type"] for part in user["content"]] == ["image_url", "text"]


def test_what_may_pass_counts_as_not_right_only_when_it_fails_again(pope, serve, capsys):  # noqa: F811
    """A server that is overloaded for a while is no refusal: a score of what it left out would be wrong for ever."""
    down = {"popular 2": 503, "random 3": 413}
    server = serve(lambda prompt, body: next((status for text, status in down.items() if text in prompt), "Yes"))
    options = asking(pope, server, count_unanswered_wrong=True)
    with pytest.raises(DataError, match="2 of 24 questions got no answer") as e:
        evaluate(options)
    assert "next time" in (e.value.hint or "") and not (pope / "e" / "scores.json").exists()
    doc = evaluate(options)  # and again: now it counts, like what was refused
    assert doc["unanswered"]["causes"] == {"unavailable": 2, "rejected": 2}
    assert "counted as not right: 2 x rejected: 413" in capsys.readouterr().err
    rows = [r for _, r in read_jsonl(pope / "e" / "predictions.jsonl")]
    assert sum(bool(r.get("unanswered")) for r in rows) == 4 and all(r["reason"] for r in rows if r.get("unanswered"))
    down.clear()
    assert evaluate(options)["unanswered"]["n"] == 0
    assert len([*read_jsonl(pope / "e" / "predictions.jsonl")]) == 24  # one line a question


def test_unanswered_predictions_of_another_run_do_not_become_a_score(pope, serve):  # noqa: F811
    server = serve(lambda prompt, body: 413 if "popular 2" in prompt else "Yes")
    evaluate(asking(pope, server, count_unanswered_wrong=True))
    again = {"benchmark": "pope", "predictions": pope / "e" / "predictions.jsonl", "out": pope / "f"}
    with pytest.raises(DataError, match=r"2 questions of .* have no answer"):
        evaluate(EvalOptions(**again))
    doc = evaluate(EvalOptions(**again, count_unanswered_wrong=True))
    assert doc["unanswered"]["n"] == 2 and doc["counts"]["accuracy"] == [11, 24]


@pytest.mark.parametrize(
    "bad",
    [
        {"model_prediction": None}, {"model_prediction": 3}, {"model_prediction": ["Yes"]}, {"id": 7}, {"key": 1},
        {"unanswered": {"a": 1}}, {"finish": 0}, {"cause": []},
    ],
)  # fmt: skip
def test_a_bad_answer_is_named_and_asked_again(bad, pope, serve, capsys):  # noqa: F811
    server = serve(lambda prompt, body: "Yes")
    wanted = evaluate(asking(pope, server))
    file = pope / "e" / "predictions.jsonl"
    rows = [r for _, r in read_jsonl(file)]
    lines(file, [rows[0], rows[1] | bad, *rows[2:]])
    server.prompts.clear()
    assert evaluate(asking(pope, server))["counts"] == wanted["counts"] and len(server.prompts) == 1
    assert f"{file}: no prediction in line 2" in capsys.readouterr().err


@pytest.mark.parametrize("damage", [b"\0" * 64, b'{"id": "VD', b"[" * 50_000, b"\xff\xfe", b"7"])
def test_a_line_that_is_damaged_costs_its_own_question(damage, pope, serve, capsys):  # noqa: F811
    """What a machine that lost power, or an editor, leaves in the middle of a file."""
    server = serve(lambda prompt, body: "Yes")
    wanted = evaluate(asking(pope, server))
    server.prompts.clear()
    for name, what in (("predictions.jsonl", "prediction"), ("judgements.jsonl", "judgement")):
        file = pope / "e" / name
        rows = file.read_bytes().splitlines()
        file.write_bytes(b"\n".join([rows[0], damage, *rows[2:], b""]))
        assert evaluate(asking(pope, server))["counts"] == wanted["counts"] and len(server.prompts) == 1
        said = capsys.readouterr().err
        assert f"{file}: no {what} in line 2 " in said or name == "judgements.jsonl"  # the rule judges anew


@pytest.mark.parametrize(
    "bad",
    [
        {"code": 7},
        {"code": "1"},
        {"code": True},
        {"code": 1.0},
        {"same": 2},
        {"same": "same"},
        {"key": None},
        {"calls": "3"},
        {"id": 3},
    ],
)
def test_a_bad_verdict_is_named_and_asked_again(bad, tmp_path, serve, capsys):
    server = serve(lambda prompt, body: "same" if "two students" in prompt else "correct")
    options = EvalOptions(
        predictions=prediction_file(tmp_path / "p.json"), out=tmp_path / "e", judge="chat", judge_model="j",
        judge_base_url=server.url, max_retries=0,
    )  # fmt: skip
    wanted = evaluate(options)
    file = tmp_path / "e" / "judgements.jsonl"
    rows = [r for _, r in read_jsonl(file)]
    lines(file, [rows[0] | bad, *rows[1:]])
    for cache in Path(tmp_path / "cache").rglob("judgements.sqlite"):
        cache.unlink()
    server.prompts.clear()
    assert evaluate(options)["counts"] == wanted["counts"] and len(server.prompts) >= 1
    assert f"{file}: no judgement in line 1" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("label", "note"),
    [(2.0, None), (7.0, None), (0.5, None), (1.0, "{}"), (1.0, "no json"), (1.0, '{"raw": 1, "model": "m"}'),
     (1.0, "[" * 50_000), (1.0, '{"raw": "\\ud800", "model": "m"}'), (1.0, b"\xff"), (1.0, 7)],
)  # fmt: skip
def test_a_bad_verdict_in_the_cache_is_named_and_asked_again(label, note, tmp_path, serve, capsys):
    import sqlite3

    server = serve(lambda prompt, body: "same" if "two students" in prompt else "correct")
    more = {
        "predictions": prediction_file(tmp_path / "p.json"),
        "judge": "chat",
        "judge_model": "j",
        "judge_base_url": server.url,
        "max_retries": 0,
    }
    wanted = evaluate(EvalOptions(**more, out=tmp_path / "e"))
    (cache,) = Path(tmp_path / "cache").rglob("judgements.sqlite")
    with sqlite3.connect(cache) as db:
        (some,) = db.execute("SELECT key FROM judgements LIMIT 1").fetchone()
        if note is None:
            db.execute("UPDATE judgements SET score = ? WHERE key = ?", (label, some))
        else:
            db.execute("UPDATE judgements SET score = ?, note = ? WHERE key = ?", (label, note, some))
    server.prompts.clear()
    doc = evaluate(EvalOptions(**more, out=tmp_path / "f"))
    if label == 2.0:  # "unclear" is a label of the first question; a verdict like any other, which nobody can tell
        return
    assert doc["counts"] == wanted["counts"] and len(server.prompts) == 1
    assert "are no judgements and are asked again" in capsys.readouterr().err
    assert json.loads(json.dumps(doc))["unjudged"] == 0
