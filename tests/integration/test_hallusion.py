"""eval-hallusion end to end: a tiny real model, real HTTP endpoints, real kills, and every bad input of the issue."""

from __future__ import annotations

import base64
import contextlib
import csv
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
import zipfile
import zlib
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from r1vfree_cli.core.errors import DataError, GateError, R1VError, UsageError
from r1vfree_cli.core.files import write_json
from r1vfree_cli.eval import reading
from r1vfree_cli.eval.hallusion import questions as questions_module
from r1vfree_cli.eval.hallusion import score
from r1vfree_cli.eval.hallusion.benchmark import BENCHMARK
from r1vfree_cli.eval.options import EvalOptions, check_gates
from r1vfree_cli.eval.runner import evaluate
from r1vfree_cli.eval.show import print_scores

ROOT = Path(__file__).parents[2]


# --- a small benchmark -----------------------------------------------------------------------------------------


def records(habit: str = "./") -> list[dict]:
    """24 questions: VD pairs, VS triples without, with original and with modified figure."""
    found = []
    for category, sub, figures in (("VD", "ocr", (1, 2)), ("VS", "chart", (0, 1, 2))):
        for set_id in range(2):
            for figure, visual in enumerate(figures):
                for question in range(2 + (category == "VD" and set_id)):
                    found.append(
                        {
                            "category": category,
                            "subcategory": sub,
                            "visual_input": str(visual),
                            "set_id": str(set_id),
                            "figure_id": str(figure),
                            "sample_note": "note",
                            "question_id": str(question),
                            "question": f"Is there a circle in the {sub}? Number {set_id}{question}."
                            + " Look well." * question,
                            "gt_answer_details": f"There is {'a' if (figure + question) % 2 else 'no'} circle.",
                            "gt_answer": str((figure + question) % 2),
                            "filename": f"{habit}{category}/{sub}/{set_id}_{figure}.png" if visual else None,
                        }
                    )
    return found


@pytest.fixture(scope="session")
def bench(tmp_path_factory):
    """Official JSON with its image folder."""
    from tiny_models import draw

    root = tmp_path_factory.mktemp("bench")
    write_json(root / "HallusionBench.json", records())
    for i, name in enumerate(sorted({r["filename"] for r in records()} - {None})):
        file = root / "hallusion_bench" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        draw(i, ((56, 56), (84, 56), (56, 112))[i % 3]).save(file)
    return root


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    from tiny_models import save_tiny

    return save_tiny(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("R1V_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


def judged_file(path: Path, seed: int = 0, **changes) -> Path:
    rng = random.Random(seed)
    rows = [
        r
        | {"model_prediction": "Yes", score.CODE: str(rng.randint(0, 2)), score.SAME: str(rng.randint(0, 1))}
        | changes
        for r in records()
    ]
    write_json(path, rows)
    return path


def prediction_file(path: Path, reply: str = "<think>a</think><answer>Yes</answer>") -> Path:
    write_json(path, [r | {"model_prediction": reply} for r in records()])
    return path


# --- an OpenAI-compatible server -------------------------------------------------------------------------------


class Server(ThreadingHTTPServer):
    """Counts the calls it answers; `reply(prompt, body)` gives a text, an int as an error status, or a raw body."""

    daemon_threads = True
    request_queue_size = 64

    def __init__(self, reply, delay: float = 0.0):
        super().__init__(("127.0.0.1", 0), Handler)
        self.reply, self.delay = reply, delay
        self.prompts: list[str] = []
        self.bodies: list[dict] = []
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_POST(self):
        try:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        except ValueError:  # a killed client
            return
        content = body["messages"][0]["content"]
        text = content if isinstance(content, str) else content[-1]["text"]
        time.sleep(self.server.delay)
        answer = self.server.reply(text, body)
        if isinstance(answer, int):
            self.send(answer, {"error": {"message": f"status {answer} temperature" if answer == 400 else "no"}})
            return
        if isinstance(answer, bytes):
            self.send(200, answer)
            return
        self.server.prompts.append(text)
        self.server.bodies.append(body)
        usage = {"prompt_tokens": 10, "completion_tokens": 2, "total_tokens": 12}
        message = {"role": "assistant", "content": answer}
        cut = "length" if answer.endswith("...") else "stop"
        choices = [{"index": 0, "finish_reason": cut, "message": message}]
        document = {"id": "x", "object": "chat.completion", "created": 1, "model": body["model"] + "-0613"}
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            self.send(200, document | {"choices": choices, "usage": usage})

    def send(self, status: int, document: dict | bytes) -> None:
        data = document if isinstance(document, bytes) else json.dumps(document).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args):
        pass


@pytest.fixture
def serve():
    servers = []

    def start(reply, delay: float = 0.0) -> Server:
        servers.append(Server(reply, delay))
        return servers[-1]

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def judge_by_content(prompt: str, body: dict) -> str:
    if "two students" in prompt:
        return "same"
    return ("incorrect", "correct", "unclear", "incorrect")[zlib.crc32(prompt.encode()) % 4]


def chat(server: Server, **more) -> dict:
    return {"judge": "chat", "judge_model": "gpt-x", "judge_base_url": server.url, "max_retries": 0, **more}


# --- scoring ---------------------------------------------------------------------------------------------------


def test_a_judged_file_is_scored_without_torch_network_or_files(tmp_path):
    file = judged_file(tmp_path / "result.json")
    code = (
        "import sys, json\n"
        "sys.addaudithook(lambda event, args: sys.exit(event) if event.startswith('socket.') else None)\n"
        "from pathlib import Path\n"
        "from r1vfree_cli.eval.runner import EvalOptions, evaluate\n"
        f"doc = evaluate(EvalOptions(judged=Path({str(file)!r})))\n"
        "assert not {'torch', 'transformers', 'openai', 'PIL'} & set(sys.modules)\n"
        "print(json.dumps(doc, allow_nan=False))\n"
    )
    before = set(tmp_path.rglob("*"))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, timeout=60)
    assert done.returncode == 0, done.stderr
    doc = json.loads(done.stdout)
    wanted = {
        "protocol": None, "n_questions": None, "by_subcategory": None, "unjudged": None,
        "metrics": {"aAcc", "qAcc", "fAcc", "easy_aAcc", "hard_aAcc"},
        "counts": {"aAcc", "qAcc", "fAcc", "easy_aAcc", "hard_aAcc"},
        "diagnostics": {"yes_pct_diff", "fp_ratio", "language_hallucination", "visual_illusion", "mixed", "consistency"},
        "by_category": {"VD", "VS"},
        "baselines": {"always_yes", "always_no"},
    }  # fmt: skip
    for key, inner in wanted.items():
        assert key in doc and (inner is None or inner <= set(doc[key]))
    assert set(tmp_path.rglob("*")) == before


