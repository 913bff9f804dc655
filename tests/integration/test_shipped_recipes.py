"""Every shipped recipe becomes the installed TRL's own config, with the settings of the run that it reproduces."""

from __future__ import annotations

import datasets
import pytest
from accelerate import DeepSpeedPlugin
from deepspeed.utils.config import get_timers_config
from PIL import Image
from tiny_models import tiny_processor
from trl import GRPOConfig

from r1vfree_cli.config import recipes
from r1vfree_cli.models import family
from r1vfree_cli.models.lengths import drop_long_prompts
from r1vfree_cli.run.run_dir import RunDir
from r1vfree_cli.training import grpo, sft
from r1vfree_cli.training import worker as common
from tests.published import config

QUESTION = "How many people in this picture wear a hat, and what are the others holding in their hands?"

# One process without GPUs: what TRL makes of `train` does not depend on it.
HERE = ["launch.preset=ddp", "launch.device=cpu"]
# The GRPO of TRL 0.14, which the runs used; TRL 1.16's defaults are others.
PINNED = {
    "beta": 0.04,
    "loss_type": "grpo",
    "scale_rewards": "group",
    "importance_sampling_level": "token",
    "num_iterations": 1,
    "epsilon": 0.2,
    "temperature": 1.0,
    "top_p": 1.0,
    "top_k": 0,
    "repetition_penalty": 1.0,
    "learning_rate": 1e-6,
    "lr_scheduler_type": "linear",
    "num_generations": 8,
    "per_device_train_batch_size": 8,  # TRL counts completions: 1 prompt
    "gradient_accumulation_steps": 2,
    "generation_batch_size": 16,
    "max_completion_length": 512,
    "bf16": True,
    "logging_steps": 1,
    "save_strategy": "steps",
    "save_steps": 100,
    "use_vllm": False,
    "report_to": [],
}
REPRODUCTIONS = [
    *("grpo/qwen2vl-2b-clevr", "grpo/qwen2vl-7b-clevr", "grpo/qwen2vl-2b-rlhfv"),
    *("grpo/qwen25vl-3b-rlhfv", "grpo/qwen25vl-7b-rlhfv"),
]
# What the others share with them; group size, memory and steps are their own.
ALGORITHM = ["beta", "loss_type", "scale_rewards", "temperature", "top_p", "top_k", "lr_scheduler_type", "bf16"]
ALGORITHM += ["max_completion_length", "save_steps", "use_vllm", "report_to"]


@pytest.mark.parametrize("name", recipes.shipped("grpo"))
def test_grpo_recipes_become_trl_configs(name, tmp_path):
    recipe = recipes.load("grpo", name, HERE)
    args = grpo.grpo_config(recipe, RunDir(tmp_path))
    assert args.reward_weights == [r.weight for r in recipe.rewards]
    if "tiny" in name:
        return
    same = PINNED if name in REPRODUCTIONS else {key: PINNED[key] for key in ALGORITHM}
    assert {key: getattr(args, key) for key in same} == same
    if name in REPRODUCTIONS:  # where memory asks for it, which changes no number
        assert args.gradient_checkpointing == ("7b" in name)
    assert args.num_train_epochs == (10 if "rlhfv" in name else 2)
    if name not in REPRODUCTIONS:  # 12 or 8 questions a step, in groups that fit the memory
        questions = args.gradient_accumulation_steps * recipes.load("grpo", name).launch.processes
        assert questions == (12 if "rlhfv" in name else 8) and args.per_device_train_batch_size in (4, 8)
        assert (args.learning_rate == 1e-5) == (recipe.model.lora is not None)


@pytest.mark.parametrize("name", [n for n in recipes.shipped() if "tiny" not in n and not n.startswith("eval/")])
def test_a_row_at_a_recipes_own_pixel_cap_fits_its_prompt_limit(name, tmp_path):
    """With a vocabulary of little but letters, so that a real one leaves room for a question three times as long."""
    stage, short = name.split("/")
    recipe = recipes.load(stage, short)
    processor = tiny_processor(config(recipe.model.name).model_type)
    pixels = recipe.model.min_pixels, recipe.model.max_pixels
    family.limit_pixels(family.of(config(recipe.model.name)), processor, *pixels)
    sides = [(616, 616), (784, 512), (512, 784), (4000, 3000), (3000, 4000), (2000, 200), (100, 9000)]
    photos = [{"images": [Image.new("L", size)], "problem": QUESTION} for size in sides]
    features = {"images": datasets.List(datasets.Image()), "problem": datasets.Value("string")}
    rows = datasets.Dataset.from_list(photos, features=datasets.Features(features))
    kept, dropped = drop_long_prompts(rows, processor, recipe.data.max_prompt_tokens, recipe.policy_prompt)
    assert (len(kept), dropped) == (len(sides), 0)
    tokens = max(processor._get_num_multimodal_tokens(image_sizes=[s[::-1] for s in sides])["num_image_tokens"])
    assert 0.9 * pixels[1] < tokens * (2 * processor.image_processor.patch_size) ** 2 <= pixels[1]


def test_bfloat16_under_zero_on_the_cpu_is_a_config(tmp_path):
    """`launch.device: cpu` runs any preset. transformers takes bfloat16 without GPU only with use_cpu, which DeepSpeed
    cannot have."""
    recipe = recipes.load("grpo", "qwen25vl-3b-rlhfv", ["launch.device=cpu"])
    with common.refusals(recipe):
        assert GRPOConfig(str(tmp_path), bf16=True, use_cpu=False).bf16


@pytest.mark.parametrize("name", recipes.shipped("sft"))
def test_sft_recipes_become_trl_configs(name, tmp_path):
    args = sft.sft_config(recipes.load("sft", name, HERE), RunDir(tmp_path))
    assert args.max_length is None and args.report_to == []  # rows are dropped, never cut
    if "tiny" not in name:
        assert (args.learning_rate, args.lr_scheduler_type, args.num_train_epochs) == (2e-5, "cosine", 1)
        assert (args.per_device_train_batch_size, args.gradient_accumulation_steps) == (4, 4)
        assert args.gradient_checkpointing and args.bf16 and args.get_warmup_steps(1000) == 100


def test_deepspeed_does_not_wait_for_the_gpu_in_each_forward_pass():
    """Its throughput timer does from the third step on, which ended every run on a GPU: no capture can hold a wait."""
    plugin = DeepSpeedPlugin(zero_stage=2)
    assert get_timers_config(plugin.deepspeed_config).enabled
    common.without_throughput_timer(plugin)
    assert not get_timers_config(plugin.deepspeed_config).enabled
