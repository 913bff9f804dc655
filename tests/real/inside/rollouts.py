"""A trainer whose rollouts a real vLLM draws, and what their log-probabilities must be. All in float32 unless asked."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

import torch
from datasets import Dataset, Features, Image, List, Value
from tiny_models import draw, load_tiny
from trl import GRPOConfig
from trl.data_utils import prepare_multimodal_messages

from r1vfree_cli.models import family
from r1vfree_cli.training.trainer import R1VGRPOTrainer
from r1vfree_cli.training.vllm_sampler import VLLMSampler

G, TOKENS = 4, 24
LIMITS = (2 * 32 * 32, 6 * 32 * 32)  # pixels; the checkpoint's own are 28 x 28 to 84 x 84
# (question, image sizes): one image, text alone, two images of other sizes, one that the limits shrink and one they grow
PROMPTS = (
    ("What colour is the square?", [(64, 96)]),
    ("Is there a circle?", []),
    ("Which of the two is larger?", [(96, 64), (64, 64)]),
    ("Yes or No?", [(200, 150)]),
    ("How many?", [(32, 32)]),
)
SAME = 2e-5  # largest difference of log-probabilities in float32
FEATURES = Features({"prompt": List({"role": Value("string"), "content": Value("string")}), "images": List(Image())})


@contextmanager
def engine(**given) -> Iterator[None]:
    """While active, engines are made with `given` too, little room for keys and values, and without vLLM's
    collections of what was imported, which take longer than all else."""
    init = VLLMSampler._init_vllm

    def made(self):
        self._engine.update(given, num_gpu_blocks_override=64)
        gc.freeze()
        init(self)

    with patch.object(VLLMSampler, "_init_vllm", made):
        yield


def make_trainer(folder, out, prompts=PROMPTS, peft_config=None, **given) -> R1VGRPOTrainer:
    model, processor = load_tiny(folder)
    model.generation_config.eos_token_id.append(processor.tokenizer.convert_tokens_to_ids("?"))
    family.edge_limits(processor, *LIMITS)
    rows = [
        {"prompt": [{"role": "user", "content": text}], "images": [draw(10 * i + j, s) for j, s in enumerate(sizes)]}
        for i, (text, sizes) in enumerate(prompts)
    ]
    settings = {
        "output_dir": str(out), "num_generations": G, "per_device_train_batch_size": G, "max_completion_length": TOKENS,
        "use_vllm": True, "vllm_mode": "colocate", "vllm_max_model_length": 512, "beta": 0.0, "learning_rate": 1e-3,
        "max_steps": 2, "bf16": False, "use_cpu": True, "report_to": "none", "logging_steps": 1, "save_strategy": "no",
        "disable_tqdm": True,
    }  # fmt: skip
    args = GRPOConfig(**(settings | given))
    return R1VGRPOTrainer(
        model=model,
        reward_funcs=[lambda completions, **_: [float(len(c[0]["content"]) % 7) for c in completions]],
        args=args,
        train_dataset=Dataset.from_list(rows, features=FEATURES),
        processing_class=processor,
        peft_config=peft_config,
        shared_prefix=True,
    )


def prompts_of(trainer, prompts=PROMPTS) -> tuple[list[list[int]], list[list]]:
    """Token ids as the trainer makes them, and images, of all prompts."""
    ids, images = [], []
    for i, (text, sizes) in enumerate(prompts):
        shown = [draw(10 * i + j, s) for j, s in enumerate(sizes)]
        made = trainer.processing_class.apply_chat_template(
            prepare_multimodal_messages([{"role": "user", "content": text}], images=shown),
            tokenize=True, add_generation_prompt=True, return_dict=True,
        )  # fmt: skip
        ids.append(list(made["input_ids"][0]))
        images.append(shown or None)
    return ids, images


def expected(trainer, model, prompt: list[int], images, completion: list[int]) -> torch.Tensor:
    """Log-probabilities of the completion by transformers' own pass, visual tokens excluded as in sampling."""
    ids = torch.tensor([prompt + completion])
    shown: dict = {}
    image_token = trainer.processing_class.image_token_id
    if images:
        made = trainer.processing_class.image_processor(images=images, return_tensors="pt")
        shown = {k: made[k] for k in ("pixel_values", "image_grid_thw")}
    with torch.no_grad():
        logits = model(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            mm_token_type_ids=(ids == image_token).int(),
            use_cache=False,
            **shown,
        ).logits[0, len(prompt) - 1 : -1]
    logits[
        :, sorted(set(family.of(model.config).visual_tokens(model.config, trainer._tokenizer).values()))
    ] = -torch.inf
    return logits.log_softmax(-1).gather(1, torch.tensor(completion)[:, None])[:, 0]


def differences(trainer, ids, images, sampled, logprobs, model=None) -> torch.Tensor:
    """Of every sampled token's log-probability as vLLM told it from that of `model`, else the trainer's."""
    found = []
    for i, (completion, logps) in enumerate(zip(sampled, logprobs, strict=True)):
        wanted = expected(trainer, model or trainer.model, ids[i], images[i], completion)
        found.append((wanted - torch.tensor(logps)[:, 0]).abs())
    return torch.cat(found)