def test_jsonl_and_json_judged_files_score_alike(tmp_path):
    file = judged_file(tmp_path / "result.json")
    lines = tmp_path / "result.jsonl"
    lines.write_text("".join(json.dumps(r) + "\n" for r in json.loads(file.read_text())))
    a, b = (evaluate(EvalOptions(judged=f)) for f in (file, lines))
    assert a["counts"] == b["counts"] and a["diagnostics"] == b["diagnostics"]


def test_gates(tmp_path, capsys):
    doc = evaluate(EvalOptions(judged=judged_file(tmp_path / "r.json", **{score.CODE: 1})))
    print_scores(doc)
    assert "always-yes" in capsys.readouterr().out
    check_gates(doc, ["aAcc=100", "qAcc=0"])
    doc["metrics"]["qAcc"] = 12.0
    with pytest.raises(GateError) as e:
        check_gates(doc, ["aAcc=50", "qAcc=18"])
    assert e.value.exit_code == 4 and len(e.value.details) == 1
    doc["metrics"]["hard_aAcc"] = None  # a part of the benchmark without edited figures: nothing measured, nothing met
    with pytest.raises(GateError, match="not met"):
        check_gates(doc, ["hard_aAcc=0"])


def test_comparison_is_paired_and_names_questions(tmp_path):
    for name, seed in (("a", 0), ("b", 1)):
        evaluate(EvalOptions(judged=judged_file(tmp_path / f"{name}.json", seed), out=tmp_path / name))
    doc = evaluate(EvalOptions(judged=tmp_path / "a.json", compare_to=tmp_path / "b"))
    other = evaluate(EvalOptions(judged=tmp_path / "b.json"))
    c = doc["comparison"]
    assert c["metrics"]["aAcc"]["difference"] == pytest.approx(doc["metrics"]["aAcc"] - other["metrics"]["aAcc"])
    assert len(c["gained"]) - len(c["lost"]) == doc["counts"]["aAcc"][0] - other["counts"]["aAcc"][0]
    print_scores(doc)


# --- questions -------------------------------------------------------------------------------------------------


def parquet_layout(bench: Path, out: Path) -> Path:
    import pyarrow as pa
    import pyarrow.parquet as pq

    out.mkdir()
    for split, has in (("image", True), ("non_image", False)):
        rows = [r for r in records() if (r["filename"] is not None) == has]
        if has:
            rows = [
                r | {"image": {"bytes": (bench / "hallusion_bench" / r["filename"]).read_bytes(), "path": "0.png"}}
                for r in rows
            ]
        pq.write_table(pa.Table.from_pylist(rows), out / f"{split}-00000-of-00001.parquet")
    return out


def tsv_layout(bench: Path, out: Path) -> Path:
    with open(out, "w", newline="", encoding="utf-8") as f:
        writer = csv.writer(f, delimiter="\t")
        writer.writerow(["index", "category", "l2-category", "question", "answer", "image"])
        first: dict[str, str] = {}
        for r in records():
            if r["filename"] is None:
                continue
            keys = ("category", "subcategory", "visual_input", "set_id", "figure_id", "question_id")
            index = "_".join(r[k] for k in keys)
            data = base64.b64encode((bench / "hallusion_bench" / r["filename"]).read_bytes()).decode()
            image = first.setdefault(r["filename"], index)
            answer = ("No", "Yes")[int(r["gt_answer"])]
            sub = f"{r['category']}_{r['subcategory']}"
            writer.writerow([index, r["category"], sub, r["question"], answer, data if image == index else image])
    return out


def test_all_layouts_give_the_same_questions_and_figures(bench, tmp_path):
    archive = tmp_path / "hallusion_bench.zip"
    with zipfile.ZipFile(archive, "w") as z:
        for file in (bench / "hallusion_bench").rglob("*.png"):
            z.write(file, f"hallusion_bench/{file.relative_to(bench / 'hallusion_bench')}")
        z.writestr("__MACOSX/hallusion_bench/VD/ocr/._0_0.png", b"x")
    other = tmp_path / "other.json"
    write_json(other, records("./hallusion_bench/"))
    load = questions_module.load
    plain = load(str(bench / "HallusionBench.json"), bench / "hallusion_bench")
    variants = {
        "beside": load(str(bench / "HallusionBench.json")),
        "parent": load(str(bench / "HallusionBench.json"), bench),
        "zip": load(str(bench / "HallusionBench.json"), archive),
        "habit": load(str(other), bench / "hallusion_bench"),
        "parquet": load(str(parquet_layout(bench, tmp_path / "hub"))),
    }
    for name, found in variants.items():
        assert found.sha256 == plain.sha256, name
        figures = {q.id: found.image(q) for q in found.questions}
        assert figures == {q.id: plain.image(q) for q in plain.questions}, name
        assert all((figures[q.id] is None) == (q.item.visual_input == 0) for q in found.questions)
    tsv = load(str(tsv_layout(bench, tmp_path / "hb.tsv")))
    image = [q for q in plain.questions if q.needs_image]
    assert [(q.item, q.text) for q in tsv.questions] == [(q.item, q.text) for q in image]
    assert all(tsv.image(a) == plain.image(b) for a, b in zip(tsv.questions, image))


