"""`r1v eval NAME`: the rooms beside HallusionBench, a user's own benchmark, recipes, and what all of them share."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from test_hallusion import Server, judged_file, records

from r1vfree_cli.core.errors import DataError, R1VError, UsageError
from r1vfree_cli.core.files import lock, read_json, write_json
from r1vfree_cli.eval import options as options_module
from r1vfree_cli.eval.benchmark import RIGHT, UNCLEAR, WRONG, find
from r1vfree_cli.eval.options import EvalOptions
from r1vfree_cli.eval.runner import evaluate
from r1vfree_cli.eval.show import below_constant, print_scores


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("R1V_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


@pytest.fixture
def serve():
    servers = []

    def start(reply) -> Server:
        servers.append(Server(reply))
        return servers[-1]

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def lines(path: Path, rows: list[dict]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return path


@pytest.fixture
def pope(tmp_path) -> Path:
    """The authors' layout: a .json of JSON lines a part, 4 images, 2 questions each in every part."""
    from tiny_models import draw

    for i in range(4):
        (tmp_path / "val2014").mkdir(exist_ok=True)
        draw(i, (56, 56)).save(tmp_path / "val2014" / f"COCO_{i}.jpg")
    for part in ("random", "popular", "adversarial"):
        rows = [
            {
                "question_id": 2 * i + k + 1,
                "image": f"COCO_{i}.jpg",
                "text": f"Is there a {'dog' if k else 'car'} in the image? {part} {i}",
                "label": "yes" if k else "no",
            }
            for i in range(4)
            for k in range(2)
        ]
        lines(tmp_path / "coco" / f"coco_pope_{part}.json", rows)
    return tmp_path


def asking(pope: Path, server: Server, out: str = "e", **more) -> EvalOptions:
    return EvalOptions(
        benchmark="pope", endpoint=server.url, model="m", questions=str(pope / "coco"), images=pope / "val2014",
        out=pope / out, max_retries=0, **more,
    )  # fmt: skip


# --- the rooms -------------------------------------------------------------------------------------------------


def test_pope_end_to_end_by_parts_with_comparison_and_report(pope, serve, capsys):
    def reply(prompt, body):
        if "adversarial 3" in prompt:
            return "Perhaps."  # unreadable: neither yes nor no
        return "<think>x</think><answer>Yes</answer>" if "dog" in prompt or "popular" in prompt else "No."

    doc = evaluate(asking(pope, serve(reply)))
    # random: all right; popular: all yes; adversarial: image 3 unreadable, the rest right
    assert doc["counts"] == {
        "accuracy": [18, 24], "precision": [11, 15], "recall": [11, 12], "f1": [22, 27], "yes_rate": [15, 24],
    }  # fmt: skip
    assert doc["by_part"]["popular"]["counts"]["precision"] == [4, 8]
    assert doc["by_part"]["adversarial"]["counts"]["accuracy"] == [6, 8]
    assert doc["answer_format"]["unreadable"] == 2
    assert doc["baselines"]["always_no"]["metrics"]["precision"] is None
    assert doc["baselines"]["always_yes"]["counts"]["recall"] == [12, 12]
    print_scores(doc)
    assert capsys.readouterr().out.startswith("2 of 24 replies unreadable")

    other = evaluate(asking(pope, serve(lambda p, b: "Yes"), "o", compare_to=pope / "e"))
    c = other["comparison"]
    assert c["sets"] == 4  # images, each asked about in all parts
    assert c["metrics"]["accuracy"]["difference"] == pytest.approx(other["metrics"]["accuracy"] - 75)
    assert c["metrics"]["precision"]["difference"] == pytest.approx(50 - 100 * 11 / 15)
    assert below_constant(other) == ["accuracy", "precision", "f1"]
    again = evaluate(EvalOptions(benchmark="pope", judged=pope / "e" / "judged.json"))
    assert again["counts"] == doc["counts"] and again["intervals"] == doc["intervals"]

    from r1vfree_cli.report import report

    report([pope / "e", pope / "o"], pope / "report")
    text = (pope / "report" / "report.md").read_text()
    assert "## POPE" in text and "adversarial" in text and "f1" in text and "Gained" in text


