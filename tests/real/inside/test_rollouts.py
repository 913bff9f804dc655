"""Rollouts drawn by a real vLLM in the trainer's process: its prompt is the trainer's, and so are its log-probabilities.

Runs in the environment of ../environment.py. Everything in float32, so that equal means equal to rounding.
"""

from __future__ import annotations

import gc

import pytest
import torch
from rollouts import SAME, TOKENS, G, differences, engine, make_trainer, prompts_of
from tiny_models import KINDS, save_tiny
from trl.generation import vllm_generation

from r1vfree_cli.config import recipes
from r1vfree_cli.core.errors import R1VError, UsageError
from r1vfree_cli.models import family
from r1vfree_cli.run.run_dir import RunDir
from r1vfree_cli.training import vllm_sampler
from r1vfree_cli.training.grpo import grpo_config

COMPILED = "qwen2_5_vl"  # dynamo traces it as it does for users; what inductor does then would take 15 s more


@pytest.fixture(scope="module", params=KINDS)
def trainer(request, tmp_path_factory):
    base = tmp_path_factory.mktemp(request.param)
    traced = {"compilation_config": {"mode": 2, "backend": "eager"}}
    with engine(**(traced if request.param == COMPILED else {"enforce_eager": True})):
        made = make_trainer(save_tiny(base / "model", request.param, width=128), base / "out")
    yield made
    del made.vllm_generation
    gc.collect()


def test_the_engine_receives_the_trainers_prompt(trainer):
    ids, images = prompts_of(trainer)
    sampler = trainer.vllm_generation
    sampler.sync_weights()
    model = sampler.llm.llm_engine.model_executor.driver_worker.model_runner.model
    seen: list[int] = []
    embed = model.embed_multimodal

    def counted(**kwargs):
        features = embed(**kwargs)
        seen.extend(len(x) for x in features)
        return features

    model.embed_multimodal = counted
    repeated, shown = [x for x in ids for _ in range(G)], [x for x in images for _ in range(G)]
    prompt_ids, sampled, logprobs, _ = sampler.generate(repeated, shown, G)
    assert [list(x) for x in prompt_ids] == repeated
    image_token = trainer.processing_class.image_token_id
    assert sorted(seen) == sorted(n for row in images for n in sampler._image_tokens(row))  # each image encoded once
    assert sum(seen) == sum(x.count(image_token) for x in ids)
    assert differences(trainer, repeated, shown, sampled, logprobs).max() < SAME

    model.embed_multimodal = embed
    with torch.no_grad():
        for weight in trainer.model.parameters():
            weight += 0.05 * torch.randn_like(weight)
    sampler.sync_weights()
    _, again, logprobs, _ = sampler.generate(ids, images, 1)
    assert differences(trainer, ids, images, again, logprobs).max() < SAME  # new weights arrived, the tower's too


def test_stop_and_banned_tokens_are_the_trainers(trainer):
    """Each made likely: an end token ends a completion, those that the checkpoint's files do not name too; no visual
    token is drawn.
    """
    ids, images = prompts_of(trainer)
    sampler, ends = trainer.vllm_generation, trainer.eos_token_ids
    assert len(ends) == 3
    banned = sorted(
        set(family.of(trainer.model.config).visual_tokens(trainer.model.config, trainer._tokenizer).values())
    )
    for end in ends:
        sampler.generation_kwargs["logit_bias"] = {end: 5.0} | dict.fromkeys(banned, 20.0)
        _, sampled, *_ = sampler.generate(ids, images, 1)
        assert end in {row[-1] for row in sampled if len(row) < TOKENS}
        assert not any({*ends, *banned} & set(row[:-1]) or row[-1] in banned for row in sampled)
    del sampler.generation_kwargs["logit_bias"]


def test_images_that_touch_stay_apart(trainer):
    """No chat template writes this; a run of tokens is then two images' and not one's."""
    ids, images = prompts_of(trainer)
    two, shown = ids[2], images[2]
    image_token = trainer.processing_class.image_token_id
    lengths = trainer.vllm_generation._image_tokens(shown)
    first = two.index(image_token)
    touching = two[:first] + [image_token] * sum(lengths) + two[first + lengths[0] + 2 + lengths[1] :]
    assert touching.count(image_token) == two.count(image_token) and len(touching) == len(two) - 2
    prompt_ids, *_ = trainer.vllm_generation.generate([touching], [shown], 1)
    assert list(prompt_ids[0]) == touching


def test_a_step_of_training_meets_its_own_figures(trainer):
    trainer.train()
    logged = [line for line in trainer.state.log_history if "sampling/sampling_logp_difference/mean" in line]
    assert len(logged) == 2 and all(line["sampling/effective_sample_size"] > 0.95 for line in logged)
    # the passes count visual tokens, which sampling excludes: little probability here, none in a trained model
    assert all(0 <= line["sampling/sampling_logp_difference/mean"] < 0.06 for line in logged)


def test_expanded_tokens_as_trl_passes_them_are_refused(trainer, monkeypatch):
    """Without the collapse vLLM expands again: never silently."""
    ids, images = prompts_of(trainer)
    monkeypatch.setattr(vllm_sampler, "collapsed", lambda ids, lengths, token: ids)
    with pytest.raises(R1VError, match="another prompt than is trained on"):
        trainer.vllm_generation.generate([ids[0]], [images[0]], 1)


def test_what_the_recipe_says_of_the_engine_reaches_it(tmp_path, monkeypatch):
    """Memory share, sleep mode (which needs a GPU), and a length that follows the recipe's prompts and completions."""
    given = {}

    class Engine:
        def __init__(self, **kwargs):
            given.update(kwargs)
            raise ValueError("No available memory for the cache blocks.")

    monkeypatch.setattr(vllm_generation, "LLM", Engine)
    sets = [
        "vllm_gpu_memory_utilization=0.25",
        "vllm_enable_sleep_mode=true",
        "use_vllm=true",
        "max_completion_length=40",
    ]
    recipe = recipes.load("grpo", "tiny", ["data.max_prompt_tokens=300", *(f"train.{s}" for s in sets)])
    args = grpo_config(recipe, RunDir(tmp_path))
    folder = save_tiny(tmp_path / "model", width=128)
    with pytest.raises(UsageError, match="vLLM cannot start: No available memory"):
        make_trainer(folder, tmp_path, **{k: v for k, v in vars(args).items() if k.startswith("vllm_")})
    assert given["gpu_memory_utilization"] == 0.25 and given["enable_sleep_mode"] and given["max_model_len"] == 340
    assert given["dtype"] == "float32" and given["model"] == str(folder)