def test_a_question_file_cannot_reach_outside_the_image_folder(bench, tmp_path):
    (tmp_path / "VD" / "ocr").mkdir(parents=True)
    for file in (bench / "hallusion_bench" / "VD" / "ocr").iterdir():
        (tmp_path / "VD" / "ocr" / file.name).symlink_to(file)
    rows = [r for r in records() if r["category"] == "VD"]
    for r in rows:
        r["filename"] = "./VD/../VD/ocr/0_0.png" if r["set_id"] == "0" else r["filename"]
    write_json(tmp_path / "q.json", rows)
    with pytest.raises(DataError, match="missing"):
        questions_module.load(str(tmp_path / "q.json"), tmp_path)


# --- generation ------------------------------------------------------------------------------------------------


def local(bench: Path, tiny: Path, out: Path, **more) -> EvalOptions:
    return EvalOptions(
        **{
            "checkpoint": str(tiny), "questions": str(bench / "HallusionBench.json"), "images": bench, "out": out,
            "max_new_tokens": 12, "max_pixels": 84 * 84, "min_pixels": 784, "batch_size": 5, "device": "cpu", **more,
        }
    )  # fmt: skip


def test_batches_give_the_tokens_of_one_question_at_a_time(bench, tiny, tmp_path):
    """Also: a figure is encoded once for all its questions, and the checkpoint's own sampling is not used."""
    import io

    import torch
    from PIL import Image
    from tiny_models import load_tiny
    from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLModel

    from r1vfree_cli.core.prompts import build_messages

    calls = []
    original = Qwen2_5_VLModel.get_image_features

    def counted(self, *args, **kwargs):
        calls.append(1)
        return original(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Qwen2_5_VLModel, "get_image_features", counted)
        doc = evaluate(local(bench, tiny, tmp_path / "e"))
    asked = questions_module.load(str(bench / "HallusionBench.json"), bench)
    assert len(calls) == len({r["filename"] for r in records()} - {None})
    model, processor = load_tiny(tiny)
    found = {r["id"]: r for _, r in _lines(tmp_path / "e" / "predictions.jsonl")}
    for q in asked.questions:
        figure = asked.image(q)
        text = processor.apply_chat_template(
            build_messages(q.text, int(figure is not None)), tokenize=False, add_generation_prompt=True
        )
        images = [Image.open(io.BytesIO(figure))] if figure else None
        inputs = processor(text=[text], images=images, return_tensors="pt")
        with torch.inference_mode():
            out = model.generate(
                **inputs, max_new_tokens=12, do_sample=False, repetition_penalty=1.0, temperature=None, top_k=None, top_p=None
            )[0, inputs["input_ids"].shape[1] :].tolist()  # fmt: skip
        ends = [i for i, token in enumerate(out) if token in model.generation_config.eos_token_id]
        text = processor.tokenizer.decode(out[: ends[0]] if ends else out, skip_special_tokens=True)
        assert found[q.id]["model_prediction"] == text
        assert found[q.id]["finish"] == ("stop" if ends else "length")
        assert found[q.id]["prompt_tokens"] == inputs["input_ids"].shape[1]
    assert doc["n_questions"] == len(asked.questions)
    assert doc["answer_format"]["no_answer_tags"] > 0 and doc["settings"]["max_pixels"] == 84 * 84
    assert (tmp_path / "e" / "scores.json").is_file()
    again = evaluate(EvalOptions(judged=tmp_path / "e" / "judged.json"))
    assert again["counts"] == doc["counts"] and again["diagnostics"] == doc["diagnostics"]


@pytest.mark.parametrize("kind", ["qwen2_vl", "qwen3_vl"])
def test_features_are_reused_in_the_other_families_too(bench, tmp_path, kind):
    """Qwen3-VL adds features of several vision layers; they must go with their figure through the batches."""
    from tiny_models import save_tiny

    from r1vfree_cli.eval.generate import Generator, Job

    save_tiny(tmp_path / "m", kind)
    asked = questions_module.load(str(bench / "HallusionBench.json"), bench)
    jobs = [Job(q.id, BENCHMARK.messages(q), asked.image(q)) for q in asked.questions]
    generator = Generator(str(tmp_path / "m"), max_new_tokens=8, min_pixels=1024, max_pixels=96 * 96, device="cpu")
    assert generator.reuse
    together, alone = {}, {}
    generator.run(jobs, 7, lambda job, answer: together.update({job.id: answer}))
    generator.reuse = False  # pixels with every question, one at a time
    generator.run(jobs, 1, lambda job, answer: alone.update({job.id: answer}))
    assert together == alone