@pytest.mark.parametrize(
    ("name", "truth", "reply", "code"),
    [
        ("counting", 3, "<think>1 + 2</think><answer>3</answer>", RIGHT),
        ("counting", "3", "There are three.", RIGHT),
        ("counting", 3, "<answer>3.0 </answer>", RIGHT),
        ("counting", 3, "<answer>4</answer>", WRONG),
        ("counting", 3, "3 or 4", UNCLEAR),
        ("counting", 3, "many", UNCLEAR),
        ("counting", 3, "12,3", UNCLEAR),
        ("counting", 3, "not 2 but 3", RIGHT),
        ("counting", 4, "Figure 1 shows 4 cubes.", RIGHT),
        ("counting", 1, "only one", RIGHT),
        ("counting", 3, "In the image 3 cubes are red.", RIGHT),
        *(("counting", 3, text, UNCLEAR) for text in ("at least 3", "not 3", "3 or more", "3+", "more than three")),
        *(("counting", 1, text, UNCLEAR) for text in ("no one can tell", "figure 1", "There isn't one.")),
        ("counting", 3, "", UNCLEAR),
        ("geoqa", "145°", "<answer>145</answer>", RIGHT),
        ("geoqa", "\\frac{1}{2}", "<answer>0.5</answer>", RIGHT),
        ("geoqa", "60", "so \\boxed{60^\\circ}", RIGHT),
        ("geoqa", "5", "<answer>6</answer>", WRONG),
        ("geoqa", "60", "I think 60", UNCLEAR),
    ],
)
def test_replies_are_right_wrong_or_unreadable(name, truth, reply, code, tmp_path):
    from tiny_models import draw

    (tmp_path / "images").mkdir()
    draw(0, (56, 56)).save(tmp_path / "images" / "a.png")
    row = {"image_path": "./images/a.png", "question": "How many?", "ground_truth": truth}  # R1-V's form
    benchmark = find(name)
    asked = benchmark.questions(str(lines(tmp_path / "q.jsonl", [row])), None, lambda q: True)
    (q,) = asked.questions
    assert asked.image(q) and q.id == "1"
    assert benchmark.code(q, reply) == code


def test_bad_questions_are_named(tmp_path):
    def fails(error, part, rows, name="counting"):
        with pytest.raises(error) as e:
            find(name).questions(str(lines(tmp_path / "q.jsonl", rows)), None, lambda q: True)
        assert part in " ".join([e.value.message, *e.value.details, e.value.hint or ""])

    good = {"image_path": "a.png", "question": "How many?", "ground_truth": 3}
    fails(DataError, "a.png", [good])  # no such figure
    fails(DataError, "ground_truth", [good | {"ground_truth": "some"}])
    fails(DataError, "line 1", [{"image_path": "a.png"}])
    fails(DataError, "../../etc/hostname", [good | {"image_path": "../../etc/hostname"}])
    label = {"question_id": 1, "image": "a", "text": "t", "label": "maybe"}
    fails(DataError, "allowed: yes, no", [label], "pope")
    with pytest.raises(UsageError, match="did you mean pope"):
        try:
            find("poep")
        except UsageError as e:
            raise UsageError(str(e.hint)) from None


# --- a benchmark of one's own ----------------------------------------------------------------------------------

OWN = '''
from r1vfree_cli.eval.benchmark import Benchmark, Question, QuestionSet


class Colours(Benchmark):
    """Which colour? No figures."""

    title = "Colours"

    def questions(self, source, images, asked):
        rows = [("sky", "blue"), ("grass", "green"), ("blood", "red")]
        return QuestionSet([Question(thing, f"Which colour has {thing}?", colour) for thing, colour in rows], {}, "colours")

    def judge(self, question, reply):
        return question.answer in reply.lower() if reply.strip() else None


BENCHMARK = Colours()
'''


