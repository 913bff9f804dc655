"""The shipped LoRA recipes in the tiny size: a step with the judge at an endpoint, merged, and asked as an evaluation asks."""

from __future__ import annotations

import io
import threading

import pytest
import torch
from judge_servers import JudgeServer
from safetensors.torch import load_file
from tiny_models import draw, draw_rows, save_tiny, write_rows

from r1vfree_cli.config import recipes
from r1vfree_cli.core.prompts import build_messages
from r1vfree_cli.eval.generate import Generator, Job
from r1vfree_cli.run.attempt import Attempt
from r1vfree_cli.run.run_dir import RunDir
from r1vfree_cli.training import grpo, merge
from r1vfree_cli.training import worker as common

SMALL = [
    "model.dtype=float32",
    "model.min_pixels=784",
    "model.max_pixels=3136",
    "launch.preset=cpu",
    "train.max_steps=1",
]
SMALL += ["train.gradient_accumulation_steps=1", "train.max_completion_length=4", "train.learning_rate=0.1"]
SMALL += ["train.save_strategy=no", "rewards.feedback.canaries=null"]


@pytest.mark.parametrize("name", [n for n in recipes.shipped("grpo") if "lora" in n])
def test_a_lora_recipe_is_trained_merged_and_evaluated(name, tmp_path, monkeypatch):
    monkeypatch.setattr(common, "_stop", threading.Event())
    monkeypatch.setenv("R1V_CACHE", str(tmp_path / "cache"))
    torch.set_num_threads(1)
    base = save_tiny(tmp_path / "model")
    data = write_rows(tmp_path / "data", draw_rows(2))
    with JudgeServer() as server:
        here = [f"model.name={base}", f"data.path={data}", f"rewards.feedback.base_url={server.url}"]
        document = recipes.load_document(recipes.shipped()[name], [*SMALL, *here])
        (tmp_path / "own.py").write_text(
            "def letters(completions, **_):\n    return [float(len(set(str(c)))) for c in completions]\n"
        )
        document["rewards"].append({"name": f"{tmp_path}/own.py:letters"})  # a tiny model's replies have no answer
        recipe = recipes.validate("grpo", document, name)
        assert recipe.model.lora and recipe.model.freeze_vision
        recipe.model.lora.quantize = None  # bitsandbytes is of GPUs
        run = RunDir(tmp_path / "run")
        run.begin(recipes.to_yaml(recipe), resume=False)
        grpo.main(recipe, Attempt.of(run))
        assert all(r["model"] == recipe.every_judge[0].model for r in server.requests) and server.requests
    merge.merge(run.final, tmp_path / "merged")
    before, after = load_file(base / "model.safetensors"), load_file(tmp_path / "merged" / "model.safetensors")
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    assert changed and not any("visual" in key for key in changed)

    buffer = io.BytesIO()
    draw(0, (56, 56)).save(buffer, "PNG")
    replies = []
    for folder in (run.final, tmp_path / "merged"):
        generator = Generator(str(folder), max_new_tokens=4, device="cpu")
        generator.run([Job("1", build_messages("Why?"), buffer.getvalue())], 1, lambda job, said: replies.append(said))
    assert replies[0] == replies[1] and replies[0].text