def test_evaluation_at_other_pixel_limits_than_training_is_a_trap_avoided(bench, tiny, tmp_path):
    from r1vfree_cli.core.prompts import template_hash

    run = tmp_path / "run"
    shutil.copytree(tiny, run / "final")
    (run / "recipe.yaml").write_text("model: {name: x}\n")
    contract = {"min_pixels": 784, "max_pixels": 56 * 56, "template_hash": template_hash()}
    write_json(run / "final" / "r1v.json", contract)
    options = local(bench, run, tmp_path / "a", min_pixels=None, max_pixels=None, limit=3)
    doc = evaluate(options)
    assert (doc["settings"]["min_pixels"], doc["settings"]["max_pixels"]) == (784, 56 * 56)
    tokens = [r["prompt_tokens"] for _, r in _lines(tmp_path / "a" / "predictions.jsonl")]
    doc = evaluate(local(bench, run, tmp_path / "b", min_pixels=None, max_pixels=140 * 140, limit=3))
    assert any("trained with 3136" in w for w in doc["warnings"])
    assert [r["prompt_tokens"] for _, r in _lines(tmp_path / "b" / "predictions.jsonl")] != tokens
    write_json(run / "final" / "r1v.json", contract | {"template_hash": "other"})
    with pytest.raises(UsageError, match="another model or with other settings"):  # the folder changed
        evaluate(options)
    options.out = tmp_path / "c"
    assert any("prompt template" in w for w in evaluate(options)["warnings"])


def test_a_lora_folder_is_evaluated_with_its_adapter(bench, tiny, tmp_path):
    import torch
    from peft import LoraConfig, get_peft_model
    from tiny_models import load_tiny

    model, _ = load_tiny(tiny)
    peft = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))
    with torch.no_grad():
        for name, weight in peft.named_parameters():
            if "lora_" in name:
                weight.normal_(0, 0.5)
    peft.save_pretrained(tmp_path / "lora")
    more = {"stage": "generate", "limit": 4}
    evaluate(local(bench, tmp_path / "lora", tmp_path / "a", base=str(tiny), **more))
    evaluate(local(bench, tiny, tmp_path / "b", **more))
    with_adapter, without = (
        [r["model_prediction"] for _, r in _lines(tmp_path / d / "predictions.jsonl")] for d in ("a", "b")
    )
    assert with_adapter != without


def test_an_endpoint_gets_figure_prompt_and_limits(bench, tmp_path, serve):
    import io

    from PIL import Image

    from r1vfree_cli.core.prompts import user_text

    server = serve(lambda prompt, body: "<think>x</think><answer>Yes</answer>")
    options = EvalOptions(
        endpoint=server.url, model="m", questions=str(bench / "HallusionBench.json"), images=bench,
        out=tmp_path / "e", min_pixels=784, max_pixels=56 * 56, max_new_tokens=7,
    )  # fmt: skip
    doc = evaluate(options)
    assert doc["counts"]["aAcc"] == doc["baselines"]["always_yes"]["counts"]["aAcc"]
    assert sorted(server.prompts) == sorted(user_text(r["question"], int(r["visual_input"] != "0")) for r in records())
    pictures = 0
    for body in server.bodies:
        parts = body["messages"][0]["content"]
        assert body["max_tokens"] == 7 and body["temperature"] == 0
        if len(parts) == 2:
            assert parts[0]["type"] == "image_url"  # the image first, as in training
            data = base64.b64decode(parts[0]["image_url"]["url"].partition(",")[2])
            width, height = Image.open(io.BytesIO(data)).size
            assert 784 <= width * height <= 56 * 56 and width % 28 == height % 28 == 0
            pictures += 1
    assert pictures == sum(r["visual_input"] != "0" for r in records())
    evaluate(options)
    assert len(server.prompts) == len(records())


def test_protocol_vlmevalkit_scores_the_image_questions(bench, tmp_path):
    file = prediction_file(tmp_path / "p.json")
    doc = evaluate(EvalOptions(predictions=file, protocol="vlmevalkit", out=tmp_path / "v"))
    n = sum(r["visual_input"] != "0" for r in records())
    assert doc["n_questions"] == n and doc["protocol"] == "vlmevalkit"
    evaluate(EvalOptions(predictions=file, out=tmp_path / "o"))
    with pytest.raises(UsageError, match="protocol"):
        evaluate(EvalOptions(predictions=file, out=tmp_path / "o", compare_to=tmp_path / "v"))
    with pytest.raises(UsageError, match="protocol"):
        evaluate(EvalOptions(out=tmp_path / "o", stage="score", protocol="vlmevalkit"))


# --- chat judge ------------------------------------------------------------------------------------------------


def test_chat_judge_asks_once_and_same_only_where_it_is_read(tmp_path, serve):
    server = serve(judge_by_content)
    file = prediction_file(tmp_path / "p.json", "<think>hidden</think><answer>Yes {question}</answer>")
    doc = evaluate(EvalOptions(predictions=file, out=tmp_path / "e", **chat(server)))
    n = len(records())
    shown = {(r["question"], r["gt_answer_details"]) for r in records()}
    assert len(shown) < n  # what is shown twice is asked once
    asked = [p for p in server.prompts if "two students" not in p]
    assert len(asked) == len(shown) and not any("hidden" in p for p in server.prompts)
    items = {i.id: i for i in BENCHMARK.load_judged([tmp_path / "e" / "judged.json"])[0]}
    codes = score.originals(items.values())
    assert any(score.reads_same(i, codes[i.pair_key]) for i in items.values())
    assert len(server.prompts) == len(asked) + 1  # all answers are equal texts here
    for i in items.values():
        assert (i.same is not None) == score.reads_same(i, codes[i.pair_key])
    assert doc["settings"]["judge"]["answered_as"] == {"gpt-x-0613": n}
    assert doc["diagnostics"]["unlabelled"] == 0 and "judge_agreement" in doc
    calls = len(server.prompts)
    assert evaluate(EvalOptions(predictions=file, out=tmp_path / "e", **chat(server)))["counts"] == doc["counts"]
    assert evaluate(EvalOptions(predictions=file, out=tmp_path / "f", **chat(server)))["counts"] == doc["counts"]
    assert len(server.prompts) == calls
    whole = evaluate(EvalOptions(predictions=file, out=tmp_path / "g", judge_input="reply", **chat(server)))
    assert any("hidden" in p for p in server.prompts[calls:]) and whole["settings"]["judge"]["judge_input"] == "reply"