def test_a_benchmark_is_added_by_one_file_outside_the_package(tmp_path, serve):
    (tmp_path / "my_bench.py").write_text(OWN)
    server = serve(lambda prompt, body: "<answer>Blue</answer>")
    command = [sys.executable, "-m", "r1vfree_cli", "eval", "my_bench.py:BENCHMARK", "--endpoint", server.url, "--model", "m",
               "--out", "e", "--json"]  # fmt: skip
    done = subprocess.run([*command, "--fail-under", "accuracy=50"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 4, done.stderr
    doc = json.loads(done.stdout)
    assert doc["counts"] == {"accuracy": [1, 3]} and doc["intervals"]["accuracy"] and doc["protocol"] == "my_bench"
    calls = len(server.prompts)
    done = subprocess.run([*command, "--compare-to", "e"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and len(server.prompts) == calls  # resumed: nothing is asked again
    assert json.loads(done.stdout)["comparison"]["metrics"]["accuracy"]["difference"] == 0
    with pytest.raises(UsageError, match="cannot be loaded"):
        find(f"{tmp_path / 'none.py'}:BENCHMARK")


# --- recipes and options ---------------------------------------------------------------------------------------


def test_options_come_from_a_recipe_then_set_then_the_command_line(tmp_path):
    o = options_module.load("pope", ["max_new_tokens=7", "seed=3"], {"seed": 4, "benchmark": "pope"})
    assert (o.benchmark, o.max_new_tokens, o.seed) == ("pope", 7, 4)
    for name in ("pope", "hallusion"):
        options_module.load(name, [], {})
    for overrides, part in ((["max_tokens=7"], "max_new_tokens"), (["limit=0", "judge=rul"], "did you mean rule")):
        with pytest.raises(UsageError) as e:
            options_module.load("pope", overrides, {})
        assert part in " ".join(e.value.details)
        assert len(e.value.details) == len(overrides)
    with pytest.raises(UsageError, match="is for the benchmark pope"):
        options_module.load("pope", [], {"benchmark": "hallusion"})


def test_both_commands_have_the_same_options_and_the_resolved_ones_are_kept(tmp_path):
    from typer.testing import CliRunner

    from r1vfree_cli import cli

    file, runner = judged_file(tmp_path / "r.json"), CliRunner()
    a, b = (runner.invoke(cli.app, [*c, "--judged", str(file), "--out", str(tmp_path / c[-1]), "--seed", "3", "--json"])
            for c in (["eval-hallusion"], ["eval", "hallusion"]))  # fmt: skip
    one, two = json.loads(a.stdout), json.loads(b.stdout)
    assert one.pop("out") != two.pop("out") and one == two
    kept = read_json(tmp_path / "hallusion" / "eval.json")["options"]
    assert kept["seed"] == 3 and kept["benchmark"] == "hallusion" and kept["judged"] == [str(file)]


# --- what is stored, empty, unanswered, in use -----------------------------------------------------------------


def test_what_is_limited_is_stored_hashed_and_compared(tmp_path):
    file = judged_file(tmp_path / "r.json")
    doc = evaluate(EvalOptions(judged=file, limit=10, out=tmp_path / "a"))
    assert doc["n_questions"] == len(read_json(tmp_path / "a" / "judged.json")) == 10
    again = evaluate(EvalOptions(judged=tmp_path / "a" / "judged.json", compare_to=tmp_path / "a"))
    assert again["counts"] == doc["counts"] and again["comparison"]["gained"] == []
    assert again["questions_sha256"] == doc["questions_sha256"]
    whole = evaluate(EvalOptions(judged=file))
    assert whole["questions_sha256"] != doc["questions_sha256"]
    with pytest.raises(DataError, match="another question set"):
        evaluate(EvalOptions(judged=file, compare_to=tmp_path / "a"))
    evaluate(EvalOptions(judged=file, limit=10, compare_to=tmp_path / "a"))
    with pytest.raises(UsageError, match="other settings"):
        evaluate(EvalOptions(judged=file, out=tmp_path / "a"))  # 24 rows are another result than 10


def test_empty_replies_are_counted_warned_of_and_refused(pope, serve):
    def reply(prompt, body):
        empty = "random" in prompt and "car" in prompt  # 4 of 24
        return b'{"choices": [{"message": {"content": null}, "finish_reason": "stop"}]}' if empty else "Yes"

    options = asking(pope, serve(reply))
    with pytest.raises(DataError, match="4 of 24 replies are empty") as e:
        evaluate(options)
    assert e.value.exit_code == 3 and not (pope / "e" / "scores.json").exists()
    options.max_empty = 20
    doc = evaluate(options)
    assert doc["empty"]["n"] == 4 and sum(doc["empty"]["causes"].values()) == 4
    assert any("4 of 24 replies are empty" in w for w in doc["warnings"])


def test_a_refused_question_blocks_until_it_is_counted_as_not_right(pope, serve, capsys):
    refused = ["popular 2"]
    server = serve(lambda prompt, body: 413 if any(r in prompt for r in refused) else "Yes")
    with pytest.raises(DataError, match="2 of 24 questions got no answer") as e:
        evaluate(asking(pope, server))
    assert "--count-unanswered-wrong" in (e.value.hint or "")
    doc = evaluate(asking(pope, server, count_unanswered_wrong=True))
    assert doc["unanswered"]["n"] == 2 and doc["unanswered"]["causes"]
    assert doc["counts"]["accuracy"] == [11, 24] and doc["counts"]["yes_rate"] == [22, 24]  # never a silent no
    assert any("2 questions have no answer" in w for w in doc["warnings"])
    print_scores(doc)
    assert capsys.readouterr().out.startswith("2 of 24 questions have no answer and count as not right")
    with pytest.raises(DataError, match="have no answer"):
        evaluate(EvalOptions(benchmark="pope", out=pope / "e", stage="score"))
    refused.clear()
    server.prompts.clear()
    doc = evaluate(asking(pope, server))  # asked again once it may work
    assert doc["unanswered"]["n"] == 0 and len(server.prompts) == 2


def test_a_refused_text_only_question_of_hallusionbench_is_not_right_although_unclear_would_be(tmp_path, serve, capsys):
    write_json(tmp_path / "q.json", [r for r in records() if r["visual_input"] == "0"])
    server = serve(lambda prompt, body: 413 if "Number 00" in prompt else "hm")
    doc = evaluate(
        EvalOptions(endpoint=server.url, model="m", questions=str(tmp_path / "q.json"), out=tmp_path / "e",
                    max_retries=0, count_unanswered_wrong=True)
    )  # fmt: skip
    n, refused = doc["n_questions"], doc["unanswered"]["n"]
    assert refused and doc["counts"]["aAcc"] == [n - refused, n] and doc["unclear_right"] == n - refused
    print_scores(doc)
    assert f"{n - refused} of {n - refused} right answers are unclear replies" in capsys.readouterr().out


def test_an_eval_dir_has_one_writer_and_says_who(tmp_path):
    file = judged_file(tmp_path / "r.json")
    with lock(tmp_path / "a", "eval dir"), pytest.raises(R1VError) as e:
        evaluate(EvalOptions(judged=file, out=tmp_path / "a"))
    assert e.value.exit_code == 2 and "eval dir" in e.value.message and "another r1v process" in e.value.message
    evaluate(EvalOptions(judged=file, out=tmp_path / "a"))


def test_a_writer_that_is_stopped_keeps_its_eval_dir_until_it_ends(tmp_path):
    """SIGSTOP, as a batch system sends it: what lies still is not abandoned."""
    file = judged_file(tmp_path / "r.json")
    code = "import sys, pathlib; from r1vfree_cli.core.files import lock\n"
    code += "with lock(pathlib.Path(sys.argv[1]), 'eval dir'): print('held', flush=True); sys.stdin.read()"
    command = [sys.executable, "-c", code, str(tmp_path / "a")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout.readline() == b"held\n"
        holder.send_signal(signal.SIGSTOP)
        try:
            with pytest.raises(R1VError, match=f"another r1v process .pid {holder.pid}. is using the eval dir"):
                evaluate(EvalOptions(judged=file, out=tmp_path / "a"))
        finally:
            holder.kill()
    evaluate(EvalOptions(judged=file, out=tmp_path / "a"))


def test_a_bad_judgement_is_named_and_judged_again(tmp_path, capsys):
    from r1vfree_cli.eval import judgements

    file = lines(
        tmp_path / "j.jsonl", [{"id": "a", "key": "k", "code": 1}, {"id": "b", "key": "k", "code": 7}, {"id": 3}]
    )
    assert list(judgements.read(file)) == ["a"] and "line 2, 3" in capsys.readouterr().err


def test_vlmevalkit_shows_the_mean_of_its_leaderboard(tmp_path):
    write_json(tmp_path / "p.json", [r | {"model_prediction": "Yes"} for r in records()])
    doc = evaluate(EvalOptions(predictions=tmp_path / "p.json", protocol="vlmevalkit", out=tmp_path / "e"))
    assert doc["mean"] == pytest.approx(sum(doc["metrics"][m] for m in ("aAcc", "fAcc", "qAcc")) / 3)


@pytest.mark.parametrize(
    "given, said",
    [
        ({"endpoint": "http://127.0.0.1:1", "model": "m", "vllm": True}, "--vllm starts a server for a checkpoint"),
        ({"checkpoint": "org/model", "base": "org/base", "vllm": True}, "complete models only"),
    ],
)
def test_vllm_is_for_complete_checkpoints(given, said):
    with pytest.raises(UsageError, match=said):
        options_module.check(EvalOptions(**given))


def test_without_vllm_an_evaluation_says_how_to_have_it(pope, tmp_path, monkeypatch):
    from tiny_models import save_tiny

    monkeypatch.setenv("R1V_VLLM", str(tmp_path / "nothing"))
    told = {"questions": str(pope / "coco"), "images": pope / "val2014", "out": tmp_path / "v", "vllm": True}
    with pytest.raises(UsageError, match="R1V_VLLM is") as raised:
        evaluate(EvalOptions(benchmark="pope", checkpoint=str(save_tiny(tmp_path / "m")), **told))
    assert raised.value.exit_code == 2 and not list((tmp_path / "v").glob("*.json*"))


def test_vllm_is_refused_for_a_family_whose_pixel_limits_it_does_not_take(pope, tmp_path, monkeypatch):
    monkeypatch.setenv("R1V_VLLM", sys.executable)
    write_json(tmp_path / "m" / "config.json", {"model_type": "internvl"})
    (tmp_path / "m" / "model.safetensors").touch()
    told = {"questions": str(pope / "coco"), "images": pope / "val2014", "out": tmp_path / "v", "vllm": True}
    with pytest.raises(UsageError, match="pixel limits of Qwen-VL models alone"):
        evaluate(EvalOptions(benchmark="pope", checkpoint=str(tmp_path / "m"), **told))


FAKE_VLLM = """#!{python}
import http.server, json, os, sys, threading
one = threading.Lock()
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.answer({{}})
    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        with one:
            with open("{count}", "a") as file:
                file.write(".")
            if os.path.getsize("{count}") in {deaths}:
                os._exit(1)
        self.answer({{"choices": [{{"message": {{"content": "<answer>Yes</answer>"}}, "finish_reason": "stop"}}]}})
    def answer(self, document):
        body = json.dumps(document).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
port = int(sys.argv[sys.argv.index("--port") + 1])
http.server.ThreadingHTTPServer(("127.0.0.1", port), Handler).serve_forever()
"""


def test_a_vllm_server_that_dies_is_started_again_once(pope, tmp_path, monkeypatch, capsys):
    """Questions wait for it; when it stays away the rest is asked by the same command."""
    from tiny_models import save_tiny

    command = tmp_path / "vllm"
    command.write_text(FAKE_VLLM.format(python=sys.executable, count=tmp_path / "count", deaths=(3, 8, 12)))
    command.chmod(0o755)
    monkeypatch.setenv("R1V_VLLM", str(command))
    told = {"questions": str(pope / "coco"), "images": pope / "val2014", "out": tmp_path / "v", "vllm": True}
    o = EvalOptions(
        benchmark="pope",
        checkpoint=str(save_tiny(tmp_path / "m")),
        stage="generate",
        max_retries=0,
        concurrency=2,
        **told,
    )
    with pytest.raises(DataError, match="the vLLM server ended twice"):
        evaluate(o)
    assert 0 < len((tmp_path / "v" / "predictions.jsonl").read_text().splitlines()) < 12
    evaluate(o)
    rows = (tmp_path / "v" / "predictions.jsonl").read_text().splitlines()
    assert len(rows) == len({json.loads(row)["id"] for row in rows}) == 24
    assert capsys.readouterr().err.count("it is started again, once") == 2
