"""`vllm serve` as r1v starts it: one server for a judge, which is killed at the end, and one for a checkpoint, asked by
an evaluation, a chat judge and TRL's server mode.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
from contextlib import contextmanager

import psutil
import pytest
import requests
import yaml
from rollouts import LIMITS, SAME, TOKENS, G, differences, make_trainer, prompts_of
from tiny_models import draw, save_tiny
from trl.generation.vllm_client import VLLMClient

from r1vfree_cli.config import recipes
from r1vfree_cli.config.rewards import FeedbackReward
from r1vfree_cli.core.errors import GuardStop
from r1vfree_cli.core.files import read_json
from r1vfree_cli.eval.options import EvalOptions
from r1vfree_cli.eval.predict import read_predictions
from r1vfree_cli.eval.runner import evaluate
from r1vfree_cli.launch import plan as plans
from r1vfree_cli.launch import processes, vllm
from r1vfree_cli.models import family
from r1vfree_cli.rewards.registry import build_feedback
from r1vfree_cli.tiny import models as tiny

ROWS = 64
SAME_SCORE = 1e-3  # largest difference of P(Yes)
# One process less; what TRL's documentation asks of the server of its server mode.
FLAGS = ["--distributed-executor-backend", "uni", "--num-gpu-blocks-override", "256"]
SCALE_OUT = ["--enable-scale-out", "--logprobs-mode", "processed_logprobs"]


@pytest.fixture(scope="module", autouse=True)
def flags():
    with pytest.MonkeyPatch.context() as patch:
        for name in ("serve_command", "policy_arguments"):
            more = FLAGS if name == "serve_command" else SCALE_OUT
            made = getattr(vllm, name)
            patch.setattr(vllm, name, lambda *a, made=made, more=more, **k: [*made(*a, **k), *more])
        patch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # else "uni" is refused
        patch.setenv("VLLM_SERVER_DEV_MODE", "1")
        yield


# --- a judge ---------------------------------------------------------------------------------------------------


def recipe_of(model, tmp_path, **serve):
    feedback = {"name": "feedback", "backend": "classify", "serve": {"engine": "vllm", "model": str(model)} | serve}
    document = yaml.safe_load(recipes.find("grpo", "tiny").read_text()) | {"rewards": [feedback]}
    document["model"] |= {"min_pixels": LIMITS[0], "max_pixels": LIMITS[1]}
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(document))
    return recipes.load("grpo", str(file), [])


def scores(reward: FeedbackReward, url: str | None, tmp_path, rows=ROWS) -> list[float]:
    rng = random.Random(0)
    words = ("red", "two squares", "Yes", "No", "a blue circle to the left of it", "green")
    problems = ("What colour is the square?", "How many squares are there?", "Is there a circle?")
    judge = build_feedback(reward, served_url=url, cache_root=tmp_path / "cache", pixels=LIMITS)
    try:
        found = asyncio.run(
            judge(
                prompts=[None] * rows,
                completions=[
                    [{"role": "assistant", "content": f"<think>so</think><answer>{rng.choice(words)} {i}</answer>"}]
                    for i in range(rows)
                ],
                images=[[draw(i, (56 + 28 * (i % 4), 84 if i % 3 else 200))] for i in range(rows)],
                problem=[problems[i % 3] for i in range(rows)],
            )
        )
        assert None not in found, judge.failures
        return found
    finally:
        judge.close()


def test_a_judge_on_vllm_scores_as_the_local_one_and_is_started_again_when_killed(tmp_path):
    """An untrained tiny judge: the tokens of Yes and No, and scores of all sizes."""
    processor = tiny.make_processor()
    tiny.make_judge(processor, 0, steps=0).save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    recipe = recipe_of(tmp_path / "model", tmp_path)
    (reward,) = recipe.judges
    with processes.serving(recipe, tmp_path / "logs") as server:
        served = scores(reward, server.url, tmp_path)
        first = psutil.Process(server.process.pid)
        group = [first, *first.children(recursive=True)]
        os.kill(first.pid, signal.SIGKILL)
        server.process.wait()
        server.watch()
        _, alive = psutil.wait_procs(group, timeout=20)
        assert len(group) > 1 and not [p for p in alive if p.status() != psutil.STATUS_ZOMBIE]
        assert server.process.poll() is None and server.process.args[0] == vllm.executable()
    here = scores(FeedbackReward(name="feedback", backend="local", model=str(tmp_path / "model")), None, tmp_path)
    assert max(here) - min(here) > 20 * SAME_SCORE
    assert max(abs(a - b) for a, b in zip(here, served, strict=True)) < SAME_SCORE
    assert b"POST /classify" in (tmp_path / "logs" / "reward-server.log").read_bytes()


# --- a checkpoint ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    """(folder, plan, running server) of an untrained policy, started as an evaluation starts it."""
    base = tmp_path_factory.mktemp("policy")
    folder = save_tiny(base / "model", width=128)
    port = plans.free_port()
    plan = plans.vllm_policy_plan(str(folder), None, port, pixels=LIMITS, on_cpu=True, dtype="auto")
    with processes.server(plan, port, base / "vllm-server.log", "vLLM server") as server:
        yield folder, plan, server


def test_a_checkpoint_answers_on_vllm_as_here(policy, tmp_path, monkeypatch):
    """200 questions, greedy, float32; its generation config asks for a repetition penalty, which counts nowhere."""
    folder, running, server = policy

    @contextmanager
    def the_same(plan, port, log, what):
        strip = {str(port), server.url.rpartition(":")[2]}
        assert [a for a in plan.argv if a not in strip] == [a for a in running.argv if a not in strip]
        assert plan.env == running.env
        yield server

    monkeypatch.setattr(processes, "server", the_same)
    (tmp_path / "val2014").mkdir()
    for i in range(67):
        draw(i, (84 + 28 * (i % 3), 56 + 28 * (i % 4))).save(tmp_path / "val2014" / f"COCO_{i}.jpg")
    for part in ("random", "popular", "adversarial"):
        rows = [
            {
                "question_id": i + 1,
                "image": f"COCO_{i}.jpg",
                "text": f"Is there a {part} thing no. {i}?",
                "label": "yes",
            }
            for i in range(67)
        ]
        (tmp_path / f"coco_pope_{part}.json").write_text("".join(json.dumps(row) + "\n" for row in rows))
    told = {"benchmark": "pope", "checkpoint": str(folder), "questions": str(tmp_path), "stage": "generate"}
    told |= {"images": tmp_path / "val2014", "min_pixels": LIMITS[0], "max_pixels": LIMITS[1], "max_new_tokens": 8}
    told |= {"concurrency": 67}
    replies = []
    for on_vllm in (True, False):
        out = tmp_path / str(on_vllm)
        evaluate(EvalOptions(**told, vllm=on_vllm, out=out, device="cpu"))
        found = read_predictions(out / "predictions.jsonl")
        # an untrained model stops within a character, whose bytes vLLM holds back
        told_of = {id_: (r["model_prediction"].rstrip("\ufffd"), r["completion_tokens"]) for id_, r in found.items()}
        replies.append(told_of)
        engine = read_json(out / "eval.json")["identity"].get("engine")
        assert engine == ("vllm" if on_vllm else None)
    served, here = replies
    assert len(here) == 201 and served.keys() == here.keys() and len(set(here.values())) > 50
    assert sum(served[id_] == here[id_] for id_ in here) >= 0.99 * len(here)


def test_a_chat_judge_is_held_to_json_by_vllm(policy, tmp_path):
    """The grammar lets an untrained model write a verdict; "}" is made likely, else it goes on with digits.

    The judge asks for more tokens than this server has room for, which it learns.
    """
    folder, _, server = policy
    close = json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"]["}"]
    asked = {"base_url": f"{server.url}/v1", "model": vllm.POLICY, "request": {"logit_bias": {str(close): 60}}}
    reward = FeedbackReward(name="feedback", backend="chat", **asked)
    found = scores(reward, server.url, tmp_path, rows=8)
    assert all(0 <= score <= 1 for score in found)


def test_servers_mode_of_trl_asks_for_the_trainers_prompt(policy, tmp_path, monkeypatch):
    """What TRL sends, to a real server: expanded token ids with features placed on them, so that nothing is expanded
    twice. Weights go by NCCL, which needs GPUs: they are those of the folder here, and who gets them is written down.
    """
    folder, _, server = policy
    sent, weights = [], []

    def update(client, metadata, named):
        weights.append((metadata, [name for name, _ in named]))

    post = VLLMClient._post
    monkeypatch.setattr(VLLMClient, "init_communicator", lambda *a, **k: None)
    monkeypatch.setattr(VLLMClient, "update_named_params", update)
    monkeypatch.setattr(
        VLLMClient, "_post", lambda c, url, **k: (sent.append((url, k.get("json"))), post(c, url, **k))[1]
    )
    trainer = make_trainer(folder, tmp_path, vllm_mode="server", vllm_server_base_url=server.url)
    sampler = trainer.vllm_generation
    sampler.sync_weights()  # and caches are dropped: the server knows these paths
    assert [name for name, *_ in weights[0][0]] == weights[0][1] and len(weights[0][1]) > 50
    assert sent.pop()[0].endswith("/reset_prefix_cache") and not sent

    ids, images = prompts_of(trainer)
    repeated, shown = [x for x in ids for _ in range(G)], [x for x in images for _ in range(G)]
    prompts, sampled, logprobs, _ = sampler.generate(repeated, shown, G)
    assert [list(x) for x in prompts] == repeated and len(sampled) == len(repeated)
    told = {tuple(body["token_ids"]): body for url, body in sent if url.endswith("/inference/v1/generate")}
    config, image_token = trainer.model.config, trainer.processing_class.image_token_id
    banned = family.of(config).visual_tokens(config, trainer._tokenizer)
    assert len(told) == len(ids)
    for prompt, pictures in zip(ids, images, strict=True):
        body = told[tuple(prompt)]
        places = body["features"]["mm_placeholders"]["image"] if pictures else []
        assert [p["length"] for p in places] == sampler._image_tokens(pictures)
        assert all(set(prompt[p["offset"] : p["offset"] + p["length"]]) == {image_token} for p in places)
        assert sum(p["length"] for p in places) == prompt.count(image_token)
        how = body["sampling_params"]
        assert how["n"] == G and how["max_tokens"] == TOKENS and how["temperature"] == 1
        assert set(how["stop_token_ids"]) == set(trainer.eos_token_ids)
        assert how["bad_words"] == sorted(banned)
    assert not {*banned.values()} & {t for row in sampled for t in row}
    assert differences(trainer, repeated, shown, sampled, logprobs).max() < SAME

    monkeypatch.setattr(sampler.vllm_client, "session", requests.Session())  # TRL's asks for a minute
    monkeypatch.setattr(sampler.vllm_client, "base_url", "http://127.0.0.1:9")
    with pytest.raises(GuardStop, match="vLLM went away while it sampled"):
        sampler.generate(repeated, shown, G)
    with pytest.raises(GuardStop, match="vLLM server does not answer before step 1"):
        trainer.train()
    assert trainer.stopping  # on all ranks, which then write a checkpoint together