@pytest.mark.parametrize(
    "reply", ["<think>yes</think>", "<think>The answer is yes", "<think>a</think><answer></answer>", " "]
)
def test_a_reply_that_says_nothing_is_never_right_and_never_judged(reply, tmp_path, serve):
    """Unclear counts as right for a VS question without a figure: nothing but reasoning is no unclear answer."""
    rows = [r | {"model_prediction": reply if i % 3 == 0 else "Yes"} for i, r in enumerate(records())]
    write_json(tmp_path / "p.json", rows)
    silent = sum(r["model_prediction"] == reply for r in rows)
    options = {"predictions": tmp_path / "p.json", "max_empty": 100}
    with pytest.raises(DataError, match=f"{silent} of {len(rows)} replies are empty"):
        evaluate(EvalOptions(**options | {"max_empty": 10}, out=tmp_path / "refused"))
    server = serve(lambda prompt, body: "unclear" if "a careful teacher marking" in prompt else "same")
    for judge in ({}, chat(server), chat(server) | {"judge_input": "reply"}):
        out = tmp_path / f"e{len(judge)}"
        doc = evaluate(EvalOptions(**options, **judge, out=out))
        assert doc["empty"]["n"] == silent and any("replies are empty" in w for w in doc["warnings"])
        judged = BENCHMARK.load_judged([out / "judged.json"])
        assert {item.code for item, record in zip(*judged) if record["model_prediction"] == reply} == {score.WRONG}
    assert server.prompts and not any(f"answer: {reply}" in p for p in server.prompts)


def test_a_chat_judge_is_not_shown_reasoning_where_there_are_no_answer_tags(tmp_path, serve):
    server = serve(judge_by_content)
    file = prediction_file(tmp_path / "p.json", "<think>hidden</think> Yes {question}")
    evaluate(EvalOptions(predictions=file, out=tmp_path / "e", **chat(server)))
    assert server.prompts and not any("hidden" in p for p in server.prompts)


def test_judging_again_keeps_what_was_spent_and_how_the_replies_were_made(bench, tmp_path, serve, monkeypatch):
    """Calls and tokens of all attempts are counted, scores of other verdicts go, the first command line stays."""
    broken = ["Number 01"]
    server = serve(lambda p, b: 500 if any(t in p for t in broken) else judge_by_content(p, b))
    out = tmp_path / "e"
    monkeypatch.setattr(sys, "argv", ["r1v", "first"])
    evaluate(EvalOptions(predictions=prediction_file(tmp_path / "p.json"), out=out, stage="judge"))
    evaluate(EvalOptions(out=out, stage="score"))
    monkeypatch.setattr(sys, "argv", ["r1v", "second"])
    options = EvalOptions(out=out, stage="judge", **chat(server))
    estimated = evaluate(EvalOptions(out=out, estimate=True, stage="judge", **chat(server)))["estimate"]["judge"]
    assert (out / "scores.json").exists()
    fails(3, options, "unjudged")
    assert not (out / "scores.json").exists()  # it was the rule's
    broken.clear()
    assert evaluate(options)["unjudged"] == 0
    for _ in range(2):
        evaluate(options)
        judge = evaluate(EvalOptions(out=out, stage="score"))["settings"]["judge"]
        assert judge["calls"] == len(server.prompts) and judge["prompt_tokens"] == 10 * len(server.prompts)
    assert (out / "scores.json").exists()
    first_calls = [p for p in server.prompts if "two students" not in p]
    assert estimated["calls"] == len(first_calls) < len(records())
    commands = json.loads((out / "eval.json").read_text())["commands"]
    assert commands["judge"] == ["r1v", "second"]
    generated = EvalOptions(
        endpoint=serve(lambda p, b: "Yes").url, model="m", questions=str(bench / "HallusionBench.json"), images=bench,
        out=tmp_path / "g",
    )  # fmt: skip
    evaluate(generated)
    monkeypatch.setattr(sys, "argv", ["r1v", "third"])
    evaluate(EvalOptions(out=tmp_path / "g", stage="judge"))
    state = json.loads((tmp_path / "g" / "eval.json").read_text())
    assert state["commands"] == {"generate": ["r1v", "second"], "judge": ["r1v", "third"]}
    assert state["asked"]["images"] == str(bench)


def test_a_failed_call_is_unjudged_never_unclear_and_asked_again(tmp_path, serve):
    broken = {"Number 01", "Number 10"}
    seen: list[str] = []

    def reply(prompt, body):
        if any(b in prompt for b in broken):
            seen.append(prompt)
            return 500 if "Number 01" in prompt else "I would rather not say"
        return judge_by_content(prompt, body)

    server = serve(reply)
    options = EvalOptions(predictions=prediction_file(tmp_path / "p.json"), out=tmp_path / "e", **chat(server))
    with pytest.raises(DataError, match="unjudged") as e:
        evaluate(options)
    assert e.value.exit_code == 3 and "no label" in str(e.value.details)
    assert not (tmp_path / "e" / "scores.json").exists()
    asked_again = {
        (r["question"], r["gt_answer_details"]) for r in records() if any(b in r["question"] for b in broken)
    }
    failed = sum(any(b in r["question"] for b in broken) for r in records())
    options.allow_unjudged = True
    doc = evaluate(options)
    assert doc["unjudged"] >= failed
    options.allow_unjudged = False
    broken.clear()
    calls = len(server.prompts)
    doc = evaluate(options)
    assert doc["unjudged"] == 0
    again = [p for p in server.prompts[calls:] if "two students" not in p]
    assert len(again) == len(asked_again)


