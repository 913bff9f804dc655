"""What is asked of the current weights while training, and their replies, generated without touching the training's RNG."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

import torch
from accelerate.utils import gather_object
from transformers import GenerationConfig
from trl import GRPOTrainer
from trl.data_utils import prepare_multimodal_messages

from ..models.sampling import keyed_draws, watch_logits
from .trainer import R1VGRPOTrainer

Interval = tuple[float, float, float]  # value, low, high


@dataclass(frozen=True)
class Scored:
    """metrics: name -> value with its 95% interval. judged: judge -> its score of each reply, None where there is none."""

    metrics: dict[str, Interval]
    judged: dict[str, list[float | None]] = field(default_factory=dict)


@dataclass(frozen=True)
class Exam:
    """`n` questions; `get(i)` is the conversation of one and its images, `question(i)` is text for people.

    `score` runs on rank 0 alone where a judge is asked.
    """

    name: str
    n: int
    get: Callable[[int], tuple[list[dict], list[Any]]]
    score: Callable[[list[str]], Scored]
    question: Callable[[int], str]


def replies(trainer: R1VGRPOTrainer, exam: Exam, *, greedy: bool) -> list[str]:
    """One reply to each question, on every rank; all ranks must call it. Training's random numbers stay as they are."""
    model = trainer.model
    was_training = model.training
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    model.eval()
    try:
        with torch.random.fork_rng(devices):
            return _generate_all(trainer, exam, greedy=greedy)
    finally:
        model.train(was_training)


def _generate_all(trainer: R1VGRPOTrainer, exam: Exam, *, greedy: bool) -> list[str]:
    world, rank = trainer.accelerator.num_processes, trainer.accelerator.process_index
    share = -(-exam.n // world)
    size = trainer.args.per_device_train_batch_size * (trainer.args.steps_per_generation or 1)
    texts: list[str] = []
    for start in range(rank * share, (rank + 1) * share, size):
        # Under ZeRO-3 all ranks generate together, so the last ones repeat questions that are thrown away below.
        numbers = range(start, min(start + size, (rank + 1) * share))
        batch = [exam.get(min(i, exam.n - 1)) for i in numbers]
        texts += _generate(trainer, batch, first=start, greedy=greedy)
    return gather_object(texts)[: exam.n]


def _generate(
    trainer: R1VGRPOTrainer, batch: list[tuple[list[dict], list[Any]]], *, first: int, greedy: bool
) -> list[str]:
    prompts = [prepare_multimodal_messages(messages, images=images) for messages, images in batch]
    prompt_ids, images, fields = GRPOTrainer._tokenize_prompts(trainer, prompts)
    draws = keyed_draws((trainer.args.seed, 1), range(first, first + len(batch)), trainer.max_completion_length)
    watching = watch_logits(trainer.accelerator.unwrap_model(trainer.model))
    with _greedy(trainer) if greedy else draws, watching as logits:
        ids, _ = GRPOTrainer._generate_single_turn(trainer, prompt_ids, images, fields, 1)
    trainer.stop_unless_finite(logits)
    return trainer._tokenizer.batch_decode(ids, skip_special_tokens=True)


def _greedy(trainer: R1VGRPOTrainer) -> AbstractContextManager:
    if trainer.use_vllm:
        backend = trainer.vllm_generation
        return patch.multiple(backend, temperature=0, top_p=1, top_k=0, min_p=0, repetition_penalty=1)
    sampling = trainer.generation_config
    kept = ("max_new_tokens", "eos_token_id", "pad_token_id", "bos_token_id", "suppress_tokens")
    greedy = GenerationConfig(do_sample=False, disable_compile=True, **{name: getattr(sampling, name) for name in kept})
    return patch.object(trainer, "generation_config", greedy)