def test_malformed_and_cut_replies_cost_their_own_question_only(bench, tmp_path, serve):
    """A gateway's page, half a JSON, a list for a text, a label in a judge's unfinished thought: calls that failed."""
    bad = {
        "Number 00": b"<html>busy</html>",
        "Number 01": b'{"choices": [{"message": {"content": ["correct"]}}]}',
        "Number 10": "It seems correct so far ...",
    }

    def reply(prompt, body):
        found = next((text for number, text in bad.items() if number in prompt), None)
        return judge_by_content(prompt, body) if found is None else found

    server = serve(reply)
    hit = sum(any(number in r["question"] for number in bad) for r in records())
    options = EvalOptions(predictions=prediction_file(tmp_path / "p.json"), out=tmp_path / "e", **chat(server))
    error = fails(3, options, "unjudged", "unparsable", "truncated")
    assert f": {hit} questions" in error.message
    asking = EvalOptions(
        endpoint=server.url, model="m", questions=str(bench / "HallusionBench.json"), images=bench,
        out=tmp_path / "g", max_retries=0,
    )  # fmt: skip
    error = fails(3, asking, "unparsable")
    kept = {r["id"] for _, r in _lines(tmp_path / "g" / "predictions.jsonl")}
    bad.clear()
    server.prompts.clear()
    assert evaluate(options)["unjudged"] == 0
    server.prompts.clear()
    evaluate(asking)
    assert 0 < len(kept) == len(records()) - len(server.prompts)


def test_temperature_is_left_out_where_it_is_refused(tmp_path, serve):
    server = serve(lambda prompt, body: 400 if "temperature" in body else judge_by_content(prompt, body))
    options = EvalOptions(predictions=prediction_file(tmp_path / "p.json"), out=tmp_path / "e", **chat(server))
    assert evaluate(options)["unjudged"] == 0


def test_estimate_spends_nothing(bench, tmp_path, serve, capsys):
    server = serve(judge_by_content)
    options = EvalOptions(
        endpoint=server.url, model="m", questions=str(bench / "HallusionBench.json"), images=bench,
        out=tmp_path / "e", estimate=True, **chat(server),
    )  # fmt: skip
    doc = evaluate(options)
    assert doc["estimate"]["generate"]["calls"] == doc["estimate"]["judge"]["calls"] == len(records())
    assert doc["estimate"]["generate"]["image_tokens"] > 0
    print_scores(doc)
    assert server.prompts == [] and not (tmp_path / "e").exists()


# --- kills -----------------------------------------------------------------------------------------------------


def _lines(path: Path):
    from r1vfree_cli.core.files import read_jsonl

    return list(read_jsonl(path))


def start(options: dict, env: dict | None = None) -> subprocess.Popen:
    """evaluate() in a process of its own, in a group of its own."""
    code = (
        "import json, sys\nfrom pathlib import Path\n"
        "from r1vfree_cli.eval.runner import EvalOptions, evaluate\n"
        "o = json.loads(sys.argv[1])\n"
        "o = {k: Path(v) if k in ('out', 'images', 'predictions') else v for k, v in o.items()}\n"
        "evaluate(EvalOptions(**o))\n"
    )
    return subprocess.Popen(
        [sys.executable, "-c", code, json.dumps(options)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", **(env or {})},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )


def kill_when(process: subprocess.Popen, condition) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert process.poll() is None, process.stderr.read().decode()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    time.sleep(0.5)  # the server finishes what was in flight


def test_sigkill_while_judging_repeats_no_finished_call(tmp_path, serve):
    server = serve(judge_by_content, delay=0.1)
    out = tmp_path / "e"
    options = {
        "predictions": str(prediction_file(tmp_path / "p.json")), "out": str(out), "concurrency": 2, **chat(server),
    }  # fmt: skip
    file = out / "judgements.jsonl"
    for least in (4, 10):
        kill_when(start(options), lambda: file.is_file() and file.read_bytes().count(b"\n") >= least)  # noqa: B023
    finished = {r["raw"] and r["id"] for _, r in _lines(file)}
    shutil.rmtree(tmp_path / "cache")  # the eval dir alone is enough to go on from
    before = len(server.prompts)
    doc = evaluate(EvalOptions(predictions=tmp_path / "p.json", out=out, concurrency=2, **chat(server)))
    assert doc["unjudged"] == 0
    again = [p for p in server.prompts[before:] if "two students" not in p]
    assert len(again) <= len(records()) - len(finished)
    # Only calls that were in flight at a kill, two each time, may have been made twice.
    assert len([p for p in server.prompts if "two students" not in p]) <= len(records()) + 4


def test_sigkill_while_asking_an_endpoint_repeats_no_finished_answer(bench, tmp_path, serve):
    server = serve(lambda prompt, body: "Yes", delay=0.1)
    out = tmp_path / "e"
    options = {
        "endpoint": server.url, "model": "m", "questions": str(bench / "HallusionBench.json"), "images": str(bench),
        "out": str(out), "concurrency": 1,
    }  # fmt: skip
    file = out / "predictions.jsonl"
    kill_when(start(options), lambda: file.is_file() and file.read_bytes().count(b"\n") >= 5)
    with open(file, "ab") as f:
        f.write(b'{"id": "VD_ocr')  # what a kill in the middle of a write leaves
    finished = [r["question"] for _, r in _lines(file)]
    before = len(server.prompts)
    evaluate(EvalOptions(**{**options, "out": out, "images": bench}))
    assert len(server.prompts) - before == len(records()) - len(finished)
    assert len(_lines(file)) == len(records())


def test_sigkill_while_generating_repeats_no_finished_question(bench, tiny, tmp_path):
    from r1vfree_cli.eval import generate

    out = tmp_path / "e"
    options = local(bench, tiny, out, batch_size=2, max_new_tokens=32, limit=12)
    file = out / "predictions.jsonl"
    plain = {k: str(v) if isinstance(v, Path) else v for k, v in vars(options).items() if v is not None}
    kill_when(start(plain), lambda: file.is_file() and file.read_bytes().count(b"\n") >= 4)
    finished = {r["id"] for _, r in _lines(file)}
    asked = []
    original = generate.Generator.run

    def counted(self, jobs, batch_size, done):
        asked.extend(job.id for job in jobs)
        return original(self, jobs, batch_size, done)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(generate.Generator, "run", counted)
        evaluate(options)
    assert not finished & set(asked) and len(finished) + len(asked) == 12
    straight = local(bench, tiny, tmp_path / "straight", batch_size=3, max_new_tokens=32, limit=12)
    evaluate(straight)
    a, b = ({r["id"]: r["model_prediction"] for _, r in _lines(d / "predictions.jsonl")} for d in (out, straight.out))
    assert a == b


# --- bad input -------------------------------------------------------------------------------------------------


def fails(code: int, options: EvalOptions | dict, *parts: str) -> R1VError:
    with pytest.raises(R1VError) as e:
        evaluate(options if isinstance(options, EvalOptions) else EvalOptions(**options))
    assert e.value.exit_code == code, e.value
    text = " ".join([e.value.message, *e.value.details, e.value.hint or ""])
    for part in parts:
        assert part in text, text
    return e.value


def test_wrong_options_are_refused_before_any_work(tmp_path):
    file = judged_file(tmp_path / "r.json")
    missing = tmp_path / "none.json"
    fails(2, EvalOptions(judged=missing, fail_under=["aAc=50"]), "aAc", "did you mean aAcc")
    fails(2, EvalOptions(judged=missing, fail_under=["aAcc=high"]), "percentage")
    fails(2, EvalOptions(judged=missing, fail_under=["aAcc"]), "percentage")
    fails(2, EvalOptions(judged=file, fail_under=["aAcc=1"], estimate=True), "needs scores")
    fails(2, EvalOptions(), "nothing to evaluate")
    fails(2, EvalOptions(judged=file, checkpoint="x/y"), "exclude each other")
    fails(2, EvalOptions(endpoint="http://localhost/v1"), "--model")
    for seconds in (0, -1, float("nan")):
        fails(2, {"judged": file, "timeout_s": seconds}, "--timeout")
    fails(2, EvalOptions(predictions=file, judge="chat"), "--judge-model")
    fails(2, EvalOptions(endpoint="http://localhost/v1", model="m", base="b"), "--base")
    fails(2, EvalOptions(predictions=file, judge="chat", judge_model="m", protocol="vlmevalkit"), "vlmevalkit")
    fails(2, EvalOptions(judged=file, protocol="vlmevalkit"), "--predictions")
    fails(2, EvalOptions(predictions=file, judge="chat", judge_model="m", out=tmp_path / "e"), "OPENAI_API_KEY")
    fails(2, EvalOptions(judged=file, compare_to=tmp_path / "nothing"), "--compare-to")
    fails(3, EvalOptions(judged=missing), "cannot read")


def test_a_vllm_that_answers_no_question_is_named(bench, tiny, tmp_path, monkeypatch):
    from r1vfree_cli.eval import predict

    def refuse(w, todo, keep):
        for job in todo:
            keep(job, None, unanswered="refused", reason="too long")

    monkeypatch.setattr(predict, "_vllm", refuse)
    monkeypatch.setattr(predict.vllm, "executable", lambda: "vllm")
    options = local(bench, tiny, tmp_path / "e", vllm=True, count_unanswered_wrong=True, limit=2)
    fails(3, options, "none of 2 questions got an answer from vLLM")


def test_a_judge_that_cannot_be_asked_is_told_before_anything_is_generated(bench, tiny, tmp_path):
    out = tmp_path / "e"
    more = {"judge": "chat", "judge_model": "m"}
    fails(2, local(bench, tiny, out, **more), "OPENAI_API_KEY")
    more["judge_base_url"] = "http://127.0.0.1:9/v1"
    fails(2, local(bench, tiny, out, judge_prompt=tmp_path / "none.txt", **more), "none.txt")
    tsv = str(tsv_layout(bench, tmp_path / "hb.tsv"))  # it has no reference details
    fails(2, local(bench, tiny, out, questions=tsv, images=None, **more), "gt_answer_details")
    assert not out.exists()


def test_bad_judged_files(tmp_path):
    rows = json.loads(judged_file(tmp_path / "r.json").read_text())
    for name, content, part in (
        ("twice", [*rows, rows[0]], "duplicate"),
        ("object", {"a": 1}, "list"),
        ("code", [rows[0] | {score.CODE: "maybe"}], score.CODE),
        ("open", [rows[0] | {score.CODE: None}], "unjudged"),
    ):
        write_json(tmp_path / f"{name}.json", content)
        fails(3, EvalOptions(judged=tmp_path / f"{name}.json"), part)
    (tmp_path / "broken.json").write_text("[{")
    fails(3, EvalOptions(judged=tmp_path / "broken.json"), "cannot read")
    doc = evaluate(EvalOptions(judged=tmp_path / "open.json", allow_unjudged=True))
    assert doc["unjudged"] == 1 and doc["counts"]["aAcc"] == [0, 1]


def test_other_question_sets(bench, tmp_path):
    official = str(bench / "HallusionBench.json")
    rows = [r | {"model_prediction": "Yes"} for r in records()]
    for name, content, part in (
        ("unknown", [*rows, rows[0] | {"set_id": "99"}], "not in the question set"),
        ("missing", rows[1:], "no prediction"),
        ("twice", [*rows, rows[0]], "twice"),
        ("text", [rows[0] | {"question": "Other?"}, *rows[1:]], "another text"),
        ("empty", [{k: v for k, v in rows[0].items() if k != "model_prediction"}], "model_prediction"),
    ):
        write_json(tmp_path / f"{name}.json", content)
        fails(3, EvalOptions(predictions=tmp_path / f"{name}.json", questions=official, out=tmp_path / name), part)
    fails(
        3,
        EvalOptions(judged=judged_file(tmp_path / "j.json"), questions=str(_half(bench, tmp_path))),
        "another question set",
    )
    evaluate(EvalOptions(judged=judged_file(tmp_path / "r.json"), out=tmp_path / "whole"))
    write_json(tmp_path / "part.json", json.loads((tmp_path / "r.json").read_text())[2:])
    fails(3, EvalOptions(judged=tmp_path / "part.json", compare_to=tmp_path / "whole"), "another question set")


def _half(bench: Path, tmp_path: Path) -> Path:
    write_json(tmp_path / "half.json", records()[::2])
    return tmp_path / "half.json"


def test_missing_figures_and_bad_ones(bench, tmp_path):
    base = {"endpoint": "http://127.0.0.1:9/v1", "model": "m", "out": tmp_path / "e"}
    official = str(bench / "HallusionBench.json")
    empty = tmp_path / "empty"
    empty.mkdir()
    fails(3, EvalOptions(questions=official, images=empty, **base), "missing", "0_0.png")
    fails(2, EvalOptions(questions=official, images=tmp_path / "no.zip", **base), "neither a folder nor a zip")
    fails(2, EvalOptions(questions=str(tmp_path / "no.json"), **base), "no questions at")
    fails(2, EvalOptions(questions="data/HallusionBenhc.json", **base), "no questions at")  # no hub name either
    shutil.copytree(bench / "hallusion_bench", tmp_path / "bad")
    (tmp_path / "bad" / "VD" / "ocr" / "0_0.png").write_bytes(b"no image")
    fails(3, EvalOptions(questions=official, images=tmp_path / "bad", **base), "VD_ocr_0_0", "not an image")
    assert not (tmp_path / "e" / "predictions.jsonl").exists()


def test_endpoints_that_are_down_or_refuse(bench, tmp_path, serve):
    file = prediction_file(tmp_path / "p.json")
    more = {"judge": "chat", "judge_model": "m", "max_retries": 0, "out": tmp_path / "e"}
    fails(2, EvalOptions(predictions=file, judge_base_url="http://127.0.0.1:9/v1", **more), "no endpoint at")
    for status in (401, 403, 404):
        server = serve(lambda prompt, body, status=status: status)
        fails(2, EvalOptions(predictions=file, judge_base_url=server.url, **more), str(status))
    options = EvalOptions(
        endpoint="http://127.0.0.1:9/v1", model="m", questions=str(bench / "HallusionBench.json"), images=bench,
        out=tmp_path / "g", max_retries=0,
    )  # fmt: skip
    fails(2, options, "no endpoint at")


def test_checkpoints_that_are_no_model(bench, tmp_path):
    run = tmp_path / "run"
    (run / "checkpoints" / "checkpoint-20").mkdir(parents=True)
    (run / "recipe.yaml").write_text("{}")
    fails(3, local(bench, run, tmp_path / "e"), "no final/", "no complete checkpoint")
    for name in ("config.json", "model.safetensors", "trainer_state.json"):
        (run / "checkpoints" / "checkpoint-20" / name).touch()
    fails(3, local(bench, run, tmp_path / "e"), "no final/", "checkpoint-20")
    fails(3, local(bench, tmp_path, tmp_path / "e"), "holds no model")
    fails(3, local(bench, tmp_path / "nowhere", tmp_path / "e"), "no checkpoint")
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    fails(3, local(bench, model, tmp_path / "e"), "model")
    lora = tmp_path / "lora"
    lora.mkdir()
    (lora / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    fails(3, local(bench, lora, tmp_path / "e"), "adapter without its weights")
    (lora / "adapter_model.bin").touch()
    fails(3, local(bench, lora, tmp_path / "e"), "adapter_model.bin is a pickle")
    (lora / "adapter_model.safetensors").touch()
    fails(3, local(bench, lora, tmp_path / "e"), "base")


def test_stages_need_what_came_before(tmp_path):
    fails(3, EvalOptions(out=tmp_path / "e", stage="judge"), "no predictions")
    file = prediction_file(tmp_path / "p.json")
    done = evaluate(EvalOptions(predictions=file, out=tmp_path / "e", stage="judge"))
    assert done["stage"] == "judge"
    doc = evaluate(EvalOptions(out=tmp_path / "e", stage="score"))
    assert doc["n_questions"] == len(records())
    (tmp_path / "e" / "judgements.jsonl").unlink()
    fails(3, EvalOptions(out=tmp_path / "e", stage="score"), "no judgements")
    prediction_file(file, "<answer>No</answer>")
    fails(2, EvalOptions(predictions=file, out=tmp_path / "e"), "another model or with other settings")
    assert reading.read_yes_no("<answer>No</answer>") == "no"
